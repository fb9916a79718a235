//! Cache groups (system S5): what is cached of each address space, kept while another one is current.
//!
//! A *group* is a number of *elements*, one an address space (found by the root of its page tables), and what they share. An element holds
//! a second-level TLB and a table of jumps into user code, all of the lower half of the address space. What all share is a
//! second-level TLB of the upper half. A switch makes the element of the new root current: what the first level holds of the lower half is
//! cleared (by list), the new element fills it again on demand, in translated code.
//!
//! **In:** finished page walks, blocks that were found, a new CR3; news that entries of page tables changed. **Out:** hits.
//!
//! **Invariant:** an entry of any element, current or not, is what a page walk from its root would give now, without setting an accessed or
//! dirty bit that is not set. Stores to page tables are seen ([`super::tables`]) and taken to every element that depends on them; so
//! nothing is ever out of date, and CR3 writes, INVLPG and INVPCID have nothing to do here.
//! What is shared was walked through root entries that are equal, accessed bits included, in the current root: those that were used are
//! remembered and compared at each switch. The global bit therefore plays no part.
//!
//! The roots decide, not process-context identifiers: two identifiers of one root see the same tables. Replacement is of the least
//! recently used element.
use super::first::{First, JUMP_ENTRIES, Jump, half};
use crate::stats::GroupStats;
use crate::{PAGE_SIZE, PhysMem};

/// What is known of one page (4 KiB or 2 MiB). A tag is the page's address, plus [`USER`] if user permissions were checked; [`NONE`] where
/// that kind of access must walk.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Entry {
    /// Reads may.
    pub read: u64,
    /// Writes may: permission, and the guest's dirty bit is set.
    pub write: u64,
    /// Fetches may.
    pub exec: u64,
    /// Host address minus virtual address.
    pub addend: u64,
    /// Host address of the page's flags ([`crate::PageFlags`]); those of the following pages follow.
    pub flags: u64,
    /// Guest-physical address of the page.
    pub gpa: u64,
    pad: [u64; 2],
}

impl Entry {
    /// Guest-physical address of a byte in it.
    #[inline]
    pub(super) fn gpa_of(&self, va: u64) -> u64 {
        // The tags that count are alike; one of them is there.
        let tag = if self.read != NONE { self.read } else { self.exec };
        self.gpa + (va - (tag & !(PAGE_SIZE - 1)))
    }
}

/// In a tag: user permissions.
pub const USER: u64 = 2;
/// No tag.
pub const NONE: u64 = 1;
/// Bits of a large page.
pub const LARGE_SHIFT: u32 = 21;
/// Entries for small pages in an element, and in what is shared; powers of two.
pub const SMALL: [usize; 2] = [1024, 4096];
/// Entries for large pages.
pub const LARGE: [usize; 2] = [64, 256];
/// Jumps in an element: groups of [`FAR_GROUP`], one a page; powers of two.
pub const FAR_JUMPS: usize = 1 << 15;
/// Jumps to one page that are kept.
pub const FAR_GROUP: usize = 256;
/// By how much a product or an address is shifted so that what is left of its low 12 bits numbers the places of a group, and what is above them the groups.
pub const FAR_SHIFT: u32 = 12 - FAR_GROUP.trailing_zeros();
/// What an address of the lower half is multiplied by to find the place of its jump in its page's group. Odd, so that the low 12 bits of the product
/// are a permutation of those of the address: jumps that lie close together do not meet in one place.
pub const FAR_FACTOR: u32 = 0x9e5;
/// Jumps that are shared, into the upper half; a power of two.
pub const UPPER_JUMPS: usize = 1 << 15;
/// What an address of the upper half is multiplied by to find its jump.
pub const UPPER_FACTOR: u32 = 0x9e37_79b1;
/// Elements at most.
pub const MAX_ELEMENTS: usize = 64;
/// The index of a small page is its number, changed by its number shifted by so much: two pages that compete for a place in the first level, as one of the
/// stack and one of the heap may for as long as a program runs, do not as a rule compete here as well.
pub const FOLD: u32 = 11;
/// What user permissions change in the index of a small page, so that both kinds of access to a page have room.
pub const USER_INDEX: usize = 512;

const EMPTY: Entry = Entry { read: NONE, write: NONE, exec: NONE, addend: 0, flags: 0, gpa: 0, pad: [0; 2] };

