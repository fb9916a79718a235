//! CR3 in long mode, process-context identifiers (PCID) and INVPCID.
//!
//! **In:** a new CR3, or the instruction. **Out:** the address space that counts; the faults that the manuals name.
//!
//! **Invariant:** CR4.PCIDE is set only in long mode. What is cached of page tables is never out of date ([`crate::mmu::groups`]), whatever
//! identifier it was cached under; so no write of CR3 has anything to flush, with bit 63 or without, and INVPCID is but its checks.
//!
//! References: SDM vol. 3 section 4.10.1 (PCIDs), 2.5 (CR3, CR4.PCIDE), vol. 2 "INVPCID", "MOV—Move to/from Control Registers".
use super::{Cx, Flow};
use crate::Exception;
use crate::mmu::{PHYSICAL_BITS, canonical};
use crate::state::{CpuState, cr4};
use iced_x86::{Instruction, Register};

/// In a source operand of MOV to CR3 with PCIDs: keep what is cached.
const KEEP: u64 = 1 << 63;
/// The root's address.
const ROOT: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;
/// PWT and PCD, which are kept without PCIDs.
const CACHING: u64 = 0x18;
/// The identifier.
const PCID: u64 = 0xfff;

/// CR3 bits that are kept in long mode.
pub(crate) fn cr3_kept(cr4: u64) -> u64 {
    ROOT | if cr4 & cr4::PCIDE != 0 { PCID } else { CACHING }
}

/// What a write of `value` makes of CR3 in long mode, or #GP(0).
pub(super) fn new_cr3(st: &CpuState, value: u64) -> Result<u64, Exception> {
    let value = if st.cr4 & cr4::PCIDE != 0 { value & !KEEP } else { value };
    if value >> PHYSICAL_BITS != 0 {
        return Err(Exception::gp(0));
    }
    Ok(value & cr3_kept(st.cr4))
}

/// Whether CR4 may become `value`, as far as PCIDs go.
pub(super) fn allows_cr4(st: &CpuState, value: u64, long_mode: bool) -> bool {
    let sets = value & !st.cr4 & cr4::PCIDE != 0;
    !sets || long_mode && st.cr3 & PCID == 0
}

/// INVPCID.
pub(super) fn invalidate(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    cx.require_cpl0()?;
    let register = if insn.op0_register() == Register::None { Register::RAX } else { insn.op0_register() };
    let kind = cx.reg(register);
    let at = cx.ea(insn);
    let mut descriptor = [0; 16];
    cx.read_bytes(at, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, va) = (descriptor as u64, (descriptor >> 64) as u64);
    let with_pcid = kind < 2;
    let bad =
        kind > 3 || pcid & !PCID != 0 || kind == 0 && !canonical(va) || with_pcid && cx.st.cr4 & cr4::PCIDE == 0 && pcid != 0;
    if bad {
        return Err(Exception::gp(0));
    }
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ROOT as TABLES, World};
    use super::*;
    use crate::state::{cr0, gpr};

    fn write_cr(w: &mut World, n: u8, value: u64) -> Result<Flow, Exception> {
        w.st.gpr[gpr::RAX] = value;
        w.exec(&[0x0f, 0x22, 0xc0 | n << 3])
    }
    /// INVPCID RCX, [RBX] with a descriptor.
    fn invpcid(w: &mut World, kind: u64, pcid: u64, va: u64) -> Result<Flow, Exception> {
        w.st.gpr[gpr::RCX] = kind;
        w.st.gpr[gpr::RBX] = 0x6_0000;
        w.put(0x6_0000, pcid);
        w.put(0x6_0008, va);
        w.exec(&[0x66, 0x0f, 0x38, 0x82, 0x0b])
    }

    #[test]
    fn the_identifier_is_part_of_cr3() {
        let gp = Err(Exception::gp(0));
        let mut w = World::new();
        let cr4 = w.st.cr4 | cr4::PCIDE;
        assert_eq!(write_cr(&mut w, 3, TABLES | 0x18), Ok(Flow::Sync));
        assert_eq!(write_cr(&mut w, 3, TABLES | KEEP), gp);
        assert_eq!(write_cr(&mut w, 4, cr4), gp);
        assert_eq!(write_cr(&mut w, 3, TABLES | 0x7), Ok(Flow::Sync));
        assert_eq!(w.st.cr3, TABLES);
        assert_eq!(write_cr(&mut w, 4, cr4), Ok(Flow::Sync));
        assert_eq!(write_cr(&mut w, 3, TABLES | 0xabc | KEEP), Ok(Flow::Sync));
        assert_eq!(w.st.cr3, TABLES | 0xabc);
        assert_eq!(write_cr(&mut w, 3, TABLES | 1 << 62), gp);
        let paging = w.st.cr0;
        assert_eq!(write_cr(&mut w, 0, paging & !cr0::PG), gp);
        assert_eq!(write_cr(&mut w, 0, paging | cr0::TS), Ok(Flow::Sync));
        assert_eq!(w.st.cr3, TABLES | 0xabc);
        // Once on, it stays on with any identifier, and goes off with any.
        assert_eq!(write_cr(&mut w, 4, cr4 | cr4::TSD), Ok(Flow::Sync));
        assert_eq!(write_cr(&mut w, 4, cr4 & !cr4::PCIDE), Ok(Flow::Sync));
        assert_eq!(w.st.cr3, TABLES | 0xabc);
        assert_eq!(write_cr(&mut w, 4, cr4), gp);
    }

    #[test]
    fn invpcid_checks() {
        let gp = Err(Exception::gp(0));
        let mut w = World::new();
        for kind in 0..4 {
            assert_eq!(invpcid(&mut w, kind, 0, 0x1000), Ok(Flow::Next));
        }
        assert_eq!(invpcid(&mut w, 4, 0, 0), gp);
        assert_eq!(invpcid(&mut w, 1 << 32, 0, 0), gp);
        assert_eq!(invpcid(&mut w, 0, 0, 1 << 60), gp);
        assert_eq!(invpcid(&mut w, 1, 0, 1 << 60), Ok(Flow::Next));
        assert_eq!(invpcid(&mut w, 3, 0x1000, 0), gp);
        // An identifier needs CR4.PCIDE, where it counts.
        assert_eq!(invpcid(&mut w, 0, 5, 0), gp);
        assert_eq!(invpcid(&mut w, 1, 5, 0), gp);
        assert_eq!(invpcid(&mut w, 2, 5, 0), Ok(Flow::Next));
        w.st.cr4 |= cr4::PCIDE;
        assert_eq!(invpcid(&mut w, 1, 5, 0), Ok(Flow::Next));
        // The descriptor must be readable; user code may not.
        w.st.gpr[gpr::RBX] = 0x80_0000;
        assert_eq!(w.exec(&[0x66, 0x0f, 0x38, 0x82, 0x0b]), Err(Exception::pf(0, 0x80_0000)));
        assert_eq!(invpcid(&mut World::new().user(), 0, 0, 0), gp);
    }
}
