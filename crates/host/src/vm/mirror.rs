//! The mirror: a standby's images are made equal to the primary's while the guest runs.
//!
//! *In*: on the primary, its disks and what the standby says of its own; on the standby, the bytes of the initial copy. *Out*: blocks, in the stream of the initial copy; reports
//! the other way; on the standby, the bytes of the machine's image. *Invariant*: when the stream ends, every block that the two could differ in has been sent as it was at the cut;
//! and no more is under way than the standby has room for.
//!
//! The primary offers its disks. The standby says of each what it has: nothing; an image that was equal at a moment both know, and what changed in it since; or any image, with
//! the hashes of its blocks. The primary sends what differs, then what the guest wrote meanwhile, round by round ([`Mirror`]), also while the machine is copied ([`round`]), and the rest at the cut ([`rest`]). `docs/protocol-pair.md` has the layout.
use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};

use minicbor::{Decode, Encode};
use serde_json::{Map, json};
use twinstep_machine::PageSet;
use twinstep_migrate::packing;
use xxhash_rust::xxh3::xxh3_128;

use super::disks;
use super::pairing::ToPair;
use super::spec::DiskSpec;
use super::turns::Post;
use crate::disk::{Access, BLOCK_BYTES, Baseline, Replica, Writer};
use crate::error::{Context, Error, Result};

/// Bytes before a piece's own: kind, 3 reserved, length.
const PIECE_HEAD_BYTES: usize = 8;
/// The longest offer; a disk takes some 70 bytes of it.
const MAX_OFFER_BYTES: u64 = 64 << 10;
/// The longest block on the wire: numbers, and data that does not compress.
const MAX_BLOCK_BYTES: u64 = 8 + BLOCK_BYTES + BLOCK_BYTES / 128 + 64;
/// What is sent at once.
const BATCH_BYTES: usize = 128 << 10;
/// So many blocks may be left for the cut at most, where they make the guest stand still.
pub const SMALL: usize = 64;
/// Rounds after which the machine is copied whatever is left. The guest is held only then.
const MAX_ROUNDS: u32 = 16;

const OFFER: u8 = 1;
const BLOCK: u8 = 2;
const IMAGE: u8 = 3;
const HAVE: u8 = 1;

const NOTHING: u8 = 0;
const SINCE_BASELINE: u8 = 1;
const HASHES: u8 = 2;
const HASH_BYTES: usize = 16;
const CHANGED_BYTES: usize = 4 + HASH_BYTES;

/// What the primary offers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Offer {
    /// The name of the moment of the cut.
    #[n(0)]
    baseline: Baseline,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    vm: [u8; 16],
    #[n(2)]
    epoch: u64,
    #[n(3)]
    disks: Vec<Offered>,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Offered {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    disk: [u8; 16],
    #[n(1)]
    generation: u64,
    #[n(2)]
    bytes: u64,
    #[n(3)]
    read_only: bool,
    /// Since when the primary knows what changed in it.
    #[n(4)]
    baseline: Option<Baseline>,
    /// It is one image that both sides share: there is nothing to mirror.
    #[n(5)]
    #[cbor(default)]
    shared: bool,
}

fn put_piece(kind: u8, parts: &[&[u8]], to: &mut Vec<u8>) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    to.extend([kind, 0, 0, 0]);
    to.extend((length as u32).to_le_bytes());
    parts.iter().for_each(|part| to.extend(*part));
}

/// Appends a block of a disk.
pub fn put_block(disk: usize, block: usize, bytes: &[u8], to: &mut Vec<u8>) {
    // Zeroes are told by their absence.
    let data = if bytes.iter().all(|byte| *byte == 0) { Vec::new() } else { packing::pack(bytes) };
    put_piece(BLOCK, &[&(disk as u32).to_le_bytes(), &(block as u32).to_le_bytes(), &data], to);
}

/// Puts a block where it belongs: of a disk, its number and its packed data (nothing: zeroes).
fn place_block(replicas: &[Replica], disk: usize, block: usize, data: &[u8]) -> Result<()> {
    let replica = replicas.get(disk).filter(|replica| block < replica.blocks());
    let replica =
        replica.ok_or_else(|| Error::new(format!("the primary sends block {block} of disk {disk}, which is not there")))?;
    let length = replica.block_bytes(block);
    let bytes = match data {
        [] => vec![0; length],
        data => packing::unpack(data, length).what(format!("block {block} of the primary's disk {disk} cannot be used"))?,
    };
    replica.write_block(block, &bytes)
}

