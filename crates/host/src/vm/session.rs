//! One VM from the command to its end: `run`, and what a standby does once it is live.
//!
//! *In*: a spec and options. *Out*: how it ended. *Invariant*: everything that is opened here (cables, terminal, recording) is closed when
//! the session ends, whatever the end.
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, json};
use twinstep_machine::offload::LargeSegment;
use twinstep_machine::{BootError, ConfigError, DiskRequest, DiskWanted, Input, MAX_FRAME, Machine, Output};
use twinstep_pair::{Config as PairConfig, Epoch, Healer, Nanos, OwnerId, Primary, PrimaryEvent, PrimarySetup, VmId, VmIdentity};

use super::disk_writer::DiskWriter;
use super::disks;
use super::healing::Standbys;
use super::live::{self, End, Outlet, RunStats, ToVm, Wiring};
use super::pairing::{Identify, PairThread, PairWiring, ToPair};
use super::replay;
use super::spec::{Cable, VmSpec};
use super::standby;
use crate::arbiter::{self, ArbiterSpec, OverridableArbiter};
use crate::channel::{self, Reach, Reached, Security};
use crate::control::Control;
use crate::disk::{Replica, Writer};
use crate::error::{Context, Error, Result};
use crate::events::{Events, now_ns};
use crate::guest::Network;
use crate::identity;
use crate::metrics;
use crate::net::tap::Tap;
use crate::net::{Arrival, Backend, Link, Token};
use crate::packages::{Store, tell_on_stderr};
use crate::passt;
use crate::perf_map::PerfMap;
use crate::signals::Signals;
use crate::status::Board;
use crate::terminal::{Escape, RawMode, Typed};

/// What waits for the machine at most ([`live::weight`]); frames that come beyond are dropped, as on any Ethernet.
const MAX_WAITING: usize = 8 << 20;

/// Positions between two state digests in a recording: about one or two a second of a busy guest.
pub const DIGEST_INTERVAL: u64 = 1 << 28;

/// What `run` is to do besides running.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Record to this file.
    pub record: Option<PathBuf>,
    /// Positions between digests in the recording.
    pub digest_interval: Option<u64>,
    /// Start from this snapshot instead of a kernel.
    pub from: Option<PathBuf>,
    /// Protect with one of the standbys at these addresses; the first is tried first.
    pub protect: Vec<String>,
    /// How to be sure of the standby.
    pub security: Security,
    /// The arbiter.
    pub arbiter: Option<ArbiterSpec>,
    /// Bounds and times of the pair.
    pub pair: PairConfig,
    /// Bounds of the copy to the standby.
    pub copy: twinstep_migrate::Config,
    /// No terminal: the serial port's output goes to standard output, nothing is read.
    pub no_input: bool,
    /// Serial output goes to this file instead of standard output.
    pub serial: Option<PathBuf>,
    /// The VM's name at the control socket.
    pub name: Option<String>,
    /// Serve metrics on this address.
    pub metrics: Option<String>,
    /// Tell `perf` what translated code is.
    pub perf_map: bool,
    /// Whoever may ask may also break the VM on purpose.
    pub debug_faults: bool,
    /// Start from disk images that are not the newest of their disk.
    pub force_stale_disk: bool,
}

/// What a session came to.
#[derive(Debug)]
pub struct SessionEnd {
    /// How the machine ended.
    pub end: End,
    /// What was logged.
    pub stats: RunStats,
}

/// Opens an arbiter for the pair of the VM that `control` is of.
pub fn open_arbiter(spec: &ArbiterSpec, control: &Control, events: &Events) -> Result<Box<dyn twinstep_pair::Arbiter + Send>> {
    Ok(Box::new(OverridableArbiter::open(spec, control.manual_override(), events)?))
}

/// What was decided by hand and was wrong ends the machine.
fn stop_when_overruled(control: &Control, to_vm: &Sender<ToVm>) {
    let to_vm = to_vm.clone();
    // A machine that has ended has stopped.
    control.manual_override().stop_by(Box::new(move |why| _ = to_vm.send(ToVm::Fail(why))));
}

