//! PUSHF and POPF, ENTER, XLATB.
//!
//! **In:** the instruction. **Out:** stack and registers changed together or not at all.
//!
//! **Invariant:** no instruction lets a guest change IOPL above privilege level 0, or IF above IOPL. RF is never set between
//! instructions: there are no instruction breakpoints it could hold off, and every fault pushes it as one anyway.
//!
//! Reference: APM vol. 3 ("POPF", "PUSHF", "ENTER").
use super::{Cx, Flow};
use crate::Exception;
use crate::state::{gpr, rflags};
use iced_x86::{Instruction, Mnemonic as M, Register};

/// Executes one of this module's instructions.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    match insn.mnemonic() {
        M::Pushf => push_flags(cx, 2),
        M::Pushfd => push_flags(cx, 4),
        M::Pushfq => push_flags(cx, 8),
        M::Popf => pop_flags(cx, 2),
        M::Popfd => pop_flags(cx, 4),
        M::Popfq => pop_flags(cx, 8),
        M::Enter => enter(cx, insn),
        M::Xlatb => xlat(cx, insn),
        _ => Err(Exception::UD),
    }
}

/// The flags after loading `image` of `size` bytes at the current privilege (POPF and IRET).
pub(super) fn loaded_flags(cx: &Cx, image: u64, size: usize) -> u64 {
    let mut writable = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        writable |= rflags::AC | rflags::ID;
    }
    if cx.st.cpl == 0 {
        writable |= rflags::IOPL;
    }
    if cx.st.cpl as u64 <= (cx.st.rflags & rflags::IOPL) >> 12 {
        writable |= rflags::IF;
    }
    cx.st.rflags & !writable | image & writable | rflags::ONE
}

fn push_flags(cx: &mut Cx, size: usize) -> Result<Flow, Exception> {
    let image = cx.st.rflags & !(rflags::RF | rflags::VM);
    cx.push(size, image)?;
    Ok(Flow::Next)
}

fn pop_flags(cx: &mut Cx, size: usize) -> Result<Flow, Exception> {
    let image = cx.peek(size, 0)?;
    let old = cx.st.rflags;
    let new = loaded_flags(cx, image, size);
    cx.st.rflags = new;
    cx.st.gpr[gpr::RSP] = cx.moved_rsp(size as i64);
    // Only a trap flag, or interrupts allowed, want the engine's attention.
    let rose = new & !old & rflags::IF != 0;
    Ok(if rose || (new | old) & rflags::TF != 0 { Flow::Sync } else { Flow::Next })
}

/// ENTER: all nesting levels.
fn enter(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let size = match insn.op_code().operand_size() {
        16 => 2,
        32 => 4,
        _ => 8,
    };
    let locals = insn.immediate16() as i64;
    let level = insn.immediate8_2nd() as usize & 31;
    let rbp = cx.st.gpr[gpr::RBP];
    // What is pushed: RBP, then copies of the outer frames' pointers, then this frame's own.
    let mut words = [0u64; 33];
    let mut count = 1;
    words[0] = rbp;
    let frame = cx.moved_rsp(-(size as i64));
    if level > 0 {
        for i in 1..level {
            let at = cx.stack_at(rbp.wrapping_sub((i * size) as u64));
            let mut value = cx.read_value(at, size)?.to_le_bytes();
            // The outer frame may overlap what was just pushed.
            for (k, byte) in value[..size].iter_mut().enumerate() {
                let below = cx.st.gpr[gpr::RSP].wrapping_sub(rbp.wrapping_sub((i * size) as u64).wrapping_add(k as u64)) as usize;
                if (1..=count * size).contains(&below) {
                    *byte = words[(below - 1) / size].to_le_bytes()[size - 1 - (below - 1) % size];
                }
            }
            words[count] = u64::from_le_bytes(value);
            count += 1;
        }
        words[count] = frame;
        count += 1;
    }
    let pushed = (count * size) as i64;
    let mut image = [0u8; 33 * 8];
    for (i, word) in words[..count].iter().enumerate() {
        let at = (count - 1 - i) * size;
        image[at..at + size].copy_from_slice(&word.to_le_bytes()[..size]);
    }
    // The final stack pointer must be writable (APM: "as if by a write").
    let last = cx.stack_at(cx.moved_rsp(-(pushed + locals)));
    cx.probe_bytes(last, size)?;
    let at = cx.stack_at(cx.moved_rsp(-pushed));
    cx.write_bytes(at, &image[..count * size])?;
    cx.st.gpr[gpr::RSP] = cx.moved_rsp(-(pushed + locals));
    cx.st.gpr[gpr::RBP] = match size {
        2 => rbp & !0xffff | frame & 0xffff,
        4 => frame & 0xffff_ffff,
        _ => frame,
    };
    Ok(Flow::Next)
}

