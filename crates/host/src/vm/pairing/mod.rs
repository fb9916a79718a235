//! The primary's end of the logging channel: drives [`twinstep_pair::Primary`], on a thread of its own and on the machine's ([`super::turns`]).
//!
//! *In*: entries and outputs from the machine's thread, bytes from the standby, verdicts from the arbiter. *Out*: bytes to the standby,
//! outputs that may leave, and word to the machine's thread. *Invariant*: an output is handed to the world here and nowhere else, and only when
//! the pair has released it.
mod feed;
mod image;
#[cfg(test)]
mod image_tests;
mod leaving;
mod resync;

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Map, json};
use twinstep_machine::Output;
use twinstep_pair::{
    Arbiter, Epoch, Nanos, Notice, OutputId, OwnerId, Primary, PrimaryAction, PrimaryEvent, PrimaryState, Record, StopReason,
    Verdict,
};

use self::feed::Feed;
use super::asker::Asker;
use super::difference;
use super::healing::{Healing, Standbys};
use super::line::{Closing, Line};
use super::live::{Outlet, ToVm};
use super::mirror::{Mirror, Mirrored};
use super::precopy::{self, CopyId, CopyNews, Copying};
use super::resync::{Delta, take_outputs, with_outputs};
use super::told::{self, Told};
use super::turns::{self, Post, Turn, Turns};
use crate::channel::{Beats, Channel, Reached};
use crate::disk::{Replica, Writer};
use crate::error::{Context, Result};
use crate::events::{Events, now_ns};
use crate::status::board::Board;
use crate::status::meter::Meter;

/// What the pair's thread is told.
#[derive(Debug)]
pub enum ToPair {
    /// The log grew.
    Record(Record),
    /// The machine made an output; the log grew by its note.
    Output {
        /// Its running number.
        id: OutputId,
        /// When the machine's thread had it.
        made_ns: u64,
        /// Its note.
        note: Record,
        /// Itself.
        output: Output,
    },
    /// The machine runs to there, and nothing enters it before, unless it pauses.
    Lookahead {
        /// The position.
        position: u64,
    },
    /// It has paused before. To be said before what it made.
    Paused,
    /// How far the guest is.
    Progress {
        /// Its position.
        position: u64,
    },
    /// What a copy has to say.
    Copy(CopyId, CopyNews),
    /// Bytes of the mirror of this number, for the initial copy.
    Copied {
        /// The mirror's.
        number: u64,
        /// Pieces.
        bytes: Vec<u8>,
    },
    /// The mirror of this number is made, up to what is written from now on; or why not.
    Mirrored {
        /// The mirror's.
        number: u64,
        /// What it came to.
        outcome: std::result::Result<Mirrored, String>,
    },
    /// For a resync all has been done that can be done while the guest runs.
    ResyncPrepared,
    /// The guest stands still at this position, as it was to.
    StandsStill {
        /// The position.
        position: u64,
    },
    /// Pieces of a resync that are sent while the guest runs.
    Ahead(Vec<u8>),
    /// Instead of a delta: too much differs, and the guest has to run on.
    ResyncGoesOn,
    /// The delta that was asked for, of the machine at this position.
    Delta {
        /// The position.
        position: u64,
        /// The delta.
        delta: Delta,
        /// How long it took.
        took_ns: u64,
    },
    /// It cannot be made.
    NoDelta(String),
    /// Nor can anything be prepared for it.
    NoResync(String),
    /// A sign of life beside the connection of this number.
    Beat(u64),
    /// The arbiter's answer.
    Verdict(Epoch, Verdict),
    /// So many outputs to shared disks, the oldest ones, have been carried out and are durable.
    Written(u64),
    /// A switch refuses our frames: it has seen this epoch of the VM, which is another side's.
    Fenced(u64),
    /// What became of the attempt to reach a standby.
    Reached(Result<Reached>),
    /// Somebody wants the standby to go live.
    HandOver,
    /// This host has failed: fall silent, so that the secondary takes over. Outputs that were not released never leave.
    Abandon,
    /// The guest is over.
    Shutdown {
        /// Why.
        reason: String,
    },
}

