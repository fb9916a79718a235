//! Encodings: which forms of an instruction mean the same on other operands.
//!
//! **In:** an encoding. **Out:** the one to use where an operand lives elsewhere than the guest says. Invariant: flags and results are the same.
use super::{full_number, in_frame, is_high_byte};
use iced_x86::{Code, Instruction, OpKind};

/// The form of ADD, SUB, CMP or TEST whose memory operand is a register.
pub(super) fn register_form(code: Code) -> Option<Code> {
    use Code::*;
    // Operands r/m may be either; the direction stays.
    matches!(
        code,
        Add_r8_rm8
            | Add_r16_rm16
            | Add_r32_rm32
            | Add_r64_rm64
            | Sub_r8_rm8
            | Sub_r16_rm16
            | Sub_r32_rm32
            | Sub_r64_rm64
            | Cmp_r8_rm8
            | Cmp_r16_rm16
            | Cmp_r32_rm32
            | Cmp_r64_rm64
            | Cmp_rm8_r8
            | Cmp_rm16_r16
            | Cmp_rm32_r32
            | Cmp_rm64_r64
            | Cmp_rm8_imm8
            | Cmp_rm16_imm16
            | Cmp_rm32_imm32
            | Cmp_rm64_imm32
            | Cmp_rm16_imm8
            | Cmp_rm32_imm8
            | Cmp_rm64_imm8
            | Test_rm8_r8
            | Test_rm16_r16
            | Test_rm32_r32
            | Test_rm64_r64
            | Test_rm8_imm8
            | Test_rm16_imm16
            | Test_rm32_imm32
            | Test_rm64_imm32
            | Test_rm8_imm8_F6r1
            | Test_rm16_imm16_F7r1
            | Test_rm32_imm32_F7r1
            | Test_rm64_imm32_F7r1
    )
    .then_some(code)
}

/// Whether [`super::flags::Recipe::Carried`] can be had of an ADC or SBB without a memory operand.
pub(super) fn carries(insn: &Instruction) -> bool {
    let general = !matches!(
        insn.code(),
        Code::Adc_AL_imm8
            | Code::Adc_AX_imm16
            | Code::Adc_EAX_imm32
            | Code::Adc_RAX_imm32
            | Code::Sbb_AL_imm8
            | Code::Sbb_AX_imm16
            | Code::Sbb_EAX_imm32
            | Code::Sbb_RAX_imm32
    );
    let other = match insn.op1_kind() {
        OpKind::Register => {
            let (dest, other) = (full_number(insn.op0_register()), full_number(insn.op1_register()));
            dest != other && !is_high_byte(insn.op1_register()) && !other.is_none_or(in_frame)
        }
        _ => true,
    };
    general && other
}

/// The form of a comparison of the accumulator with a constant that takes any register.
pub(super) fn general_form(code: Code) -> Code {
    match code {
        Code::Cmp_AL_imm8 => Code::Cmp_rm8_imm8,
        Code::Cmp_AX_imm16 => Code::Cmp_rm16_imm16,
        Code::Cmp_EAX_imm32 => Code::Cmp_rm32_imm32,
        Code::Cmp_RAX_imm32 => Code::Cmp_rm64_imm32,
        Code::Test_AL_imm8 => Code::Test_rm8_imm8,
        Code::Test_AX_imm16 => Code::Test_rm16_imm16,
        Code::Test_EAX_imm32 => Code::Test_rm32_imm32,
        Code::Test_RAX_imm32 => Code::Test_rm64_imm32,
        other => other,
    }
}

