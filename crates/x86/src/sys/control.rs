//! Control and debug registers, and the small privileged instructions around them.
//!
//! **In:** the instruction. **Out:** a state all of whose control bits are ones the CPU models have.
//!
//! **Invariant:** EFER.LMA is set exactly if paging is on; then CR4.PAE and CR0.PE are set too. Every change that could make a
//! cached translation wrong flushes it before this module returns. Paging without long mode is not offered (#GP).
//!
//! References: APM vol. 2 sections 3.1 (CR0, CR3, CR4), 13.1.1 (debug registers), 14.4 to 14.6 (entering long mode).
use super::{Cx, Flow, msr};
use crate::Exception;
use crate::exception::Vector;
use crate::mmu::PHYSICAL_BITS;
use crate::state::{Segment, cr0, cr4, efer, gpr, rflags, seg};
use iced_x86::{Instruction, Mnemonic as M, Register};

/// CR0 bits that can be set.
pub(crate) const CR0_ALLOWED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// CR4 bits that can be set; those of features the models lack are reserved. MCE and PCE are stored without effect.
pub(crate) const CR4_ALLOWED: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT;

/// CR4 bits that translations depend on.
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP;
/// CR0 bits that translations depend on.
const CR0_PAGING: u64 = cr0::PG | cr0::WP | cr0::PE;
/// CR3 bits that are kept: the root's address, PCD, PWT.
pub(crate) const CR3_KEPT: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff | 0x18;

/// DR6: bits that read as one.
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR6: bits that can be written.
pub(crate) const DR6_WRITABLE: u64 = 0xe00f;
/// DR7: the bit that reads as one.
pub(crate) const DR7_FIXED: u64 = 0x400;
/// DR7: bits that can be written.
pub(crate) const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7: general detect.
pub(super) const DR7_GD: u64 = 1 << 13;
/// DR6: debug register access detected.
const DR6_BD: u64 = 1 << 13;

/// Executes one of this module's instructions, MOV apart.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    match insn.mnemonic() {
        M::Cli | M::Sti => interrupt_flag(cx, insn.mnemonic() == M::Sti),
        M::Hlt => {
            cx.require_cpl0()?;
            cx.st.halted = true;
            Ok(Flow::Sync)
        }
        M::Smsw => {
            cx.store_word(insn, cx.st.cr0)?;
            Ok(Flow::Next)
        }
        M::Lmsw => {
            cx.require_cpl0()?;
            let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
            let value = cx.operand16(insn, 0)? as u64 & low;
            // PE can be set but not cleared.
            let new = cx.st.cr0 & (!low | cr0::PE) | value;
            set_cr0(cx, new)
        }
        M::Clts => {
            cx.require_cpl0()?;
            cx.st.cr0 &= !cr0::TS;
            Ok(Flow::Sync)
        }
        M::Invlpg => {
            cx.require_cpl0()?;
            let va = cx.ea(insn).va;
            cx.mmu.flush_page(va);
            Ok(Flow::Sync)
        }
        // Memory is coherent here: nothing to write back or to drop.
        M::Invd | M::Wbinvd | M::Wbnoinvd => {
            cx.require_cpl0()?;
            Ok(Flow::Next)
        }
        M::Rdmsr => {
            cx.require_cpl0()?;
            let value = msr::read(cx, cx.st.gpr[gpr::RCX] as u32)?;
            set_edx_eax(cx, value);
            Ok(Flow::Next)
        }
        M::Wrmsr => {
            cx.require_cpl0()?;
            let value = cx.st.gpr[gpr::RDX] << 32 | cx.st.gpr[gpr::RAX] & 0xffff_ffff;
            msr::write(cx, cx.st.gpr[gpr::RCX] as u32, value)?;
            Ok(Flow::Sync)
        }
        M::Cpuid => {
            let (leaf, subleaf) = (cx.st.gpr[gpr::RAX] as u32, cx.st.gpr[gpr::RCX] as u32);
            let [a, b, c, d] = cx.model.cpuid(leaf, subleaf, cx.st);
            for (register, value) in [(gpr::RAX, a), (gpr::RBX, b), (gpr::RCX, c), (gpr::RDX, d)] {
                cx.st.gpr[register] = value as u64;
            }
            Ok(Flow::Next)
        }
        M::Rdtsc | M::Rdtscp => {
            if cx.st.cr4 & cr4::TSD != 0 && cx.st.cpl != 0 {
                return Err(Exception::gp(0));
            }
            let tsc = msr::tsc(cx);
            set_edx_eax(cx, tsc);
            if insn.mnemonic() == M::Rdtscp {
                cx.st.gpr[gpr::RCX] = cx.st.tsc_aux & 0xffff_ffff;
            }
            Ok(Flow::Next)
        }
        // A hint-space no-operation without shadow stacks, whatever the host's processor thinks of it.
        M::Rdsspd | M::Rdsspq => Ok(Flow::Next),
        _ => Err(Exception::UD),
    }
}

fn set_edx_eax(cx: &mut Cx, value: u64) {
    cx.st.gpr[gpr::RAX] = value & 0xffff_ffff;
    cx.st.gpr[gpr::RDX] = value >> 32;
}

