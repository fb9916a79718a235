//! A shared disk: one image that several hosts can reach, to which only the live side writes.
//!
//! *In*: writes that left the machine ([`SharedDisk::pend`]), then leave to carry them out ([`SharedDisk::carry_out`]); reads. *Out*: bytes. *Invariants*: a read sees every write that left the machine before,
//! whether it has reached the image or not; nothing is written unless the image's epoch record says that this process is the one that writes.
//!
//! The epoch record is the state in the image's sidecar (role *shared*): the life of the VM, its epoch, the process. Whoever goes live enters itself before it reads or writes. Whoever writes looks at the record
//! before each write, and holds the sidecar's lock (`flock`, which NFS carries to its server) over a batch and its flush; a take-over waits for that lock, but not for ever: a side that was stopped while it held it
//! must not keep the VM down. What that leaves open is in `docs/formats/sidecar.md`.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sidecar::{Role, Sidecar, State};
use super::{Format, Image, Writer};
use crate::error::{Error, Result};
use crate::identity;

/// Bytes of writes that have left the machine and have not reached the image, beyond which the guest is to stand still.
const MAX_PENDING_BYTES: usize = 32 << 20;
/// How long a take-over waits for whoever holds the sidecar's lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// A write: first byte, data.
pub type Write = (u64, Vec<u8>);

/// The image, in the hands of the side that writes.
#[derive(Debug)]
struct Held {
    image: Arc<Image>,
    sidecar: Sidecar,
    writer: Writer,
    /// Nobody else's process has the image open to write. A side that is stopped may still have it when we take over.
    alone: bool,
    /// Somebody keeps the sidecar's lock who is not to be waited for: the side that was taken over, stopped in the middle of a batch.
    kept: bool,
}

impl Held {
    /// Takes the sidecar's lock; false if somebody keeps it.
    fn take_lock(&mut self) -> Result<bool> {
        let deadline = Instant::now() + if self.kept { Duration::ZERO } else { LOCK_PATIENCE };
        loop {
            if self.sidecar.try_lock()? {
                self.kept = false;
                return Ok(true);
            }
            if Instant::now() >= deadline {
                if !std::mem::replace(&mut self.kept, true) {
                    tracing::warn!("another process keeps the lock of a shared disk's sidecar: it is stopped, or its host is");
                }
                return Ok(false);
            }
            std::thread::sleep(LOCK_RETRY);
        }
    }
}

/// What a read looks at: it never waits for a write to be durable.
#[derive(Debug, Default)]
struct Queue {
    image: Option<Arc<Image>>,
    /// In the order in which they left the machine.
    pending: VecDeque<Write>,
    pending_bytes: usize,
}

#[derive(Debug, Default)]
struct Inner {
    /// Whose standby this is, before it is live.
    vm: [u8; 16],
    held: Option<Held>,
}

impl Inner {
    fn hold(&mut self, held: Held, queue: &mut Queue) -> &mut Held {
        queue.image = Some(held.image.clone());
        self.held.insert(held)
    }
}

/// A shared disk; its clones are the same one.
#[derive(Debug, Clone)]
pub struct SharedDisk {
    /// Locked before the queue.
    inner: Arc<Mutex<Inner>>,
    queue: Arc<Mutex<Queue>>,
    path: PathBuf,
    size: u64,
}

fn format_of(path: &Path, format: Option<Format>) -> Result<()> {
    match format.unwrap_or_else(|| Format::of_name(path)) {
        Format::Raw => Ok(()),
        // Whoever writes one keeps tables of it in memory, of which the other side would know nothing.
        Format::Qcow2 => Err(Error::new(format!("the qcow2 image {} cannot be shared", path.display()))
            .next("make it raw: qemu-img convert -O raw OLD NEW; or give each host its own image, without share=on")),
    }
}