/// A walk's result, ready to be cached.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub va: u64,
    pub user: bool,
    pub gpa: u64,
    pub readable: bool,
    pub writable: bool,
    pub executable: bool,
    /// The mapping's size.
    pub shift: u32,
}

/// What kind of access a tag is compared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    Read,
    Write,
    Exec,
}

/// A second-level TLB of one half of the address space.
struct Second {
    half: usize,
    small: Box<[Entry]>,
    large: Box<[Entry]>,
    /// Pages into which jumps may have been published, by the low bits of their numbers.
    published: [u64; 64],
    used: bool,
}

impl Second {
    fn new(half: usize) -> Self {
        Self {
            half,
            small: vec![EMPTY; SMALL[half]].into(),
            large: vec![EMPTY; LARGE[half]].into(),
            published: [0; 64],
            used: false,
        }
    }
    fn clear(&mut self) {
        if std::mem::take(&mut self.used) {
            self.small.fill(EMPTY);
            self.large.fill(EMPTY);
        }
        self.published = [0; 64];
    }
    #[inline]
    fn small_index(&self, va: u64, user: bool) -> usize {
        let i = (va / PAGE_SIZE) as usize;
        let i = i ^ i >> FOLD;
        (if self.half == 0 && user { i ^ USER_INDEX } else { i }) & (SMALL[self.half] - 1)
    }
    #[inline]
    fn large_index(&self, va: u64) -> usize {
        (va >> LARGE_SHIFT) as usize & (LARGE[self.half] - 1)
    }
    #[inline]
    fn find(&self, va: u64, tag: Tag, user: bool) -> Option<&Entry> {
        let bit = if user { USER } else { 0 };
        let of = |e: &Entry| match tag {
            Tag::Read => e.read,
            Tag::Write => e.write,
            Tag::Exec => e.exec,
        };
        let small = &self.small[self.small_index(va, user)];
        if of(small) == va & !(PAGE_SIZE - 1) | bit {
            return Some(small);
        }
        let large = &self.large[self.large_index(va)];
        (of(large) == va >> LARGE_SHIFT << LARGE_SHIFT | bit).then_some(large)
    }
    fn insert(&mut self, found: &Found, ram: &PhysMem) {
        self.used = true;
        let bit = if found.user { USER } else { 0 };
        let large = found.shift >= LARGE_SHIFT;
        let mask = if large { (1 << LARGE_SHIFT) - 1 } else { PAGE_SIZE - 1 };
        let gpa = found.gpa & !mask;
        let Some((page, host)) = ram.page(gpa) else { return };
        // Pages of a large mapping are cached as a whole or, where not all of it is RAM, in the first level only.
        if large && ram.page(gpa + mask).is_none_or(|(last, _)| (last - page) as u64 != mask / PAGE_SIZE) {
            return;
        }
        let tag = found.va & !mask | bit;
        let tag_if = |may| if may { tag } else { NONE };
        let entry = Entry {
            read: tag_if(found.readable),
            write: tag_if(found.writable),
            exec: tag_if(found.executable),
            addend: (host as u64).wrapping_sub(found.va & !mask),
            flags: ram.flags().address(page),
            gpa,
            pad: [0; 2],
        };
        if large {
            let i = self.large_index(found.va);
            self.large[i] = entry;
        } else {
            let i = self.small_index(found.va, found.user);
            self.small[i] = entry;
        }
    }
    /// Forgets one small page.
    #[inline]
    fn drop_page(&mut self, page: u64) {
        for user in [false, true] {
            let i = self.small_index(page, user);
            let e = &mut self.small[i];
            if [e.read, e.write, e.exec].iter().any(|&t| t != NONE && t & !(PAGE_SIZE - 1) == page) {
                *e = EMPTY;
            }
        }
    }
    /// Forgets the large pages in a range.
    fn drop_large(&mut self, va: u64, shift: u32) {
        let inside = |e: &Entry| [e.read, e.write, e.exec].iter().any(|&t| t != NONE && (t ^ va) >> shift == 0);
        if shift == LARGE_SHIFT {
            let i = self.large_index(va);
            if inside(&self.large[i]) {
                self.large[i] = EMPTY;
            }
            return;
        }
        for e in self.large.iter_mut().filter(|e| inside(e)) {
            *e = EMPTY;
        }
    }
    fn note_published(&mut self, va: u64) {
        let page = (va / PAGE_SIZE) as usize & 4095;
        self.published[page / 64] |= 1 << (page % 64);
    }
    #[inline]
    fn may_be_published(&self, va: u64, shift: u32) -> bool {
        if shift > 12 {
            return self.published.iter().any(|&w| w != 0);
        }
        let page = (va / PAGE_SIZE) as usize & 4095;
        self.published[page / 64] >> (page % 64) & 1 != 0
    }
}

