//! What is kept of a run, and what people are shown. *In*: all runs of all engines. *Out*: `report.json` with every single figure, `report.md` with the
//! tables, `chart.svg`. *Invariant*: a workload that failed, or printed something else than the others, has no figure but a line among the problems.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;
use twinstep_host::Result;
use twinstep_host::error::Context;

use crate::boot::{Measure, Run};
use crate::chart::{self, Bars};
use crate::host::Machine;
use crate::stats::median;
use crate::summary::{self, Clock, Figure, Figures, Line};
use crate::table::{render, seconds, times};
use crate::workload::{BOOT, BOOT_SUITE, Group, Plan};

/// Which guest was booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Image {
    /// The small one, for the time to its first line.
    Boot,
    /// The one with all programs.
    Suite,
}

impl Image {
    /// Its name in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Suite => "suite",
        }
    }
}

/// A run with its place in the whole.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Which engine.
    pub engine: String,
    /// Which repetition, from 0.
    pub repetition: usize,
    /// Which guest.
    pub image: Image,
    /// Bytes of the recording, if it made one.
    pub recording_bytes: Option<u64>,
    /// What it came to.
    #[serde(flatten)]
    pub run: Run,
}

/// A whole benchmark.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// When it began.
    pub date: String,
    /// Where.
    pub machine: Machine,
    /// With what words it was called.
    pub called: String,
    /// RAM of the guests.
    pub ram_mib: u64,
    /// The processor measured on, if it was set apart.
    pub pinned_to: Option<usize>,
    /// Whether all measured processes ran at a higher priority than the host's other work.
    pub hurried: bool,
    /// What is in the guest.
    pub packages: Vec<String>,
    /// Names and command lines, in order.
    pub engines: Vec<(String, String)>,
    /// Names, sizes, titles.
    pub workloads: Vec<(String, u64, String)>,
    /// Every run.
    pub runs: Vec<Entry>,
}

/// What is made of it.
#[derive(Debug, Clone, Serialize)]
struct Results {
    medians: BTreeMap<String, BTreeMap<String, f64>>,
    summary: Vec<Line>,
    summary_cpu: Vec<Line>,
    problems: Vec<String>,
}

