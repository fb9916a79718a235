//! The board: everything around the processor, and the bus that leads to it.
//!
//! **In:** the processor's bus accesses, guest time. **Out:** answers, interrupts for the processor, outputs, the end of the run. **Invariant:** an access is
//! served completely at its position; whatever it changes that the run loop must know of raises [`Bus::attention`].
use crate::apic::{IoApic, LocalApic, Message};
use crate::clock::Clock;
use crate::door::Output;
use crate::kvmclock::KvmClock;
use crate::layout;
use crate::memory::GuestRam;
use crate::pci::PciHost;
use crate::power::{Ending, Power};
use crate::rtc::Rtc;
use crate::serial::Serial;
use crate::stats::DeviceStats;
use crate::virtio::{Cx, Failure, Received};
use std::sync::Arc;
use twinstep_x86::{Activity, ActivityCell, Bus, Position, TscRate, UnknownMsr};

const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_X2APIC: u32 = 0x800;
const MSR_X2APIC_END: u32 = 0x900;

/// All devices.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) ram: GuestRam,
    pub(crate) clock: Clock,
    pub(crate) lapic: LocalApic,
    pub(crate) ioapic: IoApic,
    pub(crate) serial: Serial,
    pub(crate) rtc: Rtc,
    pub(crate) kvmclock: KvmClock,
    pub(crate) power: Power,
    pub(crate) pci: PciHost,
    pub(crate) outputs: Vec<(Position, Output)>,
    /// The host failed; nothing goes on until it did its part.
    pub(crate) failure: Option<Failure>,
    /// A device waits for the host: the run is left, so that it need not wait for long.
    pub(crate) asks: bool,
    /// The run loop must look at the board.
    pub(crate) attention: bool,
    pub(crate) stats: DeviceStats,
    /// What the machine's thread is doing.
    pub(crate) activity: Arc<ActivityCell>,
}

impl Board {
    pub(crate) fn new(ram: GuestRam, pci: PciHost, activity: Arc<ActivityCell>) -> Self {
        Self {
            ram,
            clock: Clock::new(),
            lapic: LocalApic::new(),
            ioapic: IoApic::new(),
            serial: Serial::new(),
            rtc: Rtc::new(),
            kvmclock: KvmClock::new(),
            power: Power::new(),
            pci,
            outputs: Vec::new(),
            failure: None,
            asks: false,
            attention: false,
            stats: DeviceStats::default(),
            activity,
        }
    }

    /// Runs `f` on the PCI host and delivers the interrupts that makes.
    pub(crate) fn with_pci<T>(&mut self, position: Position, f: impl FnOnce(&mut PciHost, &mut Cx) -> T) -> T {
        let mut messages = Vec::new();
        let mut cx = Cx {
            ram: &self.ram,
            position,
            now_ns: self.clock.ns_at(position),
            outputs: &mut self.outputs,
            messages: &mut messages,
            failure: &mut self.failure,
            asks: &mut self.asks,
        };
        let result = f(&mut self.pci, &mut cx);
        self.deliver(messages);
        result
    }

    /// As [`Board::with_pci`], for accesses that may give a device work: its next deadline may have moved, the host may have failed.
    fn with_pci_write(&mut self, position: Position, f: impl FnOnce(&mut PciHost, &mut Cx)) {
        let before = self.pci.deadline_ns();
        self.with_pci(position, f);
        self.attention |= self.failure.is_some() || self.asks || self.pci.deadline_ns() != before;
    }

    fn deliver(&mut self, messages: impl IntoIterator<Item = Message>) {
        for message in messages {
            self.attention |= self.lapic.message(message);
        }
    }

    /// Sets an interrupt line of the I/O APIC.
    fn set_line(&mut self, pin: u8, high: bool) {
        let message = self.ioapic.set_line(pin, high);
        self.deliver(message);
    }

    /// Somebody pressed the power button.
    pub(crate) fn press_power_button(&mut self) {
        self.power.press_button();
        self.set_line(layout::IRQ_SCI, self.power.line());
    }

    /// Bytes typed at the serial port.
    pub(crate) fn type_serial(&mut self, bytes: &[u8]) {
        self.serial.receive(bytes);
        self.set_line(layout::IRQ_SERIAL, self.serial.line());
    }

    /// Something from outside for PCI function `function`.
    pub(crate) fn receive(&mut self, position: Position, function: usize, received: Received) {
        self.with_pci(position, |pci, cx| {
            if let Some(function) = pci.functions.get_mut(function) {
                function.receive(cx, received);
            }
        });
    }

    /// What had to wait for the end of the instruction: only there is the processor's TSC offset known.
    pub(crate) fn latch(&mut self, position: Position, tsc_offset: u64) {
        self.lapic.latch(tsc_offset);
        let now = self.clock.ns_at(position);
        self.kvmclock.latch(&self.ram, now, tsc_offset, self.rtc.wall_clock());
    }

