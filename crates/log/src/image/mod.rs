//! Images: a machine's state as a stream of bytes. One codec for snapshot files, for what a recording starts from, and for the
//! first copy to a standby. The layout is in docs/formats/snapshot.md.
//!
//! **In:** metadata, payloads (the state of devices and CPU, opaque here), RAM pages in ascending order.
//! **Out:** the same, each part checked before it is handed out, and the whole before the end is confirmed.
//! **Invariants:** pages that are not in an image are zero; no page comes twice; a reader takes exactly the image's bytes from its
//! stream, so that something else may follow; memory used is bounded by one payload and one group of pages.
mod read;
#[cfg(test)]
mod tests;
mod write;

pub(crate) use read::skip_image;
pub use read::{ImageItem, ImageReader, Pages, PagesIter, read_image};
pub use write::{ImageWriter, write_image};

use crate::container::Container;
use minicbor::{Decode, Encode};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
/// Most pages of RAM an image may declare: 16 TiB.
pub const MAX_RAM_PAGES: u64 = 1 << 32;
/// Most bytes a payload may have.
pub const MAX_IMAGE_PAYLOAD: usize = 64 << 20;
/// Most payloads an image may have.
pub const MAX_IMAGE_PAYLOADS: u32 = 1024;
/// Most bytes the name of a payload's kind may have.
pub const MAX_KIND: usize = 64;
/// Pages that are stored together: those whose numbers differ in the lowest six bits only.
pub const GROUP_PAGES: u64 = 64;
/// The format of images that is written, and the latest that can be read.
pub const IMAGE_FORMAT: u32 = 1;

pub(crate) const CONTAINER: Container = Container { what: "image", magic: *b"TWINSNAP", format: IMAGE_FORMAT };
const GROUP_BYTES: usize = GROUP_PAGES as usize * PAGE_BYTES;

/// What an image says about itself. Fields have numbers for ever; one that is added must be optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ImageMetadata {
    /// How many pages of RAM the machine has.
    #[n(0)]
    pub ram_pages: u64,
    /// Retired guest instructions since power-on.
    #[n(1)]
    pub position: u64,
    /// Version and build of the Twinstep that wrote it.
    #[n(2)]
    pub engine: String,
    /// Name of the guest's CPU model.
    #[n(3)]
    pub cpu_model: String,
    /// Maker of the host's CPU, as CPUID names it.
    #[n(4)]
    pub host_vendor: String,
    /// Family and model of the host's CPU.
    #[n(5)]
    pub host_family: String,
    /// Anything a person wants to read later.
    #[n(6)]
    #[cbor(default)]
    pub note: String,
}

/// The state of one part of a machine, encoded by that part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePayload {
    /// Which part: 1 to [`MAX_KIND`] printable ASCII characters without spaces, unique in an image.
    pub kind: String,
    /// Version of the part's encoding.
    pub version: u16,
    /// The encoding; at most [`MAX_IMAGE_PAYLOAD`] bytes.
    pub bytes: Vec<u8>,
}

/// What is wrong with a payload's kind, if anything is.
fn kind_fault(kind: &str) -> Option<&'static str> {
    if kind.is_empty() || kind.len() > MAX_KIND {
        Some("the name of a payload's kind is empty or too long")
    } else if !kind.bytes().all(|byte| byte.is_ascii_graphic()) {
        Some("the name of a payload's kind has a character that is not allowed")
    } else {
        None
    }
}

/// Whether pages are stored as they are or smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// As they are: for connections of several Gbit/s.
    Stored,
    /// LZ4, unless that makes them larger.
    #[default]
    Lz4,
}

/// How far an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImageProgress {
    /// Pages passed so far, zero pages as well.
    pub pages_passed: u64,
    /// Pages of RAM.
    pub pages_total: u64,
    /// Bytes written or read so far.
    pub bytes: u64,
}

/// What a whole image was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSummary {
    /// Pages in it.
    pub pages: u64,
    /// Payloads in it.
    pub payloads: u32,
    /// Bytes it takes.
    pub bytes: u64,
    /// XXH3-128 over metadata, payloads and pages; does not depend on compression.
    pub digest: u128,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BlockHeader {
    /// CRC-32 of the header after this.
    check: U32,
    kind: u8,
    /// Of pages: [`STORED`] or [`LZ4`]. 0 for other kinds.
    encoding: u8,
    /// Of a payload; 0 for other kinds.
    version: U16,
    /// Bytes of the body that follows.
    length: U32,
    /// CRC-32 of the body.
    body_check: U32,
    /// Of pages: number of the group's first page. Of a payload: bytes of its kind's name, which opens the body.
    number: U64,
    /// Of pages: which of the group are there, the first in the lowest bit.
    present: U64,
}

const _: () = {
    assert!(size_of::<BlockHeader>() == 32);
    assert!(offset_of!(BlockHeader, kind) == 4);
    assert!(offset_of!(BlockHeader, encoding) == 5);
    assert!(offset_of!(BlockHeader, version) == 6);
    assert!(offset_of!(BlockHeader, length) == 8);
    assert!(offset_of!(BlockHeader, body_check) == 12);
    assert!(offset_of!(BlockHeader, number) == 16);
    assert!(offset_of!(BlockHeader, present) == 24);
};

const BLOCK_PAYLOAD: u8 = 1;
const BLOCK_PAGES: u8 = 2;
const BLOCK_END: u8 = 3;

const STORED: u8 = 1;
const LZ4: u8 = 2;

/// Body of the end block.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
struct EndLayout {
    pages: U64,
    payloads: U32,
    reserved: U32,
    digest: U128,
}

const _: () = {
    assert!(size_of::<EndLayout>() == 32);
    assert!(offset_of!(EndLayout, payloads) == 8);
    assert!(offset_of!(EndLayout, digest) == 16);
};

impl BlockHeader {
    /// The checksum of this header as it stands.
    fn computed_check(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[size_of::<U32>()..])
    }
}

/// The running digest of an image's contents.
struct ContentDigest(xxhash_rust::xxh3::Xxh3);

impl ContentDigest {
    fn new(metadata: &[u8]) -> Self {
        let mut digest = Self(xxhash_rust::xxh3::Xxh3::new());
        digest.length(metadata.len());
        digest.0.update(metadata);
        digest
    }

    /// Lengths go in before what they measure, so that no two contents give the same bytes.
    fn length(&mut self, length: usize) {
        self.0.update(&(length as u64).to_le_bytes());
    }

    fn payload(&mut self, payload: &ImagePayload) {
        self.0.update(&[BLOCK_PAYLOAD]);
        self.length(payload.kind.len());
        self.0.update(payload.kind.as_bytes());
        self.0.update(&payload.version.to_le_bytes());
        self.length(payload.bytes.len());
        self.0.update(&payload.bytes);
    }

    fn pages(&mut self, first: u64, present: u64, bytes: &[u8]) {
        self.0.update(&[BLOCK_PAGES]);
        self.0.update(&first.to_le_bytes());
        self.0.update(&present.to_le_bytes());
        self.0.update(bytes);
    }

    fn value(&self) -> u128 {
        self.0.digest128()
    }
}
