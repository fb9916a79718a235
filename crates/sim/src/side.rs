//! One side's host, as a toy: what the real host does around `Primary` and `Secondary`, without the sockets.
//!
//! In: nothing by itself; the world moves it. Out: its state. Invariant: it keeps the contract that the pair's doors state, and
//! takes every freedom that they leave.

use std::collections::{BTreeMap, VecDeque};

use twinstep_pair::{
    Bug, Bugs, Epoch, Expectation, Healer, HostIdentity, Nanos, OwnerId, Primary, PrimarySetup, PrimaryState, Record, Secondary,
    SecondarySetup, SecondaryState, StopReason, VmId, VmIdentity,
};

use crate::machine::{Machine, Output};
use crate::profile::{Beats, Profile};

/// The kind of record that holds an input.
pub(crate) const INPUT: u8 = 1;
/// The kind of record that notes an output.
pub(crate) const NOTE: u8 = 2;

/// The one VM of the world.
pub(crate) const VM: VmId = VmId([7; 16]);

/// What a side is.
#[derive(Debug, Clone)]
pub(crate) enum Role {
    Primary(Box<Primary>),
    Secondary(Box<Secondary>),
}

/// What replay is given.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Record(Record),
    /// Run to there, or to where the machine pauses before.
    Ahead(u64),
}

/// A side.
#[derive(Debug, Clone)]
pub(crate) struct Side {
    pub(crate) role: Role,
    /// Where its process runs.
    pub(crate) host: usize,
    /// Who looks for its standbys, if it is a primary.
    pub(crate) healer: Option<Healer>,
    /// When the healer is asked next.
    pub(crate) heal_at: Option<Nanos>,
    /// It has a standby that may go live.
    pub(crate) protected: bool,
    /// Since when it has had no standby.
    pub(crate) bare_since: Option<Nanos>,
    pub(crate) alive: bool,
    /// Its process dies after so many further actions.
    pub(crate) doomed: Option<u64>,
    pub(crate) stopped: Option<StopReason>,
    pub(crate) machine: Machine,
    /// Data of outputs that may still be needed.
    pub(crate) outputs: BTreeMap<u64, Output>,
    pub(crate) connection: Option<usize>,
    /// The last one it was connected to.
    pub(crate) peer: Option<usize>,
    pub(crate) stalled_until: Nanos,
    /// Since when, then.
    pub(crate) stalled_from: Nanos,
    /// When it began to run the VM after its primary.
    pub(crate) live_at: Option<Nanos>,
    pub(crate) tick_at: Option<Nanos>,
    pub(crate) last_leave: Nanos,
    // As a primary:
    pub(crate) throttled: bool,
    pub(crate) paused: bool,
    /// It loses so many hundredths of its slices.
    pub(crate) slowed: u8,
    /// How often a part of the image of a resync was sent while the guest ran.
    pub(crate) ahead: u64,
    /// The newest output that was made while nothing was protected.
    pub(crate) made_freely: u64,
    pub(crate) inputs: VecDeque<u64>,
    /// What is left to feed of the image; as a secondary, what came so far.
    pub(crate) image: Vec<u8>,
    pub(crate) image_wanted: u64,
    /// The rounds are on their way; the image is cut when all of them are sent.
    pub(crate) cut_due: bool,
    // As a secondary:
    /// Bytes of an image that came and are not used up.
    pub(crate) untaken: u64,
    /// Outputs that the machine had made when the image was cut.
    pub(crate) image_outputs: u64,
    pub(crate) replay: VecDeque<Item>,
    pub(crate) replayed: u64,
    pub(crate) replay_stalled_until: Nanos,
    /// The newest output whose note the host holds.
    pub(crate) noted: u64,
    /// Records handed over so far.
    pub(crate) received: u64,
    /// There is a machine.
    pub(crate) restored: bool,
    /// Outputs made and not compared yet.
    pub(crate) made: VecDeque<Output>,
    /// The newest output that is the same on both sides.
    pub(crate) matched: u64,
    /// An output differed: what is made since then counts for nothing.
    pub(crate) differs: bool,
    /// It was asked to report what it has made since then.
    pub(crate) diverging: bool,
    /// The primary stands still there, and wants to know all that has changed here.
    pub(crate) list_at: Option<u64>,
    /// Replay compares no more.
    pub(crate) diverged: bool,
}

fn host_identity() -> HostIdentity {
    HostIdentity { build: "sim".to_owned(), engine: "toy".to_owned(), cpu_vendor: "none".to_owned(), cpu_family: 0 }
}

/// How a host is called in a list of standbys.
pub(crate) fn place(host: usize) -> String {
    format!("host-{host}")
}

