//! Images of the FPU in guest memory: FXSAVE, FXRSTOR, FNSTENV, FNSAVE, FLDENV, FRSTOR; LDMXCSR; MASKMOVQ and MASKMOVDQU.
//!
//! **In:** `st.fx`, which the engine keeps current around these instructions. **Out:** memory, or a new `st.fx`.
//!
//! **Invariant:** FIP, FDP and FOP (and the selectors beside them) are zero in every image and in `st.fx`; MXCSR has no reserved bit
//! set; what `st.fx` holds is what the silicon would hold after loading it. So an image never tells where the host keeps the guest's code, nor which
//! maker's silicon it ran on.
//!
//! References: APM vol. 3 and 5 (instruction pages), SDM vol. 1 sections 8.1.10 (environment), 10.5 (FXSAVE area).
use super::{Cx, Ea, Flow, vector};
use crate::exception::Vector;
use crate::state::{FxImage, cr0, cr4};
use crate::{Exception, segmentation};
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

/// MXCSR bits that exist; also what the images say in MXCSR_MASK.
pub(crate) const MXCSR_MASK: u32 = 0xffff;
/// Bytes of an FXSAVE image that are written; the rest is the guest's.
const FX_WRITTEN: usize = 464;

/// Byte offsets in the FXSAVE image.
pub(super) mod at {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
}

/// FSW: exception summary and busy.
const FSW_PENDING: u16 = 0x8080;

/// Executes one of this module's instructions.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    match insn.mnemonic() {
        M::Ldmxcsr => ldmxcsr(cx, insn),
        M::Maskmovq | M::Maskmovdqu => masked_move(cx, insn),
        _ => {
            if cx.st.cr0 & (cr0::EM | cr0::TS) != 0 {
                return Err(Exception::NM);
            }
            match insn.mnemonic() {
                M::Fxsave | M::Fxsave64 => fxsave(cx, insn),
                M::Fxrstor | M::Fxrstor64 => fxrstor(cx, insn),
                M::Fnstenv | M::Fstenv => fnstenv(cx, insn),
                M::Fnsave | M::Fsave => fnsave(cx, insn),
                M::Fldenv => fldenv(cx, insn),
                M::Frstor => frstor(cx, insn),
                _ => Err(Exception::UD),
            }
        }
    }
}

fn word(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}
fn set_word(image: &mut [u8], at: usize, value: u16) {
    image[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Makes of any image what the silicon holds after loading it: constant control bits, exception summary, no pointers, and zeros
/// (MXCSR_MASK too) where `st.fx` has nothing to say.
pub(crate) fn settle(fx: &mut FxImage) {
    let image = &mut fx.0;
    let fcw = word(image, at::FCW) & 0x1f3f | 0x40;
    set_word(image, at::FCW, fcw);
    let fsw = word(image, at::FSW) & !FSW_PENDING;
    let pending = fsw & !fcw & 0x3f != 0;
    set_word(image, at::FSW, if pending { fsw | FSW_PENDING } else { fsw });
    // The byte after the abridged tags, FOP, FIP, FDP.
    image[5..at::MXCSR].fill(0);
    image[at::MXCSR_MASK..at::ST].fill(0);
    for i in 0..8 {
        let slot = at::ST + 16 * i;
        image[slot + 10..slot + 16].fill(0);
    }
    image[at::XMM + 256..].fill(0);
}

/// Whether an x87 exception is unmasked and pending.
fn pending(fx: &FxImage) -> bool {
    word(&fx.0, at::FSW) & 0x80 != 0
}

fn top(fx: &FxImage) -> usize {
    (word(&fx.0, at::FSW) >> 11) as usize & 7
}

/// Changes TOP while the physical registers stay: the image holds them in stack order, so they move.
fn set_top(fx: &mut FxImage, new: usize) {
    let by = (new + 8 - top(fx)) % 8;
    let old = fx.0;
    for i in 0..8 {
        let from = at::ST + 16 * ((i + by) % 8);
        fx.0[at::ST + 16 * i..][..16].copy_from_slice(&old[from..from + 16]);
    }
    let fsw = word(&fx.0, at::FSW) & !0x3800 | (new as u16) << 11;
    set_word(&mut fx.0, at::FSW, fsw);
}

fn fxsave(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let to = aligned(cx, insn)?;
    let mut fx = cx.st.fx;
    settle(&mut fx);
    fx.0[at::MXCSR_MASK..at::ST].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    // Outside 64-bit mode only eight XMM registers are stored.
    let len = if cx.st.is_64_bit_code() { FX_WRITTEN } else { at::XMM + 128 };
    cx.write_bytes(to, &fx.0[..len])?;
    Ok(Flow::Next)
}

fn fxrstor(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let from = aligned(cx, insn)?;
    let mut fx = cx.st.fx;
    let len = if cx.st.is_64_bit_code() { FX_WRITTEN } else { at::XMM + 128 };
    let mut image = [0; FX_WRITTEN];
    cx.read_bytes(from, &mut image[..len])?;
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    fx.0[..len].copy_from_slice(&image[..len]);
    settle(&mut fx);
    cx.st.fx = fx;
    Ok(Flow::Next)
}

/// The operand's address; #GP(0) if it is not 16-byte aligned.
fn aligned(cx: &Cx, insn: &Instruction) -> Result<Ea, Exception> {
    let ea = cx.ea(insn);
    if ea.va.is_multiple_of(16) { Ok(ea) } else { Err(Exception::gp(0)) }
}

fn ldmxcsr(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if cx.st.cr0 & cr0::EM != 0 || cx.st.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::UD);
    }
    if cx.st.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    load_mxcsr(cx, insn)
}

