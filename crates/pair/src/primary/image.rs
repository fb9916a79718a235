//! The image on its way: the initial copy, or what a resync sends.
//!
//! In: bytes from the host, word of the cut and of the end, the secondary's acknowledgements. Out: chunks, wishes for more. Invariant: no more is asked for than a window
//! beyond what the secondary has used up; an image has one cut and one end, in that order.

use super::{Backlog, Primary, PrimaryAction, PrimaryState};
use crate::bugs::Bug;
use crate::types::{Nanos, OutputId};
use crate::wire::{MAX_IMAGE_CHUNK_BYTES, Message};

/// The image on its way.
#[derive(Debug, Clone, Default)]
pub(super) struct Image {
    pub(super) wanted_bytes: u64,
    pub(super) fed_bytes: u64,
    pub(super) acked_bytes: u64,
    /// Position and last output of the machine in the image.
    pub(super) cut: Option<(u64, OutputId)>,
    pub(super) ended: bool,
    /// The secondary has restored it.
    pub(super) restored: bool,
}

impl Primary {
    pub(super) fn want_image(&mut self) {
        let window = self.image.acked_bytes + self.setup.config.image_window_bytes;
        if window > self.image.wanted_bytes && !self.image.ended {
            let bytes = window - self.image.wanted_bytes;
            self.image.wanted_bytes = window;
            self.actions.push_back(PrimaryAction::WantImage { bytes });
        }
    }

    /// Whether an image is wanted: the first one, or that of a resync.
    pub(super) fn is_copying(&self) -> bool {
        matches!(self.state, PrimaryState::Copying | PrimaryState::CatchingUp | PrimaryState::Resyncing)
    }

    pub(super) fn on_image_chunk(&mut self, bytes: &[u8]) {
        if !self.is_copying() {
            return; // The standby was lost while the host read the image.
        }
        assert!(!self.image.ended, "the image goes on after its end");
        self.image.fed_bytes += bytes.len() as u64;
        assert!(self.image.fed_bytes <= self.image.wanted_bytes, "more image was fed than was asked for");
        for chunk in bytes.chunks(MAX_IMAGE_CHUNK_BYTES) {
            self.send(&Message::ImageChunk(chunk.to_vec()));
        }
    }

    pub(super) fn on_image_cut(&mut self, position: u64) {
        if !self.is_copying() {
            return;
        }
        assert!(self.image.cut.is_none(), "an image has one cut");
        assert_ne!(self.state, PrimaryState::CatchingUp, "the cut is made where the guest stands still");
        self.image.cut = Some((position, self.outputs.produced()));
        self.position = self.position.max(position);
        if self.state == PrimaryState::Copying {
            self.backlog = Some(Backlog::new(position));
        } else {
            // The image stands for all records before it; and the secondary hears of what has left, which it does not carry.
            self.flush();
        }
    }

    pub(super) fn on_image_end(&mut self, now: Nanos) {
        if !self.is_copying() {
            return;
        }
        assert!(!self.image.ended, "the image ends once");
        let (position, _) = self.image.cut.expect("the cut is made before the image ends");
        self.image.ended = true;
        self.send(&Message::ImageEnd { position, total_bytes: self.image.fed_bytes });
        if self.bugs.has(Bug::ResumeBeforeReady) && self.state == PrimaryState::Resyncing {
            self.resynced(now);
        }
    }

    pub(super) fn on_image_ready(&mut self, now: Nanos, position: u64) {
        if !self.image.ended || self.image.cut.is_none_or(|(cut, _)| cut != position) {
            return self.lose_peer(now, &format!("the standby has restored another image, at position {position}"));
        }
        self.image.restored = true;
        // Its machine made the outputs before the cut, for it is this one.
        self.matched = self.matched.max(self.image.cut.map_or(0, |(_, last_output)| last_output));
        if self.state == PrimaryState::Resyncing {
            self.resynced(now);
        }
    }
}
