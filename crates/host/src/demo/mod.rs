//! The promise in one command: a protected pair on this machine, a real client, the primary killed, nothing lost.
//!
//! *In*: how often to tell the story. *Out*: a [`Report`] with every figure, and a verdict. *Invariant*: the demo uses what everybody uses: its processes are
//! `twinstep switch`, `standby` and `run`, its guest is stock Debian, its client an ordinary TCP client on a forwarded port.
mod child;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::events::{Event, now_ns};
use crate::guest::{self, Kind, Network};
use crate::identity;
use crate::packages::{KernelLine, Progress, Store};
use crate::passt::{self, Forward};
use crate::pki;
use crate::redis_check;
use crate::signals::{STOPPED, Signals};
use child::Process;

/// How the demo is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often.
    pub kills: u32,
    /// The guest's RAM in MiB.
    pub ram_mib: u32,
    /// Which of Debian's kernels.
    pub kernel: KernelLine,
    /// Commands the client has on their way at a time.
    pub pipeline: usize,
    /// Outputs wait until the standby has made the same ([`twinstep_pair::Commit::Matched`]).
    pub matched: bool,
    /// The two sides speak TLS, with certificates made for the occasion.
    pub tls: bool,
    /// The load runs for at least so long before the kill.
    pub load: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kills: 1,
            ram_mib: 256,
            kernel: KernelLine::Stable,
            pipeline: 4,
            matched: false,
            tls: false,
            load: Duration::from_millis(1500),
        }
    }
}

/// When things happened after the kill, in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TimeLine {
    /// The secondary noticed.
    pub detected_ms: f64,
    /// The arbiter gave it the epoch.
    pub arbiter_won_ms: f64,
    /// It had consumed the log.
    pub log_consumed_ms: f64,
    /// It was live.
    pub live_ms: f64,
    /// The client had the first reply from it.
    pub first_reply_ms: f64,
}

/// One telling.
#[derive(Debug, Clone, Serialize)]
pub struct Round {
    /// Which, from 1.
    pub round: u32,
    /// What went wrong; nothing if all is well.
    pub failure: Option<String>,
    /// From power-on to a Redis that serves, in milliseconds.
    pub ready_ms: f64,
    /// What happened when.
    pub time_line: TimeLine,
    /// The longest time the client was without a reply around the kill.
    pub gap_ms: f64,
    /// What the client found.
    pub client: redis_check::Report,
    /// The pair's figures at the last look before the kill: lag, log by kind, how long outputs were held.
    pub pair: Value,
}

/// The whole demo.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Nothing was lost, repeated or reset in any round.
    pub passed: bool,
    /// Rounds that passed.
    pub passed_rounds: u32,
    /// Half of the gaps are shorter.
    pub gap_median_ms: f64,
    /// The longest gap.
    pub gap_max_ms: f64,
    /// Every round.
    pub rounds: Vec<Round>,
}

/// For those who watch: the demo's own steps, and set-up's.
pub trait Audience {
    /// A line to show.
    fn line(&mut self, text: &str);
    /// Progress of the set-up.
    fn progress(&mut self, progress: Progress);
}

/// What every round uses.
struct Stage {
    folder: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    passt: PathBuf,
    /// The folders with certificates of primary and standby.
    tls: Option<[PathBuf; 2]>,
}

/// How long a step may take on a slow, busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the load goes on after the new side is live.
const AFTERWARDS: Duration = Duration::from_millis(1500);

/// Tells the story.
pub fn run(options: &Options, audience: &mut dyn Audience) -> Result<Report> {
    let folder = std::env::temp_dir().join(format!("twinstep-demo-{}", std::process::id()));
    std::fs::create_dir_all(&folder).at("create", &folder)?;
    let interrupted = Arc::new(Mutex::new(None));
    Signals::take()?.listen({
        let (folder, interrupted) = (folder.clone(), interrupted.clone());
        move |why| {
            *interrupted.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
            // Whoever waits for them gives up and tidies up. During the set-up there is nothing else to tidy.
            if !child::end_all() {
                let _ = std::fs::remove_dir_all(&folder);
                std::process::exit(STOPPED);
            }
        }
    });
    let result = set_up(&folder, options, audience).and_then(|stage| {
        let mut rounds = Vec::new();
        for round in 1..=options.kills.max(1) {
            rounds.push(tell(&stage, options, round, audience)?);
        }
        Ok(summary(rounds))
    });
    // What is left there is of no use to anybody.
    let _ = std::fs::remove_dir_all(&folder);
    match interrupted.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(why) => Err(Error::new(format!("the demo was ended by {why}"))),
        None => result,
    }
}

