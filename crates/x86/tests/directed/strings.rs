//! Steps of string instructions with REP (docs/positions.md).
use crate::world::{BLOCKS, CODE, DATA, DATA_PAGES, TABLES, World};
use twinstep_x86::Exit;
use twinstep_x86::state::{gpr, rflags};

const REP_MOVSB: [u8; 3] = [0xf3, 0xa4, 0xf4];
const REP_STOSB: [u8; 3] = [0xf3, 0xaa, 0xf4];

fn world(max: u32, code: &[u8], count: u64) -> World {
    World::new(max, code).with(|st| {
        st.gpr[gpr::RCX] = count;
        st.gpr[gpr::RSI] = DATA + 100;
        st.gpr[gpr::RDI] = DATA + 12_300;
        st.gpr[gpr::RAX] = 0xee;
    })
}

#[test]
fn a_step_is_4096_iterations() {
    for max in BLOCKS {
        for (count, steps) in [(0, 1), (1, 1), (4095, 1), (4096, 1), (4097, 2), (8192, 2), (8193, 3), (12_000, 3)] {
            let mut w = world(max, &REP_MOVSB, count);
            for i in 0..count {
                if i % 8 == 0 {
                    w.set_data(100 + i, i * 0x0101_0101);
                }
            }
            for step in 0..steps {
                assert_eq!(w.run(step), Exit::Position);
                assert_eq!((w.reg(gpr::RCX), w.cpu.state().rip), (count - step * 4096, CODE), "{count}, blocks of {max}");
                assert_eq!(w.reg(gpr::RSI), DATA + 100 + step * 4096);
            }
            w.halt();
            assert_eq!((w.reg(gpr::RCX), w.cpu.position()), (0, steps + 1), "{count}, blocks of {max}");
            for i in (0..count.saturating_sub(8)).step_by(8) {
                assert_eq!(w.data(12_300 + i), i * 0x0101_0101);
            }
        }
    }
}

#[test]
fn an_interrupt_comes_between_steps() {
    for max in BLOCKS {
        let mut w = world(max, &REP_STOSB, 10_000).with(|st| st.rflags |= rflags::IF);
        assert_eq!(w.run(1), Exit::Position);
        assert!(w.cpu.can_interrupt() && w.cpu.interrupt(&mut w.bus, 0x30).is_ok());
        let frame = w.fault();
        assert_eq!((frame.vector, frame.rip, w.reg(gpr::RCX)), (0x30, CODE, 10_000 - 4096), "blocks of {max}");
    }
}

#[test]
fn a_fault_inside_a_step_does_not_count() {
    for max in BLOCKS {
        // The page after the data is not present; 6000 bytes before it.
        let mut w = world(max, &REP_STOSB, 7000).with(|st| st.gpr[gpr::RDI] = DATA + 8 * 4096 - 6000);
        let frame = w.fault();
        assert_eq!((frame.vector, frame.rip, w.reg(gpr::RCX)), (14, CODE, 1000), "blocks of {max}");
        assert_eq!((w.reg(gpr::RDI), w.cpu.state().cr2), (DATA + 8 * 4096, DATA + 8 * 4096));
        assert_eq!(w.cpu.position(), 2, "the first step and the handler's HLT");
    }
}

#[test]
fn a_comparison_that_ends_at_the_step_counts_once() {
    for max in BLOCKS {
        // repne scasb: found at the 4096th byte.
        let mut w = world(max, &[0xf2, 0xae, 0xf4], 10_000).with(|st| st.gpr[gpr::RDI] = DATA);
        w.set_data(4088, 0xee << 56);
        w.halt();
        assert_eq!((w.reg(gpr::RCX), w.cpu.position()), (10_000 - 4096, 2), "blocks of {max}");
        assert!(w.cpu.state().rflags & rflags::ZF != 0);
    }
}