/// The cables and the terminal of a machine.
struct Outside {
    links: Vec<Arc<Link>>,
    disks: Option<DiskWriter>,
    serial: Option<std::fs::File>,
    /// Ends with the session.
    _passts: Vec<passt::Passt>,
    _raw: Option<RawMode>,
}

/// The TAP devices of a machine that may go live here one day, by network card. They are opened long before: the host's bridge forwards nothing for a moment
/// after a device was opened, and the first words of a machine that goes live say where it is. And a device that cannot be opened is found now.
pub struct Taps(Vec<Option<Tap>>);

impl Taps {
    /// Opens them.
    ///
    /// # Errors
    /// If one is not there, or is not ours.
    pub fn open(spec: &VmSpec) -> Result<Self> {
        let open = |cable: &Cable| match cable {
            Cable::Tap(name) => Tap::open(name).map(Some),
            _ => Ok(None),
        };
        spec.net.iter().map(|net| open(&net.cable)).collect::<Result<_>>().map(Self)
    }
    /// The device of this card, with nothing in it that came before. Nothing if it is not open yet.
    fn take(&mut self, nic: usize) -> Result<Option<Tap>> {
        let tap = self.0.get_mut(nic).and_then(Option::take);
        tap.map(|tap| tap.empty().map(|()| tap)).transpose()
    }
}

impl Outside {
    fn open(
        spec: &VmSpec,
        options: &RunOptions,
        disks: &[Replica],
        to_vm: &Sender<ToVm>,
        waiting: &Arc<AtomicUsize>,
        mut taps: Taps,
    ) -> Result<Self> {
        let mut links = Vec::new();
        let mut passts = Vec::new();
        for (nic, net) in spec.net.iter().enumerate() {
            let backend = match &net.cable {
                Cable::Switch(path) => Backend::Switch(path.clone()),
                Cable::Passt(path) => Backend::Passt(path.clone()),
                Cable::Tap(name) => Backend::Tap(name.clone()),
                Cable::User(forwards) => {
                    let program = passt::program(&Store::open()?, &mut tell_on_stderr)?;
                    let running =
                        passt::start(&passt::Options { program, forwards: forwards.clone(), network: Network::default() })?;
                    let path = running.socket().to_owned();
                    passts.push(running);
                    Backend::Passt(path)
                }
            };
            let (to_vm, waiting) = (to_vm.clone(), waiting.clone());
            let receive = move |Arrival { frame, segment_size }| {
                // Nothing the card takes, or too much: dropped here, before anything is logged.
                let fits = match segment_size {
                    0 => (14..=MAX_FRAME).contains(&frame.len()),
                    _ => LargeSegment::of(&frame, segment_size, MAX_FRAME).is_some(),
                };
                if !fits || waiting.load(Ordering::Relaxed) >= MAX_WAITING {
                    return ControlFlow::Continue(());
                }
                waiting.fetch_add(live::weight(&frame), Ordering::Relaxed);
                let nic = nic as u8;
                let input = match segment_size {
                    0 => Input::NetRx { nic, frame },
                    _ => Input::NetRxGso { nic, frame, segment_size },
                };
                match to_vm.send(ToVm::Input(input)) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            };
            let link = match taps.take(nic)? {
                Some(tap) => Link::over_tap(tap, Box::new(receive))?,
                None => backend.open(Box::new(receive))?,
            };
            links.push(Arc::new(link));
        }
        let serial = match &options.serial {
            None => None,
            Some(path) => {
                let file = std::fs::File::options().create(true).append(true).open(path);
                Some(file.at("open the serial port's file", path)?)
            }
        };
        let raw = if options.no_input { None } else { RawMode::enter(std::io::stdin())? };
        if !options.no_input {
            read_terminal(to_vm.clone(), raw.is_some())?;
        }
        let disks = DiskWriter::start(disks, to_vm.clone())?;
        Ok(Self { links, disks, serial, _passts: passts, _raw: raw })
    }

