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

/// A loop of accesses with a base and an index, on registers that live in the frame, with carries that are asked for behind a check.
fn indexed() -> Vec<u8> {
    join(&[
        // top: mov rax, [rbx+rsi*8]; add r10, rax; mov r11, rdx; adc r11, 0x0
        &[0x48, 0x8b, 0x04, 0xf3, 0x49, 0x01, 0xc2, 0x49, 0x89, 0xd3, 0x49, 0x83, 0xd3, 0x00],
        // mul [rbx+rsi*8+0x8]; add [rbx+rsi*8+0x10], rax; adc rdx, 0x0; mov r8, [rbx+rsi*8+0x18]
        &[0x48, 0xf7, 0x64, 0xf3, 0x08, 0x48, 0x01, 0x44, 0xf3, 0x10, 0x48, 0x83, 0xd2, 0x00, 0x4c, 0x8b, 0x44, 0xf3, 0x18],
        // sbb r8, rdx; sbb edx, 0x1234567; mov [rbx+rsi*8+0x20], r8; adc r8w, cx
        &[0x49, 0x19, 0xd0, 0x81, 0xda, 0x67, 0x45, 0x23, 0x01, 0x4c, 0x89, 0x44, 0xf3, 0x20, 0x66, 0x41, 0x11, 0xc8],
        // mov rdi, [rbx+rsi*8+0x18]; cmp r10b, al; cmovb r9, r10; movzx edi, r11b
        &[0x48, 0x8b, 0x7c, 0xf3, 0x18, 0x41, 0x38, 0xc2, 0x4d, 0x0f, 0x42, 0xca, 0x41, 0x0f, 0xb6, 0xfb],
        // test r15, rdx; pushfq; pop rdi; mov [rbx+rsi*8+0x28], rdi
        &[0x49, 0x85, 0xd7, 0x9c, 0x5f, 0x48, 0x89, 0x7c, 0xf3, 0x28],
        // lea r15, [rsi+rcx*2+0x5]; lea edi, [r15+rsi]; lea r12, [rip+top]; xor [rbx+rcx*1], r15b
        &[0x4c, 0x8d, 0x7c, 0x4e, 0x05, 0x41, 0x8d, 0x3c, 0x37, 0x4c, 0x8d, 0x25, 0xa3, 0xff, 0xff, 0xff, 0x44, 0x30, 0x3c, 0x0b],
        // cmp dil, [rbx+rsi*8+0x3]; inc rsi; inc rdi; mov al, [rbx+rsi*8]
        &[0x40, 0x3a, 0x7c, 0xf3, 0x03, 0x48, 0xff, 0xc6, 0x48, 0xff, 0xc7, 0x8a, 0x04, 0xf3],
        // sbb r9, 0x3; mov [rbx+rsi*8-0x8], r9; add r11d, r10d; adc rdi, r12
        &[0x49, 0x83, 0xd9, 0x03, 0x4c, 0x89, 0x4c, 0xf3, 0xf8, 0x45, 0x01, 0xd3, 0x4c, 0x11, 0xe7],
        // push r15; mov r13, [rbx+rsi*8-0x8]; pop r14; imul r10, r14
        &[0x41, 0x57, 0x4c, 0x8b, 0x6c, 0xf3, 0xf8, 0x41, 0x5e, 0x4d, 0x0f, 0xaf, 0xd6],
        // neg r15; cmp [rbx+rsi*8+0x8], 0x4d; and esi, 0x3f; dec rcx
        &[0x49, 0xf7, 0xdf, 0x48, 0x83, 0x7c, 0xf3, 0x08, 0x4d, 0x83, 0xe6, 0x3f, 0x48, 0xff, 0xc9],
        // jnz top; hlt
        &[0x0f, 0x85, 0x60, 0xff, 0xff, 0xff, 0xf4],
    ])
}

/// A loop whose flags come from RSP and a register that POP overwrites.
fn stack() -> Vec<u8> {
    join(&[
        // top: mov ebp, 8; sub rsp, rbp; pop rbp; mov rax, [rbx]; pushfq; pop rdi; xor [rbx+8], rdi
        &[0xbd, 0x08, 0x00, 0x00, 0x00, 0x48, 0x29, 0xec, 0x5d, 0x48, 0x8b, 0x03, 0x9c, 0x5f, 0x48, 0x31, 0x7b, 0x08],
        // mov rbp, -8; add rsp, rbp; pop rbp; mov rax, [rbx+16]; pushfq; pop rdi; xor [rbx+24], rdi
        &[
            0x48, 0xc7, 0xc5, 0xf8, 0xff, 0xff, 0xff, 0x48, 0x01, 0xec, 0x5d, 0x48, 0x8b, 0x43, 0x10, 0x9c, 0x5f, 0x48, 0x31,
            0x7b, 0x18,
        ],
        // nop; nop; nop; nop; lea rsp, [rsp-8]; dec rcx; jnz top; hlt
        &[0x90, 0x90, 0x90, 0x90, 0x48, 0x8d, 0x64, 0x24, 0xf8, 0x48, 0xff, 0xc9, 0x75, 0xcb, 0xf4],
    ])
}

/// `at`: where the data is. Close to the end of a page, its groups lie across pages, too.
fn world(program: &[u8], max: u32, at: u64) -> World {
    World::new(max, program).with(|st| {
        st.gpr[gpr::RCX] = 150;
        st.gpr[gpr::RSI] = 3;
        st.gpr[gpr::RDX] = 7;
        st.gpr[gpr::RBX] = at;
    })
}

const PLACES: [u64; 3] = [DATA, DATA + 4096 - 36, DATA + 4096 - 20];

/// Each program at each place.
fn cases() -> impl Iterator<Item = (Vec<u8>, u64)> {
    [program(), indexed(), stack()].into_iter().flat_map(|program| PLACES.map(|at| (program.clone(), at)))
}

#[test]
fn slices_blocks_and_cold_caches_are_invisible() {
    for (program, at) in cases() {
        let mut reference = world(&program, 1, at);
        reference.halt();
        let end = reference.everything();
        assert!(end.1 > 3000, "it ran to {}", end.1);
        for max in BLOCKS {
            for slice in [1, 3, 64, 1000] {
                for cold in [false, true] {
                    let mut w = world(&program, max, at);
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
    for (program, at) in cases() {
        let (mut alone, mut traces) = (world(&program, 1, at), world(&program, 64, at));
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
        let mut w = world(&program(), max, DATA);
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
