//! Protected mode's own gates and calls: the IDT of 8-byte gates, call gates that copy parameters, SYSENTER and SYSEXIT.
//!
//! **In:** a vector or a gate, the 16-bit or 32-bit TSS. **Out:** the inner level's first instruction, with the frame on its stack.
//!
//! **Invariant:** a transfer either happens completely or changes nothing. Hardware task switches and virtual-8086 mode are not offered: what
//! would really begin one ends the machine with a message; what the manuals refuse before it begins is refused as they say.
//!
//! References: SDM vol. 2 ("INT n", "CALL", "IRET", "SYSENTER"), vol. 3 sections 5.8 and 6.12; APM vol. 2 sections 4.11.2, 8.7, 6.1.2.
use super::delivery::Source;
use super::segments::{Descriptor, error_code, flat_code, flat_data, is_null, system};
use super::{Cx, Flow};
use crate::exception::Vector;
use crate::state::{Segment, cr0, gpr, rflags, seg};
use crate::{Exception, segmentation};
use iced_x86::Instruction;

/// A fault about a selector, with the bit that says that something external was being delivered.
fn external(e: Exception, ext: u32) -> Exception {
    match (e.vector, e.error) {
        (Vector::PageFault, _) | (_, None) => e,
        (_, Some(error)) => Exception { error: Some(error | ext), ..e },
    }
}

/// A stack to push a frame on.
struct Stack {
    ss: Segment,
    rsp: u64,
    /// Its memory is accessed with user permissions.
    user: bool,
    /// The fault if the segment has no room.
    no_room: Exception,
}

impl Stack {
    fn mask(&self) -> u64 {
        if self.ss.attributes & Segment::BIG != 0 { 0xffff_ffff } else { 0xffff }
    }

    /// Pushes words of `size` bytes in this order, all or none.
    fn push(&mut self, cx: &mut Cx, words: &[u64], size: usize) -> Result<(), Exception> {
        let mut places = Vec::with_capacity(words.len());
        let mut offset = self.rsp;
        for word in words {
            offset = offset.wrapping_sub(size as u64) & self.mask();
            if !segmentation::allows(&self.ss, offset as u32, size, true) {
                return Err(self.no_room);
            }
            let va = (self.ss.base as u32).wrapping_add(offset as u32);
            // Byte by byte where the address space ends inside a word.
            let whole = va.checked_add(size as u32 - 1).is_some();
            for (i, bytes) in word.to_le_bytes()[..size].chunks(if whole { size } else { 1 }).enumerate() {
                let at = u64::from(va.wrapping_add(i as u32));
                cx.mmu.probe_write(cx.st, at, bytes.len(), self.user)?;
                let mut copy = [0; 4];
                copy[..bytes.len()].copy_from_slice(bytes);
                places.push((at, copy, bytes.len()));
            }
        }
        for (at, bytes, len) in places {
            cx.write_as(at, &bytes[..len], self.user)?;
        }
        // A 16-bit stack pointer leaves the upper bits alone.
        self.rsp = if self.mask() == 0xffff { self.rsp & !0xffff | offset } else { offset };
        Ok(())
    }
}

/// The stack of the level the processor is at.
fn current_stack(cx: &Cx, ext: u32) -> Stack {
    Stack { ss: cx.st.seg[seg::SS], rsp: cx.st.gpr[gpr::RSP], user: cx.st.cpl == 3, no_room: Exception::ss(ext) }
}

/// The stack the TSS has for an inner level.
fn inner_stack(cx: &mut Cx, cpl: u8, ext: u32) -> Result<Stack, Exception> {
    let tr = cx.st.tr;
    let wide = tr.attributes & 8 != 0;
    let (offset, size) = if wide { (4 + u32::from(cpl) * 8, 4) } else { (2 + u32::from(cpl) * 4, 2) };
    if tr.attributes & Segment::PRESENT == 0 || offset + size + 1 > tr.limit {
        return Err(Exception::ts(error_code(tr.selector) | ext));
    }
    let at = |by: u32| u64::from((tr.base as u32).wrapping_add(offset + by));
    let rsp = u32::from_le_bytes(cx.read_system(at(0))?);
    let rsp = if wide { rsp } else { rsp & 0xffff };
    let selector = u16::from_le_bytes(cx.read_system(at(size))?);
    let (ss, descriptor) = cx.checked_ss(selector, cpl, false, Exception::ts).map_err(|e| external(e, ext))?;
    if let Some(d) = descriptor {
        cx.mark_accessed(&d)?;
    }
    let no_room = Exception::ss(error_code(selector) | ext);
    Ok(Stack { ss, rsp: rsp.into(), user: cpl == 3, no_room })
}

