//! A protected pair, as two processes over loopback: what happens to one side must leave exactly one guest, and both sides say what they do.
mod common;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use common::{Ended, Twinstep, User, boot, boot_with_network, folder, text, turn, twinstep, words};
use rustix::process::Signal;
use tempfile::TempDir;

/// A standby that listens, and where.
fn standby(arbiter: &Path, more: &[&str]) -> (Twinstep, String) {
    let arguments = [words(&["standby", "--once", "--listen", "127.0.0.1:0", "--arbiter", &text(arbiter)]), words(more)].concat();
    let standby = Twinstep::start("standby", &arguments);
    let address = standby.wait_said("waiting for a primary on ");
    (standby, address)
}

/// A pair whose guest sits at a shell.
struct Pair {
    arbiter: PathBuf,
    primary: Twinstep,
    standby: Twinstep,
    /// The VM's name at the arbiter.
    vm: String,
    _folder: TempDir,
}

impl Pair {
    fn start() -> Self {
        let folder = folder();
        let arbiter = folder.path().join("arbiter");
        std::fs::create_dir(&arbiter).unwrap();
        let (standby, address) = standby(&arbiter, &[]);
        let primary = Twinstep::run(&[&boot("128M", "shell"), &words(&["--protect", &address, "--arbiter", &text(&arbiter)])]);
        let vm = standby.wait_said("following VM ");
        let vm = vm.split_whitespace().next().unwrap().to_owned();
        primary.wait_said("protected: ");
        primary.wait_console("TWINSTEP READY shell");
        primary.wait_console("# ");
        Self { arbiter, primary, standby, vm, _folder: folder }
    }

    /// Starts a computation that goes on for a while, prints its sum, and switches the guest off.
    fn compute(&mut self) {
        begin(&mut self.primary);
    }

    /// Somebody else has the epoch that a failover would claim.
    fn claim_for_a_stranger(&self) {
        std::fs::write(self.arbiter.join(format!("{}.epoch-2", self.vm)), "a-stranger").unwrap();
    }

    /// The arbiter can't be reached until it is back.
    fn take_the_arbiter_away(&self) {
        std::fs::rename(&self.arbiter, self.arbiter.with_extension("away")).unwrap();
    }
    fn bring_the_arbiter_back(&self) {
        std::fs::rename(self.arbiter.with_extension("away"), &self.arbiter).unwrap();
    }
}

/// Some seconds of work for the guest's shell.
const ROUNDS: u64 = 60_000;

/// Has the guest of this side begin the computation.
fn begin(primary: &mut Twinstep) {
    primary.type_line(&format!(
        "i=0 sum=0; echo it began: $((1 + 1)); while [ $i -lt {ROUNDS} ]; do sum=$(((sum * 31 + i) % 65521)); i=$((i + 1)); done; \
         echo the sum is $sum; poweroff -f"
    ));
    primary.wait_console("it began: 2");
}

/// What the computation prints at its end.
fn sum() -> String {
    format!("the sum is {}", (0..ROUNDS).fold(0, |sum, i| (sum * 31 + i) % 65521))
}

/// The computation came to its end, with the right result.
#[track_caller]
fn computed(ended: Ended) {
    ended.with(0).shows(&sum()).says(&["the guest switched itself off"]);
}

#[test]
fn a_guest_that_ends_ends_both_sides() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.primary.type_line("poweroff -f");
    pair.primary.end().with(0).says(&["the guest switched itself off"]);
    pair.standby.end().with(0).says(&["the other side said goodbye: the guest switched itself off"]);
}

#[test]
fn the_primary_dies_and_the_guest_does_not() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    pair.primary.kill();
    pair.standby.wait_said("live: live in epoch 2");
    assert!(!pair.primary.has_shown(&sum()), "it was killed in the middle");
    computed(pair.standby.end());
}

/// Maintenance: nobody dies, and the computation goes on at the other host.
#[test]
fn a_vm_is_handed_over_when_somebody_asks() {
    let _turn = turn(2);
    let user = User::new();
    let arbiter = user.path().join("arbiter");
    std::fs::create_dir(&arbiter).unwrap();
    let (standby, address) = standby(&arbiter, &[]);
    let pair = words(&["--name", "db", "--protect", &address, "--arbiter", &text(&arbiter)]);
    let mut primary = user.start("run", &[&boot("128M", "shell"), &pair]);
    primary.wait_said("protected: ");
    primary.wait_console("# ");
    begin(&mut primary);
    user.ask("failover", &["db"]).with(0).shows("the standby runs 'db' now");
    let primary = primary.end().with(5).says(&["the VM runs on the other host now, in epoch 2"]);
    assert!(!primary.console.contains(&sum()), "it was handed over in the middle");
    computed(standby.end());
    user.ask("failover", &["db"]).refused(&["no VM called 'db' runs here"]);
}

