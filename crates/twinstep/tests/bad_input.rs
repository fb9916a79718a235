//! What people get wrong: each mistake is answered by a sentence that names the thing and says what to do, and by a status that is not 0.
mod common;

use std::fs::File;
use std::io::Read;
use std::process::Command;

use common::{Ended, Twinstep, boot, folder, guest, text, turn, twinstep, words};

/// `twinstep run` of something that must not start.
#[track_caller]
fn run(arguments: &[&str]) -> Ended {
    let ended = twinstep(&[&["run"], arguments].concat());
    assert!(ended.console.is_empty(), "it must not boot: {ended:#?}");
    ended
}

#[test]
fn kernels() {
    let folder = folder();
    let missing = text(&folder.path().join("vmlinuz"));
    run(&["--kernel", &missing]).refused(&[&missing, "No such file", "check --kernel"]);
    run(&["--kernel", &text(folder.path())]).refused(&[&text(folder.path()), "check --kernel"]);
    // Something else; something else that is short; a real one that is cut.
    let (other, short, cut) = (folder.path().join("other"), folder.path().join("short"), folder.path().join("cut"));
    std::fs::copy(&guest().initrd, &other).unwrap();
    std::fs::write(&short, b"MZ").unwrap();
    let kernel = std::fs::read(&guest().kernel).unwrap();
    std::fs::write(&cut, &kernel[..kernel.len() / 2]).unwrap();
    for (file, why) in [(other, "none of these: a Linux bzImage"), (short, "none of these"), (cut, "not a bzImage")] {
        run(&["--kernel", &text(&file)]).refused(&[&text(&file), why, "what to do"]);
    }
    // ELF images that cannot be booted: this very program, and the beginning of one.
    let (program, torn) = (env!("CARGO_BIN_EXE_twinstep"), folder.path().join("torn"));
    run(&["--kernel", program]).refused(&[program, "neither a PVH note nor a multiboot header", "what to do"]);
    std::fs::write(&torn, b"\x7fELF\x01\x01").unwrap();
    run(&["--kernel", &text(&torn)]).refused(&[&text(&torn), "the ELF image cannot be booted", "what to do"]);
    run(&[]).refused(&["nothing to boot", "--kernel FILE"]);
}

#[test]
fn initial_ram_file_systems() {
    let folder = folder();
    let (missing, large) = (text(&folder.path().join("missing")), folder.path().join("large"));
    let kernel = &guest().kernel;
    run(&["--kernel", kernel, "--initrd", &missing]).refused(&[&missing, "No such file", "check --initrd"]);
    File::create(&large).unwrap().set_len(100 << 20).unwrap();
    run(&["--kernel", kernel, "--initrd", &text(&large), "--mem", "128M"]).refused(&["100 MiB does not fit", "--mem"]);
}

#[test]
fn machines() {
    let kernel = &guest().kernel;
    run(&["--kernel", kernel, "--cpu", "i486"]).refused(&["no CPU model 'i486'", "x86-64-v2"]);
    run(&["--kernel", kernel, "--mem", "1M"]).refused(&["1 MiB of RAM is outside", "--mem"]);
    run(&["--kernel", kernel, "--mem", "9999G"]).refused(&["is outside", "--mem"]);
    run(&["--kernel", kernel, "--mem", "much"]).refused(&["'much' is no amount of memory", "512M or 2G"]);
    run(&["--kernel", kernel, "--cmdline", &"x".repeat(5000)]).refused(&["command line has 5000 bytes", "--cmdline"]);
    for net in ["", "wifi", "user,forward=22", "user,mac=1:2", "switch=/nowhere,forward=1:2"] {
        run(&["--kernel", kernel, "--net", net]).refused(&["means nothing", "write it as user"]);
    }
    run(&["--kernel", kernel, "--net", "switch=/no/where"]).refused(&["/no/where", "twinstep switch --listen"]);
    run(&["--kernel", kernel, "--net", "passt=/no/where"]).refused(&["/no/where"]);
    run(&["--kernel", kernel, "--protect", "127.0.0.1:1"]).refused(&["--arbiter"]);
}

#[test]
fn arbiters() {
    twinstep(&["standby", "--listen", "127.0.0.1:0"]).refused(&["--arbiter"]);
    let protect = |more: &[&str]| run(&[&["--kernel", &guest().kernel, "--protect", "127.0.0.1:1", "--arbiter"], more].concat());
    protect(&["http://localhost"]).refused(&["http://", "etcd://HOST"]);
    protect(&["etcds://localhost"]).refused(&["--arbiter-ca"]);
    protect(&["etcd://localhost", "--arbiter-user", "me"]).refused(&["--arbiter-password-file"]);
    protect(&["/tmp", "--arbiter-user", "me"]).refused(&["is for etcd"]);
    // Nobody listens at the first port.
    for command in
        [&["run", "--kernel", &guest().kernel, "--protect", "127.0.0.1:1"][..], &["standby", "--listen", "127.0.0.1:0"]]
    {
        let ended = twinstep(&[command, &["--arbiter", "etcd://127.0.0.1:1"]].concat());
        ended.refused(&["etcd at 127.0.0.1:1 cannot be the arbiter", "start etcd there"]);
    }
}

