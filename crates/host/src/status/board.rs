//! Where the figures of a VM's process can be read: a slot that the protocol's thread publishes into, and counters.
//!
//! *In*: copies of figures, a few times a second; counts from whoever does what is counted. *Out*: a [`Status`]. *Invariant*: the slot is held for the copying
//! of some hundred bytes and never longer, so nobody is kept waiting by who reads.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinstep_log::EntryKind;
use twinstep_migrate::Progress;

use super::{Commit, CopyProgress, Counts, Lag, LogRate, Status};
use crate::events::{now_ns, unix_ms};
use crate::vm::live::Outlet;

/// Kinds of log entries, and a place for those of later versions.
pub const KINDS: usize = EntryKind::ALL.len() + 1;

/// What a protocol's thread publishes. Times are moments on the host's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// See [`Status::state`].
    pub state: &'static str,
    /// The epoch.
    pub epoch: Option<u64>,
    /// When the other side was last heard, while there is a connection.
    pub heard_ns: Option<u64>,
    /// Why the guest is held back, if it is.
    pub throttle: Option<&'static str>,
    /// Instructions to replay.
    pub lag_instructions: u64,
    /// Since when the oldest record waits to be acknowledged.
    pub unreceived_since_ns: Option<u64>,
    /// Since when the oldest record waits to be replayed.
    pub unreplayed_since_ns: Option<u64>,
    /// Log bytes that are not acknowledged.
    pub unreceived_bytes: u64,
    /// Log bytes that are not replayed.
    pub unreplayed_bytes: u64,
    /// Outputs held.
    pub held: u64,
    /// Commit latency.
    pub commit: Commit,
    /// The log, by kind: [`EntryKind::ALL`], and what is unknown.
    pub log: [LogRate; KINDS],
}

impl Figures {
    /// Those of a VM without another side.
    pub fn alone(state: &'static str, epoch: Option<u64>) -> Self {
        Self {
            state,
            epoch,
            heard_ns: None,
            throttle: None,
            lag_instructions: 0,
            unreceived_since_ns: None,
            unreplayed_since_ns: None,
            unreceived_bytes: 0,
            unreplayed_bytes: 0,
            held: 0,
            commit: Commit::default(),
            log: [LogRate::default(); KINDS],
        }
    }
}

#[derive(Debug)]
struct Slot {
    vm: Option<String>,
    peer: Option<String>,
    copy: Option<Progress>,
    figures: Figures,
}

#[derive(Debug)]
struct Shared {
    slot: Mutex<Slot>,
    released: AtomicU64,
    failovers: AtomicU64,
    resyncs: AtomicU64,
    throttled: AtomicU64,
}

/// One for each VM process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Board(Arc<Shared>);

impl Board {
    /// A VM that stands like this, and has nobody on the other side so far.
    pub fn new(state: &'static str) -> Self {
        Self(Arc::new(Shared {
            slot: Mutex::new(Slot { vm: None, peer: None, copy: None, figures: Figures::alone(state, None) }),
            released: AtomicU64::new(0),
            failovers: AtomicU64::new(0),
            resyncs: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
        }))
    }
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.0.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which VM this is.
    pub fn set_vm(&self, vm: impl ToString) {
        self.slot().vm = Some(vm.to_string());
    }
    /// Where the other side is, or that there is none.
    pub fn set_peer(&self, peer: Option<String>) {
        self.slot().peer = peer;
    }
    /// How far the copy to a standby is, while there is one.
    pub fn set_copy(&self, copy: Option<Progress>) {
        self.slot().copy = copy;
    }
    /// Replaces the figures.
    pub fn publish(&self, figures: Figures) {
        self.slot().figures = figures;
    }
    /// This process took the VM over and runs it alone in `epoch`.
    pub fn took_over(&self, epoch: u64) {
        self.0.failovers.fetch_add(1, Ordering::Relaxed);
        let mut slot = self.slot();
        slot.peer = None;
        slot.figures = Figures::alone("unprotected", Some(epoch));
    }
    /// This standby waits for the next primary.
    pub fn waits_again(&self) {
        let mut slot = self.slot();
        (slot.vm, slot.peer) = (None, None);
        slot.figures = Figures::alone("listening", None);
    }
    /// The secondary's machine is the primary's again.
    pub fn resynced(&self) {
        self.0.resyncs.fetch_add(1, Ordering::Relaxed);
    }
    /// The guest is held back from now on.
    pub fn throttled(&self) {
        self.0.throttled.fetch_add(1, Ordering::Relaxed);
    }
    /// The same outlet, with what leaves by it counted.
    pub fn counting(&self, mut outlet: Outlet) -> Outlet {
        let shared = self.0.clone();
        Box::new(move |output| {
            outlet(output);
            shared.released.fetch_add(1, Ordering::Relaxed);
        })
    }

