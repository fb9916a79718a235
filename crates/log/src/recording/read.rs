//! Reading a recording, also one whose writer did not live to finish it.
//!
//! **In:** a `Read + Seek` that begins with the recording. **Out:** its metadata, its image, its entries, and how it ends.
//! **Invariant:** an entry comes out only if all bytes before it were those that were written.
use super::*;
use crate::codec::Fault;
use crate::container::{Input, ReadError, decode_metadata};
use crate::decoder::{DecodeError, Decoder};
use crate::entry::{EndReason, Entry, Event};
use crate::image::{ImageMetadata, ImageReader, skip_image};
use crate::stats::LogStats;
use std::io::{Read, Seek};

/// How a recording ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordingEnd {
    /// Its writer finished it.
    Complete {
        /// Why there is no more.
        reason: EndReason,
        /// Where the machine was.
        position: u64,
        /// How many entries there are, the end entry included.
        entries: u64,
    },
    /// Its writer did not finish it: it crashed, or its disk was full. Everything up to `position` can be replayed.
    Truncated {
        /// How many entries are good.
        entries: u64,
        /// Position of the last good entry (of the image if there is none).
        position: u64,
        /// Offset in the file of the first byte that is not part of a good entry.
        offset: u64,
        /// Bytes from there on: the beginning of an entry, or zeros.
        lost_bytes: u64,
    },
}

impl std::fmt::Display for RecordingEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RecordingEnd::Complete { reason, position, entries } => {
                write!(f, "complete: {entries} entries up to position {position}; {reason}")
            }
            RecordingEnd::Truncated { entries, position, offset, lost_bytes } => {
                write!(f, "cut off at byte {offset}: {entries} entries up to position {position} are good, ")?;
                write!(f, "{lost_bytes} bytes after them are not")
            }
        }
    }
}

/// Reads a recording.
#[derive(Debug)]
pub struct RecordingReader<R: Read + Seek> {
    input: Input<R>,
    metadata: RecordingMetadata,
    image_metadata: ImageMetadata,
    image_offset: u64,
    entries_offset: u64,
    decoder: Decoder,
    end: Option<RecordingEnd>,
    piece: Vec<u8>,
}

/// Bytes that are read at once.
const PIECE_BYTES: usize = 64 << 10;

impl<R: Read + Seek> RecordingReader<R> {
    /// Opens the recording that `input` holds from its first byte on, and passes over its image.
    ///
    /// # Errors
    /// If this is no recording, a newer one, or it is damaged or cut before its first entry (it cannot be replayed then).
    pub fn open(input: R) -> Result<Self, ReadError> {
        let mut input = Input { inner: input, offset: 0, what: CONTAINER.what };
        input.seek(0)?;
        let bytes = CONTAINER.open(&mut input)?;
        let metadata = decode_metadata(&input, &bytes)?;
        let image_offset = input.offset;
        let image_metadata = skip_image(&mut input)?;
        let entries_offset = input.offset;
        let decoder = Decoder::starting_at(entries_offset, image_metadata.position);
        let piece = vec![0; PIECE_BYTES];
        Ok(Self { input, metadata, image_metadata, image_offset, entries_offset, decoder, end: None, piece })
    }

    /// What the recording says about itself.
    pub fn metadata(&self) -> &RecordingMetadata {
        &self.metadata
    }

    /// What its image says about itself.
    pub fn image_metadata(&self) -> &ImageMetadata {
        &self.image_metadata
    }

    /// The image that the entries start from. Can be read at any time and again; does not disturb the entries.
    ///
    /// # Errors
    /// If the file fails, or the image is damaged.
    pub fn image(&mut self) -> Result<ImageReader<&mut R>, ReadError> {
        self.input.seek(self.image_offset)?;
        let Input { inner, offset, what } = &mut self.input;
        ImageReader::open_at(Input { inner, offset: *offset, what })
    }

    /// Goes back to the first entry.
    pub fn rewind(&mut self) {
        self.decoder = Decoder::starting_at(self.entries_offset, self.image_metadata.position);
        self.end = None;
    }

    /// The next entry; the end entry comes out as well. `None` at the end, and then [`RecordingReader::end`] says which.
    ///
    /// # Errors
    /// If the file fails or its bytes are not those that were written. What came out before is good.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, ReadError> {
        if self.end.is_some() {
            return Ok(None);
        }
        loop {
            match self.decoder.pop() {
                Ok(Some(entry)) => {
                    // Read ahead now: an end that something follows is none.
                    if let Event::End { reason } = &entry.event {
                        let reason = reason.clone();
                        self.check_nothing_follows()?;
                        let (position, entries) = (entry.position, self.decoder.entries());
                        self.end = Some(RecordingEnd::Complete { reason, position, entries });
                    }
                    return Ok(Some(entry));
                }
                Ok(None) => {
                    if self.fill()? == 0 {
                        self.end = Some(self.truncated(self.decoder.pending() as u64));
                        return Ok(None);
                    }
                }
                Err(error) => return self.judge(error).map(|()| None),
            }
        }
    }

    /// Reads a piece into the decoder; says how many bytes came.
    fn fill(&mut self) -> Result<usize, ReadError> {
        let offset = self.decoder.offset() + self.decoder.pending() as u64;
        if self.input.offset != offset {
            self.input.seek(offset)?;
        }
        let read = self.input.read_up_to(&mut self.piece)?;
        let taken = self.decoder.push(&self.piece[..read]);
        assert_eq!(taken, read, "a decoder that has nothing to give has room for a piece");
        Ok(read)
    }

    fn check_nothing_follows(&mut self) -> Result<(), ReadError> {
        if self.decoder.pending() == 0 && self.fill()? == 0 {
            return Ok(());
        }
        match self.decoder.pop() {
            Err(error) => Err(self.damaged(error)),
            Ok(_) => unreachable!("a decoder gives an error for bytes after the end"),
        }
    }

    /// An entry is bad. File systems may leave zeros where a crashed writer's last bytes should be: that is a cut, if there is
    /// nothing else to the end of the file.
    fn judge(&mut self, error: DecodeError) -> Result<(), ReadError> {
        let mut zeros = self.decoder.pending() as u64;
        let mut only_zeros = matches!(error.fault, Fault::Check { .. });
        only_zeros &= self.decoder.pending_bytes().iter().all(|byte| *byte == 0);
        if only_zeros {
            self.input.seek(self.decoder.offset() + zeros)?;
        }
        while only_zeros {
            let read = self.input.read_up_to(&mut self.piece)?;
            if read == 0 {
                self.end = Some(self.truncated(zeros));
                return Ok(());
            }
            zeros += read as u64;
            only_zeros = self.piece[..read].iter().all(|byte| *byte == 0);
        }
        Err(self.damaged(error))
    }

    fn truncated(&self, lost_bytes: u64) -> RecordingEnd {
        let (entries, position) = (self.decoder.entries(), self.decoder.position());
        RecordingEnd::Truncated { entries, position, offset: self.decoder.offset(), lost_bytes }
    }

    fn damaged(&self, error: DecodeError) -> ReadError {
        let DecodeError { offset, entry, fault } = error;
        let position = self.decoder.position();
        let fault = format!("{fault}; the {entry} entries before it, up to position {position}, are good");
        ReadError::Damaged { what: CONTAINER.what, offset, fault }
    }

    /// How the recording ends; `None` before it was read to there.
    pub fn end(&self) -> Option<&RecordingEnd> {
        self.end.as_ref()
    }

    /// The entries that came out so far.
    pub fn stats(&self) -> &LogStats {
        self.decoder.stats()
    }
}
