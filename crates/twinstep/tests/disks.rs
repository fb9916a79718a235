//! Disks of a protected VM: mirrored while the guest runs, right after a failover, never stale, repaired; and what one host's disk does is never the guest's.
mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use common::{Twinstep, User, boot, text, turn, vote, words};
use twinstep_host::guest::program_files;
use twinstep_host::packages::{Request, Store, tell_on_stderr};

/// QEMU's tool for images: this machine's own, or Debian's package, which needs no installation.
fn qemu_img(arguments: &[&str]) {
    static PROGRAM: OnceLock<Vec<String>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        if Command::new("qemu-img").arg("--version").output().is_ok() {
            return words(&["qemu-img"]);
        }
        let store = Store::open().expect("the cache folder");
        let packages = store.fetch(Request::WithLibraries("qemu-utils"), &mut tell_on_stderr).expect("the package qemu-utils");
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("qemu-img-{}", std::process::id()));
        for (name, content) in program_files(&packages, "usr/bin/qemu-img").expect("qemu-img and its libraries") {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().expect("it has a folder")).expect("a folder");
            std::fs::write(&path, content).expect("room for a file");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("our own file");
        }
        let within = |name: &str| text(&root.join(name));
        words(&[
            &within("lib64/ld-linux-x86-64.so.2"),
            "--library-path",
            &within("lib/x86_64-linux-gnu"),
            &within("usr/bin/qemu-img"),
        ])
    });
    let output = Command::new(&program[0]).args(&program[1..]).args(arguments).output().expect("qemu-img runs");
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
}

fn sparse(path: &Path, bytes: u64) {
    std::fs::File::create(path).unwrap().set_len(bytes).unwrap();
}

const SIZE: u64 = 64 << 20;

/// Makes a file system, with a file in it, and shows its sum as it is on the disk.
const FILL: &str = "mke2fs -F /dev/vda > /dev/null && mkdir -p /mnt && mount /dev/vda /mnt && yes ABCDEFG | head -c 3000000 > /mnt/f && sync; \
                    echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/f; echo filled $((1 + 1))";
/// Shows it again.
const LOOK: &str = "echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/f; echo looked $((1 + 1))";

/// The sums that the guest has printed.
fn sums(console: &str) -> Vec<&str> {
    let is_sum = |word: &&str| word.len() == 32 && word.bytes().all(|b| b.is_ascii_hexdigit());
    console.split_whitespace().filter(is_sum).collect()
}

/// What a pair is started with.
struct Hosts {
    user: User,
    arbiter: PathBuf,
}

impl Hosts {
    fn new() -> Self {
        let user = User::new();
        let arbiter = user.path().join("arbiter");
        std::fs::create_dir(&arbiter).unwrap();
        Self { user, arbiter }
    }
    fn path(&self, name: &str) -> String {
        text(&self.user.path().join(name))
    }
    fn common(&self, name: &str) -> Vec<String> {
        words(&["--arbiter", &text(&self.arbiter), "--debug-faults", "--name", name])
    }
    fn standby(&self, disk: &str, more: &[&str]) -> (Twinstep, String) {
        self.standby_called("twin", disk, more)
    }
    fn standby_called(&self, name: &str, disk: &str, more: &[&str]) -> (Twinstep, String) {
        let own = words(&["--listen", "127.0.0.1:0", "--disk", disk]);
        let standby = self.user.start("standby", &[&self.common(name), &own, &words(more)]);
        let address = standby.wait_said("waiting for a primary on ");
        (standby, address)
    }
    fn primary(&self, disk: &str, address: &str, mem: &str, more: &[&str]) -> Twinstep {
        let protect = words(&["--disk", disk, "--protect", address]);
        let primary = self.user.start("run", &[&self.common("db"), &protect, &boot(mem, "shell"), &words(more)]);
        primary.wait_said("protected: ");
        primary.wait_console("# ");
        primary
    }
}

