//! Delivery of exceptions and interrupts; through the 64-bit IDT, and what is the same for that of protected mode ([`super::legacy`]).
//!
//! **In:** a vector with its error code, and whether software asked for it. **Out:** the handler's first instruction in `st.rip` and the
//! frame on its stack; or a double fault instead; or shutdown.
//!
//! **Invariant:** one delivery ([`enter`]) either happens completely or changes nothing; its own faults are combined with what was being
//! delivered by the table of SDM vol. 3 section 6.15 (APM vol. 2 section 8.2.9).
use super::segments::{error_code, is_null, null, system};
use super::{Cx, as_stack_fault};
use crate::Exception;
use crate::exception::Vector;
use crate::mmu::canonical;
use crate::state::{Segment, gpr, rflags, seg};

/// How a delivery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// `st` is at the first instruction of a handler (of this event, or of a fault its delivery met).
    Done,
    /// A fault while a double fault was delivered: the processor shuts down. The state is that before the delivery, CR2 and DR6 apart.
    TripleFault,
    /// It would take something this engine does not do.
    Unsupported(&'static str),
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
    note_address(cx, &current);
    loop {
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
            Err(_) if cx.unsupported.is_some() => return unsupported(cx),
            Err(next) => {
                note_address(cx, &next);
                match combine(current.vector, next) {
                    Some(combined) => current = combined,
                    None => return Delivery::TripleFault,
                }
            }
        }
    }
}

/// A page fault's address goes to CR2 when the fault is found, also if it ends as a double fault.
fn note_address(cx: &mut Cx, exception: &Exception) {
    if let (Vector::PageFault, Some(address)) = (exception.vector, exception.address) {
        cx.st.cr2 = address;
    }
}

/// Delivers an external interrupt at the current boundary.
pub fn deliver_interrupt(cx: &mut Cx, vector: u8) -> Delivery {
    let (rip, flags) = (cx.st.rip, cx.st.rflags);
    match enter(cx, vector, None, Source::Hardware, rip, flags) {
        Ok(()) => Delivery::Done,
        Err(_) if cx.unsupported.is_some() => unsupported(cx),
        // A fault of the delivery stands for itself; the interrupt counts as benign.
        Err(fault) => deliver_exception(cx, fault),
    }
}

fn unsupported(cx: &mut Cx) -> Delivery {
    Delivery::Unsupported(cx.unsupported.take().unwrap_or("an unknown kind of delivery"))
}

/// DR6: single step.
const DR6_BS: u64 = 1 << 14;

/// Faults push RF set, so that the instruction can be restarted without meeting its breakpoint again.
fn is_fault(vector: Vector) -> bool {
    !matches!(vector, Vector::Debug | Vector::Breakpoint | Vector::Overflow | Vector::DoubleFault | Vector::MachineCheck)
}

