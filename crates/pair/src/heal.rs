//! Healing: which standby a VM without one is offered to next, and when.
//!
//! In: what became of the primary and of attempts to reach standbys, with the time. Out: whom to connect to. Invariants: at most one attempt is under
//! way; as long as the VM has no standby, every standby of the list is tried again and again, with pauses that are bounded; the order of the list is
//! an order of preference among those whose pause is over.
//!
//! A healer calls a standby by its place in the list. It decides nothing about who may run: whoever it finds gets the VM's image as any standby
//! does, in the epoch the VM runs in.

use crate::bugs::{Bug, Bugs};
use crate::config::Config;
use crate::primary::PrimaryState;
use crate::types::Nanos;
use crate::wire::{MAX_STANDBY_BYTES, MAX_STANDBYS};

/// One standby of the list.
#[derive(Debug, Clone)]
struct Candidate {
    /// Where it is, in the host's words.
    place: String,
    /// Attempts in a row that came to nothing.
    failures: u32,
    /// It is left alone until then.
    not_before: Nanos,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing is to be done: the VM is over, or somebody else looks after it.
    Resting,
    /// A standby is wanted.
    Wanting,
    /// An attempt to reach this one is under way.
    Reaching(usize),
    /// This one is connected.
    Connected(usize),
    /// And protects the VM.
    Protected(usize),
}

/// What became of an attempt, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setback {
    /// Which standby of the list.
    pub standby: usize,
    /// Attempts in a row that came to nothing.
    pub failures: u32,
    /// When it is tried again at the earliest.
    pub not_before: Nanos,
}

/// Whether a place can be told to a standby.
fn fits(place: &str) -> bool {
    !place.is_empty() && place.len() <= MAX_STANDBY_BYTES
}

fn candidates(standbys: impl IntoIterator<Item = String>) -> Vec<Candidate> {
    let places = standbys.into_iter().filter(|place| fits(place)).take(MAX_STANDBYS - 1);
    places.map(|place| Candidate { place, failures: 0, not_before: Nanos(0) }).collect()
}

/// Looks for standbys; see the head of the module.
#[derive(Debug, Clone)]
pub struct Healer {
    candidates: Vec<Candidate>,
    /// Where this process itself was reached as a standby.
    own: Option<String>,
    stage: Stage,
    retry_min: Nanos,
    retry_max: Nanos,
    bugs: Bugs,
}

impl Healer {
    /// For these standbys, and a process that was reached at `own` when it was one itself. It rests until the
    /// primary is followed.
    ///
    /// What does not fit into a greeting is left out; see [`Hello::standbys`](crate::wire::Hello::standbys) for the bounds.
    pub fn new(standbys: impl IntoIterator<Item = String>, own: Option<String>, config: &Config) -> Healer {
        Healer {
            candidates: candidates(standbys),
            own: own.filter(|place| fits(place)),
            stage: Stage::Resting,
            retry_min: config.heal_retry_min,
            retry_max: config.heal_retry_max,
            bugs: Bugs::default(),
        }
    }

