//! Disk images: where the bytes of a guest's disk are on this host.
//!
//! *In*: a path and a format. *Out*: reads, writes and flushes at offsets of the guest's disk. *Invariant*: no access goes beyond the size the disk had when it
//! was opened, a writable image is open in one process only, and after `flush` has returned everything written before is on the medium.
//!
//! The format is what the user says, or what the file's name says; the content is never asked, because a guest that writes a header into its disk could
//! make a guesser open other files the next time. For the same reason a qcow2 image may refer to no other file.
//! A [`SharedDisk`] is one image for several hosts. A [`Replica`] is an image with what is remembered of it: which blocks changed, and in its sidecar whose disk it is and how new.

mod checkpoint;
mod limit;
mod qcow2;
mod raw;
mod replica;
mod shared;
mod sidecar;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Context, Error, Result};
use qcow2::Qcow2Image;
use raw::RawImage;
pub use replica::{BLOCK_BYTES, Replica, Writer};
pub use shared::{SharedDisk, Write};
pub use sidecar::{Baseline, Role, State};

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

/// How an image holds a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One byte of the file is one byte of the disk.
    Raw,
    /// QEMU's format, in which only what was written takes room.
    Qcow2,
}

/// The first bytes of every qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

impl Format {
    /// What the name of a file says.
    #[must_use]
    pub fn of_name(path: &Path) -> Self {
        let qcow2 = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
        if qcow2 { Self::Qcow2 } else { Self::Raw }
    }

    /// For people, and as it is written in `format=`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where the bytes are.
#[derive(Debug)]
enum Bytes {
    Raw(RawImage),
    /// Nobody reads or writes it here: it is a [`SharedDisk`]'s.
    Shared,
    Qcow2(Box<Qcow2Image>),
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    bytes: Bytes,
    path: PathBuf,
    size: u64,
    access: Access,
}

impl Image {
    /// Opens and locks an image. `format` is what the user said, if anything was said.
    pub fn open(path: &Path, format: Option<Format>, access: Access) -> Result<Self> {
        let file = open_file(path, access, false)?;
        lock(&file, path, access)?;
        let bytes = match format.unwrap_or_else(|| Format::of_name(path)) {
            Format::Raw => {
                let mut magic = [0; 4];
                let looks_like_qcow2 = file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2_MAGIC;
                if format.is_none() && looks_like_qcow2 {
                    return Err(Error::new(format!("{} looks like a qcow2 image, but its name does not say so", path.display()))
                        .next("say ,format=qcow2 if it is one; ,format=raw if these are bytes that a guest wrote to its disk"));
                }
                Bytes::Raw(RawImage::new(file, path)?)
            }
            Format::Qcow2 => Bytes::Qcow2(Box::new(Qcow2Image::open(file, path, access)?)),
        };
        Self::new(bytes, path, access)
    }

    /// Opens a raw image that another host may have open as well, without a lock.
    fn open_shared(path: &Path) -> Result<Self> {
        let file = open_file(path, Access::ReadWrite, false)?;
        Self::new(Bytes::Raw(RawImage::new(file, path)?), path, Access::ReadWrite)
    }

    /// In place of an image that is shared.
    fn of_shared(path: &Path, size: u64) -> Self {
        Self { bytes: Bytes::Shared, path: path.to_owned(), size, access: Access::ReadWrite }
    }

    /// Takes the lock that keeps other processes from opening the image to write; false if one has it.
    fn try_lock(&self) -> Result<bool> {
        let Bytes::Raw(raw) = &self.bytes else { return Ok(false) };
        match flock(raw.file(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(e) => Err(Error::new(format!("cannot lock the disk image {}", self.path.display())).because(e)),
        }
    }

    /// Makes an image of `size` bytes, all zero, that must not be there yet. It takes room only as it is written.
    pub fn create(path: &Path, format: Option<Format>, size: u64) -> Result<Self> {
        let file = open_file(path, Access::ReadWrite, true)?;
        let made = lock(&file, path, Access::ReadWrite).and_then(|()| {
            Ok(match format.unwrap_or_else(|| Format::of_name(path)) {
                Format::Raw => {
                    file.set_len(size).at("make room for", path)?;
                    Bytes::Raw(RawImage::new(file, path)?)
                }
                Format::Qcow2 => Bytes::Qcow2(Box::new(Qcow2Image::create(file, path, size)?)),
            })
        });
        let made = made.and_then(|bytes| Self::new(bytes, path, Access::ReadWrite));
        if made.is_err() {
            // Half an image would be in the way of the next attempt.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    fn new(bytes: Bytes, path: &Path, access: Access) -> Result<Self> {
        let size = match &bytes {
            Bytes::Raw(raw) => raw.size(),
            Bytes::Qcow2(qcow2) => qcow2.size(),
            Bytes::Shared => 0,
        };
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(Error::new(format!(
                "the disk image {} has {size} bytes; a disk has a multiple of {SECTOR}",
                path.display()
            ))
            .next(format!("make it larger: truncate --size %{SECTOR} {0} (or --size 1G for a new one)", path.display())));
        }
        Ok(Self { bytes, path: path.to_owned(), size, access })
    }

    /// Bytes of the guest's disk.
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
        let length = to.len();
        let read = match &self.bytes {
            Bytes::Raw(raw) => raw.read_at(offset, to),
            Bytes::Qcow2(qcow2) => qcow2.read_at(offset, to),
            Bytes::Shared => Err(not_here()),
        };
        read.map_err(|e| self.failed("read", offset, length, e))
    }

