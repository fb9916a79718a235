//! What kind of work an instruction is. One place decides it, for blocks of one and of many instructions alike.
use crate::translate::Mode;
use crate::{Features, sys};
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic};
use std::sync::OnceLock;

/// How an instruction is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Raises #UD: not an instruction, or one whose unit is switched off. (Those the CPU model lacks are refused by `sys`.)
    Invalid,
    /// Raises #NM: needs the FPU, which is switched off (or belongs to somebody else).
    NoFpu,
    /// Executed by module `sys`.
    Sys,
    /// Retires and does nothing.
    Nop,
    /// Near jump, call or return.
    Branch,
    /// CLD or STD.
    Direction,
    /// Executed by the silicon, with its operands rewritten.
    Silicon,
}

/// Whose switches decide whether an instruction may run (SDM vol. 3 section 2.5, vol. 2 section 2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Nobody's: integer instructions, BMI among them, and XSAVE, which looks at the switches itself.
    Integer,
    /// CR0.EM and CR0.TS give #NM. FXSAVE belongs here.
    X87,
    /// CR0.EM gives #UD, CR0.TS #NM: MMX and SSE.
    Sse,
    /// Off in CR4.OSXSAVE or XCR0 gives #UD, CR0.TS #NM: VEX-encoded vector instructions.
    Avx,
}

/// The unit an instruction belongs to.
pub fn unit(insn: &Instruction) -> Unit {
    kept(insn).0
}

/// What the code alone of an instruction says: its unit, and what `sys` needs of the FPU to execute it. Asked for at every turn, so the answers
/// are kept.
fn kept(insn: &Instruction) -> (Unit, Image) {
    static KEPT: OnceLock<Box<[(Unit, Image)]>> = OnceLock::new();
    let all = KEPT.get_or_init(|| {
        Code::values()
            .map(|code| {
                let mut insn = Instruction::default();
                insn.set_code(code);
                (find_unit(&insn), find_image(&insn))
            })
            .collect()
    });
    all[insn.code() as usize]
}

fn find_unit(insn: &Instruction) -> Unit {
    use CpuidFeature::*;
    if matches!(
        insn.mnemonic(),
        Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Sfence
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Movnti
            | Mnemonic::Crc32
            | Mnemonic::Popcnt
            | Mnemonic::Clflush
            | Mnemonic::Pause
    ) {
        return Unit::Integer;
    }
    let features = insn.cpuid_features();
    if insn.code().encoding() == EncodingKind::VEX {
        return if features.iter().any(|f| matches!(f, BMI1 | BMI2)) { Unit::Integer } else { Unit::Avx };
    }
    if features.iter().any(|f| matches!(f, FPU | FPU287 | FPU387 | FXSR)) {
        return Unit::X87;
    }
    let sse = |f: &CpuidFeature| matches!(f, MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ | SHA | GFNI);
    if features.iter().any(sse) { Unit::Sse } else { Unit::Integer }
}

/// What of `st.fx` and `st.ymm_high` has to be current around an instruction of `sys`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// Nothing.
    None,
    /// The XMM and YMM registers.
    Vectors,
    /// All of it.
    All,
}

/// What `sys` needs of the FPU to execute the instruction.
pub fn image(insn: &Instruction) -> Image {
    kept(insn).1
}

fn find_image(insn: &Instruction) -> Image {
    match find_unit(insn) {
        Unit::Avx => Image::Vectors,
        Unit::X87 | Unit::Sse => Image::All,
        Unit::Integer => {
            let xsave = |f: &CpuidFeature| matches!(f, CpuidFeature::XSAVE | CpuidFeature::XSAVEOPT | CpuidFeature::XSAVEC);
            if insn.cpuid_features().iter().any(xsave) { Image::All } else { Image::None }
        }
    }
}

/// Decides, for a model with these features.
pub fn classify(insn: &Instruction, mode: Mode, features: Features) -> Kind {
    if insn.is_invalid() {
        return Kind::Invalid;
    }
    match unit(insn) {
        Unit::X87 if mode.has(Mode::TS | Mode::EM) => return Kind::NoFpu,
        Unit::Sse if mode.has(Mode::EM) => return Kind::Invalid,
        Unit::Avx if !mode.has(Mode::AVX) => return Kind::Invalid,
        Unit::Sse | Unit::Avx if mode.has(Mode::TS) => return Kind::NoFpu,
        _ => {}
    }
    if sys::handles(insn, features) {
        return Kind::Sys;
    }
    match insn.mnemonic() {
        Mnemonic::Nop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Pause
        | Mnemonic::Lfence
        | Mnemonic::Mfence
        | Mnemonic::Sfence
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Reservednop => Kind::Nop,
        Mnemonic::Cld | Mnemonic::Std => Kind::Direction,
        _ if is_near_branch(insn) => Kind::Branch,
        // Everything that touches what the host must not run for a guest has to be in `sys`.
        _ if insn.is_privileged() || matches!(insn.code(), Code::Ud2) => Kind::Invalid,
        _ => Kind::Silicon,
    }
}

