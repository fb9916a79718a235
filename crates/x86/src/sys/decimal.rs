//! Instructions that exist outside 64-bit code only: decimal arithmetic, SALC, BOUND, ARPL.
//!
//! **In:** the instruction. **Out:** registers and flags.
//!
//! Flags the manuals leave undefined are those of AMD's silicon (tests/silicon): as after the addition or subtraction that the instruction is
//! made of (for AAA and AAS one of 16 bits); AAM clears CF, AF and OF.
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
        M::Aad => from_digits(ax, insn.immediate8()),
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

/// OF after the addition (or subtraction) of `b` to `a` that gave `result`; `sign` is the sign bit.
fn overflow(a: u16, b: u16, result: u16, sign: u16, subtract: bool) -> u64 {
    let signs = if subtract { (a ^ b) & (a ^ result) } else { !(a ^ b) & (a ^ result) };
    if signs & sign != 0 { rflags::OF } else { 0 }
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
    new |= result_flags(result) | overflow(al.into(), adjust.into(), result.into(), 0x80, subtract);
    (ax & 0xff00 | u16::from(result), new)
}

/// AAA (or AAS): AX and the status flags after it.
fn adjust_unpacked(ax: u16, flags: u64, subtract: bool) -> (u16, u64) {
    let (mut adjust, mut new) = (0, 0);
    if ax & 15 > 9 || flags & rflags::AF != 0 {
        (adjust, new) = (0x106, rflags::AF | rflags::CF);
    }
    let result = if subtract { ax.wrapping_sub(adjust) } else { ax.wrapping_add(adjust) };
    new |= result_flags(result as u8) & rflags::PF | overflow(ax, adjust, result, 0x8000, subtract);
    if result & 0x8000 != 0 {
        new |= rflags::SF;
    }
    if result == 0 {
        new |= rflags::ZF;
    }
    (result & 0xff0f, new)
}

/// AAD: AX and the status flags after it.
fn from_digits(ax: u16, base: u8) -> (u16, u64) {
    let (high, low) = ((ax >> 8) as u8, ax as u8);
    let product = high.wrapping_mul(base);
    let (result, carry) = product.overflowing_add(low);
    let mut flags = result_flags(result) | overflow(product.into(), low.into(), result.into(), 0x80, false);
    if carry {
        flags |= rflags::CF;
    }
    if (product ^ low ^ result) & 0x10 != 0 {
        flags |= rflags::AF;
    }
    (result.into(), flags)
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
