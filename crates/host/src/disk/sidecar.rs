//! The sidecar of an image, `IMAGE.twinstep`: whose disk it is, how new it is, and which blocks changed since it was last known to equal its twin.
//!
//! *In*: changes of role, blocks about to be written. *Out*: the same at the next start. *Invariant*: a block's bit is in the file before the block changes; a state is
//! either the old one or the new one, whatever is interrupted. What may be wrong (the host went down, somebody else wrote to the image) is forgotten at loading: then the images are
//! compared by hashes. The layout is in `docs/formats/sidecar.md`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use minicbor::{Decode, Encode};
use twinstep_machine::PageSet;

use crate::error::{Context, Error, Result};

const MAGIC: [u8; 8] = *b"TWSTDISK";
const VERSION: u16 = 1;
/// Bytes of one of the two slots for the state.
const SLOT_BYTES: usize = 4096;
const HEAD_BYTES: usize = 32;
/// Where the bits begin.
const BITS_AT: u64 = 2 * SLOT_BYTES as u64;

/// What the side that has the image open does with it; it stays so if that side dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Role {
    /// Nobody has it open: it was closed in good order.
    #[n(0)]
    Closed,
    /// A VM writes to it, and nobody else can have gone on with that VM.
    #[n(1)]
    Alone,
    /// A VM writes to it that another host may go on with.
    #[n(2)]
    Protected,
    /// A standby keeps it equal to its primary's, a little later.
    #[n(3)]
    Following,
    /// A standby is being sent it: it is a mixture.
    #[n(4)]
    Copying,
    /// Several hosts can reach it, and this VM, epoch and process is the one that writes to it.
    #[n(5)]
    Shared,
}

/// What is remembered of an image besides its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct State {
    /// Which disk it is, the same for all replicas; random.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub disk: [u8; 16],
    /// Goes up whenever somebody begins to write on his own: a start, a survivor going on.
    #[n(1)]
    pub generation: u64,
    /// Bytes of the disk.
    #[n(2)]
    pub bytes: u64,
    /// What is done with it.
    #[n(3)]
    pub role: Role,
    /// Which life of which VM wrote to it last.
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    pub vm: [u8; 16],
    /// In which epoch of that life.
    #[n(5)]
    pub epoch: u64,
    /// Which process.
    #[n(6)]
    #[cbor(with = "minicbor::bytes")]
    pub owner: [u8; 16],
    /// The moment since which the bits are kept: both replicas were equal then, and both have this name for it. `None`: there is no such moment.
    #[n(7)]
    pub baseline: Option<Baseline>,
    /// The boot of the host at which this was written.
    #[n(8)]
    pub boot: String,
    /// When the image's file was last changed, in ns since 1970, if it is closed.
    #[n(9)]
    pub changed_ns: i64,
}

impl State {
    /// That of a disk of so many bytes of which nothing has happened yet.
    pub fn fresh(disk: [u8; 16], bytes: u64) -> Self {
        Self {
            disk,
            generation: 0,
            bytes,
            role: Role::Closed,
            vm: [0; 16],
            epoch: 0,
            owner: [0; 16],
            baseline: None,
            boot: String::new(),
            changed_ns: 0,
        }
    }
}

/// The name of a moment at which two replicas were equal; random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct Baseline(
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub [u8; 16],
);

/// An open sidecar.
#[derive(Debug)]
pub(super) struct Sidecar {
    file: File,
    path: PathBuf,
    image: PathBuf,
    state: State,
    sequence: u64,
    changed: PageSet,
    blocks: usize,
}

fn path_of(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".twinstep");
    name.into()
}

/// This boot of this host.
fn boot() -> String {
    // Without it every crash counts as one of the host.
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

fn changed_ns(image: &Path) -> Result<i64> {
    let metadata = std::fs::metadata(image).at("look at", image)?;
    Ok(metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()))
}

