//! COM1: a 16550A UART.
//!
//! **In:** port accesses and typed bytes. **Out:** written bytes, and the level of its interrupt line. **Invariant:** transmission takes no time, so the
//! transmitter is always empty; received bytes wait in a bounded queue and beyond it are dropped, always at the same byte. Reference:
//! National Semiconductor PC16550D data sheet.
use crate::payload::{Payload, Payloads, RestoreError};
use minicbor::{Decode, Encode};
use std::collections::VecDeque;

/// Typed bytes that wait at most; what comes beyond is lost.
pub(crate) const BACKLOG: usize = 64 << 10;
/// What the guest's "clear receiver FIFO" can throw away: the size of the real FIFO.
const FIFO: usize = 16;

const IER_RECEIVED: u8 = 1;
const IER_TRANSMIT: u8 = 2;
const IER_MODEM: u8 = 8;
const LCR_DIVISOR: u8 = 0x80;
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;
const LSR_READY: u8 = 1;
const LSR_IDLE: u8 = 0x60;
/// Clear to send, data set ready, carrier.
const MSR_LINES: u8 = 0xb0;

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct State {
    #[n(0)]
    ier: u8,
    #[n(1)]
    fcr: u8,
    #[n(2)]
    lcr: u8,
    #[n(3)]
    mcr: u8,
    #[n(4)]
    scratch: u8,
    #[n(5)]
    divisor: u16,
    /// The transmitter became empty and nobody has heard of it yet.
    #[n(6)]
    transmit_pending: bool,
    #[cbor(n(7), with = "minicbor::bytes")]
    received: Vec<u8>,
    /// Modem lines as last read, for their change bits (loop-back only).
    #[n(8)]
    modem_seen: u8,
}

/// What an access did beside its answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// A byte for the world.
    pub(crate) output: Option<u8>,
    /// The interrupt line fell and rose again, even if its level is the same as before.
    pub(crate) pulse: bool,
}

/// The UART.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Serial {
    s: State,
    received: VecDeque<u8>,
}

impl Serial {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;

    pub(crate) fn new() -> Self {
        let s = State {
            ier: 0,
            fcr: 0,
            lcr: 3,
            mcr: 0,
            scratch: 0,
            divisor: 1,
            transmit_pending: false,
            received: Vec::new(),
            modem_seen: MSR_LINES,
        };
        Self { s, received: VecDeque::new() }
    }

    /// The level of the interrupt line. On a PC, OUT2 gates it.
    pub(crate) fn line(&self) -> bool {
        self.s.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && self.source().is_some()
    }

    /// The interrupt identification of the most urgent source.
    fn source(&self) -> Option<u8> {
        if self.s.ier & IER_RECEIVED != 0 && !self.received.is_empty() {
            // Below its trigger level a FIFO reports a time-out, which here passes at once.
            let trigger = [1, 4, 8, 14][usize::from(self.s.fcr >> 6)];
            let fifo = self.s.fcr & 1 != 0;
            return Some(if fifo && self.received.len() < trigger { 0xc } else { 4 });
        }
        if self.s.ier & IER_TRANSMIT != 0 && self.s.transmit_pending {
            return Some(2);
        }
        (self.s.ier & IER_MODEM != 0 && self.modem() & 0xf != 0).then_some(0)
    }

