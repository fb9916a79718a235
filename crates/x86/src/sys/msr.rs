//! Model-specific registers the processor owns.
//!
//! **In:** an MSR number. **Out:** its value, or #GP(0); registers that are not here belong to the machine ([`crate::Bus`]: local APIC,
//! kvmclock, TSC deadline), which has the last word.
//!
//! **Invariant:** what is stored was checked: addresses are canonical, memory types exist, reserved bits are clear. Reads of
//! configuration registers of AMD's family 19h that kernels read without a safety net give fixed values; writes to them are ignored.
//!
//! References: APM vol. 2 appendix A (MSR cross-reference), section 7.7 (MTRRs), 7.8 (PAT); PPR for family 19h model 01h.
use super::Cx;
use crate::Exception;
use crate::mmu::{PHYSICAL_BITS, canonical};
use crate::state::{cr0, efer, seg};

/// EFER.AIBRSE: "automatic IBRS"; stored, without effect (there is no speculation across guest privilege levels to restrict).
const EFER_AIBRSE: u64 = 1 << 21;
/// EFER bits that can be set.
pub(crate) const EFER_ALLOWED: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE | EFER_AIBRSE;
/// IA32_MISC_ENABLE bits that can be set (all without effect).
pub(crate) const MISC_ENABLE_ALLOWED: u64 = 1 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 16;

/// MTRRcap: 8 variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = 0x508;
/// HWCR: the time-stamp counter counts at a constant rate (bit 24).
const HWCR: u64 = 1 << 24;
/// DE_CFG: LFENCE serialises (bit 1).
const DE_CFG: u64 = 1 << 1;
/// The microcode revision, in the low half (AMD's place; Intel's is the high half, written there too).
const MICROCODE: u64 = 0x0a00_11de;

/// The guest's time-stamp counter now.
pub(super) fn tsc(cx: &mut Cx) -> u64 {
    cx.bus.tsc(cx.position).wrapping_add(cx.st.tsc_offset)
}

/// The TSC deadline, which belongs to the machine; it counts with the guest's offset as of the end of the instruction that writes it.
const TSC_DEADLINE: u32 = 0x6e0;

/// Changes the guest's offset. An armed deadline is written again, since the time until then has changed.
fn set_tsc_offset(cx: &mut Cx, offset: u64) {
    if offset == cx.st.tsc_offset {
        return;
    }
    cx.st.tsc_offset = offset;
    // A machine without a deadline timer has none armed.
    match cx.bus.rdmsr(cx.position, TSC_DEADLINE) {
        Ok(armed) if armed != 0 => _ = cx.bus.wrmsr(cx.position, TSC_DEADLINE, armed),
        _ => {}
    }
}

/// Memory types of MTRRs: UC, WC, WT, WP, WB.
fn memory_type_ok(kind: u64) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}
/// Whether a value can be in the PAT: the types of MTRRs, and UC- (7), in each byte.
pub(crate) fn pat_ok(value: u64) -> bool {
    value.to_le_bytes().iter().all(|&b| memory_type_ok(b as u64) || b == 7)
}
/// Whether a value can be in a fixed-range MTRR.
pub(crate) fn mtrr_fixed_ok(value: u64) -> bool {
    value.to_le_bytes().iter().all(|&b| memory_type_ok(b as u64))
}
/// Whether a value can be in MTRRdefType.
pub(crate) fn mtrr_def_type_ok(value: u64) -> bool {
    value & !0xcff == 0 && memory_type_ok(value & 0xff)
}
/// Whether a value can be in a variable-range MTRR: a base (even `index`) or a mask (odd).
pub(crate) fn mtrr_var_ok(index: usize, value: u64) -> bool {
    if value >> PHYSICAL_BITS != 0 {
        return false;
    }
    if index.is_multiple_of(2) { value & 0xf00 == 0 && memory_type_ok(value & 0xff) } else { value & 0x7ff == 0 }
}

