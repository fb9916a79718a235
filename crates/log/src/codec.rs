//! Entries to bytes and back; the same bytes in files and on the logging channel.
//!
//! ```text
//!  0        4      5          8                16                       +length       +4
//!  | check  | kind | length   | position       | payload ...            | end check   |
//!  | u32    | u8   | u24      | u64            |                        | u32, if length > 32 |
//! ```
//! All numbers are little-endian. `check` is the CRC-32 of the header after itself and of the first 32 payload bytes. A payload
//! longer than that is followed by `end check`, the CRC-32 of the header after `check` and of the whole payload. So a length is
//! believed only after it has been checked, a damaged one cannot make a reader wait for bytes that never come, and a small entry
//! (the clock) pays for one checksum only. The bits of `length` above [`MAX_PAYLOAD`] are reserved and zero.
//!
//! **Invariant:** bytes decode to an entry only if encoding that entry gives the same bytes.
use crate::entry::{EndReason, Entry, EntryKind, Event, OutputNote, OutputPort};
use crate::input;
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most payload bytes an entry may have.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Payload bytes that are covered by the check in the header.
const HEAD: usize = 32;
/// Most bytes an entry takes.
pub const MAX_ENTRY: usize = size_of::<Header>() + MAX_PAYLOAD + END_CHECK;
/// Fewest bytes an entry takes.
pub const MIN_ENTRY: usize = size_of::<Header>();
const END_CHECK: usize = 4;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    check: U32,
    kind: u8,
    length: [u8; 3],
    position: U64,
}

const _: () = {
    assert!(size_of::<Header>() == 16);
    assert!(offset_of!(Header, check) == 0);
    assert!(offset_of!(Header, kind) == 4);
    assert!(offset_of!(Header, length) == 5);
    assert!(offset_of!(Header, position) == 8);
    assert!(MAX_PAYLOAD < 1 << 24);
};

/// Payload of an output note.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NoteLayout {
    port: u8,
    nic: u8,
    segment_size: U16,
    length: U32,
    digest: U128,
}

const _: () = {
    assert!(size_of::<NoteLayout>() == 24 && size_of::<NoteLayout>() <= HEAD);
    assert!(offset_of!(NoteLayout, length) == 4);
    assert!(offset_of!(NoteLayout, digest) == 8);
};

const PORT_NIC: u8 = 1;
const PORT_SERIAL: u8 = 2;
const PORT_CONSOLE: u8 = 3;
const PORT_NIC_GSO: u8 = 4;
const PORT_DISK: u8 = 5;
const PORT_DISK_FLUSH: u8 = 6;

const END_POWER_OFF: u8 = 1;
const END_RESET: u8 = 2;
const END_STOPPED: u8 = 3;
const END_FAILED: u8 = 4;

/// An entry that cannot be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a {kind} entry of {length} bytes is over the limit of {MAX_PAYLOAD} bytes")]
pub struct EncodeError {
    /// What kind of entry it is.
    pub kind: EntryKind,
    /// Payload bytes it would have.
    pub length: usize,
}

