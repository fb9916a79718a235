//! Writing a recording.
//!
//! **In:** the machine's image, then entries. **Out:** bytes on a `Write`.
//! **Invariant:** after a failure (a full disk) nothing more is written, what was written before can be replayed, and the machine
//! need not care.
use super::*;
use crate::codec::encode_into;
use crate::container::{Output, WriteError, encode_metadata};
use crate::entry::{Entry, Event};
use crate::image::{Compression, ImageMetadata, ImageSummary, ImageWriter};
use crate::stats::LogStats;
use std::io::Write;

/// Bytes of entries that are gathered before they are written.
const BUFFER_BYTES: usize = 64 << 10;

/// A recording whose image is being written.
pub struct RecordingStart<W: Write> {
    /// Takes the machine's payloads and pages.
    pub image: ImageWriter<W>,
    position: u64,
}

impl<W: Write> RecordingStart<W> {
    /// Begins a recording of a machine in the state that `image` describes.
    ///
    /// # Errors
    /// If the output fails, or a limit of the format is exceeded.
    pub fn new(
        output: W,
        metadata: &RecordingMetadata,
        image: &ImageMetadata,
        compression: Compression,
    ) -> Result<Self, WriteError> {
        let mut output = Output::new(output, CONTAINER.what);
        CONTAINER.begin(&mut output, &encode_metadata(metadata))?;
        Ok(Self { image: ImageWriter::new_at(output, image, compression)?, position: image.position })
    }

    /// The image is whole; now entries may come. The image is flushed.
    ///
    /// # Errors
    /// If the output fails.
    pub fn finish_image(self) -> Result<(RecordingWriter<W>, ImageSummary), WriteError> {
        let (mut output, summary) = self.image.finish_at()?;
        output.flush()?;
        let writer = RecordingWriter {
            output,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            position: self.position,
            ended: false,
            stats: LogStats::default(),
        };
        Ok((writer, summary))
    }
}

/// A recording that takes entries.
///
/// Entries are gathered; [`RecordingWriter::flush`] sees to it that all so far are in the file. A writer that is dropped without
/// [`RecordingWriter::close`] loses those gathered since.
#[derive(Debug)]
pub struct RecordingWriter<W: Write> {
    output: Output<W>,
    buffer: Vec<u8>,
    position: u64,
    ended: bool,
    stats: LogStats,
}

impl<W: Write> RecordingWriter<W> {
    /// Adds an entry.
    ///
    /// # Errors
    /// If the output fails ([`WriteError::is_disk_full`] tells why): every later call then gives [`WriteError::Failed`], and the
    /// machine can go on without being recorded. If the entry cannot come here (it goes back in time, follows the end, or is too
    /// large) only that entry is refused.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), WriteError> {
        self.output.check()?;
        if self.ended {
            return Err(self.output.invalid("an entry after the end"));
        }
        if entry.position < self.position {
            let fault = format!("an entry at position {} after position {}", entry.position, self.position);
            return Err(self.output.invalid(fault));
        }
        let length = encode_into(entry, &mut self.buffer).map_err(|error| self.output.invalid(error.to_string()))?;
        self.position = entry.position;
        self.ended = matches!(entry.event, Event::End { .. });
        self.stats.count(entry.event.kind(), length);
        if self.buffer.len() >= BUFFER_BYTES {
            self.write_buffer()?;
        }
        Ok(())
    }

    /// Writes what was gathered, and flushes the output.
    ///
    /// # Errors
    /// If the output fails.
    pub fn flush(&mut self) -> Result<(), WriteError> {
        self.write_buffer()?;
        self.output.flush()
    }

    fn write_buffer(&mut self) -> Result<(), WriteError> {
        // Cleared also when it fails: nothing is written any more then, and memory must not grow.
        let written = self.output.write(&self.buffer);
        self.buffer.clear();
        written
    }

    /// Flushes and gives the output back. Without an end entry the recording reads as cut.
    ///
    /// # Errors
    /// If the output fails.
    pub fn close(mut self) -> Result<(W, LogStats), WriteError> {
        self.flush()?;
        Ok((self.output.into_inner(), self.stats))
    }

    /// Bytes of the recording so far, gathered ones included.
    pub fn bytes(&self) -> u64 {
        self.output.offset + self.buffer.len() as u64
    }

    /// The entries taken so far.
    pub fn stats(&self) -> &LogStats {
        &self.stats
    }
}