/// Four times round a loop with the string instruction in it, so that it becomes a trace:
/// mov rcx, r12; mov rdi, r13; mov rsi, r14; cmp ebp, 2; the instruction; adc edx, edx; dec ebp; jnz
fn in_a_loop(string: &[u8]) -> Vec<u8> {
    let mut code =
        [&[0x4c, 0x89, 0xe1, 0x4c, 0x89, 0xef, 0x4c, 0x89, 0xf6, 0x83, 0xfd, 0x02], string, &[0x11, 0xd2, 0xff, 0xcd]].concat();
    let back = code.len() as u8 + 2;
    code.extend([0x75, back.wrapping_neg(), 0xf4]);
    code
}

/// Blocks execute MOVS and STOS in place where they can. That makes no difference: not to counts of nothing, to overlaps, at the ends of pages,
/// where a page is missing, holds code or is a page table, nor where the run stops.
#[test]
fn in_place_as_alone() {
    const STRINGS: [&[u8]; 8] = [&[0xa4], &[0x66, 0xa5], &[0xa5], &[0x48, 0xa5], &[0xaa], &[0x66, 0xab], &[0xab], &[0x48, 0xab]];
    const PREFIXES: [&[u8]; 3] = [&[], &[0xf3], &[0xf2]];
    const SIZES: [u64; 4] = [1, 2, 4, 8];
    let mut seed = 1u64;
    let mut below = |n: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % n
    };
    for case in 0..600 {
        let which = below(8) as usize;
        let size = SIZES[which % 4];
        let mut string = PREFIXES[below(3) as usize].to_vec();
        // The operand size prefix may come before or behind; REX comes last.
        string.extend(STRINGS[which]);
        let code = in_a_loop(&string);
        let count = match below(6) {
            0 => 0,
            1 => 4096 / size,
            2 => 4096 / size + 1,
            3 => below(10_000),
            _ => below(60),
        };
        let end = DATA + DATA_PAGES * 4096;
        let near_end = |below: &mut dyn FnMut(u64) -> u64| match below(3) {
            0 => below(4096),
            1 => 4096u64.wrapping_sub(count * size).wrapping_add(below(3)).wrapping_sub(1) % 4096,
            _ => 4096 - below(20).min(4095),
        };
        let from = DATA + 4096 * below(3) + near_end(&mut below);
        let to = match below(8) {
            0 => from + below(40),
            1 => from.wrapping_sub(below(40)),
            2 => end - below(9000),
            // Behind the code; a page table that maps nothing of this.
            3 => CODE + 200 + below(3000),
            4 => TABLES + 14 * 4096 + below(4096),
            _ => DATA + 4096 * (3 + below(3)) + near_end(&mut below),
        };
        let down = below(8) == 0;
        let start = |max| {
            let mut w = World::new(max, &code).with(|st| {
                st.gpr[gpr::RBP] = 4;
                st.gpr[gpr::RAX] = 0x0123_4567_89ab_cdef;
                (st.gpr[12], st.gpr[13], st.gpr[14]) = (count, to, from);
                st.rflags |= if down { rflags::DF } else { 0 };
            });
            (0..DATA_PAGES * 512 - 16).for_each(|i| w.set_data(8 * i, i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            w
        };
        let mut alone = start(64);
        while !alone.cpu.state().halted {
            alone.change(|st| st.interrupt_shadow = true);
            let next = alone.cpu.position() + 1;
            alone.run(next);
        }
        for max in [1, 5, 64] {
            let what = || format!("case {case}: {string:x?} from {from:x} to {to:x}, {count} times, blocks of {max}");
            let mut w = start(max);
            w.finish();
            assert!(w.everything() == alone.everything(), "{}:\n{:?}\n{:?}", what(), w.cpu.state(), alone.cpu.state());
            // In small pieces.
            let mut w = start(max);
            while w.run(w.cpu.position() + 1 + below(11)) == Exit::Position {}
            assert!(w.everything() == alone.everything(), "{}, in pieces", what());
        }
    }
}
