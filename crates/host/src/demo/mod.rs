//! The promise in one command: a protected pair on this machine, a real client, the primary killed, nothing lost.
//!
//! *In*: how often to tell the story. *Out*: a [`Report`] with every figure, and a verdict. *Invariant*: the demo uses what everybody uses: its processes are
//! `twinstep switch`, `standby` and `run`, its guest is stock Debian, its client an ordinary TCP client on a forwarded port.
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::child::{self, Process, wait_for_switch};
use crate::error::{Context, Error, Result};
use crate::events::{Event, now_ns};
use crate::guest::{self, Kind, Network};
use crate::identity;
use crate::packages::{KernelLine, Progress, Store};
use crate::passt::{self, Forward};
use crate::pki;
use crate::redis_check;
use crate::signals::{STOPPED, Signals};

/// What the demo tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Story {
    /// The primary is killed, and the standby goes on.
    Failover,
    /// There are two standbys: when the primary is killed the one goes on, protects the VM with the other, and is killed as well.
    Heal,
}

/// How the demo is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// What happens.
    pub story: Story,
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
            story: Story::Failover,
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

/// How the VM got another host, and lost it.
#[derive(Debug, Clone, Serialize)]
pub struct Healing {
    /// From the first kill until the VM was protected again, in milliseconds.
    pub protected_again_ms: f64,
    /// What happened when after the second kill.
    pub time_line: TimeLine,
    /// The longest time the client was without a reply around it.
    pub gap_ms: f64,
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
    /// The second half of [`Story::Heal`].
    pub healing: Option<Healing>,
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
    wait_for_switch(&socket, PATIENCE)?;

    let net = format!("switch={}", text(&socket)?);
    let common = ["--arbiter", &arbiter, "--net", &net, "--no-input", "--quiet", "--events", "/dev/stderr"];
    let [primary_tls, standby_tls] = match &stage.tls {
        // A standby is a primary later.
        Some([primary, standby]) => {
            let expected = ["--expect-peer", "primary", "--expect-peer", "standby"];
            [vec!["--tls", text(primary)?], [&["--tls", text(standby)?][..], &expected].concat()]
        }
        None => [vec![], vec![]],
    };
    let names: &[_] = match options.story {
        Story::Failover => &["standby"],
        Story::Heal => &["standby", "third host"],
    };
    let mut standbys = Vec::new();
    let mut addresses = Vec::new();
    for name in names {
        let listen = ["standby", "--listen", "127.0.0.1:0"];
        let mut standby = Process::start(name, &[&listen[..], &common, &standby_tls].concat())?;
        let listening = standby.wait_for("listening", PATIENCE)?;
        addresses.push(listening.figures.get("address").and_then(Value::as_str).unwrap_or_default().to_owned());
        standbys.push(standby);
    }
    let (mem, cmdline) = (format!("{}M", options.ram_mib), guest::command_line("redis", Some(&network)));
    let machine = ["--kernel", text(&stage.kernel)?, "--initrd", text(&stage.initrd)?, "--mem", &mem, "--cmdline", &cmdline];
    let commit = if options.matched { "matched" } else { "received" };
    let addresses = addresses.join(",");
    let protect = ["run", "--protect", &addresses, "--commit", commit];
    let started = Instant::now();
    let mut primary = Process::start("primary", &[&protect[..], &common, &machine, &primary_tls].concat())?;
    primary.wait_for("protected", PATIENCE)?;
    primary.wait_for_console(guest::READY, PATIENCE)?;
    let ready_ms = started.elapsed().as_secs_f64() * 1e3;
    audience.line(&format!("round {number}: protected; Redis serves on {address} after {ready_ms:.0} ms; the client writes"));

