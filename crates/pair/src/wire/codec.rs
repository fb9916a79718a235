//! Frames and payloads: how each [`Message`] becomes bytes, and the other way round.
//!
//! In: one message, or one complete frame. Out: one frame, or one message. Invariant: no byte is unaccounted for, and a message has one form only; a length is believed only
//! after it has been checked.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::varint::{self, Reader};
use super::{
    Ack, GREETING_VERSION, HEADER_BYTES, Hello, HelloReply, Kind, MAGIC, MAX_CHANGED_BYTES, MAX_DETAIL_BYTES,
    MAX_IMAGE_CHUNK_BYTES, MAX_PAYLOAD_BYTES, MAX_RECORD_BYTES, MAX_REPORT_BYTES, MAX_TEXT_BYTES, Message, RECORD_HEAD_BYTES,
    SHORT_HEADER_BYTES, WireError,
};
use crate::types::{Nanos, Record};

/// The header of a greeting. Frozen.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct FrameHeader {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    payload_bytes: U32,
    payload_crc: U32,
    reserved: [u8; 12],
    /// Of the 28 bytes before it.
    header_crc: U32,
}

/// The header of every other frame.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct ShortHeader {
    kind: u8,
    payload_bytes: [u8; 3],
    /// The lower half of the CRC-32 of the four bytes before it.
    header_check: U16,
    payload_crc: U32,
}

const _: () = assert!(size_of::<FrameHeader>() == HEADER_BYTES);
const _: () = assert!(std::mem::offset_of!(FrameHeader, header_crc) == HEADER_CHECKED_BYTES);
const _: () = assert!(size_of::<ShortHeader>() == SHORT_HEADER_BYTES);
const _: () = assert!(std::mem::offset_of!(ShortHeader, header_check) == SHORT_CHECKED_BYTES);
const _: () = assert!(MAX_PAYLOAD_BYTES < 1 << 24);

const HEADER_CHECKED_BYTES: usize = 28;
const SHORT_CHECKED_BYTES: usize = 4;

/// A header that has passed all checks.
#[derive(Debug, Clone, Copy)]
pub(super) struct CheckedHeader {
    pub(super) kind: Kind,
    pub(super) header_bytes: usize,
    pub(super) payload_bytes: usize,
    payload_crc: u32,
}

