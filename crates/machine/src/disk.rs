//! A disk as the machine sees it: bytes it owns, kept for it by the host.
//!
//! **Invariant:** the contents are part of the machine: reading returns what was written last (or what was there at power-on), on every host alike.
//! So disk data is never an input. What only one host can know, an I/O error, is not shown to the guest: it stops the machine
//! ([`Pause::HostFailure`](crate::Pause::HostFailure)), which can be run again once the host has put it right.
use std::fmt::Debug;

/// The host could not do what the disk must do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DiskError(
    /// What went wrong, for people.
    pub String,
);

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
