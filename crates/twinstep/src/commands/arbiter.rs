//! `--arbiter` and what belongs to it, the same for every command that takes one.
use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use twinstep_host::arbiter::{ArbiterOptions, ArbiterSpec};

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
