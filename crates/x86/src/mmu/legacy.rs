//! Page walks outside long mode: 32-bit paging with 4 MiB pages (SDM vol. 3 section 4.3) and PAE paging (section 4.4).
//!
//! **In:** a 32-bit linear address and an access. **Out:** a [`Walk`], with A and D set as the access does; or the page fault.
//!
//! **Invariant:** as for four levels: a failed walk changes nothing, and what it depends on is in [`Walk::entries`]. The pointers at PAE's
//! root are registers (`CpuState::pdpte`) and no part of it: only an instruction that flushes changes them. Nothing is kept over a CR3
//! write, and a store to a table forgets everything ([`super::tables`]): these modes want exactness more than speed.
use super::{Access, Mmu, PHYSICAL_BITS, Walk};
use crate::state::{cr0, cr4, efer, rflags};
use crate::{CpuState, Exception, PageFlags};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;

/// What page tables look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Entries of eight bytes, nine bits of an address choose one. The root is in registers.
    Pae,
    /// Entries of four bytes, ten bits of an address choose one.
    Narrow,
}

impl Shape {
    fn bits(self) -> u32 {
        if self == Self::Pae { 9 } else { 10 }
    }
    /// Bits of an address below those that choose an entry of this level.
    fn shift(self, level: u32) -> u32 {
        12 + self.bits() * level
    }
}

impl Mmu {
    /// Reads a page-table entry of four or eight bytes; what is not RAM reads as all ones.
    fn entry(&self, gpa: u64, shape: Shape) -> u64 {
        let narrow = shape == Shape::Narrow;
        let Some(word) = self.ram.word(gpa & !7) else { return if narrow { u32::MAX.into() } else { u64::MAX } };
        // SAFETY: a word of mapped RAM.
        let word = unsafe { word.read() };
        if narrow { word >> ((gpa & 4) * 8) & 0xffff_ffff } else { word }
    }

    /// Sets bits of an entry.
    fn mark(&mut self, gpa: u64, bits: u64) {
        let Some(word) = self.ram.word(gpa & !7) else { return };
        let bits = bits << ((gpa & 4) * 8);
        // SAFETY: a word of mapped RAM.
        unsafe {
            let old = word.read();
            if old & bits == bits {
                return;
            }
            word.write(old | bits);
        }
        let Some((page, _)) = self.ram.page(gpa) else { return };
        let flags = self.ram.flags();
        flags.set(page, PageFlags::DIRTY);
        if flags.get(page) & PageFlags::CODE != 0 {
            let at = (gpa & 0xff8) as u16;
            self.pending.code.push((page, at, at + 7));
        }
    }

    /// [`Mmu::walk`] with paging on and long mode off.
    pub(super) fn walk_legacy(&mut self, st: &CpuState, va: u64, access: Access, user: bool) -> Result<Walk, Exception> {
        let pae = st.cr4 & cr4::PAE != 0;
        let shape = if pae { Shape::Pae } else { Shape::Narrow };
        let nxe = pae && st.efer & efer::NXE != 0;
        let write = access == Access::Write;
        let mut code = (write as u32) << 1 | (user as u32) << 2;
        if access == Access::Execute && (nxe || st.cr4 & cr4::SMEP != 0) {
            code |= 1 << 4;
        }
        let mut table = st.cr3 & 0xffff_f000;
        if pae {
            let pointer = st.pdpte[(va >> 30 & 3) as usize];
            if pointer & PRESENT == 0 {
                return Err(Exception::pf(code, va));
            }
            table = pointer & ADDRESS;
        }
        let reserved_high = if pae { !((1 << PHYSICAL_BITS) - 1) & !if nxe { NO_EXECUTE } else { 0 } } else { 0 };
        let mut entries = [0; 4];
        let (mut writable, mut user_ok, mut no_exec) = (true, true, false);
        let mut depth = 0;
        let (leaf, level) = loop {
            let level = 1 - depth as u32;
            let index = va >> shape.shift(level) & ((1 << shape.bits()) - 1);
            let gpa = table + index * if pae { 8 } else { 4 };
            let entry = self.entry(gpa, shape);
            entries[depth] = gpa;
            if entry & PRESENT == 0 {
                return Err(Exception::pf(code, va));
            }
            let large = level == 1 && entry & LARGE != 0 && (pae || st.cr4 & cr4::PSE != 0);
            let mut reserved = reserved_high;
            if large {
                // 2 MiB: bits 13..=20. 4 MiB: bits 13..=20 are the upper bits of the address (PSE-36), bit 21 is reserved.
                reserved |= if pae { 0x1f_e000 } else { 1 << 21 };
            }
            if entry & reserved != 0 {
                return Err(Exception::pf(code | 1 | 1 << 3, va));
            }
            writable &= entry & WRITABLE != 0;
            user_ok &= entry & USER != 0;
            no_exec |= nxe && entry & NO_EXECUTE != 0;
            if large || level == 0 {
                break (entry, level);
            }
            table = entry & ADDRESS;
            depth += 1;
        };
        let denied = user && !user_ok
            || write && !writable && (user || st.cr0 & cr0::WP != 0)
            || access == Access::Execute && (no_exec || !user && user_ok && st.cr4 & cr4::SMEP != 0)
            || access != Access::Execute && !user && user_ok && st.cr4 & cr4::SMAP != 0 && st.rflags & rflags::AC == 0;
        if denied {
            return Err(Exception::pf(code | 1, va));
        }
        for (d, &entry) in entries.iter().enumerate().take(depth + 1) {
            self.mark(entry, if d == depth && write { ACCESSED | DIRTY } else { ACCESSED });
        }
        let gpa = match (level == 1, pae) {
            (false, _) => leaf & ADDRESS | va & 0xfff,
            (true, true) => leaf & ADDRESS & !0x1f_ffff | va & 0x1f_ffff,
            (true, false) => leaf & 0xffc0_0000 | (leaf >> 13 & 0xff) << 32 | va & 0x3f_ffff,
        };
        let may_write = writable || !user && st.cr0 & cr0::WP == 0;
        let dirty = write || leaf & DIRTY != 0;
        let executable = !no_exec && (!user || user_ok) && (user || !user_ok || st.cr4 & cr4::SMEP == 0);
        Ok(Walk { gpa, writable: may_write && dirty, executable, shift: shape.shift(level), entries, legacy: true })
    }
}
