//! The world's part that deals with connections: who connects to whom, what arrives, what ends.
//!
//! In: what sides send, cuts. Out: events for sides. Invariant: a side hears only of the connection it has now.

use twinstep_pair::{Nanos, PrimaryEvent, PrimaryState, SecondaryEvent};

use crate::network::Connection;
use crate::profile::{Beats, CALM_FROM, MAX_HOSTS};
use crate::side::{Role, Side, place};
use crate::world::{Happening, World};

/// No more sides than this in one history.
const MAX_SIDES: usize = 12;

impl World {
    /// Tells a primary's healer how the primary does, and plans when it is to be asked.
    pub(crate) fn follow(&mut self, side: usize) {
        let now = self.now;
        let state = self.sides[side].primary_state();
        let it = &mut self.sides[side];
        let (Some(state), Some(healer)) = (state, &mut it.healer) else { return };
        healer.follow(now, state);
        if state == PrimaryState::Protected && !it.protected {
            self.checker.protected += 1;
        }
        it.protected = state >= PrimaryState::Protected;
        it.bare_since = (state == PrimaryState::Unprotected).then(|| it.bare_since.unwrap_or(now));
        if let Some(deadline) = healer.deadline().filter(|deadline| it.heal_at.is_none_or(|at| *deadline < at)) {
            let at = Nanos(deadline.max(now).0 + self.random.between(0, 2_000_000));
            self.sides[side].heal_at = Some(at);
            self.plan_at(at, Happening::Heal(side));
        }
    }

    pub(crate) fn heal(&mut self, side: usize) {
        let now = self.now;
        if self.sides[side].heal_at.take().is_none() {
            return;
        }
        let wanted = self.sides[side].healer.as_mut().and_then(|healer| {
            let standby = healer.poll(now)?;
            healer.greeting(standby).into_iter().next()
        });
        if let Some(wanted) = wanted {
            let host = (0..MAX_HOSTS).find(|host| place(*host) == wanted).expect("lists name hosts");
            let delay = self.random.between(50_000, 5_000_000);
            self.plan(delay, Happening::Reach(side, host));
        }
    }

    /// The attempt of a primary to reach a standby on a host comes to something or nothing.
    pub(crate) fn reach(&mut self, primary: usize, host: usize) -> Result<(), String> {
        if self.sides[primary].primary_state() != Some(PrimaryState::Unprotected) {
            return Ok(()); // It has ended meanwhile.
        }
        let from = self.sides[primary].host;
        let cut_off = self.apart[from][host].max(self.apart[host][from]) > self.now;
        let waits = (0..self.sides.len()).find(|side| {
            let it = &self.sides[*side];
            it.host == host && it.waits() && it.stalled_until <= self.now
        });
        let Some(secondary) = waits.filter(|_| !cut_off) else {
            self.note(|_| format!("side {primary} reaches nobody on host {host}"));
            let now = self.now;
            self.sides[primary].healer.as_mut().and_then(|healer| healer.not_reached(now));
            self.follow(primary);
            return Ok(());
        };
        let connection = self.connections.len();
        self.connections.push(Connection::new(primary, secondary));
        for (side, peer) in [(primary, secondary), (secondary, primary)] {
            self.sides[side].connection = Some(connection);
            self.sides[side].peer = Some(peer);
        }
        self.note(|_| format!("side {primary} connects to standby {secondary} on host {host}"));
        let healer = self.sides[primary].healer.as_mut().expect("it has asked for this");
        healer.connected();
        let standbys = healer.greeting(healer.standby().expect("just connected"));
        self.tell_secondary(secondary, SecondaryEvent::PeerConnected)?;
        self.tell_primary(primary, PrimaryEvent::PeerConnected { standbys })
    }

    /// The process of a side has ended: its host may start a standby.
    pub(crate) fn plan_restart(&mut self, side: usize) {
        let host = self.sides[side].host;
        if self.now < CALM_FROM && self.random.percent(self.profile.restart_percent) {
            let delay = self.random.between(1_000_000, 40_000_000);
            self.plan(delay, Happening::Restart(host));
        }
    }