impl Report {
    /// What went wrong, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for entry in &self.runs {
            let place = format!("{}, repetition {}, {}", entry.engine, entry.repetition + 1, entry.image.name());
            if let Some(problem) = &entry.run.problem {
                problems.push(format!("{place}: {problem}"));
            }
            for (name, measure) in &entry.run.measures {
                if measure.status != 0 {
                    let notes = measure.notes.join("; ");
                    problems.push(format!("{place}: {name} failed with exit status {}: {notes}", measure.status));
                } else if !self.is_right(name, measure) {
                    problems.push(format!("{place}: {name} printed something else than {}", self.reference()));
                }
            }
        }
        problems
    }

    fn reference(&self) -> &str {
        self.engines.first().map_or("the first", |(name, _)| name)
    }

    /// Whether it printed what the first engine printed, which is the native run unless that is left out.
    fn is_right(&self, name: &str, measure: &Measure) -> bool {
        let of_first = self.runs.iter().filter(|e| e.engine == self.reference());
        let wanted = of_first.filter_map(|e| e.run.measures.get(name)).find(|m| m.status == 0);
        wanted.is_none_or(|wanted| wanted.digest == measure.digest)
    }

    /// The figures that count.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let mut figures = Figures::default();
        for entry in &self.runs {
            let mut add = |name: &str, m: &Measure| {
                figures.add(&entry.engine, name, entry.repetition, Figure { wall: m.seconds, cpu: m.cpu_seconds });
            };
            if let Some(init) = &entry.run.init {
                add(if entry.image == Image::Boot { BOOT } else { BOOT_SUITE }, init);
            }
            for (name, measure) in &entry.run.measures {
                if measure.status == 0 && self.is_right(name, measure) {
                    add(name, measure);
                }
            }
        }
        figures
    }

    fn engine_names(&self) -> Vec<String> {
        self.engines.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Seconds of every workload and engine, and how many times the first engine's that is.
    #[must_use]
    pub fn table(&self, plan: &Plan, clock: Clock) -> String {
        let (figures, engines) = (self.figures(), self.engine_names());
        let both = ["twinstep", "qemu"].iter().all(|e| engines.iter().any(|n| n == e));
        let mut head = vec![match clock {
            Clock::Wall => "host time, medians".to_owned(),
            Clock::Cpu => "CPU time, medians".to_owned(),
        }];
        head.extend(engines.iter().cloned());
        if both {
            head.push("qemu / twinstep".to_owned());
        }
        let mut rows = vec![head];
        for item in &plan.items {
            let name = item.workload.name;
            let mut row = vec![item.title()];
            for engine in &engines {
                // In brackets: against the first, which is the native run unless that is left out.
                let ratio =
                    if engine == self.reference() { None } else { figures.ratio(engine, self.reference(), &[name], clock) };
                row.push(match (figures.median(engine, name, clock), ratio) {
                    (None, _) => "–".to_owned(),
                    (Some(s), None) => seconds(s),
                    (Some(s), Some(ratio)) => format!("{} ({})", seconds(s), times(ratio.median)),
                });
            }
            if both {
                row.push(figures.ratio("qemu", "twinstep", &[name], clock).map_or("–".to_owned(), |r| times(r.median)));
            }
            rows.push(row);
        }
        render(&rows)
    }

    /// The ratios that sum it up, and what memory the engines took.
    #[must_use]
    pub fn summary(&self) -> String {
        let head = ["ratios, medians of the repetitions", "host time", "from", "to", "CPU time", "workloads"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        let (figures, engines) = (self.figures(), self.engine_names());
        let by_cpu = summary::lines(&figures, &engines, Clock::Cpu);
        for line in summary::lines(&figures, &engines, Clock::Wall) {
            let r = line.ratio;
            let count = format!("{} of {}", r.workloads, line.of_workloads);
            let cpu = by_cpu.iter().find(|l| l.what == line.what).map_or("–".to_owned(), |l| times(l.ratio.median));
            rows.push(vec![line.what, times(r.median), times(r.low), times(r.high), cpu, count]);
        }
        let mut text = render(&rows);
        let memory = self.memory_rows();
        if memory.len() > 1 {
            text.push('\n');
            text.push_str(&render(&memory));
        }
        text
    }

    fn memory_rows(&self) -> Vec<Vec<String>> {
        let head = ["after the last workload, medians", "guest RAM touched", "host memory beyond it", "recording"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for engine in self.engine_names() {
            let runs = || self.runs.iter().filter(|e| e.engine == engine && e.image == Image::Suite);
            let middle = |values: Vec<f64>| median(&values).map_or("–".to_owned(), |mib| format!("{mib:.0} MiB"));
            let memory: Vec<_> = runs().filter_map(|e| e.run.memory).collect();
            if memory.is_empty() {
                continue;
            }
            rows.push(vec![
                engine.clone(),
                middle(memory.iter().map(|m| m.guest_rss as f64 / 1024.0).collect()),
                middle(memory.iter().map(|m| m.beyond_guest() as f64 / 1024.0).collect()),
                middle(runs().filter_map(|e| e.recording_bytes).map(|b| b as f64 / f64::from(1 << 20)).collect()),
            ]);
        }
        rows
    }

    fn head(&self) -> String {
        let m = &self.machine;
        let mut text = format!("# Benchmark of {}\n\n", self.date);
        let mut say = |what: &str, value: &str| text.push_str(&format!("- {what}: {value}\n"));
        say("host", &format!("{}, {} processors, {} MiB, Linux {}, load {}", m.cpu, m.cpus, m.ram_mib, m.kernel, m.load));
        say(
            "measured on",
            &self.pinned_to.map_or("any processor".into(), |cpu| {
                format!("processor {cpu}, with nothing else of ours{}", if self.hurried { ", at a higher priority" } else { "" })
            }),
        );
        say("guest", &format!("{} MiB, one processor, {}", self.ram_mib, self.packages.first().map_or("", String::as_str)));
        say("QEMU", m.qemu.as_deref().unwrap_or("not installed"));
        say("called", &self.called);
        for (name, command) in &self.engines {
            say(name, &format!("`{command}`"));
        }
        text
    }

    fn chart(&self, plan: &Plan, clock: Clock) -> String {
        let figures = self.figures();
        let engines: Vec<String> = self.engine_names().into_iter().filter(|e| e != "native").collect();
        let programs = plan.items.iter().filter(|item| item.workload.group != Group::Boot);
        let rows: Vec<Bars> = programs
            .map(|item| {
                let name = item.workload.name;
                let against_native = |e: &String| figures.ratio(e, "native", &[name], clock).map(|r| r.median);
                Bars { title: item.title(), values: engines.iter().map(against_native).collect() }
            })
            .collect();
        chart::draw("Time, compared with native (1×); shorter is better", &engines, &rows)
    }

    /// Writes everything into a folder.
    pub fn write(&self, plan: &Plan, folder: &Path) -> Result<()> {
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).at("write", &path)
        };
        let (figures, engines) = (self.figures(), self.engine_names());
        let mut medians: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        for item in &plan.items {
            for engine in &engines {
                if let Some(s) = figures.median(engine, item.workload.name, Clock::Wall) {
                    medians.entry(item.workload.name.to_owned()).or_default().insert(engine.clone(), s);
                }
            }
        }
        let results = Results {
            medians,
            summary: summary::lines(&figures, &engines, Clock::Wall),
            summary_cpu: summary::lines(&figures, &engines, Clock::Cpu),
            problems: self.problems(),
        };
        #[derive(Serialize)]
        struct File<'a> {
            #[serde(flatten)]
            report: &'a Report,
            results: &'a Results,
        }
        let json =
            serde_json::to_string_pretty(&File { report: self, results: &results }).what("cannot write down the figures")?;
        write("report.json", &json)?;
        write("chart.svg", &self.chart(plan, Clock::Wall))?;
        let mut text = self.head();
        for part in [self.table(plan, Clock::Wall), self.summary(), self.table(plan, Clock::Cpu)] {
            text.push_str(&format!("\n{part}"));
        }
        if !results.problems.is_empty() {
            text.push_str("\n## Problems\n\n");
            results.problems.iter().for_each(|p| text.push_str(&format!("- {p}\n")));
        }
        write("report.md", &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(engine: &str, repetition: usize, digest: &str, status: i32, s: f64) -> Entry {
        let measure = Measure { seconds: s, status, digest: Some(digest.into()), ..Measure::default() };
        let run = Run { measures: BTreeMap::from([("shell".to_owned(), measure)]), ..Run::default() };
        Entry { engine: engine.into(), repetition, image: Image::Suite, recording_bytes: None, run }
    }

    fn report(runs: Vec<Entry>) -> Report {
        let machine = Machine {
            cpu: "c".into(),
            cpus: 1,
            ram_mib: 1,
            available_mib: 1,
            kernel: "k".into(),
            compiler: String::new(),
            qemu: None,
            load: String::new(),
        };
        Report {
            date: "d".into(),
            machine,
            called: "bench".into(),
            ram_mib: 1,
            pinned_to: None,
            hurried: false,
            packages: Vec::new(),
            engines: ["native", "twinstep", "qemu"].map(|e| (e.to_owned(), String::new())).to_vec(),
            workloads: Vec::new(),
            runs,
        }
    }

    #[test]
    fn medians_ratios_and_files() {
        let report = report(vec![
            entry("native", 0, "x", 0, 1.0),
            entry("twinstep", 0, "x", 0, 2.0),
            entry("qemu", 0, "x", 0, 8.0),
            entry("native", 1, "x", 0, 1.0),
            entry("twinstep", 1, "x", 0, 4.0),
            entry("qemu", 1, "x", 0, 16.0),
        ]);
        let plan = Plan::new(false, &["shell".to_owned()], &[]).unwrap();
        let table = report.table(&plan, Clock::Wall);
        assert!(table.contains("3.00 s (3.00×)") && table.lines().last().unwrap().ends_with("|           4.00× |"), "{table}");
        assert!(report.problems().is_empty());
        let dir = tempfile::tempdir().unwrap();
        report.write(&plan, dir.path()).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join("report.json")).unwrap()).unwrap();
        assert_eq!(json["results"]["medians"]["shell"]["twinstep"], 3.0);
        assert_eq!(json["runs"][0]["measures"]["shell"]["seconds"], 1.0);
        assert!(fs::read_to_string(dir.path().join("chart.svg")).unwrap().contains("3.00×"));
    }

    #[test]
    fn what_failed_or_differs_is_a_problem_and_no_figure() {
        let report =
            report(vec![entry("native", 0, "x", 0, 1.0), entry("twinstep", 0, "y", 0, 2.0), entry("qemu", 0, "x", 127, 8.0)]);
        let problems = report.problems();
        assert!(problems[0].contains("twinstep, repetition 1, suite: shell printed something else than native"), "{problems:?}");
        assert!(problems[1].contains("qemu, repetition 1, suite: shell failed with exit status 127"), "{problems:?}");
        assert_eq!(report.figures().median("twinstep", "shell", Clock::Wall), None);
        assert_eq!(report.figures().median("qemu", "shell", Clock::Wall), None);
    }
}