/// The frame of a message.
///
/// # Panics
/// If the message breaks the bounds of the protocol: an oversized record, chunk or text, an empty log. The state machines see to that.
pub fn encode(message: &Message) -> Vec<u8> {
    let kind = message.kind();
    let header_bytes = if kind.is_greeting() { HEADER_BYTES } else { SHORT_HEADER_BYTES };
    let mut frame = vec![0; header_bytes];
    put_payload(message, &mut frame);
    let payload_bytes = frame.len() - header_bytes;
    assert!(payload_bytes <= MAX_PAYLOAD_BYTES, "a {kind:?} payload of {payload_bytes} bytes breaks the protocol's bound");
    let payload_crc = U32::new(crc32fast::hash(&frame[header_bytes..]));
    if kind.is_greeting() {
        let mut header = FrameHeader {
            magic: MAGIC,
            version: U16::new(GREETING_VERSION),
            kind: U16::new(kind as u16),
            payload_bytes: U32::new(payload_bytes as u32),
            payload_crc,
            reserved: [0; 12],
            header_crc: U32::new(0),
        };
        header.header_crc = U32::new(crc32fast::hash(&header.as_bytes()[..HEADER_CHECKED_BYTES]));
        frame[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    } else {
        let [low, middle, high, _] = (payload_bytes as u32).to_le_bytes();
        let mut header =
            ShortHeader { kind: kind as u8, payload_bytes: [low, middle, high], header_check: U16::new(0), payload_crc };
        header.header_check = U16::new(crc32fast::hash(&header.as_bytes()[..SHORT_CHECKED_BYTES]) as u16);
        frame[..SHORT_HEADER_BYTES].copy_from_slice(header.as_bytes());
    }
    frame
}

fn put_payload(message: &Message, frame: &mut Vec<u8>) {
    match message {
        Message::Hello(hello) => frame.extend(hello.to_payload()),
        Message::HelloReply(reply) => frame.extend(reply.to_payload()),
        Message::Refuse { reason } | Message::Goodbye { reason } | Message::HandOver { reason } => {
            frame.extend(shortened(reason).as_bytes())
        }
        Message::ImageChunk(bytes) => {
            assert!(!bytes.is_empty() && bytes.len() <= MAX_IMAGE_CHUNK_BYTES, "a chunk of {} bytes", bytes.len());
            frame.extend(bytes);
        }
        Message::ImageEnd { position, total_bytes } => put_all(&[*position, *total_bytes], frame),
        Message::ImageReady { position: number }
        | Message::ProtectionStart { last_seq: number }
        | Message::StandStill { position: number }
        | Message::Released { up_to: number }
        | Message::Lookahead { position: number } => varint::put(*number, frame),
        Message::Log { first_seq, records } => put_log(*first_seq, records, frame),
        Message::Ack(ack) => {
            let Ack { received_seq, replayed_seq, replayed_position, image_bytes, matched, agreed_position } = *ack;
            put_all(&[received_seq, replayed_seq, replayed_position, image_bytes, matched, agreed_position], frame);
        }
        Message::Changed(bytes) => {
            assert!(!bytes.is_empty() && bytes.len() <= MAX_CHANGED_BYTES, "a list of {} bytes", bytes.len());
            frame.extend(bytes);
        }
        Message::CopyReport(bytes) => {
            assert!(!bytes.is_empty() && bytes.len() <= MAX_REPORT_BYTES, "a report of {} bytes", bytes.len());
            frame.extend(bytes);
        }
        Message::Listed => {}
        Message::Mismatch { output, position, detail } => {
            assert!(detail.len() <= MAX_DETAIL_BYTES, "a detail of {} bytes", detail.len());
            put_all(&[*output, *position], frame);
            frame.extend(detail);
        }
        Message::Heartbeat { time, position, echo } => put_all(&[time.0, *position, echo.0], frame),
    }
}

fn put_all(numbers: &[u64], frame: &mut Vec<u8>) {
    numbers.iter().for_each(|number| varint::put(*number, frame));
}

fn put_log(first_seq: u64, records: &[Record], frame: &mut Vec<u8>) {
    assert!(!records.is_empty(), "a log message without records");
    frame.reserve(records.iter().map(|record| RECORD_HEAD_BYTES + record.bytes.len()).sum());
    varint::put(first_seq, frame);
    let mut before = 0;
    for record in records {
        assert!(record.bytes.len() <= MAX_RECORD_BYTES, "a record of {} bytes", record.bytes.len());
        frame.push(record.kind);
        // Positions go forward, so this is small; that they do is the receiver's to check.
        varint::put(record.position.wrapping_sub(before), frame);
        varint::put(record.bytes.len() as u64, frame);
        frame.extend(&record.bytes);
        before = record.position;
    }
}

/// The text, cut at a character's boundary so that it fits into a message.
fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}

/// Checks what a frame begins with; nothing if more of it has to come. Before the greeting is over (`greeted`) there are greetings only.
pub(super) fn check_header(bytes: &[u8], greeted: bool) -> Result<Option<CheckedHeader>, WireError> {
    match bytes.first() {
        None => Ok(None),
        // No kind has this number: a greeting may come late, since who greets cannot know yet that it is over.
        Some(first) if !greeted || *first == MAGIC[0] => bytes.first_chunk().map(check_greeting).transpose(),
        Some(_) => bytes.first_chunk().map(check_short).transpose(),
    }
}

