//! The world's part that copies machines: the initial copy, and the resync of a side that differs.
//!
//! In: what the state machines ask for. Out: images, in pieces, with all the freedom a host has. Invariant: a machine is replaced only by what its image says, and nothing that entered the
//! other one after the cut is lost with it.

use twinstep_pair::{PrimaryEvent, PrimaryState, SecondaryEvent};

use crate::machine::Machine;
use crate::side::{Item, Role};
use crate::world::{Happening, World};

impl World {
    /// A side that differs says what it has changed; all of it, if the primary stands still.
    pub(crate) fn list(&mut self, side: usize) -> Result<(), String> {
        self.tell_secondary(side, SecondaryEvent::Changed(vec![2; 9]))?;
        let Some(position) = self.sides[side].list_at.take() else { return Ok(()) };
        while self.sides[side].machine.position < position {
            if let Some(output) = self.sides[side].machine.step() {
                self.sides[side].made.push_back(output);
            }
        }
        self.tell_secondary(side, SecondaryEvent::Listed)
    }

    /// The host of a side that goes on by itself says what its machine has made, as late as it likes.
    pub(crate) fn diverged(&mut self, side: usize) -> Result<(), String> {
        self.sides[side].differs = false;
        self.sides[side].diverging = false;
        self.sides[side].diverged = true;
        while let Some(output) = self.sides[side].made.pop_front() {
            self.made(side, output)?;
        }
        self.tell_secondary(side, SecondaryEvent::Diverged)
    }

    /// The primary's guest stands still, and its secondary has replayed all that it did: what it lacks is sent. Or the guest runs on once more, while a part of that is sent.
    pub(crate) fn make_delta(&mut self, side: usize) -> Result<(), String> {
        self.checker.check_level(&self.sides, side)?;
        if self.sides[side].ahead < 2 && self.random.percent(self.profile.ahead_percent) {
            let rounds = self.profile.rounds_bytes as usize;
            let state = &mut self.sides[side];
            state.ahead += 1;
            state.image.extend(std::iter::repeat_n(0xc3, rounds));
            self.give_primary(side, PrimaryEvent::ResyncGoesOn);
            let delay = self.random.between(0, 3_000_000);
            self.plan(delay, Happening::Prepared(side));
        } else {
            let padding = self.profile.image_padding as usize;
            let state = &mut self.sides[side];
            let outputs: Vec<_> = state.outputs.values().cloned().collect();
            let rest = state.machine.to_resync(&outputs, padding);
            state.image.extend(rest);
            state.cut_due = false;
            let position = state.machine.position;
            self.give_primary(side, PrimaryEvent::ImageCut { position });
        }
        self.plan(0, Happening::Feed(side));
        Ok(())
    }

    /// The image holds the machine as it is now, behind the rounds.
    pub(crate) fn cut_image(&mut self, side: usize) {
        let padding = self.profile.image_padding as usize;
        let state = &mut self.sides[side];
        state.cut_due = false;
        state.image.extend(state.machine.to_image(padding));
        state.paused = self.profile.pause_during_copy;
        let position = state.machine.position;
        self.give_primary(side, PrimaryEvent::ImageCut { position });
    }

    /// The host uses up what came of an image.
    pub(crate) fn take_image(&mut self, side: usize) -> Result<(), String> {
        let bytes = std::mem::take(&mut self.sides[side].untaken);
        if bytes == 0 || self.sides[side].stopped.is_some() || matches!(self.sides[side].role, Role::Primary(_)) {
            return Ok(());
        }
        self.tell_secondary(side, SecondaryEvent::ImageTaken { bytes })
    }

    pub(crate) fn feed_image(&mut self, side: usize) -> Result<(), String> {
        let state = &mut self.sides[side];
        let images = [PrimaryState::Copying, PrimaryState::CatchingUp, PrimaryState::Resyncing];
        let copying = state.primary_state().is_some_and(|state| images.contains(&state));
        if !copying || state.image.is_empty() {
            return Ok(());
        }
        let length = (state.image_wanted as usize).min(state.image.len());
        if length == 0 {
            return Ok(());
        }
        state.image_wanted -= length as u64;
        let chunk: Vec<u8> = state.image.drain(..length).collect();
        let sent = state.image.is_empty();
        let complete = sent && !state.cut_due;
        self.tell_primary(side, PrimaryEvent::ImageChunk(chunk))?;
        let copying = matches!(self.sides[side].primary_state(), Some(PrimaryState::Copying));
        if sent && copying && self.sides[side].cut_due {
            self.cut_image(side);
            let delay = self.random.between(0, 100_000);
            self.plan(delay, Happening::Feed(side));
        }
        if complete {
            self.tell_primary(side, PrimaryEvent::ImageEnd)?;
        }
        Ok(())
    }

    pub(crate) fn restored(&mut self, side: usize) -> Result<(), String> {
        if self.sides[side].stopped.is_some() {
            return Ok(());
        }
        self.take_image(side)?;
        let rounds = self.profile.rounds_bytes as usize;
        let state = &mut self.sides[side];
        if state.restored {
            // What was sent while the guest ran comes first.
            let ahead = state.image.iter().take_while(|byte| **byte == 0xc3).count();
            let (machine, outputs) = Machine::from_resync(&state.image[ahead..]);
            let beyond = |item: &Item| matches!(item, Item::Record(record) if record.position > machine.position);
            if let Some(late) = state.replay.iter().find(|item| beyond(item)) {
                let cut = machine.position;
                return Err(format!("side {side} is made equal at {cut}, and throws {late:?} away"));
            }
            state.machine = machine;
            state.outputs = outputs.into_iter().map(|output| (output.id, output)).collect();
            state.made.clear();
            state.replay.clear();
            state.replayed = state.received;
            state.differs = false;
            state.list_at = None;
            self.checker.resyncs += 1;
        } else {
            state.machine = Machine::from_image(&state.image[rounds..]);
            state.restored = true;
            state.image_outputs = state.machine.outputs;
            self.plan(0, Happening::Replay(side));
        }
        let state = &mut self.sides[side];
        state.matched = state.machine.outputs;
        let (position, last_output) = (state.machine.position, state.machine.outputs);
        self.tell_secondary(side, SecondaryEvent::ImageRestored { position, last_output })
    }
}
