//! Power and reset: the PM1 registers of ACPI, the reset control register, the keyboard controller's reset line.
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
const PM1_STATUS: u16 = layout::PORT_PM1_EVENT;
const PM1_ENABLE: u16 = layout::PORT_PM1_EVENT + 2;
const PM1_CONTROL: u16 = layout::PORT_PM1_CONTROL;
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
}

impl Power {
    const KIND: &'static str = "power";
    const VERSION: u16 = 1;

    pub(crate) fn new() -> Self {
        Self { reset_control: 0, ending: None, pm1_status: 0, pm1_enable: 0, sleep_type: 0 }
    }

    /// How the run ended, if it did.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// The processor shut down.
    pub(crate) fn crash(&mut self, reason: &str) {
        self.ending.get_or_insert_with(|| Ending::Crashed(reason.into()));
    }

    /// Whether a port is one of these registers.
    pub(crate) fn owns(port: u16) -> bool {
        matches!(port, PM1_STATUS..=0x605 | layout::PORT_KBD_COMMAND | layout::PORT_RESET)
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
        let byte = |register: u16, base: u16| (register >> ((port - base) * 8)) as u8;
        match port {
            PM1_STATUS..PM1_ENABLE => byte(self.pm1_status, PM1_STATUS),
            PM1_ENABLE..PM1_CONTROL => byte(self.pm1_enable, PM1_ENABLE),
            PM1_CONTROL => SCI_ENABLED,
            0x605 => self.sleep_type << 2,
            layout::PORT_RESET => self.reset_control,
            // There is no keyboard controller.
            _ => 0xff,
        }
    }

    /// Writes one of its ports. Returns whether that ended the run.
    pub(crate) fn write(&mut self, port: u16, value: u8) -> bool {
        let shifted = |base: u16| (u16::from(value) << ((port - base) * 8), 0xffu16 << ((port - base) * 8));
        let ending = match port {
            PM1_STATUS..PM1_ENABLE => {
                // Ones clear.
                self.pm1_status &= !shifted(PM1_STATUS).0;
                return false;
            }
            PM1_ENABLE..PM1_CONTROL => {
                let (bits, mask) = shifted(PM1_ENABLE);
                self.pm1_enable = (self.pm1_enable & !mask | bits) & PM1_ENABLES;
                return false;
            }
            0x605 => {
                self.sleep_type = value >> 2 & 7;
                if value & SLEEP_ENABLE == 0 || self.sleep_type != layout::SLEEP_TYPE_S5 {
                    return false;
                }
                Ending::PoweredOff
            }
            layout::PORT_KBD_COMMAND if value == KBD_PULSE_RESET => Ending::Reset,
            layout::PORT_RESET => {
                self.reset_control = value & 0x0a;
                if value & RESET_NOW == 0 {
                    return false;
                }
                Ending::Reset
            }
            _ => return false,
        };
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

    #[test]
    fn the_first_ending_counts() {
        let mut power = Power::new();
        assert!(!power.write(layout::PORT_KBD_COMMAND, 0xd1));
        assert!(!power.write(layout::PORT_RESET, 0x02));
        assert_eq!(power.read(layout::PORT_RESET), 2);
        assert!(!power.write(0x605, 3 << 2 | SLEEP_ENABLE));
        assert_eq!(power.read(0x605), 3 << 2);
        assert_eq!(power.ending(), None);
        assert!(power.write(0x605, 5 << 2 | SLEEP_ENABLE));
        assert!(power.write(layout::PORT_RESET, layout::RESET_VALUE));
        assert_eq!(power.ending(), Some(&Ending::PoweredOff));
        let mut back = Power::new();
        back.restore(&mut Payloads::new(vec![power.save()]).unwrap()).unwrap();
        assert_eq!(back, power);
    }

    #[test]
    fn the_power_button_raises_the_sci_until_acknowledged() {
        let mut power = Power::new();
        power.press_button();
        assert!(!power.line(), "not enabled");
        power.write(PM1_ENABLE, 0xff);
        power.write(PM1_ENABLE + 1, 0xff);
        assert!(power.line());
        assert_eq!((power.read(PM1_STATUS + 1), power.read(PM1_ENABLE), power.read(PM1_CONTROL)), (1, 0x21, 1));
        power.write(PM1_STATUS, 0xff);
        assert!(power.line());
        power.write(PM1_STATUS + 1, 1);
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