    /// Guest time of the next thing that happens by itself.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        [self.lapic.deadline_ns(), self.pci.deadline_ns()].into_iter().flatten().min()
    }

    /// Does all that is due at `position`.
    pub(crate) fn fire_due(&mut self, position: Position) {
        let now = self.clock.ns_at(position);
        if self.deadline_ns().is_none_or(|d| d > now) {
            return;
        }
        self.stats.fired += 1;
        self.lapic.fire_due(now);
        self.with_pci(position, |pci, cx| pci.fire_due(cx));
    }

    /// How the run ended, if it did.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.power.ending()
    }

    /// Outputs from number `first` on were made by the instruction at `position`: they leave when it has retired, so that a replay that runs
    /// to an output's position has made it.
    fn outputs_left(&mut self, first: usize, position: Position) {
        for (at, _) in &mut self.outputs[first..] {
            *at = position.saturating_add(1);
        }
    }

    fn end_of_interrupt(&mut self, vector: Option<u8>) {
        if let Some(vector) = vector {
            let again = self.ioapic.end_of_interrupt(vector);
            self.deliver(again);
        }
        self.attention = true;
    }

    fn port_read(&mut self, position: Position, port: u16) -> u8 {
        let now = self.clock.ns_at(position);
        match port {
            layout::PORT_SERIAL..0x400 => {
                let value = self.serial.read(port - layout::PORT_SERIAL);
                self.set_line(layout::IRQ_SERIAL, self.serial.line());
                value
            }
            layout::PORT_RTC | 0x71 => self.rtc.read(port - layout::PORT_RTC, now),
            _ if Power::owns(port) => self.power.read(port),
            _ if self.power.owns_debug_exit(port) => 0,
            _ => 0xff,
        }
    }

    fn port_write(&mut self, position: Position, port: u16, value: u8) {
        match port {
            layout::PORT_SERIAL..0x400 => {
                let effect = self.serial.write(port - layout::PORT_SERIAL, value);
                if let Some(byte) = effect.output {
                    self.outputs.push((position, Output::Serial(vec![byte])));
                }
                if effect.pulse {
                    self.set_line(layout::IRQ_SERIAL, false);
                }
                self.set_line(layout::IRQ_SERIAL, self.serial.line());
            }
            layout::PORT_RTC | 0x71 => {
                let now = self.clock.ns_at(position);
                self.rtc.write(port - layout::PORT_RTC, value, now);
            }
            _ if Power::owns(port) => {
                self.attention |= self.power.write(port, value);
                self.set_line(layout::IRQ_SCI, self.power.line());
            }
            _ => {}
        }
    }
}

fn within(gpa: u64, base: u64, len: u64) -> Option<u64> {
    gpa.checked_sub(base).filter(|&offset| offset < len)
}

