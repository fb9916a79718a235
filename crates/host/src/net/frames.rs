//! Ethernet frames on a byte stream: each after its length in four bytes, big-endian. passt's socket and QEMU's stream
//! netdev speak the same.
//!
//! *In*: bytes in pieces of any size. *Out*: whole frames with their length in front ("wire frames"). *Invariant*: at most one frame
//! and one read's worth of bytes is held; a length nobody could mean ends the stream, because after it no boundary can be
//! trusted.

use std::io::Read;
use std::ops::Range;

use super::token;

/// Bytes of the length in front of a frame.
pub const HEADER: usize = 4;

/// An Ethernet header: destination, source, type.
pub const ETHERNET_HEADER: usize = 14;

/// The longest frame taken: an IP packet of 65535 bytes, an Ethernet header and a VLAN tag, with some room (QEMU's limit).
pub const MAX_FRAME: usize = 69_632;

/// How much one read asks for.
const READ_SIZE: usize = 64 << 10;

/// What a stream consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A frame with its length in front.
    Frame(&'a [u8]),
    /// A message between cable and switch ([`token::Message`]), without the word in front.
    Message(&'a [u8]),
}

/// A length that can't be meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes was announced; frames have 1 to {MAX_FRAME} bytes")]
pub struct BadLength(pub u32);

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Whether frames to this address go to everyone or to a group.
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The destination of a frame, if it is long enough to have one.
    #[must_use]
    pub fn destination(frame: &[u8]) -> Option<Self> {
        Some(Self(frame.get(..ETHERNET_HEADER)?[..6].try_into().ok()?))
    }

    /// The source of a frame, if it is long enough to have one.
    #[must_use]
    pub fn source(frame: &[u8]) -> Option<Self> {
        Some(Self(frame.get(..ETHERNET_HEADER)?[6..12].try_into().ok()?))
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::fmt::Debug for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// Appends a frame with its length to `out`.
///
/// # Panics
/// If the frame is empty or longer than [`MAX_FRAME`]: the caller has checked what it sends.
pub fn encode(frame: &[u8], out: &mut Vec<u8>) {
    encode_parts(frame, &[], out);
}

/// The same for a frame in two parts.
///
/// # Panics
/// As [`encode`].
pub fn encode_parts(first: &[u8], second: &[u8], out: &mut Vec<u8>) {
    let length = first.len() + second.len();
    assert!((1..=MAX_FRAME).contains(&length), "a frame of {length} bytes is not to be sent");
    out.extend_from_slice(&(length as u32).to_be_bytes());
    out.extend_from_slice(first);
    out.extend_from_slice(second);
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Grows to what was needed at most, and stays.
    buffer: Vec<u8>,
    /// What is in it and has not been given out.
    held: Range<usize>,
}

impl Decoder {
    /// Reads once. `Ok(0)` is the end of the stream.
    pub fn fill(&mut self, from: &mut impl Read) -> std::io::Result<usize> {
        // What is left of an earlier read is less than one frame: cheap to move.
        self.buffer.copy_within(self.held.clone(), 0);
        self.held = 0..self.held.len();
        let room = self.held.end + READ_SIZE;
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        let got = from.read(&mut self.buffer[self.held.end..room]);
        self.held.end += *got.as_ref().unwrap_or(&0);
        got
    }

    /// The next whole frame or message, or `None` if more must be read first.
    pub fn next_piece(&mut self) -> Result<Option<Piece<'_>>, BadLength> {
        let rest = &self.buffer[self.held.clone()];
        let Some(header) = rest.first_chunk::<HEADER>() else { return Ok(None) };
        let announced = u32::from_be_bytes(*header);
        let is_message = announced & token::MESSAGE != 0;
        let length = (announced & !token::MESSAGE) as usize;
        if length == 0 || length > if is_message { token::LONGEST } else { MAX_FRAME } {
            return Err(BadLength(announced));
        }
        let whole = HEADER + length;
        if rest.len() < whole {
            return Ok(None);
        }
        let from = self.held.start;
        self.held.start += whole;
        let piece = &self.buffer[from..from + whole];
        Ok(Some(if is_message { Piece::Message(&piece[HEADER..]) } else { Piece::Frame(piece) }))
    }
}

#[cfg(test)]
impl Decoder {
    /// The next whole frame, where nobody sends messages.
    pub(crate) fn next_frame(&mut self) -> Result<Option<&[u8]>, BadLength> {
        self.next_piece().map(|piece| {
            piece.map(|piece| match piece {
                Piece::Frame(frame) => frame,
                Piece::Message(message) => panic!("a message: {message:?}"),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Gives its bytes in pieces of the given sizes.
    struct Pieces<'a> {
        bytes: &'a [u8],
        sizes: Vec<usize>,
    }

    impl Read for Pieces<'_> {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            let size = self.sizes.pop().unwrap_or(usize::MAX).clamp(1, to.len()).min(self.bytes.len());
            let (now, later) = self.bytes.split_at(size);
            to[..size].copy_from_slice(now);
            self.bytes = later;
            Ok(size)
        }
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_however_it_is_cut(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..3000), 0..20),
            sizes in proptest::collection::vec(1usize..5000, 0..60),
        ) {
            let mut wire = Vec::new();
            for frame in &frames {
                encode(frame, &mut wire);
            }
            let mut stream = Pieces { bytes: &wire, sizes };
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            while decoder.fill(&mut stream).unwrap() > 0 {
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame[HEADER..].to_vec());
                }
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn garbage_never_panics_and_holds_little(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let mut decoder = Decoder::default();
            let mut stream = &bytes[..];
            'all: while decoder.fill(&mut stream).unwrap() > 0 {
                loop {
                    match decoder.next_piece() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'all,
                    }
                }
            }
            prop_assert!(decoder.buffer.len() <= HEADER + MAX_FRAME + READ_SIZE);
        }
    }

    #[test]
    fn lengths_at_the_edge() {
        for (length, good) in
            [(0u32, false), (1, true), (MAX_FRAME as u32, true), (MAX_FRAME as u32 + 1, false), (u32::MAX, false)]
        {
            let mut decoder = Decoder::default();
            decoder.fill(&mut &length.to_be_bytes()[..]).unwrap();
            assert_eq!(decoder.next_frame().is_ok(), good, "{length}");
        }
    }

    #[test]
    fn addresses() {
        let frame: Vec<u8> = (0..14).collect();
        assert_eq!(Mac::destination(&frame).unwrap().to_string(), "00:01:02:03:04:05");
        assert_eq!(Mac::source(&frame).unwrap().to_string(), "06:07:08:09:0a:0b");
        assert_eq!(Mac::source(&frame[..13]), None);
        assert!(Mac([0xff; 6]).is_group() && Mac([0x33, 0x33, 0, 0, 0, 1]).is_group() && !Mac([2, 0, 0, 0, 0, 1]).is_group());
    }
}
