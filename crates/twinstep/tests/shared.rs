//! One disk image for both hosts: only the live side writes, what the guest was told is on the disk is there, and a side that was taken over cannot write any more.
mod common;

use std::path::Path;

use common::{Twinstep, User, boot, text, turn, words};
use rustix::process::Signal;

const SIZE: u64 = 64 << 20;
/// Makes a file system with a file in it, and shows its sum as it is on the disk.
const FILL: &str = "mke2fs -F /dev/vda > /dev/null && mkdir -p /mnt && mount /dev/vda /mnt && yes ABCDEFG | head -c 3000000 > /mnt/f && sync; \
                    echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/f; echo filled $((1 + 1))";
/// Counts on the disk, and says how far only once that is on the disk.
const COUNT: &str = "(i=0; while [ ! -e /tmp/enough ]; do i=$((i + 1)); echo $i >> /mnt/count; sync; echo \"count=$i.\"; done; echo counted $((1 + 1))) &";
const LOOK: &str = "echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/f; echo \"last=$(tail -n 1 /mnt/count).\"; \
                    seq $(tail -n 1 /mnt/count) | cmp - /mnt/count && echo looked $((1 + 1))";

fn sums(console: &str) -> Vec<&str> {
    let is_sum = |word: &&str| word.len() == 32 && word.bytes().all(|b| b.is_ascii_hexdigit());
    console.split_whitespace().filter(is_sum).collect()
}

/// The numbers that the guest has printed behind this word.
fn numbers(console: &str, word: &str) -> Vec<u64> {
    console.split(word).skip(1).filter_map(|rest| rest.split_once('.')?.0.parse().ok()).collect()
}

fn wait_for_count(side: &Twinstep, from: u64) {
    side.wait_console(&format!("count={from}."));
}

fn takes_over(how: &str) {
    let user = User::new();
    let (arbiter, disk) = (user.path().join("arbiter"), user.path().join("disk.img"));
    std::fs::create_dir(&arbiter).unwrap();
    std::fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let image = format!("{},share=on", text(&disk));
    let both = words(&["--arbiter", &text(&arbiter), "--disk", &image]);
    let mut standby = user.start("standby", &[&both, &words(&["--once", "--listen", "127.0.0.1:0", "--name", "twin"])]);
    let address = standby.wait_said("waiting for a primary on ");
    let mut primary = user.start("run", &[&both, &words(&["--protect", &address, "--name", "db"]), &boot("128M", "shell")]);
    standby.wait_said("protection has started");
    primary.wait_console("# ");
    primary.type_line(FILL);
    primary.wait_console("filled 2");
    primary.type_line(COUNT);
    wait_for_count(&primary, 3);
    match how {
        "kill" => primary.kill(),
        _ => primary.signal(Signal::STOP),
    }
    standby.wait_said("live: live in epoch 2");
    let told = numbers(&primary.console(), "count=").last().copied().unwrap();
    // The guest goes on where it was.
    wait_for_count(&standby, told + 2);
    if how == "stop" {
        primary.signal(Signal::CONT);
    }
    let primary = primary.end();
    if how == "stop" {
        assert!(matches!(primary.status, Some(1 | 5)), "it does not go on: {primary:#?}");
    }
    // Also after whatever the other one did when it woke up.
    let more = numbers(&standby.console(), "count=").last().copied().unwrap() + 2;
    wait_for_count(&standby, more);
    standby.type_line("touch /tmp/enough");
    standby.wait_console("counted 2");
    standby.type_line(LOOK);
    standby.wait_console("looked 2");
    standby.type_line("umount /mnt; poweroff -f");
    let survivor = standby.end().with(0);
    let (before, after) = (sums(&primary.console), sums(&survivor.console));
    assert_eq!((before.len(), &before), (1, &after), "{primary:#?} {survivor:#?}");
    let last = numbers(&survivor.console, "last=")[0];
    assert!(last >= more, "{survivor:#?}");
    if how == "stop" {
        found_again(&user, &disk, before[0], last);
    }
}

/// What is on the disk, as another machine finds it.
fn found_again(user: &User, disk: &Path, sum: &str, last: u64) {
    let image = format!("{},share=on", text(disk));
    let recording = text(&user.path().join("recording"));
    let mut other = user.start("run", &[&boot("128M", "shell"), &words(&["--disk", &image, "--record", &recording])]);
    other.wait_console("# ");
    other.type_line(&format!("mkdir -p /mnt; mount /dev/vda /mnt; {LOOK}; poweroff -f"));
    let other = other.end().with(0).shows("looked 2");
    assert_eq!((sums(&other.console), numbers(&other.console, "last=")), (vec![sum], vec![last]), "{other:#?}");
    // What was read is in the log: a replay needs no disk.
    user.ask("replay", &[&recording]).with(0);
}

#[test]
fn a_shared_disk_outlives_a_killed_host() {
    let _turn = turn(2);
    takes_over("kill");
}

#[test]
fn a_host_that_wakes_up_cannot_write_to_a_shared_disk() {
    let _turn = turn(2);
    takes_over("stop");
}

#[test]
fn a_disk_that_the_hosts_do_not_share_is_refused() {
    let _turn = turn(2);
    let user = User::new();
    let (arbiter, left, right) = (user.path().join("arbiter"), user.path().join("left.img"), user.path().join("right.img"));
    std::fs::create_dir(&arbiter).unwrap();
    for path in [&left, &right] {
        std::fs::File::create(path).unwrap().set_len(SIZE).unwrap();
    }
    let at = words(&["--arbiter", &text(&arbiter)]);
    let standby = user.start(
        "standby",
        &[&at, &words(&["--once", "--listen", "127.0.0.1:0", "--disk", &format!("{},share=on", text(&right))])],
    );
    let address = standby.wait_said("waiting for a primary on ");
    let shared = format!("{},share=on", text(&left));
    let primary = user.start("run", &[&at, &words(&["--disk", &shared, "--protect", &address]), &boot("128M", "shell")]);
    standby.end().with(1).says(&["right.img is not the image that the primary writes to"]);
    primary.wait_said("the guest runs on without protection");
    // Nobody else may have it meanwhile.
    user.start("run", &[&boot("128M", "none"), &words(&["--disk", &shared])]).end().refused(&["left.img is in use"]);
}
