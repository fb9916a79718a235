//! `bench --pair`: the table of what a protected pair must reach.
//!
//! *In*: a build of `twinstep` (and a second one to compare it with), sizes. *Out*: a table of asked and measured, and every single figure as JSON. *Invariant*: the unprotected VM
//! and the pairs run side by side and take turns with every figure, so that a host that is slower for a while is slower for all; a client's check that fails, a pair that is not
//! protected, or a figure that could not be taken is a problem and no figure.
//!
//! | module | what |
//! | --- | --- |
//! | [`world`] | one VM with its standby, its switch and passt |
//! | [`client`] | who uses it from outside |
//! | [`rounds`] | hosts that are lost, given up, or asleep; bits that flip |
//! | [`figures`] | what it all comes to |
pub mod client;
pub mod figures;
pub mod rounds;
pub mod world;

use std::collections::BTreeMap;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use twinstep_host::error::Context;
use twinstep_host::packages::{Store, tell_on_stderr};
use twinstep_host::{Error, Result, passt};

use crate::guest;
use crate::host::Machine;
use crate::stats::percentile;
use client::Redis;
use figures::{AGAINST, Figures, Line, UNPROTECTED, Verdict};
use world::{Column, Stage, World};

/// Groups of figures, as people choose them.
pub const GROUPS: [&str; 7] = ["cpu", "redis", "http", "log", "kills", "failover", "copy"];

/// What is measured, and how much of it.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Which groups.
    pub groups: Vec<&'static str>,
    /// Repetitions of what takes turns.
    pub repetitions: usize,
    /// Primaries that are killed under `received`; a fifth as many under `matched`.
    pub kills: u32,
    /// Planned failovers under each rule.
    pub failovers: usize,
    /// Primaries that fall asleep and come back, under each rule.
    pub stalls: usize,
    /// First copies of a busy guest under each rule, and flipped bits after each.
    pub copies: (usize, usize),
    /// Rounds of the shell loop, and of the compiled kernel.
    pub loops: (u64, u64),
    /// Requests one at a time, and 16 at a time.
    pub requests: (usize, usize),
    /// How long the log is looked at.
    pub log_span: Duration,
}

impl Plan {
    /// The groups called `only` (all, if there are none), in full or quick.
    pub fn new(quick: bool, only: &[String], repetitions: Option<usize>, kills: Option<u32>) -> Result<Self> {
        for name in only {
            if !GROUPS.contains(&name.as_str()) {
                return Err(Error::new(format!("--pair has no figures called {name}"))
                    .next(format!("choose among {}", GROUPS.join(", "))));
            }
        }
        let groups = GROUPS.into_iter().filter(|g| only.is_empty() || only.iter().any(|name| name == g)).collect();
        let pick = |full, quick_| if quick { quick_ } else { full };
        Ok(Self {
            groups,
            repetitions: repetitions.unwrap_or(pick(5, 2)).max(1),
            kills: kills.unwrap_or(if quick { 3 } else { 50 }),
            failovers: pick(10, 2),
            stalls: pick(3, 1),
            copies: (pick(3, 1), pick(3, 1)),
            loops: if quick { (40_000, 8_000) } else { (100_000, 20_000) },
            requests: if quick { (1000, 8000) } else { (2500, 24_000) },
            log_span: Duration::from_secs(if quick { 2 } else { 5 }),
        })
    }

    fn has(&self, group: &str) -> bool {
        self.groups.contains(&group)
    }
}

/// How the benchmark is called.
pub struct Options {
    /// What is measured.
    pub plan: Plan,
    /// The build.
    pub program: PathBuf,
    /// A second one.
    pub against: Option<PathBuf>,
    /// Where cargo builds: the guest is made there.
    pub target: PathBuf,
    /// The folder of the report.
    pub out: PathBuf,
    /// When it began.
    pub date: String,
    /// With what words it was called.
    pub called: String,
    /// Whether all of it runs at a higher priority than the host's other work.
    pub hurried: bool,
}

/// All that is kept of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    date: String,
    called: String,
    machine: Machine,
    hurried: bool,
    plan: Plan,
    builds: BTreeMap<String, PathBuf>,
    /// The table.
    lines: Vec<Line>,
    /// What went wrong, in words.
    problems: Vec<String>,
    /// Every single figure, by name and column, in the order of the repetitions.
    figures: Figures,
    /// What the guests' jobs came to: the same for all.
    results: BTreeMap<String, String>,
    /// What `twinstep demo --json` said of the kills.
    kills: Vec<Value>,
}

/// A run under way.
pub struct Bench {
    stage: Stage,
    columns: Vec<Column>,
    report: Report,
    out: PathBuf,
}

/// Runs it, and says whether all went well. (A figure that misses what is asked is for people to see.)
pub fn run(options: Options) -> Result<bool> {
    let folder = std::env::temp_dir().join(format!("twinstep-bench-{}", std::process::id()));
    fs::create_dir_all(&folder).at("create", &folder)?;
    let result = measure(options, &folder);
    // What is left there is of no use to anybody.
    let _ = fs::remove_dir_all(&folder);
    result
}

