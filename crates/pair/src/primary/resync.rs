//! Outputs that differ: the secondary catches up while the guest runs, then the guest is stopped, the secondary is made equal, and what is held leaves only then.
//!
//! In: the secondary's words, the host's. Out: how much the guest is slowed, when it is stopped, the wish for a delta. Invariant: from the moment the guest is stopped until the secondary has
//! confirmed nothing is released; before, outputs leave by the rule. The guest is stopped once the secondary is close behind, or after [`PATIENCE`]: it is slowed more and more until then.
//!
//! Why the secondary has to catch up: what the guest has written since the secondary stood somewhere differs from it. At the same position only that differs which the fault has changed.

use super::{Image, Primary, PrimaryAction, PrimaryState};
use crate::bugs::Bug;
use crate::config::{Commit, OnMismatch};
use crate::notice::StopReason;
use crate::types::{Nanos, OutputId};
use crate::wire::{Ack, Message};

/// How much the guest is slowed, in hundredths of its time, from so long after the difference on. With [`Commit::Matched`] it begins with the last: whoever waits for an output
/// waits until the end, which then is nearer.
const SLOWED: [(Nanos, u8); 3] = [(Nanos(0), 50), (Nanos::from_millis(1_000), 75), (Nanos::from_millis(2_000), 90)];
/// So long after the difference the guest is stopped however far the secondary is behind, if only all else is prepared.
const PATIENCE: Nanos = Nanos::from_millis(4_000);

/// A resync under way.
#[derive(Debug, Clone)]
pub(super) struct Resync {
    /// Since when the guest runs in it.
    since: Nanos,
    slowed: u8,
    /// The host has done what can be done before the guest is stopped.
    prepared: bool,
    /// Where the guest stands still, once it does.
    stands_at: Option<u64>,
    /// The secondary has said all that it has changed.
    listed: bool,
}

impl Primary {
    /// Whether the secondary may go live.
    pub(super) fn has_rival(&self) -> bool {
        matches!(self.state, PrimaryState::Protected | PrimaryState::CatchingUp | PrimaryState::Resyncing)
    }

    /// Nothing more leaves with [`Commit::Matched`], since the secondary has matched all it can.
    pub(super) fn on_mismatch(&mut self, now: Nanos, output: OutputId, position: u64, detail: Vec<u8>) {
        if self.setup.config.on_mismatch == OnMismatch::Stop {
            let reason = StopReason::Mismatch { output };
            self.send(&Message::Goodbye { reason: reason.to_string() });
            return self.stop(reason);
        }
        self.image = Image { restored: true, ..Image::default() };
        self.resync = Some(Resync { since: now, slowed: 0, prepared: false, stands_at: None, listed: false });
        self.enter(PrimaryState::CatchingUp, &format!("the two sides differ in output {output}"));
        if self.bugs.has(Bug::ReleaseAtResync) {
            self.release_all();
        }
        self.actions.push_back(PrimaryAction::StartResync { output, position, detail });
        self.want_image();
    }

    pub(super) fn on_resync_prepared(&mut self) {
        if let Some(resync) = &mut self.resync {
            resync.prepared = true;
        }
    }

    /// How far the secondary may be behind before the guest is held back. While it catches up, the search for what has changed takes it some time as well, and a guest that is
    /// stopped for that has its pause.
    pub(super) fn max_lag(&self) -> u64 {
        match self.state {
            PrimaryState::CatchingUp => self.setup.config.max_replay_lag.saturating_mul(2),
            _ => self.setup.config.max_replay_lag,
        }
    }

    /// When the guest is slowed more, or stopped.
    pub(super) fn resync_deadline(&self) -> Option<Nanos> {
        let resync = self.resync.as_ref().filter(|_| self.state == PrimaryState::CatchingUp)?;
        let next = SLOWED.iter().map(|(after, _)| *after).chain(resync.prepared.then_some(PATIENCE));
        next.map(|after| resync.since.plus(after)).find(|at| *at > self.called)
    }

    /// Slows the guest, or stops it, as is due.
    pub(super) fn go_on_with_resync(&mut self, now: Nanos) {
        if self.state != PrimaryState::CatchingUp {
            return;
        }
        let config = &self.setup.config;
        let close = self.backlog.as_ref().is_none_or(|backlog| {
            backlog.lag_time() <= config.max_matched_lag && backlog.lag_instructions() <= config.max_replay_lag
        });
        let resync = self.resync.as_mut().expect("there is one from the difference on");
        let after = now.since(resync.since);
        let due = SLOWED.iter().filter(|(from, _)| *from <= after).map(|(_, percent)| *percent).max().unwrap_or(0);
        let due = if self.setup.config.commit == Commit::Matched { due.max(SLOWED[2].1) } else { due };
        if due > resync.slowed {
            resync.slowed = due;
            self.actions.push_back(PrimaryAction::Slow { percent: due });
        }
        if resync.prepared && (close || after >= PATIENCE) {
            self.enter(PrimaryState::Resyncing, "the standby has caught up");
            if !self.bugs.has(Bug::RunOnAtStandStill) {
                self.hold_back(now, "the standby is made equal again");
            }
            self.actions.push_back(PrimaryAction::StandStill);
        }
    }

    /// The secondary has all records before, and is told that there are no more.
    pub(super) fn on_stands_still(&mut self, position: u64) {
        if self.state != PrimaryState::Resyncing {
            return; // The standby was lost meanwhile.
        }
        let resync = self.resync.as_mut().expect("there is one from the difference on");
        assert!(resync.stands_at.replace(position).is_none(), "a guest that stands still is stopped once");
        self.position = self.position.max(position);
        self.flush();
        self.send(&Message::StandStill { position });
    }

    pub(super) fn on_listed(&mut self, now: Nanos) {
        let asked = self.resync.as_mut().filter(|resync| resync.stands_at.is_some() && !resync.listed);
        let Some(resync) = asked else {
            return self.lose_peer(now, "the standby has listed its changes without having been asked");
        };
        resync.listed = true;
        self.last_progress = now;
        self.actions.push_back(PrimaryAction::MakeDelta);
    }

    /// Too much differs: the guest runs on.
    pub(super) fn on_resync_goes_on(&mut self, now: Nanos) {
        if self.state != PrimaryState::Resyncing {
            return;
        }
        self.resync = Some(Resync { since: now, slowed: 0, prepared: false, stands_at: None, listed: false });
        self.last_progress = now;
        self.enter(PrimaryState::CatchingUp, "more differs than can be sent while the guest stands still");
    }

    /// The machine is over. A secondary that is not equal by now will not become so, and what is held for it leaves if the epoch can be won.
    pub(super) fn on_shutdown(&mut self, now: Nanos, reason: String) {
        self.ending = Some(reason);
        if matches!(self.state, PrimaryState::CatchingUp | PrimaryState::Resyncing) {
            self.lose_peer(now, "the guest has ended before the standby was equal again");
        }
    }

    pub(super) fn resynced(&mut self, now: Nanos) {
        let (position, _) = self.image.cut.expect("it has an end, so it has a cut");
        let backlog = self.backlog.as_mut().expect("there is one since the first image");
        // The image stands for all that was sent.
        let all = backlog.sent();
        let ack = Ack { received_seq: all, replayed_seq: all, replayed_position: position, ..Ack::default() };
        backlog.acknowledge(&ack).expect("nothing is taken back");
        backlog.stands_at(position);
        self.resync = None;
        self.resyncs += 1;
        self.last_progress = now;
        self.enter(PrimaryState::Protected, "the standby is equal again");
        self.release_what_may();
        if self.handing.is_none() {
            self.set_throttle(None);
        }
    }
}
