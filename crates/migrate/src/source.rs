//! The source: rounds of units, and the cut.
//!
//! **In:** [`Event`]s with the time: sets of written units, copies of units, how much the destination takes. **Out:** [`Action`]s. **Invariants:**
//!
//! - A unit that is written after it was copied is copied again: the sets are taken *before* the round's units are, so none falls between two rounds.
//! - What was sent of a unit, or that it was zero, is known by its hash; what has not changed since is not sent again.
//! - The stream ends only after every unit was told of, with one digest for each region.
//!
//! ```text
//!  Collect ──Dirty──▶ the round's set ──Read──Copied──▶ Send ... ──▶ all sent: Collect ──Dirty──▶ little enough? ──no──▶ next round
//!                                                                                                    │ yes
//!                                                                     Done ◀── Send ◀──Finished──── Cut ──TooMuch──▶ next round
//! ```
//!
//! Driving it: call `handle(now, event)` for whatever happened, then `poll()` until `None`. Whoever gives the copy up drops the source and frees the guest, if
//! it was slowed.
use std::collections::VecDeque;

use twinstep_machine::PageSet;

use crate::layout::{Layout, is_zero, unit_hash};
use crate::pace::{Config, Pace};
use crate::stream::Encoder;

/// Copies of units, as they are made between two slices of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Of which region.
    pub region: usize,
    /// Units that are not zero, ascending.
    pub units: Vec<u64>,
    /// Their bytes, one behind the other.
    pub bytes: Vec<u8>,
    /// Units that are zero, ascending.
    pub zeroes: Vec<u64>,
}

impl Copied {
    /// None so far, with room for `bytes`.
    pub fn of(region: usize, bytes: usize) -> Self {
        Self { region, bytes: Vec::with_capacity(bytes), ..Self::default() }
    }
    /// Copies a unit. Units come in ascending order.
    pub fn push(&mut self, unit: u64, bytes: &[u8]) {
        if is_zero(bytes) {
            self.zeroes.push(unit);
        } else {
            self.units.push(unit);
            self.bytes.extend_from_slice(bytes);
        }
    }
    /// How many units.
    pub fn len(&self) -> usize {
        self.units.len() + self.zeroes.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Something that happened to the source.
#[derive(Debug, Clone)]
pub enum Event {
    /// The destination takes so many bytes more of the stream.
    Room {
        /// In addition to earlier ones.
        bytes: u64,
    },
    /// The units written since the last [`Action::Collect`], one set for each region. The first time: nothing was written before, but from now on
    /// it is watched.
    Dirty(Vec<PageSet>),
    /// Copies of the units of one [`Action::Read`].
    Copied(Copied),
    /// The cut is made: the guest stood still while these were copied, and may run on.
    Finished {
        /// Copies of all units of the rest and of those written since it was collected, by region.
        copied: Vec<Copied>,
        /// All other state, as it was at the cut.
        state: Vec<u8>,
        /// How long the guest stood still, in nanoseconds.
        pause_ns: u64,
    },
    /// The cut is not made: this is the rest together with what was written since, and it is too much.
    TooMuch(Vec<PageSet>),
}

/// Something the host has to do for the source.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send these bytes of the stream.
    Send(Vec<u8>),
    /// Take the sets of written units, and answer with [`Event::Dirty`].
    Collect,
    /// Copy these units between two slices of the guest, and answer with [`Event::Copied`].
    Read {
        /// Of which region.
        region: usize,
        /// Which, ascending.
        units: Vec<u64>,
    },
    /// Stop the guest. If `rest` and what was written since it was collected are together no more than `most_bytes`, copy all of them and the state, let
    /// the guest run on, and answer with [`Event::Finished`]; else let it run on at once, and answer with [`Event::TooMuch`].
    Cut {
        /// What is not sent.
        rest: Vec<PageSet>,
        /// The limit, in bytes of units.
        most_bytes: u64,
    },
    /// Take so many hundredths of its time from the guest. At 100 it stands still.
    Slow {
        /// 0 to 100.
        percent: u8,
    },
    /// A round begins; for people.
    Round(Progress),
    /// All is sent.
    Done(Report),
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// The round, from 1.
    pub round: u64,
    /// Bytes of units that this round has still to look at.
    pub remaining_bytes: u64,
    /// Bytes of the stream so far.
    pub sent_bytes: u64,
    /// Bytes of units a second; 0 if that is not known yet.
    pub bytes_per_s: u64,
    /// Bytes of units a second that were written in the last round.
    pub dirty_bytes_per_s: u64,
    /// From the cut until the destination has it all, if it were made now; in nanoseconds.
    pub expected_pause_ns: u64,
    /// How much of its time the guest loses, in hundredths.
    pub slowed_percent: u8,
}

/// What a copy was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Rounds before the cut.
    pub rounds: u64,
    /// Units sent with their bytes.
    pub units: u64,
    /// Units sent as zero.
    pub zeroes: u64,
    /// Units that were written, but are as they were sent.
    pub unchanged: u64,
    /// Units copied at the cut.
    pub cut_units: u64,
    /// Bytes of the stream.
    pub sent_bytes: u64,
    /// From the beginning until all was sent, in nanoseconds.
    pub total_ns: u64,
    /// How long the guest stood still at the cut, in nanoseconds.
    pub pause_ns: u64,
    /// How much of its time the guest lost at most, in hundredths.
    pub slowed_percent: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waits for the sets.
    Collecting,
    /// Units are copied and sent.
    Round,
    /// Waits for the cut.
    Cutting,
    /// What was copied at the cut is sent.
    Ending,
    Done,
}

