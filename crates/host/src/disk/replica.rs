//! A replica: an image, and what is remembered of it so that its twin on another host can be made equal to it, and so that nobody starts from a stale one.
//!
//! *In*: the machine's reads, writes and flushes; questions and news from whoever mirrors, resyncs, protects. *Out*: blocks, sets of blocks that changed. *Invariant*: a
//! write is noted in every set before anybody can read its block as unchanged: notes and blocks change under one lock.

use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinstep_machine::{Disk, DiskError, PageSet};
use twinstep_migrate::Eras;
use twinstep_pair::{OwnerId, VmId};

use super::checkpoint::Checkpoint;
use super::limit::WriteLimit;
use super::sidecar::{Baseline, Role, Sidecar, State};
use super::{Access, Format, Image, SharedDisk};
use crate::arbiter::Arbiter;
use crate::error::{Error, Result};
use crate::identity;

/// The unit of what is remembered and sent.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// What changed since the twin was last known to be equal.
#[derive(Debug)]
struct Changes {
    /// Since the last era.
    now: PageSet,
    eras: Eras,
}

#[derive(Debug)]
struct Inner {
    image: Image,
    /// What changed since it was sent, while a mirror is made; and the mirror's number.
    unsent: Option<(u64, PageSet)>,
    changes: Option<Changes>,
    /// What it held when that was asked for.
    checkpoint: Option<Checkpoint>,
    limit: Arc<WriteLimit>,
    sidecar: Option<Sidecar>,
}

/// An image that the machine uses as its disk; its clones are the same one.
#[derive(Debug, Clone)]
pub struct Replica {
    inner: Arc<Mutex<Inner>>,
    limit: Arc<WriteLimit>,
    size: u64,
    /// It is no replica but an image that all sides share: it has no blocks that could differ, and nothing is remembered of it here.
    shared: Option<SharedDisk>,
}

/// Who writes to an image.
#[derive(Debug, Clone, Copy)]
pub struct Writer {
    /// This life of the VM.
    pub vm: [u8; 16],
    /// Its epoch.
    pub epoch: u64,
    /// This process.
    pub owner: [u8; 16],
}

impl Replica {
    /// Opens an image and its sidecar, if it has one.
    pub fn open(path: &Path, format: Option<Format>, access: Access) -> Result<Self> {
        let image = Image::open(path, format, access)?;
        let sidecar = match access {
            Access::ReadOnly => None,
            Access::ReadWrite => Sidecar::load(path, image.size(), blocks_of(image.size()))?,
        };
        Ok(Self::new(image, sidecar))
    }

    /// Makes a new image, all zero.
    pub fn create(path: &Path, format: Option<Format>, size: u64) -> Result<Self> {
        Ok(Self::new(Image::create(path, format, size)?, None))
    }

    fn new(image: Image, sidecar: Option<Sidecar>) -> Self {
        let size = image.size();
        Self::of(Inner::new(image, sidecar), size, None)
    }

    fn of(inner: Inner, size: u64, shared: Option<SharedDisk>) -> Self {
        Self { limit: inner.limit.clone(), inner: Arc::new(Mutex::new(inner)), size, shared }
    }

    /// In the place of a replica, an image that all sides share.
    pub fn of_shared(path: &Path, format: Option<Format>) -> Result<Self> {
        let shared = SharedDisk::open(path, format)?;
        let (size, inner) = (shared.size(), Inner::new(Image::of_shared(path, shared.size()), None));
        Ok(Self::of(inner, size, Some(shared)))
    }

