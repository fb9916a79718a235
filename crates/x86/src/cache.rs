//! The code cache: translated blocks, how they are found, linked and dropped.
//!
//! **In:** translations, and news that guest bytes or mappings changed. **Out:** host addresses of blocks.
//!
//! Blocks are keyed by physical *and* virtual address and mode. A jump inside one virtual page is linked directly (whoever executes
//! the page has it mapped), also one between pages of the kernel's half, until anything is forgotten of that; a jump to another page else goes through the jump cache, whose entries die with the mapping.
//! Code that is likely to run and code that is not go to two ends of the arena. When it is full everything is dropped at once.
//!
//! Invariant: what the cache holds is invisible: a block's code does what its bytes say now.
use crate::PageFlags;
use crate::mmu::FixedHasher;
use crate::ram::PAGE_SIZE;
use crate::sites::{Site, Sites};
use crate::stats::CacheStats;
use crate::translate::{Manner, Mode, Owing, Point, Translation};
use iced_x86::Instruction;
use std::collections::{HashMap, HashSet};

/// What a block is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Guest virtual address of its first byte.
    pub rip: u64,
    /// Mode.
    pub mode: Mode,
}

/// One translated block.
pub struct Block {
    /// Key.
    pub key: Key,
    /// Host address of its entry for links, and for Rust.
    pub entry: u32,
    /// Host address of its entry for the jump cache.
    pub published: u32,
    /// Its instructions.
    pub points: Box<[Point]>,
    /// Those that `sys` executes.
    pub sys: Box<[(u16, Instruction)]>,
    /// Guest-physical page address that its (only) instruction reaches into, if it crosses a page.
    pub second: Option<u64>,
    /// Offsets in its page: first byte of guest code, one behind the last.
    guest: (u16, u16),
    /// Host address of its first site, and how many it has.
    sites: (u32, u32),
    /// See [`Translation::takes`].
    takes: Option<(u32, u16)>,
    links: std::ops::Range<u32>,
    incoming: Vec<u32>,
    alive: bool,
    marked: bool,
    samples: u32,
}

/// What was learnt of an instruction's accesses.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    manner: Manner,
    /// How often it was taken back.
    chances: u32,
}

/// Samples of a trace after which it gets its first other chance; each further one takes four times as many.
const CHANCE: u32 = 4;
/// How many it gets.
const CHANCES: u32 = 4;

impl Block {
    /// Number of instructions.
    pub fn len(&self) -> u64 {
        self.points.len() as u64
    }
    /// Guest address of instruction `k`.
    pub fn rip_of(&self, k: usize) -> u64 {
        self.key.rip & !(PAGE_SIZE - 1) | self.points[k].guest as u64
    }
    /// Which instruction the hot code at host address `pc` belongs to.
    pub fn instruction_at(&self, pc: usize) -> usize {
        self.points.partition_point(|p| p.host as usize <= pc).max(1) - 1
    }
}

struct LinkState {
    patch: u32,
    stub: u32,
    target: u64,
    from: u32,
    to: Option<u32>,
    owing: Option<Owing>,
    ungrouped: bool,
}

/// A piece of translated code, for profilers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeNote {
    /// Host address.
    pub start: usize,
    /// Bytes.
    pub len: usize,
    /// Guest address of its first instruction; 0 for a routine that all code shares.
    pub rip: u64,
    /// What kind of code: a routine's name, or "trace", "block", "short", "alone", each with "cold" for its unlikely part.
    pub kind: &'static str,
    /// Of user code.
    pub user: bool,
}

/// The code cache of one engine.
pub struct Cache {
    start: usize,
    next: usize,
    /// Where the code that is unlikely to run begins, and its next free byte.
    middle: usize,
    next_cold: usize,
    end: usize,
    /// What was learnt of accesses, by their instructions' guest-physical addresses.
    marks: HashMap<u64, Mark, FixedHasher>,
    /// Blocks that ran often: they are translated as traces.
    hot: HashSet<Key, FixedHasher>,
    blocks: Vec<Block>,
    /// Where each block begins, once more and close together, to be searched.
    entries: Vec<u32>,
    links: Vec<LinkState>,
    /// Those that were linked to another page.
    far: Vec<u32>,
    by_key: HashMap<Key, u32, FixedHasher>,
    by_page: HashMap<usize, Vec<u32>, FixedHasher>,
    /// Addresses (and whether of user code) of blocks that were dropped: jumps must not find them any more.
    pub dead: Vec<(u64, bool)>,
    /// What was translated since somebody asked last, if anybody wants to know.
    pub notes: Option<Vec<CodeNote>>,
    /// Counters for people.
    pub stats: CacheStats,
}

