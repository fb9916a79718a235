//! The standby's thread that owns the machine: it replays the primary's log and compares what comes of it.
//!
//! *In*: images, records, requests. *Out*: outputs that are the primary's, progress, differences. *Invariant*: an output is reported only when both
//! sides have made it, in the order of the primary's notes (or when there is nobody to compare with any more); after a difference what is made is put aside
//! until the machine is the primary's again, or nobody's twin.
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use twinstep_log::{Comparer, Entry, Event, Mismatch, OutputNote, Replayable, RunOutcome};
use twinstep_machine::{Activity, Config, Machine, Output, PageSet, Pause};
use twinstep_pair::{OutputId, Record, Seq};

use super::ahead::Staged;
use super::arrival::Arrival;
use super::build::Extra;
use super::live::entry_of;
use super::mirror::Target;
use super::replay::Vm;
use super::resync::{self, Baseline};
use super::standby::ToStandby;
use super::survey::Survey;
use super::told;
use super::turns::Turns;
use super::window::Window;
use crate::control::Ask;
use crate::disk::Replica;
use crate::error::{Error, Result};
use crate::events::now_ns;

/// What the replay's thread is told.
pub(super) enum ToReplay {
    Chunk(Vec<u8>),
    Restore {
        position: u64,
    },
    Records {
        first_seq: Seq,
        records: Vec<Record>,
    },
    /// Behind them: run to there, or to where the machine pauses before.
    RunAhead {
        position: u64,
    },
    /// When outputs differ both sides end: then it is looked for bad memory before anybody is told.
    EndsAtMismatch,
    /// The primary's guest stands still at this position: say all that has changed.
    List {
        position: u64,
    },
    Discard {
        up_to: OutputId,
    },
    /// Compare no more.
    Diverge,
    Ask(Ask),
    /// The primary has ended in good order. Answers whether the disks are equal.
    End {
        answer: Sender<Result<bool>>,
    },
    Finish {
        reissue: Range<OutputId>,
        answer: Sender<Result<Replayed>>,
    },
    /// Nobody wants the machine any more. Said after the flag of [`Follower::until`] is set, which ends a replay that is under way.
    Over,
}

/// A machine at the end of its log.
pub(super) struct Replayed {
    pub(super) machine: Machine,
    pub(super) disks: Vec<Replica>,
    pub(super) extra: Extra,
    /// Outputs to send again, in order.
    pub(super) reissue: Vec<Output>,
    pub(super) last_output: OutputId,
}

/// So long the two sides may be uneven while nothing else happens.
const UNEVEN_PATIENCE: Duration = Duration::from_millis(50);

/// The thread that owns the machine.
pub(super) struct Follower {
    inbox: Receiver<ToReplay>,
    to: Turns<ToStandby>,
    /// The disks, and what comes before the machine.
    target: Target,
    /// The machine on its way.
    arrival: Option<Arrival>,
    cables: usize,
    tune: fn(&mut Config),
    /// What is kept for a third opinion, if that was asked for.
    window: Option<Window>,
    /// What makes it the primary's again.
    staged: Staged,
    ends_at_mismatch: bool,
    /// What waits: for the first image.
    waiting: VecDeque<Step>,
    running: Option<Running>,
    /// Outputs that may not have left, with their numbers.
    held: VecDeque<(OutputId, Output)>,
    last_output: OutputId,
    /// The protocol has been told something, and has not had a turn since.
    untold: bool,
    /// Nobody wants the machine any more.
    over: Arc<AtomicBool>,
}

/// What there is to do for the machine, in order.
enum Step {
    Record(Seq, Record),
    RunAhead { position: u64 },
}

struct Running {
    vm: Vm,
    extra: Extra,
    baseline: Baseline,
    /// `None`: something differed, or there is nobody to compare with.
    comparer: Option<Comparer>,
    /// Where the newest entry of the log lies that was taken in.
    log_position: u64,
    /// What the machine has made beyond that: whether it was noted, the log has not said yet.
    ahead: VecDeque<(u64, Output)>,
    /// Something differed, and the machine is to become the primary's again.
    astray: Option<Astray>,
    /// The primary's end is replayed.
    ended: bool,
    /// Since when the sides are uneven in this output.
    uneven: Option<(OutputId, Instant)>,
}