    /// What is to be said now of the VM with this name, on this side.
    pub fn report(&self, name: &str, side: &str) -> Status {
        let (vm, peer, copy, f) = {
            let slot = self.slot();
            (slot.vm.clone(), slot.peer.clone(), slot.copy, slot.figures)
        };
        let now = now_ns();
        let age = |since: Option<u64>| since.map_or(0, |since| now.saturating_sub(since));
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let kinds = EntryKind::ALL.iter().map(|kind| kind.name()).chain(["unknown"]);
        Status {
            name: name.to_owned(),
            pid: std::process::id(),
            side: side.to_owned(),
            state: f.state.to_owned(),
            epoch: f.epoch,
            vm,
            heartbeat_age_ns: peer.as_ref().and(f.heard_ns).map(|heard| now.saturating_sub(heard)),
            peer,
            throttled: f.throttle.is_some(),
            throttle_reason: f.throttle.map(str::to_owned),
            lag: Lag {
                instructions: f.lag_instructions,
                received_ns: age(f.unreceived_since_ns),
                replayed_ns: age(f.unreplayed_since_ns),
                unreceived_bytes: f.unreceived_bytes,
                unreplayed_bytes: f.unreplayed_bytes,
            },
            log: kinds.zip(f.log).filter(|(_, rate)| rate.entries > 0).map(|(kind, rate)| (kind.to_owned(), rate)).collect(),
            copy: copy.map(CopyProgress::from),
            held: f.held,
            commit: f.commit,
            counts: Counts {
                outputs_released: count(&self.0.released),
                failovers: count(&self.0.failovers),
                resyncs: count(&self.0.resyncs),
                throttled: count(&self.0.throttled),
            },
            at_ns: now,
            unix_ms: unix_ms(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinstep_machine::Output;

    #[test]
    fn what_is_published_can_be_read_and_ages() {
        let board = Board::new("listening");
        let empty = board.report("db", "standby");
        assert_eq!((empty.name.as_str(), empty.side.as_str(), empty.state.as_str()), ("db", "standby", "listening"));
        assert_eq!((empty.epoch, empty.vm, empty.peer, empty.heartbeat_age_ns), (None, None, None, None));
        assert_eq!((empty.lag, empty.counts), (Lag::default(), Counts::default()));
        assert!(empty.log.is_empty());

        board.set_vm("cafe");
        board.set_peer(Some("127.0.0.1:1".into()));
        let now = now_ns();
        let mut figures = Figures {
            heard_ns: Some(now - 1_000),
            throttle: Some("too many outputs are held"),
            unreplayed_since_ns: Some(now - 2_000),
            // A moment that is not over yet is no age.
            unreceived_since_ns: Some(u64::MAX),
            ..Figures::alone("protected", Some(3))
        };
        figures.log[0] = LogRate { entries: 2, bytes: 40, ..LogRate::default() };
        figures.log[KINDS - 1].entries = 1;
        board.publish(figures);
        let full = board.report("db", "primary");
        assert_eq!((full.epoch, full.vm.as_deref(), full.peer.as_deref()), (Some(3), Some("cafe"), Some("127.0.0.1:1")));
        assert!(full.heartbeat_age_ns.unwrap() >= 1_000 && full.lag.replayed_ns >= 2_000 && full.lag.received_ns == 0);
        assert_eq!((full.throttled, full.throttle_reason.as_deref()), (true, Some("too many outputs are held")));
        assert_eq!(full.log.keys().collect::<Vec<_>>(), ["clock", "unknown"]);
        // All of it survives the wire.
        let line = serde_json::to_string(&full).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&line).unwrap(), full);
        // What a later build adds, and an earlier one leaves out, is no reason to fail.
        let other: Status = serde_json::from_str("{\"name\":\"db\",\"new\":1}").unwrap();
        assert_eq!((other.name.as_str(), other.held), ("db", 0));
    }

    #[test]
    fn what_happens_is_counted() {
        let board = Board::new("unprotected");
        let (left, arrived) = std::sync::mpsc::channel();
        let mut outlet = board.counting(Box::new(move |output| left.send(output).unwrap()));
        outlet(Output::Serial(vec![1]));
        outlet(Output::Serial(vec![2]));
        board.throttled();
        board.set_peer(Some("there".into()));
        board.took_over(2);
        board.resynced();
        let status = board.report("db", "survivor");
        assert_eq!(status.counts, Counts { outputs_released: 2, failovers: 1, resyncs: 1, throttled: 1 });
        assert_eq!((status.state.as_str(), status.epoch, status.peer), ("unprotected", Some(2), None));
        assert_eq!(arrived.try_iter().count(), 2);
    }
}
