//! What the silicon cannot execute for a guest: instructions that touch privileged state, and the delivery of exceptions and
//! interrupts.
//!
//! **In:** a decoded instruction and the context [`Cx`]. **Out:** the state after it, or an [`Exception`] with the state
//! untouched.
//!
//! **Invariant:** an instruction either retires completely or leaves no trace (string instructions: see `docs/positions.md`).
use crate::mmu::Mmu;
use crate::{Bus, CpuState, Exception, Position};

/// What an instruction or a delivery works on.
pub struct Cx<'a> {
    /// Architectural state.
    pub st: &'a mut CpuState,
    /// Memory.
    pub mmu: &'a mut Mmu,
    /// All that is not RAM.
    pub bus: &'a mut dyn Bus,
    /// Position before the instruction retires.
    pub position: Position,
    /// The CPU model.
    pub model: &'a crate::CpuModel,
}

/// How execution goes on after an instruction that retired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// At the following instruction; nothing but general registers, flags (not TF, not IF from 0 to 1) and FPU changed.
    Next,
    /// At the following instruction, but privileged state changed (mode, paging, interrupt flag, segment ...): look at everything afresh.
    Sync,
    /// `st.rip` was set (jump, return, or a REP step that goes on at the same instruction); look at everything afresh.
    Jump,
}

impl Cx<'_> {
    /// Whether the current code runs with user permissions.
    pub fn user(&self) -> bool {
        self.st.cpl == 3
    }
    /// Reads memory with the current privilege.
    pub fn read(&mut self, va: u64, buf: &mut [u8]) -> Result<(), Exception> {
        let user = self.user();
        self.mmu.read(self.st, self.bus, self.position, va, buf, user)
    }
    /// Writes memory with the current privilege.
    pub fn write(&mut self, va: u64, data: &[u8]) -> Result<(), Exception> {
        let user = self.user();
        self.mmu.write(self.st, self.bus, self.position, va, data, user)
    }
    /// Reads a little-endian value with supervisor permissions whatever the privilege (descriptor tables, TSS).
    pub fn read_system<const N: usize>(&mut self, va: u64) -> Result<[u8; N], Exception> {
        let mut buf = [0; N];
        self.mmu.read(self.st, self.bus, self.position, va, &mut buf, false)?;
        Ok(buf)
    }
    /// Writes with supervisor permissions whatever the privilege.
    pub fn write_system(&mut self, va: u64, data: &[u8]) -> Result<(), Exception> {
        self.mmu.write(self.st, self.bus, self.position, va, data, false)
    }
}
