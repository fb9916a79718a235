//! Page tables: accessed and dirty bits as if there were no TLB, changes noticed at once, accesses across pages all or nothing.
use crate::memory::{PRESENT, USER, WRITABLE};
use crate::world::{BLOCKS, CODE, CODE_GPA, DATA, DATA_PAGES, World, data_gpa, join};
use twinstep_x86::Exit;
use twinstep_x86::state::gpr;

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// mov rax, [rbx]; jmp back
const READ_LOOP: [u8; 5] = [0x48, 0x8b, 0x03, 0xeb, 0xfb];
/// mov [rbx], rax; jmp back
const WRITE_LOOP: [u8; 5] = [0x48, 0x89, 0x03, 0xeb, 0xfb];

#[test]
fn accessed_and_dirty_are_set_by_the_first_access_and_again() {
    for max in BLOCKS {
        for (code, bits) in [(READ_LOOP, ACCESSED), (WRITE_LOOP, ACCESSED | DIRTY)] {
            let mut w = World::new(max, &code);
            let entry = w.entry(DATA);
            let clean = w.ram.word(entry);
            assert_eq!(clean & (ACCESSED | DIRTY), 0);
            for round in 0..4 {
                assert_eq!(w.run(round * 20 + 10), Exit::Position);
                assert_eq!(w.ram.word(entry), clean | bits, "round {round}, blocks of {max}");
                // Cleared like by another agent, without any INVLPG.
                w.ram.write(entry, &clean.to_le_bytes());
                assert_eq!(w.run(round * 20 + 20), Exit::Position);
                assert_eq!(w.ram.word(entry), clean | bits, "round {round}, blocks of {max}");
                w.ram.write(entry, &clean.to_le_bytes());
            }
        }
    }
}

#[test]
fn the_guest_itself_clears_them() {
    for max in BLOCKS {
        // Five times: mov [rbx], rcx; mov rdx, [rsi]; or rdi, rdx; and [rsi], r8; mov r9, [rsi]; dec rcx; jnz
        let code = [
            0x48, 0x89, 0x0b, 0x48, 0x8b, 0x16, 0x48, 0x09, 0xd7, 0x4c, 0x21, 0x06, 0x4c, 0x8b, 0x0e, 0x48, 0xff, 0xc9, 0x75,
            0xec, 0xf4,
        ];
        let mut w = World::new(max, &code);
        let entry = w.entry_va(DATA);
        w.change(|st| {
            st.gpr[gpr::RCX] = 5;
            st.gpr[gpr::RSI] = entry;
            st.gpr[gpr::R8] = !(ACCESSED | DIRTY);
        });
        for round in 1..=5 {
            assert_eq!(w.run(round * 7 - 4), Exit::Position);
            assert_eq!(w.reg(gpr::RDX) & (ACCESSED | DIRTY), ACCESSED | DIRTY, "round {round}, blocks of {max}");
            assert_eq!(w.run(round * 7), Exit::Position);
            assert_eq!(w.reg(gpr::R9) & (ACCESSED | DIRTY), 0, "round {round}, blocks of {max}");
        }
    }
}

#[test]
fn every_level_is_marked_accessed() {
    for max in BLOCKS {
        let mut w = World::new(max, &READ_LOOP);
        assert_eq!(w.run(10), Exit::Position);
        let mut table = w.tables.root();
        for level in [39, 30, 21, 12] {
            let value = w.ram.word(table + (DATA >> level & 511) * 8);
            assert_eq!(value & (ACCESSED | DIRTY), ACCESSED, "level {level}, blocks of {max}");
            table = value & 0x000f_ffff_ffff_f000;
        }
    }
}