/// One address space's caches.
struct Element {
    /// Guest-physical address of the root of its page tables.
    root: Option<u64>,
    stamp: u64,
    second: Second,
    far: Box<[Jump]>,
    /// Page numbers of the tables that were noted for it (or had been).
    tables: Vec<u32>,
}

impl Element {
    fn new() -> Self {
        let far = vec![NOWHERE; FAR_JUMPS].into();
        Self { root: None, stamp: 0, second: Second::new(0), far, tables: Vec::new() }
    }
    fn clear(&mut self) {
        if self.second.may_be_published(0, 63) {
            self.clear_jumps();
        }
        self.second.clear();
    }
    /// Empties the groups of pages into which jumps may have been published.
    fn clear_jumps(&mut self) {
        for (w, &word) in self.second.published.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                let page = w * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                let group = (page * FAR_GROUP) & (FAR_JUMPS - 1);
                self.far[group..group + FAR_GROUP].fill(NOWHERE);
            }
        }
    }
}

/// No jump: an address that is not canonical.
const NOWHERE: Jump = Jump { rip: 1 << 63, code: 0 };

/// The jump to `rip`, whose place is `k`; it may be in the one beside it.
#[inline]
fn find_jump(jumps: &[Jump], k: usize, rip: u64) -> Option<usize> {
    [k, k ^ 1].into_iter().find(|&k| jumps[k].rip == rip)
}
/// Puts a jump into its place. What was there moves to the one beside it.
fn put_jump(jumps: &mut [Jump], k: usize, jump: Jump) {
    let known = find_jump(jumps, k, jump.rip);
    if known.is_none() {
        jumps[k ^ 1] = jumps[k];
    }
    jumps[known.unwrap_or(k)] = jump;
}
fn drop_jump(jumps: &mut [Jump], k: usize, rip: u64) {
    if let Some(k) = find_jump(jumps, k, rip) {
        jumps[k] = NOWHERE;
    }
}

/// Where the jump to `rip` is in an element.
#[inline]
fn far_index(rip: u64) -> usize {
    let place = (rip as u32).wrapping_mul(FAR_FACTOR) as usize >> FAR_SHIFT & (FAR_GROUP - 1);
    ((rip >> FAR_SHIFT) as usize & !(FAR_GROUP - 1) | place) & (FAR_JUMPS - 1)
}

/// Where the jump to `rip` of the upper half is among those that are shared.
#[inline]
fn upper_index(rip: u64) -> usize {
    ((rip as u32).wrapping_mul(UPPER_FACTOR) >> (32 - UPPER_JUMPS.trailing_zeros())) as usize
}

/// A group with its first level.
pub(super) struct Groups {
    first: *mut First,
    elements: Vec<Element>,
    current: usize,
    shared: Second,
    /// Jumps into kernel code of the upper half.
    upper: Box<[Jump]>,
    /// Root entries (index, value) that what is shared was walked through.
    upper_roots: Vec<(usize, u64)>,
    limit: usize,
    clock: u64,
    /// Mappings of the upper half were forgotten that jumps may depend on.
    pub upper_forgotten: bool,
    pub stats: GroupStats,
}

impl Groups {
    /// A group of `limit` elements at most (0: nothing outlives a switch).
    ///
    /// # Safety
    /// `first` must stay valid and be used by nothing but this object and translated code.
    pub(super) unsafe fn new(first: *mut First, limit: usize) -> Self {
        let limit = limit.min(MAX_ELEMENTS);
        let mut groups = Self {
            first,
            elements: vec![Element::new()],
            current: 0,
            shared: Second::new(1),
            upper: vec![NOWHERE; UPPER_JUMPS].into(),
            upper_roots: Vec::new(),
            limit,
            clock: 0,
            upper_forgotten: false,
            stats: GroupStats::default(),
        };
        groups.point();
        groups
    }

    /// The first level.
    #[inline]
    pub(super) fn first(&mut self) -> &mut First {
        // SAFETY: contract of `new`.
        unsafe { &mut *self.first }
    }

