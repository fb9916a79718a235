//! Counters for people: the processor's, and what the guest asked of devices.
//!
//! **In:** accesses to the board. **Out:** counters by name. Invariant: as for the processor's ([`twinstep_x86::CpuStats`]), none has an influence.
use twinstep_x86::{CpuGauges, CpuStats, counters};

counters! {
    /// Accesses of the guest to devices.
    pub struct DeviceStats {
        /// Reads of device memory: PCI functions, interrupt controllers.
        pub memory_reads,
        /// Writes to it.
        pub memory_writes,
        /// IN.
        pub port_reads,
        /// OUT.
        pub port_writes,
        /// RDMSR of a register that belongs to a device: the local APIC, the clock.
        pub msr_reads,
        /// WRMSR to one.
        pub msr_writes,
        /// Times something was due by itself: a timer, a disk's completion.
        pub fired,
    }
}

/// Everything that is counted of a machine.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MachineStats {
    /// The processor.
    pub cpu: CpuStats,
    /// The devices.
    pub devices: DeviceStats,
}

impl MachineStats {
    /// Calls `f` with every counter: its set, its name, its value.
    pub fn each(&self, f: &mut dyn FnMut(&'static str, &'static str, u64)) {
        self.cpu.each(f);
        self.devices.each(&mut |name, value| f("devices", name, value));
    }
    /// What is no counter: how full things are.
    pub fn now(&self) -> CpuGauges {
        self.cpu.now
    }
}
