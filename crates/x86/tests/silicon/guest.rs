//! The engine's side: a guest in long mode with the same windows, whose exception handlers halt.
use crate::bus::QuietBus;
use crate::case::Program;
use crate::forms::Level;
use crate::layout::{Fx, IMAGE, Outcome, PAGE, PAGE_FAULT, RAN_AWAY, Regs, SHUT_DOWN, STRANGE_EXIT, WINDOWS};
use crate::memory::{GuestRam, PageTables};
use crate::segments::Segments;
use crate::system;
use twinstep_x86::state::{FxImage, cr4, seg, xcr0};
use twinstep_x86::{Cpu, CpuConfig, CpuState, Exit, Position, Segment};

/// Guest-physical addresses. The system pages are between tables and image.
const TABLES_GPA: u64 = 0x1000;
const TABLES_END: u64 = system::SYSTEM_GPA;
const IMAGE_GPA: u64 = 0x20000;
const RAM_BYTES: usize = 0x40000;

/// An engine and its guest.
pub struct Guest {
    cpu: Cpu,
    bus: QuietBus,
    ram: GuestRam,
    cr3: u64,
    level: Level,
    /// Instructions in a block at most.
    pub max_block: u32,
}

impl Guest {
    /// A guest on an engine with blocks of at most `max_block` instructions.
    pub fn new(max_block: u32, level: Level) -> Self {
        let mut ram = GuestRam::new(RAM_BYTES);
        let mut tables = PageTables::new(TABLES_GPA, TABLES_END);
        for w in WINDOWS {
            for page in 0..w.pages {
                let offset = (w.at + page * PAGE) as u64;
                tables.map(&mut ram, w.va + (page * PAGE) as u64, IMAGE_GPA + offset, w.write, true, w.execute);
            }
        }
        system::install(&mut ram, &mut tables);
        let cr3 = tables.root();
        let config =
            // Programs are short: nothing would ever become a trace.
            CpuConfig { code_cache_bytes: 8 << 20, max_block_instructions: max_block, trace_after: 0, cache_groups: 4, ..CpuConfig::new(level.model()) };
        let cpu = Cpu::new(config, ram.phys().clone());
        Self { cpu, bus: QuietBus, ram, cr3, level, max_block }
    }
    /// Loads a case: memory and registers; the position becomes `position`.
    pub fn load(&mut self, template: &[u8; IMAGE], program: &Program, code_at: usize, cpl: u8, position: Position) {
        self.ram.write(IMAGE_GPA, template);
        self.ram.write(IMAGE_GPA + code_at as u64, &program.bytes);
        for (at, bytes) in &program.pokes {
            self.ram.write(IMAGE_GPA + *at as u64, bytes);
        }
        system::write_ldt(&mut self.ram, &program.segments.all.map(|d| d.raw));
        self.cpu.set_state(self.state(&program.init, &program.segments, cpl));
        self.cpu.set_position(position);
    }
    fn state(&self, regs: &Regs, segments: &Segments, cpl: u8) -> CpuState {
        let mut st = system::state(self.cr3, cpl);
        if self.level == Level::Host {
            st.cr4 |= cr4::OSXSAVE;
            st.xcr0 = xcr0::ALL;
        }
        st.gpr = regs.gpr;
        st.rip = regs.rip;
        st.rflags = regs.rflags;
        st.fx = FxImage(regs.fx.0);
        st.ymm_high = regs.ymm_high;
        st.seg[seg::FS].base = regs.fs_base;
        st.seg[seg::GS].base = regs.gs_base;
        if segments.narrow {
            for (to, d) in st.seg.iter_mut().zip(segments.all) {
                *to = Segment { base: d.base(), limit: d.limit(), selector: d.selector, attributes: d.attributes() };
            }
        }
        st
    }
    /// The user's registers now. Only before an exception.
    pub fn regs(&self) -> Regs {
        let st = self.cpu.state();
        Regs {
            gpr: st.gpr,
            rip: st.rip,
            rflags: st.rflags,
            fs_base: st.seg[seg::FS].base,
            gs_base: st.seg[seg::GS].base,
            fx: Fx(st.fx.0),
            ymm_high: st.ymm_high,
        }
    }
    /// The image now.
    pub fn image(&self) -> &[u8; IMAGE] {
        self.ram.bytes(IMAGE_GPA, IMAGE).try_into().expect("its length")
    }
    /// Instructions retired.
    pub fn position(&self) -> Position {
        self.cpu.position()
    }
    /// Runs to position `until`. Answers the outcome if the case ended before.
    pub fn run(&mut self, until: Position) -> Option<Outcome> {
        match self.cpu.run(&mut self.bus, until) {
            Exit::Position => {
                if self.cpu.position() != until {
                    return Some(self.odd(STRANGE_EXIT));
                }
                None
            }
            Exit::Halted => Some(self.outcome()),
            Exit::TripleFault => Some(self.odd(SHUT_DOWN)),
            Exit::Attention | Exit::Window | Exit::Unsupported(_) => Some(self.odd(STRANGE_EXIT)),
        }
    }
    /// Runs to the end, at most to position `limit`.
    pub fn finish(&mut self, limit: Position) -> Outcome {
        self.run(limit).unwrap_or_else(|| self.odd(RAN_AWAY))
    }
    /// Interrupts it here, if that may be, with a handler that returns at once. Answers whether it did.
    pub fn interrupt(&mut self) -> bool {
        const NT: u64 = 1 << 14;
        let st = self.cpu.state();
        // At the end of a code segment there is no way back.
        let beyond = !st.is_64_bit_code() && st.rip > st.seg[seg::CS].limit.into();
        if !self.cpu.can_interrupt() || st.rflags & NT != 0 || beyond {
            return false;
        }
        self.cpu.interrupt(&mut self.bus, system::TRANSPARENT as u8).is_ok()
    }
    /// Drops everything derived from the state, as a restored snapshot would.
    pub fn go_cold(&mut self) {
        let state = self.cpu.state().clone();
        self.cpu.set_state(state);
    }
    fn odd(&self, vector: u64) -> Outcome {
        Outcome { regs: self.regs(), vector, error: 0, cr2: 0 }
    }
    /// What a handler's halt says.
    fn outcome(&self) -> Outcome {
        let Some(frame) = system::frame(self.cpu.state(), &self.ram) else { return self.odd(STRANGE_EXIT) };
        let mut regs = self.regs();
        regs.rip = frame.rip;
        regs.rflags = frame.rflags;
        regs.gpr[4] = frame.rsp;
        let cr2 = if frame.vector == PAGE_FAULT { self.cpu.state().cr2 } else { 0 };
        Outcome { regs, vector: frame.vector, error: frame.error, cr2 }
    }
}
