//! What the CPU needs of the machine around it: everything that is not RAM.
use crate::Position;

/// The answer of a bus that does not know a model-specific register: the guest gets #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownMsr;

/// How the time-stamp counter counts: `tsc` at `position`, and for each instruction from there on `thousandths` more, rounded down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TscRate {
    /// See above.
    pub position: Position,
    /// See above.
    pub tsc: u64,
    /// See above.
    pub thousandths: u64,
}

/// The machine as the CPU sees it. Every call carries the position of the instruction that makes it, counted *before* it
/// retires, so that a device can derive guest time from it. Implementations must be deterministic.
pub trait Bus {
    /// Reads 1, 2, 4 or 8 bytes at a guest-physical address that is not RAM. Unclaimed addresses read as all ones.
    fn mmio_read(&mut self, position: Position, gpa: u64, data: &mut [u8]);
    /// Writes 1, 2, 4 or 8 bytes at a guest-physical address that is not RAM. Unclaimed addresses ignore it.
    fn mmio_write(&mut self, position: Position, gpa: u64, data: &[u8]);
    /// Reads 1, 2 or 4 bytes (`size`) from an I/O port, in the low bits. Unclaimed ports read as all ones.
    fn pio_read(&mut self, position: Position, port: u16, size: u8) -> u32;
    /// Writes the low 1, 2 or 4 bytes (`size`) of `value` to an I/O port.
    fn pio_write(&mut self, position: Position, port: u16, size: u8, value: u32);
    /// The time-stamp counter at `position`, before the guest's own offset. Never decreases with the position.
    fn tsc(&mut self, position: Position) -> u64;
    /// [`Bus::tsc`] as a rule that holds until [`crate::Cpu::run`] comes back, if there is one.
    fn tsc_rate(&self) -> Option<TscRate> {
        None
    }
    /// Reads a model-specific register that the CPU itself does not own (x2APIC, kvmclock, TSC deadline, ...).
    fn rdmsr(&mut self, position: Position, msr: u32) -> Result<u64, UnknownMsr>;
    /// Writes a model-specific register that the CPU itself does not own.
    fn wrmsr(&mut self, position: Position, msr: u32, value: u64) -> Result<(), UnknownMsr>;
    /// Task priority (CR8, 0..=15).
    fn cr8(&mut self) -> u8;
    /// Sets the task priority (CR8, 0..=15).
    fn set_cr8(&mut self, position: Position, value: u8);
    /// Asked after every call above: must [`crate::Cpu::run`] come back after this instruction? True when an interrupt may have
    /// become deliverable, the next timer moved, or the machine was told to power off. The answer is not cleared by asking.
    fn attention(&self) -> bool;
}
