//! The wire protocol of the logging channel: what two hosts say to each other, byte by byte.
//!
//! In: [`Message`]s to encode, bytes to decode. Out: frames, messages, or a [`WireError`] that says what is wrong.
//! Invariant: whatever bytes arrive, decoding ends in a message or an error, within bounded memory, without a panic; what
//! was encoded decodes to itself. `docs/protocol-pair.md` is the same in prose.
//!
//! ```text
//!   greeting = magic "TWPR" · version u16 · kind u16 · payload length u32 · payload crc32 · reserved 12 · header crc32 · payload
//!   frame    = kind u8 · payload length u24 · header check u16 · payload crc32 · payload (0..=MAX_PAYLOAD_BYTES)
//! ```
//!
//! All integers are little-endian, numbers in payloads are varints. The layout of the greeting's header (`Hello`, `HelloReply`, `Refuse`) is frozen for ever, with version 0,
//! since it is what agrees on a version; the rest belongs to the version that was agreed on.

mod codec;
mod decoder;
mod greeting;
#[cfg(test)]
mod tests;
mod varint;

pub use codec::encode;
pub use decoder::Decoder;
pub(crate) use greeting::greeting_version;
pub use greeting::{
    Expectation, Hello, HelloReply, HostIdentity, MAX_NAME_BYTES, MAX_STANDBY_BYTES, MAX_STANDBYS, VmIdentity, is_name,
};

use crate::types::{Nanos, OutputId, Record, Seq};

/// The first four bytes of every greeting.
pub const MAGIC: [u8; 4] = *b"TWPR";
/// The oldest version this build understands.
pub const MIN_VERSION: u16 = 5;
/// The newest version this build understands.
pub const MAX_VERSION: u16 = 5;
/// The version in the header of a greeting.
pub const GREETING_VERSION: u16 = 0;
/// The size of a greeting's header.
pub const HEADER_BYTES: usize = 32;
/// The size of any other frame's header.
pub const SHORT_HEADER_BYTES: usize = 10;
/// What a record counts for in buffers besides its bytes. What precedes its bytes in a `Log` message is not larger.
pub const RECORD_HEAD_BYTES: usize = 16;
/// The largest `bytes` of a record.
pub const MAX_RECORD_BYTES: usize = 1 << 20;
/// The largest piece of image in one message. Small enough that a heartbeat behind it is not late.
pub const MAX_IMAGE_CHUNK_BYTES: usize = 1 << 18;
/// A `Log` message is closed when it has grown to this; it may pass it by one record.
pub const LOG_BATCH_BYTES: usize = 1 << 18;
/// The largest payload of any frame.
pub const MAX_PAYLOAD_BYTES: usize = 2 << 20;
/// The longest text in a message.
pub const MAX_TEXT_BYTES: usize = 1024;

/// The most that is said of what has changed in one message.
pub const MAX_CHANGED_BYTES: usize = 1 << 18;
/// The largest piece of a report on the initial copy in one message.
pub const MAX_REPORT_BYTES: usize = 1 << 18;
/// So many instructions beyond the last record a secondary may be let run at most.
pub const MAX_LOOKAHEAD: u64 = 1 << 24;
/// The most that is said of an output that differs.
pub const MAX_DETAIL_BYTES: usize = 1 << 18;

const _: () = assert!(1 + varint::MAX_BYTES + 3 <= RECORD_HEAD_BYTES && MAX_RECORD_BYTES < 1 << 21);
const _: () = assert!(MAX_CHANGED_BYTES <= MAX_PAYLOAD_BYTES && MAX_DETAIL_BYTES + 32 <= MAX_PAYLOAD_BYTES);
const _: () = assert!(LOG_BATCH_BYTES + MAX_RECORD_BYTES + 2 * RECORD_HEAD_BYTES <= MAX_PAYLOAD_BYTES);
const _: () = assert!(MAX_IMAGE_CHUNK_BYTES <= MAX_PAYLOAD_BYTES && MAX_REPORT_BYTES <= MAX_PAYLOAD_BYTES);

/// Bytes that a record takes in a `Log` message, behind one at position `before`.
pub fn record_bytes(before: u64, record: &Record) -> usize {
    let length = record.bytes.len();
    1 + varint::bytes_of(record.position.wrapping_sub(before)) + varint::bytes_of(length as u64) + length
}

