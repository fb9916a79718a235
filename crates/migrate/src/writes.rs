//! Disks that are written faster than can be sent: when what is left of them is little enough for the cut, and to how many bytes a second the guest's writes are held until it is.
//!
//! **In:** what a pass over the written blocks sent, how long that took, what was written meanwhile. **Out:** a limit. **Invariants:** each pass that does not leave less than the one before
//! at least halves the limit, and after [`MAX_PASSES`] of them the writer waits until what it wrote is sent: so the passes end. A guest that does not write is never held.
use crate::pace::{Config, NotConverging};

/// Passes after which whoever writes waits until all is sent.
pub const MAX_PASSES: u32 = 12;
/// Bytes a second: whoever has written waits until that is sent.
pub const STANDSTILL: u64 = 1;

/// Passes smaller than this say nothing of the rate.
const MEASURED_BYTES: u64 = 1 << 20;
/// Bytes a second, before anything was measured.
const FIRST_RATE: u64 = 100_000_000;
/// A pass that leaves more than this many hundredths of what it sent does not converge.
const CONVERGES_PERCENT: u64 = 70;

/// Keeps the rates of one copy's disks.
#[derive(Debug, Clone)]
pub struct WritePace {
    config: Config,
    /// Bytes that may be left, whatever the rate.
    least: u64,
    most: u64,
    rate: Option<u64>,
    limit: Option<u64>,
    passes: u32,
}

impl WritePace {
    /// Nothing is known. At the cut at least `least` bytes may be left, and never more than `most`.
    pub fn new(config: Config, least: u64, most: u64) -> Self {
        Self { config, least, most, rate: None, limit: None, passes: 0 }
    }

    /// Passes are counted from here. `rate` is what is known of the way from elsewhere, in bytes a second; 0: nothing.
    pub fn begin(&mut self, rate: u64) {
        self.passes = 0;
        self.rate = self.rate.or(Some(rate).filter(|rate| *rate > 0));
    }

    /// A pass has sent `sent` bytes of blocks in `took_ns`; `left` bytes were written meanwhile. Gives the limit of writes in bytes a second, if that changes now.
    pub fn pass(&mut self, sent: u64, took_ns: u64, left: u64) -> Option<u64> {
        if sent >= MEASURED_BYTES {
            let measured = u128::from(sent) * 1_000_000_000 / u128::from(took_ns.max(1));
            let measured = u64::try_from(measured).unwrap_or(u64::MAX).max(1);
            self.rate = Some(self.rate.map_or(measured, |rate| rate / 2 + measured / 2));
        }
        self.passes += 1;
        if left <= self.may_be_left() {
            return None;
        }
        let before = self.limit;
        if self.passes >= MAX_PASSES {
            self.limit = Some(STANDSTILL);
        } else if left > sent / 100 * CONVERGES_PERCENT {
            self.limit = Some(match (self.config.not_converging, self.limit) {
                (NotConverging::Stop, _) => STANDSTILL,
                (NotConverging::Slow, None) => (self.rate.unwrap_or(FIRST_RATE) / 2).max(STANDSTILL),
                (NotConverging::Slow, Some(limit)) => (limit / 2).max(STANDSTILL),
            });
        }
        self.limit.filter(|_| self.limit != before)
    }

    /// So many bytes of blocks may be left at the cut: as much as is sent in the pause that is wished, and as the bounds say.
    pub fn may_be_left(&self) -> u64 {
        let bytes = u128::from(self.rate.unwrap_or(FIRST_RATE)) * u128::from(self.config.target_ns) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(self.least, self.most.max(self.least))
    }

    /// To how many bytes a second the guest's writes are held, if they are.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;
    const LEAST: u64 = 64 << 10;
    const MOST: u64 = 4 << 20;

    #[test]
    fn what_may_be_left_follows_the_rate_and_its_bounds() {
        let mut pace = WritePace::new(Config::default(), LEAST, MOST);
        assert_eq!(pace.may_be_left(), 3_000_000);
        assert_eq!(pace.pass(10 << 20, S, 0), None);
        assert_eq!(pace.may_be_left(), (10 << 20) * 3 / 100);
        pace.pass(100, S, 0);
        assert_eq!(pace.may_be_left(), (10 << 20) * 3 / 100, "little says nothing");
        pace.pass(u64::MAX, 1, 0);
        assert_eq!(pace.may_be_left(), MOST);
        let mut slow = WritePace::new(Config::default(), LEAST, MOST);
        slow.begin(0);
        assert_eq!(slow.may_be_left(), 3_000_000);
        slow.begin(1 << 20);
        assert_eq!(slow.may_be_left(), LEAST);
        slow.pass(10 << 20, S, 0);
        assert_eq!(slow.may_be_left(), ((1 << 19) + (5 << 20)) * 3 / 100);
    }

    /// A guest that writes as fast as it may, over a network: what each pass leaves is what is written while it is sent.
    fn passes(config: Config, network: u64, guest: u64, first: u64) -> (u32, WritePace) {
        let mut pace = WritePace::new(config, LEAST, MOST);
        let mut left = first;
        for number in 1..100 {
            let sent = left;
            let took_ns = (u128::from(sent) * u128::from(S) / u128::from(network)) as u64;
            let writes = pace.limit().map_or(guest, |limit| guest.min(limit));
            left = (u128::from(writes) * u128::from(took_ns) / u128::from(S)) as u64;
            pace.pass(sent, took_ns, left);
            if left <= pace.may_be_left() {
                return (number, pace);
            }
        }
        panic!("it does not end");
    }

    #[test]
    fn a_guest_that_writes_faster_than_can_be_sent_is_held_until_it_does_not() {
        for (network, guest) in [(1 << 20, 1 << 30), (10 << 20, 11 << 20), (100 << 20, 100 << 30), (100, 1 << 30)] {
            let (number, pace) = passes(Config::default(), network, guest, 1 << 30);
            assert!(number <= 2 * MAX_PASSES, "{network} {guest}: {number}");
            assert!(pace.limit().is_some_and(|limit| limit <= network), "{pace:?}");
        }
    }

    #[test]
    fn one_that_converges_is_left_alone() {
        let (_, pace) = passes(Config::default(), 100 << 20, 50 << 20, 1 << 30);
        assert_eq!(pace.limit(), None);
        // Unless that takes too long.
        let (number, pace) = passes(Config::default(), 100_000_000, 69_000_000, 1 << 40);
        assert_eq!((number, pace.limit()), (MAX_PASSES + 1, Some(STANDSTILL)));
    }

    #[test]
    fn or_whoever_writes_waits_at_once() {
        let config = Config { not_converging: NotConverging::Stop, ..Config::default() };
        let (number, pace) = passes(config, 100 << 20, 200 << 20, 1 << 30);
        assert_eq!((number, pace.limit()), (2, Some(STANDSTILL)));
    }
}
