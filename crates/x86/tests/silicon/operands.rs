//! Random operands: registers, immediates, and memory operands that reach the windows in every way of addressing.
use crate::case::Item;
use crate::generate::{Builder, Kind, Pin};
use crate::layout::{DATA, DATA_BYTES, DATA_HIGH, PAGE, STACK, STACK_PAGES};
use crate::prng::Rng;
use crate::segments;
use iced_x86::{Code, EncodingKind, Instruction, MemorySize, OpCodeOperandKind as Op, OpKind, Register};

/// The 64-bit general register number `n`.
pub fn gpr(n: usize) -> Register {
    Register::RAX + n as u32
}

/// The number of the general register `register` is part of.
pub fn gpr_number(register: Register) -> Option<usize> {
    let full = register.full_register();
    full.is_gpr64().then(|| full.number())
}

/// The low `bits` of register number `n`.
pub fn gpr_part(n: usize, bits: u32) -> Register {
    match bits {
        16 => Register::AX + n as u32,
        32 => Register::EAX + n as u32,
        _ => Register::RAX + n as u32,
    }
}

/// A memory operand that was chosen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// Its address, if known for sure.
    pub address: Option<u64>,
}

impl Builder<'_> {
    /// An instruction of form `code` with random operands. `None`: try again.
    pub fn instruction(&mut self, code: Code) -> Option<(Item, Memory)> {
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let info = code.op_code();
        let mut memory = Memory::default();
        for i in 0..info.op_count() {
            self.operand(&mut instruction, i, info.op_kind(i), &mut memory)?;
        }
        let locks = info.can_use_lock_prefix() && instruction.op0_kind() == OpKind::Memory;
        if locks && self.rng.chance(30) {
            instruction.set_has_lock_prefix(true);
        }
        let prefix = if self.rng.chance(3) && instruction.segment_prefix() == Register::None {
            Some(self.rng.pick(&[0x26, 0x2e, 0x36, 0x3e]))
        } else {
            None
        };
        Some((Item { instruction, prefix, target: None, glued: false, patches: None }, memory))
    }

    fn random_gpr(&mut self) -> usize {
        let n = self.rng.below(self.registers()) as usize;
        let others: &[usize] = if self.narrow { &[0, 3, 6] } else { &[0, 3, 10, 11, 15] };
        if n == 4 && !self.rng.chance(10) { self.rng.pick(others) } else { n }
    }

    fn byte_register(&mut self) -> Register {
        if self.narrow {
            Register::AL + self.rng.below(8) as u32
        } else if self.rng.chance(25) {
            Register::AH + self.rng.below(4) as u32
        } else {
            [
                Register::AL,
                Register::CL,
                Register::DL,
                Register::BL,
                Register::SPL,
                Register::BPL,
                Register::SIL,
                Register::DIL,
                Register::R8L,
                Register::R9L,
                Register::R10L,
                Register::R11L,
                Register::R12L,
                Register::R13L,
                Register::R14L,
                Register::R15L,
            ][self.random_gpr()]
        }
    }

    /// A register for the bit offset of BT and its kin with a memory operand: small, so that it stays in the window.
    fn bit_offset_register(&mut self) -> Option<usize> {
        self.pin(&[Kind::Index], false).map(|p| p.number)
    }

    fn operand(&mut self, instruction: &mut Instruction, i: u32, kind: Op, memory: &mut Memory) -> Option<()> {
        let fixed = match kind {
            Op::es => Some(Register::ES),
            Op::cs => Some(Register::CS),
            Op::ss => Some(Register::SS),
            Op::ds => Some(Register::DS),
            Op::fs => Some(Register::FS),
            Op::gs => Some(Register::GS),
            Op::al => Some(Register::AL),
            Op::cl => Some(Register::CL),
            Op::ax => Some(Register::AX),
            Op::dx => Some(Register::DX),
            Op::eax => Some(Register::EAX),
            Op::rax => Some(Register::RAX),
            Op::st0 => Some(Register::ST0),
            _ => None,
        };
        let bit_test = is_bit_test(instruction.code()) && i == 1 && instruction.op0_kind() == OpKind::Memory;
        let bits = match kind {
            Op::r16_reg | Op::r16_reg_mem | Op::r16_rm | Op::r16_opcode | Op::r16_or_mem => 16,
            Op::r32_reg | Op::r32_reg_mem | Op::r32_rm | Op::r32_opcode | Op::r32_or_mem => 32,
            Op::r64_reg | Op::r64_reg_mem | Op::r64_rm | Op::r64_opcode | Op::r64_or_mem => 64,
            Op::r32_vvvv => 32,
            Op::r64_vvvv => 64,
            _ => 0,
        };
        let register = match kind {
            _ if fixed.is_some() => fixed,
            Op::mem | Op::mem_offs | Op::sibmem => None,
            Op::r8_or_mem
            | Op::r16_or_mem
            | Op::r32_or_mem
            | Op::r64_or_mem
            | Op::mm_or_mem
            | Op::xmm_or_mem
            | Op::ymm_or_mem
                if self.memory_wanted() =>
            {
                None
            }
            Op::mem_vsib32x | Op::mem_vsib32y | Op::mem_vsib64x | Op::mem_vsib64y => {
                instruction.set_op_kind(i, OpKind::Memory);
                return self.vsib_operand(instruction, kind);
            }
            Op::r8_reg | Op::r8_opcode | Op::r8_or_mem => Some(self.byte_register()),
            Op::mm_reg | Op::mm_rm | Op::mm_or_mem => Some(Register::MM0 + self.rng.below(8) as u32),
            Op::xmm_reg | Op::xmm_rm | Op::xmm_or_mem | Op::xmm_vvvv | Op::xmm_is4 => {
                Some(Register::XMM0 + self.rng.below(self.registers()) as u32)
            }
            Op::ymm_reg | Op::ymm_rm | Op::ymm_or_mem | Op::ymm_vvvv | Op::ymm_is4 => {
                Some(Register::YMM0 + self.rng.below(self.registers()) as u32)
            }
            Op::seg_reg => Some(Register::ES + self.rng.below(6) as u32),
            Op::cr_reg => Some(self.rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4])),
            Op::dr_reg => Some(self.rng.pick(&[Register::DR0, Register::DR3, Register::DR6, Register::DR7])),
            Op::sti_opcode => Some(Register::ST0 + self.rng.below(8) as u32),
            _ if bits != 0 => {
                let n = match () {
                    () if bit_test => self.bit_offset_register()?,
                    // BMI: those that have no host register of their own, up to three of them at once.
                    () if !self.narrow && instruction.code().encoding() == EncodingKind::VEX && self.rng.chance(40) => {
                        self.rng.pick(&[10, 11, 15])
                    }
                    () => self.random_gpr(),
                };
                Some(gpr_part(n, bits))
            }
            _ => return self.other_operand(instruction, i, kind, memory),
        };
        match register {
            Some(register) => {
                instruction.set_op_kind(i, OpKind::Register);
                instruction.set_op_register(i, register);
            }
            None => {
                instruction.set_op_kind(i, OpKind::Memory);
                *memory = self.memory_operand(instruction, kind == Op::mem_offs)?;
            }
        }
        Some(())
    }

    fn memory_wanted(&mut self) -> bool {
        match self.force_memory {
            Some(wanted) => wanted,
            None => self.rng.chance(50),
        }
    }

    fn other_operand(&mut self, instruction: &mut Instruction, i: u32, kind: Op, memory: &mut Memory) -> Option<()> {
        let small = self.rng.chance(25);
        let value = if small { self.rng.within(-2, 70) as u64 } else { self.rng.value() };
        let byte = value as u8;
        match kind {
            Op::imm8 => {
                let second = i > 0 && instruction.op_kind(i - 1) == OpKind::Immediate16;
                if second {
                    instruction.set_op_kind(i, OpKind::Immediate8_2nd);
                    instruction.set_immediate8_2nd(if self.rng.chance(50) { 0 } else { byte % 8 });
                } else {
                    instruction.set_op_kind(i, OpKind::Immediate8);
                    instruction.set_immediate8(if instruction.code() == Code::Int_imm8 { 0x20 + byte % 0x40 } else { byte });
                }
            }
            Op::imm8_const_1 => {
                instruction.set_op_kind(i, OpKind::Immediate8);
                instruction.set_immediate8(1);
            }
            Op::imm8sex16 => {
                instruction.set_op_kind(i, OpKind::Immediate8to16);
                instruction.set_immediate8to16(i16::from(byte as i8));
            }
            Op::imm8sex32 => {
                instruction.set_op_kind(i, OpKind::Immediate8to32);
                instruction.set_immediate8to32(i32::from(byte as i8));
            }
            Op::imm8sex64 => {
                instruction.set_op_kind(i, OpKind::Immediate8to64);
                instruction.set_immediate8to64(i64::from(byte as i8));
            }
            Op::imm16 => {
                instruction.set_op_kind(i, OpKind::Immediate16);
                let moves_stack = matches!(
                    instruction.code(),
                    Code::Enterq_imm16_imm8
                        | Code::Enterd_imm16_imm8
                        | Code::Enterw_imm16_imm8
                        | Code::Retnq_imm16
                        | Code::Retnd_imm16
                );
                instruction.set_immediate16(if moves_stack { self.rng.below(200) as u16 } else { value as u16 });
            }
            Op::imm32 => {
                instruction.set_op_kind(i, OpKind::Immediate32);
                instruction.set_immediate32(value as u32);
            }
            Op::imm32sex64 => {
                instruction.set_op_kind(i, OpKind::Immediate32to64);
                instruction.set_immediate32to64(i64::from(value as i32));
            }
            Op::imm64 => {
                instruction.set_op_kind(i, OpKind::Immediate64);
                instruction.set_immediate64(value);
            }
            Op::seg_rSI | Op::es_rDI | Op::seg_rDI | Op::seg_rBX_al => self.implicit_memory(instruction, i, kind, memory)?,
            Op::br64_1 | Op::br64_4 => {
                instruction.set_op_kind(i, OpKind::NearBranch64);
            }
            Op::br32_1 | Op::br32_4 => {
                instruction.set_op_kind(i, OpKind::NearBranch32);
            }
            _ => panic!("operand kind {kind:?} of {:?}", instruction.code()),
        }
        Some(())
    }

    /// Operands at RSI, RDI, RBX+AL. Whoever builds the case has pinned those registers if it matters.
    fn implicit_memory(&mut self, instruction: &mut Instruction, i: u32, kind: Op, memory: &mut Memory) -> Option<()> {
        // All operands of one instruction have the same address size.
        let narrow = match (i > 0).then(|| instruction.op0_kind()) {
            Some(OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI) => true,
            Some(OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI) => false,
            _ => self.narrow_strings,
        };
        let number = match kind {
            Op::seg_rSI => 6,
            Op::seg_rBX_al => 3,
            _ => 7,
        };
        if kind == Op::seg_rBX_al {
            instruction.set_op_kind(i, OpKind::Memory);
            instruction.set_memory_base(if narrow { Register::EBX } else { Register::RBX });
            instruction.set_memory_index(Register::AL);
            instruction.set_memory_index_scale(1);
        } else {
            instruction.set_op_kind(
                i,
                match (kind, narrow) {
                    (Op::seg_rSI, false) => OpKind::MemorySegRSI,
                    (Op::seg_rSI, true) => OpKind::MemorySegESI,
                    (Op::es_rDI, false) => OpKind::MemoryESRDI,
                    (Op::es_rDI, true) => OpKind::MemoryESEDI,
                    (_, false) => OpKind::MemorySegRDI,
                    (_, true) => OpKind::MemorySegEDI,
                },
            );
        }
        if kind != Op::es_rDI && self.rng.chance(self.override_chance()) {
            // With the segment's base in the pinned register's stead, the sum still has to be inside.
            let fs = !self.narrow && self.rng.chance(50);
            instruction.set_segment_prefix(if fs { Register::FS } else { Register::GS });
        }
        let pinned = self.pins.iter().any(|p| p.number == number && p.usable);
        *memory = Memory::default();
        (pinned || self.allow_wild).then_some(())
    }

    fn override_chance(&self) -> u64 {
        if self.case.init.fs_base < 0x1000 && self.case.init.gs_base < 0x1000 { 20 } else { 1 }
    }

    /// Chooses where an operand of `size` bytes is to be.
    fn target(&mut self, size: u64, code: Code) -> u64 {
        let end = DATA_BYTES as u64;
        let page = PAGE as u64;
        // Encoded with VEX, most do not care.
        let vex = code.encoding() == EncodingKind::VEX;
        let aligned = size >= 16 && !self.rng.chance(if vex { 60 } else { 6 });
        let big = size > 16 && !vex;
        let offset = match self.rng.below(100) {
            0..10 if !big => page * (1 + self.rng.below(5)) - self.rng.below(size.max(2)),
            10..13 if !big => end - self.rng.below(size.max(2)),
            13..15 => end + self.rng.below(page - size),
            15..17 if !big => end + page - self.rng.below(size.max(2)),
            17 => end + page + self.rng.below(200),
            18 => 0u64.wrapping_sub(1 + self.rng.below(100)),
            _ => self.rng.below(end - size),
        };
        match size {
            32 if aligned => offset & !31,
            _ if aligned => offset & !15,
            _ => offset,
        }
    }

    /// A memory operand. Fills in base, index, scale, displacement and segment.
    fn memory_operand(&mut self, instruction: &mut Instruction, offset_only: bool) -> Option<Memory> {
        let size = operand_size(instruction);
        let target = DATA.wrapping_add(self.target(size, instruction.code()));
        let high = target.wrapping_sub(DATA).wrapping_add(DATA_HIGH);
        if self.narrow {
            return self.narrow_operand(instruction, target, offset_only);
        }
        if offset_only {
            return self.absolute_operand(instruction, target, high);
        }
        if self.rng.chance(1)
            || matches!(instruction.code(), Code::Lea_r16_m | Code::Lea_r32_m | Code::Lea_r64_m) && self.rng.chance(70)
        {
            return Some(self.wild_operand(instruction));
        }
        let narrow = self.rng.chance(8);
        let mut sum = 0u64;
        let mut exact = true;
        let mut target = target;
        if self.rng.chance(12) {
            let segment = if self.rng.chance(50) { Register::FS } else { Register::GS };
            instruction.set_segment_prefix(segment);
            sum = if segment == Register::FS { self.case.init.fs_base } else { self.case.init.gs_base };
            if sum >= DATA_HIGH {
                target = high;
            }
        }
        let mode = self.rng.below(12);
        let mut base = None;
        match mode {
            0 => {
                // RIP-relative, or absolute.
                if instruction.segment_prefix() != Register::None {
                    return None;
                }
                instruction.set_memory_base(if narrow { Register::EIP } else { Register::RIP });
                instruction.set_memory_displ_size(if narrow { 4 } else { 8 });
                instruction.set_memory_displacement64(target);
                return Some(Memory { address: Some(target) });
            }
            1 => {}
            2 => base = Some(self.pin(&[Kind::Index], true)?),
            3 => base = Some(self.pin(&[Kind::Stack], true)?),
            4 | 5 => base = Some(self.pin(&[Kind::High], true)?),
            _ => base = Some(self.pin(&[Kind::Low], true)?),
        }
        if let Some(pin) = base {
            if pin.kind == Kind::High {
                target = high;
            }
            if pin.kind == Kind::Stack && sum == 0 {
                let inside = self.rng.below((STACK_PAGES * PAGE) as u64 - size);
                target = STACK + if size >= 16 { inside & !(size.min(32) - 1) } else { inside };
            }
            instruction.set_memory_base(gpr_part(pin.number, if narrow { 32 } else { 64 }));
            sum = sum.wrapping_add(pin.value);
            exact &= pin.exact;
        }
        if self.rng.chance(40) || base.is_none() && self.rng.chance(30) {
            let index = self.pin(&[Kind::Index], true)?;
            let scale = self.rng.pick(&[1u32, 2, 4, 8]);
            instruction.set_memory_index(gpr_part(index.number, if narrow { 32 } else { 64 }));
            instruction.set_memory_index_scale(scale);
            sum = sum.wrapping_add(index.value.wrapping_mul(u64::from(scale)));
            exact &= index.exact;
        }
        let mut displacement = target.wrapping_sub(sum) as i64;
        if base.is_some() && self.rng.chance(25) {
            // No displacement, or a short one: the pins already point into the window.
            let short = self.rng.pick(&[0, 1, 8, 16, -16, 64, -128, 127]);
            target = sum.wrapping_add(short as u64);
            displacement = short;
        }
        if narrow {
            displacement = i64::from(displacement as i32);
        }
        let displacement = i32::try_from(displacement).ok()?;
        let short = i8::try_from(displacement).is_ok();
        instruction.set_memory_displ_size(match displacement {
            0 if base.is_some() => 0,
            _ if short && base.is_some() && self.rng.chance(80) => 1,
            _ if narrow => 4,
            _ => 8,
        });
        instruction.set_memory_displacement64(if narrow {
            u64::from(displacement as u32)
        } else {
            i64::from(displacement) as u64
        });
        let address = if narrow || !exact { None } else { Some(target) };
        Some(Memory { address })
    }

    /// A memory operand of 32-bit code.
    fn narrow_operand(&mut self, instruction: &mut Instruction, target: u64, offset_only: bool) -> Option<Memory> {
        let size = operand_size(instruction);
        let is_lea = matches!(instruction.code(), Code::Lea_r16_m | Code::Lea_r32_m);
        if !offset_only && (self.rng.chance(1) || is_lea && self.rng.chance(70)) {
            let memory = self.wild_operand(instruction);
            if self.rng.chance(30) {
                self.short_registers(instruction);
            }
            return Some(memory);
        }
        let mut target = target;
        let mode = if offset_only { 0 } else { self.rng.below(8) };
        let base = match mode {
            0 => None,
            1 => Some(self.pin(&[Kind::Index], true)?),
            2 => Some(self.pin(&[Kind::Stack], true)?),
            _ => Some(self.pin(&[Kind::Low, Kind::High], true)?),
        };
        let on_stack = base.is_some_and(|p| matches!(p.number, 4 | 5));
        let mut segment = if on_stack { segments::SS } else { segments::DS };
        if self.rng.chance(15) {
            let (register, s) = self.rng.pick(&[
                (Register::GS, segments::GS),
                (Register::GS, segments::GS),
                (Register::ES, segments::ES),
                (Register::SS, segments::SS),
                (Register::DS, segments::DS),
                (Register::CS, segments::CS),
            ]);
            instruction.set_segment_prefix(register);
            segment = s;
        }
        let mut sum = self.case.segments.base(segment);
        let mut exact = true;
        if let Some(pin) = base {
            if pin.kind == Kind::Stack {
                let inside = self.rng.below((STACK_PAGES * PAGE) as u64 - size);
                target = STACK + if size >= 16 { inside & !15 } else { inside };
            }
            instruction.set_memory_base(gpr_part(pin.number, 32));
            sum = sum.wrapping_add(pin.value);
            exact &= pin.exact;
        }
        if !offset_only && self.rng.chance(35) {
            let index = self.pin(&[Kind::Index], true)?;
            let scale = self.rng.pick(&[1u32, 2, 4, 8]);
            instruction.set_memory_index(gpr_part(index.number, 32));
            instruction.set_memory_index_scale(scale);
            sum = sum.wrapping_add(index.value.wrapping_mul(u64::from(scale)));
            exact &= index.exact;
        }
        let mut displacement = target.wrapping_sub(sum) as i32;
        if base.is_some() && self.rng.chance(25) {
            displacement = self.rng.pick(&[0, 1, 8, 16, -16, 64, -128, 127]);
            target = sum.wrapping_add_signed(displacement.into()) & 0xffff_ffff;
        }
        let short = i8::try_from(displacement).is_ok();
        instruction.set_memory_displ_size(match displacement {
            0 if base.is_some() => 0,
            _ if short && base.is_some() && self.rng.chance(80) => 1,
            _ => 4,
        });
        instruction.set_memory_displacement64(u64::from(displacement as u32));
        // Addresses of 16 bits reach the window through GS.
        if self.rng.chance(8) && segment == segments::GS && instruction.memory_index() == Register::None && base.is_none() {
            instruction.set_memory_displ_size(2);
            instruction.set_memory_displacement64(u64::from(displacement as u16));
            exact &= displacement as u32 <= 0xffff;
            if !offset_only && self.rng.chance(70) {
                self.short_registers(instruction);
                exact = false;
            }
        }
        Some(Memory { address: exact.then_some(target) })
    }

    /// Gives an operand registers of 16 bits.
    fn short_registers(&mut self, instruction: &mut Instruction) {
        let forms = [
            (Register::BX, Register::SI),
            (Register::BX, Register::DI),
            (Register::BP, Register::SI),
            (Register::BP, Register::DI),
            (Register::SI, Register::None),
            (Register::DI, Register::None),
            (Register::BP, Register::None),
            (Register::BX, Register::None),
        ];
        let (base, index) = self.rng.pick(&forms);
        instruction.set_memory_base(base);
        instruction.set_memory_index(index);
        instruction.set_memory_index_scale(1);
        instruction.set_memory_displ_size(2);
        instruction.set_memory_displacement64(instruction.memory_displacement64() & 0xffff);
    }

    /// The operand of a gather: a register full of small indices.
    fn vsib_operand(&mut self, instruction: &mut Instruction, kind: Op) -> Option<()> {
        let n = self.rng.below(self.registers()) as usize;
        let first = if matches!(kind, Op::mem_vsib32x | Op::mem_vsib64x) { Register::XMM0 } else { Register::YMM0 };
        let half = |rng: &mut Rng| match kind {
            Op::mem_vsib32x | Op::mem_vsib32y => {
                let [low, high] = [(); 2].map(|()| rng.within(-64, 64) as u32);
                u64::from(high) << 32 | u64::from(low)
            }
            _ => rng.within(-64, 64) as u64,
        };
        let halves = [(); 4].map(|()| half(self.rng));
        if self.rng.chance(95) {
            let at = 160 + 16 * n;
            self.case.init.fx.0[at..at + 8].copy_from_slice(&halves[0].to_le_bytes());
            self.case.init.fx.0[at + 8..at + 16].copy_from_slice(&halves[1].to_le_bytes());
            self.case.init.ymm_high[n] = [halves[2], halves[3]];
        }
        let scale = self.rng.pick(&[1u32, 2, 4, 8]);
        instruction.set_memory_index(first + n as u32);
        instruction.set_memory_index_scale(scale);
        let pin = self.pin(&[Kind::Low, Kind::High], true)?;
        let window = if pin.kind == Kind::High && !self.narrow { DATA_HIGH } else { DATA };
        let target = window.wrapping_add(self.target(8, Code::INVALID));
        if self.narrow {
            let segment = if matches!(pin.number, 4 | 5) { segments::SS } else { segments::DS };
            let sum = self.case.segments.base(segment).wrapping_add(pin.value);
            instruction.set_memory_base(gpr_part(pin.number, 32));
            instruction.set_memory_displ_size(4);
            instruction.set_memory_displacement64(target.wrapping_sub(sum) & 0xffff_ffff);
            return Some(());
        }
        instruction.set_memory_base(gpr(pin.number));
        let displacement = i32::try_from(target.wrapping_sub(pin.value) as i64).ok()?;
        instruction.set_memory_displ_size(8);
        instruction.set_memory_displacement64(i64::from(displacement) as u64);
        if self.rng.chance(5) {
            instruction.set_segment_prefix(Register::GS);
        }
        Some(())
    }

    /// MOV with an absolute address.
    fn absolute_operand(&mut self, instruction: &mut Instruction, target: u64, high: u64) -> Option<Memory> {
        let narrow = self.rng.chance(20);
        let address = if !narrow && self.rng.chance(40) { high } else { target };
        let mut displacement = address;
        if self.rng.chance(20) {
            instruction.set_segment_prefix(Register::FS);
            displacement = address.wrapping_sub(self.case.init.fs_base);
        }
        if narrow && displacement > u64::from(u32::MAX) {
            return None;
        }
        instruction.set_memory_displ_size(if narrow { 4 } else { 8 });
        instruction.set_memory_displacement64(displacement);
        Some(Memory { address: Some(address) })
    }

    /// Any registers at all. For LEA, and for the faults of wild addresses.
    fn wild_operand(&mut self, instruction: &mut Instruction) -> Memory {
        let narrow = if self.narrow || self.rng.chance(20) { 32 } else { 64 };
        if self.rng.chance(80) {
            instruction.set_memory_base(gpr_part(self.rng.below(self.registers()) as usize, narrow));
        }
        let index = self.rng.below(self.registers()) as usize;
        if index != 4 && self.rng.chance(60) {
            instruction.set_memory_index(gpr_part(index, narrow));
            instruction.set_memory_index_scale(self.rng.pick(&[1, 2, 4, 8]));
        }
        let displacement = self.rng.value() as i32;
        instruction.set_memory_displ_size(if narrow == 32 { 4 } else { 8 });
        instruction.set_memory_displacement64(if narrow == 32 {
            u64::from(displacement as u32)
        } else {
            i64::from(displacement) as u64
        });
        Memory { address: None }
    }

    /// A usable pin of one of `kinds`.
    pub fn pin(&mut self, kinds: &[Kind], as_address: bool) -> Option<Pin> {
        let mut found: Vec<Pin> = self.pins.iter().filter(|p| p.usable && kinds.contains(&p.kind)).copied().collect();
        if as_address && kinds.contains(&Kind::Index) {
            found.retain(|p| p.number != 4);
        }
        (!found.is_empty()).then(|| self.rng.pick(&found))
    }
}

/// BT, BTS, BTR, BTC with the bit offset in a register.
fn is_bit_test(code: Code) -> bool {
    matches!(
        code,
        Code::Bt_rm16_r16
            | Code::Bt_rm32_r32
            | Code::Bt_rm64_r64
            | Code::Bts_rm16_r16
            | Code::Bts_rm32_r32
            | Code::Bts_rm64_r64
            | Code::Btr_rm16_r16
            | Code::Btr_rm32_r32
            | Code::Btr_rm64_r64
            | Code::Btc_rm16_r16
            | Code::Btc_rm32_r32
            | Code::Btc_rm64_r64
    )
}

/// VGATHERDPS and its kin.
pub fn is_gather(code: Code) -> bool {
    use Op as K;
    let vsib = |kind: &Op| matches!(kind, K::mem_vsib32x | K::mem_vsib32y | K::mem_vsib64x | K::mem_vsib64y);
    code.op_code().op_kinds().iter().any(vsib)
}

/// Bytes of the memory operand.
pub fn operand_size(instruction: &Instruction) -> u64 {
    match instruction.memory_size() {
        MemorySize::Unknown => 8,
        size => (size.size() as u64).max(1),
    }
}