/// The other encoding of an instruction on two registers, and whether that is the one whose first operand may be memory (or else the second).
pub(super) fn other_direction(code: Code) -> Option<(Code, bool)> {
    use Code::*;
    Some(match code {
        Mov_rm8_r8 => (Mov_r8_rm8, false),
        Mov_r8_rm8 => (Mov_rm8_r8, true),
        Mov_rm16_r16 => (Mov_r16_rm16, false),
        Mov_r16_rm16 => (Mov_rm16_r16, true),
        Mov_rm32_r32 => (Mov_r32_rm32, false),
        Mov_r32_rm32 => (Mov_rm32_r32, true),
        Mov_rm64_r64 => (Mov_r64_rm64, false),
        Mov_r64_rm64 => (Mov_rm64_r64, true),
        Add_rm8_r8 => (Add_r8_rm8, false),
        Add_r8_rm8 => (Add_rm8_r8, true),
        Add_rm16_r16 => (Add_r16_rm16, false),
        Add_r16_rm16 => (Add_rm16_r16, true),
        Add_rm32_r32 => (Add_r32_rm32, false),
        Add_r32_rm32 => (Add_rm32_r32, true),
        Add_rm64_r64 => (Add_r64_rm64, false),
        Add_r64_rm64 => (Add_rm64_r64, true),
        Or_rm8_r8 => (Or_r8_rm8, false),
        Or_r8_rm8 => (Or_rm8_r8, true),
        Or_rm16_r16 => (Or_r16_rm16, false),
        Or_r16_rm16 => (Or_rm16_r16, true),
        Or_rm32_r32 => (Or_r32_rm32, false),
        Or_r32_rm32 => (Or_rm32_r32, true),
        Or_rm64_r64 => (Or_r64_rm64, false),
        Or_r64_rm64 => (Or_rm64_r64, true),
        Adc_rm8_r8 => (Adc_r8_rm8, false),
        Adc_r8_rm8 => (Adc_rm8_r8, true),
        Adc_rm16_r16 => (Adc_r16_rm16, false),
        Adc_r16_rm16 => (Adc_rm16_r16, true),
        Adc_rm32_r32 => (Adc_r32_rm32, false),
        Adc_r32_rm32 => (Adc_rm32_r32, true),
        Adc_rm64_r64 => (Adc_r64_rm64, false),
        Adc_r64_rm64 => (Adc_rm64_r64, true),
        Sbb_rm8_r8 => (Sbb_r8_rm8, false),
        Sbb_r8_rm8 => (Sbb_rm8_r8, true),
        Sbb_rm16_r16 => (Sbb_r16_rm16, false),
        Sbb_r16_rm16 => (Sbb_rm16_r16, true),
        Sbb_rm32_r32 => (Sbb_r32_rm32, false),
        Sbb_r32_rm32 => (Sbb_rm32_r32, true),
        Sbb_rm64_r64 => (Sbb_r64_rm64, false),
        Sbb_r64_rm64 => (Sbb_rm64_r64, true),
        And_rm8_r8 => (And_r8_rm8, false),
        And_r8_rm8 => (And_rm8_r8, true),
        And_rm16_r16 => (And_r16_rm16, false),
        And_r16_rm16 => (And_rm16_r16, true),
        And_rm32_r32 => (And_r32_rm32, false),
        And_r32_rm32 => (And_rm32_r32, true),
        And_rm64_r64 => (And_r64_rm64, false),
        And_r64_rm64 => (And_rm64_r64, true),
        Sub_rm8_r8 => (Sub_r8_rm8, false),
        Sub_r8_rm8 => (Sub_rm8_r8, true),
        Sub_rm16_r16 => (Sub_r16_rm16, false),
        Sub_r16_rm16 => (Sub_rm16_r16, true),
        Sub_rm32_r32 => (Sub_r32_rm32, false),
        Sub_r32_rm32 => (Sub_rm32_r32, true),
        Sub_rm64_r64 => (Sub_r64_rm64, false),
        Sub_r64_rm64 => (Sub_rm64_r64, true),
        Xor_rm8_r8 => (Xor_r8_rm8, false),
        Xor_r8_rm8 => (Xor_rm8_r8, true),
        Xor_rm16_r16 => (Xor_r16_rm16, false),
        Xor_r16_rm16 => (Xor_rm16_r16, true),
        Xor_rm32_r32 => (Xor_r32_rm32, false),
        Xor_r32_rm32 => (Xor_rm32_r32, true),
        Xor_rm64_r64 => (Xor_r64_rm64, false),
        Xor_r64_rm64 => (Xor_rm64_r64, true),
        Cmp_rm8_r8 => (Cmp_r8_rm8, false),
        Cmp_r8_rm8 => (Cmp_rm8_r8, true),
        Cmp_rm16_r16 => (Cmp_r16_rm16, false),
        Cmp_r16_rm16 => (Cmp_rm16_r16, true),
        Cmp_rm32_r32 => (Cmp_r32_rm32, false),
        Cmp_r32_rm32 => (Cmp_rm32_r32, true),
        Cmp_rm64_r64 => (Cmp_r64_rm64, false),
        Cmp_r64_rm64 => (Cmp_rm64_r64, true),
        _ => return None,
    })
}
