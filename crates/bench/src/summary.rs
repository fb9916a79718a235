//! What the figures come to. *In*: every single figure. *Out*: ratios, each with what it compares. *Invariant*: a ratio compares figures of the same
//! repetition; what is printed is the median over the repetitions, with the lowest and the highest; a workload that failed anywhere is in no ratio.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::stats::{geometric_mean, median};
use crate::workload::{BOOT, Group};

/// Which time is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Host time between the marks.
    Wall,
    /// CPU time the whole machine used; steadier on a busy host.
    Cpu,
}

/// A figure: what one workload took once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figure {
    /// Host time.
    pub wall: f64,
    /// CPU time.
    pub cpu: Option<f64>,
}

impl Figure {
    fn of(self, clock: Clock) -> Option<f64> {
        match clock {
            Clock::Wall => Some(self.wall),
            // Under a tick it says nothing.
            Clock::Cpu => self.cpu.filter(|s| *s >= 0.01),
        }
    }
}

/// All good figures, by engine, workload and repetition.
#[derive(Debug, Clone, Default)]
pub struct Figures(BTreeMap<(String, String, usize), Figure>);

/// A ratio over the repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// The one in the middle.
    pub median: f64,
    /// The lowest.
    pub low: f64,
    /// The highest.
    pub high: f64,
    /// How many workloads it is the geometric mean of.
    pub workloads: usize,
}

impl Figures {
    /// Adds one.
    pub fn add(&mut self, engine: &str, workload: &str, repetition: usize, figure: Figure) {
        self.0.insert((engine.to_owned(), workload.to_owned(), repetition), figure);
    }

    fn get(&self, engine: &str, workload: &str, repetition: usize, clock: Clock) -> Option<f64> {
        self.0.get(&(engine.to_owned(), workload.to_owned(), repetition)).and_then(|f| f.of(clock))
    }

    fn repetitions(&self) -> Vec<usize> {
        let mut all: Vec<usize> = self.0.keys().map(|(_, _, repetition)| *repetition).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The median over the repetitions.
    #[must_use]
    pub fn median(&self, engine: &str, workload: &str, clock: Clock) -> Option<f64> {
        let all: Vec<f64> = self.repetitions().iter().filter_map(|r| self.get(engine, workload, *r, clock)).collect();
        median(&all)
    }

    /// How many times as long `of` takes as `to`: the geometric mean over those of the workloads that both have done.
    #[must_use]
    pub fn ratio(&self, of: &str, to: &str, workloads: &[&str], clock: Clock) -> Option<Ratio> {
        let both = |w: &str, r: usize| Some(self.get(of, w, r, clock)? / self.get(to, w, r, clock)?);
        let repetitions = self.repetitions();
        // The same workloads in every repetition, or the mean would be of something else each time.
        let common: Vec<&str> = workloads.iter().copied().filter(|w| repetitions.iter().all(|r| both(w, *r).is_some())).collect();
        let means: Vec<f64> = repetitions
            .iter()
            .filter_map(|r| geometric_mean(&common.iter().filter_map(|w| both(w, *r)).collect::<Vec<_>>()))
            .collect();
        Some(Ratio {
            median: median(&means)?,
            low: means.iter().copied().fold(f64::INFINITY, f64::min),
            high: means.iter().copied().fold(0.0, f64::max),
            workloads: common.len(),
        })
    }
}

/// One line of the summary.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// What is compared, in words.
    pub what: String,
    /// The figure.
    pub ratio: Ratio,
    /// How many workloads it could have been.
    pub of_workloads: usize,
}

/// Workloads of the compute mean, and the same with cryptography as the guest's processor model offers it.
const CRYPTOGRAPHY: [(&str, &str); 3] = [("sha256", "sha256v2"), ("aes", "aesv2"), ("rsa", "rsav2")];