#[test]
fn configuration_files() {
    let folder = folder();
    let path = folder.path().join("vm.toml");
    let name = text(&path);
    run(&[&name]).refused(&[&name, "No such file"]);
    for (content, complaint) in [
        ("kernal = '/boot/vmlinuz'", "unknown field `kernal`"),
        ("kernel = 5", "kernel = 5"),
        ("mem = 'much'", "no amount of memory"),
        ("net = ['wifi']", "means nothing"),
        ("this is no TOML", "TOML"),
    ] {
        std::fs::write(&path, content).unwrap();
        run(&[&name]).refused(&[&name, complaint]);
    }
}

#[test]
fn disks() {
    let _turn = turn(1);
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let with = |disk: &str| run(&["--kernel", &guest().kernel, "--disk", disk]);
    with(&text(&path("missing"))).refused(&["missing", "create it first"]);
    with(&text(folder.path())).refused(&["not a folder"]);
    with(&format!("{},rw", text(&path("x")))).refused(&["'rw' in the disk", "PATH,ro"]);
    File::create(path("odd")).unwrap().set_len(1000).unwrap();
    with(&text(&path("odd"))).refused(&["odd", "1000 bytes", "truncate"]);

    let disk = text(&path("disk"));
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let mut vm = Twinstep::run(&[&boot("128M", "shell"), &words(&["--disk", &disk])]);
    vm.wait_console("TWINSTEP READY shell");
    with(&disk).refused(&[&disk, "in use by another process"]);
    with(&format!("{disk},ro")).refused(&[&disk, "in use by another process"]);
    vm.type_line("poweroff -f");
    vm.end().with(0);
}

#[test]
fn a_disk_that_is_full_when_a_recording_begins() {
    let vm = Twinstep::run(&[&boot("128M", "none"), &words(&["--record", "/dev/full"])]);
    vm.end().refused(&["cannot write the recording /dev/full", "No space left", "make room"]);
}

#[test]
fn a_recording_that_fails_later_does_not_stop_the_guest() {
    let _turn = turn(1);
    let folder = folder();
    // A pipe stands for the disk: it takes what comes until its reader goes away. It needs no root, and no moment to be guessed.
    let pipe = folder.path().join("recording");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut vm = Twinstep::run(&[&boot("128M", "shell"), &words(&["--record", &text(&pipe)])]);
    let mut reader = File::open(&pipe).unwrap();
    let (stop, stopped) = std::sync::mpsc::channel();
    let drain = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while stopped.try_recv().is_err() && reader.read(&mut buffer).unwrap() > 0 {}
    });
    vm.wait_console("TWINSTEP READY shell");
    stop.send(()).unwrap();
    // The recorder writes in large pieces, so the guest must make some log.
    vm.type_line("until [ -e /tmp/enough ]; do echo and on and on and on; done");
    drain.join().unwrap();
    vm.wait_said("the guest runs on without being recorded");
    vm.signal(rustix::process::Signal::TERM);
    vm.end().with(5).says(&["recording-failed: cannot write the recording"]);
}

#[test]
fn recordings_and_snapshots_that_are_none() {
    let folder = folder();
    let (missing, foreign) = (text(&folder.path().join("missing")), text(&folder.path().join("foreign")));
    std::fs::write(&foreign, "something else").unwrap();
    twinstep(&["replay", &missing]).refused(&["cannot open the recording", &missing, "No such file"]);
    twinstep(&["replay", &foreign]).refused(&["cannot use the recording", &foreign, "not a Twinstep recording"]);
    twinstep(&["run", "--from", &missing]).refused(&["cannot open the snapshot", &missing]);
    twinstep(&["run", "--from", &foreign]).refused(&["cannot use the snapshot", &foreign, "not a Twinstep"]);
    twinstep(&["run", "--record", "/no/where/recording", "--kernel", &guest().kernel])
        .refused(&["cannot create the recording /no/where/recording"]);
}

#[test]
fn wrong_command_lines() {
    for arguments in [&["fly"][..], &["run", "--fast"], &["replay"], &["standby"], &["demo", "--kills", "many"]] {
        let ended = twinstep(arguments).with(2);
        assert!(ended.said.contains("--help"), "{ended:#?}");
    }
}
