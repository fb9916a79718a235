//! 32-bit code: compatibility mode and protected mode.
//!
//! **In:** instructions decoded as 32-bit code. **Out:** host code, which is 64-bit code: the same instructions in encodings that mean the same
//! there, addresses of 32 bits, stack and branches as wide as theirs.
//!
//! Blocks of many instructions exist only where CS, DS, ES and SS are flat ([`crate::segmentation::is_flat`]), so their accesses need neither base
//! nor check; those through FS and GS need their base, and no check where [`Mode::FS_OPEN`] or [`Mode::GS_OPEN`] says so. An
//! instruction alone adds every base, and its helper checks the segment. Branches and stack instructions never get here alone
//! (`sys::handles_near`).
//!
//! r8..r15 do not exist in 32-bit code: their values stay where they are.
use super::{Ea, Follow, Mode, T0, Translator, full_number, writes};
use crate::emit::At;
use crate::state::seg;
use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

/// Width of a stack word or of an instruction pointer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Word,
    Double,
}

impl Width {
    fn of(bytes: i32) -> Self {
        if bytes == 2 { Self::Word } else { Self::Double }
    }
    fn bytes(self) -> i32 {
        if self == Self::Word { 2 } else { 4 }
    }
}

/// The number of a segment register as an operand's segment.
fn number(segment: Register) -> usize {
    match segment {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// Whether the operand's address has 16 bits.
fn is_16_bit(insn: &Instruction) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    base.is_gpr16() || index.is_gpr16() || base == Register::None && index == Register::None && insn.memory_displ_size() == 2
}

fn has_memory_operand(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// Whether an instruction of 32-bit code may access a segment that is not known to allow it: it must run alone.
pub(super) fn needs_checks(insn: &Instruction, mode: Mode, info: &mut InstructionInfoFactory) -> bool {
    if !has_memory_operand(insn) || matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Nop) {
        return false;
    }
    match insn.memory_segment() {
        Register::FS => !mode.has(Mode::FS_OPEN),
        Register::GS => !mode.has(Mode::GS_OPEN),
        Register::CS => {
            let info = info.info(insn);
            (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory && writes(info.op_access(i)))
        }
        _ => false,
    }
}

impl Translator<'_> {
    pub(super) fn code_32(&self) -> bool {
        self.src.mode.has(Mode::CODE_32)
    }

    /// An instruction pointer as wide as it is.
    pub(super) fn wrapped(&self, rip: u64) -> u64 {
        if self.code_32() { rip & 0xffff_ffff } else { rip }
    }

    /// What tells the helper of a single instruction which segment register to check, if any.
    pub(super) fn checked_segment(&self, ea: Ea) -> i32 {
        match ea {
            Ea::Operand(insn) | Ea::Kept(insn) if self.alone() && self.code_32() => {
                (number(insn.memory_segment()) as i32 + 1) << 17
            }
            _ => 0,
        }
    }

    /// r11 = the address, or one that no page can have if `size` bytes there reach beyond 4 GiB in a segment with a base: they
    /// need not cross a page, and the access must run alone. May clobber r10 and flags.
    pub(super) fn checked_address(&mut self, ea: Ea, size: usize) {
        self.address(ea);
        if let Ea::Operand(insn) | Ea::Kept(insn) = ea
            && self.code_32()
            && !self.alone()
            && number(insn.memory_segment()) >= seg::FS
            && size > 1
        {
            let base = self.at.seg_base(number(insn.memory_segment()));
            self.emit.spoil_if_wrapped(base, size as i32);
        }
    }

    /// Cuts r11 off at the width of the operand's address.
    pub(super) fn wrap_address_32(&mut self, insn: &Instruction) {
        if is_16_bit(insn) {
            self.emit.mov_zx16(T0);
        } else {
            self.emit.zero_extend(T0);
        }
    }

    /// r11 = linear address of the operand whose offset is in r11. Clobbers flags.
    pub(super) fn add_segment_32(&mut self, insn: &Instruction) {
        let s = number(insn.memory_segment());
        if self.alone() || s >= seg::FS {
            self.emit.add_word(T0, self.at.seg_base(s));
            self.emit.zero_extend(T0);
        }
    }

    /// An instruction that the silicon executes.
    pub(super) fn silicon_32(&mut self, insn: &Instruction) {
        match insn.mnemonic() {
            Mnemonic::Push => return self.push_32(insn),
            Mnemonic::Pop => return self.pop_32(insn),
            Mnemonic::Leave => return self.leave_32(insn),
            Mnemonic::Vzeroall | Mnemonic::Vzeroupper => return self.zero_vectors(insn.mnemonic() == Mnemonic::Vzeroall),
            _ => {}
        }
        let mut same = *insn;
        same.set_code(code_64(insn.code()));
        self.silicon(&same);
    }

    /// VZEROALL (`all`) and VZEROUPPER: in 32-bit code only for the eight registers there are.
    fn zero_vectors(&mut self, all: bool) {
        for register in (0..8).map(|n| Register::XMM0 + n) {
            let mut insn = Instruction::default();
            insn.set_op0_register(register);
            insn.set_op1_register(register);
            if all {
                insn.set_code(Code::VEX_Vpxor_xmm_xmm_xmmm128);
                insn.set_op2_register(register);
            } else {
                // Onto itself: the upper half is cleared.
                insn.set_code(Code::VEX_Vmovaps_xmm_xmmm128);
            }
            let ok = self.emit.raw(&insn);
            assert!(ok, "cannot encode {insn:?}");
        }
    }

    // ---- the stack, of flat segments ----

    /// Makes the stack word `disp` bytes from ESP accessible, for an instruction that moves ESP.
    fn stack_word(&mut self, disp: i32, width: Width, write: bool) -> At {
        let at = self.access(Ea::Plain32(4, disp), width.bytes() as usize, write);
        self.protect(1 << 4);
        at
    }

    /// Stores a register there.
    fn store_stack(&mut self, at: At, from: u8, width: Width) {
        match width {
            Width::Word => self.emit.store_at16(at, from),
            Width::Double => self.emit.store_at32(at, from),
        }
    }

    /// r11 = the word there.
    fn load_stack(&mut self, at: At, width: Width) {
        match width {
            Width::Word => self.emit.load_at16(T0, at),
            Width::Double => self.emit.load_at32(T0, at),
        }
    }

    fn move_stack(&mut self, by: i32) {
        self.emit.lea32(4, 4, by);
    }

    /// The register operand `reg` = r11.
    fn set_register(&mut self, reg: Register) {
        let n = full_number(reg).expect("general register");
        if reg.size() == 2 {
            self.emit.mov16(n, T0);
        } else {
            self.emit.mov(n, T0);
        }
    }

    /// The memory operand of a stack instruction or branch.
    fn operand_word(&mut self, insn: &Instruction, width: Width) -> At {
        self.access(Ea::Operand(*insn), width.bytes() as usize, false)
    }

    fn push_32(&mut self, insn: &Instruction) {
        let width = Width::of(-insn.stack_pointer_increment());
        match insn.op0_kind() {
            OpKind::Register => {
                let at = self.stack_word(-width.bytes(), width, true);
                let n = full_number(insn.op0_register()).expect("general register");
                self.store_stack(at, n, width);
                self.move_stack(-width.bytes());
            }
            OpKind::Memory => {
                let from = self.operand_word(insn, width);
                self.load_stack(from, width);
                self.emit.store_word(self.at.tmp(2), T0);
                let at = self.stack_word(-width.bytes(), width, true);
                self.emit.load_word(T0, self.at.tmp(2));
                self.store_stack(at, T0, width);
                self.move_stack(-width.bytes());
            }
            _ => self.push_constant(insn.immediate(0), width),
        }
    }

    fn push_constant(&mut self, value: u64, width: Width) {
        let at = self.stack_word(-width.bytes(), width, true);
        self.emit.imm(T0, value & 0xffff_ffff);
        self.store_stack(at, T0, width);
        self.move_stack(-width.bytes());
    }

    fn pop_32(&mut self, insn: &Instruction) {
        let width = Width::of(insn.stack_pointer_increment());
        let at = self.stack_word(0, width, false);
        if insn.op0_kind() == OpKind::Register {
            self.protect(1 << full_number(insn.op0_register()).expect("general register"));
            self.load_stack(at, width);
            self.move_stack(width.bytes());
            return self.set_register(insn.op0_register());
        }
        // The address is computed with ESP already incremented (SDM vol. 2, POP); a fault leaves ESP as it was.
        self.load_stack(at, width);
        self.emit.store_word(self.at.tmp(2), T0);
        let mut to = *insn;
        if insn.memory_base() == Register::ESP {
            to.set_memory_displacement64(u64::from((insn.memory_displacement64() as u32).wrapping_add(width.bytes() as u32)));
        }
        let at = self.access(Ea::Operand(to), width.bytes() as usize, true);
        self.emit.load_word(T0, self.at.tmp(2));
        self.store_stack(at, T0, width);
        self.move_stack(width.bytes());
    }

    fn leave_32(&mut self, insn: &Instruction) {
        let width = if insn.code() == Code::Leavew { Width::Word } else { Width::Double };
        let at = self.access(Ea::Plain32(5, 0), width.bytes() as usize, false);
        self.protect(1 << 4 | 1 << 5);
        self.load_stack(at, width);
        self.emit.lea32(4, 5, width.bytes());
        self.set_register(if width == Width::Word { Register::BP } else { Register::EBP });
    }

    // ---- branches ----

    /// A near branch.
    pub(super) fn branch_32(&mut self, insn: &Instruction, follow: Follow) {
        let next = self.wrapped(insn.next_ip());
        let width = match insn.op0_kind() {
            OpKind::NearBranch16 => Width::Word,
            OpKind::NearBranch32 => Width::Double,
            _ if insn.op_code().operand_size() == 16 => Width::Word,
            _ => Width::Double,
        };
        let target = insn.near_branch_target();
        if insn.is_jcc_short_or_near() {
            self.conditional(insn, next, follow);
        } else if insn.is_jmp_short_or_near() {
            if follow == Follow::No {
                self.settle_flags();
                self.go_to(target);
            }
        } else if insn.is_call_near() {
            self.push_constant(next, width);
            if follow == Follow::No {
                self.settle_flags();
                self.go_to(target);
            }
        } else if insn.is_jmp_near_indirect() {
            self.load_target_32(insn, width);
            self.go_to_register(0);
        } else if insn.is_call_near_indirect() {
            self.load_target_32(insn, width);
            self.emit.store_word(self.at.tmp(1), T0);
            self.push_constant(next, width);
            self.settle_flags();
            self.emit.load_word(T0, self.at.tmp(1));
            self.go_to_register(0);
        } else if insn.is_jcx_short() || insn.is_loop() || insn.is_loopcc() {
            self.counted(insn, next, target);
        } else {
            // RET, RET imm16.
            let release = if insn.op_count() == 1 { insn.immediate16().into() } else { 0 };
            let at = self.stack_word(0, width, false);
            self.settle_flags();
            self.load_stack(at, width);
            self.move_stack(width.bytes() + release);
            self.go_to_register(0);
        }
    }

    /// JECXZ and LOOP, which count in ECX or in CX.
    fn counted(&mut self, insn: &Instruction, next: u64, target: u64) {
        use Code::*;
        let short = matches!(
            insn.code(),
            Jcxz_rel8_16
                | Jcxz_rel8_32
                | Loop_rel8_16_CX
                | Loop_rel8_32_CX
                | Loope_rel8_16_CX
                | Loope_rel8_32_CX
                | Loopne_rel8_16_CX
                | Loopne_rel8_32_CX
        );
        let loops = !insn.is_jcx_short();
        let wanted = match insn.mnemonic() {
            Mnemonic::Loope => Some(5),
            Mnemonic::Loopne => Some(4),
            _ => None,
        };
        if wanted.is_some() {
            self.need_flags();
        }
        self.settle_flags();
        if loops {
            self.emit.lea(T0, 1, -1);
            if short {
                self.emit.mov16(1, T0);
            } else {
                self.emit.zero_extend(T0);
                self.emit.mov(1, T0);
            }
        }
        // The host's JRCXZ sees all of RCX.
        if short {
            self.emit.store_word(self.at.tmp(0), 1);
            self.emit.mov_zx16(1);
        }
        let zero = self.emit.label();
        self.emit.jrcxz(zero, false);
        let restore = |t: &mut Self| {
            if short {
                t.emit.load_word(1, t.at.tmp(0));
            }
        };
        restore(self);
        if loops {
            if let Some(opposite) = wanted {
                let from = self.emit.jcc_out(opposite);
                self.leave_from(from, next);
            }
            self.go_to(target);
            self.emit.bind(zero);
            restore(self);
            self.go_to(next);
        } else {
            self.go_to(next);
            self.emit.bind(zero);
            restore(self);
            self.go_to(target);
        }
    }

    /// r11 = target of an indirect jump or call.
    fn load_target_32(&mut self, insn: &Instruction, width: Width) {
        if insn.op0_kind() == OpKind::Register {
            let n = full_number(insn.op0_register()).expect("general register");
            self.settle_flags();
            self.emit.mov(T0, n);
            match width {
                Width::Word => self.emit.mov_zx16(T0),
                Width::Double => self.emit.zero_extend(T0),
            }
        } else {
            let at = self.operand_word(insn, width);
            self.settle_flags();
            self.load_stack(at, width);
        }
    }
}

/// The form that means the same in 64-bit code.
fn code_64(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        _ => code,
    }
}