    /// What tells the networks in which epoch of its life a VM runs here.
    fn identify(&self, writer: Writer) -> Identify {
        let links = self.links.clone();
        Arc::new(move |epoch| {
            let token = Token { vm: writer.vm, epoch, owner: writer.owner };
            links.iter().for_each(|link| link.identify(token));
        })
    }

    /// The pair is told when what was written to shared disks is durable.
    fn when_written(&self, pair: Option<&PairThread>) {
        if let Some((disks, pair)) = self.disks.as_ref().zip(pair) {
            let pair = pair.turns.post().clone();
            // One that has ended wants nothing.
            disks.when_written(Box::new(move |outputs| _ = pair.send(ToPair::Written(outputs))));
        }
    }

    /// What the side that is gone may not have written to shared disks is written again, in order, before anything is read from them; then every flush that the guest
    /// waits for is done.
    fn settle_disks(&self, writes: Vec<Output>, machine: &Machine, to_vm: &Sender<ToVm>) -> Result<()> {
        let Some(disks) = &self.disks else { return Ok(()) };
        disks.put_again(writes)?;
        for DiskRequest { disk, request, .. } in machine.disk_requests().into_iter().filter(|r| r.wanted == DiskWanted::Flush) {
            to_vm.send(ToVm::Input(Input::DiskDone { disk, request, data: Vec::new() })).expect("the inbox is the caller's");
        }
        Ok(())
    }

    /// People are told when a switch refuses this side's frames, and the pair, which finds out whether that is right.
    fn when_fenced(&self, events: &Events, pair: Option<&PairThread>) {
        for (nic, link) in self.links.iter().enumerate() {
            let (events, pair) = (events.clone(), pair.map(|pair| pair.turns.post().clone()));
            link.when_fenced(Box::new(move |epoch| {
                let figures = Map::from_iter([("epoch".to_owned(), json!(epoch)), ("nic".to_owned(), json!(nic))]);
                let text = format!(
                    "the switch of card {nic} refuses this side's frames: it has seen epoch {epoch} of this VM elsewhere"
                );
                events.say_with("fenced", text, figures);
                if let Some(pair) = &pair {
                    // One that has ended wants nothing.
                    let _ = pair.send(ToPair::Fenced(epoch));
                }
            }));
        }
    }

    /// What leaves by it is counted on the board.
    fn outlet(&self, board: &Board) -> Result<Outlet> {
        let (links, disks) = (self.links.clone(), self.disks.clone());
        let mut serial: Box<dyn Write + Send> = match &self.serial {
            Some(file) => Box::new(file.try_clone().what("cannot share the serial port's file")?),
            None => Box::new(std::io::stdout()),
        };
        Ok(board.counting(Box::new(move |output| match output {
            Output::NetTx { nic, frame } => {
                if let Some(link) = links.get(usize::from(nic)) {
                    link.send(&frame);
                }
            }
            Output::NetTxGso { nic, mut frame, segment_size } => {
                if let Some(link) = links.get(usize::from(nic)) {
                    link.send_large(&mut frame, segment_size);
                }
            }
            output @ (Output::DiskWrite { .. } | Output::DiskFlush { .. }) => {
                if let Some(disks) = &disks {
                    disks.put(output);
                }
            }
            Output::Serial(bytes) | Output::Console(bytes) => {
                // A terminal that is gone does not stop the guest.
                let _ = serial.write_all(&bytes).and_then(|()| serial.flush());
            }
        })))
    }
}

const HELP: &str = "\r\nCtrl-A x leaves (the guest is switched off hard), Ctrl-A h is this help, Ctrl-A Ctrl-A types Ctrl-A\r\n";

