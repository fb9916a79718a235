//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, with every prefix, size and direction.
//!
//! **In:** the instruction; RSI, RDI, RCX, RAX, DF. **Out:** at most [`STEP`] iterations done, registers moved accordingly.
//!
//! **Invariant:** how far a step goes depends on registers and memory only, never on what a TLB holds. A fault leaves the
//! registers at the faulting iteration; CMPS and SCAS then leave the flags as they were before the step (SDM vol. 2, "REP").
//!
//! MOVS, STOS, CMPS and SCAS work on host memory, a page at a time; whatever is not plain RAM, and elements that straddle a
//! page, go through the MMU one by one.
//!
//! References: APM vol. 3 ("MOVS" etc., section 1.2.6), docs/positions.md.
use super::{Cx, Flow, segment_number};
use crate::mmu::Place;
use crate::state::{gpr, rflags, seg};
use crate::{Exception, PAGE_SIZE};
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Iterations of a REP instruction that retire together at most (docs/positions.md).
const STEP: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
    Ins,
    Outs,
}

/// Whether an instruction whose mnemonic is ambiguous (MOVSD, CMPSD) is the string one.
pub(super) fn is_string(insn: &Instruction) -> bool {
    insn.is_string_instruction()
}

fn decode(mnemonic: Mnemonic) -> Option<(Op, usize)> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Movsb => (Op::Movs, 1),
        M::Movsw => (Op::Movs, 2),
        M::Movsd => (Op::Movs, 4),
        M::Movsq => (Op::Movs, 8),
        M::Stosb => (Op::Stos, 1),
        M::Stosw => (Op::Stos, 2),
        M::Stosd => (Op::Stos, 4),
        M::Stosq => (Op::Stos, 8),
        M::Lodsb => (Op::Lods, 1),
        M::Lodsw => (Op::Lods, 2),
        M::Lodsd => (Op::Lods, 4),
        M::Lodsq => (Op::Lods, 8),
        M::Cmpsb => (Op::Cmps, 1),
        M::Cmpsw => (Op::Cmps, 2),
        M::Cmpsd => (Op::Cmps, 4),
        M::Cmpsq => (Op::Cmps, 8),
        M::Scasb => (Op::Scas, 1),
        M::Scasw => (Op::Scas, 2),
        M::Scasd => (Op::Scas, 4),
        M::Scasq => (Op::Scas, 8),
        M::Insb => (Op::Ins, 1),
        M::Insw => (Op::Ins, 2),
        M::Insd => (Op::Ins, 4),
        M::Outsb => (Op::Outs, 1),
        M::Outsw => (Op::Outs, 2),
        M::Outsd => (Op::Outs, 4),
        _ => return None,
    })
}

/// One string instruction on its way.
struct Run {
    /// Bytes in an element.
    size: usize,
    /// DF: addresses go down.
    down: bool,
    /// The part of RSI, RDI and RCX that counts.
    mask: u64,
    /// Segment register number of the source.
    source: usize,
    /// For CMPS and SCAS with a prefix: go on while ZF is this.
    while_zf: Option<bool>,
    /// The last comparison, not yet in the flags.
    compared: Option<(u64, u64)>,
}

/// Executes a string instruction, or one step of it.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let Some((op, size)) = decode(insn.mnemonic()) else { return Err(Exception::UD) };
    let mask = address_mask(insn);
    let rep = insn.has_rep_prefix() || insn.has_repne_prefix();
    let mut run = Run {
        size,
        down: cx.st.rflags & rflags::DF != 0,
        mask,
        source: segment_number(insn.memory_segment()),
        while_zf: (rep && matches!(op, Op::Cmps | Op::Scas)).then(|| !insn.has_repne_prefix()),
        compared: None,
    };
    if matches!(op, Op::Ins | Op::Outs) {
        super::io::check(cx, cx.st.gpr[gpr::RDX] as u16, size)?;
    }
    if !rep {
        run.part(cx, op, 1)?;
        run.set_flags(cx);
        return Ok(Flow::Next);
    }
    let mut left = cx.st.gpr[gpr::RCX] & mask;
    let mut budget = left.min(STEP);
    let mut stopped = false;
    while budget > 0 && !stopped {
        // A fault ends the step here: what came before it stays done, and the flags stay as they were.
        let (done, stop) = run.part(cx, op, budget)?;
        budget -= done;
        left -= done;
        stopped = stop;
        set_masked(&mut cx.st.gpr[gpr::RCX], mask, left);
    }
    run.set_flags(cx);
    // RIP is at the instruction already.
    Ok(if left == 0 || stopped { Flow::Next } else { Flow::Jump })
}

/// The address size, as a mask.
fn address_mask(insn: &Instruction) -> u64 {
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return 0xffff_ffff,
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 0xffff,
            _ => {}
        }
    }
    u64::MAX
}

