//! A planned failover: the guest is stopped, the secondary does what is left, and goes live because it is told to.
//!
//! In: somebody's wish. Out: one message. Invariant: it is the arbiter who gives the epoch away, as in every other failover.

use super::{Backlog, Primary, PrimaryAction, PrimaryState};
use crate::notice::Notice;
use crate::types::Nanos;
use crate::wire::Message;

/// How far a planned failover is.
#[derive(Debug, Clone)]
pub(super) enum Handing {
    /// The guest is to stand still, and the secondary to do what it has not done yet.
    Waiting { reason: String },
    /// The secondary has been told to go live.
    Done,
}

impl Primary {
    pub(super) fn on_hand_over(&mut self, now: Nanos, reason: String) {
        if self.state != PrimaryState::Protected || self.handing.is_some() {
            let reason = match self.handing {
                Some(_) => "that is being done already".to_owned(),
                None => format!("only a protected VM has somewhere to go; this one is {}", self.state.name()),
            };
            return self.actions.push_back(PrimaryAction::Notice(Notice::HandOverRefused { reason }));
        }
        self.handing = Some(Handing::Waiting { reason });
        self.hold_back(now, "the VM is given to the standby");
    }

    /// Tells the secondary to go live, once it has done all that was done here. What the guest still does until it has been stopped never happened: it is
    /// held, and nobody will let it go.
    pub(super) fn hand_over_if_even(&mut self) {
        let (Some(Handing::Waiting { reason }), PrimaryState::Protected) = (&self.handing, self.state) else { return };
        let even = self.outputs.held() == 0 && self.backlog.as_ref().is_some_and(Backlog::is_replayed);
        if even {
            let message = Message::HandOver { reason: reason.clone() };
            self.flush();
            self.send(&message);
            self.handing = Some(Handing::Done);
        }
    }
}