    /// The image that all sides share, if this is one.
    #[must_use]
    pub fn shared(&self) -> Option<&SharedDisk> {
        self.shared.as_ref()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
    /// Blocks of [`BLOCK_BYTES`]; the last may be shorter.
    #[must_use]
    pub fn blocks(&self) -> usize {
        if self.shared.is_some() { 0 } else { blocks_of(self.size) }
    }
    /// Whether it may be written.
    #[must_use]
    pub fn access(&self) -> Access {
        self.lock().image.access()
    }
    /// For messages.
    #[must_use]
    pub fn name(&self) -> String {
        self.lock().image.path().display().to_string()
    }

    // ---- blocks ----

    /// Bytes of a block.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block_bytes(&self, block: usize) -> usize {
        assert!(block < self.blocks(), "there is no block {block}");
        (self.size - block as u64 * BLOCK_BYTES).min(BLOCK_BYTES) as usize
    }
    /// Reads a block.
    pub fn read_block(&self, block: usize) -> Result<Vec<u8>> {
        read_block(&self.lock().image, block)
    }
    /// Replaces a block by what its twin has.
    ///
    /// # Panics
    /// If the length is another.
    pub fn write_block(&self, block: usize, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), self.block_bytes(block), "a block is replaced whole");
        self.lock().write(block as u64 * BLOCK_BYTES, bytes)
    }
    /// Makes everything written durable.
    pub fn flush(&self) -> Result<()> {
        self.lock().image.flush()
    }

    // ---- a mirror ----

    /// From here on, what is written is noted as not sent by the mirror of this number. One that was made before gets nothing any more.
    pub fn begin_mirror(&self, number: u64) {
        self.lock().unsent = Some((number, PageSet::none(self.blocks())));
        self.limit.set(None);
    }
    /// What was written since the last call; `None` if this mirror is not made any more.
    #[must_use]
    pub fn take_unsent(&self, number: u64) -> Option<PageSet> {
        let none = PageSet::none(self.blocks());
        match &mut self.lock().unsent {
            Some((current, unsent)) if *current == number => Some(std::mem::replace(unsent, none)),
            _ => None,
        }
    }
    /// The mirror of this number is not made any more.
    pub fn end_mirror(&self, number: u64) {
        let mut inner = self.lock();
        if inner.unsent.take_if(|(current, _)| *current == number).is_some() {
            self.limit.set(None);
        }
    }
    /// Holds the guest's writes to so many bytes a second, if this mirror is still made.
    pub fn limit_writes(&self, number: u64, bytes_per_s: Option<u64>) {
        if self.lock().unsent.as_ref().is_some_and(|(current, _)| *current == number) {
            self.limit.set(bytes_per_s);
        }
    }
    /// To how many bytes of blocks a second the guest's writes are to be held, if they are.
    #[must_use]
    pub fn write_limit(&self) -> Option<u64> {
        self.limit.get()
    }
    /// Bytes of blocks that have become unsent by mirrors since the image was opened. Never goes back.
    #[must_use]
    pub fn became_unsent(&self) -> u64 {
        self.limit.unsent()
    }
    /// How much [`Self::take_unsent`] would give.
    #[must_use]
    pub fn unsent(&self, number: u64) -> usize {
        self.lock().unsent.as_ref().filter(|(current, _)| *current == number).map_or(0, |(_, unsent)| unsent.len())
    }

    // ---- since the twin was equal ----

    /// The twin is equal now. With a name of this moment it is also remembered in the sidecar, and what changes from here on.
    pub fn equal(&self, baseline: Option<Baseline>) -> Result<()> {
        let none = PageSet::none(self.blocks());
        let mut inner = self.lock();
        inner.changes = Some(Changes { now: none, eras: Eras::default() });
        match (&mut inner.sidecar, baseline) {
            (Some(sidecar), Some(baseline)) => {
                let state = State { baseline: Some(baseline), ..sidecar.state().clone() };
                sidecar.begin(state)
            }
            _ => Ok(()),
        }
    }
    /// An era ends at this position; the twin will say whether it was equal there.
    pub fn mark(&self, position: u64) {
        let none = PageSet::none(self.blocks());
        if let Some(changes) = &mut self.lock().changes {
            changes.eras.mark(position, std::mem::replace(&mut changes.now, none));
        }
    }
    /// The twin was equal at this position.
    pub fn agreed(&self, position: u64) {
        if let Some(changes) = &mut self.lock().changes {
            changes.eras.agreed(position);
        }
    }
    /// What changed since the twin was last known to be equal.
    #[must_use]
    pub fn changed(&self) -> PageSet {
        match &self.lock().changes {
            Some(changes) => changes.eras.all(changes.now.clone()),
            None => PageSet::none(self.blocks()),
        }
    }

    // ---- what it held at a moment ----

    /// From here on it is remembered what the image holds now, in at most so many bytes, and what the machine reads and writes of it. Instead of an earlier moment.
    pub fn keep_checkpoint(&self, max_bytes: usize) {
        if self.shared.is_none() {
            self.lock().checkpoint = Some(Checkpoint::new(self.blocks(), max_bytes));
        }
    }
    /// Nothing of that is wanted any more.
    pub fn drop_checkpoint(&self) {
        self.lock().checkpoint = None;
    }
    /// Bytes that are remembered.
    #[must_use]
    pub fn checkpoint_bytes(&self) -> usize {
        self.lock().checkpoint.as_ref().map_or(0, Checkpoint::bytes)
    }
    /// What the machine has read and written since; `None` if it was too much to remember what was there before.
    #[must_use]
    pub fn touched(&self) -> Option<PageSet> {
        match &self.lock().checkpoint {
            Some(checkpoint) => checkpoint.touched().cloned(),
            None => self.shared.is_some().then(|| PageSet::none(0)),
        }
    }
    /// A block as it was then.
    pub fn read_block_before(&self, block: usize) -> Result<Vec<u8>> {
        let inner = self.lock();
        match inner.checkpoint.as_ref().and_then(|checkpoint| checkpoint.before(block)) {
            Some([]) => Ok(vec![0; self.block_bytes(block)]),
            Some(before) => Ok(before.to_vec()),
            None => read_block(&inner.image, block),
        }
    }

    // ---- the sidecar ----

    /// What the sidecar says.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        self.lock().sidecar.as_ref().map(|sidecar| sidecar.state().clone())
    }
    /// What changed since the sidecar's baseline, if it is the one of this name.
    #[must_use]
    pub fn changed_since(&self, baseline: Option<Baseline>) -> Option<PageSet> {
        let inner = self.lock();
        let sidecar = inner.sidecar.as_ref()?;
        (baseline.is_some() && sidecar.state().baseline == baseline).then(|| sidecar.changed().clone())
    }
    /// Makes the sidecar say something else. One that is missing is made if `anew` says so, with the identity of that disk.
    fn store(&self, anew: Option<[u8; 16]>, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut inner = self.lock();
        if inner.image.access() == Access::ReadOnly {
            return Ok(());
        }
        let inner = &mut *inner;
        match (&mut inner.sidecar, anew) {
            (Some(sidecar), _) => {
                let mut state = sidecar.state().clone();
                change(&mut state);
                sidecar.store(state)
            }
            (none, Some(disk)) => {
                let mut state = State::fresh(disk, inner.image.size());
                change(&mut state);
                *none = Some(Sidecar::create(inner.image.path(), blocks_of(inner.image.size()), state)?);
                Ok(())
            }
            (None, None) => Ok(()),
        }
    }
    /// A VM begins to write on its own. An image that has no sidecar gets one if the VM is to be protected: only then there will be another replica.
    pub fn begin(&self, writer: Writer, protect: bool) -> Result<()> {
        if let Some(shared) = &self.shared {
            return shared.begin(writer);
        }
        self.store(protect.then(identity::random_id), |state| {
            (state.vm, state.epoch, state.owner) = (writer.vm, writer.epoch, writer.owner);
            state.role = Role::Alone;
            state.generation += 1;
        })
    }
    /// Another host may go on with the VM from now on, or no longer.
    pub fn protected(&self, protected: bool) -> Result<()> {
        self.store(None, |state| state.role = if protected { Role::Protected } else { Role::Alone })
    }
    /// This side goes on alone, in this epoch.
    pub fn alone(&self, epoch: u64, owner: Option<[u8; 16]>) -> Result<()> {
        if let Some(shared) = &self.shared {
            return shared.take_over(epoch, owner);
        }
        self.store(None, |state| {
            state.role = Role::Alone;
            state.epoch = epoch;
            state.owner = owner.unwrap_or(state.owner);
            state.generation += 1;
        })
    }
    /// A standby begins to make it a replica of this disk. Without a sidecar nothing was known of it.
    pub fn copying(&self, disk: [u8; 16], generation: u64, writer: Writer) -> Result<()> {
        if let Some(shared) = &self.shared {
            return shared.follow(writer);
        }
        self.store(Some(disk), |state| {
            (state.disk, state.generation) = (disk, generation);
            (state.vm, state.epoch, state.owner) = (writer.vm, writer.epoch, writer.owner);
            state.role = Role::Copying;
        })
    }
    /// It is whole, and follows its primary's.
    pub fn following(&self) -> Result<()> {
        self.store(None, |state| state.role = Role::Following)
    }
    /// Nobody writes any more, and everything is durable.
    pub fn close(&self) -> Result<()> {
        if let Some(shared) = &self.shared {
            return shared.close();
        }
        self.flush()?;
        self.store(None, |state| state.role = Role::Closed)
    }

    /// Refuses an image that may not be the newest of its disk. `arbiter` knows who went on after whom.
    pub fn check_newest(&self, arbiter: Option<&dyn Arbiter>) -> Result<()> {
        let Some(state) = self.state() else { return Ok(()) };
        let name = self.name();
        let stale = |why: String| {
            Err(Error::new(format!("the disk image {name} is not the newest of its disk (generation {})", state.generation))
                .because(why)
                .next("start from the image of the other host; if that one is lost, --force-stale-disk takes this one as it is"))
        };
        match state.role {
            Role::Copying => return stale("it was being copied from another host when that was interrupted".into()),
            Role::Following => {
                return stale("it followed a primary on another host, which was ahead of it when this side ended".into());
            }
            Role::Shared => {
                return stale("several hosts share it, and one of them may be live on it: say share=on".into());
            }
            Role::Closed | Role::Alone | Role::Protected => {}
        }
        let vm = VmId(state.vm).to_string();
        let Some(arbiter) = arbiter else {
            if state.role != Role::Protected {
                return Ok(());
            }
            return Err(Error::new(format!("the disk image {name} may not be the newest of its disk"))
                .because(format!(
                    "the protected VM {vm} wrote to it until this side ended without order, and the other side may have gone on"
                ))
                .next("give --arbiter, which knows; or --force-stale-disk, if the other host's image is lost or older"));
        };
        if state.epoch == 0 {
            return Ok(());
        }
        let next = state.epoch + 1;
        match arbiter.owner(&vm, next) {
            Ok(Some(owner)) if owner != OwnerId(state.owner).to_string() => stale(format!(
                "another side has gone on with the VM {vm} in epoch {next}; this one was written in epoch {}",
                state.epoch
            )),
            Ok(_) => Ok(()),
            Err(why) => Err(Error::new(format!("nobody knows whether the disk image {name} is the newest of its disk"))
                .because(why)
                .next("see that the arbiter can be reached; or --force-stale-disk, if the other host's image is lost or older")),
        }
    }
}

