//! Near jumps, calls and returns, and how a block goes on to another one.
//!
//! **In:** a branch. **Out:** code that leaves to its target(s), or goes on with one of them: a jump that can be linked inside the page, the jump
//! cache for other pages and for indirect targets. Invariant: wherever a block is left, the frame's copy of the flags is valid, or owed ([`super::owed`]).
use super::{Cold, Ea, Follow, Link, Mode, T0, Translator, full_number};
use crate::emit::At;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

impl Translator<'_> {
    /// Whether a jump to `target` can be linked: inside the page, since whoever executes it has it mapped; and between pages of the kernel's half,
    /// which all address spaces share as long as nothing is forgotten of it ([`crate::mmu::groups`]). An instruction in the last bytes may need
    /// the next page as well.
    pub(super) fn can_link(&self, target: u64) -> bool {
        let same_page = target >> 12 == self.src.rip >> 12;
        let shared = !self.src.mode.has(Mode::USER) && target >> 63 != 0 && self.src.rip >> 63 != 0;
        !self.alone() && !self.src.straddles && (same_page || shared) && target & 0xfff <= 0x1000 - 15
    }

    /// Goes on at a known address. The frame's flags are valid; host flags may be clobbered.
    pub(super) fn go_to(&mut self, target: u64) {
        if self.alone() {
            self.emit.imm(T0, target);
            self.emit.leave_lookup();
        } else if target == self.src.rip && !self.src.straddles {
            // A loop. It is left for good whenever the block is dropped, since that is never done while it runs.
            self.emit.jmp_abs(self.entry as i32);
        } else if self.can_link(target) {
            let from = self.emit.jmp_out();
            let link = self.links.len();
            self.links.push(Link { patch: (self.src.host + from) as u32, stub: 0, target, owing: None, ungrouped: false });
            self.cold.push(Cold::Stub { from, link });
        } else {
            self.emit.owe(0);
            self.emit.jump_cache_to(target);
        }
    }

    /// The trace ends, and goes on at a known address.
    pub(super) fn end_at(&mut self, target: u64) {
        let owing = !self.alone() && self.flags.inputs().is_some();
        if owing && target == self.src.rip && self.accepts(self.flags) {
            // Round a loop that overwrites them first thing.
            self.owe_to_itself();
        } else if owing && self.can_link(target) {
            let from = self.emit.jmp_out();
            self.cold.push(Cold::Exit { from, target, rest: 0, flags: self.flags });
        } else if owing && (target != self.src.rip || self.src.straddles) {
            self.pass_flags(0);
            self.emit.jump_cache_to(target);
        } else {
            self.settle_flags();
            self.go_to(target);
        }
    }

    /// Goes on at the address in r11, which may be any; the flags are passed on ([`Translator::pass_flags`]). `moved` is by how much the branch has changed RSP: if
    /// there can be no code, the branch is what faults, and [`crate::engine`] takes it back.
    pub(super) fn go_to_register(&mut self, moved: i32) {
        if self.alone() {
            self.emit.leave_lookup();
        } else {
            if self.code_32() {
                self.emit.owe(0);
            }
            let from = self.emit.jump_if_known();
            self.cold.push(Cold::LookUp { from, moved });
        }
    }

    /// The jump whose displacement is at `from` leaves the trace for `target`.
    pub(super) fn leave_from(&mut self, from: usize, target: u64) {
        let rest = if self.alone() { 0 } else { (self.len - 1 - self.current) as i32 };
        self.cold.push(Cold::Exit { from, target, rest, flags: self.flags });
    }

    /// Jcc; `next` is the address of the instruction behind it.
    pub(super) fn conditional(&mut self, insn: &Instruction, next: u64, follow: Follow) {
        let cc = insn.condition_code() as u8 - 1;
        if matches!(cc, 2 | 3) {
            self.need_carry();
        } else {
            self.need(insn.rflags_read());
        }
        let (cc, out, on) = match follow {
            Follow::Taken => (cc ^ 1, next, None),
            Follow::Through => (cc, insn.near_branch_target(), None),
            Follow::No => (cc, insn.near_branch_target(), Some(next)),
        };
        let from = self.emit.jcc_out(cc);
        self.leave_from(from, out);
        if let Some(next) = on {
            self.end_at(next);
        }
    }

    pub(super) fn branch(&mut self, insn: &Instruction, follow: Follow) {
        let next = insn.next_ip();
        if insn.is_jcc_short_or_near() {
            self.conditional(insn, next, follow);
        } else if insn.is_jmp_short_or_near() {
            if follow == Follow::No {
                self.end_at(insn.near_branch_target());
            }
        } else if insn.is_call_near() {
            self.push_value(next);
            if follow == Follow::No {
                self.end_at(insn.near_branch_target());
            }
        } else if insn.is_jmp_near_indirect() {
            self.load_target(insn, true);
            self.go_to_register(0);
        } else if insn.is_call_near_indirect() {
            self.load_target(insn, false);
            self.emit.store_word(self.at.tmp(2), T0);
            self.push_value(next);
            self.pass_flags(0);
            self.emit.load_word(T0, self.at.tmp(2));
            self.go_to_register(-8);
        } else if insn.is_jcx_short() {
            self.settle_flags();
            let wide = insn.code() == Code::Jrcxz_rel8_64;
            let from = self.emit.jrcxz_out(wide);
            self.leave_from(from, insn.near_branch_target());
            self.go_to(next);
        } else if insn.is_loop() || insn.is_loopcc() {
            self.loop_insn(insn);
        } else {
            // RET, RET imm16.
            let extra = if insn.op_count() == 1 { insn.immediate(0) as i32 } else { 0 };
            let size = if matches!(insn.code(), Code::Retnw | Code::Retnw_imm16) { 2 } else { 8 };
            let at = self.access(Ea::Plain(4, 0), size, false);
            self.pass_flags(size as i32 + extra);
            self.load_r11(at, size);
            self.emit.lea(4, 4, size as i32 + extra);
            self.go_to_register(size as i32 + extra);
        }
    }

    /// r11 = the 2 or 8 bytes there.
    pub(super) fn load_r11(&mut self, at: At, size: usize) {
        if size == 2 {
            self.emit.load_at16(T0, at);
        } else {
            self.emit.load_at(T0, at);
        }
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
        let from = self.emit.jrcxz_out(wide);
        self.leave_from(from, next);
        if is_e || is_ne {
            let from = self.emit.jcc_out(if is_e { 5 } else { 4 });
            self.leave_from(from, next);
        }
        self.go_to(insn.near_branch_target());
    }

    /// r11 = target of an indirect jump or call. `last`: nothing else comes before the jump, and the flags are passed on.
    fn load_target(&mut self, insn: &Instruction, last: bool) {
        if insn.op0_kind() == OpKind::Register {
            let n = full_number(insn.op0_register()).expect("general register");
            if last {
                self.pass_flags(0);
            }
            self.emit.load(T0, n as usize);
            if insn.op0_register().size() == 2 {
                self.emit.mov_zx16(T0);
            }
            return;
        }
        let size = insn.memory_size().size();
        let at = self.access(Ea::Operand(*insn), size, false);
        if last {
            self.pass_flags(0);
        }
        self.load_r11(at, size);
    }

    /// Pushes a 64-bit constant.
    fn push_value(&mut self, value: u64) {
        let at = self.access(Ea::Plain(4, -8), 8, true);
        self.protect_moved(4, -8);
        self.emit.imm(T0, value);
        self.emit.store_at(at, T0);
        self.emit.lea(4, 4, -8);
        self.stored();
    }
}
