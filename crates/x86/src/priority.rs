//! Which exception counts if an instruction has reason for several.
//!
//! **In:** an instruction that the silicon executes, and the exception its memory operand raised in the engine's own walk. **Out:** the
//! exception the silicon would have raised. (What the silicon finds itself needs no help.)
//!
//! The order is that of the silicon (tests/silicon): a pending x87 exception before anything, a misaligned operand before its page (but
//! for the SHA instructions, whose page comes first);
//! and an address that is not canonical is #SS where the segment is SS.
use crate::exception::Vector;
use crate::mmu::canonical;
use crate::state::gpr;
use crate::{CpuState, Exception};
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// The exception that counts. `ea` is the address that could not be accessed, `pending` whether an unmasked x87 exception is.
pub fn resolve(insn: &Instruction, st: &CpuState, ea: u64, pending: bool, raised: Exception) -> Exception {
    if pending && waits(insn) {
        return Exception::plain(Vector::MathFault);
    }
    if !ea.is_multiple_of(alignment(insn)) {
        return Exception::gp(0);
    }
    // Outside 64-bit code the check of the segment has said which it is.
    if st.is_64_bit_code() && raised == Exception::gp(0) && in_stack_segment(insn, st, ea) {
        return Exception::ss(0);
    }
    raised
}

/// Whether an instruction is a near branch to an address the guest computed. If that is not canonical, the branch faults, not
/// what would be there.
pub fn branches_anywhere(insn: &Instruction) -> bool {
    insn.is_jmp_near_indirect() || insn.is_call_near_indirect() || insn.mnemonic() == Mnemonic::Ret
}

/// Whether an instruction first looks for a pending x87 exception: x87 and MMX, but for the control instructions without WAIT.
pub fn waits(insn: &Instruction) -> bool {
    if matches!(
        insn.mnemonic(),
        Mnemonic::Fnstcw | Mnemonic::Fnstsw | Mnemonic::Fnstenv | Mnemonic::Fnsave | Mnemonic::Fninit | Mnemonic::Fnclex
    ) {
        return false;
    }
    let mmx = |i: u32| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm();
    let x87 = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387);
    (0..insn.op_count()).any(mmx) || insn.cpuid_features().iter().any(x87)
}

/// What the memory operand must be aligned to.
fn alignment(insn: &Instruction) -> u64 {
    if insn.code() == Code::Cmpxchg16b_m128 {
        return 16;
    }
    let size = insn.memory_size().size() as u64;
    // Encoded with VEX, only the moves that say so care (SDM vol. 1 section 14.9).
    if insn.code().encoding() == EncodingKind::VEX {
        let aligned = matches!(
            insn.mnemonic(),
            Mnemonic::Vmovaps
                | Mnemonic::Vmovapd
                | Mnemonic::Vmovdqa
                | Mnemonic::Vmovntps
                | Mnemonic::Vmovntpd
                | Mnemonic::Vmovntdq
                | Mnemonic::Vmovntdqa
        );
        return if aligned { size } else { 1 };
    }
    let anywhere = matches!(
        insn.mnemonic(),
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm64
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    ) || insn.cpuid_features().contains(&CpuidFeature::SHA);
    let vector = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) && size == 16;
    if vector && !anywhere { 16 } else { 1 }
}

/// Whether the access at `ea` was one through SS.
fn in_stack_segment(insn: &Instruction, st: &CpuState, ea: u64) -> bool {
    let operand = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    // Prefixes that name SS or DS are ignored in 64-bit code.
    if operand && !matches!(insn.segment_prefix(), Register::FS | Register::GS) && is_stack_pointer(insn.memory_base()) {
        return true;
    }
    let pointer = if insn.mnemonic() == Mnemonic::Leave { st.gpr[gpr::RBP] } else { st.gpr[gpr::RSP] };
    insn.is_stack_instruction() && !canonical(pointer) && ea.wrapping_sub(pointer).wrapping_add(16) <= 32
}

/// Whether an address with this base is in SS by default.
fn is_stack_pointer(base: Register) -> bool {
    matches!(base, Register::RSP | Register::ESP | Register::RBP | Register::EBP)
}