/// LDMXCSR and VLDMXCSR, after the checks in which they differ.
pub(super) fn load_mxcsr(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let from = cx.ea(insn);
    let value = cx.read_value(from, 4)? as u32;
    if value & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    cx.st.fx.0[at::MXCSR..at::MXCSR + 4].copy_from_slice(&value.to_le_bytes());
    Ok(Flow::Next)
}

/// The two-bit tag of a register: valid, zero, special.
fn full_tag(register: &[u8]) -> u16 {
    let exponent = word(register, 8) & 0x7fff;
    let mantissa = u64::from_le_bytes(register[..8].try_into().unwrap_or_default());
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        _ if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

/// All eight two-bit tags, by physical register.
fn full_tags(fx: &FxImage) -> u16 {
    let mut tags = 0;
    for physical in 0..8 {
        let stack = (physical + 8 - top(fx)) % 8;
        let slot = &fx.0[at::ST + 16 * stack..][..10];
        let tag = if fx.0[at::FTW] >> physical & 1 == 0 { 3 } else { full_tag(slot) };
        tags |= tag << (2 * physical);
    }
    tags
}

/// Whether the operand size of an environment instruction is 16 bits.
fn is_short(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Fnstenv_m14byte
            | Code::Fstenv_m14byte
            | Code::Fnsave_m94byte
            | Code::Fsave_m94byte
            | Code::Fldenv_m14byte
            | Code::Frstor_m94byte
    )
}

/// The environment in the format of protected mode, and its length. Reserved halves are ones, pointers zero.
fn environment(fx: &FxImage, short: bool) -> ([u8; 28], usize) {
    let mut env = [0; 28];
    let words = [word(&fx.0, at::FCW), word(&fx.0, at::FSW), full_tags(fx)];
    for (i, w) in words.into_iter().enumerate() {
        if short {
            set_word(&mut env, 2 * i, w);
        } else {
            set_word(&mut env, 4 * i, w);
            set_word(&mut env, 4 * i + 2, 0xffff);
        }
    }
    if !short {
        set_word(&mut env, 26, 0xffff);
    }
    (env, if short { 14 } else { 28 })
}

/// Puts an environment into an image: control, status, tags. Register contents stay in their physical registers.
fn load_environment(fx: &mut FxImage, env: &[u8], short: bool) {
    let step = if short { 2 } else { 4 };
    let (fcw, fsw, tags) = (word(env, 0), word(env, step), word(env, 2 * step));
    set_top(fx, (fsw >> 11) as usize & 7);
    set_word(&mut fx.0, at::FCW, fcw);
    set_word(&mut fx.0, at::FSW, fsw);
    fx.0[at::FTW] = (0..8).fold(0, |abridged, i| abridged | ((tags >> (2 * i) & 3 != 3) as u8) << i);
    settle(fx);
}

fn fnstenv(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let to = cx.ea(insn);
    let mut fx = cx.st.fx;
    settle(&mut fx);
    let (env, len) = environment(&fx, is_short(insn));
    cx.write_bytes(to, &env[..len])?;
    // All exceptions are masked afterwards.
    let fcw = word(&fx.0, at::FCW) | 0x3f;
    set_word(&mut fx.0, at::FCW, fcw);
    settle(&mut fx);
    cx.st.fx = fx;
    Ok(Flow::Next)
}

