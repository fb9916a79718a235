//! How long many things took: quantiles since the start, and of the last minute.
//!
//! *In*: times, each with the moment it was over. *Out*: count, sum, median, 99th percentile, longest. *Invariant*: memory is fixed, however many come; a
//! quantile is off by less than 1 %, count and sum not at all.
//!
//! The minute is made of slices. The oldest is forgotten as a whole, so "the last minute" is 55 to 60 seconds.
use hdrhistogram::Histogram;

use super::Quantiles;

/// What a slice of the minute lasts.
const SLICE_NS: u64 = 5_000_000_000;
/// Slices in a minute.
const SLICES: usize = 12;
/// Below this, times are not told apart.
const FINEST_NS: u64 = 100;
/// Longer times count as this one: an hour.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// Times of one sort.
#[derive(Debug, Clone)]
struct Times {
    histogram: Histogram<u64>,
    sum_ns: u64,
    max_ns: u64,
}

impl Times {
    fn new() -> Self {
        let histogram = Histogram::new_with_bounds(FINEST_NS, LONGEST_NS, 2).expect("the bounds fit each other");
        Self { histogram, sum_ns: 0, max_ns: 0 }
    }
    fn clear(&mut self) {
        self.histogram.reset();
        (self.sum_ns, self.max_ns) = (0, 0);
    }
    fn add(&mut self, ns: u64) {
        self.histogram.saturating_record(ns.min(LONGEST_NS));
        self.sum_ns = self.sum_ns.saturating_add(ns);
        self.max_ns = self.max_ns.max(ns);
    }
    fn merge(&mut self, other: &Times) {
        self.histogram.add(&other.histogram).expect("all have the same bounds");
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }
    fn quantiles(&self) -> Quantiles {
        // A bucket's upper end may lie beyond the longest time in it.
        let at = |q| self.histogram.value_at_quantile(q).min(self.max_ns);
        Quantiles { count: self.histogram.len(), sum_ns: self.sum_ns, p50_ns: at(0.5), p99_ns: at(0.99), max_ns: self.max_ns }
    }
}

/// Times, since the start and of the last minute.
#[derive(Debug)]
pub struct Latency {
    total: Times,
    /// Each with the number of the slice of time it is of.
    slices: Vec<(u64, Times)>,
    /// Where slices are added up.
    minute: Times,
}

impl Default for Latency {
    fn default() -> Self {
        Self { total: Times::new(), slices: vec![(0, Times::new()); SLICES], minute: Times::new() }
    }
}

impl Latency {
    /// Something that took so long was over at `now_ns`.
    pub fn add(&mut self, now_ns: u64, ns: u64) {
        self.total.add(ns);
        let number = now_ns / SLICE_NS;
        let (of, slice) = &mut self.slices[(number % SLICES as u64) as usize];
        if *of != number {
            slice.clear();
            *of = number;
        }
        slice.add(ns);
    }
    /// Since the start.
    pub fn total(&self) -> Quantiles {
        self.total.quantiles()
    }
    /// Of the last minute.
    pub fn minute(&mut self, now_ns: u64) -> Quantiles {
        let now = now_ns / SLICE_NS;
        self.minute.clear();
        for (_, slice) in self.slices.iter().filter(|(of, times)| now - (*of).min(now) < SLICES as u64 && times.max_ns > 0) {
            self.minute.merge(slice);
        }
        self.minute.quantiles()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn near(found: u64, exact: u64) {
        assert!(found.abs_diff(exact) * 100 <= exact, "{found} is not near {exact}");
    }

    #[test]
    fn quantiles_are_near_and_the_rest_is_exact() {
        let mut latency = Latency::default();
        assert_eq!(latency.total(), Quantiles::default());
        assert_eq!(latency.minute(0), Quantiles::default());
        for n in 1..=1000 {
            latency.add(n, n * 1_000);
        }
        let total = latency.total();
        assert_eq!((total.count, total.sum_ns, total.max_ns), (1000, 500_500_000, 1_000_000));
        near(total.p50_ns, 500_000);
        near(total.p99_ns, 990_000);
        assert_eq!(latency.minute(1000), total);
    }

    #[test]
    fn extremes_have_a_place() {
        let mut latency = Latency::default();
        for ns in [0, 1, u64::MAX] {
            latency.add(0, ns);
        }
        let total = latency.total();
        assert_eq!((total.count, total.max_ns), (3, u64::MAX));
        assert!(total.p50_ns <= FINEST_NS && total.p99_ns >= LONGEST_NS);
        let mut one = Latency::default();
        one.add(0, 12_345_678);
        assert_eq!(one.total().p50_ns, 12_345_678, "no quantile is beyond the longest");
    }

    #[test]
    fn the_minute_forgets() {
        let mut latency = Latency::default();
        let minute = SLICE_NS * SLICES as u64;
        for second in 0..180 {
            latency.add(second * 1_000_000_000, if second < 60 { 5_000_000 } else { 1_000_000 });
        }
        let now = 179_000_000_000;
        let recent = latency.minute(now);
        assert_eq!((recent.count, recent.max_ns), (60, 1_000_000));
        assert_eq!((latency.total().count, latency.total().max_ns), (180, 5_000_000));
        // Nothing happens any more.
        assert_eq!(latency.minute(now + minute), Quantiles::default());
        // A clock that goes back finds what it finds.
        latency.minute(0);
    }
}
