//! The invariants, checked from outside: the checker sees the sides' states and actions and believes none of them.
//!
//! In: what sides do. Out: the first violation, in words. Invariant: nothing here influences the history.

use std::collections::{BTreeMap, BTreeSet};

use twinstep_pair::{Commit, Config, Epoch, Nanos, PrimaryState, SecondaryState, StopReason, TableArbiter};

use crate::profile::END;
use crate::side::{Role, Side, VM, owner};
use crate::world::World;

/// How long a VM may be without a standby although one waits, once it is calm.
const HEALED_WITHIN: Nanos = Nanos::from_millis(100);

/// What must be remembered to judge, and a few counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Checker {
    /// Who went on alone in which epoch.
    owners: BTreeMap<Epoch, usize>,
    /// Which secondaries may go live, or might have.
    entitled: BTreeSet<usize>,
    /// The guest was ended on purpose: nobody has to survive.
    pub(crate) ended: bool,
    pub(crate) alone: u64,
    pub(crate) live: u64,
    pub(crate) resyncs: u64,
    pub(crate) protected: u64,
    pub(crate) faults: u64,
    /// How much had been acknowledged some time before the end.
    pub(crate) acknowledged_before: usize,
}

impl Checker {
    /// Never two sides that run on their own.
    pub(crate) fn check_lives(&self, sides: &[Side]) -> Result<(), String> {
        let on_their_own = sides.iter().filter(|side| side.on_its_own()).count();
        if on_their_own > 1 {
            return Err(format!("split brain: {on_their_own} sides run on their own"));
        }
        Ok(())
    }

    /// No epoch has two owners.
    pub(crate) fn check_owner(&mut self, side: usize, epoch: Epoch) -> Result<(), String> {
        let owner = *self.owners.entry(epoch).or_insert(side);
        if owner != side {
            return Err(format!("split brain: side {side} goes on alone in epoch {epoch}, which is side {owner}'s"));
        }
        Ok(())
    }

    /// The output rule: under protection, what leaves is noted at the secondary's host.
    pub(crate) fn check_release(&self, sides: &[Side], side: usize, up_to: u64, commit: Commit) -> Result<(), String> {
        let primary = &sides[side];
        if primary.primary_state().is_some_and(|state| state < PrimaryState::Protected) {
            return Ok(());
        }
        let noted = primary.peer.map_or(0, |peer| sides[peer].noted);
        // What was made before protection started may leave, even if the host does it only now.
        if up_to > noted.max(primary.made_freely) {
            return Err(format!("side {side} releases output {up_to}, but its secondary has notes only up to {noted}"));
        }
        let matched = primary.peer.map_or(0, |peer| sides[peer].matched);
        if commit == Commit::Matched && up_to > matched.max(primary.made_freely) {
            return Err(format!("side {side} releases output {up_to}, but its secondary has made the same only up to {matched}"));
        }
        Ok(())
    }

    /// A side that slept for long while another took its VM over lets nothing leave when it wakes up.
    pub(crate) fn check_late(&self, sides: &[Side], side: usize, up_to: u64, config: &Config) -> Result<(), String> {
        let primary = &sides[side];
        let asleep = primary.stalled_from..primary.stalled_until;
        let long = asleep.end.since(asleep.start) >= Nanos(config.peer_timeout.0 / 2);
        let heir = sides.iter().position(|other| other.live_at.is_some_and(|at| asleep.contains(&at)));
        // One that went live afterwards slept as a standby, or before it was one.
        let later = primary.live_at.is_some_and(|at| at >= asleep.end);
        match heir {
            Some(heir) if long && !later && heir != side && up_to > primary.made_freely => {
                Err(format!("side {side} wakes up and releases output {up_to}, although side {heir} has gone live meanwhile"))
            }
            _ => Ok(()),
        }
    }

    /// A secondary that may go live from now on knows of everything the world has seen, and nothing that
    /// it could not make again is still to be seen.
    pub(crate) fn check_entitled(&mut self, index: usize, side: &Side, seen: u64, table: &TableArbiter) -> Result<(), String> {
        let Role::Secondary(secondary) = &side.role else {
            return Ok(());
        };
        let status = secondary.status();
        if !status.entitled || !self.entitled.insert(index) {
            return Ok(());
        }
        // It may learn late that it might have, when the primary has won the next epoch and goes on already.
        if status.epoch.is_some_and(|epoch| table.holder(VM, epoch.next()).is_some()) {
            return Ok(());
        }
        if seen < side.image_outputs {
            let lost = side.image_outputs;
            return Err(format!(
                "side {index} may go live, but can't make output {lost} again, and the world has seen only {seen}"
            ));
        }
        let known = side.noted.max(side.machine.outputs);
        if seen > known {
            return Err(format!("side {index} may go live, but knows of {known} outputs where the world has seen {seen}"));
        }
        Ok(())
    }

