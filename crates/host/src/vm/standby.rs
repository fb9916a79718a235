//! The secondary: replays a machine from the network and goes live when its primary is lost.
//!
//! *In*: a connection from a primary. *Out*: how it ended, and, if it went live, the machine with the outputs that the world may not have
//! seen. *Invariant*: the protocol runs on a thread of its own, so that receipt is acknowledged at once, however busy the replay is.
use std::net::UdpSocket;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Map, json};
use twinstep_machine::{Config, Machine, Output};
use twinstep_pair::{
    Arbiter, Epoch, Healer, Nanos, OnMismatch, OutputId, Primary, Secondary, SecondaryAction, SecondaryEvent, SecondarySetup,
    Seq, StopReason, Verdict, VmId,
};

use super::asker::Asker;
use super::build::Extra;
use super::follow::{Follower, Replayed, ToReplay};
use super::line::{Closing, Line};
use super::mirror::Target;
use super::spec::DiskSpec;
use super::turns::{self, Post, Turn, Turns};
use super::window::Window;
use crate::channel::{Beats, Channel};
use crate::control::Control;
use crate::disk::{Replica, Writer};
use crate::error::{Context, Error, Result};
use crate::events::{Events, now_ns};
use crate::signals::Signals;
use crate::status::board::Board;
use crate::status::meter::Meter;

/// What a standby works with.
pub struct StandbyWiring {
    /// Who it is and what it accepts.
    pub setup: SecondarySetup,
    /// The primary's connection.
    pub stream: Channel,
    /// Where the primary's signs of life beside the connection come, if anywhere: what `setup.beats` says.
    pub beat_socket: Option<Arc<UdpSocket>>,
    /// The arbiter.
    pub arbiter: Box<dyn Arbiter + Send>,
    /// Where the disks are on this host. An image that is not there is made.
    pub disks: Vec<DiskSpec>,
    /// Overwrite images that are newer than the primary's, or of another disk.
    pub force_stale_disk: bool,
    /// Cables for so many network cards.
    pub cables: usize,
    /// Events.
    pub events: Events,
    /// What tells this process to end.
    pub signals: Signals,
    /// What asks how it is going.
    pub control: Control,
    /// What the guest cannot see of the configuration.
    pub tune: fn(&mut Config),
    /// The folder for windows: recordings of what led to different outputs.
    pub record_window: Option<PathBuf>,
}

/// A machine that has gone live.
pub struct Live {
    /// The machine, at the end of the log.
    pub machine: Machine,
    /// Its disks.
    pub disks: Vec<Replica>,
    /// Who writes to them from now on.
    pub writer: Writer,
    /// What the image said of it.
    pub extra: Extra,
    /// Outputs to send again, in order.
    pub reissue: Vec<Output>,
    /// Outputs it has made since power-on.
    pub last_output: OutputId,
    /// The epoch it runs in.
    pub epoch: Epoch,
    /// What drives it from here on as a primary, and who looks for its standbys.
    pub primary: (Primary, Healer),
}

/// How serving a primary ended.
pub enum Outcome {
    /// The machine is ours.
    Live(Box<Live>),
    /// It is not, and why.
    Stopped(StopReason),
}

/// What the protocol's thread is told.
#[derive(Debug)]
pub(super) enum ToStandby {
    /// A sign of life of the primary beside the channel.
    Beat,
    Verdict(Epoch, Verdict),
    /// So many bytes more of an image are used up.
    Taken(u64),
    Restored {
        position: u64,
        last_output: OutputId,
        took_ns: u64,
    },
    /// For the primary, during the initial copy.
    Report(Vec<u8>),
    /// An output was made, the same as the primary's.
    Output(OutputId),
    /// The whole state was the same there.
    Agreed(u64),
    /// The state differs there, though no output does, in these parts.
    StateDiffers(u64, String),
    /// An output is not the primary's.
    Mismatch {
        /// What is wrong, for people.
        text: String,
        output: OutputId,
        position: u64,
        detail: Vec<u8>,
    },
    /// These pages changed though nobody wrote to them.
    Damaged(Vec<usize>),
    /// For the primary, of what has changed here ([`super::told`]).
    Changed(Vec<u8>),
    /// All that has changed was told.
    Listed,
    /// What the machine has made since it differed was reported.
    Diverged,
    /// The machine is the primary's again: so many pages, and blocks of disks, were replaced.
    Resynced {
        position: u64,
        last_output: OutputId,
        pages: usize,
        blocks: usize,
        took_ns: u64,
    },
    Replayed {
        seq: Seq,
        position: u64,
    },
    Failed(String),
    /// This process was told to end.
    Shutdown(String),
}

