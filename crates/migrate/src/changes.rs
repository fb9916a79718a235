//! Which units two machines must exchange to be equal again: each lists what it has written, by hash, and only what differs travels.
//!
//! **In:** sets of units, hashes of all units, the other side's list as bytes. **Out:** a list as bytes; the set of units that differ. **Invariant:** a unit in
//! which the two differ is in the result, if at least one of the sides has it in its list.
//!
//! A list on the wire: for each unit its number (u32) and its hash ([`crate::unit_hash`], u128), little-endian.
use std::collections::BTreeMap;

use twinstep_machine::PageSet;

/// Bytes of a unit's entry.
pub const ENTRY_BYTES: usize = 4 + 16;

/// Why the other side's list cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// Not a whole number of entries.
    #[error("the list of changed pages is cut off")]
    Cut,
    /// It names a unit that does not exist.
    #[error("the list says that page {unit} has changed; there are {units}")]
    NoSuchUnit {
        /// The one named.
        unit: usize,
        /// How many there are.
        units: usize,
    },
}

/// The list of these units.
///
/// # Panics
/// If a unit has no hash.
pub fn list(units: &PageSet, hashes: &[u128]) -> Vec<u8> {
    let mut list = Vec::with_capacity(units.len() * ENTRY_BYTES);
    for unit in units.iter() {
        list.extend((unit as u32).to_le_bytes());
        list.extend(hashes[unit].to_le_bytes());
    }
    list
}

/// The units and hashes of a list.
///
/// # Errors
/// If it is cut off, or names a unit that is not among the `units`.
pub fn parse(list: &[u8], units: usize) -> Result<BTreeMap<usize, u128>, ChangesError> {
    let (entries, rest) = list.as_chunks::<ENTRY_BYTES>();
    if !rest.is_empty() {
        return Err(ChangesError::Cut);
    }
    let number = |entry: &[u8; ENTRY_BYTES]| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) as usize;
    let hash = |entry: &[u8; ENTRY_BYTES]| u128::from_le_bytes(std::array::from_fn(|i| entry[4 + i]));
    let all: BTreeMap<_, _> = entries.iter().map(|entry| (number(entry), hash(entry))).collect();
    match all.keys().find(|unit| **unit >= units) {
        Some(&unit) => Err(ChangesError::NoSuchUnit { unit, units }),
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
        let parsed = parse(&list(&theirs, &other), 100).unwrap();
        let mut ours = PageSet::none(100);
        [3, 4, 5].iter().for_each(|&unit| ours.insert(unit));
        // 3: both wrote the same; 4: here alone; 5: differently; 6: there alone, and back; 99: there alone.
        assert_eq!(differing(&ours, &hashes, &parsed).iter().collect::<Vec<_>>(), [4, 5, 99]);
    }

    #[test]
    fn lists_of_strangers_are_refused() {
        let mut strange = u32::MAX.to_le_bytes().to_vec();
        strange.extend([0; 16]);
        assert_eq!(parse(&strange, 100), Err(ChangesError::NoSuchUnit { unit: u32::MAX as usize, units: 100 }));
        assert_eq!(parse(&strange[..19], 100), Err(ChangesError::Cut));
    }
}
