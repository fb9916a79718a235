//! The world's part that deals with connections: who connects to whom, what arrives, what ends.
//!
//! In: what sides send, cuts. Out: events for sides. Invariant: a side hears only of the connection it has now.

use twinstep_pair::{PrimaryEvent, PrimaryState, SecondaryEvent};

use crate::network::Connection;
use crate::profile::CALM_FROM;
use crate::side::{Role, Side};
use crate::world::{Happening, World};

/// No more sides than this in one history.
const MAX_SIDES: usize = 6;

impl World {
    pub(crate) fn plan_heal(&mut self, side: usize) {
        if self.profile.heal {
            let delay = self.random.between(100_000, 20_000_000);
            self.plan(delay, Happening::Heal(side));
        }
    }

    pub(crate) fn heal(&mut self, primary: usize) -> Result<(), String> {
        let unprotected = self.sides[primary].primary_state() == Some(PrimaryState::Unprotected);
        if !unprotected || self.sides[primary].connection.is_some() {
            return Ok(());
        }
        if !self.connections.is_empty() {
            if self.sides.len() >= MAX_SIDES || self.now.0 > CALM_FROM.0 + 100_000_000 {
                return Ok(());
            }
            let side = Side::secondary(self.sides.len(), &self.profile, self.bug);
            self.sides.push(side);
        }
        let secondary = self.sides.len() - 1;
        if !self.sides[secondary].alive || self.sides[secondary].stopped.is_some() {
            return Ok(());
        }
        let connection = self.connections.len();
        self.connections.push(Connection::new(primary, secondary));
        for (side, peer) in [(primary, secondary), (secondary, primary)] {
            self.sides[side].connection = Some(connection);
            self.sides[side].peer = Some(peer);
        }
        self.note(|_| format!("side {primary} connects to standby {secondary}"));
        self.tell_secondary(secondary, SecondaryEvent::PeerConnected)?;
        self.tell_primary(primary, PrimaryEvent::PeerConnected)
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
