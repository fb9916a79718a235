//! Delivery of exceptions and interrupts through the 64-bit IDT.
//!
//! **In:** a vector with its error code, and whether software asked for it. **Out:** the handler's first instruction in `st.rip` and the
//! frame on its stack; or a double fault instead; or shutdown.
//!
//! **Invariant:** one delivery ([`enter`]) either happens completely or changes nothing; its own faults are combined with what was being
//! delivered by the table of SDM vol. 3 section 6.15 (APM vol. 2 section 8.2.9).
//!
//! Gates outside long mode are not offered: the engine runs long mode only, so a delivery there is a shutdown.
use super::segments::{error_code, is_null, null, system};
use super::{Cx, as_stack_fault};
use crate::exception::Vector;
use crate::mmu::canonical;
use crate::state::{Segment, efer, gpr, rflags, seg};
use crate::Exception;

/// How a delivery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// `st` is at the first instruction of a handler (of this event, or of a fault its delivery met).
    Done,
    /// A fault while a double fault was delivered: the processor shuts down. The state is that before the delivery.
    TripleFault,
}

/// Who asks for a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// INT n, INT3, INTO: the gate's privilege level counts.
    Software,
    /// An exception, an external interrupt, or INT1.
    Hardware,
}

/// Delivers an exception. For faults `st.rip` is the faulting instruction's, for traps (see [`Exception`]) the next one's.
///
/// A [`Vector::Debug`] sets DR6.BS (single step), or the bits in `address` if it has them.
pub fn deliver_exception(cx: &mut Cx, exception: Exception) -> Delivery {
    let mut current = exception;
    loop {
        if let (Vector::PageFault, Some(address)) = (current.vector, current.address) {
            cx.st.cr2 = address;
        }
        if current.vector == Vector::Debug {
            let bits = current.address.unwrap_or(DR6_BS);
            cx.st.dr[6] |= bits;
            // General detect goes off, so that the handler may look at the registers.
            cx.st.dr[7] &= !super::control::DR7_GD;
        }
        let fault = is_fault(current.vector);
        let frame_flags = cx.st.rflags | if fault { rflags::RF } else { 0 };
        let rip = cx.st.rip;
        match enter(cx, current.vector as u8, current.error, Source::Hardware, rip, frame_flags) {
            Ok(()) => return Delivery::Done,
            Err(next) => match combine(current.vector, next) {
                Some(combined) => current = combined,
                None => return Delivery::TripleFault,
            },
        }
    }
}

/// Delivers an external interrupt at the current boundary.
pub fn deliver_interrupt(cx: &mut Cx, vector: u8) -> Delivery {
    let (rip, flags) = (cx.st.rip, cx.st.rflags);
    match enter(cx, vector, None, Source::Hardware, rip, flags) {
        Ok(()) => Delivery::Done,
        // A fault of the delivery stands for itself; the interrupt counts as benign.
        Err(fault) => deliver_exception(cx, fault),
    }
}

/// DR6: single step.
const DR6_BS: u64 = 1 << 14;

/// Faults push RF set, so that the instruction can be restarted without meeting its breakpoint again.
fn is_fault(vector: Vector) -> bool {
    !matches!(
        vector,
        Vector::Debug | Vector::Breakpoint | Vector::Overflow | Vector::DoubleFault | Vector::MachineCheck
    )
}

/// What a fault `second` during the delivery of `first` becomes; `None` is shutdown.
fn combine(first: Vector, second: Exception) -> Option<Exception> {
    let contributory = |v| {
        matches!(
            v,
            Vector::DivideError
                | Vector::InvalidTss
                | Vector::SegmentNotPresent
                | Vector::StackFault
                | Vector::GeneralProtection
        )
    };
    let page_fault = second.vector == Vector::PageFault;
    match first {
        Vector::DoubleFault => None,
        Vector::PageFault if page_fault || contributory(second.vector) => Some(DOUBLE_FAULT),
        v if contributory(v) && contributory(second.vector) => Some(DOUBLE_FAULT),
        _ => Some(second),
    }
}

const DOUBLE_FAULT: Exception = Exception { vector: Vector::DoubleFault, error: Some(0), address: None };