/// Copies asked for and not there yet, at most.
const READS: usize = 2;

/// The source of one copy; see the head of the module.
#[derive(Debug)]
pub struct Source {
    config: Config,
    layout: Layout,
    encoder: Encoder,
    pace: Pace,
    state: State,
    /// The round's units that are not asked for yet, and where to look on.
    todo: Vec<PageSet>,
    at: (usize, usize),
    reads: usize,
    /// What was sent of each unit, by region.
    hashes: Vec<Vec<u128>>,
    /// Units that were told of.
    told: Vec<PageSet>,
    digests: Vec<u128>,
    /// Encoded and not sent, since there is no room.
    out: VecDeque<Vec<u8>>,
    out_bytes: usize,
    room: u64,
    round_began: u64,
    /// Bytes of units that this round has sent.
    round_bytes: u64,
    began: u64,
    report: Report,
    actions: VecDeque<Action>,
}

impl Source {
    /// Begins at `now`. The preface tells the destination what the units are of.
    ///
    /// # Panics
    /// If the preface is longer than [`crate::stream::MAX_PREFACE`].
    pub fn new(now: u64, layout: Layout, preface: &[u8], config: Config) -> Self {
        let mut encoder = Encoder::new(layout.clone());
        let mut begin = Vec::new();
        encoder.begin(preface, &mut begin);
        let mut source = Self {
            config,
            encoder,
            pace: Pace::new(config),
            state: State::Collecting,
            todo: layout.nothing(),
            at: (0, 0),
            reads: 0,
            hashes: layout.regions().iter().map(|r| vec![0; r.units as usize]).collect(),
            told: layout.nothing(),
            digests: vec![0; layout.regions().len()],
            layout,
            out: VecDeque::new(),
            out_bytes: 0,
            room: 0,
            round_began: now,
            round_bytes: 0,
            began: now,
            report: Report::default(),
            actions: VecDeque::from([Action::Collect]),
        };
        source.queue(begin);
        source
    }

    /// Takes in what happened at `now`. An answer to nothing is ignored.
    pub fn handle(&mut self, now: u64, event: Event) {
        match (self.state, event) {
            (_, Event::Room { bytes }) => self.room = self.room.saturating_add(bytes),
            (State::Collecting, Event::Dirty(sets)) => self.on_dirty(now, sets),
            (State::Round, Event::Copied(copied)) => {
                self.reads = self.reads.saturating_sub(1);
                self.take(&copied);
            }
            (State::Cutting, Event::Finished { copied, state, pause_ns }) => {
                self.report.pause_ns = pause_ns;
                self.report.cut_units = copied.iter().map(|c| c.len() as u64).sum();
                copied.iter().for_each(|copied| self.take(copied));
                let sent = self.report.units + self.report.zeroes;
                let mut bytes = Vec::new();
                self.encoder.end(&state, &self.digests, sent, &mut bytes);
                self.queue(bytes);
                self.state = State::Ending;
                if self.pace.slowed() > 0 {
                    self.actions.push_back(Action::Slow { percent: 0 });
                }
            }
            (State::Cutting, Event::TooMuch(rest)) => self.begin_round(now, rest),
            _ => {}
        }
        self.go_on(now);
    }

    /// Takes the next thing to do. Call until `None` after each event.
    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Takes back all room: something else is sent before the stream goes on. What is left of it is given again by [`Event::Room`].
    pub fn take_room(&mut self) -> u64 {
        std::mem::take(&mut self.room)
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let remaining_bytes = self.layout.bytes_of(&self.todo);
        Progress {
            round: self.report.rounds,
            remaining_bytes,
            sent_bytes: self.report.sent_bytes,
            bytes_per_s: self.pace.rate().unwrap_or(0),
            dirty_bytes_per_s: self.pace.dirty_rate(),
            expected_pause_ns: self.pace.expected_ns(remaining_bytes),
            slowed_percent: self.pace.slowed(),
        }
    }

