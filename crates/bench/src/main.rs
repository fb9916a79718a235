//! `cargo xtask bench`: the benchmark's command line. *In*: flags. *Out*: tables on standard output, a folder with everything. *Invariant*: the
//! exit status is not 0 if any workload failed or printed something else than natively.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Args, Parser, Subcommand};
use twinstep_bench::boot::{self, Run, Session, Watch};
use twinstep_bench::engine::{self, Engine, Family, Kind, Setting};
use twinstep_bench::guest::{self, Guest};
use twinstep_bench::host::{self, Machine};
use twinstep_bench::pair;
use twinstep_bench::report::{Entry, Image, Report};
use twinstep_bench::summary::Clock;
use twinstep_bench::workload::{BOOT, Plan};
use twinstep_host::error::Context;
use twinstep_host::packages::{Store, tell_on_stderr};
use twinstep_host::{Error, Result};

/// Work on Twinstep itself.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs real programs natively, on Twinstep and on QEMU, side by side, and prints medians and ratios
    Bench(Bench),
}

#[derive(Args)]
struct Bench {
    /// Small sizes, one repetition: about three minutes
    #[arg(long)]
    quick: bool,
    /// Measure a protected pair instead: everything that is asked of one, beside the same guest unprotected
    #[arg(long)]
    pair: bool,
    /// With --pair: so many primaries are killed [default: 50; with --quick 3]
    #[arg(long, value_name = "N", requires = "pair")]
    kills: Option<u32>,
    /// Repetitions [default: 3; with --quick 1; with --pair 5 and 2]
    #[arg(long, value_name = "N")]
    reps: Option<usize>,
    /// Only these workloads (boot, bootsuite, shell, pyint, pyfloat, sqlite, sha256, aes, rsa, gzip, xz, sha256v2, aesv2, rsav2, tcc, int, chase, stream, pipe, fork, redis1, redis16; with --pair: cpu, redis,
    /// http, log, kills, failover, copy)
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Other sizes for some workloads
    #[arg(long, value_name = "NAME=SIZE", value_delimiter = ',')]
    sizes: Vec<String>,
    /// Only these engines (native, twinstep, record, replay, qemu, qemu-record)
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    engines: Vec<String>,
    /// This twinstep instead of a fresh release build
    #[arg(long, value_name = "PATH")]
    twinstep: Option<PathBuf>,
    /// A second twinstep, in columns of its own called "against"
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// The same twinstep with these variables, arguments for `run`, and after `--` arguments for `replay`, in columns of its own (several times)
    #[arg(long, value_name = "NAME='[VARIABLE=VALUE ...] [ARGUMENT ...] [-- ARGUMENT ...]'")]
    variant: Vec<String>,
    /// RAM of the guests, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    mem: u64,
    /// Measure on this processor [default: the last one]
    #[arg(long, value_name = "NUMBER")]
    cpu: Option<usize>,
    /// The time that the printed table shows (the report has both)
    #[arg(long, value_enum, default_value = "wall")]
    clock: Clock,
    /// The folder of the report [default: target/bench-report/DATE]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keep the last recordings (they are large)
    #[arg(long)]
    keep_recordings: bool,
}