/// The whole life of a disk: mirrored to an image that is not there, written, its primary killed, found stale; made a replica again by what changed, and equal at the end.
#[test]
fn a_disk_outlives_its_hosts() {
    let _turn = turn(2);
    let hosts = Hosts::new();
    let (left, right) = (hosts.path("left.img"), hosts.path("right.qcow2"));
    // Something is there already, beyond what the guest will write.
    let mut content = vec![0; SIZE as usize];
    content[SIZE as usize / 2..].iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 4096 * 31 + i) as u8);
    std::fs::write(&left, content).unwrap();

    let (mut standby, address) = hosts.standby(&right, &[]);
    let mut primary = hosts.primary(&left, &address, "128M", &[]);
    assert!(primary.has_said("mirrored: the standby's disks are mirrored: 512 of 1024 blocks"), "what is zero is not sent");
    primary.type_line(FILL);
    primary.wait_console("filled 2");
    primary.kill();
    standby.wait_said("live: live in epoch 2");
    standby.type_line(LOOK);
    standby.wait_console("looked 2");
    standby.type_line("echo more > /mnt/g; umount /mnt; poweroff -f");
    let survivor = standby.end().with(0);
    let primary = primary.end();
    let (before, after) = (sums(&primary.console), sums(&survivor.console));
    assert!(before.len() == 1 && !after.is_empty(), "{primary:#?} {survivor:#?}");
    // What the standby had not heard to have left is said again.
    assert!(after.iter().all(|sum| *sum == before[0]), "{primary:#?} {survivor:#?}");
    qemu_img(&["check", &right]);

    // The killed host's image is not the newest.
    let none = |more: &[&str]| hosts.user.start("run", &[&boot("128M", "none"), &words(&["--disk", &left]), &words(more)]).end();
    none(&[]).refused(&["left.img may not be the newest of its disk", "give --arbiter"]);
    none(&["--arbiter", &text(&hosts.arbiter)]).refused(&["left.img is not the newest", "in epoch 2", "--force-stale-disk"]);

    // The other way round: what either side wrote since they were equal is looked at, and what differs is sent.
    let (standby, address) = hosts.standby(&left, &[]);
    let mut primary = hosts.primary(&right, &address, "128M", &[]);
    let mirrored = primary.wait_said("mirrored: the standby's disks are mirrored: ");
    let figures: Vec<u32> = mirrored.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    let (sent, compared) = (figures[0], figures[4]);
    assert!((1..50).contains(&sent) && compared < 200, "{mirrored}");
    primary.type_line(
        "mkdir -p /mnt; mount /dev/vda /mnt && cat /mnt/g && cp /mnt/f /mnt/h && sync; md5sum < /mnt/h; echo copied $((1 + 1))",
    );
    primary.wait_console("copied 2");
    primary.type_line("umount /mnt; poweroff -f");
    let primary = primary.end().with(0).shows("more");
    assert_eq!(sums(&primary.console), before, "{primary:#?}");
    standby.end().with(0).says(&["closed: the log is replayed to its end"]);
    qemu_img(&["check", &right]);
    qemu_img(&["compare", &left, &right]);
    // Both ended in good order, so either may start.
    none(&[]).with(0);
}

