//! The software MMU: 4-level paging (SDM vol. 3 section 4.5), the soft TLB, and what makes the TLB invisible.
//!
//! **In:** virtual addresses. **Out:** host addresses of RAM bytes, or the exception the guest gets.
//!
//! **Invariant:** nothing the guest can see depends on what the TLB holds. Pages used as page tables carry
//! [`PageFlags::TABLE`] and never have a write entry, so every change of an entry comes through [`Mmu::write`] (or a device), which
//! drops what was derived from it. An entry that was never accessed (A clear) was never cached, so the common "fill in a fresh
//! entry" costs nothing. Write entries exist only for pages whose D bit is set in the guest's tables.
use crate::state::{cr0, cr4, efer, rflags};
use crate::{Bus, CpuState, Exception, PAGE_SIZE, PageFlags, PhysMem, Position};

/// Physical address bits of every CPU model.
pub const PHYSICAL_BITS: u32 = 40;

/// Entries in each soft TLB; a power of two.
pub const TLB_ENTRIES: usize = 512;

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
}

/// Which of the two TLBs: they differ in the permission checks that their entries passed.
pub const KERNEL: usize = 0;
/// See [`KERNEL`].
pub const USER: usize = 1;

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
    /// Global page.
    pub global: bool,
    /// Guest-physical addresses of the table entries used, from the root; 0 where unused.
    entries: [u64; 4],
}

/// What stores did that the engine has to act on before the next instruction.
#[derive(Debug, Default)]
pub struct Pending {
    /// Stores to pages that hold translated code: page number, first and last byte offset.
    pub code: Vec<(usize, u16, u16)>,
    /// Fetch translations (jump caches) are out of date: all of them, or those of one virtual page.
    pub flush_fetch: bool,
    /// Fetch translations through pages that are not global are out of date.
    pub flush_fetch_non_global: bool,
    /// See `flush_fetch`.
    pub flush_fetch_pages: Vec<u64>,
}

impl Pending {
    /// Whether there is anything to do.
    pub fn any(&self) -> bool {
        self.flush_fetch || self.flush_fetch_non_global || !self.code.is_empty() || !self.flush_fetch_pages.is_empty()
    }
}

/// Where a page table is used: the level of its entries (0 = leaf tables) and the virtual address of its first entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TableUse {
    page: usize,
    level: u8,
    va: u64,
    /// Used at another place as well: a change flushes everything.
    several: bool,
}

/// The software MMU.
pub struct Mmu {
    ram: PhysMem,
    /// The two TLBs, in memory that translated code can address ([`KERNEL`], [`USER`]). Owned by the engine's low area.
    tlb: *mut [Tlb; 2],
    /// Entries of global pages, a bit each.
    global: [[bool; TLB_ENTRIES]; 2],
    /// Pages that carry `TABLE`, by page number.
    tables: std::collections::HashMap<usize, TableUse, foldhash_free::Build>,
    /// What the engine must still do.
    pub pending: Pending,
    /// Counters for people.
    pub stats: MmuStats,
}

/// Counters for people; no influence on anything.
#[derive(Debug, Default, Clone, Copy)]
#[allow(missing_docs)]
pub struct MmuStats {
    pub walks: u64,
    pub fills: u64,
    pub flushes: u64,
    pub page_flushes: u64,
    pub table_stores: u64,
    pub code_stores: u64,
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
    /// A new MMU over `ram` with its TLBs at `tlb`.
    ///
    /// # Safety
    /// `tlb` must stay valid and be used by nothing but this object and the translated code of its engine.
    pub(crate) unsafe fn new(ram: PhysMem, tlb: *mut [Tlb; 2]) -> Self {
        let mut mmu = Self {
            ram,
            tlb,
            global: [[false; TLB_ENTRIES]; 2],
            tables: Default::default(),
            pending: Pending::default(),
            stats: MmuStats::default(),
        };
        mmu.flush_all();
        mmu
    }

    /// Guest RAM.
    pub fn ram(&self) -> &PhysMem {
        &self.ram
    }

    #[inline]
    fn tlb(&mut self, user: bool) -> &mut Tlb {
        // SAFETY: contract of `new`.
        unsafe { &mut (*self.tlb)[user as usize] }
    }

    /// Forgets every translation, global ones too.
    pub fn flush_all(&mut self) {
        self.stats.flushes += 1;
        for user in [false, true] {
            let tlb = self.tlb(user);
            Tlb::clear(&mut tlb.read);
            Tlb::clear(&mut tlb.write);
        }
        for &page in self.tables.keys() {
            self.ram.flags().clear(page, PageFlags::TABLE);
        }
        self.tables.clear();
        self.pending.flush_fetch = true;
    }

