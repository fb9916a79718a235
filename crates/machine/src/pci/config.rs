//! The configuration space of one function: 256 bytes, and which of their bits the guest may write.
//!
//! Base address registers size themselves: the bits below their size are simply not writable (PCI Local Bus 3.0, 6.2.5.1).
use crate::payload::{Payload, RestoreError};
use minicbor::bytes::ByteVec;

const LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
/// Memory decoding is on.
const COMMAND_MEMORY: u8 = 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Configuration space of a type 0 function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the next capability goes, and where the link to it is stored.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// A function without base addresses and capabilities. `class` is class, subclass and interface.
    pub(crate) fn new(vendor: u16, device: u16, revision: u8, class: u32, subsystem: (u16, u16)) -> Self {
        let mut config = Self { bytes: [0; LEN], writable: [0; LEN], next: FIRST_CAPABILITY, link: CAPABILITIES };
        config.put(0x00, &vendor.to_le_bytes());
        config.put(0x02, &device.to_le_bytes());
        config.put(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        config.put(0x2c, &subsystem.0.to_le_bytes());
        config.put(0x2e, &subsystem.1.to_le_bytes());
        // Memory, bus master, INTx disable; cache line size; latency timer; interrupt line.
        config.allow(COMMAND, &[0x06, 0x04]);
        config.allow(0x0c, &[0xff, 0xff]);
        config.allow(0x3c, &[0xff]);
        config
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// Makes base address register 0 a 32-bit memory range of `len` bytes (a power of two), with memory decoding on.
    pub(crate) fn add_memory_bar(&mut self, len: u32) {
        assert!(len.is_power_of_two() && len >= 16);
        self.allow(BAR0, &(!(len - 1)).to_le_bytes());
        self.bytes[COMMAND] |= COMMAND_MEMORY;
    }

    /// Sets base address register 0.
    pub(crate) fn set_bar(&mut self, address: u32) {
        self.put(BAR0, &address.to_le_bytes());
    }

    /// Where base address register 0 decodes now, if it does.
    pub(crate) fn bar(&self) -> Option<u64> {
        (self.bytes[COMMAND] & COMMAND_MEMORY != 0)
            .then(|| u64::from(u32::from_le_bytes(self.bytes[BAR0..BAR0 + 4].try_into().expect("4 bytes"))))
    }

    /// Appends a capability; `writable` covers its first bytes. Returns its offset.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        let len = (body.len() + 2).next_multiple_of(4);
        assert!(at + len <= LEN && writable.len() <= body.len(), "capabilities outgrew configuration space");
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.bytes[self.link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.next = at + len;
        at
    }

    /// Reads; past 256 bytes there is nothing but zeroes (no PCI Express capabilities).
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, out) in data.iter_mut().enumerate() {
            *out = self.bytes.get(offset + i).copied().unwrap_or(0);
        }
    }

    /// Writes what may be written.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..LEN).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }

    /// A 16-bit word.
    pub(crate) fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }
    /// A 32-bit word.
    pub(crate) fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    pub(crate) fn save(&self) -> ByteVec {
        self.bytes.to_vec().into()
    }

    /// Takes saved bytes; what the guest cannot write must be as it is here, or the state is another machine's.
    pub(crate) fn restore(&mut self, payload: &Payload, bytes: &[u8]) -> Result<(), RestoreError> {
        if bytes.len() != LEN {
            return Err(payload.invalid("configuration space has the wrong size"));
        }
        for (at, (&new, &old)) in bytes.iter().zip(&self.bytes).enumerate() {
            if (new ^ old) & !self.writable[at] != 0 {
                return Err(payload.invalid(format!("configuration space differs at {at:#x}: another device was saved")));
            }
        }
        self.bytes.copy_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut config = ConfigSpace::new(0x1af4, 0x1041, 1, 0x02_0000, (0x1af4, 1));
        config.add_memory_bar(0x8000);
        config
    }
    fn dword(config: &ConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        config.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn bars_size_themselves() {
        let mut config = space();
        config.set_bar(0xc000_8000);
        config.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(dword(&config, 0x10), 0xffff_8000);
        config.write(0x14, &u32::MAX.to_le_bytes());
        assert_eq!(dword(&config, 0x14), 0);
        config.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!(config.bar(), Some(0xd000_0000));
        config.write(4, &[0]);
        assert_eq!(config.bar(), None);
    }

    #[test]
    fn capabilities_link_up() {
        let mut config = space();
        let a = config.add_capability(0x11, &[1, 2, 3], &[0, 0xc0]);
        let b = config.add_capability(0x09, &[0; 14], &[]);
        assert_eq!((a, b, dword(&config, 0x34) as u8), (0x40, 0x48, 0x40));
        assert_eq!(dword(&config, a) & 0xffff, 0x4811);
        config.write(a, &[0xff; 8]);
        assert_eq!(dword(&config, a), 0xc201_4811);
        assert_eq!(config.word(6) & 0x10, 0x10);
    }

    #[test]
    fn accesses_past_the_end_are_harmless() {
        let mut config = space();
        config.write(254, &[0xff; 8]);
        config.write(4000, &[0xff; 4]);
        assert_eq!(dword(&config, 254), 0);
        assert_eq!(dword(&config, 4092), 0);
    }

    #[test]
    fn another_devices_state_is_refused() {
        let mut config = space();
        let payload = Payload::encode("x", 1, &0u8);
        let mut saved = config.save().to_vec();
        saved[0x12] = 0xc1;
        config.restore(&payload, &saved).unwrap();
        saved[2] ^= 1;
        assert!(config.restore(&payload, &saved).is_err());
        assert!(config.restore(&payload, &[0; 3]).is_err());
    }
}
