//! System instructions inside a block: the common cases in code, the rest by the helper.
//!
//! **In:** an instruction that `sys` executes. **Out:** code for it; status flags are in the frame behind it. Invariant: whether the short
//! way was taken makes no difference to the state.
use super::flags::Flags;
use super::{Ea, Mode, T0, T1, Translator, full_number, in_frame};
use crate::emit::At;
use crate::sys::segment_number;
use iced_x86::{Code, Instruction, OpKind, Register};

impl Translator<'_> {
    /// Instruction `k`, which is the block's last or not.
    pub(super) fn sys_insn(&mut self, k: usize, insn: &Instruction, last: bool) {
        self.settle_flags();
        self.flags = Flags::FRAME;
        let user = self.src.mode.has(Mode::USER);
        let slow = self.emit.label();
        let kind = self.src.mode.0 & !Mode::USER;
        match insn.code() {
            Code::Cli if !user => return self.emit.interrupts_off(),
            Code::Swapgs if !user && !self.code_32() => return self.emit.swap_gs(),
            Code::Sti if !user && !last => self.emit.interrupts_on(slow),
            Code::Pushfq => {
                self.emit.flags_image();
                self.emit.store_word(self.at.tmp(2), T0);
                let at = self.access(Ea::Plain(4, -8), 8, true);
                self.emit.load_word(T0, self.at.tmp(2));
                self.emit.store_at(at, T0);
                self.emit.lea(4, 4, -8);
                return;
            }
            Code::Popfq => {
                let at = self.access(Ea::Plain(4, 0), 8, false);
                self.emit.load_at(T0, at);
                self.emit.load_flags(user, slow);
                self.emit.lea(4, 4, 8);
            }
            Code::Syscall if user && !self.code_32() => {
                self.emit.needs_jumps_of(false, kind, slow);
                self.emit.syscall(insn.next_ip(), slow);
                self.emit.bind(slow);
                return self.call_sys(k, insn);
            }
            Code::Sysretq if !user => {
                self.emit.needs_jumps_of(true, kind, slow);
                self.emit.sysret(slow);
                self.emit.bind(slow);
                return self.call_sys(k, insn);
            }
            Code::Rdtsc | Code::Rdtscp if !self.code_32() => {
                self.emit.time_stamp((self.len - k) as i32, user, insn.code() == Code::Rdtscp, slow);
            }
            Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg if !self.code_32() && insn.op0_kind() == OpKind::Register => {
                return self.read_selector(insn);
            }
            _ if !self.code_32() && in_place(insn).is_some() => return self.string(k, insn),
            _ => return self.call_sys(k, insn),
        }
        let done = self.emit.label();
        self.emit.jmp(done);
        self.emit.bind(slow);
        self.call_sys(k, insn);
        self.emit.bind(done);
    }

    /// MOV of a segment register to a general one.
    fn read_selector(&mut self, insn: &Instruction) {
        let n = full_number(insn.op0_register()).expect("general register");
        self.emit.selector(segment_number(insn.op1_register()));
        if in_frame(n) {
            self.emit.store(n as usize, T0);
        } else {
            self.emit.mov(n, T0);
        }
    }

    /// MOVS and STOS by the host's own, where they go up and do not leave the pages they begin in.
    fn string(&mut self, k: usize, insn: &Instruction) {
        let (size, copy) = in_place(insn).expect("asked before");
        let rep = insn.has_rep_prefix() || insn.has_repne_prefix();
        let (slow, done) = (self.emit.label(), self.emit.label());
        let registers: &[u8] = if copy { &[7, 6] } else { &[7] };
        self.emit.string_fits(registers, size, rep.then_some(done), slow);
        if copy {
            let from = self.access(Ea::Plain(6, 0), size, false);
            self.displacement(from, 6);
            self.emit.store_word(self.at.tmp(2), T1);
        }
        let to = self.access(Ea::Plain(7, 0), size, true);
        self.displacement(to, 7);
        if copy {
            self.emit.load_word(T0, self.at.tmp(2));
        }
        self.flags = Flags::FRAME;
        self.emit.string(size, copy, rep);
        self.emit.jmp(done);
        self.emit.bind(slow);
        self.call_sys(k, insn);
        self.emit.bind(done);
    }

    /// r10 = host address minus `reg`, of the bytes there, which `reg` points to.
    fn displacement(&mut self, at: At, reg: u8) {
        match at {
            At::Sum(base, 0) if base == reg => {}
            At::Host => self.emit.take_off(T1, reg),
            At::Sum(..) | At::Beyond(_) => unreachable!("the address of another register"),
        }
    }

    /// Leaves the instruction to the helper.
    fn call_sys(&mut self, k: usize, insn: &Instruction) {
        self.sys.push((k as u16, *insn));
        self.emit.note_block(self.src.block as i32);
        self.emit.call_helper_here(self.shared.sys, k as i32);
    }
}

/// Size of the elements of a string instruction that the host can execute in place, and whether it copies.
fn in_place(insn: &Instruction) -> Option<(usize, bool)> {
    let (size, copy) = match insn.code() {
        Code::Stosb_m8_AL => (1, false),
        Code::Stosw_m16_AX => (2, false),
        Code::Stosd_m32_EAX => (4, false),
        Code::Stosq_m64_RAX => (8, false),
        Code::Movsb_m8_m8 => (1, true),
        Code::Movsw_m16_m16 => (2, true),
        Code::Movsd_m32_m32 => (4, true),
        Code::Movsq_m64_m64 => (8, true),
        _ => return None,
    };
    let plain = !copy || insn.op1_kind() == OpKind::MemorySegRSI && !matches!(insn.memory_segment(), Register::FS | Register::GS);
    (insn.op0_kind() == OpKind::MemoryESRDI && plain).then_some((size, copy))
}
