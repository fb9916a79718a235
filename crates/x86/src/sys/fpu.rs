//! Images of the FPU in guest memory: FXSAVE, FXRSTOR, FNSTENV, FNSAVE, FLDENV, FRSTOR; LDMXCSR; MASKMOVQ and MASKMOVDQU.
//!
//! **In:** `st.fx`, which the engine keeps current around these instructions. **Out:** memory, or a new `st.fx`.
//!
//! **Invariant:** FIP, FDP and FOP (and the selectors beside them) are zero in every image and in `st.fx`; MXCSR has no reserved bit
//! set; what `st.fx` holds is what the silicon would hold after loading it. So an image never tells where the host keeps the guest's code, nor which
//! maker's silicon it ran on.
//!
//! References: APM vol. 3 and 5 (instruction pages), SDM vol. 1 sections 8.1.10 (environment), 10.5 (FXSAVE area).
use super::{Cx, Ea, Flow};
use crate::Exception;
use crate::exception::Vector;
use crate::state::{FxImage, cr0, cr4};
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

/// MXCSR bits that exist; also what the images say in MXCSR_MASK.
pub(crate) const MXCSR_MASK: u32 = 0xffff;
/// Bytes of an FXSAVE image that are written; the rest is the guest's.
const FX_WRITTEN: usize = 464;

/// Byte offsets in the FXSAVE image.
mod at {
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
    if ea.va % 16 != 0 { Err(Exception::gp(0)) } else { Ok(ea) }
}

fn ldmxcsr(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if cx.st.cr0 & cr0::EM != 0 || cx.st.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::UD);
    }
    if cx.st.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
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
    let user = cx.user();
    let stored: Vec<usize> = (0..len).filter(|&i| fx.0[mask + i] & 0x80 != 0).collect();
    for &i in &stored {
        cx.mmu.probe_write(cx.st, to.va.wrapping_add(i as u64), 1, user)?;
    }
    for &i in &stored {
        let at = Ea { va: to.va.wrapping_add(i as u64), ..to };
        cx.write_value(at, 1, fx.0[data + i] as u64)?;
    }
    cx.st.fx = fx;
    Ok(Flow::Next)
}