impl Cache {
    /// A cache whose code goes to `start..end` of the low area.
    ///
    /// # Safety
    /// The area must outlive the cache and be used by nothing else.
    pub unsafe fn new(start: usize, end: usize) -> Self {
        let middle = (start + (end - start) * 2 / 5).next_multiple_of(64);
        Self {
            start,
            next: start,
            middle,
            next_cold: middle,
            end,
            marks: HashMap::default(),
            hot: HashSet::default(),
            blocks: Vec::new(),
            entries: Vec::new(),
            links: Vec::new(),
            far: Vec::new(),
            by_key: HashMap::default(),
            by_page: HashMap::default(),
            dead: Vec::new(),
            notes: None,
            stats: CacheStats::default(),
        }
    }

    /// Where the next block's code goes (hot, cold), its number, and the number of its first link.
    pub fn next_place(&self) -> (usize, usize, u32, u32) {
        (self.next, self.next_cold, self.blocks.len() as u32, self.links.len() as u32)
    }
    /// Bytes of code, and how many there is room for.
    pub fn fill(&self) -> (usize, usize) {
        (self.next - self.start + self.next_cold - self.middle, self.end - self.start)
    }
    /// Whether there may be too little room for one more block.
    pub fn is_full(&self) -> bool {
        self.middle - self.next < 64 << 10 || self.end - self.next_cold < 64 << 10
    }
    /// How the instruction at this guest-physical address is to check its accesses.
    pub fn manner(&self, gpa: u64) -> Manner {
        self.marks.get(&gpa).map_or_else(Manner::default, |mark| mark.manner)
    }
    /// Whether what is translated under this key is to be a trace.
    pub fn is_hot(&self, key: Key) -> bool {
        self.hot.contains(&key)
    }
    /// How often the block with this key has run, of `trace_after` times after which it counts as hot and is counted no more.
    pub fn runs(&self, key: Key, trace_after: u32, sites: &Sites) -> u64 {
        if self.hot.contains(&key) {
            return trace_after.into();
        }
        let Some(id) = self.find(key) else { return 0 };
        match self.blocks[id as usize].sites {
            // A block that is no trace has a site for a counter, which counts down.
            (counter, 1) => u64::from(trace_after).saturating_sub(sites.count_of(counter)),
            _ => 0,
        }
    }
    /// A block has run often: it is dropped, and will be a trace when it is translated again.
    pub fn heat(&mut self, id: u32) {
        self.hot.insert(self.blocks[id as usize].key);
        self.kill(id);
    }
    /// The site of instruction `k` of the block whose hot code holds `pc` is of no use, nor are the block's other restless ones: they will be
    /// translated anew without. `group`: it is of use, but not for a group. The block is dropped.
    pub fn give_up_sites(&mut self, pc: usize, k: usize, group: bool, sites: &Sites) {
        let Some(id) = self.id_at(pc) else { return };
        let block = &self.blocks[id as usize];
        let gpa = |k: usize| block.key.gpa & !(PAGE_SIZE - 1) | block.points[k].guest as u64;
        let mark = &mut self.marks.entry(gpa(k)).or_default().manner;
        *if group { &mut mark.loner } else { &mut mark.restless } = true;
        for i in 0..block.sites.1 {
            let site = block.sites.0 + i * size_of::<Site>() as u32;
            if sites.is_restless(site) {
                let k = block.instruction_at(sites.retry_of(site) as usize);
                self.marks.entry(gpa(k)).or_default().manner.restless = true;
            }
        }
        self.kill(id);
    }
    /// Block `id` was about to run when time was up, which says how much of the time it takes. If that is much, and there are marks on its
    /// instructions, it gets another chance without them: many are from when a program began.
    pub fn sample(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        if !block.marked {
            return;
        }
        block.samples += 1;
        if block.samples < CHANCE || !block.samples.is_power_of_two() {
            return;
        }
        let page = block.key.gpa & !(PAGE_SIZE - 1);
        let marked = || block.points.iter().map(|p| page | p.guest as u64);
        let chances = marked().filter_map(|gpa| self.marks.get(&gpa)).map(|mark| mark.chances).max().unwrap_or(0);
        if chances < CHANCES && block.samples >= CHANCE << (2 * chances) {
            for gpa in marked() {
                if let Some(mark) = self.marks.get_mut(&gpa) {
                    *mark = Mark { manner: Manner::default(), chances: chances + 1 };
                }
            }
            self.stats.chances += 1;
            self.kill(id);
        }
    }
    /// A block by number.
    pub fn block(&self, id: u32) -> &Block {
        &self.blocks[id as usize]
    }
    /// The block whose hot code holds host address `pc`.
    pub fn block_at(&self, pc: usize) -> Option<&Block> {
        self.id_at(pc).map(|id| self.block(id))
    }
    fn id_at(&self, pc: usize) -> Option<u32> {
        (pc < self.next)
            .then(|| self.entries.partition_point(|&entry| entry as usize <= pc).checked_sub(1))
            .flatten()
            .map(|i| i as u32)
    }
    /// Which life of the cache this is: block numbers count until everything is dropped.
    pub fn life(&self) -> u64 {
        self.stats.full_flushes
    }
    /// Whether a block of this life still stands for its bytes.
    pub fn is_alive(&self, id: u32) -> bool {
        self.blocks[id as usize].alive
    }
    /// The living block with this key.
    pub fn find(&self, key: Key) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Adds a block translated for [`Cache::next_place`]. `pages` are the RAM pages its bytes come from.
    /// `first_site` is the host address of its first site.
    /// `marked`: marks on its instructions made a difference.
    pub fn add(&mut self, key: Key, t: &Translation, first_site: u32, second: Option<u64>, pages: &[usize], marked: bool) -> u32 {
        assert!(t.code.len() <= self.middle - self.next, "block of {} bytes overruns the cache", t.code.len());
        assert!(t.cold.len() <= self.end - self.next_cold, "block of {} cold bytes overruns the cache", t.cold.len());
        let id = self.blocks.len() as u32;
        // SAFETY: the arena is ours, and nothing runs in its free parts.
        unsafe {
            std::ptr::copy_nonoverlapping(t.code.as_ptr(), self.next as *mut u8, t.code.len());
            std::ptr::copy_nonoverlapping(t.cold.as_ptr(), self.next_cold as *mut u8, t.cold.len());
        }
        if let Some(notes) = &mut self.notes {
            let kinds = match key.mode {
                m if m.has(Mode::ALONE) => ["alone", "alone cold"],
                m if m.has(Mode::SHORT) => ["short", "short cold"],
                m if m.has(Mode::UNGROUPED) && self.hot.contains(&key) => ["ungrouped trace", "ungrouped trace cold"],
                _ if self.hot.contains(&key) => ["trace", "trace cold"],
                _ => ["block", "block cold"],
            };
            let (rip, user) = (key.rip, key.mode.has(Mode::USER));
            let places = [(self.next, t.code.len()), (self.next_cold, t.cold.len())];
            notes.extend(places.into_iter().zip(kinds).map(|((start, len), kind)| CodeNote { start, len, rip, kind, user }));
        }
        let first_link = self.links.len() as u32;
        for l in &t.links {
            self.links.push(LinkState {
                patch: l.patch,
                stub: l.stub,
                target: l.target,
                from: id,
                to: None,
                owing: l.owing,
                ungrouped: l.ungrouped,
            });
        }
        self.stats.blocks += 1;
        self.stats.instructions += t.points.len() as u64;
        self.entries.push(t.entry);
        self.blocks.push(Block {
            key,
            entry: t.entry,
            published: t.published,
            points: t.points.as_slice().into(),
            sys: t.sys.as_slice().into(),
            second,
            guest: t.guest,
            takes: t.takes,
            sites: (first_site, t.sites.len() as u32),
            links: first_link..self.links.len() as u32,
            incoming: Vec::new(),
            alive: true,
            marked,
            samples: 0,
        });
        self.next = (self.next + t.code.len()).next_multiple_of(16).min(self.middle);
        self.next_cold = (self.next_cold + t.cold.len()).min(self.end);
        self.by_key.insert(key, id);
        for &page in pages {
            self.by_page.entry(page).or_default().push(id);
        }
        id
    }

