//! The I/O APIC: 24 interrupt lines turned into messages to the local APIC.
//!
//! **In:** line levels, register accesses, end-of-interrupt broadcasts. **Out:** [`Message`]s. **Invariant:** an edge line sends on its rising edge
//! while unmasked; a level line sends when it is high, unmasked and not already being served. Reference: Intel 82093AA data sheet; the EOI
//! register of version 0x20.
use super::Message;
use crate::payload::{Payload, Payloads, RestoreError};
use minicbor::{Decode, Encode};

/// Interrupt lines.
pub(crate) const PINS: usize = 24;

const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;
const REG_EOI: u64 = 0x40;

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const DELIVERY_STATUS: u64 = 1 << 12;
const LOGICAL: u64 = 1 << 11;
/// Destination, mask, trigger, polarity, destination mode, delivery mode, vector.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct State {
    #[n(0)]
    select: u8,
    #[n(1)]
    id: u8,
    #[n(2)]
    redirection: [u64; PINS],
    /// Lines that are high, a bit each.
    #[n(3)]
    lines: u32,
}

/// The I/O APIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IoApic {
    s: State,
}

impl IoApic {
    const KIND: &'static str = "io-apic";
    const VERSION: u16 = 1;

    /// All lines low and masked.
    pub(crate) fn new() -> Self {
        Self { s: State { select: 0, id: 0, redirection: [MASKED; PINS], lines: 0 } }
    }

    /// Sets the level of a line. Returns the message that makes, if any.
    pub(crate) fn set_line(&mut self, pin: u8, high: bool) -> Option<Message> {
        let pin = usize::from(pin);
        if pin >= PINS {
            return None;
        }
        let was = self.s.lines >> pin & 1 != 0;
        if high {
            self.s.lines |= 1 << pin;
        } else {
            self.s.lines &= !(1 << pin);
        }
        if self.s.redirection[pin] & LEVEL != 0 {
            return self.serve_level(pin);
        }
        (high && !was && self.s.redirection[pin] & MASKED == 0).then(|| self.message(pin))
    }

    fn serve_level(&mut self, pin: usize) -> Option<Message> {
        let entry = &mut self.s.redirection[pin];
        if self.s.lines >> pin & 1 == 0 || *entry & (MASKED | REMOTE_IRR) != 0 || *entry & LEVEL == 0 {
            return None;
        }
        *entry |= REMOTE_IRR;
        Some(self.message(pin))
    }

    fn message(&self, pin: usize) -> Message {
        let entry = self.s.redirection[pin];
        Message {
            vector: entry as u8,
            mode: (entry >> 8) as u8 & 7,
            logical: entry & LOGICAL != 0,
            destination: (entry >> 56) as u32,
            level: entry & LEVEL != 0,
        }
    }

    /// The processor finished `vector`. Lines that are still high send again.
    pub(crate) fn end_of_interrupt(&mut self, vector: u8) -> Vec<Message> {
        let mut again = Vec::new();
        for pin in 0..PINS {
            let entry = &mut self.s.redirection[pin];
            if *entry as u8 == vector && *entry & LEVEL != 0 {
                *entry &= !REMOTE_IRR;
                again.extend(self.serve_level(pin));
            }
        }
        again
    }

    fn read_register(&self) -> u32 {
        match self.s.select {
            0 | 2 => u32::from(self.s.id) << 24,
            // 24 entries, version 0x20: there is an EOI register.
            1 => (PINS as u32 - 1) << 16 | 0x20,
            n @ 0x10..0x40 => {
                let entry = self.s.redirection[usize::from(n - 0x10) / 2];
                (if n & 1 == 0 { entry } else { entry >> 32 }) as u32
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, value: u32) -> Option<Message> {
        match self.s.select {
            0 => self.s.id = (value >> 24) as u8 & 0xf,
            n @ 0x10..0x40 => {
                let pin = usize::from(n - 0x10) / 2;
                let entry = &mut self.s.redirection[pin];
                let new = if n & 1 == 0 {
                    *entry & !0xffff_ffff | u64::from(value)
                } else {
                    *entry & 0xffff_ffff | u64::from(value) << 32
                };
                *entry = new & WRITABLE | *entry & (REMOTE_IRR | DELIVERY_STATUS);
                if *entry & LEVEL == 0 {
                    // Linux clears a stuck remote IRR by a trip through edge mode.
                    *entry &= !REMOTE_IRR;
                }
                return self.serve_level(pin);
            }
            _ => {}
        }
        None
    }

    /// Reads from its page.
    pub(crate) fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            REG_SELECT => u32::from(self.s.select),
            REG_WINDOW => self.read_register(),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, out) in data.iter_mut().enumerate() {
            *out = bytes.get(i).copied().unwrap_or(0);
        }
    }

