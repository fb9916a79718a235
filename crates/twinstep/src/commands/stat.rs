//! `twinstep stat`.
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use twinstep_host::control::client::Connection;
use twinstep_host::control::folder;
use twinstep_host::stat::measure::Measure;
use twinstep_host::stat::words;

#[derive(Args)]
pub struct Arguments {
    /// The VM's name (`run --name`); not needed if only one runs
    vm: Option<String>,
    /// Seconds between two figures
    #[arg(long, value_name = "S", default_value_t = 1.0, value_parser = interval)]
    interval: f64,
    /// Measure once and end
    #[arg(long)]
    once: bool,
    /// Print a JSON object for each measurement, one a line
    #[arg(long)]
    json: bool,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.1..=60.0).contains(s));
    seconds.ok_or_else(|| format!("'{text}' is not a number of seconds from 0.1 to 60"))
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let folder = folder::of_this_user();
    let mut connection = Connection::open_named(&folder, arguments.vm.as_deref())?;
    let mut out = std::io::stdout();
    let live = out.is_terminal() && !arguments.once && !arguments.json;
    let mut before = connection.stat()?;
    for round in 0u64.. {
        std::thread::sleep(Duration::from_secs_f64(arguments.interval));
        // A standby may have become the survivor meanwhile.
        let after = connection.identify().and_then(|vm| Ok((vm, connection.stat()?)));
        let (vm, after) = match after {
            Ok(after) => after,
            Err(e) if round == 0 => return Err(e.into()),
            // What was watched has ended, as everything does.
            Err(e) => {
                eprintln!("{e}");
                break;
            }
        };
        let measure = Measure::between(&before, &after);
        let text = if arguments.json {
            let mut value = json!(measure);
            value["vm"] = json!({ "name": vm.name, "pid": vm.pid, "side": vm.side });
            format!("{value}\n")
        } else if arguments.once {
            words::table(&vm, &measure)
        } else if live {
            // From the top, and what was there before is gone.
            format!("\x1b[H\x1b[J{}", words::table(&vm, &measure))
        } else {
            let head = if round.is_multiple_of(20) { format!("{}\n", words::head()) } else { String::new() };
            format!("{head}{}\n", words::line(&measure))
        };
        // Whoever read this may have seen enough.
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() || arguments.once {
            break;
        }
        before = after;
    }
    Ok(ExitCode::SUCCESS)
}
