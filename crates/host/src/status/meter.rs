//! The figures of one side, kept by the thread that drives its protocol.
//!
//! *In*: records, bytes from the other side, releases, and the protocol's own status. *Out*: [`Figures`], published about ten times a second and at each change
//! of state or of whether the guest is held back. *Invariant*: nothing here waits, and nothing grows with the length of a run.
use std::time::Duration;

use twinstep_log::EntryKind;
use twinstep_pair::wire::record_bytes;
use twinstep_pair::{Nanos, PrimaryStatus, Record, SecondaryStatus};

use super::LogRate;
use super::board::{Board, Figures, KINDS};
use super::latency::Latency;
use super::trail::Trail;

/// Time between two publications.
const PUBLISH_NS: u64 = 100_000_000;
/// The time that rates are of.
const RATE_NS: u64 = 1_000_000_000;

/// What was published last, as far as a change of it is told at once.
#[derive(Debug, Clone, Copy)]
struct Published {
    at_ns: u64,
    state: &'static str,
    throttle: Option<&'static str>,
}

/// Keeps the figures of a side.
#[derive(Debug)]
pub struct Meter {
    board: Board,
    log: [LogRate; KINDS],
    /// Of the last record.
    position: u64,
    /// The log when the span of the rates began.
    before: [LogRate; KINDS],
    before_ns: u64,
    latency: Latency,
    trail: Trail,
    /// Bytes of records that the trail does not know yet.
    fresh_bytes: u64,
    heard_ns: Option<u64>,
    throttle: Option<&'static str>,
    published: Option<Published>,
}

impl Meter {
    /// One that publishes on this board.
    pub fn new(board: Board, now_ns: u64) -> Self {
        Self {
            board,
            log: [LogRate::default(); KINDS],
            position: 0,
            before: [LogRate::default(); KINDS],
            before_ns: now_ns,
            latency: Latency::default(),
            trail: Trail::default(),
            fresh_bytes: 0,
            heard_ns: None,
            throttle: None,
            published: None,
        }
    }
    /// A record of the log. Gives the bytes it takes on the channel.
    pub fn record(&mut self, record: &Record) -> u64 {
        let bytes = record_bytes(self.position, record) as u64;
        self.position = record.position;
        let kind = EntryKind::ALL.iter().position(|kind| kind.number() == record.kind).unwrap_or(KINDS - 1);
        self.log[kind].entries += 1;
        self.log[kind].bytes += bytes;
        self.fresh_bytes += record.cost_bytes();
        bytes
    }
    /// The other side was heard.
    pub fn heard(&mut self, now_ns: u64) {
        self.heard_ns = Some(now_ns);
    }
    /// The other side is gone.
    pub fn lost(&mut self) {
        self.heard_ns = None;
        self.board.set_peer(None);
    }
    /// The guest is held back for this reason, or is not.
    pub fn throttle(&mut self, reason: Option<&'static str>) {
        if reason.is_some() {
            self.board.throttled();
        }
        self.throttle = reason;
    }
    /// An output that had to be held left after so long.
    pub fn committed(&mut self, now_ns: u64, ns: u64) {
        self.latency.add(now_ns, ns);
    }
    /// How long its owner may sleep: the figures want to be fresh also when nothing happens.
    pub fn patience(&self, deadline: Option<Nanos>, now_ns: u64) -> Duration {
        let publish = self.published.map_or(0, |before| (before.at_ns + PUBLISH_NS).saturating_sub(now_ns));
        Duration::from_nanos(deadline.map_or(publish, |deadline| publish.min(deadline.since(Nanos(now_ns)).0)))
    }