fn check_short(bytes: &[u8; SHORT_HEADER_BYTES]) -> Result<CheckedHeader, WireError> {
    let header = ShortHeader::read_from_bytes(bytes).expect("the size is right and any bytes will do");
    let (stated, computed) = (header.header_check.get(), crc32fast::hash(&bytes[..SHORT_CHECKED_BYTES]) as u16);
    if stated != computed {
        return Err(WireError::HeaderChecksum { stated: stated.into(), computed: computed.into() });
    }
    let kind = Kind::from_number(header.kind.into()).ok_or(WireError::UnknownKind(header.kind.into()))?;
    if kind.is_greeting() {
        return Err(WireError::Payload { kind, problem: "a greeting has another header" });
    }
    let [low, middle, high] = header.payload_bytes;
    let length_bytes = u32::from_le_bytes([low, middle, high, 0]);
    if length_bytes as usize > MAX_PAYLOAD_BYTES {
        return Err(WireError::TooLong { kind, length_bytes });
    }
    let (header_bytes, payload_bytes) = (SHORT_HEADER_BYTES, length_bytes as usize);
    Ok(CheckedHeader { kind, header_bytes, payload_bytes, payload_crc: header.payload_crc.get() })
}

fn check_greeting(bytes: &[u8; HEADER_BYTES]) -> Result<CheckedHeader, WireError> {
    let header = FrameHeader::read_from_bytes(bytes).expect("the size is right and any bytes will do");
    if header.magic != MAGIC {
        return Err(WireError::Magic { found: header.magic });
    }
    let (stated, computed) = (header.header_crc.get(), crc32fast::hash(&bytes[..HEADER_CHECKED_BYTES]));
    if stated != computed {
        return Err(WireError::HeaderChecksum { stated, computed });
    }
    let kind = Kind::from_number(header.kind.get()).ok_or(WireError::UnknownKind(header.kind.get()))?;
    if !kind.is_greeting() {
        return Err(WireError::Payload { kind, problem: "only a greeting has this header; is the greeting over?" });
    }
    let found = header.version.get();
    if found != GREETING_VERSION {
        return Err(WireError::Version { kind, found, expected: GREETING_VERSION });
    }
    if header.reserved != [0; 12] {
        return Err(WireError::Reserved { kind });
    }
    let length_bytes = header.payload_bytes.get();
    if length_bytes as usize > MAX_PAYLOAD_BYTES {
        return Err(WireError::TooLong { kind, length_bytes });
    }
    let (header_bytes, payload_bytes) = (HEADER_BYTES, length_bytes as usize);
    Ok(CheckedHeader { kind, header_bytes, payload_bytes, payload_crc: header.payload_crc.get() })
}