impl SharedDisk {
    /// An image that is there, with its size. Nothing is read, and nothing is entered, yet.
    pub fn open(path: &Path, format: Option<Format>) -> Result<Self> {
        format_of(path, format)?;
        let size = Image::open_shared(path)?.size();
        Ok(Self { inner: Arc::default(), queue: Arc::default(), path: path.to_owned(), size })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    fn sidecar(&self) -> Result<Option<Sidecar>> {
        Sidecar::load(&self.path, self.size, 0)
    }

    /// A VM is powered on with this disk. Refused while another process holds it.
    pub fn begin(&self, writer: Writer) -> Result<()> {
        let image = Image::open_shared(&self.path)?;
        if !image.try_lock()? {
            return Err(super::in_use(&self.path));
        }
        let mut sidecar = match self.sidecar()? {
            Some(sidecar) => sidecar,
            None => {
                let state = State::fresh(identity::random_id(), self.size);
                Sidecar::create(&self.path, 0, state)?
            }
        };
        if matches!(sidecar.state().role, Role::Following | Role::Copying | Role::Protected) {
            return Err(Error::new(format!(
                "the disk image {} is a replica, perhaps not the newest of its disk",
                self.path.display()
            ))
            .next("start once without share=on, which checks that, and end in good order; then share it"));
        }
        enter(&mut sidecar, writer)?;
        self.lock().hold(Held { image: Arc::new(image), sidecar, writer, alone: true, kept: false }, &mut self.queue());
        Ok(())
    }

    /// This is a standby of a primary that writes to the image: says whether it is the same image.
    pub fn follow(&self, writer: Writer) -> Result<()> {
        let state = self.sidecar()?.map(|sidecar| sidecar.state().clone());
        if state.is_none_or(|state| state.vm != writer.vm || state.role != Role::Shared) {
            return Err(Error::new(format!("{} is not the image that the primary writes to", self.path.display()))
                .because("its sidecar does not say that this VM is live on it")
                .next("name the very same file on both hosts, on a file system that both mount (and its .twinstep beside it)"));
        }
        self.lock().vm = writer.vm;
        Ok(())
    }

    /// This side is the live one from now on, in this epoch that it has won. `owner`: this process, if it was a standby before.
    pub fn take_over(&self, epoch: u64, owner: Option<[u8; 16]>) -> Result<()> {
        let mut inner = self.lock();
        let held = match (inner.held.is_some(), owner) {
            (true, _) => inner.held.as_mut().expect("just seen"),
            (false, Some(owner)) => {
                let image = Image::open_shared(&self.path)?;
                let sidecar =
                    self.sidecar()?.ok_or_else(|| Error::new(format!("the sidecar of {} is gone", self.path.display())))?;
                let alone = image.try_lock()?;
                let writer = Writer { vm: inner.vm, epoch, owner };
                inner.hold(Held { image: Arc::new(image), sidecar, writer, alone, kept: false }, &mut self.queue())
            }
            (false, None) => return Ok(()),
        };
        // A side that was stopped in the middle of a batch keeps the lock, and must not keep the VM.
        let locked = held.take_lock()?;
        held.sidecar.reload()?;
        let found = held.sidecar.state();
        let newer =
            found.vm != held.writer.vm || found.epoch > epoch || (found.epoch == epoch && found.owner != held.writer.owner);
        let result = if newer {
            Err(fenced(&self.path, found))
        } else {
            held.writer.epoch = epoch;
            enter(&mut held.sidecar, held.writer)
        };
        if locked {
            held.sidecar.unlock()?;
        }
        result
    }

    /// Nobody writes any more, and everything is durable.
    pub fn close(&self) -> Result<()> {
        let mut inner = self.lock();
        let Some(held) = &mut inner.held else { return Ok(()) };
        held.sidecar.reload()?;
        check(&self.path, held)?;
        held.image.flush()?;
        let state = State { role: Role::Closed, ..held.sidecar.state().clone() };
        held.sidecar.store(state)
    }

    /// A write has left the machine: from now on it can be read.
    pub fn pend(&self, offset: u64, data: &[u8]) {
        let mut queue = self.queue();
        queue.pending_bytes += data.len();
        queue.pending.push_back((offset, data.to_vec()));
    }

    /// Whether so much is on its way that the guest is to stand still.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.queue().pending_bytes >= MAX_PENDING_BYTES
    }

    /// Reads `length` bytes as the guest has left them.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        // A write that reaches the image meanwhile leaves the queue only after this.
        let queue = self.queue();
        let Some(image) = &queue.image else { return Err(Error::new("a shared disk is read before this side is live")) };
        let mut data = vec![0; length];
        image.read_at(offset, &mut data)?;
        let end = offset + length as u64;
        for (start, written) in &queue.pending {
            let (from, to) = (offset.max(*start), end.min(start + written.len() as u64));
            if from < to {
                let part = &written[(from - start) as usize..(to - start) as usize];
                data[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
            }
        }
        Ok(data)
    }

    /// Carries out the writes in `batch`, in order, and makes them durable. Those that were [pending](Self::pend) are no longer; they are the oldest ones.
    pub fn carry_out(&self, batch: &[Write], were_pending: bool) -> Result<()> {
        let mut inner = self.lock();
        let Some(held) = &mut inner.held else { return Err(Error::new("a shared disk is written before this side is live")) };
        // It may still be held by a side that was stopped, and is not ours to wait for: then the record alone decides.
        let locked = held.take_lock()?;
        let result = write(&self.path, held, batch);
        if locked {
            held.sidecar.unlock()?;
        }
        result?;
        if were_pending {
            let mut queue = self.queue();
            for write in batch {
                let oldest = queue.pending.pop_front();
                assert!(oldest.as_ref() == Some(write), "writes are carried out in their order");
                queue.pending_bytes -= write.1.len();
            }
        }
        Ok(())
    }
}

fn write(path: &Path, held: &mut Held, batch: &[Write]) -> Result<()> {
    if !held.alone {
        held.alone = held.image.try_lock()?;
    }
    for (offset, data) in batch {
        // Before each: this process may be stopped at any moment, for any time.
        held.sidecar.reload()?;
        check(path, held)?;
        held.image.write_at(*offset, data)?;
    }
    held.image.flush()
}

