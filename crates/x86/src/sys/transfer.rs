//! Control transfers that may change the privilege level: far CALL, JMP and RET, IRET, SYSCALL and SYSRET, INT n.
//!
//! **In:** the instruction, descriptors, gates, the stack. **Out:** CS:RIP, SS:RSP and the privilege level changed together.
//!
//! **Invariant:** `st.cpl` equals the privilege level in CS's selector; RIP is canonical.
//!
//! References: APM vol. 2 section 4.12.2 (far transfers), 4.10.5 (call gates), 8.9.4 (IRET), 6.1.1 (SYSCALL); vol. 3 pages of the
//! instructions. SYSRET checks RCX at privilege level 0 and loads SS's hidden part, as Intel's does: both are the safer answer.
use super::delivery::{self, Source};
use super::segments::{Descriptor, error_code, flat_code, flat_data, is_null, null, system};
use super::stack::loaded_flags;
use super::{Cx, Ea, Flow, as_stack_fault, legacy};
use crate::Exception;
use crate::exception::Vector;
use crate::mmu::canonical;
use crate::state::{Segment, efer, gpr, rflags, seg};
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

/// Whether a CALL or JMP is a far one.
pub(super) fn is_far(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
    )
}

/// Executes one of this module's instructions.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    match insn.mnemonic() {
        M::Int => interrupt(cx, insn, insn.immediate8(), Source::Software),
        M::Int3 => interrupt(cx, insn, Vector::Breakpoint as u8, Source::Software),
        // No privilege check: it counts as a debug exception, without a bit in DR6.
        M::Int1 => interrupt(cx, insn, Vector::Debug as u8, Source::Hardware),
        M::Into if cx.st.is_64_bit_code() => Err(Exception::UD),
        M::Into if cx.st.rflags & rflags::OF == 0 => Ok(Flow::Next),
        M::Into => interrupt(cx, insn, Vector::Overflow as u8, Source::Software),
        M::Iret => return_from(cx, 2, None),
        M::Iretd => return_from(cx, 4, None),
        M::Iretq => return_from(cx, 8, None),
        M::Retf => {
            let size = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            let release = if insn.op_count() == 1 { insn.immediate16() } else { 0 };
            return_from(cx, size, Some(release))
        }
        M::Syscall => syscall(cx, insn),
        M::Sysret => sysret(cx, false),
        M::Sysretq => sysret(cx, true),
        M::Sysenter => legacy::sysenter(cx),
        M::Sysexit | M::Sysexitq => legacy::sysexit(cx),
        M::Call => far(cx, insn, true),
        M::Jmp => far(cx, insn, false),
        _ => Err(Exception::UD),
    }
}

fn interrupt(cx: &mut Cx, insn: &Instruction, vector: u8, source: Source) -> Result<Flow, Exception> {
    let flags = cx.st.rflags;
    let next = cx.next_ip(insn);
    delivery::enter(cx, vector, None, source, next, flags)?;
    Ok(Flow::Jump)
}

/// Whether a descriptor is that of 64-bit code. Outside long mode none is.
fn is_long(cx: &Cx, code: &Descriptor) -> bool {
    code.is_long() && cx.long_mode()
}

/// The offset a code segment can be entered at, or #GP(0).
fn checked_target(cx: &Cx, code: &Descriptor, offset: u64) -> Result<u64, Exception> {
    let ok = if is_long(cx, code) { canonical(offset) } else { offset <= code.limit() as u64 };
    if ok { Ok(offset) } else { Err(Exception::gp(0)) }
}

/// Long mode's two kinds of code segment: 64-bit, or the default sizes of compatibility mode; not both bits.
fn is_sane_code(cx: &Cx, d: &Descriptor) -> bool {
    d.is_code() && !(is_long(cx, d) && d.is_big())
}

