//! When records came that are still on their way, so that lag has an age.
//!
//! *In*: the newest record's number, now and then; how far the other side is. *Out*: the moment since which the oldest record beyond that waits.
//! *Invariant*: bounded; when it is full, ages are told too long rather than too short.
use std::collections::VecDeque;

use twinstep_pair::Seq;

/// Marks that are kept: one for each time the log was looked at, while records wait.
const MAX_MARKS: usize = 8192;

#[derive(Debug, Clone, Copy)]
struct Mark {
    /// The newest record of the batch.
    last: Seq,
    /// When the batch was there.
    at_ns: u64,
    /// What its records cost.
    bytes: u64,
}

/// Batches of records, oldest first.
#[derive(Debug, Default)]
pub struct Trail {
    marks: VecDeque<Mark>,
    newest: Seq,
    bytes: u64,
}

impl Trail {
    /// The newest record is `last` now, and those since the one before have so many bytes. A number that goes back begins another log.
    pub fn grew(&mut self, last: Seq, bytes: u64, now_ns: u64) {
        if last < self.newest {
            *self = Self::default();
        }
        if last == self.newest {
            return;
        }
        self.newest = last;
        self.bytes += bytes;
        let full = self.marks.len() >= MAX_MARKS;
        match self.marks.back_mut().filter(|_| full) {
            Some(mark) => {
                mark.last = last;
                mark.bytes += bytes;
            }
            None => self.marks.push_back(Mark { last, at_ns: now_ns, bytes }),
        }
    }
    /// All up to `seq` are done.
    pub fn done(&mut self, seq: Seq) {
        while let Some(mark) = self.marks.front()
            && mark.last <= seq
        {
            self.bytes -= mark.bytes;
            self.marks.pop_front();
        }
    }
    /// When the first record after `seq` was there; none if there is none.
    pub fn since(&self, seq: Seq) -> Option<u64> {
        self.marks.get(self.marks.partition_point(|mark| mark.last <= seq)).map(|mark| mark.at_ns)
    }
    /// Bytes of batches that are not wholly done.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_that_waits() {
        let mut trail = Trail::default();
        assert_eq!((trail.since(0), trail.bytes()), (None, 0));
        for (last, now) in [(3, 10), (3, 11), (5, 20), (9, 30)] {
            trail.grew(last, 100, now);
        }
        let since = |trail: &Trail| [0, 2, 3, 4, 5, 8, 9].map(|seq| trail.since(seq));
        assert_eq!(since(&trail), [Some(10), Some(10), Some(20), Some(20), Some(30), Some(30), None]);
        assert_eq!(trail.bytes(), 300);
        trail.done(4);
        assert_eq!((trail.since(4), trail.bytes()), (Some(20), 200));
        trail.done(9);
        assert_eq!((trail.since(9), trail.bytes()), (None, 0));
        // Another log.
        trail.grew(20, 1, 40);
        trail.grew(1, 7, 50);
        assert_eq!((trail.since(0), trail.since(1), trail.bytes()), (Some(50), None, 7));
        trail.grew(0, 0, 60);
        assert_eq!((trail.since(0), trail.bytes()), (None, 0));
    }

    #[test]
    fn it_is_bounded() {
        let mut trail = Trail::default();
        for n in 1..=3 * MAX_MARKS as u64 {
            trail.grew(n, 1, n);
        }
        assert_eq!((trail.marks.len(), trail.bytes()), (MAX_MARKS, 3 * MAX_MARKS as u64));
        // What was merged counts as old as the first of it.
        assert_eq!(trail.since(3 * MAX_MARKS as u64 - 1), Some(MAX_MARKS as u64));
        trail.done(3 * MAX_MARKS as u64);
        assert_eq!((trail.marks.len(), trail.bytes()), (0, 0));
    }
}