fn is_near_branch(insn: &Instruction) -> bool {
    insn.is_jcc_short_or_near()
        || insn.is_jmp_short_or_near()
        || insn.is_call_near()
        || insn.is_jmp_near_indirect()
        || insn.is_call_near_indirect()
        || insn.is_loop()
        || insn.is_loopcc()
        || insn.is_jcx_short()
        || insn.mnemonic() == Mnemonic::Ret
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::decode;

    fn kind(code: &[u8], mode: u16) -> Kind {
        let features = Features::V3.with(Features::OPTIONAL);
        classify(&decode(code, 0, Mode(mode), features), Mode(mode), features)
    }

    /// Which switch gives which exception.
    #[test]
    fn switches() {
        const X87: &[u8] = &[0xd9, 0xe8];
        const MMX: &[u8] = &[0x0f, 0xef, 0xc0];
        const SSE: &[u8] = &[0x66, 0x0f, 0xef, 0xc0];
        const AES: &[u8] = &[0x66, 0x0f, 0x38, 0xdc, 0xc1];
        const VPXOR: &[u8] = &[0xc5, 0xf9, 0xef, 0xc0];
        const VZEROUPPER: &[u8] = &[0xc5, 0xf8, 0x77];
        const VAESENC: &[u8] = &[0xc4, 0xe2, 0x75, 0xdc, 0xc1];
        const ANDN: &[u8] = &[0xc4, 0xe2, 0x70, 0xf2, 0xc0];
        const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];
        use Kind::*;
        for (code, none, ts, em, both) in [
            (X87, Silicon, NoFpu, NoFpu, NoFpu),
            (MMX, Silicon, NoFpu, Invalid, Invalid),
            (SSE, Silicon, NoFpu, Invalid, Invalid),
            (AES, Silicon, NoFpu, Invalid, Invalid),
            (VPXOR, Silicon, NoFpu, Silicon, NoFpu),
            (VZEROUPPER, Silicon, NoFpu, Silicon, NoFpu),
            (VAESENC, Silicon, NoFpu, Silicon, NoFpu),
            (ANDN, Silicon, Silicon, Silicon, Silicon),
            (XSAVE, Sys, Sys, Sys, Sys),
        ] {
            let avx = Mode::AVX;
            let found = [avx, avx | Mode::TS, avx | Mode::EM, avx | Mode::TS | Mode::EM].map(|mode| kind(code, mode));
            assert_eq!(found, [none, ts, em, both], "{code:x?}");
        }
        for (code, off) in [(VPXOR, Invalid), (VZEROUPPER, Invalid), (VAESENC, Invalid), (ANDN, Silicon), (SSE, Silicon)] {
            assert_eq!(kind(code, 0), off, "{code:x?}");
        }
        // No feature, no instruction.
        for code in [AES, ANDN, XSAVE] {
            assert_eq!(
                classify(&decode(code, 0, Mode(Mode::AVX), Features::NONE), Mode(Mode::AVX), Features::NONE),
                Sys,
                "{code:x?}"
            );
        }
    }

    /// LOCK, 66, F2, F3 and REX before VEX are no instruction (SDM vol. 2 section 2.3.2).
    #[test]
    fn prefixes_before_vex() {
        for prefix in [0xf0, 0x66, 0xf2, 0xf3, 0x40, 0x48] {
            for code in [&[0xc5, 0xf9, 0xef, 0xc0][..], &[0xc4, 0xe2, 0x70, 0xf2, 0xc0]] {
                assert_eq!(kind(&[&[prefix], code].concat(), Mode::AVX), Kind::Invalid, "{prefix:x} {code:x?}");
            }
        }
        // Segments and the address size are fine.
        for prefix in [0x64, 0x67, 0x2e] {
            assert_eq!(kind(&[prefix, 0xc5, 0xf9, 0xef, 0x00], Mode::AVX), Kind::Silicon);
        }
    }

    /// A model decodes as its hardware did.
    #[test]
    fn trailing_zeros() {
        for (code, old, new) in [
            (&[0xf3, 0x0f, 0xbc, 0xc1], Mnemonic::Bsf, Mnemonic::Tzcnt),
            (&[0xf3, 0x0f, 0xbd, 0xc1], Mnemonic::Bsr, Mnemonic::Lzcnt),
        ] {
            assert_eq!(decode(code, 0, Mode(0), Features::NONE).mnemonic(), old);
            assert_eq!(decode(code, 0, Mode(0), Features::V3).mnemonic(), new);
        }
    }
}