fn measure(options: Options, folder: &Path) -> Result<bool> {
    let store = Store::open()?;
    let guest_folder = options.target.join("bench-pair");
    fs::create_dir_all(&guest_folder).at("create", &guest_folder)?;
    let (kernel, initrd) = guest::build_for_pair(&store, &guest_folder, &mut tell_on_stderr)?;
    let passt = passt::program(&store, &mut tell_on_stderr)?;
    fs::create_dir_all(&options.out).at("create", &options.out)?;

    let mut builds = BTreeMap::from([("".to_owned(), options.program.clone())]);
    builds.extend(options.against.map(|program| (AGAINST.to_owned(), program)));
    let rules = [(UNPROTECTED, None), ("received", Some("received")), ("matched", Some("matched"))];
    let columns = builds.iter().flat_map(|(prefix, program)| {
        rules.map(|(name, rule)| Column { name: format!("{prefix}{name}"), program: program.clone(), rule })
    });
    let mut bench = Bench {
        stage: Stage { folder: folder.to_owned(), kernel, initrd, passt },
        columns: columns.collect(),
        report: Report {
            date: options.date,
            called: options.called,
            machine: Machine::this(),
            hurried: options.hurried,
            plan: options.plan,
            builds,
            lines: Vec::new(),
            problems: Vec::new(),
            figures: Figures::default(),
            results: BTreeMap::new(),
            kills: Vec::new(),
        },
        out: options.out,
    };
    bench.take_turns()?;
    bench.rounds()?;
    bench.write()?;
    let Report { lines, problems, .. } = &bench.report;
    println!("\n{}", figures::table(lines));
    for problem in problems {
        println!("PROBLEM: {problem}");
    }
    let missed = lines.iter().filter(|l| l.verdict == Some(Verdict::Missed)).count();
    println!("{missed} of {} lines miss what is asked. Table and every single figure: {}", lines.len(), bench.out.display());
    Ok(problems.is_empty())
}

impl Bench {
    /// What all VMs do in turn, side by side.
    fn take_turns(&mut self) -> Result<()> {
        let plan = self.report.plan.clone();
        if !["cpu", "redis", "http", "log"].iter().any(|group| plan.has(group)) {
            return Ok(());
        }
        let mut worlds = Vec::new();
        for column in self.columns.clone() {
            self.show(&format!("boot: {}", column.name));
            let mut world = World::start(&self.stage, &column, &format!("turns-{}", worlds.len()), 256)?;
            // What is done for the first time is translated, and not counted.
            world.job("shell", 5000)?;
            world.job("kernel", 500)?;
            Redis::connect(world.redis)?.set(300, 1)?;
            worlds.push(world);
        }
        for repetition in 0..plan.repetitions {
            let mut turn = |bench: &mut Self, group: &str, what: fn(&mut Self, &mut World) -> Result<()>| {
                if !plan.has(group) {
                    return Ok(());
                }
                // Another one begins each time.
                for n in 0..worlds.len() {
                    let at = (n + repetition) % worlds.len();
                    let world = &mut worlds[at];
                    bench.show(&format!("{}/{} {group}: {}", repetition + 1, plan.repetitions, world.column.name));
                    world.check()?;
                    what(bench, world).map_err(|e| Error::new(format!("{group}, {}", world.column.name)).because(e))?;
                    world.check()?;
                }
                bench.write()
            };
            turn(self, "cpu", Self::cpu)?;
            turn(self, "redis", Self::redis)?;
            turn(self, "http", Self::http)?;
            turn(self, "log", Self::log)?;
        }
        Ok(())
    }

    fn add(&mut self, figure: &str, column: &Column, value: f64) {
        self.report.figures.add(figure, &column.name, value);
    }

    /// What comes of a job must be the same everywhere.
    fn compare(&mut self, job: &str, world: &World, result: String) {
        let first = self.report.results.entry(job.to_owned()).or_insert_with(|| result.clone());
        if *first != result {
            self.report.problems.push(format!("{job}, {}: '{result}' and not '{first}'", world.column.name));
        }
    }

    fn cpu(&mut self, world: &mut World) -> Result<()> {
        let (shell, kernel) = self.report.plan.loops;
        for (job, size) in [("shell", shell), ("kernel", kernel)] {
            let (seconds, result) = world.job(job, size)?;
            self.compare(job, world, result);
            self.add(job, &world.column, seconds);
        }
        Ok(())
    }

