//! The judge before servers that are right, wrong, slow and gone.

use super::*;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;

/// What a fake server does wrong, at its n-th command.
#[derive(Clone, Copy)]
enum Fault {
    None,
    SkipsACount,
    RepeatsACount,
    ForgetsAWrite,
    HangsUp,
    Stalls,
    Refuses,
}

/// A Redis with one connection.
fn server(fault: Fault, at: u64) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut writer = stream.try_clone().unwrap();
        let mut reader = BufReader::new(stream);
        let mut store: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut n = 0;
        let mut line = String::new();
        loop {
            line.clear();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let count: usize = line[1..].trim().parse().unwrap();
            let mut words = Vec::new();
            for _ in 0..count {
                line.clear();
                reader.read_line(&mut line).unwrap();
                let mut word = vec![0; line[1..].trim().parse::<usize>().unwrap() + 2];
                reader.read_exact(&mut word).unwrap();
                word.truncate(word.len() - 2);
                words.push(word);
            }
            n += 1;
            let hit = n == at;
            let reply = match (&words[0][..], fault) {
                (_, Fault::HangsUp) if hit => {
                    // A socket closed over commands that were not read is a reset, which is another fault.
                    writer.shutdown(std::net::Shutdown::Write).unwrap();
                    let _ = std::io::copy(&mut reader, &mut std::io::sink());
                    return;
                }
                (_, Fault::Stalls) if n >= at => continue,
                (b"PING", _) => b"+PONG\r\n".to_vec(),
                (b"INCR", _) => {
                    let value = store.entry(words[1].clone()).or_insert_with(|| b"0".to_vec());
                    let mut number: i64 = std::str::from_utf8(value).unwrap().parse().unwrap();
                    number += match fault {
                        Fault::SkipsACount if hit => 2,
                        Fault::RepeatsACount if hit => 0,
                        _ => 1,
                    };
                    *value = number.to_string().into_bytes();
                    format!(":{number}\r\n").into_bytes()
                }
                (b"SET", Fault::Refuses) if n >= at => b"-OOM command not allowed\r\n".to_vec(),
                (b"SET", Fault::ForgetsAWrite) if hit => b"+OK\r\n".to_vec(),
                (b"SET", _) => {
                    store.insert(words[1].clone(), words[2].clone());
                    b"+OK\r\n".to_vec()
                }
                (b"GET", _) => match store.get(&words[1]) {
                    Some(value) => [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat(),
                    None => b"$-1\r\n".to_vec(),
                },
                _ => b"-ERR unknown command\r\n".to_vec(),
            };
            if writer.write_all(&reply).is_err() {
                return;
            }
        }
    });
    address
}

/// Runs until so many replies have come or the check has ended.
fn check(fault: Fault, at: u64, keys: usize) -> Report {
    let mut options = Options { keys, ..Options::new(server(fault, at)) };
    if matches!(fault, Fault::Stalls) {
        // It is waited for to the end; of every other server nobody says how fast it is on a busy machine.
        options.patience = Duration::from_millis(500);
    }
    let running = Running::start(options).unwrap();
    while running.replies() < 2000 && !running.has_ended() {
        std::thread::yield_now();
    }
    running.mark(Instant::now());
    running.finish().unwrap()
}

#[test]
fn a_good_server_passes() {
    let report = check(Fault::None, 0, 100);
    assert!(report.passed(), "{report:?}");
    assert!(report.replies >= 2000 && report.gets > 0);
    assert_eq!(report.counter as u64, report.increments);
    assert_eq!(report.keys_verified, 100);
    assert_eq!(report.interruptions.len(), 1);
    let text = serde_json::to_string(&report).unwrap();
    let back: Report = serde_json::from_str(&text).unwrap();
    assert_eq!((back.failure, back.counter, back.latency), (None, report.counter, report.latency));
}

#[test]
fn every_fault_is_found_and_named() {
    // The first command is a PING, and after it INCRs are the odd ones of every eight.
    for (fault, at, words) in [
        (Fault::SkipsACount, 1 + 81, "a reply was lost"),
        (Fault::RepeatsACount, 1 + 81, "an acknowledged increment was lost"),
        (Fault::HangsUp, 500, "closed the connection"),
        (Fault::Stalls, 500, "no reply for"),
        (Fault::Refuses, 500, "OOM"),
    ] {
        let failure = check(fault, at, 100).failure.expect("the fault is found");
        assert!(failure.contains(words), "{failure}");
    }
    // A forgotten write of a key that is not written again is found at the end (or by a GET in passing).
    let failure = check(Fault::ForgetsAWrite, 1 + 82, 100_000).failure.expect("the fault is found");
    assert!(failure.contains("acknowledged write is missing") || failure.contains("Get"), "{failure}");
}

#[test]
fn keys_are_read_back_under_way() {
    let running = Running::start(Options { keys: 100, ..Options::new(server(Fault::None, 0)) }).unwrap();
    while running.replies() < 1000 {
        std::thread::yield_now();
    }
    assert_eq!(running.verify(), Some(100));
    let before = running.replies();
    while running.replies() < before + 100 {
        std::thread::yield_now();
    }
    assert!(running.finish().unwrap().passed());
    // A write that was forgotten is found, whoever asks first.
    let options = Options { keys: 100_000, ..Options::new(server(Fault::ForgetsAWrite, 1 + 82)) };
    let running = Running::start(options).unwrap();
    while running.replies() < 200 && !running.has_ended() {
        std::thread::yield_now();
    }
    assert_eq!(running.verify(), None);
    assert!(!running.finish().unwrap().passed());
}

#[test]
fn nobody_there_is_an_error_at_the_start() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Running::start(Options::new(address)).unwrap_err().to_string();
    assert!(error.contains(&address.to_string()) && error.contains("what to do"), "{error}");
}
