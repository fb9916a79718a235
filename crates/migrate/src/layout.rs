//! What is copied: regions of units of one size.
//!
//! **In:** regions. **Out:** a checked [`Layout`]. **Invariant:** within its bounds, so that whoever agrees to a layout knows how much memory the copy takes.
use twinstep_machine::PageSet;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Most regions.
pub const MAX_REGIONS: usize = 32;
/// Most units of all regions together: 256 GiB of RAM.
pub const MAX_UNITS: u64 = 1 << 26;
/// Sizes a unit may have, in bytes; powers of two only.
pub const UNIT_BYTES: std::ops::RangeInclusive<u32> = 512..=1 << 20;

/// Units of one size, numbered from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Bytes of a unit: a power of two within [`UNIT_BYTES`].
    pub unit_bytes: u32,
    /// How many there are.
    pub units: u64,
}

impl Region {
    /// RAM in pages of 4 KiB.
    pub fn pages(pages: usize) -> Self {
        Self { unit_bytes: 4096, units: pages as u64 }
    }
}

/// The regions; each is named by its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout(Vec<Region>);

/// What is wrong with a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// None, or too many.
    #[error("{0} regions, where 1 to {MAX_REGIONS} may be")]
    Regions(usize),
    /// A unit has no size of those allowed.
    #[error("region {region} has units of {bytes} bytes, which is no power of two between 512 and 1048576")]
    UnitBytes {
        /// Which region.
        region: usize,
        /// The size.
        bytes: u32,
    },
    /// Too many.
    #[error("more than {MAX_UNITS} units")]
    Units,
}

impl Layout {
    /// Checks the regions.
    ///
    /// # Errors
    /// If there are none or too many, or their units have a strange size, or are too many.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(LayoutError::Regions(regions.len()));
        }
        if let Some((region, found)) =
            regions.iter().enumerate().find(|(_, r)| !UNIT_BYTES.contains(&r.unit_bytes) || !r.unit_bytes.is_power_of_two())
        {
            return Err(LayoutError::UnitBytes { region, bytes: found.unit_bytes });
        }
        let total = regions.iter().try_fold(0_u64, |sum, r| sum.checked_add(r.units));
        if total.is_none_or(|total| total > MAX_UNITS) {
            return Err(LayoutError::Units);
        }
        Ok(Self(regions))
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.0
    }
    /// No unit of any region.
    pub fn nothing(&self) -> Vec<PageSet> {
        self.0.iter().map(|r| PageSet::none(r.units as usize)).collect()
    }
    /// All units of all regions.
    pub fn everything(&self) -> Vec<PageSet> {
        self.0.iter().map(|r| PageSet::all(r.units as usize)).collect()
    }
    /// Bytes of the units in these sets, one set for each region.
    pub fn bytes_of(&self, sets: &[PageSet]) -> u64 {
        self.0.iter().zip(sets).map(|(r, set)| u64::from(r.unit_bytes) * set.len() as u64).sum()
    }
}

/// The hash of a unit: XXH3-128 seeded with its number; 0 if all its bytes are zero. It finds differences that happen; it is no defence against somebody
/// who makes them.
pub fn unit_hash(unit: u64, bytes: &[u8]) -> u128 {
    if is_zero(bytes) { 0 } else { xxh3_128_with_seed(bytes, unit) }
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused() {
        let region = |unit_bytes, units| Region { unit_bytes, units };
        assert_eq!(Layout::new(Vec::new()), Err(LayoutError::Regions(0)));
        assert_eq!(Layout::new(vec![region(4096, 1); 33]), Err(LayoutError::Regions(33)));
        for bytes in [0, 256, 4095, 2 << 20] {
            let found = Layout::new(vec![region(4096, 1), region(bytes, 1)]);
            assert_eq!(found, Err(LayoutError::UnitBytes { region: 1, bytes }));
        }
        for units in [MAX_UNITS, u64::MAX] {
            assert_eq!(Layout::new(vec![region(4096, 1), region(4096, units)]), Err(LayoutError::Units));
        }
        let layout = Layout::new(vec![region(4096, 70), region(1 << 20, 3)]).unwrap();
        assert_eq!(layout.bytes_of(&layout.everything()), 70 * 4096 + (3 << 20));
        assert_eq!(layout.bytes_of(&layout.nothing()), 0);
    }

    #[test]
    fn zeroes_are_seen_wherever_they_end() {
        for length in [0, 1, 63, 64, 65, 4096] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes) && unit_hash(5, &bytes) == 0);
            if let Some(last) = bytes.last_mut() {
                *last = 1;
                assert!(!is_zero(&bytes) && unit_hash(5, &bytes) != unit_hash(6, &bytes));
            }
        }
    }
}
