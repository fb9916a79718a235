//! Going on in translated code after something out of the ordinary, without a round through the main loop.
//!
//! **In:** a helper that has made the state exact. **Out:** host code to go on at, if the loop would do nothing but enter it.
//! Invariant: this is the loop's own order of things ([`Core::run_loop`]), for the cases in which none of its exits is due.
use super::{Core, Stop};
use crate::activity::Activity;
use crate::cache::Key;
use crate::mmu::Access;
use crate::state::rflags;
use crate::translate::Mode;
use crate::{CpuState, PAGE_SIZE};
use iced_x86::Code;

/// How to go on.
pub(super) enum Onward {
    /// At this host code.
    Code(u64),
    /// In the loop.
    Leave,
    /// In the loop, which runs the instruction at RIP alone once more and finds out what is wrong with it.
    Again,
}

impl Core {
    /// The code at RIP, if nothing waits for the loop. `split_flags` is the caller's.
    fn next_code(&mut self) -> Option<u64> {
        self.activity.set(Activity::Engine);
        self.settle();
        let wanted = self.window();
        if self.bus().attention() {
            return None;
        }
        let mode = self.mode();
        let stale = mode.0 & !Mode::USER != *self.jump_kind(mode.has(Mode::USER));
        let st = self.st();
        let careful = st.interrupt_shadow || st.rflags & (rflags::TF | rflags::RF) != 0 || matches!(st.cpl, 1 | 2);
        let interrupt = wanted && st.rflags & rflags::IF != 0;
        if careful || interrupt || st.halted || !st.is_64_bit_code() {
            return None;
        }
        let rip = st.rip;
        if !stale && let Some(code) = self.mmu.published(rip, mode.has(Mode::USER)) {
            return Some(code);
        }
        // What goes wrong here goes wrong in the loop again.
        let id = self.find_block(false).ok()?;
        Some(self.cache.block(id).entry as u64)
    }

    /// Where a jump to another page of the kernel's half goes on, linked for the next time. `None`: by the loop.
    pub(super) fn far_entry(&mut self, link: u32) -> Option<u32> {
        let key = self.cache.link_target(link);
        self.st().rip = key.rip;
        let life = self.cache.life();
        if key.mode.has(Mode::SHORT) {
            return None;
        }
        // Walks, and so notes that jumps into that page depend on its mapping. What goes wrong here goes wrong in the loop again.
        let to = self.find_block(false).ok()?;
        if life == self.cache.life() {
            self.cache.link(link, to);
        }
        Some(self.cache.block(to).entry)
    }

    /// Does what a MOV that stores to `ea` does, if the instruction at RIP is one and there is RAM: in practice stores to page tables. `None`: somebody
    /// else has to.
    pub(super) fn plain_store(&mut self, ea: u64) -> Option<()> {
        let mut mode = self.mode();
        let (rip, gpa) = self.fetch(mode).ok()?;
        mode.0 |= Mode::ALONE;
        let (insn, _) = self.alone_block(Key { gpa, rip, mode }).ok()?;
        let st = self.st();
        let source = |st: &CpuState| st.gpr[insn.op1_register().number()];
        let (value, size) = match insn.code() {
            Code::Mov_rm64_r64 => (source(st), 8),
            Code::Mov_rm64_imm32 => (insn.immediate32to64() as u64, 8),
            Code::Mov_rm32_r32 => (source(st), 4),
            _ => return None,
        };
        if !st.is_64_bit_code() || ea % PAGE_SIZE + size as u64 > PAGE_SIZE {
            return None;
        }
        // SAFETY: the state is not part of the MMU.
        let st = unsafe { &(*self.frame).st };
        let to = self.mmu.fill(st, ea, Access::Write, st.cpl == 3).ok()?;
        self.mmu.ram().page(to)?;
        self.mmu.write_ram(to, &value.to_le_bytes()[..size]);
        self.stats.engine.helper_stores += 1;
        self.st().rip = insn.next_ip();
        self.position += 1;
        Some(())
    }

    /// Runs the instruction at RIP alone, or delivers its exception, in the middle of a block that is left for good. The state is exact, the
    /// position too; the budget is made so.
    /// If `stores`, it stores to this address and cannot in the block.
    pub(super) fn alone_and_on(&mut self, stores: Option<u64>) -> Onward {
        // What is known of the block that is left counts as long as no code is translated.
        self.settle();
        let limit = self.limit;
        // SAFETY: the frame is ours; the code that called the helper is not entered again but by its `ret`.
        let host_rsp = unsafe { (*self.frame).host_rsp };
        let done = match stores.and_then(|ea| self.plain_store(ea)).map_or_else(|| self.step_alone(), Ok) {
            Ok(()) => true,
            // If its delivery ends in a shutdown, the loop finds the same.
            Err(Stop::Fault(e)) => self.deliver(e).is_ok(),
            Err(_) => false,
        };
        self.limit = limit;
        // SAFETY: as above.
        unsafe {
            (*self.frame).host_rsp = host_rsp;
            (*self.frame).budget = limit - self.position;
        }
        self.onward(done)
    }

    /// Goes on at the instruction at RIP, in the middle of a block that is left for good, with each access checked by itself. State, position and
    /// budget are exact.
    pub(super) fn ungrouped_and_on(&mut self) -> Onward {
        self.activity.set(Activity::Engine);
        self.settle();
        let mut mode = self.mode();
        let Ok((rip, gpa)) = self.fetch(mode) else { return Onward::Again };
        mode.0 |= Mode::UNGROUPED;
        match self.ungrouped_block(Key { gpa, rip, mode }) {
            Ok(id) => Onward::Code(self.cache.block(id).entry.into()),
            Err(_) => Onward::Again,
        }
    }

    /// How to go on after an instruction that is `done` with, its exception delivered if it had one.
    pub(super) fn onward(&mut self, done: bool) -> Onward {
        if !done {
            return Onward::Again;
        }
        self.next_code().map_or(Onward::Leave, Onward::Code)
    }
}
