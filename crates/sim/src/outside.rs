//! The world outside: a client with several writers, and an observer of everything that leaves.
//!
//! In: outputs, in the order in which they leave any side. Out: what the client sends, and violations. Invariant: knows
//! nothing but what left, so what it finds wrong a real client could have noticed.

use std::collections::BTreeSet;

use crate::machine::{Machine, Output};

/// The observer and the client's memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outside {
    /// All outputs that were seen, by id from 1.
    seen: Vec<Output>,
    /// Writes the client was told to be done.
    pub(crate) acknowledged: BTreeSet<u64>,
    /// The write each writer waits for.
    waiting: Vec<Option<u64>>,
    next_write: u64,
    /// Whether outputs may be seen twice from now on, because a side went live.
    pub(crate) duplicates_allowed: bool,
    pub(crate) duplicates: u64,
}

impl Outside {
    pub(crate) fn new(writers: u64) -> Outside {
        Outside { waiting: vec![None; writers as usize], ..Outside::default() }
    }

    /// How many different outputs were seen.
    pub(crate) fn seen(&self) -> u64 {
        self.seen.len() as u64
    }

    /// The write that a writer sends now: the one it waits for, or a new one.
    pub(crate) fn write(&mut self, writer: usize) -> u64 {
        *self.waiting[writer].get_or_insert_with(|| {
            self.next_write += 1;
            self.next_write
        })
    }

    /// An output leaves a side.
    pub(crate) fn see(&mut self, output: &Output) -> Result<(), String> {
        let newest = self.seen();
        if output.id <= newest {
            let before = &self.seen[output.id as usize - 1];
            if before != output {
                return Err(format!("output {} was seen with another content: {before:?}, now {output:?}", output.id));
            }
            self.duplicates += 1;
            if !self.duplicates_allowed {
                return Err(format!("output {} was seen twice although no side went live", output.id));
            }
            return Ok(());
        }
        if output.id != newest + 1 {
            return Err(format!("a gap: output {} was seen after output {newest}", output.id));
        }
        if output.chain_before != self.seen.last().map_or(0, Output::chain_after) {
            return Err(format!("output {} comes from a machine with other outputs before it", output.id));
        }
        self.seen.push(output.clone());
        if let Some(write) = output.acknowledges {
            self.acknowledged.insert(write);
            for waiting in self.waiting.iter_mut().filter(|waiting| **waiting == Some(write)) {
                *waiting = None;
            }
        }
        Ok(())
    }

    /// Whether a machine that is about to run on its own could have made everything that was seen.
    pub(crate) fn check_survivor(&self, machine: &Machine) -> Result<(), String> {
        if let Some(write) = self.acknowledged.iter().find(|write| !machine.writes.contains(write)) {
            return Err(format!("write {write} was acknowledged and is missing in the machine that goes on"));
        }
        if machine.outputs < self.seen() {
            return Err(format!("{} outputs were seen, but the machine that goes on has made {}", self.seen(), machine.outputs));
        }
        Ok(())
    }
}
