//! Steps of string instructions with REP (docs/positions.md).
use crate::world::{BLOCKS, CODE, DATA, World};
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
