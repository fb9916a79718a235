//! The engine's side: a guest in long mode with the same windows, whose exception handlers halt.
//!
//! Every gate leads to a handler of its own on a stack of its own (IST 1), so vector, error code and the interrupted registers can be
//! read after the halt whatever the case did to its stack pointer.
use crate::bus::QuietBus;
use crate::case::Program;
use crate::layout::{
    Fx, IMAGE, Outcome, PAGE, RAN_AWAY, Regs, SHUT_DOWN, STRANGE_EXIT, USER_CS, USER_SS, WINDOWS,
};
use crate::memory::{GuestRam, PageTables};
use twinstep_x86::state::{FxImage, cr0, cr4, efer, seg};
use twinstep_x86::{Cpu, CpuConfig, CpuModel, CpuState, Exit, Position, Segment};

/// Guest-physical addresses.
const TABLES_GPA: u64 = 0x1000;
const TABLES_END: u64 = 0x10000;
const SYSTEM_GPA: u64 = 0x10000;
const IMAGE_GPA: u64 = 0x20000;
const RAM_BYTES: usize = 0x40000;

/// Where the system pages are mapped, and what is in them. In the kernel's half, where the host has its kernel: what a case does there by
/// mistake is as forbidden on both sides.
const SYSTEM: u64 = 0xffff_8a5d_5000_0000;
const SYSTEM_PAGES: u64 = 5;
const GDT: u64 = SYSTEM;
const TSS: u64 = SYSTEM + 0x200;
const IDT: u64 = SYSTEM + 0x1000;
const HANDLERS: u64 = SYSTEM + 0x2000;
const HANDLER_BYTES: u64 = 16;
const INTERRUPT_STACK: u64 = SYSTEM + 0x5000;

const KERNEL_CS: u16 = 0x10;
const KERNEL_SS: u16 = 0x18;

/// Vectors that push an error code.
const WITH_ERROR: [u64; 7] = [8, 10, 11, 12, 13, 14, 17];

/// An engine and its guest.
pub struct Guest {
    cpu: Cpu,
    bus: QuietBus,
    ram: GuestRam,
    cr3: u64,
    /// Instructions in a block at most.
    pub max_block: u32,
}

