//! Record and replay as people use it: a replay ends in the same state, however it is cut and wherever it starts; and a file that is
//! not what was written is refused.
mod common;

use std::fs::OpenOptions;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{Ended, PATIENCE, Twinstep, boot, boot_with_network, folder, text, turn, twinstep, words};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use twinstep_host::passt::free_port;
use twinstep_host::redis_check;

/// `twinstep replay RECORDING --json ...`, which must succeed.
#[track_caller]
fn replay(recording: &str, more: &[&str]) -> Value {
    twinstep(&[&["replay", recording, "--json"], more].concat()).with(0).json()
}

#[track_caller]
fn position(report: &Value) -> u64 {
    report["position"].as_u64().unwrap_or_else(|| panic!("no position in {report}"))
}

/// A recording of Redis under load and a busy shell replays to the same digest in every way there is.
#[test]
fn every_way_to_replay_gives_the_same_digest() {
    let _turn = turn(2);
    let folder = folder();
    let path = |name: &str| text(&folder.path().join(name));
    let (recording, snapshot) = (path("recording"), path("snapshot"));
    let port = free_port().unwrap();
    let net = format!("user,forward={port}:6379");
    let mut vm = Twinstep::run(&[
        &boot_with_network("256M", "shell", &net),
        &words(&["--record", &recording, "--digest-interval", "50000000"]),
    ]);
    vm.wait_console("TWINSTEP READY shell");
    vm.type_line("redis-server /etc/redis.conf & until grep -q ':18EB 00000000:0000 0A' /proc/net/tcp; do usleep 10000; done; echo it serves: $?");
    vm.wait_console("it serves: 0");
    vm.type_line("i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done & echo it loops: $?");
    vm.wait_console("it loops: 0");
    let client = redis_check::Running::start(redis_check::Options {
        keys: 500,
        patience: PATIENCE,
        ..redis_check::Options::new(SocketAddr::from(([127, 0, 0, 1], port)))
    });
    let client = client.unwrap();
    while client.replies() < 1000 && !client.has_ended() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let report = client.finish().unwrap();
    assert!(report.passed() && report.replies >= 1000, "{report:#?}");
    TcpStream::connect(("127.0.0.1", port)).unwrap().write_all(b"SHUTDOWN\r\n").unwrap();
    vm.type_line("wait; poweroff -f");
    vm.end().with(0);

    let plain = replay(&recording, &[]);
    assert!(plain["end"].as_str().unwrap().contains("complete"), "{plain}");
    assert!(plain["digests_checked"].as_u64() > Some(3) && plain["outputs_checked"].as_u64() > Some(100), "{plain}");
    let middle = (position(&plain) / 4 * 3).to_string();
    let first = replay(&recording, &["--until", &middle, "--save", &snapshot]);
    assert_eq!((position(&first), first["end"].as_str()), (middle.parse().unwrap(), Some("stopped where asked")));
    let from_the_middle = replay(&recording, &["--from", &snapshot]);
    let one_by_one = replay(&recording, &["--from", &snapshot, "--block", "1"]);
    for (how, arguments) in [
        ("without cache groups", &["--cache-groups", "0"][..]),
        ("with one element", &["--cache-groups", "1"]),
        ("with two elements", &["--cache-groups", "2"]),
        ("with caches cleared now and then", &["--forget", "1"]),
        ("with one element, cleared now and then", &["--cache-groups", "1", "--forget", "2"]),
    ] {
        let report = replay(&recording, arguments);
        assert_eq!((report["digest"].clone(), position(&report)), (plain["digest"].clone(), position(&plain)), "{how}");
    }
    for (report, how) in [(&from_the_middle, "from a snapshot"), (&one_by_one, "from a snapshot, instruction by instruction")] {
        assert_eq!((report["digest"].clone(), position(report)), (plain["digest"].clone(), position(&plain)), "{how}");
        assert_eq!(report["start"].as_u64(), Some(middle.parse().unwrap()), "{how}");
    }
}

/// A short life of a guest that was at its shell already, and a whole boot.
struct Recordings {
    /// In the build's folder, since what is made once for all tests is never dropped.
    folder: PathBuf,
    /// Where the short ones begin.
    begin: u64,
}

impl Recordings {
    fn path(&self, name: &str) -> String {
        text(&self.folder.join(name))
    }
    /// Where the entries of `one` begin, give or take a little: after the image, which is that of `prompt`.
    fn entries(&self) -> u64 {
        std::fs::metadata(self.path("prompt")).unwrap().len() + 500
    }
    /// A copy that may be damaged.
    fn copy(&self, name: &str) -> (TempDir, String) {
        let place = folder();
        let copy = text(&place.path().join(name));
        std::fs::copy(self.path(name), &copy).unwrap();
        (place, copy)
    }
}

/// `boot`, its end as `prompt`, and two lives that begin there: `one` and `two`.
fn recordings() -> &'static Recordings {
    static MADE: OnceLock<Recordings> = OnceLock::new();
    MADE.get_or_init(|| {
        let _turn = turn(1);
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("recordings");
        // Of an earlier run, if there was one.
        let _ = std::fs::remove_dir_all(&place);
        std::fs::create_dir_all(&place).unwrap();
        let mut made = Recordings { folder: place, begin: 0 };
        let vm = Twinstep::run(&[&boot("80M", "shell"), &words(&["--record", &made.path("boot")])]);
        vm.wait_console("TWINSTEP READY shell");
        vm.wait_console("# ");
        vm.signal(Signal::TERM);
        vm.end().with(5);
        made.begin = position(&replay(&made.path("boot"), &["--save", &made.path("prompt")]));
        for name in ["one", "two"] {
            let mut vm = Twinstep::run(&[&words(&[
                "--from",
                &made.path("prompt"),
                "--record",
                &made.path(name),
                "--digest-interval",
                "1000000",
            ])]);
            vm.type_line("for i in $(seq 500); do echo $i; done; echo $((6 * 7)); poweroff -f");
            vm.end().with(0).shows("42");
        }
        made
    })
}

