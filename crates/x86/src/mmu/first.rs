//! The first level: the soft TLBs and jump caches that translated code reads at fixed addresses.
//!
//! **In:** translations and blocks that were found. **Out:** hits. One entry a page or address, kernel and user permissions apart.
//!
//! What belongs to the lower half of the address space is listed as it is filled in, so that a switch to another address space
//! clears what is there and not the whole.
//!
//! Invariant: an entry of the lower half agrees with the current element of the cache group, one of the upper half with what all elements
//! share (see [`super::groups`]); no write entry leads to a page that holds code or a page table.
use super::groups::Entry;
use crate::PAGE_SIZE;
use crate::sites::Sites;

/// Entries in each soft TLB; a power of two.
pub const TLB_ENTRIES: usize = 512;
/// Entries in a jump cache; a power of two.
pub const JUMP_ENTRIES: usize = 1 << 14;
/// Fills of the lower half that are listed; after more of them everything is looked through.
pub const TLB_FILLS: usize = 1024;

/// One soft TLB in the layout translated code reads. An entry hits for reads if `read[i] == va & !0xfff`, likewise for writes;
/// the host address is then `va + addend[i]`.
#[repr(C)]
pub struct Tlb {
    /// Page addresses valid for reading, or that of an empty entry.
    pub read: [u64; TLB_ENTRIES],
    /// Page addresses valid for writing, or that of an empty entry.
    pub write: [u64; TLB_ENTRIES],
    /// Host address minus guest virtual address.
    pub addend: [u64; TLB_ENTRIES],
}

impl Tlb {
    /// The tag of an empty entry `i`: a page that belongs into another entry, so that no address, canonical or not, matches.
    #[inline]
    const fn empty(i: usize) -> u64 {
        ((i ^ 1) as u64) * PAGE_SIZE
    }
    #[inline]
    fn is_empty(tag: u64, i: usize) -> bool {
        Self::index(tag) != i
    }
    fn clear(tags: &mut [u64; TLB_ENTRIES]) {
        for (i, tag) in tags.iter_mut().enumerate() {
            *tag = Self::empty(i);
        }
    }
    #[inline]
    fn index(va: u64) -> usize {
        (va / PAGE_SIZE) as usize & (TLB_ENTRIES - 1)
    }
    #[inline]
    fn drop_entry(&mut self, i: usize) {
        self.read[i] = Self::empty(i);
        self.write[i] = Self::empty(i);
    }
}

/// One entry of a jump cache: guest virtual address to host code.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Jump {
    /// Guest virtual address.
    pub rip: u64,
    /// Host address of the block's entry.
    pub code: u64,
}

impl Jump {
    /// Empty entry `i`: an address that belongs into another entry, so that no jump finds it.
    pub const fn empty(i: usize) -> Self {
        Self { rip: (i ^ 1) as u64, code: 0 }
    }
}

/// The first level, part of the frame that translated code addresses.
#[repr(C, align(64))]
pub struct First {
    /// Soft TLBs: kernel, user.
    pub tlb: [Tlb; 2],
    /// What the accesses of translated code remember for themselves, of what the TLBs held.
    pub sites: Sites,
    /// Jump caches: kernel, user.
    pub jumps: [[Jump; JUMP_ENTRIES]; 2],
    /// How many entries of `tlb_list` count; [`TLB_FILLS`] means that there were more.
    pub tlb_fills: u64,
    /// How many entries of `jump_list` count, lower and upper half; [`JUMP_ENTRIES`] means that there were more.
    pub jump_fills: [u64; 2],
    /// Where the second level is: of the lower half (the current element), of the upper half.
    pub small: [*mut Entry; 2],
    /// See `small`; entries of large pages.
    pub large: [*mut Entry; 2],
    /// Jumps of the second level, by half.
    pub far: [*mut Jump; 2],
    /// Entries filled with pages of the lower half: index, and from bit 9 on which TLB.
    pub tlb_list: [u16; TLB_FILLS],
    /// Jump cache entries filled, by half: index, and from bit 14 on which cache.
    pub jump_list: [[u16; JUMP_ENTRIES]; 2],
}

/// 1 for addresses of the upper half.
#[inline]
pub(super) fn half(va: u64) -> usize {
    (va >> 63) as usize
}

impl First {
    /// Empties everything.
    pub(super) fn clear(&mut self) {
        for tlb in &mut self.tlb {
            Tlb::clear(&mut tlb.read);
            Tlb::clear(&mut tlb.write);
        }
        self.tlb_fills = 0;
        self.sites.clear_half(0);
        self.sites.clear_half(1);
        self.jump_fills = [JUMP_ENTRIES as u64; 2];
        self.wipe_jumps(0);
        self.wipe_jumps(1);
    }

    /// Forgets the pages of the lower half.
    pub(super) fn clear_lower(&mut self) {
        self.sites.clear_half(0);
        let fills = std::mem::take(&mut self.tlb_fills) as usize;
        if fills < TLB_FILLS {
            for k in 0..fills {
                let at = self.tlb_list[k] as usize;
                let (tlb, i) = (&mut self.tlb[at >> 9 & 1], at & (TLB_ENTRIES - 1));
                // The entry may have gone to a page of the upper half since; then it may stay.
                if half(tlb.read[i]) == 0 {
                    tlb.drop_entry(i);
                }
            }
            return;
        }
        self.clear_upper_or_lower(0);
    }
    /// Forgets the pages of one half by looking at every entry.
    pub(super) fn clear_upper_or_lower(&mut self, which: usize) {
        self.sites.clear_half(which);
        for tlb in &mut self.tlb {
            for i in 0..TLB_ENTRIES {
                if half(tlb.read[i]) == which {
                    tlb.drop_entry(i);
                }
            }
        }
    }

