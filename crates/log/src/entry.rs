//! What a log is made of.
//!
//! **In:** what happened to a machine (an [`Input`] given), what it did (an [`OutputNote`]), what it looked like (a digest).
//! **Out:** [`Entry`] values, each stamped with the position at which it happened.
//! **Invariant:** in one log positions never go back; entries at the same position happened in the order of the log.
use twinstep_machine::door::{Input, Output};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// One thing that happened, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Retired guest instructions since power-on.
    pub position: u64,
    /// What happened there.
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The world did this to the machine. A replay does it again at the same position.
    Input(Input),
    /// The machine made an output. A replay must make the same one.
    Output(OutputNote),
    /// The machine's state, digested. Opaque here; only the machine can say what differs between two of them.
    Digest(Vec<u8>),
    /// The machine got here and nothing else is to be told. Lets a follower run on, and a reader know how far the log is good.
    Progress,
    /// The log is complete. Nothing follows.
    End {
        /// Why there is no more.
        reason: EndReason,
    },
}

impl Event {
    /// Which kind of entry this event is stored as.
    pub fn kind(&self) -> EntryKind {
        match self {
            Event::Input(input) => crate::input::kind(input),
            Event::Output(_) => EntryKind::Output,
            Event::Digest(_) => EntryKind::Digest,
            Event::Progress => EntryKind::Progress,
            Event::End { .. } => EntryKind::End,
        }
    }
}

/// Why a log is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndReason {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// Somebody ended the recording; the machine may have gone on.
    Stopped,
    /// The machine could not go on (a triple fault, an instruction that is not supported); the text says what it was. Text
    /// longer than [`EndReason::MAX_TEXT`] bytes is cut when the entry is encoded.
    Failed(String),
}

impl EndReason {
    /// Most bytes of text that an entry keeps.
    pub const MAX_TEXT: usize = 4096;
}

impl std::fmt::Display for EndReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            EndReason::PowerOff => f.write_str("the guest switched the machine off"),
            EndReason::Reset => f.write_str("the guest reset the machine"),
            EndReason::Stopped => f.write_str("recording was stopped"),
            EndReason::Failed(text) => write!(f, "the machine failed: {text}"),
        }
    }
}

/// Where an output left the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OutputPort {
    /// A network card, counted from 0.
    Nic(u8),
    /// The same, for a large segment.
    NicGso {
        /// Which card, from 0.
        nic: u8,
        /// Bytes of payload after cutting.
        segment_size: u16,
    },
    /// The serial port.
    Serial,
    /// The virtio console.
    Console,
    /// A write to a shared disk, counted from 0.
    Disk(u8),
    /// A flush of a shared disk.
    DiskFlush(u8),
}

impl std::fmt::Display for OutputPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OutputPort::Nic(nic) => write!(f, "network card {nic}"),
            OutputPort::NicGso { nic, segment_size } => write!(f, "network card {nic} in pieces of {segment_size}"),
            OutputPort::Serial => f.write_str("serial port"),
            OutputPort::Console => f.write_str("virtio console"),
            OutputPort::Disk(disk) => write!(f, "shared disk {disk}"),
            OutputPort::DiskFlush(disk) => write!(f, "shared disk {disk}, as a flush"),
        }
    }
}

/// An output without its bytes: enough to know whether another machine made the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputNote {
    /// Where it left.
    pub port: OutputPort,
    /// How many bytes it has.
    pub length: u32,
    /// XXH3-128 of its bytes, seed 0. Finds faults, not forgers. The bytes of a write to a disk are its offset (u64, little-endian) and its data, those of a flush the number of its request.
    pub digest: u128,
}

impl OutputNote {
    /// The note of an output.
    ///
    /// # Panics
    /// If the output has 4 GiB or more; a machine's largest is a frame or a burst of console bytes.
    pub fn of(output: &Output) -> Self {
        let (port, head, bytes): (_, Option<u64>, &[u8]) = match output {
            Output::NetTx { nic, frame } => (OutputPort::Nic(*nic), None, frame),
            &Output::NetTxGso { nic, ref frame, segment_size } => (OutputPort::NicGso { nic, segment_size }, None, frame),
            Output::Serial(bytes) => (OutputPort::Serial, None, bytes),
            Output::Console(bytes) => (OutputPort::Console, None, bytes),
            Output::DiskWrite { disk, offset, data } => (OutputPort::Disk(*disk), Some(*offset), data),
            Output::DiskFlush { disk, request } => (OutputPort::DiskFlush(*disk), Some(*request), &[]),
        };
        let Some(head) = head else {
            let length = u32::try_from(bytes.len()).expect("an output is smaller than 4 GiB");
            return Self { port, length, digest: xxh3_128(bytes) };
        };
        let head = head.to_le_bytes();
        let mut hash = Xxh3::new();
        hash.update(&head);
        hash.update(bytes);
        let length = u32::try_from(head.len() + bytes.len()).expect("an output is smaller than 4 GiB");
        Self { port, length, digest: hash.digest128() }
    }
}

