//! Outputs on their way out: released by the protocol, not yet gone.
//!
//! *In*: how far the protocol has released. *Out*: outputs to the outlet, in order, and word to the protocol how far they have left. *Invariant*: nothing leaves while this side may have been
//! taken over without knowing it; what was written to a shared disk has left when it is durable, and not before.

use twinstep_machine::Output;
use twinstep_pair::{Nanos, OutputId, PrimaryEvent, PrimaryState};

use super::{Driver, now};
use crate::events::now_ns;

impl Driver {
    pub(super) fn release(&mut self, up_to: OutputId) {
        self.may_leave = up_to;
        self.let_leave();
    }

    /// Lets outputs leave that were released. This process may be stopped at any moment, also between a release and its execution, and when it wakes up the VM may be
    /// another side's: so the clock is read before each of them, and after a stall the peer or the arbiter is heard first.
    pub(super) fn let_leave(&mut self) {
        let before = self.given;
        while self.held.front().is_some_and(|(id, ..)| *id <= self.may_leave) {
            let now_ns = now_ns();
            if self.primary.was_stalled(Nanos(now_ns)) {
                self.primary.handle(Nanos(now_ns), PrimaryEvent::Tick);
            }
            if self.primary.is_unsure() {
                break;
            }
            let (id, made_ns, output) = self.held.pop_front().expect("just seen");
            if matches!(output, Output::DiskWrite { .. } | Output::DiskFlush { .. }) {
                self.writing.push_back(id);
            }
            (self.outlet)(output);
            self.given = id;
            let held = now_ns.saturating_sub(made_ns);
            // One that may leave at once was not held.
            if self.last_state >= PrimaryState::Protected {
                self.meter.committed(now_ns, held);
            }
            self.report.held_max_ns = self.report.held_max_ns.max(held);
            self.report.held_sum_ns += held;
            self.report.held_outputs += 1;
        }
        if self.given != before {
            self.primary.handle(now(), PrimaryEvent::OutputsLeft { up_to: self.left() });
        }
    }

    /// The last output up to which all have left: frames leave at once, what is written to a shared disk once it is durable there.
    pub(super) fn left(&self) -> OutputId {
        self.writing.front().map_or(self.given, |first| first - 1)
    }
}