fn xlat(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let rbx = match insn.memory_base() {
        Register::BX => cx.st.gpr[gpr::RBX] as u16 as u64,
        Register::EBX => cx.st.gpr[gpr::RBX] as u32 as u64,
        _ => cx.st.gpr[gpr::RBX],
    };
    let mut offset = rbx.wrapping_add(cx.st.gpr[gpr::RAX] & 0xff);
    match insn.memory_base() {
        Register::BX => offset &= 0xffff,
        Register::EBX => offset &= 0xffff_ffff,
        _ => {}
    }
    let at = cx.linear(super::segment_number(insn.memory_segment()), offset);
    let value = cx.read_value(at, 1)?;
    let rax = &mut cx.st.gpr[gpr::RAX];
    *rax = *rax & !0xff | value;
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{STACK, USER, World};
    use super::*;

    const POPFQ: &[u8] = &[0x9d];

    fn popf(w: &mut World, image: u64) -> Result<Flow, Exception> {
        let rsp = w.st.gpr[gpr::RSP];
        w.put(rsp, image);
        let result = w.exec(POPFQ);
        w.st.gpr[gpr::RSP] = rsp;
        result
    }

    #[test]
    fn popf_keeps_what_the_privilege_does_not_cover() {
        let mut w = World::new();
        assert_eq!(popf(&mut w, u64::MAX), Ok(Flow::Sync));
        let all = rflags::STATUS
            | rflags::ONE
            | rflags::TF
            | rflags::IF
            | rflags::DF
            | rflags::IOPL
            | rflags::NT
            | rflags::AC
            | rflags::ID;
        assert_eq!(w.st.rflags, all);
        assert!(!w.st.interrupt_shadow);
        assert_eq!(popf(&mut w, 0), Ok(Flow::Sync));
        assert_eq!(w.st.rflags, rflags::ONE);
        assert_eq!(popf(&mut w, rflags::CF), Ok(Flow::Next));
        assert_eq!(popf(&mut w, rflags::IF), Ok(Flow::Sync));
        assert_eq!(popf(&mut w, rflags::IF), Ok(Flow::Next));

        let mut w = World::new().user();
        assert_eq!(popf(&mut w, rflags::IOPL | rflags::AC), Ok(Flow::Next));
        assert_eq!(w.st.rflags, rflags::ONE | rflags::IF | rflags::AC);
        w.st.rflags |= rflags::IOPL;
        assert_eq!(popf(&mut w, 0), Ok(Flow::Next));
        assert_eq!(w.st.rflags, rflags::ONE | rflags::IOPL);
    }

    #[test]
    fn sixteen_bits_leave_the_rest() {
        let mut w = World::new();
        w.st.rflags |= rflags::AC | rflags::ID;
        w.put(STACK, 0);
        assert_eq!(w.exec(&[0x66, 0x9d]), Ok(Flow::Next));
        assert_eq!((w.st.rflags, w.st.gpr[gpr::RSP]), (rflags::ONE | rflags::AC | rflags::ID, STACK + 2));
        w.st.rflags |= rflags::CF;
        w.put(STACK - 8, u64::MAX);
        assert_eq!(w.exec(&[0x66, 0x9c]), Ok(Flow::Next));
        assert_eq!((w.get(STACK), w.st.gpr[gpr::RSP]), (3, STACK));
        assert_eq!(w.exec(&[0x9c]), Ok(Flow::Next));
        assert_eq!(w.get(STACK - 8), rflags::ONE | rflags::CF | rflags::AC | rflags::ID);
    }

    #[test]
    fn stack_faults() {
        let mut w = World::new();
        w.st.gpr[gpr::RSP] = 1 << 50;
        assert_eq!(w.exec(&[0x9c]), Err(Exception::ss(0)));
        assert_eq!(w.exec(&[0x9d]), Err(Exception::ss(0)));
        w.st.gpr[gpr::RSP] = 0x1_0000_0000;
        assert_eq!(w.exec(&[0x9d]), Err(Exception::pf(0, 0x1_0000_0000)));
    }

    #[test]
    fn enter_makes_frames() {
        let mut w = World::new();
        w.st.gpr[gpr::RBP] = 0x1111;
        // ENTER 0x20, 0.
        assert_eq!(w.exec(&[0xc8, 0x20, 0, 0]), Ok(Flow::Next));
        assert_eq!(w.get(STACK - 8), 0x1111);
        assert_eq!((w.st.gpr[gpr::RBP], w.st.gpr[gpr::RSP]), (STACK - 8, STACK - 0x28));
        // ENTER 8, 3: copies two pointers of the outer frame.
        w.put(STACK - 16, 0xaaaa);
        w.put(STACK - 24, 0xbbbb);
        let rsp = STACK - 0x28;
        assert_eq!(w.exec(&[0xc8, 8, 0, 3]), Ok(Flow::Next));
        assert_eq!(w.get(rsp - 8), STACK - 8);
        assert_eq!((w.get(rsp - 16), w.get(rsp - 24)), (0xaaaa, 0xbbbb));
        assert_eq!(w.get(rsp - 32), rsp - 8);
        assert_eq!((w.st.gpr[gpr::RBP], w.st.gpr[gpr::RSP]), (rsp - 8, rsp - 40));
        // The final stack pointer counts, too.
        w.unmap(STACK - 0x1000);
        assert_eq!(w.exec(&[0xc8, 0, 8, 0]), Err(Exception::pf(2, rsp - 48 - 0x800)));
        // 16-bit operands.
        let mut w = World::new();
        w.st.gpr[gpr::RBP] = 0x2_1111;
        assert_eq!(w.exec(&[0x66, 0xc8, 0, 0, 1]), Ok(Flow::Next));
        assert_eq!(w.get(STACK - 4), 0x1111_fffe);
        assert_eq!((w.st.gpr[gpr::RBP], w.st.gpr[gpr::RSP]), (0x2_fffe, STACK - 4));
    }

    #[test]
    fn xlat_looks_up() {
        let mut w = World::new().user();
        w.st.gpr[gpr::RBX] = USER + 0x100;
        w.st.gpr[gpr::RAX] = 0x1234_5605;
        w.put(USER + 0x105, 0x99);
        assert_eq!(w.exec(&[0xd7]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RAX], 0x1234_5699);
    }
}
