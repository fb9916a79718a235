//! Bits that flip in one side of a pair: what nobody sees is let pass, what somebody would see is caught before it leaves (`--commit matched`) or found
//! afterwards (`--commit received`), and the pair is made whole again.
mod common;

use common::{Twinstep, User, boot, text, turn, vote, words};

/// A pair whose guest sits at a shell and has a large file in its memory. Both sides can be broken on purpose.
struct Pair {
    primary: Twinstep,
    standby: Twinstep,
    user: User,
}

impl Pair {
    fn start(more: &[&str]) -> Self {
        let user = User::new();
        let arbiter = user.path().join("arbiter");
        std::fs::create_dir(&arbiter).unwrap();
        let common = words(&["--arbiter", &text(&arbiter), "--debug-faults", "--name"]);
        let windows = text(&user.path().join("windows"));
        let standby =
            user.start("standby", &[&common, &words(&["twin", "--listen", "127.0.0.1:0", "--record-window", &windows])]);
        let address = standby.wait_said("waiting for a primary on ");
        let protect = words(&["db", "--protect", &address]);
        let mut primary = user.start("run", &[&common, &protect, &boot("256M", "shell"), &words(more)]);
        primary.wait_said("protected: ");
        primary.wait_console("# ");
        primary.type_line(
            "cd /tmp; yes ABCDEFG | head -c 65536 > a; cat a a a a a a a a > b; cat b b b b b b b b > c; \
             cat c c c c c c c c c c c c c c c c c c c c c c c c > f; cd /; echo it is $((40 + 2)) full; md5sum < /tmp/f; echo first $((1 + 1))",
        );
        primary.wait_console("it is 42 full");
        primary.wait_console("first 2");
        Self { primary, standby, user }
    }

    /// Memory of this side goes bad in several places, all of them in the files, and 24 of 25 in the large one.
    fn damage(&self, side: &str) {
        self.user.ask("debug", &["flip-bit", side, "--filled", "ABCDEFG\\n", "--count", "25", "--bit", "2"]).with(0);
    }

    /// Has the guest look at the file.
    fn sum(&mut self) {
        self.primary.type_line("md5sum < /tmp/f; echo second $((1 + 1))");
    }
}

/// The sums that the guest has printed.
fn sums(console: &str) -> Vec<&str> {
    let is_sum = |word: &&str| word.len() == 32 && word.bytes().all(|b| b.is_ascii_hexdigit());
    console.split_whitespace().filter(is_sum).collect()
}

/// The standby is wrong, and the primary dies later: whatever was shown, by whichever side, is right.
#[test]
fn a_standby_that_went_wrong_is_made_right_before_it_is_needed() {
    let _turn = turn(2);
    for commit in ["matched", "received"] {
        let mut pair = Pair::start(&["--commit", commit]);
        pair.damage("twin");
        pair.sum();
        pair.standby.wait_said("damaged: memory of this standby's host is bad");
        pair.standby.wait_said("mismatch: output ");
        pair.primary.wait_said("mismatch: output ");
        pair.primary.wait_said("resynced: the standby is equal again");
        pair.standby.wait_said("resynced: ");
        vote(&pair.user, &pair.standby, "primary", 0);
        pair.primary.wait_console("second 2");
        pair.primary.type_line("md5sum < /tmp/f; echo third $((1 + 1))");
        pair.primary.wait_console("third 2");
        pair.primary.kill();
        pair.standby.wait_said("live: live in epoch 2");
        pair.standby.type_line("md5sum < /tmp/f; poweroff -f");
        let standby = pair.standby.end().with(0);
        let primary = pair.primary.end();
        let (before, after) = (sums(&primary.console), sums(&standby.console));
        assert_eq!((before.len(), after.is_empty()), (3, false), "{commit}: {primary:#?} {standby:#?}");
        assert!(before.iter().chain(&after).all(|sum| *sum == before[0]), "{commit}: {before:?} {after:?}");
    }
}

/// The primary is wrong. Nothing wrong leaves, and whose memory it is is known.
#[test]
fn a_primary_that_went_wrong_says_nothing_wrong() {
    let _turn = turn(2);
    let mut pair = Pair::start(&["--commit", "matched", "--on-mismatch", "stop"]);
    pair.damage("db");
    pair.sum();
    let primary = pair.primary.end().with(5).says(&["the two sides differ in output", "--on-mismatch stop"]);
    pair.standby.end().says(&["the two sides differ in output"]);
    assert_eq!(sums(&primary.console).len(), 1, "the first, which was right: {primary:#?}");
    assert!(!primary.console.contains("second 2"), "{primary:#?}");
}

/// A primary that finds that its own memory is to blame gives way to the standby, which is right.
#[test]
fn a_primary_whose_memory_is_bad_gives_way() {
    let _turn = turn(2);
    let mut pair = Pair::start(&["--commit", "matched"]);
    pair.damage("db");
    pair.sum();
    let primary = pair.primary.end().with(1).says(&["memory of the primary's host is bad", "the standby takes over"]);
    pair.standby.wait_said("live: live in epoch 2");
    pair.standby.wait_console("second 2");
    vote(&pair.user, &pair.standby, "standby", 7);
    pair.standby.type_line("poweroff -f");
    let standby = pair.standby.end().with(0);
    let (before, after) = (sums(&primary.console), sums(&standby.console));
    assert_eq!((before.len(), before[0]), (1, after[0]), "{before:?} {after:?}");
}

/// What is never read harms nobody.
#[test]
fn a_difference_that_nobody_sees_is_let_pass() {
    let _turn = turn(2);
    let mut pair = Pair::start(&["--commit", "matched"]);
    pair.damage("twin");
    pair.primary
        .type_line("rm /tmp/f; i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo it went on: $((40 + 2)); poweroff -f");
    let primary = pair.primary.end().with(0).shows("it went on: 42");
    let standby = pair.standby.end().with(0);
    for side in [&primary, &standby] {
        assert!(!side.said.contains("mismatch"), "{side:#?}");
    }
}

#[test]
fn nobody_breaks_a_vm_that_was_not_started_for_it() {
    let _turn = turn(1);
    let user = User::new();
    let mut vm = user.start("run", &[&words(&["--name", "db"]), &boot("128M", "shell")]);
    vm.wait_console("# ");
    let flip = |more: &[&str]| user.ask("debug", &[&["flip-bit", "db"], more].concat());
    flip(&["--register", "rip"]).with(2);
    flip(&["--address", "0x1000"]).refused(&["was not started with --debug-faults"]);
    vm.type_line("poweroff -f");
    vm.end().with(0);
}
