//! The system structures of a test guest: descriptor tables, a task state segment, and exception handlers that halt.
//!
//! Every gate leads to a handler of its own on a stack of its own (IST 1), so vector, error code and the interrupted registers can be
//! read after the halt whatever the guest did to its stack pointer.
use crate::memory::{GuestRam, PageTables};
use twinstep_x86::state::{cr0, cr4, efer, seg};
use twinstep_x86::{CpuState, Segment};

const PAGE: u64 = 4096;
/// Guest-physical address of the system pages.
pub const SYSTEM_GPA: u64 = 0x10000;
/// Where they are mapped. In the kernel's half, where a host has its kernel: what a program does there by mistake is forbidden on both
/// sides.
const SYSTEM: u64 = 0xffff_8a5d_5000_0000;
/// How many.
pub const SYSTEM_PAGES: u64 = 5;
const GDT: u64 = SYSTEM;
const TSS: u64 = SYSTEM + 0x200;
const LDT: u64 = SYSTEM + 0x400;
const IDT: u64 = SYSTEM + 0x1000;
const HANDLERS: u64 = SYSTEM + 0x2000;
const HANDLER_BYTES: u64 = 16;
const INTERRUPT_STACK: u64 = SYSTEM + SYSTEM_PAGES * PAGE;

/// Selectors: those of the kernel, and for programs the same as Linux has.
pub const KERNEL_CS: u16 = 0x10;
/// See [`KERNEL_CS`].
pub const KERNEL_SS: u16 = 0x18;
/// See [`KERNEL_CS`].
pub const USER_CS: u16 = 0x33;
/// See [`KERNEL_CS`].
pub const USER_SS: u16 = 0x2b;
/// See [`KERNEL_CS`].
pub const USER_CS_32: u16 = 0x23;

/// The vector whose handler returns at once (IRETQ).
pub const TRANSPARENT: u64 = 0x40;

/// Vectors that push an error code.
const WITH_ERROR: [u64; 7] = [8, 10, 11, 12, 13, 14, 17];

/// Writes the system pages and maps them.
pub fn install(ram: &mut GuestRam, tables: &mut PageTables) {
    for page in 0..SYSTEM_PAGES {
        tables.map(ram, SYSTEM + page * PAGE, SYSTEM_GPA + page * PAGE, true, false, true);
    }
    let put = |ram: &mut GuestRam, va: u64, value: u64| ram.write(SYSTEM_GPA + (va - SYSTEM), &value.to_le_bytes());
    let descriptors = [
        (KERNEL_CS, 0x00af_9b00_0000_ffff),
        (KERNEL_SS, 0x00cf_9300_0000_ffff),
        (USER_SS & !3, 0x00cf_f300_0000_ffff),
        (USER_CS & !3, 0x00af_fb00_0000_ffff),
        (USER_CS_32 & !3, 0x00cf_fb00_0000_ffff),
    ];
    for (selector, descriptor) in descriptors {
        put(ram, GDT + u64::from(selector), descriptor);
    }
    let low = (TSS & 0xff_ffff) << 16 | (TSS >> 24 & 0xff) << 56 | 0x8b << 40 | 0x67;
    put(ram, GDT + 0x40, low);
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
        put(ram, at, if vector == TRANSPARENT { 0xcf48 } else { 0xf4 });
    }
}

/// Writes the first entries of the LDT.
pub fn write_ldt(ram: &mut GuestRam, descriptors: &[u64]) {
    for (i, descriptor) in (0..).zip(descriptors) {
        ram.write(SYSTEM_GPA + (LDT - SYSTEM) + 8 * i, &descriptor.to_le_bytes());
    }
}

/// A processor in 64-bit mode with these tables.
pub fn state(cr3: u64, cpl: u8) -> CpuState {
    let mut st = CpuState::reset();
    st.cpl = cpl;
    st.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    st.cr3 = cr3;
    st.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    st.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    let dpl = u16::from(cpl) << 5;
    let (cs, ss) = if cpl == 3 { (USER_CS, USER_SS) } else { (KERNEL_CS, KERNEL_SS) };
    st.seg = [Segment { base: 0, limit: u32::MAX, selector: 0, attributes: 0 }; 6];
    st.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, selector: cs, attributes: 0xa09b | dpl };
    st.seg[seg::SS] = Segment { base: 0, limit: u32::MAX, selector: ss, attributes: 0xc093 | dpl };
    st.tr = Segment { base: TSS, limit: 0x67, selector: 0x40, attributes: 0x8b };
    st.ldtr = Segment { base: LDT, limit: 0x7f, selector: 0x50, attributes: 0x82 };
    st.gdtr.base = GDT;
    st.gdtr.limit = 0x4f;
    st.idtr.base = IDT;
    st.idtr.limit = 0xfff;
    st
}

/// What a handler found on its stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    pub vector: u64,
    /// Zero for vectors without.
    pub error: u64,
    pub rip: u64,
    pub rflags: u64,
    pub rsp: u64,
}

/// The exception whose handler has halted. `None` if it was another HLT.
pub fn frame(st: &CpuState, ram: &GuestRam) -> Option<Frame> {
    let vector = st.rip.wrapping_sub(HANDLERS + 1) / HANDLER_BYTES;
    let bytes = if WITH_ERROR.contains(&vector) { 48 } else { 40 };
    let at = INTERRUPT_STACK - bytes;
    if vector > 255 || st.rip != HANDLERS + 1 + vector * HANDLER_BYTES || st.cpl != 0 || st.gpr[4] != at {
        return None;
    }
    let word = |i: u64| ram.word(SYSTEM_GPA + (at - SYSTEM) + i * 8);
    let first = (bytes - 40) / 8;
    let error = if first == 1 { word(0) } else { 0 };
    Some(Frame { vector, error, rip: word(first), rflags: word(first + 2), rsp: word(first + 3) })
}