impl Running {
    /// Runs to a position, as far as that can be done. Why not, if not.
    fn run_to(&mut self, position: u64) -> Result<Option<String>> {
        match self.vm.run_to(position) {
            RunOutcome::Reached => Ok(None),
            RunOutcome::Waiting => Ok(Some("it is halted and waits for an input".to_owned())),
            RunOutcome::Stopped(why) => Ok(Some(why)),
            // Nothing is wrong with the machine, and nothing would be right with it here.
            RunOutcome::HostFailure(why) => Err(Error::new(why)),
        }
    }
    /// Up to where the two sides can be compared.
    fn compared(&self) -> u64 {
        self.vm.position().min(self.log_position)
    }
    /// What the machine has made that was not matched, in order.
    fn compare_no_more(&mut self) -> Vec<Output> {
        let made = self.comparer.take().map_or(Vec::new(), Comparer::into_made);
        made.into_iter().chain(std::mem::take(&mut self.ahead).into_iter().map(|(_, output)| output)).collect()
    }
}

/// A machine that has made another output than its primary's.
#[derive(Default)]
struct Astray {
    /// What it has made since, which counts only if nobody makes it equal again; and how many bytes that is.
    aside: Vec<Output>,
    aside_bytes: usize,
    survey: Survey,
    /// Pages that have changed, of which the primary has not been told what they are.
    unsaid: Option<PageSet>,
    /// The primary knows that all of RAM was looked through.
    searched: bool,
    /// When the last part of this was done.
    worked: Option<Instant>,
}

/// Pages of a part of the search for what has changed: a few milliseconds.
const PART: usize = 4096;
/// So long it replays between two parts.
const BETWEEN_PARTS: Duration = Duration::from_millis(5);
/// Bytes of outputs that are put aside. Who makes more than that is lost anyway.
const MAX_ASIDE_BYTES: usize = 64 << 20;

impl Follower {
    pub(super) fn new(
        inbox: Receiver<ToReplay>,
        to: Turns<ToStandby>,
        target: Target,
        cables: usize,
        tune: fn(&mut Config),
        window: Option<Window>,
    ) -> Self {
        let (waiting, held) = (VecDeque::new(), VecDeque::new());
        Self {
            inbox,
            to,
            target,
            arrival: None,
            cables,
            tune,
            window,
            staged: Staged::default(),
            ends_at_mismatch: false,
            waiting,
            running: None,
            held,
            last_output: 0,
            untold: false,
            over: Arc::default(),
        }
    }
    /// Ends soon after this is set, and [`ToReplay::Over`] said.
    pub(super) fn until(self, over: Arc<AtomicBool>) -> Self {
        Self { over, ..self }
    }

    pub(super) fn run(mut self) {
        loop {
            let result = match self.next() {
                Err(RecvTimeoutError::Timeout) if self.is_astray() => self.search(),
                Err(RecvTimeoutError::Timeout) => self.look_at_uneven(),
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(ToReplay::Chunk(bytes)) => self.take_in(&bytes),
                Ok(ToReplay::Restore { position }) => match self.running {
                    None => self.restore(position),
                    Some(_) => self.resync(position),
                },
                Ok(ToReplay::Records { first_seq, records }) => {
                    self.waiting.extend((first_seq..).zip(records).map(|(seq, record)| Step::Record(seq, record)));
                    self.replay()
                }
                Ok(ToReplay::RunAhead { position }) => {
                    self.waiting.push_back(Step::RunAhead { position });
                    self.replay()
                }
                Ok(ToReplay::EndsAtMismatch) => {
                    self.ends_at_mismatch = true;
                    Ok(())
                }
                Ok(ToReplay::List { position }) => self.list(position),
                Ok(ToReplay::Discard { up_to }) => {
                    while self.held.front().is_some_and(|(id, _)| *id <= up_to) {
                        self.held.pop_front();
                    }
                    Ok(())
                }
                Ok(ToReplay::Diverge) => {
                    self.diverge();
                    self.replay()
                }
                Ok(ToReplay::Ask(ask)) => {
                    match &mut self.running {
                        Some(running) => ask.answer(&mut running.vm.0),
                        None => ask.no_machine("the machine is on its way from its primary"),
                    }
                    Ok(())
                }
                Ok(ToReplay::End { answer }) => {
                    let _ = answer.send(self.end());
                    return;
                }
                Ok(ToReplay::Finish { reissue, answer }) => {
                    let _ = answer.send(self.finish(reissue));
                    return;
                }
                Ok(ToReplay::Over) => return,
            };
            if let Err(e) = &result {
                self.tell(ToStandby::Failed(e.to_string()));
            }
            if self.drive().is_err() || result.is_err() {
                return;
            }
        }
    }

