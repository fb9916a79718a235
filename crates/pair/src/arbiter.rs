//! Arbitration: the one atomic step that decides which side goes on after the two have lost each other.
//!
//! In: a [`Claim`]. Out: a [`Verdict`]. Invariant: for each (VM, epoch) at most one owner is ever told `Won`, for ever.
//!
//! Timeouts only raise a suspicion; this decides. An arbiter is a test-and-set register per (VM, epoch) that remembers
//! its owner:
//!
//! ```text
//!            claim by A                claim by A: Won (again)
//!   free ────────────────▶ held by A ◀─┐
//!            Won                │      │
//!                               └──────┘ claim by B: Lost
//! ```
//!
//! An answer may get lost on the way, so the asker may ask again, and is told `Won` if it is itself the holder. That is why
//! the owner's identity is part of the register, and why it names a process and not a host.
//!
//! [`Arbitration`] is the asker's half: ask, wait, ask again with growing pauses, never assume.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::types::{Epoch, Nanos, OwnerId, VmId};

/// A request for the right to run `vm` alone in `epoch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    /// Which VM.
    pub vm: VmId,
    /// Which epoch; always one more than the epoch in which the pair was protected.
    pub epoch: Epoch,
    /// Who asks.
    pub owner: OwnerId,
}

/// What the arbiter says to a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The asker holds the epoch, and will for ever.
    Won,
    /// Somebody else holds the epoch, and will for ever.
    Lost,
    /// Nobody could say. The claim may or may not have been entered; only asking again can tell.
    Unreachable,
}

/// A test-and-set register per (VM, epoch). The real ones live in the host; this is their contract.
///
/// The directory arbiter: a file `<vm>.epoch-<n>`, created exclusively with its content in place (write a temporary file, sync
/// it, link it to its name, sync the directory), that holds the owner. If it exists, its content decides between `Won` and
/// `Lost`; whatever goes wrong on the way, an unreadable content included, is `Unreachable`, never `Lost`.
///
/// The etcd arbiter: a key `<prefix>/<vm>/epoch-<n>`, created with the owner as its value by one transaction that reads it if it exists.
pub trait Arbiter {
    /// Enters the claim if the register is free, and tells who holds it now.
    fn test_and_set(&mut self, claim: &Claim) -> Verdict;
}

/// The verdict for `asker` when the register turned out to be held by `holder` (which may be the asker itself).
pub fn verdict_for(asker: OwnerId, holder: OwnerId) -> Verdict {
    if asker == holder { Verdict::Won } else { Verdict::Lost }
}

/// The arbiter as a table in memory: the reference for tests and simulations.
#[derive(Debug, Clone, Default)]
pub struct TableArbiter {
    holders: BTreeMap<(VmId, Epoch), OwnerId>,
}

impl TableArbiter {
    /// Who holds an epoch, if anybody.
    pub fn holder(&self, vm: VmId, epoch: Epoch) -> Option<OwnerId> {
        self.holders.get(&(vm, epoch)).copied()
    }
}

impl Arbiter for TableArbiter {
    fn test_and_set(&mut self, claim: &Claim) -> Verdict {
        let holder = *self.holders.entry((claim.vm, claim.epoch)).or_insert(claim.owner);
        verdict_for(claim.owner, holder)
    }
}

/// What an asker does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Send the claim to the arbiter.
    Ask(Claim),
    /// The epoch is ours.
    Won,
    /// The epoch is somebody else's.
    Lost,
    /// Wait until then and ask again.
    RetryAt(Nanos),
    /// Nothing to do yet.
    Wait,
}

/// One side's pursuit of one epoch.
#[derive(Debug, Clone)]
pub(crate) struct Arbitration {
    claim: Claim,
    /// How often the arbiter has been asked.
    pub(crate) attempts: u32,
    /// While an answer is awaited: when to stop waiting for it. Otherwise: when to ask again.
    deadline: Nanos,
    awaiting: bool,
}

impl Arbitration {
    /// Begins; the caller must send the returned claim.
    pub(crate) fn begin(now: Nanos, claim: Claim, config: &Config) -> (Arbitration, Claim) {
        let deadline = now.plus(config.arbiter_timeout);
        (Arbitration { claim, attempts: 1, deadline, awaiting: true }, claim)
    }