/// What the pair's thread works with.
pub struct PairWiring {
    /// The protocol.
    pub primary: Primary,
    /// The connection to the standby, if there is one already; then whoever looks for standbys knows which.
    pub stream: Option<Channel>,
    /// The standbys.
    pub standbys: Standbys,
    /// The arbiter.
    pub arbiter: Box<dyn Arbiter + Send>,
    /// Where outputs go.
    pub outlet: Outlet,
    /// Tells the networks in which epoch the VM runs here.
    pub identify: Identify,
    /// The machine's thread.
    pub vm: Sender<ToVm>,
    /// The machine's disks.
    pub disks: Vec<Replica>,
    /// Who writes to them.
    pub writer: Writer,
    /// Events.
    pub events: Events,
    /// Where people see how it goes.
    pub board: Board,
    /// Bounds of the first copy.
    pub copy: twinstep_migrate::Config,
}

/// Tells the networks in which epoch the VM runs here.
pub type Identify = Arc<dyn Fn(u64) + Send + Sync>;

/// A running pair thread.
pub struct PairThread {
    /// Messages to it, and its turns.
    pub turns: Turns<ToPair>,
    thread: std::thread::JoinHandle<PairReport>,
}

/// What a pair thread did.
#[derive(Debug, Clone, Default)]
pub struct PairReport {
    /// Whether protection was ever established.
    pub protected: bool,
    /// Whether the VM ended here, and goes on nowhere.
    pub in_order: bool,
    /// Longest time an output was held, and the sum and number of all that were.
    pub held_max_ns: u64,
    #[allow(missing_docs)]
    pub held_sum_ns: u64,
    #[allow(missing_docs)]
    pub held_outputs: u64,
}

impl PairThread {
    /// Starts the thread.
    pub fn start(wiring: PairWiring) -> Result<Self> {
        let (post, inbox) = Post::new()?;
        let line = wiring.stream.map(Line::new).transpose()?;
        let driver = Driver {
            asker: Asker::new(wiring.arbiter, post.clone(), ToPair::Verdict),
            healing: Healing::new(wiring.standbys, post.clone(), ToPair::Reached, wiring.events.clone()),
            to_self: post.clone(),
            copy: wiring.copy,
            copying: None,
            copies: 0,
            cut_blocks: 0,
            primary: wiring.primary,
            inbox,
            line,
            connections: 0,
            beats: None,
            closing: Closing::default(),
            outlet: wiring.outlet,
            identify: wiring.identify,
            may_leave: 0,
            given: 0,
            writing: VecDeque::new(),
            vm: wiring.vm,
            disks: wiring.disks,
            writer: wiring.writer,
            mirror: None,
            mirrors: 0,
            events: wiring.events,
            held: VecDeque::new(),
            unmatched: Unmatched::default(),
            told: None,
            ahead: false,
            mismatch_ns: 0,
            stopped_ns: 0,
            stood_ns: 0,
            feed: Feed::default(),
            deltas_awaited: 0,
            report: PairReport::default(),
            last_state: PrimaryState::Unprotected,
            logged: Default::default(),
            status_ns: now_ns(),
            board: wiring.board.clone(),
            meter: Meter::new(wiring.board, now_ns()),
            held_before: (0, 0),
            done: false,
        };
        let driver = Arc::new(Mutex::new(driver));
        let turns = Turns::new(post.clone(), driver.clone());
        let own = move || own(&driver, &post);
        let thread = std::thread::Builder::new().name("pair".into()).spawn(own).what("cannot start a thread")?;
        Ok(Self { turns, thread })
    }
    /// Waits for its end, which comes after the guest's.
    pub fn join(self) -> PairReport {
        self.thread.join().unwrap_or_default()
    }
}

/// The driver's own thread: waits for the standby, for messages and for time.
fn own(driver: &Mutex<Driver>, post: &Post<ToPair>) -> PairReport {
    let mut readable = false;
    // Who panics while it drives takes the pair with it.
    let lock = || driver.lock().expect("nobody has failed while it drove the pair");
    lock().begin();
    loop {
        let (interest, patience) = {
            let mut driver = lock();
            if std::mem::take(&mut readable) {
                driver.receive();
            }
            driver.turn();
            driver.look_at_time();
            // Once it is over, not another action is carried out.
            if driver.done {
                break;
            }
            (driver.line.as_ref().map(Line::interest), driver.patience())
        };
        match turns::wait(post, interest.as_ref(), patience) {
            Ok(ready) => readable = ready,
            Err(e) => lock().tell_vm(ToVm::Fail(e.to_string())),
        }
    }
    let closing = std::mem::take(&mut lock().closing);
    closing.wait();
    std::mem::take(&mut lock().report)
}

/// Outputs that the secondary has not matched. Those that are too many are forgotten, the oldest first: then a difference in them is shown without bytes.
#[derive(Default)]
struct Unmatched {
    outputs: VecDeque<(OutputId, u64, Output)>,
    bytes: usize,
}