fn read_terminal(to_vm: Sender<ToVm>, raw: bool) -> Result<()> {
    let read = move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = [0; 1024];
        let mut escape = Escape::default();
        while let Ok(n @ 1..) = stdin.read(&mut buffer) {
            // What comes from a pipe is for the guest, byte by byte.
            let typed = if raw { escape.typed(&buffer[..n]) } else { vec![Typed::Bytes(buffer[..n].to_vec())] };
            for typed in typed {
                let sent = match typed {
                    Typed::Bytes(bytes) => to_vm.send(ToVm::Input(Input::Serial(bytes))),
                    Typed::Leave => to_vm.send(ToVm::Stop("left by Ctrl-A x".into())),
                    Typed::Help => {
                        eprint!("{HELP}");
                        Ok(())
                    }
                };
                if sent.is_err() {
                    return;
                }
            }
        }
    };
    std::thread::Builder::new().name("terminal".into()).spawn(read).what("cannot start a thread")?;
    Ok(())
}

/// Ends the machine in good order when the process is told to end.
fn end_on_signals(signals: &Signals, to_vm: &Sender<ToVm>) {
    let to_vm = to_vm.clone();
    // A machine that has ended already is not to be told: the process is about to end.
    signals.listen(move |why| _ = to_vm.send(ToVm::Stop(why)));
}

fn read_file(path: &Path, what: &str) -> Result<Vec<u8>> {
    std::fs::read(path)
        .map_err(|e| Error::new(format!("cannot read the {what} {}", path.display())).because(e).next(format!("check --{what}")))
}

/// A machine at power-on, or from a snapshot. Also says how many outputs it had made.
fn make_machine(spec: &VmSpec, options: &RunOptions, replicas: &[Replica]) -> Result<(Machine, u64)> {
    if let Some(snapshot) = &options.from {
        let (machine, extra) = replay::load_snapshot(snapshot, &mut |wanted| disks::matching(replicas, wanted), &|_| {})?;
        return Ok((machine, extra.last_output));
    }
    let kernel = spec.kernel.as_ref().ok_or_else(|| {
        Error::new("there is nothing to boot").next("give --kernel FILE (and --initrd FILE), or --from SNAPSHOT, or a TOML file")
    })?;
    let image = read_file(kernel, "kernel")?;
    let initrd = spec.initrd.as_ref().map(|path| read_file(path, "initrd")).transpose()?;
    let mut machine = Machine::new(spec.config(), disks::of_machine(replicas)).map_err(cannot_build)?;
    if spec.debug_exit {
        machine.add_debug_exit();
    }
    machine
        .boot(&image, initrd.as_deref(), spec.cmdline.as_deref().unwrap_or("console=ttyS0"))
        .map_err(|e| cannot_boot(kernel, e))?;
    Ok((machine, 0))
}

/// The full name of the CPU model a spec asks for, if it asks.
pub fn cpu_model(spec: &VmSpec) -> Result<Option<String>> {
    spec.cpu.as_ref().map(|_| spec.config().cpu().map(|model| model.name).map_err(cannot_build)).transpose()
}

fn cannot_build(e: ConfigError) -> Error {
    let next = match &e {
        ConfigError::Ram(_) => "give another amount of RAM: --mem 512M",
        ConfigError::CpuModel(_) => "leave --cpu away, or say --cpu x86-64-v2, x86-64-v3 or host-common",
        ConfigError::HostLacks { .. } => {
            "leave --cpu away, or say --cpu x86-64-v2; `twinstep doctor` tells which models this host can run"
        }
        ConfigError::TooMany { .. } => "give fewer of them",
        ConfigError::Map(_) => "give less RAM with --mem, or stop something else on this host",
        ConfigError::Disks { .. } => "give --disk once for each disk",
    };
    Error::new("cannot build this machine").because(e).next(next)
}