/// What is wrong with bytes that should be an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Header or first payload bytes were damaged.
    #[error("damaged: the entry's checksum is {stored:08x}, its bytes give {computed:08x}")]
    Check {
        /// What the header says.
        stored: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// Later payload bytes were damaged.
    #[error("damaged: the checksum at the entry's end is {stored:08x}, its bytes give {computed:08x}")]
    EndCheck {
        /// What stands at the end.
        stored: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// The entry is whole, but of a kind this version does not know.
    #[error("entry kind {0} is not known to this version; a newer Twinstep wrote it")]
    UnknownKind(u8),
    /// The entry is whole as far as it was read, but claims to be larger than any may be.
    #[error("an entry of {0} bytes is over the limit of {MAX_PAYLOAD} bytes")]
    TooLong(usize),
    /// The entry is whole but means nothing.
    #[error("a {kind} entry makes no sense: {what}")]
    Payload {
        /// What kind of entry it is.
        kind: EntryKind,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The log goes back in time.
    #[error("position {position} follows position {last}")]
    Backwards {
        /// Position of the entry before.
        last: u64,
        /// Position of this one.
        position: u64,
    },
    /// The log goes on after its end.
    #[error("there are entries after the end entry")]
    AfterEnd,
}

/// Appends the encoding of `entry` to `out`; gives the number of bytes appended. On an error nothing was appended.
pub fn encode_into(entry: &Entry, out: &mut Vec<u8>) -> Result<usize, EncodeError> {
    let start = out.len();
    let payload_start = start + size_of::<Header>();
    out.resize(payload_start, 0);
    encode_payload(&entry.event, out);
    let length = out.len() - payload_start;
    let kind = entry.event.kind();
    if length > MAX_PAYLOAD {
        out.truncate(start);
        return Err(EncodeError { kind, length });
    }
    let [length_0, length_1, length_2, _] = (length as u32).to_le_bytes();
    let mut header = Header {
        check: U32::ZERO,
        kind: kind.number(),
        length: [length_0, length_1, length_2],
        position: U64::new(entry.position),
    };
    let checks = checks(&header, &out[payload_start..]);
    header.check = U32::new(checks.0);
    out[start..payload_start].copy_from_slice(header.as_bytes());
    if length > HEAD {
        out.extend_from_slice(&checks.1.to_le_bytes());
    }
    Ok(out.len() - start)
}

/// How many bytes [`encode_into`] appends for `entry`.
pub fn encoded_length(entry: &Entry) -> usize {
    let payload = match &entry.event {
        Event::Input(twinstep_machine::Input::NetRx { frame, .. }) => 1 + frame.len(),
        Event::Input(twinstep_machine::Input::NetRxGso { frame, .. }) => 3 + frame.len(),
        Event::Input(twinstep_machine::Input::Serial(bytes) | twinstep_machine::Input::Console(bytes)) => bytes.len(),
        Event::Digest(bytes) => bytes.len(),
        // The rest is small, and measuring it is the surest way to be right about it.
        event => {
            let mut bytes = Vec::new();
            encode_payload(event, &mut bytes);
            bytes.len()
        }
    };
    whole_length(payload)
}

fn whole_length(payload: usize) -> usize {
    size_of::<Header>() + payload + if payload > HEAD { END_CHECK } else { 0 }
}

/// The check of the header and the payload's head, and the check that goes on to the payload's end.
fn checks(header: &Header, payload: &[u8]) -> (u32, u32) {
    let (head, rest) = payload.split_at(payload.len().min(HEAD));
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.as_bytes()[size_of::<U32>()..]);
    hasher.update(head);
    let check = hasher.clone().finalize();
    hasher.update(rest);
    (check, hasher.finalize())
}

pub(crate) fn encode_payload(event: &Event, out: &mut Vec<u8>) {
    match event {
        Event::Input(input) => input::encode(input, out),
        Event::Output(note) => out.extend_from_slice(note_layout(note).as_bytes()),
        Event::Digest(bytes) => out.extend_from_slice(bytes),
        Event::Progress => {}
        Event::End { reason } => encode_end(reason, out),
    }
}

fn note_layout(note: &OutputNote) -> NoteLayout {
    let (port, nic, segment_size) = match note.port {
        OutputPort::Nic(nic) => (PORT_NIC, nic, 0),
        OutputPort::Serial => (PORT_SERIAL, 0, 0),
        OutputPort::Console => (PORT_CONSOLE, 0, 0),
        OutputPort::NicGso { nic, segment_size } => (PORT_NIC_GSO, nic, segment_size),
        OutputPort::Disk(disk) => (PORT_DISK, disk, 0),
        OutputPort::DiskFlush(disk) => (PORT_DISK_FLUSH, disk, 0),
    };
    let (length, digest) = (U32::new(note.length), U128::new(note.digest));
    NoteLayout { port, nic, segment_size: U16::new(segment_size), length, digest }
}

fn encode_end(reason: &EndReason, out: &mut Vec<u8>) {
    match reason {
        EndReason::PowerOff => out.push(END_POWER_OFF),
        EndReason::Reset => out.push(END_RESET),
        EndReason::Stopped => out.push(END_STOPPED),
        EndReason::Failed(text) => {
            out.push(END_FAILED);
            let cut = text.floor_char_boundary(EndReason::MAX_TEXT);
            out.extend_from_slice(&text.as_bytes()[..cut]);
        }
    }
}

/// What [`parse`] found at the start of some bytes.
pub(crate) enum Parsed {
    /// The bytes are the beginning of an entry, which cannot be judged before there are this many.
    Incomplete(usize),
    /// An entry, and how many bytes it took.
    Whole(Entry, usize),
}

/// Reads one entry from the start of `bytes`.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed, Fault> {
    let Ok((header, rest)) = Header::ref_from_prefix(bytes) else {
        return Ok(Parsed::Incomplete(size_of::<Header>()));
    };
    let length = u32::from_le_bytes([header.length[0], header.length[1], header.length[2], 0]) as usize;
    let Some(head) = rest.get(..length.min(HEAD)) else {
        return Ok(Parsed::Incomplete(size_of::<Header>() + length.min(HEAD)));
    };
    let (computed, _) = checks(header, head);
    if computed != header.check.get() {
        return Err(Fault::Check { stored: header.check.get(), computed });
    }
    // From here on the header is what somebody wrote.
    let kind = EntryKind::from_number(header.kind).ok_or(Fault::UnknownKind(header.kind))?;
    if length > MAX_PAYLOAD {
        return Err(Fault::TooLong(length));
    }
    let whole = whole_length(length);
    if bytes.len() < whole {
        return Ok(Parsed::Incomplete(whole));
    }
    let payload = &rest[..length];
    if length > HEAD {
        let stored = u32::from_le_bytes(rest[length..length + END_CHECK].try_into().expect("four bytes"));
        let (_, computed) = checks(header, payload);
        if computed != stored {
            return Err(Fault::EndCheck { stored, computed });
        }
    }
    let event = decode_payload(kind, payload).map_err(|what| Fault::Payload { kind, what })?;
    Ok(Parsed::Whole(Entry { position: header.position.get(), event }, whole))
}

