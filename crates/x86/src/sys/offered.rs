//! Which instructions exist: those of the CPU models, whatever the host's silicon could do.
//!
//! **In:** a decoded instruction and the model's features. **Out:** whether the guest may have it; everything else is #UD, so that two hosts
//! agree.
//!
//! **Invariant:** agrees with the feature bits of CPUID ([`crate::CpuModel`]), with these exceptions, which are no-operations or
//! plain encodings on a processor without the feature: ENDBR, RDSSP, CLDEMOTE and prefetches (they live in the hint space), TZCNT
//! and LZCNT (BSF and BSR with an ignored prefix: the translator decodes them as such for a model without them).
use crate::Features;
use iced_x86::{CpuidFeature as F, Instruction, Mnemonic as M};

/// The model's feature that a feature of the decoder's belongs to, if there is one.
fn feature(f: F) -> Option<Features> {
    Some(match f {
        F::ADX => Features::ADX,
        F::AES => Features::AES,
        F::AVX => Features::AVX,
        F::AVX2 => Features::AVX2,
        F::BMI1 => Features::BMI1,
        F::BMI2 => Features::BMI2,
        F::F16C => Features::F16C,
        F::FMA => Features::FMA,
        F::GFNI => Features::GFNI,
        F::LZCNT => Features::LZCNT,
        F::MOVBE => Features::MOVBE,
        F::PCLMULQDQ => Features::PCLMULQDQ,
        F::SHA => Features::SHA,
        F::VAES => Features::VAES,
        F::VPCLMULQDQ => Features::VPCLMULQDQ,
        F::XSAVE | F::XSAVEOPT | F::XSAVEC => Features::XSAVE,
        _ => return None,
    })
}

/// Whether a model with these features has this instruction.
pub(super) fn exists(insn: &Instruction, features: Features) -> bool {
    match insn.mnemonic() {
        // These come under features that are offered, but are not.
        M::Rdpmc | M::Ud0 | M::Ud1 | M::Ud2 | M::Rsm | M::INVALID => return false,
        // Hint space.
        M::Rdsspd | M::Rdsspq | M::Endbr32 | M::Endbr64 | M::Cldemote | M::Prefetchw | M::Prefetchwt1 => return true,
        M::Prefetch => return true,
        // WBINVD with an ignored prefix.
        M::Wbnoinvd => return true,
        _ => {}
    }
    insn.cpuid_features().iter().all(|&f| {
        if let Some(feature) = feature(f) {
            return features.has(feature);
        }
        matches!(
            f,
            F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::CMOV
                | F::CPUID
                | F::CX8
                | F::CMPXCHG16B
                | F::CLFSH
                | F::FXSR
                | F::INVPCID
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::POPCNT
                | F::MSR
                | F::TSC
                | F::RDTSCP
                | F::SEP
                | F::SYSCALL
                | F::MULTIBYTENOP
                | F::PAUSE
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::handles;
    use super::{M, exists};
    use crate::Features;
    use iced_x86::{Code, EncodingKind, Instruction, OpCodeOperandKind};

    /// One instruction of every encoding there is in 64-bit mode, register operands filled in where they decide.
    fn every_instruction() -> impl Iterator<Item = Instruction> {
        Code::values().filter(|c| c.op_code().mode64() && !matches!(c, Code::INVALID)).map(|code| {
            let mut insn = Instruction::default();
            insn.set_code(code);
            for op in 0..code.op_code().op_count() {
                let register = match code.op_code().op_kind(op) {
                    OpCodeOperandKind::seg_reg => iced_x86::Register::DS,
                    OpCodeOperandKind::cr_reg => iced_x86::Register::CR0,
                    OpCodeOperandKind::dr_reg => iced_x86::Register::DR0,
                    OpCodeOperandKind::es => iced_x86::Register::ES,
                    OpCodeOperandKind::cs => iced_x86::Register::CS,
                    OpCodeOperandKind::ss => iced_x86::Register::SS,
                    OpCodeOperandKind::ds => iced_x86::Register::DS,
                    OpCodeOperandKind::fs => iced_x86::Register::FS,
                    OpCodeOperandKind::gs => iced_x86::Register::GS,
                    _ => continue,
                };
                insn.set_op_register(op, register);
            }
            insn
        })
    }

    /// What iced knows to be privileged, serialising, about tables, ports or interrupts never reaches the silicon.
    #[test]
    fn nothing_privileged_reaches_the_silicon() {
        let mut passed = 0;
        let all = Features::V3.with(Features::OPTIONAL);
        for insn in every_instruction() {
            if handles(&insn, all) {
                continue;
            }
            passed += 1;
            let info = insn.op_code();
            // Of images of the FPU, only those without pointers: STMXCSR is one of the save instructions, too.
            let image = info.is_save_restore() && !matches!(insn.mnemonic(), M::Stmxcsr | M::Vstmxcsr);
            assert!(info.cpl3() && !info.is_privileged() && !info.is_input_output() && !image, "{insn:?}");
            assert!(!insn.is_string_instruction(), "{insn:?}");
        }
        assert!(passed > 1000);
    }

    /// Every feature brings instructions, and none without it.
    #[test]
    fn features_bring_their_instructions() {
        let all = Features::V3.with(Features::OPTIONAL);
        let count = |set| every_instruction().filter(|insn| exists(insn, set)).count();
        let most = count(all);
        for name in all.names() {
            let without = all.without(Features::by_name(name).expect("its name"));
            assert!(count(without) < most, "{name}");
        }
        assert!(every_instruction().all(|insn| insn.op_code().encoding() != EncodingKind::VEX || !exists(&insn, Features::NONE)));
    }
}
