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
use crate::segmentation;
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
    fn in_page(&self, cx: &Cx, s: usize, va: u64, register: u64) -> u64 {
        // Whatever a segment's limit may forbid is checked one by one.
        if !cx.st.is_64_bit_code() && !segmentation::is_open(&cx.st.seg[s]) {
            return 0;
        }
        let offset = va % PAGE_SIZE;
        let size = self.size as u64;
        let room = PAGE_SIZE - offset;
        if room < size {
            return 0;
        }
        // An address register narrower than the address space wraps, also inside a page.
        if self.down {
            return (offset / size + 1).min(((register & self.mask) / size).saturating_add(1));
        }
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
        cx.read_value(super::Ea { va: at, segment: self.source }, self.size)
    }

    fn movs(&self, cx: &mut Cx, budget: u64) -> Result<u64, Exception> {
        let (from, to) = (self.rsi(cx), self.rdi(cx));
        let (rsi, rdi) = (cx.st.gpr[gpr::RSI], cx.st.gpr[gpr::RDI]);
        let mut done = budget.min(self.in_page(cx, self.source, from, rsi)).min(self.in_page(cx, seg::ES, to, rdi));
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
            cx.write_value(super::Ea { va: to, segment: seg::ES }, self.size, value)?;
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
        let mut done = budget.min(self.in_page(cx, seg::ES, to, cx.st.gpr[gpr::RDI]));
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
                cx.write_value(super::Ea { va: to, segment: seg::ES }, self.size, value)?;
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
        let room = budget.min(self.in_page(cx, self.source, first, rsi)).min(self.in_page(cx, seg::ES, second, rdi));
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
                let b = cx.read_value(super::Ea { va: second, segment: seg::ES }, self.size)?;
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
        let room = budget.min(self.in_page(cx, seg::ES, at, cx.st.gpr[gpr::RDI]));
        let user = cx.user();
        let place = if room == 0 { Place::Device } else { cx.mmu.place_for_read(cx.st, at, user)? };
        let (done, stop) = match place {
            // SAFETY: `room` elements lie in one page of RAM.
            Place::Plain(host) => self.scan(room, |i| (wanted, unsafe { self.element(host, i) })),
            _ => {
                let value = cx.read_value(super::Ea { va: at, segment: seg::ES }, self.size)?;
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
            ((result as u8).count_ones().is_multiple_of(2), rflags::PF),
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
        // Reading a port has effects: only when nothing can fail any more.
        cx.probe_bytes(super::Ea { va: to, segment: seg::ES }, self.size)?;
        let port = cx.st.gpr[gpr::RDX] as u16;
        let value = cx.bus.pio_read(cx.position, port, self.size as u8);
        cx.write_value(super::Ea { va: to, segment: seg::ES }, self.size, value as u64)?;
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

#[cfg(test)]
mod tests {
    use super::super::testing::{DEVICE, LEAVES, ROOT, USER, World};
    use super::*;
    use crate::PageFlags;

    const REP_MOVSB: &[u8] = &[0xf3, 0xa4];
    const REP_MOVSQ: &[u8] = &[0xf3, 0x48, 0xa5];
    const REP_STOSQ: &[u8] = &[0xf3, 0x48, 0xab];
    const REPE_CMPSB: &[u8] = &[0xf3, 0xa6];
    const REPNE_SCASB: &[u8] = &[0xf2, 0xae];

    fn world(rsi: u64, rdi: u64, rcx: u64) -> World {
        let mut w = World::new();
        w.st.gpr[gpr::RSI] = rsi;
        w.st.gpr[gpr::RDI] = rdi;
        w.st.gpr[gpr::RCX] = rcx;
        w
    }
    fn registers(w: &World) -> (u64, u64, u64) {
        (w.st.gpr[gpr::RSI], w.st.gpr[gpr::RDI], w.st.gpr[gpr::RCX])
    }
    /// Runs an instruction until it is through; how many steps it took.
    fn finish(w: &mut World, code: &[u8]) -> u32 {
        let rip = w.st.rip;
        for steps in 1.. {
            match w.exec(code) {
                Ok(Flow::Next) => return steps,
                Ok(Flow::Jump) => assert_eq!(w.st.rip, rip),
                other => panic!("{other:?}"),
            }
        }
        unreachable!()
    }

    #[test]
    fn steps_are_4096_iterations() {
        let mut w = world(USER, USER + 0x10_0000, 4096 * 2 + 1);
        assert_eq!(w.exec(REP_MOVSB), Ok(Flow::Jump));
        assert_eq!(registers(&w), (USER + 4096, USER + 0x10_1000, 4097));
        assert_eq!(finish(&mut w, REP_MOVSB), 2);
        for (count, steps) in [(0, 1), (1, 1), (4096, 1), (4097, 2)] {
            let mut w = world(USER + 3, USER + 0x10_0000, count);
            assert_eq!(finish(&mut w, REP_STOSQ), steps);
            assert_eq!(registers(&w), (USER + 3, USER + 0x10_0000 + 8 * count, 0));
        }
    }

    /// Every size, direction, overlap and alignment against the manual's own definition.
    #[test]
    fn movs_equals_one_by_one() {
        let sizes: [(usize, &[u8]); 4] = [(1, REP_MOVSB), (2, &[0xf3, 0x66, 0xa5]), (4, &[0xf3, 0xa5]), (8, REP_MOVSQ)];
        for (size, code) in sizes {
            for down in [false, true] {
                for (s, d) in [(0, 1), (1, 0), (0, 3), (5, 0), (0, 8), (0, 16), (7, 4000), (4090, 8190), (0, 0), (3000, 2999)] {
                    for count in [1u64, 2, 13, 500, 700] {
                        let middle = USER + 0x10_0000;
                        let mut w = world(middle + s, middle + d, count);
                        let mut model: Vec<u8> = (0..0x20_0000u32 / 16).map(|i| (i * 7 + i / 256) as u8).collect();
                        let base = middle - 0x1_0000;
                        w.put_bytes(base, &model);
                        if down {
                            w.st.rflags |= rflags::DF;
                        }
                        let (mut from, mut to) = (0x1_0000 + s as usize, 0x1_0000 + d as usize);
                        for _ in 0..count {
                            let element: Vec<u8> = model[from..from + size].to_vec();
                            model[to..to + size].copy_from_slice(&element);
                            if down {
                                (from, to) = (from - size, to - size);
                            } else {
                                (from, to) = (from + size, to + size);
                            }
                        }
                        finish(&mut w, code);
                        assert!(w.bytes(base, model.len()) == model, "{size} {down} {s} {d} {count}");
                        assert_eq!(registers(&w), (base + from as u64, base + to as u64, 0));
                    }
                }
            }
        }
    }

    #[test]
    fn overlap_repeats() {
        let mut w = world(USER, USER + 1, 5000);
        w.put(USER, 0xab);
        finish(&mut w, REP_MOVSB);
        assert!(w.bytes(USER, 5001).iter().all(|&b| b == 0xab));
        assert_eq!(w.get(USER + 5001) as u8, 0);
    }

    #[test]
    fn stos_fills() {
        for down in [false, true] {
            for (size, code) in [(1, &[0xf3u8, 0xaa] as &[u8]), (2, &[0xf3, 0x66, 0xab]), (4, &[0xf3, 0xab]), (8, REP_STOSQ)] {
                let start = USER + 0x1_0003;
                let mut w = world(0, start, 1500);
                w.st.gpr[gpr::RAX] = 0x8877_6655_4433_2211;
                if down {
                    w.st.rflags |= rflags::DF;
                }
                finish(&mut w, code);
                let low = if down { start - 1499 * size } else { start };
                let got = w.bytes(low - 1, 1500 * size as usize + 2);
                let element = &0x8877_6655_4433_2211u64.to_le_bytes()[..size as usize];
                assert_eq!((got[0], got[got.len() - 1]), (0, 0));
                assert!(got[1..got.len() - 1].chunks(size as usize).all(|c| c == element), "{size} {down}");
            }
        }
    }

    #[test]
    fn a_fault_stays_at_its_iteration() {
        let mut w = world(USER, USER + 0x10_0ff8, 100);
        w.unmap(USER + 0x10_1000);
        assert_eq!(w.exec(REP_MOVSQ), Err(Exception::pf(2, USER + 0x10_1000)));
        assert_eq!(registers(&w), (USER + 8, USER + 0x10_1000, 99));
        // The source is read first.
        let mut w = world(USER + 0x10_0ff8, USER + 0x10_0ff8, 100);
        w.unmap(USER + 0x10_1000);
        assert_eq!(w.exec(REP_MOVSQ), Err(Exception::pf(0, USER + 0x10_1000)));
        // An element that straddles the boundary writes nothing.
        let mut w = world(0, USER + 0x10_0ffc, 100);
        w.st.gpr[gpr::RAX] = u64::MAX;
        w.unmap(USER + 0x10_1000);
        assert_eq!(w.exec(REP_STOSQ), Err(Exception::pf(2, USER + 0x10_1000)));
        assert_eq!(registers(&w).2, 100);
        assert_eq!(w.get(USER + 0x10_0ff8), 0);
        // User code and a supervisor page.
        let mut w = World::new().user();
        w.st.gpr[gpr::RDI] = 0x10_0000;
        assert_eq!(w.exec(&[0xaa]), Err(Exception::pf(7, 0x10_0000)));
        w.st.gpr[gpr::RDI] = 1 << 60;
        assert_eq!(w.exec(&[0xaa]), Err(Exception::gp(0)));
    }

    #[test]
    fn compares_stop_where_they_should() {
        let mut w = world(USER, USER + 0x10_0000, 10000);
        w.put_bytes(USER + 5000, &[5]);
        w.put_bytes(USER + 0x10_0000 + 5000, &[6]);
        assert_eq!(w.exec(REPE_CMPSB), Ok(Flow::Jump));
        assert_ne!(w.st.rflags & rflags::ZF, 0);
        assert_eq!(w.exec(REPE_CMPSB), Ok(Flow::Next));
        assert_eq!(registers(&w), (USER + 5001, USER + 0x10_0000 + 5001, 4999));
        assert_eq!(w.st.rflags & rflags::STATUS, rflags::CF | rflags::SF | rflags::AF | rflags::PF);
        // REPNE SCASB finds; nothing found ends with RCX zero and ZF clear.
        let mut w = world(0, USER + 4000, 1000);
        w.st.gpr[gpr::RAX] = 0x1142;
        w.put_bytes(USER + 4000 + 600, &[0x42]);
        assert_eq!(w.exec(REPNE_SCASB), Ok(Flow::Next));
        assert_eq!(registers(&w), (0, USER + 4601, 399));
        assert_ne!(w.st.rflags & rflags::ZF, 0);
        assert_eq!(w.exec(REPNE_SCASB), Ok(Flow::Next));
        assert_eq!(registers(&w).2, 0);
        assert_eq!(w.st.rflags & rflags::ZF, 0);
        // A count of zero leaves the flags alone.
        w.st.rflags |= rflags::STATUS;
        assert_eq!(w.exec(REPNE_SCASB), Ok(Flow::Next));
        assert_eq!(w.st.rflags & rflags::STATUS, rflags::STATUS);
        // A fault leaves them as they were, and the registers where it happened.
        let mut w = world(USER, USER + 0x10_0ff0, 100);
        w.st.rflags |= rflags::CF;
        w.unmap(USER + 0x10_1000);
        assert_eq!(w.exec(REPE_CMPSB), Err(Exception::pf(0, USER + 0x10_1000)));
        assert_eq!(registers(&w), (USER + 16, USER + 0x10_1000, 84));
        assert_eq!(w.st.rflags & rflags::STATUS, rflags::CF);
    }

    /// CMPSx and SCASx leave the flags CMP does: the silicon is asked.
    #[test]
    fn flags_are_those_of_the_silicon() {
        let values = [0u64, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, 1 << 63, u64::MAX, 0x0f, 0x10];
        for a in values {
            for b in values {
                let mut w = world(USER, USER + 64, 0);
                w.put(USER, a);
                w.put(USER + 64, b);
                assert_eq!(w.exec(&[0x48, 0xa7]), Ok(Flow::Next));
                let flags: u64;
                // SAFETY: compares two registers and reads the flags through the stack.
                unsafe { std::arch::asm!("cmp {a}, {b}", "pushfq", "pop {f}", a = in(reg) a, b = in(reg) b, f = out(reg) flags) };
                assert_eq!(w.st.rflags & rflags::STATUS, flags & rflags::STATUS, "{a:x} {b:x}");
                let mut w = world(USER, USER + 64, 0);
                w.put(USER, a);
                w.put(USER + 64, b);
                assert_eq!(w.exec(&[0xa6]), Ok(Flow::Next));
                let flags: u64;
                // SAFETY: as above.
                unsafe {
                    std::arch::asm!("cmp {a}, {b}", "pushfq", "pop {f}", a = in(reg_byte) a as u8, b = in(reg_byte) b as u8, f = out(reg) flags)
                };
                assert_eq!(w.st.rflags & rflags::STATUS, flags & rflags::STATUS, "{a:x} {b:x}");
            }
        }
    }

    #[test]
    fn narrow_addresses_wrap_and_zero_extend() {
        let mut w = world(0xffff_ffff_0000_0000 | USER, 0x1_0000_0000 | (USER + 64), 0x5_0000_0003);
        w.put(USER, 0x00cc_bbaa);
        // REP MOVSB with 32-bit addresses.
        assert_eq!(w.exec(&[0x67, 0xf3, 0xa4]), Ok(Flow::Next));
        assert_eq!(registers(&w), (USER + 3, USER + 67, 0));
        assert_eq!(w.get(USER + 64), 0x00cc_bbaa);
        // The source has FS's base, the target has none.
        let mut w = world(0x40, USER, 8);
        w.st.seg[seg::FS].base = USER + 0x100;
        w.put(USER + 0x140, 0x55);
        assert_eq!(w.exec(&[0x64, 0xa4]), Ok(Flow::Next));
        assert_eq!(w.get(USER), 0x55);
    }

    #[test]
    fn devices_get_every_element() {
        let mut w = world(USER, DEVICE, 3);
        finish(&mut w, &[0xf3, 0xa5]);
        assert_eq!(w.bus.log, ["w4 fee00000", "w4 fee00004", "w4 fee00008"]);
        let mut w = world(DEVICE + 8, USER, 2);
        finish(&mut w, &[0xf3, 0xa4]);
        assert_eq!(w.bus.log, ["r1 fee00008", "r1 fee00009"]);
        assert_eq!(w.get(USER), 0xdada);
    }

    #[test]
    fn code_and_table_pages_hear_of_it() {
        for down in [false, true] {
            let mut w = world(USER, USER + 0x10_0ff0, 4);
            let page = (USER + 0x10_0000) as usize / 4096;
            w.put(USER, 0x1122_3344);
            w.put(USER - 24, 77);
            w.mmu.ram().flags().set(page, PageFlags::CODE);
            if down {
                w.st.rflags |= rflags::DF;
            }
            assert_eq!(w.exec(REP_MOVSQ), Ok(Flow::Next));
            assert!(w.mmu.pending.code.iter().any(|&(p, _, _)| p == page));
            assert_eq!(w.get(USER + 0x10_0ff0), 0x1122_3344);
            assert_eq!(w.get(USER + 0x10_0fd8), if down { 77 } else { 0 });
        }
        // Clearing a leaf table with REP STOSQ takes the translation away at once.
        let mut w = world(0, LEAVES + 0x1000, 512);
        let at = USER + 0x5000;
        assert!(w.cx().read(at, &mut [0]).is_ok());
        w.st.gpr[gpr::RAX] = 0;
        finish(&mut w, REP_STOSQ);
        assert_eq!(w.cx().read(at, &mut [0]), Err(Exception::pf(0, at)));
        assert_eq!(w.get(ROOT) & 1, 1);
    }

    #[test]
    fn ports_in_strings() {
        let mut w = world(USER, USER + 64, 2);
        w.st.gpr[gpr::RDX] = 0x1f0;
        w.bus.port_value = 0x1234_5678;
        finish(&mut w, &[0xf3, 0x66, 0x6d]);
        assert_eq!(w.get(USER + 64), 0x5678_5678);
        w.put(USER, 0xbeef);
        finish(&mut w, &[0x6e]);
        assert_eq!(w.bus.log, ["in2 1f0", "in2 1f0", "out1 1f0 ef"]);
        // A fault asks no port.
        w.unmap(USER + 0x10_0000);
        w.st.gpr[gpr::RDI] = USER + 0x10_0000;
        assert_eq!(w.exec(&[0x6c]), Err(Exception::pf(2, USER + 0x10_0000)));
        assert_eq!(w.bus.log.len(), 3);
    }

    #[test]
    fn lods_loads() {
        let mut w = world(USER, 0, 3);
        w.st.gpr[gpr::RAX] = u64::MAX;
        w.put(USER, 0x0605_0403_0201);
        finish(&mut w, &[0xac]);
        assert_eq!(w.st.gpr[gpr::RAX], 0xffff_ffff_ffff_ff01);
        finish(&mut w, &[0xad]);
        assert_eq!(w.st.gpr[gpr::RAX], 0x0504_0302);
        finish(&mut w, &[0xf3, 0xac]);
        assert_eq!(registers(&w), (USER + 8, 0, 0));
    }
}
