//! Accesses that share a check, and flags that are not saved: what traces save themselves cannot be seen.
use crate::world::{BLOCKS, DATA, World, join};
use twinstep_x86::Exit;
use twinstep_x86::state::gpr;

/// A loop of pushes, pops, a call and arithmetic on memory, whose flags are asked for late or never. The stack goes down 40 bytes a round, so that
/// its groups come to lie across pages.
fn program() -> Vec<u8> {
    join(&[
        // top: push rcx; push rdx; add [rbx+16], rcx; sub qword [rbx+24], 1; inc qword [rbx+32]; adc qword [rbx+40], 0
        &[0x51, 0x52, 0x48, 0x01, 0x4b, 0x10, 0x48, 0x83, 0x6b, 0x18, 0x01, 0x48, 0xff, 0x43, 0x20, 0x48, 0x83, 0x53, 0x28, 0x00],
        // mov rsi, [rbx+16]; and [rbx+48], rsi; pushfq; pop rdi; mov [rbx+56], rdi
        &[0x48, 0x8b, 0x73, 0x10, 0x48, 0x21, 0x73, 0x30, 0x9c, 0x5f, 0x48, 0x89, 0x7b, 0x38],
        // inc rdx; mov rsi, [rbx+24]; adc rsi, rdx; call f (18 bytes on)
        &[0x48, 0xff, 0xc2, 0x48, 0x8b, 0x73, 0x18, 0x48, 0x11, 0xd6, 0xe8, 13, 0, 0, 0],
        // pop rdx; pop rcx; lea rsp, [rsp-40]; dec rcx; jnz top; hlt
        &[0x5a, 0x59, 0x48, 0x8d, 0x64, 0x24, 0xd8, 0x48, 0xff, 0xc9, 0x75, 0xc3, 0xf4],
        // f: test rcx, rcx; mov rax, [rbx+16]; sub rax, rcx; lea rsp, [rsp+8]; lea rsp, [rsp-8]; ret
        &[0x48, 0x85, 0xc9, 0x48, 0x8b, 0x43, 0x10, 0x48, 0x29, 0xc8],
        &[0x48, 0x8d, 0x64, 0x24, 0x08, 0x48, 0x8d, 0x64, 0x24, 0xf8, 0xc3],
    ])
}

/// `at`: where the data is. Close to the end of a page, its groups lie across pages, too.
fn world(max: u32, at: u64) -> World {
    World::new(max, &program()).with(|st| {
        st.gpr[gpr::RCX] = 150;
        st.gpr[gpr::RDX] = 7;
        st.gpr[gpr::RBX] = at;
    })
}

const PLACES: [u64; 3] = [DATA, DATA + 4096 - 36, DATA + 4096 - 20];

#[test]
fn slices_blocks_and_cold_caches_are_invisible() {
    for at in PLACES {
        let mut reference = world(1, at);
        reference.halt();
        let end = reference.everything();
        assert!(end.1 > 3000, "it ran to {}", end.1);
        for max in BLOCKS {
            for slice in [1, 3, 64, 1000] {
                for cold in [false, true] {
                    let mut w = world(max, at);
                    while w.run(w.cpu.position() + slice) == Exit::Position {
                        if cold {
                            w.cpu.drop_caches();
                        }
                    }
                    let (state, position, ram) = w.everything();
                    assert_eq!(
                        (position, &state),
                        (end.1, &end.0),
                        "at {at:#x}, blocks of {max}, slices of {slice}, cold {cold}"
                    );
                    let first = ram.iter().zip(&end.2).position(|(a, b)| a != b);
                    assert_eq!(first, None, "memory; at {at:#x}, blocks of {max}, slices of {slice}, cold {cold}");
                }
            }
        }
    }
}

#[test]
fn flags_that_are_owed_are_there_at_every_stop() {
    for at in PLACES {
        let (mut alone, mut traces) = (world(1, at), world(64, at));
        // Warm: traces, linked.
        traces.run(1500);
        alone.run(1500);
        for until in (1501..2200).step_by(5) {
            assert_eq!((alone.run(until), traces.run(until)), (Exit::Position, Exit::Position));
            assert_eq!(alone.cpu.state(), traces.cpu.state(), "at {at:#x}, position {until}");
        }
    }
}

#[test]
fn a_page_that_is_taken_away_under_a_group_faults_where_it_is_used() {
    for max in BLOCKS {
        let mut w = world(max, DATA);
        assert_eq!(w.run(1500), Exit::Position);
        let entry = w.entry(DATA);
        let old = u64::from_le_bytes(w.ram.bytes(entry, 8).try_into().expect("eight bytes"));
        // Read-only from now on, as a device would write it: the next store faults, loads before it do not.
        w.ram.write(entry, &(old & !2).to_le_bytes());
        w.cpu.drop_caches();
        let frame = w.fault();
        assert_eq!(w.cpu.state().cr2 & !63, DATA, "blocks of {max}");
        assert_eq!(frame.error, 3, "a write to a page that is there; blocks of {max}");
    }
}
