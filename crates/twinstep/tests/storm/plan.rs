//! Which fault comes in which round, and when.
//!
//! *In*: a seed. *Out*: rounds. *Invariant*: a round's choice follows from the seed and its number alone; before a fault comes again, every other one has come.

use std::fmt;
use std::time::Duration;

/// A side of the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Primary,
    Standby,
}
use Side::{Primary, Standby};

/// What happens to the hosts. Where nothing else is said, a fault lasts until somebody has gone on because of it, and a little longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL.
    Kill(Side),
    /// SIGKILL to the primary, and to the next standby while it gets its copy.
    KillTwice,
    /// SIGSTOP; SIGCONT before anybody could have noticed.
    Nap(Side),
    /// SIGSTOP; SIGCONT when it is too late.
    Stop(Side),
    /// The two sides do not hear each other.
    CutLink,
    /// One side does not hear the other, which is this one.
    CutFrom(Side),
    /// Nobody reaches the arbiter, for a while in which nobody needs it.
    CutArbiter,
    /// The two sides do not hear each other, and for a while no arbiter either.
    CutLinkAndArbiter,
    /// The two sides do not hear each other, and one of them no arbiter either.
    CutLinkAndArbiterOf(Side),
    /// All cables of one side are pulled out.
    Isolate(Side),
    /// The file system with one side's disk image is full.
    FillDisk(Side),
    /// `twinstep failover`.
    HandOver,
}

/// All of them.
const FAULTS: [Fault; 19] = [
    Fault::Kill(Primary),
    Fault::Kill(Standby),
    Fault::KillTwice,
    Fault::Nap(Primary),
    Fault::Nap(Standby),
    Fault::Stop(Primary),
    Fault::Stop(Standby),
    Fault::CutLink,
    Fault::CutFrom(Primary),
    Fault::CutFrom(Standby),
    Fault::CutArbiter,
    Fault::CutLinkAndArbiter,
    Fault::CutLinkAndArbiterOf(Primary),
    Fault::CutLinkAndArbiterOf(Standby),
    Fault::Isolate(Primary),
    Fault::Isolate(Standby),
    Fault::FillDisk(Primary),
    Fault::FillDisk(Standby),
    Fault::HandOver,
];

/// A round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    pub fault: Fault,
    /// From the moment at which the VM is protected.
    pub after: Duration,
    /// How long it lasts, or how much longer than until it is noticed.
    pub lasts: Duration,
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} after {} ms, for {} ms", self.fault, self.after.as_millis(), self.lasts.as_millis())
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// The round of this number, from 0.
pub fn round(seed: u64, number: u64) -> Round {
    let all = FAULTS.len() as u64;
    let mut deck = FAULTS;
    let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95) ^ (number / all));
    for last in (1..deck.len()).rev() {
        deck.swap(last, random.below(last as u64 + 1) as usize);
    }
    let mut random = Random(seed.wrapping_mul(0xaef1_7502_108e_f2d9) ^ number.wrapping_mul(0x9fb2_1c65_1e98_df25));
    Round {
        fault: deck[(number % all) as usize],
        after: Duration::from_millis(random.below(600)),
        lasts: Duration::from_millis(20 + random.below(400)),
    }
}

#[test]
fn every_fault_comes_once_and_a_seed_is_a_choice() {
    for seed in 0..20 {
        let rounds: Vec<_> = (0..2 * FAULTS.len() as u64).map(|number| round(seed, number)).collect();
        for deck in rounds.chunks(FAULTS.len()) {
            assert!(FAULTS.iter().all(|fault| deck.iter().any(|round| round.fault == *fault)), "{deck:?}");
        }
        assert_eq!(rounds[5], round(seed, 5));
        assert_ne!(rounds, (0..rounds.len() as u64).map(|number| round(seed + 1, number)).collect::<Vec<_>>());
    }
}
