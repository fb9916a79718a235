//! System instructions that blocks execute by themselves do what they do when they run alone: the same program in blocks of several sizes, and
//! instruction by instruction with an interrupt shadow before each, which makes it run alone.
use crate::world::{BLOCKS, CODE, World};
use twinstep_x86::state::{cr0, cr4, gpr, rflags, seg};
use twinstep_x86::{CpuState, Exit};

/// A fixed sequence of numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }
}

/// A piece of code that changes flags, pushes them, pops some.
fn piece(random: &mut Random, kernel: bool, code: &mut Vec<u8>) {
    match random.below(if kernel { 9 } else { 6 }) {
        // add eax, imm32; sub rdx, rax; xor esi, esi; nop
        0 => {
            code.push(0x05);
            code.extend((random.next() as u32).to_le_bytes());
        }
        1 => code.extend([0x48, 0x29, 0xc2]),
        2 => code.extend([0x90, 0x31, 0xf6]),
        // pushfq; pop rdi; add rdx, rdi
        3 => code.extend([0x9c, 0x5f, 0x48, 0x01, 0xfa]),
        // push imm32; popfq
        4 | 5 => {
            let image = random.next() as u32 & !(rflags::TF as u32) & !0xfff8_0000;
            code.push(0x68);
            code.extend(image.to_le_bytes());
            code.push(0x9d);
        }
        6 => code.push(0xfa),
        7 => code.push(0xfb),
        _ => code.extend([0x0f, 0x01, 0xf8]),
    }
}

/// mov reg, imm64; `reg` of r8 to r15 or below.
fn load(code: &mut Vec<u8>, reg: u8, value: u64) {
    code.extend([0x48 | reg >> 3, 0xb8 | reg & 7]);
    code.extend(value.to_le_bytes());
}

/// Parts of kernel code, each followed by one of user code. SYSCALL arrives at the start, which jumps on to r14.
fn program(random: &mut Random) -> Vec<u8> {
    // jmp r14
    let mut code = vec![0x41, 0xff, 0xe6];
    for _ in 0..12 {
        for _ in 0..random.below(12) {
            piece(random, true, &mut code);
        }
        // To the user's code behind it, with some flags.
        let flags = random.next() & !(rflags::TF | rflags::AC);
        load(&mut code, 11, flags);
        let user = CODE + code.len() as u64 + 13;
        load(&mut code, 1, user);
        code.extend([0x48, 0x0f, 0x07]);
        for _ in 0..random.below(12) {
            piece(random, false, &mut code);
        }
        let kernel = CODE + code.len() as u64 + 12;
        load(&mut code, 14, kernel);
        code.extend([0x0f, 0x05]);
    }
    code.push(0xf4);
    code
}

fn prepare(st: &mut CpuState, random: &mut Random) {
    st.rip = CODE + 3;
    st.efer |= 1;
    st.cr0 &= !cr0::AM;
    st.star = random.next() & 0xfff8_fff8 << 32;
    st.lstar = CODE;
    st.sfmask = random.next() & 0xffff_ffff | rflags::TF;
    st.kernel_gs_base = 0x1234_5678;
    st.gpr[gpr::RDX] = random.next();
}

#[test]
fn in_blocks_as_alone() {
    for seed in 1..=40u64 {
        let start = |max| {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let code = program(&mut random);
            World::new(max, &code).with(|st| prepare(st, &mut random))
        };
        let mut alone = start(64);
        while !alone.cpu.state().halted {
            alone.change(|st| st.interrupt_shadow = true);
            let next = alone.cpu.position() + 1;
            assert!(matches!(alone.run(next), Exit::Position | Exit::Halted));
        }
        for max in BLOCKS {
            let mut w = start(max);
            w.finish();
            assert!(
                w.everything() == alone.everything(),
                "seed {seed}, blocks of {max}:\n{:?}\n{:?}",
                w.cpu.state(),
                alone.cpu.state()
            );
            assert!(w.cpu.state().rip > CODE + 100, "seed {seed} ended early");
            // Stopped anywhere, it stands where it stood alone.
            let mut w = start(max);
            let mut alone = start(64);
            let mut random = Random(seed);
            while w.run(w.cpu.position() + 1 + random.below(9)) == Exit::Position {
                while alone.cpu.position() < w.cpu.position() {
                    alone.change(|st| st.interrupt_shadow = true);
                    let next = alone.cpu.position() + 1;
                    alone.run(next);
                }
                assert_eq!(w.cpu.state(), alone.cpu.state(), "seed {seed}, blocks of {max}, position {}", w.cpu.position());
            }
        }
    }
}

/// The time-stamp counter and the selectors, read in blocks and alone; at user level as well, where CR4.TSD forbids it.
#[test]
fn reading_what_the_processor_knows() {
    // rdtsc; mov [rbx], rax; mov [rbx+8], rdx; rdtscp; mov [rbx+16], rax; mov [rbx+24], rcx; mov r10, fs; mov [rbx+32], r10;
    // mov r11d, ss; mov [rbx+40], r11; mov eax, es; mov [rbx+48], rax; add rbx, 56; dec ebp; jnz; hlt
    let mut code =
        vec![0x0f, 0x31, 0x48, 0x89, 0x03, 0x48, 0x89, 0x53, 8, 0x0f, 0x01, 0xf9, 0x48, 0x89, 0x43, 16, 0x48, 0x89, 0x4b, 24];
    code.extend([
        0x49, 0x8c, 0xe2, 0x4c, 0x89, 0x53, 32, 0x41, 0x8c, 0xd3, 0x4c, 0x89, 0x5b, 40, 0x8c, 0xc0, 0x48, 0x89, 0x43, 48,
    ]);
    code.extend([0x48, 0x83, 0xc3, 56, 0xff, 0xcd]);
    let back = code.len() as u8 + 2;
    code.extend([0x75, back.wrapping_neg(), 0xf4]);
    for (user, forbidden, offset) in
        [(false, false, 0), (false, true, 3), (true, false, u64::MAX - 20), (true, true, 0), (true, false, 1 << 40)]
    {
        let start = |max| {
            World::new(max, &code).with(|st| {
                st.gpr[gpr::RBP] = 9;
                (st.tsc_offset, st.tsc_aux) = (offset, 0x1_0000_0007);
                st.cr4 |= if forbidden { cr4::TSD } else { 0 };
                st.seg[seg::FS].selector = 0xfff3;
                if user {
                    st.cpl = 3;
                    for (s, dpl) in [(seg::CS, 3), (seg::SS, 3)] {
                        st.seg[s].attributes |= dpl << 5;
                        st.seg[s].selector |= 3;
                    }
                }
            })
        };
        let mut alone = start(64);
        while !alone.cpu.state().halted {
            alone.change(|st| st.interrupt_shadow = true);
            let next = alone.cpu.position() + 1;
            alone.run(next);
        }
        assert_eq!(alone.reg(gpr::RBP), if user && forbidden { 9 } else { 0 });
        for max in BLOCKS {
            let mut w = start(max);
            w.finish();
            assert!(
                w.everything() == alone.everything(),
                "{user} {forbidden} {offset:x}, blocks of {max}:\n{:?}\n{:?}",
                w.cpu.state(),
                alone.cpu.state()
            );
        }
    }
}
