//! How far the secondary may run though it has no record that says so: what the primary knows of its own near future.
//!
//! In: the position up to which the machine is about to run without a look at what has arrived. Out: word of it, behind the records so far. Invariant: what is told holds where it
//! is told in the log: a later input makes what was not told yet void, and none is told that ends before the last record.
//!
//! Without it a secondary can run to an input or an output only when the primary has got there, so that the two take turns. With it they run the same
//! instructions at the same time. (Simulators that run in parallel call that lookahead, and the message that carries nothing else a null message.)

use super::{Primary, PrimaryState};
use crate::bugs::Bug;
use crate::config::Commit;
use crate::wire::{MAX_LOOKAHEAD, Message};

/// What the secondary could be told.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lookahead {
    /// The machine runs to there, and the secondary has not been told.
    untold: Option<u64>,
}

impl Lookahead {
    /// Something enters the machine: from here on it is another one.
    pub(super) fn is_void(&mut self) {
        self.untold = None;
    }
}

impl Primary {
    pub(super) fn on_lookahead(&mut self, position: u64) {
        self.lookahead.untold = Some(position);
    }

    /// Whether it is sent although nothing else is: if outputs wait for the secondary to make the same.
    pub(super) fn is_lookahead_worth_a_message(&self) -> bool {
        self.lookahead.untold.is_some() && self.setup.config.commit == Commit::Matched && self.may_look_ahead()
    }

    fn may_look_ahead(&self) -> bool {
        self.image.restored && matches!(self.state, PrimaryState::Copying | PrimaryState::Protected)
    }

    /// Behind the records.
    pub(super) fn tell_lookahead(&mut self) {
        let Some(backlog) = &self.backlog else { return self.lookahead.is_void() };
        let last = backlog.last_position();
        if let Some(position) = self.lookahead.untold.take()
            && self.may_look_ahead()
            && position > last
            && position - last <= MAX_LOOKAHEAD
        {
            self.send(&Message::Lookahead { position });
        }
    }

    /// The log grows by something that enters the machine.
    pub(super) fn enters(&mut self) {
        if !self.bugs.has(Bug::StaleLookahead) {
            self.lookahead.is_void();
        }
    }
}