    /// Has something for the protocol, which takes it in its next turn.
    fn tell(&mut self, message: ToStandby) {
        self.to.put(message);
        self.untold = true;
    }

    /// Takes the protocol's turn, if there is something for it.
    fn drive(&mut self) -> Result<()> {
        if std::mem::take(&mut self.untold) { self.to.turn() } else { Ok(()) }
    }

    fn next(&self) -> std::result::Result<ToReplay, RecvTimeoutError> {
        let say = |activity| {
            if let Some(running) = &self.running {
                running.vm.0.activity().set(activity);
            }
        };
        say(Activity::Waiting);
        let astray = self.running.as_ref().and_then(|running| running.astray.as_ref().map(|astray| !astray.searched));
        let uneven = self.running.as_ref().and_then(|running| running.uneven);
        let message = match uneven {
            _ if astray == Some(true) => self.inbox.try_recv().map_err(|e| match e {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            }),
            Some((_, since)) => self.inbox.recv_timeout(UNEVEN_PATIENCE.saturating_sub(since.elapsed())),
            None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        say(Activity::Host);
        message
    }

    /// More of the copy, or of a delta.
    fn take_in(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(running) = &self.running {
            self.staged.push(bytes, running.vm.0.ram().flags().pages())?;
        } else {
            let (cables, tune, arrival) = (self.cables, self.tune, &mut self.arrival);
            let report = self.target.take(bytes, &mut |image, replicas| {
                arrival.get_or_insert_with(|| Arrival::new(replicas.to_vec(), cables, tune)).push(image)
            })?;
            if !report.is_empty() {
                self.tell(ToStandby::Report(report));
            }
        }
        self.tell(ToStandby::Taken(bytes.len() as u64));
        Ok(())
    }

    /// The primary has ended in good order. If its end was replayed, the disks are equal.
    fn end(&mut self) -> Result<bool> {
        let equal = self.running.as_ref().is_some_and(|running| running.ended);
        if equal {
            self.target.replicas().iter().try_for_each(Replica::close)?;
        }
        Ok(equal)
    }

    fn restore(&mut self, position: u64) -> Result<()> {
        let started = now_ns();
        let arrival = self.arrival.take().ok_or_else(|| Error::new("the primary's machine has not arrived"))?;
        let (mut machine, extra) = arrival.finish(position)?;
        // Only now: a replica counts as equal once the machine is here as well.
        self.target.finish()?;
        self.last_output = extra.last_output;
        let baseline = Baseline::new(&mut machine, self.target.replicas().to_vec())?;
        if let Some(window) = &mut self.window {
            window.begin(&mut machine, self.target.replicas(), self.last_output);
        }
        let comparer = Some(Comparer::new(self.last_output));
        self.running = Some(Running {
            vm: Vm(machine, None),
            extra,
            baseline,
            comparer,
            log_position: position,
            ahead: VecDeque::new(),
            astray: None,
            uneven: None,
            ended: false,
        });
        let took_ns = now_ns() - started;
        self.tell(ToStandby::Restored { position, last_output: self.last_output, took_ns });
        self.replay()
    }

    /// The primary has sent what the machine lacks: it stands for all that was received.
    fn resync(&mut self, position: u64) -> Result<()> {
        let started = now_ns();
        let (ahead, delta) = std::mem::take(&mut self.staged).finish()?;
        let (outputs, image) = resync::split(&delta)?;
        let running = self.running.as_mut().expect("checked by the caller");
        for page in ahead {
            let (page, bytes) = page?;
            let bytes = bytes[..].try_into().expect("it was unpacked to a page");
            running.vm.0.write_ram_page(page, bytes);
        }
        let (extra, pages, blocks) = resync::apply(&mut running.vm.0, self.target.replicas(), image)?;
        if running.vm.0.position() != position {
            return Err(Error::new(format!("the delta is of position {}, not {position}", running.vm.0.position())));
        }
        running.baseline.equal(&mut running.vm.0)?;
        if let Some(window) = &mut self.window {
            window.agreed(&mut running.vm.0, extra.last_output);
        }
        running.comparer = Some(Comparer::new(extra.last_output));
        running.log_position = position;
        running.ahead.clear();
        running.astray = None;
        running.uneven = None;
        self.waiting.clear();
        self.held = outputs.into();
        self.last_output = extra.last_output;
        let took_ns = now_ns() - started;
        self.tell(ToStandby::Resynced { position, last_output: self.last_output, pages, blocks, took_ns });
        Ok(())
    }

    /// From here on the machine is nobody's twin.
    fn diverge(&mut self) {
        let Some(running) = &mut self.running else { return };
        if let Some(window) = self.window.take() {
            window.end(&mut running.vm.0);
        }
        running.uneven = None;
        let made = running.compare_no_more();
        let aside = running.astray.take().map_or(Vec::new(), |astray| astray.aside);
        made.into_iter().chain(aside).for_each(|output| self.made(output));
        self.tell(ToStandby::Diverged);
    }

    /// An output counts.
    fn made(&mut self, output: Output) {
        self.last_output += 1;
        self.held.push_back((self.last_output, output));
        self.tell(ToStandby::Output(self.last_output));
    }

    fn replay(&mut self) -> Result<()> {
        while self.running.is_some()
            && !self.over.load(Ordering::Relaxed)
            && let Some(step) = self.waiting.pop_front()
        {
            let (seq, record) = match step {
                Step::Record(seq, record) => (seq, record),
                Step::RunAhead { position } => {
                    self.run_ahead(position)?;
                    continue;
                }
            };
            let entry = entry_of(&record)?;
            if let Some(window) = &mut self.window
                && self.running.as_ref().is_some_and(|running| running.comparer.is_some())
            {
                window.entry(&entry);
            }
            self.follow(entry)?;
            let position = self.running.as_ref().expect("just seen").vm.position();
            self.tell(ToStandby::Replayed { seq, position });
            if self.is_astray() {
                self.search_now_and_then()?;
            }
        }
        Ok(())
    }

    /// Takes an entry of the log in, as far as the machine can.
    fn follow(&mut self, entry: Entry) -> Result<()> {
        let running = self.running.as_mut().expect("the caller looked");
        let (at, log) = (running.vm.position(), running.log_position);
        if entry.position < log && running.comparer.is_some() {
            return Err(Error::new(format!("the primary's log goes back: from position {log} to {}", entry.position)));
        }
        running.log_position = entry.position;
        // The note of an output may lie behind a machine that has run ahead.
        let stuck = match entry.event {
            Event::Output(_) if entry.position < at => None,
            _ if entry.position < at => Some("it has run beyond, and so did not pause there".to_owned()),
            _ => running.run_to(entry.position)?,
        };
        self.collect();
        if let Some(why) = stuck
            && self.is_compared()
        {
            let position = entry.position;
            self.go_astray(format!("the machine does not get to position {position}, as the primary did: {why}"), None)?;
        }
        let running = self.running.as_mut().expect("the caller looked");
        match entry.event {
            Event::Input(input) => match running.vm.input(input) {
                Err(why) if running.comparer.is_some() => {
                    self.go_astray(format!("the machine refuses an input that the primary took: {why}"), None)?;
                }
                // What cannot be given to a machine of its own is lost, as on any cable.
                _ => self.collect(),
            },
            Event::Output(note) => {
                if let Some(comparer) = &mut running.comparer {
                    comparer.noted(entry.position, note);
                }
            }
            Event::Digest(recorded) if running.comparer.is_some() => {
                let ours = running.vm.digest();
                if ours == recorded {
                    running.baseline.equal(&mut running.vm.0)?;
                    if let Some(window) = &mut self.window
                        && running.comparer.as_ref().is_some_and(Comparer::is_even)
                    {
                        window.agreed(&mut running.vm.0, self.last_output);
                    }
                    self.tell(ToStandby::Agreed(entry.position));
                } else {
                    let text = running.vm.explain(&ours, &recorded);
                    self.tell(ToStandby::StateDiffers(entry.position, text));
                }
            }
            Event::End { .. } => running.ended = running.comparer.is_some(),
            Event::Digest(_) | Event::Progress => {}
        }
        self.report()
    }

    fn is_astray(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.astray.is_some())
    }

