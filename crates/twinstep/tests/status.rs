//! `twinstep status`, `events`, `top` and `/metrics` as people and programs use them: of a VM that runs alone, of both sides of a pair, of the survivor.
mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use common::{PATIENCE, Twinstep, User, boot, text, turn, words};
use rustix::process::Signal;
use serde_json::Value;

#[track_caller]
fn number(value: &Value, path: &[&str]) -> f64 {
    let found = path.iter().fold(value, |value, key| &value[*key]);
    found.as_f64().unwrap_or_else(|| panic!("{path:?} is no number in {value}"))
}

#[track_caller]
fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} is no text in {value}"))
}

/// What is true of every status.
#[track_caller]
fn is_sane(value: &Value) {
    for quantiles in [&value["commit"]["minute"], &value["commit"]["total"]] {
        let n = |key| number(quantiles, &[key]);
        assert!(n("p50_ns") <= n("p99_ns") && n("p99_ns") <= n("max_ns"), "{value}");
        assert!(n("max_ns") <= n("sum_ns") || n("count") == 0.0, "{value}");
    }
    assert!(number(value, &["commit", "minute", "count"]) <= number(value, &["commit", "total", "count"]), "{value}");
    assert!(number(value, &["lag", "unreceived_bytes"]) <= number(value, &["lag", "unreplayed_bytes"]), "{value}");
    assert_eq!(value["throttled"].as_bool().unwrap(), value["throttle_reason"].is_string(), "{value}");
    assert_eq!(number(value, &["counts", "resyncs"]), 0.0);
    let events = value["events"].as_array().unwrap();
    for (a, b) in events.iter().zip(events.iter().skip(1)) {
        assert!(number(a, &["number"]) < number(b, &["number"]) && number(a, &["times"]) >= 1.0, "{value}");
        assert!(number(a, &["at_ns"]) <= number(b, &["at_ns"]), "{value}");
    }
}

/// The kinds of events that were told, in order.
fn kinds(value: &Value) -> Vec<&str> {
    value["events"].as_array().unwrap().iter().map(|event| word(event, "what")).collect()
}

/// These are among them, in this order.
#[track_caller]
fn in_order(value: &Value, wanted: &[&str]) {
    let kinds = kinds(value);
    let mut rest = kinds.iter();
    for kind in wanted {
        assert!(rest.any(|found| found == kind), "'{kind}' is not where it should be in {kinds:?}");
    }
}

/// One sample: its metric, its labels, its value.
type Sample = (String, BTreeMap<String, String>, f64);

/// Reads a page of metrics as strictly as the format allows.
#[track_caller]
fn samples(page: &str) -> Vec<Sample> {
    let (mut helped, mut kinds, mut found) = (Vec::new(), BTreeMap::new(), Vec::<Sample>::new());
    let mut current = String::new();
    assert!(page.ends_with('\n'));
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(!help.is_empty() && !helped.contains(&name), "{line}");
            helped.push(name);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["gauge", "counter", "summary"].contains(&kind) && helped.last() == Some(&name), "{line}");
            assert!(name.starts_with("twinstep_") && (kind == "counter") == name.ends_with("_total"), "{line}");
            assert!(kinds.insert(name.to_owned(), kind).is_none(), "{line}");
            current = name.to_owned();
        } else {
            let (name, rest) = line.split_once('{').unwrap();
            let (labels, value) = rest.rsplit_once("} ").unwrap();
            let of = if kinds[&current] == "summary" { name.trim_end_matches("_sum").trim_end_matches("_count") } else { name };
            assert_eq!(of, current, "samples of a metric stand together, after its TYPE");
            let labels: BTreeMap<String, String> = labels
                .split(',')
                .map(|label| label.split_once('=').unwrap())
                .map(|(name, value)| (name.to_owned(), value.strip_prefix('"').unwrap().strip_suffix('"').unwrap().to_owned()))
                .collect();
            assert!(labels.contains_key("vm") && labels.contains_key("side"), "{line}");
            assert!(found.iter().all(|(n, l, _)| (n.as_str(), l) != (name, &labels)), "twice: {line}");
            found.push((name.to_owned(), labels, value.parse().unwrap()));
        }
    }
    found
}

#[track_caller]
fn sample(samples: &[Sample], name: &str) -> f64 {
    samples.iter().find(|(found, ..)| found == name).unwrap_or_else(|| panic!("there is no {name} in {samples:?}")).2
}

