//! The bytes between source and destination. The layout is in docs/formats/migration.md.
//!
//! **In:** what is to be sent ([`Encoder`]); bytes as they arrive, cut anywhere ([`Decoder`]). **Out:** blocks as bytes; the same blocks again. **Invariant:** a
//! decoder hands out only what fits the layout that the stream began with, each block checked by its checksums, and keeps no more than one block and the bytes
//! pushed last.
use std::mem::{offset_of, size_of};

use twinstep_machine::PageSet;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{Layout, LayoutError, MAX_REGIONS, Region};

/// The first bytes of a stream.
pub const MAGIC: [u8; 8] = *b"TWINMOVE";
/// The format that is written, and the only one that is read.
pub const FORMAT: u32 = 1;
/// Most bytes of the preface, which says what the units are of.
pub const MAX_PREFACE: usize = 1 << 20;
/// Most bytes of state that travel besides units.
pub const MAX_STATE: usize = 64 << 20;
/// Units that a block tells of: those whose numbers differ in the lowest six bits only.
pub const GROUP: u64 = 64;
/// Bytes of units in a block at most, unless one unit alone has more.
const BLOCK_BYTES: usize = 256 << 10;
/// Bytes of state in a block at most.
const STATE_BYTES: usize = 256 << 10;
/// The longest body of any block: a unit of the largest size, or the preface.
const MAX_BODY: usize = 1 << 20;