/// Bytes of outputs that are kept in order to show differences.
const UNMATCHED_BYTES: usize = 32 << 20;

impl Unmatched {
    fn push(&mut self, id: OutputId, position: u64, output: &Output) {
        self.bytes += cost(output);
        self.outputs.push_back((id, position, output.clone()));
        while self.bytes > UNMATCHED_BYTES {
            self.pop();
        }
    }
    fn pop(&mut self) {
        if let Some((_, _, output)) = self.outputs.pop_front() {
            self.bytes -= cost(&output);
        }
    }
    /// Those up to this one are matched.
    fn forget(&mut self, matched: OutputId) {
        while self.outputs.front().is_some_and(|(id, ..)| *id <= matched) {
            self.pop();
        }
    }
    fn get(&self, wanted: OutputId) -> difference::Made<'_> {
        let found = self.outputs.iter().find(|(id, ..)| *id == wanted);
        found.map(|(_, position, output)| (*position, output))
    }
}

fn cost(output: &Output) -> usize {
    super::live::weight(match output {
        Output::NetTx { frame, .. } | Output::NetTxGso { frame, .. } => frame,
        Output::Serial(bytes) | Output::Console(bytes) | Output::DiskWrite { data: bytes, .. } => bytes,
        Output::DiskFlush { .. } => &[],
    })
}

struct Driver {
    copy: twinstep_migrate::Config,
    /// The copy to the standby, while it is under way.
    copying: Option<Copying>,
    copies: CopyId,
    /// Blocks of disks that were left for the last cut.
    cut_blocks: usize,
    primary: Primary,
    healing: Healing<ToPair>,
    /// For threads of connections to come.
    to_self: Post<ToPair>,
    inbox: Receiver<ToPair>,
    line: Option<Line>,
    /// The number of the newest connection: what still comes beside an earlier one is wanted by nobody.
    connections: u64,
    /// Signs of life beside it.
    beats: Option<Beats>,
    closing: Closing,
    asker: Asker<ToPair>,
    outlet: Outlet,
    identify: Identify,
    /// The last output that was released.
    may_leave: OutputId,
    /// The last one that was given to the outlet, and those to shared disks among them that have not been carried out.
    given: OutputId,
    writing: VecDeque<OutputId>,
    vm: Sender<ToVm>,
    events: Events,
    /// Outputs that may not leave yet, with the time they were made.
    held: VecDeque<(OutputId, u64, Output)>,
    /// Outputs that the secondary has not matched yet, with their positions, so that a difference can be shown.
    unmatched: Unmatched,
    board: Board,
    /// What the standby has told of its machine, during a resync.
    told: Option<Arc<Mutex<Told>>>,
    /// Pieces of the resync are sent while the guest runs.
    ahead: bool,
    /// When the difference was found, when the guest was stopped for the resync, and how long it had stood still for it before.
    mismatch_ns: u64,
    stopped_ns: u64,
    stood_ns: u64,
    /// What goes to the standby as its image.
    feed: Feed,
    /// Deltas asked for that have not come.
    deltas_awaited: u32,
    disks: Vec<Replica>,
    writer: Writer,
    /// While the standby's disks are made equal; the copy of the machine follows.
    mirror: Option<Mirror>,
    mirrors: u64,
    report: PairReport,
    last_state: PrimaryState,
    /// What was logged since the last status: entries and bytes by kind.
    logged: std::collections::BTreeMap<u8, (u64, u64)>,
    status_ns: u64,
    meter: Meter,
    held_before: (u64, u64),
    done: bool,
}

/// Time between two status events.
const STATUS_NS: u64 = 500_000_000;

fn now() -> Nanos {
    Nanos(now_ns())
}

impl Turn for Driver {
    fn turn(&mut self) {
        // What has come meanwhile goes into the same packets.
        while !self.done
            && let Ok(message) = self.inbox.try_recv()
        {
            self.take(message);
        }
        self.act();
    }
    fn wants_owner(&self) -> bool {
        self.done || self.line.as_ref().is_some_and(Line::wants_owner)
    }
}

impl Driver {
    fn begin(&mut self) {
        if self.line.is_some() {
            let standbys = self.healing.greeting();
            self.primary.handle(now(), PrimaryEvent::PeerConnected { standbys });
        }
    }

    /// How long its thread may wait.
    fn patience(&self) -> Duration {
        self.meter.patience(self.deadline(), now_ns())
    }

