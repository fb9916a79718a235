//! `twinstep run` as people use it: stock kernels boot, every way to end has its status, and what is plugged in works.
mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use common::{PATIENCE, Twinstep, boot, boot_image, boot_with_network, build, folder, guest, text, turn, twinstep, words};
use rustix::process::Signal;
use twinstep_host::guest::{Kind, command_line};
use twinstep_host::packages::KernelLine;
use twinstep_host::passt::free_port;

/// A shell on the serial port that has shown its prompt.
fn shell(mem: &str, more: &[String]) -> Twinstep {
    let vm = Twinstep::run(&[&boot(mem, "shell"), more]);
    vm.wait_console("TWINSTEP READY shell");
    vm.wait_console("# ");
    vm
}

/// A guest's `free -m`.
fn total_mib(console: &str) -> u64 {
    let line = console.lines().find(|line| line.starts_with("Mem:")).expect("`free` was shown");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number of MiB")
}

#[test]
fn a_shell_and_a_power_off() {
    let _turn = turn(1);
    let mut vm = shell("128M", &[]);
    vm.type_line("echo six times seven is $((6 * 7)); uname -r");
    vm.wait_console("seven is 42");
    vm.type_line("poweroff -f");
    vm.end().with(0).says(&["the guest switched itself off"]).shows("6.1.");
}

#[test]
fn the_newer_kernel_of_the_backports() {
    let _turn = turn(1);
    let image = match build(Kind::Shell, KernelLine::Backports) {
        Ok(image) => image,
        Err(e) => return eprintln!("skipped: the newer kernel cannot be had: {e}"),
    };
    let vm = Twinstep::run(&[&boot_image(&image, "256M", &command_line("none", None))]);
    vm.end().with(0).shows("TWINSTEP OFF");
}

#[test]
fn a_reset_is_told_from_a_power_off() {
    let _turn = turn(1);
    let mut vm = shell("128M", &[]);
    vm.type_line("reboot -f");
    vm.end().with(4).says(&["the guest asked for a reset"]);
}

#[test]
fn a_panic_ends_as_the_guest_was_told_to() {
    let _turn = turn(1);
    let mut vm = shell("128M", &[]);
    // The command line says panic=-1: reset at once.
    vm.type_line("echo c > /proc/sysrq-trigger");
    vm.end().with(4).shows("Kernel panic - not syncing: sysrq triggered crash");
}

#[test]
fn a_signal_ends_the_machine_in_good_order() {
    let _turn = turn(1);
    let folder = folder();
    let recording = text(&folder.path().join("recording"));
    let vm = shell("128M", &words(&["--record", &recording]));
    vm.signal(Signal::TERM);
    vm.end().with(5).says(&["stopped: signal 15"]);
    let replayed = twinstep(&["replay", &recording]).with(0);
    assert!(replayed.console.contains("the recording is complete"), "{replayed:#?}");
}

/// Debian's kernel unpacks itself at 16 MiB and needs 52 MiB there, so that it does not fit into the smallest machine; but nearly.
#[test]
fn little_ram() {
    let _turn = turn(1);
    Twinstep::run(&[&boot("64M", "none")]).end().with(1).says(&["the kernel needs", "the machine has 64 MiB", "--mem"]);
    let mut vm = shell("80M", &[]);
    vm.type_line("free -m; poweroff -f");
    let total = total_mib(&vm.end().with(0).console);
    assert!((20..80).contains(&total), "{total}");
}

#[test]
fn much_ram() {
    let _turn = turn(1);
    let mut vm = shell("8G", &[]);
    vm.type_line("free -m; poweroff -f");
    let total = total_mib(&vm.end().with(0).console);
    assert!((7500..8192).contains(&total), "{total}");
}

#[test]
fn a_disk_keeps_what_the_guest_writes() {
    let _turn = turn(1);
    let folder = folder();
    let (disk, other) = (folder.path().join("disk"), folder.path().join("other"));
    let mut content: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
    std::fs::write(&disk, &content).unwrap();
    std::fs::write(&other, vec![7; 1 << 20]).unwrap();
    let mut vm = shell("128M", &words(&["--disk", &text(&disk), "--disk", &format!("{},ro,serial=OTHER", text(&other))]));
    vm.type_line("echo disk $(cat /sys/block/vdb/serial) $(cat /sys/block/vdb/ro)");
    vm.wait_console("disk OTHER 1");
    vm.type_line("printf 'written by the guest' | dd of=/dev/vda bs=1 seek=5000 conv=notrunc && sync && echo written: $?");
    vm.wait_console("written: 0");
    vm.type_line("dd if=/dev/zero of=/dev/vdb bs=512 count=1 || echo read-only: $?");
    vm.wait_console("read-only: 1");
    vm.type_line("poweroff -f");
    vm.end().with(0);
    content[5000..5000 + 20].copy_from_slice(b"written by the guest");
    assert!(std::fs::read(&disk).unwrap() == content, "the disk has what the guest wrote and nothing else");
    assert!(std::fs::read(&other).unwrap() == vec![7; 1 << 20], "the read-only disk is untouched");
}

#[test]
fn a_forwarded_port_leads_into_the_guest() {
    let _turn = turn(1);
    let port = free_port().unwrap();
    let vm = Twinstep::run(&[&boot_with_network("256M", "redis", &format!("user,forward={port}:6379"))]);
    vm.wait_console("TWINSTEP READY redis");
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut replies = BufReader::new(client.try_clone().unwrap()).lines();
    for (command, reply) in [("PING", "+PONG"), ("SET a 1", "+OK"), ("INCR a", ":2")] {
        client.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        assert_eq!(replies.next().unwrap().unwrap(), reply);
    }
    client.write_all(b"SHUTDOWN\r\n").unwrap();
    vm.end().with(0).shows("TWINSTEP DONE redis");
}

#[test]
fn a_file_says_what_flags_say() {
    let _turn = turn(1);
    let folder = folder();
    let path = folder.path().join("vm.toml");
    let image = guest();
    let cmdline = command_line("none", None);
    std::fs::write(
        &path,
        format!("kernel = '{}'\ninitrd = '{}'\ncmdline = '{cmdline}'\nmem = '96M'\n", image.kernel, image.initrd),
    )
    .unwrap();
    twinstep(&["run", &text(&path)]).with(0).shows("TWINSTEP OFF");
}
