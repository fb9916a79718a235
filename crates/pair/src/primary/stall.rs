//! Stalls of this side: what is certain after one.
//!
//! In: the time of each call, the secondary's beats. Out: whether outputs may leave. Invariant: a primary that was not called for half of the peer's timeout releases nothing until
//! the secondary has echoed a beat that was sent since.
//!
//! Half of it: a secondary counts from the last beat it has heard, which was sent up to an interval before the stall began, and several intervals fit into a timeout
//! ([`crate::Config::check`]). So nobody has gone live over a side whose stall is too short to be noticed here. A connection that is cut is another matter: then the
//! secondary need not wait, and what was acknowledged just before may leave here while it claims the epoch. That is as harmless as any frame that is late on its way, and a switch that knows epochs refuses it.

use super::{Primary, PrimaryAction, PrimaryState};
use crate::notice::Notice;
use crate::types::Nanos;
use crate::wire::Message;

impl Primary {
    /// Whether nobody may rely on its right to the epoch now: it has not heard of the secondary since a stall, or the secondary is lost and the arbiter has
    /// not answered. A host that was stopped itself between a release and its execution looks again ([`Primary::was_stalled`]) and waits while this holds.
    pub fn is_unsure(&self) -> bool {
        self.woken.is_some() || self.state == PrimaryState::Deciding
    }

    /// Whether it was not called for so long before `now` that its secondary may have given it up. The next event, whatever it is, makes it ask.
    pub fn was_stalled(&self, now: Nanos) -> bool {
        self.has_rival() && now.since(self.called) >= Nanos(self.setup.config.peer_timeout.0 / 2)
    }

    /// Asks the secondary whether it still follows.
    pub(super) fn on_stall(&mut self, now: Nanos) {
        let stall = now.since(self.called);
        self.woken = Some(now);
        self.actions.push_back(PrimaryAction::Notice(Notice::Stalled { stall }));
        let position = self.position;
        self.send(&Message::Heartbeat { time: now, position, echo: Nanos(0) });
    }

    pub(super) fn on_beat(&mut self, echo: Nanos) {
        if self.woken.is_some_and(|woken| echo >= woken) {
            self.woken = None;
            if matches!(self.state, PrimaryState::Protected | PrimaryState::CatchingUp) {
                self.release_what_may();
            }
        }
    }
}
