//! The world's part that breaks things.
//!
//! In: the profile's weights. Out: dead, stalled, cut-off sides. Invariant: no fault that a correct pair could not survive, and none
//! once it is calm.

use twinstep_pair::{Nanos, PrimaryEvent, SecondaryEvent};

use crate::profile::{CALM_FROM, Fault, MAX_HOSTS};
use crate::side::Role;
use crate::world::World;

impl World {
    pub(crate) fn fault(&mut self) -> Result<(), String> {
        let fault = self.profile.fault(&mut self.random);
        let victims: Vec<usize> =
            (0..self.sides.len()).filter(|side| self.sides[*side].alive && self.sides[*side].stopped.is_none()).collect();
        if victims.is_empty() || self.now >= CALM_FROM {
            return Ok(());
        }
        let victim = self.random.pick(&victims);
        let for_ns = self.random.between(1_000_000, 90_000_000);
        let until = Nanos(self.now.0 + for_ns).min(CALM_FROM);
        self.note(|_| format!("fault: {fault:?}, side {victim}, until {until}"));
        self.checker.faults += 1;
        match fault {
            Fault::Crash | Fault::PowerLoss => self.kill(victim, fault == Fault::PowerLoss),
            Fault::Cut => {
                if let Some(connection) = self.sides[victim].connection {
                    self.cut(connection, &[0, 1]);
                }
            }
            Fault::Partition => self.partition(victim, until),
            Fault::Stall => {
                let side = &mut self.sides[victim];
                // One stall after the other is one.
                if side.stalled_until < self.now {
                    side.stalled_from = self.now;
                }
                side.stalled_until = until;
            }
            Fault::ReplayStall => {
                for side in &mut self.sides {
                    side.replay_stalled_until = until;
                }
            }
            Fault::Flip => {
                let side = &mut self.sides[victim];
                if matches!(side.role, Role::Primary(_)) || side.restored {
                    side.machine.flip();
                }
            }
            Fault::HandOver => {
                if matches!(self.sides[victim].role, Role::Primary(_)) {
                    let reason = "maintenance".to_owned();
                    self.tell_primary(victim, PrimaryEvent::HandOver { reason })?;
                }
            }
            Fault::Goodbye => {
                let reason = "the administrator wants it".to_owned();
                match self.sides[victim].role {
                    Role::Primary(_) => {
                        self.checker.ended = true;
                        self.tell_primary(victim, PrimaryEvent::Shutdown { reason })?;
                    }
                    Role::Secondary(_) => self.tell_secondary(victim, SecondaryEvent::Shutdown { reason })?,
                }
            }
        }
        Ok(())
    }

    pub(crate) fn kill(&mut self, victim: usize, silently: bool) {
        self.sides[victim].alive = false;
        self.plan_restart(victim);
        let Some(index) = self.sides[victim].connection.take() else {
            return;
        };
        let end = self.connections[index].end_of(victim);
        self.connections[index].toward[end].silent = true;
        if !silently {
            self.cut(index, &[1 - end]);
        } else {
            self.connections[index].toward[1 - end].silent = true;
        }
    }

    fn partition(&mut self, victim: usize, until: Nanos) {
        let Some(index) = self.sides[victim].connection else {
            // Of a standby that waits, it shows only when somebody wants to reach it.
            let (host, other) = (self.sides[victim].host, self.random.between(0, MAX_HOSTS as u64 - 1) as usize);
            self.apart[host][other] = until;
            return;
        };
        let hosts = self.connections[index].ends.map(|side| self.sides[side].host);
        let for_ever = self.random.percent(40);
        let ends = self.random.pick(&[&[0_usize][..], &[1], &[0, 1], &[0, 1]]);
        for end in ends {
            let direction = &mut self.connections[index].toward[*end];
            if for_ever {
                direction.silent = true;
            } else {
                direction.block(until);
                self.apart[hosts[1 - *end]][hosts[*end]] = until;
            }
        }
    }
}