    /// MSR: in loop-back the modem control outputs, with change bits.
    fn modem(&self) -> u8 {
        let lines = if self.s.mcr & MCR_LOOP != 0 {
            let m = self.s.mcr;
            (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
        } else {
            MSR_LINES
        };
        let changed = (lines ^ self.s.modem_seen) >> 4;
        // The ring indicator counts only when it falls.
        let ring_fell = self.s.modem_seen & !lines & 0x40 != 0;
        lines | changed & 0xb | u8::from(ring_fell) << 2
    }

    fn push(&mut self, byte: u8) {
        if self.received.len() < BACKLOG {
            self.received.push_back(byte);
        }
    }

    /// Bytes typed.
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.push(byte);
        }
    }

    /// Reads the register at `offset` 0..=7.
    pub(crate) fn read(&mut self, offset: u16) -> u8 {
        let divisor = self.s.lcr & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => self.s.divisor as u8,
            0 => self.received.pop_front().unwrap_or(0),
            1 if divisor => (self.s.divisor >> 8) as u8,
            1 => self.s.ier,
            2 => {
                let source = self.source();
                if source == Some(2) {
                    self.s.transmit_pending = false;
                }
                source.unwrap_or(1) | if self.s.fcr & 1 != 0 { 0xc0 } else { 0 }
            }
            3 => self.s.lcr,
            4 => self.s.mcr,
            5 => LSR_IDLE | if self.received.is_empty() { 0 } else { LSR_READY },
            6 => {
                let modem = self.modem();
                self.s.modem_seen = modem & 0xf0;
                modem
            }
            _ => self.s.scratch,
        }
    }

    /// Writes the register at `offset` 0..=7.
    pub(crate) fn write(&mut self, offset: u16, value: u8) -> Effect {
        let divisor = self.s.lcr & LCR_DIVISOR != 0;
        let mut effect = Effect::default();
        match offset {
            0 if divisor => self.s.divisor = self.s.divisor & 0xff00 | u16::from(value),
            0 => {
                if self.s.mcr & MCR_LOOP != 0 {
                    self.push(value);
                } else {
                    effect.output = Some(value);
                }
                // Full and at once empty again: the line falls and rises.
                self.s.transmit_pending = true;
                effect.pulse = true;
            }
            1 if divisor => self.s.divisor = self.s.divisor & 0xff | u16::from(value) << 8,
            1 => {
                if value & !self.s.ier & IER_TRANSMIT != 0 {
                    self.s.transmit_pending = true;
                    effect.pulse = true;
                }
                self.s.ier = value & 0xf;
            }
            2 => {
                let value = if value & 1 == 0 { 0 } else { value };
                if value & 2 != 0 || (value ^ self.s.fcr) & 1 != 0 {
                    let lost = self.received.len().min(FIFO);
                    self.received.drain(..lost);
                }
                self.s.fcr = value & 0xc9;
            }
            3 => self.s.lcr = value,
            4 => self.s.mcr = value & 0x1f,
            7 => self.s.scratch = value,
            _ => {}
        }
        effect
    }

    pub(crate) fn save(&self) -> Payload {
        let state = State { received: self.received.iter().copied().collect(), ..self.s.clone() };
        Payload::encode(Self::KIND, Self::VERSION, &state)
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let mut s: State = payload.decode()?;
        if s.received.len() > BACKLOG {
            return Err(payload.invalid("too many received bytes"));
        }
        if s.ier > 0xf || s.mcr > 0x1f || s.fcr & !0xc9 != 0 || s.modem_seen & 0xf != 0 {
            return Err(payload.invalid("reserved bits are set"));
        }
        self.received = std::mem::take(&mut s.received).into();
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_and_the_line_pulses() {
        let mut uart = Serial::new();
        uart.write(4, 0xb);
        assert_eq!(uart.write(0, b'x'), Effect { output: Some(b'x'), pulse: true });
        assert!(!uart.line(), "not enabled");
        uart.write(1, 2);
        assert!(uart.line());
        assert_eq!(uart.read(2), 2);
        assert!(!uart.line(), "reading IIR took it");
        assert_eq!(uart.read(2), 1);
        uart.write(0, b'y');
        assert!(uart.line());
        assert_eq!(uart.read(5), 0x60);
    }

    #[test]
    fn typed_bytes_interrupt_until_read() {
        let mut uart = Serial::new();
        uart.write(4, 8);
        uart.write(2, 0x81);
        uart.write(1, 5);
        uart.receive(b"ab");
        assert!(uart.line());
        assert_eq!(uart.read(2), 0xcc, "time-out: below the trigger level");
        assert_eq!(uart.read(5) & 1, 1);
        assert_eq!((uart.read(0), uart.read(0)), (b'a', b'b'));
        assert!(!uart.line());
        uart.receive(&[0; 8]);
        assert_eq!(uart.read(2), 0xc4);
    }

    #[test]
    fn linux_finds_a_16550a() {
        let mut uart = Serial::new();
        uart.write(7, 0x5a);
        assert_eq!(uart.read(7), 0x5a);
        uart.write(2, 1);
        assert_eq!(uart.read(2) >> 6, 3);
        // Loop-back: OUT2 and RTS come back as carrier and clear-to-send.
        uart.write(4, 0x1a);
        assert_eq!(uart.read(6) & 0xf0, 0x90);
        uart.write(0, 7);
        assert_eq!(uart.read(0), 7);
        uart.write(3, 0x80);
        uart.write(0, 12);
        uart.write(1, 1);
        assert_eq!((uart.read(0), uart.read(1)), (12, 1));
    }

    #[test]
    fn the_backlog_is_bounded() {
        let mut uart = Serial::new();
        uart.receive(&vec![1; BACKLOG]);
        uart.receive(b"lost");
        assert_eq!(uart.received.len(), BACKLOG);
        uart.write(2, 3);
        assert_eq!(uart.received.len(), BACKLOG - FIFO);
    }

    #[test]
    fn state_survives_saving() {
        let mut uart = Serial::new();
        uart.write(1, 7);
        uart.write(0, 1);
        uart.receive(b"abc");
        let mut back = Serial::new();
        back.restore(&mut Payloads::new(vec![uart.save()]).unwrap()).unwrap();
        assert_eq!(back, uart);
        uart.s.ier = 0xff;
        assert!(back.restore(&mut Payloads::new(vec![uart.save()]).unwrap()).is_err());
    }
}
