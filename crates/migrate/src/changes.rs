//! Which units two machines must exchange to be equal again: each lists what it has written, by hash, and only what differs travels.
//!
//! **In:** sets of units, hashes of all units, the other side's list as bytes. **Out:** a list as bytes; the set of units that differ. **Invariant:** a unit in
//! which the two differ is in the result, if at least one of the sides has it in its list.
//!
//! A list on the wire, for each region: how many entries (u32); for each unit its number (u32) and its hash (of a page [`crate::unit_hash`], u128), little-endian.
use std::collections::BTreeMap;

use twinstep_machine::PageSet;

/// Bytes of a unit's entry.
pub const ENTRY_BYTES: usize = 4 + 16;

/// Why the other side's list cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// Less than it says.
    #[error("the list of changes is cut off")]
    Cut,
    /// It names a unit that does not exist.
    #[error("the list says that {what} {unit} has changed; there are {units}")]
    NoSuchUnit {
        /// What a unit of the region is called.
        what: &'static str,
        /// The one named.
        unit: usize,
        /// How many there are.
        units: usize,
    },
}

/// Appends a region to a list: its changed units with their hashes.
///
/// # Panics
/// If there are 2^32 or more, or a unit has a number that does not fit 32 bits.
pub fn put_region(entries: impl IntoIterator<Item = (usize, u128)>, list: &mut Vec<u8>) {
    let at = list.len();
    list.extend([0; 4]);
    for (unit, hash) in entries {
        list.extend(u32::try_from(unit).expect("units have numbers of 32 bits").to_le_bytes());
        list.extend(hash.to_le_bytes());
    }
    let number = u32::try_from((list.len() - at - 4) / ENTRY_BYTES).expect("there are no more units than numbers");
    list[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

/// The units and hashes of the next region, which has so many `units`; `what` names one. Leaves the rest of the list.
///
/// # Errors
/// If it is cut off, or names a unit that the region does not have.
pub fn take_region(list: &mut &[u8], units: usize, what: &'static str) -> Result<BTreeMap<usize, u128>, ChangesError> {
    let (number, rest) = list.split_first_chunk::<4>().ok_or(ChangesError::Cut)?;
    let length = (u32::from_le_bytes(*number) as usize).checked_mul(ENTRY_BYTES).ok_or(ChangesError::Cut)?;
    let (entries, rest) = rest.split_at_checked(length).ok_or(ChangesError::Cut)?;
    let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
    let number = |entry: &[u8; ENTRY_BYTES]| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) as usize;
    let hash = |entry: &[u8; ENTRY_BYTES]| u128::from_le_bytes(std::array::from_fn(|i| entry[4 + i]));
    let all: BTreeMap<_, _> = entries.iter().map(|entry| (number(entry), hash(entry))).collect();
    *list = rest;
    match all.keys().find(|unit| **unit >= units) {
        Some(&unit) => Err(ChangesError::NoSuchUnit { what, unit, units }),
        None => Ok(all),
    }
}

/// The units that differ, given what this side has changed, its hashes, and the other side's changes: a unit that only one side has changed is another on the
/// other, unless it was changed back.
pub fn differing(ours: &PageSet, hashes: &[u128], theirs: &BTreeMap<usize, u128>) -> PageSet {
    let mut wanted = PageSet::none(hashes.len());
    ours.iter().filter(|unit| theirs.get(unit) != Some(&hashes[*unit])).for_each(|unit| wanted.insert(unit));
    theirs.iter().filter(|(unit, hash)| hashes[**unit] != **hash).for_each(|(&unit, _)| wanted.insert(unit));
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_wanted() {
        let hashes: Vec<u128> = (0..100).map(|unit| unit << 64 | 7).collect();
        let mut theirs = PageSet::none(100);
        [3, 5, 6, 99].iter().for_each(|&unit| theirs.insert(unit));
        let mut other = hashes.clone();
        other[5] = 1;
        other[99] = 2;
        let mut list = Vec::new();
        put_region(theirs.iter().map(|unit| (unit, other[unit])), &mut list);
        put_region([(7, 8)], &mut list);
        let mut rest = &list[..];
        let parsed = take_region(&mut rest, 100, "page").unwrap();
        assert_eq!(take_region(&mut rest, 8, "block").unwrap(), BTreeMap::from([(7, 8)]));
        assert!(rest.is_empty());
        let mut ours = PageSet::none(100);
        [3, 4, 5].iter().for_each(|&unit| ours.insert(unit));
        // 3: both wrote the same; 4: here alone; 5: differently; 6: there alone, and back; 99: there alone.
        assert_eq!(differing(&ours, &hashes, &parsed).iter().collect::<Vec<_>>(), [4, 5, 99]);
    }

    #[test]
    fn lists_of_strangers_are_refused() {
        let mut strange = Vec::new();
        put_region([(u32::MAX as usize, 0)], &mut strange);
        let wrong = ChangesError::NoSuchUnit { what: "page", unit: u32::MAX as usize, units: 100 };
        assert_eq!(take_region(&mut &strange[..], 100, "page"), Err(wrong));
        for cut in 0..strange.len() {
            assert_eq!(take_region(&mut &strange[..cut], 100, "page"), Err(ChangesError::Cut), "{cut}");
        }
        assert_eq!(take_region(&mut &[255; 4][..], 100, "page"), Err(ChangesError::Cut));
    }
}