fn cannot_boot(kernel: &Path, e: BootError) -> Error {
    let next = match &e {
        BootError::NotBzImage(_) | BootError::Unknown => {
            "give --kernel a Linux bzImage, such as /boot/vmlinuz-VERSION of a distribution, or an ELF image with a PVH note or a multiboot header"
        }
        BootError::BadElf(_) | BootError::BadMultiboot(_) => {
            "link the image for 1 MiB or higher, with a PVH note or a multiboot header"
        }
        BootError::TooOld { .. } => "use a kernel of this decade",
        BootError::KernelTooLarge { .. } | BootError::InitrdTooLarge { .. } => "give more RAM with --mem",
        BootError::CommandLineTooLong { .. } | BootError::CommandLineNul => "change --cmdline",
        BootError::NotFresh | BootError::Load(_) => "this is a mistake in Twinstep: report it",
    };
    Error::new(format!("cannot boot {}", kernel.display())).because(e).next(next)
}

/// Runs a VM to its end.
pub fn run(spec: &VmSpec, options: &RunOptions, events: &Events) -> Result<SessionEnd> {
    options.pair.check().what("the pair's settings do not fit")?;
    let (to_vm, inbox) = channel();
    end_on_signals(&Signals::take()?, &to_vm);
    let side = if !options.protect.is_empty() { "primary" } else { "alone" };
    let control = Control::open(options.name.as_deref(), side, events)?;
    if options.debug_faults {
        control.allow_faults();
    }
    if let Some(address) = &options.metrics {
        metrics::serve(address, control.inquiry(), events)?;
    }
    answer_questions(&control, side, &to_vm);
    stop_when_overruled(&control, &to_vm);
    let vm = VmId(identity::random_id());
    let owner = OwnerId(identity::random_id());
    let replicas = disks::open(&spec.disk)?;
    if !options.force_stale_disk {
        let arbiter = options.arbiter.as_ref().map(ArbiterSpec::open).transpose()?;
        replicas.iter().try_for_each(|replica| replica.check_newest(arbiter.as_deref()))?;
    }
    let (machine, last_output) = make_machine(spec, options, &replicas)?;
    let disk_bytes = disks::bytes(&replicas);
    let digest_interval = options.digest_interval.unwrap_or(DIGEST_INTERVAL);
    // The arbiter and the standby are asked first: a VM that was to be protected does not start unprotected by mistake. A standby
    // serves the first who connects, so nothing that can be refused comes after.
    let arbiter = match (options.protect.is_empty(), &options.arbiter) {
        (true, _) => None,
        (false, Some(spec)) => Some(open_arbiter(spec, &control, events)?),
        (false, None) => {
            return Err(Error::new("a protected VM needs an arbiter").next(arbiter::SYNTAX));
        }
    };
    let reach = reach(options);
    let standby = if options.protect.is_empty() { None } else { Some(reach_one(&options.protect, &reach, events)?) };
    let recording = match &options.record {
        Some(path) => Some(replay::record(&machine, path, digest_interval, &disk_bytes, last_output)?),
        None => None,
    };
    let waiting = Arc::new(AtomicUsize::new(0));
    let outside = Outside::open(spec, options, &replicas, &to_vm, &waiting, Taps(Vec::new()))?;
    if options.from.is_none() {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut seed = [0; 32];
        identity::random(&mut seed);
        for input in [Input::WallClock(since_1970.as_nanos() as u64), Input::Seed(seed)] {
            to_vm.send(ToVm::Input(input)).expect("the inbox is ours");
        }
    }
    let writer = Writer { vm: vm.0, epoch: Epoch::FIRST.0, owner: owner.0 };
    replicas.iter().try_for_each(|replica| replica.begin(writer, !options.protect.is_empty()))?;
    let pair = match standby.zip(arbiter) {
        None => None,
        Some(((place, (stream, at)), arbiter)) => {
            control.board().set_vm(vm);
            control.board().set_peer(stream.peer().map(|address| address.to_string()));
            let primary = Primary::new(PrimarySetup {
                config: options.pair.clone(),
                vm: VmIdentity {
                    vm,
                    name: control.name().to_owned(),
                    cpu_model: machine.config().cpu_model.clone(),
                    ram_bytes: u64::from(machine.config().ram_mib) << 20,
                },
                host: identity::host(),
                owner,
                epoch: Epoch::FIRST,
                last_output,
                last_left: last_output,
            })
            .what("the pair's settings do not fit")?;
            let identify = outside.identify(writer);
            identify(writer.epoch);
            let mut healer = Healer::new(options.protect.iter().cloned(), None, &options.pair);
            healer.begin_with(place);
            Some(PairThread::start(PairWiring {
                primary,
                stream: Some(stream),
                standbys: Standbys { healer, reach, at: Some(at) },
                arbiter,
                outlet: outside.outlet(control.board())?,
                identify,
                vm: to_vm.clone(),
                disks: replicas.clone(),
                writer,
                events: events.clone(),
                board: control.board().clone(),
                copy: options.copy,
            })?)
        }
    };
    outside.when_fenced(events, pair.as_ref());
    outside.when_written(pair.as_ref());
    let wiring = Wiring {
        inbox,
        outlet: outside.outlet(control.board())?,
        recording,
        pair: pair.as_ref().map(|pair| pair.turns.clone()),
        commit: options.pair.commit,
        events: events.clone(),
        digest_interval: if options.record.is_some() || !options.protect.is_empty() { digest_interval } else { 0 },
        disks: replicas.clone(),
        last_output,
        waiting,
        perf_map: options.perf_map.then(PerfMap::new).transpose()?,
    };
    let (_machine, end, stats) = live::run(machine, wiring);
    end_in_order(&end, &stats, pair, &outside, &replicas, events)?;
    Ok(SessionEnd { end, stats })
}