/// Disk, block and packed data of a piece.
fn split_block(piece: &[u8]) -> Result<(usize, usize, &[u8])> {
    let (head, data) = piece.split_first_chunk::<8>().ok_or_else(|| Error::new("a block of a disk is cut off"))?;
    let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| head[at + i])) as usize;
    Ok((number(0), number(4), data))
}

/// Is given blocks: disk, number, packed data (nothing: zeroes).
pub type EachBlock<'a> = dyn FnMut(usize, usize, &[u8]) -> Result<()> + 'a;

/// Gives blocks one after the other, as [`put_block`] wrote them, to `each`. An error of `each` ends it.
pub fn each_block(mut bytes: &[u8], each: &mut EachBlock<'_>) -> Result<()> {
    while !bytes.is_empty() {
        let (kind, piece, rest) = split_piece(bytes, MAX_BLOCK_BYTES)?.ok_or_else(|| Error::new("the blocks are cut off"))?;
        if kind != BLOCK {
            return Err(Error::new(format!("a piece of kind {kind} stands where a block should")));
        }
        let (disk, block, data) = split_block(piece)?;
        each(disk, block, data)?;
        bytes = rest;
    }
    Ok(())
}

/// Puts blocks one after the other, as [`put_block`] wrote them, where they belong; says how many.
pub fn take_blocks(bytes: &[u8], replicas: &[Replica]) -> Result<usize> {
    let mut taken = 0;
    each_block(bytes, &mut |disk, block, data| {
        taken += 1;
        place_block(replicas, disk, block, data)
    })?;
    Ok(taken)
}

/// Kind and bytes of a piece, and what follows it.
type Split<'a> = (u8, &'a [u8], &'a [u8]);

/// The first piece; `None` if it is not whole yet.
fn split_piece(bytes: &[u8], longest: u64) -> Result<Option<Split<'_>>> {
    let Some((head, rest)) = bytes.split_first_chunk::<PIECE_HEAD_BYTES>() else { return Ok(None) };
    let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    if head[1..4] != [0; 3] || u64::from(length) > longest {
        return Err(Error::new(format!("a piece of kind {} of {length} bytes is none that this build knows", head[0])));
    }
    Ok(rest.split_at_checked(length as usize).map(|(piece, rest)| (head[0], piece, rest)))
}

/// Pieces from bytes that come as they like.
#[derive(Debug, Default)]
struct Pieces {
    bytes: VecDeque<u8>,
}

impl Pieces {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }
    /// At most so many bytes, as they are.
    fn take(&mut self, most: usize) -> Vec<u8> {
        let most = most.min(self.bytes.len());
        self.bytes.drain(..most).collect()
    }
    /// Takes the head of a piece of image, if that is what comes next: gives its length.
    fn take_image_head(&mut self) -> Option<usize> {
        if self.bytes.len() < PIECE_HEAD_BYTES || self.bytes.range(..4).ne(&[IMAGE, 0, 0, 0]) {
            return None;
        }
        let length = u32::from_le_bytes(std::array::from_fn(|i| self.bytes[4 + i]));
        self.bytes.drain(..PIECE_HEAD_BYTES);
        Some(length as usize)
    }
    fn next(&mut self, longest: u64) -> Result<Option<(u8, Vec<u8>)>> {
        let bytes = self.bytes.make_contiguous();
        let Some((kind, piece, rest)) = split_piece(bytes, longest)? else { return Ok(None) };
        let (piece, used) = (piece.to_vec(), bytes.len() - rest.len());
        self.bytes.drain(..used);
        Ok(Some((kind, piece)))
    }
}

// ---- the primary ----

/// What the thread that makes the mirror is told.
enum ToMirror {
    /// So many bytes more may be sent.
    Room(u64),
    /// The standby's words.
    Report(Vec<u8>),
}

/// The thread that makes a mirror. It ends with its job or when this is dropped.
pub struct Mirror {
    to: Sender<ToMirror>,
    /// Which one it is: what a mirror says that was given up is not listened to.
    pub number: u64,
}

/// What a mirror came to.
#[derive(Debug)]
pub struct Mirrored {
    /// The name of the moment of the cut that may be made now.
    pub baseline: Baseline,
    /// For people.
    pub text: String,
    /// Its figures.
    pub figures: Map<String, serde_json::Value>,
}

