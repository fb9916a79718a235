//! The incremental decoder: bytes in, in pieces of any size; messages out.
//!
//! In: what the socket gave. Out: complete messages, or an error, after which there is nothing more to be had.
//! Invariant: never holds more than one frame and the piece that was last put in; a frame that is cut off at the end of a connection
//! is dropped, as if it had never been sent.

use super::codec::{CheckedHeader, check_header, decode_payload};
use super::{HEADER_BYTES, MAX_PAYLOAD_BYTES, Message, WireError};

/// Turns the bytes of one connection into messages.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Everything before this has been decoded.
    start: usize,
    /// Of the frame that is being received. Checked as soon as it is complete, so that garbage is refused early.
    header: Option<CheckedHeader>,
    greeted: bool,
    failed: Option<WireError>,
}

impl Decoder {
    /// For a new connection, whose greeting is to come.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// The greeting is over: other frames follow.
    pub fn greeted(&mut self) {
        self.greeted = true;
    }

    /// Puts bytes in. Take out all messages before you put in more.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        let held = self.buffer.len() - self.start;
        assert!(held <= HEADER_BYTES + MAX_PAYLOAD_BYTES, "messages were not taken out before more bytes were put in");
        // Moving what is left of a frame to the front costs at most one copy per piece.
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the next message out, if it is complete.
    pub fn next_message(&mut self) -> Result<Option<Message>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.try_next();
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.buffer = Vec::new();
            self.start = 0;
        }
        result
    }

    fn try_next(&mut self) -> Result<Option<Message>, WireError> {
        let bytes = &self.buffer[self.start..];
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(header) = check_header(bytes, self.greeted)? else {
                    return Ok(None);
                };
                *self.header.insert(header)
            }
        };
        let end = header.header_bytes + header.payload_bytes;
        let Some(payload) = bytes.get(header.header_bytes..end) else {
            return Ok(None);
        };
        let message = decode_payload(&header, payload)?;
        self.header = None;
        self.start += end;
        Ok(Some(message))
    }
}
