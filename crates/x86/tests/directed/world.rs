//! A small guest to try things on.
use crate::bus::QuietBus;
use crate::memory::{GuestRam, PageTables};
use crate::system::{self, Frame};
use twinstep_x86::state::gpr;
use twinstep_x86::{Cpu, CpuConfig, CpuModel, CpuState, Exit, Position};

/// Sizes of blocks that everything is tried with.
pub const BLOCKS: [u32; 4] = [1, 2, 5, 64];

/// Where things are: virtual, and guest-physical.
pub const CODE: u64 = 0x40_0000;
/// See [`CODE`].
pub const CODE_GPA: u64 = 0x20000;
/// Pages of code.
const CODE_PAGES: u64 = 4;
/// Data: its pages lie in RAM in reverse order, so that no two neighbours are neighbours there.
pub const DATA: u64 = 0x7f_0000_0000;
/// See [`DATA`].
const DATA_GPA: u64 = 0x30000;
/// Pages of data.
pub const DATA_PAGES: u64 = 8;
/// The first page tables, mapped for the guest itself.
pub const TABLES: u64 = 0x60_0000;
const TABLES_GPA: u64 = 0x1000;
/// Top of the stack (the last data page).
pub const STACK_TOP: u64 = DATA + DATA_PAGES * 4096 - 64;
const RAM_BYTES: usize = 0x60000;

/// A guest on an engine, in 64-bit mode at privilege 0, with code at [`CODE`].
pub struct World {
    // Before the RAM it uses.
    pub cpu: Cpu,
    pub bus: QuietBus,
    pub ram: GuestRam,
    pub tables: PageTables,
}

impl World {
    /// Runs nothing yet.
    pub fn new(max_block: u32, code: &[u8]) -> Self {
        Self::of(CpuModel::x86_64_v2(), max_block, code)
    }
    /// The same with another CPU model.
    pub fn of(model: CpuModel, max_block: u32, code: &[u8]) -> Self {
        let mut ram = GuestRam::new(RAM_BYTES);
        let mut tables = PageTables::new(TABLES_GPA, system::SYSTEM_GPA);
        for page in 0..CODE_PAGES {
            tables.map(&mut ram, CODE + page * 4096, CODE_GPA + page * 4096, true, true, true);
        }
        for page in 0..DATA_PAGES {
            tables.map(&mut ram, DATA + page * 4096, data_gpa(page), true, true, false);
        }
        for page in 0..15 {
            tables.map(&mut ram, TABLES + page * 4096, TABLES_GPA + page * 4096, true, true, false);
        }
        system::install(&mut ram, &mut tables);
        ram.write(CODE_GPA, &[0xf4; (CODE_PAGES * 4096) as usize]);
        ram.write(CODE_GPA, code);
        let mut config = CpuConfig::new(model);
        config.code_cache_bytes = 1 << 20;
        config.max_block_instructions = max_block;
        // Loops of a few rounds become traces on the way.
        config.trace_after = 2;
        let mut cpu = Cpu::new(config, ram.phys().clone());
        let mut st = system::state(tables.root(), 0);
        st.rip = CODE;
        st.gpr[gpr::RSP] = STACK_TOP;
        st.gpr[gpr::RBX] = DATA;
        cpu.set_state(st);
        Self { cpu, bus: QuietBus, ram, tables }
    }
    /// The same with other registers.
    pub fn with(mut self, change: impl FnOnce(&mut CpuState)) -> Self {
        self.change(change);
        self
    }
    /// Changes registers.
    pub fn change(&mut self, change: impl FnOnce(&mut CpuState)) {
        let mut st = self.cpu.state().clone();
        change(&mut st);
        self.cpu.set_state(st);
    }
    /// Runs up to a position.
    pub fn run(&mut self, until: Position) -> Exit {
        self.cpu.run(&mut self.bus, until)
    }
    /// Runs to a HLT.
    pub fn finish(&mut self) {
        let limit = self.cpu.position() + 1_000_000;
        assert_eq!(self.run(limit), Exit::Halted);
    }
    /// Runs to a HLT that must be that of an exception handler.
    pub fn fault(&mut self) -> Frame {
        self.finish();
        system::frame(self.cpu.state(), &self.ram)
            .unwrap_or_else(|| panic!("halted at {:#x} without an exception", self.cpu.state().rip))
    }
    /// Runs to a HLT that must not be that of an exception handler.
    pub fn halt(&mut self) {
        self.finish();
        let frame = system::frame(self.cpu.state(), &self.ram);
        assert_eq!(frame, None, "cr2 {:#x}", self.cpu.state().cr2);
    }
    /// A general register.
    pub fn reg(&self, n: usize) -> u64 {
        self.cpu.state().gpr[n]
    }
    /// A word of data.
    pub fn data(&self, offset: u64) -> u64 {
        let bytes: Vec<u8> = (0..8).map(|i| self.ram.bytes(data_address(offset + i), 1)[0]).collect();
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }
    /// Sets a word of data, like a device.
    pub fn set_data(&mut self, offset: u64, value: u64) {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            self.ram.write(data_address(offset + i as u64), &[byte]);
        }
    }
    /// Guest-physical address of the last-level page-table entry of `va`.
    pub fn entry(&mut self, va: u64) -> u64 {
        self.tables.entry(&mut self.ram, va)
    }
    /// Where the guest itself sees that entry.
    pub fn entry_va(&mut self, va: u64) -> u64 {
        self.entry(va) - TABLES_GPA + TABLES
    }
    /// State and all of RAM.
    pub fn everything(&self) -> (CpuState, Position, Vec<u8>) {
        (self.cpu.state().clone(), self.cpu.position(), self.ram.bytes(0, RAM_BYTES).to_vec())
    }
}

/// Guest-physical address of data page `page`.
pub fn data_gpa(page: u64) -> u64 {
    DATA_GPA + (DATA_PAGES - 1 - page) * 4096
}

/// Guest-physical address of a byte of data.
fn data_address(offset: u64) -> u64 {
    data_gpa(offset / 4096) + offset % 4096
}

/// One after the other.
pub fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}
