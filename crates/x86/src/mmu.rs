//! The software MMU: 4-level paging (SDM vol. 3 section 4.5), what is cached of it, and what makes that invisible. Paging outside long mode is
//! in [`legacy`].
//!
//! **In:** virtual addresses. **Out:** host addresses of RAM bytes, or the exception the guest gets.
//!
//! **Invariant:** nothing the guest can see depends on what is cached. Pages used as page tables carry
//! [`PageFlags::TABLE`] and never have a write entry in the first level, so every change of an entry comes through [`Mmu::write`] (or a
//! device), which drops what was derived from it. An entry that was never accessed (A clear) was never cached, so the common "fill in a fresh
//! entry" costs nothing. Write entries exist only for pages whose D bit is set in the guest's tables.
//!
//! One submodule per idea: [`first`] (what translated code reads), [`groups`] (what is kept of each address space), [`tables`] (which
//! pages are page tables, and what a store to one means), [`access`] (reads and writes with all of it).
mod access;
pub(crate) mod first;
pub(crate) mod groups;
mod legacy;
mod tables;

pub(crate) use access::Place;

use crate::sites::Sites;
use crate::state::{cr0, cr4, efer, rflags};
use crate::stats::{GroupStats, MmuStats};
use crate::{CpuState, Exception, PAGE_SIZE, PageFlags, PhysMem};
use first::First;
use groups::{Found, Groups, Tag};
use tables::Tables;

/// Physical address bits of every CPU model.
pub const PHYSICAL_BITS: u32 = 40;

/// What kind of access a translation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write (or read-modify-write).
    Write,
    /// Instruction fetch.
    Execute,
}

/// A finished page walk.
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    /// Guest-physical address of the byte.
    pub gpa: u64,
    /// The page may be written through this translation now (permission and D bit).
    pub writable: bool,
    /// Code may be fetched from the page.
    executable: bool,
    /// Bits of the page's size.
    shift: u32,
    /// Guest-physical addresses of the table entries used, from the root; 0 where unused.
    entries: [u64; 4],
    /// Through tables of another kind than long mode's.
    legacy: bool,
}

/// What stores did that the engine has to act on before the next instruction.
#[derive(Debug, Default)]
pub struct Pending {
    /// Stores to pages that hold translated code: page number, first and last byte offset.
    pub code: Vec<(usize, u16, u16)>,
    /// The mapping of code was forgotten that may be running: it has to be found again.
    pub refetch: bool,
}

impl Pending {
    /// Whether there is anything to do.
    pub fn any(&self) -> bool {
        self.refetch || !self.code.is_empty()
    }
}

/// The software MMU.
pub struct Mmu {
    ram: PhysMem,
    groups: Groups,
    tables: Tables,
    /// What the engine must still do.
    pub pending: Pending,
    /// Counters for people.
    pub stats: MmuStats,
}

/// A fixed, fast hasher: the standard one is seeded at random, and nothing here may depend on the host.
mod foldhash_free {
    #[derive(Default, Clone, Copy)]
    pub struct Build;
    impl std::hash::BuildHasher for Build {
        type Hasher = Fold;
        fn build_hasher(&self) -> Fold {
            Fold(0)
        }
    }
    pub struct Fold(u64);
    impl std::hash::Hasher for Fold {
        fn finish(&self) -> u64 {
            self.0
        }
        fn write(&mut self, bytes: &[u8]) {
            for &b in bytes {
                self.write_u64(b as u64);
            }
        }
        fn write_u64(&mut self, v: u64) {
            let p = ((self.0 ^ v) as u128).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
            self.0 = (p as u64) ^ ((p >> 64) as u64);
        }
        fn write_u32(&mut self, v: u32) {
            self.write_u64(v as u64);
        }
        fn write_u8(&mut self, v: u8) {
            self.write_u64(v as u64);
        }
        fn write_usize(&mut self, v: usize) {
            self.write_u64(v as u64);
        }
    }
}
pub(crate) use foldhash_free::Build as FixedHasher;

/// Whether a linear address is canonical for 48-bit linear addresses.
#[inline]
pub fn canonical(va: u64) -> bool {
    ((va as i64) << 16 >> 16) as u64 == va
}

