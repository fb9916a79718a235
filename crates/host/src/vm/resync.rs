//! What makes a secondary equal to its primary again: the pages and the blocks of disks in which they differ, and all other state.
//!
//! *In*: on each side, which pages and blocks have changed since both were last known to be equal, and which have changed though nobody wrote to them; outputs that may not
//! have left. *Out*: a list for the wire, a delta, a machine that is the other. *Invariant*: after [`apply`] the digests of the whole state agree, or it
//! fails. What comes from the network is checked before it is used.
//!
//! A delta is the data of outputs and the blocks of disks (each section with its length first), then an image ([`twinstep_log::image`]) that holds the pages to replace, with a payload
//! of its own that lists them, for a page of zeroes has no place in an image. `docs/protocol-pair.md` has the layout.
use minicbor::{Decode, Encode};
use twinstep_log::{Compression, ImageItem, ImagePayload, ImageReader, ImageWriter};
use twinstep_machine::{ConsumerId, Digest, Machine, Output, PAGE_SIZE, PageSet, Payload, Start};
use twinstep_migrate::{Eras, changes as lists};
use twinstep_pair::OutputId;
use xxhash_rust::xxh3::xxh3_128;

use super::build::{self, Extra};
use super::mirror;
use crate::disk::Replica;
use crate::error::{Context, Error, Result};

/// Kind of the payload that lists the delta's pages.
const KIND: &str = "resync";
const VERSION: u16 = 1;
const UNUSABLE: &str = "what the standby says cannot be used";
/// Bytes of blocks in a delta at most: it lies in memory on both sides.
const MAX_BLOCKS_BYTES: usize = 1 << 30;

/// Which pages, and blocks of disks, have changed since the other side was last known to be equal.
#[derive(Debug)]
pub struct Baseline {
    consumer: ConsumerId,
    disks: Vec<Replica>,
    eras: Eras,
}

impl Baseline {
    /// They are equal now.
    pub fn new(machine: &mut Machine, disks: Vec<Replica>) -> Result<Self> {
        disks.iter().try_for_each(|disk| disk.equal(None))?;
        Ok(Self::adopt(machine.track_dirty("resync", Start::Nothing), disks))
    }
    /// They were equal when this consumer was last asked, and the disks when they were told so.
    pub fn adopt(consumer: ConsumerId, disks: Vec<Replica>) -> Self {
        Self { consumer, disks, eras: Eras::default() }
    }
    /// Nobody is to be compared with any more.
    pub fn end(self, machine: &mut Machine) {
        machine.untrack_dirty(self.consumer);
    }
    /// What changes from here on is told apart from what has changed so far: the other side will say whether it was equal here.
    pub fn mark(&mut self, machine: &mut Machine) {
        self.disks.iter().for_each(|disk| disk.mark(machine.position()));
        self.eras.mark(machine.position(), machine.take_dirty(self.consumer));
    }
    /// The other side was equal at `position`.
    pub fn agreed(&mut self, position: u64) {
        self.disks.iter().for_each(|disk| disk.agreed(position));
        self.eras.agreed(position);
    }
    /// They are equal where the machine stands.
    pub fn equal(&mut self, machine: &mut Machine) -> Result<()> {
        machine.take_dirty(self.consumer);
        self.eras.clear();
        self.disks.iter().try_for_each(|disk| disk.equal(None))
    }
    /// All that has changed.
    fn changed(&mut self, machine: &mut Machine) -> PageSet {
        self.eras.all(machine.take_dirty(self.consumer))
    }
}

/// What a side has to say of its RAM and its disks.
#[derive(Debug)]
pub struct Changes {
    /// For the other side: pages and blocks, and their hashes.
    pub list: Vec<u8>,
    /// Pages that changed though nobody wrote to them: this side's memory is bad.
    pub damaged: Vec<usize>,
}

/// The pages in which a machine may differ from the other: those that were written to, and those that changed by themselves, which are told apart.
/// All of RAM is read for the latter, unless `scrub` is false.
fn suspects(machine: &mut Machine, baseline: &mut Baseline, scrub: bool) -> (PageSet, Vec<usize>) {
    let damaged = if scrub { machine.scrub() } else { Vec::new() };
    let mut pages = baseline.changed(machine);
    damaged.iter().for_each(|&page| pages.insert(page));
    (pages, damaged)
}