fn fnsave(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let to = cx.ea(insn);
    let mut fx = cx.st.fx;
    settle(&mut fx);
    let (env, len) = environment(&fx, is_short(insn));
    let mut image = [0; 108];
    image[..len].copy_from_slice(&env[..len]);
    for i in 0..8 {
        image[len + 10 * i..][..10].copy_from_slice(&fx.0[at::ST + 16 * i..][..10]);
    }
    cx.write_bytes(to, &image[..len + 80])?;
    // As FNINIT: the registers keep their contents, empty.
    set_top(&mut fx, 0);
    set_word(&mut fx.0, at::FCW, 0x37f);
    set_word(&mut fx.0, at::FSW, 0);
    fx.0[at::FTW] = 0;
    settle(&mut fx);
    cx.st.fx = fx;
    Ok(Flow::Next)
}

fn fldenv(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if pending(&cx.st.fx) {
        return Err(Exception::plain(Vector::MathFault));
    }
    let short = is_short(insn);
    let from = cx.ea(insn);
    let mut env = [0; 28];
    cx.read_bytes(from, &mut env[..if short { 14 } else { 28 }])?;
    load_environment(&mut cx.st.fx, &env, short);
    Ok(Flow::Next)
}

fn frstor(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if pending(&cx.st.fx) {
        return Err(Exception::plain(Vector::MathFault));
    }
    let short = is_short(insn);
    let len = if short { 14 } else { 28 };
    let from = cx.ea(insn);
    let mut image = [0; 108];
    cx.read_bytes(from, &mut image[..len + 80])?;
    let fx = &mut cx.st.fx;
    load_environment(fx, &image[..len], short);
    for i in 0..8 {
        fx.0[at::ST + 16 * i..][..10].copy_from_slice(&image[len + 10 * i..][..10]);
    }
    Ok(Flow::Next)
}