pub(crate) fn owner(index: usize) -> OwnerId {
    OwnerId([index as u8 + 1; 16])
}

impl Side {
    fn new(role: Role, host: usize) -> Side {
        Side {
            role,
            host,
            healer: None,
            heal_at: None,
            protected: false,
            bare_since: None,
            alive: true,
            doomed: None,
            stopped: None,
            machine: Machine::new(),
            outputs: BTreeMap::new(),
            connection: None,
            peer: None,
            stalled_until: Nanos(0),
            stalled_from: Nanos(0),
            live_at: None,
            tick_at: None,
            last_leave: Nanos(0),
            throttled: false,
            paused: false,
            slowed: 0,
            ahead: 0,
            made_freely: 0,
            inputs: VecDeque::new(),
            image: Vec::new(),
            image_wanted: 0,
            cut_due: false,
            untaken: 0,
            image_outputs: 0,
            replay: VecDeque::new(),
            replayed: 0,
            replay_stalled_until: Nanos(0),
            noted: 0,
            received: 0,
            restored: false,
            made: VecDeque::new(),
            matched: 0,
            differs: false,
            diverging: false,
            list_at: None,
            diverged: false,
        }
    }

    /// The machine that was powered on.
    pub(crate) fn primary(index: usize, profile: &Profile, bug: Option<Bug>) -> Side {
        let primary = Primary::new(PrimarySetup {
            config: profile.config.clone(),
            vm: VmIdentity { vm: VM, name: "toy".to_owned(), cpu_model: "toy".to_owned(), ram_bytes: 4096 },
            host: host_identity(),
            owner: owner(index),
            epoch: Epoch::FIRST,
            last_output: 0,
            last_left: 0,
        })
        .expect("profiles are sound");
        let standbys = (1..profile.hosts).map(place);
        let healer = Healer::new(standbys, profile.own_place.then(|| place(index)), &profile.config);
        let mut side = Side::new(Role::Primary(Box::new(primary.with_bugs(bugs(bug)))), index);
        side.healer = Some(healer.with_bugs(bugs(bug)));
        side
    }

    /// A standby.
    pub(crate) fn secondary(index: usize, host: usize, profile: &Profile, bug: Option<Bug>) -> Side {
        let secondary = Secondary::new(SecondarySetup {
            config: profile.config.clone(),
            host: host_identity(),
            owner: owner(index),
            expect: Expectation { vm: Some(VM), ..Expectation::default() },
            beats: (profile.beats != Beats::None).then(|| place(host)),
        })
        .expect("profiles are sound");
        Side::new(Role::Secondary(Box::new(secondary.with_bugs(bugs(bug)))), host)
    }

    /// The side has gone live: what was a secondary drives the machine as a primary.
    pub(crate) fn become_primary(&mut self, bug: Option<Bug>) {
        if let Role::Secondary(secondary) = &self.role {
            let (primary, healer) = secondary.as_ref().clone().into_primary();
            self.role = Role::Primary(Box::new(primary.with_bugs(bugs(bug))));
            self.healer = Some(healer.with_bugs(bugs(bug)));
        }
    }

    pub(crate) fn deadline(&self) -> Option<Nanos> {
        match &self.role {
            Role::Primary(primary) => primary.deadline(),
            Role::Secondary(secondary) => secondary.deadline(),
        }
    }

    pub(crate) fn primary_state(&self) -> Option<PrimaryState> {
        match &self.role {
            Role::Primary(primary) => Some(primary.state()),
            Role::Secondary(_) => None,
        }
    }

    /// Whether it is a standby that waits for a primary.
    pub(crate) fn waits(&self) -> bool {
        let listening = matches!(&self.role, Role::Secondary(secondary) if secondary.state() == SecondaryState::Listening);
        self.alive && self.stopped.is_none() && self.connection.is_none() && listening
    }

    /// Whether its outputs leave without anybody's acknowledgement.
    pub(crate) fn on_its_own(&self) -> bool {
        self.alive && self.primary_state().is_some_and(|state| state < PrimaryState::Protected)
    }

    /// Whether the output made last may leave at once.
    pub(crate) fn lets_go(&self) -> bool {
        let held = match &self.role {
            Role::Primary(primary) => primary.status().held_outputs,
            Role::Secondary(_) => 0,
        };
        self.on_its_own() && held == 0
    }

    /// Whether the guest may run now.
    pub(crate) fn may_run(&self) -> bool {
        let state = self.primary_state();
        self.alive && !self.throttled && !self.paused && state.is_some_and(|state| state != PrimaryState::Stopped)
    }
}

fn bugs(bug: Option<Bug>) -> Bugs {
    bug.map_or_else(Bugs::default, Bugs::only)
}