    /// Takes a primary's status in, and publishes if it is time to.
    pub fn primary(&mut self, now_ns: u64, status: &PrimaryStatus) {
        let bytes = std::mem::take(&mut self.fresh_bytes);
        self.trail.grew(status.appended_seq, bytes, now_ns);
        self.trail.done(status.replayed_seq);
        if !self.due(now_ns, status.state.name()) {
            return;
        }
        let figures = Figures {
            lag_instructions: status.lag_instructions,
            unreceived_since_ns: self.trail.since(status.received_seq),
            unreplayed_since_ns: self.trail.since(status.replayed_seq),
            unreceived_bytes: status.unacked_bytes,
            unreplayed_bytes: status.unreplayed_bytes,
            held: status.held_outputs,
            ..self.figures(now_ns, status.state.name(), Some(status.epoch.0))
        };
        self.board.publish(figures);
    }
    /// Takes a secondary's status in, and publishes if it is time to.
    pub fn secondary(&mut self, now_ns: u64, status: &SecondaryStatus) {
        let bytes = std::mem::take(&mut self.fresh_bytes);
        self.trail.grew(status.received_seq, bytes, now_ns);
        self.trail.done(status.replayed_seq);
        if !self.due(now_ns, status.state.name()) {
            return;
        }
        let waits = status.received_seq > status.replayed_seq;
        let figures = Figures {
            // Without records there is nothing that it could replay: the primary is ahead, and it is not behind.
            lag_instructions: if waits { status.primary_position.saturating_sub(status.replayed_position) } else { 0 },
            unreplayed_since_ns: self.trail.since(status.replayed_seq),
            unreplayed_bytes: self.trail.bytes(),
            held: status.unconfirmed_outputs,
            ..self.figures(now_ns, status.state.name(), status.epoch.map(|epoch| epoch.0))
        };
        self.board.publish(figures);
    }

    fn due(&mut self, now_ns: u64, state: &'static str) -> bool {
        let throttle = self.throttle;
        let same = |before: Published| before.state == state && before.throttle == throttle;
        let due = self.published.is_none_or(|before| !same(before) || now_ns >= before.at_ns + PUBLISH_NS);
        if due {
            self.published = Some(Published { at_ns: now_ns, state, throttle });
        }
        due
    }