fn main() -> ExitCode {
    let Task::Bench(arguments) = Arguments::parse().command;
    match if arguments.pair { bench_pair(&arguments) } else { bench(&arguments) } {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all went well.
fn bench(a: &Bench) -> Result<bool> {
    let plan = Plan::new(a.quick, &a.only, &a.sizes)?;
    let repetitions = a.reps.unwrap_or(if a.quick { 1 } else { 3 }).max(1);
    let target = target_folder();
    let families = families(a, &target)?;
    let engines = engine::choose(&a.engines, &families)?;
    if !host::in_path(engine::QEMU) {
        eprintln!("{} is not installed: its columns are missing (the package is qemu-system-x86)", engine::QEMU);
    }

    let store = Store::open()?;
    let _lock = only_one(&store)?;
    let guest_folder = target.join("bench-guest");
    fs::create_dir_all(&guest_folder).at("create", &guest_folder)?;
    let guest = guest::build(&store, &guest_folder, &plan, &mut tell_on_stderr)?;

    let date = host::now();
    let out = a.out.clone().unwrap_or_else(|| target.join("bench-report").join(&date));
    for folder in [out.join("consoles"), out.join("recordings")] {
        fs::create_dir_all(&folder).at("create", &folder)?;
    }
    let machine = Machine::this();
    let pinned_to = host::set_apart(a.cpu);
    let hurried = host::hurry();
    let bench = Benchmark {
        guest: &guest,
        out: &out,
        ram_mib: a.mem,
        cpu: pinned_to,
        keep: a.keep_recordings,
        available_mib: machine.available_mib,
    };
    let mut report = Report {
        date,
        machine,
        called: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        ram_mib: a.mem,
        pinned_to,
        hurried,
        packages: guest.packages.clone(),
        engines: engines.iter().map(|e| (e.name.clone(), e.command(&bench.setting(Image::Suite)).shown())).collect(),
        workloads: plan.items.iter().map(|i| (i.workload.name.to_owned(), i.size, i.title())).collect(),
        runs: Vec::new(),
    };
    let mut images = Vec::new();
    if plan.has(BOOT) {
        images.push(Image::Boot);
    }
    if plan.needs_suite() {
        images.push(Image::Suite);
    }
    for repetition in 0..repetitions {
        for &image in &images {
            let running: Vec<&Engine> = engines.iter().filter(|e| image == Image::Suite || e.kind != Kind::Native).collect();
            let (replays, live): (Vec<_>, Vec<_>) = running.into_iter().partition(|e| e.is_replay());
            // Replays come after what they replay, and one after the other: they wait for nobody.
            for group in bench.groups(&live).into_iter().chain(replays.chunks(1).map(<[_]>::to_vec)) {
                report.runs.extend(bench.run(&group, image, repetition, repetitions)?);
            }
        }
        // After each repetition, so that an interrupted run leaves what it has.
        report.write(&plan, &out)?;
    }
    if !a.keep_recordings {
        let folder = out.join("recordings");
        fs::remove_dir_all(&folder).at("remove", &folder)?;
    }
    println!("\n{}\n{}", report.table(&plan, a.clock), report.summary());
    let problems = report.problems();
    for problem in &problems {
        println!("PROBLEM: {problem}");
    }
    println!("Tables, chart and every single figure: {}", out.display());
    Ok(problems.is_empty())
}

/// The table of a pair. Whether all went well.
fn bench_pair(a: &Bench) -> Result<bool> {
    let plan = pair::Plan::new(a.quick, &a.only, a.reps, a.kills)?;
    let target = target_folder();
    let program = match &a.twinstep {
        Some(path) => usable(path)?,
        None => build_twinstep(&target)?,
    };
    let _lock = only_one(&Store::open()?)?;
    let date = host::now();
    pair::run(pair::Options {
        plan,
        program,
        against: a.against.as_deref().map(usable).transpose()?,
        out: a.out.clone().unwrap_or_else(|| target.join("bench-report").join(format!("{date}-pair"))),
        target,
        date,
        called: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        // Both sides of a pair need processors, so none is set apart.
        hurried: host::hurry(),
    })
}

/// What all runs share.
struct Benchmark<'a> {
    guest: &'a Guest,
    out: &'a Path,
    ram_mib: u64,
    cpu: Option<usize>,
    keep: bool,
    available_mib: u64,
}

impl Benchmark<'_> {
    fn setting(&self, image: Image) -> Setting<'_> {
        let initrd = match image {
            Image::Boot => &self.guest.boot_initrd,
            Image::Suite => &self.guest.initrd,
        };
        let (kernel, root) = (&self.guest.kernel, &self.guest.root);
        Setting { kernel, initrd, root, ram_mib: self.ram_mib, recordings: self.out.join("recordings") }
    }

    /// Who runs side by side: all, if this host has the memory for it.
    fn groups<'e>(&self, engines: &[&'e Engine]) -> Vec<Vec<&'e Engine>> {
        // Besides its RAM, QEMU takes up to a third of a gigabyte.
        let needed = engines.len() as u64 * (self.ram_mib + 400);
        if self.available_mib >= needed {
            return vec![engines.to_vec()];
        }
        engines.chunks(1).map(<[_]>::to_vec).collect()
    }

    /// Boots some engines and lets them take turns, one workload each.
    fn run(&self, engines: &[&Engine], image: Image, repetition: usize, of: usize) -> Result<Vec<Entry>> {
        let setting = self.setting(image);
        let show = |engine: &Engine, what: &str| {
            if std::io::stderr().is_terminal() {
                eprint!("\r\x1b[K{}/{of} {}: {}: {what}", repetition + 1, image.name(), engine.name);
                let _ = std::io::stderr().flush();
            }
        };
        let mut sessions = Vec::new();
        for engine in engines {
            show(engine, "boot");
            let native = engine.kind == Kind::Native;
            let watch = Watch {
                cpu: self.cpu,
                waits_for_nobody: engine.is_replay(),
                ram_mib: if native { 0 } else { self.ram_mib },
                console: boot::console_file(&self.out.join("consoles"), repetition + 1, &engine.name, image.name()),
            };
            let mut session = Session::start(&engine.command(&setting), &watch)?;
            let next = session.go_on();
            sessions.push((*engine, session, next));
        }
        while sessions.iter().any(|(_, _, next)| next.is_some()) {
            for (engine, session, next) in &mut sessions {
                if let Some(workload) = next {
                    show(engine, workload);
                    *next = session.go_on();
                }
            }
        }
        sessions.into_iter().map(|(engine, session, _)| self.entry(engine, image, repetition, session.finish()?)).collect()
    }

    fn entry(&self, engine: &Engine, image: Image, repetition: usize, run: Run) -> Result<Entry> {
        let recording = engine.recording(&self.setting(image).recordings);
        let recording_bytes = recording.as_ref().and_then(|path| fs::metadata(path).ok()).map(|m| m.len());
        // QEMU's is not needed any more; ours is replayed next, and then overwritten.
        if let (Kind::QemuRecord, Some(path), false) = (&engine.kind, &recording, self.keep) {
            let _ = fs::remove_file(path);
        }
        let programs = run.measures.values().fold(0.0, |sum, m| sum + m.seconds);
        let clear = if std::io::stderr().is_terminal() { "\r\x1b[K" } else { "" };
        eprint!("{clear}{} {} {}: ", repetition + 1, image.name(), engine.name);
        match (&run.problem, &run.init) {
            (Some(problem), _) => eprintln!("{problem}"),
            (None, Some(init)) => eprintln!("init after {:.1} s, programs {programs:.1} s", init.seconds),
            (None, None) => eprintln!("programs {programs:.1} s"),
        }
        Ok(Entry { engine: engine.name.clone(), repetition, image, recording_bytes, run })
    }
}

