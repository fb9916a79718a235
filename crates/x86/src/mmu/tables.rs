//! Which pages of RAM serve as page tables for cached translations, and what a store to one of them makes wrong.
//!
//! **In:** walks whose results are cached, stores to pages that carry [`PageFlags::TABLE`]. **Out:** what depended on the old contents is
//! forgotten, in every element that depends on it, before the next instruction.
//!
//! A page's *note* says at which level and for which addresses it is used, and by whom: one element, what all share, or several. Taking a
//! table out of the tree (its entry in the table above changes) forgets what was cached through it, and the page is an ordinary one
//! again: kernels use their table pages for other things later.
//!
//! **Invariant:** every table that something cached was walked through has a note, and exactly those pages with one carry `TABLE`. An entry
//! that is not present or was never accessed has nothing cached through it, so filling in fresh entries costs nothing.
use super::Mmu;
use super::groups::LARGE_SHIFT;
use crate::PageFlags;

/// Whose translations a table serves, beside the numbers of elements.
const SHARED: u64 = 0xfe;
const MANY: u64 = 0xff;

/// Present and accessed.
const USED: u64 = 0x21;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What is known of a page that serves as a page table: bit 0 set, bits 1 and 2 level (0 = leaf tables), bit 3 set if it is used at several places
/// or levels, bits 8..=15 who uses it, from bit 21 on the virtual address of its first entry (48 bits). Zero: no table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Note(u64);

impl Note {
    const SEVERAL: u64 = 8;
    fn new(level: u32, va: u64, who: u64) -> Self {
        let span = 12 + 9 * (level + 1);
        let va = (va & ((1 << 48) - 1)) >> span << span;
        Self(1 | (level as u64) << 1 | who << 8 | va)
    }
    /// A table of another kind than long mode's: whatever changes in it, everything is forgotten.
    const LEGACY: Self = Self(1 | Self::SEVERAL | MANY << 8);
    fn level(self) -> u32 {
        (self.0 >> 1) as u32 & 3
    }
    fn who(self) -> u64 {
        self.0 >> 8 & 0xff
    }
    fn several(self) -> bool {
        self.0 & Self::SEVERAL != 0
    }
    /// Same level and addresses.
    fn same_place(self, other: Self) -> bool {
        (self.0 ^ other.0) & !(0xff << 8) == 0
    }
    /// Virtual address that entry `index` maps from on.
    fn va_of(self, index: usize) -> u64 {
        let va = self.0 >> LARGE_SHIFT << LARGE_SHIFT | (index as u64) << (12 + 9 * self.level());
        ((va as i64) << 16 >> 16) as u64
    }
}

/// The notes of all pages.
pub(super) struct Tables {
    notes: Vec<Note>,
    /// Noted pages that belong to no single element, some of them not any more.
    common: Vec<u32>,
}

impl Tables {
    pub(super) fn new(pages: usize) -> Self {
        Self { notes: vec![Note(0); pages], common: Vec::new() }
    }
}

impl Mmu {
    /// Remembers that a cached translation of `va` depends on the tables at `entries`. Must be called by whoever caches one.
    pub(super) fn note_tables(&mut self, entries: &[u64; 4], va: u64) {
        let upper = va >> 63 != 0;
        for (depth, &entry) in entries.iter().enumerate() {
            if entry == 0 {
                break;
            }
            let who = if upper && depth > 0 { SHARED } else { self.groups.current() as u64 };
            self.note_table(entry, Note::new(3 - depth as u32, va, who));
        }
        if upper && entries[0] != 0 {
            let index = (entries[0] >> 3) as usize & 511;
            // SAFETY: a word of mapped RAM.
            if let Some(value) = self.ram.word(entries[0]).map(|w| unsafe { w.read() }) {
                self.groups.note_upper_root(index, value);
            }
        }
    }

    /// The same for tables of another kind than long mode's.
    pub(super) fn note_legacy_tables(&mut self, entries: &[u64; 4]) {
        for &entry in entries.iter().filter(|&&e| e != 0) {
            self.note_table(entry, Note::LEGACY);
        }
    }

    #[inline]
    fn note_table(&mut self, gpa: u64, note: Note) {
        let Some((page, _)) = self.ram.page(gpa) else { return };
        let known = self.tables.notes[page];
        if known == note {
            return;
        }
        let new = if known == Note(0) {
            self.ram.flags().set(page, PageFlags::TABLE);
            self.forbid_writes(page);
            note
        } else {
            let several = if known.same_place(note) && !known.several() { 0 } else { Note::SEVERAL };
            let who = if known.who() == note.who() { known.who() } else { MANY };
            Note(known.0 & !(0xff << 8) | several | who << 8)
        };
        if new == known {
            return;
        }
        self.tables.notes[page] = new;
        let notes = &self.tables.notes;
        let list = match new.who() {
            SHARED | MANY => &mut self.tables.common,
            element => self.groups.tables(element as usize),
        };
        if list.len() == list.capacity() {
            // Before it grows: what is listed twice, or not a table any more.
            list.sort_unstable();
            list.dedup();
            list.retain(|&p| notes[p as usize] != Note(0));
        }
        list.push(page as u32);
    }

