//! Control and debug registers, and the small privileged instructions around them.
//!
//! **In:** the instruction. **Out:** a state all of whose control bits are ones the CPU models have.
//!
//! **Invariant:** EFER.LMA is set exactly if paging is on and EFER.LME is set; then CR4.PAE and CR0.PE are set too. Every change that could
//! make a cached translation wrong flushes it before this module returns. The page-directory pointers of PAE paging outside long mode
//! are registers: they are loaded here and nowhere else (SDM vol. 3 section 4.4.1).
//!
//! References: APM vol. 2 sections 3.1 (CR0, CR3, CR4), 13.1.1 (debug registers), 14.4 to 14.6 (entering long mode).
use super::{Cx, Flow, msr, pcid};
use crate::exception::Vector;
use crate::mmu::PHYSICAL_BITS;
use crate::state::{Segment, cr0, cr4, efer, gpr, rflags, seg};
use crate::{Exception, Features};
use iced_x86::{Instruction, Mnemonic as M, Register};

/// CR0 bits that can be set.
pub(crate) const CR0_ALLOWED: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

/// CR4 bits that some model can set; those of features the models lack are reserved. MCE and PCE are stored without effect.
pub(crate) const CR4_ALLOWED: u64 = cr4::PCIDE
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::OSXSAVE;

/// CR4 bits that translations depend on.
/// (What is cached depends on the tables alone, so global pages and process-context identifiers have no part in it.)
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::SMEP | cr4::SMAP;
/// CR4 bits whose change loads PAE's page-directory pointers again.
const CR4_POINTERS: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP;
/// CR0 bits that translations depend on.
const CR0_PAGING: u64 = cr0::PG | cr0::WP | cr0::PE;
/// CR3 bits that are kept outside long mode: PAE's table of page-directory pointers has 32 bytes and lies anywhere.
pub(crate) const CR3_KEPT_LEGACY: u64 = 0xffff_fff8;