/// IRET (`release` is `None`) and RETF, which have all but the flags in common. `size` is that of a stack word.
fn return_from(cx: &mut Cx, size: usize, release: Option<u16>) -> Result<Flow, Exception> {
    let iret = release.is_none();
    if iret && cx.st.rflags & rflags::NT != 0 {
        // Task returns do not exist in long mode.
        return if cx.long_mode() { Err(Exception::gp(0)) } else { legacy::task_return(cx) };
    }
    let from_long = cx.st.is_64_bit_code();
    let rip = cx.peek(size, 0)?;
    let selector = cx.peek(size, 1)? as u16;
    let image = if iret { cx.peek(size, 2)? } else { 0 };
    let words = if iret { 3 } else { 2 };
    if image & rflags::VM != 0 && size == 4 && cx.st.cpl == 0 && !cx.long_mode() {
        cx.unsupported = Some("virtual-8086 mode");
        return Err(Exception::gp(0));
    }

    let cpl = (selector & 3) as u8;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let bad = Exception::gp(error_code(selector));
    let code = cx.descriptor(selector)?;
    let dpl_ok = if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
    if !is_sane_code(cx, &code) || cpl < cx.st.cpl || !dpl_ok {
        return Err(bad);
    }
    if !code.is_present() {
        return Err(Exception::np(error_code(selector)));
    }
    let rip = checked_target(cx, &code, rip)?;
    let outer = cpl != cx.st.cpl;

    // IRET in 64-bit code pops SS:RSP always.
    let release = release.unwrap_or(0) as i64;
    let popped = (words * size) as i64 + release;
    let (rsp, ss) = if outer || iret && from_long {
        let at = cx.stack_at(cx.st.gpr[gpr::RSP].wrapping_add(popped as u64));
        let rsp = cx.read_value(at, size)?;
        let next = cx.stack_at(cx.st.gpr[gpr::RSP].wrapping_add(popped as u64 + size as u64));
        let ss_selector = cx.read_value(next, size)? as u16;
        let (ss, descriptor) = cx.checked_ss(ss_selector, cpl, is_long(cx, &code), Exception::gp)?;
        if let Some(d) = descriptor {
            cx.mark_accessed(&d)?;
        }
        // RETF with an operand releases its bytes on the outer stack, too.
        let rsp = rsp.wrapping_add(release as u64);
        let narrow = !is_long(cx, &code) && ss.attributes & Segment::BIG == 0;
        let old = cx.st.gpr[gpr::RSP];
        (if narrow { old & !0xffff | rsp & 0xffff } else { rsp }, Some(ss))
    } else {
        (cx.moved_rsp(popped), None)
    };
    cx.mark_accessed(&code)?;

    if iret {
        cx.st.rflags = loaded_flags(cx, image, size);
    }
    let st = &mut cx.st;
    st.seg[seg::CS] = code.segment(selector);
    st.cpl = cpl;
    st.rip = rip;
    st.gpr[gpr::RSP] = rsp;
    if let Some(ss) = ss {
        st.seg[seg::SS] = ss;
    }
    if outer {
        // Data segments the outer level could not have loaded become null (APM vol. 2 section 4.10.6).
        for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &mut st.seg[s];
            let conforming = segment.attributes & 0xc == 0xc;
            if segment.attributes != 0 && !conforming && segment.dpl() < cpl {
                *segment = null(0);
            }
        }
    }
    Ok(Flow::Jump)
}

fn syscall(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if cx.st.efer & efer::SCE == 0 {
        return Err(Exception::UD);
    }
    if !cx.long_mode() {
        return Ok(legacy::syscall(cx, insn));
    }
    let next = cx.next_ip(insn);
    let target = if cx.st.is_64_bit_code() { cx.st.lstar } else { cx.st.cstar };
    let st = &mut cx.st;
    st.gpr[gpr::RCX] = next;
    st.gpr[gpr::R11] = st.rflags & !rflags::RF;
    let selector = (st.star >> 32) as u16 & !3;
    st.seg[seg::CS] = flat_code(selector, 0, true);
    st.seg[seg::SS] = flat_data(selector.wrapping_add(8), 0);
    st.cpl = 0;
    st.rip = target;
    st.rflags = st.rflags & !st.sfmask & !rflags::RF | rflags::ONE;
    Ok(Flow::Jump)
}

fn sysret(cx: &mut Cx, long: bool) -> Result<Flow, Exception> {
    if cx.st.efer & efer::SCE == 0 {
        return Err(Exception::UD);
    }
    cx.require_cpl0()?;
    if !cx.st.is_64_bit_code() {
        return Ok(legacy::sysret(cx));
    }
    let st = &mut cx.st;
    let rcx = st.gpr[gpr::RCX];
    let rip = if long { rcx } else { rcx as u32 as u64 };
    if !canonical(rip) {
        return Err(Exception::gp(0));
    }
    let base = (st.star >> 48) as u16;
    let code = if long { base.wrapping_add(16) } else { base };
    st.seg[seg::CS] = flat_code(code | 3, 3, long);
    st.seg[seg::SS] = flat_data(base.wrapping_add(8) | 3, 3);
    st.cpl = 3;
    st.rip = rip;
    let loadable = rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
    st.rflags = st.gpr[gpr::R11] & loadable | rflags::ONE;
    Ok(Flow::Jump)
}

