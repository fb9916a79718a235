//! What an image held at a moment, while the machine goes on writing to it: only what was there before is kept, and which blocks anybody cared for.
//!
//! *In*: reads and writes of the machine, before they are done. *Out*: the blocks that it has touched since, as they were then. *Invariant*: a block that has changed since
//! is kept as it was, or the whole checkpoint is lost; memory is bounded.
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use twinstep_machine::PageSet;

/// See the head of this module.
#[derive(Debug)]
pub(super) struct Checkpoint {
    touched: PageSet,
    /// What has changed, as it was; nothing for zeroes.
    before: BTreeMap<usize, Vec<u8>>,
    bytes: usize,
    max_bytes: usize,
    lost: bool,
}

impl Checkpoint {
    /// Now, of an image of so many blocks.
    pub(super) fn new(blocks: usize, max_bytes: usize) -> Self {
        Self { touched: PageSet::none(blocks), before: BTreeMap::new(), bytes: 0, max_bytes, lost: false }
    }
    /// The machine reads or writes these.
    pub(super) fn touch(&mut self, blocks: RangeInclusive<usize>) {
        blocks.for_each(|block| self.touched.insert(block));
    }
    /// Somebody is about to write these; `read` gives what is there.
    pub(super) fn keep<E>(&mut self, blocks: RangeInclusive<usize>, mut read: impl FnMut(usize) -> Result<Vec<u8>, E>) {
        for block in blocks {
            if self.lost || self.before.contains_key(&block) {
                continue;
            }
            match read(block) {
                Ok(bytes) if bytes.iter().all(|byte| *byte == 0) => _ = self.before.insert(block, Vec::new()),
                Ok(bytes) if self.bytes + bytes.len() <= self.max_bytes => {
                    self.bytes += bytes.len();
                    self.before.insert(block, bytes);
                }
                // The write does not wait for that, and does not fail for it.
                Ok(_) | Err(_) => {
                    self.lost = true;
                    self.before = BTreeMap::new();
                }
            }
        }
    }
    /// Blocks that the machine has touched since; `None` if what they were is lost.
    pub(super) fn touched(&self) -> Option<&PageSet> {
        (!self.lost).then_some(&self.touched)
    }
    /// A block as it was, if it has changed: nothing for zeroes.
    pub(super) fn before(&self, block: usize) -> Option<&[u8]> {
        self.before.get(&block).map(Vec::as_slice)
    }
    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