/// Writes 16 MiB of memory in the background, over and over and with other bytes each time, until there is a file `stop`; then copies a file of as many, compares, and
/// prints the file's sum.
const WRITES: &str = "cd /tmp; yes ABCDEFGHIJKLMNOPQRSTUVWXYZ | head -c 65536 > a; cat a a a a a a a a a a a a a a a a > b; : > f; i=0; \
     while [ $i -lt 16 ]; do echo $i >> f; cat b >> f; i=$((i + 1)); done; cat f > g; echo before: $(md5sum < f); \
     { i=0; while [ ! -e stop ]; do dd if=f of=g bs=65521 skip=$((i % 7)) conv=notrunc 2> /dev/null; i=$((i + 1)); done; \
     cat f > g; cmp f g && echo after: $(md5sum < g); poweroff -f; } & echo it writes: $((40 + 2))";

/// A sum that the guest has printed.
#[track_caller]
fn printed(console: &str, name: &str) -> String {
    let sums = console.split(name).skip(1).filter_map(|rest| rest.split_whitespace().next());
    sums.filter(|sum| sum.len() == 32).last().unwrap_or_else(|| panic!("no sum {name}: {console}")).to_owned()
}

/// The guest writes memory all the time while it is copied, so what was sent is sent again, until the copy is complete; then its host dies.
#[test]
fn a_guest_that_writes_memory_all_the_time_is_copied_while_it_runs() {
    let _turn = turn(2);
    let folder = folder();
    let (mut standby, address) = standby(folder.path(), &[]);
    let pair = words(&["--protect", &address, "--arbiter", &text(folder.path())]);
    let mut primary = Twinstep::run(&[&boot("128M", "shell"), &pair]);
    // Asleep, so that the copy waits until the guest is busy.
    standby.wait_said("following VM ");
    standby.signal(Signal::STOP);
    primary.wait_console("# ");
    primary.type_line(WRITES);
    primary.wait_console("it writes: 42");
    assert!(!primary.has_said("protected: "), "the standby was asleep");
    standby.signal(Signal::CONT);
    let copied = primary.wait_said("the machine is copied: ");
    let rounds: u64 = copied.split_whitespace().next().unwrap().parse().unwrap();
    assert!(rounds >= 2, "what was written meanwhile was sent again: {copied}");
    primary.wait_said("protected: ");
    // Before it has heard that, it is not to go live.
    standby.wait_said("protection has started");
    let before = printed(&primary.console(), "before: ");
    primary.kill();
    standby.wait_said("live: live in epoch 2");
    standby.type_line("touch /tmp/stop");
    let ended = standby.end().with(0).says(&["the guest switched itself off"]);
    assert_eq!(printed(&ended.console, "after: "), before);
}

#[test]
fn the_standby_dies_and_the_primary_goes_on_alone() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    pair.standby.kill();
    pair.primary.wait_said("alone: going on alone in epoch 2");
    computed(pair.primary.end());
}

#[test]
fn the_standby_stops_when_the_arbiter_says_no() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.claim_for_a_stranger();
    pair.compute();
    pair.primary.kill();
    let ended = pair.standby.end().with(1).says(&["the arbiter gave epoch 2 to the other side"]);
    assert!(ended.console.is_empty(), "a side that lost shows nothing: {ended:#?}");
}

#[test]
fn the_primary_stops_when_the_arbiter_says_no() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.claim_for_a_stranger();
    pair.compute();
    pair.standby.kill();
    let ended = pair.primary.end().with(5).says(&["the arbiter gave epoch 2 to the other side"]);
    assert!(!ended.console.contains(&sum()), "a side that lost shows nothing more: {ended:#?}");
}

#[test]
fn without_the_arbiter_the_standby_waits_for_it() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    pair.take_the_arbiter_away();
    pair.primary.kill();
    pair.standby.wait_said("staying stopped, asking again");
    assert!(!pair.standby.has_said("live: "));
    pair.bring_the_arbiter_back();
    pair.standby.wait_said("live: live in epoch 2");
    computed(pair.standby.end());
}

#[test]
fn without_the_arbiter_the_primary_waits_for_it() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    pair.take_the_arbiter_away();
    pair.standby.kill();
    pair.primary.wait_said("staying stopped, asking again");
    assert!(!pair.primary.has_said("alone: "));
    pair.bring_the_arbiter_back();
    pair.primary.wait_said("alone: going on alone in epoch 2");
    computed(pair.primary.end());
}

#[test]
fn a_standby_that_was_asleep_finds_that_it_lost() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    pair.standby.signal(Signal::STOP);
    pair.primary.wait_said("alone: going on alone in epoch 2");
    pair.standby.signal(Signal::CONT);
    let ended = pair.standby.end().with(1).says(&["the arbiter gave epoch 2 to the other side"]);
    assert!(ended.console.is_empty(), "{ended:#?}");
    computed(pair.primary.end());
}

#[test]
fn a_primary_that_was_asleep_finds_that_it_lost() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    pair.primary.signal(Signal::STOP);
    pair.standby.wait_said("live: live in epoch 2");
    pair.primary.signal(Signal::CONT);
    let ended = pair.primary.end().with(5).says(&["the arbiter gave epoch 2 to the other side"]);
    assert!(!ended.console.contains(&sum()), "a side that lost shows nothing more: {ended:#?}");
    computed(pair.standby.end());
}

