//! What makes a secondary equal to its primary again: the pages and the blocks of disks in which they differ, and all other state.
//!
//! *In*: on each side, which pages and blocks have changed since both were last known to be equal, and which have changed though nobody wrote to them; outputs that may not
//! have left. *Out*: what differs, a delta, a machine that is the other. *Invariant*: after [`apply`] the digests of the whole state agree, or it
//! fails. What comes from the network is checked before it is used.
//!
//! A delta is the data of outputs and the blocks of disks (each section with its length first), then an image ([`twinstep_log::image`]) that holds the pages to replace, with a payload
//! of its own that lists them, for a page of zeroes has no place in an image. `docs/protocol-pair.md` has the layout.
use minicbor::{Decode, Encode};
use twinstep_log::{Compression, ImageItem, ImagePayload, ImageReader, ImageWriter};
use twinstep_machine::{ConsumerId, Digest, Machine, Output, PAGE_SIZE, PageSet, Payload, Start};
use twinstep_migrate::Eras;
use twinstep_pair::OutputId;
use xxhash_rust::xxh3::xxh3_128;

use super::build::{self, Extra};
use super::mirror;
use super::told::Told;
use crate::disk::Replica;
use crate::error::{Context, Error, Result};

/// Kind of the payload that lists the delta's pages.
const KIND: &str = "resync";
const VERSION: u16 = 1;
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
    /// All pages that have changed.
    pub(super) fn changed(&mut self, machine: &mut Machine) -> PageSet {
        self.changed_since(machine);
        self.eras.all(PageSet::none(machine.ram().flags().pages()))
    }
    /// The pages that have changed since this or [`Self::changed`] was asked last.
    pub(super) fn changed_since(&mut self, machine: &mut Machine) -> PageSet {
        let pages = machine.take_dirty(self.consumer);
        self.eras.mark(machine.position(), pages.clone());
        pages
    }
    /// The blocks that have changed, with their hashes, for each disk in order.
    pub(super) fn changed_blocks(&self) -> Result<Vec<Vec<(usize, u128)>>> {
        let hash = |disk: &Replica, block| Ok((block, xxh3_128(&disk.read_block(block)?)));
        self.disks.iter().map(|disk| disk.changed().iter().map(|block| hash(disk, block)).collect()).collect()
    }
}

/// The pages in which the secondary's RAM differs, given the pages that went bad here. The hashes have to be up to date.
pub(super) fn differing_pages(machine: &mut Machine, baseline: &mut Baseline, told: &Told, damaged: &[usize]) -> PageSet {
    let mut ours = baseline.changed(machine);
    damaged.iter().for_each(|&page| ours.insert(page));
    let mut pages = told.ram.suspects(&ours);
    let hashes = machine.page_hashes();
    let same: Vec<usize> = pages.iter().filter(|&page| told.ram.is(page, hashes[page])).collect();
    same.into_iter().for_each(|page| pages.remove(page));
    pages
}

/// The blocks of the disks in which the two sides differ, as pieces; and how many.
fn differing_blocks(baseline: &Baseline, told: &Told) -> Result<(Vec<u8>, usize)> {
    let (mut bytes, mut number) = (Vec::new(), 0);
    for (index, (disk, theirs)) in baseline.disks.iter().zip(&told.disks).enumerate() {
        for block in theirs.suspects(&disk.changed()).iter() {
            let ours = disk.read_block(block)?;
            if !theirs.is(block, xxh3_128(&ours)) {
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
    /// Pages of the primary that changed though nobody wrote to them.
    pub damaged: Vec<usize>,
    /// How many such the secondary has.
    pub theirs_damaged: u32,
}

/// Makes the delta from a machine that stands still to one of which all was told. Afterwards both count as equal. `wanted` are the pages in which they differ.
pub(super) fn delta(
    machine: &mut Machine,
    baseline: &mut Baseline,
    told: &Told,
    (wanted, damaged): (&PageSet, Vec<usize>),
    disk_bytes: &[u64],
    last_output: u64,
) -> Result<Delta> {
    let (block_bytes, blocks) = differing_blocks(baseline, told)?;
    let digest = machine.digest();
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
    let theirs_damaged = told.damaged.unwrap_or(0);
    Ok(Delta { image, pages: pages.len(), blocks, damaged, theirs_damaged })
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
    use super::super::survey::Survey;
    use super::super::told;
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

    /// What a secondary that stands still tells.
    fn tell(machine: &mut Machine, baseline: &mut Baseline) -> Told {
        let mut survey = Survey::default();
        survey.finish(machine);
        let mut pages = baseline.changed(machine);
        survey.damaged.iter().for_each(|&page| pages.insert(page));
        let pages: Vec<_> = pages.iter().map(|page| (page, machine.page_hashes()[page])).collect();
        let mut told = Told::of(machine, &baseline.disks);
        told::of_pages(&pages).iter().for_each(|message| told.take(message).unwrap());
        for (disk, blocks) in baseline.changed_blocks().unwrap().iter().enumerate() {
            told::of_blocks(disk, blocks).iter().for_each(|message| told.take(message).unwrap());
        }
        told.take(&told::of_search(survey.damaged.len())).unwrap();
        told
    }

    fn resync(pair: &mut [(Machine, Baseline); 2]) -> (Delta, usize) {
        let [(primary, ours), (secondary, theirs)] = pair;
        let told = tell(secondary, theirs);
        let mut survey = Survey::default();
        survey.finish(primary);
        let wanted = differing_pages(primary, ours, &told, &survey.damaged);
        let delta = delta(primary, ours, &told, (&wanted, survey.damaged), &[], 5).unwrap();
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
        let [_, (secondary, theirs)] = &mut pair;
        let found = tell(secondary, theirs);
        let none = PageSet::none(secondary.ram().flags().pages());
        assert_eq!((found.damaged, found.ram.suspects(&none).iter().collect::<Vec<_>>()), (Some(1), vec![9]));
        let mut pair = self::pair();
        assert!(pair[0].0.flip(Bit::Ram(9 * 4096, 0)) && pair[1].0.flip(Bit::Ram(10 * 4096, 0)));
        let (delta, pages) = resync(&mut pair);
        assert_eq!((delta.damaged, delta.theirs_damaged, pages), (vec![9], 1, 2));
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
    fn deltas_of_strangers_are_refused() {
        let [(mut primary, mut ours), (mut secondary, _)] = pair();
        // Something nobody told of differs: the digest finds it.
        secondary.write_ram_page(77, &[3; 4096]);
        let none = PageSet::none(primary.ram().flags().pages());
        let told = Told::of(&primary, &[]);
        let delta = delta(&mut primary, &mut ours, &told, (&none, Vec::new()), &[], 0).unwrap();
        let refused = apply(&mut secondary, &[], &delta.image).unwrap_err().to_string();
        assert!(refused.contains("still differs in ram"), "{refused}");
        let mut other = Machine::new(Config { ram_mib: 128, ..Config::default() }, Vec::new()).unwrap();
        assert!(apply(&mut other, &[], &delta.image).unwrap_err().to_string().contains("16384 pages, not 32768"));
        assert!(apply(&mut secondary, &[], &delta.image[..100]).is_err());
    }
}
