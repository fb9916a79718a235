//! Instructions that exist outside 64-bit code only: decimal arithmetic, SALC, BOUND, ARPL.
//!
//! **In:** the instruction. **Out:** registers and flags.
//!
//! Flags the manuals leave undefined are those of AMD's silicon (tests/silicon): OF after DAA, DAS, AAM and AAD as after the addition or
//! subtraction it is made of.
//!
//! References: APM vol. 3 and SDM vol. 2, pages of the instructions.
use super::{Cx, Ea, Flow};
use crate::Exception;
use crate::exception::Vector;
use crate::state::{gpr, rflags};
use iced_x86::{Instruction, Mnemonic as M, OpKind};

/// Executes one of this module's instructions.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if cx.st.is_64_bit_code() {
        return Err(Exception::UD);
    }
    match insn.mnemonic() {
        M::Bound => return bound(cx, insn),
        M::Arpl => return arpl(cx, insn),
        M::Aam if insn.immediate8() == 0 => return Err(Exception::plain(Vector::DivideError)),
        _ => {}
    }
    let ax = cx.st.gpr[gpr::RAX] as u16;
    let flags = cx.st.rflags;
    let (ax, flags) = match insn.mnemonic() {
        M::Daa => adjust_packed(ax, flags, false),
        M::Das => adjust_packed(ax, flags, true),
        M::Aaa => adjust_unpacked(ax, flags, false),
        M::Aas => adjust_unpacked(ax, flags, true),
        M::Aam => {
            let (al, base) = (ax & 0xff, u16::from(insn.immediate8()));
            let ax = ((al / base) << 8) | (al % base);
            (ax, result_flags(ax as u8))
        }
        M::Aad => {
            let al = ((ax >> 8) * u16::from(insn.immediate8())).wrapping_add(ax) & 0xff;
            (al, result_flags(al as u8))
        }
        // SALC: no flags.
        _ => (ax & 0xff00 | if flags & rflags::CF != 0 { 0xff } else { 0 }, flags & rflags::STATUS),
    };
    let rax = &mut cx.st.gpr[gpr::RAX];
    *rax = *rax & !0xffff | u64::from(ax);
    cx.st.rflags = cx.st.rflags & !rflags::STATUS | flags;
    Ok(Flow::Next)
}

/// SF, ZF and PF of a byte.
fn result_flags(value: u8) -> u64 {
    let mut flags = 0;
    if value & 0x80 != 0 {
        flags |= rflags::SF;
    }
    if value == 0 {
        flags |= rflags::ZF;
    }
    if value.count_ones().is_multiple_of(2) {
        flags |= rflags::PF;
    }
    flags
}

/// DAA (or DAS): AX and the status flags after it.
fn adjust_packed(ax: u16, flags: u64, subtract: bool) -> (u16, u64) {
    let al = ax as u8;
    let (mut adjust, mut new) = (0u8, 0);
    if al & 15 > 9 || flags & rflags::AF != 0 {
        adjust = 6;
        new |= rflags::AF;
    }
    if al > 0x99 || flags & rflags::CF != 0 {
        adjust |= 0x60;
        new |= rflags::CF;
    } else if subtract && al < adjust {
        // The borrow of the lower digit's adjustment.
        new |= rflags::CF;
    }
    let result = if subtract { al.wrapping_sub(adjust) } else { al.wrapping_add(adjust) };
    (ax & 0xff00 | u16::from(result), new | result_flags(result))
}

/// AAA (or AAS): AX and the status flags after it.
fn adjust_unpacked(ax: u16, flags: u64, subtract: bool) -> (u16, u64) {
    let mut new = 0;
    let mut result = ax;
    if ax & 15 > 9 || flags & rflags::AF != 0 {
        result = if subtract { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) };
        new = rflags::AF | rflags::CF;
    }
    result &= 0xff0f;
    (result, new | result_flags(result as u8))
}

/// BOUND: an array index against its signed limits in memory.
fn bound(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let register = insn.op0_register();
    let size = register.size();
    let at = cx.ea(insn);
    let signed = |v: u64| if size == 2 { i64::from(v as i16) } else { i64::from(v as i32) };
    let index = signed(cx.reg(register));
    let lower = signed(cx.read_value(at, size)?);
    let upper = signed(cx.read_value(Ea { va: at.va.wrapping_add(size as u64), ..at }, size)?);
    if index < lower || index > upper { Err(Exception::plain(Vector::Bound)) } else { Ok(Flow::Next) }
}

/// ARPL: raises the requested privilege level of a selector to that of another.
fn arpl(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let source = cx.reg(insn.op1_register()) as u16;
    let target = cx.operand16(insn, 0)?;
    let raised = target & 3 < source & 3;
    if raised {
        let value = u64::from(target & !3 | source & 3);
        if insn.op0_kind() == OpKind::Memory {
            let at = cx.ea(insn);
            cx.write_value(at, 2, value)?;
        } else {
            let slot = &mut cx.st.gpr[insn.op0_register().full_register().number() & 15];
            *slot = *slot & !0xffff | value;
        }
    }
    cx.st.rflags = cx.st.rflags & !rflags::ZF | if raised { rflags::ZF } else { 0 };
    Ok(Flow::Next)
}
