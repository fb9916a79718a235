//! A guest that tries everything: random instructions of this module on random registers and descriptors.
//!
//! Whatever it does, nothing panics, a fault leaves no trace, and the state stays one that a snapshot would accept.
use super::testing::{GDT, HANDLERS, IDT, STACK, TSS, USER, World};
use super::{execute, handles};
use crate::state::{cr0, cr4, efer, gpr, rflags, seg};
use crate::{Exception, Vector, decode_state, encode_state};
use iced_x86::{Decoder, DecoderOptions};

/// A small generator with a fixed seed: the same guest every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// A value at which something tends to break.
    fn value(&mut self) -> u64 {
        let edges =
            [0, 1 << 12, USER, USER + 0x1000, 1 << 21, 1 << 22, 1 << 31, 1 << 32, 1 << 47, u64::MAX << 47, 0, STACK, GDT, TSS];
        let selectors = [0x10, 0x18, 0x23, 0x2b, 0x33, 0x40, 0x50, 0x58, 0x60, 0x68, 0x70, 0x53, 0x63, 0x73, 0x14];
        match self.below(8) {
            0 => self.next(),
            1 => self.below(20),
            2 => self.pick(&selectors),
            3 => 1 << self.below(64),
            4 => u64::MAX - self.below(20),
            _ => self.pick(&edges).wrapping_add(self.below(64)).wrapping_sub(32),
        }
    }
}

/// First bytes and opcodes of what `sys` handles.
const OPCODES: &[&[u8]] = &[
    &[0xa4],
    &[0xa5],
    &[0xa6],
    &[0xa7],
    &[0xaa],
    &[0xab],
    &[0xac],
    &[0xad],
    &[0xae],
    &[0xaf],
    &[0x6c],
    &[0x6d],
    &[0x6e],
    &[0x6f],
    &[0x9c],
    &[0x9d],
    &[0xfa],
    &[0xfb],
    &[0xf4],
    &[0xcc],
    &[0xcd, 0x30],
    &[0xcd, 0xff],
    &[0xf1],
    &[0xce],
    &[0xcf],
    &[0xcb],
    &[0xca],
    &[0x8c],
    &[0x8e],
    &[0x8e],
    &[0x8e],
    &[0xc8],
    &[0xd7],
    &[0xe4],
    &[0xe6],
    &[0xec],
    &[0xef],
    &[0xff],
    &[0xff],
    &[0x0f, 0x00],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x06],
    &[0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x30],
    &[0x0f, 0x31],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xa0],
    &[0x0f, 0xa1],
    &[0x0f, 0xa8],
    &[0x0f, 0xa9],
    &[0x0f, 0xa2],
    &[0x0f, 0xae],
    &[0x0f, 0xae],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x0f, 0xb5],
    &[0x0f, 0xf7],
    &[0xd9],
    &[0xdd],
    &[0x0f, 0x0b],
    &[0x0f, 0xc7],
    // Only outside 64-bit code, or with a meaning of their own there.
    &[0x27],
    &[0x37],
    &[0x60],
    &[0x61],
    &[0x62],
    &[0x63],
    &[0x06],
    &[0x07],
    &[0x1e],
    &[0x1f],
    &[0x9a],
    &[0xea],
    &[0xc4],
    &[0xd4],
    &[0xe8],
    &[0xe3],
    &[0xe2],
    &[0xc2],
    &[0xc3],
    &[0xc9],
    &[0x50],
    &[0x5c],
    &[0x8f],
    &[0x75],
];
const MSRS: &[u64] = &[
    0x10,
    0x1b,
    0x3b,
    0x174,
    0x175,
    0x1a0,
    0x200,
    0x201,
    0x250,
    0x277,
    0x2ff,
    0x6e0,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
];

fn scramble(w: &mut World, r: &mut Random) {
    for register in &mut w.st.gpr {
        *register = r.value();
    }
    if r.below(2) == 0 {
        w.st.gpr[gpr::RSP] = r.pick(&[STACK, USER + 0x8000, USER + 0x7ffd, 0x3000_0000]);
    }
    if r.below(4) == 0 {
        w.st.gpr[gpr::RCX] = r.pick(MSRS);
    }
    w.st.rflags = rflags::ONE | r.next() & (rflags::STATUS | rflags::IF | rflags::DF | rflags::IOPL | rflags::AC);
    // Descriptors of any kind in the free slots, gates among them; a stack full of edges.
    for slot in [0x50, 0x58, 0x60, 0x68, 0x70] {
        let access = r.pick(&[0x9au64, 0x92, 0xfa, 0xf2, 0x9e, 0xee, 0x8c, 0xec, 0x82, 0x89, 0x8b, 0x12, 0x1a, 0]);
        let mut descriptor = super::testing::flat(access, r.below(16));
        if r.below(2) == 0 {
            descriptor = descriptor & !0xffff_0000 | r.pick(&[0x10u64, 0x33, 0x50, 0x60]) << 16;
        }
        w.put(GDT + slot, descriptor);
    }
    let rsp = w.st.gpr[gpr::RSP];
    if (USER..USER + 0x10_0000).contains(&rsp) || rsp == STACK {
        for i in 0..8 {
            let word = r.value();
            w.put(rsp + 8 * i, word);
        }
    }
    for i in 0..8 {
        let word = r.value();
        w.put(USER + 8 * i, word);
    }
    w.put(IDT + 16 * 0x30 + 4, r.next() & 0xffff_ff07 | 0xe00);
}