    /// Forgets every translation that is not global (a CR3 write).
    pub fn flush_non_global(&mut self) {
        self.stats.flushes += 1;
        self.pending.flush_fetch_non_global = true;
        for user in [KERNEL, USER] {
            // SAFETY: contract of `new`.
            let tlb = unsafe { &mut (*self.tlb)[user] };
            for i in 0..TLB_ENTRIES {
                if !self.global[user][i] {
                    tlb.read[i] = Tlb::empty(i);
                    tlb.write[i] = Tlb::empty(i);
                }
            }
        }
        // Tables of the lower half are used by nothing that is left, unless the guest marked user pages global.
        let flags = self.ram.flags().clone();
        let mut lower_half_left = false;
        for user in [false, true] {
            let tlb = self.tlb(user);
            lower_half_left |= (0..TLB_ENTRIES).any(|i| !Tlb::is_empty(tlb.read[i], i) && tlb.read[i] >> 63 == 0);
        }
        if !lower_half_left {
            self.tables.retain(|&page, t| {
                let keep = t.several || t.va >> 63 != 0 || t.level == 3;
                if !keep {
                    flags.clear(page, PageFlags::TABLE);
                }
                keep
            });
        }
    }

    /// Forgets the translations of one virtual page (INVLPG, or a changed leaf entry).
    pub fn flush_page(&mut self, va: u64) {
        self.stats.page_flushes += 1;
        let page = va & !(PAGE_SIZE - 1);
        for user in [false, true] {
            let i = Tlb::index(page);
            let tlb = self.tlb(user);
            if tlb.read[i] == page || tlb.write[i] == page {
                tlb.read[i] = Tlb::empty(i);
                tlb.write[i] = Tlb::empty(i);
            }
        }
        self.pending.flush_fetch_pages.push(page);
    }

    /// Takes away write entries of one physical page (it now holds code or a page table).
    pub(crate) fn forbid_writes(&mut self, page: usize) {
        let (_, host) = self.ram.page(self.ram.gpa_of_page(page)).expect("existing page");
        for user in [false, true] {
            let tlb = self.tlb(user);
            for i in 0..TLB_ENTRIES {
                if !Tlb::is_empty(tlb.write[i], i) && tlb.write[i].wrapping_add(tlb.addend[i]) == host as u64 {
                    tlb.write[i] = Tlb::empty(i);
                }
            }
        }
    }

    /// Takes away all write entries, so that the next store to each page marks it dirty again.
    pub fn forbid_all_writes(&mut self) {
        for user in [false, true] {
            Tlb::clear(&mut self.tlb(user).write);
        }
    }