fn read_block(image: &Image, block: usize) -> Result<Vec<u8>> {
    let offset = block as u64 * BLOCK_BYTES;
    let mut bytes = vec![0; image.size().saturating_sub(offset).min(BLOCK_BYTES) as usize];
    image.read_at(offset, &mut bytes)?;
    Ok(bytes)
}

fn blocks_of(bytes: u64) -> usize {
    bytes.div_ceil(BLOCK_BYTES) as usize
}

fn blocks_at(offset: u64, length: usize) -> RangeInclusive<usize> {
    (offset / BLOCK_BYTES) as usize..=((offset + length as u64 - 1) / BLOCK_BYTES) as usize
}

impl Inner {
    fn new(image: Image, sidecar: Option<Sidecar>) -> Self {
        Self { image, unsent: None, changes: None, checkpoint: None, limit: Arc::default(), sidecar }
    }

    /// The machine is about to read or write.
    fn touch(&mut self, offset: u64, length: usize) {
        if let Some(checkpoint) = &mut self.checkpoint
            && length > 0
        {
            checkpoint.touch(blocks_at(offset, length));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let blocks = blocks_at(offset, data.len());
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.keep(blocks.clone(), |block| read_block(&self.image, block));
        }
        if let Some(sidecar) = &mut self.sidecar {
            sidecar.mark(blocks.clone())?;
        }
        for block in blocks {
            if let Some((_, unsent)) = &mut self.unsent
                && !unsent.contains(block)
            {
                unsent.insert(block);
                self.limit.count(BLOCK_BYTES);
            }
            if let Some(changes) = &mut self.changes {
                changes.now.insert(block);
            }
        }
        self.image.write_at(offset, data)
    }
}