impl Sidecar {
    /// Opens the sidecar of an image of so many bytes and blocks, if it has one.
    pub(super) fn load(image: &Path, bytes: u64, blocks: usize) -> Result<Option<Self>> {
        let path = path_of(image);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => {
                return Err(Error::new(format!("cannot open {}, which belongs to the disk image", path.display())).because(e));
            }
        };
        let unusable = |why: String| {
            Error::new(format!("{} cannot be used", path.display()))
                .because(why)
                .next("use the Twinstep that wrote it; or remove it: then nothing is known of the image, and it counts as new")
        };
        let (sequence, mut state) = newest_state(&file).map_err(unusable)?;
        if state.bytes != bytes {
            return Err(unusable(format!("it is of a disk of {} bytes, the image has {bytes}", state.bytes)));
        }
        let sound = match state.role {
            // Then somebody else has written to it.
            Role::Closed => changed_ns(image)? == state.changed_ns,
            // Bits may have been lost that were set before their blocks were written.
            _ => state.boot == boot(),
        };
        let mut changed = PageSet::none(blocks);
        let mut bits = vec![0; blocks.div_ceil(8)];
        if !sound || file.read_exact_at(&mut bits, BITS_AT).is_err() {
            state.baseline = None;
        } else {
            (0..blocks).filter(|block| bits[block / 8] >> (block % 8) & 1 != 0).for_each(|block| changed.insert(block));
        }
        Ok(Some(Self { file, path, image: image.to_owned(), state, sequence, changed, blocks }))
    }

    /// Makes a sidecar.
    pub(super) fn create(image: &Path, blocks: usize, state: State) -> Result<Self> {
        let path = path_of(image);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.at("create", &path)?;
        file.set_len(BITS_AT + blocks.div_ceil(8) as u64).at("make room for", &path)?;
        let changed = PageSet::none(blocks);
        let mut sidecar = Self { file, path, image: image.to_owned(), state: state.clone(), sequence: 0, changed, blocks };
        sidecar.store(state)?;
        Ok(sidecar)
    }

    /// Takes in what another process may have stored.
    pub(super) fn reload(&mut self) -> Result<()> {
        let found = newest_state(&self.file);
        let found = found.map_err(|why| Error::new(format!("{} cannot be used", self.path.display())).because(why))?;
        (self.sequence, self.state) = found;
        Ok(())
    }

    /// Takes the lock under which several processes use it; false if another one has it.
    pub(super) fn try_lock(&self) -> Result<bool> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(std::fs::TryLockError::WouldBlock) => Ok(false),
            Err(std::fs::TryLockError::Error(e)) => Err(e).at("lock", &self.path),
        }
    }

    /// Gives the lock back.
    pub(super) fn unlock(&self) -> Result<()> {
        self.file.unlock().at("unlock", &self.path)
    }

    pub(super) fn state(&self) -> &State {
        &self.state
    }

    /// Replaces the state, durably.
    pub(super) fn store(&mut self, mut state: State) -> Result<()> {
        state.boot = boot();
        state.changed_ns = if state.role == Role::Closed { changed_ns(&self.image)? } else { 0 };
        let sequence = self.sequence + 1;
        let slot = write_slot(sequence, &state);
        let at = sequence % 2 * SLOT_BYTES as u64;
        self.file.write_all_at(&slot, at).and_then(|()| self.file.sync_data()).at("write", &self.path)?;
        (self.sequence, self.state) = (sequence, state);
        Ok(())
    }

    /// From here on changes are remembered as changes since `baseline`.
    pub(super) fn begin(&mut self, state: State) -> Result<()> {
        // In this order: bits of another moment must never count as those of this one.
        let forgotten = State { baseline: None, ..self.state.clone() };
        self.store(forgotten)?;
        self.file.write_all_at(&vec![0; self.blocks.div_ceil(8)], BITS_AT).at("write", &self.path)?;
        self.changed = PageSet::none(self.blocks);
        self.store(state)
    }

    /// These blocks are about to change.
    pub(super) fn mark(&mut self, blocks: std::ops::RangeInclusive<usize>) -> Result<()> {
        if self.state.baseline.is_none() {
            return Ok(());
        }
        for block in blocks {
            if self.changed.contains(block) {
                continue;
            }
            let first = block / 8 * 8;
            let others = (first..(first + 8).min(self.blocks)).filter(|b| *b == block || self.changed.contains(*b));
            let byte = others.fold(0u8, |byte, b| byte | 1 << (b % 8));
            self.file.write_all_at(&[byte], BITS_AT + (block / 8) as u64).at("write", &self.path)?;
            self.changed.insert(block);
        }
        Ok(())
    }

    /// What has changed since the baseline.
    pub(super) fn changed(&self) -> &PageSet {
        &self.changed
    }
}

/// The state in the sound slot that was written last, with its sequence number; or why there is none.
fn newest_state(file: &File) -> std::result::Result<(u64, State), String> {
    let mut newest: Option<(u64, State)> = None;
    let mut why = "it is no sidecar of a disk image".to_owned();
    for slot in 0..2 {
        let mut bytes = [0; SLOT_BYTES];
        if file.read_exact_at(&mut bytes, slot * SLOT_BYTES as u64).is_err() {
            continue;
        }
        match read_slot(&bytes) {
            Ok((sequence, state)) if newest.as_ref().is_none_or(|(n, _)| *n < sequence) => newest = Some((sequence, state)),
            Ok(_) => {}
            Err(e) => why = e,
        }
    }
    newest.ok_or(why)
}