/// Far CALL and JMP: directly to a code segment, or through a call gate.
fn far(cx: &mut Cx, insn: &Instruction, call: bool) -> Result<Flow, Exception> {
    let size = match insn.code() {
        Code::Call_m1616 | Code::Jmp_m1616 | Code::Call_ptr1616 | Code::Jmp_ptr1616 => 2,
        Code::Call_m1632 | Code::Jmp_m1632 | Code::Call_ptr1632 | Code::Jmp_ptr1632 => 4,
        _ => 8,
    };
    let (offset, selector) = match insn.op0_kind() {
        OpKind::FarBranch16 => (insn.far_branch16() as u64, insn.far_branch_selector()),
        OpKind::FarBranch32 => (insn.far_branch32() as u64, insn.far_branch_selector()),
        _ => {
            let at = cx.ea(insn);
            let offset = cx.read_value(at, size)?;
            (offset, cx.read_value(Ea { va: at.va.wrapping_add(size as u64), ..at }, 2)? as u16)
        }
    };
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let bad = Exception::gp(error_code(selector));
    let target = cx.descriptor(selector)?;
    if target.is_system() && !cx.long_mode() {
        return legacy::far_to_system(cx, insn, selector, target, call);
    }
    if target.is_system() {
        return gate(cx, insn, selector, call);
    }
    let rpl = (selector & 3) as u8;
    let allowed = if target.is_conforming() { target.dpl() <= cx.st.cpl } else { rpl <= cx.st.cpl && target.dpl() == cx.st.cpl };
    if !is_sane_code(cx, &target) || !allowed {
        return Err(bad);
    }
    if !target.is_present() {
        return Err(Exception::np(error_code(selector)));
    }
    let rip = checked_target(cx, &target, offset)?;
    cx.mark_accessed(&target)?;
    if call {
        push_return(cx, insn, size)?;
    }
    cx.st.seg[seg::CS] = target.segment(selector & !3 | cx.st.cpl as u16);
    cx.st.rip = rip;
    Ok(Flow::Jump)
}

/// Pushes CS and the next instruction's address, both or none.
fn push_return(cx: &mut Cx, insn: &Instruction, size: usize) -> Result<(), Exception> {
    let mut frame = [0; 16];
    frame[..size].copy_from_slice(&cx.next_ip(insn).to_le_bytes()[..size]);
    let cs = cx.st.seg[seg::CS].selector as u64;
    frame[size..2 * size].copy_from_slice(&cs.to_le_bytes()[..size]);
    let rsp = cx.moved_rsp(-(2 * size as i64));
    let at = cx.stack_at(rsp);
    cx.write_bytes(at, &frame[..2 * size])?;
    cx.st.gpr[gpr::RSP] = rsp;
    Ok(())
}