/// Goes through gate `vector` of an IDT of 8-byte gates, or fails without a trace.
pub(super) fn enter(
    cx: &mut Cx,
    vector: u8,
    error: Option<u32>,
    source: Source,
    rip: u64,
    frame_flags: u64,
) -> Result<(), Exception> {
    let ext = (source == Source::Hardware) as u32;
    let gate_error = u32::from(vector) << 3 | 2 | ext;
    let offset = u32::from(vector) * 8;
    if cx.st.cr0 & cr0::PE == 0 {
        cx.unsupported = Some("an interrupt or exception in real mode");
        return Err(Exception::gp(0));
    }
    if offset + 7 > cx.st.idtr.limit.into() {
        return Err(Exception::gp(gate_error));
    }
    let gate = u64::from_le_bytes(cx.read_system(cx.st.idtr.base.wrapping_add(offset.into()))?);
    let kind = (gate >> 40) as u16 & 31;
    let size = match kind {
        system::INTERRUPT_GATE | system::TRAP_GATE => 4,
        system::INTERRUPT_GATE_16 | system::TRAP_GATE_16 => 2,
        system::TASK_GATE => 0,
        _ => return Err(Exception::gp(gate_error)),
    };
    if source == Source::Software && ((gate >> 45) as u8 & 3) < cx.st.cpl {
        return Err(Exception::gp(gate_error));
    }
    if gate >> 47 & 1 == 0 {
        return Err(Exception::np(gate_error));
    }
    if size == 0 {
        cx.unsupported = Some("a hardware task switch (task gate in the IDT)");
        return Err(Exception::gp(gate_error));
    }
    let handler = gate & 0xffff | if size == 4 { gate >> 32 & 0xffff_0000 } else { 0 };
    let selector = (gate >> 16) as u16;
    if is_null(selector) {
        return Err(Exception::gp(ext));
    }
    let bad = Exception::gp(error_code(selector) | ext);
    let code = cx.find_descriptor(selector)?.ok_or(bad)?;
    if !code.is_code() || code.dpl() > cx.st.cpl {
        return Err(bad);
    }
    if !code.is_present() {
        return Err(Exception::np(error_code(selector) | ext));
    }
    let cpl = if code.is_conforming() { cx.st.cpl } else { code.dpl() };
    let inner = cpl < cx.st.cpl;
    let mut stack = if inner { inner_stack(cx, cpl, ext)? } else { current_stack(cx, ext) };
    if handler > code.limit().into() {
        return Err(Exception::gp(ext));
    }
    cx.mark_accessed(&code)?;
    let (ss, cs) = (cx.st.seg[seg::SS].selector.into(), cx.st.seg[seg::CS].selector.into());
    let words = [ss, cx.st.gpr[gpr::RSP], frame_flags, cs, rip, error.unwrap_or(0).into()];
    let first = if inner { 0 } else { 2 };
    let end = if error.is_some() { 6 } else { 5 };
    stack.push(cx, &words[first..end], size)?;

    let st = &mut cx.st;
    st.gpr[gpr::RSP] = stack.rsp;
    if inner {
        st.seg[seg::SS] = stack.ss;
    }
    st.seg[seg::CS] = code.segment(selector & !3 | u16::from(cpl));
    st.cpl = cpl;
    st.rip = handler;
    st.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if matches!(kind, system::INTERRUPT_GATE | system::INTERRUPT_GATE_16) {
        st.rflags &= !rflags::IF;
    }
    st.halted = false;
    st.interrupt_shadow = false;
    Ok(())
}

/// A far CALL or JMP to a system descriptor: a call gate, or what would switch tasks.
pub(super) fn far_to_system(
    cx: &mut Cx,
    insn: &Instruction,
    selector: u16,
    gate: Descriptor,
    call: bool,
) -> Result<Flow, Exception> {
    let bad = Exception::gp(error_code(selector));
    let size = match gate.kind() {
        system::CALL_GATE => 4,
        system::CALL_GATE_16 => 2,
        system::TASK_GATE | system::TSS | system::TSS_16 => 0,
        _ => return Err(bad),
    };
    if gate.dpl() < cx.st.cpl
        || gate.dpl() < (selector & 3) as u8
        || size == 0 && gate.kind() != system::TASK_GATE && selector & 4 != 0
    {
        return Err(bad);
    }
    if !gate.is_present() {
        return Err(Exception::np(error_code(selector)));
    }
    if size == 0 {
        cx.unsupported = Some("a hardware task switch (far jump or call)");
        return Err(bad);
    }
    let offset = gate.raw & 0xffff | if size == 4 { gate.raw >> 32 & 0xffff_0000 } else { 0 };
    let code_selector = (gate.raw >> 16) as u16;
    if is_null(code_selector) {
        return Err(Exception::gp(0));
    }
    let bad = Exception::gp(error_code(code_selector));
    let code = cx.descriptor(code_selector)?;
    let inner = call && !code.is_conforming() && code.dpl() < cx.st.cpl;
    let allowed = code.dpl() == cx.st.cpl || code.dpl() < cx.st.cpl && (call || code.is_conforming());
    if !code.is_code() || !allowed {
        return Err(bad);
    }
    if !code.is_present() {
        return Err(Exception::np(error_code(code_selector)));
    }
    let (cs, next) = (u64::from(cx.st.seg[seg::CS].selector), cx.next_ip(insn));
    let mut words = vec![cs, next];
    let mut stack = current_stack(cx, 0);
    let cpl = if inner { code.dpl() } else { cx.st.cpl };
    if inner {
        let parameters = (gate.raw >> 32) as usize & 31;
        words = vec![cx.st.seg[seg::SS].selector.into(), cx.st.gpr[gpr::RSP]];
        for i in (0..parameters).rev() {
            words.push(cx.peek(size, i)?);
        }
        words.extend([cs, next]);
        stack = inner_stack(cx, cpl, 0)?;
    }
    if offset > code.limit().into() {
        return Err(Exception::gp(0));
    }
    cx.mark_accessed(&code)?;
    if call {
        stack.push(cx, &words, size)?;
        cx.st.gpr[gpr::RSP] = stack.rsp;
    }
    if inner {
        cx.st.seg[seg::SS] = stack.ss;
    }
    cx.st.cpl = cpl;
    cx.st.seg[seg::CS] = code.segment(code_selector & !3 | u16::from(cpl));
    cx.st.rip = offset;
    Ok(Flow::Jump)
}

