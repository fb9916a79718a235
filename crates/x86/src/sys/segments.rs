//! Segment registers and descriptor tables: loading, storing, and the instructions that only look.
//!
//! **In:** selectors, the GDT and LDT in guest memory. **Out:** segment registers with their hidden parts.
//!
//! **Invariant:** a hidden part is either unusable (attributes zero) or came from a descriptor that passed the checks of its
//! register. A descriptor's accessed bit is set before the register changes.
//!
//! References: APM vol. 2 sections 4.7, 4.8 (descriptors), 4.10, 4.12 (checks); SDM vol. 2 "MOV", "LAR", "LSL", "LTR".
use super::{Cx, Ea, Flow, segment_number};
use crate::Exception;
use crate::mmu::canonical;
use crate::state::{Segment, TableRegister, efer, gpr, seg};
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

/// System descriptor types. Those below 8, but for the LDT's, exist outside long mode only.
#[allow(missing_docs)]
pub(super) mod system {
    pub const TSS_16: u16 = 1;
    pub const LDT: u16 = 2;
    pub const BUSY_TSS_16: u16 = 3;
    pub const CALL_GATE_16: u16 = 4;
    pub const TASK_GATE: u16 = 5;
    pub const INTERRUPT_GATE_16: u16 = 6;
    pub const TRAP_GATE_16: u16 = 7;
    pub const TSS: u16 = 9;
    pub const BUSY_TSS: u16 = 11;
    pub const CALL_GATE: u16 = 12;
    pub const INTERRUPT_GATE: u16 = 14;
    pub const TRAP_GATE: u16 = 15;
}

/// Attributes and limits of the flat segments that SYSCALL and friends load without looking at a descriptor.
pub(super) fn flat_code(selector: u16, dpl: u16, long: bool) -> Segment {
    let attributes = 0x809b | dpl << 5 | if long { Segment::LONG } else { Segment::BIG };
    Segment { base: 0, limit: u32::MAX, selector, attributes }
}
/// See [`flat_code`].
pub(super) fn flat_data(selector: u16, dpl: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attributes: 0xc093 | dpl << 5 }
}
/// A null selector with its requested privilege level.
pub(super) fn null(selector: u16) -> Segment {
    Segment { base: 0, limit: 0, selector, attributes: 0 }
}
/// Whether a selector is null.
pub(super) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}
/// A selector as the error code of a fault about it.
pub(super) fn error_code(selector: u16) -> u32 {
    (selector & 0xfffc) as u32
}

/// The first eight bytes of a descriptor, and where they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub raw: u64,
    pub va: u64,
}

impl Descriptor {
    /// Access rights in the format of [`Segment::attributes`].
    pub fn attributes(&self) -> u16 {
        let high = (self.raw >> 40) as u16;
        high & 0xf0ff
    }
    /// Type field.
    pub fn kind(&self) -> u16 {
        self.attributes() & 15
    }
    pub fn is_system(&self) -> bool {
        self.attributes() & Segment::NON_SYSTEM == 0
    }
    pub fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    pub fn is_writable_data(&self) -> bool {
        !self.is_system() && self.kind() & 10 == 2
    }
    pub fn is_readable(&self) -> bool {
        !self.is_system() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }
    pub fn is_present(&self) -> bool {
        self.attributes() & Segment::PRESENT != 0
    }
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }
    pub fn is_long(&self) -> bool {
        self.attributes() & Segment::LONG != 0
    }
    pub fn is_big(&self) -> bool {
        self.attributes() & Segment::BIG != 0
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// The 32-bit base.
    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// The segment register it makes, accessed bit set.
    pub fn segment(&self, selector: u16) -> Segment {
        let accessed = if self.is_system() { 0 } else { 1 };
        Segment { base: self.base(), limit: self.limit(), selector, attributes: self.attributes() | accessed }
    }
}