    /// Whether link `link` leads to another page than it comes from.
    pub fn is_far(&self, link: u32) -> bool {
        let l = &self.links[link as usize];
        (self.blocks[l.from as usize].key.rip ^ l.target) >> 12 != 0
    }
    /// Unlinks the jumps between pages: their mappings may have changed.
    pub fn unlink_far(&mut self) {
        let mut targets = Vec::new();
        for link in std::mem::take(&mut self.far) {
            if let Some(to) = self.links[link as usize].to {
                targets.push(to);
                self.unlink(link);
            }
        }
        targets.sort_unstable();
        targets.dedup();
        for to in targets {
            let links = &self.links;
            self.blocks[to as usize].incoming.retain(|&link| links[link as usize].to == Some(to));
        }
    }
    /// The key of the block that link `link`, which is not far, wants to jump to.
    pub fn link_target(&self, link: u32) -> Key {
        let l = &self.links[link as usize];
        let from = &self.blocks[l.from as usize];
        let mode = Mode((from.key.mode.0 & !Mode::UNGROUPED) | (l.ungrouped as u16 * Mode::UNGROUPED));
        Key { gpa: from.key.gpa & !(PAGE_SIZE - 1) | l.target & (PAGE_SIZE - 1), rip: l.target, mode }
    }

