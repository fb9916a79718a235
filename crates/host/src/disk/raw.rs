//! A raw image: a file or a block device, one byte of it one byte of the disk.
//!
//! *In*, *out*: bytes at offsets, which the caller has checked. *Invariant*: the size is what it was at opening.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Context, Result};

/// An open raw image.
#[derive(Debug)]
pub(super) struct RawImage {
    file: File,
    size: u64,
}

impl RawImage {
    pub(super) fn new(mut file: File, path: &Path) -> Result<Self> {
        // A block device has its size at its end only.
        let size = file.seek(SeekFrom::End(0)).at("measure", path)?;
        Ok(Self { file, size })
    }
    pub(super) fn file(&self) -> &File {
        &self.file
    }
    pub(super) fn size(&self) -> u64 {
        self.size
    }
    pub(super) fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, offset)
    }
    pub(super) fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }
    pub(super) fn flush(&self) -> io::Result<()> {
        // The size never changes, so the data is all there is to make durable.
        self.file.sync_data()
    }
}