/// Serves one primary to the end. Blocks.
pub fn serve(wiring: StandbyWiring) -> Result<Outcome> {
    let (post, inbox) = Post::new()?;
    let (replay, replay_inbox) = channel();
    let peer = wiring.stream.peer().map(|address| address.to_string());
    let line = Line::new(wiring.stream)?;
    let target = Target::new(wiring.disks, wiring.force_stale_disk, wiring.setup.owner.0);
    let owner = wiring.setup.owner.0;
    let window = wiring.record_window.map(|folder| Window::new(&folder, wiring.events.clone())).transpose()?;
    let asked = replay.clone();
    wiring.control.serve("standby", move |ask| asked.send(ToReplay::Ask(ask)).is_ok());
    let told = post.clone();
    // Whoever has ended needs not be told.
    wiring.signals.listen(move |why| _ = told.send(ToStandby::Shutdown(why)));
    let secondary = Secondary::new(wiring.setup).what("the pair's settings do not fit")?;
    let board = wiring.control.board().clone();
    board.set_peer(peer);
    let driver = Driver {
        inbox,
        meter: Meter::new(board.clone(), now_ns()),
        board,
        secondary,
        owner,
        vm: VmId::default(),
        line: Some(line),
        beat_socket: wiring.beat_socket,
        beats: None,
        to_self: post.clone(),
        closing: Closing::default(),
        asker: Asker::new(wiring.arbiter, post.clone(), ToStandby::Verdict),
        replay: replay.clone(),
        to_do: Vec::new(),
        events: wiring.events,
        state_differs: 0,
        failure: None,
        ending: None,
        outcome: None,
    };
    let driver = Arc::new(Mutex::new(driver));
    let turns = Turns::new(post.clone(), driver.clone());
    let over = Arc::new(AtomicBool::new(false));
    let follower = Follower::new(replay_inbox, turns, target, wiring.cables, wiring.tune, window).until(over.clone());
    let thread = std::thread::Builder::new().name("replay".into()).spawn(move || follower.run()).what("cannot start a thread")?;
    let outcome = own(&driver, &post);
    // It has the disks, which the next one wants.
    over.store(true, Ordering::Relaxed);
    let _ = replay.send(ToReplay::Over);
    let ended = thread.join();
    outcome.and_then(|outcome| ended.map(|()| outcome).map_err(|_| Error::new("the thread that replays has failed")))
}

/// The driver's own thread: waits for the primary, for messages and for time.
fn own(driver: &Mutex<Driver>, post: &Post<ToStandby>) -> Result<Outcome> {
    let lock = || driver.lock().map_err(|_| Error::new("the thread that replays has failed while it drove the pair"));
    lock()?.secondary.handle(now(), SecondaryEvent::PeerConnected);
    let mut readable = false;
    loop {
        let (interest, patience) = {
            let mut driver = lock()?;
            if std::mem::take(&mut readable) {
                driver.receive();
            }
            driver.turn();
            driver.look_at_time();
            if let Some(action) = driver.ending.take() {
                driver.end(action);
            }
            if let Some(outcome) = driver.outcome.take() {
                let closing = std::mem::take(&mut driver.closing);
                drop(driver);
                if !matches!(outcome, Ok(Outcome::Live(_))) {
                    closing.wait();
                }
                return outcome;
            }
            (driver.line.as_ref().map(Line::interest), driver.patience())
        };
        readable = turns::wait(post, interest.as_ref(), patience)?;
    }
}

