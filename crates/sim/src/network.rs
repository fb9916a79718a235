//! The toy network: connections like TCP's. Bytes of one direction keep their order and are never damaged; they may be
//! late, arrive in pieces of any size, or stop at any byte because the connection was cut.
//!
//! In: bytes sent, cuts, partitions. Out: when what arrives where. Invariant: what a side receives is always a prefix of what
//! the other has sent.

use std::collections::VecDeque;

use twinstep_pair::Nanos;

use crate::profile::Profile;
use crate::random::Random;

/// One direction of a connection.
#[derive(Debug, Clone, Default)]
pub(crate) struct Direction {
    /// On their way, with the time of arrival.
    pub(crate) in_flight: VecDeque<(Nanos, Vec<u8>)>,
    last_due: Nanos,
    /// Nothing arrives before.
    blocked_until: Nanos,
    /// Nothing arrives any more after what is in flight; then the receiver learns of the end.
    pub(crate) closing: bool,
    /// Nothing arrives any more, and the receiver is not told.
    pub(crate) silent: bool,
    /// A delivery is in the world's queue already.
    pub(crate) planned: bool,
}

/// A connection between two sides.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    /// The primary's and the secondary's index.
    pub(crate) ends: [usize; 2],
    /// Towards the primary, towards the secondary.
    pub(crate) toward: [Direction; 2],
}

impl Connection {
    pub(crate) fn new(primary: usize, secondary: usize) -> Connection {
        Connection { ends: [primary, secondary], toward: [Direction::default(), Direction::default()] }
    }

    /// Which end a side is.
    pub(crate) fn end_of(&self, side: usize) -> usize {
        usize::from(self.ends[1] == side)
    }
}

impl Direction {
    /// Sends bytes.
    pub(crate) fn send(&mut self, now: Nanos, bytes: Vec<u8>, profile: &Profile, random: &mut Random) {
        if self.silent || self.closing {
            return;
        }
        let delay = random.between(profile.delay_min_ns, profile.delay_max_ns);
        let due = Nanos(now.0 + delay + bytes.len() as u64 * profile.ns_per_byte);
        self.last_due = self.last_due.max(due).max(self.blocked_until);
        self.in_flight.push_back((self.last_due, bytes));
    }

    /// When a delivery is to be planned, if none is.
    pub(crate) fn plan_next(&mut self, now: Nanos) -> Option<Nanos> {
        if self.planned {
            return None;
        }
        let (due, _) = self.in_flight.front()?;
        self.planned = true;
        Some((*due).max(now))
    }

    /// Whether nothing arrives now.
    pub(crate) fn is_blocked(&self, now: Nanos) -> bool {
        self.blocked_until > now
    }

    /// Nothing arrives until then.
    pub(crate) fn block(&mut self, until: Nanos) {
        self.blocked_until = self.blocked_until.max(until);
        for (due, _) in &mut self.in_flight {
            *due = (*due).max(until);
        }
    }

    /// The connection is reset: a random prefix of what is in flight arrives, then the end.
    pub(crate) fn cut(&mut self, now: Nanos, random: &mut Random) {
        let mut bytes: Vec<u8> = self.in_flight.drain(..).flat_map(|(_, bytes)| bytes).collect();
        bytes.truncate(random.between(0, bytes.len() as u64) as usize);
        self.finish(now, bytes, random);
    }

    /// The connection is closed properly: everything in flight arrives, then the end.
    pub(crate) fn close(&mut self, now: Nanos, random: &mut Random) {
        let bytes: Vec<u8> = self.in_flight.drain(..).flat_map(|(_, bytes)| bytes).collect();
        self.finish(now, bytes, random);
    }

    fn finish(&mut self, now: Nanos, bytes: Vec<u8>, random: &mut Random) {
        let due = Nanos(now.0 + random.between(1_000, 2_000_000)).max(self.blocked_until);
        self.in_flight.push_back((due, bytes));
        self.closing = true;
    }

    /// Takes what has arrived: all of it, or a piece.
    pub(crate) fn take(&mut self, now: Nanos, random: &mut Random) -> Option<Vec<u8>> {
        let (due, bytes) = self.in_flight.front_mut()?;
        if *due > now {
            return None;
        }
        if bytes.len() > 1 && random.percent(20) {
            let length = random.between(1, bytes.len() as u64 - 1) as usize;
            return Some(bytes.drain(..length).collect());
        }
        self.in_flight.pop_front().map(|(_, bytes)| bytes)
    }
}
