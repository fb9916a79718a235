//! Exact stops, shadows, and that neither slicing nor cold caches can be seen.
use crate::world::{BLOCKS, CODE, DATA, World, join};
use twinstep_x86::Exit;
use twinstep_x86::state::{gpr, rflags};

/// A loop with memory, flags, calls, a string instruction and a page fault's worth of pages in it; ends after many rounds.
fn busy() -> Vec<u8> {
    join(&[
        // top: add [rbx], rcx; adc [rbx+4090], rcx (two pages); call f; rep movsb of 5; lea rdi, [rbx+512]; lea rsi, [rbx+8]
        &[0x48, 0x01, 0x0b],
        &[0x48, 0x11, 0x8b, 0xfa, 0x0f, 0, 0],
        &[0xe8, 26, 0, 0, 0],
        &[0x51, 0xb9, 5, 0, 0, 0, 0xf3, 0xa4, 0x59],
        &[0x48, 0x8d, 0xbb, 0, 2, 0, 0],
        &[0x48, 0x8d, 0x73, 8],
        // dec rcx; jnz top; hlt
        &[0x48, 0xff, 0xc9, 0x75, 0xd8, 0xf4],
        // f: pushfq; pop rax; add rdx, rax; setc [rbx+100]; sub rax, rdx; ret
        &[0x9c, 0x58, 0x48, 0x01, 0xc2, 0x0f, 0x92, 0x43, 0x64, 0x48, 0x29, 0xd0, 0xc3],
    ])
}

fn busy_world(max: u32) -> World {
    World::new(max, &busy()).with(|st| {
        st.gpr[gpr::RCX] = 40;
        st.gpr[gpr::RSI] = DATA + 8;
        st.gpr[gpr::RDI] = DATA + 512;
    })
}

#[test]
fn stops_are_exact_in_loops() {
    // dec rcx; jnz -5
    let code = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];
    for max in BLOCKS {
        let mut w = World::new(max, &code).with(|st| st.gpr[gpr::RCX] = 1000);
        for until in (0..2000).step_by(7) {
            assert_eq!(w.run(until), Exit::Position);
            assert_eq!(w.cpu.position(), until);
            assert_eq!(w.reg(gpr::RCX), 1000 - until.div_ceil(2), "blocks of {max}");
            assert_eq!(w.cpu.state().rip, if until % 2 == 0 { CODE } else { CODE + 3 });
        }
        w.halt();
        assert_eq!(w.cpu.position(), 2001);
    }
}

#[test]
fn slices_blocks_and_cold_caches_are_invisible() {
    let mut reference = busy_world(64);
    reference.halt();
    let end = reference.everything();
    assert!(end.1 > 500, "it ran to {}", end.1);
    for max in BLOCKS {
        for slice in [1, 2, 3, 7, 64, 1000] {
            for cold in [false, true] {
                let mut w = busy_world(max);
                while w.run(w.cpu.position() + slice) == Exit::Position {
                    if cold {
                        let state = w.cpu.state().clone();
                        w.cpu.set_state(state);
                        w.cpu.drop_caches();
                    }
                }
                let (state, position, ram) = w.everything();
                assert_eq!((position, &state), (end.1, &end.0), "blocks of {max}, slices of {slice}, cold {cold}");
                let first = ram.iter().zip(&end.2).position(|(a, b)| a != b);
                assert_eq!(first, None, "memory; blocks of {max}, slices of {slice}, cold {cold}");
            }
        }
    }
}

#[test]
fn every_position_has_one_state() {
    let states: Vec<_> = {
        let mut w = busy_world(1);
        (0..200)
            .map(|p| {
                w.run(p);
                w.everything()
            })
            .collect()
    };
    for max in BLOCKS {
        for (p, expected) in states.iter().enumerate() {
            let mut w = busy_world(max);
            assert_eq!(w.run(p as u64), Exit::Position);
            assert_eq!(w.everything().0, expected.0, "position {p}, blocks of {max}");
            assert!(w.everything().2 == expected.2, "memory at position {p}, blocks of {max}");
        }
    }
}

