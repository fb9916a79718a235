//! Two reports of one machine, and what happened between them.
//!
//! *In*: [`Stat`]s. *Out*: rates, shares of time. *Invariant*: shares are of the time between the two, and their sum is 1 if the thread was seen at all.
use std::collections::BTreeMap;

use serde::Serialize;

use super::words;
use crate::control::wire::Stat;

/// What a machine did in a span of time.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measure {
    /// How long it was.
    pub seconds: f64,
    /// Where the machine stands at its end.
    pub position: u64,
    /// Guest time at its end.
    pub guest_ns: u64,
    /// Millions of guest instructions a second.
    pub mips: f64,
    /// The same, not counting the time in which the guest slept or had to wait.
    pub busy_mips: f64,
    /// Processors that the machine's thread got (1: one all the time).
    pub processor: f64,
    /// Shares of the time, by activity.
    pub time: BTreeMap<String, f64>,
    /// Looks at what the machine was doing, from which the shares follow.
    pub samples: u64,
    /// What was counted, a second: "set.name".
    pub rates: BTreeMap<String, f64>,
    /// How full things are at its end.
    pub gauges: BTreeMap<String, u64>,
    /// What stands out.
    pub verdict: String,
}

impl Measure {
    /// What happened from `before` to `after`.
    pub fn between(before: &Stat, after: &Stat) -> Self {
        let ns = after.at_ns.saturating_sub(before.at_ns).max(1) as f64;
        let grown = |now: &BTreeMap<String, u64>, then: &BTreeMap<String, u64>| -> BTreeMap<String, u64> {
            let by = |(name, value): (&String, &u64)| (name.clone(), value.saturating_sub(*then.get(name).unwrap_or(&0)));
            now.iter().map(by).collect()
        };
        let seen = grown(&after.samples, &before.samples);
        let samples: u64 = seen.values().sum();
        let time: BTreeMap<String, f64> =
            if samples == 0 { BTreeMap::new() } else { seen.into_iter().map(|(k, n)| (k, n as f64 / samples as f64)).collect() };
        let counted = grown(&after.counters, &before.counters);
        let mips = after.position.saturating_sub(before.position) as f64 * 1e3 / ns;
        let mut measure = Self {
            seconds: ns / 1e9,
            position: after.position,
            guest_ns: after.guest_ns,
            mips,
            busy_mips: mips,
            processor: after.cpu_ns.saturating_sub(before.cpu_ns) as f64 / ns,
            time,
            samples,
            rates: counted.into_iter().map(|(k, n)| (k, n as f64 * 1e9 / ns)).collect(),
            gauges: after.gauges.clone(),
            verdict: String::new(),
        };
        // With a handful of looks, the quotient would be noise.
        if samples >= 20 && measure.busy() > 0.01 {
            measure.busy_mips = mips / measure.busy();
        }
        measure.verdict = words::verdict(&measure);
        measure
    }
    /// The share of time spent on this.
    pub fn share(&self, activity: &str) -> f64 {
        *self.time.get(activity).unwrap_or(&0.0)
    }
    /// The share of time in which the machine's thread had something to do.
    pub fn busy(&self) -> f64 {
        1.0 - self.share("halted") - self.share("waiting")
    }
    /// How often a second.
    pub fn rate(&self, counter: &str) -> f64 {
        *self.rates.get(counter).unwrap_or(&0.0)
    }
    /// The rates of a set, the highest first, without those that are 0.
    pub fn set(&self, set: &str) -> Vec<(&str, f64)> {
        let of_set = self.rates.iter().filter_map(|(name, rate)| Some((name.strip_prefix(set)?.strip_prefix('.')?, *rate)));
        let mut found: Vec<_> = of_set.filter(|(_, rate)| *rate > 0.0).collect();
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        found
    }
    /// All accesses to devices, a second.
    pub fn device_accesses(&self) -> f64 {
        self.set("devices").iter().filter(|(name, _)| *name != "fired").map(|(_, rate)| rate).sum()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Half a second in which the thread was seen like this, with these counts.
    pub fn measure(seen: &[(&str, u64)], counted: &[(&str, u64)]) -> Measure {
        let map = |of: &[(&str, u64)]| of.iter().map(|(k, n)| ((*k).to_owned(), *n)).collect::<BTreeMap<_, _>>();
        let before = Stat { at_ns: 7, position: 1_000, counters: map(&[("exits.link", 10)]), ..Stat::default() };
        let after = Stat {
            at_ns: 500_000_007,
            position: 50_001_000,
            cpu_ns: 450_000_000,
            samples: map(seen),
            counters: map(counted),
            ..Stat::default()
        };
        Measure::between(&before, &after)
    }

    #[test]
    fn rates_and_shares() {
        let m = measure(&[("guest", 60), ("halted", 40)], &[("exits.link", 110), ("exits.hot", 7), ("tlb.walks", 0)]);
        assert_eq!((m.seconds, m.mips, m.processor, m.samples), (0.5, 100.0, 0.9, 100));
        assert_eq!((m.share("guest"), m.share("device"), m.rate("exits.link")), (0.6, 0.0, 200.0));
        assert!((m.busy_mips - 100.0 / 0.6).abs() < 1e-9);
        assert_eq!(m.set("exits"), [("link", 200.0), ("hot", 14.0)]);
        assert_eq!(m.set("exit"), []);
    }

    #[test]
    fn nobody_looked() {
        let m = measure(&[("guest", 0)], &[]);
        assert_eq!((m.samples, m.mips, m.busy_mips), (0, 100.0, 100.0));
        assert!(m.time.is_empty());
        // A clock that stands still, a counter that fell: no reason to divide by zero.
        let stat = Stat { position: 5, ..Stat::default() };
        assert_eq!(Measure::between(&stat, &Stat::default()).mips, 0.0);
    }
}