    /// What both sides have.
    fn figures(&mut self, now_ns: u64, state: &'static str, epoch: Option<u64>) -> Figures {
        let span_ns = now_ns.saturating_sub(self.before_ns);
        if span_ns >= RATE_NS {
            for (now, before) in self.log.iter_mut().zip(&self.before) {
                let per_s = |now: u64, before: u64| (now - before) as f64 * 1e9 / span_ns as f64;
                now.entries_per_s = per_s(now.entries, before.entries);
                now.bytes_per_s = per_s(now.bytes, before.bytes);
            }
            (self.before, self.before_ns) = (self.log, now_ns);
        }
        Figures {
            heard_ns: self.heard_ns,
            throttle: self.throttle,
            commit: super::Commit { minute: self.latency.minute(now_ns), total: self.latency.total() },
            log: self.log,
            ..Figures::alone(state, epoch)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinstep_pair::{Epoch, PrimaryState, SecondaryState};

    fn record(kind: EntryKind, bytes: usize) -> Record {
        Record { position: 0, kind: kind.number(), bytes: vec![0; bytes] }
    }

    fn primary(state: PrimaryState, appended: u64, received: u64, replayed: u64) -> PrimaryStatus {
        PrimaryStatus {
            matched: 0,
            resyncs: 0,
            state,
            epoch: Epoch(4),
            throttled: false,
            appended_seq: appended,
            received_seq: received,
            replayed_seq: replayed,
            unacked_bytes: 10 * (appended - received),
            unreplayed_bytes: 10 * (appended - replayed),
            lag_instructions: 77,
            lag_time: Nanos(78),
            held_outputs: 5,
            image_bytes: 0,
        }
    }

    #[test]
    fn a_primary_is_published_in_time_and_at_each_change() {
        let board = Board::new("unprotected");
        let mut meter = Meter::new(board.clone(), 0);
        let seen = |board: &Board| board.report("db", "primary");
        assert_eq!(meter.patience(None, 0), Duration::ZERO, "nothing is published yet");
        meter.primary(1, &primary(PrimaryState::Copying, 0, 0, 0));
        assert_eq!(seen(&board).state, "copying");
        assert_eq!(meter.patience(None, 1), Duration::from_nanos(PUBLISH_NS));
        assert_eq!(meter.patience(Some(Nanos(11)), 1), Duration::from_nanos(10));

        board.set_peer(Some("there".into()));
        meter.heard(2);
        meter.record(&record(EntryKind::Output, 30));
        meter.record(&record(EntryKind::Clock, 20));
        meter.record(&record(EntryKind::Clock, 20));
        meter.committed(3, 1_000_000);
        meter.primary(4, &primary(PrimaryState::Copying, 3, 2, 1));
        assert!(seen(&board).log.is_empty(), "it is not time yet");
        meter.throttle(Some("too many outputs are held"));
        meter.primary(4, &primary(PrimaryState::Copying, 3, 2, 1));
        assert_eq!((seen(&board).held, seen(&board).throttled), (5, true), "that the guest is held back is told at once");
        meter.primary(5, &primary(PrimaryState::Protected, 3, 2, 1));
        let status = seen(&board);
        assert_eq!((status.state.as_str(), status.epoch), ("protected", Some(4)), "another state is told at once");
        assert_eq!((status.lag.instructions, status.lag.unreceived_bytes, status.lag.unreplayed_bytes), (77, 10, 20));
        assert!(status.lag.replayed_ns > 0 && status.lag.received_ns > 0 && status.heartbeat_age_ns.is_some());
        assert_eq!((status.log["clock"].entries, status.log["clock"].bytes, status.log["output"].bytes), (2, 46, 33));
        assert_eq!((status.commit.total.count, status.commit.minute.max_ns), (1, 1_000_000));
        assert_eq!((status.counts.throttled, status.throttled), (1, true));

        // A second later there are rates, and all is replayed.
        meter.throttle(None);
        meter.primary(2 * RATE_NS, &primary(PrimaryState::Protected, 3, 3, 3));
        let status = seen(&board);
        assert_eq!((status.log["clock"].entries_per_s, status.log["clock"].bytes_per_s), (1.0, 23.0));
        assert_eq!((status.lag.replayed_ns, status.lag.received_ns, status.throttled), (0, 0, false));
        meter.lost();
        meter.primary(3 * RATE_NS, &primary(PrimaryState::Unprotected, 0, 0, 0));
        let status = seen(&board);
        assert_eq!((status.peer, status.heartbeat_age_ns, status.log["clock"].entries_per_s), (None, None, 0.0));
        assert_eq!((status.log["clock"].entries, status.counts.throttled), (2, 1));
    }

    #[test]
    fn a_secondary_is_behind_what_it_has() {
        let board = Board::new("listening");
        let mut meter = Meter::new(board.clone(), 0);
        let mut status = SecondaryStatus {
            state: SecondaryState::Following,
            epoch: Some(Epoch(1)),
            entitled: true,
            received_seq: 2,
            replayed_seq: 0,
            replayed_position: 100,
            primary_position: 350,
            unconfirmed_outputs: 3,
            image_bytes: 0,
        };
        (0..2).for_each(|_| _ = meter.record(&record(EntryKind::Serial, 5)));
        meter.secondary(1, &status);
        let seen = board.report("db", "standby");
        assert_eq!((seen.state.as_str(), seen.lag.instructions, seen.held), ("following", 250, 3));
        assert_eq!(seen.lag.unreplayed_bytes, 2 * record(EntryKind::Serial, 5).cost_bytes());
        assert!(seen.lag.replayed_ns > 0 && seen.lag.received_ns == 0);
        status.replayed_seq = 2;
        meter.secondary(1 + PUBLISH_NS, &status);
        let seen = board.report("db", "standby");
        assert_eq!((seen.lag.instructions, seen.lag.unreplayed_bytes, seen.lag.replayed_ns), (0, 0, 0));
    }
}
