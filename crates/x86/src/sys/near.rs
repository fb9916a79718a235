//! Near branches and stack instructions of 32-bit code, where a segment may have a limit, a base, or a 16-bit stack pointer.
//!
//! **In:** PUSH, POP, PUSHA, POPA, LEAVE; near CALL, RET, JMP, Jcc, LOOP, JCXZ. **Out:** stack, registers and EIP changed together or not
//! at all.
//!
//! The translator does the same for flat segments; the engine comes here when an instruction runs alone. PUSHA and POPA are always done here.
//!
//! References: SDM vol. 2 and APM vol. 3, pages of the instructions.
use super::{Cx, Flow};
use crate::Exception;
use crate::state::{gpr, rflags, seg};
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// Whether [`execute`] knows this instruction (of 32-bit code).
pub fn handles(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Push | M::Pop | M::Leave | M::Ret)
        || insn.is_jcc_short_or_near()
        || insn.is_jmp_short_or_near()
        || insn.is_call_near()
        || insn.is_jmp_near_indirect()
        || insn.is_call_near_indirect()
        || insn.is_loop()
        || insn.is_loopcc()
        || insn.is_jcx_short()
}

/// Executes one of this module's instructions.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if cx.st.is_64_bit_code() {
        return Err(Exception::UD);
    }
    match insn.mnemonic() {
        M::Push => push(cx, insn),
        M::Pop => pop(cx, insn),
        M::Pusha => push_all(cx, 2),
        M::Pushad => push_all(cx, 4),
        M::Popa => pop_all(cx, 2),
        M::Popad => pop_all(cx, 4),
        M::Leave => leave(cx, insn),
        M::Ret => ret(cx, insn),
        _ if insn.is_call_near() || insn.is_call_near_indirect() => {
            let target = target(cx, insn)?;
            let size = operand_size(insn);
            let next = cx.next_ip(insn);
            cx.push(size, next)?;
            cx.st.rip = target;
            Ok(Flow::Jump)
        }
        _ => {
            let (taken, count) = condition(cx, insn);
            let to = if taken { target(cx, insn)? } else { cx.next_ip(insn) };
            if let Some(count) = count {
                cx.st.gpr[gpr::RCX] = count;
            }
            cx.st.rip = to;
            Ok(Flow::Jump)
        }
    }
}

/// Bytes of a stack word or of an instruction pointer.
fn operand_size(insn: &Instruction) -> usize {
    match insn.op0_kind() {
        OpKind::NearBranch16 => return 2,
        OpKind::NearBranch32 => return 4,
        _ => {}
    }
    if insn.op_code().operand_size() == 16 { 2 } else { 4 }
}

/// Where a branch goes, after the check of the code segment's limit.
fn target(cx: &mut Cx, insn: &Instruction) -> Result<u64, Exception> {
    let target = match insn.op0_kind() {
        OpKind::NearBranch16 => insn.near_branch16().into(),
        OpKind::NearBranch32 => insn.near_branch32().into(),
        OpKind::Register => cx.reg(insn.op0_register()),
        _ => {
            let at = cx.ea(insn);
            cx.read_value(at, operand_size(insn))?
        }
    };
    checked_target(cx, target)
}

/// #GP(0) for an instruction pointer beyond the limit of CS.
fn checked_target(cx: &Cx, target: u64) -> Result<u64, Exception> {
    if target > cx.st.seg[seg::CS].limit.into() { Err(Exception::gp(0)) } else { Ok(target) }
}

/// Whether a jump is taken, and the counter after it if it has one.
fn condition(cx: &Cx, insn: &Instruction) -> (bool, Option<u64>) {
    let flags = cx.st.rflags;
    let rcx = cx.st.gpr[gpr::RCX];
    let mask = count_mask(insn);
    if insn.is_jcx_short() {
        return (rcx & mask == 0, None);
    }
    if insn.is_loop() || insn.is_loopcc() {
        let left = rcx.wrapping_sub(1) & mask;
        let zero = flags & rflags::ZF != 0;
        let goes_on = match insn.mnemonic() {
            M::Loope => zero,
            M::Loopne => !zero,
            _ => true,
        };
        // A 16-bit counter leaves the upper bits alone.
        let count = if mask == 0xffff { rcx & !mask | left } else { left };
        return (left != 0 && goes_on, Some(count));
    }
    if !insn.is_jcc_short_or_near() {
        return (true, None);
    }
    let set = |flag: u64| flags & flag != 0;
    // In the order of the opcodes; odd ones are the opposite of the one before.
    let number = insn.condition_code() as u8 - 1;
    let holds = match number / 2 {
        0 => set(rflags::OF),
        1 => set(rflags::CF),
        2 => set(rflags::ZF),
        3 => set(rflags::CF) || set(rflags::ZF),
        4 => set(rflags::SF),
        5 => set(rflags::PF),
        6 => set(rflags::SF) != set(rflags::OF),
        _ => set(rflags::ZF) || set(rflags::SF) != set(rflags::OF),
    };
    (holds != (number % 2 == 1), None)
}