/// A bit that flips in memory and gets to the disk is repaired on the disk, too; and a third host, which has none of these disks, can say whose bit it was.
#[test]
fn a_flipped_bit_that_reached_the_disk_is_repaired() {
    let _turn = turn(2);
    let hosts = Hosts::new();
    let (left, right) = (hosts.path("left.img"), hosts.path("right.img"));
    // As large as the file, and with something at its beginning that is overwritten.
    sparse(Path::new(&left), 96 << 20);
    let old: Vec<u8> = (0..2 << 20).map(|i: u32| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    std::fs::File::options().write(true).open(&left).unwrap().write_all(&old).unwrap();
    let (mut standby, address) = hosts.standby(&right, &["--record-window", &hosts.path("windows")]);
    let mut primary = hosts.primary(&left, &address, "256M", &["--commit", "matched"]);
    primary.type_line(
        "cd /tmp; yes ABCDEFG | head -c 65536 > a; cat a a a a a a a a > b; cat b b b b b b b b > c; \
         cat c c c c c c c c c c c c c c c c c c c c c c c c > f; cd /; echo made $((1 + 1))",
    );
    primary.wait_console("made 2");
    hosts.user.ask("debug", &["flip-bit", "twin", "--filled", "ABCDEFG\\n", "--count", "25", "--bit", "2"]).with(0);
    // The copy goes through the bad memory to the disk, and the memory is forgotten; nobody has seen a difference yet.
    primary.type_line(
        "head -c 2097152 /dev/vda > /tmp/old; dd if=/tmp/f of=/dev/vda bs=1048576; sync; rm /tmp/f; echo 3 > /proc/sys/vm/drop_caches; echo copied $((1 + 1))",
    );
    primary.wait_console("copied 2");
    assert!(!primary.has_said("mismatch: "));
    const LOOK: &str = "echo 3 > /proc/sys/vm/drop_caches; cat /tmp/old /dev/vda | md5sum; echo looked $((1 + 1))";
    primary.type_line(LOOK);
    // The sum is of other bytes.
    primary.wait_said("resynced: ");
    vote(&hosts.user, &standby, "primary", 0);
    primary.wait_console("looked 2");
    primary.kill();
    standby.wait_said("live: live in epoch 2");
    standby.type_line(LOOK);
    standby.type_line("poweroff -f");
    let (survivor, primary) = (standby.end().with(0), primary.end());
    let (before, after) = (sums(&primary.console), sums(&survivor.console));
    assert!(!after.is_empty() && before[0] == *after.last().unwrap(), "{primary:#?} {survivor:#?}");
    assert!(std::fs::read(&left).unwrap() == std::fs::read(&right).unwrap());
}

/// `arguments` with files that cannot grow beyond so many bytes, as on a full disk.
fn with_little_room(bytes: u64, arguments: &[String], user: &User) -> Twinstep {
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", bytes / 512);
    let arguments = [&words(&["-c", &script, "sh", env!("CARGO_BIN_EXE_twinstep")])[..], arguments].concat();
    Twinstep::start_program("sh", "full", &arguments, &[("XDG_RUNTIME_DIR", &text(user.path()))])
}

/// What the disk of one host cannot hold is that host's failure; the guest goes on at the other and hears nothing of it.
#[test]
fn a_full_disk_is_its_hosts_failure() {
    let _turn = turn(2);
    const WRITE: &str = "dd if=/dev/zero bs=65536 count=1 2> /dev/null | tr '\\0' A > /tmp/a; dd if=/tmp/a of=/dev/vda bs=65536 seek=800 conv=fsync && echo wrote $((1 + 1))";
    for full in ["standby", "primary"] {
        let hosts = Hosts::new();
        let (left, right) = (hosts.path("left.img"), hosts.path("right.img"));
        sparse(Path::new(&left), SIZE);
        sparse(Path::new(&right), SIZE);
        let standby_arguments =
            [words(&["standby"]), hosts.common("twin"), words(&["--listen", "127.0.0.1:0", "--disk", &right])].concat();
        let (standby, mut primary);
        if full == "standby" {
            standby = with_little_room(SIZE / 2, &standby_arguments, &hosts.user);
            let address = standby.wait_said("waiting for a primary on ");
            primary = hosts.primary(&left, &address, "128M", &[]);
        } else {
            let address;
            (standby, address) = hosts.standby(&right, &[]);
            let arguments =
                [words(&["run"]), hosts.common("db"), words(&["--disk", &left, "--protect", &address]), boot("128M", "shell")]
                    .concat();
            primary = with_little_room(SIZE / 2, &arguments, &hosts.user);
            primary.wait_said("protected: ");
            primary.wait_console("# ");
        }
        primary.type_line(WRITE);
        let (failed, mut survivor) = if full == "standby" {
            primary.wait_said("alone: going on alone");
            (standby, primary)
        } else {
            standby.wait_said("live: live in epoch 2");
            (primary, standby)
        };
        survivor.wait_console("wrote 2");
        survivor.type_line("dmesg | grep -c 'I/O error'; poweroff -f");
        failed.end().with(1).says(&["cannot write 65536 bytes at 52428800 of the disk image"]);
        let survivor = survivor.end().with(0);
        assert!(!survivor.console.contains("I/O error, dev"), "{survivor:#?}");
        let image = std::fs::read(if full == "standby" { &left } else { &right }).unwrap();
        assert!(image[52_428_800..][..65536].iter().all(|byte| *byte == b'A'), "{full}");
    }
}

#[test]
fn what_a_guest_wrote_does_not_make_an_image_another_format() {
    let user = User::new();
    let disk = text(&user.path().join("disk"));
    std::fs::write(&disk, [&b"QFI\xfb"[..], &[0; 4092]].concat()).unwrap();
    let run = |disk: &str| user.start("run", &[&boot("128M", "none"), &words(&["--disk", disk])]).end();
    run(&disk).refused(&["looks like a qcow2 image", "format=raw"]);
    run(&format!("{disk},format=qcow2")).refused(&["as a qcow2 image"]);
    run(&format!("{disk},format=raw")).with(0);
}

/// A way to `there` that carries so many bytes a second from whoever connects; answers are not slowed. Gives where to connect.
fn slow_way(there: String, bytes_per_s: usize) -> String {
    const PIECE: usize = 16 << 10;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (mut near, mut far) = (near.unwrap(), TcpStream::connect(&there).unwrap());
            let (mut back, mut answers) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            // Either end may close whenever it likes.
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut answers, &mut back);
                let _ = back.shutdown(Shutdown::Both);
            });
            std::thread::spawn(move || {
                let mut piece = [0; PIECE];
                while let Ok(n @ 1..) = near.read(&mut piece) {
                    std::thread::sleep(Duration::from_secs_f64(n as f64 / bytes_per_s as f64));
                    if far.write_all(&piece[..n]).is_err() {
                        break;
                    }
                }
                let _ = far.shutdown(Shutdown::Both);
            });
        }
    });
    here
}