    fn patch(&mut self, patch: u32, target: u32) {
        // SAFETY: a displacement inside code that `add` wrote; it is not running now.
        unsafe { (patch as usize as *mut i32).write_unaligned(target.wrapping_sub(patch + 4) as i32) };
    }

    /// Links a jump to a block. Does nothing if either end is gone or the target crosses a page.
    pub fn link(&mut self, link: u32, to: u32) {
        let l = &mut self.links[link as usize];
        let target = &mut self.blocks[to as usize];
        if l.to.is_some() || !target.alive || target.second.is_some() || !self.blocks[l.from as usize].alive {
            return;
        }
        l.to = Some(to);
        let patch = l.patch;
        if self.is_far(link) {
            self.far.push(link);
        }
        let owing = self.links[link as usize].owing;
        let target = &mut self.blocks[to as usize];
        target.incoming.push(link);
        let entry = target.entry;
        match (owing, target.takes) {
            (Some(owing), Some((entry, written))) if owing.needs & written == 0 => {
                self.patch(owing.patch, entry);
                self.patch(owing.jump, owing.thunk);
            }
            _ => self.patch(patch, entry),
        }
    }

    /// Makes a jump leave for Rust again.
    fn unlink(&mut self, link: u32) {
        let l = &mut self.links[link as usize];
        l.to = None;
        let (patch, stub, owing) = (l.patch, l.stub, l.owing);
        self.patch(patch, stub);
        if let Some(owing) = owing {
            self.patch(owing.jump, owing.exit);
        }
    }

    fn kill(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        if !block.alive {
            return;
        }
        block.alive = false;
        self.stats.killed += 1;
        let (key, outgoing) = (block.key, block.links.clone());
        let incoming = std::mem::take(&mut block.incoming);
        block.sys = Box::default();
        if self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
        for link in incoming {
            self.unlink(link);
        }
        for link in outgoing {
            if let Some(to) = self.links[link as usize].to.take() {
                self.blocks[to as usize].incoming.retain(|&i| i != link);
            }
        }
        self.dead.push((key.rip, key.mode.has(Mode::USER)));
    }

    /// Bytes `first..=last` of RAM page `page` changed: drops the blocks made from them. Says whether the page holds no code any more.
    pub fn bytes_changed(&mut self, page: usize, gpa: u64, first: u16, last: u16) -> bool {
        let Some(mut ids) = self.by_page.remove(&page) else { return true };
        ids.retain(|&id| {
            let b = &self.blocks[id as usize];
            if !b.alive {
                return false;
            }
            let page = b.key.gpa & !(PAGE_SIZE - 1);
            let (start, end) = (page + b.guest.0 as u64, page + b.guest.1.max(b.guest.0 + 1) as u64);
            let hit = match b.second {
                // Crosses pages: a byte of its end in another physical page, or of its start in this one.
                Some(_) => true,
                None => start <= gpa + last as u64 && gpa + (first as u64) < end,
            };
            if hit {
                self.stats.overwritten += 1;
                self.kill(id);
            }
            !hit
        });
        if ids.is_empty() {
            return true;
        }
        self.by_page.insert(page, ids);
        false
    }

    /// Drops everything. The caller makes jumps forget it ([`crate::mmu::Mmu::forget_jumps`]).
    pub fn flush(&mut self, flags: &PageFlags) {
        for (&page, _) in self.by_page.iter() {
            flags.clear(page, PageFlags::CODE);
        }
        self.stats.full_flushes += 1;
        self.blocks.clear();
        self.entries.clear();
        self.links.clear();
        self.far.clear();
        self.by_key.clear();
        self.by_page.clear();
        self.dead.clear();
        self.next = self.start;
        self.next_cold = self.middle;
        self.marks.clear();
        self.hot.clear();
    }
}