    /// Writes `from` at `offset`.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Err(
                Error::new(format!("the disk image {} was opened read-only", self.path.display())).next("attach it writable")
            );
        }
        self.check("write", offset, from.len())?;
        let written = match &self.bytes {
            Bytes::Raw(raw) => raw.write_at(offset, from),
            Bytes::Qcow2(qcow2) => qcow2.write_at(offset, from),
            Bytes::Shared => Err(not_here()),
        };
        written.map_err(|e| self.failed("write", offset, from.len(), e))
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        let flushed = match &self.bytes {
            Bytes::Raw(raw) => raw.flush(),
            Bytes::Qcow2(qcow2) => qcow2.flush(),
            Bytes::Shared => Ok(()),
        };
        flushed.map_err(|e| with_advice(Error::new(format!("cannot flush the disk image {}", self.path.display())), e))
    }

    fn check(&self, verb: &str, offset: u64, length: usize) -> Result<()> {
        let end = offset.checked_add(length as u64);
        if end.is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        Err(Error::new(format!("cannot {verb} {length} bytes at {offset} of {}: it ends at {}", self.path.display(), self.size)))
    }

    fn failed(&self, verb: &str, offset: u64, length: usize, e: std::io::Error) -> Error {
        let path = self.path.display();
        with_advice(Error::new(format!("cannot {verb} {length} bytes at {offset} of the disk image {path}")), e)
    }
}

fn not_here() -> std::io::Error {
    std::io::Error::other("it is shared, and not read or written like this")
}

fn in_use(path: &Path) -> Error {
    Error::new(format!("the disk image {} is in use by another process", path.display()))
        .next("stop the other VM, or give each its own copy (two writers would destroy the file system in it)")
}

fn with_advice(error: Error, e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::StorageFull => error.next("the image is sparse and its file system is full: make room (df -h)"),
        std::io::ErrorKind::UnexpectedEof => error.next("the file has become shorter since it was opened: who has cut it?"),
        _ => error,
    }
    .because(e)
}

fn open_file(path: &Path, access: Access, create: bool) -> Result<File> {
    let writable = access == Access::ReadWrite;
    let file = OpenOptions::new().read(true).write(writable).create_new(create).open(path).map_err(|e| {
        let next = match e.kind() {
            std::io::ErrorKind::NotFound if create => "make the folder first".to_owned(),
            std::io::ErrorKind::NotFound => format!("create it first: truncate --size 1G {}", path.display()),
            std::io::ErrorKind::PermissionDenied if writable => "make it writable for you, or attach it read-only".to_owned(),
            std::io::ErrorKind::IsADirectory => "name an image file, not a folder".to_owned(),
            _ => "see that the path is right and the file system is mounted".to_owned(),
        };
        let verb = if create { "create" } else { "open" };
        Error::new(format!("cannot {verb} the disk image {}", path.display())).because(e).next(next)
    })?;
    let kind = file.metadata().at("look at", path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::new(format!("{} is neither a file nor a block device", path.display())).next("name a disk image"));
    }
    Ok(file)
}

/// One writer or many readers, as long as the file is open.
fn lock(file: &File, path: &Path, access: Access) -> Result<()> {
    let how = match access {
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
    };
    match flock(file, how) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(in_use(path)),
        Err(e) => Err(Error::new(format!("cannot lock the disk image {}", path.display())).because(e)),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