    /// Switches a seeded bug on.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub fn with_bugs(mut self, bugs: Bugs) -> Healer {
        self.bugs = bugs;
        self
    }

    /// These standbys instead, before any was tried.
    pub fn replace(&mut self, standbys: impl IntoIterator<Item = String>) {
        self.candidates = candidates(standbys);
    }

    /// Where the standbys are.
    pub fn places(&self) -> impl Iterator<Item = &str> {
        self.candidates.iter().map(|candidate| candidate.place.as_str())
    }

    /// Attempts in a row, to reach this standby or be protected by it, that came to nothing.
    ///
    /// # Panics
    /// If there is no such standby.
    pub fn failures(&self, standby: usize) -> u32 {
        self.candidates[standby].failures
    }

    /// What this standby is told of the VM's standbys: itself first, those behind it in the list, those before it, and at last this process's own
    /// place, where a standby may wait again once this process is gone.
    ///
    /// # Panics
    /// If there is no such standby.
    pub fn greeting(&self, standby: usize) -> Vec<String> {
        let (before, from) = self.candidates.split_at(standby);
        let places = from.iter().chain(before).map(|candidate| candidate.place.clone());
        places.chain(self.own.clone()).collect()
    }

    /// This standby is connected already, without having been asked for here.
    ///
    /// # Panics
    /// If there is no such standby.
    pub fn begin_with(&mut self, standby: usize) {
        assert!(standby < self.candidates.len(), "it is one of the list");
        self.stage = Stage::Connected(standby);
    }

    /// A standby is wanted. One that was connected has failed.
    fn bare(&mut self, now: Nanos) -> Option<Setback> {
        let setback = match self.stage {
            // Nobody has failed yet, or it is known already.
            Stage::Resting | Stage::Wanting => None,
            // The attempt goes on.
            Stage::Reaching(_) => return None,
            Stage::Connected(standby) => Some(self.failed(now, standby, false)),
            // It was good for something; yet its host may be gone.
            Stage::Protected(standby) => {
                self.candidates[standby].failures = 0;
                Some(self.failed(now, standby, false))
            }
        };
        if self.bugs.has(Bug::HealOnce) && setback.is_some() {
            self.candidates.clear();
        }
        self.stage = Stage::Wanting;
        setback
    }

    /// Takes in where the primary stands; to be called whenever that may have changed. Says which standby has failed, if one has.
    pub fn follow(&mut self, now: Nanos, state: PrimaryState) -> Option<Setback> {
        match state {
            PrimaryState::Unprotected => return self.bare(now),
            PrimaryState::Protected => self.protected(),
            PrimaryState::Stopped => self.stage = Stage::Resting,
            PrimaryState::Greeting
            | PrimaryState::Copying
            | PrimaryState::CatchingUp
            | PrimaryState::Resyncing
            | PrimaryState::Deciding => {}
        }
        None
    }

    /// The attempt under way has made a connection.
    pub fn connected(&mut self) {
        if let Stage::Reaching(standby) = self.stage {
            self.stage = Stage::Connected(standby);
        }
    }

    /// The attempt under way has come to nothing.
    pub fn not_reached(&mut self, now: Nanos) -> Option<Setback> {
        let Stage::Reaching(standby) = self.stage else { return None };
        self.stage = Stage::Wanting;
        Some(self.failed(now, standby, false))
    }

    /// The standby that is connected does not fit the VM; it is left alone for as long as any.
    pub fn refused(&mut self, now: Nanos) -> Option<Setback> {
        let Stage::Connected(standby) = self.stage else { return None };
        self.stage = Stage::Wanting;
        Some(self.failed(now, standby, true))
    }

    fn protected(&mut self) {
        if let Stage::Connected(standby) = self.stage {
            self.stage = Stage::Protected(standby);
        }
    }

    /// The standby that is connected.
    pub fn standby(&self) -> Option<usize> {
        match self.stage {
            Stage::Connected(standby) | Stage::Protected(standby) => Some(standby),
            _ => None,
        }
    }

    /// The standby that an attempt is to be made to now. Report with [`connected`](Healer::connected) or [`not_reached`](Healer::not_reached).
    pub fn poll(&mut self, now: Nanos) -> Option<usize> {
        if self.stage != Stage::Wanting {
            return None;
        }
        let standby = self.candidates.iter().position(|candidate| candidate.not_before <= now)?;
        self.stage = Stage::Reaching(standby);
        Some(standby)
    }

    /// When [`poll`](Healer::poll) has something to say next, if nothing else happens.
    pub fn deadline(&self) -> Option<Nanos> {
        if self.stage != Stage::Wanting {
            return None;
        }
        self.candidates.iter().map(|candidate| candidate.not_before).min()
    }

    fn failed(&mut self, now: Nanos, standby: usize, for_long: bool) -> Setback {
        let candidate = &mut self.candidates[standby];
        candidate.failures = candidate.failures.saturating_add(1);
        let doublings = (candidate.failures - 1).min(16);
        let pause = self.retry_min.0.saturating_mul(1 << doublings).min(self.retry_max.0);
        let pause = if for_long { self.retry_max.0 } else { pause };
        candidate.not_before = now.plus(Nanos(pause));
        Setback { standby, failures: candidate.failures, not_before: candidate.not_before }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn healer(standbys: usize) -> Healer {
        let config = Config { heal_retry_min: Nanos(10 * MS), heal_retry_max: Nanos(80 * MS), ..Config::default() };
        Healer::new(["a", "b", "c"].map(str::to_owned).into_iter().take(standbys), Some("own".to_owned()), &config)
    }

    #[test]
    fn whoever_becomes_a_standby_is_told_of_the_others() {
        assert_eq!(healer(3).greeting(1), ["b", "c", "a", "own"]);
        assert_eq!(healer(1).greeting(0), ["a", "own"]);
        let all = (0..100).map(|n| format!("standby-{n}")).chain(["x".repeat(MAX_STANDBY_BYTES + 1)]);
        let many = Healer::new(all, Some("own".to_owned()), &Config::default());
        assert_eq!(many.greeting(0).len(), MAX_STANDBYS);
    }

    #[test]
    fn it_rests_until_a_standby_is_wanted() {
        let mut healer = healer(2);
        assert_eq!((healer.poll(Nanos(5)), healer.deadline()), (None, None));
        assert_eq!(healer.bare(Nanos(5)), None);
        assert_eq!(healer.poll(Nanos(5)), Some(0));
        assert_eq!(healer.poll(Nanos(5)), None, "one attempt at a time");
        healer.follow(Nanos(6), PrimaryState::Stopped);
        assert_eq!(healer.not_reached(Nanos(6)), None);
        assert_eq!(healer.poll(Nanos(1_000 * MS)), None);
    }

    #[test]
    fn the_list_is_an_order_and_a_failure_a_pause() {
        let mut healer = healer(3);
        healer.bare(Nanos(0));
        let mut tried = Vec::new();
        let mut now = Nanos(0);
        for _ in 0..9 {
            now = healer.deadline().expect("one is wanted").max(now);
            tried.push((healer.poll(now).expect("its time has come"), now.0 / MS));
            healer.not_reached(now);
        }
        assert_eq!(tried, [(0, 0), (1, 0), (2, 0), (0, 10), (1, 10), (2, 10), (0, 30), (1, 30), (2, 30)]);
    }

    #[test]
    fn pauses_are_bounded() {
        let mut healer = healer(1);
        healer.bare(Nanos(0));
        let mut now = Nanos(0);
        for _ in 0..200 {
            let next = healer.deadline().expect("one is wanted").max(now);
            assert!(next.since(now) <= Nanos(80 * MS));
            now = next;
            assert_eq!(healer.poll(now), Some(0));
            healer.not_reached(now);
        }
    }

    #[test]
    fn one_that_was_lost_comes_after_the_others() {
        let mut healer = healer(2);
        healer.begin_with(0);
        healer.protected();
        assert_eq!(healer.standby(), Some(0));
        let setback = healer.bare(Nanos(MS)).expect("it is lost");
        assert_eq!((setback.standby, setback.failures), (0, 1));
        assert_eq!((healer.failures(0), healer.failures(1)), (1, 0));
        assert_eq!(healer.poll(Nanos(MS)), Some(1));
        healer.connected();
        healer.protected();
        // The first had its pause meanwhile, and is preferred again.
        healer.bare(Nanos(100 * MS));
        assert_eq!(healer.poll(Nanos(100 * MS)), Some(0));
    }

    #[test]
    fn one_that_does_not_fit_is_left_alone_for_long() {
        let mut healer = healer(2);
        healer.bare(Nanos(0));
        assert_eq!(healer.poll(Nanos(0)), Some(0));
        healer.connected();
        assert_eq!(healer.refused(Nanos(0)).map(|setback| setback.not_before), Some(Nanos(80 * MS)));
        // The primary's own word of it comes afterwards and counts once.
        assert_eq!(healer.bare(Nanos(0)), None);
        assert_eq!(healer.poll(Nanos(0)), Some(1));
    }

    #[test]
    fn without_standbys_there_is_nothing_to_do() {
        let mut healer = healer(0);
        healer.bare(Nanos(0));
        assert_eq!((healer.poll(Nanos(0)), healer.deadline()), (None, None));
    }
}