    fn deadline(&self) -> Option<Nanos> {
        self.primary.deadline().into_iter().chain(self.healing.deadline()).min()
    }

    fn look_at_time(&mut self) {
        if self.deadline().is_some_and(|deadline| deadline <= now()) {
            self.primary.handle(now(), PrimaryEvent::Tick);
            self.act();
        }
        self.status();
    }

    /// Takes what the standby has sent.
    fn receive(&mut self) {
        if let Some(line) = &mut self.line {
            line.flush();
        }
        while !self.done
            && let Some(received) = self.line.as_mut().and_then(Line::receive)
        {
            let event = match received {
                Ok(bytes) => {
                    self.meter.heard(now_ns());
                    PrimaryEvent::Bytes(bytes)
                }
                Err(reason) => {
                    (self.line, self.mirror, self.beats) = (None, None, None);
                    self.meter.lost();
                    PrimaryEvent::PeerClosed { reason }
                }
            };
            self.primary.handle(now(), event);
            self.act();
        }
    }

    fn disconnect(&mut self) {
        (self.mirror, self.beats) = (None, None);
        if let Some(line) = self.line.take() {
            self.closing = line.close();
            self.meter.lost();
        }
    }

    fn open_beats(&mut self, to: &str, peer: OwnerId) {
        let Some(line) = &self.line else { return };
        let (number, inbox) = (self.connections, self.to_self.clone());
        let heard = move || inbox.send(ToPair::Beat(number)).is_ok();
        match Beats::toward(to, line.beat_key(), self.writer.owner, peer.0, heard) {
            Ok(beats) => self.beats = Some(beats),
            // The channel's own heartbeats do without.
            Err(e) => self.events.say("no-heartbeats", e.to_string()),
        }
    }

    fn take(&mut self, message: ToPair) {
        let event = match message {
            ToPair::Record(record) => {
                self.count(&record);
                PrimaryEvent::Record(record)
            }
            ToPair::Output { id, made_ns, note, output } => {
                self.count(&note);
                if self.primary.state() >= PrimaryState::Copying {
                    self.unmatched.push(id, note.position, &output);
                }
                self.held.push_back((id, made_ns, output));
                PrimaryEvent::Output { id, note }
            }
            ToPair::Lookahead { position } => PrimaryEvent::Lookahead { position },
            ToPair::Paused => PrimaryEvent::Paused,
            ToPair::Progress { position } => PrimaryEvent::Progress { position },
            ToPair::Delta { .. } | ToPair::NoDelta(_) | ToPair::ResyncGoesOn if !self.is_newest_delta() => return,
            ToPair::ResyncPrepared => PrimaryEvent::ResyncPrepared,
            ToPair::StandsStill { position } => PrimaryEvent::StandsStill { position },
            ToPair::Ahead(bytes) => return self.on_ahead(bytes),
            ToPair::ResyncGoesOn => return self.on_resync_goes_on(),
            ToPair::Copy(id, news) => match self.on_copy(id, news) {
                Some(event) => event,
                None => return,
            },
            ToPair::Copied { number, bytes } => return self.on_mirror_bytes(number, bytes),
            ToPair::Mirrored { number, outcome } => match self.on_mirrored(number, outcome) {
                Some(event) => event,
                None => return,
            },
            ToPair::Delta { position, delta, took_ns } => return self.on_delta(position, &delta, took_ns),
            ToPair::NoDelta(reason) | ToPair::NoResync(reason) => {
                // As if the standby had hung up: it is of no use like this.
                self.disconnect();
                PrimaryEvent::PeerClosed { reason }
            }
            // Of a connection that was given up, nothing is wanted.
            ToPair::Beat(number) if self.line.is_none() || number != self.connections => return,
            ToPair::Beat(_) => PrimaryEvent::Beat,
            ToPair::Verdict(epoch, verdict) => {
                self.asker.answered();
                let figures = Map::from_iter([("epoch".to_owned(), json!(epoch.0))]);
                self.events.say_with("arbiter", format!("the arbiter says {verdict:?} for epoch {epoch}"), figures);
                PrimaryEvent::ArbiterAnswer { epoch, verdict }
            }
            ToPair::Reached(result) => match self.reached(result) {
                Some(standbys) => PrimaryEvent::PeerConnected { standbys },
                None => return,
            },
            ToPair::Written(outputs) => {
                let done = usize::try_from(outputs).map_or(self.writing.len(), |outputs| outputs.min(self.writing.len()));
                self.writing.drain(..done);
                PrimaryEvent::OutputsLeft { up_to: self.left() }
            }
            // The switch may be wrong. So may this side, and the arbiter knows.
            ToPair::Fenced(epoch) => {
                if self.line.is_none() {
                    return;
                }
                self.disconnect();
                PrimaryEvent::PeerClosed { reason: format!("a switch says that epoch {epoch} of this VM is another side's") }
            }
            ToPair::HandOver => PrimaryEvent::HandOver { reason: "somebody asked for it".into() },
            ToPair::Abandon => {
                self.events.say("abandoned", "this host has failed; the secondary may take over");
                self.held.clear();
                self.line = None;
                self.done = true;
                return;
            }
            ToPair::Shutdown { reason } => PrimaryEvent::Shutdown { reason },
        };
        self.primary.handle(now(), event);
    }

