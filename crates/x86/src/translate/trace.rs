//! Which instructions make a trace.
//!
//! **In:** the bytes of a page and where to begin, and how often its blocks have run. **Out:** the instructions in the order in which they are most
//! likely to run: through or along conditional jumps, whichever has run more often, along unconditional ones inside the page, and round a loop that
//! comes back to the beginning.
//!
//! Invariant: all of a trace lies in one page (or is a single instruction across two), so that it is valid as long as that page is.
use super::legacy::needs_checks;
use super::{Mode, Source, decode};
use crate::classify::{Kind, classify};
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, OpKind};

/// How often a loop is unrolled at most, the first time included.
const COPIES: u32 = 4;

/// How a trace goes on after a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    /// It ends here (or: no branch).
    No,
    /// At the next instruction; a taken jump leaves.
    Through,
    /// At the target; a jump that is not taken leaves.
    Taken,
}

/// One instruction of a trace.
pub(super) struct Step {
    pub insn: Instruction,
    pub kind: Kind,
    pub follow: Follow,
}

/// Whether a jump is taken more often than not.
fn more_often(src: &Source, target: u64, next: u64) -> bool {
    let runs = |rip: u64| if rip >> 12 == src.rip >> 12 { (src.runs)((rip & 0xfff) as u16) } else { 0 };
    runs(target) > runs(next)
}

/// Collects a trace in `steps`. The result is where it goes on if its last instruction does not say.
pub(super) fn gather(src: &Source, steps: &mut Vec<Step>, info: &mut InstructionInfoFactory) -> u64 {
    let page = src.rip >> 12;
    let mut at = src.rip;
    let mut copies = 1;
    while (steps.len() as u32) < src.max && (at >> 12 == page) {
        let single = src.straddles || src.mode.has(Mode::ALONE);
        let bytes = if single { src.bytes } else { &src.bytes[(at & 0xfff) as usize..] };
        let insn = decode(bytes, at, src.mode, src.features);
        let kind = classify(&insn, src.mode, src.features);
        if matches!(kind, Kind::Invalid | Kind::NoFpu) {
            // Runs alone, where it raises its exception. (Also bytes cut at the end of the page.)
            break;
        }
        let narrow = src.mode.has(Mode::CODE_32);
        if narrow && !src.mode.has(Mode::ALONE) && needs_checks(&insn, src.mode, info) {
            break;
        }
        let next = insn.next_ip();
        let alone = src.straddles || src.max == 1;
        let follows = src.hot && !alone;
        let (follow, to) = match kind {
            Kind::Branch if !follows => (Follow::No, None),
            Kind::Branch => {
                let target = insn.near_branch_target();
                // A branch of 16-bit operands cuts off the instruction pointer.
                let inside = target >> 12 == page && insn.op0_kind() != OpKind::NearBranch16;
                let fresh = !steps.iter().any(|s| s.insn.ip() == target);
                if insn.is_jcc_short_or_near() {
                    let body = steps.len() as u32 / copies + 1;
                    if inside && target == src.rip && copies < COPIES && steps.len() as u32 + 1 + body <= src.max {
                        copies += 1;
                        (Follow::Taken, Some(target))
                    } else if inside && fresh && target != src.rip && more_often(src, target, next) {
                        (Follow::Taken, Some(target))
                    } else {
                        (Follow::Through, Some(next))
                    }
                } else if insn.is_jmp_short_or_near() || insn.is_call_near() {
                    if inside && fresh { (Follow::Taken, Some(target)) } else { (Follow::No, None) }
                } else {
                    (Follow::No, None)
                }
            }
            Kind::Sys if insn.flow_control() != FlowControl::Next => (Follow::No, None),
            _ => (Follow::No, (!alone).then_some(next)),
        };
        steps.push(Step { insn, kind, follow });
        match to {
            Some(to) => at = to,
            None => {
                at = next;
                break;
            }
        }
    }
    // A jump that the trace would follow, but for its length, leaves it instead.
    if let Some(last) = steps.last_mut()
        && last.follow == Follow::Taken
    {
        last.follow = Follow::No;
    }
    at
}