fn write_slot(sequence: u64, state: &State) -> Vec<u8> {
    let body = minicbor::to_vec(state).expect("encoding into memory cannot fail");
    assert!(body.len() <= SLOT_BYTES - HEAD_BYTES, "a state fits its slot");
    let mut slot = Vec::with_capacity(SLOT_BYTES);
    slot.extend(MAGIC);
    slot.extend(VERSION.to_le_bytes());
    slot.extend([0; 2]);
    slot.extend((body.len() as u32).to_le_bytes());
    slot.extend(sequence.to_le_bytes());
    let mut hash = crc32fast::Hasher::new();
    hash.update(&slot);
    hash.update(&body);
    slot.extend(hash.finalize().to_le_bytes());
    slot.extend([0; 4]);
    slot.extend(body);
    slot.resize(SLOT_BYTES, 0);
    slot
}

fn read_slot(slot: &[u8; SLOT_BYTES]) -> std::result::Result<(u64, State), String> {
    let number = |range: std::ops::Range<usize>| slot[range].iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    if slot[..8] != MAGIC {
        return Err("it is no sidecar of a disk image".into());
    }
    if number(8..10) != u64::from(VERSION) {
        return Err(format!("it has version {}, this build knows {VERSION}", number(8..10)));
    }
    let length = number(12..16) as usize;
    let body = slot.get(HEAD_BYTES..HEAD_BYTES + length).ok_or("it is damaged")?;
    let mut hash = crc32fast::Hasher::new();
    hash.update(&slot[..24]);
    hash.update(body);
    if u64::from(hash.finalize()) != number(24..28) {
        return Err("it is damaged".into());
    }
    let state = minicbor::decode(body).map_err(|e| format!("it is damaged: {e}"))?;
    Ok((number(16..24), state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(bytes: u64) -> State {
        State {
            disk: [1; 16],
            generation: 7,
            bytes,
            role: Role::Alone,
            vm: [2; 16],
            epoch: 3,
            owner: [4; 16],
            baseline: Some(Baseline([5; 16])),
            boot: String::new(),
            changed_ns: 0,
        }
    }

    fn image() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        std::fs::write(&image, [0; 512]).unwrap();
        (dir, image)
    }

    fn load(image: &Path) -> Sidecar {
        Sidecar::load(image, 100, 20).unwrap().unwrap()
    }

    #[test]
    fn bits_survive_the_death_of_the_process() {
        let (_dir, image) = image();
        assert!(Sidecar::load(&image, 100, 20).unwrap().is_none());
        let mut sidecar = Sidecar::create(&image, 20, state(100)).unwrap();
        sidecar.mark(3..=4).unwrap();
        sidecar.mark(4..=9).unwrap();
        sidecar.mark(19..=19).unwrap();
        // Nothing is closed here, as after a SIGKILL.
        let found = load(&image);
        assert_eq!(found.changed().iter().collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8, 9, 19]);
        assert_eq!(found.state().generation, 7);
        sidecar.begin(State { baseline: Some(Baseline([6; 16])), ..state(100) }).unwrap();
        sidecar.mark(1..=1).unwrap();
        let found = load(&image);
        assert_eq!((found.changed().iter().collect::<Vec<_>>(), found.state().baseline), (vec![1], Some(Baseline([6; 16]))));
    }

    #[test]
    fn what_may_be_wrong_is_forgotten() {
        let (_dir, image) = image();
        let mut sidecar = Sidecar::create(&image, 20, state(100)).unwrap();
        // The host went down.
        let other = write_slot(9, &State { boot: "another".into(), ..state(100) });
        sidecar.file.write_all_at(&other, SLOT_BYTES as u64).unwrap();
        assert_eq!(load(&image).state().baseline, None);
        sidecar.sequence = 9;
        sidecar.store(State { role: Role::Closed, ..state(100) }).unwrap();
        assert!(load(&image).state().baseline.is_some());
        // Somebody else wrote to it.
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(load(&image).state().baseline, None);
    }

    #[test]
    fn a_torn_state_is_the_one_before_and_a_strange_one_is_refused() {
        let (_dir, image) = image();
        let mut sidecar = Sidecar::create(&image, 20, state(100)).unwrap();
        sidecar.store(State { generation: 8, ..state(100) }).unwrap();
        assert_eq!(load(&image).state().generation, 8);
        sidecar.file.write_all_at(&[9; 3], 40).unwrap();
        assert_eq!(load(&image).state().generation, 7);
        assert!(Sidecar::load(&image, 101, 20).unwrap_err().to_string().contains("the image has 101"));
        sidecar.file.write_all_at(&[2], SLOT_BYTES as u64 + 8).unwrap();
        let refused = Sidecar::load(&image, 100, 20).unwrap_err().to_string();
        assert!(refused.contains("version 2, this build knows 1"), "{refused}");
    }
}