/// Lets the machine's thread answer what comes by the control socket.
fn answer_questions(control: &Control, side: &str, to_vm: &Sender<ToVm>) {
    let to_vm = to_vm.clone();
    control.serve(side, move |ask| to_vm.send(ToVm::Ask(ask)).is_ok());
}

/// The log's figures, by kind of entry.
pub fn log_figures(stats: &RunStats) -> Map<String, serde_json::Value> {
    let kinds: Map<_, _> =
        stats.log.iter().map(|(kind, k)| (kind.name().to_owned(), json!({ "entries": k.entries, "bytes": k.bytes }))).collect();
    let mut figures = Map::new();
    figures.insert("position".into(), json!(stats.position));
    figures.insert("guest_ns".into(), json!(stats.guest_ns));
    figures.insert("log".into(), json!(kinds));
    figures
}

/// Connects to the first standby of a list that can be reached; says which it is.
fn reach_one(places: &[String], reach: &Reach, events: &Events) -> Result<(usize, Reached)> {
    let patience = if places.len() == 1 { channel::CONNECT_PATIENCE } else { channel::patience(1) };
    let mut failure = None;
    for (standby, place) in places.iter().enumerate() {
        match reach.reach(place, patience) {
            Ok(reached) => return Ok((standby, reached)),
            Err(e) if places.len() == 1 => return Err(e),
            Err(e) => {
                events.say("no-standby", e.to_string());
                failure = Some(e);
            }
        }
    }
    let all = Error::new(format!("none of the standbys can be reached: {}", places.join(", ")));
    Err(match failure {
        Some(last) => all.because(last),
        None => all,
    })
}

/// How standbys are reached.
fn reach(options: &RunOptions) -> Reach {
    Reach::new(options.security.clone(), options.arbiter.clone())
}

