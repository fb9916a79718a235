//! `twinstep arbiter`, and `--arbiter` with what belongs to it, the same for every command that takes one.
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use twinstep_host::arbiter::{ArbiterOptions, ArbiterSpec};
use twinstep_host::control::client::Connection;
use twinstep_host::control::folder;

#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows who has won which epoch of a VM
    Show(Show),
    /// Lets a side go on that lost its peer and waits for an arbiter that cannot be reached.
    ///
    /// DANGER: only for who KNOWS that the other side is dead: its host is switched off, or cannot come back. If it runs, or wakes up later, two machines run as one, with two
    /// histories, and what the network and shared disks make of that cannot be undone. The arbiter hears of the decision as soon as it answers; if it knows better, the side that was let go stops then.
    Override(Override),
}

#[derive(Args)]
struct Show {
    /// The name of a VM that runs here, or a VM's id (32 hexadecimal digits; the events have it); not needed if only one VM runs here
    vm: Option<String>,
    #[command(flatten)]
    arbiter: ArbiterArguments,
}

#[derive(Args)]
struct Override {
    /// The name of the side that is to go on (`--name` of `run` or `standby`); not needed if only one runs here
    vm: Option<String>,
    /// I know that the other side is dead, and stays so
    #[arg(long)]
    other_side_is_dead: bool,
}

/// Epochs without an owner in a row after which none is looked for. A person may have decided one of them.
const GAP: u64 = 3;

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Show(arguments) => show(arguments),
        Command::Override(arguments) => decide(&arguments),
    }
}

fn show(arguments: Show) -> anyhow::Result<ExitCode> {
    let spec = arguments.arbiter.spec()?.context("which arbiter? give --arbiter, as for the VM")?;
    let is_id = |name: &String| name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let vm = match arguments.vm.as_ref().filter(|name| is_id(name)) {
        Some(id) => id.to_lowercase(),
        None => {
            let mut connection = Connection::open_named(&folder::of_this_user(), arguments.vm.as_deref())?;
            connection.status()?.vm.context("this VM is not, and was not, one of a pair: nobody has asked an arbiter about it")?
        }
    };
    let arbiter = spec.open()?;
    println!("VM {vm}\nepoch 1: whoever powered it on");
    let (mut epoch, mut gap) = (1, 0);
    while gap < GAP {
        epoch += 1;
        match arbiter.owner(&vm, epoch).map_err(|why| anyhow::anyhow!("the arbiter cannot be read: {why}"))? {
            Some(owner) => {
                gap = 0;
                println!("epoch {epoch}: process {owner}");
            }
            None => gap += 1,
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn decide(arguments: &Override) -> anyhow::Result<ExitCode> {
    if !arguments.other_side_is_dead {
        bail!(
            "this lets a side go on without an arbiter; if the other one lives, or wakes up later, there are two machines where there was one, and nobody can undo that\n  \
             what to do: make sure that the other host is off and stays off, then say --other-side-is-dead"
        );
    }
    let mut connection = Connection::open_named(&folder::of_this_user(), arguments.vm.as_deref())?;
    let name = connection.identify()?.name;
    let epoch = connection.override_arbiter()?.epoch;
    println!("'{name}' goes on in epoch {epoch}, on your word; the arbiter is told when it answers");
    Ok(ExitCode::SUCCESS)
}

/// The arbiter, as flags.
#[derive(Args, Clone)]
pub struct ArbiterArguments {
    /// Where the pair's sides settle who goes on, the same for both: a shared directory, or
    /// etcd://HOST[:PORT][,HOST[:PORT]...][/PREFIX] (with TLS etcds://...)
    #[arg(long, value_name = "DIR|ETCD")]
    arbiter: Option<OsString>,
    /// The user's name at etcd
    #[arg(long, value_name = "NAME")]
    arbiter_user: Option<String>,
    /// A file with the user's password, which others may not read
    #[arg(long, value_name = "FILE")]
    arbiter_password_file: Option<PathBuf>,
    /// For etcds: certificates of the authorities that may vouch for etcd (PEM)
    #[arg(long, value_name = "FILE")]
    arbiter_ca: Option<PathBuf>,
    /// For etcds: our own certificate, if etcd wants to see one (PEM; where etcd has users, one without a common name)
    #[arg(long, value_name = "FILE")]
    arbiter_cert: Option<PathBuf>,
    /// The key of that certificate, which others may not read (PEM)
    #[arg(long, value_name = "FILE")]
    arbiter_key: Option<PathBuf>,
}

impl ArbiterArguments {
    /// The arbiter that is meant, if any.
    pub fn spec(self) -> anyhow::Result<Option<ArbiterSpec>> {
        let options = ArbiterOptions {
            place: self.arbiter,
            user: self.arbiter_user,
            password_file: self.arbiter_password_file,
            ca: self.arbiter_ca,
            cert: self.arbiter_cert,
            key: self.arbiter_key,
        };
        Ok(options.check()?)
    }
}
