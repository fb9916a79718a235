//! Which units two machines must exchange to be equal again: one says what it has written, by hash, the other keeps that, and only what differs travels.
//!
//! **In:** entries of the other side as bytes, as often as it has something new; what was sent to it; sets of units and hashes of this side. **Out:** entries as bytes; which units
//! are other on the other side. **Invariant:** a unit in which the two differ is in the result, if at least one of the sides has named it; memory follows the number of units, whatever comes.
//!
//! An entry on the wire: the unit's number (u32) and its hash (of a page [`crate::unit_hash`], u128), little-endian. What is said later of the same unit counts.
use twinstep_machine::PageSet;

/// Bytes of a unit's entry.
pub const ENTRY_BYTES: usize = 4 + 16;

/// Why what the other side says cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// An entry is not whole.
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

/// Appends the entry of a unit.
///
/// # Panics
/// If its number does not fit 32 bits.
pub fn put_entry(unit: usize, hash: u128, to: &mut Vec<u8>) {
    to.extend(u32::try_from(unit).expect("units have numbers of 32 bits").to_le_bytes());
    to.extend(hash.to_le_bytes());
}

/// What is known of a region of the other side.
#[derive(Debug)]
pub struct Known {
    what: &'static str,
    hashes: Vec<u128>,
    known: PageSet,
    /// What was sent takes the place of whatever the other side writes there itself.
    sent: PageSet,
}

impl Known {
    /// Nothing, of a region of so many `units`; `what` names one.
    pub fn nothing(units: usize, what: &'static str) -> Self {
        Self { what, hashes: vec![0; units], known: PageSet::none(units), sent: PageSet::none(units) }
    }
    /// Takes entries in.
    ///
    /// # Errors
    /// If one is cut off, or names a unit that the region does not have.
    pub fn take(&mut self, entries: &[u8]) -> Result<(), ChangesError> {
        let (entries, []) = entries.as_chunks::<ENTRY_BYTES>() else { return Err(ChangesError::Cut) };
        for entry in entries {
            let unit = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) as usize;
            let hash = u128::from_le_bytes(std::array::from_fn(|i| entry[4 + i]));
            let units = self.hashes.len();
            let known = self.hashes.get_mut(unit).ok_or(ChangesError::NoSuchUnit { what: self.what, unit, units })?;
            if !self.sent.contains(unit) {
                *known = hash;
                self.known.insert(unit);
            }
        }
        Ok(())
    }
    /// The other side has this unit, or will have it before it counts.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn sent(&mut self, unit: usize, hash: u128) {
        self.hashes[unit] = hash;
        self.known.insert(unit);
        self.sent.insert(unit);
    }
    /// The units in which the two may differ, given what this side has changed.
    pub fn suspects(&self, ours: &PageSet) -> PageSet {
        let mut all = self.known.clone();
        all.join(ours);
        all
    }
    /// Whether the other side is known to have the unit with this hash.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn is(&self, unit: usize, hash: u128) -> bool {
        self.known.contains(unit) && self.hashes[unit] == hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(units: &[(usize, u128)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        units.iter().for_each(|&(unit, hash)| put_entry(unit, hash, &mut bytes));
        bytes
    }

    #[test]
    fn only_what_differs_is_wanted() {
        let hashes: Vec<u128> = (0..100).map(|unit| unit << 64 | 7).collect();
        let mut theirs = Known::nothing(100, "page");
        theirs.take(&entries(&[(3, 1), (5, 1), (6, hashes[6])])).unwrap();
        // What is said later counts.
        theirs.take(&entries(&[(3, hashes[3]), (99, 2)])).unwrap();
        let mut ours = PageSet::none(100);
        [3, 4, 5].iter().for_each(|&unit| ours.insert(unit));
        let differing =
            |theirs: &Known| -> Vec<_> { theirs.suspects(&ours).iter().filter(|&unit| !theirs.is(unit, hashes[unit])).collect() };
        // 3: both wrote the same; 4: here alone; 5: differently; 6: there alone, and back; 99: there alone.
        assert_eq!(differing(&theirs), [4, 5, 99]);
        // What was sent is there, whatever the other side writes.
        theirs.sent(4, hashes[4]);
        theirs.sent(5, hashes[5]);
        theirs.take(&entries(&[(5, 9), (6, 9)])).unwrap();
        assert_eq!(differing(&theirs), [6, 99]);
        theirs.sent(6, 1);
        assert_eq!(differing(&theirs), [6, 99], "it has changed here since it was sent");
    }

    #[test]
    fn entries_of_strangers_are_refused() {
        let mut theirs = Known::nothing(100, "page");
        let strange = entries(&[(u32::MAX as usize, 0)]);
        let wrong = ChangesError::NoSuchUnit { what: "page", unit: u32::MAX as usize, units: 100 };
        assert_eq!(theirs.take(&strange), Err(wrong));
        for cut in 1..strange.len() {
            assert_eq!(theirs.take(&strange[..cut]), Err(ChangesError::Cut), "{cut}");
        }
    }
}