/// Asks for a page; gives its first line and its body.
fn get(address: &str, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[track_caller]
fn metrics(address: &str, name: &str, side: &str) -> Vec<Sample> {
    let (status, page) = get(address, "GET /metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    let samples = samples(&page);
    assert!(samples.iter().all(|(_, labels, _)| labels["vm"] == name && labels["side"] == side), "{page}");
    samples
}

/// Where a process says that its metrics are.
#[track_caller]
fn metrics_address(process: &Twinstep) -> String {
    process.wait_said("metrics at http://").strip_suffix("/metrics").unwrap().to_owned()
}

#[test]
fn a_vm_that_runs_alone() {
    let _turn = turn(1);
    let user = User::new();
    let mut vm = user.start("run", &[&boot("128M", "shell"), &words(&["--name", "solo", "--metrics", "127.0.0.1:0"])]);
    let page = metrics_address(&vm);
    vm.wait_console("# ");
    let first = user.status("solo");
    is_sane(&first);
    let words_of = ["name", "side", "state"].map(|key| word(&first, key));
    assert_eq!(words_of, ["solo", "alone", "unprotected"]);
    assert_eq!(first["pid"].as_u64(), Some(vm.pid().into()));
    for nobody in ["epoch", "vm", "peer", "heartbeat_age_ns", "throttle_reason"] {
        assert!(first[nobody].is_null(), "{nobody} in {first}");
    }
    // What the kernel has printed has left.
    let released = number(&first, &["counts", "outputs_released"]);
    assert!(released > 0.0, "{first}");
    vm.type_line("echo it counts: $((6 * 7))");
    vm.wait_console("it counts: 42");
    user.status_with("solo", "more outputs", |now| number(now, &["counts", "outputs_released"]) > released);
    let table = user.ask("status", &[]).with(0);
    for part in ["solo (process", "unprotected, epoch -", "runs freely", "0 failovers"] {
        assert!(table.console.contains(part), "{table:#?}");
    }

    let counted = metrics(&page, "solo", "alone");
    let retired = sample(&counted, "twinstep_instructions_retired_total");
    assert!(retired > 1e6 && sample(&counted, "twinstep_outputs_released_total") >= released, "{counted:?}");
    assert!(sample(&counted, "twinstep_machine_counts_total") >= 0.0 && sample(&counted, "twinstep_code_cache_bytes") > 0.0);
    vm.type_line("echo it counts on: $((6 * 7))");
    vm.wait_console("it counts on: 42");
    assert!(sample(&metrics(&page, "solo", "alone"), "twinstep_instructions_retired_total") > retired);
    for (request, status) in [("GET /", "404"), ("GET /metrics/x", "404"), ("POST /metrics", "405"), ("HEAD /metrics", "405")] {
        let (found, _) = get(&page, request);
        assert!(found.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {found}");
    }
    let taken = user.start("run", &[&boot("128M", "shell"), &words(&["--name", "other", "--metrics", &page])]).end();
    taken.refused(&["cannot serve metrics on", &page, "a free port"]);

    // Programs speak the same.
    let mut raw = BufReader::new(UnixStream::connect(user.path().join("twinstep/solo.sock")).unwrap());
    for (request, part) in [
        ("{\"v\":1,\"do\":\"identify\"}", "[\"identify\",\"stat\",\"status\",\"events\",\"failover\",\"override\",\"flip-bit\"]"),
        ("{\"v\":1,\"do\":\"status\"}", "\"state\":\"unprotected\""),
        ("{\"v\":1,\"do\":\"events\"}", "\"events\":["),
        ("{\"v\":1,\"do\":\"events\",\"last\":3}", "\"code\":\"bad-request\""),
        ("{\"v\":2,\"do\":\"status\"}", "\"code\":\"version\""),
    ] {
        raw.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        raw.read_line(&mut answer).unwrap();
        assert!(answer.contains(part), "{request}: {answer}");
    }

    user.ask("status", &["other"]).refused(&["no VM called 'other' runs here", "name one of these: solo"]);
    user.ask("events", &["other"]).refused(&["no VM called 'other' runs here"]);
    user.ask("status", &["solo", "--events", "many"]).refused(&["many", "--events"]);
    let followed = user.start("events", &[&words(&["--follow", "--json"])]);
    vm.type_line("poweroff -f");
    vm.end().with(0);
    followed.end().with(0).says(&["the VM 'solo'"]);
    for command in ["status", "events"] {
        user.ask(command, &[]).refused(&["no VM runs here", "twinstep run"]);
    }
}

#[test]
fn both_sides_of_a_pair_and_the_survivor() {
    let _turn = turn(2);
    let user = User::new();
    let arbiter = user.path().join("arbiter");
    fs::create_dir(&arbiter).unwrap();
    let arbiter = text(&arbiter);
    let served = words(&["--metrics", "127.0.0.1:0"]);
    let listen = words(&["--name", "db-standby", "--listen", "127.0.0.1:0", "--arbiter", &arbiter]);
    let standby = user.start("standby", &[&listen, &served]);
    let second_page = metrics_address(&standby);
    let address = standby.wait_said("waiting for a primary on ");
    let waiting = user.status("db-standby");
    is_sane(&waiting);
    assert_eq!(["side", "state"].map(|key| word(&waiting, key)), ["standby", "listening"]);
    assert_eq!(kinds(&waiting), ["metrics", "listening"]);
    let counted = metrics(&second_page, "db-standby", "standby");
    assert!(
        counted.iter().all(|(name, ..)| name != "twinstep_instructions_retired_total"),
        "there is no machine yet: {counted:?}"
    );

    let pair = words(&["--name", "db", "--protect", &address, "--arbiter", &arbiter]);
    let mut primary = user.start("run", &[&boot("128M", "shell"), &pair, &served]);
    let first_page = metrics_address(&primary);
    primary.wait_said("protected: ");
    primary.wait_console("# ");
    primary.type_line("echo it runs: $((6 * 7))");
    primary.wait_console("it runs: 42");
    // What was shown has been held and released.
    let first =
        user.status_with("db", "commits", |s| number(s, &["commit", "total", "count"]) > 0.0 && s["log"]["output"].is_object());
    is_sane(&first);
    assert_eq!(["side", "state", "peer"].map(|key| word(&first, key)), ["primary", "protected", &address]);
    assert_eq!((number(&first, &["epoch"]), number(&first, &["counts", "failovers"])), (1.0, 0.0));
    assert!(number(&first, &["heartbeat_age_ns"]) >= 0.0 && number(&first, &["commit", "total", "p50_ns"]) > 0.0, "{first}");
    assert!(number(&first, &["log", "clock", "entries"]) > 0.0 && number(&first, &["log", "output", "bytes"]) > 0.0, "{first}");
    in_order(&first, &["notice", "image", "protected"]);
    let second = user.status_with("db-standby", "following", |s| s["state"] == "following" && s["log"]["output"].is_object());
    is_sane(&second);
    assert_eq!((word(&second, "side"), number(&second, &["epoch"])), ("standby", 1.0));
    assert_eq!(word(&first, "vm"), word(&second, "vm"), "both say which VM it is");
    assert!(second["peer"].is_string() && number(&second, &["heartbeat_age_ns"]) >= 0.0, "{second}");
    in_order(&second, &["listening", "connected", "accepted", "restored"]);

    let counted = metrics(&first_page, "db", "primary");
    assert!(counted.iter().any(|(name, labels, _)| name == "twinstep_state" && labels["state"] == "protected"), "{counted:?}");
    assert!(sample(&counted, "twinstep_commit_latency_seconds_count") >= number(&first, &["commit", "total", "count"]));
    for name in ["twinstep_commit_latency_seconds_sum", "twinstep_log_bytes_total", "twinstep_instructions_retired_total"] {
        assert!(sample(&counted, name) > 0.0, "{name}: {counted:?}");
    }
    let counted = metrics(&second_page, "db-standby", "standby");
    assert_eq!((sample(&counted, "twinstep_epoch"), sample(&counted, "twinstep_failovers_total")), (1.0, 0.0));

    // One line for each.
    let lines = user.ask("status", &[]).with(0);
    for (name, side, state) in [("db ", "primary", "protected"), ("db-standby ", "standby", "following")] {
        let line = lines.console.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{lines:#?}"));
        assert!(line.contains(side) && line.contains(state), "{line}");
    }
    let objects: Vec<Value> =
        user.ask("status", &["--json"]).with(0).console.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.iter().map(|o| word(o, "name")).collect::<Vec<_>>(), ["db", "db-standby"]);
    let table = user.ask("status", &["db", "--events", "1000"]).with(0);
    for part in ["protected, epoch 1", "to acknowledge", "commit, all", "protected  "] {
        assert!(table.console.contains(part), "'{part}' is not shown: {table:#?}");
    }
    user.ask("events", &[]).refused(&["several VMs run here", "db-standby", "name one of them"]);

    primary.kill();
    standby.wait_said("live: live in epoch 2");
    let survivor = user.status("db-standby");
    is_sane(&survivor);
    assert_eq!(["side", "state"].map(|key| word(&survivor, key)), ["survivor", "unprotected"]);
    assert_eq!((number(&survivor, &["epoch"]), number(&survivor, &["counts", "failovers"])), (2.0, 1.0));
    assert_eq!(word(&survivor, "vm"), word(&first, "vm"), "it is the same VM");
    assert!(survivor["peer"].is_null() && survivor["heartbeat_age_ns"].is_null(), "{survivor}");
    in_order(&survivor, &["listening", "connected", "accepted", "restored", "peer-lost", "arbiter", "consumed", "live"]);
    let live = survivor["events"].as_array().unwrap().iter().find(|event| event["what"] == "live").unwrap();
    assert_eq!(number(live, &["figures", "epoch"]), 2.0);
    let told = user.ask("events", &["db-standby", "--json"]).with(0).console;
    let told: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(told.len(), survivor["events"].as_array().unwrap().len());
    assert!(user.ask("events", &[]).with(0).console.contains("live in epoch 2"));
    let counted = metrics(&second_page, "db-standby", "survivor");
    assert_eq!((sample(&counted, "twinstep_epoch"), sample(&counted, "twinstep_failovers_total")), (2.0, 1.0));
    assert!(sample(&counted, "twinstep_instructions_retired_total") > 0.0);
    standby.signal(Signal::TERM);
    standby.end().with(5);
}

#[test]
fn a_primary_that_lost_its_standby() {
    let _turn = turn(2);
    let user = User::new();
    let arbiter = text(user.path());
    let mut standby = user.start("standby", &[&words(&["--name", "other", "--listen", "127.0.0.1:0", "--arbiter", &arbiter])]);
    let address = standby.wait_said("waiting for a primary on ");
    let pair = words(&["--name", "db", "--protect", &address, "--arbiter", &arbiter]);
    let primary = user.start("run", &[&boot("128M", "shell"), &pair]);
    primary.wait_said("protected: ");
    standby.kill();
    primary.wait_said("alone: going on alone in epoch 2");
    // At once: whoever is told of a change and asks hears of what it changed to.
    let status = user.status("db");
    is_sane(&status);
    assert_eq!(["side", "state"].map(|key| word(&status, key)), ["primary", "unprotected"]);
    assert_eq!((number(&status, &["epoch"]), number(&status, &["counts", "failovers"])), (2.0, 0.0));
    assert!(status["peer"].is_null() && status["heartbeat_age_ns"].is_null() && status["vm"].is_string(), "{status}");
    in_order(&status, &["protected", "arbiter", "alone"]);
    let line = user.ask("status", &["db"]).with(0);
    assert!(!line.console.contains("to replay"), "nobody is behind: {line:#?}");
    primary.signal(Signal::TERM);
    primary.end().with(5);
}

#[test]
fn top_needs_a_terminal() {
    User::new().ask("top", &[]).refused(&["standard output is none", "twinstep status"]);
}

/// On a pseudo terminal it draws, obeys, and leaves the terminal as it was.
#[test]
fn top_on_a_terminal() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let user = User::new();
    let standby = words(&["--name", "waiting", "--listen", "127.0.0.1:0", "--arbiter", &text(user.path())]);
    let standby = user.start("standby", &[&standby]);
    standby.wait_said("waiting for a primary on ");
    let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let name = ptsname(&screen, Vec::new()).unwrap().into_string().unwrap();
    let size = rustix::termios::Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&screen, size).unwrap();
    let terminal = fs::File::options().read(true).write(true).open(&name).unwrap();
    let before = rustix::termios::tcgetattr(&terminal).unwrap().local_modes;
    let mut top = std::process::Command::new(env!("CARGO_BIN_EXE_twinstep"))
        .arg("top")
        .env("XDG_RUNTIME_DIR", user.path())
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .stderr(terminal)
        .spawn()
        .unwrap();
    // One that hangs ends as well, and with it what is read below.
    let pid = rustix::process::Pid::from_child(&top);
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if wait.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    });
    let mut screen = fs::File::from(screen);
    let (mut shown, mut buffer, mut asked) = (String::new(), [0; 4096], false);
    // What is drawn last, after `q`, is that the ordinary screen is back.
    while !shown.contains("\x1b[?1049l") {
        let n = screen.read(&mut buffer).unwrap_or_else(|e| panic!("top ended: {e}\n{shown}"));
        shown.push_str(&String::from_utf8_lossy(&buffer[..n]));
        // Words: where a blank was and is, nothing is written.
        if !asked && ["listening", "waiting", "primary", "epoch"].iter().all(|word| shown.contains(word)) {
            screen.write_all(b"\x1b[Bq").unwrap();
            asked = true;
        }
    }
    assert!(top.wait().unwrap().success() && asked, "{shown}");
    drop(done);
    watch.join().unwrap();
    assert_eq!(rustix::termios::tcgetattr(&screen).unwrap().local_modes, before);
    standby.signal(Signal::TERM);
    standby.end().with(5);
}
