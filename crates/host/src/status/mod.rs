//! What people see of a pair: how far the other side is, what is held, how long that takes, how often it went wrong.
//!
//! *In*: what the protocol's thread saw ([`meter`]). *Out*: one report of plain figures, for the control socket and for `/metrics`, and a table of it
//! ([`words`]). *Invariant*: the protocol's thread publishes copies into the [`board`] and never waits for who reads; ages are kept as moments and become
//! ages when somebody asks, so a report is as fresh as its reading.
//!
//! | module | what |
//! | --- | --- |
//! | [`board`] | the slot that is published into, and what is counted since the process began |
//! | [`meter`] | the figures of one side, as its protocol's thread keeps them |
//! | [`latency`] | a histogram: since the start, and of the last minute |
//! | [`trail`] | when records came that are still on their way |
//! | [`view`] | all VMs of this user, asked at once |
//! | [`words`] | for people |
pub mod board;
pub mod latency;
pub mod meter;
pub mod trail;
pub mod view;
pub mod words;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use twinstep_migrate::Progress;

pub use board::Board;

/// What a VM's process says of its pair: the answer to `status` on the control socket.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The VM's name.
    pub name: String,
    /// The process.
    pub pid: u32,
    /// What it is: "alone", "primary", "standby", "survivor".
    pub side: String,
    /// Where the protocol stands: "unprotected", "greeting", "copying", "protected", "deciding", "listening", "following", "consuming", "live", "stopped".
    pub state: String,
    /// The epoch; none while a standby waits, and for a VM that was never to be protected.
    pub epoch: Option<u64>,
    /// The id of this life of the VM; none as for the epoch.
    pub vm: Option<String>,
    /// The other side's address, while there is a connection.
    pub peer: Option<String>,
    /// Nanoseconds since anything was heard from the other side.
    pub heartbeat_age_ns: Option<u64>,
    /// Whether the guest is held back.
    pub throttled: bool,
    /// Why, if it is.
    pub throttle_reason: Option<String>,
    /// How far the copy to a standby is, while there is one.
    pub copy: Option<CopyProgress>,
    /// How far behind the secondary is.
    pub lag: Lag,
    /// What was logged, by kind of entry: on a primary since power-on, on a standby what has arrived.
    pub log: BTreeMap<String, LogRate>,
    /// Outputs held now; on a standby those that it made and that are not known to have left.
    pub held: u64,
    /// How long outputs were held.
    pub commit: Commit,
    /// What happened since this process began.
    pub counts: Counts,
    /// The host's monotonic clock.
    pub at_ns: u64,
    /// Wall-clock time, in milliseconds since 1970.
    pub unix_ms: u64,
}

/// How far the copy of a running machine is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CopyProgress {
    /// The round, from 1.
    pub round: u64,
    /// Bytes of RAM that this round has still to look at.
    pub remaining_bytes: u64,
    /// Bytes sent so far.
    pub sent_bytes: u64,
    /// Bytes of RAM a second that are sent; 0: not known yet.
    pub bytes_per_s: u64,
    /// Bytes of RAM a second that the guest wrote in the last round.
    pub dirty_bytes_per_s: u64,
    /// From the cut until the standby has it all, if the cut were made now.
    pub expected_pause_ns: u64,
    /// How much of its time the guest loses, in hundredths.
    pub slowed_percent: u8,
}

impl From<Progress> for CopyProgress {
    fn from(p: Progress) -> Self {
        let Progress { round, remaining_bytes, sent_bytes, bytes_per_s, dirty_bytes_per_s, expected_pause_ns, slowed_percent } =
            p;
        Self { round, remaining_bytes, sent_bytes, bytes_per_s, dirty_bytes_per_s, expected_pause_ns, slowed_percent }
    }
}

/// How far behind the secondary is, as this side knows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lag {
    /// Instructions that are still to be replayed.
    pub instructions: u64,
    /// Age of the oldest record that the secondary has not acknowledged as received; 0: there is none.
    pub received_ns: u64,
    /// Age of the oldest record that is not replayed; 0: there is none.
    pub replayed_ns: u64,
    /// Log bytes that are not acknowledged as received.
    pub unreceived_bytes: u64,
    /// Log bytes that are not replayed.
    pub unreplayed_bytes: u64,
}

/// One kind of log entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogRate {
    /// Entries so far.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Entries a second, over the last second.
    pub entries_per_s: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
}

/// Commit latency: from an output's making to its release.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Commit {
    /// In the last minute.
    pub minute: Quantiles,
    /// Since this process began.
    pub total: Quantiles,
}

/// What there is to say of many times.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quantiles {
    /// How many.
    pub count: u64,
    /// Their sum.
    pub sum_ns: u64,
    /// Half of them are below.
    pub p50_ns: u64,
    /// All but one in a hundred are below.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// What happened since the process began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Outputs that this process let out.
    pub outputs_released: u64,
    /// How often this process took a VM over from its primary.
    pub failovers: u64,
    /// How often a lost secondary was brought back to what the primary has. Always 0 in this build.
    pub resyncs: u64,
    /// How often the guest was held back.
    pub throttled: u64,
}