/// What one side says to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Primary: who I am, what I run. The first frame of a connection.
    Hello(Hello),
    /// Secondary: I can replay that, and these are my particulars.
    HelloReply(HelloReply),
    /// Either side, instead of going on with the greeting: no, and why.
    Refuse {
        /// For people.
        reason: String,
    },
    /// Primary: the next bytes of the initial copy.
    ImageChunk(Vec<u8>),
    /// Primary: the initial copy is complete.
    ImageEnd {
        /// The position of the machine that the image holds; the log starts there.
        position: u64,
        /// How many bytes the image had.
        total_bytes: u64,
    },
    /// Secondary: the image is restored.
    ImageReady {
        /// The position of the restored machine.
        position: u64,
    },
    /// Primary: from here on I hold outputs, and all records of outputs that left earlier precede this message.
    ProtectionStart {
        /// The last record that precedes.
        last_seq: Seq,
    },
    /// Primary: the log goes on.
    Log {
        /// The number of the first record; the others follow without gaps.
        first_seq: Seq,
        /// At least one.
        records: Vec<Record>,
    },
    /// Primary: behind all records so far, my machine runs to this position without anything entering it, unless it pauses before (it halts, or asks its host for
    /// something); then it has taken nothing until there.
    Lookahead {
        /// Where it gets at most; beyond the last record by no more than [`MAX_LOOKAHEAD`].
        position: u64,
    },
    /// Secondary: how far I am.
    Ack(Ack),
    /// Primary: all outputs up to this one have certainly left.
    Released {
        /// The last one.
        up_to: OutputId,
    },
    /// Secondary, after a `Mismatch`: some of what has changed here since the two machines were last known to be equal. Opaque here.
    Changed(Vec<u8>),
    /// Secondary: I have made another output than the one noted, or none, or one too many. I replay on without comparing, and wait for an image.
    Mismatch {
        /// The first output that is not matched.
        output: OutputId,
        /// The position of the secondary's machine.
        position: u64,
        /// What the secondary made. Opaque here.
        detail: Vec<u8>,
    },
    /// Secondary, during the initial copy: a piece of what the secondary's host says of it (what it has already, how much is written). Opaque here.
    CopyReport(Vec<u8>),
    /// Primary: my guest stands still, all it did is with you: go live. (A planned failover.)
    HandOver {
        /// For people.
        reason: String,
    },
    /// Primary, after a `Mismatch`: my guest stands still, and all records before are with you.
    StandStill {
        /// The position.
        position: u64,
    },
    /// Secondary: I have replayed all there is before the `StandStill`, and said in `Changed` all that has changed.
    Listed,
    /// Either side: I am alive.
    Heartbeat {
        /// The sender's clock.
        time: Nanos,
        /// The position of the sender's machine.
        position: u64,
        /// The newest clock heard from the other side; 0 before.
        echo: Nanos,
    },
    /// Either side: I have stopped for good and shall never go live or go on from here.
    Goodbye {
        /// For people.
        reason: String,
    },
}

/// How far the secondary is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ack {
    /// All records up to this one are received.
    pub received_seq: Seq,
    /// All records up to this one are replayed.
    pub replayed_seq: Seq,
    /// The position of the secondary's machine.
    pub replayed_position: u64,
    /// So many bytes of the image are received; from a `Mismatch` on, of the image of the resync.
    pub image_bytes: u64,
    /// All outputs up to this one were made by the secondary as well, and are the same.
    pub matched: OutputId,
    /// The position at which the two machines were last seen to be equal, in all of their state; 0 if never since the image.
    pub agreed_position: u64,
}

/// The kind of a frame. Numbers are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Kind {
    /// [`Message::Hello`]
    Hello = 1,
    /// [`Message::HelloReply`]
    HelloReply = 2,
    /// [`Message::Refuse`]
    Refuse = 3,
    /// [`Message::ImageChunk`]
    ImageChunk = 4,
    /// [`Message::ImageEnd`]
    ImageEnd = 5,
    /// [`Message::ImageReady`]
    ImageReady = 6,
    /// [`Message::ProtectionStart`]
    ProtectionStart = 7,
    /// [`Message::Log`]
    Log = 8,
    /// [`Message::Ack`]
    Ack = 9,
    /// [`Message::Released`]
    Released = 10,
    /// [`Message::Heartbeat`]
    Heartbeat = 11,
    /// [`Message::Goodbye`]
    Goodbye = 12,
    /// [`Message::Changed`]
    Changed = 13,
    /// [`Message::Mismatch`]
    Mismatch = 14,
    /// [`Message::HandOver`]
    HandOver = 15,
    /// [`Message::CopyReport`]
    CopyReport = 16,
    /// [`Message::StandStill`]
    StandStill = 17,
    /// [`Message::Listed`]
    Listed = 18,
    /// [`Message::Lookahead`]
    Lookahead = 19,
}

