//! The command line: words to calls, results to text and exit status. No logic lives here.
//!
//! Exit status: 0 the guest switched itself off (or the command did what it was asked), 1 an error, 2 a wrong command line,
//! 3 the guest crashed, 4 the guest asked for a reset, 5 the VM was stopped from outside, 6 a replay differs from its recording, 7 a vote is for the
//! standby, 8 for neither side; with `--debug-exit` the guest's own, which is odd.
mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Virtual machines that outlive their hosts.
#[derive(Parser)]
#[command(name = "twinstep", version, about, long_about = None)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a virtual machine, its console on this terminal
    Run(commands::run::Arguments),
    /// Waits for a VM to protect, follows it, and goes live when its host dies
    Standby(commands::standby::Arguments),
    /// Replays a recording and checks it
    Replay(commands::replay::Arguments),
    /// Says which side of a pair is right, when they have made different outputs: whose this host makes
    Vote(commands::vote::Arguments),
    /// Shows where a running VM's time goes
    Stat(commands::stat::Arguments),
    /// Says how a VM and its pair do
    Status(commands::status::Arguments),
    /// Shows all VMs of this user, live, on the whole terminal
    Top(commands::top::Arguments),
    /// Shows what happened to a VM so far
    Events(commands::events::Arguments),
    /// Shows the promise: a protected pair on this machine, a real client, the primary killed, nothing lost
    Demo(commands::demo::Arguments),
    /// Has the standby of a running VM go live, and ends it here: for maintenance of this host
    Failover(commands::failover::Arguments),
    /// Shows whose a VM's epochs are, and lets a person decide where no arbiter can be reached
    Arbiter(commands::arbiter::Arguments),
    /// Makes certificates for the hosts of pairs
    Pki(commands::pki::Arguments),
    /// Breaks things on purpose, for tests
    #[command(hide = true)]
    Debug(commands::debug::Arguments),
    /// Says what this host offers and what Twinstep will use
    Doctor(commands::doctor::Arguments),
    /// Joins virtual machines and passt to one Ethernet
    Switch(commands::switch::Arguments),
}

fn main() -> ExitCode {
    twinstep_host::terminal::restore_on_panic();
    // TWINSTEP_LOG=debug shows more.
    let filter = tracing_subscriber::EnvFilter::try_from_env("TWINSTEP_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).without_time().init();
    let result = match Arguments::parse().command {
        Command::Run(arguments) => commands::run::run(arguments),
        Command::Standby(arguments) => commands::standby::run(arguments),
        Command::Replay(arguments) => commands::replay::run(arguments),
        Command::Vote(arguments) => commands::vote::run(arguments),
        Command::Stat(arguments) => commands::stat::run(arguments),
        Command::Status(arguments) => commands::status::run(arguments),
        Command::Top(arguments) => commands::top::run(arguments),
        Command::Events(arguments) => commands::events::run(arguments),
        Command::Demo(arguments) => commands::demo::run(arguments),
        Command::Failover(arguments) => commands::failover::run(arguments),
        Command::Arbiter(arguments) => commands::arbiter::run(arguments),
        Command::Pki(arguments) => commands::pki::run(arguments),
        Command::Debug(arguments) => commands::debug::run(arguments),
        Command::Doctor(arguments) => commands::doctor::run(arguments),
        Command::Switch(arguments) => commands::switch::run(arguments),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("twinstep: {e:#}");
            ExitCode::FAILURE
        }
    }
}