pub(crate) fn decode_payload(kind: EntryKind, payload: &[u8]) -> Result<Event, &'static str> {
    match kind {
        EntryKind::Clock
        | EntryKind::NetRx
        | EntryKind::Serial
        | EntryKind::Console
        | EntryKind::Seed
        | EntryKind::WallClock
        | EntryKind::PowerButton
        | EntryKind::NetRxGso
        | EntryKind::DiskDone => input::decode(kind, payload).map(Event::Input),
        EntryKind::Output => decode_note(payload).map(Event::Output),
        EntryKind::Digest => Ok(Event::Digest(payload.to_vec())),
        EntryKind::Progress if payload.is_empty() => Ok(Event::Progress),
        EntryKind::Progress => Err("a progress entry has no payload"),
        EntryKind::End => decode_end(payload).map(|reason| Event::End { reason }),
    }
}

/// The note as the logging channel carries it ([`crate::channel`]).
pub(crate) fn encode_short_note(note: &OutputNote, out: &mut Vec<u8>) {
    let layout = note_layout(note);
    out.extend_from_slice(&[layout.port, layout.nic]);
    if layout.port == PORT_NIC_GSO {
        out.extend_from_slice(layout.segment_size.as_bytes());
    }
    let mut length = note.length;
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(&note.digest.to_le_bytes());
}

