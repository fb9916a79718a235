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
    last_tick_cpu_ns: u64,
    last_tick_position: u64,
    /// Picoseconds of processor time an instruction takes, smoothed.
    picoseconds: u64,
}

impl Pace {
    /// A pace for a machine at `position` whose guest time is `guest_ns` at the real time `now_ns`; `cpu_ns` is the processor time its
    /// thread has used.
    pub fn new(now_ns: u64, cpu_ns: u64, position: u64, guest_ns: u64) -> Self {
        Self {
            origin_ns: now_ns.wrapping_sub(guest_ns),
            last_tick_ns: now_ns,
            last_tick_cpu_ns: cpu_ns,
            last_tick_position: position,
            // A fast host: an estimate that is too small makes guest time lag for a moment, one that is too large makes it run ahead.
            picoseconds: 500,
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
    /// The clock input for now, for a machine that stands at `position` and believes that it is `believed_ns`.
    ///
    /// The rate is learnt from processor time, not from real time: a host that gives the thread no processor for a while
    /// must not make the guest believe that it has become slow, or its time would run ahead once it runs again.
    pub fn tick(&mut self, now_ns: u64, cpu_ns: u64, position: u64, believed_ns: u64) -> Input {
        let (ns, instructions) = (cpu_ns - self.last_tick_cpu_ns, position - self.last_tick_position);
        if instructions > 10_000 {
            let measured = (u128::from(ns) * 1000 / u128::from(instructions)).clamp(50, 1_000_000) as u64;
            // Down at once, up slowly.
            self.picoseconds = if measured < self.picoseconds {
                (self.picoseconds + measured) / 2
            } else {
                (self.picoseconds * 15 + measured) / 16
            };
        }
        self.last_tick_ns = now_ns;
        self.last_tick_cpu_ns = cpu_ns;
        self.last_tick_position = position;
        let real_ns = self.guest_ns(now_ns);
        // A little slow, so that guest time lags and each tick pulls it forward. If it is ahead all the same, real time catches up.
        let picoseconds = if believed_ns > real_ns { self.picoseconds / 4 } else { self.picoseconds * 7 / 8 };
        Input::Clock { advance_to_ns: real_ns, picoseconds_per_instruction: picoseconds as u32 }
    }
    /// The machine stood still for a while (it was held back): nothing is to be learnt from that time.
    pub fn stood_still(&mut self, now_ns: u64, cpu_ns: u64, position: u64) {
        self.last_tick_ns = now_ns.max(self.last_tick_ns);
        self.last_tick_cpu_ns = cpu_ns;
        self.last_tick_position = position;
    }
}

/// Processor time this thread has used.
pub fn cpu_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_the_speed_and_stays_behind_real_time() {
        let mut pace = Pace::new(1_000, 0, 0, 0);
        let (mut now, mut position, mut guest) = (1_000, 0, 0);
        for round in 0..200 {
            // Every tenth time the host has something else to do for twenty ticks.
            now += if round % 10 == 9 { 20 * TICK_NS } else { TICK_NS };
            position += 500_000;
            assert!(pace.tick_due(now));
            let real = now - 1_000;
            let tick = pace.tick(now, 1_000_000 * (round + 1), position, guest);
            let Input::Clock { advance_to_ns, picoseconds_per_instruction } = tick else { panic!() };
            assert_eq!(advance_to_ns, real);
            guest = guest.max(advance_to_ns) + 500_000 * u64::from(picoseconds_per_instruction) / 1000;
            assert!(guest <= real + TICK_NS, "{guest} at {real}");
        }
        assert!((1_900..2_100).contains(&pace.picoseconds), "{}", pace.picoseconds);
        assert_eq!(pace.slice(), SLICE_NS * 1000 / pace.picoseconds);
    }
}
