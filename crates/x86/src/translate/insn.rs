//! Instructions that the silicon executes, with their operands rewritten.
//!
//! **In:** a decoded instruction. **Out:** the same instruction on the host, its memory operand through the soft TLB, guest registers that
//! live in the frame through scratch registers. Invariant: what can fault comes before anything that changes guest state.
use super::flags::{Effect, effect};
use super::forms::other_direction;
use super::{Ea, T0, T1, Translator, can_fault, full_number, in_frame, is_high_byte, same_width, writes};
use crate::emit::At;
use iced_x86::{Code, Instruction, Mnemonic, OpAccess, OpKind, Register};

impl Translator<'_> {
    pub(super) fn silicon(&mut self, insn: &Instruction) {
        match insn.mnemonic() {
            Mnemonic::Push => return self.push(insn),
            Mnemonic::Pop => return self.pop(insn),
            Mnemonic::Leave => {
                let size = if insn.code() == Code::Leavew { 2 } else { 8 };
                let at = self.access(Ea::Plain(5, 0), size, false);
                self.protect(1 << 4 | 1 << 5);
                self.load_r11(at, size);
                self.emit.lea(4, 5, size as i32);
                if size == 2 {
                    self.emit.mov16(5, T0);
                } else {
                    self.emit.mov(5, T0);
                }
                return;
            }
            Mnemonic::Lea => return self.lea(insn),
            Mnemonic::Clflush => {
                self.access(Ea::Operand(*insn), 1, false);
                return;
            }
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register =>
            {
                return self.bit_string(insn);
            }
            _ => {}
        }
        // 32-bit code has come here as 64-bit code with the same meaning, which is not what its bytes are.
        let verbatim = !self.code_32() && !insn.has_lock_prefix() && !insn.has_rep_prefix() && !insn.has_repne_prefix();
        let mut insn = *insn;
        // Nothing else writes guest memory meanwhile, and the prefixes that older hardware ignores must not mean
        // something newer to this host.
        insn.set_has_lock_prefix(false);
        insn.set_has_rep_prefix(false);
        insn.set_has_repne_prefix(false);
        match (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory) {
            Some(_) => self.with_memory(&insn),
            None => self.registers_only(&insn, verbatim),
        }
    }

    /// General registers that an instruction writes, a bit each.
    pub(super) fn written(&mut self, insn: &Instruction) -> u16 {
        self.info
            .info(insn)
            .used_registers()
            .iter()
            .filter(|used| writes(used.access()))
            .filter_map(|used| full_number(used.register()))
            .fold(0, |mask, n| mask | 1 << n)
    }

    /// Guest registers in the frame that the explicit operands name: (number, must be loaded, must be stored).
    pub(super) fn spilled(&mut self, insn: &Instruction) -> Vec<(u8, bool, bool)> {
        let mut found: Vec<(u8, bool, bool)> = Vec::new();
        let named = |i| insn.op_kind(i) == OpKind::Register && full_number(insn.op_register(i)).is_some_and(in_frame);
        if !(0..insn.op_count()).any(named) {
            return found;
        }
        let info = self.info.info(insn);
        for i in 0..insn.op_count() {
            if insn.op_kind(i) != OpKind::Register {
                continue;
            }
            let reg = insn.op_register(i);
            let Some(n) = full_number(reg).filter(|&n| in_frame(n)) else { continue };
            let access = info.op_access(i);
            let stores = writes(access);
            let loads = access != OpAccess::Write || reg.size() < 4;
            match found.iter_mut().find(|f| f.0 == n) {
                Some(f) => {
                    f.1 |= loads;
                    f.2 |= stores;
                }
                None => found.push((n, loads, stores)),
            }
        }
        found
    }

    pub(super) fn rename(insn: &mut Instruction, guest: u8, host: u8) {
        for i in 0..insn.op_count() {
            if insn.op_kind(i) == OpKind::Register && full_number(insn.op_register(i)) == Some(guest) {
                let reg = same_width(insn.op_register(i), host);
                insn.set_op_register(i, reg);
            }
        }
    }

    /// `verbatim`: the guest's own bytes mean the same to the host, unless they name a register that lives elsewhere.
    pub(super) fn registers_only(&mut self, insn: &Instruction, verbatim: bool) {
        if self.count(insn) {
            return;
        }
        let spilled = self.spilled(insn);
        if spilled.len() > 2 {
            return self.three_registers(insn, &spilled);
        }
        let mut out = *insn;
        let mut hosts = [0u8; 2];
        for (i, &(n, ..)) in spilled.iter().enumerate() {
            let other = if i == 0 { spilled.get(1).map(|s| s.0) } else { Some(hosts[0]) };
            // r10 and r11 stand for themselves where they can.
            hosts[i] = match n {
                10 | 11 => n,
                _ => {
                    if other == Some(T0) {
                        T1
                    } else {
                        T0
                    }
                }
            };
        }
        if can_fault(insn) {
            self.note_flags();
        }
        let effect = effect(insn, &self.silicon);
        self.flags_before(insn, effect);
        let kept = self.keep_old(insn, effect);
        if let [(n, _, stores)] = spilled[..]
            && let Some(out) = self.on_frame(insn, n, stores)
            && self.emit.raw(&out)
        {
            self.flags_after(insn, effect);
            if kept.is_some() {
                self.flags.set_recipe(kept);
            }
            return;
        }
        for (i, &(n, loads, _)) in spilled.iter().enumerate() {
            if loads {
                self.emit.load(hosts[i], n as usize);
            }
        }
        if hosts[..spilled.len()].contains(&T1) {
            self.held = None;
        }
        // Rename in two steps is not needed: r10 and r11 keep their names, only r15 changes.
        for (i, &(n, ..)) in spilled.iter().enumerate() {
            if hosts[i] != n {
                Self::rename(&mut out, n, hosts[i]);
            }
        }
        if verbatim && spilled.is_empty() {
            self.emit.copy(self.src.bytes_of(insn));
        } else {
            let ok = self.emit.raw(&out);
            assert!(ok, "cannot encode {out:?}");
        }
        for (i, &(n, _, stores)) in spilled.iter().enumerate() {
            if stores {
                self.emit.store(n as usize, hosts[i]);
            }
        }
        self.flags_after(insn, effect);
        if kept.is_some() {
            self.flags.set_recipe(kept);
        }
    }

    /// The instruction with its operand in the frame, which is guest register `n`, as a memory operand. It may turn out to have no such encoding. None
    /// if it would mean something else.
    fn on_frame(&self, insn: &Instruction, n: u8, stores: bool) -> Option<Instruction> {
        use Mnemonic::*;
        let fits = matches!(
            insn.mnemonic(),
            Mov | Add
                | Sub
                | Adc
                | Sbb
                | And
                | Or
                | Xor
                | Cmp
                | Test
                | Neg
                | Not
                | Movzx
                | Movsx
                | Movsxd
                | Mul
                | Imul
                | Shl
                | Sal
                | Shr
                | Sar
                | Rol
                | Ror
                | Cmova
                | Cmovae
                | Cmovb
                | Cmovbe
                | Cmove
                | Cmovg
                | Cmovge
                | Cmovl
                | Cmovle
                | Cmovne
                | Cmovno
                | Cmovnp
                | Cmovns
                | Cmovo
                | Cmovp
                | Cmovs
        );
        let named = |i: &u32| insn.op_kind(*i) == OpKind::Register && full_number(insn.op_register(*i)) == Some(n);
        let mut operands = (0..insn.op_count()).filter(named);
        let (Some(mut operand), None) = (operands.next(), operands.next()) else { return None };
        let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        // A result of 32 bits clears the upper half, which memory does not.
        if !fits || memory || stores && insn.op_register(operand).size() == 4 {
            return None;
        }
        let mut out = *insn;
        if let Some((code, to_memory)) = other_direction(insn.code())
            && to_memory == (operand == 0)
        {
            out.set_code(code);
        } else if insn.mnemonic() == Test && operand == 1 && insn.op0_kind() == OpKind::Register {
            out.set_op0_register(insn.op1_register());
            out.set_op1_register(insn.op0_register());
            operand = 0;
        }
        out.set_op_kind(operand, OpKind::Memory);
        Self::set_memory(&mut out, Register::None, Register::None, self.at.gpr(n.into()));
        Some(out)
    }

    fn with_memory(&mut self, insn: &Instruction) {
        let op = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory).expect("caller saw one");
        let access = self.info.info(insn).op_access(op);
        let write = writes(access);
        let spilled = self.spilled(insn);
        if !write && spilled.len() > 1 {
            return self.through_frame(insn);
        }
        let size = insn.memory_size().size();
        assert!(size > 0 && size <= 512, "{insn:?} has a memory operand of {size} bytes");
        let at = self.access(Ea::Operand(*insn), size, write);
        let mut out = *insn;
        Self::plain_code(&mut out);

        let high = (0..insn.op_count())
            .filter(|&i| insn.op_kind(i) == OpKind::Register)
            .map(|i| insn.op_register(i))
            .find(|&r| is_high_byte(r));
        assert!(spilled.len() + high.is_some() as usize <= 1, "{insn:?} names too many registers");

        match at {
            At::Sum(_, disp) => Self::set_memory(&mut out, insn.memory_base(), Register::R10, disp),
            At::Host => Self::set_memory(&mut out, Register::R10, Register::None, 0),
            At::Beyond(disp) => Self::set_memory(&mut out, Register::R10, Register::None, disp),
        }
        if !write && self.with_kept_operand(insn, at) || write && self.with_kept_result(insn, at) {
            return;
        }
        let data = T0;
        let effect = effect(insn, &self.silicon);
        self.flags_before(insn, effect);
        if let Some(&(n, loads, _)) = spilled.first() {
            if loads {
                self.emit.load(data, n as usize);
            }
            Self::rename(&mut out, n, data);
        }
        if let Some(reg) = high {
            self.emit.load_high(data, reg.number() as u8 & 3);
            for i in 0..out.op_count() {
                if out.op_kind(i) == OpKind::Register && out.op_register(i) == reg {
                    out.set_op_register(i, Register::R11L);
                }
            }
        }
        let ok = self.emit.raw(&out);
        assert!(ok, "cannot encode {out:?}");
        if let Some(&(n, _, true)) = spilled.first() {
            self.emit.store(n as usize, data);
        }
        if let Some(reg) = high {
            let info = self.info.info(insn);
            let stores = (0..insn.op_count())
                .any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i) == reg && writes(info.op_access(i)));
            if stores {
                self.emit.store_high(data, reg.number() as u8 & 3);
            }
        }
        self.flags_after(insn, effect);
        if write {
            self.stored();
        }
    }

    /// Forms whose memory operand is an absolute address become their general forms.
    fn plain_code(insn: &mut Instruction) {
        let code = match insn.code() {
            Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
            Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
            Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
            Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
            Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
            Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
            Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
            Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
            _ => return,
        };
        insn.set_code(code);
    }

    pub(super) fn set_memory(insn: &mut Instruction, base: Register, index: Register, disp: i32) {
        insn.set_segment_prefix(Register::None);
        insn.set_memory_base(base);
        insn.set_memory_index(index);
        insn.set_memory_index_scale(1);
        insn.set_memory_displacement64(disp as i64 as u64);
        insn.set_memory_displ_size(match disp {
            0 => 0,
            -128..=127 => 1,
            _ => 8,
        });
    }

    fn lea(&mut self, insn: &Instruction) {
        let dest = insn.op0_register();
        let n = full_number(dest).expect("general register");
        if dest.size() == 8 && insn.memory_index() == Register::None && insn.memory_base() == dest {
            self.protect_moved(n, insn.memory_displacement64() as i32);
        } else {
            self.protect(1 << n);
        }
        if self.lea_in_place(insn, n) {
            return;
        }
        self.operand_address(insn, false);
        match dest.size() {
            8 => {}
            4 => self.emit.zero_extend(T0),
            _ => {
                // The upper bits of the destination stay.
                self.held = None;
                self.emit.load(T1, n as usize);
                self.emit.mov16(T1, T0);
                self.emit.mov(T0, T1);
            }
        }
        self.set_guest(n, T0);
    }

    /// LEA into guest register `n`, where the host can do as the guest says. Says whether it did.
    fn lea_in_place(&mut self, insn: &Instruction, n: u8) -> bool {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let elsewhere = |reg: Register| full_number(reg).is_some_and(in_frame);
        if self.code_32() || in_frame(n) || elsewhere(base) || elsewhere(index) {
            return false;
        }
        if base != Register::RIP && base != Register::EIP {
            self.emit.copy(self.src.bytes_of(insn));
            return true;
        }
        let address = insn.memory_displacement64();
        match insn.op0_register().size() {
            8 if base == Register::RIP => self.emit.imm(n, address),
            4 => self.emit.imm(n, address & 0xffff_ffff),
            _ => return false,
        }
        true
    }

    /// Guest register = host register.
    fn set_guest(&mut self, guest: u8, host: u8) {
        if in_frame(guest) {
            self.emit.store(guest as usize, host);
        } else {
            self.emit.mov(guest, host);
        }
    }

    fn push(&mut self, insn: &Instruction) {
        use OpKind::*;
        let size = if insn.stack_pointer_increment() == -2 { 2 } else { 8 };
        let to = Ea::Plain(4, -size);
        match insn.op0_kind() {
            Register => {
                let n = full_number(insn.op0_register()).expect("general register");
                let at = self.access(to, size as usize, true);
                self.protect_moved(4, -size);
                let host = if in_frame(n) {
                    self.emit.load(T0, n as usize);
                    T0
                } else {
                    n
                };
                self.push_store(at, host, size);
            }
            Memory => {
                let from = self.access(Ea::Operand(*insn), size as usize, false);
                self.load_r11(from, size as usize);
                self.emit.store_word(self.at.tmp(2), T0);
                let at = self.access(to, size as usize, true);
                self.protect_moved(4, -size);
                self.emit.load_word(T0, self.at.tmp(2));
                self.push_store(at, T0, size);
            }
            _ => {
                let at = self.access(to, size as usize, true);
                self.protect_moved(4, -size);
                self.emit.imm(T0, insn.immediate(0));
                self.push_store(at, T0, size);
            }
        }
    }

    fn push_store(&mut self, at: At, host: u8, size: i32) {
        if size == 2 {
            self.emit.store_at16(at, host);
        } else {
            self.emit.store_at(at, host);
        }
        self.emit.lea(4, 4, -size);
        self.stored();
    }

    fn pop(&mut self, insn: &Instruction) {
        let size = if insn.stack_pointer_increment() == 2 { 2 } else { 8 };
        let at = self.access(Ea::Plain(4, 0), size as usize, false);
        if insn.op0_kind() == OpKind::Register {
            let n = full_number(insn.op0_register()).expect("general register");
            // RSP is as it was: flags that are made from it and from the register are made first.
            self.protect(1 << n);
            if n != 4 {
                self.protect_moved(4, size);
            }
            if size == 8 && !in_frame(n) && n != 4 {
                self.emit.load_at(n, at);
                self.emit.lea(4, 4, size);
                return;
            }
            self.load_r11(at, size as usize);
            self.emit.lea(4, 4, size);
            if size == 2 {
                self.held = None;
                self.emit.load(T1, n as usize);
                self.emit.mov16(T1, T0);
                self.emit.mov(T0, T1);
            }
            self.set_guest(n, T0);
            return;
        }
        // POP to memory: the address is computed with RSP already incremented (SDM vol. 2, POP); a fault leaves RSP as it was.
        self.load_r11(at, size as usize);
        self.emit.store_word(self.at.tmp(2), T0);
        let mut to = *insn;
        if insn.memory_base() == Register::ESP {
            // Before the sum is cut off at 32 bits.
            to.set_memory_displacement64(u64::from((insn.memory_displacement64() as u32).wrapping_add(size as u32)));
        }
        self.operand_address(&to, true);
        if insn.memory_base() == Register::RSP {
            self.emit.lea(T0, T0, size);
        }
        self.emit.store_word(self.at.tmp(1), T0);
        let at = self.access(Ea::Kept(*insn), size as usize, true);
        self.protect(1 << 4);
        self.emit.load_word(T0, self.at.tmp(2));
        if size == 2 {
            self.emit.store_at16(at, T0);
        } else {
            self.emit.store_at(at, T0);
        }
        self.emit.lea(4, 4, size);
        self.stored();
    }

    /// BT family with a register offset into memory: a bit string of any length (SDM vol. 2, BT).
    fn bit_string(&mut self, insn: &Instruction) {
        let reg = insn.op1_register();
        let n = full_number(reg).expect("general register") as usize;
        let bits = reg.size() as u32 * 8;
        self.held = None;
        self.clobber_flags();
        // The sum wraps at the address size; the segment's base comes after that.
        self.operand_address(insn, false);
        self.emit.bit_word_index(n, bits);
        self.emit.lea_index(T0, T0, T1, bits / 8, 0);
        self.wrap_address(insn);
        self.add_segment(insn);
        self.emit.store_word(self.at.tmp(1), T0);
        let write = insn.mnemonic() != Mnemonic::Bt;
        self.access(Ea::Kept(*insn), bits as usize / 8, write);
        // Of the flags only CF changes, and the others may be asked for. They come before the offset takes r11.
        self.settle_flags();
        self.emit.bit_in_word(n, bits);
        self.emit.restore_flags();
        let mut out = *insn;
        out.set_has_lock_prefix(false);
        Self::set_memory(&mut out, Register::R10, Register::None, 0);
        out.set_op1_register(same_width(reg, T0));
        let ok = self.emit.raw(&out);
        assert!(ok, "cannot encode {out:?}");
        self.flags_after(insn, Effect::Partial);
        if write {
            self.stored();
        }
    }
}
