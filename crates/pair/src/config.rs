//! The bounds and times of a pair, in one place, with the reasons for their defaults.
//!
//! In: what the administrator set. Out: a checked [`Config`]. Invariant: after [`Config::check`] the numbers fit each other:
//! several heartbeats fit into a timeout, every soft bound lies below its hard bound.

use crate::types::Nanos;

/// When an output may leave a protected primary. The primary's setting decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Commit {
    /// When the secondary has received the record that notes it.
    #[default]
    Received,
    /// When the secondary has made the same output itself and said so.
    Matched,
}

/// What a primary does when the secondary has made another output than it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnMismatch {
    /// The primary is believed: the secondary is made equal to it again ([`crate::PrimaryState::Resyncing`]).
    #[default]
    Primary,
    /// Nobody is: the VM stops on both sides, for people to find out.
    Stop,
}

/// The bounds and times of a pair. Both sides have their own; they need not be equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// When an output may leave.
    pub commit: Commit,
    /// What happens when outputs differ.
    pub on_mismatch: OnMismatch,
    /// How often a side lets the other hear from it.
    pub heartbeat_interval: Nanos,
    /// A peer silent for so long is suspected dead, or for three times the longest gap it has left lately, if that is more; at most for five times
    /// of this. Silence that a stall of our own explains is not counted.
    pub peer_timeout: Nanos,
    /// The same until protection starts. Longer, since a wrong suspicion throws the copy away, and waiting costs nothing:
    /// outputs are not held yet.
    pub copy_timeout: Nanos,
    /// A secondary that answers but makes no progress for so long while the primary is throttled is given up.
    pub stall_timeout: Nanos,
    /// At most so often the secondary reports replay progress on its own account.
    pub replay_report_interval: Nanos,
    /// How long to wait for the arbiter's answer before the question counts as unanswered.
    pub arbiter_timeout: Nanos,
    /// The pause before the second question to the arbiter; it doubles up to `arbiter_retry_max`.
    pub arbiter_retry_min: Nanos,
    /// The longest pause between two questions to the arbiter.
    pub arbiter_retry_max: Nanos,
    /// The pause before a standby that could not be reached, or was lost, is tried again; it doubles up to `heal_retry_max`.
    pub heal_retry_min: Nanos,
    /// The longest pause between two attempts to reach the same standby.
    pub heal_retry_max: Nanos,
    /// The primary is throttled when more bytes of log than this are not acknowledged as received.
    pub max_unacked_bytes: u64,
    /// The primary is throttled when more bytes of log than this are not replayed. Bounds the secondary's memory.
    pub max_unreplayed_bytes: u64,
    /// The primary is throttled when the secondary is more instructions than this behind. Bounds the time to go live.
    pub max_replay_lag: u64,
    /// With [`Commit::Matched`] the primary is also throttled when what the secondary has not replayed took it longer than this: that bounds how long an output is held. In time,
    /// since guests differ by a factor of ten in how many instructions they do in it.
    pub max_matched_lag: Nanos,
    /// The primary is throttled when more outputs than this are held.
    pub max_held_outputs: u64,
    /// A soft bound above may be passed by this factor before the secondary is given up: a throttled guest needs a moment to stop.
    pub hard_bound_factor: u64,
    /// At most so many bytes of image are on their way to the secondary.
    pub image_window_bytes: u64,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            commit: Commit::default(),
            on_mismatch: OnMismatch::default(),
            heartbeat_interval: Nanos::from_millis(20),
            peer_timeout: Nanos::from_millis(300),
            copy_timeout: Nanos::from_millis(30_000),
            stall_timeout: Nanos::from_millis(10_000),
            replay_report_interval: Nanos::from_millis(5),
            arbiter_timeout: Nanos::from_millis(1_000),
            arbiter_retry_min: Nanos::from_millis(50),
            arbiter_retry_max: Nanos::from_millis(2_000),
            heal_retry_min: Nanos::from_millis(500),
            heal_retry_max: Nanos::from_millis(10_000),
            // A log of 1 Gbit/s for a quarter of a second.
            max_unacked_bytes: 32 << 20,
            max_unreplayed_bytes: 64 << 20,
            // About a quarter of a second of guest time at 1 GHz: what a failover may cost in replay.
            max_replay_lag: 250_000_000,
            // Several reports of progress: less, and the guest is stopped and started for each of them.
            max_matched_lag: Nanos::from_millis(20),
            max_held_outputs: 16_384,
            hard_bound_factor: 4,
            image_window_bytes: 16 << 20,
        }
    }
}

/// What is wrong with a [`Config`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// Which field.
    pub field: &'static str,
    /// What it would have to be.
    pub problem: &'static str,
}

impl Config {
    /// Says what does not fit, if anything.
    pub fn check(&self) -> Result<(), ConfigError> {
        let rules: [(bool, &'static str, &'static str); 10] = [
            (self.heartbeat_interval.0 > 0, "heartbeat_interval", "must not be zero"),
            (
                self.peer_timeout.0 / 4 >= self.heartbeat_interval.0,
                "peer_timeout",
                "must be at least four heartbeat intervals, or a single late one looks like a death",
            ),
            (self.copy_timeout >= self.peer_timeout, "copy_timeout", "must not be below peer_timeout"),
            (self.stall_timeout >= self.peer_timeout, "stall_timeout", "must not be below peer_timeout"),
            (self.arbiter_timeout.0 > 0, "arbiter_timeout", "must not be zero"),
            (
                self.arbiter_retry_min.0 > 0 && self.arbiter_retry_min <= self.arbiter_retry_max,
                "arbiter_retry_min",
                "must lie between one nanosecond and arbiter_retry_max",
            ),
            (
                self.heal_retry_min.0 > 0 && self.heal_retry_min <= self.heal_retry_max,
                "heal_retry_min",
                "must lie between one nanosecond and heal_retry_max",
            ),
            (
                self.max_unacked_bytes > 0
                    && self.max_unreplayed_bytes > 0
                    && self.max_replay_lag > 0
                    && self.max_matched_lag.0 > 0
                    && self.max_held_outputs > 0,
                "max_*",
                "must not be zero, or the guest could never run",
            ),
            (self.hard_bound_factor >= 2, "hard_bound_factor", "must be at least two"),
            (self.image_window_bytes > 0, "image_window_bytes", "must not be zero"),
        ];
        match rules.iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, field, problem)) => Err(ConfigError { field, problem }),
        }
    }
}