/// Where cargo builds.
fn target_folder() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).to_owned();
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// The builds and variants to compare.
fn families(a: &Bench, target: &Path) -> Result<Vec<Family>> {
    let wants_ours = a.engines.is_empty() || a.engines.iter().any(|e| ["twinstep", "record", "replay"].contains(&e.as_str()));
    if !wants_ours {
        return Ok(Vec::new());
    }
    let program = match &a.twinstep {
        Some(path) => usable(path)?,
        None => build_twinstep(target)?,
    };
    let mut families = vec![Family::plain("", &program)];
    if let Some(path) = &a.against {
        families.push(Family::plain("against", &usable(path)?));
    }
    for text in &a.variant {
        families.push(Family::variant(text, &program)?);
    }
    Ok(families)
}

fn usable(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|e| {
        Error::new(format!("cannot use {} as a twinstep", path.display())).because(e).next("build it: cargo build --release")
    })
}

fn build_twinstep(target: &Path) -> Result<PathBuf> {
    eprintln!("Building twinstep (release)");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--release",
            "-p",
            "twinstep",
            "--manifest-path",
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"),
        ])
        .status()
        .map_err(|e| Error::new("cannot run cargo").because(e).next("give a built program with --twinstep PATH"))?;
    if !status.success() {
        return Err(
            Error::new("twinstep does not build").next("see the errors above, or give a built program with --twinstep PATH")
        );
    }
    Ok(target.join("release/twinstep"))
}

/// Two benchmarks at a time would measure each other.
fn only_one(store: &Store) -> Result<fs::File> {
    let path = store.root().join("bench-lock");
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).at("open", &path)?;
    if file.try_lock().is_err() {
        eprintln!("Waiting for another benchmark on this host to end");
        file.lock().at("lock", &path)?;
    }
    Ok(file)
}