/// Writes an address-sized register: 32 bits zero-extend, 16 bits merge.
fn set_masked(register: &mut u64, mask: u64, value: u64) {
    *register = if mask == 0xffff { *register & !mask | value & mask } else { value & mask };
}

impl Run {
    fn rsi(&self, cx: &Cx) -> u64 {
        cx.linear(self.source, cx.st.gpr[gpr::RSI] & self.mask).va
    }
    fn rdi(&self, cx: &Cx) -> u64 {
        cx.linear(seg::ES, cx.st.gpr[gpr::RDI] & self.mask).va
    }
    fn advance(&self, cx: &mut Cx, register: usize, elements: u64) {
        let bytes = elements.wrapping_mul(self.size as u64);
        let slot = &mut cx.st.gpr[register];
        let moved = if self.down { slot.wrapping_sub(bytes) } else { slot.wrapping_add(bytes) };
        set_masked(slot, self.mask, moved);
    }

    /// Elements from `va` on, in the direction of travel, that lie in the same page completely; 0 if the first one straddles.
    fn in_page(&self, va: u64, register: u64) -> u64 {
        let offset = va % PAGE_SIZE;
        let size = self.size as u64;
        let room = PAGE_SIZE - offset;
        if room < size {
            return 0;
        }
        if self.down {
            return offset / size + 1;
        }
        // An address register narrower than the address space wraps, also inside a page.
        let wrap = (self.mask - (register & self.mask)) / size;
        (room / size).min(wrap.saturating_add(1))
    }

    /// The lowest address of `elements` elements the first of which is at `host`.
    fn lowest(&self, host: *mut u8, elements: u64) -> *mut u8 {
        if self.down { host.wrapping_sub((elements as usize - 1) * self.size) } else { host }
    }

    /// Does between one and `budget` iterations. Says how many, and whether a comparison ended the instruction.
    fn part(&mut self, cx: &mut Cx, op: Op, budget: u64) -> Result<(u64, bool), Exception> {
        match op {
            Op::Movs => self.movs(cx, budget).map(|n| (n, false)),
            Op::Stos => self.stos(cx, budget).map(|n| (n, false)),
            Op::Lods => self.lods(cx).map(|n| (n, false)),
            Op::Cmps => self.cmps(cx, budget),
            Op::Scas => self.scas(cx, budget),
            Op::Ins => self.ins(cx).map(|n| (n, false)),
            Op::Outs => self.outs(cx).map(|n| (n, false)),
        }
    }

    fn read_element(&self, cx: &mut Cx, at: u64) -> Result<u64, Exception> {
        let stack = self.source == seg::SS;
        cx.read_value(super::Ea { va: at, stack }, self.size)
    }

    fn movs(&self, cx: &mut Cx, budget: u64) -> Result<u64, Exception> {
        let (from, to) = (self.rsi(cx), self.rdi(cx));
        let (rsi, rdi) = (cx.st.gpr[gpr::RSI], cx.st.gpr[gpr::RDI]);
        let mut done = budget.min(self.in_page(from, rsi)).min(self.in_page(to, rdi));
        let user = cx.user();
        let mut fast = done > 0;
        if fast {
            let source = cx.mmu.place_for_read(cx.st, from, user)?;
            let target = cx.mmu.place_for_write(cx.st, to, user)?;
            let bytes = done as usize * self.size;
            match (source, target) {
                (Place::Plain(s), Place::Plain(d)) => {
                    let (s, d) = (self.lowest(s, done), self.lowest(d, done));
                    // SAFETY: both ranges lie in one page of RAM each (`in_page`).
                    unsafe { self.copy(s, d, done as usize) };
                }
                (Place::Plain(s), Place::Special(gpa)) => {
                    let s = self.lowest(s, done);
                    let low = if self.down { gpa - (bytes - self.size) as u64 } else { gpa };
                    let same_page = cx.mmu.ram().page(gpa).is_some_and(|(_, d)| s as u64 & !(PAGE_SIZE - 1) == d as u64);
                    if same_page {
                        // May overlap: one by one, below.
                        fast = false;
                    } else {
                        let mut copy = [0; PAGE_SIZE as usize];
                        // SAFETY: `bytes` bytes in one page of RAM; the copy is as large as a page.
                        unsafe { std::ptr::copy_nonoverlapping(s, copy.as_mut_ptr(), bytes) };
                        cx.mmu.write_ram(low, &copy[..bytes]);
                    }
                }
                _ => fast = false,
            }
        }
        if !fast {
            let value = self.read_element(cx, from)?;
            cx.write_value(super::Ea { va: to, stack: false }, self.size, value)?;
            done = 1;
        }
        self.advance(cx, gpr::RSI, done);
        self.advance(cx, gpr::RDI, done);
        Ok(done)
    }