struct Driver {
    secondary: Secondary,
    /// This process.
    owner: [u8; 16],
    /// Whose standby it is.
    vm: VmId,
    inbox: Receiver<ToStandby>,
    line: Option<Line>,
    /// Where the primary's signs of life beside it come, if anywhere, and what hears them.
    beat_socket: Option<Arc<UdpSocket>>,
    beats: Option<Beats>,
    to_self: Post<ToStandby>,
    closing: Closing,
    asker: Asker<ToStandby>,
    replay: Sender<ToReplay>,
    /// What it is given next.
    to_do: Vec<ToReplay>,
    events: Events,
    /// How often the state was seen to differ.
    state_differs: u64,
    board: Board,
    meter: Meter,
    /// Why this host cannot go on, if it cannot.
    failure: Option<String>,
    /// The last action, for which the thread that replays is waited for: it is carried out by the driver's own.
    ending: Option<SecondaryAction>,
    outcome: Option<Result<Outcome>>,
}

fn now() -> Nanos {
    Nanos(now_ns())
}

impl Turn for Driver {
    fn turn(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            self.take(message);
        }
        self.act();
        self.meter.secondary(now_ns(), &self.secondary.status());
    }
    fn wants_owner(&self) -> bool {
        self.ending.is_some() || self.line.as_ref().is_some_and(Line::wants_owner)
    }
}

impl Driver {
    /// How long its thread may wait.
    fn patience(&self) -> Duration {
        self.meter.patience(self.secondary.deadline(), now_ns())
    }

    fn look_at_time(&mut self) {
        if self.secondary.deadline().is_some_and(|deadline| deadline <= now()) {
            self.secondary.handle(now(), SecondaryEvent::Tick);
            self.act();
        }
    }

    /// Takes what the primary has sent.
    fn receive(&mut self) {
        if let Some(line) = &mut self.line {
            line.flush();
        }
        while let Some(received) = self.line.as_mut().and_then(Line::receive) {
            let event = match received {
                Ok(bytes) => {
                    self.meter.heard(now_ns());
                    SecondaryEvent::Bytes(bytes)
                }
                Err(reason) => {
                    (self.line, self.beats) = (None, None);
                    self.meter.lost();
                    self.events.say("peer-lost", format!("the primary is gone: {reason}"));
                    SecondaryEvent::PeerClosed { reason }
                }
            };
            self.secondary.handle(now(), event);
            self.act();
        }
    }