#[test]
fn a_changed_mapping_is_seen_at_once() {
    for max in BLOCKS {
        // Rounds of: add rdx, [rbx]; mov [rsi], r8 (the entry: the other page); add rdx, [rbx]; mov [rsi], r9 (back); dec rcx; jnz; hlt
        let code = [0x48, 0x03, 0x13, 0x4c, 0x89, 0x06, 0x48, 0x03, 0x13, 0x4c, 0x89, 0x0e, 0x48, 0xff, 0xc9, 0x75, 0xef, 0xf4];
        let mut w = World::new(max, &code);
        w.set_data(0, 1);
        w.set_data(4096, 1000);
        let entry = w.entry_va(DATA);
        let flags = PRESENT | WRITABLE | USER;
        w.change(|st| {
            st.gpr[gpr::RCX] = 50;
            st.gpr[gpr::RSI] = entry;
            st.gpr[gpr::R8] = data_gpa(1) | flags;
            st.gpr[gpr::R9] = data_gpa(0) | flags;
        });
        w.halt();
        assert_eq!((w.reg(gpr::RDX), w.cpu.position()), (50 * 1001, 301), "blocks of {max}");
    }
}

#[test]
fn a_revoked_mapping_faults_at_once() {
    for max in BLOCKS {
        for (value, error) in [(data_gpa(0) | PRESENT, 3), (0, 2)] {
            // mov [rbx], rax; mov [rsi], r8; mov [rbx], rax
            let mut w = World::new(max, &[0x48, 0x89, 0x03, 0x4c, 0x89, 0x06, 0x48, 0x89, 0x03, 0xf4]);
            let entry = w.entry_va(DATA);
            w.change(|st| {
                st.gpr[gpr::RSI] = entry;
                st.gpr[gpr::R8] = value;
            });
            let frame = w.fault();
            assert_eq!((frame.vector, frame.error, frame.rip), (14, error, CODE + 6), "blocks of {max}");
            assert_eq!((w.cpu.state().cr2, w.cpu.position()), (DATA, 3));
        }
    }
}

#[test]
fn an_upper_level_changes() {
    for max in BLOCKS {
        // mov rax, [rbx]; mov [rsi], r8 (the page directory's entry: not present); mov rax, [rbx]
        let mut w = World::new(max, &[0x48, 0x8b, 0x03, 0x4c, 0x89, 0x06, 0x48, 0x8b, 0x03, 0xf4]);
        let mut table = w.tables.root();
        for level in [39, 30] {
            table = w.ram.word(table + (DATA >> level & 511) * 8) & 0x000f_ffff_ffff_f000;
        }
        let entry = table + (DATA >> 21 & 511) * 8 - 0x1000 + crate::world::TABLES;
        w.change(|st| st.gpr[gpr::RSI] = entry);
        let frame = w.fault();
        assert_eq!((frame.vector, frame.error, frame.rip), (14, 0, CODE + 6), "blocks of {max}");
    }
}

#[test]
fn code_moves_to_another_page() {
    for max in BLOCKS {
        // Page 0: call page 1; mov [rsi], r8 (page 1 is now what page 2 was); call page 1; hlt
        let first = [0xe8, 0xfb, 0x0f, 0, 0, 0x4c, 0x89, 0x06, 0xe8, 0xf3, 0x0f, 0, 0, 0xf4];
        let mut w = World::new(max, &first);
        w.ram.write(CODE_GPA + 0x1000, &[0x48, 0xff, 0xc2, 0xc3]); // inc rdx; ret
        w.ram.write(CODE_GPA + 0x2000, &[0x48, 0x83, 0xc2, 0x64, 0xc3]); // add rdx, 100; ret
        let entry = w.entry_va(CODE + 0x1000);
        w.change(|st| {
            st.gpr[gpr::RSI] = entry;
            st.gpr[gpr::R8] = (CODE_GPA + 0x2000) | PRESENT | WRITABLE | USER;
        });
        w.halt();
        assert_eq!((w.reg(gpr::RDX), w.cpu.position()), (101, 8), "blocks of {max}");
    }
}

#[test]
fn the_running_page_moves_under_the_instruction_pointer() {
    for max in BLOCKS {
        // mov [rsi], r8 (this page is now another); mov eax, 1 (there: mov eax, 2); hlt
        let mut w = World::new(max, &[0x4c, 0x89, 0x06, 0xb8, 1, 0, 0, 0, 0xf4]);
        w.ram.write(CODE_GPA + 0x1000, &[0x90, 0x90, 0x90, 0xb8, 2, 0, 0, 0, 0xf4]);
        let entry = w.entry_va(CODE);
        w.change(|st| {
            st.gpr[gpr::RSI] = entry;
            st.gpr[gpr::R8] = (CODE_GPA + 0x1000) | PRESENT | WRITABLE | USER;
        });
        w.halt();
        assert_eq!((w.reg(gpr::RAX), w.cpu.position()), (2, 3), "blocks of {max}");
    }
}