    /// A standby was reached, or not: the connection is taken over if the VM still has none.
    fn reached(&mut self, result: Result<Reached>) -> Option<Vec<String>> {
        let (stream, standbys) = self.healing.reached(result)?;
        if self.primary.state() != PrimaryState::Unprotected || self.line.is_some() {
            return None;
        }
        let peer = stream.peer().map(|address| address.to_string());
        match Line::new(stream) {
            Ok(line) => {
                self.board.set_peer(peer);
                self.connections += 1;
                self.line = Some(line);
                Some(standbys)
            }
            Err(e) => {
                self.events.say("no-standby", e.to_string());
                None
            }
        }
    }

    fn act(&mut self) {
        // Whoever is told below and asks is not to hear of the state before.
        self.meter.primary(now_ns(), &self.primary.status());
        while !self.done
            && let Some(action) = self.primary.poll()
        {
            match action {
                PrimaryAction::Send(bytes) => {
                    if let Some(line) = &mut self.line {
                        line.send(&bytes);
                    }
                }
                PrimaryAction::OpenBeats { to, peer } => self.open_beats(&to, peer),
                PrimaryAction::Beat => self.beats.iter_mut().for_each(Beats::send),
                PrimaryAction::Disconnect => self.disconnect(),
                PrimaryAction::StartImage => self.start_image(),
                PrimaryAction::CopyReport(bytes) => {
                    if let Some(mirror) = &self.mirror {
                        mirror.report(bytes);
                    }
                }
                PrimaryAction::StartResync { output, position, detail } => {
                    self.say_mismatch(output, position, &detail);
                    self.start_resync();
                }
                PrimaryAction::Changed(bytes) => self.on_changed(&bytes),
                PrimaryAction::Slow { percent } => self.tell_vm(ToVm::Slow(percent)),
                PrimaryAction::StandStill => {
                    self.stopped_ns = now_ns();
                    self.tell_vm(ToVm::StandStill);
                }
                PrimaryAction::MakeDelta => {
                    self.deltas_awaited += 1;
                    self.tell_vm(ToVm::MakeDelta);
                }
                PrimaryAction::Agreed { position } => self.tell_vm(ToVm::Agreed { position }),
                PrimaryAction::WantImage { bytes } => {
                    self.feed.want(bytes);
                    self.feed_image();
                }
                PrimaryAction::Release { up_to } => self.release(up_to),
                PrimaryAction::AskArbiter(claim) => {
                    self.events.say("arbiter", format!("claiming epoch {}", claim.epoch));
                    self.asker.ask(claim);
                }
                PrimaryAction::GoAlone { epoch, reason } => {
                    let figures = Map::from_iter([("epoch".to_owned(), json!(epoch.0))]);
                    self.events.say_with("alone", format!("going on alone in epoch {epoch}: {reason}"), figures);
                    self.writer.epoch = epoch.0;
                    (self.identify)(epoch.0);
                    // Before anything leaves that only this side has made.
                    self.note(|disk| disk.alone(epoch.0, None));
                }
                PrimaryAction::Stop(reason) => {
                    self.events.say("stopped", reason.to_string());
                    self.report.in_order = matches!(reason, StopReason::Ended { .. });
                    self.tell_vm(ToVm::Stop(reason.to_string()));
                    // Never to leave.
                    self.held.clear();
                    self.done = true;
                }
                PrimaryAction::Throttle(on) => self.tell_vm(ToVm::Throttle(on)),
                PrimaryAction::Notice(notice) => {
                    match notice {
                        Notice::Throttle { reason } => self.meter.throttle(reason),
                        Notice::Refused { .. } => self.healing.refused(),
                        _ => {}
                    }
                    self.events.say("notice", notice.to_string());
                }
            }
        }
        self.let_leave();
        let state = self.primary.state();
        self.healing.follow(state);
        if state != self.last_state {
            let before = std::mem::replace(&mut self.last_state, state);
            if state == PrimaryState::Protected && before == PrimaryState::Resyncing {
                self.say_resynced();
            } else if state == PrimaryState::Protected {
                self.report.protected = true;
                self.events.say("protected", "every output now waits for the secondary");
            }
            if state == PrimaryState::Unprotected {
                self.unmatched = Unmatched::default();
                self.feed = Feed::default();
                self.told = None;
                self.tell_vm(ToVm::Unprotected);
                (self.mirror, self.copying) = (None, None);
                // Whatever a mirror had begun is over.
                self.disks.iter().for_each(|disk| disk.end_mirror(self.mirrors));
            }
            if state == PrimaryState::Unprotected && matches!(before, PrimaryState::Greeting | PrimaryState::Copying) {
                self.events.say("unprotected", "the guest runs on without protection");
                self.note(|disk| disk.protected(false));
            }
        }
    }

