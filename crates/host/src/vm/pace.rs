//! Guest time pulled toward real time.
//!
//! *In*: real time, positions. *Out*: `Clock` inputs, and how many instructions to run before the next look outside.
//! *Invariant*: guest time is never ahead of real time by more than one tick's error, and the inputs given are all that the machine knows of time.
use twinstep_machine::Input;

/// Real time between two clock inputs of a busy guest.
const TICK_NS: u64 = 1_000_000;
/// Real time between two looks at what has arrived for a busy guest.
const SLICE_NS: u64 = 200_000;
/// Bounds of the slice in instructions: the first for a guest that only waits on devices, the last for a measurement gone wild.
const SLICE_INSTRUCTIONS: std::ops::RangeInclusive<u64> = 2_000..=2_000_000;

/// Keeps one machine's time.
#[derive(Debug)]
pub struct Pace {
    /// Real time (monotonic) at guest time zero.
    origin_ns: u64,
    last_tick_ns: u64,
    last_tick_position: u64,
    /// Picoseconds of real time an instruction takes, smoothed.
    picoseconds: u64,
}

impl Pace {
    /// A pace for a machine at `position` whose guest time is `guest_ns` at the real time `now_ns`.
    pub fn new(now_ns: u64, position: u64, guest_ns: u64) -> Self {
        Self {
            origin_ns: now_ns.wrapping_sub(guest_ns),
            last_tick_ns: now_ns,
            last_tick_position: position,
            picoseconds: 5_000,
        }
    }
    /// Guest time that corresponds to `now_ns`.
    pub fn guest_ns(&self, now_ns: u64) -> u64 {
        now_ns.wrapping_sub(self.origin_ns)
    }
    /// How many instructions to run before looking outside again.
    pub fn slice(&self) -> u64 {
        (SLICE_NS * 1000 / self.picoseconds).clamp(*SLICE_INSTRUCTIONS.start(), *SLICE_INSTRUCTIONS.end())
    }
    /// Whether a busy guest is due a clock input.
    pub fn tick_due(&self, now_ns: u64) -> bool {
        now_ns - self.last_tick_ns >= TICK_NS
    }
    /// The clock input for now. `slept` says that the guest was idle since the last one, so that nothing is learnt of its speed.
    pub fn tick(&mut self, now_ns: u64, position: u64, slept: bool) -> Input {
        let (ns, instructions) = (now_ns - self.last_tick_ns, position - self.last_tick_position);
        if !slept && instructions > 10_000 {
            let measured = (ns as u128 * 1000 / instructions as u128).clamp(50, 1_000_000) as u64;
            self.picoseconds = (self.picoseconds * 7 + measured) / 8;
        }
        self.last_tick_ns = now_ns;
        self.last_tick_position = position;
        Input::Clock {
            advance_to_ns: self.guest_ns(now_ns),
            // A little slow, so that guest time lags and each tick pulls it forward: it must not run ahead.
            picoseconds_per_instruction: (self.picoseconds * 7 / 8) as u32,
        }
    }
    /// Forgets how long the machine stood still (it was held back): guest time goes on, but its speed is not learnt from it.
    pub fn stood_still(&mut self, now_ns: u64, position: u64) {
        self.last_tick_ns = now_ns.max(self.last_tick_ns);
        self.last_tick_position = position;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_the_speed_and_stays_behind_real_time() {
        let mut pace = Pace::new(1_000, 0, 0);
        let (mut now, mut position) = (1_000, 0);
        for _ in 0..100 {
            now += TICK_NS;
            position += 500_000;
            assert!(pace.tick_due(now));
            let Input::Clock { advance_to_ns, picoseconds_per_instruction } = pace.tick(now, position, false) else { panic!() };
            assert_eq!(advance_to_ns, now - 1_000);
            let next_guest = advance_to_ns + 500_000 * u64::from(picoseconds_per_instruction) / 1000;
            assert!(position < 10_000_000 || next_guest <= now - 1_000 + TICK_NS);
        }
        assert!((1_900..2_100).contains(&pace.picoseconds), "{}", pace.picoseconds);
        assert_eq!(pace.slice(), SLICE_NS * 1000 / pace.picoseconds);
    }
}