fn failed(e: Error) -> DiskError {
    DiskError(e.to_string())
}

impl Disk for Replica {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> std::result::Result<(), DiskError> {
        let mut inner = self.lock();
        inner.touch(offset, data.len());
        inner.image.read_at(offset, data).map_err(failed)
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> std::result::Result<(), DiskError> {
        let mut inner = self.lock();
        inner.touch(offset, data.len());
        inner.write(offset, data).map_err(failed)
    }
    fn flush(&mut self) -> std::result::Result<(), DiskError> {
        self.lock().image.flush().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::{DirectoryArbiter, Verdict};

    const WRITER: Writer = Writer { vm: [1; 16], epoch: 1, owner: [2; 16] };

    struct World {
        dir: tempfile::TempDir,
        arbiter: DirectoryArbiter,
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let arbiter = DirectoryArbiter::open(dir.path()).unwrap();
            Self { dir, arbiter }
        }
        /// Somebody has won an epoch.
        fn won(&self, epoch: u64, owner: u8) {
            let (vm, owner) = (VmId(WRITER.vm).to_string(), OwnerId([owner; 16]).to_string());
            assert_eq!(self.arbiter.claim(&vm, epoch, &owner), Verdict::Won);
        }
        fn disk(&self) -> Replica {
            let disk = Replica::create(&self.dir.path().join("a.img"), None, 1 << 20).unwrap();
            disk.begin(WRITER, true).unwrap();
            disk
        }
        /// What a start from the image says without and with the arbiter, if this side ended now.
        fn starts(&self, disk: &Replica) -> [Option<String>; 2] {
            [None, Some(&self.arbiter as &dyn Arbiter)].map(|arbiter| disk.check_newest(arbiter).err().map(|e| e.to_string()))
        }
    }