/// Why a stream cannot be used. After one it is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It begins with something else.
    #[error("this is no migration stream")]
    Foreign,
    /// Another version of Twinstep sends it.
    #[error("the migration stream has format {0}, this build reads {FORMAT}")]
    Format(u32),
    /// Its layout is impossible.
    #[error("the migration stream is of an impossible machine: {0}")]
    Layout(#[from] LayoutError),
    /// Its bytes are not those that were sent, or make no sense.
    #[error("byte {offset} of the migration stream: {fault}")]
    Damaged {
        /// Where the damaged part begins.
        offset: u64,
        /// What is wrong there.
        fault: String,
    },
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    format: U32,
    regions: U32,
    preface_bytes: U32,
    /// CRC-32 of the regions and the preface.
    body_check: U32,
    reserved: U32,
    /// CRC-32 of the head before this.
    check: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RegionLayout {
    units: U64,
    unit_bytes: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BlockHeader {
    /// CRC-32 of the header after this.
    check: U32,
    kind: u8,
    /// Of units: [`STORED`] or [`LZ4`]. 0 for other kinds.
    encoding: u8,
    /// Of units and zeroes; 0 for other kinds.
    region: U16,
    /// Bytes of the body that follows.
    length: U32,
    /// CRC-32 of the body.
    body_check: U32,
    /// Of units and zeroes: number of the group's first unit. Of a round: its number. Of the end: units that were sent, zeroes included.
    number: U64,
    /// Of units and zeroes: which of the group, the first in the lowest bit.
    present: U64,
}

const _: () = {
    assert!(size_of::<Head>() == 32);
    assert!(offset_of!(Head, body_check) == 20);
    assert!(size_of::<RegionLayout>() == 16);
    assert!(size_of::<BlockHeader>() == 32);
    assert!(offset_of!(BlockHeader, region) == 6);
    assert!(offset_of!(BlockHeader, body_check) == 12);
    assert!(offset_of!(BlockHeader, number) == 16);
    assert!(offset_of!(BlockHeader, present) == 24);
};

const UNITS: u8 = 1;
const ZEROES: u8 = 2;
const ROUND: u8 = 3;
const STATE: u8 = 4;
const END: u8 = 5;

const STORED: u8 = 1;
const LZ4: u8 = 2;

/// Makes a stream's bytes.
#[derive(Debug)]
pub struct Encoder {
    layout: Layout,
    packed: Vec<u8>,
    /// So many blocks are not tried to be packed, since the last ones did not become smaller.
    skip: u32,
}

/// Blocks that are stored after one that did not become smaller: what cannot be packed comes in heaps.
const SKIP: u32 = 7;

impl Encoder {
    /// Of a stream of this layout.
    pub fn new(layout: Layout) -> Self {
        Self { layout, packed: Vec::new(), skip: 0 }
    }

    /// The beginning: the layout, and what the destination must know before it takes units.
    ///
    /// # Panics
    /// If the preface is longer than [`MAX_PREFACE`].
    pub fn begin(&mut self, preface: &[u8], to: &mut Vec<u8>) {
        assert!(preface.len() <= MAX_PREFACE, "a preface of {} bytes cannot be sent", preface.len());
        let regions = self.layout.regions();
        let mut body: Vec<u8> = Vec::new();
        for region in regions {
            let layout =
                RegionLayout { units: U64::new(region.units), unit_bytes: U32::new(region.unit_bytes), reserved: U32::ZERO };
            body.extend(layout.as_bytes());
        }
        body.extend(preface);
        let mut head = Head {
            magic: MAGIC,
            format: U32::new(FORMAT),
            regions: U32::new(regions.len() as u32),
            preface_bytes: U32::new(preface.len() as u32),
            body_check: U32::new(crc32fast::hash(&body)),
            reserved: U32::ZERO,
            check: U32::ZERO,
        };
        head.check = U32::new(head_check(&head));
        to.extend(head.as_bytes());
        to.extend(body);
    }

    /// A round begins; they count from 1.
    pub fn round(&mut self, number: u64, to: &mut Vec<u8>) {
        put(to, header(ROUND, number), &[]);
    }

    /// Units of a region, ascending, with their bytes one behind the other.
    ///
    /// # Panics
    /// If a unit does not exist, they do not ascend, or there are not as many bytes as they have.
    pub fn units(&mut self, region: usize, units: &[u64], bytes: &[u8], to: &mut Vec<u8>) {
        let unit_bytes = self.layout.regions()[region].unit_bytes as usize;
        assert_eq!(bytes.len(), units.len() * unit_bytes, "each unit has its bytes");
        let most = (BLOCK_BYTES / unit_bytes).max(1);
        let mut at = 0;
        self.groups(region, units, most, |this, header, count| {
            let body = &bytes[at * unit_bytes..(at + count) * unit_bytes];
            at += count;
            this.pack(header, body, to);
        });
    }

    /// Units of a region, ascending, that are all zero.
    ///
    /// # Panics
    /// If a unit does not exist, or they do not ascend.
    pub fn zeroes(&mut self, region: usize, units: &[u64], to: &mut Vec<u8>) {
        self.groups(region, units, GROUP as usize, |_, mut header, _| {
            header.kind = ZEROES;
            put(to, header, &[]);
        });
    }

    /// Calls `each` with the header of a block of up to `most` units, and how many these are.
    fn groups(&mut self, region: usize, units: &[u64], most: usize, mut each: impl FnMut(&mut Self, BlockHeader, usize)) {
        let there_are = self.layout.regions()[region].units;
        assert!(units.is_sorted_by(|a, b| a < b), "units ascend");
        assert!(units.last().is_none_or(|last| *last < there_are), "region {region} has {there_are} units");
        for group in units.chunk_by(|a, b| a / GROUP == b / GROUP) {
            for block in group.chunks(most) {
                let first = block[0] - block[0] % GROUP;
                let mut header = header(UNITS, first);
                header.region = U16::new(region as u16);
                header.present = U64::new(block.iter().fold(0, |present, unit| present | 1 << (unit - first)));
                each(self, header, block.len());
            }
        }
    }

    fn pack(&mut self, mut header: BlockHeader, body: &[u8], to: &mut Vec<u8>) {
        header.encoding = STORED;
        if self.skip > 0 {
            self.skip -= 1;
            return put(to, header, body);
        }
        let room = lz4_flex::block::get_maximum_output_size(body.len());
        self.packed.resize(room.max(self.packed.len()), 0);
        match lz4_flex::block::compress_into(body, &mut self.packed) {
            Ok(length) if length < body.len() / 8 * 7 => {
                header.encoding = LZ4;
                put(to, header, &self.packed[..length]);
            }
            _ => {
                self.skip = SKIP;
                put(to, header, body);
            }
        }
    }

    /// The state that travels besides units, and the end: the digests of the regions, and how many units were sent.
    ///
    /// # Panics
    /// If the state is longer than [`MAX_STATE`].
    pub fn end(&mut self, state: &[u8], digests: &[u128], sent: u64, to: &mut Vec<u8>) {
        assert!(state.len() <= MAX_STATE, "a state of {} bytes cannot be sent", state.len());
        for piece in state.chunks(STATE_BYTES) {
            put(to, header(STATE, 0), piece);
        }
        let digests: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
        put(to, header(END, sent), &digests);
    }
}

fn header(kind: u8, number: u64) -> BlockHeader {
    BlockHeader {
        check: U32::ZERO,
        kind,
        encoding: 0,
        region: U16::ZERO,
        length: U32::ZERO,
        body_check: U32::ZERO,
        number: U64::new(number),
        present: U64::ZERO,
    }
}

fn put(to: &mut Vec<u8>, mut header: BlockHeader, body: &[u8]) {
    header.length = U32::new(body.len() as u32);
    header.body_check = U32::new(crc32fast::hash(body));
    header.check = U32::new(block_check(&header));
    to.extend(header.as_bytes());
    to.extend(body);
}

fn head_check(head: &Head) -> u32 {
    crc32fast::hash(&head.as_bytes()[..offset_of!(Head, check)])
}

fn block_check(header: &BlockHeader) -> u32 {
    crc32fast::hash(&header.as_bytes()[size_of::<U32>()..])
}

/// A part of a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Block<'a> {
    /// The beginning.
    Begin {
        /// The regions.
        layout: Layout,
        /// What the source says of them.
        preface: &'a [u8],
    },
    /// A round begins.
    Round(u64),
    /// Units.
    Units {
        /// Of which region.
        region: usize,
        /// Number of the group's first.
        first: u64,
        /// Which of the group; never none.
        present: u64,
        /// Their bytes, one behind the other.
        bytes: &'a [u8],
    },
    /// Units that are zero.
    Zeroes {
        /// Of which region.
        region: usize,
        /// Number of the group's first.
        first: u64,
        /// Which of the group; never none.
        present: u64,
    },
    /// A piece of the state.
    State(&'a [u8]),
    /// The end.
    End {
        /// One for each region.
        digests: Vec<u128>,
        /// Units sent, zeroes included.
        sent: u64,
    },
}

/// The numbers of a group's units.
pub fn numbers(first: u64, present: u64) -> impl Iterator<Item = u64> {
    (0..GROUP).filter(move |bit| present >> bit & 1 != 0).map(move |bit| first + bit)
}

/// Finds the blocks in bytes that arrive.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are used up.
    used: usize,
    /// Bytes of the stream before `buffer`.
    before: u64,
    layout: Option<Layout>,
    unpacked: Vec<u8>,
    ended: bool,
}

impl Decoder {
    /// Of a stream that begins with the next byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes in. To be called only after [`Decoder::next_block`] has said `None`.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.used);
        self.before += self.used as u64;
        self.used = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether the end was handed out, and nothing came behind it.
    pub fn is_complete(&self) -> bool {
        self.ended && self.used == self.buffer.len()
    }

    fn damaged(&self, fault: impl Into<String>) -> StreamError {
        StreamError::Damaged { offset: self.before + self.used as u64, fault: fault.into() }
    }

    /// The next block; `None` if it is not all there yet.
    ///
    /// # Errors
    /// If the bytes are no stream of this format. Then nothing more comes.
    pub fn next_block(&mut self) -> Result<Option<Block<'_>>, StreamError> {
        match self.layout.is_some() {
            false => self.begin(),
            true => self.block(),
        }
    }

    fn begin(&mut self) -> Result<Option<Block<'_>>, StreamError> {
        let given = &self.buffer[self.used..];
        if given.len() < MAGIC.len() || given[..MAGIC.len()] != MAGIC {
            let fits = MAGIC.starts_with(&given[..given.len().min(MAGIC.len())]);
            return if fits { Ok(None) } else { Err(StreamError::Foreign) };
        }
        let Ok((head, rest)) = Head::ref_from_prefix(given) else { return Ok(None) };
        if head.check.get() != head_check(head) {
            return Err(self.damaged("the checksum of its head is wrong"));
        }
        if head.format.get() != FORMAT {
            return Err(StreamError::Format(head.format.get()));
        }
        let (regions, preface_bytes) = (head.regions.get() as usize, head.preface_bytes.get() as usize);
        if head.reserved.get() != 0 || preface_bytes > MAX_PREFACE {
            return Err(self.damaged("its head is not that of this format"));
        }
        if regions == 0 || regions > MAX_REGIONS {
            return Err(LayoutError::Regions(regions).into());
        }
        let length = regions * size_of::<RegionLayout>() + preface_bytes;
        let Some(body) = rest.get(..length) else { return Ok(None) };
        if crc32fast::hash(body) != head.body_check.get() {
            return Err(self.damaged("the checksum of its layout is wrong"));
        }
        let Ok((found, _)) = <[RegionLayout]>::ref_from_prefix_with_elems(body, regions) else {
            return Err(self.damaged("its layout cannot be read"));
        };
        if found.iter().any(|region| region.reserved.get() != 0) {
            return Err(self.damaged("its layout is not that of this format"));
        }
        let found = found.iter().map(|r| Region { unit_bytes: r.unit_bytes.get(), units: r.units.get() }).collect();
        let layout = Layout::new(found)?;
        self.layout = Some(layout.clone());
        self.used += size_of::<Head>() + length;
        let preface = &self.buffer[self.used - preface_bytes..self.used];
        Ok(Some(Block::Begin { layout, preface }))
    }

    fn block(&mut self) -> Result<Option<Block<'_>>, StreamError> {
        let given = &self.buffer[self.used..];
        if self.ended && !given.is_empty() {
            return Err(self.damaged("it goes on after its end"));
        }
        let Ok((header, rest)) = BlockHeader::ref_from_prefix(given) else { return Ok(None) };
        if header.check.get() != block_check(header) {
            return Err(self.damaged("the checksum of a block's header is wrong"));
        }
        let length = header.length.get() as usize;
        if length > MAX_BODY {
            return Err(self.damaged(format!("a block of {length} bytes, over the limit of {MAX_BODY}")));
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        if crc32fast::hash(body) != header.body_check.get() {
            return Err(self.damaged("the checksum of a block is wrong"));
        }
        let (kind, encoding, region) = (header.kind, header.encoding, usize::from(header.region.get()));
        let (number, present) = (header.number.get(), header.present.get());
        let of_units = matches!(kind, UNITS | ZEROES);
        if !of_units && (region, encoding, present) != (0, 0, 0) {
            return Err(self.damaged("a block says what its kind does not have"));
        }
        let regions = self.layout.as_ref().expect("the stream has begun").regions();
        let mut bytes = 0;
        if of_units {
            let Some(found) = regions.get(region) else {
                return Err(self.damaged(format!("a block is of region {region}; there are {}", regions.len())));
            };
            if present == 0 || !number.is_multiple_of(GROUP) {
                return Err(self.damaged("a block is of no unit"));
            }
            let last = number.saturating_add(u64::from(63 - present.leading_zeros()));
            if last >= found.units {
                return Err(self.damaged(format!("a block is of unit {last}; region {region} has {}", found.units)));
            }
            let unit_bytes = found.unit_bytes as usize;
            bytes = present.count_ones() as usize * unit_bytes;
            if kind == UNITS && bytes > BLOCK_BYTES.max(unit_bytes) {
                return Err(self.damaged("a block has too many units"));
            }
        }
        let end = self.used + size_of::<BlockHeader>() + length;
        let start = end - length;
        let block = match (kind, encoding) {
            (UNITS, STORED) if length == bytes => {
                Block::Units { region, first: number, present, bytes: &self.buffer[start..end] }
            }
            (UNITS, LZ4) => {
                self.unpacked.resize(bytes, 0);
                if !matches!(lz4_flex::block::decompress_into(&self.buffer[start..end], &mut self.unpacked), Ok(n) if n == bytes)
                {
                    return Err(self.damaged("the units of a block cannot be unpacked"));
                }
                Block::Units { region, first: number, present, bytes: &self.unpacked }
            }
            (ZEROES, 0) if length == 0 => Block::Zeroes { region, first: number, present },
            (ROUND, _) if length == 0 => Block::Round(number),
            (STATE, _) if (1..=STATE_BYTES).contains(&length) && number == 0 => Block::State(&self.buffer[start..end]),
            (END, _) if length == regions.len() * size_of::<U128>() => {
                self.ended = true;
                let (digests, _) = self.buffer[start..end].as_chunks::<16>();
                Block::End { digests: digests.iter().map(|d| u128::from_le_bytes(*d)).collect(), sent: number }
            }
            _ => {
                return Err(
                    self.damaged(format!("a block of kind {kind}, encoding {encoding} and {length} bytes makes no sense"))
                );
            }
        };
        self.used = end;
        Ok(Some(block))
    }
}

/// Adds a group's units to a set.
pub(crate) fn join(set: &mut PageSet, first: u64, present: u64) {
    numbers(first, present).for_each(|unit| set.insert(unit as usize));
}
