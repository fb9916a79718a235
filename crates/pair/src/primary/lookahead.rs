//! How far the secondary may run though it has no record that says so: what the primary knows of its own near future.
//!
//! In: the position up to which the machine is about to run without a look at what has arrived. Out: word of it, behind the records so far. Invariant: what is told holds where it
//! is told in the log: an input or a pause of the machine makes what was not told yet void.
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

impl Primary {
    pub(super) fn on_lookahead(&mut self, position: u64) {
        // With the other rule nobody waits for the secondary, and it had better run when the primary's side has less to do: at the next input.
        if self.setup.config.commit == Commit::Matched {
            self.lookahead.untold = Some(position);
        }
    }

    /// Something enters the machine, or it has paused: what was not told yet holds no more.
    pub(super) fn disturbed(&mut self) {
        if !self.bugs.has(Bug::StaleLookahead) {
            self.lookahead.untold = None;
        }
    }

    /// Whether there is something to tell.
    pub(super) fn can_look_ahead(&self) -> bool {
        self.lookahead.untold.is_some() && self.may_look_ahead()
    }

    fn may_look_ahead(&self) -> bool {
        self.image.restored && matches!(self.state, PrimaryState::Copying | PrimaryState::Protected)
    }

    /// Behind the records.
    pub(super) fn tell_lookahead(&mut self) {
        let untold = self.lookahead.untold.take();
        if let (Some(position), Some(backlog)) = (untold, &self.backlog)
            && self.may_look_ahead()
            && position.checked_sub(backlog.last_position()).is_some_and(|beyond| (1..=MAX_LOOKAHEAD).contains(&beyond))
        {
            self.send(&Message::Lookahead { position });
        }
    }
}