    /// Writes to its page. Returns the messages that makes.
    pub(crate) fn mmio_write(&mut self, offset: u64, data: &[u8]) -> Vec<Message> {
        let mut bytes = [0; 4];
        let n = data.len().min(4);
        bytes[..n].copy_from_slice(&data[..n]);
        let value = u32::from_le_bytes(bytes);
        match offset {
            REG_SELECT => self.s.select = value as u8,
            REG_WINDOW if n == 4 => return self.write_register(value).into_iter().collect(),
            REG_EOI => return self.end_of_interrupt(value as u8),
            _ => {}
        }
        Vec::new()
    }

    pub(crate) fn save(&self) -> Payload {
        Payload::encode(Self::KIND, Self::VERSION, &self.s)
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let s: State = payload.decode()?;
        if s.lines >> PINS != 0 || s.redirection.iter().any(|e| e & !(WRITABLE | REMOTE_IRR | DELIVERY_STATUS) != 0) {
            return Err(payload.invalid("reserved bits are set"));
        }
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(io: &mut IoApic, register: u8, value: u32) -> Vec<Message> {
        io.mmio_write(REG_SELECT, &u32::from(register).to_le_bytes());
        io.mmio_write(REG_WINDOW, &value.to_le_bytes())
    }
    fn read(io: &mut IoApic, register: u8) -> u32 {
        io.mmio_write(REG_SELECT, &u32::from(register).to_le_bytes());
        let mut bytes = [0; 4];
        io.mmio_read(REG_WINDOW, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn edge_lines_send_on_the_rising_edge_only() {
        let mut io = IoApic::new();
        assert_eq!(io.set_line(4, true), None, "masked");
        write(&mut io, 0x18, 0x34);
        assert_eq!(io.set_line(4, true), None, "no edge");
        io.set_line(4, false);
        let m = io.set_line(4, true).unwrap();
        assert_eq!((m.vector, m.mode, m.level), (0x34, 0, false));
        assert!(io.end_of_interrupt(0x34).is_empty());
    }

    #[test]
    fn level_lines_send_until_they_fall() {
        let mut io = IoApic::new();
        write(&mut io, 0x1a, 0x35 | LEVEL as u32);
        assert!(io.set_line(5, true).is_some_and(|m| m.level));
        assert_eq!(io.set_line(5, true), None, "being served");
        assert_eq!(read(&mut io, 0x1a) & REMOTE_IRR as u32, REMOTE_IRR as u32);
        assert_eq!(io.end_of_interrupt(0x35).len(), 1, "still high");
        io.set_line(5, false);
        assert!(io.end_of_interrupt(0x35).is_empty());
        // A line that is high when it is unmasked sends then.
        write(&mut io, 0x1a, 0x35 | LEVEL as u32 | MASKED as u32);
        assert_eq!(io.set_line(5, true), None);
        assert_eq!(write(&mut io, 0x1a, 0x35 | LEVEL as u32).len(), 1);
        assert_eq!(io.mmio_write(REG_EOI, &0x35u32.to_le_bytes()).len(), 1);
    }

    #[test]
    fn registers() {
        let mut io = IoApic::new();
        assert_eq!(read(&mut io, 1), 0x0017_0020);
        write(&mut io, 0x11, 0xff00_0000);
        write(&mut io, 0x10, 0xffff_ffff);
        assert_eq!(read(&mut io, 0x10), 0x0001_afff);
        assert_eq!(read(&mut io, 0x11), 0xff00_0000);
        assert_eq!(read(&mut io, 0xee), 0);
        assert_eq!(io.set_line(200, true), None);
    }

    #[test]
    fn state_survives_saving() {
        let mut io = IoApic::new();
        write(&mut io, 0x1a, 0x35 | LEVEL as u32);
        io.set_line(5, true);
        let mut back = IoApic::new();
        back.restore(&mut Payloads::new(vec![io.save()]).unwrap()).unwrap();
        assert_eq!(back, io);
        io.s.lines = u32::MAX;
        assert!(back.restore(&mut Payloads::new(vec![io.save()]).unwrap()).is_err());
    }
}