    fn take(&mut self, message: ToStandby) {
        let event = match message {
            // Of a connection that was given up, nothing is wanted.
            ToStandby::Beat if self.line.is_none() => return,
            ToStandby::Beat => SecondaryEvent::Beat,
            ToStandby::Verdict(epoch, verdict) => {
                self.asker.answered();
                let figures = Map::from_iter([("epoch".to_owned(), json!(epoch.0))]);
                self.events.say_with("arbiter", format!("the arbiter says {verdict:?} for epoch {epoch}"), figures);
                SecondaryEvent::ArbiterAnswer { epoch, verdict }
            }
            ToStandby::Restored { position, last_output, took_ns } => {
                let figures = Map::from_iter([("took_ns".to_owned(), json!(took_ns))]);
                let text = format!("machine restored at position {position} in {:.1} ms", took_ns as f64 / 1e6);
                self.events.say_with("restored", text, figures);
                SecondaryEvent::ImageRestored { position, last_output }
            }
            ToStandby::Taken(bytes) => SecondaryEvent::ImageTaken { bytes },
            ToStandby::Report(bytes) => SecondaryEvent::CopyReport(bytes),
            ToStandby::Output(id) => SecondaryEvent::Output { id },
            ToStandby::Agreed(position) => SecondaryEvent::Agreed { position },
            ToStandby::StateDiffers(position, text) => {
                self.state_differs += 1;
                let figures =
                    Map::from_iter([("position".to_owned(), json!(position)), ("times".to_owned(), json!(self.state_differs))]);
                // Nobody can see it, so nothing is done about it.
                let text = format!("the state is not the primary's at position {position}, but all outputs are: it {text}");
                self.events.say_with("state-differs", text, figures);
                return;
            }
            ToStandby::Mismatch { text, output, position, detail } => {
                let figures = Map::from_iter([("output".to_owned(), json!(output)), ("position".to_owned(), json!(position))]);
                self.events.say_with("mismatch", text, figures);
                SecondaryEvent::Mismatch { output, position, detail }
            }
            ToStandby::Damaged(pages) => {
                let text = format!(
                    "memory of this standby's host is bad: {} pages changed without being written, the first is page {} of the guest's RAM",
                    pages.len(),
                    pages[0]
                );
                self.events.say_with("damaged", text, Map::from_iter([("pages".to_owned(), json!(pages))]));
                return;
            }
            ToStandby::Changed(message) => SecondaryEvent::Changed(message),
            ToStandby::Listed => SecondaryEvent::Listed,
            ToStandby::Diverged => SecondaryEvent::Diverged,
            ToStandby::Resynced { position, last_output, pages, blocks, took_ns } => {
                let figures = Map::from_iter([
                    ("pages".to_owned(), json!(pages)),
                    ("blocks".to_owned(), json!(blocks)),
                    ("took_ns".to_owned(), json!(took_ns)),
                ]);
                let text = format!(
                    "{pages} pages and {blocks} blocks replaced in {:.1} ms; the machine is the primary's again",
                    took_ns as f64 / 1e6
                );
                self.events.say_with("resynced", text, figures);
                self.board.resynced();
                SecondaryEvent::ImageRestored { position, last_output }
            }
            ToStandby::Replayed { seq, position } => SecondaryEvent::Replayed { seq, position },
            ToStandby::Failed(reason) => {
                self.events.say("replay-failed", reason.clone());
                self.failure = Some(reason.clone());
                SecondaryEvent::Failed { reason }
            }
            ToStandby::Shutdown(reason) => SecondaryEvent::Shutdown { reason },
        };
        self.secondary.handle(now(), event);
    }

