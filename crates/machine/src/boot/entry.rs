//! The processor as the boot protocols want it: for Linux's 64-bit entry point long mode, flat segments, memory identity-mapped; for PVH and
//! multiboot protected mode without paging, flat segments.
//!
//! The page tables map the first 4 GiB, which hold the kernel, the zero page, the command line and (below 3 GiB, always) the initramfs.
//! The kernel builds its own tables before it looks further.
use crate::memory::GuestRam;
use twinstep_x86::state::{cr0, cr4, efer, gpr, rflags, seg};
use twinstep_x86::{CpuState, Segment};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

const GDT: u64 = 0x8000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
/// Four page directories, one for each GiB.
const PAGE_DIRECTORIES: u64 = 0xb000;
const IDENTITY_GIB: u64 = 4;

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;

/// Selectors the protocol prescribes: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
/// null, null, 64-bit code, data.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the GDT and the page tables.
pub(super) fn write_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let put = |gpa: u64, value: u64| ram.write_slice(&value.to_le_bytes(), GuestAddress(gpa));
    for (i, descriptor) in (0u64..).zip(DESCRIPTORS) {
        put(GDT + i * 8, descriptor)?;
    }
    put(PML4, PDPT | PRESENT_WRITABLE)?;
    for gib in 0..IDENTITY_GIB {
        put(PDPT + gib * 8, (PAGE_DIRECTORIES + gib * 4096) | PRESENT_WRITABLE)?;
    }
    for page in 0..IDENTITY_GIB * 512 {
        put(PAGE_DIRECTORIES + page * 8, page << 21 | LARGE_PAGE | PRESENT_WRITABLE)?;
    }
    Ok(())
}

/// null, null, 32-bit code, data: what a kernel that begins in protected mode finds in the GDT until it has its own.
const DESCRIPTORS_32: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the GDT of protected mode.
pub(super) fn write_gdt_32(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let bytes = DESCRIPTORS_32.map(u64::to_le_bytes).concat();
    ram.write_slice(&bytes, GuestAddress(GDT))
}

/// The state at the first instruction of a kernel that begins in protected mode.
pub(super) fn state_32(entry: u32, eax: u32, ebx: u32) -> CpuState {
    let mut st = state(entry.into(), 0);
    st.seg[seg::CS].attributes = (DESCRIPTORS_32[2] >> 40) as u16 & 0xf0ff;
    st.tr = Segment { base: 0, limit: 0x67, selector: 0, attributes: 0x8b };
    st.cr0 = cr0::PE | cr0::ET;
    (st.cr3, st.cr4, st.efer) = (0, 0, 0);
    (st.gpr[gpr::RAX], st.gpr[gpr::RBX]) = (eax.into(), ebx.into());
    st
}

/// The state at the kernel's first instruction.
pub(super) fn state(entry: u64, zero_page: u64) -> CpuState {
    let mut st = CpuState::reset();
    let segment = |selector: u16| {
        let descriptor = DESCRIPTORS[usize::from(selector >> 3)];
        // Bits 40..=47 and 52..=55, as in `Segment::attributes`.
        Segment { base: 0, limit: u32::MAX, selector, attributes: (descriptor >> 40) as u16 & 0xf0ff }
    };
    st.seg = [segment(DATA); 6];
    st.seg[seg::CS] = segment(CODE);
    st.gdtr.base = GDT;
    st.gdtr.limit = (DESCRIPTORS.len() * 8 - 1) as u16;
    st.idtr.limit = 0;
    st.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE;
    st.cr3 = PML4;
    st.cr4 = cr4::PAE;
    st.efer = efer::LME | efer::LMA;
    st.rflags = rflags::ONE;
    st.rip = entry;
    st.gpr[gpr::RSI] = zero_page;
    // Firmware leaves memory write-back by default.
    st.mtrr_def_type = 0xc06;
    st
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_first_4_gib_map_to_themselves() {
        let (ram, _phys) = memory::map(64).unwrap();
        write_tables(&ram).unwrap();
        let get = |gpa: u64| ram.read_obj::<u64>(GuestAddress(gpa)).unwrap();
        for va in [0u64, 0x10_0200, 0x7fff_ffff, 0xffff_ffff] {
            let pdpt = get(PML4 + (va >> 39) * 8) & !0xfff;
            let pd = get(pdpt + (va >> 30 & 511) * 8) & !0xfff;
            let pde = get(pd + (va >> 21 & 511) * 8);
            assert_eq!(pde & !0x1f_ffff | va & 0x1f_ffff, va);
            assert_eq!(pde & (LARGE_PAGE | 3), LARGE_PAGE | 3);
        }
    }

    #[test]
    fn segments_match_their_descriptors() {
        let st = state(0x10_0200, 0x7000);
        assert_eq!(st.seg[seg::CS].attributes, 0xa09b);
        assert_eq!(st.seg[seg::SS].attributes, 0xc093);
    }
}