impl Mmu {
    /// A new MMU over `ram` with its first level at `first`, whose cache group has `elements` elements at most (0: nothing outlives a
    /// CR3 write).
    ///
    /// # Safety
    /// `first` must stay valid and be used by nothing but this object and the translated code of its engine.
    pub(crate) unsafe fn new(ram: PhysMem, first: *mut First, elements: usize) -> Self {
        let tables = Tables::new(ram.flags().pages());
        // SAFETY: contract of this function.
        let groups = unsafe { Groups::new(first, elements) };
        let mut mmu = Self { ram, groups, tables, pending: Pending::default(), stats: MmuStats::default() };
        mmu.flush_all();
        mmu
    }

    /// Guest RAM.
    pub fn ram(&self) -> &PhysMem {
        &self.ram
    }
    /// Counters of the cache groups, and how many address spaces they keep.
    pub fn group_counters(&self) -> (GroupStats, usize) {
        (self.groups.stats, self.groups.kept())
    }

    // ---- what is forgotten: whoever caches translations elsewhere has to hook in here and in `switch` ----

    /// Forgets every translation in every element.
    pub fn flush_all(&mut self) {
        self.stats.flushes += 1;
        self.groups.clear();
        self.forget_tables();
        self.pending.refetch = true;
    }

    /// Forgets the translations of one virtual page in the current address space (INVLPG). Nothing would be wrong without: see [`groups`].
    pub fn flush_page(&mut self, va: u64) {
        self.stats.page_flushes += 1;
        let current = self.groups.current();
        self.pending.refetch |= self.groups.forget(Some(current), va, 12);
    }

    /// Takes away write entries of one physical page (it now holds code or a page table).
    pub(crate) fn forbid_writes(&mut self, page: usize) {
        if self.ram.flags().get(page) & PageFlags::WRITE_CACHED == 0 {
            return;
        }
        self.ram.flags().clear(page, PageFlags::WRITE_CACHED);
        let (_, host) = self.ram.page(self.ram.gpa_of_page(page)).expect("existing page");
        self.groups.first().forbid_writes(host as u64);
    }

    /// Takes away all write entries, so that the next store to each page marks it dirty again.
    pub fn forbid_all_writes(&mut self) {
        self.groups.first().forbid_all_writes();
    }

    // ---- jumps ----

    /// Lets jumps to `rip` find `code`, until the mapping of its page, or of `second_page`, changes.
    pub(crate) fn publish(&mut self, rip: u64, code: u64, user: bool, second_page: Option<u64>) {
        self.groups.publish(rip, code, user, second_page);
    }
    /// What jumps to `rip` find.
    pub(crate) fn published(&mut self, rip: u64, user: bool) -> Option<u64> {
        self.groups.published(rip, user)
    }
    /// Whether mappings of the upper half were forgotten since this was asked last, on which jumps between its pages depend.
    #[inline]
    pub(crate) fn take_upper_forgotten(&mut self) -> bool {
        std::mem::take(&mut self.groups.upper_forgotten)
    }
    /// The block at `rip` is gone.
    pub(crate) fn forget_jump(&mut self, rip: u64, user: bool) {
        self.groups.forget_jump(rip, user);
    }
    /// All blocks are gone, or are no longer what jumps should find.
    pub(crate) fn forget_jumps(&mut self) {
        self.groups.forget_jumps();
    }

    /// All code is gone.
    pub(crate) fn forget_code(&mut self) {
        self.groups.forget_jumps();
        self.groups.first().sites.reset();
    }
    /// A site for the page of `va`, which is cached, can be noted afterwards.
    pub(crate) fn make_room_for_site(&mut self, va: u64, user: bool) {
        let page = va & !(PAGE_SIZE - 1);
        let host = page.wrapping_add(self.addend(va, user));
        self.groups.first().sites.make_room(page, host);
    }
    /// The sites of translated code.
    pub(crate) fn sites(&mut self) -> &mut Sites {
        &mut self.groups.first().sites
    }

    // ---- walks ----