    /// Tells translated code where the second level is.
    fn point(&mut self) {
        let e = &mut self.elements[self.current];
        let small = [e.second.small.as_mut_ptr(), self.shared.small.as_mut_ptr()];
        let large = [e.second.large.as_mut_ptr(), self.shared.large.as_mut_ptr()];
        let far = [e.far.as_mut_ptr(), self.upper.as_mut_ptr()];
        let first = self.first();
        (first.small, first.large, first.far) = (small, large, far);
    }

    /// The number of the current element.
    #[inline]
    pub(super) fn current(&self) -> usize {
        self.current
    }
    /// Whether anything is cached of the upper half.
    pub(super) fn shares(&self) -> bool {
        !self.upper_roots.is_empty()
    }
    /// The tables noted for an element.
    pub(super) fn tables(&mut self, element: usize) -> &mut Vec<u32> {
        &mut self.elements[element].tables
    }
    /// How many elements hold an address space.
    pub(super) fn kept(&self) -> usize {
        self.elements.iter().filter(|e| e.root.is_some()).count()
    }
    /// How many elements there are.
    pub(super) fn len(&self) -> usize {
        self.elements.len()
    }

    /// Which element a switch to `root` will use, and whether it holds that address space already. Otherwise the caller has to
    /// [`Groups::reset`] it first.
    pub(super) fn choose(&mut self, root: u64) -> (usize, bool) {
        if let Some(i) = self.elements.iter().position(|e| e.root == Some(root)) {
            return (i, true);
        }
        if let Some(i) = self.elements.iter().position(|e| e.root.is_none()) {
            return (i, false);
        }
        if self.elements.len() < self.limit {
            self.elements.push(Element::new());
            return (self.elements.len() - 1, false);
        }
        let oldest = self.elements.iter().enumerate().min_by_key(|(_, e)| e.stamp).map_or(0, |(i, _)| i);
        self.stats.replaced += 1;
        (oldest, false)
    }
    /// Whether elements outlive a switch.
    pub(super) fn keeps(&self) -> bool {
        self.limit > 0
    }
    /// Makes an element current, as that of `root`.
    pub(super) fn make_current(&mut self, element: usize, root: u64, hit: bool) {
        self.clock += 1;
        self.stats.switches += 1;
        if hit {
            self.stats.hits += 1;
        } else {
            self.stats.misses += 1;
        }
        let e = &mut self.elements[element];
        e.stamp = self.clock;
        e.root = Some(root);
        self.current = element;
        self.stats.saved += self.first().tlb_fills;
        self.first().clear_lower();
        self.first().wipe_jumps(0);
        self.point();
    }
    /// Forgets all an element holds, its root too. The caller takes care of its tables.
    pub(super) fn reset(&mut self, element: usize) {
        let e = &mut self.elements[element];
        e.clear();
        e.root = None;
        if element == self.current {
            self.first().clear_lower();
            self.first().wipe_jumps(0);
        }
    }
    /// Forgets the upper half.
    pub(super) fn clear_shared(&mut self) {
        self.shared.clear();
        self.upper_roots.clear();
        self.first().clear_upper_or_lower(1);
        self.wipe_upper();
    }
    /// Forgets everything. The current element keeps its root.
    pub(super) fn clear(&mut self) {
        for (i, e) in self.elements.iter_mut().enumerate() {
            e.clear();
            e.tables.clear();
            if i != self.current {
                e.root = None;
            }
        }
        self.shared.clear();
        self.upper_roots.clear();
        self.wipe_upper();
        self.first().clear();
    }
    /// Whether what is shared holds for `root` as well; if not the caller forgets it.
    pub(super) fn fits(&self, root: u64, ram: &PhysMem) -> bool {
        self.upper_roots.iter().all(|&(i, value)| {
            // SAFETY: a word of mapped RAM.
            ram.word(root + 8 * i as u64).is_some_and(|w| unsafe { w.read() } == value)
        })
    }
    /// Forgets jumps into the upper half.
    fn wipe_upper(&mut self) {
        self.upper_forgotten = true;
        self.first().wipe_jumps(1);
        self.upper.fill(NOWHERE);
    }
    /// Something of the upper half is cached that was walked through root entry `index`.
    pub(super) fn note_upper_root(&mut self, index: usize, value: u64) {
        if !self.upper_roots.iter().any(|&(i, _)| i == index) {
            self.upper_roots.push((index, value));
        }
    }

    // ---- entries ----