    fn redis(&mut self, world: &mut World) -> Result<()> {
        let (one, sixteen) = self.report.plan.requests;
        let mut redis = Redis::connect(world.redis)?;
        redis.set(100, 1)?;
        let load = redis.set(one, 1)?;
        self.add("redis1", &world.column, load.per_second);
        for (figure, percent) in [("latency50", 50), ("latency99", 99)] {
            let latency = percentile(&load.batches_ms, percent).ok_or_else(|| Error::new("no request was made"))?;
            self.add(figure, &world.column, latency);
        }
        let load = redis.set(sixteen, 16)?;
        self.add("redis16", &world.column, load.per_second);
        Ok(())
    }

    fn http(&mut self, world: &mut World) -> Result<()> {
        let (seconds, file) = client::download(world.http, "/file")?;
        // The whole file in a few digits.
        let digest = file.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
        self.compare("http", world, format!("{} bytes {digest:016x}", file.len()));
        self.add("http", &world.column, file.len() as f64 / f64::from(1 << 20) / seconds);
        Ok(())
    }

    /// Bytes of the log a second, of an idle guest and under SETs; only what is protected has a log.
    fn log(&mut self, world: &mut World) -> Result<()> {
        if world.column.rule.is_none() {
            return Ok(());
        }
        let span = self.report.plan.log_span;
        // What the guest still has to do for the figure before is over.
        std::thread::sleep(Duration::from_millis(500));
        let before = LogBytes::of(world)?;
        std::thread::sleep(span);
        let idle = before.kbit_per_s(&LogBytes::of(world)?, |_| true);
        self.add("idle", &world.column, idle);
        let mut redis = Redis::connect(world.redis)?;
        redis.set(100, 1)?;
        let before = LogBytes::of(world)?;
        redis.set_for(span)?;
        let beyond = before.kbit_per_s(&LogBytes::of(world)?, |kind| !kind.starts_with("net-rx"));
        self.add("setlog", &world.column, beyond);
        Ok(())
    }

    /// Shows what is being done, on a terminal.
    fn show(&self, what: &str) {
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K{what}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{what}");
        }
    }

    /// Writes what there is so far, so that an interrupted run leaves what it has.
    fn write(&mut self) -> Result<()> {
        let report = &mut self.report;
        report.lines = report.figures.lines();
        let json = serde_json::to_vec_pretty(&report).what("cannot write the report")?;
        let path = self.out.join("pair.json");
        fs::write(&path, json).at("write", &path)?;
        let mut text = format!("# The pair, {}\n\n{}\n", report.date, figures::table(&report.lines));
        report.problems.iter().for_each(|problem| text.push_str(&format!("- PROBLEM: {problem}\n")));
        let machine = &report.machine;
        text.push_str(&format!(
            "\n{}, {} processors, kernel {}, load {}; `cargo xtask {}`\n",
            machine.cpu, machine.cpus, machine.kernel, machine.load, report.called
        ));
        let path = self.out.join("pair.md");
        fs::write(&path, text).at("write", &path)
    }
}

/// Bytes of the log by kind of entry, and when they were asked for.
struct LogBytes(Instant, BTreeMap<String, u64>);

impl LogBytes {
    fn of(world: &World) -> Result<Self> {
        let (status, at) = (world.status()?, Instant::now());
        let kinds = status["log"].as_object().ok_or_else(|| Error::new("twinstep status tells nothing of the log"))?;
        Ok(Self(at, kinds.iter().map(|(kind, rate)| (kind.clone(), rate["bytes"].as_u64().unwrap_or(0))).collect()))
    }

    fn kbit_per_s(&self, later: &Self, which: impl Fn(&str) -> bool) -> f64 {
        let sum = |log: &Self| log.1.iter().filter(|(kind, _)| which(kind)).map(|(_, bytes)| *bytes).sum::<u64>();
        sum(later).saturating_sub(sum(self)) as f64 * 8.0 / 1e3 / (later.0 - self.0).as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_choose_groups() {
        let plan = Plan::new(true, &["redis".to_owned(), "copy".to_owned()], Some(0), Some(7)).unwrap();
        assert_eq!((plan.groups.clone(), plan.repetitions, plan.kills), (vec!["redis", "copy"], 1, 7));
        assert!(plan.has("copy") && !plan.has("kills"));
        assert_eq!(Plan::new(false, &[], None, None).unwrap().kills, 50);
        let error = Plan::new(false, &["shell".to_owned()], None, None).unwrap_err().to_string();
        assert!(error.contains("choose among cpu, redis"), "{error}");
    }

    #[test]
    fn log_rates_leave_out_what_is_asked() {
        let at = Instant::now();
        let log = |seconds, rx, clock| {
            LogBytes(at + Duration::from_secs(seconds), BTreeMap::from([("net-rx".to_owned(), rx), ("clock".to_owned(), clock)]))
        };
        let (before, after) = (log(0, 1000, 50), log(2, 9000, 300));
        assert!((before.kbit_per_s(&after, |_| true) - 33.0).abs() < 1e-9);
        assert!((before.kbit_per_s(&after, |kind| kind != "net-rx") - 1.0).abs() < 1e-9);
    }
}