/// The part of RCX that LOOP and JCXZ count with: the address size.
fn count_mask(insn: &Instruction) -> u64 {
    use iced_x86::Code::*;
    match insn.code() {
        Jcxz_rel8_16 | Jcxz_rel8_32 | Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX
        | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 0xffff,
        _ => 0xffff_ffff,
    }
}

fn push(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let size = -insn.stack_pointer_increment() as usize;
    let value = match insn.op0_kind() {
        OpKind::Register => cx.reg(insn.op0_register()),
        OpKind::Memory => {
            let at = cx.ea(insn);
            cx.read_value(at, size)?
        }
        _ => insn.immediate(0),
    };
    cx.push(size, value)?;
    Ok(Flow::Next)
}

fn pop(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let size = insn.stack_pointer_increment() as usize;
    let value = cx.peek(size, 0)?;
    let (before, after) = (cx.st.gpr[gpr::RSP], cx.moved_rsp(size as i64));
    cx.st.gpr[gpr::RSP] = after;
    if insn.op0_kind() == OpKind::Register {
        cx.set_reg(insn.op0_register(), value);
        return Ok(Flow::Next);
    }
    // The address is computed with the stack pointer already moved.
    let at = cx.ea(insn);
    let result = cx.write_value(at, size, value);
    if result.is_err() {
        cx.st.gpr[gpr::RSP] = before;
    }
    result.map(|()| Flow::Next)
}

fn push_all(cx: &mut Cx, size: usize) -> Result<Flow, Exception> {
    let mut image = [0; 32];
    for (i, register) in cx.st.gpr[..8].iter().enumerate() {
        // RAX is pushed first, so it is highest.
        image[(7 - i) * size..][..size].copy_from_slice(&register.to_le_bytes()[..size]);
    }
    let rsp = cx.moved_rsp(-8 * size as i64);
    push_pieces(cx, rsp, &image[..8 * size], size)?;
    cx.st.gpr[gpr::RSP] = rsp;
    Ok(Flow::Next)
}

/// Writes words to the stack from `rsp` on. They need not lie side by side: a 16-bit stack pointer wraps.
fn push_pieces(cx: &mut Cx, rsp: u64, image: &[u8], size: usize) -> Result<(), Exception> {
    let count = image.len() / size;
    for i in (0..count).rev() {
        let at = cx.stack_at(rsp.wrapping_add((i * size) as u64));
        cx.probe_bytes(at, size)?;
    }
    for (i, word) in image.chunks(size).enumerate().rev() {
        let at = cx.stack_at(rsp.wrapping_add((i * size) as u64));
        cx.write_bytes(at, word)?;
    }
    Ok(())
}

fn pop_all(cx: &mut Cx, size: usize) -> Result<Flow, Exception> {
    let mut words = [0; 8];
    for (i, word) in words.iter_mut().enumerate() {
        *word = cx.peek(size, i)?;
    }
    let rsp = cx.moved_rsp(8 * size as i64);
    let base = if size == 2 { Register::AX } else { Register::EAX };
    for (i, word) in words.into_iter().enumerate() {
        let number = 7 - i;
        if number != gpr::RSP {
            cx.set_reg(base + number as u32, word);
        }
    }
    cx.st.gpr[gpr::RSP] = rsp;
    Ok(Flow::Next)
}

fn leave(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let size = if insn.op_code().operand_size() == 16 { 2 } else { 4 };
    let (before, frame) = (cx.st.gpr[gpr::RSP], cx.st.gpr[gpr::RBP]);
    let mask = cx.stack_mask();
    cx.st.gpr[gpr::RSP] = if mask == 0xffff { before & !mask | frame & mask } else { frame & mask };
    match cx.peek(size, 0) {
        Ok(value) => {
            cx.st.gpr[gpr::RSP] = cx.moved_rsp(size as i64);
            cx.set_reg(if size == 2 { Register::BP } else { Register::EBP }, value);
            Ok(Flow::Next)
        }
        Err(e) => {
            cx.st.gpr[gpr::RSP] = before;
            Err(e)
        }
    }
}

fn ret(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let size = if insn.op_code().operand_size() == 16 { 2 } else { 4 };
    let release = if insn.op_count() == 1 { insn.immediate16() } else { 0 };
    let target = cx.peek(size, 0)?;
    let target = checked_target(cx, target)?;
    cx.st.gpr[gpr::RSP] = cx.moved_rsp(size as i64 + i64::from(release));
    cx.st.rip = target;
    Ok(Flow::Jump)
}