/// The summary. `engines` in the order of the table.
#[must_use]
pub fn lines(figures: &Figures, engines: &[String], clock: Clock) -> Vec<Line> {
    let of_group = |group| crate::workload::ALL.iter().filter(|w| w.group == group).map(|w| w.name).collect::<Vec<_>>();
    let compute = of_group(Group::Compute);
    let limited: Vec<&str> =
        compute.iter().map(|w| CRYPTOGRAPHY.iter().find(|(full, _)| full == w).map_or(*w, |(_, limited)| *limited)).collect();
    let redis = ["redis1", "redis16"];
    let mut everything = of_group(Group::Compute);
    for group in [Group::Limited, Group::Kernel, Group::System] {
        everything.extend(of_group(group));
    }

    let mut lines = Vec::new();
    let mut add = |what: String, of: &str, to: &str, workloads: &[&str]| {
        if let Some(ratio) = figures.ratio(of, to, workloads, clock) {
            lines.push(Line { what, ratio, of_workloads: workloads.len() });
        }
    };
    for engine in engines.iter().filter(|e| *e != "native") {
        add(format!("compute: {engine} takes × native"), engine, "native", &compute);
        add(format!("compute, cryptography as x86-64-v2 for both: {engine} takes × native"), engine, "native", &limited);
    }
    // Whoever is no peer is one of ours, in some mode.
    for engine in engines.iter().filter(|e| !["native", "qemu", "qemu-record"].contains(&e.as_str())) {
        match mode(engine) {
            "record" => {
                add(format!("compute: {engine} is × as fast as qemu-record"), "qemu-record", engine, &compute);
                add(format!("redis: {engine} is × as fast as qemu-record"), "qemu-record", engine, &redis);
                let plain = plain_of(engine);
                add(format!("compute: {engine} takes × {plain} (what recording costs)"), engine, &plain, &compute);
                add(format!("redis: {engine} takes × {plain} (what recording costs)"), engine, &plain, &redis);
            }
            "replay" => {
                let record = engine.replace("replay", "record");
                add(format!("compute: {engine} is × as fast as {record}"), &record, engine, &compute);
                add(format!("redis: {engine} is × as fast as {record}"), &record, engine, &redis);
                add(format!("all programs: {engine} is × as fast as {record}"), &record, engine, &everything);
            }
            _ => {
                add(format!("compute: {engine} is × as fast as qemu"), "qemu", engine, &compute);
                for workload in ["fork", "pipe", "redis1", "redis16", BOOT] {
                    add(format!("{workload}: {engine} is × as fast as qemu"), "qemu", engine, &[workload]);
                }
                if engine != "twinstep" {
                    add(format!("all programs: {engine} takes × twinstep"), engine, "twinstep", &everything);
                }
            }
        }
    }
    lines
}

fn mode(engine: &str) -> &str {
    engine.rsplit('-').next().filter(|word| ["record", "replay"].contains(word)).unwrap_or("plain")
}

fn plain_of(engine: &str) -> String {
    engine.strip_suffix("-record").unwrap_or("twinstep").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(list: &[(&str, &str, usize, f64)]) -> Figures {
        let mut figures = Figures::default();
        for (engine, workload, repetition, wall) in list {
            figures.add(engine, workload, *repetition, Figure { wall: *wall, cpu: None });
        }
        figures
    }

    #[test]
    fn ratios_are_paired_and_leave_out_what_is_missing() {
        // A host twice as slow in the second repetition changes no ratio; `xz` failed once.
        let f = figures(&[
            ("a", "shell", 0, 2.0),
            ("b", "shell", 0, 1.0),
            ("a", "shell", 1, 4.0),
            ("b", "shell", 1, 2.0),
            ("a", "gzip", 0, 8.0),
            ("b", "gzip", 0, 1.0),
            ("a", "gzip", 1, 8.0),
            ("b", "gzip", 1, 1.0),
            ("a", "xz", 0, 100.0),
            ("b", "xz", 0, 1.0),
            ("a", "xz", 1, 100.0),
        ]);
        let ratio = f.ratio("a", "b", &["shell", "gzip", "xz"], Clock::Wall).unwrap();
        assert!((ratio.median - 4.0).abs() < 1e-9 && ratio.workloads == 2, "{ratio:?}");
        assert!((ratio.low - ratio.high).abs() < 1e-9);
        assert_eq!(f.ratio("a", "c", &["shell"], Clock::Wall), None);
        assert_eq!(f.ratio("a", "b", &["shell"], Clock::Cpu), None);
        assert_eq!(f.median("a", "shell", Clock::Wall), Some(3.0));
    }

    #[test]
    fn lines_name_what_they_compare() {
        let mut list = Vec::new();
        for (engine, wall) in [
            ("native", 1.0),
            ("twinstep", 4.0),
            ("record", 5.0),
            ("replay", 2.5),
            ("qemu", 8.0),
            ("qemu-record", 20.0),
            ("b", 2.0),
            ("b-record", 3.0),
        ] {
            list.extend([(engine, "shell", 0, wall), (engine, "redis1", 0, wall), (engine, "fork", 0, wall)]);
        }
        let engines: Vec<String> =
            ["native", "twinstep", "b", "record", "b-record", "replay", "qemu", "qemu-record"].map(str::to_owned).to_vec();
        let lines = lines(&figures(&list), &engines, Clock::Wall);
        let value =
            |what: &str| lines.iter().find(|l| l.what == what).unwrap_or_else(|| panic!("{what}: {lines:#?}")).ratio.median;
        let near = |what: &str, wanted: f64| assert!((value(what) - wanted).abs() < 1e-9, "{what}: {}", value(what));
        near("compute: twinstep takes × native", 4.0);
        near("compute: record is × as fast as qemu-record", 4.0);
        near("redis: record takes × twinstep (what recording costs)", 1.25);
        near("redis: b-record takes × b (what recording costs)", 1.5);
        near("compute: replay is × as fast as record", 2.0);
        near("fork: twinstep is × as fast as qemu", 2.0);
        near("all programs: b takes × twinstep", 0.5);
    }
}