impl Mirror {
    /// Begins to mirror these disks of a VM; `to` gets [`ToPair::Copied`], and in the end [`ToPair::Mirrored`].
    pub fn start(disks: Vec<Replica>, writer: Writer, number: u64, to: Post<ToPair>) -> Result<Self> {
        let (sender, inbox) = channel();
        // Before anything is read: what is written from here on is sent again. Whoever gives the mirror up ends this.
        disks.iter().for_each(|disk| disk.begin_mirror(number));
        let mut maker = Maker {
            disks,
            inbox,
            to: to.clone(),
            number,
            room: 0,
            reports: Pieces::default(),
            haves: VecDeque::new(),
            sent: 0,
            out: Vec::new(),
            blocks: 0,
            looked_at: 0,
        };
        let run = move || {
            let outcome = maker.run(writer);
            // A pair that has ended wants nothing.
            let _ = to.send(ToPair::Mirrored { number, outcome: outcome.map_err(|e| e.to_string()) });
        };
        std::thread::Builder::new().name("mirror".into()).spawn(run).what("cannot start a thread")?;
        Ok(Self { to: sender, number })
    }
    /// So many bytes more may be sent.
    pub fn room(&self, bytes: u64) {
        // It may have done all it had to do.
        let _ = self.to.send(ToMirror::Room(bytes));
    }
    /// The standby says something.
    pub fn report(&self, bytes: Vec<u8>) {
        let _ = self.to.send(ToMirror::Report(bytes));
    }
}

struct Maker {
    disks: Vec<Replica>,
    inbox: Receiver<ToMirror>,
    to: Post<ToPair>,
    number: u64,
    room: u64,
    reports: Pieces,
    haves: VecDeque<Vec<u8>>,
    /// Bytes of pieces sent.
    sent: u64,
    out: Vec<u8>,
    blocks: usize,
    looked_at: usize,
}

/// What a standby has of a disk: blocks to look at, with the hashes that are known.
struct Have {
    blocks: PageSet,
    hashes: BTreeMap<usize, u128>,
    /// It is all zero.
    blank: bool,
}

impl Maker {
    fn run(&mut self, writer: Writer) -> Result<Mirrored> {
        let offer = self.offer(writer);
        let bytes = minicbor::to_vec(&offer).expect("encoding into memory cannot fail");
        put_piece(OFFER, &[&bytes], &mut self.out);
        self.send()?;
        let mut total = 0;
        for (index, disk) in self.disks.clone().iter().enumerate() {
            total += disk.blocks();
            let have = self.have(index, disk, offer.disks[index].baseline)?;
            self.looked_at += have.blocks.len();
            for block in have.blocks.iter() {
                let bytes = disk.read_block(block)?;
                let same = match have.hashes.get(&block) {
                    Some(hash) => *hash == xxh3_128(&bytes),
                    None => have.blank && bytes.iter().all(|byte| *byte == 0),
                };
                if !same {
                    self.put(index, block, &bytes)?;
                }
            }
        }
        let mut rounds = 1;
        // What was left is what was sent in the round before; if that does not become less it never will, and the copy of the machine has means.
        let (mut before, mut left) = (usize::MAX, unsent(&self.disks, self.number));
        while rounds < MAX_ROUNDS && left > SMALL && left < before {
            for (index, disk) in self.disks.clone().iter().enumerate() {
                let unsent = disk.take_unsent(self.number).ok_or_else(|| Error::new("the mirror is given up"))?;
                for block in unsent.iter() {
                    let bytes = disk.read_block(block)?;
                    self.put(index, block, &bytes)?;
                }
            }
            self.send()?;
            rounds += 1;
            (before, left) = (left, unsent(&self.disks, self.number));
        }
        self.send()?;
        // So that the cut has little left to make durable.
        self.disks.iter().try_for_each(Replica::flush)?;
        // From the cut on the standby may go on with the VM without us.
        self.disks.iter().try_for_each(|disk| disk.protected(true))?;
        let figures = Map::from_iter([
            ("blocks".to_owned(), json!(self.blocks)),
            ("looked_at".to_owned(), json!(self.looked_at)),
            ("of".to_owned(), json!(total)),
            ("bytes".to_owned(), json!(self.sent)),
            ("rounds".to_owned(), json!(rounds)),
        ]);
        let text = format!(
            "the standby's disks are mirrored: {} of {total} blocks of 64 KiB sent ({} KiB on the wire), {} compared, {rounds} rounds",
            self.blocks,
            self.sent.div_ceil(1024),
            self.looked_at
        );
        Ok(Mirrored { baseline: offer.baseline, text, figures })
    }

