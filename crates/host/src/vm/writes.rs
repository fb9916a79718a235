//! A guest that writes to its disks faster than they can be copied: after it has written it waits until that much could be sent.
//!
//! *In*: the limit and what was written ([`Replica::write_limit`], [`Replica::became_unsent`]), the time. *Out*: how long the guest must not run. *Invariant*: over any time the guest dirties no more
//! than the limit allows, but for what one slice writes; a guest that does not write never waits.
use crate::disk::Replica;

/// Keeps what the guest has written and not waited for.
#[derive(Debug, Default)]
pub(super) struct Writes {
    /// What had become unsent when it was looked at last.
    seen: u64,
    /// Bytes that the guest is ahead of the limit, at `at_ns`.
    ahead: u64,
    at_ns: u64,
}

impl Writes {
    /// How long the guest must wait from `now` on, if it must.
    pub(super) fn wait_ns(&mut self, disks: &[Replica], now: u64) -> Option<u64> {
        let seen = disks.iter().map(Replica::became_unsent).sum();
        let new = seen - std::mem::replace(&mut self.seen, seen);
        match disks.iter().filter_map(Replica::write_limit).min() {
            Some(limit) => self.account(new, limit, now),
            None => {
                self.ahead = 0;
                None
            }
        }
    }

    fn account(&mut self, new: u64, limit: u64, now: u64) -> Option<u64> {
        const S: u128 = 1_000_000_000;
        if self.ahead == 0 {
            self.at_ns = now;
        }
        let paid = u128::from(now.saturating_sub(self.at_ns)) * u128::from(limit) / S;
        self.at_ns += u64::try_from(paid * S / u128::from(limit)).unwrap_or(u64::MAX);
        self.ahead = self.ahead.saturating_sub(u64::try_from(paid).unwrap_or(u64::MAX)) + new;
        let ns = u64::try_from(u128::from(self.ahead) * S / u128::from(limit)).unwrap_or(u64::MAX);
        (ns > 0).then_some(ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_guest_waits_for_what_it_wrote_and_not_for_what_it_might() {
        let mut writes = Writes::default();
        assert_eq!(writes.account(0, 1000, 5 * MS), None);
        assert_eq!(writes.account(100, 1000, 10 * MS), Some(100 * MS), "time without writing is not saved up");
        assert_eq!(writes.account(0, 1000, 60 * MS), Some(50 * MS));
        assert_eq!(writes.account(0, 500, 60 * MS), Some(100 * MS), "the limit became lower");
        assert_eq!(writes.account(10, 500, 100 * MS), Some(80 * MS));
        assert_eq!(writes.account(0, 500, 180 * MS), None);
        // However often it is looked at.
        assert_eq!(writes.account(2, 1000, 200 * MS), Some(2 * MS));
        for step in 1..20 {
            let left = writes.account(0, 1000, 200 * MS + step * MS / 10);
            assert_eq!(left.is_some(), step < 20, "{step}");
        }
        assert_eq!(writes.account(0, 1000, 202 * MS), None);
        assert_eq!(writes.account(u64::MAX, 1, 300 * MS), Some(u64::MAX));
    }

    #[test]
    fn only_what_must_be_sent_counts_and_only_while_there_is_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let disk = [Replica::create(&dir.path().join("a.img"), None, 1 << 20).unwrap()];
        let mut writes = Writes::default();
        let block = vec![1; 65536];
        disk[0].write_block(0, &block).unwrap();
        assert_eq!(writes.wait_ns(&disk, 0), None);
        disk[0].begin_mirror(1);
        disk[0].write_block(0, &block).unwrap();
        disk[0].limit_writes(2, Some(65536));
        assert_eq!((disk[0].write_limit(), writes.wait_ns(&disk, 0)), (None, None), "of another mirror");
        disk[0].limit_writes(1, Some(65536));
        assert_eq!(writes.wait_ns(&disk, 0), None, "it was written before");
        disk[0].write_block(0, &block).unwrap();
        assert_eq!(writes.wait_ns(&disk, 0), None, "it is sent once");
        disk[0].write_block(1, &block).unwrap();
        assert_eq!(writes.wait_ns(&disk, 0), Some(1000 * MS));
        disk[0].end_mirror(1);
        assert_eq!(writes.wait_ns(&disk, 0), None);
    }
}
