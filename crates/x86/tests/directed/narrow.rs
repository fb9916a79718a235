//! 32-bit code in protected mode: paging of both kinds, segments that are not flat, branches of 16 bits; and that blocks, slices and
//! cold caches cannot be seen there either.
use crate::bus::QuietBus;
use crate::memory::GuestRam;
use crate::world::{BLOCKS, join};
use twinstep_x86::state::{TableRegister, cr0, cr4, gpr, rflags, seg};
use twinstep_x86::{Cpu, CpuConfig, CpuModel, CpuState, Exit, Position, Segment};

const IDT: u64 = 0x2000;
/// Handler of vector `n` is a HLT at `HANDLERS + 16 * n`.
const HANDLERS: u64 = 0x3000;
const GDT: u64 = 0x5000;
const TABLES: u64 = 0x8000;
const CODE: u64 = 0x10000;
const DATA: u64 = 0x20000;
const STACK: u64 = 0x30000;
const RAM_BYTES: usize = 0x80_0000;

/// A guest in protected mode without paging, all segments flat.
struct Narrow {
    cpu: Cpu,
    ram: GuestRam,
}

impl Narrow {
    fn new(max_block: u32, code: &[u8]) -> Self {
        let mut ram = GuestRam::new(RAM_BYTES);
        for (selector, descriptor) in [(8, 0x00cf_9b00_0000_ffffu64), (16, 0x00cf_9300_0000_ffff)] {
            ram.write(GDT + selector, &descriptor.to_le_bytes());
        }
        for vector in 0..256u64 {
            let gate = (HANDLERS + 16 * vector) | 8 << 16 | 0x8e << 40;
            ram.write(IDT + 8 * vector, &gate.to_le_bytes());
            ram.write(HANDLERS + 16 * vector, &[0xf4]);
        }
        ram.write(CODE, code);
        let mut config = CpuConfig::new(CpuModel::x86_64_v2());
        config.code_cache_bytes = 1 << 20;
        config.max_block_instructions = max_block;
        // Loops of a few rounds become traces on the way.
        config.trace_after = 2;
        let mut cpu = Cpu::new(config, ram.phys().clone());
        let mut st = CpuState::reset();
        let flat = |selector: u16, attributes: u16| Segment { base: 0, limit: u32::MAX, selector, attributes };
        st.seg = [flat(16, 0xc093); 6];
        st.seg[seg::CS] = flat(8, 0xc09b);
        st.cr0 = cr0::PE | cr0::ET | cr0::NE;
        st.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT;
        st.gdtr = TableRegister { base: GDT, limit: 0x17 };
        st.idtr = TableRegister { base: IDT, limit: 0x7ff };
        st.rip = CODE;
        st.gpr[gpr::RSP] = STACK;
        st.gpr[gpr::RBX] = DATA;
        cpu.set_state(st);
        Self { cpu, ram }
    }
    fn with(mut self, change: impl FnOnce(&mut CpuState, &mut GuestRam)) -> Self {
        let mut st = self.cpu.state().clone();
        change(&mut st, &mut self.ram);
        self.cpu.set_state(st);
        self
    }
    fn run(&mut self, until: Position) -> Exit {
        self.cpu.run(&mut QuietBus, until)
    }
    fn halt(&mut self) -> u64 {
        assert_eq!(self.run(1_000_000), Exit::Halted);
        self.cpu.state().rip - 1
    }
    /// Runs into an exception: its vector, error code (for those that have one) and the EIP it is about.
    fn fault(&mut self) -> (u64, u32, u32) {
        let at = self.halt();
        let vector = at.wrapping_sub(HANDLERS) / 16;
        assert!(vector < 32, "halted at {at:#x}");
        let st = self.cpu.state();
        let sp = st.seg[seg::SS].base + st.gpr[gpr::RSP];
        let with_error = matches!(vector, 8 | 10..=14 | 17);
        let word = |i: u64| self.word(sp + 4 * i);
        if with_error { (vector, word(0), word(1)) } else { (vector, 0, word(0)) }
    }
    fn word(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.ram.bytes(gpa, 4).try_into().expect("four bytes"))
    }
    fn reg(&self, n: usize) -> u64 {
        self.cpu.state().gpr[n]
    }
}

