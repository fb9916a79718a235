//! Power and reset: the PM1 registers of ACPI, the reset control register, the keyboard controller's reset line; and the debug-exit port, if there
//! is one.
//!
//! **In:** port accesses, the power button. **Out:** how the run ended, the level of the SCI. **Invariant:** once ended, a machine stays ended; the SCI is
//! high while an enabled event is pending. Reference: ACPI 6.5, sections 4.8.3.1 and 4.8.3.2 (PM1 event and control registers).
use crate::layout;
use crate::payload::{Payload, Payloads, RestoreError};
use minicbor::{Decode, Encode};

/// PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 enable: timer, global lock, power button, sleep button, clock.
const PM1_ENABLES: u16 = 1 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
/// PM1 control, low byte: ACPI mode is on, always.
const SCI_ENABLED: u8 = 1;
/// PM1 control, high byte.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Offsets into the PM1 registers, which lie side by side.
const PM1_STATUS: u16 = 0;
const PM1_STATUS_HIGH: u16 = 1;
const PM1_ENABLE: u16 = 2;
const PM1_ENABLE_HIGH: u16 = 3;
const PM1_CONTROL: u16 = 4;
const PM1_CONTROL_HIGH: u16 = 5;
const PM1_LEN: u16 = layout::PORT_PM1_EVENT_LEN + layout::PORT_PM1_CONTROL_LEN;
const KBD_PULSE_RESET: u8 = 0xfe;
const RESET_NOW: u8 = 1 << 2;

/// How a machine's run ended.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Ending {
    /// The guest switched itself off.
    #[n(0)]
    PoweredOff,
    /// The guest asked for a reset.
    #[n(1)]
    Reset,
    /// The processor shut down.
    #[n(2)]
    Crashed(#[n(0)] String),
    /// The guest wrote this value to the debug-exit port.
    #[n(3)]
    DebugExit(#[n(0)] u32),
}

/// The power and reset registers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Power {
    #[n(0)]
    reset_control: u8,
    #[n(1)]
    ending: Option<Ending>,
    #[n(2)]
    pm1_status: u16,
    #[n(3)]
    pm1_enable: u16,
    /// The sleep type; the rest of the control register has no effect.
    #[n(4)]
    sleep_type: u8,
    /// There is a debug-exit port. `None` is written as nothing at all, so a machine without one is saved as in version 1.
    #[n(5)]
    debug_exit: Option<bool>,
}

impl Power {
    const KIND: &'static str = "power";
    const VERSION: u16 = 2;

    pub(crate) fn new() -> Self {
        Self { reset_control: 0, ending: None, pm1_status: 0, pm1_enable: 0, sleep_type: 0, debug_exit: None }
    }

    /// How the run ended, if it did.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// The processor shut down.
    pub(crate) fn crash(&mut self, reason: &str) {
        self.ending.get_or_insert_with(|| Ending::Crashed(reason.into()));
    }

    /// Adds the debug-exit port.
    pub(crate) fn add_debug_exit(&mut self) {
        self.debug_exit = Some(true);
    }

    /// Whether a port is part of the debug-exit port, and there is one.
    pub(crate) fn owns_debug_exit(&self, port: u16) -> bool {
        self.debug_exit == Some(true)
            && (layout::PORT_DEBUG_EXIT..layout::PORT_DEBUG_EXIT + layout::PORT_DEBUG_EXIT_LEN).contains(&port)
    }

    /// The guest wrote to the debug-exit port.
    pub(crate) fn debug_exit(&mut self, value: u32) {
        self.end(Ending::DebugExit(value));
    }

    /// Whether a port is one of these registers.
    pub(crate) fn owns(port: u16) -> bool {
        Self::pm1(port).is_some() || port == layout::PORT_KBD_COMMAND || port == layout::PORT_RESET
    }

    /// Offset into the PM1 registers.
    fn pm1(port: u16) -> Option<u16> {
        port.checked_sub(layout::PORT_PM1_EVENT).filter(|&offset| offset < PM1_LEN)
    }

    /// Somebody pressed the power button.
    pub(crate) fn press_button(&mut self) {
        self.pm1_status |= POWER_BUTTON;
    }

    /// The level of the SCI.
    pub(crate) fn line(&self) -> bool {
        self.pm1_status & self.pm1_enable != 0
    }

    /// Reads one of its ports.
    pub(crate) fn read(&self, port: u16) -> u8 {
        match Self::pm1(port) {
            Some(PM1_STATUS) => self.pm1_status as u8,
            Some(PM1_STATUS_HIGH) => (self.pm1_status >> 8) as u8,
            Some(PM1_ENABLE) => self.pm1_enable as u8,
            Some(PM1_ENABLE_HIGH) => (self.pm1_enable >> 8) as u8,
            Some(PM1_CONTROL) => SCI_ENABLED,
            Some(PM1_CONTROL_HIGH) => self.sleep_type << 2,
            _ if port == layout::PORT_RESET => self.reset_control,
            // There is no keyboard controller.
            _ => 0xff,
        }
    }