impl Cx<'_> {
    /// Where `selector`'s descriptor of `size` bytes is, if its table reaches that far.
    fn descriptor_address(&self, selector: u16, size: u32) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.st.gdtr.base, self.st.gdtr.limit as u32)
        } else {
            let ldtr = &self.st.ldtr;
            if ldtr.attributes & Segment::PRESENT == 0 || is_null(ldtr.selector) {
                return None;
            }
            (ldtr.base, ldtr.limit)
        };
        let offset = (selector & 0xfff8) as u32;
        (offset + size - 1 <= limit).then(|| base.wrapping_add(offset as u64))
    }
    /// Reads a descriptor, or `None` beyond its table's limit.
    pub(super) fn find_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Exception> {
        let Some(va) = self.descriptor_address(selector, 8) else { return Ok(None) };
        Ok(Some(Descriptor { raw: u64::from_le_bytes(self.read_system(va)?), va }))
    }
    /// Reads a descriptor; beyond the table's limit is #GP(selector).
    pub(super) fn descriptor(&mut self, selector: u16) -> Result<Descriptor, Exception> {
        self.find_descriptor(selector)?.ok_or(Exception::gp(error_code(selector)))
    }
    /// Whether long mode is active (64-bit code or compatibility mode): its system descriptors and gates have 16 bytes.
    pub(super) fn long_mode(&self) -> bool {
        self.st.efer & efer::LMA != 0
    }
    /// Reads a system descriptor: its first half and the upper one, which is zero outside long mode.
    pub(super) fn system_descriptor(&mut self, selector: u16) -> Result<(Descriptor, u64), Exception> {
        let gp = Exception::gp(error_code(selector));
        let descriptor = self.descriptor(selector)?;
        if !self.long_mode() {
            return Ok((descriptor, 0));
        }
        let va = self.descriptor_address(selector, 16).ok_or(gp)?;
        let upper = u64::from_le_bytes(self.read_system(va.wrapping_add(8))?);
        Ok((descriptor, upper))
    }
    /// Sets the accessed bit of a code or data descriptor in memory, if it is not set.
    pub(super) fn mark_accessed(&mut self, descriptor: &Descriptor) -> Result<(), Exception> {
        if descriptor.raw >> 40 & 1 != 0 {
            return Ok(());
        }
        let byte = (descriptor.raw >> 40) as u8 | 1;
        self.write_system(descriptor.va.wrapping_add(5), &[byte])
    }

    /// What loading `selector` into SS gives at privilege level `cpl`, in 64-bit code or not. `null_ok`: a null selector is
    /// allowed (it never is at level 3). Faults are made by `fault` from a selector's error code.
    pub(super) fn checked_ss(
        &mut self,
        selector: u16,
        cpl: u8,
        null_ok: bool,
        fault: fn(u32) -> Exception,
    ) -> Result<(Segment, Option<Descriptor>), Exception> {
        if is_null(selector) {
            if null_ok && cpl < 3 && (selector & 3) as u8 == cpl {
                return Ok((null(selector), None));
            }
            return Err(fault(0));
        }
        let bad = fault(error_code(selector));
        let d = self.find_descriptor(selector)?.ok_or(bad)?;
        if (selector & 3) as u8 != cpl || !d.is_writable_data() || d.dpl() != cpl {
            return Err(bad);
        }
        if !d.is_present() {
            return Err(Exception::ss(error_code(selector)));
        }
        Ok((d.segment(selector), Some(d)))
    }

    /// Loads a segment register other than CS from a selector.
    fn load_segment(&mut self, s: usize, selector: u16) -> Result<(), Exception> {
        let (segment, descriptor) = if s == seg::SS {
            self.checked_ss(selector, self.st.cpl, self.st.is_64_bit_code(), Exception::gp)?
        } else if is_null(selector) {
            // The base is cleared as well, as CPUID 8000_0021 EAX bit 6 promises.
            (null(selector), None)
        } else {
            let bad = Exception::gp(error_code(selector));
            let d = self.descriptor(selector)?;
            let rpl = (selector & 3) as u8;
            if !d.is_readable() || !d.is_conforming() && (rpl > d.dpl() || self.st.cpl > d.dpl()) {
                return Err(bad);
            }
            if !d.is_present() {
                return Err(Exception::np(error_code(selector)));
            }
            (d.segment(selector), Some(d))
        };
        if let Some(d) = descriptor {
            self.mark_accessed(&d)?;
        }
        self.st.seg[s] = segment;
        if s == seg::SS {
            self.st.interrupt_shadow = true;
        }
        Ok(())
    }
}

