//! The log on its way: records that are not sent, not acknowledged or not replayed yet, and what they amount to.
//!
//! In: records, acknowledgements. Out: batches to send, figures for the throttle. Invariant:
//! `replayed <= received <= sent <= appended`; the byte counts are exactly those of the records in between.

use std::collections::VecDeque;

use crate::types::{Nanos, Record, Seq};
use crate::wire::{Ack, LOG_BATCH_BYTES, MAX_RECORD_BYTES, RECORD_HEAD_BYTES};

/// The records since the image's cut.
#[derive(Debug, Clone, Default)]
pub(super) struct Backlog {
    appended: Seq,
    received: Seq,
    replayed: Seq,
    replayed_position: u64,
    last_position: u64,
    unacked_bytes: u64,
    unreplayed_bytes: u64,
    /// What each of the records `replayed + 1 ..= appended` costs, and when it was appended.
    entries: VecDeque<(u64, Nanos)>,
    /// The last of them, which are not sent yet.
    pending: Vec<Record>,
    pending_bytes: usize,
}

impl Backlog {
    /// Begins at the image's cut.
    pub(super) fn new(position: u64) -> Backlog {
        Backlog { replayed_position: position, last_position: position, ..Backlog::default() }
    }

    /// Appends a record and numbers it.
    pub(super) fn append(&mut self, now: Nanos, record: Record) -> Seq {
        assert!(record.bytes.len() <= MAX_RECORD_BYTES, "a record of {} bytes can't be sent", record.bytes.len());
        assert!(
            record.position >= self.last_position,
            "the log goes forward: record at position {} after one at {}",
            record.position,
            self.last_position
        );
        let cost_bytes = record.cost_bytes();
        self.last_position = record.position;
        self.unacked_bytes += cost_bytes;
        self.unreplayed_bytes += cost_bytes;
        self.entries.push_back((cost_bytes, now));
        self.pending_bytes += RECORD_HEAD_BYTES + record.bytes.len();
        self.pending.push(record);
        self.appended += 1;
        self.appended
    }

    /// Whether enough is pending to be sent without waiting for more.
    pub(super) fn batch_full(&self) -> bool {
        self.pending_bytes >= LOG_BATCH_BYTES
    }

    /// Whether there is something to be sent.
    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes what is pending, with the number of the first record.
    pub(super) fn take_batch(&mut self) -> Option<(Seq, Vec<Record>)> {
        if self.pending.is_empty() {
            return None;
        }
        let records = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        Some((self.appended - records.len() as u64 + 1, records))
    }

    /// Takes an acknowledgement in; an impossible one is the peer's fault. Tells whether it brought anything new.
    pub(super) fn acknowledge(&mut self, ack: &Ack) -> Result<bool, &'static str> {
        if ack.received_seq > self.sent() {
            return Err("it acknowledges records that were not sent");
        }
        if ack.received_seq < self.received || ack.replayed_seq < self.replayed {
            return Err("it takes back an acknowledgement");
        }
        if ack.replayed_seq > ack.received_seq {
            return Err("it says that it has replayed what it has not received");
        }
        let news = ack.received_seq > self.received
            || ack.replayed_seq > self.replayed
            || ack.replayed_position > self.replayed_position;
        for seq in self.received + 1..=ack.received_seq {
            self.unacked_bytes -= self.entries[(seq - self.replayed - 1) as usize].0;
        }
        self.received = ack.received_seq;
        while self.replayed < ack.replayed_seq {
            let (cost_bytes, _) = self.entries.pop_front().expect("there is one for each record that is not replayed");
            self.unreplayed_bytes -= cost_bytes;
            self.replayed += 1;
        }
        self.replayed_position = self.replayed_position.max(ack.replayed_position);
        assert_eq!(self.entries.len() as u64, self.appended - self.replayed);
        assert!(self.unacked_bytes <= self.unreplayed_bytes);
        Ok(news)
    }

    /// The secondary was made equal to the primary at `position`, which may be before where it stood.
    pub(super) fn stands_at(&mut self, position: u64) {
        self.replayed_position = position;
    }

    /// Whether the secondary has replayed all there is.
    pub(super) fn is_replayed(&self) -> bool {
        self.entries.is_empty()
    }

    /// The newest record that is sent.
    pub(super) fn sent(&self) -> Seq {
        self.appended - self.pending.len() as u64
    }

    /// The position of the newest record, or of the cut.
    pub(super) fn last_position(&self) -> u64 {
        self.last_position
    }

    /// The newest record.
    pub(super) fn appended(&self) -> Seq {
        self.appended
    }

    /// The newest record that the secondary has replayed.
    pub(super) fn replayed(&self) -> Seq {
        self.replayed
    }

    /// The newest record that the secondary has.
    pub(super) fn received(&self) -> Seq {
        self.received
    }

    /// Bytes not acknowledged as received.
    pub(super) fn unacked_bytes(&self) -> u64 {
        self.unacked_bytes
    }

    /// Bytes not replayed.
    pub(super) fn unreplayed_bytes(&self) -> u64 {
        self.unreplayed_bytes
    }

    /// How long the primary took for what the secondary still has to replay.
    pub(super) fn lag_time(&self) -> Nanos {
        match (self.entries.front(), self.entries.back()) {
            (Some((_, first)), Some((_, last))) => last.since(*first),
            _ => Nanos(0),
        }
    }

    /// How many instructions the secondary still has to replay in order to consume the log.
    ///
    /// Measured to the newest record and not to where the primary is now, since the secondary can't go further than that.
    pub(super) fn lag_instructions(&self) -> u64 {
        if self.entries.is_empty() { 0 } else { self.last_position.saturating_sub(self.replayed_position) }
    }
}
