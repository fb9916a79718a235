//! Which instructions exist: those of the CPU models, whatever the host's silicon could do.
//!
//! **In:** a decoded instruction. **Out:** whether the guest may have it; everything else is #UD, so that two hosts agree.
//!
//! **Invariant:** agrees with the feature bits of CPUID ([`crate::CpuModel`]), with these exceptions, which are no-operations or
//! plain encodings on a processor without the feature: ENDBR, RDSSP, CLDEMOTE and prefetches (they live in the hint space), TZCNT
//! and LZCNT (BSF and BSR with an ignored prefix: the translator decodes them as such).
use iced_x86::{CpuidFeature as F, Instruction, Mnemonic as M};

/// Whether the models have this instruction.
pub(super) fn exists(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        // These come under features that are offered, but are not.
        M::Rdpmc | M::Ud0 | M::Ud1 | M::Ud2 | M::Rsm | M::INVALID => return false,
        // Hint space.
        M::Rdsspd | M::Rdsspq | M::Endbr32 | M::Endbr64 | M::Cldemote | M::Prefetchw | M::Prefetchwt1 => return true,
        M::Prefetch | M::Tzcnt | M::Lzcnt => return true,
        // WBINVD with an ignored prefix.
        M::Wbnoinvd => return true,
        _ => {}
    }
    insn.cpuid_features().iter().all(|f| {
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
    use super::M;
    use iced_x86::{Code, Instruction, OpCodeOperandKind};

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
        for insn in every_instruction() {
            if handles(&insn) {
                continue;
            }
            passed += 1;
            let info = insn.op_code();
            // Of images of the FPU, only those without pointers: STMXCSR is one of the save instructions, too.
            let image = info.is_save_restore() && insn.mnemonic() != M::Stmxcsr;
            assert!(info.cpl3() && !info.is_privileged() && !info.is_input_output() && !image, "{insn:?}");
            assert!(!insn.is_string_instruction(), "{insn:?}");
        }
        assert!(passed > 500);
    }
}
