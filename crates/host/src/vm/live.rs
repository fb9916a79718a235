//! Run and record: a machine in the real world.
//!
//! *In*: messages ([`ToVm`]) from sockets, terminals and the pair. *Out*: the machine's outputs to the world, or to the pair, which holds
//! them back; entries of the log to a recording, to the pair, or to nobody. *Invariant*: whatever enters the machine is noted first, with
//! the position at which it enters; and every output's note comes before whatever the machine is given next.
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use twinstep_log::channel::{decode_payload, encode_payload};
use twinstep_log::{EndReason, Entry, LogStats, Recorder};
use twinstep_machine::{Activity, DiskRequest, DiskWanted, Input, Machine, Output, Pause};
use twinstep_pair::{Commit, Record};

use super::disks;
use super::pace::{Pace, cpu_ns};
use super::pairing::ToPair;
use super::precopy::{self, Copier, CopyAsk, Surroundings};
use super::preparation::{Part, Preparation, Stop};
use super::resync::Baseline;
use super::told::Told;
use super::turns::Turns;
use super::writes::Writes;
use crate::control::Ask;
use crate::disk::{Replica, SharedDisk};
use crate::error::{Error, Result};
use crate::events::{Events, now_ns};
use crate::perf_map::PerfMap;

/// What the machine's thread is told.
#[derive(Debug)]
pub enum ToVm {
    /// Something for the machine's door.
    Input(Input),
    /// The guest must not run while this is on.
    Throttle(bool),
    /// Something for a copy of the machine.
    Copy(CopyAsk),
    /// Prepare a resync of the standby, of which that is known.
    PrepareResync(Arc<Mutex<Told>>),
    /// The standby has looked through all of its RAM.
    Searched,
    /// The guest is to lose so many hundredths of its time.
    Slow(u8),
    /// So many bytes of the resync may be sent ahead.
    Room(u64),
    /// The guest is throttled: say where it stands. Nothing enters until it is no longer throttled.
    StandStill,
    /// Make the delta, where it stands.
    MakeDelta,
    /// The standby was equal to the machine at this position.
    Agreed {
        /// The position.
        position: u64,
    },
    /// The standby is equal again.
    Resynced,
    /// There is no standby any more.
    Unprotected,
    /// Writes to shared disks have been carried out.
    DiskWritten,
    /// A question of the control socket.
    Ask(Ask),
    /// Give the machine up.
    Stop(String),
    /// This host cannot do its part any more.
    Fail(String),
}

/// Where outputs go when they may leave.
pub type Outlet = Box<dyn FnMut(Output) + Send>;

/// What a frame that waits counts for: its bytes, and a part for itself, since memory is what short ones take as well.
pub fn weight(frame: &[u8]) -> usize {
    512 + frame.len()
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote to the debug-exit port; the exit status it asks for.
    DebugExit(u8),
    /// The guest's processor shut down.
    Crashed(String),
    /// This host could not do its part.
    HostFailure(String),
    /// Somebody wanted an end.
    Stopped(String),
}

impl End {
    /// For people.
    pub fn text(&self) -> String {
        match self {
            End::PoweredOff => "the guest switched itself off".into(),
            End::Reset => "the guest asked for a reset".into(),
            End::DebugExit(status) => format!("the guest ended with status {status}"),
            End::Crashed(why) => format!("the guest crashed: {why}"),
            End::HostFailure(why) => format!("this host failed: {why}"),
            End::Stopped(why) => format!("stopped: {why}"),
        }
    }
    fn reason(&self) -> EndReason {
        match self {
            End::PoweredOff | End::DebugExit(_) => EndReason::PowerOff,
            End::Reset => EndReason::Reset,
            End::Crashed(why) => EndReason::Failed(why.clone()),
            End::HostFailure(why) => EndReason::Failed(why.clone()),
            End::Stopped(_) => EndReason::Stopped,
        }
    }
}

/// Figures of a run.
#[derive(Debug, Clone, Default)]
pub struct RunStats {
    /// Instructions retired since power-on.
    pub position: u64,
    /// Guest time.
    pub guest_ns: u64,
    /// What was logged.
    pub log: LogStats,
}

/// Somewhere that entries are recorded to.
pub trait EntrySink: Send {
    /// Takes the next entry. After an error it is not called again.
    fn entry(&mut self, entry: &Entry) -> Result<()>;
    /// The log is complete.
    fn close(self: Box<Self>) -> Result<()>;
}

