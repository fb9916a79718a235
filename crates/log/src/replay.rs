//! Replays: a machine runs through a log again, and every difference is found at the first entry that shows it.
//!
//! **In:** a machine in the state that the log starts from, and the log's entries in order. **Out:** the outputs the machine makes,
//! each compared first; then a [`Report`], or the [`Divergence`].
//! **Invariants:** an input is given exactly at the position it was recorded at; an output is handed out only if it is the recorded
//! one; after a divergence the replayer does nothing more.
use crate::codec::encoded_length;
use crate::container::ReadError;
use crate::entry::{EndReason, Entry, Event, OutputNote};
use crate::stats::LogStats;
use std::collections::VecDeque;
use twinstep_machine::door::{Input, Output};

/// Why a machine stopped running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunOutcome {
    /// It stands at the position asked for.
    Reached,
    /// It is halted before that position and waits for an input.
    Waiting,
    /// It runs no more (switched off, reset, failed); the text says why.
    Stopped(String),
    /// The host cannot do its part, such as read a disk; the text says why. It says nothing of the machine.
    HostFailure(String),
}

/// A machine, as a replay sees it.
pub trait Replayable {
    /// Retired guest instructions since power-on.
    fn position(&self) -> u64;
    /// Runs up to `position` and no further; at once if it stands there.
    fn run_to(&mut self, position: u64) -> RunOutcome;
    /// Gives it an input at its present position.
    ///
    /// # Errors
    /// If the machine has no use for it (a frame for a card it does not have); the text says why.
    fn input(&mut self, input: Input) -> Result<(), String>;
    /// The outputs made since the last call, each with its position, in order.
    fn take_outputs(&mut self) -> Vec<(u64, Output)>;
    /// Its state, digested, as it was when the log was recorded.
    fn digest(&mut self) -> Vec<u8>;
    /// Names the first thing in which two digests differ, for a person.
    fn explain(&self, ours: &[u8], recorded: &[u8]) -> String;
}

/// In what a replay differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// The machine cannot get to the position of the next entry.
    #[error("the machine does not get as far")]
    Position,
    /// The machine refused a recorded input.
    #[error("the machine refuses an input")]
    Input,
    /// A recorded output was not made.
    #[error("an output is missing")]
    OutputMissing,
    /// An output was made that was not recorded.
    #[error("there is an output too many")]
    OutputExtra,
    /// An output was made at another position.
    #[error("an output has another position")]
    OutputPosition,
    /// An output left elsewhere.
    #[error("an output leaves elsewhere")]
    OutputPort,
    /// An output has another length.
    #[error("an output has another length")]
    OutputLength,
    /// An output has other bytes.
    #[error("an output has other bytes")]
    OutputBytes,
    /// The machine's state is another.
    #[error("the machine's state differs")]
    State,
    /// The log goes back in time or on after its end: it is not the machine that is wrong.
    #[error("the log is not in order")]
    LogOrder,
}

/// The first difference between a replay and what was recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the replay differs at position {position} (entry {entry}): {what}; recorded: {expected}; replayed: {found}; {}",
    agreed(*last_agreed)
)]
pub struct Divergence {
    /// The first position at which the difference is seen.
    pub position: u64,
    /// Number of the entry that showed it, from 0.
    pub entry: u64,
    /// In what they differ.
    pub what: Difference,
    /// What was recorded.
    pub expected: String,
    /// What the replay made.
    pub found: String,
    /// Position of the last digest that agreed: the cause lies after it.
    pub last_agreed: Option<u64>,
}

fn agreed(position: Option<u64>) -> String {
    match position {
        Some(position) => format!("the state last agreed at position {position}"),
        None => "the state was not compared before".to_owned(),
    }
}

/// What a replay did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The entries that were replayed.
    pub entries: LogStats,
    /// Where the machine started.
    pub start: u64,
    /// Where it stands.
    pub position: u64,
    /// Outputs that were compared and found equal.
    pub outputs_checked: u64,
    /// Digests that were compared and found equal.
    pub digests_checked: u64,
    /// Position of the last digest that agreed.
    pub last_agreed: Option<u64>,
    /// Why the log ended, if it did.
    pub end: Option<EndReason>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Report { start, position, outputs_checked, digests_checked, entries, .. } = self;
        write!(f, "replayed positions {start} to {position}: {outputs_checked} outputs and ")?;
        write!(f, "{digests_checked} state digests are as recorded ({entries})")
    }
}

