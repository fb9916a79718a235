//! 32-bit code end to end: bare kernels that begin in protected mode, and a 32-bit program on a stock kernel. Each is recorded and replayed.
mod common;

use std::io::Write;
use std::path::Path;
use std::process::Command;

use common::{Ended, Twinstep, boot_image, folder, guest, text, turn, twinstep, words};
use serde_json::Value;

/// Builds a source of `tests/bare` as a 32-bit program.
fn build(source: &str, to: &Path, more: &[&str]) -> String {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bare");
    let status = Command::new("cc")
        .args(["-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-o"])
        .arg(to)
        .args(more)
        .arg(sources.join(source))
        .current_dir(&sources)
        .status()
        .expect("a C compiler");
    assert!(status.success(), "cc cannot make a 32-bit program of {source}: {status}");
    text(to)
}

/// What the bare kernel tells about itself, but for how it was booted.
const TOLD: &str = "own tables
[00000040 level 00000000 ]
[00000003 error 00000000 level 00000000 ]
[00000004 error 00000000 level 00000000 ]
[00000005 error 00000000 level 00000000 ]
[00000006 error 00000000 level 00000000 ]
[00000000 error 00000000 level 00000000 ]
[0000000D error 00000000 level 00000000 ]
[0000000D error 00000000 level 00000000 ]
[0000000D error 00000000 level 00000000 ]
[0000000D error 00001230 level 00000000 ]
segments
12345678  through a page; entries 00200063 00400083 
[0000000E error 00000000 at 00801000 level 00000000 ]
[0000000E error 00000003 at 00800000 level 00000000 ]
0000004D  through another
12345678  through PAE
[0000000E error 00000000 at 40000000 level 00000000 ]
compatibility mode
11223344  from 64-bit code
protected mode again
00222111  through a call gate
[00000041 00000000 level 00000003 ]
[0000000D error 00000000 level 00000003 ]
[00000041 00000006 level 00000003 ]
by SYSENTER
back by SYSEXIT
done
";

fn replay(recording: &str, more: &[&str]) -> Value {
    twinstep(&[&["replay", recording, "--json"], more].concat()).with(0).json()
}

/// Replays to the same digest, also one instruction a block.
fn replays_alike(recording: &str) {
    let plain = replay(recording, &[]);
    assert!(plain["end"].as_str().is_some_and(|end| end.contains("complete")), "{plain}");
    let one_by_one = replay(recording, &["--block", "1"]);
    assert_eq!((&one_by_one["digest"], &one_by_one["position"]), (&plain["digest"], &plain["position"]));
}

fn bare(more: &[&str], arguments: &[&str]) -> (Ended, tempfile::TempDir) {
    let place = folder();
    let path = |name: &str| text(&place.path().join(name));
    let script = "-Wl,-T,kernel.ld";
    let kernel = build("kernel.S", &place.path().join("kernel"), &[&[script], more].concat());
    std::fs::write(path("module"), b"a module\0").unwrap();
    let recording = path("recording");
    let machine = ["--kernel", &kernel, "--initrd", &path("module"), "--mem", "64M", "--cmdline", "hello 32", "--no-input"];
    let ended = Twinstep::run(&[&words(&machine), &words(&["--record", &recording]), &words(arguments)]).end();
    (ended, place)
}

#[test]
fn a_multiboot_kernel() {
    let _turn = turn(1);
    let (ended, place) = bare(&[], &["--debug-exit"]);
    let ended = ended.with(33).says(&["the guest ended with status 33"]);
    let first = "multiboot: kernel hello 32\nmodule: a module\nmemory: 0000027F \n";
    assert_eq!(ended.console, format!("{first}{TOLD}"));
    replays_alike(&text(&place.path().join("recording")));
}

#[test]
fn a_pvh_kernel() {
    let _turn = turn(1);
    let (ended, place) = bare(&["-DPVH_ONLY"], &["--debug-exit"]);
    let first = "pvh: hello 32\nmodule: a module\nmap of several ranges\n";
    assert_eq!(ended.with(33).console, format!("{first}{TOLD}"));
    replays_alike(&text(&place.path().join("recording")));
}

/// Without the port nothing happens: the kernel goes to sleep with interrupts off.
#[test]
fn without_a_debug_exit_port() {
    let _turn = turn(1);
    let place = folder();
    let kernel = build("kernel.S", &place.path().join("kernel"), &["-Wl,-T,kernel.ld"]);
    std::fs::write(place.path().join("module"), b"m\0").unwrap();
    let module = text(&place.path().join("module"));
    let vm = Twinstep::run(&[&words(&["--kernel", &kernel, "--initrd", &module, "--mem", "64M", "--no-input"])]);
    vm.wait_console("done\n");
    vm.signal(rustix::process::Signal::TERM);
    vm.end().with(5);
}

/// One file as an archive that can follow another initramfs.
fn archive(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, mode, contents) in [(name, 0o100_755, contents), ("TRAILER!!!", 0, &[][..])] {
        let fields = [1, mode, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0];
        out.extend(b"070701");
        out.extend(fields.iter().flat_map(|f| format!("{f:08x}").into_bytes()));
        out.extend(name.bytes().chain([0]));
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(contents);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

#[test]
fn a_32_bit_program_on_a_stock_kernel() {
    let _turn = turn(1);
    let place = folder();
    let path = |name: &str| text(&place.path().join(name));
    let program = build("program.S", &place.path().join("program"), &[]);
    let mut initrd = std::fs::read(&guest().initrd).unwrap();
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.write_all(&archive("program", &std::fs::read(program).unwrap())).unwrap();
    std::fs::write(path("initrd"), initrd).unwrap();
    let image = common::Image { kernel: guest().kernel.clone(), initrd: path("initrd") };
    let recording = path("recording");
    let mut vm = Twinstep::run(&[
        &boot_image(&image, "128M", &twinstep_host::guest::command_line("shell", None)),
        &words(&["--record", &recording]),
    ]);
    vm.wait_console("TWINSTEP READY shell");
    vm.wait_console("# ");
    vm.type_line("/program; echo status $?; poweroff -f");
    let told = "32-bit program\r\nby the vDSO\r\nthread-local storage\r\na limit\r\ninstructions\r\na child\r\nstatus 42\r\n";
    vm.end().with(0).shows(told);
    replays_alike(&recording);
}
