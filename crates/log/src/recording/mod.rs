//! Recordings: a machine's image and the log of what happened to it since. The layout is in docs/formats/recording.md.
//!
//! **In:** metadata, an image, entries. **Out:** the same; and for a file that its writer could not finish, everything up to where
//! it was cut, with the position up to which it can be replayed.
//! **Invariants:** no entry lies before the image's position; a file without an end entry is cut, whatever else it looks like;
//! bytes that changed are an error and never an entry.
mod read;
mod write;

pub use read::{RecordingEnd, RecordingReader};
pub use write::{RecordingStart, RecordingWriter};

use crate::container::Container;
use crate::vote::Dispute;
use minicbor::{Decode, Encode};

/// The format of recordings that is written, and the latest that can be read.
pub const RECORDING_FORMAT: u32 = 1;

const CONTAINER: Container = Container { what: "recording", magic: *b"TWINSREC", format: RECORDING_FORMAT };

/// What a recording says about itself. Fields have numbers for ever; one that is added must be optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RecordingMetadata {
    /// Version and build of the Twinstep that wrote it.
    #[n(0)]
    pub engine: String,
    /// Name of the guest's CPU model.
    #[n(1)]
    pub cpu_model: String,
    /// Guest RAM in MiB.
    #[n(2)]
    pub ram_mib: u32,
    /// Maker of the host's CPU, as CPUID names it. A replay on another maker's CPU may differ.
    #[n(3)]
    pub host_vendor: String,
    /// Family and model of the host's CPU.
    #[n(4)]
    pub host_family: String,
    /// Network cards, in order.
    #[n(5)]
    pub nics: Vec<NicMetadata>,
    /// Disks, in order.
    #[n(6)]
    pub disks: Vec<DiskMetadata>,
    /// Positions from one digest entry to the next; 0 for none.
    #[n(7)]
    #[cbor(default)]
    pub digest_interval: u64,
    /// Anything a person wants to read later.
    #[n(8)]
    #[cbor(default)]
    pub note: String,
    /// Of a window: what the two sides of the pair disagree about at its end.
    #[n(9)]
    pub dispute: Option<Dispute>,
}

/// A network card of the recorded machine.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NicMetadata {
    /// Its hardware address.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub mac: [u8; 6],
}

/// A disk of the recorded machine. Its contents are not in the recording.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DiskMetadata {
    /// What the host calls it, for people.
    #[n(0)]
    pub name: String,
    /// Its size in bytes.
    #[n(1)]
    pub bytes: u64,
    /// Digest of its contents when the recording began, with the name of the method ("xxh3:..."); empty if not known.
    #[n(2)]
    #[cbor(default)]
    pub digest: String,
}
