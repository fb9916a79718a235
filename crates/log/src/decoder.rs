//! Entries out of a stream of bytes that comes in pieces of any size.
//!
//! **In:** pieces of bytes ([`Decoder::push`]). **Out:** entries in order ([`Decoder::pop`]), or the first fault and where it is.
//! **Invariants:** at most [`Decoder::CAPACITY`] bytes are kept; positions never go back; after a fault or an end entry nothing
//! more comes out. How the bytes were cut into pieces makes no difference to what comes out.
use crate::codec::{Fault, MAX_ENTRY, Parsed, parse};
use crate::entry::{Entry, Event};
use crate::stats::LogStats;

/// A fault in a stream of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}, entry {entry}: {fault}")]
pub struct DecodeError {
    /// Where the bad entry begins, in bytes from the start of the stream (or of the file, see [`Decoder::starting_at`]).
    pub offset: u64,
    /// Its number, from 0.
    pub entry: u64,
    /// What is wrong.
    pub fault: Fault,
}

/// Turns pieces of bytes into entries.
#[derive(Debug, Clone)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were already turned into entries.
    used: usize,
    /// Offset in the stream of `buffer[used]`.
    offset: u64,
    /// No entry may lie before this.
    position: u64,
    ended: bool,
    failed: Option<DecodeError>,
    entries: u64,
    stats: LogStats,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// Most bytes kept: an entry of the largest size, and a piece beside it.
    pub const CAPACITY: usize = MAX_ENTRY + (64 << 10);

    /// A decoder for a stream that starts at its first byte, with any position.
    pub fn new() -> Self {
        Self::starting_at(0, 0)
    }

    /// A decoder for a stream whose first byte is told to people as `offset`, and none of whose entries may lie before
    /// `position`.
    pub fn starting_at(offset: u64, position: u64) -> Self {
        Self { buffer: Vec::new(), used: 0, offset, position, ended: false, failed: None, entries: 0, stats: LogStats::default() }
    }

    /// Takes as many of `bytes` as there is room for, and says how many. After [`Decoder::pop`] gave `None` there is room for
    /// at least 64 KiB.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(Self::CAPACITY - self.pending());
        if self.used > 0 && self.buffer.len() + taken > Self::CAPACITY.min(self.buffer.capacity()) {
            self.buffer.drain(..self.used);
            self.used = 0;
        }
        self.buffer.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// The next entry; `None` if it is not all there yet.
    ///
    /// # Errors
    /// If the bytes are no entry, or one that may not be here. Every later call gives the same error.
    pub fn pop(&mut self) -> Result<Option<Entry>, DecodeError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let next = self.parse_next();
        next.map_err(|fault| {
            let error = DecodeError { offset: self.offset, entry: self.entries, fault };
            self.failed = Some(error);
            error
        })
    }

    fn parse_next(&mut self) -> Result<Option<Entry>, Fault> {
        if self.pending() == 0 {
            return Ok(None);
        }
        if self.ended {
            return Err(Fault::AfterEnd);
        }
        let (entry, length) = match parse(&self.buffer[self.used..])? {
            Parsed::Incomplete(needed) => {
                assert!(needed > self.pending() && needed <= MAX_ENTRY, "an incomplete entry always fits");
                return Ok(None);
            }
            Parsed::Whole(entry, length) => (entry, length),
        };
        if entry.position < self.position {
            return Err(Fault::Backwards { last: self.position, position: entry.position });
        }
        self.position = entry.position;
        self.ended = matches!(entry.event, Event::End { .. });
        self.used += length;
        self.offset += length as u64;
        self.entries += 1;
        self.stats.count(entry.event.kind(), length);
        if self.used == self.buffer.len() {
            self.buffer.clear();
            self.used = 0;
        }
        Ok(Some(entry))
    }

    /// Bytes that were pushed and are not yet part of an entry that came out. Not 0 at the end of a stream: it was cut.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.used
    }

    /// Those bytes.
    pub fn pending_bytes(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// Offset of the first byte that is not part of an entry that came out.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Position of the last entry that came out, or where the stream starts.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How many entries came out.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Whether the end entry came out.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// What came out so far.
    pub fn stats(&self) -> &LogStats {
        &self.stats
    }
}