/// MOV to and from segment registers.
pub(super) fn mov(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let to = insn.op0_register();
    if to.is_segment_register() {
        let s = segment_number(to);
        if s == seg::CS {
            return Err(Exception::UD);
        }
        let selector = cx.operand16(insn, 1)?;
        cx.load_segment(s, selector)?;
        return Ok(Flow::Sync);
    }
    let selector = cx.st.seg[segment_number(insn.op1_register())].selector;
    cx.store_word(insn, selector as u64)?;
    Ok(Flow::Next)
}

/// PUSH and POP of segment registers.
pub(super) fn push_pop(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let s = segment_number(insn.op0_register());
    if cx.st.is_64_bit_code() && s < seg::FS {
        return Err(Exception::UD);
    }
    let size = match insn.op_code().operand_size() {
        16 => 2,
        32 => 4,
        _ => 8,
    };
    if insn.mnemonic() == M::Push {
        cx.push(size, cx.st.seg[s].selector as u64)?;
        return Ok(Flow::Next);
    }
    let selector = cx.peek(size, 0)? as u16;
    // The width of the stack pointer is that of the old SS.
    let rsp = cx.moved_rsp(size as i64);
    cx.load_segment(s, selector)?;
    cx.st.gpr[gpr::RSP] = rsp;
    Ok(Flow::Sync)
}

/// Executes one of the other instructions of this module.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    match insn.mnemonic() {
        M::Lds => load_far_pointer(cx, insn, seg::DS),
        M::Les => load_far_pointer(cx, insn, seg::ES),
        M::Lfs => load_far_pointer(cx, insn, seg::FS),
        M::Lgs => load_far_pointer(cx, insn, seg::GS),
        M::Lss => load_far_pointer(cx, insn, seg::SS),
        M::Lar | M::Lsl | M::Verr | M::Verw => look(cx, insn),
        M::Lldt => lldt(cx, insn),
        M::Ltr => ltr(cx, insn),
        M::Sldt => store(cx, insn, cx.st.ldtr.selector),
        M::Str => store(cx, insn, cx.st.tr.selector),
        M::Lgdt | M::Lidt => load_table(cx, insn),
        M::Sgdt => store_table(cx, insn, cx.st.gdtr),
        M::Sidt => store_table(cx, insn, cx.st.idtr),
        M::Swapgs => swapgs(cx),
        _ => Err(Exception::UD),
    }
}

fn store(cx: &mut Cx, insn: &Instruction, selector: u16) -> Result<Flow, Exception> {
    cx.store_word(insn, selector as u64)?;
    Ok(Flow::Next)
}

fn load_far_pointer(cx: &mut Cx, insn: &Instruction, s: usize) -> Result<Flow, Exception> {
    if cx.st.is_64_bit_code() && s != seg::SS && s < seg::FS {
        return Err(Exception::UD);
    }
    let to = insn.op0_register();
    let at = cx.ea(insn);
    let offset = cx.read_value(at, to.size())?;
    let selector = cx.read_value(Ea { va: at.va.wrapping_add(to.size() as u64), ..at }, 2)? as u16;
    cx.load_segment(s, selector)?;
    cx.set_reg(to, offset);
    Ok(Flow::Sync)
}

