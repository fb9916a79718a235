//! The engine: runs translated code, stops at exact positions.
use crate::{Bus, CpuModel, CpuState, Exit, PhysMem, Position};

/// How an engine is built. None of it but the model is visible to the guest.
#[derive(Debug, Clone)]
pub struct CpuConfig {
    /// The CPU model the guest sees.
    pub model: CpuModel,
    /// Bytes of translated code kept at most.
    pub code_cache_bytes: usize,
    /// Guest instructions in a block at most; 1 runs everything one instruction a block.
    pub max_block_instructions: u32,
}

/// One deterministic processor.
pub struct Cpu {
    st: Box<CpuState>,
    position: Position,
    ram: PhysMem,
}

impl Cpu {
    /// A processor over `ram` in the state after reset.
    pub fn new(config: CpuConfig, ram: PhysMem) -> Self {
        let _ = config;
        Self { st: Box::new(CpuState::reset()), position: 0, ram }
    }
    /// The architectural state, exact.
    pub fn state(&self) -> &CpuState {
        &self.st
    }
    /// Replaces the architectural state (boot, snapshot restore); everything derived from the old one is dropped.
    pub fn set_state(&mut self, state: CpuState) {
        *self.st = state;
    }
    /// Instructions retired since power-on.
    pub fn position(&self) -> Position {
        self.position
    }
    /// Sets the position (snapshot restore).
    pub fn set_position(&mut self, position: Position) {
        self.position = position;
    }
    /// Guest RAM.
    pub fn ram(&self) -> &PhysMem {
        &self.ram
    }
    /// Runs until position `until` at most. A halted processor returns [`Exit::Halted`] at once.
    pub fn run(&mut self, bus: &mut dyn Bus, until: Position) -> Exit {
        let _ = (bus, until);
        Exit::Halted
    }
    /// Whether an interrupt could be taken right now (IF set, no shadow; halted or not).
    pub fn can_interrupt(&self) -> bool {
        false
    }
    /// Delivers external interrupt `vector` at the current position. Wakes a halted processor.
    /// Returns false if that ended in a triple fault.
    ///
    /// # Panics
    /// If [`Cpu::can_interrupt`] is false.
    pub fn interrupt(&mut self, bus: &mut dyn Bus, vector: u8) -> bool {
        let _ = (bus, vector);
        true
    }
    /// Asks [`Cpu::run`] to return [`Exit::Window`] as soon as [`Cpu::can_interrupt`] holds.
    pub fn want_interrupt_window(&mut self, wanted: bool) {
        let _ = wanted;
    }
    /// Clears the dirty flags of all pages and makes the next store to each set it again.
    /// Calls `each` with every page that was dirty.
    pub fn harvest_dirty(&mut self, each: &mut dyn FnMut(usize)) {
        let _ = each;
    }
}
