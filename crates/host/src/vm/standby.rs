//! The secondary: replays a machine from the network and goes live when its primary is lost.
//!
//! *In*: a connection from a primary. *Out*: how it ended, and, if it went live, the machine with the outputs that the world may not have
//! seen. *Invariant*: the protocol runs on a thread of its own, so that receipt is acknowledged at once, however busy the replay is.
use std::collections::VecDeque;
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::{Map, json};
use twinstep_log::{Entry, ImageReader, ReplayOptions, Replayer};
use twinstep_machine::{Activity, Config, Machine, Output};
use twinstep_pair::{
    Arbiter, Epoch, Nanos, OutputId, Record, Secondary, SecondaryAction, SecondaryEvent, SecondarySetup, Seq, StopReason,
    Verdict, wire,
};

use super::build::{self, DiskExtra, Extra};
use super::live::entry_of;
use super::pairing::{Asker, Closing, Connection};
use super::replay::Vm;
use crate::control::{Ask, Control};
use crate::error::{Context, Error, Result};
use crate::events::{Events, now_ns};
use crate::signals::Signals;
use crate::status::board::Board;
use crate::status::meter::Meter;

/// Makes the replica disks that an image's machine wants.
pub type Disks = Box<dyn FnMut(&[DiskExtra]) -> Result<Vec<Box<dyn twinstep_machine::Disk>>> + Send>;

/// What a standby works with.
pub struct StandbyWiring {
    /// Who it is and what it accepts.
    pub setup: SecondarySetup,
    /// The primary's connection.
    pub stream: TcpStream,
    /// The arbiter.
    pub arbiter: Box<dyn Arbiter + Send>,
    /// Replica disks.
    pub disks: Disks,
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
}