fn interrupt_flag(cx: &mut Cx, set: bool) -> Result<Flow, Exception> {
    if cx.st.cpl as u64 > (cx.st.rflags & rflags::IOPL) >> 12 {
        return Err(Exception::gp(0));
    }
    if !set {
        cx.st.rflags &= !rflags::IF;
        return Ok(Flow::Next);
    }
    if cx.st.rflags & rflags::IF != 0 {
        return Ok(Flow::Next);
    }
    cx.st.rflags |= rflags::IF;
    cx.st.interrupt_shadow = true;
    Ok(Flow::Sync)
}

/// MOV to and from control and debug registers.
pub(super) fn mov(cx: &mut Cx, to: Register, from: Register) -> Result<Flow, Exception> {
    if to.is_cr() {
        let value = cx.st.gpr[from.full_register().number() & 15];
        let value = if cx.st.is_64_bit_code() { value } else { value & 0xffff_ffff };
        return write_cr(cx, to.number(), value);
    }
    if from.is_cr() {
        let value = read_cr(cx, from.number())?;
        cx.set_reg(to, value);
        return Ok(Flow::Next);
    }
    if to.is_dr() {
        let value = cx.st.gpr[from.full_register().number() & 15];
        let value = if cx.st.is_64_bit_code() { value } else { value & 0xffff_ffff };
        return write_dr(cx, to.number(), value);
    }
    if from.is_dr() {
        let n = checked_dr(cx, from.number())?;
        cx.set_reg(to, cx.st.dr[n]);
        return Ok(Flow::Next);
    }
    // Test registers do not exist.
    Err(Exception::UD)
}

fn read_cr(cx: &mut Cx, n: usize) -> Result<u64, Exception> {
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::UD);
    }
    cx.require_cpl0()?;
    Ok(match n {
        0 => cx.st.cr0,
        2 => cx.st.cr2,
        3 => cx.st.cr3,
        4 => cx.st.cr4,
        _ => cx.bus.cr8() as u64,
    })
}

fn write_cr(cx: &mut Cx, n: usize, value: u64) -> Result<Flow, Exception> {
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::UD);
    }
    cx.require_cpl0()?;
    match n {
        0 => return set_cr0(cx, value),
        2 => cx.st.cr2 = value,
        3 => {
            if value >> PHYSICAL_BITS != 0 {
                return Err(Exception::gp(0));
            }
            cx.st.cr3 = value & CR3_KEPT;
            cx.mmu.flush_non_global();
        }
        4 => {
            let leaves_pae = value & cr4::PAE == 0 && cx.st.efer & efer::LMA != 0;
            if value & !CR4_ALLOWED != 0 || leaves_pae {
                return Err(Exception::gp(0));
            }
            let changed = cx.st.cr4 ^ value;
            cx.st.cr4 = value;
            if changed & CR4_PAGING != 0 {
                cx.mmu.flush_all();
            }
        }
        _ => {
            if value > 15 {
                return Err(Exception::gp(0));
            }
            cx.bus.set_cr8(cx.position, value as u8);
        }
    }
    Ok(Flow::Sync)
}

fn set_cr0(cx: &mut Cx, value: u64) -> Result<Flow, Exception> {
    let bit = |b| value & b != 0;
    if value >> 32 != 0 || bit(cr0::PG) && !bit(cr0::PE) || bit(cr0::NW) && !bit(cr0::CD) {
        return Err(Exception::gp(0));
    }
    let was_paging = cx.st.cr0 & cr0::PG != 0;
    let long_code = cx.st.seg[seg::CS].attributes & Segment::LONG != 0;
    let mut new_efer = cx.st.efer;
    if bit(cr0::PG) && !was_paging {
        // Into long mode; the other kinds of paging are not offered.
        if cx.st.efer & efer::LME == 0 || cx.st.cr4 & cr4::PAE == 0 || long_code {
            return Err(Exception::gp(0));
        }
        new_efer |= efer::LMA;
    } else if !bit(cr0::PG) && was_paging {
        // Out of it: from compatibility mode only.
        if long_code {
            return Err(Exception::gp(0));
        }
        new_efer &= !efer::LMA;
    }
    let new = value & CR0_ALLOWED | cr0::ET;
    let changed = cx.st.cr0 ^ new;
    cx.st.cr0 = new;
    cx.st.efer = new_efer;
    if changed & CR0_PAGING != 0 {
        cx.mmu.flush_all();
    }
    Ok(Flow::Sync)
}

/// The number a debug register really has, after the checks both directions share.
fn checked_dr(cx: &mut Cx, n: usize) -> Result<usize, Exception> {
    let n = match n {
        0..=3 | 6 | 7 => n,
        4 | 5 if cx.st.cr4 & cr4::DE == 0 => n + 2,
        _ => return Err(Exception::UD),
    };
    cx.require_cpl0()?;
    if cx.st.dr[7] & DR7_GD != 0 {
        return Err(Exception { vector: Vector::Debug, error: None, address: Some(DR6_BD) });
    }
    Ok(n)
}

fn write_dr(cx: &mut Cx, n: usize, value: u64) -> Result<Flow, Exception> {
    let n = checked_dr(cx, n)?;
    cx.st.dr[n] = match n {
        6 | 7 if value >> 32 != 0 => return Err(Exception::gp(0)),
        6 => value & DR6_WRITABLE | DR6_FIXED,
        7 => value & DR7_WRITABLE | DR7_FIXED,
        _ => value,
    };
    Ok(Flow::Sync)
}