/// What a run is connected to.
pub struct Wiring {
    /// Messages to the machine.
    pub inbox: Receiver<ToVm>,
    /// Where outputs go, unless a pair holds them.
    pub outlet: Outlet,
    /// The recording.
    pub recording: Option<Box<dyn EntrySink>>,
    /// The pair.
    pub pair: Option<Turns<ToPair>>,
    /// When its outputs leave.
    pub commit: Commit,
    /// Events.
    pub events: Events,
    /// Positions between two state digests in the log; 0 for none.
    pub digest_interval: u64,
    /// The machine's disks.
    pub disks: Vec<Replica>,
    /// Outputs the machine has made since power-on.
    pub last_output: u64,
    /// What waits in the inbox, in units of [`weight`]; counted down here.
    pub waiting: Arc<AtomicUsize>,
    /// Where `perf` is told what translated code is.
    pub perf_map: Option<PerfMap>,
}

/// So long the pair need not hear of a busy guest's clock and how far it is, as long as nothing comes of it. Its own thread looks every heartbeat.
const PAIR_PATIENCE_NS: u64 = 5_000_000;

/// The same if outputs are to be matched: what the standby is behind by, the next output waits for.
const PAIR_PATIENCE_MATCHED_NS: u64 = 500_000;

/// So long a slowed guest waits at most at a time.
const LOST_NS: u64 = 25_000_000;

/// A machine in the real world.
struct Live {
    machine: Machine,
    wiring: Wiring,
    recorder: Recorder,
    /// Nobody reads entries: none are made.
    logging: bool,
    pace: Pace,
    throttled: bool,
    /// The copy to a standby that is under way.
    copier: Option<Copier>,
    /// What the guest writes to disks that are copied.
    writes: Writes,
    /// What has changed since the standby was last known to be equal.
    baseline: Option<Baseline>,
    /// What is done for a resync of the standby.
    resync: Option<Preparation>,
    /// What waits to enter, while nothing may.
    deferred: VecDeque<Input>,
    /// The pair has been told something, and has not had a turn since.
    untold: bool,
    /// Something of it is to leave, or is asked for.
    urgent: bool,
    /// Something has entered that the guest will work on, and the pair has not had a turn since.
    entered: bool,
    /// When it had its last turn.
    driven_ns: u64,
    end: Option<End>,
}

/// Runs the machine until it ends. Returns it with how it ended and what was logged.
pub fn run(machine: Machine, wiring: Wiring) -> (Machine, End, RunStats) {
    let now = now_ns();
    let logging = wiring.recording.is_some() || wiring.pair.is_some();
    let mut machine = machine;
    if wiring.perf_map.is_some() {
        machine.note_code();
    }
    let mut live = Live {
        pace: Pace::new(now, cpu_ns(), machine.position(), machine.guest_ns()),
        recorder: Recorder::new(machine.position(), if logging { wiring.digest_interval } else { 0 }),
        machine,
        wiring,
        logging,
        throttled: false,
        copier: None,
        writes: Writes::default(),
        baseline: None,
        resync: None,
        deferred: VecDeque::new(),
        untold: false,
        urgent: false,
        entered: false,
        driven_ns: now,
        end: None,
    };
    let end = live.run();
    let stats = live.stats();
    (live.machine, end, stats)
}

impl Live {
    fn run(&mut self) -> End {
        loop {
            while let Ok(message) = self.wiring.inbox.try_recv() {
                self.take(message);
            }
            if let Some(end) = self.end.take() {
                self.finish(&end);
                return end;
            }
            if self.stands_still() {
                if !self.prepare() {
                    self.wait(None);
                }
                self.pace.stood_still(now_ns(), cpu_ns(), self.machine.position());
                continue;
            }
            self.step();
        }
    }

    /// Whether the guest must not run.
    fn stands_still(&self) -> bool {
        let full = |disk: &Replica| disk.shared().is_some_and(SharedDisk::is_full);
        self.throttled || self.wiring.disks.iter().any(full) || self.slowed() >= 100
    }

    /// How much of its time the guest loses, in hundredths.
    fn slowed(&self) -> u8 {
        precopy::slowed(self.copier.as_ref()).max(self.resync.as_ref().map_or(0, |resync| resync.slowed))
    }