    /// Forgets one page.
    pub(super) fn drop_page(&mut self, page: u64) {
        self.sites.clear_range(page, 12);
        let i = Tlb::index(page);
        for tlb in &mut self.tlb {
            if tlb.read[i] == page || tlb.write[i] == page {
                tlb.drop_entry(i);
            }
        }
    }
    /// Forgets the pages of the range of `1 << shift` bytes that holds `va`.
    pub(super) fn drop_range(&mut self, va: u64, shift: u32) {
        self.sites.clear_range(va, shift);
        for tlb in &mut self.tlb {
            for i in 0..TLB_ENTRIES {
                if (tlb.read[i] ^ va) >> shift == 0 {
                    tlb.drop_entry(i);
                }
            }
        }
    }
    /// Takes away write entries that lead to the page at host address `host`.
    pub(super) fn forbid_writes(&mut self, host: u64) {
        self.sites.forbid_writes(host);
        for tlb in &mut self.tlb {
            for i in 0..TLB_ENTRIES {
                if tlb.write[i].wrapping_add(tlb.addend[i]) == host && !Tlb::is_empty(tlb.write[i], i) {
                    tlb.write[i] = Tlb::empty(i);
                }
            }
        }
    }
    /// Takes away all write entries.
    pub(super) fn forbid_all_writes(&mut self) {
        self.sites.forbid_all_writes();
        for tlb in &mut self.tlb {
            Tlb::clear(&mut tlb.write);
        }
    }

    /// Makes accesses to the page of `va` hit.
    #[inline]
    pub(super) fn fill(&mut self, va: u64, user: bool, addend: u64, write: bool) {
        let page = va & !(PAGE_SIZE - 1);
        let i = Tlb::index(va);
        let tlb = &mut self.tlb[user as usize];
        if half(va) == 0 && tlb.read[i] != page {
            let n = (self.tlb_fills as usize).min(TLB_FILLS - 1);
            self.tlb_list[n] = (i | (user as usize) << 9) as u16;
            self.tlb_fills = (n + 1) as u64;
        }
        if write {
            tlb.write[i] = page;
        } else if tlb.read[i] != page {
            tlb.write[i] = Tlb::empty(i);
        }
        tlb.read[i] = page;
        tlb.addend[i] = addend;
    }

    /// The host address of a cached byte.
    #[inline]
    pub(super) fn hit(&self, va: u64, write: bool, user: bool) -> Option<*mut u8> {
        let tlb = &self.tlb[user as usize];
        let i = Tlb::index(va);
        let tag = if write { tlb.write[i] } else { tlb.read[i] };
        (tag == va & !(PAGE_SIZE - 1)).then(|| va.wrapping_add(tlb.addend[i]) as *mut u8)
    }
    /// Host address minus virtual address of a cached page.
    pub(super) fn addend(&self, va: u64, user: bool) -> u64 {
        self.tlb[user as usize].addend[Tlb::index(va)]
    }

    /// Lets jumps to `rip` find `code`.
    pub(super) fn publish(&mut self, rip: u64, code: u64, user: bool) {
        let i = rip as usize & (JUMP_ENTRIES - 1);
        let (fills, list) = (&mut self.jump_fills[half(rip)], &mut self.jump_list[half(rip)]);
        let n = (*fills as usize).min(JUMP_ENTRIES - 1);
        list[n] = (i | (user as usize) << 14) as u16;
        *fills = (n + 1) as u64;
        self.jumps[user as usize][i] = Jump { rip, code };
    }
    /// Forgets the jump to `rip`.
    pub(super) fn forget_jump(&mut self, rip: u64, user: bool) {
        let i = rip as usize & (JUMP_ENTRIES - 1);
        let jump = &mut self.jumps[user as usize][i];
        if jump.rip == rip {
            *jump = Jump::empty(i);
        }
    }
    /// Forgets the jumps to addresses of one half.
    pub(super) fn wipe_jumps(&mut self, which: usize) {
        let fills = std::mem::take(&mut self.jump_fills[which]) as usize;
        if fills < JUMP_ENTRIES {
            for k in 0..fills {
                let at = self.jump_list[which][k] as usize;
                let i = at & (JUMP_ENTRIES - 1);
                let jump = &mut self.jumps[at >> 14 & 1][i];
                if half(jump.rip) == which {
                    *jump = Jump::empty(i);
                }
            }
            return;
        }
        for jumps in &mut self.jumps {
            for (i, jump) in jumps.iter_mut().enumerate() {
                // Zero is what fresh memory holds.
                if half(jump.rip) == which || jump.code == 0 {
                    *jump = Jump::empty(i);
                }
            }
        }
    }
}

const _: () = assert!(size_of::<Tlb>() == 3 * 8 * TLB_ENTRIES);
