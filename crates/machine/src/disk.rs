//! A disk as the machine sees it: bytes it owns, kept for it by the host.
//!
//! **Invariant:** the contents are part of the machine: reading returns what was written last (or what was there at power-on), on every host alike.
//! So disk data is never an input. What only one host can know, an I/O error, is not shown to the guest: it stops the machine
//! ([`Pause::HostFailure`](crate::Pause::HostFailure)), which can be run again once the host has put it right.
//!
//! # Shared disks
//! The contents of a disk that several hosts can reach are not part of the machine ([`DiskConfig::shared`](crate::DiskConfig::shared)). A write leaves by the door
//! ([`Output::DiskWrite`](crate::Output::DiskWrite)) and is complete for the guest a fixed guest time later, as in any write-back cache; a flush leaves
//! ([`Output::DiskFlush`](crate::Output::DiskFlush)) and a read waits ([`Machine::disk_requests`](crate::Machine::disk_requests)), both until the host says that they are done
//! ([`Input::DiskDone`](crate::Input::DiskDone)). So a machine that replays needs no disk at all. Whoever executes reads must let them see all writes that have left before, whether they have
//! reached the disk or not. Of [`Disk`] only the size is asked.
use std::fmt::Debug;

/// The host could not do what the disk must do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DiskError(
    /// What went wrong, for people.
    pub String,
);

/// A request to a shared disk that waits for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRequest {
    /// Which disk, from 0.
    pub disk: u8,
    /// Its number; never used twice by one disk.
    pub request: u64,
    /// What is wanted.
    pub wanted: DiskWanted,
}

/// What a request to a shared disk waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskWanted {
    /// Data.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes; at most [`MAX_SHARED_BYTES`].
        length: u32,
    },
    /// All writes that left before are on stable storage.
    Flush,
}

/// Bytes of a request to a shared disk at most: it must fit an entry of the log.
pub const MAX_SHARED_BYTES: u32 = 512 << 10;

/// A disk the host supplies. Its size never changes.
pub trait Disk: Debug + Send {
    /// Bytes; whole sectors of 512 of them are the guest's.
    fn size(&self) -> u64;
    /// Reads at `offset`. The range lies inside the disk.
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError>;
    /// Writes at `offset`. The range lies inside the disk.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError>;
    /// Returns when everything written is on stable storage.
    fn flush(&mut self) -> Result<(), DiskError>;
}

/// A disk in memory: for tests and demonstrations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryDisk(
    /// Its contents.
    pub Vec<u8>,
);

impl MemoryDisk {
    fn range(&mut self, offset: u64, len: usize) -> Result<&mut [u8], DiskError> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(len)?));
        range.and_then(|range| self.0.get_mut(range)).ok_or_else(|| DiskError("beyond the end of the disk".into()))
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        data.copy_from_slice(self.range(offset, data.len())?);
        Ok(())
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.range(offset, data.len())?.copy_from_slice(data);
        Ok(())
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// A disk of which only the size is known: a shared one, which the machine never reads or writes by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElsewhereDisk(
    /// Bytes.
    pub u64,
);

impl Disk for ElsewhereDisk {
    fn size(&self) -> u64 {
        self.0
    }
    fn read_at(&mut self, _offset: u64, _data: &mut [u8]) -> Result<(), DiskError> {
        Err(DiskError("a shared disk is read through the door".into()))
    }
    fn write_at(&mut self, _offset: u64, _data: &[u8]) -> Result<(), DiskError> {
        Err(DiskError("a shared disk is written through the door".into()))
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Err(DiskError("a shared disk is flushed through the door".into()))
    }
}
