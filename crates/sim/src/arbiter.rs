//! The toy arbiter: right in what it decides, unreliable in everything else.
//!
//! In: claims. Out: verdicts, late or never. Invariant: a claim that arrives takes effect at once and for ever, whether or not the
//! answer gets back.

use twinstep_pair::{Arbiter, Claim, Nanos, TableArbiter, Verdict};

use crate::profile::Profile;
use crate::random::Random;

/// What becomes of one claim.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fate {
    /// It arrives, and the answer too: `arrives`, then `answers` later; and once more `again` later, if it is said twice.
    Answered { arrives: u64, answers: u64, again: Option<u64> },
    /// It arrives, the answer is lost.
    AnswerLost { arrives: u64 },
    /// It does not arrive, and the asker is told so.
    Refused { answers: u64 },
    /// It does not arrive, and the asker hears nothing.
    Lost,
}

/// The arbiter and its faults.
#[derive(Debug, Clone, Default)]
pub(crate) struct ToyArbiter {
    pub(crate) table: TableArbiter,
}

impl ToyArbiter {
    /// Draws what becomes of a claim made now on this host.
    pub(crate) fn fate(now: Nanos, host: usize, calm_from: Nanos, profile: &Profile, random: &mut Random) -> Fate {
        let arrives = random.between(10_000, profile.arbiter_delay_max_ns);
        let answers = random.between(10_000, profile.arbiter_delay_max_ns);
        let again = random.percent(profile.arbiter_twice_percent).then(|| random.between(0, 30_000_000));
        if now >= calm_from {
            return Fate::Answered { arrives, answers, again };
        }
        let (away_from, away_to) = profile.arbiter_away[host];
        if now >= away_from && now < away_to {
            return if random.percent(50) { Fate::Refused { answers } } else { Fate::Lost };
        }
        if random.percent(profile.arbiter_answer_lost_percent) {
            return Fate::AnswerLost { arrives };
        }
        Fate::Answered { arrives, answers, again }
    }

    /// A claim arrives.
    pub(crate) fn decide(&mut self, claim: &Claim) -> Verdict {
        self.table.test_and_set(claim)
    }
}
