//! The demo's client on its own: `redis-load ADDRESS SECONDS [PIPELINE]`. Prints its report as JSON; fails if anything was lost.
use std::process::ExitCode;
use std::time::Duration;

use twinstep_host::redis_check::{Options, Running};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match arguments.as_slice() {
        [address, seconds, rest @ ..] => address
            .parse()
            .ok()
            .zip(seconds.parse().ok())
            .map(|(a, s)| (a, s, rest.first().and_then(|p| p.parse().ok()).unwrap_or(4))),
        _ => None,
    };
    let Some((address, seconds, pipeline)) = parsed else {
        eprintln!("usage: redis-load IP:PORT SECONDS [PIPELINE]");
        return ExitCode::from(2);
    };
    let running = match Running::start(Options { pipeline, ..Options::new(address) }) {
        Ok(running) => running,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
    };
    std::thread::sleep(Duration::from_secs(seconds));
    match running.finish() {
        Ok(report) => {
            println!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
            if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
