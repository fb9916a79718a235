//! Frames and payloads: how each [`Message`] becomes bytes, and the other way round.
//!
//! In: one message, or one complete frame. Out: one frame, or one message. Invariant: layouts are fixed, checked at compile
//! time, and hold no byte that is not accounted for; reserved bytes are written zero and refused otherwise.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    Ack, GREETING_VERSION, HEADER_BYTES, Hello, HelloReply, Kind, MAGIC, MAX_CHANGED_BYTES, MAX_DETAIL_BYTES,
    MAX_IMAGE_CHUNK_BYTES, MAX_PAYLOAD_BYTES, MAX_RECORD_BYTES, MAX_REPORT_BYTES, MAX_TEXT_BYTES, Message, RECORD_HEAD_BYTES,
    WireError,
};
use crate::types::{Nanos, Record};

/// The header of every frame. Frozen.
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

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ImageEndPayload {
    position: U64,
    total_bytes: U64,
}

/// `ImageReady` (a position), `ProtectionStart` (a sequence number) and `Released` (an output).
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OneNumberPayload {
    number: U64,
    reserved: [u8; 8],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AckPayload {
    received_seq: U64,
    replayed_seq: U64,
    replayed_position: U64,
    image_bytes: U64,
    matched: U64,
    agreed_position: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct MismatchHead {
    output: U64,
    position: U64,
    damaged: U64,
    reserved: [u8; 8],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeartbeatPayload {
    time: U64,
    position: U64,
    echo: U64,
    reserved: [u8; 8],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct LogHead {
    first_seq: U64,
    count: U32,
    reserved: [u8; 4],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordHead {
    position: U64,
    length_bytes: U32,
    kind: u8,
    reserved: [u8; 3],
}

const _: () = assert!(size_of::<FrameHeader>() == HEADER_BYTES);
const _: () = assert!(std::mem::offset_of!(FrameHeader, header_crc) == HEADER_CHECKED_BYTES);
const _: () = assert!(size_of::<RecordHead>() == RECORD_HEAD_BYTES);
const _: () = assert!(size_of::<LogHead>() == 16);
const _: () = assert!(size_of::<AckPayload>() == 48);
const _: () = assert!(size_of::<HeartbeatPayload>() == 32);

const HEADER_CHECKED_BYTES: usize = 28;

/// A header that has passed all checks.
#[derive(Debug, Clone, Copy)]
pub(super) struct CheckedHeader {
    pub(super) kind: Kind,
    pub(super) payload_bytes: usize,
    payload_crc: u32,
}

/// The frame of a message. `version` is the agreed one; a greeting does not look at it.
///
/// # Panics
/// If the message breaks the bounds of the protocol: an oversized record, chunk or text, an empty log. The state machines see to that.
pub fn encode(message: &Message, version: u16) -> Vec<u8> {
    let kind = message.kind();
    let mut frame = vec![0; HEADER_BYTES];
    put_payload(message, &mut frame);
    let payload_bytes = frame.len() - HEADER_BYTES;
    assert!(payload_bytes <= MAX_PAYLOAD_BYTES, "a {kind:?} payload of {payload_bytes} bytes breaks the protocol's bound");
    let mut header = FrameHeader {
        magic: MAGIC,
        version: U16::new(if kind.is_greeting() { GREETING_VERSION } else { version }),
        kind: U16::new(kind as u16),
        payload_bytes: U32::new(payload_bytes as u32),
        payload_crc: U32::new(crc32fast::hash(&frame[HEADER_BYTES..])),
        reserved: [0; 12],
        header_crc: U32::new(0),
    };
    header.header_crc = U32::new(crc32fast::hash(&header.as_bytes()[..HEADER_CHECKED_BYTES]));
    frame[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    frame
}

fn put_payload(message: &Message, frame: &mut Vec<u8>) {
    let one_number = |number: u64| OneNumberPayload { number: U64::new(number), reserved: [0; 8] };
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
        Message::ImageEnd { position, total_bytes } => {
            let payload = ImageEndPayload { position: U64::new(*position), total_bytes: U64::new(*total_bytes) };
            frame.extend(payload.as_bytes());
        }
        Message::ImageReady { position } => frame.extend(one_number(*position).as_bytes()),
        Message::ProtectionStart { last_seq } => frame.extend(one_number(*last_seq).as_bytes()),
        Message::Released { up_to } => frame.extend(one_number(*up_to).as_bytes()),
        Message::Log { first_seq, records } => put_log(*first_seq, records, frame),
        Message::Ack(ack) => {
            let payload = AckPayload {
                received_seq: U64::new(ack.received_seq),
                replayed_seq: U64::new(ack.replayed_seq),
                replayed_position: U64::new(ack.replayed_position),
                image_bytes: U64::new(ack.image_bytes),
                matched: U64::new(ack.matched),
                agreed_position: U64::new(ack.agreed_position),
            };
            frame.extend(payload.as_bytes());
        }
        Message::Changed(bytes) => {
            assert!(!bytes.is_empty() && bytes.len() <= MAX_CHANGED_BYTES, "a list of {} bytes", bytes.len());
            frame.extend(bytes);
        }
        Message::CopyReport(bytes) => {
            assert!(!bytes.is_empty() && bytes.len() <= MAX_REPORT_BYTES, "a report of {} bytes", bytes.len());
            frame.extend(bytes);
        }
        Message::Mismatch { output, position, damaged, detail } => {
            assert!(detail.len() <= MAX_DETAIL_BYTES, "a detail of {} bytes", detail.len());
            let head = MismatchHead {
                output: U64::new(*output),
                position: U64::new(*position),
                damaged: U64::new(*damaged),
                reserved: [0; 8],
            };
            frame.extend(head.as_bytes());
            frame.extend(detail);
        }
        Message::Heartbeat { time, position, echo } => {
            let payload = HeartbeatPayload {
                time: U64::new(time.0),
                position: U64::new(*position),
                echo: U64::new(echo.0),
                reserved: [0; 8],
            };
            frame.extend(payload.as_bytes());
        }
    }
}

fn put_log(first_seq: u64, records: &[Record], frame: &mut Vec<u8>) {
    assert!(!records.is_empty(), "a log message without records");
    let total: usize = records.iter().map(|record| RECORD_HEAD_BYTES + record.bytes.len()).sum();
    frame.reserve_exact(size_of::<LogHead>() + total);
    let head = LogHead { first_seq: U64::new(first_seq), count: U32::new(records.len() as u32), reserved: [0; 4] };
    frame.extend(head.as_bytes());
    for record in records {
        assert!(record.bytes.len() <= MAX_RECORD_BYTES, "a record of {} bytes", record.bytes.len());
        let head = RecordHead {
            position: U64::new(record.position),
            length_bytes: U32::new(record.bytes.len() as u32),
            kind: record.kind,
            reserved: [0; 3],
        };
        frame.extend(head.as_bytes());
        frame.extend(&record.bytes);
    }
}

/// The text, cut at a character's boundary so that it fits into a message.
fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}

/// Checks a header. `agreed` is the payload version of this connection, if the greeting is over.
pub(super) fn check_header(bytes: &[u8; HEADER_BYTES], agreed: Option<u16>) -> Result<CheckedHeader, WireError> {
    let header = FrameHeader::read_from_bytes(bytes).expect("the size is right and any bytes will do");
    if header.magic != MAGIC {
        return Err(WireError::Magic { found: header.magic });
    }
    let (stated, computed) = (header.header_crc.get(), crc32fast::hash(&bytes[..HEADER_CHECKED_BYTES]));
    if stated != computed {
        return Err(WireError::HeaderChecksum { stated, computed });
    }
    let kind = Kind::from_number(header.kind.get()).ok_or(WireError::UnknownKind(header.kind.get()))?;
    let found = header.version.get();
    match (kind.is_greeting(), agreed) {
        (true, _) if found != GREETING_VERSION => {
            return Err(WireError::Version { kind, found, expected: GREETING_VERSION });
        }
        (false, Some(expected)) if found != expected => {
            return Err(WireError::Version { kind, found, expected });
        }
        (false, None) => {
            return Err(WireError::Payload { kind, problem: "it came before the greeting was over" });
        }
        _ => {}
    }
    if header.reserved != [0; 12] {
        return Err(WireError::Reserved { kind });
    }
    let length_bytes = header.payload_bytes.get();
    if length_bytes as usize > MAX_PAYLOAD_BYTES {
        return Err(WireError::TooLong { kind, length_bytes });
    }
    Ok(CheckedHeader { kind, payload_bytes: length_bytes as usize, payload_crc: header.payload_crc.get() })
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
            let end = ImageEndPayload::read_from_bytes(payload).map_err(|_| bad(WRONG_SIZE))?;
            Message::ImageEnd { position: end.position.get(), total_bytes: end.total_bytes.get() }
        }
        Kind::ImageReady => Message::ImageReady { position: one_number(kind, payload)? },
        Kind::ProtectionStart => Message::ProtectionStart { last_seq: one_number(kind, payload)? },
        Kind::Released => Message::Released { up_to: one_number(kind, payload)? },
        Kind::Log => decode_log(payload)?,
        Kind::Ack => {
            let ack = AckPayload::read_from_bytes(payload).map_err(|_| bad(WRONG_SIZE))?;
            Message::Ack(Ack {
                received_seq: ack.received_seq.get(),
                replayed_seq: ack.replayed_seq.get(),
                replayed_position: ack.replayed_position.get(),
                image_bytes: ack.image_bytes.get(),
                matched: ack.matched.get(),
                agreed_position: ack.agreed_position.get(),
            })
        }
        Kind::Changed if payload.is_empty() => return Err(bad("it is empty")),
        Kind::Changed if payload.len() > MAX_CHANGED_BYTES => return Err(bad("it is too long")),
        Kind::Changed => Message::Changed(payload.to_vec()),
        Kind::CopyReport if payload.is_empty() => return Err(bad("it is empty")),
        Kind::CopyReport if payload.len() > MAX_REPORT_BYTES => return Err(bad("it is too long")),
        Kind::CopyReport => Message::CopyReport(payload.to_vec()),
        Kind::Mismatch => {
            let (head, detail) = MismatchHead::read_from_prefix(payload).map_err(|_| bad("its head is cut off"))?;
            reserved(kind, &head.reserved)?;
            if detail.len() > MAX_DETAIL_BYTES {
                return Err(bad("it is too long"));
            }
            let (output, position, damaged) = (head.output.get(), head.position.get(), head.damaged.get());
            Message::Mismatch { output, position, damaged, detail: detail.to_vec() }
        }
        Kind::Heartbeat => {
            let beat = HeartbeatPayload::read_from_bytes(payload).map_err(|_| bad(WRONG_SIZE))?;
            reserved(kind, &beat.reserved)?;
            Message::Heartbeat { time: Nanos(beat.time.get()), position: beat.position.get(), echo: Nanos(beat.echo.get()) }
        }
    })
}

const WRONG_SIZE: &str = "its size is wrong";

fn reserved(kind: Kind, bytes: &[u8]) -> Result<(), WireError> {
    if bytes.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(WireError::Reserved { kind }) }
}