    /// Writes into the sidecars of the disks. A side that cannot do that has failed.
    fn note(&mut self, what: impl Fn(&Replica) -> Result<()>) {
        if let Err(e) = self.disks.iter().try_for_each(what) {
            self.tell_vm(ToVm::Fail(e.to_string()));
        }
    }

    /// Tells people what differs.
    fn say_mismatch(&self, output: OutputId, position: u64, detail: &[u8]) {
        let theirs = take_outputs(detail).unwrap_or_default();
        let theirs = theirs.first().map(|(position, output)| (*position, output));
        let text = difference::describe(output, self.unmatched.get(output), theirs);
        let figures = Map::from_iter([("output".to_owned(), json!(output)), ("position".to_owned(), json!(position))]);
        let text = format!(
            "{text}. Two sides cannot tell which of them is wrong; the primary is believed. A third host can, if the standby records what led to it (--record-window, `twinstep vote`)"
        );
        self.events.say_with("mismatch", text, figures);
    }

    fn say_damaged(&self, side: &str, damaged: &[usize]) {
        if !damaged.is_empty() {
            let figures = Map::from_iter([("pages".to_owned(), json!(damaged))]);
            let text = format!(
                "memory of the {side}'s host is bad: {} pages changed without being written, the first is page {} of the guest's RAM",
                damaged.len(),
                damaged[0]
            );
            self.events.say_with("damaged", text, figures);
        }
    }

    fn count(&mut self, record: &Record) {
        let taken = self.meter.record(record);
        let (entries, bytes) = self.logged.entry(record.kind).or_default();
        *entries += 1;
        *bytes += taken;
    }

    /// Says how the pair does, now and then.
    fn status(&mut self) {
        self.unmatched.forget(self.primary.status().matched);
        let span_ns = now_ns() - self.status_ns;
        if span_ns < STATUS_NS {
            return;
        }
        self.status_ns += span_ns;
        let per_s = |n: u64| n as f64 * 1e9 / span_ns as f64;
        let status = self.primary.status();
        let (sum, number) = (self.report.held_sum_ns, self.report.held_outputs);
        let (sum_before, number_before) = std::mem::replace(&mut self.held_before, (sum, number));
        let mut log = Map::new();
        let mut bytes = 0;
        for (kind, (n, b)) in std::mem::take(&mut self.logged) {
            let name = twinstep_log::EntryKind::from_number(kind).map_or("unknown", twinstep_log::EntryKind::name);
            log.insert(name.to_owned(), json!({ "entries": per_s(n), "bytes": per_s(b) }));
            bytes += b;
        }
        let figures = json!({
            "state": status.state.name(), "epoch": status.epoch.0, "throttled": status.throttled,
            "unacked_bytes": status.unacked_bytes, "unreplayed_bytes": status.unreplayed_bytes,
            "lag_instructions": status.lag_instructions, "held_now": status.held_outputs,
            "matched": status.matched, "resyncs": status.resyncs,
            "held_mean_ns": (sum - sum_before).checked_div(number - number_before).unwrap_or(0),
            "held_max_ns": self.report.held_max_ns, "log_bytes_per_s": per_s(bytes), "log_per_s": log,
        });
        if let serde_json::Value::Object(figures) = figures {
            self.events.figures("status", figures);
        }
    }

    fn tell_vm(&mut self, message: ToVm) {
        // A machine that has ended needs nothing.
        let _ = self.vm.send(message);
    }
}
