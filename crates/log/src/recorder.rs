//! The bookkeeping of whoever records: a file, or the logging channel of a protected pair.
//!
//! **In:** inputs as they are given to the machine, outputs as they are taken from it, its digest when one is due.
//! **Out:** entries in the order of the log. **Invariant:** positions never go back, and nothing follows the end.
//!
//! How to use it: run the machine no further than [`Recorder::next_digest`]; then note the outputs it made, the digest if it is
//! due, the inputs given to it, in this order.
use crate::codec::encoded_length;
use crate::entry::{EndReason, Entry, Event, OutputNote};
use crate::stats::LogStats;
use twinstep_machine::door::{Input, Output};

/// Something was noted that cannot come here in a log: a mistake of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It happened before the entry noted last.
    #[error("cannot log position {position} after position {last}: it was noted too late")]
    Backwards {
        /// Position of the last entry.
        last: u64,
        /// Position of the one refused.
        position: u64,
    },
    /// The log has ended.
    #[error("cannot log position {position}: the log has ended")]
    Ended {
        /// Position of the one refused.
        position: u64,
    },
}

/// Turns what happens to a machine into entries.
#[derive(Debug, Clone)]
pub struct Recorder {
    position: u64,
    /// Positions from one digest to the next; 0 for none.
    digest_interval: u64,
    /// Where the last digest was noted.
    digested: Option<u64>,
    ended: bool,
    stats: LogStats,
}

impl Recorder {
    /// A recorder for a machine that stands at position `start`. A digest is due at every multiple of `digest_interval`
    /// positions after `start`; with 0, never.
    pub fn new(start: u64, digest_interval: u64) -> Self {
        Self { position: start, digest_interval, digested: None, ended: false, stats: LogStats::default() }
    }

    /// The first position after the last entry at which a digest is due. The machine must be stopped there exactly, so that
    /// digests of two runs can be compared wherever their runs were cut into slices. `None` if there is none before the
    /// end of time.
    pub fn next_digest(&self) -> Option<u64> {
        let passed = self.position.checked_div(self.digest_interval)?;
        (passed + 1).checked_mul(self.digest_interval)
    }

    /// Whether a digest is due of a machine that stands at `position`: once at each multiple of the interval.
    pub fn digest_due(&self, position: u64) -> bool {
        let multiple = position != 0 && position.checked_rem(self.digest_interval) == Some(0);
        multiple && self.digested != Some(position)
    }

    /// An input is given to the machine.
    pub fn input(&mut self, position: u64, input: Input) -> Result<Entry, RecordError> {
        self.note(position, Event::Input(input))
    }

    /// The machine made an output at `position`.
    pub fn output(&mut self, position: u64, output: &Output) -> Result<Entry, RecordError> {
        self.note(position, Event::Output(OutputNote::of(output)))
    }

    /// The machine's digest.
    pub fn digest(&mut self, position: u64, digest: Vec<u8>) -> Result<Entry, RecordError> {
        let entry = self.note(position, Event::Digest(digest))?;
        self.digested = Some(position);
        Ok(entry)
    }

    /// The machine has come to `position`; `None` if the log already says so.
    pub fn progress(&mut self, position: u64) -> Result<Option<Entry>, RecordError> {
        if position == self.position && !self.ended {
            return Ok(None);
        }
        self.note(position, Event::Progress).map(Some)
    }

    /// The log is complete.
    pub fn end(&mut self, position: u64, reason: EndReason) -> Result<Entry, RecordError> {
        let entry = self.note(position, Event::End { reason })?;
        self.ended = true;
        Ok(entry)
    }

    fn note(&mut self, position: u64, event: Event) -> Result<Entry, RecordError> {
        if self.ended {
            return Err(RecordError::Ended { position });
        }
        if position < self.position {
            return Err(RecordError::Backwards { last: self.position, position });
        }
        self.position = position;
        let entry = Entry { position, event };
        self.stats.count(entry.event.kind(), encoded_length(&entry));
        Ok(entry)
    }

    /// Position of the last entry, or where the machine started.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// What was noted so far.
    pub fn stats(&self) -> &LogStats {
        &self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_due_at_multiples() {
        let mut recorder = Recorder::new(250, 100);
        assert_eq!(recorder.next_digest(), Some(300));
        assert!(!recorder.digest_due(299) && recorder.digest_due(300));
        recorder.digest(300, vec![1]).unwrap();
        assert!(!recorder.digest_due(300), "a halted machine stays where it is");
        assert_eq!(recorder.next_digest(), Some(400));
        assert_eq!(Recorder::new(250, 0).next_digest(), None);
        assert!(!Recorder::new(0, 0).digest_due(0) && !Recorder::new(0, 5).digest_due(0));
        assert_eq!(Recorder::new(u64::MAX, 2).next_digest(), None);
    }

    #[test]
    fn order_is_kept() {
        let mut recorder = Recorder::new(10, 0);
        assert_eq!(recorder.progress(10), Ok(None));
        assert!(recorder.progress(11).unwrap().is_some());
        recorder.output(12, &Output::Serial(vec![1])).unwrap();
        recorder.input(12, Input::PowerButton).unwrap();
        assert_eq!(recorder.input(11, Input::PowerButton), Err(RecordError::Backwards { last: 12, position: 11 }));
        recorder.end(13, EndReason::PowerOff).unwrap();
        assert_eq!(recorder.progress(14), Err(RecordError::Ended { position: 14 }));
        assert_eq!(recorder.progress(13), Err(RecordError::Ended { position: 13 }));
        assert_eq!(recorder.stats().total().entries, 4);
        assert_eq!(recorder.position(), 13);
    }
}