/// 32-bit paging: everything to itself by 4 MiB pages, and the page at 4 MiB by a table.
fn narrow_paging(st: &mut CpuState, ram: &mut GuestRam) {
    ram.write(TABLES, &0x83u32.to_le_bytes());
    ram.write(TABLES + 4, &(TABLES as u32 + 0x1003).to_le_bytes());
    ram.write(TABLES + 0x1000, &(DATA as u32 | 3).to_le_bytes());
    st.cr3 = TABLES;
    st.cr4 |= cr4::PSE;
    st.cr0 |= cr0::PG | cr0::WP;
}

/// The same with PAE paging; the pointers are in registers.
fn pae_paging(st: &mut CpuState, ram: &mut GuestRam) {
    for (i, at) in (0..2).map(|i| (i, 0x20_0000 * i)) {
        ram.write(TABLES + 8 * i, &(0x83 | at).to_le_bytes());
    }
    ram.write(TABLES + 16, &(TABLES + 0x1003).to_le_bytes());
    ram.write(TABLES + 0x1000, &(DATA | 3).to_le_bytes());
    st.pdpte = [TABLES | 1, 0, 0, 0];
    st.cr4 |= cr4::PAE;
    st.cr0 |= cr0::PG | cr0::WP;
}

const PAGED: u64 = 0x40_0000;
const LEAF: u64 = TABLES + 0x1000;

#[test]
fn accessed_and_dirty_bits() {
    for max in BLOCKS {
        for paging in [narrow_paging, pae_paging] {
            // top: mov eax, [ebx] (or: mov [ebx], eax); jmp top
            for (code, bits) in [([0x8b, 0x03, 0xeb, 0xfc], 0x20), ([0x89, 0x03, 0xeb, 0xfc], 0x60)] {
                let mut w = Narrow::new(max, &code).with(|st, ram| {
                    paging(st, ram);
                    st.gpr[gpr::RBX] = PAGED;
                });
                for round in 0..4 {
                    assert_eq!(w.run(round * 20 + 20), Exit::Position);
                    assert_eq!(w.word(LEAF), DATA as u32 | 3 | bits, "round {round}, blocks of {max}");
                    // Cleared like by another agent.
                    w.ram.write(LEAF, &(DATA as u32 | 3).to_le_bytes());
                }
            }
        }
    }
}

#[test]
fn a_changed_mapping_is_seen_at_once() {
    for max in BLOCKS {
        for paging in [narrow_paging, pae_paging] {
            // Rounds of: add edx, [ebx]; mov [esi], eax; add edx, [ebx]; mov [esi], edi; dec ecx; jnz; hlt
            let code = [0x03, 0x13, 0x89, 0x06, 0x03, 0x13, 0x89, 0x3e, 0x49, 0x75, 0xf5, 0xf4];
            let mut w = Narrow::new(max, &code).with(|st, ram| {
                paging(st, ram);
                ram.write(DATA, &1u32.to_le_bytes());
                ram.write(DATA + 0x1000, &1000u32.to_le_bytes());
                st.gpr[gpr::RBX] = PAGED;
                st.gpr[gpr::RSI] = LEAF;
                st.gpr[gpr::RAX] = DATA + 0x1003;
                st.gpr[gpr::RDI] = DATA | 3;
                st.gpr[gpr::RCX] = 50;
            });
            w.halt();
            assert_eq!((w.reg(gpr::RDX), w.cpu.position()), (50 * 1001, 301), "blocks of {max}");
            // Not writable any more: the store faults.
            let code = [0x89, 0x03, 0x89, 0x06, 0x89, 0x03, 0xf4];
            let mut w = Narrow::new(max, &code).with(|st, ram| {
                paging(st, ram);
                st.gpr[gpr::RBX] = PAGED;
                st.gpr[gpr::RSI] = LEAF;
                st.gpr[gpr::RAX] = DATA | 1;
            });
            assert_eq!(w.fault(), (14, 3, CODE as u32 + 4), "blocks of {max}");
            assert_eq!(w.cpu.state().cr2, PAGED);
        }
    }
}

