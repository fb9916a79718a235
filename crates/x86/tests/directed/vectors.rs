//! Vector instructions and the switches around them: what is switched off is off at once, whatever was translated before; vector stores are
//! stores like all others.
use crate::world::{BLOCKS, CODE, DATA, World};
use twinstep_x86::state::{cr0, cr4, gpr, xcr0};
use twinstep_x86::{CpuModel, CpuState};

/// VPADDD ymm0, ymm0, ymm1
const VPADDD: [u8; 4] = [0xc5, 0xfd, 0xfe, 0xc1];

/// Worlds of model v3 with everything switched on, one for each size of blocks. None if this host cannot run it.
fn worlds<'a>(code: &'a [u8], change: impl Fn(&mut CpuState) + 'a) -> Box<dyn Iterator<Item = World> + 'a> {
    let v3 = CpuModel::x86_64_v3();
    if !v3.missing().is_empty() {
        println!("left out: this host lacks {}", v3.missing());
        return Box::new(std::iter::empty());
    }
    Box::new(BLOCKS.into_iter().map(move |max_block| {
        World::of(CpuModel::x86_64_v3(), max_block, code).with(|st| {
            st.cr4 |= cr4::OSXSAVE;
            st.xcr0 = xcr0::ALL;
            st.fx.0[176] = 3;
            st.ymm_high[1] = [5 << 32, 7];
            change(st);
        })
    }))
}

/// Fifty rounds of VPADDD, the last of which switches something off; then VPADDD must fault. Each round has eight instructions.
fn switched_off(code: &[u8], vector: u64, change: impl Fn(&mut CpuState)) {
    for mut w in worlds(code, change) {
        let frame = w.fault();
        assert_eq!((frame.vector, frame.rip), (vector, CODE));
        let st = w.cpu.state();
        assert_eq!((st.fx.0[160], st.ymm_high[0]), (150, [250 << 32, 350]));
        // And the handler's HLT.
        assert_eq!(w.cpu.position(), 50 * 8 + 1);
    }
}

#[test]
fn xcr0_takes_effect_at_once() {
    // mov eax, 7; dec esi; cmovz eax, edi; xor edx, edx; xor ecx, ecx; xsetbv; jmp
    let rest = [0xb8, 7, 0, 0, 0, 0xff, 0xce, 0x0f, 0x44, 0xc7, 0x31, 0xd2, 0x31, 0xc9, 0x0f, 0x01, 0xd1, 0xeb, 0xe9];
    switched_off(&[&VPADDD[..], &rest].concat(), 6, |st| {
        st.gpr[gpr::RSI] = 50;
        st.gpr[gpr::RDI] = 3;
    });
}

#[test]
fn task_switched_takes_effect_at_once() {
    // mov rax, r8; dec esi; cmovz rax, r9; nop; nop; mov cr0, rax; jmp
    let rest = [0x4c, 0x89, 0xc0, 0xff, 0xce, 0x49, 0x0f, 0x44, 0xc1, 0x90, 0x90, 0x0f, 0x22, 0xc0, 0xeb, 0xec];
    switched_off(&[&VPADDD[..], &rest].concat(), 7, |st| {
        st.gpr[gpr::RSI] = 50;
        (st.gpr[gpr::R8], st.gpr[gpr::R9]) = (st.cr0, st.cr0 | cr0::TS);
    });
}

#[test]
fn osxsave_takes_effect_at_once() {
    // mov rax, r8; dec esi; cmovz rax, r9; nop; nop; mov cr4, rax; jmp
    let rest = [0x4c, 0x89, 0xc0, 0xff, 0xce, 0x49, 0x0f, 0x44, 0xc1, 0x90, 0x90, 0x0f, 0x22, 0xe0, 0xeb, 0xec];
    switched_off(&[&VPADDD[..], &rest].concat(), 6, |st| {
        st.gpr[gpr::RSI] = 50;
        (st.gpr[gpr::R8], st.gpr[gpr::R9]) = (st.cr4, st.cr4 & !cr4::OSXSAVE);
    });
}

/// What a model lacks does not exist, or is what it was before: TZCNT eax, ecx is BSF, which leaves its destination when there is no bit.
#[test]
fn a_model_has_what_it_has() {
    for max_block in BLOCKS {
        let frame = World::new(max_block, &VPADDD).fault();
        assert_eq!((frame.vector, frame.rip), (6, CODE));
        let mut w = World::new(max_block, &[0xf3, 0x0f, 0xbc, 0xc1, 0xf4]).with(|st| st.gpr[gpr::RAX] = 77);
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 77);
    }
    for mut w in worlds(&[0xf3, 0x0f, 0xbc, 0xc1, 0xf4], |st| st.gpr[gpr::RAX] = 77) {
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 32);
    }
}

/// A vector store across two pages of code that has run: the new code runs, also when the store is in the same block.
#[test]
fn vector_stores_change_code() {
    // vmovdqu ymm0, [rbx]; vmovdqu [rdi], ymm0; add rbx, 32; jmp rdi
    let code = [0xc5, 0xfe, 0x6f, 0x03, 0xc5, 0xfe, 0x7f, 0x07, 0x48, 0x83, 0xc3, 0x20, 0xff, 0xe7];
    for mut w in worlds(&code, |st| st.gpr[gpr::RDI] = CODE + 0x1000 - 15) {
        let rounds = 6u32;
        for round in 0..rounds {
            // add eax, imm32, three times; 13 NOPs around a page border; dec esi; then jmp r8 or hlt at the end
            let value = 0x0101_0000 << (round % 4) | round;
            let mut piece = [[0x05].as_slice(), &value.to_le_bytes()].concat().repeat(3);
            piece.extend([0x90; 12]);
            piece.extend(if round + 1 == rounds { [0xf4, 0xf4, 0xf4] } else { [0x41, 0xff, 0xe0] });
            for (i, word) in [&piece[..], &[0x90; 2]].concat().as_chunks::<8>().0.iter().enumerate() {
                w.set_data(u64::from(round) * 32 + 8 * i as u64, u64::from_le_bytes(*word));
            }
        }
        w.change(|st| st.gpr[gpr::R8] = CODE);
        w.halt();
        let sum = (0..rounds).map(|round| 3 * u64::from(0x0101_0000 << (round % 4) | round)).sum::<u64>();
        assert_eq!(w.reg(gpr::RAX), sum & 0xffff_ffff);
        assert_eq!(w.reg(gpr::RBX), DATA + 32 * u64::from(rounds));
    }
}