#[test]
fn a_standby_is_told_to_end_and_the_primary_goes_on() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    pair.standby.signal(Signal::TERM);
    pair.primary.wait_said("alone: going on alone in epoch 1: the standby said goodbye: signal 15");
    pair.standby.end().with(5).says(&["stopped: signal 15"]);
    computed(pair.primary.end());
}

#[test]
fn a_standby_that_has_gone_live_ends_in_good_order() {
    let _turn = turn(2);
    let mut pair = Pair::start();
    pair.compute();
    // Stopped and not killed: the connection to it stays open.
    pair.primary.signal(Signal::STOP);
    pair.standby.wait_said("live: live in epoch 2");
    pair.standby.signal(Signal::TERM);
    pair.standby.end().with(5).says(&["stopped: signal 15"]);
}

/// A standby that expects something else refuses, says what differs, and the guest does not suffer.
fn refused(expected: &[&str], named: &str) {
    let _turn = turn(1);
    let folder = folder();
    let (standby, address) = standby(folder.path(), expected);
    let mut primary =
        Twinstep::run(&[&boot("128M", "shell"), &words(&["--protect", &address, "--arbiter", &text(folder.path())])]);
    standby.end().with(1).says(&["pairing refused", named]);
    primary.wait_said("pairing refused");
    primary.wait_console("TWINSTEP READY shell");
    primary.type_line("poweroff -f");
    primary.end().with(0).says(&[named, "runs on without protection"]);
}

#[test]
fn another_amount_of_ram_is_refused() {
    refused(&["--mem", "96M"], "RAM");
}

#[test]
fn another_cpu_is_refused() {
    refused(&["--cpu", "x86-64-v3"], "x86-64-v3");
}

#[test]
fn a_standby_without_a_cable_for_each_card_does_not_protect() {
    let _turn = turn(1);
    let folder = folder();
    let (standby, address) = standby(folder.path(), &[]);
    let pair = words(&["--protect", &address, "--arbiter", &text(folder.path())]);
    let mut primary = Twinstep::run(&[&boot_with_network("128M", "shell", "user"), &pair]);
    let why = "the machine has 1 network cards, the standby was given 0";
    standby.end().with(1).says(&[why, "--net once for each card"]);
    primary.wait_said("the guest runs on without protection");
    primary.wait_console("TWINSTEP READY shell");
    primary.type_line("poweroff -f");
    primary.end().with(0).says(&[why]);
}

#[test]
fn nobody_at_the_standbys_address() {
    let folder = folder();
    // Bound and not listening: nobody else gets the port, and nobody answers.
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let vm = Twinstep::run(&[&boot("128M", "none"), &words(&["--protect", &address, "--arbiter", &text(folder.path())])]);
    let ended = vm.end().refused(&["cannot reach the standby", &address, "twinstep standby --listen"]);
    assert!(ended.console.is_empty(), "it has not booted: {ended:#?}");
}

#[test]
fn a_busy_port() {
    let folder = folder();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    twinstep(&["standby", "--listen", &address, "--arbiter", &text(folder.path())]).refused(&[
        "cannot listen on",
        &address,
        "choose another port",
    ]);
}

#[test]
fn an_arbiter_that_is_not_there() {
    let folder = folder();
    let nowhere = text(&folder.path().join("nowhere"));
    twinstep(&["standby", "--listen", "127.0.0.1:0", "--arbiter", &nowhere]).refused(&["cannot be the arbiter", "nowhere"]);
    let (standby, address) = standby(folder.path(), &[]);
    let vm = Twinstep::run(&[&boot("128M", "none"), &words(&["--protect", &address, "--arbiter", &nowhere])]);
    vm.end().refused(&["cannot be the arbiter", "nowhere"]);
    assert!(!standby.has_said("connected"), "the standby was not disturbed");
}

/// Strangers come to any open port. They are told nothing, and the standby still takes its primary.
#[test]
fn strangers_do_not_disturb_a_standby() {
    let _turn = turn(2);
    let folder = folder();
    let (standby, address) = standby(folder.path(), &[]);
    let mut random = 1_u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 24) as u8
    })
    .take(1 << 20)
    .collect();
    for garbage in [&b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n"[..], &noise, &[0; 4096], &[0xff; 4096], b""] {
        let mut stranger = TcpStream::connect(&address).unwrap();
        // It may hang up before it has read all.
        let _ = stranger.write_all(garbage);
    }
    let mut primary =
        Twinstep::run(&[&boot("128M", "shell"), &words(&["--protect", &address, "--arbiter", &text(folder.path())])]);
    primary.wait_said("protected: ");
    primary.wait_console("TWINSTEP READY shell");
    primary.type_line("poweroff -f");
    primary.end().with(0);
    standby.end().with(0).says(&["is no primary", "said goodbye"]);
}
