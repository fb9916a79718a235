//! `twinstep doctor`.
use std::process::ExitCode;

use clap::Args;

#[derive(Args)]
pub struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let _ = arguments.json;
    Ok(ExitCode::SUCCESS)
}