/// LAR, LSL, VERR, VERW: the answer is ZF, and never a fault about the descriptor's contents.
fn look(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let op = match insn.mnemonic() {
        M::Lar | M::Lsl => 1,
        _ => 0,
    };
    let selector = cx.operand16(insn, op)?;
    let found = if is_null(selector) { None } else { cx.find_descriptor(selector)? };
    let answer = found.and_then(|d| {
        let rpl = (selector & 3) as u8;
        if !d.is_conforming() && (cx.st.cpl > d.dpl() || rpl > d.dpl()) {
            return None;
        }
        let legacy = !cx.long_mode();
        let tss = matches!(d.kind(), system::LDT | system::TSS | system::BUSY_TSS)
            || legacy && matches!(d.kind(), system::TSS_16 | system::BUSY_TSS_16);
        let gate = d.kind() == system::CALL_GATE || legacy && matches!(d.kind(), system::CALL_GATE_16 | system::TASK_GATE);
        match insn.mnemonic() {
            M::Lar => (!d.is_system() || tss || gate).then_some(d.raw >> 32 & 0x00ff_ff00),
            M::Lsl => (!d.is_system() || tss).then_some(d.limit() as u64),
            M::Verr => d.is_readable().then_some(0),
            _ => d.is_writable_data().then_some(0),
        }
    });
    let zf = crate::state::rflags::ZF;
    cx.st.rflags &= !zf;
    if let Some(value) = answer {
        cx.st.rflags |= zf;
        if op == 1 {
            cx.set_reg(insn.op0_register(), value);
        }
    }
    Ok(Flow::Next)
}

fn lldt(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    cx.require_cpl0()?;
    let selector = cx.operand16(insn, 0)?;
    if is_null(selector) {
        cx.st.ldtr = null(selector);
        return Ok(Flow::Sync);
    }
    let bad = Exception::gp(error_code(selector));
    if selector & 4 != 0 {
        return Err(bad);
    }
    let (d, upper) = cx.system_descriptor(selector)?;
    if !d.is_system() || d.kind() != system::LDT {
        return Err(bad);
    }
    if !d.is_present() {
        return Err(Exception::np(error_code(selector)));
    }
    let base = d.base() | upper << 32;
    if !canonical(base) {
        return Err(bad);
    }
    cx.st.ldtr = Segment { base, ..d.segment(selector) };
    Ok(Flow::Sync)
}

fn ltr(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    cx.require_cpl0()?;
    let selector = cx.operand16(insn, 0)?;
    let bad = Exception::gp(error_code(selector));
    if is_null(selector) || selector & 4 != 0 {
        return Err(bad);
    }
    let (d, upper) = cx.system_descriptor(selector)?;
    let available = d.kind() == system::TSS || !cx.long_mode() && d.kind() == system::TSS_16;
    if !d.is_system() || !available {
        return Err(bad);
    }
    if !d.is_present() {
        return Err(Exception::np(error_code(selector)));
    }
    let base = d.base() | upper << 32;
    if !canonical(base) {
        return Err(bad);
    }
    // Available becomes busy, in memory and in the register.
    cx.write_system(d.va.wrapping_add(5), &[(d.raw >> 40) as u8 | 2])?;
    let segment = d.segment(selector);
    cx.st.tr = Segment { base, attributes: segment.attributes | 2, ..segment };
    Ok(Flow::Sync)
}

fn load_table(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    cx.require_cpl0()?;
    if insn.op0_kind() != OpKind::Memory {
        return Err(Exception::UD);
    }
    let at = cx.ea(insn);
    let limit = cx.read_value(at, 2)? as u16;
    let wide = cx.st.is_64_bit_code();
    let base = cx.read_value(Ea { va: at.va.wrapping_add(2), ..at }, if wide { 8 } else { 4 })?;
    // With 16-bit operands only 24 bits of it count.
    let base = if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) { base & 0xff_ffff } else { base };
    if !canonical(base) {
        return Err(Exception::gp(0));
    }
    let table = TableRegister { base, limit };
    if insn.mnemonic() == M::Lgdt {
        cx.st.gdtr = table;
    } else {
        cx.st.idtr = table;
    }
    Ok(Flow::Sync)
}