/// Goes through gate `vector`, or fails without a trace. The frame returns to `rip` with `frame_flags`.
pub(super) fn enter(
    cx: &mut Cx,
    vector: u8,
    error: Option<u32>,
    source: Source,
    rip: u64,
    frame_flags: u64,
) -> Result<(), Exception> {
    let ext = (source == Source::Hardware) as u32;
    let gate_error = (vector as u32) << 3 | 2 | ext;
    let offset = vector as u64 * 16;
    if cx.st.efer & efer::LMA == 0 || offset + 15 > cx.st.idtr.limit as u64 {
        return Err(Exception::gp(gate_error));
    }
    let gate: [u8; 16] = cx.read_system(cx.st.idtr.base.wrapping_add(offset))?;
    let low = u64::from_le_bytes(gate[..8].try_into().unwrap_or_default());
    let high = u64::from_le_bytes(gate[8..].try_into().unwrap_or_default());
    let kind = (low >> 40) as u16 & 31;
    if kind != system::INTERRUPT_GATE && kind != system::TRAP_GATE {
        return Err(Exception::gp(gate_error));
    }
    if source == Source::Software && ((low >> 45) as u8 & 3) < cx.st.cpl {
        return Err(Exception::gp(gate_error));
    }
    if low >> 47 & 1 == 0 {
        return Err(Exception::np(gate_error));
    }
    let handler = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
    let selector = (low >> 16) as u16;
    let ist = (low >> 32) as u8 & 7;

    if is_null(selector) {
        return Err(Exception::gp(ext));
    }
    let bad = Exception::gp(error_code(selector) | ext);
    let code = cx.find_descriptor(selector)?.ok_or(bad)?;
    if !code.is_code() || code.dpl() > cx.st.cpl || !code.is_long() || code.is_big() {
        return Err(bad);
    }
    if !code.is_present() {
        return Err(Exception::np(error_code(selector) | ext));
    }
    if !canonical(handler) {
        return Err(Exception::gp(ext));
    }
    let cpl = if code.is_conforming() { cx.st.cpl } else { code.dpl() };

    let rsp = if ist != 0 {
        cx.tss_stack(0x24 + (ist as u32 - 1) * 8, ext)?
    } else if cpl < cx.st.cpl {
        cx.tss_stack(4 + cpl as u32 * 8, ext)?
    } else {
        cx.st.gpr[gpr::RSP] & cx.stack_mask()
    };
    cx.mark_accessed(&code)?;
    let mut frame = [0u8; 48];
    let words = [
        error.unwrap_or(0) as u64,
        rip,
        cx.st.seg[seg::CS].selector as u64,
        frame_flags,
        cx.st.gpr[gpr::RSP],
        cx.st.seg[seg::SS].selector as u64,
    ];
    for (to, word) in frame.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    let frame = if error.is_some() { &frame[..] } else { &frame[8..] };
    let rsp = (rsp & !15).wrapping_sub(frame.len() as u64);
    cx.write_as(rsp, frame, cpl == 3).map_err(|e| match as_stack_fault(e) {
        e if e == Exception::ss(0) => Exception::ss(ext),
        e => e,
    })?;

    let st = &mut cx.st;
    if cpl != st.cpl {
        st.seg[seg::SS] = null(cpl as u16);
    }
    st.seg[seg::CS] = code.segment(selector & !3 | cpl as u16);
    st.cpl = cpl;
    st.gpr[gpr::RSP] = rsp;
    st.rip = handler;
    st.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if kind == system::INTERRUPT_GATE {
        st.rflags &= !rflags::IF;
    }
    st.halted = false;
    st.interrupt_shadow = false;
    Ok(())
}

impl Cx<'_> {
    /// A stack pointer from the TSS.
    pub(super) fn tss_stack(&mut self, offset: u32, ext: u32) -> Result<u64, Exception> {
        let tr = self.st.tr;
        if tr.attributes & Segment::PRESENT == 0 || offset + 7 > tr.limit {
            return Err(Exception::ts(error_code(tr.selector) | ext));
        }
        let rsp = u64::from_le_bytes(self.read_system(tr.base.wrapping_add(offset as u64))?);
        if canonical(rsp) { Ok(rsp) } else { Err(Exception::ss(ext)) }
    }
}
