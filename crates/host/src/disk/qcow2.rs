//! A qcow2 image, by `imago`.
//!
//! *In*, *out*: bytes at offsets of the guest's disk, which the caller has checked. *Invariant*: nothing but the file that was handed in is ever opened; an
//! image that refers to others (a backing file, an external data file) is refused.

use std::fs::File;
use std::io;
use std::path::Path;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, StorageOpenOptions};

use super::Access;
use crate::error::{Context, Error, Result};

type Storage = imago::file::File;

/// An open qcow2 image. What it holds back of its tables is written when it is flushed or dropped.
#[derive(Debug)]
pub(super) struct Qcow2Image(FormatAccess<Storage>);

fn storage(file: File, writable: bool) -> io::Result<Storage> {
    Storage::from_open_file(file, StorageOpenOptions::new().write(writable))
}

impl Qcow2Image {
    /// Opens what is in a file.
    pub(super) fn open(file: File, path: &Path, access: Access) -> Result<Self> {
        let writable = access == Access::ReadWrite;
        let what = || format!("cannot use {} as a qcow2 image", path.display());
        let image = Qcow2::<Storage>::open_image(storage(file, writable).what(what())?, writable)
            .map_err(|e| Error::new(what()).because(e).next("see what it is: qemu-img info; a raw image needs ,format=raw"))?;
        let refers = image.implicit_backing_file().or(image.implicit_external_data_file());
        if let Some(other) = refers {
            return Err(Error::new(what())
                .because(format!("it refers to another file, '{other}', which is not opened for it"))
                .next("make it one image: qemu-img convert -O qcow2 OLD NEW"));
        }
        if image.requires_external_data_file() {
            return Err(Error::new(what())
                .because("its data is in another file")
                .next("make it one image: qemu-img convert -O qcow2 OLD NEW"));
        }
        Ok(Self(FormatAccess::new(image)))
    }

    /// Makes an image in an empty file.
    pub(super) fn create(file: File, path: &Path, size: u64) -> Result<Self> {
        let what = || format!("cannot make the qcow2 image {}", path.display());
        let builder = Qcow2::<Storage>::create_builder(storage(file, true).what(what())?).size(size);
        let open = |storage| Ok(Qcow2::<Storage>::builder(storage).write(true));
        let image = builder.create_open(DenyImplicitOpenGate::default(), open).what(what())?;
        Ok(Self(FormatAccess::new(image)))
    }

    pub(super) fn size(&self) -> u64 {
        self.0.size()
    }
    pub(super) fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.0.read(to, offset)
    }
    pub(super) fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.write(from, offset)
    }
    /// The tables that lead to the data, then all of it to the medium.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.0.flush()?;
        self.0.sync()
    }
}
