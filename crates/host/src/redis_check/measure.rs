//! The client's view of time: how long replies take, and how long none comes.
//!
//! *In*: when replies came, and when somebody was killed. *Out*: figures. *Invariant*: memory is bounded; what is left out is the small gaps and the
//! late samples, never the longest gap.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Samples kept for the percentiles. More than ten minutes at the rate an emulated guest manages.
const SAMPLES: usize = 4 << 20;
/// Gaps shorter than this are not worth remembering one by one...
const SMALL: Duration = Duration::from_millis(1);
/// ...and so many of the others are remembered.
const GAPS: usize = 1 << 20;

/// From command to reply, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Half are faster.
    pub median_us: u32,
    /// 99 of 100 are faster.
    pub p99_us: u32,
    /// The slowest.
    pub max_us: u32,
}

/// What the client saw of one kill, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interruption {
    /// When, since the load began.
    pub at_ms: f64,
    /// The longest time without a reply that ended after the kill.
    pub longest_gap_ms: f64,
    /// From the kill to the reply that ended that gap.
    pub first_reply_after_ms: f64,
}

#[derive(Debug, Clone, Copy)]
struct Gap {
    from: Instant,
    to: Instant,
}

/// Collects.
#[derive(Debug)]
pub struct Measure {
    start: Instant,
    last: Instant,
    longest: Duration,
    gaps: Vec<Gap>,
    samples: Vec<u32>,
}

/// To the microsecond: more digits would only look exact.
fn ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

impl Measure {
    /// From now on.
    pub fn new(start: Instant) -> Self {
        Self { start, last: start, longest: Duration::ZERO, gaps: Vec::new(), samples: Vec::new() }
    }

    /// Some replies came.
    pub fn replies_arrived(&mut self, now: Instant) {
        let gap = now - self.last;
        self.longest = self.longest.max(gap);
        if gap >= SMALL && self.gaps.len() < GAPS {
            self.gaps.push(Gap { from: self.last, to: now });
        }
        self.last = now;
    }

    /// One of them took so long.
    pub fn latency_of(&mut self, duration: Duration) {
        if self.samples.len() < SAMPLES {
            self.samples.push(u32::try_from(duration.as_micros()).unwrap_or(u32::MAX));
        }
    }

    /// The percentiles.
    pub fn latency(&mut self) -> Latency {
        self.samples.sort_unstable();
        let at =
            |percent: usize| self.samples.get((self.samples.len() * percent / 100).min(self.samples.len().saturating_sub(1)));
        Latency {
            median_us: at(50).copied().unwrap_or(0),
            p99_us: at(99).copied().unwrap_or(0),
            max_us: self.samples.last().copied().unwrap_or(0),
        }
    }

    /// The longest time without a reply.
    pub fn longest_gap_ms(&self) -> f64 {
        ms(self.longest)
    }

    /// What was seen of each kill: the longest gap that ended after it and before the next kill. Replies that were on their way when the
    /// host died may come shortly after the kill; the gap begins after them.
    pub fn interruptions(&self, marks: &[Instant]) -> Vec<Interruption> {
        let mut found = Vec::new();
        for (index, mark) in marks.iter().enumerate() {
            let next = marks.get(index + 1);
            let after = self.gaps.iter().filter(|gap| gap.to > *mark && next.is_none_or(|next| gap.from < *next));
            let longest = after.max_by_key(|gap| gap.to - gap.from);
            found.push(Interruption {
                at_ms: ms(mark.saturating_duration_since(self.start)),
                longest_gap_ms: longest.map_or(0.0, |gap| ms(gap.to - gap.from)),
                first_reply_after_ms: longest.map_or(0.0, |gap| ms(gap.to - *mark)),
            });
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_belong_to_their_kill() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut measure = Measure::new(start);
        // A slow start, a kill at 500 with a late reply at 510, silence until 800, a second kill at 2000 without much of a gap.
        for t in (300..=500).step_by(10).chain([510, 800]).chain((810..2050).step_by(10)) {
            measure.replies_arrived(at(t));
        }
        let found = measure.interruptions(&[at(505), at(2000)]);
        assert_eq!(found[0], Interruption { at_ms: 505.0, longest_gap_ms: 290.0, first_reply_after_ms: 295.0 });
        assert_eq!(found[1].longest_gap_ms, 10.0);
        assert_eq!(measure.longest_gap_ms(), 300.0);
    }

    #[test]
    fn percentiles() {
        let mut measure = Measure::new(Instant::now());
        assert_eq!(measure.latency(), Latency::default());
        for us in (1..=100).rev() {
            measure.latency_of(Duration::from_micros(us));
        }
        assert_eq!(measure.latency(), Latency { median_us: 51, p99_us: 100, max_us: 100 });
    }
}