/// A pair whose guest writes to its disk faster than the network carries it becomes one nevertheless, and little is left for the moment when the guest stands still.
#[test]
fn writes_that_are_faster_than_the_network_are_held_while_a_disk_is_copied() {
    let _turn = turn(2);
    let hosts = Hosts::new();
    let (left, near, far) = (hosts.path("left.img"), hosts.path("near.img"), hosts.path("far.img"));
    sparse(Path::new(&left), SIZE);
    let (mut first, address) = hosts.standby(&near, &[]);
    let (second, slow) = hosts.standby_called("far", &far, &[]);
    let slow = slow_way(slow, 10 << 20);
    let mut primary = hosts.primary(&left, &format!("{address},{slow}"), "128M", &[]);
    // 8 MiB, or 128 blocks, again and again.
    primary.type_line(
        "head -c 8388608 /dev/urandom > /tmp/r; touch /tmp/go; (while [ -e /tmp/go ]; do dd if=/tmp/r of=/dev/vda bs=65536 conv=fsync 2> /dev/null; done; echo done $((1 + 1))) & \
         sleep 1; echo going $((1 + 1))",
    );
    primary.wait_console("going 2");
    first.kill();
    primary.wait_said("copy-disks-slow: the guest writes to its disks faster than can be sent");
    primary.wait_said_times("protected: every output", 2);
    let status = hosts.user.status("db");
    let mut copies = status["events"].as_array().unwrap().iter().filter(|event| event["what"] == "image");
    let cut_blocks = copies.next_back().unwrap()["figures"]["cut_blocks"].as_u64().unwrap();
    assert!(cut_blocks < 64, "{cut_blocks} blocks: {status}");
    primary.type_line("rm /tmp/go");
    primary.wait_console("done 2");
    primary.type_line("poweroff -f");
    primary.end().with(0);
    second.end().with(0).says(&["closed: the log is replayed to its end"]);
    assert!(std::fs::read(&left).unwrap() == std::fs::read(&far).unwrap());
}