fn set_up(folder: &Path, options: &Options, audience: &mut dyn Audience) -> Result<Stage> {
    let store = Store::open()?;
    let mut progress = |p| audience.progress(p);
    let (kernel, initrd) = guest::build_into(folder, &store, Kind::Redis, options.kernel, &mut progress)?;
    let passt = passt::program(&store, &mut progress)?;
    let tls = if options.tls { Some(throw_away_pki(&folder.join("pki"))?) } else { None };
    Ok(Stage { folder: folder.to_owned(), kernel, initrd, passt, tls })
}

/// An authority for this demo, and what both sides need.
fn throw_away_pki(folder: &Path) -> Result<[PathBuf; 2]> {
    pki::init(folder, 1)?;
    Ok([pki::issue(folder, "primary", &[], 1)?, pki::issue(folder, "standby", &[Ipv4Addr::LOCALHOST.to_string()], 1)?])
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::new(format!("{} is not UTF-8", path.display())))
}

/// A random span between `from` and twice of it, so that the kill meets the machine anywhere.
fn random_span(from: Duration) -> Duration {
    let random = u32::from_le_bytes(identity::random_id()[..4].try_into().expect("four bytes"));
    from + from.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

fn tell(stage: &Stage, options: &Options, number: u32, audience: &mut dyn Audience) -> Result<Round> {
    let folder = stage.folder.join(format!("round-{number}"));
    let arbiter = folder.join("arbiter");
    std::fs::create_dir_all(&arbiter).at("create", &arbiter)?;
    let (arbiter, socket) = (text(&arbiter)?.to_owned(), folder.join("switch"));
    let network = Network::default();
    let address: SocketAddr = SocketAddr::from(([127, 0, 0, 1], passt::free_port()?));
    let SocketAddr::V4(host) = address else { unreachable!("made as IPv4 above") };
    let passt = passt::start(&passt::Options {
        program: stage.passt.clone(),
        forwards: vec![Forward { host, guest: guest::REDIS_PORT }],
        network: network.clone(),
    })?;
    let _switch =
        Process::start("switch", &["switch", "--quiet", "--listen", text(&socket)?, "--uplink", text(passt.socket())?])?;
    wait_for_socket(&socket)?;

    let net = format!("switch={}", text(&socket)?);
    let common = ["--arbiter", &arbiter, "--net", &net, "--no-input", "--quiet", "--events", "/dev/stderr"];
    let [primary_tls, standby_tls] = match &stage.tls {
        Some([primary, standby]) => [vec!["--tls", text(primary)?], vec!["--tls", text(standby)?, "--expect-peer", "primary"]],
        None => [vec![], vec![]],
    };
    let mut standby = Process::start("standby", &[&["standby", "--listen", "127.0.0.1:0"][..], &common, &standby_tls].concat())?;
    let listening = standby.wait_for("listening", PATIENCE)?;
    let standby_address = listening.figures.get("address").and_then(Value::as_str).unwrap_or_default().to_owned();
    let (mem, cmdline) = (format!("{}M", options.ram_mib), guest::command_line("redis", Some(&network)));
    let machine = ["--kernel", text(&stage.kernel)?, "--initrd", text(&stage.initrd)?, "--mem", &mem, "--cmdline", &cmdline];
    let commit = if options.matched { "matched" } else { "received" };
    let protect = ["run", "--protect", &standby_address, "--commit", commit];
    let started = Instant::now();
    let mut primary = Process::start("primary", &[&protect[..], &common, &machine, &primary_tls].concat())?;
    primary.wait_for("protected", PATIENCE)?;
    primary.wait_for_console(guest::READY, PATIENCE)?;
    let ready_ms = started.elapsed().as_secs_f64() * 1e3;
    audience.line(&format!("round {number}: protected; Redis serves on {address} after {ready_ms:.0} ms; the client writes"));

    let client =
        redis_check::Running::start(redis_check::Options { pipeline: options.pipeline, ..redis_check::Options::new(address) })?;
    std::thread::sleep(random_span(options.load));
    primary.catch_up();
    let (killed, killed_ns) = (Instant::now(), now_ns());
    client.mark(killed);
    primary.kill()?;
    primary.catch_up();
    let live = standby.wait_for("live", PATIENCE);
    if live.is_ok() {
        std::thread::sleep(AFTERWARDS);
    }
    let client = client.finish()?;
    let since = |event: Option<&Event>| event.map_or(f64::NAN, |e| (e.at_ns as f64 - killed_ns as f64) / 1e6);
    let interruption = client.interruptions.first();
    let won = standby.events.iter().find(|e| e.what == "arbiter" && e.text.contains("Won"));
    let time_line = TimeLine {
        detected_ms: since(standby.event("peer-lost")),
        arbiter_won_ms: since(won),
        log_consumed_ms: since(standby.event("consumed")),
        live_ms: since(standby.event("live")),
        first_reply_ms: interruption.map_or(f64::NAN, |i| i.first_reply_after_ms),
    };
    let failure = match (&client.failure, live) {
        (Some(failure), _) => Some(failure.clone()),
        (None, Err(e)) => Some(e.to_string()),
        (None, Ok(_)) if !client.passed() => Some("the client is not content".into()),
        (None, Ok(_)) => None,
    };
    let pair = primary.events.iter().rfind(|e| e.what == "status").map(|e| Value::Object(e.figures.clone()));
    standby.end(PATIENCE)?;
    let round = Round {
        round: number,
        failure,
        ready_ms,
        gap_ms: interruption.map_or(f64::NAN, |i| i.longest_gap_ms),
        time_line,
        client,
        pair: pair.unwrap_or_default(),
    };
    show(&round, audience);
    Ok(round)
}

/// A switch that listens has made its socket. It has nothing else to say, so the file is what is waited for.
fn wait_for_socket(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        if Instant::now() > deadline {
            return Err(Error::new(format!("the switch does not listen on {}", path.display())));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn show(round: &Round, audience: &mut dyn Audience) {
    let t = &round.time_line;
    let steps = [
        (0.0, "primary killed (SIGKILL)"),
        (t.detected_ms, "standby: peer lost"),
        (t.arbiter_won_ms, "standby: arbiter won"),
        (t.log_consumed_ms, "standby: log consumed"),
        (t.live_ms, "standby: live"),
        (t.first_reply_ms, "client: first reply"),
    ];
    for (at, what) in steps {
        audience.line(&format!("  {at:9.2} ms  {what}"));
    }
    let c = &round.client;
    audience.line(&format!(
        "  client: {} replies ({:.0}/s), {} INCRs in sequence, {} SETs; {} keys verified; gap {:.1} ms",
        c.replies, c.replies_per_second, c.increments, c.sets, c.keys_verified, round.gap_ms
    ));
    if let Some(line) = pair_line(&round.pair) {
        audience.line(&format!("  pair: {line}"));
    }
    match &round.failure {
        None => audience.line("  nothing lost, nothing repeated, connection never reset"),
        Some(why) => audience.line(&format!("  FAILED: {why}")),
    }
}

/// The pair's figures in a line.
fn pair_line(pair: &Value) -> Option<String> {
    let number = |name: &str| pair.get(name).and_then(Value::as_f64);
    let mut text = format!(
        "lag {:.2} M instructions, {} bytes unacknowledged; outputs held {:.2} ms on average; log {:.0} kbit/s:",
        number("lag_instructions")? / 1e6,
        number("unacked_bytes")?,
        number("held_mean_ns")? / 1e6,
        number("log_bytes_per_s")? * 8.0 / 1e3
    );
    for (kind, figures) in pair.get("log_per_s")?.as_object()? {
        let entries = figures.get("entries").and_then(Value::as_f64)?;
        if entries > 0.0 {
            let bytes = figures.get("bytes").and_then(Value::as_f64)?;
            text.push_str(&format!(" {kind} {entries:.0}/s ({bytes:.0} B/s),"));
        }
    }
    Some(text.trim_end_matches(',').to_owned())
}

fn summary(rounds: Vec<Round>) -> Report {
    let passed_rounds = rounds.iter().filter(|r| r.failure.is_none()).count() as u32;
    let mut gaps: Vec<f64> = rounds.iter().map(|r| r.gap_ms).filter(|g| g.is_finite()).collect();
    gaps.sort_by(f64::total_cmp);
    let median = match gaps.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => gaps[n / 2],
        n => (gaps[n / 2 - 1] + gaps[n / 2]) / 2.0,
    };
    Report {
        passed: passed_rounds as usize == rounds.len(),
        passed_rounds,
        gap_median_ms: median,
        gap_max_ms: gaps.last().copied().unwrap_or(f64::NAN),
        rounds,
    }
}