    fn open_beats(&mut self, peer: [u8; 16]) {
        let (Some(line), Some(socket)) = (&self.line, &self.beat_socket) else { return };
        let inbox = self.to_self.clone();
        let heard = move || inbox.send(ToStandby::Beat).is_ok();
        match Beats::listen(socket.clone(), line.beat_key(), self.owner, peer, heard) {
            Ok(beats) => self.beats = Some(beats),
            // The channel's own heartbeats do without.
            Err(e) => self.events.say("no-heartbeats", e.to_string()),
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.secondary.poll() {
            match action {
                SecondaryAction::Send(bytes) => {
                    if let Some(line) = &mut self.line {
                        line.send(&bytes);
                    }
                }
                SecondaryAction::OpenBeats { peer } => self.open_beats(peer.0),
                SecondaryAction::Beat => self.beats.iter_mut().for_each(Beats::send),
                SecondaryAction::Disconnect => {
                    self.beats = None;
                    if let Some(line) = self.line.take() {
                        self.closing = line.close();
                        self.meter.lost();
                    }
                }
                SecondaryAction::Prepare(hello) => {
                    self.board.set_vm(hello.vm.vm);
                    self.vm = hello.vm.vm;
                    if hello.on_mismatch == OnMismatch::Stop {
                        self.tell_replay(ToReplay::EndsAtMismatch);
                    }
                    let (vm, name, mib, cpu_model) = (hello.vm.vm, hello.vm.name, hello.vm.ram_bytes >> 20, hello.vm.cpu_model);
                    // Before the image travels: a host that cannot run the model has no use for it.
                    match (Config { cpu_model: cpu_model.clone(), ..Config::default() }).cpu() {
                        Ok(_) => {
                            let text = format!("following VM {vm} ({name}, {mib} MiB, {cpu_model}) in epoch {}", hello.epoch);
                            self.events.say("accepted", text);
                        }
                        Err(e) => self.take(ToStandby::Failed(format!(
                            "{e}; run the guest with a --cpu that both hosts have (`twinstep doctor` on each tells)"
                        ))),
                    }
                }
                SecondaryAction::ImageChunk(bytes) => self.tell_replay(ToReplay::Chunk(bytes)),
                SecondaryAction::Restore { position } => self.tell_replay(ToReplay::Restore { position }),
                SecondaryAction::Replay { first_seq, records } => {
                    records.iter().for_each(|record| _ = self.meter.record(record));
                    self.to_do.push(ToReplay::Records { first_seq, records });
                }
                SecondaryAction::RunAhead { position } => self.to_do.push(ToReplay::RunAhead { position }),
                SecondaryAction::ListChanges { position } => self.tell_replay(ToReplay::List { position }),
                SecondaryAction::Diverge => self.tell_replay(ToReplay::Diverge),
                SecondaryAction::Discard { up_to } => self.tell_replay(ToReplay::Discard { up_to }),
                SecondaryAction::AskArbiter(claim) => {
                    self.events.say("arbiter", format!("claiming epoch {}", claim.epoch));
                    self.asker.ask(claim);
                }
                ending @ (SecondaryAction::GoLive { .. } | SecondaryAction::Stop(_)) => self.ending = Some(ending),
                SecondaryAction::Notice(notice) => self.events.say("notice", notice.to_string()),
            }
        }
        self.hand_over();
    }

    /// Gives the replay what there is to do. After the acknowledgement is on its way: the thread that is woken may well take this one's processor, and outputs wait.
    fn hand_over(&mut self) {
        for message in std::mem::take(&mut self.to_do) {
            // A replay that has failed has said so.
            let _ = self.replay.send(message);
        }
    }

    /// Carries out the last action.
    fn end(&mut self, action: SecondaryAction) {
        match action {
            SecondaryAction::GoLive { epoch, reissue } => self.go_live(epoch, reissue),
            SecondaryAction::Stop(reason) => {
                if matches!(reason, StopReason::PeerEnded { .. }) {
                    self.end_with_primary();
                }
                self.events.say("stopped", reason.to_string());
                self.outcome = Some(match self.failure.take() {
                    Some(failure) => Err(Error::new(format!("this standby cannot follow the primary any more: {failure}"))),
                    None => Ok(Outcome::Stopped(reason)),
                });
            }
            other => unreachable!("{other:?} ends nothing"),
        }
    }

    /// The primary has ended in good order: the log is replayed to its end, so that the disks here are equal to those there.
    fn end_with_primary(&mut self) {
        let (answer, ended) = channel();
        self.tell_replay(ToReplay::End { answer });
        match ended.recv() {
            Ok(Ok(true)) => {
                self.events.say("closed", "the log is replayed to its end; the disks are closed, equal to the primary's")
            }
            Ok(Ok(false)) => {}
            Ok(Err(e)) => self.events.say("closed", format!("the disks may differ from the primary's: {e}")),
            // It has failed before, and said so.
            Err(_) => {}
        }
    }

    fn go_live(&mut self, epoch: Epoch, reissue: Range<OutputId>) {
        let (answer, live) = channel();
        self.tell_replay(ToReplay::Finish { reissue, answer });
        let replayed = live.recv().unwrap_or_else(|_| Err(Error::new("the replay is gone")));
        let live = replayed.map(|replayed| {
            let Replayed { machine, disks, extra, reissue, last_output } = replayed;
            let writer = Writer { vm: self.vm.0, epoch: epoch.0, owner: self.owner };
            Live { machine, disks, writer, extra, reissue, last_output, epoch, primary: self.secondary.clone().into_primary() }
        });
        if let Ok(live) = &live {
            let figures = Map::from_iter([("position".to_owned(), json!(live.machine.position()))]);
            self.events.say_with("consumed", format!("the log is consumed, to position {}", live.machine.position()), figures);
        }
        // Before it writes anything on its own.
        let noted = live.and_then(|live| {
            live.disks.iter().try_for_each(|disk| disk.alone(epoch.0, Some(self.owner)))?;
            Ok(live)
        });
        self.outcome = Some(noted.map(|live| Outcome::Live(Box::new(live))));
    }

    fn tell_replay(&mut self, message: ToReplay) {
        self.to_do.push(message);
        self.hand_over();
    }
}