#[test]
fn sti_casts_a_shadow_of_one_instruction() {
    for max in BLOCKS {
        // sti; nop; nop; sti; nop; hlt
        let mut w = World::new(max, &[0xfb, 0x90, 0x90, 0xfb, 0x90, 0xf4]);
        let open: Vec<bool> = (0..6)
            .map(|p| {
                assert_eq!(w.run(p), Exit::Position);
                w.cpu.can_interrupt()
            })
            .collect();
        // Only an STI that sets IF casts one.
        assert_eq!(open, [false, false, true, true, true, true], "blocks of {max}");
        let mut w = World::new(max, &[0xfb, 0x90, 0x90, 0xfb, 0x90, 0xf4]);
        w.cpu.want_interrupt_window(true);
        assert_eq!((w.run(100), w.cpu.position()), (Exit::Window, 2), "blocks of {max}");
        assert!(w.cpu.interrupt(&mut w.bus, 0x41).is_ok());
        w.cpu.want_interrupt_window(false);
        let frame = w.fault();
        assert_eq!((frame.vector, frame.rip, frame.rflags & rflags::IF), (0x41, CODE + 2, rflags::IF));
        assert_eq!(w.cpu.position(), 3, "delivery counts nothing, the handler's HLT one");
    }
}

#[test]
fn mov_ss_casts_a_shadow() {
    for max in BLOCKS {
        // mov ax, 0x18; mov ss, ax; nop; nop
        let mut w = World::new(max, &[0x66, 0xb8, 0x18, 0, 0x8e, 0xd0, 0x90, 0x90, 0xf4]).with(|st| st.rflags |= rflags::IF);
        let open: Vec<bool> = (0..4)
            .map(|p| {
                assert_eq!(w.run(p), Exit::Position);
                w.cpu.can_interrupt()
            })
            .collect();
        assert_eq!(open, [true, true, false, true], "blocks of {max}");
    }
}

#[test]
fn hlt_counts_and_wakes() {
    for max in BLOCKS {
        let mut w = World::new(max, &[0xfb, 0xf4, 0x90, 0xf4]);
        assert_eq!((w.run(100), w.cpu.position()), (Exit::Halted, 2));
        assert_eq!((w.run(100), w.cpu.position()), (Exit::Halted, 2));
        assert!(w.cpu.can_interrupt() && w.cpu.interrupt(&mut w.bus, 0x21).is_ok());
        let frame = w.fault();
        assert_eq!((frame.vector, frame.rip, w.cpu.position()), (0x21, CODE + 2, 3), "blocks of {max}");
    }
}

#[test]
fn dead_flags_are_exact_in_a_fault_frame() {
    for max in BLOCKS {
        for (al, flags) in [(0x80u64, 0x80), (0, 0x44), (0xff, 0x84), (0x7f, 0)] {
            // test al, al; mov rdx, [rsi] (not present); add eax, eax
            let mut w = World::new(max, &[0x84, 0xc0, 0x48, 0x8b, 0x16, 0x01, 0xc0, 0xf4]).with(|st| {
                st.gpr[gpr::RAX] = al;
                st.gpr[gpr::RSI] = 0x1234_5000;
            });
            let frame = w.fault();
            assert_eq!((frame.vector, frame.rip, frame.rflags & 0xcd5), (14, CODE + 2, flags), "blocks of {max}");
            assert_eq!((w.cpu.state().cr2, w.cpu.position()), (0x1234_5000, 2));
        }
    }
}

#[test]
fn the_trap_flag_traps_after_every_instruction() {
    for max in BLOCKS {
        // add rax, rcx; mov [rbx], rax; rep stosb
        let code = [0x48, 0x01, 0xc8, 0x48, 0x89, 0x03, 0xf3, 0xaa, 0xf4];
        for (at, next) in [(0, 3), (3, 6)] {
            let mut w = World::new(max, &code).with(|st| {
                st.rip = CODE + at;
                st.rflags |= rflags::TF;
            });
            let frame = w.fault();
            assert_eq!((frame.vector, frame.rip, frame.rflags & rflags::TF), (1, CODE + next, rflags::TF), "blocks of {max}");
            assert_eq!(w.cpu.state().dr[6] & 1 << 14, 1 << 14);
            assert_eq!(w.cpu.position(), 2, "the instruction and the handler's HLT");
        }
    }
}