    /// Writes one of its ports. Returns whether that ended the run.
    pub(crate) fn write(&mut self, port: u16, value: u8) -> bool {
        let (low, high) = (u16::from(value), u16::from(value) << 8);
        match Self::pm1(port) {
            // Ones clear.
            Some(PM1_STATUS) => self.pm1_status &= !low,
            Some(PM1_STATUS_HIGH) => self.pm1_status &= !high,
            Some(PM1_ENABLE) => self.pm1_enable = (self.pm1_enable & 0xff00 | low) & PM1_ENABLES,
            Some(PM1_ENABLE_HIGH) => self.pm1_enable = (self.pm1_enable & 0x00ff | high) & PM1_ENABLES,
            Some(PM1_CONTROL_HIGH) => {
                self.sleep_type = value >> 2 & 7;
                if value & SLEEP_ENABLE != 0 && self.sleep_type == layout::SLEEP_TYPE_S5 {
                    return self.end(Ending::PoweredOff);
                }
            }
            Some(_) => {}
            None if port == layout::PORT_KBD_COMMAND && value == KBD_PULSE_RESET => return self.end(Ending::Reset),
            None if port == layout::PORT_RESET => {
                self.reset_control = value & 0x0a;
                if value & RESET_NOW != 0 {
                    return self.end(Ending::Reset);
                }
            }
            None => {}
        }
        false
    }

    fn end(&mut self, ending: Ending) -> bool {
        self.ending.get_or_insert(ending);
        true
    }

    pub(crate) fn save(&self) -> Payload {
        Payload::encode(Self::KIND, Self::VERSION, self)
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let new: Self = payload.decode()?;
        if new.pm1_enable & !PM1_ENABLES != 0 || new.pm1_status & !POWER_BUTTON != 0 || new.sleep_type > 7 {
            return Err(payload.invalid("reserved bits are set"));
        }
        *self = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: u16 = layout::PORT_PM1_EVENT;
    const CONTROL_HIGH: u16 = layout::PORT_PM1_CONTROL + 1;

    #[test]
    fn the_first_ending_counts() {
        let mut power = Power::new();
        assert!(!power.write(layout::PORT_KBD_COMMAND, 0xd1));
        assert!(!power.write(layout::PORT_RESET, 0x02));
        assert_eq!(power.read(layout::PORT_RESET), 2);
        assert!(!power.write(CONTROL_HIGH, 3 << 2 | SLEEP_ENABLE));
        assert_eq!(power.read(CONTROL_HIGH), 3 << 2);
        assert_eq!(power.ending(), None);
        assert!(power.write(CONTROL_HIGH, 5 << 2 | SLEEP_ENABLE));
        assert!(power.write(layout::PORT_RESET, layout::RESET_VALUE));
        assert_eq!(power.ending(), Some(&Ending::PoweredOff));
        let mut back = Power::new();
        back.restore(&mut Payloads::new(vec![power.save()]).unwrap()).unwrap();
        assert_eq!(back, power);
    }

    #[test]
    fn a_debug_exit_port_is_there_when_it_was_added() {
        let mut power = Power::new();
        let without = power.save();
        assert!(!power.owns_debug_exit(0xf4));
        power.add_debug_exit();
        assert!(power.owns_debug_exit(0xf4) && power.owns_debug_exit(0xf7) && !power.owns_debug_exit(0xf8));
        power.debug_exit(0x10);
        assert_eq!(power.ending(), Some(&Ending::DebugExit(0x10)));
        let mut back = Power::new();
        back.restore(&mut Payloads::new(vec![power.save()]).unwrap()).unwrap();
        assert_eq!(back, power);
        // Version 1 knows none; its bytes are those of a machine without.
        assert_eq!(without.bytes, [0x85, 0, 0xf6, 0, 0, 0]);
        back.restore(&mut Payloads::new(vec![Payload { version: 1, ..without }]).unwrap()).unwrap();
        assert_eq!(back, Power::new());
    }

    #[test]
    fn the_power_button_raises_the_sci_until_acknowledged() {
        let mut power = Power::new();
        power.press_button();
        assert!(!power.line(), "not enabled");
        power.write(EVENT + 2, 0xff);
        power.write(EVENT + 3, 0xff);
        assert!(power.line());
        assert_eq!((power.read(EVENT + 1), power.read(EVENT + 2), power.read(EVENT + 4)), (1, 0x21, 1));
        power.write(EVENT, 0xff);
        assert!(power.line());
        power.write(EVENT + 1, 1);
        assert!(!power.line());
    }

    #[test]
    fn resets() {
        for (port, value) in [(layout::PORT_KBD_COMMAND, 0xfe), (layout::PORT_RESET, 6)] {
            let mut power = Power::new();
            assert!(power.write(port, value));
            assert_eq!(power.ending(), Some(&Ending::Reset));
        }
    }
}