/// Looks what has changed in a machine that stands still.
pub fn changes(machine: &mut Machine, baseline: &mut Baseline) -> Result<Changes> {
    let (pages, damaged) = suspects(machine, baseline, true);
    let hashes = machine.page_hashes();
    let mut list = Vec::new();
    lists::put_region(pages.iter().map(|page| (page, hashes[page])), &mut list);
    for disk in &baseline.disks {
        let hash = |block| Ok((block, xxh3_128(&disk.read_block(block)?)));
        let blocks: Vec<_> = disk.changed().iter().map(hash).collect::<Result<_>>()?;
        lists::put_region(blocks, &mut list);
    }
    Ok(Changes { list, damaged })
}

/// The blocks of the disks in which the two sides differ, as pieces; and how many.
fn differing_blocks(baseline: &Baseline, list: &mut &[u8]) -> Result<(Vec<u8>, usize)> {
    let (mut bytes, mut number) = (Vec::new(), 0);
    for (index, disk) in baseline.disks.iter().enumerate() {
        let theirs = lists::take_region(list, disk.blocks(), "block").what(UNUSABLE)?;
        let mut suspects = disk.changed();
        theirs.keys().for_each(|&block| suspects.insert(block));
        for block in suspects.iter() {
            let ours = disk.read_block(block)?;
            if theirs.get(&block) != Some(&xxh3_128(&ours)) {
                mirror::put_block(index, block, &ours, &mut bytes);
                number += 1;
            }
            if bytes.len() > MAX_BLOCKS_BYTES {
                return Err(Error::new(
                    "the disks of the two sides differ in more than can be sent while the guest stands still",
                ));
            }
        }
    }
    if !list.is_empty() {
        return Err(Error::new("the standby's list of changes goes on after its end"));
    }
    Ok((bytes, number))
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Own {
    /// Numbers of the pages, 32 bits each.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pages: Vec<u8>,
    /// The state's digest afterwards.
    #[n(1)]
    digest: Digest,
}

/// What the secondary lacks.
#[derive(Debug)]
pub struct Delta {
    /// The parts after the outputs: blocks, image.
    pub image: Vec<u8>,
    /// How many pages it has.
    pub pages: usize,
    /// How many blocks of disks.
    pub blocks: usize,
    /// See [`Changes::damaged`]; of the primary.
    pub damaged: Vec<usize>,
}

/// Makes the delta from a machine that stands still to one that has sent `theirs`. Afterwards both count as equal.
///
/// `scrub`: whether to look for pages of this side that changed though nobody wrote to them. If the other side has found some of its own, it is
/// known who is wrong, and the guest need not stand still for so long.
pub fn delta(
    machine: &mut Machine,
    baseline: &mut Baseline,
    mut theirs: &[u8],
    disk_bytes: &[u64],
    last_output: u64,
    scrub: bool,
) -> Result<Delta> {
    let total = machine.ram().flags().pages();
    let list = &mut theirs;
    let theirs = lists::take_region(list, total, "page").what(UNUSABLE)?;
    let (block_bytes, blocks) = differing_blocks(baseline, list)?;
    let (ours, damaged) = suspects(machine, baseline, scrub);
    let digest = machine.digest();
    let wanted = lists::differing(&ours, machine.page_hashes(), &theirs);
    let pages: Vec<usize> = wanted.iter().collect();

    let own = Own { pages: pages.iter().flat_map(|&page| (page as u32).to_le_bytes()).collect(), digest };
    let own = minicbor::to_vec(&own).expect("encoding into memory cannot fail");
    let what = "cannot make the delta";
    let mut writer = ImageWriter::new(Vec::new(), &build::image_metadata(machine), Compression::Lz4).what(what)?;
    for payload in build::image_payloads(machine, disk_bytes, last_output, None) {
        writer.payload(&payload).what(what)?;
    }
    writer.payload(&ImagePayload { kind: KIND.into(), version: VERSION, bytes: own }).what(what)?;
    for &page in &pages {
        writer.page(page as u64, machine.ram().page_bytes(page)).what(what)?;
    }
    let (image, _) = writer.finish().what(what)?;
    baseline.equal(machine)?;
    let image = [&(block_bytes.len() as u64).to_le_bytes()[..], &block_bytes, &image].concat();
    Ok(Delta { image, pages: pages.len(), blocks, damaged })
}

/// Makes a machine and its disks equal to those the delta is of. Says what the delta knows beyond the machine, and how many pages and blocks were replaced.
pub fn apply(machine: &mut Machine, disks: &[Replica], delta: &[u8]) -> Result<(Extra, usize, usize)> {
    let (blocks, image) = section(delta)?;
    let blocks = mirror::take_blocks(blocks, disks)?;
    let mut reader = ImageReader::open(image).what("the primary's delta cannot be read")?;
    let metadata = reader.metadata().clone();
    let total = machine.ram().flags().pages();
    if metadata.ram_pages != total as u64 {
        return Err(Error::new(format!("the primary's delta is of a machine of {} pages, not {total}", metadata.ram_pages)));
    }
    let mut payloads = Vec::new();
    let mut present = PageSet::none(total);
    while let Some(item) = reader.next_item().what("the primary's delta cannot be used")? {
        match item {
            ImageItem::Payload(payload) => payloads.push(payload),
            ImageItem::Pages(pages) => {
                for (number, bytes) in pages.iter() {
                    // The reader has checked the number.
                    present.insert(number as usize);
                    machine.write_ram_page(number as usize, bytes);
                }
            }
        }
    }
    let own = payloads.iter().position(|p| p.kind == KIND);
    let own = payloads.swap_remove(own.ok_or_else(|| Error::new("the primary's delta does not say which pages it is of"))?);
    if own.version != VERSION {
        return Err(Error::new(format!("the primary's delta has version {}, this build reads {VERSION}", own.version)));
    }
    let own: Own = minicbor::decode(&own.bytes).what("the primary's delta cannot be read")?;
    let extra = build::take_extra(&mut payloads)?;
    let (numbers, _) = own.pages.as_chunks::<4>();
    for number in numbers.iter().map(|bytes| u32::from_le_bytes(*bytes) as usize) {
        if number >= total {
            return Err(Error::new(format!("the primary's delta replaces page {number}; there are {total}")));
        }
        if !present.contains(number) {
            machine.write_ram_page(number, &[0; PAGE_SIZE as usize]);
        }
    }
    let payloads = payloads.into_iter().map(|p| Payload { kind: p.kind, version: p.version, bytes: p.bytes });
    machine.restore(payloads.collect()).what("the primary's delta does not fit this build")?;
    machine.drop_caches();
    let differs = machine.digest().differences(&own.digest);
    if !differs.is_empty() {
        return Err(Error::new(format!("after the resync the machine still differs in {}", differs.join(", "))));
    }
    Ok((extra, numbers.len(), blocks))
}

// ---- outputs on the wire ----

/// Outputs with their numbers.
pub type NumberedOutputs = Vec<(OutputId, Output)>;

/// Bytes before an output's own: number, kind, card, segment size, length.
const OUTPUT_HEAD_BYTES: usize = 8 + 1 + 1 + 2 + 4;

/// Appends an output with a number of the caller's.
pub fn put_output(number: u64, output: &Output, to: &mut Vec<u8>) {
    let (kind, nic, segment_size, bytes) = match output {
        Output::NetTx { nic, frame } => (1, *nic, 0, frame),
        Output::NetTxGso { nic, frame, segment_size } => (2, *nic, *segment_size, frame),
        Output::Serial(bytes) => (3, 0, 0, bytes),
        Output::Console(bytes) => (4, 0, 0, bytes),
        Output::DiskWrite { disk, offset, data } => (5, *disk, 0, &[&offset.to_le_bytes()[..], data].concat()),
        Output::DiskFlush { disk, request } => (6, *disk, 0, &request.to_le_bytes().to_vec()),
    };
    to.extend(number.to_le_bytes());
    to.extend([kind, nic]);
    to.extend(segment_size.to_le_bytes());
    to.extend((bytes.len() as u32).to_le_bytes());
    to.extend(bytes);
}

/// The outputs that were put.
pub fn take_outputs(mut bytes: &[u8]) -> Result<NumberedOutputs> {
    let cut = || Error::new("the data of an output is cut off");
    let mut outputs = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<OUTPUT_HEAD_BYTES>().ok_or_else(cut)?;
        let number = u64::from_le_bytes(std::array::from_fn(|i| head[i]));
        let (nic, segment_size) = (head[9], u16::from_le_bytes([head[10], head[11]]));
        let length = u32::from_le_bytes([head[12], head[13], head[14], head[15]]) as usize;
        let own = rest.get(..length).ok_or_else(cut)?.to_vec();
        bytes = &rest[length..];
        outputs.push((
            number,
            match head[8] {
                1 => Output::NetTx { nic, frame: own },
                2 => Output::NetTxGso { nic, frame: own, segment_size },
                3 => Output::Serial(own),
                4 => Output::Console(own),
                5 | 6 => {
                    let (number, data) = own.split_first_chunk::<8>().ok_or_else(cut)?;
                    let number = u64::from_le_bytes(*number);
                    match head[8] {
                        5 => Output::DiskWrite { disk: nic, offset: number, data: data.to_vec() },
                        _ if data.is_empty() => Output::DiskFlush { disk: nic, request: number },
                        _ => return Err(Error::new("a flush has data")),
                    }
                }
                kind => return Err(Error::new(format!("an output is of the unknown kind {kind}"))),
            },
        ));
    }
    Ok(outputs)
}

