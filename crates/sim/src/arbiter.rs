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
    /// It arrives, and the answer too: `arrives`, then `answers` later.
    Answered { arrives: u64, answers: u64 },
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
    /// Draws what becomes of a claim made now.
    pub(crate) fn fate(now: Nanos, calm_from: Nanos, profile: &Profile, random: &mut Random) -> Fate {
        let arrives = random.between(10_000, profile.arbiter_delay_max_ns);
        let answers = random.between(10_000, profile.arbiter_delay_max_ns);
        if now >= calm_from {
            return Fate::Answered { arrives, answers };
        }
        if now >= profile.arbiter_away.0 && now < profile.arbiter_away.1 {
            return if random.percent(50) { Fate::Refused { answers } } else { Fate::Lost };
        }
        if random.percent(profile.arbiter_answer_lost_percent) {
            return Fate::AnswerLost { arrives };
        }
        Fate::Answered { arrives, answers }
    }

    /// A claim arrives.
    pub(crate) fn decide(&mut self, claim: &Claim) -> Verdict {
        self.table.test_and_set(claim)
    }
}
