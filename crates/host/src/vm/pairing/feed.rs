//! What goes to the standby as its image, in order: pieces of the initial copy, or a delta.
//!
//! *In*: bytes as they are made, by threads of their own; how much the standby takes. *Out*: chunks of no more than it takes; room for those who make
//! the bytes. *Invariant*: no more is promised to them than the standby takes beyond what waits here, so that little waits here. What is made at a cut
//! comes without having been given room; then nobody gets any until it has left.
use std::collections::VecDeque;

use crate::vm::mirror;

/// Bytes of a chunk at most.
const CHUNK_BYTES: usize = 256 << 10;

/// See the head of the module. One is made for each copy, and for each delta.
#[derive(Debug, Default)]
pub(super) struct Feed {
    parts: VecDeque<Vec<u8>>,
    /// How much of the first part has left.
    left: usize,
    /// Bytes that wait.
    waiting: u64,
    /// Bytes that the standby takes beyond those that have left.
    wanted: u64,
    /// Room that was given and is not used.
    granted: u64,
    ended: bool,
}

impl Feed {
    /// The standby takes so many bytes more.
    pub(super) fn want(&mut self, bytes: u64) {
        self.wanted += bytes;
    }
    /// Bytes of the machine's image were made, in room that was given.
    pub(super) fn image(&mut self, bytes: Vec<u8>) {
        self.granted = self.granted.saturating_sub(bytes.len() as u64);
        self.push(mirror::image_head(bytes.len()));
        self.push(bytes);
    }
    /// Whole pieces, or a delta, were made.
    pub(super) fn pieces(&mut self, bytes: Vec<u8>, in_room: bool) {
        if in_room {
            self.granted = self.granted.saturating_sub(bytes.len() as u64);
        }
        self.push(bytes);
    }
    fn push(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.waiting += bytes.len() as u64;
            self.parts.push_back(bytes);
        }
    }
    /// Nothing more will be made.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }
    /// Room that was given will not be used: who had it is gone.
    pub(super) fn take_back(&mut self) {
        self.granted = 0;
    }
    /// New room, which is thereby given; 0 if there is none.
    pub(super) fn grant(&mut self) -> u64 {
        let room = self.wanted.saturating_sub(self.waiting + self.granted);
        self.granted += room;
        room
    }
    /// The next bytes for the standby; `None` if it takes none now, or there are none.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let length = self.waiting.min(self.wanted).min(CHUNK_BYTES as u64) as usize;
        let mut chunk = Vec::with_capacity(length);
        while chunk.len() < length
            && let Some(part) = self.parts.front()
        {
            let rest = &part[self.left..];
            let taken = rest.len().min(length - chunk.len());
            chunk.extend_from_slice(&rest[..taken]);
            self.left += taken;
            if self.left == part.len() {
                self.parts.pop_front();
                self.left = 0;
            }
        }
        self.waiting -= length as u64;
        self.wanted -= length as u64;
        (length > 0).then_some(chunk)
    }
    /// Whether all has left. Says so once.
    pub(super) fn is_over(&mut self) -> bool {
        let over = self.ended && self.parts.is_empty();
        self.ended &= !over;
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(feed: &mut Feed) -> Vec<u8> {
        std::iter::from_fn(|| feed.next()).flatten().collect()
    }

    #[test]
    fn what_comes_in_goes_out_in_order_and_within_what_is_wanted() {
        let mut feed = Feed::default();
        feed.want(100);
        assert_eq!((feed.grant(), feed.grant()), (100, 0));
        feed.pieces(vec![1; 60], true);
        feed.image(vec![2; 40]);
        // The head is beyond the room: it waits like everything else.
        let whole = [vec![1; 60], mirror::image_head(40), vec![2; 40]].concat();
        assert_eq!(all(&mut feed), whole[..100]);
        feed.end();
        assert!(!feed.is_over());
        feed.want(1000);
        assert_eq!(all(&mut feed), whole[100..]);
        assert!(feed.is_over());
        assert!(!feed.is_over(), "it is said once");
    }

    #[test]
    fn nobody_gets_room_while_what_was_made_without_waits() {
        let mut feed = Feed::default();
        feed.want(100);
        feed.pieces(vec![1; 3 * CHUNK_BYTES], false);
        assert_eq!((all(&mut feed).len(), feed.grant()), (100, 0));
        feed.want(3 * CHUNK_BYTES as u64);
        assert_eq!(feed.next().map(|chunk| chunk.len()), Some(CHUNK_BYTES));
        assert_eq!(all(&mut feed).len(), 2 * CHUNK_BYTES - 100);
        assert_eq!(feed.grant(), 100);
        feed.take_back();
        assert_eq!(feed.grant(), 100, "whoever had it is gone");
    }
}