#[test]
fn accesses_across_pages() {
    let stores: [(&str, &[u8], usize); 8] = [
        ("mov [rbx+4093], rax", &[0x48, 0x89, 0x83, 0xfd, 0x0f, 0, 0], 8),
        ("add [rbx+4093], rax", &[0x48, 0x01, 0x83, 0xfd, 0x0f, 0, 0], 8),
        ("lock xadd [rbx+4093], rax", &[0xf0, 0x48, 0x0f, 0xc1, 0x83, 0xfd, 0x0f, 0, 0], 8),
        ("xchg [rbx+4093], rax", &[0x48, 0x87, 0x83, 0xfd, 0x0f, 0, 0], 8),
        ("movups [rbx+4093], xmm0", &[0x0f, 0x11, 0x83, 0xfd, 0x0f, 0, 0], 16),
        ("fld1; fstp tbyte [rbx+4093]", &[0xd9, 0xe8, 0xdb, 0xbb, 0xfd, 0x0f, 0, 0], 10),
        ("mov rsp, rdi; push rax", &[0x48, 0x89, 0xfc, 0x50], 8),
        ("movsq", &[0x48, 0xa5], 8),
    ];
    for max in BLOCKS {
        for (name, code, size) in stores {
            let setup = |w: &mut World, page: u64| {
                w.change(|st| {
                    st.gpr[gpr::RBX] = DATA + page * 4096;
                    st.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
                    let at = DATA + page * 4096 + 4093;
                    st.gpr[gpr::RDI] = if name.contains("push") { at + 8 } else { at };
                    st.gpr[gpr::RSI] = DATA;
                    st.fx.0[160..176].copy_from_slice(&[0xa5; 16]);
                });
            };
            // Between two pages.
            let code = join(&[code, &[0xf4]]);
            let mut w = World::new(max, &code);
            w.set_data(0, 0x1122_3344_5566_7788);
            setup(&mut w, 1);
            w.halt();
            let expected = match size {
                16 => 0xa5a5_a5a5_a5a5_a5a5,
                10 => 1 << 63,
                _ => 0x1122_3344_5566_7788,
            };
            assert_eq!(w.data(4096 + 4093), expected, "{name}, blocks of {max}");
            // Into a page that is not present: nothing is written.
            let mut w = World::new(max, &code);
            w.set_data(0, 0x1122_3344_5566_7788);
            let last = DATA_PAGES - 1;
            setup(&mut w, last);
            w.set_data(last * 4096 + 4088, 0);
            let frame = w.fault();
            assert_eq!((frame.vector, frame.error), (14, 2), "{name}, blocks of {max}");
            assert_eq!(w.cpu.state().cr2, DATA + DATA_PAGES * 4096);
            assert_eq!(w.data(last * 4096 + 4088), 0, "{name}, blocks of {max}");
        }
    }
}

#[test]
fn pages_that_compete_for_one_place_are_not_walked_again_and_again() {
    // A load and a store, each of two pages in turn, whose numbers end alike: they have one place in the first level.
    let far = DATA + (4096 << 12);
    // xchg rsi, rbx; mov rax, [rbx]; add [rsi], rax; dec rcx; jnz; hlt
    let code = [0x48, 0x87, 0xde, 0x48, 0x8b, 0x03, 0x48, 0x01, 0x06, 0x48, 0xff, 0xc9, 0x75, 0xf2, 0xf4];
    for max in BLOCKS {
        let mut w = World::new(max, &code);
        w.tables.map(&mut w.ram, far, data_gpa(1), true, true, false);
        w.change(|st| (st.gpr[gpr::RCX], st.gpr[gpr::RSI]) = (10_000, far));
        w.halt();
        let tlb = w.cpu.stats().tlb;
        assert!(tlb.walks < 100, "{tlb:?}, blocks of {max}");
    }
}
