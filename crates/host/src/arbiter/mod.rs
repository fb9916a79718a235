//! The arbiter: who may go on alone. A test-and-set at a place both hosts can reach.
//!
//! *In*: a VM, an epoch, and who asks. *Out*: won, lost (to whom), or unreachable (why). *Invariant*: for one VM and one epoch at most one
//! owner ever wins, whatever crashes in between; the owner who has won wins again when it asks again; and an answer
//! that can't be had is never taken for a win.
//!
//! There are two: a directory ([`DirectoryArbiter`]) and etcd ([`EtcdArbiter`]). [`ArbiterSpec`] says which one a command line means. When neither answers, a person may
//! decide ([`ManualOverride`]). In etcd standbys may say as well where they wait ([`Registry`]); that decides nothing.

mod directory;
mod etcd;
mod manual;
mod registry;
mod secrets;
mod spec;

use std::fmt;

pub use directory::DirectoryArbiter;
pub use etcd::EtcdArbiter;
pub use manual::{ManualOverride, OverridableArbiter};
pub use registry::{Registration, Registry};
pub use spec::{ArbiterOptions, ArbiterSpec, EtcdSpec, Login, SYNTAX, TlsFiles};

/// The arbiter's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The epoch is ours: go on.
    Won,
    /// The epoch is somebody else's: stop.
    Lost {
        /// Whose it is.
        owner: String,
    },
    /// Nobody knows: stay stopped and ask again.
    Unreachable {
        /// What went wrong.
        why: String,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Won => f.write_str("won"),
            Self::Lost { owner } => write!(f, "lost to {owner}"),
            Self::Unreachable { why } => write!(f, "unreachable: {why}"),
        }
    }
}

/// Something that can decide. A call may take long (a file server that does not answer): it belongs into a thread of its own.
pub trait Arbiter: Send {
    /// Claims an epoch of a VM for an owner.
    fn claim(&self, vm: &str, epoch: u64, owner: &str) -> Verdict;
    /// Who has won an epoch of a VM, if anybody has. Claims nothing.
    ///
    /// # Errors
    /// Why that cannot be known.
    fn owner(&self, vm: &str, epoch: u64) -> std::result::Result<Option<String>, String>;
}

/// Names become parts of file names and of keys, so they must not wander about there.
fn check_name(what: &str, name: &str) -> std::result::Result<(), String> {
    let good = (1..=100).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':' | b'@'));
    if good { Ok(()) } else { Err(format!("`{name}` cannot be the name of a {what}: use up to 100 letters, digits, - _ . : @")) }
}
