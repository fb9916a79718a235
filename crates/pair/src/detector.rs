//! Failure detection: when a silent peer becomes a suspect.
//!
//! In: when something was heard, on the channel and beside it, when we looked. Out: `Some(silence)` once the peer has been silent for too long.
//! Invariants: silence that happened while we were not looking ourselves is not held against the peer; what counts as too long follows the gaps
//! that were seen lately, and is never below the timeout that is configured nor beyond [`MAX_STRETCH`] times of it.
//!
//! A suspicion decides nothing (the arbiter does), so a wrong one costs redundancy and never correctness. It costs a copy of the VM, though, on hosts
//! that are busy already. So the rule adapts: a peer that lets itself be heard every few milliseconds is suspected when the configured timeout is over; where
//! gaps of a third of it and more have been usual, because a host is overloaded or the network is, it gets [`GAPS`] of such gaps. The longest
//! gap is kept and forgotten slowly, rather than mean and deviation: what delays heartbeats is no noise around a mean but rare and long, and one such
//! delay says that the next may come.

//!
//! Who is silent on the channel and gives signs of life beside it is no dead peer: its channel is blocked, or cut. It is waited for as long as [`Grace`] says, since
//! it may be heard again; and not for ever, since a peer that only says that it lives acknowledges nothing.

use crate::config::Config;
use crate::types::Nanos;

/// How long a peer may be silent on the channel that gives signs of life beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grace(Nanos);

impl Grace {
    /// What a primary grants its secondary.
    pub(crate) fn of_primary(config: &Config) -> Grace {
        Grace(Nanos(config.peer_timeout.0.saturating_mul(3)))
    }

    /// What a secondary grants its primary: more. Both see the same channel dead, and of two that are alive the one that has the guest is to go on.
    pub(crate) fn of_secondary(config: &Config) -> Grace {
        Grace(Nanos(config.peer_timeout.0.saturating_mul(4)))
    }

    /// For ever, as a mistake.
    pub(crate) fn endless() -> Grace {
        Grace(Nanos(u64::MAX))
    }
}

/// So many of the longest gap seen lately make a silence.
const GAPS: u64 = 3;

/// The configured timeout is stretched by this factor at most.
const MAX_STRETCH: u64 = 5;

/// With each gap the longest one loses one part in so many: at fifty heartbeats a second half of it is forgotten in fourteen seconds.
const FORGET: u64 = 1024;

/// Watches for silence.
#[derive(Debug, Clone)]
pub(crate) struct Detector {
    last_heard: Nanos,
    last_looked: Nanos,
    /// The longest time lately between two signs of life.
    longest_gap: Nanos,
    /// The last sign of life beside the channel.
    last_beat: Option<Nanos>,
}

impl Detector {
    /// Starts to listen now.
    pub(crate) fn new(now: Nanos) -> Detector {
        Detector { last_heard: now, last_looked: now, longest_gap: Nanos(0), last_beat: None }
    }

    /// The peer gave a sign of life.
    pub(crate) fn heard(&mut self, now: Nanos) {
        let gap = now.since(self.last_heard);
        let kept = self.longest_gap.0 - self.longest_gap.0 / FORGET;
        self.longest_gap = Nanos(kept.max(gap.0));
        self.last_heard = self.last_heard.max(now);
    }

    /// The peer gave a sign of life beside the channel.
    pub(crate) fn beat(&mut self, now: Nanos) {
        self.last_beat = self.last_beat.max(Some(now));
    }

    /// Whether the peer gives signs of life beside the channel.
    pub(crate) fn beats(&self, now: Nanos, timeout: Nanos) -> bool {
        self.last_beat.is_some_and(|beat| now.since(beat) < self.patience(timeout))
    }

    /// The peer's work is another one from now on: how late it was so far says nothing.
    pub(crate) fn forget(&mut self) {
        self.longest_gap = Nanos(0);
    }

    /// What counts as too long now, where `timeout` is configured.
    pub(crate) fn patience(&self, timeout: Nanos) -> Nanos {
        let stretched = self.longest_gap.0.saturating_mul(GAPS).min(timeout.0.saturating_mul(MAX_STRETCH));
        Nanos(stretched.max(timeout.0))
    }