/// A far transfer through a 64-bit call gate.
fn gate(cx: &mut Cx, insn: &Instruction, gate_selector: u16, call: bool) -> Result<Flow, Exception> {
    let bad = Exception::gp(error_code(gate_selector));
    let first = cx.descriptor(gate_selector)?;
    if first.kind() != system::CALL_GATE || first.dpl() < cx.st.cpl || first.dpl() < (gate_selector & 3) as u8 {
        return Err(bad);
    }
    let (gate, upper) = cx.system_descriptor(gate_selector)?;
    // The type field of the upper half must be zero, or half of a gate could be taken for a descriptor.
    if upper >> 40 & 31 != 0 {
        return Err(bad);
    }
    if !gate.is_present() {
        return Err(Exception::np(error_code(gate_selector)));
    }
    let offset = gate.raw & 0xffff | gate.raw >> 32 & 0xffff_0000 | upper << 32;
    let selector = (gate.raw >> 16) as u16;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let bad = Exception::gp(error_code(selector));
    let code = cx.descriptor(selector)?;
    let inner = call && !code.is_conforming() && code.dpl() < cx.st.cpl;
    let allowed = code.dpl() == cx.st.cpl || code.dpl() < cx.st.cpl && (call || code.is_conforming());
    if !code.is_code() || !code.is_long() || code.is_big() || !allowed {
        return Err(bad);
    }
    if !code.is_present() {
        return Err(Exception::np(error_code(selector)));
    }
    let rip = checked_target(cx, &code, offset)?;
    cx.mark_accessed(&code)?;
    if inner {
        let cpl = code.dpl();
        let rsp = cx.tss_stack(4 + cpl as u32 * 8, 0)?.wrapping_sub(32);
        let mut frame = [0; 32];
        let words =
            [cx.next_ip(insn), cx.st.seg[seg::CS].selector as u64, cx.st.gpr[gpr::RSP], cx.st.seg[seg::SS].selector as u64];
        for (to, word) in frame.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        cx.write_as(rsp, &frame, false).map_err(as_stack_fault)?;
        cx.st.gpr[gpr::RSP] = rsp;
        cx.st.seg[seg::SS] = null(cpl as u16);
        cx.st.cpl = cpl;
    } else if call {
        push_return(cx, insn, 8)?;
    }
    cx.st.seg[seg::CS] = code.segment(selector & !3 | cx.st.cpl as u16);
    cx.st.rip = rip;
    Ok(Flow::Jump)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{CODE, GDT, KERNEL_CS, KERNEL_SS, RSP0, STACK, USER, USER_CS, USER_CS32, USER_SS, World, flat};
    use super::*;

    const IRETQ: &[u8] = &[0x48, 0xcf];
    const RETFQ: &[u8] = &[0x48, 0xcb];

    fn push(w: &mut World, words: &[u64]) {
        w.st.gpr[gpr::RSP] -= 8 * words.len() as u64;
        let rsp = w.st.gpr[gpr::RSP];
        for (i, word) in words.iter().enumerate() {
            w.put(rsp + 8 * i as u64, *word);
        }
    }

    #[test]
    fn iret_to_user() {
        let mut w = World::new();
        w.st.seg[seg::DS] = flat_data(KERNEL_SS, 0);
        w.st.seg[seg::ES] = flat_data(USER_SS, 3);
        w.st.seg[seg::GS].base = 0x1234;
        push(&mut w, &[USER, USER_CS as u64, rflags::IF | rflags::RF | rflags::CF, USER + 0x100, USER_SS as u64]);
        assert_eq!(w.exec(IRETQ), Ok(Flow::Jump));
        assert_eq!((w.st.rip, w.st.cpl, w.st.gpr[gpr::RSP]), (USER, 3, USER + 0x100));
        assert_eq!(w.st.rflags, rflags::ONE | rflags::IF | rflags::CF);
        assert_eq!((w.st.seg[seg::CS].selector, w.st.seg[seg::SS].selector), (USER_CS, USER_SS));
        assert!(w.st.is_64_bit_code());
        assert_eq!(w.st.seg[seg::DS], null(0));
        assert_eq!(w.st.seg[seg::ES].selector, USER_SS);
        // A null GS keeps its base.
        assert_eq!(w.st.seg[seg::GS].base, 0x1234);
    }

    #[test]
    fn iret_to_compatibility_mode_and_the_kernel() {
        let mut w = World::new();
        push(&mut w, &[USER, USER_CS32 as u64, 0, 0xffff_fff0, USER_SS as u64]);
        assert_eq!(w.exec(IRETQ), Ok(Flow::Jump));
        assert!(!w.st.is_64_bit_code());
        // To itself, from an interrupt: a null SS at level 0 is fine.
        let mut w = World::new();
        push(&mut w, &[CODE + 5, KERNEL_CS as u64, rflags::IF, STACK, 0]);
        assert_eq!(w.exec(IRETQ), Ok(Flow::Jump));
        assert_eq!((w.st.rip, w.st.seg[seg::SS], w.st.gpr[gpr::RSP]), (CODE + 5, null(0), STACK));
    }

    #[test]
    fn iret_faults() {
        let cases: [([u64; 5], Exception); 9] = [
            ([0, 0, 0, 0, 0], Exception::gp(0)),
            ([0, 0xf3, 0, 0, 0], Exception::gp(0xf0)),
            ([0, KERNEL_SS as u64, 0, 0, 0], Exception::gp(KERNEL_SS as u32)),
            // The requested level does not fit the descriptor.
            ([0, KERNEL_CS as u64 | 3, 0, 0, 0x2b], Exception::gp(KERNEL_CS as u32)),
            ([1 << 50, USER_CS as u64, 0, 0, USER_SS as u64], Exception::gp(0)),
            ([1 << 32, USER_CS32 as u64, 0, 0, USER_SS as u64], Exception::gp(0)),
            ([0, USER_CS as u64, 0, 0, 0], Exception::gp(0)),
            ([0, USER_CS as u64, 0, 0, KERNEL_SS as u64], Exception::gp(KERNEL_SS as u32)),
            ([0, USER_CS as u64, 0, 0, 0x53], Exception::ss(0x50)),
        ];
        for (frame, fault) in cases {
            let mut w = World::new();
            w.put(GDT + 0x50, flat(0x72, 0xc));
            push(&mut w, &frame);
            assert_eq!(w.exec(IRETQ), Err(fault), "{frame:x?}");
        }
        let mut w = World::new();
        w.st.rflags |= rflags::NT;
        assert_eq!(w.exec(IRETQ), Err(Exception::gp(0)));
        // A code segment that is not present; inward is not possible.
        let mut w = World::new();
        w.put(GDT + 0x50, flat(0x7a, 0xa));
        push(&mut w, &[0, 0x53, 0, 0, USER_SS as u64]);
        assert_eq!(w.exec(IRETQ), Err(Exception::np(0x50)));
        let mut w = World::new().user();
        push(&mut w, &[0, KERNEL_CS as u64, 0, 0, KERNEL_SS as u64]);
        assert_eq!(w.exec(IRETQ), Err(Exception::gp(KERNEL_CS as u32)));
    }

    #[test]
    fn user_iret_cannot_raise_flags() {
        let mut w = World::new().user();
        push(&mut w, &[USER + 9, USER_CS as u64, rflags::IOPL | rflags::DF, USER + 0x200, USER_SS as u64]);
        assert_eq!(w.exec(IRETQ), Ok(Flow::Jump));
        assert_eq!(w.st.rflags, rflags::ONE | rflags::IF | rflags::DF);
    }

    #[test]
    fn syscall_and_back() {
        let mut w = World::new().user();
        w.st.rflags |= rflags::DF | rflags::CF;
        let flags = w.st.rflags;
        assert_eq!(w.exec(&[0x0f, 0x05]), Ok(Flow::Jump));
        assert_eq!((w.st.rip, w.st.cpl), (0x60000, 0));
        assert_eq!((w.st.gpr[gpr::RCX], w.st.gpr[gpr::R11]), (USER + 2, flags));
        assert_eq!(w.st.rflags, rflags::ONE | rflags::CF);
        assert_eq!((w.st.seg[seg::CS].selector, w.st.seg[seg::SS].selector), (0x10, 0x18));
        assert!(w.st.is_64_bit_code());
        let mut narrow = World::new();
        narrow.st = w.st.clone();
        assert_eq!(w.exec(&[0x48, 0x0f, 0x07]), Ok(Flow::Jump));
        assert_eq!((w.st.rip, w.st.cpl, w.st.rflags), (USER + 2, 3, flags));
        assert_eq!((w.st.seg[seg::CS].selector, w.st.seg[seg::SS].selector), (USER_CS, USER_SS));
        assert!(w.st.is_64_bit_code());
        assert_eq!(narrow.exec(&[0x0f, 0x07]), Ok(Flow::Jump));
        assert_eq!(narrow.st.seg[seg::CS].selector, USER_CS32);
        assert!(!narrow.st.is_64_bit_code());
        // From there SYSCALL goes to CSTAR.
        assert_eq!(narrow.exec(&[0x0f, 0x05]), Ok(Flow::Jump));
        assert_eq!(narrow.st.rip, 0x61000);

        assert_eq!(w.exec(&[0x48, 0x0f, 0x07]), Err(Exception::gp(0)));
        let mut w = World::new();
        w.st.gpr[gpr::RCX] = 1 << 47;
        assert_eq!(w.exec(&[0x48, 0x0f, 0x07]), Err(Exception::gp(0)));
        w.st.efer &= !efer::SCE;
        assert_eq!(w.exec(&[0x48, 0x0f, 0x07]), Err(Exception::UD));
        assert_eq!(w.exec(&[0x0f, 0x05]), Err(Exception::UD));
        assert_eq!(w.exec(&[0x0f, 0x34]), Err(Exception::UD));
    }

    #[test]
    fn far_returns() {
        let mut w = World::new();
        push(&mut w, &[CODE + 0x20, KERNEL_CS as u64]);
        assert_eq!(w.exec(RETFQ), Ok(Flow::Jump));
        assert_eq!((w.st.rip, w.st.gpr[gpr::RSP]), (CODE + 0x20, STACK));
        // Outward, releasing 16 bytes on both stacks.
        push(&mut w, &[USER, USER_CS as u64, 0, 0, USER + 0x100, USER_SS as u64]);
        assert_eq!(w.exec(&[0x48, 0xca, 16, 0]), Ok(Flow::Jump));
        assert_eq!((w.st.cpl, w.st.gpr[gpr::RSP], w.st.rip), (3, USER + 0x110, USER));
        push(&mut w, &[CODE, KERNEL_CS as u64]);
        assert_eq!(w.exec(RETFQ), Err(Exception::gp(KERNEL_CS as u32)));
        // 32-bit words.
        let mut w = World::new();
        push(&mut w, &[(KERNEL_CS as u64) << 32 | (CODE + 3)]);
        assert_eq!(w.exec(&[0xcb]), Ok(Flow::Jump));
        assert_eq!((w.st.rip, w.st.gpr[gpr::RSP]), (CODE + 3, STACK));
    }

    /// CALL and JMP FAR [rbx], with 32-bit offsets.
    #[test]
    fn far_jumps_and_calls() {
        let far = |target: u64, selector: u16, call: bool, user: bool| {
            let mut w = if user { World::new().user() } else { World::new() };
            w.st.gpr[gpr::RBX] = USER + 0x500;
            w.put(USER + 0x500, target | (selector as u64) << 32);
            let result = w.exec(&[0xff, if call { 0x1b } else { 0x2b }]);
            (result, w)
        };
        let (result, w) = far(CODE + 0x40, KERNEL_CS, false, false);
        assert_eq!((result, w.st.rip), (Ok(Flow::Jump), CODE + 0x40));
        let (result, w) = far(CODE + 0x40, KERNEL_CS, true, false);
        assert_eq!((result, w.st.gpr[gpr::RSP]), (Ok(Flow::Jump), STACK - 8));
        assert_eq!(w.get(STACK - 8), (KERNEL_CS as u64) << 32 | (CODE + 2));
        assert_eq!(far(0, 0, false, false).0, Err(Exception::gp(0)));
        assert_eq!(far(0, USER_CS, false, false).0, Err(Exception::gp(USER_CS as u32 & !3)));
        assert_eq!(far(0, KERNEL_CS, true, true).0, Err(Exception::gp(KERNEL_CS as u32)));
        assert_eq!(far(0, KERNEL_SS, true, false).0, Err(Exception::gp(KERNEL_SS as u32)));
        assert_eq!(far(0, 0xf0, true, false).0, Err(Exception::gp(0xf0)));
        // User code to compatibility mode.
        let (result, w) = far(USER + 7, USER_CS32, false, true);
        assert_eq!((result, w.st.is_64_bit_code(), w.st.rip), (Ok(Flow::Jump), false, USER + 7));
    }

    #[test]
    fn call_gates() {
        let gate = |access: u64, call: bool| {
            let mut w = World::new().user();
            w.put(GDT + 0x50, 0x3344 | (KERNEL_CS as u64) << 16 | access << 40 | 0x6 << 48);
            w.put(GDT + 0x58, 0);
            w.st.gpr[gpr::RBX] = USER + 0x500;
            w.put(USER + 0x500, 0x53 << 32);
            let result = w.exec(&[0xff, if call { 0x1b } else { 0x2b }]);
            (result, w)
        };
        let (result, w) = gate(0xec, true);
        assert_eq!((result, w.st.rip, w.st.cpl), (Ok(Flow::Jump), 0x63344, 0));
        assert_eq!(w.st.gpr[gpr::RSP], RSP0 - 32);
        let frame: Vec<u64> = (0..4).map(|i| w.get(RSP0 - 32 + 8 * i)).collect();
        assert_eq!(frame, [USER + 2, USER_CS as u64, USER + 0x8000, USER_SS as u64]);
        assert_eq!(w.st.seg[seg::SS], null(0));
        // JMP cannot go inward; the gate's level; presence.
        assert_eq!(gate(0xec, false).0, Err(Exception::gp(KERNEL_CS as u32)));
        assert_eq!(gate(0x8c, true).0, Err(Exception::gp(0x50)));
        assert_eq!(gate(0x6c, true).0, Err(Exception::np(0x50)));
        assert_eq!(gate(0xe9, true).0, Err(Exception::gp(0x50)));
    }
}