/// Index of a fixed-range MTRR.
fn fixed_mtrr(msr: u32) -> Option<usize> {
    match msr {
        0x250 => Some(0),
        0x258 | 0x259 => Some((msr - 0x258) as usize + 1),
        0x268..=0x26f => Some((msr - 0x268) as usize + 3),
        _ => None,
    }
}

/// Configuration registers with a fixed value.
fn fixed_value(msr: u32) -> Option<u64> {
    Some(match msr {
        // Platform id, power-on configuration, machine check (capabilities, status: none), debug control, last branches.
        0x17 | 0x2a | 0x179 | 0x17a | 0x1d9 | 0x1db..=0x1de => 0,
        0x8b => MICROCODE << 32 | MICROCODE,
        // SYSCFG; IO range registers, TOP_MEM, TOP_MEM2; NB_CFG; interrupt pending message; MMIO configuration base.
        0xc001_0010 | 0xc001_0016..=0xc001_001a | 0xc001_001d | 0xc001_001f | 0xc001_0055 | 0xc001_0058 => 0,
        0xc001_0015 => HWCR,
        // LS, IC, DC, BU (twice), FP configuration.
        0xc001_1020..=0xc001_1023 | 0xc001_102a | 0xc001_1028 => 0,
        0xc001_1029 => DE_CFG,
        _ => return None,
    })
}

/// RDMSR, after the privilege check.
pub(super) fn read(cx: &mut Cx, msr: u32) -> Result<u64, Exception> {
    if let Some(i) = fixed_mtrr(msr) {
        return Ok(cx.st.mtrr_fixed[i]);
    }
    if let Some(value) = fixed_value(msr) {
        return Ok(value);
    }
    Ok(match msr {
        0x10 => tsc(cx),
        0x3b => cx.st.tsc_offset,
        0xfe => MTRR_CAP,
        0x174..=0x176 => cx.st.sysenter[(msr - 0x174) as usize],
        0x1a0 => cx.st.misc_enable,
        0x200..=0x20f => cx.st.mtrr_var[(msr - 0x200) as usize],
        0x277 => cx.st.pat,
        0x2ff => cx.st.mtrr_def_type,
        0xc000_0080 => cx.st.efer,
        0xc000_0081 => cx.st.star,
        0xc000_0082 => cx.st.lstar,
        0xc000_0083 => cx.st.cstar,
        0xc000_0084 => cx.st.sfmask,
        0xc000_0100 => cx.st.seg[seg::FS].base,
        0xc000_0101 => cx.st.seg[seg::GS].base,
        0xc000_0102 => cx.st.kernel_gs_base,
        0xc000_0103 => cx.st.tsc_aux,
        _ => return cx.bus.rdmsr(cx.position, msr).map_err(|_| Exception::gp(0)),
    })
}

/// WRMSR, after the privilege check.
pub(super) fn write(cx: &mut Cx, msr: u32, value: u64) -> Result<(), Exception> {
    let require = |ok: bool| if ok { Ok(()) } else { Err(Exception::gp(0)) };
    if let Some(i) = fixed_mtrr(msr) {
        require(mtrr_fixed_ok(value))?;
        cx.st.mtrr_fixed[i] = value;
        return Ok(());
    }
    if fixed_value(msr).is_some() {
        return Ok(());
    }
    match msr {
        0x10 => {
            let offset = value.wrapping_sub(cx.bus.tsc(cx.position));
            set_tsc_offset(cx, offset);
        }
        0x3b => set_tsc_offset(cx, value),
        0xfe => return Err(Exception::gp(0)),
        0x174 => cx.st.sysenter[0] = value & 0xffff,
        0x175 | 0x176 => {
            require(canonical(value))?;
            cx.st.sysenter[(msr - 0x174) as usize] = value;
        }
        0x1a0 => {
            require(value & !MISC_ENABLE_ALLOWED == 0)?;
            cx.st.misc_enable = value;
        }
        0x200..=0x20f => {
            let i = (msr - 0x200) as usize;
            require(mtrr_var_ok(i, value))?;
            cx.st.mtrr_var[i] = value;
        }
        0x277 => {
            require(pat_ok(value))?;
            cx.st.pat = value;
        }
        0x2ff => {
            require(mtrr_def_type_ok(value))?;
            cx.st.mtrr_def_type = value;
        }
        0xc000_0080 => write_efer(cx, value)?,
        0xc000_0081 => cx.st.star = value,
        0xc000_0082 | 0xc000_0083 | 0xc000_0100..=0xc000_0102 => {
            require(canonical(value))?;
            let slot = match msr {
                0xc000_0082 => &mut cx.st.lstar,
                0xc000_0083 => &mut cx.st.cstar,
                0xc000_0100 => &mut cx.st.seg[seg::FS].base,
                0xc000_0101 => &mut cx.st.seg[seg::GS].base,
                _ => &mut cx.st.kernel_gs_base,
            };
            *slot = value;
        }
        0xc000_0084 => cx.st.sfmask = value & 0xffff_ffff,
        0xc000_0103 => {
            require(value >> 32 == 0)?;
            cx.st.tsc_aux = value;
        }
        _ => return cx.bus.wrmsr(cx.position, msr, value).map_err(|_| Exception::gp(0)),
    }
    Ok(())
}