/// Reserved bits of a page-directory pointer of PAE paging.
const PDPTE_RESERVED: u64 = !((1 << PHYSICAL_BITS) - 1) | 0x1e6;

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
        M::Invpcid => pcid::invalidate(cx, insn),
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
            let legacy = !cx.long_mode();
            let value = if legacy { value & CR3_KEPT_LEGACY } else { pcid::new_cr3(cx.st, value)? };
            if legacy && cx.st.cr0 & cr0::PG != 0 && cx.st.cr4 & cr4::PAE != 0 {
                cx.st.pdpte = directory_pointers(cx, value)?;
            }
            cx.st.cr3 = value;
            cx.mmu.switch(value);
            // What is kept of an address space is long mode's.
            if legacy {
                cx.mmu.flush_all();
            }
        }
        4 => {
            let leaves_pae = value & cr4::PAE == 0 && cx.st.efer & efer::LMA != 0;
            let no_xsave = value & cr4::OSXSAVE != 0 && !cx.model.features.has(Features::XSAVE);
            let bad_pcide = !pcid::allows_cr4(cx.st, value, cx.long_mode());
            if value & !CR4_ALLOWED != 0 || no_xsave || leaves_pae || bad_pcide {
                return Err(Exception::gp(0));
            }
            let changed = cx.st.cr4 ^ value;
            let reloads = changed & CR4_POINTERS != 0 && value & cr4::PAE != 0 && cx.st.cr0 & cr0::PG != 0 && !cx.long_mode();
            if reloads {
                cx.st.pdpte = directory_pointers(cx, cx.st.cr3)?;
            }
            cx.st.cr4 = value;
            if changed & CR4_PAGING != 0 || reloads {
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
    if bit(cr0::PG) && !was_paging && cx.st.efer & efer::LME != 0 {
        // Into long mode, which has no 16-bit TSS.
        let narrow_tss = cx.st.tr.attributes & Segment::PRESENT != 0 && cx.st.tr.attributes & 8 == 0;
        if cx.st.cr4 & cr4::PAE == 0 || long_code || narrow_tss {
            return Err(Exception::gp(0));
        }
        new_efer |= efer::LMA;
    } else if !bit(cr0::PG) && was_paging && cx.long_mode() {
        // Out of it: from compatibility mode only, without process-context identifiers.
        if long_code || cx.st.cr4 & cr4::PCIDE != 0 {
            return Err(Exception::gp(0));
        }
        new_efer &= !efer::LMA;
    }
    let new = value & CR0_ALLOWED | cr0::ET;
    let changed = cx.st.cr0 ^ new;
    let pae = bit(cr0::PG) && cx.st.cr4 & cr4::PAE != 0 && new_efer & efer::LMA == 0;
    let reloads = changed & (cr0::PG | cr0::CD | cr0::NW) != 0 && pae;
    if reloads {
        cx.st.pdpte = directory_pointers(cx, cx.st.cr3)?;
    }
    if new_efer & efer::LMA != 0 && !was_paging {
        cx.st.cr3 &= pcid::cr3_kept(cx.st.cr4);
    }
    cx.st.cr0 = new;
    cx.st.efer = new_efer;
    if changed & CR0_PAGING != 0 || reloads {
        cx.mmu.flush_all();
    }
    Ok(Flow::Sync)
}

/// The page-directory pointers of PAE paging in memory at `cr3`; a present one with reserved bits is #GP(0).
fn directory_pointers(cx: &Cx, cr3: u64) -> Result<[u64; 4], Exception> {
    let mut pointers = [0; 4];
    for (i, pointer) in (0..).zip(&mut pointers) {
        // What is not RAM reads as all ones.
        // SAFETY: a word of mapped RAM.
        *pointer = cx.mmu.ram().word((cr3 & 0xffff_ffe0) + i * 8).map_or(u64::MAX, |word| unsafe { word.read() });
        if *pointer & 1 != 0 && *pointer & PDPTE_RESERVED != 0 {
            return Err(Exception::gp(0));
        }
    }
    Ok(pointers)
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

#[cfg(test)]
mod tests {
    use super::super::testing::{LEAVES, ROOT, USER, USER_CS32, World};
    use super::*;

    /// MOV CRn, RAX.
    fn write(w: &mut World, n: u8, value: u64) -> Result<Flow, Exception> {
        w.st.gpr[gpr::RAX] = value;
        if n < 8 { w.exec(&[0x0f, 0x22, 0xc0 | n << 3]) } else { w.exec(&[0x44, 0x0f, 0x22, 0xc0 | (n - 8) << 3]) }
    }
    fn read(w: &mut World, n: u8) -> u64 {
        assert_eq!(w.exec(&[0x0f, 0x20, 0xc0 | n << 3]), Ok(Flow::Next));
        w.st.gpr[gpr::RAX]
    }

    #[test]
    fn reserved_bits() {
        let gp = Err(Exception::gp(0));
        let mut w = World::new();
        let (cr0, cr4) = (w.st.cr0, w.st.cr4);
        assert_eq!(write(&mut w, 0, cr0 | 1 << 32), gp);
        assert_eq!(write(&mut w, 0, cr0 & !cr0::PE), gp);
        assert_eq!(write(&mut w, 0, cr0 | cr0::NW), gp);
        // PG cannot be cleared in 64-bit code.
        assert_eq!(write(&mut w, 0, cr0 & !cr0::PG), gp);
        assert_eq!(write(&mut w, 0, (cr0 | cr0::TS) & !cr0::ET), Ok(Flow::Sync));
        assert_eq!(read(&mut w, 0), cr0 | cr0::TS);
        assert_eq!(w.exec(&[0x0f, 0x06]), Ok(Flow::Sync));
        assert_eq!(w.st.cr0, cr0);
        assert_eq!(write(&mut w, 4, cr4 & !cr4::PAE), gp);
        for bit in [cr4::SMEP, cr4::SMAP, cr4::OSXSAVE, cr4::FSGSBASE, cr4::UMIP, cr4::VME, 1 << 12, 1 << 40] {
            assert_eq!(write(&mut w, 4, cr4 | bit), gp);
        }
        assert_eq!(write(&mut w, 4, cr4 | cr4::TSD), Ok(Flow::Sync));
        assert_eq!(write(&mut w, 3, 1 << 40), gp);
        assert_eq!(write(&mut w, 3, 1 << 63), gp);
        assert_eq!(write(&mut w, 3, ROOT | 0xfff), Ok(Flow::Sync));
        assert_eq!(read(&mut w, 3), ROOT | 0x18);
        assert_eq!(write(&mut w, 2, u64::MAX), Ok(Flow::Sync));
        assert_eq!(read(&mut w, 2), u64::MAX);
        assert_eq!(write(&mut w, 8, 16), gp);
        assert_eq!(write(&mut w, 8, 9), Ok(Flow::Sync));
        assert_eq!(w.bus.cr8, 9);
        assert_eq!(write(&mut w, 5, 0), Err(Exception::UD));
        let mut w = World::new().user();
        assert_eq!(write(&mut w, 3, ROOT), gp);
        assert_eq!(w.exec(&[0x0f, 0x20, 0xc0]), gp);
    }

    #[test]
    fn in_and_out_of_long_mode() {
        let mut w = World::new();
        w.st.seg[seg::CS] = super::super::segments::flat_code(USER_CS32 & !3, 0, false);
        let cr0 = w.st.cr0;
        assert_eq!(write(&mut w, 0, cr0 & !cr0::PG), Ok(Flow::Sync));
        assert_eq!(w.st.efer & efer::LMA, 0);
        w.st.cr4 &= !cr4::PAE;
        assert_eq!(write(&mut w, 0, cr0), Err(Exception::gp(0)));
        w.st.cr4 |= cr4::PAE;
        assert_eq!(write(&mut w, 0, cr0), Ok(Flow::Sync));
        assert_ne!(w.st.efer & efer::LMA, 0);
        // PAE paging without long mode: the first words of the root are no page-directory pointers (writable, user).
        assert_eq!(write(&mut w, 0, cr0 & !cr0::PG), Ok(Flow::Sync));
        w.st.efer &= !efer::LME;
        assert_eq!(write(&mut w, 0, cr0), Err(Exception::gp(0)));
        w.put(ROOT, 0x2001);
        assert_eq!(write(&mut w, 0, cr0), Ok(Flow::Sync));
        assert_eq!((w.st.pdpte, w.st.efer & efer::LMA), ([0x2001, 0, 0, 0], 0));
    }

    #[test]
    fn translations_follow_the_registers() {
        let mut w = World::new();
        // Write protection for the supervisor.
        w.put(LEAVES, 1);
        let cr0 = w.st.cr0;
        assert_eq!(write(&mut w, 0, cr0 & !cr0::WP), Ok(Flow::Sync));
        assert_eq!(w.cx().write(8, &[1]), Ok(()));
        assert_eq!(write(&mut w, 0, cr0), Ok(Flow::Sync));
        assert_eq!(w.cx().write(8, &[1]), Err(Exception::pf(3, 8)));
        // Another root.
        assert_eq!(w.cx().read(USER, &mut [0]), Ok(()));
        assert_eq!(write(&mut w, 3, 0x7000), Ok(Flow::Sync));
        assert_eq!(w.cx().read(USER, &mut [0]), Err(Exception::pf(0, USER)));
        assert_eq!(w.exec(&[0x0f, 0x01, 0x38]), Ok(Flow::Sync));
    }

    #[test]
    fn machine_status_word() {
        let mut w = World::new();
        w.st.cr0 |= cr0::TS;
        w.st.gpr[gpr::RAX] = cr0::EM;
        assert_eq!(w.exec(&[0x0f, 0x01, 0xf0]), Ok(Flow::Sync));
        let now = w.st.cr0;
        assert_eq!(now & 0xf, cr0::PE | cr0::EM);
        assert_eq!(w.exec(&[0x48, 0x0f, 0x01, 0xe1]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RCX], now);
    }

    #[test]
    fn debug_registers() {
        let mut w = World::new();
        w.st.gpr[gpr::RAX] = 0xffff_ffff;
        assert_eq!(w.exec(&[0x0f, 0x23, 0xf0]), Ok(Flow::Sync));
        assert_eq!(w.st.dr[6], 0xffff_eff0 | 0xf);
        w.st.gpr[gpr::RAX] = 1 << 32;
        assert_eq!(w.exec(&[0x0f, 0x23, 0xf8]), Err(Exception::gp(0)));
        w.st.gpr[gpr::RAX] = 0x3ff;
        assert_eq!(w.exec(&[0x0f, 0x23, 0xf8]), Ok(Flow::Sync));
        assert_eq!(w.st.dr[7], 0x7ff);
        // DR5 is DR7, unless CR4.DE.
        assert_eq!(w.exec(&[0x0f, 0x21, 0xe9]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RCX], 0x7ff);
        w.st.cr4 |= cr4::DE;
        assert_eq!(w.exec(&[0x0f, 0x21, 0xe9]), Err(Exception::UD));
        w.st.dr[7] |= DR7_GD;
        let bd = Exception { vector: Vector::Debug, error: None, address: Some(DR6_BD) };
        assert_eq!(w.exec(&[0x0f, 0x21, 0xc0]), Err(bd));
        let mut w = World::new().user();
        assert_eq!(w.exec(&[0x0f, 0x21, 0xc0]), Err(Exception::gp(0)));
    }

    #[test]
    fn interrupt_flag_and_shadow() {
        let mut w = World::new();
        assert_eq!(w.exec(&[0xfb]), Ok(Flow::Sync));
        assert!(w.st.interrupt_shadow && w.st.rflags & rflags::IF != 0);
        // STI with IF set casts none.
        assert_eq!(w.exec(&[0xfb]), Ok(Flow::Next));
        assert!(!w.st.interrupt_shadow);
        assert_eq!(w.exec(&[0xfa]), Ok(Flow::Next));
        assert_eq!(w.st.rflags & rflags::IF, 0);
        assert_eq!(w.exec(&[0xf4]), Ok(Flow::Sync));
        assert!(w.st.halted);
        let mut w = World::new().user();
        for code in [0xfa, 0xfb, 0xf4] {
            assert_eq!(w.exec(&[code]), Err(Exception::gp(0)));
        }
        w.st.rflags |= rflags::IOPL;
        assert_eq!(w.exec(&[0xfa]), Ok(Flow::Next));
    }

    #[test]
    fn time_and_identity() {
        let mut w = World::new().user();
        w.bus.tsc = 0x1_2345_6789;
        w.st.tsc_aux = 42;
        assert_eq!(w.exec(&[0x0f, 0x01, 0xf9]), Ok(Flow::Next));
        assert_eq!((w.st.gpr[gpr::RDX], w.st.gpr[gpr::RAX], w.st.gpr[gpr::RCX]), (1, 0x2345_6789, 42));
        w.st.cr4 |= cr4::TSD;
        assert_eq!(w.exec(&[0x0f, 0x31]), Err(Exception::gp(0)));
        w.st.gpr[gpr::RAX] = 0xffff_ffff_0000_0000;
        w.st.gpr[gpr::RCX] = 0;
        assert_eq!(w.exec(&[0x0f, 0xa2]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RBX], u32::from_le_bytes(*b"Auth") as u64);
    }

    /// What the models do not have is #UD, whatever the host's silicon says.
    #[test]
    fn unknown_instructions() {
        let none: &[&[u8]] = &[
            &[0x0f, 0x0b],
            &[0x0f, 0xb9, 0xc0],
            &[0x0f, 0xff, 0xc0],
            // RDPMC, RDRAND, RDSEED, RDPID.
            &[0x0f, 0x33],
            &[0x0f, 0xc7, 0xf0],
            &[0x0f, 0xc7, 0xf8],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            // MONITOR, MWAIT, XGETBV, XSAVE, VMCALL, VMMCALL, VMRUN, CLAC, STAC, INVVPID.
            &[0x0f, 0x01, 0xc8],
            &[0x0f, 0x01, 0xc9],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0xae, 0x20],
            &[0x0f, 0x01, 0xc1],
            &[0x0f, 0x01, 0xd9],
            &[0x0f, 0x01, 0xd8],
            &[0x0f, 0x01, 0xca],
            &[0x0f, 0x01, 0xcb],
            &[0x66, 0x0f, 0x38, 0x81, 0x00],
            // RDFSBASE, AESENC, PCLMULQDQ, VADDPS, ANDN, MOVBE, CLFLUSHOPT, SHA1NEXTE, ADCX.
            &[0xf3, 0x0f, 0xae, 0xc0],
            &[0x66, 0x0f, 0x38, 0xdc, 0xc1],
            &[0x66, 0x0f, 0x3a, 0x44, 0xc1, 0],
            &[0xc5, 0xf8, 0x58, 0xc1],
            &[0xc4, 0xe2, 0x78, 0xf2, 0xc1],
            &[0x0f, 0x38, 0xf0, 0x00],
            &[0x66, 0x0f, 0xae, 0x38],
            &[0x0f, 0x38, 0xc8, 0xc1],
            &[0x66, 0x0f, 0x38, 0xf6, 0xc1],
        ];
        for code in none {
            for mut w in [World::new(), World::new().user()] {
                assert_eq!(w.exec(code), Err(Exception::UD), "{code:x?}");
            }
        }
        // Not claimed: the silicon's own (ADDPS, POPCNT, PSHUFB, CMPXCHG16B, ENDBR64, BSF, PREFETCHW, PAUSE, LFENCE, FLD).
        let silicon: &[&[u8]] = &[
            &[0x0f, 0x58, 0xc1],
            &[0xf3, 0x0f, 0xb8, 0xc1],
            &[0x66, 0x0f, 0x38, 0x00, 0xc1],
            &[0x48, 0x0f, 0xc7, 0x08],
            &[0xf3, 0x0f, 0x1e, 0xfa],
            &[0x0f, 0xbc, 0xc1],
            &[0x0f, 0x0d, 0x08],
            &[0xf3, 0x90],
            &[0x0f, 0xae, 0xe8],
            &[0xd9, 0xc0],
            &[0x66, 0x0f, 0x3a, 0x63, 0xc1, 0],
            &[0xf2, 0x0f, 0x38, 0xf1, 0xc1],
            &[0xf2, 0x0f, 0x10, 0x00],
            &[0x9f],
            &[0x0f, 0xae, 0x38],
            &[0x0f, 0xc3, 0x00],
            &[0x9b],
        ];
        for code in silicon {
            let insn = iced_x86::Decoder::new(64, code, iced_x86::DecoderOptions::NONE).decode();
            assert!(!insn.is_invalid() && !super::super::handles(&insn, Features::NONE), "{code:x?} {insn:?}");
        }
    }
}