    /// Copies as if element by element in the direction of travel: an overlap in that direction repeats what was just written.
    ///
    /// # Safety
    /// Both ranges of `elements` elements must be valid RAM.
    unsafe fn copy(&self, s: *const u8, d: *mut u8, elements: usize) {
        let bytes = elements * self.size;
        let ahead = (d as usize).wrapping_sub(s as usize);
        let behind = (s as usize).wrapping_sub(d as usize);
        let repeats = if self.down { behind != 0 && behind < bytes } else { ahead != 0 && ahead < bytes };
        if !repeats {
            // SAFETY: contract of this function.
            unsafe { std::ptr::copy(s, d, bytes) };
            return;
        }
        for i in 0..elements {
            let at = if self.down { elements - 1 - i } else { i } * self.size;
            let mut element = [0u8; 8];
            // SAFETY: element `at` of both ranges; the two copies go through a buffer, so overlap inside an element is fine.
            unsafe {
                std::ptr::copy_nonoverlapping(s.add(at), element.as_mut_ptr(), self.size);
                std::ptr::copy_nonoverlapping(element.as_ptr(), d.add(at), self.size);
            }
        }
    }

    fn stos(&self, cx: &mut Cx, budget: u64) -> Result<u64, Exception> {
        let to = self.rdi(cx);
        let value = cx.st.gpr[gpr::RAX];
        let mut done = budget.min(self.in_page(to, cx.st.gpr[gpr::RDI]));
        let user = cx.user();
        let place = if done == 0 { Place::Device } else { cx.mmu.place_for_write(cx.st, to, user)? };
        match place {
            Place::Plain(host) => {
                let low = self.lowest(host, done);
                // SAFETY: `done` elements in one page of RAM (`in_page`).
                unsafe { self.fill(low, value, done as usize) };
            }
            Place::Special(gpa) => {
                let mut copy = [0u8; PAGE_SIZE as usize];
                let bytes = done as usize * self.size;
                // SAFETY: at most a page, and the buffer is a page.
                unsafe { self.fill(copy.as_mut_ptr(), value, done as usize) };
                let low = if self.down { gpa - (bytes - self.size) as u64 } else { gpa };
                cx.mmu.write_ram(low, &copy[..bytes]);
            }
            Place::Device => {
                cx.write_value(super::Ea { va: to, stack: false }, self.size, value)?;
                done = 1;
            }
        }
        self.advance(cx, gpr::RDI, done);
        Ok(done)
    }

    /// Stores `value` into `elements` elements from `low` on.
    ///
    /// # Safety
    /// The range must be valid for writing.
    unsafe fn fill(&self, low: *mut u8, value: u64, elements: usize) {
        // SAFETY: contract of this function; the pointers may be unaligned.
        unsafe {
            match self.size {
                1 => std::ptr::write_bytes(low, value as u8, elements),
                2 => (0..elements).for_each(|i| low.cast::<u16>().add(i).write_unaligned(value as u16)),
                4 => (0..elements).for_each(|i| low.cast::<u32>().add(i).write_unaligned(value as u32)),
                _ => (0..elements).for_each(|i| low.cast::<u64>().add(i).write_unaligned(value)),
            }
        }
    }

    fn lods(&self, cx: &mut Cx) -> Result<u64, Exception> {
        let at = self.rsi(cx);
        let value = self.read_element(cx, at)?;
        self.set_accumulator(cx, value);
        self.advance(cx, gpr::RSI, 1);
        Ok(1)
    }

    fn set_accumulator(&self, cx: &mut Cx, value: u64) {
        let rax = &mut cx.st.gpr[gpr::RAX];
        *rax = match self.size {
            1 => *rax & !0xff | value & 0xff,
            2 => *rax & !0xffff | value & 0xffff,
            4 => value as u32 as u64,
            _ => value,
        };
    }

    fn cmps(&mut self, cx: &mut Cx, budget: u64) -> Result<(u64, bool), Exception> {
        let (first, second) = (self.rsi(cx), self.rdi(cx));
        let (rsi, rdi) = (cx.st.gpr[gpr::RSI], cx.st.gpr[gpr::RDI]);
        let room = budget.min(self.in_page(first, rsi)).min(self.in_page(second, rdi));
        let user = cx.user();
        let mut places = None;
        if room > 0 {
            let a = cx.mmu.place_for_read(cx.st, first, user).map_err(|e| self.source_fault(e))?;
            if let (Place::Plain(a), Place::Plain(b)) = (a, cx.mmu.place_for_read(cx.st, second, user)?) {
                places = Some((a, b));
            }
        }
        let (done, stop) = match places {
            // SAFETY: `room` elements at both places lie in one page of RAM each.
            Some((a, b)) => self.scan(room, |i| unsafe { (self.element(a, i), self.element(b, i)) }),
            None => {
                let a = self.read_element(cx, first)?;
                let b = cx.read_value(super::Ea { va: second, stack: false }, self.size)?;
                self.scan(1, |_| (a, b))
            }
        };
        self.compared = Some(done.1);
        self.advance(cx, gpr::RSI, done.0);
        self.advance(cx, gpr::RDI, done.0);
        Ok((done.0, stop))
    }