fn write_efer(cx: &mut Cx, value: u64) -> Result<(), Exception> {
    let changed = cx.st.efer ^ value;
    let paging = cx.st.cr0 & cr0::PG != 0;
    if value & !EFER_ALLOWED != 0 || changed & efer::LME != 0 && paging {
        return Err(Exception::gp(0));
    }
    // LMA is the processor's own.
    cx.st.efer = value & !efer::LMA | cx.st.efer & efer::LMA;
    if changed & efer::NXE != 0 {
        cx.mmu.flush_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Flow;
    use super::super::testing::{LEAVES, USER, World};
    use super::*;
    use crate::state::gpr;

    fn wrmsr(w: &mut World, msr: u32, value: u64) -> Result<Flow, Exception> {
        w.st.gpr[gpr::RCX] = msr as u64;
        w.st.gpr[gpr::RAX] = value & 0xffff_ffff;
        w.st.gpr[gpr::RDX] = value >> 32;
        w.exec(&[0x0f, 0x30])
    }
    fn rdmsr(w: &mut World, msr: u32) -> Result<u64, Exception> {
        w.st.gpr[gpr::RCX] = msr as u64;
        w.exec(&[0x0f, 0x32])?;
        Ok(w.st.gpr[gpr::RDX] << 32 | w.st.gpr[gpr::RAX])
    }

    #[test]
    fn stored_values() {
        let mut w = World::new();
        for msr in [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0x175, 0x176] {
            assert_eq!(wrmsr(&mut w, msr, 0xffff_8000_1234_5678), Ok(Flow::Sync));
            assert_eq!(rdmsr(&mut w, msr), Ok(0xffff_8000_1234_5678));
        }
        assert_eq!(w.st.seg[seg::GS].base, 0xffff_8000_1234_5678);
        for msr in [0xc000_0082, 0xc000_0083, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0x175, 0x176] {
            assert_eq!(wrmsr(&mut w, msr, 1 << 47), Err(Exception::gp(0)));
        }
        assert_eq!(wrmsr(&mut w, 0x277, 0x0007_0406_0007_0401), Ok(Flow::Sync));
        assert_eq!(rdmsr(&mut w, 0x277), Ok(0x0007_0406_0007_0401));
        for bad in [2, 3, 8, 1 << 63] {
            assert_eq!(wrmsr(&mut w, 0x277, bad), Err(Exception::gp(0)));
        }
        assert_eq!(wrmsr(&mut w, 0x26f, 0x0606_0606_0606_0606), Ok(Flow::Sync));
        assert_eq!(wrmsr(&mut w, 0x26f, 7), Err(Exception::gp(0)));
        assert_eq!(rdmsr(&mut w, 0x26f), Ok(0x0606_0606_0606_0606));
        assert_eq!(wrmsr(&mut w, 0x201, 0xff_8000_0800), Ok(Flow::Sync));
        assert_eq!(wrmsr(&mut w, 0x201, 1 << 40), Err(Exception::gp(0)));
        assert_eq!(wrmsr(&mut w, 0x2ff, 0xc06), Ok(Flow::Sync));
        assert_eq!(rdmsr(&mut w, 0x2ff), Ok(0xc06));
        assert_eq!(wrmsr(&mut w, 0xfe, 0), Err(Exception::gp(0)));
        assert_eq!(wrmsr(&mut w, 0xc000_0103, 1 << 32), Err(Exception::gp(0)));
    }

    #[test]
    fn the_time_stamp_counter() {
        let mut w = World::new();
        w.bus.tsc = 1000;
        assert_eq!(rdmsr(&mut w, 0x10), Ok(1000));
        assert_eq!(wrmsr(&mut w, 0x10, 5000), Ok(Flow::Sync));
        w.bus.tsc = 1007;
        assert_eq!(rdmsr(&mut w, 0x10), Ok(5007));
        assert_eq!(rdmsr(&mut w, 0x3b), Ok(4000));
        assert_eq!(wrmsr(&mut w, 0x3b, 0), Ok(Flow::Sync));
        assert_eq!(rdmsr(&mut w, 0x10), Ok(1007));
    }

    #[test]
    fn an_armed_deadline_hears_of_a_new_offset() {
        let mut w = World::new();
        w.bus.tsc = 1000;
        assert_eq!(wrmsr(&mut w, 0x10, 1500), Ok(Flow::Sync));
        assert_eq!(wrmsr(&mut w, 0x6e0, 3000), Ok(Flow::Sync));
        assert_eq!(w.bus.log, ["deadline 3000"]);
        assert_eq!(wrmsr(&mut w, 0x3b, 500), Ok(Flow::Sync));
        assert_eq!(w.bus.log.len(), 1);
        assert_eq!(wrmsr(&mut w, 0x3b, 600), Ok(Flow::Sync));
        assert_eq!(w.bus.log, ["deadline 3000"; 2]);
    }

    #[test]
    fn efer() {
        let mut w = World::new();
        let now = w.st.efer;
        assert_eq!(wrmsr(&mut w, 0xc000_0080, now & !efer::LME), Err(Exception::gp(0)));
        assert_eq!(wrmsr(&mut w, 0xc000_0080, now | 1 << 12), Err(Exception::gp(0)));
        // LMA is kept; NXE takes effect at once.
        assert_eq!(w.cx().read(USER, &mut [0]), Ok(()));
        w.put(LEAVES + 0x1000, USER | 7 | 1 << 63);
        assert_eq!(wrmsr(&mut w, 0xc000_0080, now & !efer::NXE & !efer::LMA), Ok(Flow::Sync));
        assert_eq!(w.st.efer, now & !efer::NXE);
        assert_eq!(w.cx().read(USER, &mut [0]), Err(Exception::pf(9, USER)));
    }

    #[test]
    fn others_are_the_machines() {
        let mut w = World::new();
        assert_eq!(rdmsr(&mut w, 0x1b), Ok(0xfee0_0900));
        assert_eq!(wrmsr(&mut w, 0x1b, 0), Ok(Flow::Sync));
        assert_eq!(rdmsr(&mut w, 0x1234), Err(Exception::gp(0)));
        assert_eq!(wrmsr(&mut w, 0x1234, 0), Err(Exception::gp(0)));
        assert_eq!(rdmsr(&mut w, 0xc001_0015).map(|v| v >> 24 & 1), Ok(1));
        assert_eq!(wrmsr(&mut w, 0xc001_0015, 0), Ok(Flow::Sync));
        let mut w = World::new().user();
        assert_eq!(rdmsr(&mut w, 0x10), Err(Exception::gp(0)));
        assert_eq!(wrmsr(&mut w, 0x10, 0), Err(Exception::gp(0)));
    }
}
