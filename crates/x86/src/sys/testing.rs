//! A small world for unit tests: RAM, page tables, descriptor tables, and a bus that remembers what it was asked.
//!
//! Virtual addresses equal physical ones. The first 2 MiB belong to the supervisor, the next 2 MiB to everybody; what lies above
//! 4 MiB is not mapped, but for one page of device memory at [`DEVICE`].
use super::{Cx, Flow, execute, handles};
use crate::mmu::Mmu;
use crate::mmu::first::First;
use crate::state::{CpuState, TableRegister, cr0, cr4, efer, gpr, rflags, seg};
use crate::stats::SystemStats;
use crate::{Bus, CpuModel, Exception, PageFlags, PhysMem, Position, RamRegion, UnknownMsr};
use iced_x86::{Decoder, DecoderOptions};

pub const GDT: u64 = 0x8000;
pub const IDT: u64 = 0x9000;
pub const TSS: u64 = 0xa000;
/// Kernel code and the default kernel stack.
pub const CODE: u64 = 0x10000;
pub const STACK: u64 = 0x20000;
/// RSP0 and IST1 of the TSS.
pub const RSP0: u64 = 0x30000;
pub const IST1: u64 = 0x40000;
/// Handler of vector `n` is at `HANDLERS + 16 * n`.
pub const HANDLERS: u64 = 0x50000;
/// User memory.
pub const USER: u64 = 0x20_0000;
pub const DEVICE: u64 = 0x3f_f000;
/// Root of the page tables; the leaf tables of both halves.
pub const ROOT: u64 = 0x1000;
pub const LEAVES: u64 = 0x4000;

pub const KERNEL_CS: u16 = 0x10;
pub const KERNEL_SS: u16 = 0x18;
pub const USER_CS32: u16 = 0x23;
pub const USER_SS: u16 = 0x2b;
pub const USER_CS: u16 = 0x33;
pub const TSS_SELECTOR: u16 = 0x40;

#[derive(Default)]
pub struct FakeBus {
    pub log: Vec<String>,
    pub tsc: u64,
    pub cr8: u8,
    pub port_value: u32,
    pub deadline: u64,
}

impl Bus for FakeBus {
    fn mmio_read(&mut self, _: Position, gpa: u64, data: &mut [u8]) {
        self.log.push(format!("r{} {gpa:x}", data.len()));
        data.fill(0xda);
    }
    fn mmio_write(&mut self, _: Position, gpa: u64, data: &[u8]) {
        self.log.push(format!("w{} {gpa:x}", data.len()));
    }
    fn pio_read(&mut self, _: Position, port: u16, size: u8) -> u32 {
        self.log.push(format!("in{size} {port:x}"));
        self.port_value
    }
    fn pio_write(&mut self, _: Position, port: u16, size: u8, value: u32) {
        self.log.push(format!("out{size} {port:x} {value:x}"));
    }
    fn tsc(&mut self, _: Position) -> u64 {
        self.tsc
    }
    fn rdmsr(&mut self, _: Position, msr: u32) -> Result<u64, UnknownMsr> {
        match msr {
            0x1b => Ok(0xfee0_0900),
            0x6e0 => Ok(self.deadline),
            _ => Err(UnknownMsr),
        }
    }
    fn wrmsr(&mut self, _: Position, msr: u32, value: u64) -> Result<(), UnknownMsr> {
        match msr {
            0x1b => Ok(()),
            0x6e0 => {
                self.log.push(format!("deadline {value}"));
                self.deadline = value;
                Ok(())
            }
            _ => Err(UnknownMsr),
        }
    }
    fn cr8(&mut self) -> u8 {
        self.cr8
    }
    fn set_cr8(&mut self, _: Position, value: u8) {
        self.cr8 = value;
    }
    fn attention(&self) -> bool {
        false
    }
}

pub struct World {
    pub st: CpuState,
    pub mmu: Mmu,
    pub bus: FakeBus,
    pub model: CpuModel,
    pub counts: SystemStats,
    host: *mut u8,
    /// What `host` and the MMU's TLB point into.
    _owned: (Box<[[u64; 512]]>, Box<First>),
}

/// A GDT code or data descriptor, flat.
pub fn flat(access: u64, flags: u64) -> u64 {
    0xffff | access << 40 | 0xf << 48 | flags << 52
}

