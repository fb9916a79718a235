//! The local APIC: interrupt priorities, inter-processor interrupts to oneself, and the timer.
//!
//! **In:** register accesses (xAPIC page or x2APIC MSRs), interrupt [`Message`]s, guest time. **Out:** the vector to deliver next, the guest time of the
//! next timer interrupt, end-of-interrupt broadcasts for the I/O APIC. **Invariant:** a pure function of those; the timer keeps guest
//! times, never host times. Reference: SDM vol. 3, chapter 11 (chapter 10 in older editions).
//!
//! One processor with APIC id 0. The timer counts at 1 GHz (guest nanoseconds) before its divider. NMI, SMI, INIT and start-up messages go nowhere: there
//! is no second processor, and nothing here makes an NMI.
use super::Message;
use crate::layout;
use crate::payload::{Payload, Payloads, RestoreError};
use minicbor::{Decode, Encode};

// Register numbers: x2APIC MSR minus 0x800, xAPIC offset divided by 16.
const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TPR: u32 = 0x08;
const APR: u32 = 0x09;
const PPR: u32 = 0x0a;
const EOI: u32 = 0x0b;
const RRD: u32 = 0x0c;
const LDR: u32 = 0x0d;
const DFR: u32 = 0x0e;
const SVR: u32 = 0x0f;
const ISR: u32 = 0x10;
const TMR: u32 = 0x18;
const IRR: u32 = 0x20;
const ESR: u32 = 0x28;
const LVT_CMCI: u32 = 0x2f;
const ICR: u32 = 0x30;
const ICR_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_ERROR: u32 = 0x37;
const INITIAL_COUNT: u32 = 0x38;
const CURRENT_COUNT: u32 = 0x39;
const DIVIDE: u32 = 0x3e;
const SELF_IPI: u32 = 0x3f;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLED: u64 = 1 << 11;
const SVR_ENABLED: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE: u32 = 3 << 17;
const MODE_ONE_SHOT: u32 = 0;
const MODE_PERIODIC: u32 = 1;
const MODE_DEADLINE: u32 = 2;
const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;
/// Version 0x14, six LVT entries, no suppression of EOI broadcasts.
const VERSION_VALUE: u32 = 0x0005_0014;

/// An access the hardware answers with #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault;

/// A set of 256 vectors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
struct Vectors(#[n(0)] [u64; 4]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }
    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }
    fn has(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }
    fn highest(&self) -> Option<u8> {
        (0..4).rev().find(|&i| self.0[i] != 0).map(|i| (i as u32 * 64 + 63 - self.0[i].leading_zeros()) as u8)
    }
    fn word(&self, index: u32) -> u32 {
        (self.0[index as usize / 2] >> (index % 2 * 32)) as u32
    }
}

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct State {
    #[n(0)]
    base: u64,
    #[n(1)]
    tpr: u8,
    #[n(2)]
    ldr: u32,
    #[n(3)]
    dfr: u32,
    #[n(4)]
    svr: u32,
    #[n(5)]
    isr: Vectors,
    #[n(6)]
    tmr: Vectors,
    #[n(7)]
    irr: Vectors,
    /// Errors since the last write to ESR, and what that write latched.
    #[n(8)]
    errors: u32,
    #[n(9)]
    esr: u32,
    #[n(10)]
    icr: u64,
    /// CMCI, timer, thermal, performance, LINT0, LINT1, error.
    #[n(11)]
    lvt: [u32; 7],
    #[n(12)]
    initial_count: u32,
    #[n(13)]
    divide: u32,
    /// Guest time of the next timer event, when armed.
    #[n(14)]
    deadline_ns: Option<u64>,
    /// What the guest wrote to IA32_TSC_DEADLINE; 0 when disarmed.
    #[n(15)]
    tsc_deadline: u64,
    /// The guest wrote IA32_TSC_DEADLINE and its TSC offset was not applied yet.
    #[n(16)]
    latch: bool,
}

/// The local APIC of the one processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LocalApic {
    s: State,
}

