//! Guest time: a function of the position and of the clock inputs given so far.
//!
//! **In:** [`Input::Clock`](crate::Input::Clock) (a base and a rate). **Out:** guest time at a position, and the first position at which a guest
//! time is reached. **Invariant:** guest time never goes back, and for every deadline `position_of(t)` is the *smallest* position whose time is at
//! least `t`; so a timer fires at a position that no slicing of the run can move.
use crate::payload::{Payload, RestoreError};
use minicbor::{Decode, Encode};
use twinstep_x86::{Position, TscRate};

/// Picoseconds an instruction lasts before the first clock input.
const DEFAULT_RATE: u32 = 1000;

/// The machine's clock.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Clock {
    #[n(0)]
    base_position: Position,
    #[n(1)]
    base_ns: u64,
    #[n(2)]
    picoseconds_per_instruction: u32,
}

impl Clock {
    const KIND: &'static str = "clock";
    const VERSION: u16 = 1;

    /// Guest time 0 at position 0.
    pub(crate) fn new() -> Self {
        Self { base_position: 0, base_ns: 0, picoseconds_per_instruction: DEFAULT_RATE }
    }

    /// Guest time in nanoseconds at `position` (not before the last clock input).
    pub(crate) fn ns_at(&self, position: Position) -> u64 {
        let instructions = position.saturating_sub(self.base_position);
        let ns = u128::from(instructions) * u128::from(self.picoseconds_per_instruction) / 1000;
        self.base_ns.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// [`Clock::ns_at`] as a rule, until the next clock input.
    pub(crate) fn rate(&self) -> TscRate {
        TscRate { position: self.base_position, tsc: self.base_ns, thousandths: self.picoseconds_per_instruction.into() }
    }

    /// The first position at which guest time is at least `ns`, or `None` if no number of instructions gets there.
    pub(crate) fn position_of(&self, ns: u64) -> Option<Position> {
        let Some(left) = ns.checked_sub(self.base_ns).filter(|&left| left > 0) else {
            return Some(self.base_position);
        };
        if self.picoseconds_per_instruction == 0 {
            return None;
        }
        let instructions = (u128::from(left) * 1000).div_ceil(u128::from(self.picoseconds_per_instruction));
        self.base_position.checked_add(u64::try_from(instructions).ok()?)
    }

    /// Applies a clock input at `position`.
    pub(crate) fn pull(&mut self, position: Position, advance_to_ns: u64, picoseconds_per_instruction: u32) {
        self.base_ns = self.ns_at(position).max(advance_to_ns);
        self.base_position = position;
        self.picoseconds_per_instruction = picoseconds_per_instruction;
    }

    pub(crate) fn save(&self) -> Payload {
        Payload::encode(Self::KIND, Self::VERSION, self)
    }

    pub(crate) fn restore(&mut self, payloads: &mut crate::payload::Payloads, position: Position) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let new: Self = payload.decode()?;
        if new.base_position > position {
            return Err(payload.invalid("its base lies after the machine's position"));
        }
        *self = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_reached_at_the_smallest_position() {
        let mut clock = Clock::new();
        clock.pull(1000, 5_000, 333);
        for ns in [0, 4_999, 5_000, 5_001, 5_002, 6_000, 1 << 40] {
            let p = clock.position_of(ns).unwrap();
            assert!(clock.ns_at(p) >= ns);
            assert!(p == 1000 || clock.ns_at(p - 1) < ns, "{ns}");
        }
    }

    #[test]
    fn time_never_goes_back() {
        let mut clock = Clock::new();
        let before = clock.ns_at(5_000);
        clock.pull(5_000, 10, 2000);
        assert_eq!(clock.ns_at(5_000), before);
        assert_eq!(clock.ns_at(5_001), before + 2);
        clock.pull(5_001, u64::MAX, u32::MAX);
        assert_eq!(clock.ns_at(u64::MAX), u64::MAX);
        clock.pull(5_002, 0, 0);
        assert_eq!(clock.position_of(u64::MAX), Some(5_002));
    }

    #[test]
    fn standing_time_reaches_no_deadline() {
        let mut clock = Clock::new();
        clock.pull(0, 0, 0);
        assert_eq!(clock.position_of(1), None);
    }
}