    /// Walks the page tables for one access, checks permissions, and sets A and D as the access does.
    /// On failure nothing is changed.
    pub fn walk(&mut self, st: &CpuState, va: u64, access: Access, user: bool) -> Result<Walk, Exception> {
        self.stats.walks += 1;
        if !canonical(va) {
            return Err(Exception::gp(0));
        }
        if st.cr0 & cr0::PG == 0 {
            return Ok(Walk { gpa: va, writable: true, executable: true, shift: 12, entries: [0; 4], legacy: false });
        }
        if st.efer & efer::LMA == 0 {
            return self.walk_legacy(st, va, access, user);
        }
        let nxe = st.efer & efer::NXE != 0;
        let write = access == Access::Write;
        let mut code = (write as u32) << 1 | (user as u32) << 2;
        if access == Access::Execute && (nxe || st.cr4 & cr4::SMEP != 0) {
            code |= 1 << 4;
        }
        let reserved_high = !((1u64 << PHYSICAL_BITS) - 1) & 0x000f_ffff_ffff_f000 | if nxe { 0 } else { 1 << 63 };
        let mut table = st.cr3 & 0x000f_ffff_ffff_f000;
        let mut words: [*mut u64; 4] = [std::ptr::null_mut(); 4];
        let mut entries = [0; 4];
        let (mut writable, mut user_ok, mut no_exec) = (true, true, false);
        let mut depth = 0;
        let leaf = loop {
            let level = 3 - depth;
            let gpa = table + ((va >> (12 + 9 * level)) & 511) * 8;
            // A table outside RAM reads as all ones, which has reserved bits set.
            let entry = match self.ram.word(gpa) {
                Some(word) => {
                    words[depth] = word;
                    // SAFETY: a word of mapped RAM.
                    unsafe { word.read() }
                }
                None => u64::MAX,
            };
            entries[depth] = gpa;
            if entry & 1 == 0 {
                return Err(Exception::pf(code, va));
            }
            let large = entry & (1 << 7) != 0 && (level == 1 || level == 2);
            let mut reserved = reserved_high;
            if level == 3 {
                reserved |= 1 << 7;
            }
            if large {
                reserved |= ((1u64 << (12 + 9 * level)) - 1) & !0x1fff;
            }
            if entry & reserved != 0 {
                return Err(Exception::pf(code | 1 | 1 << 3, va));
            }
            writable &= entry & 2 != 0;
            user_ok &= entry & 4 != 0;
            no_exec |= nxe && entry >> 63 != 0;
            if large || level == 0 {
                break entry;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            depth += 1;
        };
        let level = 3 - depth;
        let denied = user && !user_ok
            || write && !writable && (user || st.cr0 & cr0::WP != 0)
            || access == Access::Execute && (no_exec || !user && user_ok && st.cr4 & cr4::SMEP != 0)
            || access != Access::Execute && !user && user_ok && st.cr4 & cr4::SMAP != 0 && st.rflags & rflags::AC == 0;
        if denied {
            return Err(Exception::pf(code | 1, va));
        }
        for d in 0..=depth {
            let bits = if d == depth && write { 0x60 } else { 0x20 };
            // SAFETY: words of mapped RAM, found above.
            unsafe {
                let old = words[d].read();
                if old & bits != bits {
                    words[d].write(old | bits);
                    let (page, _) = self.ram.page(entries[d]).expect("found above");
                    let flags = self.ram.flags();
                    flags.set(page, PageFlags::DIRTY);
                    if flags.get(page) & PageFlags::CODE != 0 {
                        let at = (entries[d] & 0xff8) as u16;
                        self.pending.code.push((page, at, at + 7));
                    }
                }
            }
        }
        let offset_mask = (1u64 << (12 + 9 * level)) - 1;
        let gpa = (leaf & 0x000f_ffff_ffff_f000 & !offset_mask) | (va & offset_mask);
        let may_write = writable || !user && st.cr0 & cr0::WP == 0;
        let dirty = write || leaf & 0x40 != 0;
        let executable = !no_exec && (!user || user_ok) && (user || !user_ok || st.cr4 & cr4::SMEP == 0);
        Ok(Walk { gpa, writable: may_write && dirty, executable, shift: 12 + 9 * level as u32, entries, legacy: false })
    }

    /// Walks and caches in the second level, if the page is RAM.
    fn walk_and_cache(&mut self, st: &CpuState, va: u64, access: Access, user: bool) -> Result<u64, Exception> {
        let walk = self.walk(st, va, access, user)?;
        if self.ram.page(walk.gpa).is_some() {
            self.stats.fills += 1;
            if walk.legacy {
                self.note_legacy_tables(&walk.entries);
            } else {
                self.note_tables(&walk.entries, va);
            }
            // A fetch says nothing of reads where supervisors may not touch user pages (not offered yet).
            let readable = access != Access::Execute || st.cr4 & cr4::SMAP == 0;
            let (executable, writable) = (walk.executable, walk.writable);
            let found = Found { va, user, gpa: walk.gpa, readable, writable, executable, shift: walk.shift };
            self.groups.insert(&found, &self.ram);
        }
        Ok(walk.gpa)
    }

    /// The guest-physical address code is fetched from, walked if need be; cached, if it is RAM.
    pub(crate) fn fetch(&mut self, st: &CpuState, va: u64, user: bool) -> Result<u64, Exception> {
        if let Some(e) = self.groups.find(va, Tag::Exec, user) {
            return Ok(e.gpa_of(va));
        }
        self.walk_and_cache(st, va, Access::Execute, user)
    }

    /// Makes the next access of this kind to this page hit, if it is RAM, and says where it is.
    /// No write entry is made for pages whose stores must be seen ([`PageFlags::CODE`], [`PageFlags::TABLE`]).
    pub(crate) fn fill(&mut self, st: &CpuState, va: u64, access: Access, user: bool) -> Result<u64, Exception> {
        let write = access == Access::Write;
        let tag = if write { Tag::Write } else { Tag::Read };
        let known = self.groups.find(va, tag, user).map(|e| e.gpa_of(va));
        self.stats.misses += 1;
        self.stats.second_hits += u64::from(known.is_some());
        let gpa = match known {
            Some(gpa) => gpa,
            None => self.walk_and_cache(st, va, access, user)?,
        };
        let Some((page, host)) = self.ram.page(gpa) else { return Ok(gpa) };
        let flags = self.ram.flags();
        let plain = flags.get(page) & (PageFlags::CODE | PageFlags::TABLE) == 0;
        if write && plain {
            // Reads make no write entry, or everything ever read would count as dirty.
            flags.set(page, PageFlags::DIRTY | PageFlags::WRITE_CACHED);
        }
        let addend = (host as u64).wrapping_sub(va & !(PAGE_SIZE - 1));
        self.groups.first().fill(va, user, addend, write && plain);
        Ok(gpa)
    }

    /// Makes the next access of this kind to this page hit, if that takes no walk and changes nothing that anybody can see. Says whether it does.
    pub(crate) fn fill_known(&mut self, va: u64, write: bool, user: bool) -> bool {
        if self.is_cached(va, write, user) {
            return true;
        }
        let tag = if write { Tag::Write } else { Tag::Read };
        let Some(gpa) = self.groups.find(va, tag, user).map(|e| e.gpa_of(va)) else { return false };
        let Some((page, host)) = self.ram.page(gpa) else { return false };
        let flags = self.ram.flags();
        if write {
            // A page not yet known to be dirty waits for a real store.
            if flags.get(page) & (PageFlags::CODE | PageFlags::TABLE | PageFlags::DIRTY) != PageFlags::DIRTY {
                return false;
            }
            flags.set(page, PageFlags::WRITE_CACHED);
        }
        let addend = (host as u64).wrapping_sub(va & !(PAGE_SIZE - 1));
        self.groups.first().fill(va, user, addend, write);
        true
    }

    /// Whether an access to the page of `va` would hit now.
    pub(crate) fn is_cached(&mut self, va: u64, write: bool, user: bool) -> bool {
        self.hit(va, write, user).is_some()
    }
    /// Host address minus virtual address of a cached page.
    pub(crate) fn addend(&mut self, va: u64, user: bool) -> u64 {
        self.groups.first().addend(va, user)
    }
    #[inline]
    fn hit(&mut self, va: u64, write: bool, user: bool) -> Option<*mut u8> {
        self.groups.first().hit(va, write, user)
    }

    /// Acts upon what devices wrote to pages that things were derived from.
    pub(crate) fn sweep_device_writes(&mut self) {
        if !self.ram.flags().any_stale() {
            return;
        }
        let flags = self.ram.flags().clone();
        for page in flags.take_stale() {
            if flags.get(page) & PageFlags::TABLE != 0 {
                self.table_page_changed(page);
            }
            if flags.get(page) & PageFlags::CODE != 0 {
                self.pending.code.push((page, 0, PAGE_SIZE as u16 - 1));
            }
        }
    }
}