    /// A guest does not get a slice while a bound is passed.
    pub(crate) fn check_bounds(&self, side: &Side, config: &Config) -> Result<(), String> {
        let Role::Primary(primary) = &side.role else {
            return Ok(());
        };
        let status = primary.status();
        let protected = status.state == PrimaryState::Protected;
        let bounds = [
            ("unacknowledged bytes", status.unacked_bytes, config.max_unacked_bytes, true),
            ("unreplayed bytes", status.unreplayed_bytes, config.max_unreplayed_bytes, true),
            ("instructions behind", status.lag_instructions, config.max_replay_lag, protected),
            ("nanoseconds behind", status.lag_time.0, config.max_matched_lag.0, protected && config.commit == Commit::Matched),
            ("held outputs", status.held_outputs, config.max_held_outputs, protected),
        ];
        for (what, value, bound, counts) in bounds {
            if counts && value > bound {
                return Err(format!("the guest runs with {value} {what}; the bound is {bound}"));
            }
        }
        Ok(())
    }

    /// A standby's host never holds more of an image than the window.
    pub(crate) fn check_untaken(&self, side: &Side, config: &Config) -> Result<(), String> {
        let (held, window) = (side.untaken, config.image_window_bytes);
        if held > window { Err(format!("a standby holds {held} bytes of an image; the window is {window}")) } else { Ok(()) }
    }

    /// What a secondary lacks is found out where both stand, and no record is on its way.
    pub(crate) fn check_level(&self, sides: &[Side], side: usize) -> Result<(), String> {
        let here = sides[side].machine.position;
        let Some(peer) = sides[side].peer.map(|peer| &sides[peer]) else { return Ok(()) };
        // It may have gone on by itself, while its primary slept.
        if !matches!(&peer.role, Role::Secondary(secondary) if secondary.state() == SecondaryState::Resyncing) {
            return Ok(());
        }
        // A machine that is another one may have run ahead of where this one stopped.
        if peer.machine.position < here || !peer.replay.is_empty() {
            let (there, left) = (peer.machine.position, peer.replay.len());
            return Err(format!(
                "side {side} stands at {here} and makes a delta to a machine at {there} that has {left} records left"
            ));
        }
        Ok(())
    }

    /// A side stops only for a reason that is true.
    pub(crate) fn check_stop(&self, side: usize, reason: &StopReason, table: &TableArbiter) -> Result<(), String> {
        let (StopReason::LostArbitration { epoch } | StopReason::HandedOver { epoch }) = reason else {
            return Ok(());
        };
        match table.holder(VM, *epoch) {
            Some(holder) if holder != owner(side) => Ok(()),
            holder => Err(format!("side {side} says that it lost epoch {epoch}, which is held by {holder:?}")),
        }
    }

    /// After the calm: whoever is left runs, and the client gets answers.
    pub(crate) fn check_end(&self, world: &World) -> Result<(), String> {
        for (index, side) in world.sides.iter().enumerate().filter(|(_, side)| side.alive) {
            self.check_side_at_end(world, index, side)?;
        }
        if self.ended {
            return Ok(());
        }
        let running = world
            .sides
            .iter()
            .any(|side| side.alive && side.primary_state().is_some_and(|state| state <= PrimaryState::Protected));
        if running {
            if world.outside.acknowledged.len() <= self.acknowledged_before {
                return Err("the VM runs, but the client gets no answers".to_owned());
            }
            return check_healed(world);
        }
        // Nobody runs: then the side that had the right to is dead.
        let mut entitled = 0;
        for epoch in 1..=world.sides.len() as u64 + 1 {
            if let Some(holder) = world.arbiter.table.holder(VM, Epoch(epoch)) {
                entitled = (0..world.sides.len()).find(|side| owner(*side) == holder).expect("it is one of them");
            }
        }
        if world.sides[entitled].alive {
            return Err(format!("side {entitled} had the right to run and is alive, but nobody runs"));
        }
        Ok(())
    }

    fn check_side_at_end(&self, world: &World, index: usize, side: &Side) -> Result<(), String> {
        let peer_alive = side.connection.is_some() && side.peer.is_some_and(|peer| world.sides[peer].alive);
        match &side.role {
            Role::Primary(primary) => match primary.state() {
                PrimaryState::Deciding => Err(format!("side {index} still waits for the arbiter")),
                PrimaryState::CatchingUp | PrimaryState::Resyncing => Err(format!("side {index} is still resynchronising")),
                PrimaryState::Protected if !peer_alive => Err(format!("side {index} has not noticed its peer's death")),
                _ => Ok(()),
            },
            Role::Secondary(secondary) => match secondary.state() {
                SecondaryState::Resyncing | SecondaryState::Deciding | SecondaryState::Consuming => {
                    Err(format!("side {index} is still {}", secondary.state().name()))
                }
                SecondaryState::Following if !peer_alive => Err(format!("side {index} has not noticed its peer's death")),
                _ => Ok(()),
            },
        }
    }
}

/// A VM that runs has a standby, if any waits for it.
fn check_healed(world: &World) -> Result<(), String> {
    let alone = |side: &&Side| side.alive && side.bare_since.is_some_and(|since| END.since(since) > HEALED_WITHIN);
    let Some(alone) = world.sides.iter().find(alone) else { return Ok(()) };
    // It may be asked for at places where the VM has, or had, a standby.
    let known = |host: usize| host != 0 || world.profile.own_place;
    match world.sides.iter().find(|side| side.waits() && known(side.host)) {
        None => Ok(()),
        Some(standby) => {
            Err(format!("the VM on host {} has had no standby for long, although one waits on host {}", alone.host, standby.host))
        }
    }
}
