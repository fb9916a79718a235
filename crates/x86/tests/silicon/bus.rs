//! A machine with nothing in it.
use twinstep_x86::{Bus, Position, TscRate, UnknownMsr};

/// Reads as all ones, ignores writes, never asks for attention.
#[derive(Debug, Default)]
pub struct QuietBus;

impl Bus for QuietBus {
    fn mmio_read(&mut self, _: Position, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: Position, _: u64, _: &[u8]) {}
    fn pio_read(&mut self, _: Position, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn pio_write(&mut self, _: Position, _: u16, _: u8, _: u32) {}
    fn tsc(&mut self, position: Position) -> u64 {
        5 + position * 1234 / 1000
    }
    fn tsc_rate(&self) -> Option<TscRate> {
        Some(TscRate { position: 0, tsc: 5, thousandths: 1234 })
    }
    fn rdmsr(&mut self, _: Position, _: u32) -> Result<u64, UnknownMsr> {
        Err(UnknownMsr)
    }
    fn wrmsr(&mut self, _: Position, _: u32, _: u64) -> Result<(), UnknownMsr> {
        Err(UnknownMsr)
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: Position, _: u8) {}
    fn attention(&self) -> bool {
        false
    }
}