impl Guest {
    /// A guest on an engine with blocks of at most `max_block` instructions.
    pub fn new(max_block: u32) -> Self {
        let mut ram = GuestRam::new(RAM_BYTES);
        let mut tables = PageTables::new(TABLES_GPA, TABLES_END);
        for w in WINDOWS {
            for page in 0..w.pages {
                let offset = (w.at + page * PAGE) as u64;
                tables.map(&mut ram, w.va + (page * PAGE) as u64, IMAGE_GPA + offset, w.write, true, w.execute);
            }
        }
        for page in 0..SYSTEM_PAGES {
            let offset = page * PAGE as u64;
            tables.map(&mut ram, SYSTEM + offset, SYSTEM_GPA + offset, true, false, true);
        }
        let cr3 = tables.root();
        write_system_pages(&mut ram);
        let config = CpuConfig { model: CpuModel::x86_64_v2(), code_cache_bytes: 8 << 20, max_block_instructions: max_block };
        let cpu = Cpu::new(config, ram.phys().clone());
        Self { cpu, bus: QuietBus, ram, cr3, max_block }
    }
    /// Loads a case: memory and registers; the position becomes `position`.
    pub fn load(&mut self, template: &[u8; IMAGE], program: &Program, code_at: usize, cpl: u8, position: Position) {
        self.ram.write(IMAGE_GPA, template);
        self.ram.write(IMAGE_GPA + code_at as u64, &program.bytes);
        for (at, bytes) in &program.pokes {
            self.ram.write(IMAGE_GPA + *at as u64, bytes);
        }
        self.cpu.set_state(self.state(&program.init, cpl));
        self.cpu.set_position(position);
    }
    fn state(&self, regs: &Regs, cpl: u8) -> CpuState {
        let mut st = CpuState::reset();
        st.gpr = regs.gpr;
        st.rip = regs.rip;
        st.rflags = regs.rflags;
        st.fx = FxImage(regs.fx.0);
        st.cpl = cpl;
        st.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        st.cr3 = self.cr3;
        st.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        st.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        let dpl = u16::from(cpl) << 5;
        let data = Segment { base: 0, limit: u32::MAX, selector: 0, attributes: 0 };
        let (cs, ss) = if cpl == 3 { (USER_CS, USER_SS) } else { (KERNEL_CS, KERNEL_SS) };
        st.seg = [data; 6];
        st.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, selector: cs, attributes: 0xa09b | dpl };
        st.seg[seg::SS] = Segment { base: 0, limit: u32::MAX, selector: ss, attributes: 0xc093 | dpl };
        st.seg[seg::FS].base = regs.fs_base;
        st.seg[seg::GS].base = regs.gs_base;
        st.tr = Segment { base: TSS, limit: 0x67, selector: 0x40, attributes: 0x8b };
        st.ldtr = Segment { base: 0, limit: 0, selector: 0, attributes: 0 };
        st.gdtr.base = GDT;
        st.gdtr.limit = 0x4f;
        st.idtr.base = IDT;
        st.idtr.limit = 0xfff;
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
        let st = self.cpu.state();
        let vector = st.rip.wrapping_sub(HANDLERS + 1) / HANDLER_BYTES;
        let frame_bytes = if WITH_ERROR.contains(&vector) { 48 } else { 40 };
        let frame = INTERRUPT_STACK - frame_bytes;
        if vector > 255 || st.rip != HANDLERS + 1 + vector * HANDLER_BYTES || st.cpl != 0 || st.gpr[4] != frame {
            return self.odd(STRANGE_EXIT);
        }
        let bytes = self.ram.bytes(SYSTEM_GPA + (frame - SYSTEM), frame_bytes as usize);
        let mut words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        let error = if frame_bytes == 48 { words.remove(0) } else { 0 };
        let mut regs = self.regs();
        regs.rip = words[0];
        regs.rflags = words[2];
        regs.gpr[4] = words[3];
        Outcome { regs, vector, error, cr2: if vector == 14 { st.cr2 } else { 0 } }
    }
}

fn write_system_pages(ram: &mut GuestRam) {
    let put = |ram: &mut GuestRam, va: u64, value: u64| ram.write(SYSTEM_GPA + (va - SYSTEM), &value.to_le_bytes());
    let descriptors = [
        (KERNEL_CS, 0x00af_9b00_0000_ffff),
        (KERNEL_SS, 0x00cf_9300_0000_ffff),
        (USER_SS & !3, 0x00cf_f300_0000_ffff),
        (USER_CS & !3, 0x00af_fb00_0000_ffff),
    ];
    for (selector, descriptor) in descriptors {
        put(ram, GDT + u64::from(selector), descriptor);
    }
    let tss = (TSS & 0xff_ffff) << 16 | (TSS >> 24 & 0xff) << 56 | 0x8b << 40 | 0x67;
    put(ram, GDT + 0x40, tss);
    put(ram, GDT + 0x48, TSS >> 32);
    put(ram, TSS + 4, INTERRUPT_STACK);
    put(ram, TSS + 0x24, INTERRUPT_STACK);
    put(ram, TSS + 0x60, 0x68 << 48); // the I/O permission bitmap starts behind the limit: there is none
    for vector in 0..256 {
        let at = HANDLERS + vector * HANDLER_BYTES;
        let dpl: u64 = if vector == 3 || vector == 4 { 3 } else { 0 };
        let low = at & 0xffff | u64::from(KERNEL_CS) << 16 | 1 << 32 | (0x8e | dpl << 5) << 40 | (at >> 16 & 0xffff) << 48;
        put(ram, IDT + vector * 16, low);
        put(ram, IDT + vector * 16 + 8, at >> 32);
        put(ram, at, 0xf4);
    }
}