pub(crate) fn decode_short_note(payload: &[u8]) -> Result<OutputNote, &'static str> {
    let mut rest = payload.iter().copied();
    let mut next = || rest.next().ok_or("an output note is cut short");
    let (port, nic) = (next()?, next()?);
    let segment_size = if port == PORT_NIC_GSO { u16::from_le_bytes([next()?, next()?]) } else { 0 };
    let port = port_of(port, nic, segment_size)?;
    let mut length = 0u64;
    for at in 0.. {
        let byte = next()?;
        length |= u64::from(byte & 0x7f) << (7 * at);
        if length > u64::from(u32::MAX) {
            return Err("the length is too large");
        }
        if byte & 0x80 == 0 {
            if byte == 0 && at > 0 {
                return Err("the length has a leading zero");
            }
            break;
        }
        if at == 4 {
            return Err("the length is too large");
        }
    }
    let digest: Vec<u8> = rest.collect();
    let digest = u128::from_le_bytes(digest.try_into().map_err(|_| "the digest has 16 bytes")?);
    Ok(OutputNote { port, length: length as u32, digest })
}

fn port_of(port: u8, nic: u8, segment_size: u16) -> Result<OutputPort, &'static str> {
    match (port, nic) {
        (PORT_NIC, nic) => Ok(OutputPort::Nic(nic)),
        (PORT_SERIAL, 0) => Ok(OutputPort::Serial),
        (PORT_CONSOLE, 0) => Ok(OutputPort::Console),
        (PORT_NIC_GSO, nic) => Ok(OutputPort::NicGso { nic, segment_size }),
        (PORT_DISK, disk) => Ok(OutputPort::Disk(disk)),
        (PORT_DISK_FLUSH, disk) => Ok(OutputPort::DiskFlush(disk)),
        (PORT_SERIAL | PORT_CONSOLE, _) => Err("a network card is named for an output that has none"),
        _ => Err("the output port is not known"),
    }
}

fn decode_note(payload: &[u8]) -> Result<OutputNote, &'static str> {
    let layout = NoteLayout::ref_from_bytes(payload).map_err(|_| "an output note has 24 bytes")?;
    let segment_size = layout.segment_size.get();
    if layout.port != PORT_NIC_GSO && segment_size != 0 {
        return Err("bytes that are reserved for this port are not zero");
    }
    let port = port_of(layout.port, layout.nic, segment_size)?;
    Ok(OutputNote { port, length: layout.length.get(), digest: layout.digest.get() })
}

