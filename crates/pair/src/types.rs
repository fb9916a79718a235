//! The words every module of this room shares: time, identities, epochs, records, outputs.
//!
//! In: nothing. Out: plain values. Invariant: none of them knows a clock, a socket or a source of randomness; the host
//! makes them and passes them in.

use std::fmt;

/// A moment on the host's monotonic clock, in nanoseconds. Only differences mean anything, and only on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// So many milliseconds.
    pub const fn from_millis(millis: u64) -> Nanos {
        Nanos(millis * 1_000_000)
    }

    /// This moment and `span` later.
    #[must_use]
    pub const fn plus(self, span: Nanos) -> Nanos {
        Nanos(self.0.saturating_add(span.0))
    }

    /// The span since `earlier`; zero if that lies in the future.
    #[must_use]
    pub const fn since(self, earlier: Nanos) -> Nanos {
        Nanos(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} ms", self.0 / 1_000_000, self.0 / 1_000 % 1_000)
    }
}

/// Names one life of a virtual machine: drawn at random at power-on, kept through every failover, never reused.
///
/// It is not the name people give a VM: two power-ons of the same configuration have different ids, so that epochs claimed
/// at the arbiter by an earlier life can't get in the way of this one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VmId(pub [u8; 16]);

/// Names one process that may claim an epoch: drawn at random when the process starts.
///
/// It must not be the name of a host: a process restarted on the same host has not inherited what the old one had won.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct OwnerId(pub [u8; 16]);

macro_rules! hex_id {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}
hex_id!(VmId);
hex_id!(OwnerId);

/// Counts who was last entitled to run the VM on its own. A VM powers on in epoch 1; each failover claims the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a VM that has just been powered on.
    pub const FIRST: Epoch = Epoch(1);

    /// The epoch that a failover out of this one claims.
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0.checked_add(1).expect("an epoch is one failover; 2^64 of them can't have happened"))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The running number of a log record within one protection; the first record after the image's cut is 1.
pub type Seq = u64;

/// The running number of an output, counted by the machine itself since power-on; the first output is 1.
///
/// Both sides count alike because they run the same deterministic machine, and the image carries the count.
pub type OutputId = u64;

/// One entry of the event log, opaque here except for the position at which it applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Guest instructions retired when the entry applies.
    pub position: u64,
    /// What it is; the log's business.
    pub kind: u8,
    /// Its content; the log's business. At most [`crate::wire::MAX_RECORD_BYTES`].
    pub bytes: Vec<u8>,
}

impl Record {
    /// What the record costs in buffers and on the wire.
    pub fn cost_bytes(&self) -> u64 {
        self.bytes.len() as u64 + crate::wire::RECORD_HEAD_BYTES as u64
    }
}
