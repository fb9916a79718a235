//! System instructions inside a block: the common cases in code, the rest by the helper.
//!
//! **In:** an instruction that `sys` executes. **Out:** code for it; status flags are in the frame behind it. Invariant: whether the short
//! way was taken makes no difference to the state.
use super::flags::Flags;
use super::{Ea, Mode, T0, Translator};
use iced_x86::{Code, Instruction};

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
            _ => return self.call_sys(k, insn),
        }
        let done = self.emit.label();
        self.emit.jmp(done);
        self.emit.bind(slow);
        self.call_sys(k, insn);
        self.emit.bind(done);
    }

    /// Leaves the instruction to the helper.
    fn call_sys(&mut self, k: usize, insn: &Instruction) {
        self.sys.push((k as u16, *insn));
        self.emit.note_block(self.src.block as i32);
        self.emit.call_helper_here(self.shared.sys, k as i32);
    }
}
