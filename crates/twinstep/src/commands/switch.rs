//! `twinstep switch`.
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use twinstep_host::switch::{Options, Switch};

#[derive(Args)]
pub struct Arguments {
    /// The socket to listen on (length-prefixed frames, as passt and QEMU's stream netdev speak)
    #[arg(long, value_name = "SOCKET")]
    listen: PathBuf,
    /// A socket to connect to, such as passt's (can be given several times)
    #[arg(long, value_name = "SOCKET")]
    uplink: Vec<PathBuf>,
    #[command(flatten)]
    arbiter: super::arbiter::ArbiterArguments,
    /// Say nothing about ports that come and go
    #[arg(long)]
    quiet: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let options =
        Options { listen: arguments.listen, uplinks: arguments.uplink, arbiter: arguments.arbiter.spec()?, ..Options::default() };
    let quiet = arguments.quiet;
    Switch::bind(options)?.run(&mut |event| {
        if !quiet {
            eprintln!("switch: {event:?}");
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