    fn scas(&mut self, cx: &mut Cx, budget: u64) -> Result<(u64, bool), Exception> {
        let at = self.rdi(cx);
        let wanted = cx.st.gpr[gpr::RAX] & self.element_mask();
        let room = budget.min(self.in_page(at, cx.st.gpr[gpr::RDI]));
        let user = cx.user();
        let place = if room == 0 { Place::Device } else { cx.mmu.place_for_read(cx.st, at, user)? };
        let (done, stop) = match place {
            // SAFETY: `room` elements lie in one page of RAM.
            Place::Plain(host) => self.scan(room, |i| (wanted, unsafe { self.element(host, i) })),
            _ => {
                let value = cx.read_value(super::Ea { va: at, stack: false }, self.size)?;
                self.scan(1, |_| (wanted, value))
            }
        };
        self.compared = Some(done.1);
        self.advance(cx, gpr::RDI, done.0);
        Ok((done.0, stop))
    }

    /// Compares up to `room` pairs (at least one) until the prefix says stop: how many, the last pair, and whether it stopped.
    fn scan(&self, room: u64, pair: impl Fn(usize) -> (u64, u64)) -> ((u64, (u64, u64)), bool) {
        let mut last = (0, 0);
        for i in 0..room {
            last = pair(i as usize);
            if self.while_zf.is_some_and(|zf| (last.0 == last.1) != zf) {
                return ((i + 1, last), true);
            }
        }
        ((room, last), false)
    }

    /// Element number `i` in the direction of travel.
    ///
    /// # Safety
    /// It must be valid for reading.
    #[inline]
    unsafe fn element(&self, host: *mut u8, i: usize) -> u64 {
        let at = if self.down { host.wrapping_sub(i * self.size) } else { host.wrapping_add(i * self.size) };
        // SAFETY: contract of this function.
        unsafe {
            match self.size {
                1 => at.read() as u64,
                2 => at.cast::<u16>().read_unaligned() as u64,
                4 => at.cast::<u32>().read_unaligned() as u64,
                _ => at.cast::<u64>().read_unaligned(),
            }
        }
    }

    fn source_fault(&self, e: Exception) -> Exception {
        if self.source == seg::SS { super::as_stack_fault(e) } else { e }
    }

    fn element_mask(&self) -> u64 {
        u64::MAX >> (64 - 8 * self.size)
    }

    /// Puts the last comparison into the status flags, as CMP would.
    fn set_flags(&self, cx: &mut Cx) {
        let Some((a, b)) = self.compared else { return };
        let mask = self.element_mask();
        let sign = mask & !(mask >> 1);
        let result = a.wrapping_sub(b) & mask;
        let mut flags = 0;
        for (set, flag) in [
            (a < b, rflags::CF),
            ((result as u8).count_ones() % 2 == 0, rflags::PF),
            ((a ^ b ^ result) & 0x10 != 0, rflags::AF),
            (result == 0, rflags::ZF),
            (result & sign != 0, rflags::SF),
            ((a ^ b) & (a ^ result) & sign != 0, rflags::OF),
        ] {
            if set {
                flags |= flag;
            }
        }
        cx.st.rflags = cx.st.rflags & !rflags::STATUS | flags;
    }

    fn ins(&self, cx: &mut Cx) -> Result<u64, Exception> {
        let to = self.rdi(cx);
        let user = cx.user();
        // Reading a port has effects: only when nothing can fail any more.
        cx.mmu.probe_write(cx.st, to, self.size, user)?;
        let port = cx.st.gpr[gpr::RDX] as u16;
        let value = cx.bus.pio_read(cx.position, port, self.size as u8);
        cx.write_value(super::Ea { va: to, stack: false }, self.size, value as u64)?;
        self.advance(cx, gpr::RDI, 1);
        Ok(1)
    }

    fn outs(&self, cx: &mut Cx) -> Result<u64, Exception> {
        let at = self.rsi(cx);
        let value = self.read_element(cx, at)?;
        let port = cx.st.gpr[gpr::RDX] as u16;
        cx.bus.pio_write(cx.position, port, self.size as u8, value as u32);
        self.advance(cx, gpr::RSI, 1);
        Ok(1)
    }
}