    fn offer(&self, writer: Writer) -> Offer {
        let offered = |disk: &Replica| {
            let state = disk.state();
            Offered {
                disk: state.as_ref().map_or([0; 16], |state| state.disk),
                generation: state.as_ref().map_or(0, |state| state.generation),
                bytes: disk.size(),
                read_only: disk.access() == Access::ReadOnly,
                baseline: state.and_then(|state| state.baseline),
                shared: disk.shared().is_some(),
            }
        };
        let disks = self.disks.iter().map(offered).collect();
        Offer { baseline: Baseline(crate::identity::random_id()), vm: writer.vm, epoch: writer.epoch, disks }
    }

    fn put(&mut self, disk: usize, block: usize, bytes: &[u8]) -> Result<()> {
        self.blocks += 1;
        put_block(disk, block, bytes, &mut self.out);
        if self.out.len() >= BATCH_BYTES { self.send() } else { Ok(()) }
    }

    /// Sends what is put together, once there is room for it.
    fn send(&mut self) -> Result<()> {
        let length = self.out.len() as u64;
        while length > self.room {
            self.listen()?;
        }
        self.room -= length;
        self.sent += length;
        let bytes = std::mem::take(&mut self.out);
        let copied = ToPair::Copied { number: self.number, bytes };
        self.to.send(copied).map_err(|_| Error::new("the pair has ended"))
    }

    fn listen(&mut self) -> Result<()> {
        match self.inbox.recv() {
            Ok(ToMirror::Room(bytes)) => self.room += bytes,
            Ok(ToMirror::Report(bytes)) => self.reports.push(&bytes),
            Err(_) => return Err(Error::new("the standby is lost")),
        }
        let most = self.disks.iter().map(|disk| disk.blocks() as u64 * CHANGED_BYTES as u64).max().unwrap_or(0) + 8;
        while let Some((kind, piece)) = self.reports.next(most)? {
            match kind {
                HAVE if self.haves.len() < self.disks.len() => self.haves.push_back(piece),
                kind => return Err(Error::new(format!("the standby reports something of kind {kind} that makes no sense"))),
            }
        }
        Ok(())
    }

    fn have(&mut self, index: usize, disk: &Replica, baseline: Option<Baseline>) -> Result<Have> {
        let report = loop {
            match self.haves.pop_front() {
                Some(report) => break report,
                None => self.listen()?,
            }
        };
        let wrong = || Error::new(format!("what the standby says of its disk {index} makes no sense"));
        let (head, rest) = report.split_first_chunk::<8>().ok_or_else(wrong)?;
        if head[..4] != (index as u32).to_le_bytes() || head[5..] != [0; 3] {
            return Err(wrong());
        }
        let hash = |bytes: &[u8]| u128::from_le_bytes(std::array::from_fn(|i| bytes[i]));
        let mut blocks = PageSet::none(disk.blocks());
        let mut hashes = BTreeMap::new();
        let all = |blocks: &mut PageSet| (0..disk.blocks()).for_each(|block| blocks.insert(block));
        match head[4] {
            NOTHING if rest.is_empty() => all(&mut blocks),
            HASHES if rest.len() == disk.blocks() * HASH_BYTES => {
                all(&mut blocks);
                hashes.extend(rest.chunks(HASH_BYTES).map(hash).enumerate());
            }
            SINCE_BASELINE if rest.len().is_multiple_of(CHANGED_BYTES) => {
                for entry in rest.chunks(CHANGED_BYTES) {
                    let block = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) as usize;
                    if block >= disk.blocks() {
                        return Err(wrong());
                    }
                    hashes.insert(block, hash(&entry[4..]));
                    blocks.insert(block);
                }
                // What was written here since it was asked for is sent in the next round.
                blocks.join(&disk.changed_since(baseline).ok_or_else(wrong)?);
            }
            _ => return Err(wrong()),
        }
        Ok(Have { blocks, hashes, blank: head[4] == NOTHING })
    }
}

