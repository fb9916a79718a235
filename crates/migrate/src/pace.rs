//! Rates, and what follows from them: when the rest is little enough, and what to do if it does not become so.
//!
//! **In:** what a round sent, how long that took, what was written meanwhile. **Out:** how much may be left at the cut, how far to slow the guest.
//! **Invariant:** what may be left is never more than [`Config::stop_bytes`], and always enough for a guest that stands still.

/// What to do with a guest that writes faster than can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NotConverging {
    /// It gets less and less time, until it writes little enough. The pause at the cut stays as it was wished.
    #[default]
    Slow,
    /// It stands still for as long as the rest takes: a longer pause, over sooner.
    Stop,
}

/// The bounds of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// From the cut until the destination has all of it, in nanoseconds, as expected from the rates; the guest stands still for a part of that.
    pub target_ns: u64,
    /// Bytes of units that are left at the cut at most. Bounds the source's memory.
    pub stop_bytes: u64,
    /// What to do if it does not converge.
    pub not_converging: NotConverging,
    /// After so many rounds the guest stands still until the rest is sent.
    pub max_rounds: u64,
    /// Bytes of units that are asked for at once; the guest waits for so much to be copied.
    pub batch_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            target_ns: 30_000_000,
            stop_bytes: 32 << 20,
            not_converging: NotConverging::default(),
            max_rounds: 40,
            batch_bytes: 512 << 10,
        }
    }
}

/// What the cut costs besides its units: the state of devices.
const FIXED_NS: u64 = 2_000_000;
/// Rounds smaller than this say nothing of the rate.
const MEASURED_BYTES: u64 = 1 << 20;
/// May be left at the cut, however slow the way is.
const LEAST_BYTES: u64 = 64 << 10;
/// Bytes a second, before anything was measured.
const FIRST_RATE: u64 = 100_000_000;
/// A round that leaves more than this many hundredths of what it sent does not converge.
const CONVERGES_PERCENT: u64 = 70;
/// How much of its time a guest loses, step by step.
const STEPS: [u8; 8] = [0, 50, 75, 88, 94, 97, 98, 99];

/// Keeps the rates of one copy.
#[derive(Debug, Clone)]
pub struct Pace {
    config: Config,
    /// Bytes of units a second, from the machine into the stream.
    rate: Option<u64>,
    dirty_rate: u64,
    step: usize,
    stopped: bool,
}

impl Pace {
    /// Nothing is known.
    pub fn new(config: Config) -> Self {
        Self { config, rate: None, dirty_rate: 0, step: 0, stopped: false }
    }

    /// A round has sent `sent` bytes of units in `took_ns`; `dirty` bytes were written meanwhile. Says how far the guest is to be slowed now, in hundredths of its
    /// time, if that changes.
    pub fn round(&mut self, round: u64, sent: u64, took_ns: u64, dirty: u64) -> Option<u8> {
        let took_ns = took_ns.max(1);
        let per_s = |bytes: u64| u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(took_ns)).unwrap_or(u64::MAX);
        self.dirty_rate = per_s(dirty);
        if sent >= MEASURED_BYTES {
            let measured = per_s(sent).max(1);
            self.rate = Some(self.rate.map_or(measured, |rate| rate / 2 + measured / 2));
        }
        if self.stopped || dirty <= self.most() {
            return None;
        }
        if round >= self.config.max_rounds {
            self.stopped = true;
            return Some(100);
        }
        // The first round sends everything, also what nobody writes: it says nothing.
        if round < 2 || dirty <= sent / 100 * CONVERGES_PERCENT {
            return None;
        }
        match self.config.not_converging {
            NotConverging::Stop => {
                self.stopped = true;
                Some(100)
            }
            NotConverging::Slow if self.step + 1 < STEPS.len() => {
                self.step += 1;
                Some(STEPS[self.step])
            }
            NotConverging::Slow => None,
        }
    }

    /// So many bytes of units may be left at the cut.
    pub fn most(&self) -> u64 {
        let ns = self.config.target_ns.saturating_sub(FIXED_NS);
        let bytes = u128::from(self.rate.unwrap_or(FIRST_RATE)) * u128::from(ns) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(LEAST_BYTES, self.config.stop_bytes.max(LEAST_BYTES))
    }

    /// How long the destination waits for so many bytes, in nanoseconds.
    pub fn expected_ns(&self, bytes: u64) -> u64 {
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.unwrap_or(FIRST_RATE).max(1));
        FIXED_NS.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Bytes of units a second that are sent, as far as known.
    pub fn rate(&self) -> Option<u64> {
        self.rate
    }
    /// Bytes of units a second that were written in the last round.
    pub fn dirty_rate(&self) -> u64 {
        self.dirty_rate
    }
    /// How much of its time the guest loses, in hundredths.
    pub fn slowed(&self) -> u8 {
        if self.stopped { 100 } else { STEPS[self.step] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn what_may_be_left_follows_the_rate_and_its_bounds() {
        let mut pace = Pace::new(Config::default());
        assert_eq!(pace.most(), 2_800_000);
        pace.round(1, 500_000_000, S, 0);
        assert_eq!((pace.rate(), pace.most()), (Some(500_000_000), 14_000_000));
        assert_eq!(pace.expected_ns(14_000_000), 30_000_000);
        pace.round(2, 1000, S, 0);
        assert_eq!(pace.rate(), Some(500_000_000), "little says nothing");
        pace.round(3, u64::MAX, 1, 0);
        assert_eq!(pace.most(), 32 << 20);
        let mut slow = Pace::new(Config { target_ns: 0, ..Config::default() });
        slow.round(1, 2 << 20, u64::MAX, u64::MAX);
        assert_eq!(slow.most(), LEAST_BYTES);
        assert!(slow.expected_ns(u64::MAX) > 1 << 60);
    }

    #[test]
    fn a_guest_that_writes_too_fast_is_slowed_step_by_step_and_stops_at_last() {
        let mut pace = Pace::new(Config { max_rounds: 12, ..Config::default() });
        let steps: Vec<_> = (1..=14).map(|round| pace.round(round, 300_000_000, S, 300_000_000)).collect();
        let expected: Vec<_> = [0, 50, 75, 88, 94, 97, 98, 99, 0, 0, 0, 100, 0, 0].map(|s| (s > 0).then_some(s)).into();
        assert_eq!(steps, expected);
        assert_eq!((pace.slowed(), pace.dirty_rate()), (100, 300_000_000));
    }

    #[test]
    fn or_it_stops_at_once_and_one_that_converges_is_left_alone() {
        let mut pace = Pace::new(Config { not_converging: NotConverging::Stop, ..Config::default() });
        assert_eq!(pace.round(1, 300_000_000, S, 300_000_000), None);
        assert_eq!(pace.round(2, 300_000_000, S, 200_000_000), None, "it becomes less");
        assert_eq!(pace.round(3, 200_000_000, S, 150_000_000), Some(100));
        assert_eq!(pace.round(4, 150_000_000, S, 150_000_000), None);
    }
}
