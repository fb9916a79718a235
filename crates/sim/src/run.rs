//! One seed, start to end.
//!
//! In: a seed, perhaps a seeded bug. Out: figures, or the violation with a trace. Invariant: a panic of the code under test is
//! a violation like any other; the trace of a failing seed comes from running it again, so passing seeds cost nothing for it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use twinstep_pair::{Bug, Nanos};

use crate::profile::END;
use crate::world::World;

/// How much of a trace is shown.
const TRACE_LINES: usize = 150;
/// No history has more happenings than this.
const MAX_STEPS: u64 = 1_000_000;
/// The client must have got an answer within so much time before the end.
const ANSWERS_WITHIN: Nanos = Nanos::from_millis(150);

/// What happened in a history without a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// How many things happened.
    pub steps: u64,
    /// How many of them were faults.
    pub faults: u64,
    /// How often a primary went on alone.
    pub alone: u64,
    /// How often a secondary went live.
    pub live: u64,
    /// How often a secondary was made equal again.
    pub resyncs: u64,
    /// How often a VM got a standby after its first one.
    pub healed: u64,
    /// How many outputs the world saw.
    pub outputs: u64,
    /// How many of them it saw again.
    pub duplicates: u64,
    /// How many writes the client was told to be done.
    pub acknowledged: u64,
}

impl Figures {
    /// Both histories together.
    #[must_use]
    pub fn plus(self, other: Figures) -> Figures {
        Figures {
            steps: self.steps + other.steps,
            faults: self.faults + other.faults,
            alone: self.alone + other.alone,
            live: self.live + other.live,
            resyncs: self.resyncs + other.resyncs,
            healed: self.healed + other.healed,
            outputs: self.outputs + other.outputs,
            duplicates: self.duplicates + other.duplicates,
            acknowledged: self.acknowledged + other.acknowledged,
        }
    }
}

/// An invariant that did not hold.
#[derive(Debug, Clone)]
pub struct Violation {
    /// Which history.
    pub seed: u64,
    /// What was wrong.
    pub problem: String,
    /// The last things that happened before.
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        write!(f, "seed {}: {}", self.seed, self.problem)
    }
}

/// Lives through the history of one seed, with a seeded bug or without.
pub fn run_seed(seed: u64, bug: Option<Bug>) -> Result<Figures, Box<Violation>> {
    let (mut world, result) = live(seed, bug, false);
    match result {
        Ok(steps) => Ok(Figures {
            steps,
            faults: world.checker.faults,
            alone: world.checker.alone,
            live: world.checker.live,
            resyncs: world.checker.resyncs,
            healed: world.checker.protected.saturating_sub(1),
            outputs: world.outside.seen(),
            duplicates: world.outside.duplicates,
            acknowledged: world.outside.acknowledged.len() as u64,
        }),
        Err(problem) => {
            if bug.is_none() {
                world = live(seed, bug, true).0;
            }
            let trace = world.trace.take().unwrap_or_default();
            let from = trace.len().saturating_sub(TRACE_LINES);
            // The first line is the profile.
            let trace = trace.iter().take(1.min(from)).chain(&trace[from..]).cloned().collect();
            Err(Box::new(Violation { seed, problem, trace }))
        }
    }
}

fn live(seed: u64, bug: Option<Bug>, traced: bool) -> (World, Result<u64, String>) {
    let mut world = World::new(seed, bug, traced);
    let result = catch_unwind(AssertUnwindSafe(|| {
        for steps in 1..=MAX_STEPS {
            if world.now.plus(ANSWERS_WITHIN) < END {
                world.checker.acknowledged_before = world.outside.acknowledged.len();
            }
            if !world.step()? {
                return Ok(steps);
            }
        }
        Err(format!("the history does not end; it is stuck at {}", world.now))
    }));
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_else(|| "without words".to_owned())))
    });
    (world, result)
}