/// Blocks that are written and not sent by this mirror.
pub fn unsent(replicas: &[Replica], mirror: u64) -> usize {
    replicas.iter().map(|disk| disk.unsent(mirror)).sum()
}

/// A round while the machine is copied: what the guest wrote since it was sent by this mirror goes to `send`, in pieces of some batches. Says how many blocks that were.
/// An error of `send` ends it.
pub fn round(replicas: &[Replica], mirror: u64, send: &mut dyn FnMut(Vec<u8>) -> Result<()>) -> Result<usize> {
    let (mut bytes, mut blocks) = (Vec::new(), 0);
    for (index, disk) in replicas.iter().enumerate() {
        let unsent = disk.take_unsent(mirror).ok_or_else(|| Error::new("the mirror is given up"))?;
        for block in unsent.iter() {
            put_block(index, block, &disk.read_block(block)?, &mut bytes);
            blocks += 1;
            if bytes.len() >= BATCH_BYTES {
                send(std::mem::take(&mut bytes))?;
            }
        }
        // So that the cut has little left to make durable.
        disk.flush()?;
    }
    send(bytes)?;
    Ok(blocks)
}

/// The rest of a mirror, at the cut: what the guest wrote since it was sent, as pieces. The machine must stand still; from here on both
/// sides' disks are equal. `None` if the mirror was given up.
pub fn rest(replicas: &[Replica], mirror: u64, baseline: Baseline) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    for (index, disk) in replicas.iter().enumerate() {
        let Some(unsent) = disk.take_unsent(mirror) else { return Ok(None) };
        for block in unsent.iter() {
            put_block(index, block, &disk.read_block(block)?, &mut bytes);
        }
        disk.flush()?;
        disk.end_mirror(mirror);
        disk.equal(Some(baseline))?;
    }
    Ok(Some(bytes))
}

/// What stands before so many bytes of the machine's image.
///
/// # Panics
/// If that is 4 GiB or more.
pub fn image_head(bytes: usize) -> Vec<u8> {
    let length = u32::try_from(bytes).expect("the image comes in parts");
    [&[IMAGE, 0, 0, 0][..], &length.to_le_bytes()].concat()
}

// ---- the standby ----

/// Where bytes of the machine's image go, with its disks.
pub type ImageSink<'a> = dyn FnMut(&[u8], &[Replica]) -> Result<()> + 'a;

/// The standby's end: images that become the primary's.
pub struct Target {
    specs: Vec<DiskSpec>,
    /// Also images that are newer, or of another disk.
    force: bool,
    owner: [u8; 16],
    pieces: Pieces,
    replicas: Vec<Replica>,
    baseline: Option<Baseline>,
    /// Bytes of the image that are still to come of the piece under way.
    image_left: usize,
    /// The machine has begun to come.
    machine: bool,
}

impl Target {
    /// Images where these specs say, for a process of this identity.
    pub fn new(specs: Vec<DiskSpec>, force: bool, owner: [u8; 16]) -> Self {
        let (replicas, pieces) = (Vec::new(), Pieces::default());
        Self { specs, force, owner, pieces, replicas, baseline: None, image_left: 0, machine: false }
    }

    /// Takes the next bytes of the initial copy; gives what the primary is to be told. Bytes of the machine's image go on to `image`, with its disks.
    pub fn take(&mut self, bytes: &[u8], image: &mut ImageSink<'_>) -> Result<Vec<u8>> {
        let mut report = Vec::new();
        self.pieces.push(bytes);
        loop {
            if self.image_left > 0 {
                let part = self.pieces.take(self.image_left);
                if part.is_empty() {
                    break;
                }
                self.image_left -= part.len();
                image(&part, &self.replicas)?;
                continue;
            }
            if let Some(length) = self.pieces.take_image_head() {
                disks::check_number(self.specs.len(), self.replicas.len())?;
                (self.image_left, self.machine) = (length, true);
                continue;
            }
            let Some((kind, piece)) = self.pieces.next(MAX_OFFER_BYTES.max(MAX_BLOCK_BYTES))? else { break };
            match kind {
                OFFER if self.baseline.is_none() && !self.machine => self.open(&piece, &mut report)?,
                BLOCK => {
                    let (disk, block, data) = split_block(&piece)?;
                    place_block(&self.replicas, disk, block, data)?;
                }
                kind => return Err(Error::new(format!("the primary's copy has a piece of kind {kind} that makes no sense"))),
            }
        }
        Ok(report)
    }

