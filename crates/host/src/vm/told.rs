//! What the standby tells of its machine during a resync, and what is known of it on the primary.
//!
//! *In*: on the standby, pages and blocks that have changed there, with hashes; on the primary, the messages made of them. *Out*: messages; a table of what the standby has. *Invariant*: a message
//! is no longer than the channel takes; the table's size follows the machine's, whatever the standby says.
//!
//! A message: kind u8. 1: entries of pages ([`twinstep_migrate::changes`]). 2: disk u8, entries of blocks of 64 KiB (XXH3-128). 3: pages damaged u32: the standby has looked through
//! all of its RAM, and so many pages had changed though nobody wrote to them.
use std::sync::{Mutex, MutexGuard, PoisonError};

use twinstep_migrate::changes::{ENTRY_BYTES, Known, put_entry};
use twinstep_pair::wire::MAX_CHANGED_BYTES;

use crate::disk::Replica;
use crate::error::{Context, Error, Result};

const PAGES: u8 = 1;
const BLOCKS: u8 = 2;
const SEARCHED: u8 = 3;

const UNUSABLE: &str = "what the standby says cannot be used";

/// Entries a message has at most.
const MOST_ENTRIES: usize = (MAX_CHANGED_BYTES - 2) / ENTRY_BYTES;

fn entries(head: &[u8], entries: &[(usize, u128)]) -> Vec<Vec<u8>> {
    let message = |part: &[(usize, u128)]| {
        let mut bytes = head.to_vec();
        part.iter().for_each(|&(unit, hash)| put_entry(unit, hash, &mut bytes));
        bytes
    };
    entries.chunks(MOST_ENTRIES).map(message).collect()
}

/// The messages that tell of pages.
pub(super) fn of_pages(pages: &[(usize, u128)]) -> Vec<Vec<u8>> {
    entries(&[PAGES], pages)
}

/// The messages that tell of blocks of a disk.
pub(super) fn of_blocks(disk: usize, blocks: &[(usize, u128)]) -> Vec<Vec<u8>> {
    entries(&[BLOCKS, disk as u8], blocks)
}

/// The message that tells how many pages went bad.
pub(super) fn of_search(damaged: usize) -> Vec<u8> {
    [&[SEARCHED][..], &(damaged as u32).to_le_bytes()].concat()
}

/// What is known of the standby.
#[derive(Debug)]
pub struct Told {
    /// Its RAM.
    pub(super) ram: Known,
    /// Its disks, in order.
    pub(super) disks: Vec<Known>,
    /// How many pages of its RAM went bad, once it has looked through all of it.
    pub(super) damaged: Option<u32>,
}

impl Told {
    /// Nothing was told of a machine with so many pages and such disks.
    pub(super) fn nothing(pages: usize, disks: &[Replica]) -> Self {
        let disks = disks.iter().map(|disk| Known::nothing(disk.blocks(), "block")).collect();
        Self { ram: Known::nothing(pages, "page"), disks, damaged: None }
    }
    /// Nothing was told of the twin of this machine.
    #[cfg(test)]
    pub(super) fn of(machine: &twinstep_machine::Machine, disks: &[Replica]) -> Self {
        Self::nothing(machine.ram().flags().pages(), disks)
    }
    /// Takes a message in.
    pub(super) fn take(&mut self, message: &[u8]) -> Result<()> {
        match *message {
            [PAGES, ref entries @ ..] => self.ram.take(entries).what(UNUSABLE),
            [BLOCKS, disk, ref entries @ ..] => match self.disks.get_mut(usize::from(disk)) {
                Some(known) => known.take(entries).what(UNUSABLE),
                None => Err(Error::new(UNUSABLE).because(format!("it has changed disk {disk}, which is not there"))),
            },
            [SEARCHED, a, b, c, d] => {
                self.damaged = Some(u32::from_le_bytes([a, b, c, d]));
                Ok(())
            }
            _ => Err(Error::new(UNUSABLE).because("a message of changes is of no known kind")),
        }
    }
}

/// The table, which the pair's threads fill and the machine's reads.
pub(super) fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinstep_machine::PageSet;

    #[test]
    fn what_is_told_is_known() {
        let mut told = Told::nothing(100_000, &[]);
        let pages: Vec<_> = (0..30_000).map(|page| (page * 3, page as u128)).collect();
        let messages = of_pages(&pages);
        assert!(messages.len() > 1 && messages.iter().all(|message| message.len() <= MAX_CHANGED_BYTES));
        messages.iter().for_each(|message| told.take(message).unwrap());
        assert!(pages.iter().all(|&(page, hash)| told.ram.is(page, hash)));
        assert_eq!(told.ram.suspects(&PageSet::none(100_000)).len(), 30_000);
        assert_eq!(told.damaged, None);
        told.take(&of_search(7)).unwrap();
        assert_eq!(told.damaged, Some(7));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut told = Told::nothing(100, &[]);
        for message in [&[][..], &[9, 1], &[SEARCHED, 1], &[PAGES, 1, 2], &of_blocks(0, &[(1, 1)])[0], &of_pages(&[(100, 1)])[0]]
        {
            assert!(told.take(message).is_err(), "{message:?}");
        }
    }
}