impl LocalApic {
    const KIND: &'static str = "local-apic";
    const VERSION: u16 = 1;

    /// The state after reset: enabled in xAPIC mode at its usual address, all LVT entries masked.
    pub(crate) fn new() -> Self {
        Self {
            s: State {
                base: layout::LOCAL_APIC | BASE_ENABLED | BASE_BSP,
                tpr: 0,
                ldr: 0,
                dfr: u32::MAX,
                svr: 0xff,
                isr: Vectors::default(),
                tmr: Vectors::default(),
                irr: Vectors::default(),
                errors: 0,
                esr: 0,
                icr: 0,
                lvt: [LVT_MASKED; 7],
                initial_count: 0,
                divide: 0,
                deadline_ns: None,
                tsc_deadline: 0,
                latch: false,
            },
        }
    }

    fn x2apic(&self) -> bool {
        self.s.base & BASE_X2APIC != 0
    }
    fn hardware_enabled(&self) -> bool {
        self.s.base & BASE_ENABLED != 0
    }
    /// Whether the xAPIC page answers.
    pub(crate) fn mmio_enabled(&self) -> bool {
        self.hardware_enabled() && !self.x2apic()
    }

    /// IA32_APIC_BASE.
    pub(crate) fn base(&self) -> u64 {
        self.s.base
    }

    /// Writes IA32_APIC_BASE. Legal transitions only (SDM vol. 3, 11.12.5); the base address cannot move.
    pub(crate) fn set_base(&mut self, value: u64) -> Result<(), Fault> {
        let mode = |v: u64| (v & BASE_ENABLED != 0, v & BASE_X2APIC != 0);
        let illegal = matches!(
            (mode(self.s.base), mode(value)),
            (_, (false, true)) | ((false, _), (true, true)) | ((true, true), (true, false))
        );
        if illegal || value & !(BASE_ENABLED | BASE_X2APIC | BASE_BSP) != layout::LOCAL_APIC {
            return Err(Fault);
        }
        let was = mode(self.s.base);
        if value & BASE_ENABLED == 0 {
            *self = Self::new();
        }
        self.s.base = value & !BASE_BSP | BASE_BSP;
        if was != mode(value) && self.x2apic() {
            // Cluster 0, member 0: derived from the APIC id.
            self.s.ldr = 1;
            self.s.icr &= 0xffff_ffff;
        }
        Ok(())
    }

    fn lvt_index(register: u32) -> Option<usize> {
        match register {
            LVT_CMCI => Some(0),
            LVT_TIMER..=LVT_ERROR => Some((register - LVT_TIMER) as usize + 1),
            _ => None,
        }
    }

    /// Reads an x2APIC MSR (`register` = MSR - 0x800).
    pub(crate) fn read_msr(&mut self, register: u32, now_ns: u64) -> Result<u64, Fault> {
        if !self.hardware_enabled() || !self.x2apic() {
            return Err(Fault);
        }
        match register {
            ICR => Ok(self.s.icr),
            EOI | SELF_IPI | APR | RRD | DFR | ICR_HIGH => Err(Fault),
            _ => self.read(register, now_ns).map(u64::from).ok_or(Fault),
        }
    }

    /// Writes an x2APIC MSR. Returns the vector whose end-of-interrupt the I/O APIC must see.
    pub(crate) fn write_msr(&mut self, register: u32, value: u64, now_ns: u64) -> Result<Option<u8>, Fault> {
        if !self.hardware_enabled() || !self.x2apic() {
            return Err(Fault);
        }
        if register != ICR && value >> 32 != 0 {
            return Err(Fault);
        }
        match register {
            ICR => {
                self.s.icr = value & !(1 << 12);
                self.send(self.s.icr as u32, (value >> 32) as u32);
                Ok(None)
            }
            SELF_IPI => {
                self.accept_vector(value as u8, false);
                Ok(None)
            }
            EOI | ESR if value != 0 => Err(Fault),
            ID | VERSION | PPR | LDR | DFR | APR | RRD | ICR_HIGH | CURRENT_COUNT | ISR..ESR => Err(Fault),
            _ => self.write(register, value as u32, now_ns).ok_or(Fault),
        }
    }