    fn unmark(&mut self, page: usize) {
        self.tables.notes[page] = Note(0);
        self.ram.flags().clear(page, PageFlags::TABLE);
    }

    /// No page is a table any more: nothing is cached.
    pub(super) fn forget_tables(&mut self) {
        for element in 0..self.groups.len() {
            for page in std::mem::take(self.groups.tables(element)) {
                self.unmark(page as usize);
            }
        }
        for page in std::mem::take(&mut self.tables.common) {
            self.unmark(page as usize);
        }
    }

    /// Empties an element; what served it alone is no table any more.
    pub(super) fn reset_element(&mut self, element: usize) {
        for page in std::mem::take(self.groups.tables(element)) {
            if self.tables.notes[page as usize].who() == element as u64 {
                self.unmark(page as usize);
            }
        }
        self.groups.reset(element);
    }

    /// CR3 is `cr3` from now on.
    pub fn switch(&mut self, cr3: u64) {
        let root = cr3 & ADDRESS;
        let (element, known) = self.groups.choose(root);
        let hit = known && self.groups.keeps();
        if !known || !hit {
            self.reset_element(element);
        } else if element == self.groups.current() {
            return;
        }
        self.groups.make_current(element, root, hit);
        if !self.groups.shares() {
            return;
        }
        if self.groups.fits(root, &self.ram) {
            // From here on a change of its upper half has to be seen.
            self.note_table(root, Note::new(3, 0, element as u64));
        } else {
            self.groups.stats.unshared += 1;
            self.groups.clear_shared();
            self.pending.refetch = true;
        }
    }

    /// A device wrote to a page that serves as a table.
    pub(super) fn table_page_changed(&mut self, page: usize) {
        let note = self.tables.notes[page];
        let element = note.who() as usize;
        if note.several() || note.who() >= SHARED || element == self.groups.current() {
            self.flush_all();
        } else {
            self.reset_element(element);
        }
    }

    /// Entry `index` of a table changed, which was `was`.
    pub(super) fn table_entry_changed(&mut self, page: usize, index: usize, was: u64) {
        // Only a present entry whose A bit is set can be cached. Setting D, and giving more permission to a page, changes
        // nothing that is cached either, but those are rare and forgotten all the same.
        let used = |entry: u64| entry & USED == USED;
        let note = self.tables.notes[page];
        if note == Note(0) {
            return;
        }
        if note.several() {
            // Perhaps it is two entries of four bytes.
            if used(was) || used(was >> 32) {
                self.flush_all();
            }
            return;
        }
        if !used(was) {
            return;
        }
        let level = note.level();
        if level == 3 && index >= 256 {
            return self.upper_root_changed(note);
        }
        self.entry_gone(was, level, note.va_of(index), note.who());
    }

    fn upper_root_changed(&mut self, note: Note) {
        match note.who() as usize {
            // Roots that are away are compared when they come back; one whose page is used for other things never does.
            element if (element as u64) < SHARED && element != self.groups.current() => self.reset_element(element),
            _ => {
                self.groups.clear_shared();
                self.pending.refetch = true;
            }
        }
    }

    /// What was cached through table entry `was`, which maps `va` at `level`, is forgotten.
    fn entry_gone(&mut self, was: u64, level: u32, va: u64, who: u64) {
        if level == 0 || level < 3 && was & 1 << 7 != 0 {
            self.stats.page_flushes += 1;
            let element = (who < SHARED).then_some(who as usize);
            self.pending.refetch |= self.groups.forget(element, va, 12 + 9 * level);
            return;
        }
        let Some((child, host)) = self.ram.page(was & ADDRESS) else { return };
        let note = self.tables.notes[child];
        // Without a note, or with one of another place, nothing was cached through it here.
        if note == Note(0) {
            return;
        }
        if note.several() {
            return self.flush_all();
        }
        if !note.same_place(Note::new(level - 1, va, 0)) || note.who() != who && note.who() != MANY && who != MANY {
            return;
        }
        for index in 0..512 {
            // SAFETY: a word of a page of RAM.
            let entry = unsafe { host.cast::<u64>().add(index).read() };
            if entry & USED == USED {
                self.entry_gone(entry, level - 1, note.va_of(index), note.who());
            }
        }
        // A flush of everything on the way has done this already.
        if note.who() != MANY && self.tables.notes[child] != Note(0) {
            self.unmark(child);
        }
    }
}