/// Why a replay stopped early.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// It differs from what was recorded.
    #[error(transparent)]
    Divergence(#[from] Divergence),
    /// The log cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplayOptions {
    /// Outputs with their notes. Off for a log that has no notes: outputs are handed out unseen then.
    pub check_outputs: bool,
    /// The machine's state with recorded digests.
    pub check_digests: bool,
}

impl Default for ReplayOptions {
    fn default() -> Self {
        Self { check_outputs: true, check_digests: true }
    }
}

/// Drives a machine through a log.
#[derive(Debug)]
pub struct Replayer {
    options: ReplayOptions,
    /// Made by the machine and not compared yet.
    made: VecDeque<(u64, Output)>,
    /// Read from the log, but beyond where the last run stopped.
    held: Option<Entry>,
    diverged: Option<Divergence>,
    report: Report,
}

impl Replayer {
    /// A replayer for a machine that stands at position `start`.
    pub fn new(start: u64, options: ReplayOptions) -> Self {
        let report = Report {
            entries: LogStats::default(),
            start,
            position: start,
            outputs_checked: 0,
            digests_checked: 0,
            last_agreed: None,
            end: None,
        };
        Self { options, made: VecDeque::new(), held: None, diverged: None, report }
    }

    /// Runs the machine to the position of `entry` and does what it says. `outputs` is given what the machine made, as soon
    /// as it was compared.
    ///
    /// # Errors
    /// If the machine differs from what was recorded, or `entry` follows the end entry or lies before where the machine stands.
    /// Every later call gives the same error.
    pub fn step<M: Replayable>(
        &mut self,
        machine: &mut M,
        entry: Entry,
        outputs: &mut impl FnMut(u64, Output),
    ) -> Result<(), Divergence> {
        self.check_not_diverged()?;
        let result = self.check_order(&entry).and_then(|()| self.follow(machine, entry, outputs));
        self.remember(result)
    }

    /// Replays the entries that `next` gives until it gives `None`, or the end entry was done, or the machine stands at `until`
    /// with all entries of that position done. Can be called again to go on.
    ///
    /// # Errors
    /// If the machine differs from what was recorded, or `next` fails.
    pub fn run<M: Replayable>(
        &mut self,
        machine: &mut M,
        until: Option<u64>,
        mut next: impl FnMut() -> Result<Option<Entry>, ReadError>,
        mut outputs: impl FnMut(u64, Output),
    ) -> Result<Report, ReplayError> {
        while self.report.end.is_none() {
            let entry = match self.held.take() {
                Some(entry) => entry,
                None => match next()? {
                    Some(entry) => entry,
                    None => break,
                },
            };
            if let Some(until) = until.filter(|until| *until < entry.position) {
                self.held = Some(entry);
                self.run_on(machine, until, &mut outputs)?;
                break;
            }
            self.step(machine, entry, &mut outputs)?;
        }
        Ok(self.report.clone())
    }

    /// Runs the machine without an entry, to a position before the next entry's. Does nothing if it is there already.
    fn run_on<M: Replayable>(
        &mut self,
        machine: &mut M,
        position: u64,
        outputs: &mut impl FnMut(u64, Output),
    ) -> Result<(), Divergence> {
        self.check_not_diverged()?;
        if position <= self.report.position {
            return Ok(());
        }
        let result = self.run_machine(machine, position, outputs);
        self.remember(result)
    }

    fn check_not_diverged(&self) -> Result<(), Divergence> {
        self.diverged.clone().map_or(Ok(()), Err)
    }

    /// A decoder sees to this as well, but it may not know where the machine started.
    fn check_order(&self, entry: &Entry) -> Result<(), Divergence> {
        let position = self.report.position;
        if self.report.end.is_none() && entry.position >= position {
            return Ok(());
        }
        let found = format!("the machine stands at {position}{}", if self.report.end.is_some() { ", the log's end" } else { "" });
        let expected = format!("a {} entry at {}", entry.event.kind(), entry.position);
        Err(self.divergence(entry.position.min(position), Difference::LogOrder, expected, found))
    }

    fn remember(&mut self, result: Result<(), Divergence>) -> Result<(), Divergence> {
        self.diverged = result.clone().err();
        result
    }