/// The message of a frame whose header has been checked.
pub(super) fn decode_payload(header: &CheckedHeader, payload: &[u8]) -> Result<Message, WireError> {
    let kind = header.kind;
    assert_eq!(payload.len(), header.payload_bytes, "the decoder hands over whole payloads");
    let (stated, computed) = (header.payload_crc, crc32fast::hash(payload));
    if stated != computed {
        return Err(WireError::PayloadChecksum { kind, stated, computed });
    }
    let bad = |problem| WireError::Payload { kind, problem };
    Ok(match kind {
        Kind::Hello => Message::Hello(Hello::from_payload(payload).map_err(bad)?),
        Kind::HelloReply => Message::HelloReply(HelloReply::from_payload(payload).map_err(bad)?),
        Kind::Refuse => Message::Refuse { reason: text(payload).map_err(bad)? },
        Kind::HandOver => Message::HandOver { reason: text(payload).map_err(bad)? },
        Kind::Goodbye => Message::Goodbye { reason: text(payload).map_err(bad)? },
        Kind::ImageChunk if payload.is_empty() => return Err(bad("it is empty")),
        Kind::ImageChunk if payload.len() > MAX_IMAGE_CHUNK_BYTES => {
            return Err(bad("it is too long"));
        }
        Kind::ImageChunk => Message::ImageChunk(payload.to_vec()),
        Kind::ImageEnd => {
            let [position, total_bytes] = numbers(payload).map_err(bad)?;
            Message::ImageEnd { position, total_bytes }
        }
        Kind::ImageReady => Message::ImageReady { position: numbers::<1>(payload).map_err(bad)?[0] },
        Kind::ProtectionStart => Message::ProtectionStart { last_seq: numbers::<1>(payload).map_err(bad)?[0] },
        Kind::Released => Message::Released { up_to: numbers::<1>(payload).map_err(bad)?[0] },
        Kind::Lookahead => Message::Lookahead { position: numbers::<1>(payload).map_err(bad)?[0] },
        Kind::Log => decode_log(payload)?,
        Kind::Ack => {
            let [received_seq, replayed_seq, replayed_position, image_bytes, matched, agreed_position] =
                numbers(payload).map_err(bad)?;
            Message::Ack(Ack { received_seq, replayed_seq, replayed_position, image_bytes, matched, agreed_position })
        }
        Kind::Changed if payload.is_empty() => return Err(bad("it is empty")),
        Kind::Changed if payload.len() > MAX_CHANGED_BYTES => return Err(bad("it is too long")),
        Kind::Changed => Message::Changed(payload.to_vec()),
        Kind::CopyReport if payload.is_empty() => return Err(bad("it is empty")),
        Kind::CopyReport if payload.len() > MAX_REPORT_BYTES => return Err(bad("it is too long")),
        Kind::CopyReport => Message::CopyReport(payload.to_vec()),
        Kind::StandStill => Message::StandStill { position: numbers::<1>(payload).map_err(bad)?[0] },
        Kind::Listed => {
            let [] = numbers(payload).map_err(bad)?;
            Message::Listed
        }
        Kind::Mismatch => {
            let mut reader = Reader(payload);
            let [output, position] = take_all(&mut reader).map_err(bad)?;
            let detail = reader.0;
            if detail.len() > MAX_DETAIL_BYTES {
                return Err(bad("it is too long"));
            }
            Message::Mismatch { output, position, detail: detail.to_vec() }
        }
        Kind::Heartbeat => {
            let [time, position, echo] = numbers(payload).map_err(bad)?;
            Message::Heartbeat { time: Nanos(time), position, echo: Nanos(echo) }
        }
    })
}

/// So many numbers, and nothing after them.
fn numbers<const N: usize>(payload: &[u8]) -> Result<[u64; N], &'static str> {
    let mut reader = Reader(payload);
    let numbers = take_all(&mut reader)?;
    if reader.0.is_empty() { Ok(numbers) } else { Err("bytes are left over after its numbers") }
}

fn take_all<const N: usize>(reader: &mut Reader<'_>) -> Result<[u64; N], &'static str> {
    let mut numbers = [0; N];
    for number in &mut numbers {
        *number = reader.number()?;
    }
    Ok(numbers)
}

fn text(payload: &[u8]) -> Result<String, &'static str> {
    if payload.len() > MAX_TEXT_BYTES {
        return Err("its text is too long");
    }
    std::str::from_utf8(payload).map(str::to_owned).map_err(|_| "its text is not UTF-8")
}

fn decode_log(payload: &[u8]) -> Result<Message, WireError> {
    let bad = |problem| WireError::Payload { kind: Kind::Log, problem };
    let mut reader = Reader(payload);
    let first_seq = reader.number().map_err(bad)?;
    // Each record takes three bytes at least, so what is allocated for them follows from what came.
    let (mut records, mut before) = (Vec::new(), 0u64);
    while !reader.0.is_empty() {
        let kind = reader.bytes(1).map_err(bad)?[0];
        let position = before.wrapping_add(reader.number().map_err(bad)?);
        let length_bytes = reader.number().map_err(bad)?;
        if length_bytes > MAX_RECORD_BYTES as u64 {
            return Err(bad("a record is too long"));
        }
        let bytes = reader.bytes(length_bytes as usize).map_err(bad)?.to_vec();
        records.push(Record { position, kind, bytes });
        before = position;
    }
    if records.is_empty() {
        return Err(bad("it has no records"));
    }
    if first_seq == 0 || first_seq.checked_add(records.len() as u64).is_none() {
        return Err(bad("its records can't have such numbers"));
    }
    Ok(Message::Log { first_seq, records })
}