    /// Walks the page tables for one access, checks permissions, and sets A and D as the access does.
    /// On failure nothing is changed.
    pub fn walk(&mut self, st: &CpuState, va: u64, access: Access, user: bool) -> Result<Walk, Exception> {
        self.stats.walks += 1;
        if !canonical(va) {
            return Err(Exception::gp(0));
        }
        if st.cr0 & cr0::PG == 0 {
            return Ok(Walk { gpa: va, writable: true, global: false, entries: [0; 4] });
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
        let global = leaf & (1 << 8) != 0 && st.cr4 & cr4::PGE != 0;
        Ok(Walk { gpa, writable: may_write && dirty, global, entries })
    }

    /// Remembers that a cached translation depends on the tables of `walk`. Must be called by whoever caches one.
    pub(crate) fn note_tables(&mut self, walk: &Walk, va: u64) {
        for (depth, &entry) in walk.entries.iter().enumerate() {
            if entry == 0 {
                break;
            }
            let Some((page, _)) = self.ram.page(entry) else { continue };
            let level = 3 - depth as u8;
            let span = 12 + 9 * (level as u32 + 1);
            let va = if span >= 48 { 0 } else { va >> span << span };
            let fresh = self.ram.flags().get(page) & PageFlags::TABLE == 0;
            let known = self.tables.entry(page).or_insert(TableUse { page, level, va, several: false });
            if known.level != level || known.va != va {
                known.several = true;
            }
            if fresh {
                self.ram.flags().set(page, PageFlags::TABLE);
                self.forbid_writes(page);
            }
        }
    }

    /// Walks and caches: makes the next access of this kind to this page hit, if it is RAM. Returns the walk.
    /// No write entry is made for pages whose stores must be seen ([`PageFlags::CODE`], [`PageFlags::TABLE`]).
    pub(crate) fn fill(&mut self, st: &CpuState, va: u64, access: Access, user: bool) -> Result<Walk, Exception> {
        let walk = self.walk(st, va, access, user)?;
        let Some((page, host)) = self.ram.page(walk.gpa) else { return Ok(walk) };
        self.stats.fills += 1;
        self.note_tables(&walk, va);
        let flags = self.ram.flags();
        let mut write = false;
        if walk.writable && flags.get(page) & (PageFlags::CODE | PageFlags::TABLE) == 0 {
            // A write entry may stand for a page that was only read so far; it counts as dirty from here on.
            // Reads do not make one, or everything ever read would count as dirty.
            write = access == Access::Write;
            if write {
                flags.set(page, PageFlags::DIRTY);
            }
        }
        let tag = va & !(PAGE_SIZE - 1);
        let i = Tlb::index(va);
        let kept_write = self.tlb(user).write[i] == tag && self.tlb(user).read[i] == tag;
        self.global[user as usize][i] = walk.global;
        let tlb = self.tlb(user);
        tlb.read[i] = tag;
        tlb.addend[i] = (host as u64).wrapping_sub(tag);
        if write {
            tlb.write[i] = tag;
        } else if !kept_write {
            tlb.write[i] = Tlb::empty(i);
        }
        Ok(walk)
    }

    /// Whether an access to the page of `va` would hit now.
    pub(crate) fn is_cached(&mut self, va: u64, write: bool, user: bool) -> bool {
        self.hit(va, write, user).is_some()
    }
    /// Host address minus virtual address of a cached page.
    pub(crate) fn addend(&mut self, va: u64, user: bool) -> u64 {
        self.tlb(user).addend[Tlb::index(va)]
    }

    #[inline]
    fn hit(&mut self, va: u64, write: bool, user: bool) -> Option<*mut u8> {
        let tlb = self.tlb(user);
        let i = Tlb::index(va);
        let tag = if write { tlb.write[i] } else { tlb.read[i] };
        (tag == va & !(PAGE_SIZE - 1)).then(|| va.wrapping_add(tlb.addend[i]) as *mut u8)
    }

    /// Reads guest virtual memory; RAM or device. `user` says whose permissions count. On failure `buf` is undefined.
    pub fn read(
        &mut self,
        st: &CpuState,
        bus: &mut dyn Bus,
        position: Position,
        va: u64,
        buf: &mut [u8],
        user: bool,
    ) -> Result<(), Exception> {
        let mut done = 0;
        while done < buf.len() {
            let at = va.wrapping_add(done as u64);
            let n = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(buf.len() - done);
            let piece = &mut buf[done..done + n];
            let host = match self.hit(at, false, user) {
                Some(host) => Some(host),
                None => {
                    let walk = self.fill(st, at, Access::Read, user)?;
                    match self.ram.page(walk.gpa) {
                        // SAFETY: offset inside the page.
                        Some((_, page)) => Some(unsafe { page.add((at % PAGE_SIZE) as usize) }),
                        None => {
                            bus.mmio_read(position, walk.gpa, piece);
                            None
                        }
                    }
                }
            };
            if let Some(host) = host {
                // SAFETY: `n` bytes inside one page of RAM.
                unsafe { std::ptr::copy_nonoverlapping(host, piece.as_mut_ptr(), n) };
            }
            done += n;
        }
        Ok(())
    }

    /// Checks that `len` bytes at `va` can be written, as a write would, without writing (A and D bits are set).
    pub fn probe_write(&mut self, st: &CpuState, va: u64, len: usize, user: bool) -> Result<(), Exception> {
        let mut done = 0;
        while done < len {
            let at = va.wrapping_add(done as u64);
            if self.hit(at, true, user).is_none() {
                self.walk(st, at, Access::Write, user)?;
            }
            done += ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(len - done);
        }
        Ok(())
    }

    /// Writes guest virtual memory; RAM or device. Either all bytes are written or, on failure, none.
    pub fn write(
        &mut self,
        st: &CpuState,
        bus: &mut dyn Bus,
        position: Position,
        va: u64,
        data: &[u8],
        user: bool,
    ) -> Result<(), Exception> {
        if (va % PAGE_SIZE) as usize + data.len() > PAGE_SIZE as usize {
            self.probe_write(st, va, data.len(), user)?;
        }
        let mut done = 0;
        while done < data.len() {
            let at = va.wrapping_add(done as u64);
            let n = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(data.len() - done);
            let piece = &data[done..done + n];
            match self.hit(at, true, user) {
                // SAFETY: `n` bytes inside one page of RAM without special flags.
                Some(host) => unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), host, n) },
                None => {
                    let walk = self.fill(st, at, Access::Write, user)?;
                    if self.ram.page(walk.gpa).is_some() {
                        self.write_ram(walk.gpa, piece);
                    } else {
                        bus.mmio_write(position, walk.gpa, piece);
                    }
                }
            }
            done += n;
        }
        Ok(())
    }

    /// Writes RAM by physical address inside one page, with all the care that code and table pages want.
    ///
    /// # Panics
    /// If there is no RAM at `gpa` or the piece leaves its page.
    pub fn write_ram(&mut self, gpa: u64, data: &[u8]) {
        let (page, host) = self.ram.page(gpa).expect("RAM");
        let offset = (gpa % PAGE_SIZE) as usize;
        assert!(offset + data.len() <= PAGE_SIZE as usize);
        let flags = self.ram.flags().get(page);
        // SAFETY: inside the page.
        let bytes = unsafe { std::slice::from_raw_parts_mut(host.add(offset), data.len()) };
        if flags & PageFlags::DIRTY == 0 {
            self.ram.flags().set(page, PageFlags::DIRTY);
        }
        if flags & PageFlags::CODE != 0 && bytes != data {
            self.stats.code_stores += 1;
            self.pending.code.push((page, offset as u16, (offset + data.len() - 1) as u16));
        }
        if flags & PageFlags::TABLE == 0 {
            bytes.copy_from_slice(data);
            return;
        }
        self.stats.table_stores += 1;
        let first = offset / 8;
        let last = (offset + data.len() - 1) / 8;
        // SAFETY: a page of RAM, as 512 words.
        let words = unsafe { std::slice::from_raw_parts(host.cast::<u64>(), 512) };
        let mut old = [0u64; 512];
        old[first..=last].copy_from_slice(&words[first..=last]);
        // SAFETY: as above; the shared view of the words is not used across this store.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host.add(offset), data.len()) };
        for (i, &was) in old.iter().enumerate().take(last + 1).skip(first) {
            // SAFETY: inside the page.
            let now = unsafe { host.cast::<u64>().add(i).read() };
            // Only a present entry whose A bit is set can be cached. Setting A or D, and giving more permission to a
            // writable-but-clean page, changes nothing that is cached either, but those are rare and flushed all the same.
            if was != now && was & 0x21 == 0x21 {
                self.table_entry_changed(page, i, was);
            }
        }
    }

    fn table_entry_changed(&mut self, page: usize, index: usize, was: u64) {
        let Some(&table) = self.tables.get(&page) else { return };
        let va = table.va | (index as u64) << (12 + 9 * table.level as u32);
        let va = ((va as i64) << 16 >> 16) as u64;
        let large = was & (1 << 7) != 0;
        if table.level == 0 && !table.several {
            self.flush_page(va);
        } else if table.level == 1 && large && !table.several {
            for i in 0..512 {
                self.flush_page(va + i * PAGE_SIZE);
            }
        } else {
            self.flush_all();
        }
    }

    /// Acts upon what devices wrote to pages that things were derived from.
    pub(crate) fn sweep_device_writes(&mut self) {
        if !self.ram.flags().any_stale() {
            return;
        }
        let flags = self.ram.flags().clone();
        let mut tables = false;
        for page in flags.take_stale() {
            tables |= flags.get(page) & PageFlags::TABLE != 0;
            if flags.get(page) & PageFlags::CODE != 0 {
                self.pending.code.push((page, 0, PAGE_SIZE as u16 - 1));
            }
        }
        if tables {
            self.flush_all();
        }
    }
}