#[test]
fn page_directory_pointers_are_registers() {
    for max in BLOCKS {
        // mov eax, [ebx]; mov dword [esi], 0; mov eax, [ebx]; mov eax, cr3; mov cr3, eax; nop
        let code = [0x8b, 0x03, 0xc7, 0x06, 0, 0, 0, 0, 0x8b, 0x03, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x90, 0xf4];
        let mut w = Narrow::new(max, &code).with(|st, ram| {
            pae_paging(st, ram);
            st.cr3 = DATA + 0x20;
            ram.write(DATA + 0x20, &(TABLES | 1).to_le_bytes());
            st.gpr[gpr::RBX] = PAGED;
            st.gpr[gpr::RSI] = DATA + 0x20;
            st.idtr.limit = 0;
        });
        // The store changes nothing; the reload does, and there is no code any more, nor a handler.
        assert_eq!((w.run(100), w.cpu.position()), (Exit::TripleFault, 5), "blocks of {max}");
    }
}

#[test]
fn a_code_segment_with_base_and_limit() {
    for max in BLOCKS {
        // inc eax; jmp short +0; call +1; hlt; pop edx; jmp to the end of the segment, which is not in it
        let code = [0x40, 0xeb, 0x00, 0xe8, 1, 0, 0, 0, 0xf4, 0x5a, 0xeb, 0x04, 0x90, 0x90, 0x90, 0x90, 0x90];
        let mut w = Narrow::new(max, &code).with(|st, _| {
            st.seg[seg::CS] = Segment { base: CODE - 0x100, limit: 0x10f, selector: 8, attributes: 0x409b };
            st.rip = 0x100;
        });
        assert_eq!(w.fault(), (13, 0, 0x10a), "blocks of {max}");
        assert_eq!((w.reg(gpr::RAX), w.reg(gpr::RDX)), (1, 0x108));
        // An instruction that reaches beyond it.
        let mut w = Narrow::new(max, &[0x90, 0xb8, 0, 0, 0, 0]).with(|st, _| {
            st.seg[seg::CS] = Segment { base: CODE, limit: 4, selector: 8, attributes: 0x409b };
            st.rip = 0;
        });
        assert_eq!(w.fault(), (13, 0, 1), "blocks of {max}");
    }
}

#[test]
fn branches_of_16_bits_cut_the_instruction_pointer() {
    for max in BLOCKS {
        // At 0x10010: jmp (16 bits) to 0x20, which is what is left of 0x10020.
        for jump in
            [&[0x66, 0xeb, 0x0d][..], &[0x66, 0xe9, 0x0c, 0], &[0x66, 0xff, 0xe0], &[0x66, 0xe2, 0x0d], &[0x66, 0x74, 0x0d]]
        {
            let mut w = Narrow::new(max, &[]).with(|st, ram| {
                ram.write(CODE + 0x10, jump);
                ram.write(0x20, &[0x43, 0xf4]);
                st.rip = CODE + 0x10;
                st.gpr[gpr::RAX] = 0x1234_0020;
                st.gpr[gpr::RCX] = 5;
                st.rflags |= rflags::ZF;
            });
            assert_eq!((w.halt(), w.reg(gpr::RBX)), (0x21, DATA + 1), "{jump:x?}, blocks of {max}");
        }
        // call (16 bits) pushes two bytes, ret pops them.
        let mut w = Narrow::new(max, &[]).with(|st, ram| {
            ram.write(CODE + 0x10, &[0x66, 0xe8, 0x0c, 0]);
            ram.write(0x20, &[0x66, 0xc3]);
            ram.write(0x14, &[0xf4]);
            st.rip = CODE + 0x10;
        });
        assert_eq!((w.halt(), w.reg(gpr::RSP), w.word(STACK - 4) >> 16), (0x14, STACK, 0x14), "blocks of {max}");
    }
}

