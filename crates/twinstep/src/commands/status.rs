//! `twinstep status`.
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use twinstep_host::control::client::Connection;
use twinstep_host::control::folder;
use twinstep_host::events::Kept;
use twinstep_host::status::view::{self, Seen};
use twinstep_host::status::{Status, words};

#[derive(Args)]
pub struct Arguments {
    /// The VM's name (`run --name`); without, and if several run, one line for each
    vm: Option<String>,
    /// Print JSON: an object, or one a line for several VMs
    #[arg(long)]
    json: bool,
    /// So many of the last events
    #[arg(long, value_name = "N", default_value_t = 5)]
    events: usize,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let folder = folder::of_this_user();
    if arguments.vm.is_none() {
        let seen = view::all(&folder)?;
        if seen.len() > 1 {
            return Ok(several(&arguments, &seen));
        }
    }
    let mut connection = Connection::open_named(&folder, arguments.vm.as_deref())?;
    let (status, events) = (connection.status()?, connection.events()?);
    print(&if arguments.json {
        format!("{}\n", object(&status, last(&events, arguments.events)))
    } else {
        let mut text = words::table(&status);
        for event in last(&events, arguments.events) {
            let _ = writeln!(text, "  {}", words::event(event));
        }
        text
    });
    Ok(ExitCode::SUCCESS)
}

fn last(events: &[Kept], n: usize) -> &[Kept] {
    &events[events.len().saturating_sub(n)..]
}

fn object(status: &Status, events: &[Kept]) -> serde_json::Value {
    let mut value = json!(status);
    value["events"] = json!(events);
    value
}

/// A line for each; one that does not answer says why, and is an error in the end.
fn several(arguments: &Arguments, seen: &[Seen]) -> ExitCode {
    let mut text = if arguments.json { String::new() } else { format!("{}\n", words::head()) };
    let mut code = ExitCode::SUCCESS;
    for Seen { name, answer } in seen {
        let line = match answer {
            Ok((status, events)) if arguments.json => object(status, last(events, arguments.events)).to_string(),
            Ok((status, _)) => words::line(status),
            Err(why) => {
                eprintln!("{name}: {why}");
                code = ExitCode::FAILURE;
                continue;
            }
        };
        let _ = writeln!(text, "{line}");
    }
    print(&text);
    code
}

fn print(text: &str) {
    // Whoever read this may have seen enough.
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
