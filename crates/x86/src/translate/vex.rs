//! Instructions that name three general registers: those of BMI1 and BMI2 (ANDN, BEXTR, BZHI, SHLX, MULX, PDEP ...).
//!
//! **In:** an instruction with more operands that live in the frame than there are scratch registers. **Out:** code that finds room for one more.
//! Invariant: none of these instructions faults once its memory operand has been read, so the budget may leave its register meanwhile.
use super::flags::effect;
use super::{Ea, T0, Translator};
use iced_x86::{Instruction, Register};

/// The host register of the budget.
const BUDGET: u8 = 15;

impl Translator<'_> {
    /// r10, r11 and r15 all at once: each stands for itself, and the budget waits in the frame.
    pub(super) fn three_registers(&mut self, insn: &Instruction, spilled: &[(u8, bool, bool)]) {
        assert!(spilled.len() == 3, "{insn:?} names too many registers");
        self.held = None;
        let effect = effect(insn, &self.silicon);
        self.flags_before(insn, effect);
        self.emit.store_word(self.at.tmp(2), BUDGET);
        for &(n, loads, _) in spilled {
            if loads {
                self.emit.load(n, n as usize);
            }
        }
        let ok = self.emit.raw(insn);
        assert!(ok, "cannot encode {insn:?}");
        for &(n, _, stores) in spilled {
            if stores {
                self.emit.store(n as usize, n);
            }
        }
        self.emit.load_word(BUDGET, self.at.tmp(2));
        self.flags_after(insn, effect);
    }

    /// A memory operand to read and two registers of the frame: the operand is copied to the frame first, where no register is
    /// needed to address it.
    pub(super) fn through_frame(&mut self, insn: &Instruction) {
        let size = insn.memory_size().size();
        assert!(size == 4 || size == 8, "{insn:?} has a memory operand of {size} bytes");
        let at = self.access(Ea::Operand(*insn), size, false);
        if size == 4 {
            self.emit.load_at32(T0, at);
        } else {
            self.emit.load_at(T0, at);
        }
        self.emit.store_word(self.at.tmp(2), T0);
        let mut out = *insn;
        Self::set_memory(&mut out, Register::None, Register::None, self.at.tmp(2));
        self.registers_only(&out, false);
    }
}
