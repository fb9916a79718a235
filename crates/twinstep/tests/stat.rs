//! `twinstep stat` and the control socket as people and programs use them: of a VM that runs, of a pair, and of what must be refused.
mod common;

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use common::{User, boot, text, turn, words};
use rustix::process::Signal;
use serde_json::Value;

/// Where a user's sockets are.
fn sockets(user: &User) -> PathBuf {
    user.path().join("twinstep")
}

/// Work for the guest's shell until it is told to stop.
const LOOP: &str =
    "while [ ! -e /tmp/stop ]; do i=0; while [ $i -lt 500 ]; do i=$((i + 1)); done; done & echo it loops: $((6 * 7))";

fn number(value: &Value, path: &[&str]) -> f64 {
    let found = path.iter().fold(value, |value, key| &value[*key]);
    found.as_f64().unwrap_or_else(|| panic!("{path:?} is no number in {value}"))
}

/// What is true of every measurement.
fn is_sane(value: &Value) {
    let time = value["time"].as_object().unwrap();
    let shares: Vec<f64> = time.values().map(|share| share.as_f64().unwrap()).collect();
    assert_eq!(time.len(), 10, "{value}");
    assert!(shares.iter().all(|share| (0.0..=1.0).contains(share)), "{value}");
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{value}");
    assert!(number(value, &["samples"]) > 10.0, "{value}");
    assert!((0.0..1.2).contains(&number(value, &["processor"])), "{value}");
    assert!(number(value, &["busy_mips"]) >= number(value, &["mips"]), "{value}");
    assert!(number(value, &["gauges", "code_bytes"]) <= number(value, &["gauges", "code_capacity"]), "{value}");
    assert!(!value["verdict"].as_str().unwrap().is_empty(), "{value}");
}

#[test]
fn a_busy_guest_and_an_idle_one() {
    let _turn = turn(1);
    let user = User::new();
    let mut vm = user.start("run", &[&boot("128M", "shell"), &words(&["--name", "db", "--perf-map"])]);
    let map = format!("/tmp/perf-{}.map", vm.pid());
    vm.wait_console("# ");
    vm.type_line(LOOP);
    vm.wait_console("it loops: 42");

    let first = user.ask("stat", &["db", "--once", "--json"]).with(0).json();
    is_sane(&first);
    let second = user.ask("stat", &["--once", "--json", "--interval", "0.5"]).with(0).json();
    is_sane(&second);
    for busy in [&first, &second] {
        assert_eq!((busy["vm"]["name"].as_str(), busy["vm"]["side"].as_str()), (Some("db"), Some("alone")));
        assert_eq!(busy["vm"]["pid"].as_u64(), Some(vm.pid().into()));
        assert!(number(busy, &["mips"]) > 1.0 && number(busy, &["time", "guest"]) > 0.1, "{busy}");
        assert!(number(busy, &["time", "halted"]) < 0.5, "{busy}");
        // The host does not matter: what the guest executes makes so much happen.
        assert!(number(busy, &["rates", "engine.system_calls"]) > 0.0 && number(busy, &["rates", "engine.interrupts"]) > 0.0);
        // Every entry ends in an exit, but for those in which an instruction ran alone.
        let exits: f64 = busy["rates"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(k, _)| k.starts_with("exits."))
            .map(|(_, v)| v.as_f64().unwrap())
            .sum();
        assert!(exits > 0.0 && exits <= number(busy, &["rates", "engine.entries"]) + 1e-6, "{busy}");
    }
    assert!(number(&second, &["position"]) > number(&first, &["position"]));

    let table = user.ask("stat", &["db", "--once"]).with(0);
    for part in ["db (process", "MIPS while busy", "translator", "exits/s", "TLB/s", "devices/s"] {
        assert!(table.console.contains(part), "{table:#?}");
    }
    // One after the other, until the VM is no more. Standard output is no terminal: lines.
    let lines = user.start("stat", &[&words(&["db", "--interval", "0.2"])]);
    lines.wait_console("waits");
    vm.type_line("touch /tmp/stop; wait; echo it rests: $((6 * 7))");
    vm.wait_console("it rests: 42");
    let idle = user.ask("stat", &["db", "--once", "--json"]).with(0).json();
    is_sane(&idle);
    assert!(number(&idle, &["time", "halted"]) > 0.5, "{idle}");

    // Programs speak the same.
    let mut raw = BufReader::new(UnixStream::connect(sockets(&user).join("db.sock")).unwrap());
    for (request, part) in [
        ("{\"v\":1,\"do\":\"identify\"}", "\"side\":\"alone\""),
        ("{\"v\":1,\"do\":\"dance\"}", "\"code\":\"unknown-request\""),
        ("{\"v\":1,\"do\":\"stat\",\"loud\":1}", "\"code\":\"bad-request\""),
        ("{\"v\":9,\"do\":\"stat\"}", "\"code\":\"version\""),
        ("{\"v\":1,\"do\":\"stat\"}", "\"exits.lookup\""),
    ] {
        raw.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        raw.read_line(&mut answer).unwrap();
        assert!(answer.contains(part), "{request}: {answer}");
    }

    // Names are taken once, and those that nobody has are said to be so.
    let again = user.start("run", &[&boot("128M", "shell"), &words(&["--name", "db"])]).end();
    again.refused(&["a VM called 'db' runs already", "--name"]);
    user.start("run", &[&boot("128M", "shell"), &words(&["--name", "../db"])]).end().refused(&["cannot be a VM's name"]);
    user.ask("stat", &["other"]).refused(&["no VM called 'other' runs here", "name one of these: db"]);

    vm.type_line("poweroff -f");
    vm.end().with(0);
    lines.end().with(0).says(&["the VM 'db'"]);
    user.ask("stat", &[]).refused(&["no VM runs here", "twinstep run"]);
    assert_eq!(fs::read_dir(sockets(&user)).unwrap().count(), 0, "the socket went with its VM");
    let mapped = fs::read_to_string(&map).unwrap();
    fs::remove_file(&map).unwrap();
    for part in [" twinstep:enter\n", " kernel:ffffffff", ":trace\n", " user:"] {
        assert!(mapped.contains(part), "'{part}' is not in the map");
    }
}

