//! How many entries of each kind, and how many bytes they take.
//!
//! **In:** entries as they are encoded or decoded. **Out:** numbers for people. **Invariant:** the total is the sum of the kinds.
use crate::entry::EntryKind;

/// Count of entries of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindStats {
    /// How many.
    pub entries: u64,
    /// Bytes they take, with headers and checksums.
    pub bytes: u64,
}

/// Counts of entries by kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogStats {
    by_kind: [KindStats; EntryKind::ALL.len()],
}

impl LogStats {
    /// Counts one entry that takes `bytes` bytes.
    pub fn count(&mut self, kind: EntryKind, bytes: usize) {
        let stats = &mut self.by_kind[kind.index()];
        stats.entries += 1;
        stats.bytes += bytes as u64;
    }

    /// The counts of one kind.
    pub fn of(&self, kind: EntryKind) -> KindStats {
        self.by_kind[kind.index()]
    }

    /// All kinds with their counts, also those that never came.
    pub fn iter(&self) -> impl Iterator<Item = (EntryKind, KindStats)> + '_ {
        EntryKind::ALL.into_iter().zip(self.by_kind)
    }

    /// All kinds together.
    pub fn total(&self) -> KindStats {
        self.by_kind.iter().fold(KindStats::default(), |sum, kind| KindStats {
            entries: sum.entries + kind.entries,
            bytes: sum.bytes + kind.bytes,
        })
    }
}

/// One line: the total, then every kind that came.
impl std::fmt::Display for LogStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let total = self.total();
        write!(f, "{} entries, {} bytes", total.entries, total.bytes)?;
        for (index, (kind, stats)) in self.iter().filter(|(_, stats)| stats.entries > 0).enumerate() {
            let separator = if index == 0 { ": " } else { ", " };
            write!(f, "{separator}{kind} {} ({} bytes)", stats.entries, stats.bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_shows() {
        let mut stats = LogStats::default();
        assert_eq!(stats.to_string(), "0 entries, 0 bytes");
        stats.count(EntryKind::Clock, 24);
        stats.count(EntryKind::Clock, 23);
        stats.count(EntryKind::End, 17);
        assert_eq!(stats.total(), KindStats { entries: 3, bytes: 64 });
        assert_eq!(stats.of(EntryKind::Clock), KindStats { entries: 2, bytes: 47 });
        assert_eq!(stats.to_string(), "3 entries, 64 bytes: clock 2 (47 bytes), end 1 (17 bytes)");
    }
}