    /// A guest that writes faster than can be copied, or that its standby does not follow, loses so many hundredths of its time: after a slice it waits.
    fn lose_time(&mut self, percent: u8, slice_ns: u64) {
        let until = now_ns() + (slice_ns * u64::from(percent) / u64::from(100 - percent)).min(LOST_NS);
        while self.end.is_none()
            && !self.stands_still()
            && let Some(left) = until.checked_sub(now_ns()).filter(|left| *left > 0)
        {
            if !self.prepare() {
                self.wait(Some(Duration::from_nanos(left)));
            }
            while let Ok(message) = self.wiring.inbox.try_recv() {
                self.take(message);
            }
        }
    }

    /// Runs a slice, or sleeps with the guest.
    fn step(&mut self) {
        let started = now_ns();
        if let Some(left) = self.writes.wait_ns(&self.wiring.disks, started) {
            // The limit may be another soon.
            self.wait(Some(Duration::from_nanos(left.min(LOST_NS))));
            return;
        }
        let mut until = self.machine.position() + self.pace.slice();
        if let Some(digest) = self.recorder.next_digest() {
            until = until.min(digest);
        }
        self.look_ahead(until);
        let pause = self.machine.run(until);
        if !matches!(pause, Pause::Position) {
            // What was said of it is over, and that comes before anything else is said.
            self.tell_of_lookahead(ToPair::Paused);
        }
        self.take_outputs();
        self.digest_if_due();
        let now = now_ns();
        if self.read_disks(matches!(pause, Pause::Idle { .. })) {
            self.drive_pair();
            return;
        }
        match pause {
            Pause::DiskRequest | Pause::Position => {
                if self.pace.tick_due(now) {
                    self.tick(now);
                    self.progress();
                }
                self.drive_pair();
                let percent = self.slowed();
                if (1..100).contains(&percent) {
                    self.lose_time(percent, now - started);
                }
            }
            Pause::Idle { wake_ns } => {
                self.progress();
                self.idle(wake_ns, now);
            }
            Pause::PoweredOff => self.end = Some(End::PoweredOff),
            Pause::Reset => self.end = Some(End::Reset),
            Pause::DebugExit { status } => self.end = Some(End::DebugExit(status)),
            Pause::Crashed { reason } => self.end = Some(End::Crashed(reason)),
            Pause::HostFailure(message) => self.end = Some(End::HostFailure(message)),
        }
    }

    /// Reads what the guest waits for from shared disks. False if there is nothing.
    fn read_disks(&mut self, asleep: bool) -> bool {
        if self.wiring.disks.iter().all(|disk| disk.shared().is_none()) {
            return false;
        }
        let reads: Vec<_> = self.machine.disk_requests().into_iter().filter(|r| r.wanted != DiskWanted::Flush).collect();
        if asleep && !reads.is_empty() {
            self.tick(now_ns());
        }
        for DiskRequest { disk, request, wanted } in &reads {
            let (DiskWanted::Read { offset, length }, Some(shared)) = (*wanted, self.wiring.disks[usize::from(*disk)].shared())
            else {
                continue;
            };
            match shared.read(offset, length as usize) {
                Ok(data) => self.input(Input::DiskDone { disk: *disk, request: *request, data }),
                Err(e) => {
                    self.end = Some(End::HostFailure(e.to_string()));
                    break;
                }
            }
        }
        !reads.is_empty()
    }

    /// The guest sleeps: waits for its timer or for a message, whichever comes first.
    fn idle(&mut self, wake_ns: Option<u64>, now: u64) {
        if self.prepare() {
            return;
        }
        let guest_now = self.pace.guest_ns(now);
        match wake_ns {
            Some(wake) if wake <= guest_now => self.tick(now),
            Some(wake) => {
                if !self.wait(Some(Duration::from_nanos(wake - guest_now))) {
                    self.tick(now_ns());
                }
            }
            None => {
                self.wait(None);
            }
        }
    }