impl std::fmt::Display for OutputNote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes to {} (digest {:032x})", self.length, self.port, self.digest)
    }
}

/// Kinds of entries as they are numbered in files and streams.
///
/// A number is never reused, and the meaning of one never changes: an entry that needs another layout gets the next free
/// number, and the old one decodes for ever. 0 is never given, so that a hole of zeros is no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum EntryKind {
    /// [`Input::Clock`].
    Clock = 1,
    /// [`Input::NetRx`].
    NetRx = 2,
    /// [`Input::Serial`].
    Serial = 3,
    /// [`Input::Console`].
    Console = 4,
    /// [`Input::Seed`].
    Seed = 5,
    /// [`Input::WallClock`].
    WallClock = 6,
    /// [`Input::PowerButton`].
    PowerButton = 7,
    /// [`Input::NetRxGso`].
    NetRxGso = 8,
    /// [`Input::DiskDone`].
    DiskDone = 9,
    /// [`Event::Output`].
    Output = 64,
    /// [`Event::Digest`].
    Digest = 65,
    /// [`Event::Progress`].
    Progress = 66,
    /// [`Event::End`].
    End = 67,
}

impl EntryKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [EntryKind; 13] = [
        EntryKind::Clock,
        EntryKind::NetRx,
        EntryKind::Serial,
        EntryKind::Console,
        EntryKind::Seed,
        EntryKind::WallClock,
        EntryKind::PowerButton,
        EntryKind::NetRxGso,
        EntryKind::DiskDone,
        EntryKind::Output,
        EntryKind::Digest,
        EntryKind::Progress,
        EntryKind::End,
    ];

    /// The number stored in an entry's header.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The kind of that number, if this version knows it.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }

    /// Place in [`EntryKind::ALL`].
    pub(crate) fn index(self) -> usize {
        Self::ALL.iter().position(|kind| *kind == self).expect("ALL holds every kind")
    }

    /// A short name for people.
    pub fn name(self) -> &'static str {
        match self {
            EntryKind::Clock => "clock",
            EntryKind::NetRx => "net-rx",
            EntryKind::Serial => "serial",
            EntryKind::Console => "console",
            EntryKind::Seed => "seed",
            EntryKind::WallClock => "wall-clock",
            EntryKind::PowerButton => "power-button",
            EntryKind::NetRxGso => "net-rx-gso",
            EntryKind::DiskDone => "disk-done",
            EntryKind::Output => "output",
            EntryKind::Digest => "digest",
            EntryKind::Progress => "progress",
            EntryKind::End => "end",
        }
    }
}

impl std::fmt::Display for EntryKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_found_again() {
        for (index, kind) in EntryKind::ALL.into_iter().enumerate() {
            assert_eq!(EntryKind::from_number(kind.number()), Some(kind));
            assert_eq!(kind.index(), index);
        }
        assert_eq!(EntryKind::from_number(0), None);
    }

    #[test]
    fn notes_tell_outputs_apart() {
        let note = |nic, frame: &[u8]| OutputNote::of(&Output::NetTx { nic, frame: frame.to_vec() });
        assert_eq!(note(0, b"abc"), note(0, b"abc"));
        assert_ne!(note(0, b"abc"), note(1, b"abc"));
        assert_ne!(note(0, b"abc"), note(0, b"abd"));
        assert_ne!(note(0, b"abc"), OutputNote::of(&Output::Serial(b"abc".to_vec())));
        let large = |segment_size| OutputNote::of(&Output::NetTxGso { nic: 0, frame: b"abc".to_vec(), segment_size });
        assert_ne!(note(0, b"abc"), large(1));
        assert_ne!(large(1), large(2));
        let write = |offset| OutputNote::of(&Output::DiskWrite { disk: 0, offset, data: vec![1; 512] });
        assert_ne!(write(0), write(512));
        assert_eq!(write(512).digest, xxh3_128(&[&512u64.to_le_bytes()[..], &[1; 512]].concat()));
    }
}
