//! A disk image: a raw file or a block device, one byte of it one byte of the disk.
//!
//! *In*: a path. *Out*: reads, writes and flushes at offsets. *Invariant*: no access goes beyond the size the disk had when it was opened, a writable image
//! is open in one process only, and after `flush` has returned everything written before is on the medium.
//!
//! Only raw images: the format is never guessed, because a guest that writes a header into its disk could make a guesser open other
//! files the next time.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Context, Error, Result};

/// The unit of size.
pub const SECTOR: u64 = 512;

/// Whether the guest may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Any number of readers, and no writer at the same time.
    ReadOnly,
    /// One process only.
    ReadWrite,
}

/// An open image.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    path: PathBuf,
    size: u64,
    access: Access,
}

impl RawDisk {
    /// Opens and locks an image.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let writable = access == Access::ReadWrite;
        let mut file = OpenOptions::new().read(true).write(writable).open(path).map_err(|e| {
            let next = match e.kind() {
                std::io::ErrorKind::NotFound => format!("create it first: truncate --size 1G {}", path.display()),
                std::io::ErrorKind::PermissionDenied if writable => "make it writable for you, or attach it read-only".to_owned(),
                std::io::ErrorKind::IsADirectory => "name an image file, not a folder".to_owned(),
                _ => "see that the path is right and the file system is mounted".to_owned(),
            };
            Error::new(format!("cannot open the disk image {}", path.display())).because(e).next(next)
        })?;
        let kind = file.metadata().at("look at", path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(
                Error::new(format!("{} is neither a file nor a block device", path.display())).next("name a raw disk image")
            );
        }
        let lock = if writable { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
        match flock(&file, lock) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::new(format!("the disk image {} is in use by another process", path.display()))
                    .next("stop the other VM, or give each its own copy (two writers would destroy the file system in it)"));
            }
            Err(e) => return Err(Error::new(format!("cannot lock the disk image {}", path.display())).because(e)),
        }
        // A block device has its size at its end only.
        let size = file.seek(SeekFrom::End(0)).at("measure", path)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(Error::new(format!(
                "the disk image {} has {size} bytes; a disk has a multiple of {SECTOR}",
                path.display()
            ))
            .next(format!("make it larger: truncate --size %{SECTOR} {0} (or --size 1G for a new one)", path.display())));
        }
        Ok(Self { file, path: path.to_owned(), size, access })
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it may be written.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `to` from `offset` on.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        self.check("read", offset, to.len())?;
        self.file.read_exact_at(to, offset).map_err(|e| self.failed("read", offset, to.len(), e))
    }

    /// Writes `from` at `offset`.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Err(
                Error::new(format!("the disk image {} was opened read-only", self.path.display())).next("attach it writable")
            );
        }
        self.check("write", offset, from.len())?;
        self.file.write_all_at(from, offset).map_err(|e| self.failed("write", offset, from.len(), e))
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        // The size never changes, so the data is all there is to make durable.
        self.file.sync_data().map_err(|e| Error::new(format!("cannot flush the disk image {}", self.path.display())).because(e))
    }

    fn check(&self, verb: &str, offset: u64, length: usize) -> Result<()> {
        let end = offset.checked_add(length as u64);
        if end.is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        Err(Error::new(format!("cannot {verb} {length} bytes at {offset} of {}: it ends at {}", self.path.display(), self.size)))
    }

    fn failed(&self, verb: &str, offset: u64, length: usize, e: std::io::Error) -> Error {
        let error = Error::new(format!("cannot {verb} {length} bytes at {offset} of the disk image {}", self.path.display()));
        match e.kind() {
            std::io::ErrorKind::StorageFull => error.next("the image is sparse and its file system is full: make room (df -h)"),
            std::io::ErrorKind::UnexpectedEof => error.next("the file has become shorter since it was opened: who has cut it?"),
            _ => error,
        }
        .because(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_read() {
        let file = image(4096);
        let disk = RawDisk::open(file.path(), Access::ReadWrite).unwrap();
        disk.write_at(512, b"hello").unwrap();
        disk.flush().unwrap();
        let mut got = [0; 5];
        disk.read_at(512, &mut got).unwrap();
        assert_eq!((&got, disk.size(), disk.access()), (b"hello", 4096, Access::ReadWrite));
        drop(disk);
        let disk = RawDisk::open(file.path(), Access::ReadOnly).unwrap();
        disk.read_at(512, &mut got).unwrap();
        assert_eq!(&got, b"hello");
        assert!(disk.write_at(0, b"x").unwrap_err().to_string().contains("read-only"));
        disk.flush().unwrap();
    }

    #[test]
    fn nothing_beyond_the_end() {
        let file = image(1024);
        let disk = RawDisk::open(file.path(), Access::ReadWrite).unwrap();
        let mut sector = [0; 512];
        disk.read_at(512, &mut sector).unwrap();
        for offset in [513, 1024, u64::MAX - 10] {
            let error = disk.read_at(offset, &mut sector).unwrap_err().to_string();
            assert!(error.contains("ends at 1024"), "{error}");
            disk.write_at(offset, &sector).unwrap_err();
        }
        assert_eq!(fs::metadata(file.path()).unwrap().len(), 1024);
        // Somebody cuts the file under us.
        file.as_file().set_len(512).unwrap();
        assert!(disk.read_at(512, &mut sector).unwrap_err().to_string().contains("shorter"));
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(512);
        let open = |access| RawDisk::open(file.path(), access);
        let writer = open(Access::ReadWrite).unwrap();
        assert!(open(Access::ReadWrite).unwrap_err().to_string().contains("in use"));
        assert!(open(Access::ReadOnly).unwrap_err().to_string().contains("in use"));
        drop(writer);
        let _readers = (open(Access::ReadOnly).unwrap(), open(Access::ReadOnly).unwrap());
        open(Access::ReadWrite).unwrap_err();
    }

    #[test]
    fn what_is_no_disk_is_refused_with_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none");
        for (path, words) in
            [(missing.as_path(), "truncate --size"), (dir.path(), "folder"), (Path::new("/dev/null"), "raw disk image")]
        {
            let error = RawDisk::open(path, Access::ReadWrite).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        for size in [0, 511, 513] {
            assert!(RawDisk::open(image(size).path(), Access::ReadOnly).unwrap_err().to_string().contains("multiple of 512"));
        }
    }
}