    /// Waits for a message and takes it; false if none came in time. An input to a sleeping guest comes with the time.
    fn wait(&mut self, timeout: Option<Duration>) -> bool {
        if self.is_overdue() {
            self.turn_pair();
        }
        self.drive_pair();
        let activity = self.machine.activity();
        activity.set(if self.stands_still() { Activity::Waiting } else { Activity::Halted });
        let message = match timeout {
            Some(timeout) => match self.wiring.inbox.recv_timeout(timeout) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => {
                    activity.set(Activity::Host);
                    return false;
                }
                Err(RecvTimeoutError::Disconnected) => ToVm::Stop("nobody is left to talk to".into()),
            },
            None => self.wiring.inbox.recv().unwrap_or_else(|_| ToVm::Stop("nobody is left to talk to".into())),
        };
        activity.set(Activity::Host);
        if matches!(message, ToVm::Input(_)) && !self.throttled {
            self.tick(now_ns());
        }
        self.take(message);
        true
    }

    fn take(&mut self, message: ToVm) {
        match message {
            // In the order in which they came, and at the position where the guest goes on.
            ToVm::Input(input) if self.resync.as_ref().is_some_and(|resync| resync.stands) => self.deferred.push_back(input),
            ToVm::Input(input) => {
                if let Input::NetRx { frame, .. } | Input::NetRxGso { frame, .. } = &input {
                    self.wiring.waiting.fetch_sub(weight(frame), Ordering::Relaxed);
                }
                // The guest may have reset the disk since it asked.
                let wanted = match &input {
                    Input::DiskDone { disk, request, .. } => {
                        self.machine.disk_requests().iter().any(|r| (r.disk, r.request) == (*disk, *request))
                    }
                    _ => true,
                };
                if wanted {
                    self.input(input);
                }
            }
            ToVm::PrepareResync(told) if self.baseline.is_some() => self.resync = Some(Preparation::new(told)),
            ToVm::PrepareResync(_) => self.tell_pair(ToPair::NoResync("nothing is known of what the standby has".into())),
            // It is looked at in the next part of the work.
            ToVm::Searched => {}
            ToVm::Slow(percent) => {
                if let Some(resync) = &mut self.resync {
                    resync.slowed = percent;
                }
            }
            ToVm::Room(bytes) => {
                if let Some(resync) = &mut self.resync {
                    resync.room(bytes);
                }
            }
            ToVm::StandStill => self.stand_still(),
            ToVm::MakeDelta => self.make_delta(),
            ToVm::DiskWritten => {}
            ToVm::Throttle(on) => {
                self.throttled = on;
                if !on {
                    self.let_in();
                }
            }
            ToVm::Stop(why) => self.end = Some(End::Stopped(why)),
            ToVm::Fail(why) => self.end = Some(End::HostFailure(why)),
            ToVm::Copy(ask) => self.copy(ask),
            ToVm::Agreed { position } => {
                if let Some(baseline) = &mut self.baseline {
                    baseline.agreed(position);
                }
            }
            ToVm::Resynced => self.resync = None,
            ToVm::Unprotected => {
                self.forget_baseline();
                self.let_in();
            }
            ToVm::Ask(ask) if ask.is_failover() && self.wiring.pair.is_some() => {
                self.tell_pair(ToPair::HandOver);
                ask.failing_over();
            }
            ToVm::Ask(ask) => ask.answer(&mut self.machine),
        }
    }

    fn stats(&self) -> RunStats {
        RunStats { position: self.machine.position(), guest_ns: self.machine.guest_ns(), log: self.recorder.stats().clone() }
    }

    fn tick(&mut self, now: u64) {
        let clock = self.pace.tick(now, cpu_ns(), self.machine.position(), self.machine.guest_ns());
        self.input(clock);
        self.map_code();
    }

    /// Tells `perf` what was translated since the last time, if it wants to know.
    fn map_code(&mut self) {
        if let Some(map) = &mut self.wiring.perf_map {
            map.write(&self.machine.take_code_notes());
        }
    }

    fn input(&mut self, input: Input) {
        let position = self.machine.position();
        if self.logging {
            let entry = self.recorder.input(position, input.clone()).expect("positions of one machine do not go back");
            self.log(entry);
            self.entered |= !matches!(input, Input::Clock { .. });
        }
        if let Err(refused) = self.machine.input(input) {
            // Sources check what they pass on, so this is a mistake of ours; the machine is as before, and replay refuses alike.
            self.end = Some(End::HostFailure(refused.to_string()));
        }
        self.take_outputs();
    }

    fn take_outputs(&mut self) {
        for (position, output) in self.machine.drain_outputs() {
            self.wiring.last_output += 1;
            if let Output::DiskWrite { disk, offset, data } = &output
                && let Some(shared) = self.wiring.disks.get(usize::from(*disk)).and_then(Replica::shared)
            {
                // From now on it can be read, wherever it is on its way.
                shared.pend(*offset, data);
            }
            if !self.logging {
                (self.wiring.outlet)(output);
                continue;
            }
            let entry = self.recorder.output(position, &output).expect("positions of one machine do not go back");
            self.record(&entry);
            match &self.wiring.pair {
                None => (self.wiring.outlet)(output),
                Some(_) => {
                    let note = record_of(&entry);
                    let id = self.wiring.last_output;
                    self.tell_pair(ToPair::Output { id, made_ns: now_ns(), note, output });
                }
            }
        }
    }

    fn digest_if_due(&mut self) {
        let position = self.machine.position();
        if self.logging && self.recorder.digest_due(position) {
            let digest = minicbor::to_vec(self.machine.digest()).expect("encoding into memory cannot fail");
            let entry = self.recorder.digest(position, digest).expect("positions of one machine do not go back");
            self.log(entry);
            if let Some(baseline) = &mut self.baseline {
                baseline.mark(&mut self.machine);
            }
        }
    }

    /// The guest runs on, with no look outside before `until`. The standby may do so at the same time, and is told if it has something to work on.
    fn look_ahead(&mut self, until: u64) {
        self.tell_of_lookahead(ToPair::Lookahead { position: until });
        if self.entered && self.is_matched() || self.is_overdue() {
            self.turn_pair();
        }
    }

    fn tell_of_lookahead(&self, message: ToPair) {
        if let Some(pair) = self.wiring.pair.as_ref().filter(|_| self.is_matched()) {
            pair.put(message);
        }
    }

    /// Whether outputs wait for the standby to make the same.
    fn is_matched(&self) -> bool {
        self.wiring.commit == Commit::Matched
    }

    fn progress(&mut self) {
        let position = self.machine.position();
        self.tell_pair(ToPair::Progress { position });
    }

    /// An entry that is not the note of an output.
    fn log(&mut self, entry: Entry) {
        self.record(&entry);
        if self.wiring.pair.is_some() {
            self.tell_pair(ToPair::Record(record_of(&entry)));
        }
    }

    fn record(&mut self, entry: &Entry) {
        let Some(recording) = &mut self.wiring.recording else { return };
        if let Err(e) = recording.entry(entry) {
            // The guest matters more than its recording.
            self.wiring.events.say("recording-failed", format!("{e}; the guest runs on without being recorded"));
            self.wiring.recording = None;
            self.logging = self.wiring.pair.is_some();
        }
    }

    /// Has something for the pair, which takes it in its next turn.
    fn tell_pair(&mut self, message: ToPair) {
        if let Some(pair) = &self.wiring.pair {
            self.untold = true;
            // What has entered matters once something comes of it that wants to leave.
            self.urgent |= !matches!(message, ToPair::Progress { .. } | ToPair::Record(_));
            pair.put(message);
        }
    }

    /// Takes the pair's turn, if there is something for it that matters: what follows is done at once, and by nobody who would have to be woken. What
    /// only matters later goes with what comes next, or when the pair's own thread looks.
    fn drive_pair(&mut self) {
        if self.untold && self.urgent {
            self.turn_pair();
        }
    }

    /// Whether the pair has waited long enough for what does not matter by itself.
    fn is_overdue(&self) -> bool {
        let patience_ns = if self.is_matched() { PAIR_PATIENCE_MATCHED_NS } else { PAIR_PATIENCE_NS };
        self.untold && now_ns() - self.driven_ns > patience_ns
    }

    fn turn_pair(&mut self) {
        if let Some(pair) = &self.wiring.pair {
            (self.untold, self.urgent, self.entered) = (false, false, false);
            self.driven_ns = now_ns();
            if let Err(e) = pair.turn()
                && self.end.is_none()
            {
                self.end = Some(End::HostFailure(e.to_string()));
            }
        }
    }

    /// Does what a copy asks for, between two slices.
    fn copy(&mut self, ask: CopyAsk) {
        let Some(pair) = &self.wiring.pair else { return };
        let around = Surroundings { disks: &self.wiring.disks, last_output: self.wiring.last_output, pair: pair.post() };
        if let Err(e) = precopy::serve(&mut self.copier, &mut self.baseline, &mut self.machine, ask, &around) {
            self.end = Some(End::HostFailure(e.to_string()));
        }
    }

    /// The standby that it was made for is gone.
    fn forget_baseline(&mut self) {
        self.resync = None;
        if let Some(baseline) = self.baseline.take() {
            baseline.end(&mut self.machine);
        }
    }

    /// Does a part of what a resync wants to be prepared. False if there is nothing to be done.
    fn prepare(&mut self) -> bool {
        let (Some(resync), Some(baseline)) = (&mut self.resync, &mut self.baseline) else { return false };
        if resync.stands {
            return false;
        }
        match resync.part(&mut self.machine, baseline) {
            Part::Nothing => return false,
            Part::Some => {}
            Part::Send(bytes) => self.tell_pair(ToPair::Ahead(bytes)),
            Part::Prepared => self.tell_pair(ToPair::ResyncPrepared),
        }
        self.drive_pair();
        true
    }

    /// The guest, which is throttled, stands where it stands until it is no longer.
    fn stand_still(&mut self) {
        let Some(resync) = &mut self.resync else { return };
        resync.stands = true;
        let position = self.machine.position();
        self.tell_pair(ToPair::StandsStill { position });
        // The standby does its part meanwhile.
        self.drive_pair();
        if let (Some(resync), Some(baseline)) = (&mut self.resync, &mut self.baseline) {
            resync.stop(&mut self.machine, baseline);
        }
    }

    /// The guest may run on: what has waited enters.
    fn let_in(&mut self) {
        if let Some(resync) = &mut self.resync {
            resync.stands = false;
        }
        std::mem::take(&mut self.deferred).into_iter().for_each(|input| self.take(ToVm::Input(input)));
    }

    /// Makes the delta where the guest stands and hands it to the pair.
    fn make_delta(&mut self) {
        let (Some(resync), Some(baseline)) = (&mut self.resync, &mut self.baseline) else {
            return self.tell_pair(ToPair::NoDelta("nothing was prepared for it".into()));
        };
        let started = now_ns();
        let disk_bytes = disks::bytes(&self.wiring.disks);
        match resync.finish(&mut self.machine, baseline, &disk_bytes, self.wiring.last_output) {
            Ok(Stop::Delta(delta)) => {
                let (position, took_ns) = (self.machine.position(), now_ns() - started);
                self.tell_pair(ToPair::Delta { position, delta, took_ns });
            }
            Ok(Stop::GoOn) => {
                self.tell_pair(ToPair::ResyncGoesOn);
                self.let_in();
            }
            Err(e) => self.tell_pair(ToPair::NoDelta(e.to_string())),
        }
    }

    fn finish(&mut self, end: &End) {
        self.map_code();
        if self.logging {
            let position = self.machine.position();
            if let Ok(entry) = self.recorder.end(position, end.reason()) {
                self.record(&entry);
                // The standby comes to the same end, so that its disks are equal. Of a host that fails nobody is to believe where it was.
                if let (Some(pair), false) = (&self.wiring.pair, matches!(end, End::HostFailure(_))) {
                    pair.put(ToPair::Record(record_of(&entry)));
                }
            }
        }
        if let Some(recording) = self.wiring.recording.take()
            && let Err(e) = recording.close()
        {
            self.wiring.events.say("recording-failed", format!("{e}; its end is missing"));
        }
        if let Some(pair) = self.wiring.pair.take() {
            // The guest's end is the pair's. A failure of this host alone is not: the secondary takes over as if the host had died.
            let message = match end {
                End::HostFailure(_) => ToPair::Abandon,
                _ => ToPair::Shutdown { reason: end.text() },
            };
            // A pair that has ended already wants nothing.
            let _ = pair.post().send(message);
        }
    }
}

/// A log entry as the pair carries it.
fn record_of(entry: &Entry) -> Record {
    let bytes = encode_payload(entry).expect("what goes through the door fits an entry");
    Record { position: entry.position, kind: entry.event.kind().number(), bytes }
}

/// An entry from a pair's record.
pub(super) fn entry_of(record: &Record) -> Result<Entry> {
    decode_payload(record.position, record.kind, &record.bytes)
        .map_err(|e| Error::new("a record of the log cannot be read").because(e))
}