/// What a fault `second` during the delivery of `first` becomes; `None` is shutdown.
fn combine(first: Vector, second: Exception) -> Option<Exception> {
    let contributory = |v| {
        matches!(
            v,
            Vector::DivideError | Vector::InvalidTss | Vector::SegmentNotPresent | Vector::StackFault | Vector::GeneralProtection
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
    if !cx.long_mode() {
        return super::legacy::enter(cx, vector, error, source, rip, frame_flags);
    }
    let ext = (source == Source::Hardware) as u32;
    let gate_error = (vector as u32) << 3 | 2 | ext;
    let offset = vector as u64 * 16;
    if offset + 15 > cx.st.idtr.limit as u64 {
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

#[cfg(test)]
mod tests {
    use super::super::Flow;
    use super::super::testing::{
        CODE, GDT, HANDLERS, IDT, IST1, KERNEL_CS, KERNEL_SS, RSP0, STACK, TSS, USER, USER_CS, USER_CS32, USER_SS, World,
    };
    use super::*;

    fn frame(w: &World, words: usize) -> Vec<u64> {
        (0..words as u64).map(|i| w.get(w.st.gpr[gpr::RSP] + 8 * i)).collect()
    }
    fn deliver(w: &mut World, e: Exception) -> Delivery {
        deliver_exception(&mut w.cx(), e)
    }

    #[test]
    fn page_fault_from_user() {
        let mut w = World::new().user();
        w.st.rflags |= rflags::TF | rflags::NT | rflags::CF;
        let flags = w.st.rflags;
        w.st.gpr[gpr::RSP] += 4;
        let rsp = w.st.gpr[gpr::RSP];
        assert_eq!(deliver(&mut w, Exception::pf(6, 0x1234)), Delivery::Done);
        assert_eq!(w.st.cr2, 0x1234);
        assert_eq!(w.st.rip, HANDLERS + 16 * 14);
        assert_eq!(w.st.gpr[gpr::RSP], RSP0 - 48);
        assert_eq!(frame(&w, 6), [6, USER, USER_CS as u64, flags | rflags::RF, rsp, USER_SS as u64]);
        assert_eq!((w.st.cpl, w.st.seg[seg::CS].selector), (0, KERNEL_CS));
        assert_eq!(w.st.seg[seg::SS], null(0));
        assert_eq!(w.st.rflags, rflags::ONE | rflags::CF);
        // The accessed bit of the code segment was set.
        assert_eq!(w.get(GDT + KERNEL_CS as u64) >> 40 & 0xff, 0x9b);
    }

    #[test]
    fn interrupt_in_the_kernel() {
        let mut w = World::new();
        w.st.rflags |= rflags::IF;
        w.st.gpr[gpr::RSP] = STACK - 8;
        w.st.halted = true;
        assert_eq!(deliver_interrupt(&mut w.cx(), 0x30), Delivery::Done);
        assert_eq!(frame(&w, 5), [CODE, KERNEL_CS as u64, rflags::ONE | rflags::IF, STACK - 8, KERNEL_SS as u64]);
        // The frame is aligned before it is pushed.
        assert_eq!(w.st.gpr[gpr::RSP], STACK - 16 - 40);
        assert_eq!((w.st.rip, w.st.halted, w.st.seg[seg::SS].selector), (HANDLERS + 0x300, false, KERNEL_SS));
        assert_eq!(w.st.rflags, rflags::ONE);
        // A trap gate leaves IF.
        let mut w = World::new();
        w.gate(0x31, 0x8f, 0);
        w.st.rflags |= rflags::IF;
        assert_eq!(deliver_interrupt(&mut w.cx(), 0x31), Delivery::Done);
        assert_eq!(w.st.rflags, rflags::ONE | rflags::IF);
    }

    #[test]
    fn interrupt_stack_table() {
        for user in [false, true] {
            let mut w = if user { World::new().user() } else { World::new() };
            w.gate(2, 0x8e, 1);
            let ss = w.st.seg[seg::SS];
            assert_eq!(deliver_interrupt(&mut w.cx(), 2), Delivery::Done);
            assert_eq!(w.st.gpr[gpr::RSP], IST1 - 40);
            assert_eq!(w.st.seg[seg::SS], if user { null(0) } else { ss });
        }
        // A TSS too short for it.
        let mut w = World::new();
        w.gate(2, 0x8e, 1);
        w.st.tr.limit = 0x24 + 6;
        assert_eq!(deliver_interrupt(&mut w.cx(), 2), Delivery::Done);
        assert_eq!((w.st.rip, frame(&w, 1)[0]), (HANDLERS + 16 * 10, 0x41));
    }

    #[test]
    fn software_interrupts_need_the_gates_privilege() {
        let mut w = World::new().user();
        assert_eq!(w.exec(&[0xcd, 0x80]), Err(Exception::gp(0x80 * 8 + 2)));
        w.gate(0x80, 0xee, 0);
        assert_eq!(w.exec(&[0xcd, 0x80]), Ok(Flow::Jump));
        assert_eq!(frame(&w, 1), [USER + 2]);
        let mut w = World::new().user();
        assert_eq!(w.exec(&[0xcc]), Err(Exception::gp(3 * 8 + 2)));
        // INT1 is no software interrupt in this.
        assert_eq!(w.exec(&[0xf1]), Ok(Flow::Jump));
        assert_eq!((w.st.rip, w.st.dr[6]), (HANDLERS + 16, 0xffff_0ff0));
        let mut w = World::new();
        assert_eq!(w.exec(&[0xcc]), Ok(Flow::Jump));
        assert_eq!((frame(&w, 1), w.st.rip), (vec![CODE + 1], HANDLERS + 48));
    }

    #[test]
    fn single_step_is_told_in_dr6() {
        let mut w = World::new();
        w.st.rflags |= rflags::TF;
        w.st.dr[7] |= 1 << 13;
        assert_eq!(deliver(&mut w, Exception::plain(Vector::Debug)), Delivery::Done);
        assert_eq!((w.st.dr[6], w.st.dr[7]), (0xffff_4ff0, 0x400));
        // A trap: RF is not set.
        assert_eq!(frame(&w, 3)[2], rflags::ONE | rflags::TF);
    }

    #[test]
    fn faults_of_the_delivery() {
        // A gate that is not there: #NP with EXT, about the IDT.
        let mut w = World::new();
        w.put(IDT + 16 * 0x30, 0);
        assert_eq!(deliver_interrupt(&mut w.cx(), 0x30), Delivery::Done);
        assert_eq!((w.st.rip, frame(&w, 1)[0]), (HANDLERS + 16 * 13, 0x30 * 8 + 3));
        let mut w = World::new();
        w.gate(0x30, 0x0e, 0);
        assert_eq!(deliver_interrupt(&mut w.cx(), 0x30), Delivery::Done);
        assert_eq!((w.st.rip, frame(&w, 1)[0]), (HANDLERS + 16 * 11, 0x30 * 8 + 3));
        // Beyond the limit.
        let mut w = World::new();
        w.st.idtr.limit = 0x30 * 16 - 1;
        assert_eq!(deliver_interrupt(&mut w.cx(), 0x30), Delivery::Done);
        assert_eq!(frame(&w, 1)[0], 0x30 * 8 + 3);
        // A code segment that is none, and one that is not 64-bit.
        for selector in [KERNEL_SS, USER_CS32, 0x78, 0xf0] {
            let mut w = World::new();
            let gate = w.get(IDT + 16 * 0x30) & !0xffff_0000 | (selector as u64) << 16;
            w.put(IDT + 16 * 0x30, gate);
            assert_eq!(deliver_interrupt(&mut w.cx(), 0x30), Delivery::Done);
            assert_eq!((w.st.rip, frame(&w, 1)[0]), (HANDLERS + 16 * 13, (selector as u64 & !3) | 1));
        }
        // #UD is benign: a page fault on its stack is just that.
        let mut w = World::new();
        w.gate(14, 0x8e, 1);
        w.st.gpr[gpr::RSP] = 0x80_0000;
        assert_eq!(deliver(&mut w, Exception::UD), Delivery::Done);
        assert_eq!((w.st.rip, w.st.cr2, frame(&w, 2)), (HANDLERS + 16 * 14, 0x80_0000 - 40, vec![2, CODE]));
        // A non-canonical stack.
        let mut w = World::new();
        w.gate(12, 0x8e, 1);
        w.st.gpr[gpr::RSP] = 1 << 60;
        assert_eq!(deliver(&mut w, Exception::UD), Delivery::Done);
        assert_eq!((w.st.rip, frame(&w, 1)[0]), (HANDLERS + 16 * 12, 1));
    }

    #[test]
    fn double_and_triple_faults() {
        // Page fault on page fault.
        let mut w = World::new().user();
        w.gate(8, 0x8e, 1);
        w.put(TSS + 4, 0x80_0000);
        assert_eq!(deliver(&mut w, Exception::pf(4, 0x5000)), Delivery::Done);
        assert_eq!((w.st.rip, frame(&w, 2)), (HANDLERS + 16 * 8, vec![0, USER]));
        assert_eq!(w.st.cr2, 0x80_0000 - 48);
        assert_eq!(w.st.gpr[gpr::RSP], IST1 - 48);
        // General protection on general protection.
        let mut w = World::new();
        w.put(IDT + 16 * 13, 0);
        assert_eq!(deliver(&mut w, Exception::gp(0)), Delivery::Done);
        assert_eq!(w.st.rip, HANDLERS + 16 * 8);
        // A contributory fault followed by a page fault is a page fault.
        let mut w = World::new().user();
        w.gate(14, 0x8e, 1);
        w.put(TSS + 4, 0x80_0000);
        assert_eq!(deliver(&mut w, Exception::gp(0)), Delivery::Done);
        assert_eq!(w.st.rip, HANDLERS + 16 * 14);
        // No double fault handler either; nothing has changed but CR2.
        let mut w = World::new().user();
        w.put(TSS + 4, 0x80_0000);
        let mut before = w.st.clone();
        assert_eq!(deliver(&mut w, Exception::pf(4, 0x5000)), Delivery::TripleFault);
        before.cr2 = w.st.cr2;
        assert_eq!(before, w.st);
        let mut w = World::new();
        w.st.idtr.limit = 0;
        assert_eq!(deliver_interrupt(&mut w.cx(), 0x30), Delivery::TripleFault);
    }

    #[test]
    fn compatibility_mode_enters_64_bit_handlers() {
        let mut w = World::new().user();
        w.st.seg[seg::CS] = super::super::segments::flat_code(USER_CS32, 3, false);
        assert_eq!(deliver(&mut w, Exception::UD), Delivery::Done);
        assert_eq!(frame(&w, 2), [USER, USER_CS32 as u64]);
        assert!(w.st.is_64_bit_code());
    }
}