/// A machine that has gone live.
pub struct Live {
    /// The machine, at the end of the log.
    pub machine: Machine,
    /// What the image said of it.
    pub extra: Extra,
    /// Outputs to send again, in order.
    pub reissue: Vec<Output>,
    /// Outputs it has made since power-on.
    pub last_output: OutputId,
    /// The epoch it runs in.
    pub epoch: Epoch,
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
enum ToStandby {
    Bytes(Vec<u8>),
    Closed(String),
    Verdict(Epoch, Verdict),
    Restored {
        position: u64,
        last_output: OutputId,
        took_ns: u64,
    },
    Output(OutputId),
    Replayed {
        seq: Seq,
        position: u64,
    },
    Failed(String),
    /// This process was told to end.
    Shutdown(String),
}

/// What the replay's thread is told.
enum ToReplay {
    Chunk(Vec<u8>),
    Restore { position: u64 },
    Records { first_seq: Seq, records: Vec<Record> },
    Discard { up_to: OutputId },
    Ask(Ask),
    Finish { reissue: Range<OutputId>, epoch: Epoch, answer: Sender<Result<Live>> },
}

/// How long who connects may take to say its first word. A primary says it at once.
const GREETING_PATIENCE: Duration = Duration::from_secs(2);

/// Waits for a primary. Strangers come to any open port: scanners, health checks, people with a wrong address. They are sent away, and the
/// waiting goes on.
pub fn accept(listener: &TcpListener, events: &Events) -> Result<TcpStream> {
    loop {
        let (stream, from) = listener.accept().what("cannot accept a primary")?;
        match first_word(&stream) {
            Ok(()) => {
                events.say("connected", format!("a primary connected from {from}"));
                return Ok(stream);
            }
            Err(why) => events.say("stranger", format!("{from} is no primary: {why}; waiting on")),
        }
    }
}

/// Looks at how a conversation begins, without taking anything from it.
fn first_word(stream: &TcpStream) -> std::result::Result<(), String> {
    let deadline = Instant::now() + GREETING_PATIENCE;
    let mut word = [0; wire::MAGIC.len()];
    stream.set_read_timeout(Some(GREETING_PATIENCE)).map_err(|e| e.to_string())?;
    loop {
        match stream.peek(&mut word) {
            Ok(0) => return Err("it closed the connection".into()),
            Ok(n) if word[..n] != wire::MAGIC[..n] => return Err("it speaks another protocol".into()),
            Ok(n) if n == word.len() => return stream.set_read_timeout(None).map_err(|e| e.to_string()),
            // A part of the word: the rest is on its way.
            Ok(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Ok(_) => return Err("it does not go on".into()),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Err("it says nothing".into()),
            Err(e) => return Err(e.to_string()),
        }
    }
}

/// Serves one primary to the end. Blocks.
pub fn serve(wiring: StandbyWiring) -> Result<Outcome> {
    let (sender, inbox) = channel();
    let (replay, replay_inbox) = channel();
    let peer = wiring.stream.peer_addr().ok().map(|address| address.to_string());
    let connection = Connection::start(wiring.stream, sender.clone(), ToStandby::Bytes, ToStandby::Closed)?;
    let replayer = Replay {
        inbox: replay_inbox,
        to: sender.clone(),
        disks: wiring.disks,
        cables: wiring.cables,
        tune: wiring.tune,
        image: Vec::new(),
        waiting: Vec::new(),
        running: None,
        held: VecDeque::new(),
        last_output: 0,
    };
    std::thread::Builder::new().name("replay".into()).spawn(move || replayer.run()).what("cannot start a thread")?;
    let asked = replay.clone();
    wiring.control.serve("standby", move |ask| asked.send(ToReplay::Ask(ask)).is_ok());
    let told = sender.clone();
    // Whoever has ended needs not be told.
    wiring.signals.listen(move |why| _ = told.send(ToStandby::Shutdown(why)));
    let secondary = Secondary::new(wiring.setup).what("the pair's settings do not fit")?;
    let board = wiring.control.board().clone();
    board.set_peer(peer);
    let mut driver = Driver {
        meter: Meter::new(board.clone(), now_ns()),
        board,
        secondary,
        connection: Some(connection),
        closing: Closing::default(),
        asker: Asker::new(wiring.arbiter, sender, ToStandby::Verdict),
        replay,
        events: wiring.events,
        failure: None,
        outcome: None,
    };
    driver.run(inbox)
}

struct Driver {
    secondary: Secondary,
    connection: Option<Connection>,
    closing: Closing,
    asker: Asker<ToStandby>,
    replay: Sender<ToReplay>,
    events: Events,
    board: Board,
    meter: Meter,
    /// Why this host cannot go on, if it cannot.
    failure: Option<String>,
    outcome: Option<Result<Outcome>>,
}

fn now() -> Nanos {
    Nanos(now_ns())
}

impl Driver {
    fn run(&mut self, inbox: Receiver<ToStandby>) -> Result<Outcome> {
        self.secondary.handle(now(), SecondaryEvent::PeerConnected);
        self.act();
        loop {
            if let Some(outcome) = self.outcome.take() {
                if !matches!(outcome, Ok(Outcome::Live(_))) {
                    self.closing.wait();
                }
                return outcome;
            }
            self.meter.secondary(now_ns(), &self.secondary.status());
            let deadline = self.secondary.deadline();
            match inbox.recv_timeout(self.meter.patience(deadline, now_ns())) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) if deadline.is_some_and(|deadline| deadline <= now()) => {
                    self.secondary.handle(now(), SecondaryEvent::Tick);
                }
                // Only the figures are due.
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Error::new("the standby's threads are gone")),
            }
            self.act();
        }
    }

    fn take(&mut self, message: ToStandby) {
        let event = match message {
            // Of a connection that was given up, nothing is wanted.
            ToStandby::Bytes(_) | ToStandby::Closed(_) if self.connection.is_none() => return,
            ToStandby::Bytes(bytes) => {
                self.meter.heard(now_ns());
                SecondaryEvent::Bytes(bytes)
            }
            ToStandby::Closed(reason) => {
                self.connection = None;
                self.meter.lost();
                self.events.say("peer-lost", format!("the primary is gone: {reason}"));
                SecondaryEvent::PeerClosed { reason }
            }
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
            ToStandby::Output(id) => SecondaryEvent::Output { id },
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

    fn act(&mut self) {
        while let Some(action) = self.secondary.poll() {
            match action {
                SecondaryAction::Send(bytes) => {
                    if let Some(connection) = &self.connection {
                        connection.send(bytes);
                    }
                }
                SecondaryAction::Disconnect => {
                    if let Some(connection) = self.connection.take() {
                        self.closing = connection.close();
                        self.meter.lost();
                    }
                }
                SecondaryAction::Prepare(hello) => {
                    self.board.set_vm(hello.vm.vm);
                    let (vm, mib, cpu_model) = (hello.vm.vm, hello.vm.ram_bytes >> 20, hello.vm.cpu_model);
                    // Before the image travels: a host that cannot run the model has no use for it.
                    match (Config { cpu_model: cpu_model.clone(), ..Config::default() }).cpu() {
                        Ok(_) => {
                            let text = format!("following VM {vm} ({mib} MiB, {cpu_model}) in epoch {}", hello.epoch);
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
                    records.iter().for_each(|record| self.meter.record(record));
                    self.tell_replay(ToReplay::Records { first_seq, records });
                }
                SecondaryAction::Discard { up_to } => self.tell_replay(ToReplay::Discard { up_to }),
                SecondaryAction::AskArbiter(claim) => {
                    self.events.say("arbiter", format!("claiming epoch {}", claim.epoch));
                    self.asker.ask(claim);
                }
                SecondaryAction::GoLive { epoch, reissue } => self.go_live(epoch, reissue),
                SecondaryAction::Stop(reason) => {
                    self.events.say("stopped", reason.to_string());
                    self.outcome = Some(match self.failure.take() {
                        Some(failure) => Err(Error::new(format!("this standby cannot follow the primary any more: {failure}"))),
                        None => Ok(Outcome::Stopped(reason)),
                    });
                }
                SecondaryAction::Notice(notice) => self.events.say("notice", notice.to_string()),
            }
        }
    }

    fn go_live(&mut self, epoch: Epoch, reissue: Range<OutputId>) {
        let (answer, live) = channel();
        self.tell_replay(ToReplay::Finish { reissue, epoch, answer });
        let live = live.recv().unwrap_or_else(|_| Err(Error::new("the replay is gone")));
        if let Ok(live) = &live {
            let figures = Map::from_iter([("position".to_owned(), json!(live.machine.position()))]);
            self.events.say_with("consumed", format!("the log is consumed, to position {}", live.machine.position()), figures);
        }
        self.outcome = Some(live.map(|live| Outcome::Live(Box::new(live))));
    }

    fn tell_replay(&mut self, message: ToReplay) {
        // A replay that has failed has said so.
        let _ = self.replay.send(message);
    }
}

/// The thread that owns the machine.
struct Replay {
    inbox: Receiver<ToReplay>,
    to: Sender<ToStandby>,
    disks: Disks,
    cables: usize,
    tune: fn(&mut Config),
    image: Vec<u8>,
    /// Records that came before the image was restored.
    waiting: Vec<(Seq, Vec<Record>)>,
    running: Option<Running>,
    /// Outputs that may not have left, with their numbers.
    held: VecDeque<(OutputId, Output)>,
    last_output: OutputId,
}

struct Running {
    vm: Vm,
    extra: Extra,
    replayer: Replayer,
}

impl Replay {
    fn run(mut self) {
        while let Ok(message) = self.next() {
            let result = match message {
                ToReplay::Chunk(bytes) => {
                    self.image.extend(bytes);
                    Ok(())
                }
                ToReplay::Restore { position } => self.restore(position),
                ToReplay::Records { first_seq, records } => {
                    if self.running.is_some() {
                        self.replay(first_seq, records)
                    } else {
                        self.waiting.push((first_seq, records));
                        Ok(())
                    }
                }
                ToReplay::Discard { up_to } => {
                    while self.held.front().is_some_and(|(id, _)| *id <= up_to) {
                        self.held.pop_front();
                    }
                    Ok(())
                }
                ToReplay::Ask(ask) => {
                    match &self.running {
                        Some(running) => ask.answer(&running.vm.0),
                        None => ask.no_machine("the machine is on its way from its primary"),
                    }
                    Ok(())
                }
                ToReplay::Finish { reissue, epoch, answer } => {
                    let _ = answer.send(self.finish(reissue, epoch));
                    return;
                }
            };
            if let Err(e) = result {
                let _ = self.to.send(ToStandby::Failed(e.to_string()));
                return;
            }
        }
    }

    fn next(&self) -> std::result::Result<ToReplay, RecvError> {
        let say = |activity| {
            if let Some(running) = &self.running {
                running.vm.0.activity().set(activity);
            }
        };
        say(Activity::Waiting);
        let message = self.inbox.recv();
        say(Activity::Host);
        message
    }

    fn restore(&mut self, position: u64) -> Result<()> {
        let started = now_ns();
        let image = std::mem::take(&mut self.image);
        let mut reader = ImageReader::open(image.as_slice()).what("the primary's image cannot be read")?;
        let tune = self.tune;
        let (machine, extra) = build::from_image(&mut reader, &mut *self.disks, &tune)?;
        // Now, and not when it goes live: then it would be too late.
        if extra.nics.len() > self.cables {
            let what = format!("the machine has {} network cards, the standby was given {}", extra.nics.len(), self.cables);
            return Err(Error::new(what).next("start the standby with --net once for each card"));
        }
        if machine.position() != position {
            return Err(Error::new(format!("the image is of position {}, not {position}", machine.position())));
        }
        self.last_output = extra.last_output;
        let replayer = Replayer::new(position, ReplayOptions::default());
        self.running = Some(Running { vm: Vm(machine, None), extra, replayer });
        let took_ns = now_ns() - started;
        let _ = self.to.send(ToStandby::Restored { position, last_output: self.last_output, took_ns });
        for (first_seq, records) in std::mem::take(&mut self.waiting) {
            self.replay(first_seq, records)?;
        }
        Ok(())
    }

    fn replay(&mut self, first_seq: Seq, records: Vec<Record>) -> Result<()> {
        let Self { running, to, held, last_output, .. } = self;
        let Running { vm, replayer, .. } = running.as_mut().expect("checked by the caller");
        for (seq, record) in (first_seq..).zip(&records) {
            let entry: Entry = entry_of(record)?;
            replayer
                .step(vm, entry, &mut |_, output| {
                    *last_output += 1;
                    held.push_back((*last_output, output));
                    let _ = to.send(ToStandby::Output(*last_output));
                })
                .what("the replay differs from the primary")?;
            let _ = to.send(ToStandby::Replayed { seq, position: vm.0.position() });
        }
        Ok(())
    }

    fn finish(&mut self, reissue: Range<OutputId>, epoch: Epoch) -> Result<Live> {
        let Running { vm, extra, .. } = self.running.take().ok_or_else(|| Error::new("there is no machine to go live with"))?;
        let kept = std::mem::take(&mut self.held).into_iter();
        let outputs: Vec<Output> = kept.filter(|(id, _)| reissue.contains(id)).map(|(_, output)| output).collect();
        assert_eq!(
            outputs.len() as u64,
            reissue.end.saturating_sub(reissue.start),
            "every output that may not have left is kept"
        );
        Ok(Live { machine: vm.0, extra, reissue: outputs, last_output: self.last_output, epoch })
    }
}
