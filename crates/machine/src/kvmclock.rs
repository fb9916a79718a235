//! kvmclock: the paravirtual clock Linux takes its TSC frequency and wall time from.
//!
//! **In:** MSR writes, guest time, the wall clock. **Out:** two structures in guest RAM. **Invariant:** system time equals guest time in nanoseconds; as
//! the TSC runs at 1 GHz by definition, one structure written once stays true for ever, and it is flagged stable.
//! Reference: Linux, Documentation/virt/kvm/x86/msr.rst and arch/x86/include/asm/pvclock-abi.h.
use crate::memory::GuestRam;
use crate::payload::{Payload, Payloads, RestoreError};
use minicbor::{Decode, Encode};
use vm_memory::{Bytes, GuestAddress};

const MSR_WALL_CLOCK_OLD: u32 = 0x11;
const MSR_SYSTEM_TIME_OLD: u32 = 0x12;
const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// Bit 0 of the system time MSR.
const ENABLED: u64 = 1;
/// All processors see the same time, and it never goes back.
const FLAG_STABLE: u8 = 1;
/// nanoseconds = (TSC << shift) * multiplier / 2^32: for 1 GHz, 1 and 2^31.
const TSC_SHIFT: i8 = 1;
const TSC_MULTIPLIER: u32 = 1 << 31;

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct State {
    #[n(0)]
    wall_clock: u64,
    #[n(1)]
    system_time: u64,
    /// Even; grows by two with every structure written.
    #[n(2)]
    version: u32,
    /// The guest wrote the MSR and the structure is not written yet.
    #[n(3)]
    wall_clock_due: bool,
    #[n(4)]
    system_time_due: bool,
}

/// The paravirtual clock of the one processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KvmClock {
    s: State,
}

impl KvmClock {
    const KIND: &'static str = "kvmclock";
    const VERSION: u16 = 1;

    pub(crate) fn new() -> Self {
        Self { s: State { wall_clock: 0, system_time: 0, version: 0, wall_clock_due: false, system_time_due: false } }
    }

    /// Reads one of its MSRs.
    pub(crate) fn read_msr(&self, msr: u32) -> Option<u64> {
        match msr {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD => Some(self.s.wall_clock),
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => Some(self.s.system_time),
            _ => None,
        }
    }

    /// Writes one of its MSRs; [`KvmClock::latch`] follows at the instruction's end. Returns false if it is not one of them.
    pub(crate) fn write_msr(&mut self, msr: u32, value: u64) -> bool {
        match msr {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD => {
                self.s.wall_clock = value;
                self.s.wall_clock_due = true;
            }
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => {
                self.s.system_time = value;
                self.s.system_time_due = value & ENABLED != 0;
            }
            _ => return false,
        }
        true
    }

    /// Writes the structures that were asked for. A structure at an address without RAM is the guest's own loss.
    pub(crate) fn latch(&mut self, ram: &GuestRam, now_ns: u64, tsc_offset: u64, wall_clock_ns: u64) {
        if std::mem::take(&mut self.s.wall_clock_due) {
            self.s.version = self.s.version.wrapping_add(2);
            let mut wall = [0; 12];
            wall[0..4].copy_from_slice(&self.s.version.to_le_bytes());
            wall[4..8].copy_from_slice(&((wall_clock_ns / 1_000_000_000) as u32).to_le_bytes());
            wall[8..12].copy_from_slice(&((wall_clock_ns % 1_000_000_000) as u32).to_le_bytes());
            let _ = ram.write_slice(&wall, GuestAddress(self.s.wall_clock));
        }
        if std::mem::take(&mut self.s.system_time_due) {
            self.s.version = self.s.version.wrapping_add(2);
            let mut time = [0; 32];
            time[0..4].copy_from_slice(&self.s.version.to_le_bytes());
            time[8..16].copy_from_slice(&now_ns.wrapping_add(tsc_offset).to_le_bytes());
            time[16..24].copy_from_slice(&now_ns.to_le_bytes());
            time[24..28].copy_from_slice(&TSC_MULTIPLIER.to_le_bytes());
            time[28] = TSC_SHIFT as u8;
            time[29] = FLAG_STABLE;
            let _ = ram.write_slice(&time, GuestAddress(self.s.system_time & !ENABLED));
        }
    }

    pub(crate) fn save(&self) -> Payload {
        Payload::encode(Self::KIND, Self::VERSION, &self.s)
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let s: State = payload.decode()?;
        if !s.version.is_multiple_of(2) {
            return Err(payload.invalid("odd version"));
        }
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn structures_say_one_gigahertz() {
        let (ram, _phys) = memory::map(64).unwrap();
        let mut clock = KvmClock::new();
        assert!(clock.write_msr(MSR_SYSTEM_TIME, 0x5000 | ENABLED));
        assert!(clock.write_msr(MSR_WALL_CLOCK, 0x6004));
        assert!(!clock.write_msr(0x4b56_4d02, 0));
        clock.latch(&ram, 12_345, 1_000, 1_700_000_000_000_000_007);
        let at = |offset: u64| ram.read_obj::<u64>(GuestAddress(0x5000 + offset)).unwrap();
        let version = at(0) as u32;
        assert!(version != 0 && version.is_multiple_of(2));
        let (tsc, system) = (at(8), at(16));
        assert_eq!((tsc, system), (13_345, 12_345));
        // What Linux computes when the guest's TSC has moved on by 500.
        let shifted = u128::from(13_845 - tsc) << TSC_SHIFT;
        let ns = system + ((shifted * u128::from(at(24) as u32)) >> 32) as u64;
        assert_eq!(ns, 12_845);
        assert_eq!(at(24) >> 40 & 0xff, u64::from(FLAG_STABLE));
        assert_eq!(ram.read_obj::<u32>(GuestAddress(0x6008)).unwrap(), 1_700_000_000);
        assert_eq!(ram.read_obj::<u32>(GuestAddress(0x600c)).unwrap(), 7);
        assert_eq!(clock.read_msr(MSR_SYSTEM_TIME_OLD), Some(0x5001));
    }

    #[test]
    fn wild_addresses_hurt_nobody() {
        let (ram, _phys) = memory::map(64).unwrap();
        let mut clock = KvmClock::new();
        clock.write_msr(MSR_SYSTEM_TIME, u64::MAX);
        clock.write_msr(MSR_WALL_CLOCK, u64::MAX - 3);
        clock.latch(&ram, 0, 0, u64::MAX);
        clock.write_msr(MSR_SYSTEM_TIME, 0x5000);
        clock.latch(&ram, 1, 0, 0);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x5000)).unwrap(), 0, "not enabled");
    }
}