/// IRET with NT set: back to the task whose TSS the current one links to. Refuses what the manual refuses; a real switch is not offered.
pub(super) fn task_return(cx: &mut Cx) -> Result<Flow, Exception> {
    let tr = cx.st.tr;
    let link = u16::from_le_bytes(cx.read_system(tr.base)?);
    let bad = Exception::ts(error_code(link));
    if link & 4 != 0 {
        return Err(bad);
    }
    let d = cx.find_descriptor(link)?.ok_or(bad)?;
    if !d.is_system() || !matches!(d.kind(), system::BUSY_TSS | system::BUSY_TSS_16) {
        return Err(bad);
    }
    if !d.is_present() {
        return Err(Exception::np(error_code(link)));
    }
    cx.unsupported = Some("a hardware task switch (IRET with NT set)");
    Err(bad)
}

/// SYSENTER. In long mode it does not exist on AMD's processors (APM vol. 3 "SYSENTER").
pub(super) fn sysenter(cx: &mut Cx) -> Result<Flow, Exception> {
    if cx.long_mode() {
        return Err(Exception::UD);
    }
    let [cs, esp, eip] = cx.st.sysenter;
    let cs = cs as u16 & !3;
    if cx.st.cr0 & cr0::PE == 0 || cs == 0 {
        return Err(Exception::gp(0));
    }
    let st = &mut cx.st;
    st.seg[seg::CS] = flat_code(cs, 0, false);
    st.seg[seg::SS] = flat_data(cs.wrapping_add(8), 0);
    st.cpl = 0;
    st.gpr[gpr::RSP] = esp & 0xffff_ffff;
    st.rip = eip & 0xffff_ffff;
    st.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
    Ok(Flow::Jump)
}

/// SYSEXIT; as [`sysenter`].
pub(super) fn sysexit(cx: &mut Cx) -> Result<Flow, Exception> {
    if cx.long_mode() {
        return Err(Exception::UD);
    }
    let cs = cx.st.sysenter[0] as u16 & !3;
    if cx.st.cr0 & cr0::PE == 0 || cs == 0 {
        return Err(Exception::gp(0));
    }
    cx.require_cpl0()?;
    let st = &mut cx.st;
    st.seg[seg::CS] = flat_code(cs.wrapping_add(16) | 3, 3, false);
    st.seg[seg::SS] = flat_data(cs.wrapping_add(24) | 3, 3);
    st.cpl = 3;
    st.gpr[gpr::RSP] = st.gpr[gpr::RCX] & 0xffff_ffff;
    st.rip = st.gpr[gpr::RDX] & 0xffff_ffff;
    Ok(Flow::Jump)
}

/// SYSCALL outside long mode (APM vol. 2 section 6.1.1).
pub(super) fn syscall(cx: &mut Cx, insn: &Instruction) -> Flow {
    let next = cx.next_ip(insn);
    let st = &mut cx.st;
    st.gpr[gpr::RCX] = next;
    let selector = (st.star >> 32) as u16 & !3;
    st.seg[seg::CS] = flat_code(selector, 0, false);
    st.seg[seg::SS] = flat_data(selector.wrapping_add(8), 0);
    st.cpl = 0;
    st.rip = st.star & 0xffff_ffff;
    st.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
    Flow::Jump
}

/// SYSRET outside 64-bit code, after its checks.
pub(super) fn sysret(cx: &mut Cx) -> Flow {
    let st = &mut cx.st;
    let base = (st.star >> 48) as u16;
    st.seg[seg::CS] = flat_code(base | 3, 3, false);
    st.seg[seg::SS] = flat_data(base.wrapping_add(8) | 3, 3);
    st.cpl = 3;
    st.rip = st.gpr[gpr::RCX] & 0xffff_ffff;
    st.rflags |= rflags::IF;
    Flow::Jump
}
