//! Flags that one trace owes to the next.
//!
//! Most flags that are there when a trace ends are overwritten at the head of the next one before anybody can ask for them. So a trace that
//! can make them again from registers need not save them: it notes in the frame where the code is that would make and save them ([`Owing`]),
//! and enters its successor behind the note that nothing is owed. Whatever leaves the successor before its flags are overwritten runs that
//! code first ([`crate::emit::Emit::settle_owed`]).
//!
//! Who goes on by the jump cache does not know its successor. It may owe flags that are made from RSP and kept operands alone, and every block that
//! can be found there has an entry for that, where one that does not take debts has them paid.
//!
//! **In:** how a trace ends, how it begins. **Out:** a second entry for traces that take such debts, a second way out for those that make them.
//!
//! Invariant: `owed` counts from a note of it to the first instruction that overwrites all flags, or to an entry that is not for debtors, and nowhere
//! else. Up to there nothing reads
//! or changes flags, nothing faults on the host, and no register is written that the flags are made from.
use super::flags::{Effect, Flags, effect};
use super::trace::{Follow, Step};
use super::{Cold, Mode, Translator, can_fault};
use crate::classify::Kind;

/// RSP's bit among registers.
pub(super) const RSP: u16 = 1 << 4;
/// Instructions looked at for one that overwrites the flags.
const HEAD: usize = 8;

/// How to go to a successor that takes a debt.
#[derive(Debug, Clone, Copy)]
pub struct Owing {
    /// Host address of the displacement in hot code that leads to `exit`, or to `thunk`.
    pub jump: u32,
    /// The way that saves the flags.
    pub exit: u32,
    /// The way that owes them.
    pub thunk: u32,
    /// Host address of the displacement of the thunk's jump to the successor.
    pub patch: u32,
    /// Guest registers, a bit each, that the flags are made from.
    pub needs: u16,
}

impl Translator<'_> {
    /// The registers that are written before all flags are, if nothing asks for them until then.
    fn head(&mut self, steps: &[Step]) -> Option<u16> {
        let mut written = 0;
        for step in steps.iter().take(HEAD) {
            match step.kind {
                Kind::Nop => {}
                Kind::Branch if step.insn.is_jmp_short_or_near() && step.follow != Follow::No => {}
                Kind::Silicon => {
                    let reads = step.insn.rflags_read() & super::STATUS != 0;
                    if reads || can_fault(&step.insn) {
                        return None;
                    }
                    match effect(&step.insn, &self.silicon) {
                        Effect::Full => return Some(written),
                        Effect::Partial => return None,
                        Effect::None => written |= self.written(&step.insn),
                    }
                }
                _ => return None,
            }
        }
        None
    }

    /// Emits the block's entries.
    pub(super) fn open(&mut self, steps: &[Step]) {
        if self.alone() || self.src.mode.has(Mode::SHORT) {
            // Entered by whoever owes nothing.
            return;
        }
        let takes = if self.code_32() || self.src.straddles { None } else { self.head(steps) };
        if takes.is_none_or(|written| written & RSP != 0) {
            self.published = self.emit.here();
            let from = self.emit.if_owed();
            self.entry = self.emit.here();
            self.cold.push(Cold::Owed { from, back: self.entry });
        }
        if let Some(written) = takes {
            self.emit.owe(0);
            let entry = self.emit.here();
            self.takes = Some((entry as u32, written));
            if written & RSP == 0 {
                self.published = entry;
            }
            self.flags = Flags::OWED;
        }
    }
    /// Before the trace goes on by the jump cache: the flags are passed on as a debt, or are in the frame and nothing is owed. RSP will have changed by
    /// `moved` then, which is still to be done. Clobbers r11 and flags.
    pub(super) fn pass_flags(&mut self, moved: i32) {
        if self.alone() {
            return self.settle_flags();
        }
        self.freeze_flags(moved);
        if self.flags.passes() {
            let place = self.emit.owe(0);
            self.cold.push(Cold::Maker { place, flags: self.flags });
        } else {
            self.settle_flags();
            self.emit.owe(0);
        }
    }
    /// Leaves before the first instruction, with the frame's flags made valid.
    pub(super) fn leave_head(&mut self, reason: u64) {
        let block = self.src.block as i32;
        match self.takes {
            Some(_) => self.emit.leave_owing(reason, block),
            None => self.emit.leave(reason, block),
        }
    }
    /// Whether this block's head takes these flags as a debt.
    pub(super) fn accepts(&self, flags: Flags) -> bool {
        matches!((self.takes, flags.inputs()), (Some((_, written)), Some(needs)) if written & needs == 0)
    }
    /// Goes round once more, owing the flags.
    pub(super) fn owe_to_itself(&mut self) {
        let (entry, _) = self.takes.expect("the caller asked");
        let place = self.emit.owe(0);
        self.cold.push(Cold::Maker { place, flags: self.flags });
        self.emit.jmp_abs(entry as i32);
    }
    /// Code that makes flags which were owed.
    pub(super) fn maker(&mut self, flags: Flags) {
        self.flags = flags.elsewhere();
        self.need_flags();
        self.emit.jmp_abs(self.shared.made);
    }
    /// The way out of the trace, beside `exit`, that owes the flags; `from` is where the hot code jumps to `exit`.
    pub(super) fn owing_exit(&mut self, from: usize, exit: u32, rest: i32, flags: Flags, needs: u16) -> Owing {
        let maker = self.emit.here() as i32;
        self.maker(flags);
        let thunk = self.emit.here() as u32;
        self.emit.refund(rest);
        self.emit.owe(maker);
        let patch = (self.src.cold + self.emit.jmp_out()) as u32;
        Owing { jump: (self.src.host + from) as u32, exit, thunk, patch, needs }
    }
}
