//! The demo's client on its own: `redis-check HOST:PORT SECONDS` prints the report as JSON.

use std::process::ExitCode;
use std::time::Duration;

use twinstep_host::redis_check::{Options, Running};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match &arguments[..] {
        [address, seconds] => address.parse().ok().zip(seconds.parse::<f64>().ok()),
        _ => None,
    };
    let Some((address, seconds)) = parsed else {
        eprintln!("usage: redis-check HOST:PORT SECONDS");
        return ExitCode::from(2);
    };
    let check = || {
        let running = Running::start(Options::new(address))?;
        std::thread::sleep(Duration::from_secs_f64(seconds));
        running.finish()
    };
    match check() {
        Ok(report) => {
            println!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
            if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("redis-check: {e}");
            ExitCode::FAILURE
        }
    }
}