/// Protected mode with or without 32-bit paging, and an IDT of small gates.
fn protected_mode(w: &mut World, r: &mut Random) {
    w.st.efer &= !(efer::LMA | efer::LME);
    w.st.cr4 &= !cr4::PAE;
    w.st.cr0 &= !cr0::PG;
    if r.below(2) == 0 {
        // 4 MiB pages, all of RAM for everybody.
        w.put(0x6000, 0x87);
        w.st.cr3 = 0x6000;
        w.st.cr4 |= cr4::PSE;
        w.st.cr0 |= cr0::PG;
    }
    w.mmu.flush_all();
    for vector in 0..256 {
        let access = r.pick(&[0x8e, 0xee, 0x8f, 0x86, 0x85, 0x0e, 0x8c]);
        let selector = r.pick(&[0x10, 0x20, 0x50, 0x58, 0]);
        w.put(IDT + 8 * vector, HANDLERS & 0xffff | selector << 16 | access << 40 | (HANDLERS >> 16) << 48);
    }
    // A 32-bit or 16-bit TSS with stacks of any kind.
    w.st.tr.attributes = r.pick(&[0x8b, 0x83]);
    let selector = r.pick(&[0x18, 0x50, 0x60]);
    w.put(TSS + 4, STACK | selector << 32);
    w.put(TSS + 2, r.next());
}

/// Gives segment registers limits, bases and types.
fn bend(w: &mut World, r: &mut Random) {
    for s in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
        if r.below(3) != 0 {
            continue;
        }
        let dpl = (w.st.cpl as u16) << 5;
        let attributes = r.pick(&[0xc093u16, 0x4093, 0x0093, 0xc097, 0x0097, 0xc091, 0xc09b]);
        if s == seg::SS && attributes & 0xa != 2 {
            continue;
        }
        w.st.seg[s].attributes = attributes | dpl;
        w.st.seg[s].base = r.pick(&[0, 0, USER, 0x10, 0xffff_f000, 0xffff_ffff]);
        w.st.seg[s].limit = r.pick(&[u32::MAX, 0xffff, 0, 0x20_0fff, USER as u32]);
    }
}

#[test]
fn random_instructions_keep_the_invariants() {
    let mut r = Random(1);
    let (mut done, mut faults) = (0u32, 0u32);
    for _ in 0..20_000 {
        let mut w = if r.below(2) == 0 { World::new() } else { World::new().user() };
        if r.below(4) == 0 {
            // Compatibility mode at the same level.
            let dpl = w.st.cpl as u16;
            let selector = if dpl == 3 { 0x23 } else { 0x50 };
            w.st.seg[seg::CS] = super::segments::flat_code(selector, dpl, false);
            if r.below(2) == 0 {
                protected_mode(&mut w, &mut r);
            }
            bend(&mut w, &mut r);
        }
        scramble(&mut w, &mut r);
        let mut code = Vec::new();
        while r.below(3) == 0 && code.len() < 3 {
            code.push(r.pick(&[0x66u8, 0x67, 0xf3, 0xf2, 0x64, 0x65, 0x36]));
        }
        let wide = w.st.is_64_bit_code();
        if wide && r.below(2) == 0 {
            code.push(0x40 | r.below(16) as u8);
        }
        code.extend(r.pick(OPCODES));
        code.extend(r.next().to_le_bytes());
        let bits = if wide { 64 } else { 32 };
        let insn = Decoder::with_ip(bits, &code, w.st.rip, DecoderOptions::NONE).decode();
        let near = !wide && super::near::handles(&insn);
        if insn.is_invalid() || !handles(&insn, w.model.features) && !near {
            continue;
        }
        let before = w.st.clone();
        let mut cx = w.cx();
        let result = execute(&mut cx, &insn);
        if cx.unsupported.is_some() {
            assert!(result.is_err() && before == w.st, "{insn:?} left a trace");
            continue;
        }
        match result {
            Ok(_) => done += 1,
            Err(e) => {
                faults += 1;
                assert!(insn.is_string_instruction() || before == w.st, "{insn:?} left a trace");
                check_error_code(&e);
                super::deliver_exception(&mut w.cx(), e);
            }
        }
        let checked = decode_state(&encode_state(&w.st));
        assert!(checked.is_ok(), "{insn:?} {:x?}: {checked:?}", insn.code());
    }
    assert!(done > 2000 && faults > 2000, "{done} {faults}");
}

fn check_error_code(e: &Exception) {
    let has_code = matches!(
        e.vector,
        Vector::InvalidTss | Vector::SegmentNotPresent | Vector::StackFault | Vector::GeneralProtection | Vector::PageFault
    );
    assert_eq!(e.error.is_some(), has_code, "{e:?}");
    assert_eq!(e.address.is_some(), matches!(e.vector, Vector::PageFault | Vector::Debug), "{e:?}");
}
