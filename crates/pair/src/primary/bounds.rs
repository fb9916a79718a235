//! What holds the guest back: the bounds of the log on its way, of the standby's lag, and of what is held.
//!
//! In: the figures of the backlog and of the outputs. Out: which bound is passed, and the throttle. Invariant: a guest that is held back runs on once what it was held back for has fallen
//! to half its bound, and not before.

use super::{Primary, PrimaryAction, PrimaryState};
use crate::config::Commit;
use crate::notice::Notice;
use crate::types::Nanos;

/// In instructions.
pub(super) const TOO_FAR_BEHIND: &str = "the standby is too far behind";
/// In time, while outputs wait for it.
pub(super) const TOO_LATE: &str = "outputs wait too long for the standby";

impl Primary {
    /// Which bound, times `multiplier / divisor`, is passed.
    pub(super) fn beyond(&self, multiplier: u64, divisor: u64) -> Option<&'static str> {
        self.all_beyond(multiplier, divisor).next()
    }

    /// Which bounds are.
    pub(super) fn all_beyond(&self, multiplier: u64, divisor: u64) -> impl Iterator<Item = &'static str> {
        let config = &self.setup.config;
        // The secondary can't replay before it has the image.
        let restored = self.image.restored;
        let soft = restored && multiplier == 1;
        // A secondary that catches up is compared with nobody.
        let matched = config.commit == Commit::Matched && self.state != PrimaryState::CatchingUp;
        let figures = self.backlog.as_ref().map(|backlog| {
            [
                (true, backlog.unacked_bytes(), config.max_unacked_bytes, "too much log is not acknowledged"),
                (true, backlog.unreplayed_bytes(), config.max_unreplayed_bytes, "too much log is not replayed"),
                (soft, backlog.lag_instructions(), self.max_lag(), TOO_FAR_BEHIND),
                (soft && matched, backlog.lag_time().0, config.max_matched_lag.0, TOO_LATE),
                (restored, self.outputs.held(), config.max_held_outputs, "too many outputs are held"),
            ]
        });
        let passes = move |value: u64, bound: u64| value > bound.saturating_mul(multiplier) / divisor;
        let passed = figures.into_iter().flatten().filter(move |(counts, value, bound, _)| *counts && passes(*value, *bound));
        passed.map(|(.., what)| what)
    }

    /// Whether a guest that is held back may run on: the figure it was held back for has fallen to half its bound, so that it is not stopped and started for every
    /// record, and no other one is beyond its own.
    pub(super) fn may_run_on(&self) -> bool {
        self.beyond(1, 1).is_none() && self.held_back_for.is_none_or(|reason| self.all_beyond(1, 2).all(|what| what != reason))
    }

    /// Holds the guest back until the secondary has got on, which is waited for from now on.
    pub(super) fn hold_back(&mut self, now: Nanos, reason: &'static str) {
        self.last_progress = now;
        self.set_throttle(Some(reason));
    }

    pub(super) fn set_throttle(&mut self, reason: Option<&'static str>) {
        if self.throttled != reason.is_some() {
            self.throttled = reason.is_some();
            self.held_back_for = reason;
            self.actions.push_back(PrimaryAction::Throttle(self.throttled));
            self.actions.push_back(PrimaryAction::Notice(Notice::Throttle { reason }));
        }
    }
}