    fn follow<M: Replayable>(
        &mut self,
        machine: &mut M,
        entry: Entry,
        outputs: &mut impl FnMut(u64, Output),
    ) -> Result<(), Divergence> {
        let length = encoded_length(&entry);
        let (position, kind) = (entry.position, entry.event.kind());
        self.run_machine(machine, position, outputs)?;
        if let Event::Output(note) = &entry.event {
            self.compare_output(position, note, outputs)?;
        } else {
            // Outputs of this very position may be noted after an input of the same position.
            let ended = matches!(entry.event, Event::End { .. });
            self.expect_no_output_before(if ended { u64::MAX } else { position })?;
        }
        match entry.event {
            Event::Input(input) => {
                let given = format!("{} given", kind.name());
                machine.input(input).map_err(|why| self.divergence(position, Difference::Input, given, why))?;
                self.collect(machine, outputs);
            }
            Event::Digest(recorded) => self.compare_digest(machine, position, &recorded)?,
            Event::End { reason } => self.report.end = Some(reason),
            Event::Output(_) | Event::Progress => {}
        }
        self.report.entries.count(kind, length);
        Ok(())
    }

    fn run_machine<M: Replayable>(
        &mut self,
        machine: &mut M,
        position: u64,
        outputs: &mut impl FnMut(u64, Output),
    ) -> Result<(), Divergence> {
        let outcome = machine.run_to(position);
        let reached = machine.position();
        assert!(reached <= position, "a machine ran past the position it was asked to run to");
        self.collect(machine, outputs);
        self.report.position = reached;
        if reached == position {
            return Ok(());
        }
        let found = match outcome {
            RunOutcome::Reached => unreachable!("a machine that stands at {reached} did not reach {position}"),
            RunOutcome::Waiting => format!("it is halted at {reached} and waits for an input"),
            RunOutcome::Stopped(why) | RunOutcome::HostFailure(why) => format!("it stopped at {reached}: {why}"),
        };
        Err(self.divergence(reached, Difference::Position, format!("it ran to {position}"), found))
    }

    /// Takes the machine's outputs.
    fn collect<M: Replayable>(&mut self, machine: &mut M, outputs: &mut impl FnMut(u64, Output)) {
        let made = machine.take_outputs();
        if self.options.check_outputs {
            self.made.extend(made);
        } else {
            made.into_iter().for_each(|(position, output)| outputs(position, output));
        }
    }

    fn compare_output(
        &mut self,
        position: u64,
        recorded: &OutputNote,
        outputs: &mut impl FnMut(u64, Output),
    ) -> Result<(), Divergence> {
        if !self.options.check_outputs {
            return Ok(());
        }
        let expected = format!("{recorded} at {position}");
        let Some((made_at, output)) = self.made.pop_front() else {
            return Err(self.divergence(position, Difference::OutputMissing, expected, "none".to_owned()));
        };
        let made = OutputNote::of(&output);
        let what = if made_at != position {
            Difference::OutputPosition
        } else if made.port != recorded.port {
            Difference::OutputPort
        } else if made.length != recorded.length {
            Difference::OutputLength
        } else if made.digest != recorded.digest {
            Difference::OutputBytes
        } else {
            self.report.outputs_checked += 1;
            outputs(position, output);
            return Ok(());
        };
        Err(self.divergence(position.min(made_at), what, expected, format!("{made} at {made_at}")))
    }

    fn expect_no_output_before(&self, position: u64) -> Result<(), Divergence> {
        match self.made.front() {
            Some((made_at, output)) if *made_at < position => {
                let found = format!("{} at {made_at}", OutputNote::of(output));
                Err(self.divergence(*made_at, Difference::OutputExtra, "none".to_owned(), found))
            }
            _ => Ok(()),
        }
    }

    fn compare_digest<M: Replayable>(&mut self, machine: &mut M, position: u64, recorded: &[u8]) -> Result<(), Divergence> {
        if !self.options.check_digests {
            return Ok(());
        }
        let ours = machine.digest();
        if ours != recorded {
            let found = machine.explain(&ours, recorded);
            return Err(self.divergence(position, Difference::State, "another state".to_owned(), found));
        }
        self.report.digests_checked += 1;
        self.report.last_agreed = Some(position);
        Ok(())
    }

    fn divergence(&self, position: u64, what: Difference, expected: String, found: String) -> Divergence {
        let entry = self.report.entries.total().entries;
        Divergence { position, entry, what, expected, found, last_agreed: self.report.last_agreed }
    }

    /// What it did so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Outputs that the machine made and no entry spoke of, so that they were not handed out. When a log ends in a crash and the
    /// machine goes live, these leave first.
    pub fn take_unchecked_outputs(&mut self) -> Vec<(u64, Output)> {
        std::mem::take(&mut self.made).into()
    }
}