/// A delta with the data of outputs that may not have left.
pub fn with_outputs<'a>(outputs: impl Iterator<Item = (OutputId, &'a Output)>, image: &[u8]) -> Vec<u8> {
    let mut section = Vec::new();
    outputs.for_each(|(id, output)| put_output(id, output, &mut section));
    [&(section.len() as u64).to_le_bytes()[..], &section, image].concat()
}

/// The two parts of a delta.
pub fn split(delta: &[u8]) -> Result<(NumberedOutputs, &[u8])> {
    let (outputs, rest) = section(delta)?;
    Ok((take_outputs(outputs)?, rest))
}

/// A section, which begins with its length, and what follows it.
fn section(delta: &[u8]) -> Result<(&[u8], &[u8])> {
    let cut = || Error::new("the primary's delta is cut off");
    let (length, rest) = delta.split_first_chunk::<8>().ok_or_else(cut)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| cut())?;
    rest.split_at_checked(length).ok_or_else(cut)
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinstep_machine::Config;
    use twinstep_machine::faults::Bit;

    fn machine() -> Machine {
        let mut machine = Machine::new(Config { ram_mib: 64, ..Config::default() }, Vec::new()).unwrap();
        for page in 0..200 {
            machine.write_ram_page(page, &[page as u8; 4096]);
        }
        machine
    }

    /// Two equal machines, and what each remembers.
    fn pair() -> [(Machine, Baseline); 2] {
        std::array::from_fn(|_| {
            let mut machine = machine();
            machine.digest();
            let baseline = Baseline::new(&mut machine, Vec::new()).unwrap();
            (machine, baseline)
        })
    }

    fn resync(pair: &mut [(Machine, Baseline); 2]) -> (Delta, usize) {
        let [(primary, ours), (secondary, theirs)] = pair;
        let list = changes(secondary, theirs).unwrap().list;
        let delta = delta(primary, ours, &list, &[], 5, true).unwrap();
        let (extra, pages, _) = apply(secondary, &theirs.disks, &delta.image).unwrap();
        theirs.equal(secondary).unwrap();
        assert_eq!(extra.last_output, 5);
        assert!(primary.digest().differences(&secondary.digest()).is_empty());
        (delta, pages)
    }

    #[test]
    fn only_what_differs_travels() {
        let mut pair = pair();
        // Both write the same; one writes alone; both write differently; one writes zeroes.
        for (machine, _) in &mut pair {
            machine.write_ram_page(3, &[9; 4096]);
        }
        pair[0].0.write_ram_page(4, &[1; 4096]);
        pair[1].0.write_ram_page(5, &[1; 4096]);
        pair[0].0.write_ram_page(6, &[1; 4096]);
        pair[1].0.write_ram_page(6, &[2; 4096]);
        pair[0].0.write_ram_page(7, &[0; 4096]);
        let (delta, pages) = resync(&mut pair);
        assert_eq!((delta.pages, pages), (4, 4));
        assert_eq!(resync(&mut pair).1, 0, "now they are equal");
    }

    #[test]
    fn blocks_that_differ_travel_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut pair = pair();
        for (side, (machine, baseline)) in pair.iter_mut().enumerate() {
            let disk = Replica::create(&dir.path().join(format!("{side}.img")), None, 1 << 20).unwrap();
            *baseline = Baseline::new(machine, vec![disk]).unwrap();
        }
        let write = |pair: &[(Machine, Baseline); 2], side: usize, block: usize, byte: u8| {
            pair[side].1.disks[0].write_block(block, &[byte; 65536]).unwrap();
        };
        // Both alike; each alone; both differently.
        (0..2).for_each(|side| write(&pair, side, 1, 9));
        write(&pair, 0, 2, 9);
        write(&pair, 1, 3, 9);
        (0..2).for_each(|side| write(&pair, side, 4, side as u8 + 1));
        assert_eq!(resync(&mut pair).0.blocks, 3);
        for block in 0..16 {
            let [ours, theirs] = pair.each_ref().map(|(_, baseline)| baseline.disks[0].read_block(block).unwrap());
            assert!(ours == theirs, "block {block}");
        }
        assert_eq!(resync(&mut pair).0.blocks, 0, "now they are equal");
    }

    #[test]
    fn bits_that_flipped_are_found_and_whose_they_are() {
        let mut pair = pair();
        assert!(pair[1].0.flip(Bit::Ram(9 * 4096, 0)));
        let found = changes(&mut pair[1].0, &mut Baseline::new(&mut machine(), Vec::new()).unwrap()).unwrap();
        assert_eq!((found.damaged, found.list.len()), (vec![9], 4 + lists::ENTRY_BYTES));
        let mut pair = self::pair();
        assert!(pair[0].0.flip(Bit::Ram(9 * 4096, 0)) && pair[1].0.flip(Bit::Ram(10 * 4096, 0)));
        let (delta, pages) = resync(&mut pair);
        assert_eq!((delta.damaged, pages), (vec![9], 2));
    }

    #[test]
    fn what_was_agreed_upon_is_forgotten() {
        let [(mut machine, mut baseline), _] = pair();
        machine.write_ram_page(3, &[1; 4096]);
        baseline.mark(&mut machine);
        machine.write_ram_page(4, &[1; 4096]);
        assert_eq!(baseline.changed(&mut machine).iter().collect::<Vec<_>>(), [3, 4]);
        machine.write_ram_page(4, &[1; 4096]);
        baseline.agreed(machine.position());
        assert_eq!(baseline.changed(&mut machine).iter().collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn outputs_survive_the_wire_and_nonsense_does_not() {
        let outputs = vec![
            (7, Output::NetTx { nic: 1, frame: vec![1; 60] }),
            (8, Output::NetTxGso { nic: 0, frame: vec![2; 3000], segment_size: 1448 }),
            (9, Output::Serial(b"x".to_vec())),
            (10, Output::Console(Vec::new())),
            (11, Output::DiskWrite { disk: 1, offset: 1 << 40, data: vec![3; 512] }),
            (12, Output::DiskFlush { disk: 1, request: 9 }),
        ];
        let delta = with_outputs(outputs.iter().map(|(id, output)| (*id, output)), b"image");
        let (found, image) = split(&delta).unwrap();
        assert_eq!((found, image), (outputs, &b"image"[..]));
        for cut in 0..delta.len() - 5 {
            assert!(split(&delta[..cut]).is_err(), "{cut}");
        }
        let mut other = delta.clone();
        other[16] = 9;
        assert!(split(&other).unwrap_err().to_string().contains("unknown kind 9"));
        other[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(split(&other).is_err());
    }

    #[test]
    fn lists_and_deltas_of_strangers_are_refused() {
        let [(mut primary, mut ours), (mut secondary, _)] = pair();
        let mut list = [1u32.to_le_bytes(), u32::MAX.to_le_bytes()].concat();
        list.extend([0; 16]);
        let refused = delta(&mut primary, &mut ours, &list, &[], 0, true).unwrap_err().to_string();
        assert!(refused.contains("has changed; there are 16384"), "{refused}");
        assert!(delta(&mut primary, &mut ours, &list[..23], &[], 0, true).unwrap_err().to_string().contains("cut off"));
        // Something nobody told of differs: the digest finds it.
        secondary.write_ram_page(77, &[3; 4096]);
        let delta = delta(&mut primary, &mut ours, &[0; 4], &[], 0, true).unwrap();
        let refused = apply(&mut secondary, &[], &delta.image).unwrap_err().to_string();
        assert!(refused.contains("still differs in ram"), "{refused}");
        let mut other = Machine::new(Config { ram_mib: 128, ..Config::default() }, Vec::new()).unwrap();
        assert!(apply(&mut other, &[], &delta.image).unwrap_err().to_string().contains("16384 pages, not 32768"));
        assert!(apply(&mut secondary, &[], &delta.image[..100]).is_err());
    }
}