/// MASKMOVQ and MASKMOVDQU: stores the bytes whose mask byte has its top bit set.
fn masked_move(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let mmx = insn.mnemonic() == M::Maskmovq;
    if cx.st.cr0 & cr0::EM != 0 || !mmx && cx.st.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::UD);
    }
    if cx.st.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    if mmx && pending(&cx.st.fx) {
        return Err(Exception::plain(Vector::MathFault));
    }
    masked_bytes(cx, insn)
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU, after the checks in which they differ.
pub(super) fn masked_bytes(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let mmx = insn.mnemonic() == M::Maskmovq;
    let mut fx = cx.st.fx;
    if mmx {
        // An MMX instruction: TOP is zero from now on, all registers valid.
        set_top(&mut fx, 0);
        fx.0[at::FTW] = 0xff;
    }
    let len = if mmx { 8 } else { 16 };
    let register = |op: u32| {
        let base = if mmx { at::ST } else { at::XMM };
        base + 16 * (insn.op_register(op).number() & if mmx { 7 } else { 15 })
    };
    let (data, mask) = (register(1), register(2));
    let rdi = cx.st.gpr[crate::state::gpr::RDI];
    let offset = match insn.op_kind(0) {
        OpKind::MemorySegEDI => rdi & 0xffff_ffff,
        OpKind::MemorySegDI => rdi & 0xffff,
        _ => rdi,
    };
    let to = cx.linear(super::segment_number(insn.memory_segment()), offset);
    // Outside 64-bit code, the type of the segment counts even if nothing is selected.
    if !cx.st.is_64_bit_code() && !segmentation::permits(&cx.st.seg[to.segment], true) {
        return Err(to.fault(Exception::gp(0)));
    }
    let stored: Vec<usize> = (0..len).filter(|&i| fx.0[mask + i] & 0x80 != 0).collect();
    for &i in &stored {
        let at = vector::element_at(cx, to, i, 1)?;
        cx.probe_bytes(at, 1)?;
    }
    for &i in &stored {
        let at = vector::element_at(cx, to, i, 1)?;
        cx.write_value(at, 1, fx.0[data + i] as u64)?;
    }
    cx.st.fx = fx;
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{USER, World};
    use super::*;
    use crate::state::gpr;
    use std::arch::asm;

    /// A world with an operand at RBX.
    fn world() -> World {
        let mut w = World::new();
        w.st.gpr[gpr::RBX] = USER;
        w
    }

    /// Runs one FPU instruction on the silicon with `fx` loaded and `memory` as operand; the FPU image after it.
    macro_rules! silicon {
        ($instruction:literal, $fx:expr, $memory:expr) => {{
            let (mut host, mut after) = (FxImage::RESET, FxImage::RESET);
            // SAFETY: the host's own FPU state is saved before and restored after; the operand is large enough.
            unsafe {
                asm!(
                    "fxsave64 [{host}]",
                    "fxrstor64 [{fx}]",
                    concat!($instruction, " [{memory}]"),
                    "fxsave64 [{after}]",
                    "fxrstor64 [{host}]",
                    host = in(reg) &raw mut host,
                    fx = in(reg) &raw const $fx,
                    memory = in(reg) $memory.as_mut_ptr(),
                    after = in(reg) &raw mut after,
                );
            }
            settle(&mut after);
            after
        }};
    }

    /// Images with all kinds of register contents, tops and tags, exceptions masked or pending.
    fn images() -> Vec<FxImage> {
        let registers: [(u64, u16); 8] = [
            (0, 0),
            (1 << 63, 0x3fff),
            (0xc000_0000_0000_0000, 0x7fff),
            (1 << 63, 0xffff),
            (5, 0),
            (0x7000_0000_0000_0000, 0x4000),
            (0xffff_ffff_ffff_ffff, 0xbffe),
            (0, 0x8000),
        ];
        let mut all = Vec::new();
        for top in 0..8u16 {
            for (ftw, fcw, flags) in
                [(0xffu8, 0x37f, 0u16), (0, 0x37f, 0x4100), (0x5a, 0xffff, 0x3f), (0x81, 0x340, 0x01), (0xe7, 0x27e, 0x22)]
            {
                let mut fx = FxImage::RESET;
                for (i, (mantissa, exponent)) in registers.into_iter().enumerate() {
                    fx.0[32 + 16 * i..][..8].copy_from_slice(&mantissa.to_le_bytes());
                    set_word(&mut fx.0, 40 + 16 * i, exponent);
                }
                set_word(&mut fx.0, at::FCW, fcw);
                set_word(&mut fx.0, at::FSW, flags | top << 11);
                fx.0[at::FTW] = ftw;
                fx.0[160..416].iter_mut().enumerate().for_each(|(i, b)| *b = i as u8);
                all.push(fx);
            }
        }
        all
    }

    #[test]
    fn settled_is_what_the_silicon_keeps() {
        for fx in images() {
            let mut settled = fx;
            settle(&mut settled);
            let mut nothing = [0u8; 4];
            // STMXCSR leaves the FPU alone: this shows what loading alone does.
            assert_eq!(settled, silicon!("stmxcsr", fx, nothing));
            let again = settled;
            settle(&mut settled);
            assert_eq!(again, settled);
        }
    }

    #[test]
    fn environments_are_the_silicons() {
        for mut fx in images() {
            settle(&mut fx);
            for (code, len) in
                [(&[0xd9u8, 0x33] as &[u8], 28), (&[0x66, 0xd9, 0x33], 14), (&[0xdd, 0x33], 108), (&[0x66, 0xdd, 0x33], 94)]
            {
                let mut w = world();
                w.st.fx = fx;
                assert_eq!(w.exec(code), Ok(Flow::Next));
                let mut memory = [0u8; 108];
                let after = match (len, code[0]) {
                    (28, _) => silicon!("fnstenv", fx, memory),
                    (14, _) => silicon!(".byte 0x66; fnstenv", fx, memory),
                    (108, _) => silicon!("fnsave", fx, memory),
                    _ => silicon!(".byte 0x66; fnsave", fx, memory),
                };
                assert_eq!(w.st.fx, after, "{len}");
                let mut mine = w.bytes(USER, len);
                // The silicon may keep pointers and selectors; here they are zero.
                let pointers = if len == 28 || len == 108 { 12..26 } else { 6..14 };
                assert!(mine[pointers.clone()].iter().all(|&b| b == 0));
                mine[pointers.clone()].copy_from_slice(&memory[pointers]);
                assert_eq!(mine, memory[..len], "{len}");
            }
        }
    }

    #[test]
    fn loading_is_the_silicons() {
        let all = images();
        for (i, fx) in all.iter().enumerate() {
            let (mut from, mut to) = (*fx, all[(i * 7 + 3) % all.len()]);
            settle(&mut from);
            settle(&mut to);
            if pending(&to) {
                let mut w = world();
                w.st.fx = to;
                assert_eq!(w.exec(&[0xd9, 0x23]), Err(Exception::plain(Vector::MathFault)));
                assert_eq!(w.exec(&[0xdd, 0x23]), Err(Exception::plain(Vector::MathFault)));
                continue;
            }
            let (env, _) = environment(&from, false);
            let mut w = world();
            w.st.fx = to;
            w.put_bytes(USER, &env);
            assert_eq!(w.exec(&[0xd9, 0x23]), Ok(Flow::Next));
            let mut memory = env;
            assert_eq!(w.st.fx, silicon!("fldenv", to, memory), "{i}");
            // FNSAVE, FRSTOR.
            let mut w = world();
            w.st.fx = from;
            assert_eq!(w.exec(&[0xdd, 0x33]), Ok(Flow::Next));
            let mut memory = w.bytes(USER, 108);
            w.st.fx = to;
            assert_eq!(w.exec(&[0xdd, 0x23]), Ok(Flow::Next));
            assert_eq!(w.st.fx, silicon!("frstor", to, memory), "{i}");
        }
    }

    #[test]
    fn fxsave_and_back() {
        let mut w = world();
        let mut fx = images()[7];
        settle(&mut fx);
        w.st.fx = fx;
        // What the host left in the constant fields does not get out.
        w.st.fx.0[6..24].fill(0xee);
        w.st.fx.0[30] = 2;
        w.put(USER + 464, u64::MAX);
        assert_eq!(w.exec(&[0x48, 0x0f, 0xae, 0x03]), Ok(Flow::Next));
        let image = w.bytes(USER, 512);
        assert!(image[6..24].iter().all(|&b| b == 0));
        assert_eq!(image[28..32], [0xff, 0xff, 0, 0]);
        assert_eq!(image[464..472], [0xff; 8]);
        w.st.fx = FxImage::RESET;
        w.put_bytes(USER + 8, &[9; 16]);
        assert_eq!(w.exec(&[0x48, 0x0f, 0xae, 0x0b]), Ok(Flow::Next));
        assert!(w.st.fx.0[5..24].iter().all(|&b| b == 0));
        assert_eq!(w.st.fx, fx);

        w.put_bytes(USER + 26, &[1]);
        assert_eq!(w.exec(&[0x0f, 0xae, 0x0b]), Err(Exception::gp(0)));
        w.st.gpr[gpr::RBX] += 8;
        assert_eq!(w.exec(&[0x0f, 0xae, 0x0b]), Err(Exception::gp(0)));
        assert_eq!(w.exec(&[0x0f, 0xae, 0x03]), Err(Exception::gp(0)));
        w.st.cr0 |= cr0::TS;
        assert_eq!(w.exec(&[0x0f, 0xae, 0x03]), Err(Exception::NM));
        assert_eq!(w.exec(&[0x0f, 0xae, 0x13]), Err(Exception::NM));
    }

    #[test]
    fn mxcsr() {
        let mut w = world();
        w.put(USER, 0xffff);
        assert_eq!(w.exec(&[0x0f, 0xae, 0x13]), Ok(Flow::Next));
        assert_eq!(w.st.fx.0[24..28], [0xff, 0xff, 0, 0]);
        w.put(USER, 0x2_1f80);
        assert_eq!(w.exec(&[0x0f, 0xae, 0x13]), Err(Exception::gp(0)));
        w.st.cr4 &= !cr4::OSFXSR;
        assert_eq!(w.exec(&[0x0f, 0xae, 0x13]), Err(Exception::UD));
    }

    #[test]
    fn masked_moves() {
        let mut w = world();
        w.st.gpr[gpr::RDI] = USER + 0xff8;
        for i in 0..16 {
            w.st.fx.0[at::XMM + i] = i as u8 + 1;
            // XMM9 is the mask: every other byte.
            w.st.fx.0[at::XMM + 9 * 16 + i] = if i % 2 == 0 { 0x80 } else { 0x7f };
        }
        assert_eq!(w.exec(&[0x66, 0x41, 0x0f, 0xf7, 0xc1]), Ok(Flow::Next));
        assert_eq!(w.bytes(USER + 0xff8, 16), [1, 0, 3, 0, 5, 0, 7, 0, 9, 0, 11, 0, 13, 0, 15, 0]);
        w.unmap(USER + 0x1000);
        let fault = Exception::pf(2, USER + 0x1000);
        assert_eq!(w.exec(&[0x66, 0x41, 0x0f, 0xf7, 0xc1]), Err(fault));
        // MASKMOVQ mm0, mm1 makes the stack an MMX one.
        let mut w = world();
        w.st.gpr[gpr::RDI] = USER;
        set_word(&mut w.st.fx.0, at::FSW, 3 << 11);
        // MM0 is ST5 and MM1 is ST6 with TOP 3.
        w.st.fx.0[at::ST + 5 * 16..][..8].fill(7);
        w.st.fx.0[at::ST + 6 * 16] = 0x80;
        assert_eq!(w.exec(&[0x0f, 0xf7, 0xc1]), Ok(Flow::Next));
        assert_eq!(w.get(USER), 7);
        assert_eq!((top(&w.st.fx), w.st.fx.0[at::FTW], w.st.fx.0[at::ST]), (0, 0xff, 7));
    }
}