#[test]
fn a_16_bit_stack_wraps() {
    for max in BLOCKS {
        // push eax; push ecx; pushad; popad; pop edx; pop ebp; hlt
        let mut w = Narrow::new(max, &[0x50, 0x51, 0x60, 0x61, 0x5a, 0x5d, 0xf4]).with(|st, _| {
            st.seg[seg::SS] = Segment { base: STACK, limit: 0xffff, selector: 16, attributes: 0x0093 };
            st.gpr[gpr::RSP] = 0xabcd_0004;
            (st.gpr[gpr::RAX], st.gpr[gpr::RCX]) = (0x1111_1111, 0x2222_2222);
        });
        w.halt();
        assert_eq!((w.reg(gpr::RDX), w.reg(gpr::RBP), w.reg(gpr::RSP)), (0x2222_2222, 0x1111_1111, 0xabcd_0004));
        assert_eq!((w.word(STACK), w.word(STACK + 0xfffc)), (0x1111_1111, 0x2222_2222), "blocks of {max}");
    }
}

/// A loop with memory in several segments, calls, a string, decimal arithmetic, far transfers and flags.
fn busy(max: u32, flat: bool) -> Narrow {
    let code = join(&[
        // top: add [ebx], ecx; adc gs:[ebx+4], ecx; call f; push ds; pop es; rep movsb of 5; lea edi, [ebx+512]; lea esi, [ebx+8]
        &[0x01, 0x0b],
        &[0x65, 0x11, 0x4b, 0x04],
        &[0xe8, 28, 0, 0, 0],
        &[0x1e, 0x07],
        &[0x51, 0xb9, 5, 0, 0, 0, 0xf3, 0xa4, 0x59],
        &[0x8d, 0xbb, 0, 2, 0, 0],
        &[0x8d, 0x73, 8],
        // dec ecx; jnz top; hlt
        &[0x49, 0x75, 0xde, 0xf4, 0x90, 0x90, 0x90, 0x90],
        // f: pushfd; pop eax; daa; add edx, eax; pushad; popad; setc [ebx+100]; jecxz +0; ret
        &[0x9c, 0x58, 0x27, 0x01, 0xc2, 0x60, 0x61, 0x0f, 0x92, 0x43, 0x64, 0xe3, 0x00, 0xc3],
    ]);
    assert_eq!(code.len(), 0x27 + 14);
    Narrow::new(max, &code).with(|st, _| {
        st.gpr[gpr::RCX] = 40;
        st.gpr[gpr::RSI] = DATA + 8;
        st.gpr[gpr::RDI] = DATA + 512;
        st.seg[seg::GS].base = 0xfff1;
        if !flat {
            st.seg[seg::SS].limit = STACK as u32;
        }
    })
}

#[test]
fn slices_blocks_and_cold_caches_are_invisible() {
    let everything = |w: &Narrow| (w.cpu.state().clone(), w.cpu.position(), w.ram.bytes(CODE, 0x30000).to_vec());
    for flat in [true, false] {
        let mut reference = busy(64, flat);
        reference.halt();
        let end = everything(&reference);
        assert!(end.1 > 500, "it ran to {}", end.1);
        for max in BLOCKS {
            for slice in [1, 2, 3, 7, 64, 1000] {
                for cold in [false, true] {
                    let mut w = busy(max, flat);
                    while w.run(w.cpu.position() + slice) == Exit::Position {
                        if cold {
                            let state = w.cpu.state().clone();
                            w.cpu.set_state(state);
                            w.cpu.drop_caches();
                        }
                    }
                    assert!(everything(&w) == end, "flat {flat}, blocks of {max}, slices of {slice}, cold {cold}");
                }
            }
        }
    }
}