fn decode_end(payload: &[u8]) -> Result<EndReason, &'static str> {
    let (code, text) = payload.split_first().ok_or("no reason is given")?;
    if text.len() > EndReason::MAX_TEXT {
        return Err("the text is too long");
    }
    let text = std::str::from_utf8(text).map_err(|_| "the text is not UTF-8")?;
    match (*code, text) {
        (END_POWER_OFF, "") => Ok(EndReason::PowerOff),
        (END_RESET, "") => Ok(EndReason::Reset),
        (END_STOPPED, "") => Ok(EndReason::Stopped),
        (END_FAILED, text) => Ok(EndReason::Failed(text.to_owned())),
        (END_POWER_OFF | END_RESET | END_STOPPED, _) => Err("a text follows a reason that has none"),
        _ => Err("the reason is not known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinstep_machine::Input;

    fn encode(entry: &Entry) -> Vec<u8> {
        let mut out = Vec::new();
        encode_into(entry, &mut out).unwrap();
        out
    }

    /// An entry with a right check around whatever header and payload.
    fn forge(kind: u8, length: u32, position: u64, payload: &[u8]) -> Vec<u8> {
        let [a, b, c, _] = length.to_le_bytes();
        let mut header = Header { check: U32::ZERO, kind, length: [a, b, c], position: U64::new(position) };
        let (check, end_check) = checks(&header, payload);
        header.check = U32::new(check);
        let mut out = header.as_bytes().to_vec();
        out.extend_from_slice(payload);
        if payload.len() > HEAD {
            out.extend_from_slice(&end_check.to_le_bytes());
        }
        out
    }

    fn fault(bytes: &[u8]) -> Fault {
        match parse(bytes) {
            Err(fault) => fault,
            Ok(_) => panic!("no fault found"),
        }
    }

    /// A thousand clock entries a second stay below 200 kbit/s, also on a machine that is up for three days.
    #[test]
    fn clock_entries_are_small() {
        let three_days_ns = 3 * 86_400 * 1_000_000_000;
        let input = Input::Clock { advance_to_ns: three_days_ns, picoseconds_per_instruction: 5000 };
        let entry = Entry { position: u64::MAX, event: Event::Input(input) };
        assert_eq!(encode(&entry).len(), 24);
        assert_eq!(encoded_length(&entry), 24);
    }

    #[test]
    fn too_large_is_refused_and_leaves_nothing() {
        let mut out = vec![7];
        let entry = Entry { position: 1, event: Event::Digest(vec![0; MAX_PAYLOAD + 1]) };
        let error = encode_into(&entry, &mut out).unwrap_err();
        assert_eq!(error, EncodeError { kind: EntryKind::Digest, length: MAX_PAYLOAD + 1 });
        assert_eq!(out, [7]);
        let entry = Entry { position: 1, event: Event::Digest(vec![3; MAX_PAYLOAD]) };
        let bytes = encode(&entry);
        assert_eq!(bytes.len(), MAX_ENTRY);
        assert!(matches!(parse(&bytes), Ok(Parsed::Whole(found, used)) if found == entry && used == MAX_ENTRY));
    }

    #[test]
    fn forged_entries_are_refused() {
        assert_eq!(fault(&forge(0, 0, 1, &[])), Fault::UnknownKind(0));
        assert_eq!(fault(&forge(99, 0, 1, &[])), Fault::UnknownKind(99));
        let long = forge(EntryKind::Serial.number(), MAX_PAYLOAD as u32 + 1, 1, &[0; HEAD]);
        assert_eq!(fault(&long), Fault::TooLong(MAX_PAYLOAD + 1));
        let bad_payload = |kind: EntryKind, payload: &[u8]| {
            let found = fault(&forge(kind.number(), payload.len() as u32, 1, payload));
            assert!(matches!(found, Fault::Payload { kind: k, .. } if k == kind), "{found}");
        };
        bad_payload(EntryKind::Progress, &[0]);
        bad_payload(EntryKind::PowerButton, &[0]);
        bad_payload(EntryKind::Seed, &[0; 31]);
        bad_payload(EntryKind::WallClock, &[0; 9]);
        bad_payload(EntryKind::NetRx, &[]);
        bad_payload(EntryKind::NetRxGso, &[0, 1]);
        bad_payload(EntryKind::End, &[]);
        bad_payload(EntryKind::End, &[END_RESET, b'x']);
        bad_payload(EntryKind::End, &[END_FAILED, 0xff]);
        bad_payload(EntryKind::End, &[77]);
        let mut note = [0; 24];
        bad_payload(EntryKind::Output, &note);
        note[0] = PORT_SERIAL;
        note[1] = 1;
        bad_payload(EntryKind::Output, &note);
        note[1] = 0;
        note[2] = 1;
        bad_payload(EntryKind::Output, &note);
        bad_payload(EntryKind::Output, &note[..23]);
    }

    #[test]
    fn long_failure_texts_are_cut_at_a_character() {
        let entry = Entry { position: 1, event: Event::End { reason: EndReason::Failed("ä".repeat(3000)) } };
        let Ok(Parsed::Whole(found, _)) = parse(&encode(&entry)) else { panic!("does not decode") };
        assert_eq!(found.event, Event::End { reason: EndReason::Failed("ä".repeat(2048)) });
    }
}
