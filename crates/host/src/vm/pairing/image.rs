//! What the pair's thread does for the bytes of the initial copy's image: the mirror of the disks, then the copy of the machine.
//!
//! *In*: bytes that were made, word of the cut and of the end. *Out*: events for the protocol; room for those who make the bytes. *Invariant*: of a mirror or a
//! copy for a standby that was lost, nothing is listened to.
use super::*;
use crate::vm::mirror::{Mirror, Mirrored};
use crate::vm::precopy::{CopyNews, CopyWiring, MirroredDisks};

impl Driver {
    /// The standby can replay the machine: its disks come first, while the guest runs.
    pub(super) fn start_image(&mut self) {
        self.feed = Feed::default();
        if self.disks.is_empty() {
            return self.start_copy(None);
        }
        self.mirrors += 1;
        let writer = Writer { epoch: self.primary.epoch().0, ..self.writer };
        match Mirror::start(self.disks.clone(), writer, self.mirrors, self.to_self.clone()) {
            Ok(mirror) => {
                self.events.say("mirroring", "the standby's disks are made equal while the guest runs");
                self.mirror = Some(mirror);
            }
            Err(e) => self.tell_vm(ToVm::Fail(e.to_string())),
        }
    }

    /// Bytes of a mirror.
    pub(super) fn on_mirror_bytes(&mut self, number: u64, bytes: Vec<u8>) {
        if self.mirror.as_ref().is_some_and(|mirror| mirror.number == number) {
            self.feed.pieces(bytes, true);
            self.feed_image();
        }
    }

    /// A mirror is made, or failed.
    pub(super) fn on_mirrored(&mut self, number: u64, outcome: std::result::Result<Mirrored, String>) -> Option<PrimaryEvent> {
        if self.mirror.as_ref().is_none_or(|mirror| mirror.number != number) {
            return None;
        }
        match outcome {
            Ok(done) => {
                self.events.say_with("mirrored", done.text, done.figures);
                self.mirror = None;
                self.start_copy(Some(MirroredDisks { mirror: number, baseline: done.baseline }));
                None
            }
            Err(reason) => {
                self.disconnect();
                Some(PrimaryEvent::PeerClosed { reason: format!("the disks cannot be mirrored: {reason}") })
            }
        }
    }

    /// A copy of the machine has something to say.
    pub(super) fn on_copy(&mut self, id: CopyId, news: CopyNews) -> Option<PrimaryEvent> {
        if self.copying.as_ref().is_none_or(|copying| copying.id() != id) {
            return None;
        }
        match news {
            CopyNews::Bytes(bytes) => self.feed.image(bytes),
            CopyNews::Blocks { pieces, in_room } => self.feed.pieces(pieces, in_room),
            CopyNews::Cut { position, blocks } => {
                self.cut_blocks = blocks;
                return Some(PrimaryEvent::ImageCut { position });
            }
            CopyNews::Done(report) => {
                self.copying = None;
                precopy::say_done(&self.events, &report, self.cut_blocks);
                self.feed.end();
            }
            CopyNews::Failed(reason) => {
                self.disconnect();
                return Some(PrimaryEvent::PeerClosed { reason: format!("the machine cannot be copied: {reason}") });
            }
        }
        self.feed_image();
        None
    }

    /// Disks, if there are any, are mirrored but for what is written from now on.
    fn start_copy(&mut self, disks: Option<MirroredDisks>) {
        self.copies += 1;
        let disks = disks.map(|mirrored| (self.disks.clone(), mirrored));
        let copying = Copying::start(CopyWiring {
            id: self.copies,
            config: self.copy,
            disks,
            vm: self.vm.clone(),
            pair: self.to_self.clone(),
            events: self.events.clone(),
            board: self.board.clone(),
        });
        self.copying = Some(copying);
        // What the mirror did not use of its room went with it.
        self.feed.take_back();
        self.feed_image();
    }

    /// Feeds as much of the image as is wanted and there, and has more made if there is room.
    pub(super) fn feed_image(&mut self) {
        while let Some(chunk) = self.feed.next() {
            self.primary.handle(now(), PrimaryEvent::ImageChunk(chunk));
        }
        if self.feed.is_over() {
            self.primary.handle(now(), PrimaryEvent::ImageEnd);
            return;
        }
        if let Some(mirror) = &self.mirror
            && let room @ 1.. = self.feed.grant()
        {
            mirror.room(room);
        } else if let Some(copying) = &self.copying
            && let room @ 1.. = self.feed.grant()
        {
            copying.room(room);
        } else if self.ahead
            && let room @ 1.. = self.feed.grant()
        {
            self.tell_vm(ToVm::Room(room));
        }
    }
}