    fn open(&mut self, offer: &[u8], report: &mut Vec<u8>) -> Result<()> {
        let offer: Offer = minicbor::decode(offer).what("the primary's offer of disks cannot be read")?;
        disks::check_number(self.specs.len(), offer.disks.len())?;
        self.baseline = Some(offer.baseline);
        let writer = Writer { vm: offer.vm, epoch: offer.epoch, owner: self.owner };
        for (index, (spec, offered)) in self.specs.iter().zip(&offer.disks).enumerate() {
            let (replica, blank) = open_replica(spec, offered, self.force)?;
            let changed = replica.changed_since(offered.baseline);
            if !offered.read_only {
                replica.copying(offered.disk, offered.generation, writer)?;
            }
            let how = match &changed {
                _ if blank => NOTHING,
                Some(_) => SINCE_BASELINE,
                None => HASHES,
            };
            let mut entries = Vec::new();
            match (&changed, blank) {
                (_, true) => {}
                (Some(changed), _) => {
                    for block in changed.iter() {
                        entries.extend((block as u32).to_le_bytes());
                        entries.extend(xxh3_128(&replica.read_block(block)?).to_le_bytes());
                    }
                }
                (None, _) => {
                    for block in 0..replica.blocks() {
                        entries.extend(xxh3_128(&replica.read_block(block)?).to_le_bytes());
                    }
                }
            }
            let head = [&(index as u32).to_le_bytes()[..], &[how, 0, 0, 0]].concat();
            put_piece(HAVE, &[&head, &entries], report);
            self.replicas.push(replica);
        }
        Ok(())
    }

    /// The copy is complete: the images are the primary's, and follow them.
    pub fn finish(&mut self) -> Result<()> {
        if self.image_left > 0 || !self.pieces.bytes.is_empty() {
            return Err(Error::new("the primary's copy is cut off"));
        }
        for replica in &self.replicas {
            replica.flush()?;
            replica.equal(self.baseline)?;
            replica.following()?;
        }
        Ok(())
    }

    /// The images.
    pub fn replicas(&self) -> &[Replica] {
        &self.replicas
    }
}

/// Opens the image that becomes a replica of the offered disk, or makes it. Says whether it is new.
fn open_replica(spec: &DiskSpec, offered: &Offered, force: bool) -> Result<(Replica, bool)> {
    if spec.shared != offered.shared {
        let (here, there) = if spec.shared { ("shared", "not") } else { ("not shared", "shared") };
        return Err(Error::new(format!("the disk {} is {here} here, and at the primary it is {there}", spec.path.display()))
            .next("say share=on on both hosts, or on none"));
    }
    if spec.shared {
        let replica = Replica::of_shared(&spec.path, spec.format)?;
        if replica.size() == offered.bytes {
            return Ok((replica, true));
        }
        let what = format!("{} has {} bytes, the primary's disk {}", spec.path.display(), replica.size(), offered.bytes);
        return Err(Error::new(what).next("name the very same file on both hosts"));
    }
    if spec.read_only && !offered.read_only {
        return Err(Error::new(format!("the primary writes to the disk that is {} here, read-only", spec.path.display()))
            .next("start the standby without ,ro for it"));
    }
    if !spec.path.exists() {
        return Ok((Replica::create(&spec.path, spec.format, offered.bytes)?, true));
    }
    let replica = Replica::open(&spec.path, spec.format, spec.access())?;
    if replica.size() != offered.bytes {
        return Err(Error::new(format!(
            "{} has {} bytes, the primary's disk {}",
            spec.path.display(),
            replica.size(),
            offered.bytes
        ))
        .next("give the standby another path, or remove that image: one that is not there is made"));
    }
    if let Some(state) = replica.state().filter(|_| !force && !offered.read_only) {
        let refuse = |why: String| {
            Err(Error::new(format!("{} is not overwritten with the primary's disk", spec.path.display())).because(why).next(
                "start the VM on this host if this image is the right one; --force-stale-disk at the standby overwrites it",
            ))
        };
        if state.disk != offered.disk {
            return refuse("it is a replica of another disk".into());
        }
        if state.generation > offered.generation {
            return refuse(format!("it is newer: generation {} here, {} there", state.generation, offered.generation));
        }
    }
    Ok((replica, false))
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