    /// A round is over (or the first begins), and this was written meanwhile.
    fn on_dirty(&mut self, now: u64, sets: Vec<PageSet>) {
        if self.report.rounds == 0 {
            let everything = self.layout.everything();
            return self.begin_round(now, everything);
        }
        let dirty = self.layout.bytes_of(&sets);
        if let Some(percent) = self.pace.round(self.report.rounds, self.round_bytes, now - self.round_began, dirty) {
            self.report.slowed_percent = self.report.slowed_percent.max(percent);
            self.actions.push_back(Action::Slow { percent });
        }
        let most_bytes = self.pace.most();
        if dirty <= most_bytes {
            self.state = State::Cutting;
            self.actions.push_back(Action::Cut { rest: sets, most_bytes });
        } else {
            self.begin_round(now, sets);
        }
    }

    fn begin_round(&mut self, now: u64, units: Vec<PageSet>) {
        self.state = State::Round;
        self.todo = units;
        self.at = (0, 0);
        self.report.rounds += 1;
        self.round_began = now;
        self.round_bytes = 0;
        let mut bytes = Vec::new();
        self.encoder.round(self.report.rounds, &mut bytes);
        self.queue(bytes);
        self.actions.push_back(Action::Round(self.progress()));
    }

    /// Encodes what has changed of copied units.
    fn take(&mut self, copied: &Copied) {
        let region = copied.region;
        let Some(found) = self.layout.regions().get(region) else { return };
        let unit_bytes = found.unit_bytes as usize;
        let mut bytes = Vec::new();
        let (told, hashes) = (&mut self.told[region], &mut self.hashes[region]);
        // Whether the unit is to be sent, with its hash from now on.
        let mut news = |unit: u64, hash: u128| {
            let known = &mut hashes[unit as usize];
            let news = *known != hash || !told.contains(unit as usize);
            told.insert(unit as usize);
            self.digests[region] = self.digests[region].wrapping_sub(*known).wrapping_add(hash);
            *known = hash;
            news
        };
        let zeroes: Vec<u64> = copied.zeroes.iter().copied().filter(|&unit| news(unit, 0)).collect();
        self.encoder.zeroes(region, &zeroes, &mut bytes);
        let pieces = copied.units.iter().zip(copied.bytes.chunks_exact(unit_bytes));
        let changed: Vec<(u64, &[u8])> =
            pieces.map(|(&unit, bytes)| (unit, bytes)).filter(|(unit, bytes)| news(*unit, unit_hash(*unit, bytes))).collect();
        let units: Vec<u64> = changed.iter().map(|(unit, _)| *unit).collect();
        if units.len() == copied.units.len() {
            self.encoder.units(region, &units, &copied.bytes, &mut bytes);
        } else {
            let data: Vec<u8> = changed.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
            self.encoder.units(region, &units, &data, &mut bytes);
        }
        self.report.zeroes += zeroes.len() as u64;
        self.report.units += units.len() as u64;
        self.report.unchanged += (copied.len() - zeroes.len() - units.len()) as u64;
        self.round_bytes += (copied.units.len() * unit_bytes) as u64;
        if !bytes.is_empty() {
            self.queue(bytes);
        }
    }

    fn queue(&mut self, bytes: Vec<u8>) {
        self.out_bytes += bytes.len();
        self.out.push_back(bytes);
    }

    /// Does what can be done now.
    fn go_on(&mut self, now: u64) {
        while self.room > 0
            && let Some(mut bytes) = self.out.pop_front()
        {
            let n = bytes.len().min(usize::try_from(self.room).unwrap_or(usize::MAX));
            let rest = bytes.split_off(n);
            if !rest.is_empty() {
                self.out.push_front(rest);
            }
            self.room -= n as u64;
            self.out_bytes -= n;
            self.report.sent_bytes += n as u64;
            self.actions.push_back(Action::Send(bytes));
        }
        match self.state {
            State::Round => {
                while self.reads < READS && self.out_bytes < 2 * self.config.batch_bytes {
                    let Some((region, units)) = self.next_batch() else { break };
                    self.reads += 1;
                    self.actions.push_back(Action::Read { region, units });
                }
                // All of it is on its way, so that the time it took says how fast that is.
                if self.reads == 0 && self.out.is_empty() {
                    self.state = State::Collecting;
                    self.actions.push_back(Action::Collect);
                }
            }
            State::Ending if self.out.is_empty() => {
                self.state = State::Done;
                self.report.total_ns = now - self.began;
                self.actions.push_back(Action::Done(self.report));
            }
            State::Collecting | State::Cutting | State::Ending | State::Done => {}
        }
    }

    /// The next units of the round.
    fn next_batch(&mut self) -> Option<(usize, Vec<u64>)> {
        while self.at.0 < self.todo.len() {
            let (region, from) = self.at;
            let most = (self.config.batch_bytes / self.layout.regions()[region].unit_bytes as usize).max(1);
            let set = &mut self.todo[region];
            let mut units = Vec::with_capacity(most);
            let mut next = from;
            while units.len() < most
                && let Some(unit) = set.first_from(next)
            {
                set.remove(unit);
                units.push(unit as u64);
                next = unit + 1;
            }
            if units.is_empty() {
                self.at = (region + 1, 0);
            } else {
                self.at.1 = next;
                return Some((region, units));
            }
        }
        None
    }
}
