//! What the primary's machine thread does for a resync while the guest runs, and where it stops.
//!
//! *In*: what the standby has told ([`super::told`]), the machine between two slices of its guest, room in the channel. *Out*: word that all is prepared; pages that are sent ahead; the delta. *Invariant*: a part
//! of the work takes about a millisecond; while the guest stands still only that is done which depends on where it stands.
//!
//! Prepared is: both sides have looked through all of their RAM, and their hashes are up to date but for what is written last. If it turns out, where the guest stands, that more differs than
//! [`SMALL`], it runs on while that is sent ahead ([`super::ahead`]), round by round, until little is left. That is so when the standby's machine has gone another way altogether, so that it shares
//! little with the primary's that was written since. At most [`MAX_STOPS`] times, and [`MAX_ROUNDS`] rounds each: then the rest is sent, however much.
use std::sync::{Arc, Mutex};

use twinstep_machine::{Machine, PAGE_SIZE, PageSet};

use super::ahead;
use super::resync::{self, Baseline, Delta};
use super::survey::Survey;
use super::told::{self, Told};
use crate::error::Result;

/// Pages of a part of the work: 4 MiB.
const PART: usize = 1024;
/// Pages of what is sent ahead at once; packing them takes longer.
const SENT_PART: usize = 128;
/// So many pages are left to be sent while the guest stands still: some 20 ms.
const SMALL: usize = 2048;
/// How often the guest is stopped and runs on.
const MAX_STOPS: u32 = 4;
/// How often it is looked what is left to be sent ahead.
const MAX_ROUNDS: u32 = 16;

/// See the head of the module.
#[derive(Debug)]
pub(super) struct Preparation {
    told: Arc<Mutex<Told>>,
    survey: Survey,
    /// How much of its time the guest loses, in hundredths.
    pub(super) slowed: u8,
    /// The pair knows that all is prepared.
    said: bool,
    /// The guest stands still, and nothing enters the machine.
    pub(super) stands: bool,
    stops: u32,
    /// What is sent ahead, if that is necessary.
    ahead: Option<Ahead>,
}

#[derive(Debug)]
struct Ahead {
    left: PageSet,
    /// Where it goes on.
    next: usize,
    /// Bytes that may be sent.
    room: u64,
    rounds: u32,
    done: bool,
}

/// What a part of the work came to.
pub(super) enum Part {
    /// There is nothing to be done now.
    Nothing,
    /// Something was done.
    Some,
    /// These bytes are to be sent ahead.
    Send(Vec<u8>),
    /// All is prepared.
    Prepared,
}

/// What there is to be done where the guest stands.
pub(super) enum Stop {
    /// The standby gets this.
    Delta(Delta),
    /// The guest has to run on.
    GoOn,
}

impl Preparation {
    pub(super) fn new(told: Arc<Mutex<Told>>) -> Self {
        Self { told, survey: Survey::default(), slowed: 0, said: false, stands: false, stops: 0, ahead: None }
    }

    /// Does a part of the work.
    pub(super) fn part(&mut self, machine: &mut Machine, baseline: &mut Baseline) -> Part {
        let level = self.survey.part(machine, PART);
        if !level || !self.survey.is_done(machine) {
            return Part::Some;
        }
        if let Some(ahead) = self.ahead.as_mut().filter(|ahead| !ahead.done) {
            let mut told = told::lock(&self.told);
            if ahead.left.is_empty() {
                ahead.rounds += 1;
                ahead.left = resync::differing_pages(machine, baseline, &told, &self.survey.damaged);
                ahead.done = ahead.left.len() <= SMALL || ahead.rounds > MAX_ROUNDS;
                return Part::Some;
            }
            return ahead.send(machine, &mut told);
        }
        if !self.said && told::lock(&self.told).damaged.is_some() {
            self.said = true;
            return Part::Prepared;
        }
        Part::Nothing
    }

    /// So many bytes more may be sent ahead.
    pub(super) fn room(&mut self, bytes: u64) {
        if let Some(ahead) = &mut self.ahead {
            ahead.room += bytes;
        }
    }

    /// The guest stands still: what can be done until the standby has told all of where it stands.
    pub(super) fn stop(&mut self, machine: &mut Machine, baseline: &mut Baseline) {
        self.stands = true;
        machine.digest_ram();
        baseline.changed_since(machine);
    }

    /// The standby has told all.
    pub(super) fn finish(
        &mut self,
        machine: &mut Machine,
        baseline: &mut Baseline,
        disk_bytes: &[u64],
        last_output: u64,
    ) -> Result<Stop> {
        let told = told::lock(&self.told);
        let wanted = resync::differing_pages(machine, baseline, &told, &self.survey.damaged);
        self.stops += 1;
        if wanted.len() > SMALL && self.stops < MAX_STOPS {
            let room = self.ahead.take().map_or(0, |ahead| ahead.room);
            self.ahead = Some(Ahead { left: wanted, next: 0, room, rounds: 0, done: false });
            self.said = false;
            return Ok(Stop::GoOn);
        }
        let damaged = std::mem::take(&mut self.survey.damaged);
        resync::delta(machine, baseline, &told, (&wanted, damaged), disk_bytes, last_output).map(Stop::Delta)
    }
}