/// Where the bytes behind a virtual address are (used by `sys`).
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// RAM that may be accessed at this host address, up to the end of the page.
    Plain(*mut u8),
    /// RAM at this guest-physical address whose stores must go through [`Mmu::write_ram`].
    Special(u64),
    /// Not RAM.
    Device,
}

// Used by `sys`.
impl Mmu {
    /// Translates for reading: the result is good for the rest of the page, until the next call of any method.
    #[inline]
    pub(crate) fn place_for_read(&mut self, st: &CpuState, va: u64, user: bool) -> Result<Place, Exception> {
        if let Some(host) = self.hit(va, false, user) {
            return Ok(Place::Plain(host));
        }
        let walk = self.fill(st, va, Access::Read, user)?;
        Ok(match self.ram.page(walk.gpa) {
            Some((_, page)) => Place::Plain(page.wrapping_add((va % PAGE_SIZE) as usize)),
            None => Place::Device,
        })
    }

    /// Translates for writing: as [`Mmu::place_for_read`], and the page counts as written.
    #[inline]
    pub(crate) fn place_for_write(&mut self, st: &CpuState, va: u64, user: bool) -> Result<Place, Exception> {
        if let Some(host) = self.hit(va, true, user) {
            return Ok(Place::Plain(host));
        }
        let walk = self.fill(st, va, Access::Write, user)?;
        let Some((page, host)) = self.ram.page(walk.gpa) else { return Ok(Place::Device) };
        if self.ram.flags().get(page) & (PageFlags::CODE | PageFlags::TABLE) != 0 {
            return Ok(Place::Special(walk.gpa));
        }
        Ok(Place::Plain(host.wrapping_add((va % PAGE_SIZE) as usize)))
    }
}