    #[test]
    fn an_image_that_nobody_went_on_from_may_start() {
        let world = World::new();
        let disk = world.disk();
        assert_eq!(world.starts(&disk), [None, None], "it was never protected");
        disk.protected(true).unwrap();
        let [without, with] = world.starts(&disk);
        assert!(without.unwrap().contains("give --arbiter"));
        assert_eq!(with, None);
        // It won the epoch itself, and died before it could write that down.
        world.won(2, 2);
        assert_eq!(world.starts(&disk)[1], None);
        disk.close().unwrap();
        assert_eq!(world.starts(&disk), [None, None]);
    }

    #[test]
    fn a_stale_image_may_not() {
        let world = World::new();
        let disk = world.disk();
        disk.protected(true).unwrap();
        world.won(2, 3);
        let [without, with] = world.starts(&disk);
        assert!(without.is_some() && with.as_ref().unwrap().contains("gone on with the VM"), "{with:?}");
        // Also if it ended in good order, as far as it knew.
        disk.close().unwrap();
        let [without, with] = world.starts(&disk);
        assert!(without.is_none() && with.is_some());
        disk.copying([9; 16], 5, WRITER).unwrap();
        assert!(world.starts(&disk).iter().all(|why| why.as_ref().unwrap().contains("being copied")));
        disk.following().unwrap();
        assert!(world.starts(&disk).iter().all(|why| why.as_ref().unwrap().contains("followed a primary")));
        // The follower went on.
        disk.alone(2, Some([3; 16])).unwrap();
        assert_eq!(world.starts(&disk), [None, None]);
        assert_eq!(disk.state().unwrap().generation, 6);
    }