    /// When [`Arbitration::tick`] has something to do.
    pub(crate) fn deadline(&self) -> Nanos {
        self.deadline
    }

    /// The epoch that is claimed.
    pub(crate) fn epoch(&self) -> Epoch {
        self.claim.epoch
    }

    /// Takes the arbiter's answer. A late answer to an earlier ask is as good as any: `Won` and `Lost` are for ever.
    pub(crate) fn answer(&mut self, now: Nanos, epoch: Epoch, verdict: Verdict, config: &Config) -> Next {
        if epoch != self.claim.epoch {
            return Next::Wait;
        }
        match verdict {
            Verdict::Won => Next::Won,
            Verdict::Lost => Next::Lost,
            Verdict::Unreachable => self.back_off(now, config),
        }
    }

    /// Time has passed: an answer may be overdue, or the pause between two asks over.
    pub(crate) fn tick(&mut self, now: Nanos, config: &Config) -> Next {
        if now < self.deadline {
            return Next::Wait;
        }
        if self.awaiting {
            return self.back_off(now, config);
        }
        self.awaiting = true;
        self.attempts = self.attempts.saturating_add(1);
        self.deadline = now.plus(config.arbiter_timeout);
        Next::Ask(self.claim)
    }

    fn back_off(&mut self, now: Nanos, config: &Config) -> Next {
        if !self.awaiting {
            // The answer of an ask that was given up already; the next ask is under way.
            return Next::Wait;
        }
        // Doubling, so that two stopped sides and a struggling arbiter do not keep each other busy.
        let doublings = (self.attempts - 1).min(16);
        let pause = config.arbiter_retry_min.0.saturating_mul(1 << doublings).min(config.arbiter_retry_max.0);
        self.awaiting = false;
        self.deadline = now.plus(Nanos(pause));
        Next::RetryAt(self.deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId([1; 16]);

    fn claim(epoch: u64, owner: u8) -> Claim {
        Claim { vm: VM, epoch: Epoch(epoch), owner: OwnerId([owner; 16]) }
    }

    #[test]
    fn an_epoch_has_one_winner_who_may_ask_again() {
        let mut arbiter = TableArbiter::default();
        assert_eq!(arbiter.test_and_set(&claim(2, 1)), Verdict::Won);
        assert_eq!(arbiter.test_and_set(&claim(2, 2)), Verdict::Lost);
        assert_eq!(arbiter.test_and_set(&claim(2, 1)), Verdict::Won);
        assert_eq!(arbiter.test_and_set(&claim(3, 2)), Verdict::Won);
        let other = Claim { vm: VmId([9; 16]), ..claim(2, 2) };
        assert_eq!(arbiter.test_and_set(&other), Verdict::Won);
        assert_eq!(arbiter.holder(VM, Epoch(2)), Some(OwnerId([1; 16])));
        assert_eq!(arbiter.holder(VM, Epoch(4)), None);
    }

    #[test]
    fn pauses_double_up_to_their_bound() {
        let config = Config::default();
        let (mut arbitration, asked) = Arbitration::begin(Nanos(0), claim(2, 1), &config);
        assert_eq!(asked, claim(2, 1));
        let (mut now, mut pauses) = (Nanos(0), Vec::new());
        for _ in 0..8 {
            let next = arbitration.answer(now, Epoch(2), Verdict::Unreachable, &config);
            let Next::RetryAt(at) = next else { panic!("{next:?}") };
            pauses.push(at.since(now).0 / 1_000_000);
            assert_eq!(arbitration.tick(Nanos(at.0 - 1), &config), Next::Wait);
            now = at;
            assert_eq!(arbitration.tick(now, &config), Next::Ask(claim(2, 1)));
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1_600, 2_000, 2_000]);
    }

    #[test]
    fn an_answer_that_does_not_come_counts_as_none_and_may_come_late() {
        let config = Config::default();
        let (mut arbitration, _) = Arbitration::begin(Nanos(0), claim(2, 1), &config);
        let overdue = config.arbiter_timeout;
        assert!(matches!(arbitration.tick(overdue, &config), Next::RetryAt(_)));
        let late = arbitration.answer(overdue, Epoch(2), Verdict::Unreachable, &config);
        assert_eq!(late, Next::Wait, "the pause is not begun anew");
        assert_eq!(arbitration.answer(overdue, Epoch(2), Verdict::Won, &config), Next::Won);
    }
}
