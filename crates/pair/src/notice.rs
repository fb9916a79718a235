//! What people are told: changes of state with their reasons, and why a side stopped.
//!
//! In: nothing. Out: values that print as sentences. Invariant: every change of what a VM's protection is worth makes a notice.

use std::fmt;

use crate::types::{Epoch, Nanos, OutputId};

/// Something an administrator may want to know. Prints as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// This side is in another state now.
    State {
        /// The state before.
        from: &'static str,
        /// The state now.
        to: &'static str,
        /// Why.
        reason: String,
    },
    /// The other side refused the greeting, or we did.
    Refused {
        /// What does not fit.
        reason: String,
    },
    /// Nobody could say who holds the epoch. The guest stays stopped; the question is asked again.
    ArbiterUnreachable {
        /// Which epoch is claimed.
        epoch: Epoch,
        /// How often it was claimed so far.
        attempts: u32,
        /// When it is claimed again.
        retry_at: Nanos,
    },
    /// The VM can't be given to the other side now.
    HandOverRefused {
        /// Why not.
        reason: String,
    },
    /// A standby can't be ended now.
    ShutdownRefused {
        /// Why not.
        reason: String,
    },
    /// This side was not running for so long that the other one may have given it up. Outputs wait until that is known.
    Stalled {
        /// How long.
        stall: Nanos,
    },
    /// The guest is held back, or is no longer.
    Throttle {
        /// Why, while it is held back.
        reason: Option<&'static str>,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::State { from, to, reason } => write!(f, "{from} -> {to}: {reason}"),
            Notice::Refused { reason } => write!(f, "pairing refused: {reason}"),
            Notice::ArbiterUnreachable { epoch, attempts, retry_at } => write!(
                f,
                "the arbiter does not say who holds epoch {epoch} (asked {attempts} times); staying stopped, asking again at {retry_at}"
            ),
            Notice::HandOverRefused { reason } => write!(f, "not handed over: {reason}"),
            Notice::ShutdownRefused { reason } => write!(f, "not ended: {reason}"),
            Notice::Stalled { stall } => {
                write!(f, "this side was not running for {stall}: nothing leaves until the other one was heard again")
            }
            Notice::Throttle { reason: Some(reason) } => write!(f, "the guest is held back: {reason}"),
            Notice::Throttle { reason: None } => write!(f, "the guest runs freely again"),
        }
    }
}

/// Why a side stopped for good. Prints as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The other side holds the epoch and runs the VM.
    LostArbitration {
        /// Which epoch.
        epoch: Epoch,
    },
    /// Our own host asked for it.
    Ended {
        /// Its reason.
        reason: String,
    },
    /// The other side said goodbye.
    PeerEnded {
        /// Its reason.
        reason: String,
    },
    /// The connection was lost before protection had started: this side has nothing it could go live with.
    NotProtected {
        /// What happened to the connection.
        reason: String,
    },
    /// The VM was given to the other side, as somebody asked.
    HandedOver {
        /// The epoch in which it runs there.
        epoch: Epoch,
    },
    /// The two sides have made different outputs, and nobody is to be believed.
    Mismatch {
        /// The first that differs.
        output: OutputId,
    },
    /// The two sides do not fit.
    Refused {
        /// What does not fit.
        reason: String,
    },
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopReason::LostArbitration { epoch } => {
                write!(f, "the arbiter gave epoch {epoch} to the other side, which runs the VM now")
            }
            StopReason::Ended { reason } => write!(f, "{reason}"),
            StopReason::PeerEnded { reason } => write!(f, "the other side said goodbye: {reason}"),
            StopReason::NotProtected { reason } => {
                write!(f, "the connection was lost before protection had started ({reason}); the primary goes on alone")
            }
            StopReason::HandedOver { epoch } => write!(f, "the VM runs on the other host now, in epoch {epoch}"),
            StopReason::Mismatch { output } => {
                write!(f, "the two sides differ in output {output}, and it is set that the VM stops then (--on-mismatch stop)")
            }
            StopReason::Refused { reason } => write!(f, "pairing refused: {reason}"),
        }
    }
}