    #[test]
    fn an_arbiter_that_does_not_answer_is_no_yes() {
        let world = World::new();
        let disk = world.disk();
        disk.protected(true).unwrap();
        std::fs::write(world.dir.path().join(format!("{}.epoch-2", VmId(WRITER.vm))), "").unwrap();
        assert!(world.starts(&disk)[1].as_ref().unwrap().contains("nobody knows whether"));
    }

    #[test]
    fn what_was_there_is_kept_while_it_is_overwritten() {
        let world = World::new();
        let mut disk = world.disk();
        let block = |byte: u8| vec![byte; BLOCK_BYTES as usize];
        disk.write_block(1, &block(1)).unwrap();
        disk.write_block(5, &block(5)).unwrap();
        assert!(disk.touched().is_none(), "nobody asked");
        disk.keep_checkpoint(BLOCK_BYTES as usize);
        disk.write_at(BLOCK_BYTES + 512, &[9; 512]).unwrap();
        disk.write_at(2 * BLOCK_BYTES - 512, &[9; 1024]).unwrap();
        disk.read_at(5 * BLOCK_BYTES, &mut [0; 512]).unwrap();
        // By nobody's machine.
        disk.write_block(3, &block(3)).unwrap();
        assert_eq!(disk.touched().unwrap().iter().collect::<Vec<_>>(), [1, 2, 5]);
        let before = |number| disk.read_block_before(number).unwrap();
        assert_eq!([before(1), before(2), before(3), before(5)], [block(1), block(0), block(0), block(5)]);
        assert_eq!(disk.checkpoint_bytes() as u64, BLOCK_BYTES, "zeroes take nothing");
        // More than there is room for.
        disk.write_block(5, &block(6)).unwrap();
        assert_eq!((disk.touched(), disk.read_block(5).unwrap()), (None, block(6)));
        disk.keep_checkpoint(BLOCK_BYTES as usize);
        assert_eq!((disk.touched().map(|set| set.len()), disk.read_block_before(5).unwrap()), (Some(0), block(6)));
        disk.drop_checkpoint();
        assert!(disk.touched().is_none());
    }

    #[test]
    fn eras_end_where_the_twin_was_equal() {
        let world = World::new();
        let disk = world.disk();
        let changed = || disk.changed().iter().collect::<Vec<_>>();
        let write = |block| disk.write_block(block, &vec![1; disk.block_bytes(block)]).unwrap();
        write(1);
        assert!(changed().is_empty(), "there is no twin");
        disk.equal(Some(Baseline([7; 16]))).unwrap();
        write(2);
        disk.mark(100);
        write(3);
        disk.agreed(99);
        assert_eq!(changed(), [2, 3]);
        disk.agreed(100);
        assert_eq!(changed(), [3]);
        let since = |name| disk.changed_since(Some(Baseline([name; 16]))).map(|set| set.iter().collect::<Vec<_>>());
        assert_eq!((since(7), since(8), disk.changed_since(None)), (Some(vec![2, 3]), None, None));
        disk.equal(None).unwrap();
        assert_eq!((changed(), since(7)), (vec![], Some(vec![2, 3])), "the sidecar's moment is another");
    }
}
