//! `twinstep pki`.
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use twinstep_host::pki;

#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes an authority: a certificate that hosts trust, and the key that makes certificates for hosts
    Init {
        /// A folder for it, which need not exist
        folder: PathBuf,
        /// Days until the authority is not believed any more
        #[arg(long, value_name = "N", default_value_t = pki::CA_DAYS)]
        days: u32,
    },
    /// Makes a key and a certificate for a host
    Issue {
        /// The folder of `twinstep pki init`
        folder: PathBuf,
        /// The host's name (or address), as others reach it
        name: String,
        /// Another name or address by which others reach it (several times)
        #[arg(long, value_name = "ADDRESS")]
        address: Vec<String>,
        /// Days until the certificate is not believed any more
        #[arg(long, value_name = "N", default_value_t = pki::HOST_DAYS)]
        days: u32,
    },
    /// Withdraws certificates of hosts: writes a list (crl.pem) with which hosts refuse them. With no name it renews the list
    Revoke {
        /// The folder of `twinstep pki init`
        folder: PathBuf,
        /// Names of hosts whose folders are still there (several)
        name: Vec<String>,
        /// A certificate whose folder is not (PEM; several times)
        #[arg(long, value_name = "FILE")]
        cert: Vec<PathBuf>,
        /// Days until the list runs out: from then on hosts that have it refuse everybody, until they have a newer one
        #[arg(long, value_name = "N", default_value_t = pki::HOST_DAYS)]
        days: u32,
    },
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Init { folder, days } => {
            pki::init(&folder, days)?;
            let shown = folder.display();
            println!(
                "an authority, valid for {days} days, is in {shown}\n\
                 keep {shown}/ca-key.pem secret and here: whoever has it can pass for any host\n\
                 next: twinstep pki issue {shown} HOST, once for each host of a pair"
            );
        }
        Command::Issue { folder, name, address, days } => {
            let own = pki::issue(&folder, &name, &address, days)?;
            let shown = own.display();
            println!(
                "a certificate for {name}, valid for {days} days, is in {shown}\n\
                 next: copy the folder to {name}, its key readable by its owner alone: scp -rp {shown} {name}:tls\n\
                 there: twinstep standby --tls tls ...   or   twinstep run --protect STANDBY --tls tls ..."
            );
        }
        Command::Revoke { folder, name, cert, days } => {
            let withdrawn = pki::revoke(&folder, &name, &cert, days)?;
            let shown = folder.display();
            println!(
                "{shown}/crl.pem, valid for {days} days, has {withdrawn} withdrawn certificates; it is in the folders of hosts in {shown} as well\n\
                 next: copy it to every host of this authority, beside its ca.pem: scp {shown}/crl.pem HOST:tls/\n\
                 it counts there at once for who connects from then on; a pair that is connected goes on"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
