//! Images opened as a machine's disks.
//!
//! *In*: what the user says of the disks, and what a machine wants. *Out*: [`Replica`]s in the machine's order. *Invariant*: a machine gets exactly the disks it wants, of
//! the right sizes, or none.
use twinstep_machine::Disk;

use super::build::DiskExtra;
use super::spec::DiskSpec;
use crate::disk::Replica;
use crate::error::{Error, Result};

/// Opens the disks of a spec.
pub fn open(specs: &[DiskSpec]) -> Result<Vec<Replica>> {
    specs.iter().map(|disk| Replica::open(&disk.path, disk.format, disk.access())).collect()
}

/// As a machine takes them.
pub fn of_machine(replicas: &[Replica]) -> Vec<Box<dyn Disk>> {
    replicas.iter().map(|replica| Box::new(replica.clone()) as Box<dyn Disk>).collect()
}

/// Their sizes, for images.
pub fn bytes(replicas: &[Replica]) -> Vec<u64> {
    replicas.iter().map(Replica::size).collect()
}

/// The disks that an image's machine wants; others are refused.
pub fn matching(replicas: &[Replica], wanted: &[DiskExtra]) -> Result<Vec<Box<dyn Disk>>> {
    check_number(replicas.len(), wanted.len())?;
    for (replica, want) in replicas.iter().zip(wanted) {
        if replica.size() != want.bytes {
            let what = format!("{} has {} bytes, the machine's disk {}", replica.name(), replica.size(), want.bytes);
            return Err(Error::new(what).next("give a copy of the image the machine started with"));
        }
    }
    Ok(of_machine(replicas))
}

/// Refuses another number of disks than the machine has.
pub fn check_number(given: usize, wanted: usize) -> Result<()> {
    if given == wanted {
        return Ok(());
    }
    Err(Error::new(format!("the machine has {wanted} disks, {given} were given"))
        .next("give --disk once for each, in the same order"))
}