impl Board {
    /// Does what a device does, and says so.
    fn working<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.activity.replace(Activity::Device);
        let result = f(self);
        self.activity.set(before);
        result
    }

    fn memory_read(&mut self, position: Position, gpa: u64, data: &mut [u8]) {
        if within(gpa, layout::PCI_WINDOW, layout::PCI_WINDOW_LEN).is_some() {
            self.with_pci(position, |pci, cx| pci.window_read(cx, gpa, data));
        } else if let Some(offset) = within(gpa, layout::ECAM, layout::ECAM_LEN) {
            self.with_pci(position, |pci, cx| pci.ecam_read(cx, offset, data));
        } else if let Some(offset) = within(gpa, layout::IO_APIC, layout::IO_APIC_LEN) {
            self.ioapic.mmio_read(offset, data);
        } else if let Some(offset) = within(gpa, layout::LOCAL_APIC, layout::LOCAL_APIC_LEN).filter(|_| self.lapic.mmio_enabled())
        {
            let now = self.clock.ns_at(position);
            self.lapic.mmio_read(offset, data, now);
        } else {
            data.fill(0xff);
        }
    }

    fn memory_write(&mut self, position: Position, gpa: u64, data: &[u8]) {
        let first = self.outputs.len();
        if within(gpa, layout::PCI_WINDOW, layout::PCI_WINDOW_LEN).is_some() {
            self.with_pci_write(position, |pci, cx| pci.window_write(cx, gpa, data));
        } else if let Some(offset) = within(gpa, layout::ECAM, layout::ECAM_LEN) {
            self.with_pci_write(position, |pci, cx| pci.ecam_write(cx, offset, data));
        } else if let Some(offset) = within(gpa, layout::IO_APIC, layout::IO_APIC_LEN) {
            let messages = self.ioapic.mmio_write(offset, data);
            self.deliver(messages);
        } else if let Some(offset) = within(gpa, layout::LOCAL_APIC, layout::LOCAL_APIC_LEN).filter(|_| self.lapic.mmio_enabled())
        {
            let now = self.clock.ns_at(position);
            let ended = self.lapic.mmio_write(offset, data, now);
            self.end_of_interrupt(ended);
        }
        self.outputs_left(first, position);
    }

    fn ports_read(&mut self, position: Position, port: u16, size: u8) -> u32 {
        if port == layout::PORT_PCI_ADDRESS && size == 4 {
            return self.pci.address();
        }
        let mut data = [0; 4];
        let n = usize::from(size).min(4);
        if let Some(offset) = port.checked_sub(layout::PORT_PCI_DATA).filter(|&o| usize::from(o) + n <= 4) {
            self.with_pci(position, |pci, cx| pci.data_read(cx, offset, &mut data[..n]));
            return u32::from_le_bytes(data);
        }
        // Wide accesses to byte-wide devices are that many byte accesses.
        for (i, byte) in data[..n].iter_mut().enumerate() {
            *byte = self.port_read(position, port.wrapping_add(i as u16));
        }
        u32::from_le_bytes(data)
    }

    fn ports_write(&mut self, position: Position, port: u16, size: u8, value: u32) {
        if port == layout::PORT_PCI_ADDRESS && size == 4 {
            return self.pci.set_address(value);
        }
        if self.power.owns_debug_exit(port) {
            self.power.debug_exit(value);
            self.attention = true;
            return;
        }
        let first = self.outputs.len();
        let data = value.to_le_bytes();
        let n = usize::from(size).min(4);
        if let Some(offset) = port.checked_sub(layout::PORT_PCI_DATA).filter(|&o| usize::from(o) + n <= 4) {
            self.with_pci_write(position, |pci, cx| pci.data_write(cx, offset, &data[..n]));
        } else {
            for (i, byte) in data[..n].iter().enumerate() {
                self.port_write(position, port.wrapping_add(i as u16), *byte);
            }
        }
        self.outputs_left(first, position);
    }

    fn msr_read(&mut self, position: Position, msr: u32) -> Result<u64, UnknownMsr> {
        let now = self.clock.ns_at(position);
        match msr {
            MSR_APIC_BASE => Ok(self.lapic.base()),
            MSR_TSC_DEADLINE => Ok(self.lapic.tsc_deadline()),
            MSR_X2APIC..MSR_X2APIC_END => self.lapic.read_msr(msr - MSR_X2APIC, now).map_err(|_| UnknownMsr),
            _ => self.kvmclock.read_msr(msr).ok_or(UnknownMsr),
        }
    }

    fn msr_write(&mut self, position: Position, msr: u32, value: u64) -> Result<(), UnknownMsr> {
        let now = self.clock.ns_at(position);
        match msr {
            MSR_APIC_BASE => self.lapic.set_base(value).map_err(|_| UnknownMsr)?,
            MSR_TSC_DEADLINE => self.lapic.set_tsc_deadline(value),
            MSR_X2APIC..MSR_X2APIC_END => {
                let ended = self.lapic.write_msr(msr - MSR_X2APIC, value, now).map_err(|_| UnknownMsr)?;
                self.end_of_interrupt(ended);
            }
            _ if self.kvmclock.write_msr(msr, value) => {}
            _ => return Err(UnknownMsr),
        }
        self.attention = true;
        Ok(())
    }
}

impl Bus for Board {
    fn mmio_read(&mut self, position: Position, gpa: u64, data: &mut [u8]) {
        self.stats.memory_reads += 1;
        self.working(|board| board.memory_read(position, gpa, data));
    }

    fn mmio_write(&mut self, position: Position, gpa: u64, data: &[u8]) {
        self.stats.memory_writes += 1;
        self.working(|board| board.memory_write(position, gpa, data));
    }

    fn pio_read(&mut self, position: Position, port: u16, size: u8) -> u32 {
        self.stats.port_reads += 1;
        self.working(|board| board.ports_read(position, port, size))
    }

    fn pio_write(&mut self, position: Position, port: u16, size: u8, value: u32) {
        self.stats.port_writes += 1;
        self.working(|board| board.ports_write(position, port, size, value));
    }

    fn tsc(&mut self, position: Position) -> u64 {
        self.clock.ns_at(position)
    }

    fn tsc_rate(&self) -> Option<TscRate> {
        Some(self.clock.rate())
    }

    fn rdmsr(&mut self, position: Position, msr: u32) -> Result<u64, UnknownMsr> {
        self.stats.msr_reads += 1;
        self.working(|board| board.msr_read(position, msr))
    }

    fn wrmsr(&mut self, position: Position, msr: u32, value: u64) -> Result<(), UnknownMsr> {
        self.stats.msr_writes += 1;
        self.working(|board| board.msr_write(position, msr, value))
    }

    fn cr8(&mut self) -> u8 {
        self.lapic.cr8()
    }

    fn set_cr8(&mut self, _position: Position, value: u8) {
        self.lapic.set_cr8(value);
        self.attention = true;
    }

    fn attention(&self) -> bool {
        self.attention
    }
}
