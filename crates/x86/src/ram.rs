//! Guest RAM as the CPU sees it, and what is known of each of its pages.
//!
//! RAM is owned by whoever built the machine; here it is a short list of regions with their host addresses, and a byte of
//! flags a page, shared with the devices. A device that writes guest memory says so ([`PageFlags::device_wrote`]), and the engine drops
//! what it had derived from the old bytes (translated code, TLB entries) before the next instruction.
//!
//! Invariant: a page whose `CODE` or `TABLE` flag is set has no write entry in any soft TLB.
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// One contiguous piece of guest RAM.
#[derive(Debug, Clone, Copy)]
pub struct RamRegion {
    /// Guest-physical address of its first byte; page aligned.
    pub gpa: u64,
    /// Length in bytes; a multiple of the page size.
    pub len: u64,
    /// Host address of its first byte; page aligned.
    pub host: *mut u8,
}

/// A byte of flags for every page of RAM. Pages are numbered through all regions in order (no holes).
#[derive(Debug)]
pub struct PageFlags {
    flags: Box<[AtomicU8]>,
    /// Some page that carries `CODE` or `TABLE` was written by a device.
    device_wrote: AtomicBool,
    /// Which ones.
    stale: Mutex<Vec<usize>>,
}

impl PageFlags {
    /// Written since the flag was last cleared (for checkpoints, digests and migration).
    pub const DIRTY: u8 = 1;
    /// Holds bytes that were translated.
    pub const CODE: u8 = 2;
    /// Used as a page table by a cached translation.
    pub const TABLE: u8 = 4;
    /// A device wrote to it while it was `CODE` or `TABLE`.
    pub const STALE: u8 = 8;
    /// May have a write entry in a first-level TLB.
    pub const WRITE_CACHED: u8 = 16;

    /// Flags for `pages` pages, all dirty (nothing is known of them yet).
    pub fn new(pages: usize) -> Arc<Self> {
        let flags = (0..pages).map(|_| AtomicU8::new(Self::DIRTY)).collect();
        Arc::new(Self { flags, device_wrote: AtomicBool::new(false), stale: Mutex::default() })
    }
    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.flags.len()
    }
    /// The flags of one page. Panics if there is no such page.
    pub fn get(&self, page: usize) -> u8 {
        self.flags[page].load(Relaxed)
    }
    /// Sets bits.
    pub fn set(&self, page: usize, bits: u8) {
        self.flags[page].store(self.get(page) | bits, Relaxed);
    }
    /// Clears bits.
    pub fn clear(&self, page: usize, bits: u8) {
        self.flags[page].store(self.get(page) & !bits, Relaxed);
    }
    /// Host address of a page's flags, for translated code; those of the following pages follow.
    pub(crate) fn address(&self, page: usize) -> u64 {
        (&raw const self.flags[page]) as u64
    }
    /// To be called by whoever writes guest RAM other than through the CPU (devices, boot loader, snapshot
    /// restore), after the write and before the next instruction. `page` is counted through all regions.
    pub fn device_wrote(&self, page: usize) {
        let old = self.get(page);
        if old & (Self::CODE | Self::TABLE) != 0 {
            if old & Self::STALE == 0 {
                self.stale.lock().expect("no panic while held").push(page);
            }
            self.set(page, Self::DIRTY | Self::STALE);
            self.device_wrote.store(true, Relaxed);
        } else if old & Self::DIRTY == 0 {
            self.set(page, Self::DIRTY);
        }
    }
    /// Whether a device wrote to a page that code or translations were derived from.
    #[inline]
    pub(crate) fn any_stale(&self) -> bool {
        self.device_wrote.load(Relaxed)
    }
    /// Takes the list of such pages and clears their marks.
    pub(crate) fn take_stale(&self) -> Vec<usize> {
        self.device_wrote.store(false, Relaxed);
        let pages = std::mem::take(&mut *self.stale.lock().expect("no panic while held"));
        for &page in &pages {
            self.clear(page, Self::STALE);
        }
        pages
    }
}

/// Guest RAM: at most a few regions, sorted by address.
#[derive(Debug, Clone)]
pub struct PhysMem {
    regions: Vec<RamRegion>,
    flags: Arc<PageFlags>,
}

// SAFETY: the host pointers stay valid for the life of the PhysMem (contract of `new`) and are only followed by the thread
// that runs the machine.
unsafe impl Send for PhysMem {}

impl PhysMem {
    /// Describes RAM.
    ///
    /// # Panics
    /// If regions are unsorted, overlap, are not page aligned, or do not have `flags.pages()` pages together.
    ///
    /// # Safety
    /// Every region's host memory must stay mapped, readable and writable as long as the result or a clone of it is used.
    pub unsafe fn new(regions: Vec<RamRegion>, flags: Arc<PageFlags>) -> Self {
        let mut end = 0;
        let mut pages = 0;
        for r in &regions {
            assert!(r.gpa >= end && [r.gpa, r.len, r.host as u64].iter().all(|n| n.is_multiple_of(PAGE_SIZE)));
            end = r.gpa.checked_add(r.len).expect("region wraps");
            pages += r.len / PAGE_SIZE;
        }
        assert_eq!(pages as usize, flags.pages());
        Self { regions, flags }
    }
    /// The flags of its pages.
    pub fn flags(&self) -> &Arc<PageFlags> {
        &self.flags
    }
    /// The regions.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }
    /// The page number and host address of the page that holds `gpa`, or `None` where there is no RAM.
    #[inline]
    pub fn page(&self, gpa: u64) -> Option<(usize, *mut u8)> {
        let mut first = 0;
        for r in &self.regions {
            let offset = gpa.wrapping_sub(r.gpa);
            if offset < r.len {
                let offset = offset & !(PAGE_SIZE - 1);
                // SAFETY: offset is inside the region.
                return Some((first + (offset / PAGE_SIZE) as usize, unsafe { r.host.add(offset as usize) }));
            }
            first += (r.len / PAGE_SIZE) as usize;
        }
        None
    }
    /// Host address of an aligned 8-byte word of RAM.
    #[inline]
    pub(crate) fn word(&self, gpa: u64) -> Option<*mut u64> {
        let (_, host) = self.page(gpa)?;
        // SAFETY: inside the page.
        Some(unsafe { host.add((gpa & (PAGE_SIZE - 1) & !7) as usize) }.cast())
    }
    /// Guest-physical address of page number `page`. Panics if there is no such page.
    pub fn gpa_of_page(&self, page: usize) -> u64 {
        let mut left = page as u64 * PAGE_SIZE;
        for r in &self.regions {
            if left < r.len {
                return r.gpa + left;
            }
            left -= r.len;
        }
        panic!("page {page} of {}", self.flags.pages());
    }
    /// The bytes of page number `page`. Panics if there is no such page.
    pub fn page_bytes(&self, page: usize) -> &[u8; PAGE_SIZE as usize] {
        let (_, host) = self.page(self.gpa_of_page(page)).expect("gpa of an existing page");
        // SAFETY: a whole page of mapped RAM; the machine is single-threaded, so nothing writes it while it is borrowed.
        unsafe { &*host.cast() }
    }
}
