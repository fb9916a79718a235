//! Interrupt controllers: the processor's local APIC and the I/O APIC.
//!
//! There is no 8259 and no 8254: guests find no answer at their ports and do without them. They learn time from the TSC, kvmclock and the local APIC
//! timer.
mod io;
mod local;

pub(crate) use io::IoApic;
pub(crate) use local::LocalApic;

/// An interrupt message as the I/O APIC and MSI capable devices send it to the processor (SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    /// Vector, 16..=255.
    pub(crate) vector: u8,
    /// Delivery mode: 0 fixed, 1 lowest priority; everything else is dropped.
    pub(crate) mode: u8,
    /// Logical destination.
    pub(crate) logical: bool,
    /// Destination.
    pub(crate) destination: u32,
    /// Level triggered: its end-of-interrupt goes to the I/O APIC.
    pub(crate) level: bool,
}

impl Message {
    /// The message an MSI write makes, or `None` if the address is not an interrupt message.
    pub(crate) fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        Some(Self {
            vector: data as u8,
            mode: (data >> 8) as u8 & 7,
            logical: address & 4 != 0,
            destination: (address >> 12) as u32 & 0xff,
            level: data & (1 << 15) != 0,
        })
    }
}
