//! What kind of work an instruction is. One place decides it, for blocks of one and of many instructions alike.
use crate::sys;
use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic};

/// How an instruction is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Raises #UD: not an instruction. (Those the CPU model lacks are refused by `sys`.)
    Invalid,
    /// Raises #NM: needs the FPU, which is switched off.
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

/// Whether executing the instruction needs a working FPU (CR0.TS and CR0.EM clear).
pub fn needs_fpu(insn: &Instruction) -> bool {
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
        return false;
    }
    insn.cpuid_features()
        .iter()
        .any(|f| matches!(f, FPU | FPU287 | FPU387 | MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | FXSR))
}

/// Decides. `fpu_off` is CR0.TS or CR0.EM.
pub fn classify(insn: &Instruction, fpu_off: bool) -> Kind {
    if insn.is_invalid() {
        return Kind::Invalid;
    }
    if fpu_off && needs_fpu(insn) {
        return Kind::NoFpu;
    }
    if sys::handles(insn) {
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
