//! `twinstep events`.
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use twinstep_host::control::client::Connection;
use twinstep_host::control::folder;
use twinstep_host::status::words;

/// Time between two questions of one who follows.
const INTERVAL: Duration = Duration::from_millis(500);

#[derive(Args)]
pub struct Arguments {
    /// The VM's name (`run --name`); not needed if only one runs
    vm: Option<String>,
    /// Go on with those that happen from now on, until the VM ends
    #[arg(long)]
    follow: bool,
    /// Print a JSON object for each event, one a line
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let folder = folder::of_this_user();
    let mut connection = Connection::open_named(&folder, arguments.vm.as_deref())?;
    let mut out = std::io::stdout();
    let mut events = connection.events()?;
    let mut told = 0;
    loop {
        for event in events.iter().filter(|event| event.number > told) {
            let line = if arguments.json { json!(event).to_string() } else { words::event(event) };
            // Whoever read this may have seen enough.
            if writeln!(out, "{line}").is_err() {
                return Ok(ExitCode::SUCCESS);
            }
        }
        told = events.last().map_or(told, |event| event.number);
        if out.flush().is_err() || !arguments.follow {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(INTERVAL);
        events = match connection.events() {
            Ok(events) => events,
            // What was watched has ended, as everything does.
            Err(e) => {
                eprintln!("{e}");
                return Ok(ExitCode::SUCCESS);
            }
        };
    }
}