    let client =
        redis_check::Running::start(redis_check::Options { pipeline: options.pipeline, ..redis_check::Options::new(address) })?;
    let story = play(&mut primary, &mut standbys, options, &client);
    let client = client.finish()?;
    let (failure, kills) = match (&client.failure, story) {
        (Some(failure), story) => (Some(failure.clone()), story.unwrap_or_default()),
        (None, Err(e)) => (Some(e.to_string()), Vec::new()),
        (None, Ok(kills)) => ((!client.passed()).then(|| "the client is not content".into()), kills),
    };
    let mut told = kills.iter().zip(&standbys).enumerate().map(|(n, (kill, standby))| {
        let seen = client.interruptions.get(n);
        (kill.time_line(standby, seen), seen.map_or(f64::NAN, |i| i.longest_gap_ms))
    });
    let (time_line, gap_ms) = told.next().unwrap_or((TimeLine::default(), f64::NAN));
    let healing = told.next().map(|(time_line, gap_ms)| {
        let protected_again_ms = kills[0].until(protection(&standbys[1]));
        Healing { protected_again_ms, time_line, gap_ms }
    });
    let pair = primary.events.iter().rfind(|e| e.what == "status").map(|e| Value::Object(e.figures.clone()));
    if let Some(last) = standbys.last_mut() {
        last.end(PATIENCE)?;
    }
    let round = Round { round: number, failure, ready_ms, gap_ms, time_line, healing, client, pair: pair.unwrap_or_default() };
    show(&round, audience);
    Ok(round)
}

/// A kill that happened.
struct Kill {
    at_ns: u64,
}

impl Kill {
    fn of(victim: &mut Process, client: &redis_check::Running) -> Result<Self> {
        victim.catch_up();
        let at_ns = now_ns();
        client.mark(Instant::now());
        victim.kill()?;
        victim.catch_up();
        Ok(Self { at_ns })
    }

    /// Milliseconds until then.
    fn until(&self, event: Option<&Event>) -> f64 {
        event.map_or(f64::NAN, |e| (e.at_ns as f64 - self.at_ns as f64) / 1e6)
    }

    /// What the survivor said, and what the client saw.
    fn time_line(&self, survivor: &Process, seen: Option<&redis_check::Interruption>) -> TimeLine {
        let won = survivor.events.iter().find(|e| e.what == "arbiter" && e.text.contains("Won"));
        TimeLine {
            detected_ms: self.until(survivor.event("peer-lost")),
            arbiter_won_ms: self.until(won),
            log_consumed_ms: self.until(survivor.event("consumed")),
            live_ms: self.until(survivor.event("live")),
            first_reply_ms: seen.map_or(f64::NAN, |i| i.first_reply_after_ms),
        }
    }
}

/// What a standby says when it may go live from now on.
fn protection(standby: &Process) -> Option<&Event> {
    standby.events.iter().find(|e| e.what == "notice" && e.text.contains("protection has started"))
}

/// Kills one host after the other, until the last standby runs the VM.
fn play(primary: &mut Process, standbys: &mut [Process], options: &Options, client: &redis_check::Running) -> Result<Vec<Kill>> {
    let mut kills = Vec::new();
    for n in 0..standbys.len() {
        let (before, after) = standbys.split_at_mut(n);
        let victim = before.last_mut().unwrap_or(primary);
        after[0].wait_until("protection", PATIENCE, |standby| protection(standby).map(|_| ()))?;
        std::thread::sleep(random_span(options.load));
        kills.push(Kill::of(victim, client)?);
        after[0].wait_for("live", PATIENCE)?;
    }
    std::thread::sleep(AFTERWARDS);
    Ok(kills)
}

fn show(round: &Round, audience: &mut dyn Audience) {
    let mut kill = |t: &TimeLine, killed: &str, survivor: &str| {
        let steps = [
            (0.0, killed, "killed (SIGKILL)"),
            (t.detected_ms, survivor, "peer lost"),
            (t.arbiter_won_ms, survivor, "arbiter won"),
            (t.log_consumed_ms, survivor, "log consumed"),
            (t.live_ms, survivor, "live"),
            (t.first_reply_ms, "client", "first reply"),
        ];
        for (at, who, what) in steps {
            audience.line(&format!("  {at:9.2} ms  {who}: {what}"));
        }
    };
    kill(&round.time_line, "primary", "standby");
    if let Some(healing) = &round.healing {
        kill(&healing.time_line, "the former standby", "third host");
        let ms = healing.protected_again_ms;
        audience.line(&format!(
            "  healed: the third host protected the VM {ms:.0} ms after the first kill; gap at the second {:.1} ms",
            healing.gap_ms
        ));
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
    let all = rounds.iter().flat_map(|r| [Some(r.gap_ms), r.healing.as_ref().map(|h| h.gap_ms)]);
    let mut gaps: Vec<f64> = all.flatten().filter(|g| g.is_finite()).collect();
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