    #[inline]
    fn second(&self, va: u64) -> &Second {
        if half(va) == 0 { &self.elements[self.current].second } else { &self.shared }
    }
    /// The entry by which an access is allowed without a walk.
    #[inline]
    pub(super) fn find(&self, va: u64, tag: Tag, user: bool) -> Option<&Entry> {
        self.second(va).find(va, tag, user)
    }
    /// Caches a walk in the second level.
    pub(super) fn insert(&mut self, found: &Found, ram: &PhysMem) {
        let second = if half(found.va) == 0 { &mut self.elements[self.current].second } else { &mut self.shared };
        second.insert(found, ram);
    }

    /// Forgets the mapping of `1 << shift` bytes at `va` in one element (`None`: in all; the upper half has but one). `leaf` says
    /// what the entry that changed mapped. True if jumps into it were forgotten that code running now may rely on.
    pub(super) fn forget(&mut self, element: Option<usize>, va: u64, shift: u32) -> bool {
        let small = shift == 12;
        let va = va >> shift << shift;
        // SAFETY: contract of `new`; the first level is no part of the elements.
        let first = unsafe { &mut *self.first };
        let drop_first = |first: &mut First| if small { first.drop_page(va) } else { first.drop_range(va, shift) };
        if half(va) == 1 {
            if small {
                self.shared.drop_page(va)
            } else {
                self.shared.drop_large(va, shift)
            }
            drop_first(first);
            let published = self.shared.may_be_published(va, shift);
            if published {
                self.wipe_upper();
            }
            return published;
        }
        let mut refetch = false;
        let (from, to) = element.map_or((0, self.elements.len()), |e| (e, e + 1));
        for i in from..to {
            let e = &mut self.elements[i];
            if small {
                e.second.drop_page(va)
            } else {
                e.second.drop_large(va, shift)
            }
            let published = e.second.may_be_published(va, shift);
            if published && small {
                let group = far_index(va & !(PAGE_SIZE - 1)) & !(FAR_GROUP - 1);
                for k in group..group + FAR_GROUP {
                    if e.far[k].rip & !(PAGE_SIZE - 1) == va {
                        e.far[k] = NOWHERE;
                    }
                }
            } else if published {
                e.clear_jumps();
            }
            if i == self.current {
                drop_first(first);
                if published {
                    first.wipe_jumps(0);
                    refetch = true;
                }
            }
        }
        refetch
    }

    // ---- jumps ----

    /// Lets jumps to `rip` find `code`, until the mapping of its page, or of `second_page`, changes.
    pub(super) fn publish(&mut self, rip: u64, code: u64, user: bool, second_page: Option<u64>) {
        self.first().publish(rip, code, user);
        for va in [Some(rip), second_page].into_iter().flatten() {
            // Pages of one half are forgotten with the jumps of that half only.
            if half(va) == 0 {
                self.elements[self.current].second.note_published(va);
            } else {
                self.shared.note_published(va);
            }
        }
        if !user && half(rip) == 1 {
            put_jump(&mut self.upper, upper_index(rip), Jump { rip, code });
        }
        // A block across pages would have to be found by its second page, too.
        if user && half(rip) == 0 && second_page.is_none() {
            put_jump(&mut self.elements[self.current].far, far_index(rip), Jump { rip, code });
        }
    }
    /// What jumps to `rip` find.
    pub(super) fn published(&mut self, rip: u64, user: bool) -> Option<u64> {
        let near = self.first().jumps[user as usize][rip as usize & (JUMP_ENTRIES - 1)];
        if near.rip == rip {
            return Some(near.code);
        }
        let (jumps, k) = match (user, half(rip)) {
            (true, 0) => (&self.elements[self.current].far, far_index(rip)),
            (false, 1) => (&self.upper, upper_index(rip)),
            _ => return None,
        };
        let code = jumps[find_jump(jumps, k, rip)?].code;
        self.first().publish(rip, code, user);
        Some(code)
    }
    /// A block is gone.
    pub(super) fn forget_jump(&mut self, rip: u64, user: bool) {
        self.first().forget_jump(rip, user);
        if !user {
            return drop_jump(&mut self.upper, upper_index(rip), rip);
        }
        for e in &mut self.elements {
            drop_jump(&mut e.far, far_index(rip), rip);
        }
    }
    /// All blocks are gone.
    pub(super) fn forget_jumps(&mut self) {
        self.first().wipe_jumps(0);
        self.wipe_upper();
        for e in &mut self.elements {
            e.clear_jumps();
        }
    }
}
