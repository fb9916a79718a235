//! CPU models beyond x86-64-v2: a stock kernel and a stock OpenSSL find and use what the model has, recordings of it replay alike, and names
//! are checked.
mod common;

use std::path::Path;

use common::{Image, Twinstep, boot_image, folder, guest, text, turn, twinstep, words};
use twinstep_host::guest::{self, cpio::Archive, program_files};
use twinstep_host::packages::{Request, Store, tell_on_stderr};
use twinstep_machine::CpuModel;

/// The guest with OpenSSL in it, by a second archive behind the first.
fn openssl_guest(folder: &Path) -> Image {
    let packages = Store::open().unwrap().fetch(Request::WithLibraries("openssl"), &mut tell_on_stderr).unwrap();
    let mut archive = Archive::new();
    for (path, content) in program_files(&packages, "usr/bin/openssl").unwrap() {
        let folders: Vec<_> = path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect();
        folders.iter().for_each(|folder| archive.folder(folder));
        archive.file(&path, 0o755, &content);
    }
    let mut initrd = std::fs::read(&guest().initrd).unwrap();
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(archive.finish());
    let path = folder.join("initrd");
    std::fs::write(&path, initrd).unwrap();
    Image { kernel: guest().kernel.clone(), initrd: text(&path) }
}

/// What OpenSSL is asked: digests and ciphers with code of their own for every instruction set.
const WORK: &str = "dd if=/dev/zero of=/tmp/z bs=1M count=2 2>/dev/null; \
     for d in sha1 sha256 sha512 sha3-256 blake2b512; do openssl dgst -$d -r /tmp/z; done; \
     for c in aes-128-cbc aes-256-ctr chacha20; do openssl enc -$c -nosalt -K 0102 -iv 03 -in /tmp/z 2>/dev/null | md5sum; done; \
     grep -m1 -o -w -e avx2 -e vaes /proc/cpuinfo; echo the work is done: $?";

/// The lines of a console that hold a digest.
fn digests(console: &str) -> Vec<String> {
    let hex = |word: &str| word.len() >= 32 && word.bytes().all(|b| b.is_ascii_hexdigit());
    console.lines().filter_map(|line| line.split_whitespace().next().filter(|word| hex(word))).map(str::to_owned).collect()
}

#[test]
fn every_model_computes_the_same_and_replays_alike() {
    let _turn = turn(1);
    let folder = folder();
    let image = openssl_guest(folder.path());
    let mut seen = Vec::new();
    for name in CpuModel::NAMES {
        let model = CpuModel::by_name(name).unwrap();
        if !model.missing().is_empty() {
            println!("left out: this host lacks {}, which {name} has", model.missing());
            continue;
        }
        let recording = text(&folder.path().join(format!("{name}.rec")));
        let mut vm = Twinstep::run(&[
            &boot_image(&image, "256M", &guest::command_line("shell", None)),
            &words(&["--cpu", name, "--record", &recording, "--digest-interval", "20000000"]),
        ]);
        vm.wait_console("TWINSTEP READY shell");
        vm.type_line(WORK);
        vm.wait_console(if name == "x86-64-v2" { "the work is done: 1" } else { "the work is done: 0" });
        vm.type_line("poweroff -f");
        let ended = vm.end().with(0);
        let found = digests(&ended.console);
        assert_eq!(found.len(), 8, "{ended:#?}");
        seen.push((name, found));
        let report = twinstep(&["replay", &recording, "--json"]).with(0).json();
        assert!(report["end"].as_str().unwrap().contains("complete"), "{report}");
        assert!(report["digests_checked"].as_u64() > Some(3), "{report}");
        // Cut elsewhere: from the middle, in short blocks.
        let snapshot = text(&folder.path().join("snapshot"));
        let middle = (report["position"].as_u64().unwrap() / 10 * 9).to_string();
        twinstep(&["replay", &recording, "--json", "--until", &middle, "--save", &snapshot]).with(0);
        let rest = twinstep(&["replay", &recording, "--json", "--from", &snapshot, "--block", "3"]).with(0).json();
        assert_eq!((&rest["digest"], &rest["position"]), (&report["digest"], &report["position"]), "{name}");
    }
    for (name, found) in &seen[1..] {
        assert_eq!(*found, seen[0].1, "{name} computes something else");
    }
}

/// A pair on `host-common`: both sides know it by its full name, and the guest outlives its primary with all its registers.
#[test]
fn a_pair_agrees_on_the_full_name() {
    let model = CpuModel::by_name("host-common").unwrap();
    if !model.missing().is_empty() {
        println!("left out: this host lacks {}", model.missing());
        return;
    }
    let _turn = turn(2);
    let folder = folder();
    let arbiter = text(folder.path());
    let listen = words(&["standby", "--listen", "127.0.0.1:0", "--arbiter", &arbiter, "--cpu", "host-common"]);
    let mut standby = Twinstep::start("standby", &listen);
    let address = standby.wait_said("waiting for a primary on ");
    let pair = words(&["--cpu", "host-common", "--protect", &address, "--arbiter", &arbiter]);
    let mut primary = Twinstep::run(&[&boot_image(guest(), "128M", &guest::command_line("shell", None)), &pair]);
    let vm = standby.wait_said("following VM ");
    assert!(vm.contains(&format!("{})", model.name)), "{vm}");
    // Only a standby that has the whole machine can go on.
    primary.wait_said("protected: ");
    primary.wait_console("TWINSTEP READY shell");
    primary.kill();
    standby.wait_said("live: live in epoch 2");
    standby.type_line("grep -c -w avx2 /proc/cpuinfo; poweroff -f");
    standby.end().with(0).shows("poweroff -f\r\n1\r\n");
}

/// The model's name is part of what a standby can be told to expect, and of what it is offered.
#[test]
fn names_are_checked() {
    let kernel = &guest().kernel;
    for wrong in ["x86-64-v4", "host", "host-common+avx512f", "host-common+"] {
        let ended = twinstep(&["run", "--kernel", kernel, "--cpu", wrong]);
        ended.refused(&[&format!("no CPU model '{wrong}'"), "x86-64-v3", "host-common"]);
    }
    let shared = folder();
    twinstep(&["standby", "--listen", "127.0.0.1:0", "--arbiter", &text(shared.path()), "--cpu", "x86-64-v4"])
        .refused(&["no CPU model 'x86-64-v4'"]);
    twinstep(&["doctor"]).with(0).shows("CPU models");
}
