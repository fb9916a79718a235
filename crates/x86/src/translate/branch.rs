//! Near jumps, calls and returns, and how a block goes on to another one.
//!
//! **In:** a branch. **Out:** code that leaves to its target(s): a jump that can be linked inside the page, the jump cache for other pages and for
//! indirect targets. Invariant: wherever a block is left, the frame's copy of the flags is valid.
use super::{Cold, Ea, Link, T0, T1, Translator, full_number, in_frame};
use dynasmrt::DynamicLabel;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

impl Translator<'_> {
    fn same_page(&self, target: u64) -> bool {
        !self.src.straddles && target >> 12 == self.src.rip >> 12
    }

    /// Goes on at a known address. The frame's flags are valid; host flags may be clobbered.
    pub(super) fn go_to(&mut self, target: u64) {
        if self.alone() {
            self.emit.imm(T0, target);
            self.emit.leave_lookup();
        } else if self.same_page(target) {
            let label = self.emit.label();
            self.emit.jmp(label);
            self.link(label, target);
        } else {
            self.emit.imm(T0, target);
            self.emit.jump_cache();
        }
    }

    /// The jump just emitted, to `label`, can be linked to `target`.
    fn link(&mut self, label: DynamicLabel, target: u64) {
        let link = self.links.len();
        self.links.push(Link { patch: self.emit.here() as u32 - 4, stub: 0, target });
        self.cold.push(Cold::Stub { label, link });
    }

    /// Goes on at the address in r11, which may be any. `moved` is by how much the branch has changed RSP: if there can be no code,
    /// the branch is what faults, and [`crate::engine`] takes it back.
    pub(super) fn go_to_register(&mut self, moved: i32) {
        self.settle_flags();
        if self.alone() {
            self.emit.leave_lookup();
        } else {
            self.emit.jump_cache_or(self.src.block as i32, moved);
        }
    }

    /// A label that, when jumped to, goes on at `target`. To be called right after the jump was emitted with that label.
    pub(super) fn taken(&mut self, label: DynamicLabel, target: u64) {
        if self.same_page(target) && !self.alone() {
            self.link(label, target);
        } else {
            self.cold.push(Cold::Far { label, target });
        }
    }

    pub(super) fn branch(&mut self, insn: &Instruction) {
        let next = insn.next_ip();
        if insn.is_jcc_short_or_near() {
            self.need_flags();
            self.settle_flags();
            let label = self.emit.label();
            self.emit.jcc(insn.condition_code() as u8 - 1, label);
            self.taken(label, insn.near_branch_target());
            self.go_to(next);
        } else if insn.is_jmp_short_or_near() {
            self.settle_flags();
            self.go_to(insn.near_branch_target());
        } else if insn.is_call_near() {
            self.push_value(next);
            self.settle_flags();
            self.go_to(insn.near_branch_target());
        } else if insn.is_jmp_near_indirect() {
            self.load_target(insn);
            self.go_to_register(0);
        } else if insn.is_call_near_indirect() {
            self.load_target(insn);
            self.emit.store_word(self.at.tmp(2), T0);
            self.push_value(next);
            self.emit.load_word(T0, self.at.tmp(2));
            // The push left the flags in the frame.
            self.go_to_register(-8);
        } else if insn.is_jcx_short() {
            self.settle_flags();
            let wide = insn.code() == Code::Jrcxz_rel8_64;
            let label = self.emit.label();
            self.count_jump(label, wide, insn.near_branch_target());
            self.go_to(next);
        } else if insn.is_loop() || insn.is_loopcc() {
            self.loop_insn(insn);
        } else {
            // RET, RET imm16.
            let extra = if insn.op_count() == 1 { insn.immediate(0) as i32 } else { 0 };
            let size = if matches!(insn.code(), Code::Retnw | Code::Retnw_imm16) { 2 } else { 8 };
            self.access(Ea::Plain(4, 0), size, false);
            if size == 8 {
                self.emit.load_sum(T0, 4, T1, 0);
            } else {
                self.emit.load_sum16(T0, 4, T1, 0);
            }
            self.emit.lea(4, 4, size as i32 + extra);
            self.go_to_register(size as i32 + extra);
        }
    }

    /// jrcxz/jecxz to `target`.
    fn count_jump(&mut self, label: DynamicLabel, wide: bool, target: u64) {
        self.emit.jrcxz(label, wide);
        self.taken(label, target);
    }

    fn loop_insn(&mut self, insn: &Instruction) {
        use Code::*;
        let wide = matches!(insn.code(), Loop_rel8_64_RCX | Loope_rel8_64_RCX | Loopne_rel8_64_RCX);
        let next = insn.next_ip();
        let is_e = insn.mnemonic() == Mnemonic::Loope;
        let is_ne = insn.mnemonic() == Mnemonic::Loopne;
        if is_e || is_ne {
            self.need_flags();
        }
        self.settle_flags();
        self.emit.dec_rcx(wide);
        let done = self.emit.label();
        self.count_jump(done, wide, next);
        if is_e || is_ne {
            let done = self.emit.label();
            self.emit.jcc(if is_e { 5 } else { 4 }, done);
            self.taken(done, next);
        }
        self.go_to(insn.near_branch_target());
    }

    /// r11 = target of an indirect jump or call.
    fn load_target(&mut self, insn: &Instruction) {
        if insn.op0_kind() == OpKind::Register {
            let n = full_number(insn.op0_register()).expect("general register");
            self.settle_flags();
            self.emit.load(T0, n as usize);
            if insn.op0_register().size() == 2 {
                self.emit.mov_zx16(T0);
            }
            return;
        }
        let size = insn.memory_size().size();
        self.access(Ea::Operand(*insn), size, false);
        self.operand_again(insn);
        if size == 2 {
            self.emit.load_sum16(T0, T0, T1, 0);
        } else {
            self.emit.load_sum(T0, T0, T1, 0);
        }
    }

    /// r11 = the operand's address once more; r10 stays the addend. Clobbers flags.
    pub(super) fn operand_again(&mut self, insn: &Instruction) {
        let uses_t1 = full_number(insn.memory_index()).is_some_and(in_frame);
        if uses_t1 {
            self.emit.store_word(self.at.tmp(0), T1);
        }
        self.operand_address(insn, true);
        if uses_t1 {
            self.emit.load_word(T1, self.at.tmp(0));
        }
    }

    /// Pushes a 64-bit constant. Flags end up in the frame.
    fn push_value(&mut self, value: u64) {
        self.access(Ea::Plain(4, -8), 8, true);
        self.emit.imm(T0, value);
        self.emit.store_sum(T0, 4, T1, -8);
        self.emit.lea(4, 4, -8);
        self.stored();
    }
}