    pub(crate) fn restart(&mut self, host: usize) {
        let busy = self.sides.iter().any(|side| side.host == host && side.alive && side.stopped.is_none());
        if busy || self.sides.len() >= MAX_SIDES {
            return;
        }
        let side = self.sides.len();
        self.note(|_| format!("host {host} starts standby {side}"));
        self.sides.push(Side::secondary(side, host, &self.profile, self.bug));
    }

    pub(crate) fn send(&mut self, side: usize, bytes: Vec<u8>) {
        let Some(index) = self.sides[side].connection else {
            return;
        };
        let connection = &mut self.connections[index];
        let other = 1 - connection.end_of(side);
        connection.toward[other].send(self.now, bytes, &self.profile, &mut self.random);
        self.plan_delivery(index, other);
    }

    /// A side sends a sign of life beside the channel.
    pub(crate) fn beat(&mut self, side: usize) {
        let Some(index) = self.sides[side].connection else {
            return;
        };
        if self.random.percent(self.profile.beats_lost_percent) {
            return;
        }
        let connection = &self.connections[index];
        let end = 1 - connection.end_of(side);
        let way = &connection.toward[end];
        // Not bound to the connection's order, and not to its end.
        let blocked = self.profile.beats == Beats::SamePath && (way.silent || way.is_blocked(self.now));
        if !blocked {
            let delay = self.random.between(self.profile.delay_min_ns, self.profile.delay_max_ns);
            self.plan(delay, Happening::Beat(index, end));
        }
    }

    pub(crate) fn beat_arrives(&mut self, index: usize, end: usize) -> Result<(), String> {
        let side = self.connections[index].ends[end];
        // Hosts know by the process that sent it of which connection it is.
        if self.sides[side].connection != Some(index) {
            return Ok(());
        }
        match self.sides[side].role {
            Role::Primary(_) => self.tell_primary(side, PrimaryEvent::Beat),
            Role::Secondary(_) => self.tell_secondary(side, SecondaryEvent::Beat),
        }
    }

    /// One delivery is planned as long as anything is in flight.
    fn plan_delivery(&mut self, index: usize, end: usize) {
        if let Some(due) = self.connections[index].toward[end].plan_next(self.now) {
            self.plan_at(due, Happening::Deliver(index, end));
        }
    }

    /// A side closes its end properly.
    pub(crate) fn disconnect(&mut self, side: usize) {
        let Some(index) = self.sides[side].connection.take() else {
            return;
        };
        let connection = &mut self.connections[index];
        let end = connection.end_of(side);
        connection.toward[end].silent = true;
        let other = &mut connection.toward[1 - end];
        if !other.silent && !other.closing {
            other.close(self.now, &mut self.random);
            self.plan_delivery(index, 1 - end);
        }
    }

    /// The connection is reset towards these ends.
    pub(crate) fn cut(&mut self, index: usize, ends: &[usize]) {
        for end in ends {
            let direction = &mut self.connections[index].toward[*end];
            if !direction.silent && !direction.closing {
                direction.cut(self.now, &mut self.random);
                self.plan_delivery(index, *end);
            }
        }
    }

    pub(crate) fn deliver(&mut self, index: usize, end: usize) -> Result<(), String> {
        let side = self.connections[index].ends[end];
        let direction = &mut self.connections[index].toward[end];
        direction.planned = false;
        if direction.silent || self.sides[side].connection != Some(index) {
            return Ok(());
        }
        let arrived = direction.take(self.now, &mut self.random);
        self.plan_delivery(index, end);
        if let Some(bytes) = arrived {
            match self.sides[side].role {
                Role::Primary(_) => self.tell_primary(side, PrimaryEvent::Bytes(bytes))?,
                Role::Secondary(_) => self.tell_secondary(side, SecondaryEvent::Bytes(bytes))?,
            }
        }
        let direction = &self.connections[index].toward[end];
        let ended = direction.closing && direction.in_flight.is_empty();
        if ended && self.sides[side].connection == Some(index) {
            self.sides[side].connection = None;
            let reason = "reset".to_owned();
            match self.sides[side].role {
                Role::Primary(_) => self.tell_primary(side, PrimaryEvent::PeerClosed { reason })?,
                Role::Secondary(_) => self.tell_secondary(side, SecondaryEvent::PeerClosed { reason })?,
            }
        }
        Ok(())
    }
}
