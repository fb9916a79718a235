//! Failure detection: when a silent peer becomes a suspect.
//!
//! In: when something was heard, when we looked. Out: `Some(silence)` once the peer has been silent for too long.
//! Invariant: silence that happened while we were not looking ourselves is not held against the peer.
//!
//! A suspicion decides nothing (the arbiter does), so a wrong one costs redundancy and never correctness. That is why a simple
//! rule is enough here, and why one that adapts to the measured jitter can take its place.

use crate::types::Nanos;

/// Watches for silence.
#[derive(Debug, Clone)]
pub(crate) struct Detector {
    last_heard: Nanos,
    last_looked: Nanos,
}

impl Detector {
    /// Starts to listen now.
    pub(crate) fn new(now: Nanos) -> Detector {
        Detector { last_heard: now, last_looked: now }
    }

    /// The peer gave a sign of life.
    pub(crate) fn heard(&mut self, now: Nanos) {
        self.last_heard = self.last_heard.max(now);
    }

    /// Tells how long the peer has been silent, if that is too long.
    ///
    /// If we were stalled ourselves (stopped, swapped out) the peer's words may be waiting in the socket, unread. Then the
    /// peer gets half a timeout more, in which the host will read them.
    pub(crate) fn look(&mut self, now: Nanos, timeout: Nanos) -> Option<Nanos> {
        let half = Nanos(timeout.0 / 2);
        if now.since(self.last_looked) > half {
            self.last_heard = self.last_heard.max(Nanos(now.0.saturating_sub(half.0)));
        }
        self.last_looked = self.last_looked.max(now);
        let silence = now.since(self.last_heard);
        (silence >= timeout).then_some(silence)
    }

    /// When to look next at the latest.
    pub(crate) fn deadline(&self, timeout: Nanos) -> Nanos {
        self.last_heard.plus(timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Nanos = Nanos(100);

    #[test]
    fn silence_is_noticed_when_we_kept_looking() {
        let mut detector = Detector::new(Nanos(0));
        for time in (10..100).step_by(10) {
            assert_eq!(detector.look(Nanos(time), TIMEOUT), None);
        }
        assert_eq!(detector.look(Nanos(100), TIMEOUT), Some(Nanos(100)));
    }

    #[test]
    fn our_own_stall_is_not_held_against_the_peer() {
        let mut detector = Detector::new(Nanos(0));
        assert_eq!(detector.look(Nanos(1_000), TIMEOUT), None);
        assert_eq!(detector.deadline(TIMEOUT), Nanos(1_050));
        assert_eq!(detector.look(Nanos(1_049), TIMEOUT), None);
        assert_eq!(detector.look(Nanos(1_050), TIMEOUT), Some(TIMEOUT));
    }
}
