//! Self-modifying code: takes effect at the next instruction, also in the same block (docs/positions.md).
use crate::memory::NO_EXECUTE;
use crate::world::{BLOCKS, CODE, CODE_GPA, DATA, World, join};
use twinstep_x86::Exit;
use twinstep_x86::state::gpr;

const MOV_EAX_1: [u8; 5] = [0xb8, 1, 0, 0, 0];
const HLT: [u8; 1] = [0xf4];

#[test]
fn a_store_into_the_next_instruction() {
    for max in BLOCKS {
        // mov byte [rip+1], 7 (the immediate of the next); mov eax, 1
        let mut w = World::new(max, &join(&[&[0xc6, 5, 1, 0, 0, 0, 7], &MOV_EAX_1, &HLT]));
        w.halt();
        assert_eq!((w.reg(gpr::RAX), w.cpu.position()), (7, 3), "blocks of {max}");
    }
}

#[test]
fn a_store_further_down_the_running_block() {
    for max in BLOCKS {
        // mov byte [rip+1+6], 7; six NOPs; mov eax, 1
        let mut w = World::new(max, &join(&[&[0xc6, 5, 7, 0, 0, 0, 7], &[0x90; 6], &MOV_EAX_1, &HLT]));
        w.halt();
        assert_eq!((w.reg(gpr::RAX), w.cpu.position()), (7, 9), "blocks of {max}");
    }
}

#[test]
fn a_store_every_round_of_a_loop() {
    for max in BLOCKS {
        // top: inc byte [rip+1]; mov eax, 1 -> add edx, eax; dec ecx; jnz top
        let code = join(&[&[0xfe, 5, 1, 0, 0, 0], &MOV_EAX_1, &[0x01, 0xc2, 0xff, 0xc9, 0x75, 0xef], &HLT]);
        let mut w = World::new(max, &code).with(|st| st.gpr[gpr::RCX] = 50);
        w.halt();
        // 2 + 3 + ... + 51
        assert_eq!((w.reg(gpr::RDX), w.cpu.position()), (50 * 53 / 2, 251), "blocks of {max}");
    }
}

#[test]
fn a_store_behind_the_running_instruction() {
    for max in BLOCKS {
        // top: mov eax, 1; add edx, eax; mov byte [top+1], 9; dec ecx; jnz top
        let code = join(&[&MOV_EAX_1, &[0x01, 0xc2], &[0xc6, 5, 0xf3, 0xff, 0xff, 0xff, 9], &[0xff, 0xc9, 0x75, 0xee], &HLT]);
        let mut w = World::new(max, &code).with(|st| st.gpr[gpr::RCX] = 3);
        w.halt();
        assert_eq!((w.reg(gpr::RDX), w.cpu.position()), (1 + 9 + 9, 16), "blocks of {max}");
    }
}

#[test]
fn an_instruction_on_two_pages() {
    for max in BLOCKS {
        // mov eax, imm32 whose immediate is on the second page; before it a store there through RDI.
        let mut w = World::new(max, &[]);
        let at = 4096 - 1 - 4;
        // inc byte [rdi+1]; nop; then the MOV with its opcode as the last byte of the page.
        w.ram.write(CODE_GPA + at - 4, &join(&[&[0xfe, 0x47, 0x01], &[0x90; 5], &MOV_EAX_1, &[0xff, 0xc9, 0x75, 0xef], &HLT]));
        w.change(|st| {
            st.rip = CODE + at - 4;
            st.gpr[gpr::RDI] = CODE + 4096;
            st.gpr[gpr::RCX] = 4;
        });
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 1 + (4 << 8), "blocks of {max}");
    }
}

#[test]
fn a_store_through_another_mapping() {
    for max in BLOCKS {
        let code = join(&[&[0xc6, 0x43, 0x05, 7], &MOV_EAX_1, &HLT]);
        let mut w = World::new(max, &code);
        let (entry, value) = (w.entry(DATA), CODE_GPA | 3 | NO_EXECUTE);
        w.ram.write(entry, &value.to_le_bytes());
        // Warm: the code is translated before it is written.
        assert_eq!(w.run(1), Exit::Position);
        w.change(|st| st.rip = CODE);
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 7, "blocks of {max}");
    }
}

#[test]
fn a_store_from_the_page_before() {
    for max in BLOCKS {
        // mov [rdi], rax over the end of page 0 into the code on page 1; jmp to it.
        let mut w = World::new(max, &[0x48, 0x89, 0x07, 0xff, 0xe6]);
        w.ram.write(CODE_GPA + 4096, &join(&[&MOV_EAX_1, &HLT]));
        w.change(|st| {
            st.gpr[gpr::RSI] = CODE + 4096;
            st.gpr[gpr::RDI] = CODE + 4096;
            st.gpr[gpr::RAX] = 0xf400_0000_01b8;
        });
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 1);
        // The same code again, with the last four bytes of page 0 and the first four of page 1.
        w.change(|st| {
            st.rip = CODE;
            st.halted = false;
            st.gpr[gpr::RDI] = CODE + 4092;
            st.gpr[gpr::RAX] = 0x0005_06b8_0000_0000;
        });
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 0x506, "blocks of {max}");
    }
}

#[test]
fn string_instructions_and_devices_write_code() {
    for max in BLOCKS {
        // rep stosb into the immediate of the MOV: four times 7.
        let mut w = World::new(max, &join(&[&[0xf3, 0xaa], &MOV_EAX_1, &HLT])).with(|st| {
            st.gpr[gpr::RCX] = 4;
            st.gpr[gpr::RAX] = 7;
            st.gpr[gpr::RDI] = CODE + 3;
        });
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 0x0707_0707, "blocks of {max}");
        w.ram.write(CODE_GPA + 3, &[9, 0, 0, 0]);
        w.change(|st| {
            st.rip = CODE + 2;
            st.halted = false;
        });
        w.halt();
        assert_eq!(w.reg(gpr::RAX), 9, "blocks of {max}");
        // Between two runs without any change of state: only the device's word for it.
        let mut w = World::new(max, &[0xb8, 1, 0, 0, 0, 0x01, 0xc2, 0xeb, 0xf7]);
        assert_eq!(w.run(3 * 10), Exit::Position);
        w.ram.write(CODE_GPA + 1, &[100]);
        assert_eq!(w.run(3 * 20), Exit::Position);
        assert_eq!(w.reg(gpr::RDX), 10 + 1000, "blocks of {max}");
    }
}

#[test]
fn the_rest_of_a_page_stays_fast_and_right() {
    for max in BLOCKS {
        // Data next to code: mov [rip+0x100], rcx; inc rdx; dec rcx; jnz
        let code = [0x48, 0x89, 0x0d, 0, 1, 0, 0, 0x48, 0xff, 0xc2, 0x48, 0xff, 0xc9, 0x75, 0xf1, 0xf4];
        let mut w = World::new(max, &code).with(|st| st.gpr[gpr::RCX] = 1000);
        w.halt();
        assert_eq!((w.reg(gpr::RDX), w.cpu.position()), (1000, 4001), "blocks of {max}");
        assert_eq!(w.ram.word(CODE_GPA + 0x107), 1);
    }
}