/// Enters whose image it is.
fn enter(sidecar: &mut Sidecar, writer: Writer) -> Result<()> {
    let state = sidecar.state().clone();
    sidecar.store(State {
        generation: state.generation + 1,
        role: Role::Shared,
        vm: writer.vm,
        epoch: writer.epoch,
        owner: writer.owner,
        baseline: None,
        ..state
    })
}

/// Refuses to write an image whose record names somebody else.
fn check(path: &Path, held: &Held) -> Result<()> {
    let found = held.sidecar.state();
    if found.vm == held.writer.vm && found.owner == held.writer.owner { Ok(()) } else { Err(fenced(path, found)) }
}

fn fenced(path: &Path, found: &State) -> Error {
    Error::new(format!("this side may not write to the shared disk {} any more", path.display()))
        .because(format!("its record says that epoch {} of VM {} is another side's", found.epoch, twinstep_pair::VmId(found.vm)))
        .next("nothing: the VM goes on there")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn writer(epoch: u64, owner: u8) -> Writer {
        Writer { vm: [1; 16], epoch, owner: [owner; 16] }
    }

    /// An image, and both sides of a pair that share it.
    fn sides() -> (tempfile::TempDir, PathBuf, SharedDisk, SharedDisk) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let left = SharedDisk::open(&path, None).unwrap();
        let right = SharedDisk::open(&path, None).unwrap();
        right.follow(writer(1, 2)).unwrap_err();
        left.begin(writer(1, 1)).unwrap();
        right.follow(writer(1, 2)).unwrap();
        (dir, path, left, right)
    }

    fn at(path: &Path, offset: usize) -> u8 {
        std::fs::read(path).unwrap()[offset]
    }

    #[test]
    fn a_read_sees_what_is_on_its_way() {
        let (_dir, path, left, _right) = sides();
        for (offset, byte) in [(512, 1), (1024, 2), (1024, 3)] {
            left.pend(offset, &[byte; 512]);
        }
        let read = || left.read(768, 1024).unwrap();
        let expected = [[1; 256].as_slice(), &[3; 512], &[0; 256]].concat();
        assert_eq!(read(), expected);
        assert_eq!(at(&path, 512), 0, "none has leave to be carried out");
        left.carry_out(&[(512, vec![1; 512]), (1024, vec![2; 512])], true).unwrap();
        assert_eq!((at(&path, 512), at(&path, 1024)), (1, 2));
        assert_eq!(read(), expected, "the last is still on its way");
        left.carry_out(&[(1024, vec![3; 512])], true).unwrap();
        assert_eq!((read(), at(&path, 1024)), (expected, 3));
    }

    #[test]
    fn a_side_that_was_taken_over_cannot_write() {
        let (_dir, path, left, right) = sides();
        left.carry_out(&[(0, vec![1; 512])], false).unwrap();
        right.take_over(2, Some([2; 16])).unwrap();
        let refused = left.carry_out(&[(0, vec![9; 512])], false).unwrap_err().to_string();
        assert!(refused.contains("may not write") && refused.contains("epoch 2"), "{refused}");
        assert_eq!(at(&path, 0), 1);
        assert!(left.close().is_err() && left.take_over(2, None).is_err(), "nor can it take it back");
        right.carry_out(&[(0, vec![2; 512])], false).unwrap();
        assert_eq!(at(&path, 0), 2);
        // The one that went on ends in good order; then anybody may begin.
        right.close().unwrap();
        drop((left, right));
        SharedDisk::open(&path, None).unwrap().begin(writer(1, 5)).unwrap();
    }

    #[test]
    fn a_side_that_was_stopped_with_the_lock_does_not_keep_the_vm() {
        let (_dir, path, left, right) = sides();
        let keeps = left.lock().held.as_ref().unwrap().sidecar.try_lock().unwrap();
        assert!(keeps);
        right.take_over(2, Some([2; 16])).unwrap();
        right.carry_out(&[(0, vec![2; 512])], false).unwrap();
        // It wakes up in the middle of its batch.
        let held = &mut left.lock().held;
        write(&path, held.as_mut().unwrap(), &[(0, vec![9; 512])]).unwrap_err();
        assert_eq!(at(&path, 0), 2);
    }

    #[test]
    fn one_vm_at_a_time() {
        let (_dir, path, left, _right) = sides();
        let other = SharedDisk::open(&path, None).unwrap();
        assert!(other.begin(Writer { vm: [9; 16], epoch: 1, owner: [9; 16] }).unwrap_err().to_string().contains("in use"));
        drop(left);
        // Its process died.
        other.begin(Writer { vm: [9; 16], epoch: 1, owner: [9; 16] }).unwrap();
        let qcow2 = SharedDisk::open(&path, Some(Format::Qcow2)).unwrap_err().to_string();
        assert!(qcow2.contains("cannot be shared") && qcow2.contains("-O raw"), "{qcow2}");
    }
}