    /// Tells how long the peer has been silent, if that is too long.
    ///
    /// If we were stalled ourselves (stopped, swapped out) the peer's words may be waiting in the socket, unread. Then the
    /// peer gets half a timeout more, in which the host will read them.
    pub(crate) fn look(&mut self, now: Nanos, timeout: Nanos, grace: Grace) -> Option<Nanos> {
        let patience = self.patience(timeout);
        let half = Nanos(timeout.0 / 2);
        if now.since(self.last_looked) > half {
            self.last_heard = self.last_heard.max(Nanos(now.0.saturating_sub(patience.0 - half.0)));
        }
        self.last_looked = self.last_looked.max(now);
        (now >= self.deadline(timeout, grace)).then(|| now.since(self.last_heard))
    }

    /// When to look next at the latest: then the peer is a suspect, if it is not heard before.
    pub(crate) fn deadline(&self, timeout: Nanos, Grace(grace): Grace) -> Nanos {
        let patience = self.patience(timeout);
        let silent = self.last_heard.plus(patience);
        match self.last_beat {
            None => silent,
            // As long as it beats, and no longer than the grace.
            Some(beat) => silent.max(beat.plus(patience).min(Nanos(self.last_heard.0.saturating_add(grace.0)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Nanos = Nanos(100);
    const GRACE: Grace = Grace(Nanos(300));

    #[test]
    fn silence_is_noticed_when_we_kept_looking() {
        let mut detector = Detector::new(Nanos(0));
        for time in (10..100).step_by(10) {
            assert_eq!(detector.look(Nanos(time), TIMEOUT, GRACE), None);
        }
        assert_eq!(detector.look(Nanos(100), TIMEOUT, GRACE), Some(Nanos(100)));
    }

    #[test]
    fn our_own_stall_is_not_held_against_the_peer() {
        let mut detector = Detector::new(Nanos(0));
        assert_eq!(detector.look(Nanos(1_000), TIMEOUT, GRACE), None);
        assert_eq!(detector.deadline(TIMEOUT, GRACE), Nanos(1_050));
        assert_eq!(detector.look(Nanos(1_049), TIMEOUT, GRACE), None);
        assert_eq!(detector.look(Nanos(1_050), TIMEOUT, GRACE), Some(TIMEOUT));
    }

    #[test]
    fn who_beats_is_waited_for_and_not_for_ever() {
        // A channel that is silent from the beginning.
        let looks = |beats_until: u64| {
            let mut detector = Detector::new(Nanos(0));
            (1..100).map(|n| n * 10).find(|now| {
                if *now <= beats_until {
                    detector.beat(Nanos(*now));
                }
                detector.look(Nanos(*now), TIMEOUT, GRACE).is_some()
            })
        };
        assert_eq!(looks(0), Some(100), "a peer without beats is a suspect as always");
        assert_eq!(looks(50), Some(150), "its beats have ended: it is dead");
        assert_eq!(looks(990), Some(300), "it is alive, and its channel is dead");
        // Heard again in time.
        let mut detector = Detector::new(Nanos(0));
        for now in (10..290).step_by(10) {
            detector.beat(Nanos(now));
            assert_eq!(detector.look(Nanos(now), TIMEOUT, GRACE), None);
        }
        assert!(detector.beats(Nanos(290), TIMEOUT));
        detector.heard(Nanos(290));
        assert_eq!(detector.look(Nanos(300), TIMEOUT, GRACE), None);
    }

    /// Hears the peer in gaps of these lengths; gives the time then.
    fn hear(detector: &mut Detector, from: u64, gaps: impl IntoIterator<Item = u64>) -> u64 {
        gaps.into_iter().fold(from, |now, gap| {
            detector.heard(Nanos(now + gap));
            now + gap
        })
    }

    #[test]
    fn who_is_always_late_is_waited_for() {
        let mut detector = Detector::new(Nanos(0));
        hear(&mut detector, 0, [6; 50]);
        assert_eq!(detector.patience(TIMEOUT), TIMEOUT, "a peer that is in time gets no more than is configured");
        hear(&mut detector, 300, [70]);
        assert_eq!(detector.patience(TIMEOUT), Nanos(210));
        hear(&mut detector, 370, [95_000]);
        assert_eq!(detector.patience(TIMEOUT), Nanos(500), "for ever is nobody waited for");
    }

    #[test]
    fn what_was_late_once_is_forgotten() {
        const MS: u64 = 1_000_000;
        let timeout = Nanos(300 * MS);
        let mut detector = Detector::new(Nanos(0));
        let now = hear(&mut detector, 0, [250 * MS]);
        assert_eq!(detector.patience(timeout), Nanos(750 * MS));
        let now = hear(&mut detector, now, [20 * MS; 400]);
        assert!(detector.patience(timeout) > timeout);
        hear(&mut detector, now, [20 * MS; 1_000]);
        assert_eq!(detector.patience(timeout), timeout);
    }
}