impl World {
    /// 64-bit kernel code at [`CODE`] with interrupts off.
    pub fn new() -> Self {
        // One page more than needed, for alignment.
        let mut pages = vec![[0u64; 512]; 1025].into_boxed_slice();
        let start = pages.as_mut_ptr() as u64;
        let host = (pages.as_mut_ptr() as *mut u8).wrapping_add((start.next_multiple_of(4096) - start) as usize);
        let region = RamRegion { gpa: 0, len: 1 << 22, host };
        // SAFETY: memory that lives as long as the world, used by nothing else.
        let ram = unsafe { PhysMem::new(vec![region], PageFlags::new(1024)) };
        // SAFETY: numbers and pointers that nobody follows before the MMU has set them.
        let mut first: Box<First> = unsafe { Box::new_zeroed().assume_init() };
        // SAFETY: as above.
        let mmu = unsafe { Mmu::new(ram, &raw mut *first, 4) };
        let mut w = Self {
            st: CpuState::reset(),
            mmu,
            bus: FakeBus::default(),
            model: CpuModel::x86_64_v2(),
            counts: SystemStats::default(),
            host,
            _owned: (pages, first),
        };
        w.put(ROOT, 0x2007);
        w.put(0x2000, 0x3007);
        w.put(0x3000, LEAVES | 7);
        w.put(0x3008, (LEAVES + 0x1000) | 7);
        for i in 0..1024u64 {
            w.put(LEAVES + 8 * i, i << 12 | if i < 512 { 3 } else { 7 });
        }
        w.put(LEAVES + 8 * (DEVICE >> 12), 0xfee0_0007);
        w.put(GDT + KERNEL_CS as u64, flat(0x9a, 0xa));
        w.put(GDT + KERNEL_SS as u64, flat(0x92, 0xc));
        w.put(GDT + 0x20, flat(0xfa, 0xc));
        w.put(GDT + 0x28, flat(0xf2, 0xc));
        w.put(GDT + 0x30, flat(0xfa, 0xa));
        w.put(GDT + 0x40, 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40);
        w.put(TSS + 4, RSP0);
        w.put(TSS + 0x24, IST1);
        for v in 0..256 {
            w.gate(v, 0x8e, 0);
        }
        let st = &mut w.st;
        st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::ET | cr0::NE | cr0::MP;
        st.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        st.cr3 = ROOT;
        st.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        st.gdtr = TableRegister { base: GDT, limit: 0x7f };
        st.idtr = TableRegister { base: IDT, limit: 0xfff };
        st.tr = crate::Segment { base: TSS, limit: 0x67, selector: TSS_SELECTOR, attributes: 0x8b };
        st.seg[seg::CS] = super::segments::flat_code(KERNEL_CS, 0, true);
        st.seg[seg::SS] = super::segments::flat_data(KERNEL_SS, 0);
        for s in [seg::DS, seg::ES, seg::FS, seg::GS] {
            st.seg[s] = super::segments::null(0);
        }
        st.rip = CODE;
        st.gpr[gpr::RSP] = STACK;
        st.star = 0x0023_0010_0000_0000;
        st.lstar = 0x60000;
        st.cstar = 0x61000;
        st.sfmask = rflags::IF | rflags::TF | rflags::DF;
        w
    }

    /// Makes it 64-bit user code in user memory.
    pub fn user(mut self) -> Self {
        self.st.cpl = 3;
        self.st.seg[seg::CS] = super::segments::flat_code(USER_CS, 3, true);
        self.st.seg[seg::SS] = super::segments::flat_data(USER_SS, 3);
        self.st.rip = USER;
        self.st.gpr[gpr::RSP] = USER + 0x8000;
        self.st.rflags |= rflags::IF;
        self
    }

    /// Makes a gate: access byte and IST.
    pub fn gate(&mut self, vector: u64, access: u64, ist: u64) {
        let handler = HANDLERS + 16 * vector;
        let low = handler & 0xffff | (KERNEL_CS as u64) << 16 | ist << 32 | access << 40 | (handler >> 16 & 0xffff) << 48;
        self.put(IDT + 16 * vector, low);
        self.put(IDT + 16 * vector + 8, handler >> 32);
    }

    pub fn cx(&mut self) -> Cx<'_> {
        Cx {
            st: &mut self.st,
            mmu: &mut self.mmu,
            bus: &mut self.bus,
            position: 7,
            model: &self.model,
            unsupported: None,
            counts: &mut self.counts,
        }
    }

    /// Writes RAM behind the MMU's back.
    pub fn put(&mut self, gpa: u64, value: u64) {
        assert!(gpa < 1 << 22);
        // SAFETY: inside the RAM.
        unsafe { self.host.add(gpa as usize).cast::<u64>().write_unaligned(value) };
    }
    pub fn get(&self, gpa: u64) -> u64 {
        assert!(gpa < 1 << 22);
        // SAFETY: inside the RAM.
        unsafe { self.host.add(gpa as usize).cast::<u64>().read_unaligned() }
    }
    pub fn put_bytes(&mut self, gpa: u64, bytes: &[u8]) {
        // SAFETY: inside the RAM.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.add(gpa as usize), bytes.len()) };
    }
    pub fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        // SAFETY: inside the RAM.
        unsafe { std::slice::from_raw_parts(self.host.add(gpa as usize), len) }.to_vec()
    }
    /// Takes a page away.
    pub fn unmap(&mut self, va: u64) {
        self.put(LEAVES + 8 * (va >> 12), 0);
        self.mmu.flush_all();
    }

    /// Executes one instruction at RIP and moves RIP as the engine does.
    pub fn exec(&mut self, code: &[u8]) -> Result<Flow, Exception> {
        let bits = if self.st.is_64_bit_code() { 64 } else { 32 };
        let insn = Decoder::with_ip(bits, code, self.st.rip, DecoderOptions::NONE).decode();
        assert_eq!(insn.len(), code.len(), "{insn:?}");
        assert!(handles(&insn, self.model.features), "{insn:?}");
        let before = self.st.clone();
        let flow = execute(&mut self.cx(), &insn);
        match flow {
            Ok(Flow::Next | Flow::Sync) => self.st.rip = insn.next_ip() & if bits == 64 { u64::MAX } else { 0xffff_ffff },
            Ok(Flow::Jump) => {}
            // Only a string step may leave something behind.
            Err(_) => {
                if !insn.is_string_instruction() {
                    assert_eq!(before, self.st, "a fault left a trace");
                }
            }
        }
        if let Ok(Flow::Next) = flow {
            assert_eq!(before.seg, self.st.seg);
            assert_eq!((before.cr0, before.cr4, before.efer, before.cpl), (self.st.cr0, self.st.cr4, self.st.efer, self.st.cpl));
            assert_eq!(0, self.st.rflags & !before.rflags & rflags::IF);
        }
        flow
    }
}