    fn is_compared(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.comparer.is_some())
    }

    /// Takes the machine's outputs.
    fn collect(&mut self) {
        let outputs = self.running.as_mut().map_or(Vec::new(), |running| running.vm.take_outputs());
        for (position, output) in outputs {
            match self.running.as_mut().map(|running| (&running.comparer, &mut running.ahead, &mut running.astray)) {
                Some((Some(_), ahead, _)) => ahead.push_back((position, output)),
                Some((None, _, Some(astray))) => {
                    astray.aside_bytes += OutputNote::of(&output).length as usize;
                    astray.aside.push(output);
                }
                _ => self.made(output),
            }
        }
        // What the log has come to can be compared.
        let Some(running) = &mut self.running else { return };
        while let Some(comparer) = &mut running.comparer
            && let Some((position, output)) = running.ahead.pop_front_if(|(position, _)| *position <= running.log_position)
        {
            comparer.made(position, output);
        }
    }

    /// The primary has taken nothing until `position`, or until it paused.
    fn run_ahead(&mut self, position: u64) -> Result<()> {
        let running = self.running.as_mut().expect("the caller looked");
        // One that is nobody's twin stays where the log is.
        if running.comparer.is_some() && running.vm.position() < position {
            // Nothing is wrong with the machine then, as below.
            if let Pause::HostFailure(why) = running.vm.0.run(position) {
                return Err(Error::new(why));
            }
            self.collect();
        }
        Ok(())
    }

    /// Reports what both sides have made, or that they differ.
    fn report(&mut self) -> Result<()> {
        while let Some((id, output)) =
            self.running.as_mut().and_then(|running| running.comparer.as_mut()).and_then(Comparer::matched)
        {
            assert_eq!(id, self.last_output + 1, "outputs come in order");
            self.made(output);
        }
        let running = self.running.as_mut().expect("the caller looked");
        let Some(comparer) = &running.comparer else { return Ok(()) };
        if let Some(found) = comparer.mismatch(running.compared()) {
            return self.go_astray(found.to_string(), Some(found));
        }
        running.uneven = comparer.first().map(|first| match running.uneven {
            Some(before) if before.0 == first.output => before,
            _ => (first.output, Instant::now()),
        });
        Ok(())
    }

    /// Nothing has come for a while.
    fn look_at_uneven(&mut self) -> Result<()> {
        let running = self.running.as_mut().expect("something was uneven");
        match running.comparer.as_ref().and_then(Comparer::first) {
            Some(found) => self.go_astray(found.to_string(), Some(found)),
            None => {
                running.uneven = None;
                Ok(())
            }
        }
    }

    /// The machine is not the primary's: the protocol is told, and it goes on by itself as far as it gets.
    fn go_astray(&mut self, text: String, found: Option<Mismatch>) -> Result<()> {
        let running = self.running.as_mut().expect("the caller looked");
        let position = running.vm.position();
        if let Some(window) = &mut self.window {
            window.dispute(self.last_output + 1, running.compared(), &text, found.as_ref());
        }
        let mut detail = Vec::new();
        if let Some((position, output)) = found.as_ref().and_then(|found| found.made.as_ref())
            && OutputNote::of(output).length <= MAX_DETAIL
        {
            resync::put_output(*position, output, &mut detail);
        }
        let aside = running.compare_no_more();
        let unsaid = Some(running.baseline.changed(&mut running.vm.0));
        running.astray = Some(Astray { aside, unsaid, ..Astray::default() });
        running.uneven = None;
        self.staged = Staged::default();
        if self.ends_at_mismatch {
            self.search_all();
        }
        // The next one, whatever it is that the comparison stumbled upon.
        self.tell(ToStandby::Mismatch { text, output: self.last_output + 1, position, detail });
        self.drive()
    }

    /// Does a part of the search for what has changed, if the last one is a while ago.
    fn search_now_and_then(&mut self) -> Result<()> {
        let astray = self.running.as_ref().and_then(|running| running.astray.as_ref()).expect("the caller looked");
        if astray.aside_bytes > MAX_ASIDE_BYTES {
            return Err(Error::new("the machine has made more outputs of its own than can be kept"));
        }
        match astray.worked {
            Some(worked) if worked.elapsed() < BETWEEN_PARTS => Ok(()),
            _ => self.search(),
        }
    }

    /// Does a part of the search for what has changed, and tells the primary.
    fn search(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let Some(astray) = &mut running.astray else { return Ok(()) };
        let machine = &mut running.vm.0;
        let level = astray.survey.part(machine, PART);
        astray.worked = Some(Instant::now());
        if level {
            self.say_pages();
            self.say_search();
        }
        self.drive()
    }

    /// Looks through all of RAM at once.
    fn search_all(&mut self) {
        if let Some(Running { vm, astray: Some(astray), .. }) = &mut self.running {
            astray.survey.finish(&mut vm.0);
        }
        self.say_search();
    }

    /// Tells the primary of all pages that have changed since it was told last. Their hashes are up to date.
    fn say_pages(&mut self) {
        let Some(Running { vm, baseline, astray: Some(astray), .. }) = &mut self.running else { return };
        let mut pages = baseline.changed_since(&mut vm.0);
        if let Some(unsaid) = astray.unsaid.take() {
            pages.join(&unsaid);
        }
        let hashes = vm.0.page_hashes();
        let pages: Vec<_> = pages.iter().map(|page| (page, hashes[page])).collect();
        told::of_pages(&pages).into_iter().for_each(|message| self.tell(ToStandby::Changed(message)));
    }

    /// Tells of the search through all of RAM, once, if it is over.
    fn say_search(&mut self) {
        let Some(Running { vm, astray: Some(astray), .. }) = &mut self.running else { return };
        if astray.searched || !astray.survey.is_done(&vm.0) {
            return;
        }
        astray.searched = true;
        let damaged = std::mem::take(&mut astray.survey.damaged);
        let hashes = vm.0.page_hashes();
        let pages: Vec<_> = damaged.iter().map(|&page| (page, hashes[page])).collect();
        told::of_pages(&pages).into_iter().for_each(|message| self.tell(ToStandby::Changed(message)));
        let message = told::of_search(damaged.len());
        if !damaged.is_empty() {
            self.tell(ToStandby::Damaged(damaged));
        }
        self.tell(ToStandby::Changed(message));
    }

    /// The primary's guest stands still at `position`, and all its records are here: goes there, as far as the machine gets, and says all that has changed.
    fn list(&mut self, position: u64) -> Result<()> {
        self.replay()?;
        let Some(running) = self.running.as_mut().filter(|running| running.astray.is_some()) else { return Ok(()) };
        // It may have run ahead of where the primary stopped.
        if running.vm.position() < position
            && let RunOutcome::HostFailure(why) = running.vm.run_to(position)
        {
            return Err(Error::new(why));
        }
        self.collect();
        self.search_all();
        let Some(running) = &mut self.running else { return Ok(()) };
        running.vm.0.digest_ram();
        let blocks = running.baseline.changed_blocks()?;
        self.say_pages();
        for (disk, blocks) in blocks.iter().enumerate() {
            told::of_blocks(disk, blocks).into_iter().for_each(|message| self.tell(ToStandby::Changed(message)));
        }
        self.tell(ToStandby::Listed);
        Ok(())
    }

    fn finish(&mut self, reissue: Range<OutputId>) -> Result<Replayed> {
        let mut running = self.running.take().ok_or_else(|| Error::new("there is no machine to go live with"))?;
        let kept = std::mem::take(&mut self.held).into_iter();
        let mut outputs: Vec<Output> = kept.filter(|(id, _)| reissue.contains(id)).map(|(_, output)| output).collect();
        assert_eq!(
            outputs.len() as u64,
            reissue.end.saturating_sub(reissue.start),
            "every output that may not have left is kept"
        );
        // What it made and the primary never noted is new to the world.
        outputs.extend(running.compare_no_more());
        let Running { mut vm, extra, baseline, .. } = running;
        baseline.end(&mut vm.0);
        if let Some(window) = self.window.take() {
            window.end(&mut vm.0);
        }
        let disks = self.target.replicas().to_vec();
        Ok(Replayed { machine: vm.0, disks, extra, reissue: outputs, last_output: self.last_output })
    }
}

/// Bytes of an output that are sent to the primary to show a difference. No output of a machine is longer.
const MAX_DETAIL: u32 = 128 << 10;