/// Runs a machine that has just gone live, to its end.
pub fn run_live(
    live: standby::Live,
    spec: &VmSpec,
    options: &RunOptions,
    events: &Events,
    signals: &Signals,
    control: &Control,
    taps: Taps,
) -> Result<SessionEnd> {
    let (to_vm, inbox): (Sender<ToVm>, Receiver<ToVm>) = channel();
    end_on_signals(signals, &to_vm);
    answer_questions(control, "survivor", &to_vm);
    stop_when_overruled(control, &to_vm);
    control.board().took_over(live.epoch.0);
    let waiting = Arc::new(AtomicUsize::new(0));
    let outside = Outside::open(spec, options, &live.disks, &to_vm, &waiting, taps)?;
    let identify = outside.identify(live.writer);
    identify(live.epoch.0);
    // The network learns where the machine is now, before it hears from it.
    for (link, mac) in outside.links.iter().zip(&live.machine.config().nics) {
        link.announce(*mac);
    }
    let mut outlet = outside.outlet(control.board())?;
    let reissued = live.reissue.len();
    let to_disks = |output: &Output| matches!(output, Output::DiskWrite { .. } | Output::DiskFlush { .. });
    let (disks, others): (Vec<Output>, Vec<Output>) = live.reissue.into_iter().partition(to_disks);
    others.into_iter().for_each(&mut outlet);
    let writes = disks.into_iter().filter(|output| matches!(output, Output::DiskWrite { .. })).collect();
    outside.settle_disks(writes, &live.machine, &to_vm)?;
    let figures = Map::from_iter([
        ("epoch".to_owned(), json!(live.epoch.0)),
        ("reissued".to_owned(), json!(reissued)),
        ("position".to_owned(), json!(live.machine.position())),
    ]);
    events.say_with("live", format!("live in epoch {}; {reissued} outputs sent again", live.epoch), figures);
    let (mut primary, mut healer) = live.primary;
    let commit = primary.commit();
    // They were sent just now.
    primary.handle(Nanos(now_ns()), PrimaryEvent::OutputsLeft { up_to: live.last_output });
    if !options.protect.is_empty() {
        // This host was told better.
        healer.replace(options.protect.iter().cloned());
    }
    let pair = match &options.arbiter {
        Some(arbiter) if healer.places().next().is_some() => Some(PairThread::start(PairWiring {
            primary,
            stream: None,
            standbys: Standbys { healer, reach: reach(options), at: None },
            arbiter: open_arbiter(arbiter, control, events)?,
            outlet: outside.outlet(control.board())?,
            identify,
            vm: to_vm.clone(),
            disks: live.disks.clone(),
            writer: live.writer,
            events: events.clone(),
            board: control.board().clone(),
            copy: options.copy,
        })?),
        _ => {
            events.say("unprotected", "this VM has no other standby: it runs on without protection");
            None
        }
    };
    outside.when_fenced(events, pair.as_ref());
    outside.when_written(pair.as_ref());
    let wiring = Wiring {
        inbox,
        outlet,
        recording: None,
        pair: pair.as_ref().map(|pair| pair.turns.clone()),
        commit,
        events: events.clone(),
        digest_interval: if pair.is_some() { DIGEST_INTERVAL } else { 0 },
        disks: live.disks.clone(),
        last_output: live.last_output,
        waiting,
        perf_map: options.perf_map.then(PerfMap::new).transpose()?,
    };
    let (_machine, end, stats) = live::run(live.machine, wiring);
    end_in_order(&end, &stats, pair, &outside, &live.disks, events)?;
    Ok(SessionEnd { end, stats })
}

/// Waits for the pair, tells people how it ended, and closes the disks unless the VM goes on elsewhere or nobody knows.
fn end_in_order(
    end: &End,
    stats: &RunStats,
    pair: Option<PairThread>,
    outside: &Outside,
    disks: &[Replica],
    events: &Events,
) -> Result<()> {
    let mut figures = log_figures(stats);
    let mut in_order = !matches!(end, End::HostFailure(_));
    if let Some(pair) = pair {
        let report = pair.join();
        in_order &= report.in_order;
        figures.insert("held_outputs".into(), json!(report.held_outputs));
        figures.insert("held_mean_ns".into(), json!(report.held_sum_ns.checked_div(report.held_outputs).unwrap_or(0)));
        figures.insert("held_max_ns".into(), json!(report.held_max_ns));
    }
    events.say_with("ended", end.text(), figures);
    if !in_order {
        return Ok(());
    }
    if let Some(writer) = &outside.disks {
        writer.put_again(Vec::new())?;
    }
    disks.iter().try_for_each(Replica::close)
}
