//! A machine that arrives while it runs elsewhere: the other end of [`super::precopy`].
//!
//! *In*: bytes of the copy. *Out*: a machine whose RAM is filled as the pages come, and whose state is the primary's at the cut. *Invariant*: what does not
//! fit this host is refused before the first page; a machine comes out whole or not at all.
use twinstep_log::{ImageItem, ImageMetadata, ImagePayload, ImageReader};
use twinstep_machine::{Config, Machine, PAGE_SIZE, Payload};
use twinstep_migrate::{Destination, Layout, Region, Target};

use super::build::{self, DiskExtra, Extra};
use super::disks;
use crate::disk::Replica;
use crate::error::{Context, Error, Result};

/// Bytes after which the pages that came are digested: at the end, the machine has no time for all of them at once.
const DIGEST_BYTES: usize = 4 << 20;

/// A machine on its way.
pub(super) struct Arrival {
    destination: Destination,
    room: Room,
    undigested: usize,
}

/// Where its pages go.
struct Room {
    disks: Vec<Replica>,
    cables: usize,
    tune: fn(&mut Config),
    machine: Option<Machine>,
}

impl Arrival {
    /// Nothing has come. The machine gets these disks.
    pub(super) fn new(disks: Vec<Replica>, cables: usize, tune: fn(&mut Config)) -> Self {
        Self { destination: Destination::new(), room: Room { disks, cables, tune, machine: None }, undigested: 0 }
    }

    /// Takes bytes in.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.destination.push(bytes, &mut self.room).what("the primary's machine cannot be taken in")?;
        self.undigested += bytes.len();
        if self.undigested >= DIGEST_BYTES
            && let Some(machine) = &mut self.room.machine
        {
            machine.digest_ram();
            self.undigested = 0;
        }
        Ok(())
    }

    /// All has come: the machine, at `position`.
    pub(super) fn finish(self, position: u64) -> Result<(Machine, Extra)> {
        let arrived = self.destination.finish().what("the primary's machine has not arrived")?;
        let mut machine = self.room.machine.ok_or_else(|| Error::new("the primary's machine has not arrived"))?;
        let (metadata, mut payloads) = read(&arrived.state)?;
        let extra = build::take_extra(&mut payloads)?;
        let payloads = payloads.into_iter().map(|p| Payload { kind: p.kind, version: p.version, bytes: p.bytes });
        machine.restore(payloads.collect()).what("the primary's machine does not fit this build")?;
        for (what, stands) in [("state says", metadata.position), ("processor stands at", machine.position())] {
            if stands != position {
                return Err(Error::new(format!("the primary's machine is of position {position}, and its {what} {stands}")));
            }
        }
        machine.digest_ram();
        Ok((machine, extra))
    }
}

impl Target for Room {
    fn begin(&mut self, layout: &Layout, preface: &[u8]) -> std::result::Result<(), String> {
        self.machine = Some(self.make(layout, preface).map_err(|e| e.to_string())?);
        Ok(())
    }
    fn unit(&mut self, _region: usize, unit: u64, bytes: &[u8]) -> std::result::Result<(), String> {
        let page: Option<&[u8; PAGE_SIZE as usize]> = bytes.try_into().ok();
        let written = self.machine.as_mut().zip(page).is_some_and(|(machine, page)| machine.write_ram_page(unit as usize, page));
        written.then_some(()).ok_or_else(|| format!("page {unit} cannot be written"))
    }
    fn zero(&mut self, region: usize, unit: u64, first: bool) -> std::result::Result<(), String> {
        // RAM begins with zeroes.
        if first { Ok(()) } else { self.unit(region, unit, &[0; PAGE_SIZE as usize]) }
    }
}

impl Room {
    /// The machine before its state.
    fn make(&mut self, layout: &Layout, preface: &[u8]) -> Result<Machine> {
        let (metadata, mut payloads) = read(preface)?;
        build::check_host(&metadata.host_vendor, &metadata.host_family)?;
        if layout.regions() != [Region { unit_bytes: PAGE_SIZE as u32, units: metadata.ram_pages }] {
            return Err(Error::new("the primary copies something else than RAM").next("use the same Twinstep on both hosts"));
        }
        let mut disks = |wanted: &[DiskExtra]| disks::matching(&self.disks, wanted);
        let (machine, extra) = build::blank(&metadata, &mut payloads, &mut disks, &self.tune)?;
        // Now, and not when it goes live: then it would be too late.
        if extra.nics.len() > self.cables {
            let what = format!("the machine has {} network cards, the standby was given {}", extra.nics.len(), self.cables);
            return Err(Error::new(what).next("start the standby with --net once for each card"));
        }
        Ok(machine)
    }
}

/// An image that has no pages.
fn read(image: &[u8]) -> Result<(ImageMetadata, Vec<ImagePayload>)> {
    let what = "what the primary says of its machine cannot be read";
    let mut reader = ImageReader::open(image).what(what)?;
    let metadata = reader.metadata().clone();
    let mut payloads = Vec::new();
    while let Some(item) = reader.next_item().what(what)? {
        match item {
            ImageItem::Payload(payload) => payloads.push(payload),
            ImageItem::Pages(_) => return Err(Error::new(what).because("there are pages in it")),
        }
    }
    Ok((metadata, payloads))
}