    /// Reads from the xAPIC page.
    pub(crate) fn mmio_read(&mut self, offset: u64, data: &mut [u8], now_ns: u64) {
        data.fill(0);
        let register = (offset >> 4) as u32;
        // Registers are 32 bits wide at the start of their 16 bytes; the other twelve read as zero.
        let within = (offset & 15) as usize;
        let value = match register {
            ICR => Some(self.s.icr as u32),
            ICR_HIGH => Some((self.s.icr >> 32) as u32),
            ID => Some(0),
            APR | RRD => Some(0),
            _ => self.read(register, now_ns),
        };
        if value.is_none() {
            self.s.errors |= ERROR_REGISTER;
        }
        let bytes = value.unwrap_or(0).to_le_bytes();
        for (i, out) in data.iter_mut().enumerate() {
            *out = bytes.get(within + i).copied().unwrap_or(0);
        }
    }

    /// Writes to the xAPIC page. Returns the vector whose end-of-interrupt the I/O APIC must see.
    pub(crate) fn mmio_write(&mut self, offset: u64, data: &[u8], now_ns: u64) -> Option<u8> {
        // Other sizes and alignments are undefined on hardware; here they are ignored.
        let value = u32::from_le_bytes(data.try_into().ok().filter(|_| offset & 15 == 0)?);
        let register = (offset >> 4) as u32;
        match register {
            ICR => {
                self.s.icr = self.s.icr & !0xffff_ffff | u64::from(value & !(1 << 12));
                self.send(value, (self.s.icr >> 56) as u32);
                None
            }
            ICR_HIGH => {
                self.s.icr = self.s.icr & 0xffff_ffff | u64::from(value) << 32;
                None
            }
            LDR => {
                self.s.ldr = value & 0xff00_0000;
                None
            }
            DFR => {
                self.s.dfr = value | 0x0fff_ffff;
                None
            }
            ID | VERSION | PPR | APR | RRD | CURRENT_COUNT | ISR..ESR => None,
            _ => {
                let written = self.write(register, value, now_ns);
                if written.is_none() {
                    self.s.errors |= ERROR_REGISTER;
                }
                written.flatten()
            }
        }
    }

    /// Registers that read alike in both modes.
    fn read(&self, register: u32, now_ns: u64) -> Option<u32> {
        if let Some(i) = Self::lvt_index(register) {
            return Some(self.s.lvt[i]);
        }
        Some(match register {
            ID => 0,
            VERSION => VERSION_VALUE,
            TPR => u32::from(self.s.tpr),
            PPR => u32::from(self.ppr()),
            EOI => 0,
            LDR => self.s.ldr,
            DFR => self.s.dfr,
            SVR => self.s.svr,
            ISR..TMR => self.s.isr.word(register - ISR),
            TMR..IRR => self.s.tmr.word(register - TMR),
            IRR..ESR => self.s.irr.word(register - IRR),
            ESR => self.s.esr,
            INITIAL_COUNT => self.s.initial_count,
            CURRENT_COUNT => self.current_count(now_ns),
            DIVIDE => self.s.divide,
            _ => return None,
        })
    }

    /// Registers that are written alike in both modes. `None`: no such register.
    fn write(&mut self, register: u32, value: u32, now_ns: u64) -> Option<Option<u8>> {
        if let Some(i) = Self::lvt_index(register) {
            self.write_lvt(register, i, value);
            return Some(None);
        }
        match register {
            TPR => self.s.tpr = value as u8,
            EOI => return Some(self.end_of_interrupt()),
            SVR => {
                self.s.svr = value & 0x1ff;
                if value & SVR_ENABLED == 0 {
                    self.s.lvt.iter_mut().for_each(|lvt| *lvt |= LVT_MASKED);
                }
            }
            ESR => self.s.esr = std::mem::take(&mut self.s.errors),
            INITIAL_COUNT => {
                if self.timer_mode() != MODE_DEADLINE {
                    self.s.initial_count = value;
                    self.s.deadline_ns = (value != 0).then(|| now_ns.saturating_add(self.period_ns()));
                }
            }
            DIVIDE => {
                let count = self.current_count(now_ns);
                self.s.divide = value & 0xb;
                if self.timer_mode() != MODE_DEADLINE && self.s.deadline_ns.is_some() {
                    self.s.deadline_ns = Some(now_ns.saturating_add(u64::from(count.max(1)) << self.divide_shift()));
                }
            }
            _ => return None,
        }
        Some(None)
    }