#[test]
fn both_sides_of_a_pair_and_the_survivor() {
    let _turn = turn(2);
    let user = User::new();
    let arbiter = user.path().join("arbiter");
    fs::create_dir(&arbiter).unwrap();
    let arbiter = text(&arbiter);
    let standby = user.start("standby", &[&words(&["--name", "db-standby", "--listen", "127.0.0.1:0", "--arbiter", &arbiter])]);
    let address = standby.wait_said("waiting for a primary on ");
    user.ask("stat", &["db-standby"]).refused(&["waits for a primary"]);
    let pair = words(&["--name", "db", "--protect", &address, "--arbiter", &arbiter]);
    let mut primary = user.start("run", &[&boot("128M", "shell"), &pair]);
    primary.wait_said("protected: ");
    primary.wait_console("# ");
    user.ask("stat", &["--once"]).refused(&["several VMs run here", "db  (", "primary", "db-standby  (", "standby", "name one"]);
    primary.type_line(LOOP);
    primary.wait_console("it loops: 42");
    let mut positions = Vec::new();
    for (name, side) in [("db", "primary"), ("db-standby", "standby")] {
        let value = user.ask("stat", &[name, "--once", "--json"]).with(0).json();
        is_sane(&value);
        assert_eq!(value["vm"]["side"].as_str(), Some(side), "{value}");
        assert!(number(&value, &["mips"]) > 0.0, "{value}");
        positions.push(number(&value, &["position"]));
    }
    primary.kill();
    standby.wait_said("live: live in epoch 2");
    // The name of the dead is free, though its socket is still there.
    assert!(sockets(&user).join("db.sock").exists());
    let value = user.ask("stat", &["--once", "--json"]).with(0).json();
    is_sane(&value);
    assert_eq!((value["vm"]["name"].as_str(), value["vm"]["side"].as_str()), (Some("db-standby"), Some("survivor")));
    assert!(number(&value, &["position"]) > positions[1]);
    standby.signal(Signal::TERM);
    standby.end().with(5);
}

#[test]
fn folders_that_others_can_touch_are_refused() {
    let user = User::new();
    fs::create_dir(sockets(&user)).unwrap();
    fs::set_permissions(sockets(&user), Permissions::from_mode(0o755)).unwrap();
    let at = text(&sockets(&user));
    let run = || user.start("run", &[&boot("128M", "shell")]).end();
    for refused in [user.ask("stat", &[]), user.ask("stat", &["db"]), run()] {
        refused.refused(&[&at, "is not safe", "0755", "chmod 700"]);
    }
    fs::set_permissions(sockets(&user), Permissions::from_mode(0o700)).unwrap();
    user.ask("stat", &[]).refused(&["no VM runs here"]);
    // Root alone can give a folder to somebody else.
    if std::os::unix::fs::chown(sockets(&user), Some(12345), None).is_ok() {
        for refused in [user.ask("stat", &[]), run()] {
            refused.refused(&[&at, "is not safe", "it belongs to user 12345"]);
        }
    }
}
