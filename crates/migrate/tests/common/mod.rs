//! A world for copies: a guest that writes at random, a way with room for some bytes, and a destination.
//!
//! *In*: a seed. *Out*: what both sides hold. *Invariant*: everything follows from the seed.

// Each test program uses its part of this.
#![allow(dead_code)]

use std::collections::VecDeque;

use twinstep_machine::PageSet;
use twinstep_migrate::{
    Action, Arrived, Config, Copied, Destination, Event, Layout, NotConverging, Region, Report, Source, Target,
};

/// A small generator (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Regions of bytes, and which units were written.
pub struct Memory {
    pub layout: Layout,
    pub bytes: Vec<Vec<u8>>,
    pub dirty: Vec<PageSet>,
}

impl Memory {
    pub fn zero(layout: &Layout) -> Self {
        let bytes = layout.regions().iter().map(|r| vec![0; r.units as usize * r.unit_bytes as usize]).collect();
        Self { bytes, dirty: layout.nothing(), layout: layout.clone() }
    }
    pub fn unit(&self, region: usize, unit: u64) -> &[u8] {
        let size = self.layout.regions()[region].unit_bytes as usize;
        &self.bytes[region][unit as usize * size..][..size]
    }
    fn unit_mut(&mut self, region: usize, unit: u64) -> &mut [u8] {
        let size = self.layout.regions()[region].unit_bytes as usize;
        &mut self.bytes[region][unit as usize * size..][..size]
    }
    /// One write of the guest's: a byte, a whole unit, zeroes, or what was there already.
    pub fn write(&mut self, random: &mut Random) {
        let region = random.below(self.bytes.len() as u64) as usize;
        let units = self.layout.regions()[region].units;
        if units == 0 {
            return;
        }
        let unit = random.below(units);
        self.dirty[region].insert(unit as usize);
        let (kind, value) = (random.below(4), random.number());
        let bytes = self.unit_mut(region, unit);
        match kind {
            0 => bytes[value as usize % bytes.len()] = (value >> 32) as u8,
            1 => bytes.fill(value as u8),
            2 => bytes.fill(0),
            _ => {}
        }
    }
    pub fn copy(&self, region: usize, units: impl Iterator<Item = u64>) -> Copied {
        let mut copied = Copied::of(region, 0);
        units.for_each(|unit| copied.push(unit, self.unit(region, unit)));
        copied
    }
    pub fn take_dirty(&mut self) -> Vec<PageSet> {
        std::mem::replace(&mut self.dirty, self.layout.nothing())
    }
}

impl Target for Memory {
    fn begin(&mut self, layout: &Layout, preface: &[u8]) -> Result<(), String> {
        (layout == &self.layout && preface == b"preface").then_some(()).ok_or_else(|| "another machine".to_owned())
    }
    fn unit(&mut self, region: usize, unit: u64, bytes: &[u8]) -> Result<(), String> {
        self.unit_mut(region, unit).copy_from_slice(bytes);
        Ok(())
    }
    fn zero(&mut self, region: usize, unit: u64, first: bool) -> Result<(), String> {
        let bytes = self.unit_mut(region, unit);
        assert!(!first || bytes.iter().all(|b| *b == 0), "it began with zeroes");
        bytes.fill(0);
        Ok(())
    }
}

/// A copy under way.
pub struct World {
    pub random: Random,
    pub guest: Memory,
    pub at_cut: Option<Vec<Vec<u8>>>,
    pub source: Source,
    pub way: VecDeque<u8>,
    pub there: Memory,
    pub destination: Destination,
    pub now: u64,
    /// Writes of the guest in a step, before it is slowed.
    writes: u64,
    pub percent: u64,
    /// What the source asked for and did not get yet.
    asked: VecDeque<Action>,
    pub report: Option<Report>,
    /// The most bytes that were asked for at a time.
    pub most_asked: usize,
    pub slowed: Vec<u8>,
}

pub const STATE: &[u8] = b"all other state";

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let sizes = [512, 1024, 4096];
        let regions = 1 + random.below(3);
        let regions: Vec<_> =
            (0..regions).map(|_| Region { unit_bytes: sizes[random.below(3) as usize], units: random.below(150) }).collect();
        let layout = Layout::new(regions).unwrap();
        let mut guest = Memory::zero(&layout);
        let before = random.below(300);
        (0..before).for_each(|_| guest.write(&mut random));
        let config = Config {
            not_converging: if random.percent(50) { NotConverging::Slow } else { NotConverging::Stop },
            max_rounds: 2 + random.below(20),
            batch_bytes: 1 << (10 + random.below(8)),
            stop_bytes: 32 << 10,
            target_ns: random.below(50_000_000),
        };
        let source = Source::new(0, layout.clone(), b"preface", config);
        let writes = random.below(60);
        Self {
            there: Memory::zero(&layout),
            random,
            guest,
            at_cut: None,
            source,
            way: VecDeque::new(),
            destination: Destination::new(),
            now: 0,
            writes,
            percent: 0,
            asked: VecDeque::new(),
            report: None,
            most_asked: 0,
            slowed: Vec::new(),
        }
    }

    fn answer(&mut self, action: Action) {
        let event = match action {
            Action::Collect => Event::Dirty(self.guest.take_dirty()),
            Action::Read { region, units } => {
                self.most_asked = self.most_asked.max(units.len());
                Event::Copied(self.guest.copy(region, units.into_iter()))
            }
            Action::Cut { mut rest, most_bytes } => {
                let new = self.guest.take_dirty();
                rest.iter_mut().zip(&new).for_each(|(rest, new)| rest.join(new));
                if self.guest.layout.bytes_of(&rest) > most_bytes {
                    Event::TooMuch(rest)
                } else {
                    let copied =
                        rest.iter().enumerate().map(|(r, set)| self.guest.copy(r, set.iter().map(|u| u as u64))).collect();
                    self.at_cut = Some(self.guest.bytes.clone());
                    Event::Finished { copied, state: STATE.to_vec(), pause_ns: 5 }
                }
            }
            other => panic!("{other:?} wants no answer"),
        };
        self.source.handle(self.now, event);
    }

    /// Lets a moment pass; false when the copy is over.
    pub fn step(&mut self) -> bool {
        self.now += 1 + self.random.below(1_000_000);
        for _ in 0..self.writes * (100 - self.percent) / 100 {
            self.guest.write(&mut self.random);
        }
        let bytes = self.random.below(100_000);
        self.source.handle(self.now, Event::Room { bytes });
        while let Some(action) = self.source.poll() {
            match action {
                Action::Send(bytes) => self.way.extend(bytes),
                Action::Slow { percent } => {
                    self.percent = percent.into();
                    self.slowed.push(percent);
                }
                Action::Round(_) => {}
                Action::Done(report) => self.report = Some(report),
                ask => self.asked.push_back(ask),
            }
        }
        // In order, as by a queue; sooner or later.
        while self.random.percent(70)
            && let Some(action) = self.asked.pop_front()
        {
            self.answer(action);
        }
        let arrive = (self.random.below(300_000) as usize).min(self.way.len());
        let bytes: Vec<u8> = self.way.drain(..arrive).collect();
        self.destination.push(&bytes, &mut self.there).unwrap();
        self.report.is_none() || !self.way.is_empty()
    }

    pub fn run(&mut self) {
        let mut steps = 0;
        while self.step() {
            steps += 1;
            assert!(steps < 100_000, "the copy does not end: {:?}", self.source.progress());
        }
    }

    pub fn arrived(self) -> Arrived {
        self.destination.finish().unwrap()
    }
}
