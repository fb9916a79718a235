//! Power and reset: the ACPI sleep registers, the reset control register, the keyboard controller's reset line.
//!
//! **In:** port accesses. **Out:** how the run ended. **Invariant:** once ended, a machine stays ended. Reference: ACPI 6.5, section 4.8.3.7 (sleep
//! control and status registers).
use crate::layout;
use crate::payload::{Payload, Payloads, RestoreError};
use minicbor::{Decode, Encode};

const SLEEP_ENABLE: u8 = 1 << 5;
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
}

impl Power {
    const KIND: &'static str = "power";
    const VERSION: u16 = 1;

    pub(crate) fn new() -> Self {
        Self { reset_control: 0, ending: None }
    }

    /// How the run ended, if it did.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// The processor shut down.
    pub(crate) fn crash(&mut self, reason: &str) {
        self.ending.get_or_insert_with(|| Ending::Crashed(reason.into()));
    }

    /// Reads one of its ports.
    pub(crate) fn read(&self, port: u16) -> u8 {
        match port {
            layout::PORT_RESET => self.reset_control,
            // Sleep control reads as zero, and no wake status is ever set.
            _ => 0,
        }
    }

    /// Writes one of its ports. Returns whether that ended the run.
    pub(crate) fn write(&mut self, port: u16, value: u8) -> bool {
        let ending = match port {
            layout::PORT_KBD_COMMAND if value == KBD_PULSE_RESET => Ending::Reset,
            layout::PORT_RESET => {
                self.reset_control = value & 0x0a;
                if value & RESET_NOW == 0 {
                    return false;
                }
                Ending::Reset
            }
            layout::PORT_SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == layout::SLEEP_TYPE_S5 => Ending::PoweredOff,
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
        *self = payload.decode()?;
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
        assert!(!power.write(layout::PORT_SLEEP_CONTROL, 3 << 2 | SLEEP_ENABLE));
        assert_eq!(power.ending(), None);
        assert!(power.write(layout::PORT_SLEEP_CONTROL, 5 << 2 | SLEEP_ENABLE));
        assert!(power.write(layout::PORT_RESET, layout::RESET_VALUE));
        assert_eq!(power.ending(), Some(&Ending::PoweredOff));
        let mut back = Power::new();
        back.restore(&mut Payloads::new(vec![power.save()]).unwrap()).unwrap();
        assert_eq!(back, power);
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
