//! The output rule: which outputs may leave, and which are held.
//!
//! In: outputs with the record that notes each, acknowledgements, what the host says has left. Out: how far outputs may leave.
//! Invariant: `told <= left <= released <= produced`; under protection `released` never passes an output whose note is
//! not acknowledged.
//!
//! ```text
//!   produced ──(note acknowledged, or unprotected)──▶ released ──(host wrote it)──▶ left ──(Released sent)──▶ told
//! ```

use std::collections::VecDeque;

use crate::types::{OutputId, Seq};

/// The primary's outputs that the secondary does not yet know to have left.
#[derive(Debug, Clone)]
pub(super) struct HeldOutputs {
    produced: OutputId,
    released: OutputId,
    left: OutputId,
    told: OutputId,
    /// The notes of the outputs after `released`, in order.
    notes: VecDeque<Seq>,
}

impl HeldOutputs {
    /// Of a machine that has made outputs up to `last`; none of them is held, those up to `left` have left.
    pub(super) fn new(last: OutputId, left: OutputId) -> HeldOutputs {
        assert!(left <= last, "output {left} can't have left when only {last} were made");
        HeldOutputs { produced: last, released: last, left, told: left, notes: VecDeque::new() }
    }

    /// The machine made its next output; record `note` says so.
    pub(super) fn produce(&mut self, id: OutputId, note: Seq) {
        assert_eq!(id, self.produced + 1, "outputs are numbered without gaps");
        assert!(self.notes.back().is_none_or(|last| *last <= note), "notes are in order");
        self.produced = id;
        self.notes.push_back(note);
    }

    /// Lets go of those up to `matched` whose notes are acknowledged; tells how far outputs may leave now, if further than before.
    pub(super) fn release_acked(&mut self, received: Seq, matched: OutputId) -> Option<OutputId> {
        let before = self.released;
        while self.released < matched && self.notes.front().is_some_and(|note| *note <= received) {
            self.notes.pop_front();
            self.released += 1;
        }
        self.changed_since(before)
    }

    /// Lets go of all.
    pub(super) fn release_all(&mut self) -> Option<OutputId> {
        let before = self.released;
        self.notes.clear();
        self.released = self.produced;
        self.changed_since(before)
    }

    fn changed_since(&self, before: OutputId) -> Option<OutputId> {
        assert_eq!(self.notes.len() as u64, self.produced - self.released, "each held output has its note");
        (self.released > before).then_some(self.released)
    }

    /// The host says that all up to `id` have certainly left.
    pub(super) fn has_left(&mut self, id: OutputId) {
        assert!(id <= self.released, "output {id} left, but only those up to {} were released", self.released);
        self.left = self.left.max(id);
    }

    /// What the secondary is to be told now, if anything; it counts as told afterwards.
    pub(super) fn tell(&mut self) -> Option<OutputId> {
        let news = self.left > self.told;
        self.told = self.left;
        news.then_some(self.told)
    }

    /// How many the secondary could be told of now.
    pub(super) fn untold(&self) -> u64 {
        self.left - self.told
    }

    /// The newest.
    pub(super) fn produced(&self) -> OutputId {
        self.produced
    }

    /// The newest that may leave.
    pub(super) fn released(&self) -> OutputId {
        self.released
    }

    /// The newest that has certainly left.
    pub(super) fn left(&self) -> OutputId {
        self.left
    }

    /// How many are held.
    pub(super) fn held(&self) -> u64 {
        self.notes.len() as u64
    }
}
