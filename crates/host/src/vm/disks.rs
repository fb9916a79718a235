//! Images opened as a machine's disks.
//!
//! *In*: what the user says of the disks, and what a machine wants. *Out*: [`Replica`]s in the machine's order. *Invariant*: a machine gets exactly the disks it wants, of
//! the right sizes, or none.
use twinstep_machine::{Disk, ElsewhereDisk};

use super::build::DiskExtra;
use super::spec::DiskSpec;
use crate::disk::Replica;
use crate::error::{Error, Result};

/// Opens the disks of a spec.
pub fn open(specs: &[DiskSpec]) -> Result<Vec<Replica>> {
    let open = |disk: &DiskSpec| match disk.shared {
        true => Replica::of_shared(&disk.path, disk.format),
        false => Replica::open(&disk.path, disk.format, disk.access()),
    };
    specs.iter().map(open).collect()
}

/// As a machine takes them.
pub fn of_machine(replicas: &[Replica]) -> Vec<Box<dyn Disk>> {
    let of = |replica: &Replica| match replica.shared() {
        Some(shared) => Box::new(ElsewhereDisk(shared.size())) as Box<dyn Disk>,
        None => Box::new(replica.clone()),
    };
    replicas.iter().map(of).collect()
}

/// Their sizes, for images.
pub fn bytes(replicas: &[Replica]) -> Vec<u64> {
    replicas.iter().map(Replica::size).collect()
}

/// The disks that an image's machine wants; others are refused. What was on a shared disk is in the log, so those may be left out.
pub fn matching(replicas: &[Replica], wanted: &[DiskExtra]) -> Result<Vec<Box<dyn Disk>>> {
    let own = wanted.iter().filter(|want| !want.shared);
    if replicas.len() == own.clone().count() && replicas.len() < wanted.len() {
        let own: Vec<DiskExtra> = own.cloned().collect();
        let mut given = matching(replicas, &own)?.into_iter();
        let next = |want: &DiskExtra| match want.shared {
            true => Box::new(ElsewhereDisk(want.bytes)) as Box<dyn Disk>,
            false => given.next().expect("they were counted"),
        };
        return Ok(wanted.iter().map(next).collect());
    }
    check_number(replicas.len(), wanted.len())?;
    for (replica, want) in replicas.iter().zip(wanted) {
        if replica.shared().is_some() != want.shared {
            let (is, was) = if want.shared { ("not shared", "shared") } else { ("shared", "not") };
            return Err(Error::new(format!("{} is {is}, the machine's disk is {was}", replica.name()))
                .next("give the disk with or without share=on, as it was"));
        }
    }
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