    fn write_lvt(&mut self, register: u32, index: usize, value: u32) {
        let writable = match register {
            LVT_TIMER => 0xff | LVT_MASKED | LVT_MODE,
            0x35 | 0x36 => 0xff | 7 << 8 | 1 << 13 | 1 << 15 | LVT_MASKED,
            LVT_ERROR => 0xff | LVT_MASKED,
            _ => 0xff | 7 << 8 | LVT_MASKED,
        };
        let before = self.timer_mode();
        self.s.lvt[index] = value & writable;
        if self.s.svr & SVR_ENABLED == 0 {
            self.s.lvt[index] |= LVT_MASKED;
        }
        // Into or out of deadline mode disarms the timer (SDM vol. 3, 11.5.4.1).
        if (before == MODE_DEADLINE) != (self.timer_mode() == MODE_DEADLINE) {
            self.s.deadline_ns = None;
            self.s.tsc_deadline = 0;
            self.s.latch = false;
            self.s.initial_count = 0;
        }
    }

    // The timer.

    fn timer_mode(&self) -> u32 {
        self.s.lvt[1] >> 17 & 3
    }
    fn divide_shift(&self) -> u32 {
        // Bits 0, 1 and 3 make a number; 7 means "by 1".
        let code = self.s.divide & 3 | self.s.divide >> 1 & 4;
        (code + 1) & 7
    }
    fn period_ns(&self) -> u64 {
        u64::from(self.s.initial_count) << self.divide_shift()
    }
    fn current_count(&self, now_ns: u64) -> u32 {
        match self.s.deadline_ns {
            Some(deadline) if self.timer_mode() != MODE_DEADLINE => {
                let ticks = deadline.saturating_sub(now_ns).div_ceil(1 << self.divide_shift());
                u32::try_from(ticks).unwrap_or(u32::MAX)
            }
            _ => 0,
        }
    }