fn store_table(cx: &mut Cx, insn: &Instruction, table: TableRegister) -> Result<Flow, Exception> {
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    let len = if cx.st.is_64_bit_code() { 10 } else { 6 };
    let at = cx.ea(insn);
    cx.write_bytes(at, &image[..len])?;
    Ok(Flow::Next)
}

fn swapgs(cx: &mut Cx) -> Result<Flow, Exception> {
    if !cx.st.is_64_bit_code() {
        return Err(Exception::UD);
    }
    cx.require_cpl0()?;
    std::mem::swap(&mut cx.st.seg[seg::GS].base, &mut cx.st.kernel_gs_base);
    Ok(Flow::Sync)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{GDT, KERNEL_CS, KERNEL_SS, STACK, TSS, TSS_SELECTOR, USER, USER_CS, USER_SS, World, flat};
    use super::*;
    use crate::state::rflags;

    /// MOV to the segment register numbered `s`, from AX.
    fn load(w: &mut World, s: u8, selector: u16) -> Result<Flow, Exception> {
        w.st.gpr[gpr::RAX] = selector as u64;
        w.exec(&[0x8e, 0xc0 | s << 3])
    }

    #[test]
    fn moves_to_data_segments() {
        let mut w = World::new();
        w.put(GDT + 0x50, flat(0x92, 0xc) | 0x12_3456 << 16 | 0x78 << 56);
        assert_eq!(load(&mut w, 4, 0x50), Ok(Flow::Sync));
        let fs = Segment { base: 0x7812_3456, limit: u32::MAX, selector: 0x50, attributes: 0xc093 };
        assert_eq!(w.st.seg[seg::FS], fs);
        // The accessed bit is set in memory.
        assert_eq!(w.get(GDT + 0x50) >> 40 & 0xff, 0x93);
        // A null selector clears the base.
        assert_eq!(load(&mut w, 4, 3), Ok(Flow::Sync));
        assert_eq!(w.st.seg[seg::FS], null(3));
        assert_eq!(load(&mut w, 3, 0xf0), Err(Exception::gp(0xf0)));
        assert_eq!(load(&mut w, 3, TSS_SELECTOR), Err(Exception::gp(0x40)));
        assert_eq!(load(&mut w, 3, 0x0c), Err(Exception::gp(0x0c)));
        // Byte granularity, not present.
        w.put(GDT + 0x50, 0x1234 | 0x92 << 40 | 0x5 << 48);
        assert_eq!(load(&mut w, 3, 0x50), Ok(Flow::Sync));
        assert_eq!(w.st.seg[seg::DS].limit, 0x5_1234);
        w.put(GDT + 0x50, flat(0x12, 0xc));
        assert_eq!(load(&mut w, 3, 0x50), Err(Exception::np(0x50)));
        // Execute-only code cannot be read.
        w.put(GDT + 0x50, flat(0x98, 0xa));
        assert_eq!(load(&mut w, 3, 0x50), Err(Exception::gp(0x50)));
        // CS never.
        assert_eq!(load(&mut w, 1, KERNEL_CS), Err(Exception::UD));
        // Users cannot load the kernel's.
        let mut w = World::new().user();
        assert_eq!(load(&mut w, 3, KERNEL_SS), Err(Exception::gp(KERNEL_SS as u32)));
        assert_eq!(load(&mut w, 3, USER_SS), Ok(Flow::Sync));
        assert_eq!(w.exec(&[0x8c, 0xd8]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RAX], USER_SS as u64);
    }

    #[test]
    fn stack_segment() {
        let mut w = World::new();
        assert_eq!(load(&mut w, 2, KERNEL_SS), Ok(Flow::Sync));
        assert!(w.st.interrupt_shadow);
        assert_eq!(w.exec(&[0xfa]), Ok(Flow::Next));
        assert!(!w.st.interrupt_shadow);
        assert_eq!(load(&mut w, 2, 0), Ok(Flow::Sync));
        assert_eq!(load(&mut w, 2, 3), Err(Exception::gp(0)));
        assert_eq!(load(&mut w, 2, USER_SS), Err(Exception::gp(USER_SS as u32 & !3)));
        assert_eq!(load(&mut w, 2, KERNEL_CS), Err(Exception::gp(KERNEL_CS as u32)));
        w.put(GDT + 0x50, flat(0x12, 0xc));
        assert_eq!(load(&mut w, 2, 0x50), Err(Exception::ss(0x50)));
        let mut w = World::new().user();
        assert_eq!(load(&mut w, 2, 0), Err(Exception::gp(0)));
        assert_eq!(load(&mut w, 2, USER_SS), Ok(Flow::Sync));
    }

    #[test]
    fn stores_and_pushes() {
        let mut w = World::new();
        w.put(STACK - 8, u64::MAX);
        // PUSH GS, POP FS.
        w.st.seg[seg::GS].selector = 0x2b;
        assert_eq!(w.exec(&[0x0f, 0xa8]), Ok(Flow::Next));
        assert_eq!((w.get(STACK - 8), w.st.gpr[gpr::RSP]), (0x2b, STACK - 8));
        assert_eq!(w.exec(&[0x0f, 0xa1]), Ok(Flow::Sync));
        assert_eq!((w.st.seg[seg::FS].selector, w.st.gpr[gpr::RSP]), (0x2b, STACK));
        // MOV [rbx], ss: 16 bits.
        w.st.gpr[gpr::RBX] = USER;
        w.put(USER, u64::MAX);
        assert_eq!(w.exec(&[0x8c, 0x13]), Ok(Flow::Next));
        assert_eq!(w.get(USER), 0xffff_ffff_ffff_0018);
        // LSS with a pointer in memory.
        w.put(USER, 0x0018_1234_5678);
        assert_eq!(w.exec(&[0x0f, 0xb2, 0x03]), Ok(Flow::Sync));
        assert_eq!(w.st.gpr[gpr::RAX], 0x1234_5678);
    }

    #[test]
    fn local_descriptors() {
        let mut w = World::new();
        w.put(GDT + 0x50, 0xf | (USER & 0xff_ffff) << 16 | 0x82 << 40 | (USER >> 24) << 56);
        w.put(GDT + 0x58, 0);
        w.put(USER + 8, flat(0x92, 0xc));
        assert_eq!(load(&mut w, 3, 0xc), Err(Exception::gp(0xc)));
        w.st.gpr[gpr::RAX] = 0x50;
        assert_eq!(w.exec(&[0x0f, 0x00, 0xd0]), Ok(Flow::Sync));
        assert_eq!((w.st.ldtr.base, w.st.ldtr.limit), (USER, 0xf));
        assert_eq!(load(&mut w, 3, 0xc), Ok(Flow::Sync));
        assert_eq!(load(&mut w, 3, 0x14), Err(Exception::gp(0x14)));
        assert_eq!(w.exec(&[0x0f, 0x00, 0xc1]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RCX], 0x50);
        w.put(GDT + 0x58, 0x8000);
        w.st.gpr[gpr::RAX] = 0x50;
        assert_eq!(w.exec(&[0x0f, 0x00, 0xd0]), Err(Exception::gp(0x50)));
        w.st.gpr[gpr::RAX] = KERNEL_CS as u64;
        assert_eq!(w.exec(&[0x0f, 0x00, 0xd0]), Err(Exception::gp(KERNEL_CS as u32)));
        w.st.gpr[gpr::RAX] = 0;
        assert_eq!(w.exec(&[0x0f, 0x00, 0xd0]), Ok(Flow::Sync));
        assert_eq!(w.st.ldtr, null(0));
    }

    #[test]
    fn task_register() {
        let mut w = World::new();
        w.st.tr = null(0);
        w.st.gpr[gpr::RAX] = TSS_SELECTOR as u64;
        assert_eq!(w.exec(&[0x0f, 0x00, 0xd8]), Ok(Flow::Sync));
        assert_eq!(w.st.tr, Segment { base: TSS, limit: 0x67, selector: TSS_SELECTOR, attributes: 0x8b });
        assert_eq!(w.get(GDT + 0x40) >> 40 & 0xff, 0x8b);
        // Busy now.
        assert_eq!(w.exec(&[0x0f, 0x00, 0xd8]), Err(Exception::gp(0x40)));
        let mut w = World::new().user();
        assert_eq!(w.exec(&[0x0f, 0x00, 0xd8]), Err(Exception::gp(0)));
    }

    #[test]
    fn looking_at_descriptors() {
        let mut w = World::new().user();
        let mut look = |code: &[u8], selector: u16| {
            w.st.gpr[gpr::RAX] = selector as u64;
            w.st.gpr[gpr::RCX] = 0x77;
            assert_eq!(w.exec(code), Ok(Flow::Next));
            (w.st.rflags & rflags::ZF != 0).then_some(w.st.gpr[gpr::RCX])
        };
        let (lar, lsl) = (&[0x0f, 0x02, 0xc8], &[0x0f, 0x03, 0xc8]);
        assert_eq!(look(lar, USER_CS), Some(0x00af_fa00));
        assert_eq!(look(lsl, USER_CS), Some(0xffff_ffff));
        // Not for this level, null, beyond the table.
        for selector in [KERNEL_CS, 3, 0xf3] {
            assert_eq!(look(lar, selector), None);
            assert_eq!(look(lsl, selector), None);
        }
        let (verr, verw) = (&[0x0f, 0x00, 0xe0], &[0x0f, 0x00, 0xe8]);
        assert!(look(verr, USER_CS).is_some() && look(verw, USER_CS).is_none());
        assert!(look(verr, USER_SS).is_some() && look(verw, USER_SS).is_some());
        assert!(look(verr, KERNEL_SS).is_none());
        let mut w = World::new();
        w.st.gpr[gpr::RAX] = TSS_SELECTOR as u64;
        assert_eq!(w.exec(&[0x0f, 0x03, 0xc8]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RCX], 0x67);
    }

    #[test]
    fn tables() {
        let mut w = World::new();
        w.st.gpr[gpr::RBX] = USER + 0xffa;
        // SGDT straddles a page.
        assert_eq!(w.exec(&[0x0f, 0x01, 0x03]), Ok(Flow::Next));
        assert_eq!(w.bytes(USER + 0xffa, 10), [0x7f, 0, 0, 0x80, 0, 0, 0, 0, 0, 0]);
        assert_eq!(w.exec(&[0x0f, 0x01, 0x1b]), Ok(Flow::Sync));
        assert_eq!(w.st.idtr, w.st.gdtr);
        w.put_bytes(USER + 0xffc, &[0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(w.exec(&[0x0f, 0x01, 0x13]), Err(Exception::gp(0)));
        let mut w = World::new().user();
        assert_eq!(w.exec(&[0x0f, 0x01, 0x13]), Err(Exception::gp(0)));
        w.st.gpr[gpr::RBX] = USER;
        assert_eq!(w.exec(&[0x0f, 0x01, 0x0b]), Ok(Flow::Next));
    }

    #[test]
    fn swapping_gs() {
        let mut w = World::new();
        w.st.seg[seg::GS].base = 5;
        w.st.kernel_gs_base = 6;
        assert_eq!(w.exec(&[0x0f, 0x01, 0xf8]), Ok(Flow::Sync));
        assert_eq!((w.st.seg[seg::GS].base, w.st.kernel_gs_base), (6, 5));
        let mut w = World::new().user();
        assert_eq!(w.exec(&[0x0f, 0x01, 0xf8]), Err(Exception::gp(0)));
    }
}
