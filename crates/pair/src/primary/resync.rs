//! Outputs that differ: the guest is stopped, the secondary is made equal, and what is held leaves only then.
//!
//! In: the secondary's words. Out: the wish for a delta. Invariant: from the mismatch until the secondary has confirmed nothing is released.

use super::{Image, Primary, PrimaryAction, PrimaryState};
use crate::bugs::Bug;
use crate::config::OnMismatch;
use crate::notice::StopReason;
use crate::types::{Nanos, OutputId};
use crate::wire::{Ack, Message};

/// What a secondary can have changed at most, in bytes of its list a page of RAM.
const CHANGED_BYTES_PER_PAGE: u64 = 32;
/// And beyond its RAM: on disks, of which nothing is known here.
const CHANGED_BYTES_ELSEWHERE: u64 = 64 << 20;

impl Primary {
    pub(super) fn on_changed(&mut self, now: Nanos, bytes: &[u8]) {
        self.changed.extend(bytes);
        let most = self.setup.vm.ram_bytes / 4096 * CHANGED_BYTES_PER_PAGE + CHANGED_BYTES_ELSEWHERE;
        if self.changed.len() as u64 > most {
            self.lose_peer(now, "the standby says that more has changed than there is");
        }
    }

    /// The guest stands still from here on, and nothing leaves, until the secondary is equal again.
    pub(super) fn on_mismatch(&mut self, now: Nanos, output: OutputId, position: u64, damaged: u64, detail: Vec<u8>) {
        let changed = std::mem::take(&mut self.changed);
        if self.setup.config.on_mismatch == OnMismatch::Stop {
            let reason = StopReason::Mismatch { output };
            self.send(&Message::Goodbye { reason: reason.to_string() });
            return self.stop(reason);
        }
        self.image = Image::default();
        self.enter(PrimaryState::Resyncing, &format!("the two sides differ in output {output}"));
        self.hold_back(now, "the standby is made equal again");
        if self.bugs.has(Bug::ReleaseAtResync) {
            self.release_all();
        }
        self.actions.push_back(PrimaryAction::StartResync { output, position, damaged, detail, changed });
        self.want_image();
    }

    pub(super) fn resynced(&mut self, now: Nanos) {
        let (position, _) = self.image.cut.expect("it has an end, so it has a cut");
        let backlog = self.backlog.as_mut().expect("there is one since the first image");
        // The image stands for all that was sent.
        let all = backlog.sent();
        let ack = Ack { received_seq: all, replayed_seq: all, replayed_position: position, ..Ack::default() };
        backlog.acknowledge(&ack).expect("nothing is taken back");
        backlog.stands_at(position);
        self.resyncs += 1;
        self.last_progress = now;
        self.enter(PrimaryState::Protected, "the standby is equal again");
        self.release_what_may();
        if self.handing.is_none() {
            self.set_throttle(None);
        }
    }
}