impl Ahead {
    /// Takes the next pages, as many as there is room for.
    fn send(&mut self, machine: &Machine, told: &mut Told) -> Part {
        let mut bytes = Vec::new();
        for _ in 0..SENT_PART {
            if self.room < bytes.len() as u64 + 2 * PAGE_SIZE {
                break;
            }
            let Some(page) = self.left.first_from(self.next).or_else(|| self.left.first_from(0)) else { break };
            self.left.remove(page);
            self.next = page + 1;
            ahead::put_page(page, machine.ram().page_bytes(page), &mut bytes);
            // The hashes are up to date.
            told.ram.sent(page, machine.page_hashes()[page]);
        }
        self.room -= bytes.len() as u64;
        if bytes.is_empty() { Part::Nothing } else { Part::Send(bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ahead::Staged;
    use super::*;
    use twinstep_machine::Config;
    use twinstep_machine::faults::Bit;

    /// What a secondary that stands still tells, and has told before.
    fn tell(told: &Mutex<Told>, machine: &mut Machine, baseline: &mut Baseline, survey: &mut Survey) {
        survey.finish(machine);
        let mut pages = baseline.changed(machine);
        survey.damaged.iter().for_each(|&page| pages.insert(page));
        let hashes = machine.page_hashes();
        let pages: Vec<_> = pages.iter().map(|page| (page, hashes[page])).collect();
        let mut told = told::lock(told);
        told::of_pages(&pages).iter().for_each(|message| told.take(message).unwrap());
        told.take(&told::of_search(survey.damaged.len())).unwrap();
    }

    fn page(turn: usize) -> [u8; 4096] {
        std::array::from_fn(|i| (turn + i * i / 7) as u8)
    }

    /// The two have gone different ways for long, and the primary's guest goes on writing.
    #[test]
    fn what_is_too_much_for_a_pause_is_sent_ahead() {
        let [mut primary, mut secondary] = std::array::from_fn(|_| {
            let mut machine = Machine::new(Config { ram_mib: 64, ..Config::default() }, Vec::new()).unwrap();
            (0..10_000).for_each(|n| _ = machine.write_ram_page(n, &page(n)));
            machine.digest();
            let baseline = Baseline::new(&mut machine, Vec::new()).unwrap();
            (machine, baseline)
        });
        (1000..6000).for_each(|n| _ = primary.0.write_ram_page(n, &page(n + 1)));
        (3000..9000).for_each(|n| _ = secondary.0.write_ram_page(n, &page(n + 2)));
        assert!(secondary.0.flip(Bit::Ram(9500 * 4096, 1)));
        let told = Arc::new(Mutex::new(Told::of(&secondary.0, &[])));
        let (mut preparation, mut staged, mut survey) = (Preparation::new(told.clone()), Staged::default(), Survey::default());
        let (mut stops, mut sent, mut turn) = (0, 0, 0);
        let delta = loop {
            // The guest writes the same few pages again and again, and others now and then.
            turn += 1;
            primary.0.write_ram_page(turn % 50, &page(turn));
            primary.0.write_ram_page(2000 + turn * 7 % 5000, &page(turn));
            match preparation.part(&mut primary.0, &mut primary.1) {
                Part::Some => {}
                Part::Nothing if told::lock(&told).damaged.is_none() => {
                    tell(&told, &mut secondary.0, &mut secondary.1, &mut survey)
                }
                Part::Nothing => preparation.room(1 << 20),
                Part::Send(bytes) => {
                    sent += bytes.len();
                    staged.push(&bytes, 16384).unwrap();
                }
                Part::Prepared => {
                    stops += 1;
                    preparation.stop(&mut primary.0, &mut primary.1);
                    tell(&told, &mut secondary.0, &mut secondary.1, &mut survey);
                    match preparation.finish(&mut primary.0, &mut primary.1, &[], 9).unwrap() {
                        Stop::GoOn => assert_eq!(stops, 1),
                        Stop::Delta(delta) => break delta,
                    }
                    preparation.stands = false;
                    // It goes on, too, and that must not count where something else was sent.
                    secondary.0.write_ram_page(5000, &page(99));
                }
            }
            assert!(turn < 10_000, "it does not end");
        };
        assert!(stops == 2 && sent > 4 << 20 && delta.pages <= SMALL, "{stops} stops, {sent} bytes ahead, {} pages", delta.pages);
        assert_eq!((delta.theirs_damaged, delta.damaged.len()), (1, 0));
        staged.push(&ahead::delta_head(), 16384).unwrap();
        staged.push(&delta.image, 16384).unwrap();
        let (pages, image) = staged.finish().unwrap();
        for page in pages {
            let (page, bytes) = page.unwrap();
            secondary.0.write_ram_page(page, bytes[..].try_into().unwrap());
        }
        let (extra, ..) = resync::apply(&mut secondary.0, &[], &image).unwrap();
        assert_eq!((extra.last_output, primary.0.digest().differences(&secondary.0.digest())), (9, Vec::new()));
    }
}
