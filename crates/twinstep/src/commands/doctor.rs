//! `twinstep doctor`.
use std::process::ExitCode;

use clap::Args;
use twinstep_host::{doctor, packages::Store};

#[derive(Args)]
pub struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let findings = doctor::examine(Store::default_folder());
    println!("{}", if arguments.json { findings.in_json() } else { findings.in_words() });
    Ok(if findings.healthy() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