fn one_number(kind: Kind, payload: &[u8]) -> Result<u64, WireError> {
    let payload = OneNumberPayload::read_from_bytes(payload).map_err(|_| WireError::Payload { kind, problem: WRONG_SIZE })?;
    reserved(kind, &payload.reserved)?;
    Ok(payload.number.get())
}

fn text(payload: &[u8]) -> Result<String, &'static str> {
    if payload.len() > MAX_TEXT_BYTES {
        return Err("its text is too long");
    }
    std::str::from_utf8(payload).map(str::to_owned).map_err(|_| "its text is not UTF-8")
}

fn decode_log(payload: &[u8]) -> Result<Message, WireError> {
    let kind = Kind::Log;
    let bad = |problem| WireError::Payload { kind, problem };
    let (head, mut rest) = LogHead::read_from_prefix(payload).map_err(|_| bad("its head is cut off"))?;
    reserved(kind, &head.reserved)?;
    let count = head.count.get() as usize;
    if count == 0 {
        return Err(bad("it has no records"));
    }
    // Checked before anything is allocated for them.
    if count > rest.len() / RECORD_HEAD_BYTES {
        return Err(bad("it is too short for its number of records"));
    }
    if head.first_seq.get() == 0 || head.first_seq.get().checked_add(count as u64).is_none() {
        return Err(bad("its records can't have such numbers"));
    }
    let mut records = Vec::with_capacity(count);
    for _ in 0..count {
        let (record, after) = RecordHead::read_from_prefix(rest).map_err(|_| bad("a record's head is cut off"))?;
        reserved(kind, &record.reserved)?;
        let length_bytes = record.length_bytes.get() as usize;
        if length_bytes > MAX_RECORD_BYTES {
            return Err(bad("a record is too long"));
        }
        let bytes = after.get(..length_bytes).ok_or(bad("a record is cut off"))?;
        records.push(Record { position: record.position.get(), kind: record.kind, bytes: bytes.to_vec() });
        rest = &after[length_bytes..];
    }
    if !rest.is_empty() {
        return Err(bad("bytes are left over after its records"));
    }
    Ok(Message::Log { first_seq: head.first_seq.get(), records })
}
