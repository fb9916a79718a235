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