    /// IA32_TSC_DEADLINE.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.s.tsc_deadline
    }

    /// Writes IA32_TSC_DEADLINE. It counts in the guest's TSC, whose offset only the processor knows: [`LocalApic::latch`] follows at the
    /// instruction's end.
    pub(crate) fn set_tsc_deadline(&mut self, value: u64) {
        if self.timer_mode() == MODE_DEADLINE {
            self.s.tsc_deadline = value;
            self.s.deadline_ns = None;
            self.s.latch = value != 0;
        }
    }

    /// Turns a fresh TSC deadline into guest time, with what the guest added to its TSC.
    pub(crate) fn latch(&mut self, tsc_offset: u64) {
        if std::mem::take(&mut self.s.latch) {
            // Both count nanoseconds. With the offset taken off, a deadline before time 0 wraps; it is long past.
            let ns = self.s.tsc_deadline.wrapping_sub(tsc_offset);
            self.s.deadline_ns = Some(if ns > i64::MAX as u64 && self.s.tsc_deadline <= i64::MAX as u64 { 0 } else { ns });
        }
    }

    /// Guest time of the next timer event.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        self.s.deadline_ns
    }

    /// Fires the timer if its time has come.
    pub(crate) fn fire_due(&mut self, now_ns: u64) {
        let Some(deadline) = self.s.deadline_ns.filter(|&d| d <= now_ns) else { return };
        self.s.deadline_ns = match self.timer_mode() {
            MODE_PERIODIC if self.s.initial_count != 0 => {
                // Periods missed while guest time jumped are not made up for.
                let period = self.period_ns();
                let missed = (now_ns - deadline) / period;
                deadline.checked_add((missed + 1).saturating_mul(period))
            }
            _ => None,
        };
        self.s.tsc_deadline = 0;
        debug_assert!([MODE_ONE_SHOT, MODE_PERIODIC, MODE_DEADLINE, 3].contains(&self.timer_mode()));
        let lvt = self.s.lvt[1];
        if lvt & LVT_MASKED == 0 {
            self.accept_vector(lvt as u8, false);
        }
    }

    // Priorities.

    fn ppr(&self) -> u8 {
        let isr = self.s.isr.highest().unwrap_or(0);
        if self.s.tpr >> 4 >= isr >> 4 { self.s.tpr } else { isr & 0xf0 }
    }
    /// CR8.
    pub(crate) fn cr8(&self) -> u8 {
        self.s.tpr >> 4
    }
    /// Sets CR8.
    pub(crate) fn set_cr8(&mut self, value: u8) {
        self.s.tpr = value << 4;
    }

    /// The vector to deliver, if any is deliverable as far as the APIC goes.
    pub(crate) fn pending(&self) -> Option<u8> {
        if self.s.svr & SVR_ENABLED == 0 || !self.hardware_enabled() {
            return None;
        }
        self.s.irr.highest().filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// The processor takes `vector`, which [`LocalApic::pending`] named.
    pub(crate) fn take(&mut self, vector: u8) {
        self.s.irr.clear(vector);
        self.s.isr.set(vector);
    }

    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.s.isr.highest()?;
        self.s.isr.clear(vector);
        self.s.tmr.has(vector).then_some(vector)
    }

    // Messages.

    fn accept_vector(&mut self, vector: u8, level: bool) {
        if !self.hardware_enabled() {
            return;
        }
        if vector < 16 {
            self.s.errors |= ERROR_RECEIVE_VECTOR;
            return;
        }
        self.s.irr.set(vector);
        if level { self.s.tmr.set(vector) } else { self.s.tmr.clear(vector) }
    }

    fn is_me(&self, logical: bool, destination: u32) -> bool {
        if destination == 0xff || destination == u32::MAX {
            return true;
        }
        match (logical, self.x2apic()) {
            (false, _) => destination == 0,
            // Logical x2APIC ids: cluster in the high half, a bit per member in the low one.
            (true, true) => destination >> 16 == 0 && destination & 1 != 0,
            (true, false) => {
                let mine = self.s.ldr >> 24;
                if self.s.dfr >> 28 == 0xf {
                    destination & mine != 0
                } else {
                    destination >> 4 == mine >> 4 && destination & mine & 0xf != 0
                }
            }
        }
    }

    /// An interrupt message from the I/O APIC or a device. Returns whether this processor accepted it.
    pub(crate) fn message(&mut self, message: Message) -> bool {
        let mine = message.mode <= 1 && self.is_me(message.logical, message.destination);
        if mine {
            self.accept_vector(message.vector, message.level);
        }
        mine
    }

    /// An inter-processor interrupt.
    fn send(&mut self, command: u32, destination: u32) {
        let to_self = match command >> 18 & 3 {
            0 => self.is_me(command & (1 << 11) != 0, destination),
            1 | 2 => true,
            _ => false,
        };
        let (mode, vector) = (command >> 8 & 7, command as u8);
        if mode <= 1 && vector < 16 {
            self.s.errors |= ERROR_SEND_VECTOR;
        } else if mode <= 1 && to_self {
            self.accept_vector(vector, false);
        }
    }

    // Saved state.

    pub(crate) fn save(&self) -> Payload {
        Payload::encode(Self::KIND, Self::VERSION, &self.s)
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let s: State = payload.decode()?;
        let flags = BASE_ENABLED | BASE_X2APIC | BASE_BSP;
        if s.base & !flags != layout::LOCAL_APIC || s.base & (BASE_ENABLED | BASE_X2APIC) == BASE_X2APIC {
            return Err(payload.invalid("impossible APIC base"));
        }
        if s.divide & !0xb != 0 || s.svr & !0x1ff != 0 {
            return Err(payload.invalid("reserved bits are set"));
        }
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