impl Kind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Kind; 19] = [
        Kind::Hello,
        Kind::HelloReply,
        Kind::Refuse,
        Kind::ImageChunk,
        Kind::ImageEnd,
        Kind::ImageReady,
        Kind::ProtectionStart,
        Kind::Log,
        Kind::Ack,
        Kind::Released,
        Kind::Heartbeat,
        Kind::Goodbye,
        Kind::Changed,
        Kind::Mismatch,
        Kind::HandOver,
        Kind::CopyReport,
        Kind::StandStill,
        Kind::Listed,
        Kind::Lookahead,
    ];

    /// The kind with that number.
    pub fn from_number(number: u16) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// Greetings agree on a version, and have a header of their own.
    pub fn is_greeting(self) -> bool {
        matches!(self, Kind::Hello | Kind::HelloReply | Kind::Refuse)
    }
}

impl Message {
    /// The message's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::HelloReply(_) => Kind::HelloReply,
            Message::Refuse { .. } => Kind::Refuse,
            Message::ImageChunk(_) => Kind::ImageChunk,
            Message::ImageEnd { .. } => Kind::ImageEnd,
            Message::ImageReady { .. } => Kind::ImageReady,
            Message::ProtectionStart { .. } => Kind::ProtectionStart,
            Message::Log { .. } => Kind::Log,
            Message::Ack(_) => Kind::Ack,
            Message::Released { .. } => Kind::Released,
            Message::Heartbeat { .. } => Kind::Heartbeat,
            Message::Goodbye { .. } => Kind::Goodbye,
            Message::Changed(_) => Kind::Changed,
            Message::Mismatch { .. } => Kind::Mismatch,
            Message::HandOver { .. } => Kind::HandOver,
            Message::CopyReport(_) => Kind::CopyReport,
            Message::StandStill { .. } => Kind::StandStill,
            Message::Listed => Kind::Listed,
            Message::Lookahead { .. } => Kind::Lookahead,
        }
    }
}

/// What is wrong with bytes from the logging channel. After one of these the connection is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not our protocol at all.
    #[error("this is not a Twinstep logging channel: the frame begins with {found:02x?} instead of {MAGIC:02x?}")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// Flipped bits, or the peer lost its place.
    #[error("a frame's header is damaged: its checksum says {stated:08x}, its bytes make {computed:08x}")]
    HeaderChecksum {
        /// In the header.
        stated: u32,
        /// Of the header.
        computed: u32,
    },
    /// A newer peer that did not keep to the agreed version.
    #[error("bytes that are reserved in {kind:?} are not zero; the peer speaks a newer protocol than was agreed")]
    Reserved {
        /// Where.
        kind: Kind,
    },
    /// A greeting of another kind than all others.
    #[error("a {kind:?} frame has version {found} instead of {expected}")]
    Version {
        /// Of which frame.
        kind: Kind,
        /// In the header.
        found: u16,
        /// What it should be.
        expected: u16,
    },
    /// A message we do not know.
    #[error("unknown kind of message: {0}")]
    UnknownKind(u16),
    /// A length no correct peer would send.
    #[error("a {kind:?} frame says it has {length_bytes} bytes; the most is {MAX_PAYLOAD_BYTES}")]
    TooLong {
        /// Of which frame.
        kind: Kind,
        /// In the header.
        length_bytes: u32,
    },
    /// Flipped bits in the payload.
    #[error("the payload of a {kind:?} frame is damaged: its checksum says {stated:08x}, its bytes make {computed:08x}")]
    PayloadChecksum {
        /// Of which frame.
        kind: Kind,
        /// In the header.
        stated: u32,
        /// Of the payload.
        computed: u32,
    },
    /// A payload with a correct checksum that makes no sense.
    #[error("a {kind:?} message makes no sense: {problem}")]
    Payload {
        /// Of which frame.
        kind: Kind,
        /// What about it.
        problem: &'static str,
    },
}