#[test]
fn instruction_by_instruction_from_power_on() {
    let recordings = recordings();
    let _turn = turn(1);
    let boot = recordings.path("boot");
    let until = (recordings.begin / 4).to_string();
    let plain = replay(&boot, &["--until", &until]);
    let one_by_one = replay(&boot, &["--until", &until, "--block", "1"]);
    assert_eq!((&plain["digest"], position(&plain)), (&one_by_one["digest"], position(&one_by_one)));
}

#[test]
fn a_snapshot_is_only_for_its_own_recording() {
    let recordings = recordings();
    let (one, two) = (recordings.path("one"), recordings.path("two"));
    let folder = folder();
    let snapshot = text(&folder.path().join("snapshot"));
    let until = (recordings.begin + 500_000).to_string();
    replay(&one, &["--until", &until, "--save", &snapshot]);
    assert_eq!(replay(&one, &["--from", &snapshot])["digest"], replay(&one, &[])["digest"]);
    // A snapshot of a snapshot's replay is of the same recording, too.
    let (later, second) = ((recordings.begin + 900_000).to_string(), text(&folder.path().join("second")));
    replay(&one, &["--from", &snapshot, "--until", &later, "--save", &second]);
    replay(&one, &["--from", &second]);
    for snapshot in [&snapshot, &second] {
        twinstep(&["replay", &two, "--from", snapshot]).refused(&[
            "another recording",
            snapshot,
            "a replay of this very recording",
        ]);
    }
    twinstep(&["replay", &one, "--from", &second, "--until", &until]).refused(&["the snapshot stands at position", &later]);
}

/// The places to harm a file in: its first bytes, each, and more of them all over it.
fn places(file: &str, begin: u64) -> Vec<u64> {
    let bytes = std::fs::metadata(file).unwrap().len();
    let over = |from: u64, to: u64, n: u64| (0..n).map(move |i| from + (to - from) * i / n);
    [0, 8, 12, 16, 28, 40].into_iter().chain(over(100, begin, 6)).chain(over(begin, bytes, 7)).chain([bytes - 1]).collect()
}

#[track_caller]
fn explained(ended: &Ended, file: &str, what: &str) {
    let clear = ended.said.contains(file)
        && ["byte ", "cut off", "newer Twinstep", "not a Twinstep"].iter().any(|w| ended.said.contains(w));
    assert!(ended.status == Some(1) && clear, "{what}: {ended:#?}");
}

#[test]
fn flipped_bytes_are_found() {
    let recordings = recordings();
    let (_place, copy) = recordings.copy("one");
    let file = OpenOptions::new().read(true).write(true).open(&copy).unwrap();
    for place in places(&copy, recordings.entries()) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], place).unwrap();
        let _turn = turn(1);
        explained(&twinstep(&["replay", &copy, "--json"]), &copy, &format!("flipped at {place}"));
        file.write_all_at(&byte, place).unwrap();
    }
    replay(&copy, &[]);
}

#[test]
fn what_is_left_of_a_cut_recording_replays() {
    let recordings = recordings();
    let (_place, copy) = recordings.copy("one");
    let whole = position(&replay(&copy, &[]));
    let mut places = places(&copy, recordings.entries());
    places.sort_unstable_by_key(|place| std::cmp::Reverse(*place));
    let mut lengths = Vec::new();
    for place in places {
        OpenOptions::new().write(true).open(&copy).unwrap().set_len(place).unwrap();
        let _turn = turn(1);
        let ended = twinstep(&["replay", &copy, "--json"]);
        if ended.status == Some(0) {
            let report = ended.json();
            assert!(report["end"].as_str().unwrap().contains("the recording is cut"), "{report}");
            lengths.push(position(&report));
        } else {
            explained(&ended, &copy, &format!("cut at {place}"));
        }
    }
    assert!(lengths.len() >= 4 && lengths.is_sorted_by(|a, b| a >= b), "shorter files go less far: {lengths:?}");
    assert!(lengths.iter().all(|position| (recordings.begin..=whole).contains(position)), "{lengths:?}");
}

#[test]
fn newer_files_are_told_from_broken_ones() {
    let recordings = recordings();
    for (name, what) in [("one", "recording"), ("prompt", "snapshot")] {
        let (_place, copy) = recordings.copy(name);
        OpenOptions::new().write(true).open(&copy).unwrap().write_all_at(&[9], 8).unwrap();
        let ended = if name == "one" { twinstep(&["replay", &copy]) } else { twinstep(&["run", "--from", &copy]) };
        ended.refused(&[&copy, what, "newer Twinstep", "format 9", "up to 1", "what to do"]);
    }
}

#[test]
fn damaged_snapshots_are_found() {
    let recordings = recordings();
    let (_place, copy) = recordings.copy("prompt");
    let file = OpenOptions::new().read(true).write(true).open(&copy).unwrap();
    for place in places(&copy, std::fs::metadata(&copy).unwrap().len() / 2) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], place).unwrap();
        let ended = twinstep(&["run", "--no-input", "--from", &copy]);
        explained(&ended, &copy, &format!("flipped at {place}"));
        assert!(ended.console.is_empty(), "{ended:#?}");
        file.write_all_at(&byte, place).unwrap();
    }
}
