//! Sites: a one-entry translation cache beside every memory access of translated code.
//!
//! **In:** where accesses are (the translator), which translations die (the MMU). **Out:** memory that translated code reads: a site
//! whose tag is the accessed page gives the addend without a look into the soft TLB.
//!
//! A site is filled by code, from the soft TLB ([`crate::emit::Shared::sites`]), which also notes it in the list of its half of the address
//! space, under the guest page, and, if it writes, under the host page; so forgetting costs no more than what was filled, and
//! forgetting one page no more than what was filled of it.
//!
//! Invariant: a filled site says what a walk of the tables now would say, with the permission its access needs. Its addend is of use only
//! behind the check: that of an empty site leads nowhere.
use crate::ram::PAGE_SIZE;

/// Misses within [`PERIOD`] after which an access is translated anew to look into the TLB itself. Being emptied is a miss like any other:
/// where address spaces change that often, filling costs more than looking.
pub const PATIENCE: u8 = 25;
/// Instructions after which a site has all its [`PATIENCE`] again: what counts is how often it misses, not how long it lives.
pub const PERIOD: u64 = 1 << 20;
/// What it costs a site that its group's bytes cannot be accessed as one (they cross a page, or not all may be written): its instruction ran alone.
const GROUP_FAILED: u8 = 2;

/// Buckets by guest page, for both halves of the address space; a power of two.
pub const GUEST_BUCKETS: usize = 1024;
/// The same, for one half.
pub const HALF_BUCKETS: usize = GUEST_BUCKETS / 2;
/// Buckets by host page; a power of two.
pub const HOST_BUCKETS: usize = 128;

/// Addresses of sites by the low bits of a page number, as translated code notes them when it fills them. A site is in the bucket that it names,
/// and may be in others that it left.
#[repr(C)]
pub struct Notes<const N: usize> {
    /// Where each bucket's sites are noted.
    pub slots: [*mut u32; N],
    /// How many.
    pub count: [u32; N],
    /// How many there is room for.
    pub room: [u32; N],
}

/// The bucket of a guest page.
fn guest_bucket(va: u64) -> usize {
    ((va / PAGE_SIZE) as usize & (HALF_BUCKETS - 1)) + (va >> 63) as usize * HALF_BUCKETS
}
/// The bucket of a host page.
fn host_bucket(host: u64) -> usize {
    (host / PAGE_SIZE) as usize & (HOST_BUCKETS - 1)
}

impl<const N: usize> Notes<N> {
    fn new() -> Self {
        Self { slots: [std::ptr::null_mut(); N], count: [0; N], room: [0; N] }
    }
    fn of(&self, bucket: usize) -> &'static mut [u32] {
        if self.room[bucket] == 0 {
            return &mut [];
        }
        // SAFETY: `count` of the `room` slots that `make_room` allocated were written; no result outlives a method.
        unsafe { std::slice::from_raw_parts_mut(self.slots[bucket], self.count[bucket] as usize) }
    }
    /// Makes room for one more in a bucket, of which `is_there` says which sites name it (and marks them: the second time it says no). Says whether it asked.
    fn make_room(&mut self, bucket: usize, mut is_there: impl FnMut(u32) -> bool) -> bool {
        if self.count[bucket] < self.room[bucket] {
            return false;
        }
        let mut noted = self.of(bucket).to_vec();
        noted.retain(|&address| is_there(address));
        self.free(bucket);
        // The more room, the less often all that is noted must be looked through.
        let room = (4 * noted.len()).max(16);
        self.count[bucket] = noted.len() as u32;
        self.room[bucket] = room as u32;
        noted.resize(room, 0);
        self.slots[bucket] = Box::into_raw(noted.into_boxed_slice()).cast();
        true
    }
    fn free(&mut self, bucket: usize) {
        if self.room[bucket] != 0 {
            let slots = std::ptr::slice_from_raw_parts_mut(self.slots[bucket], self.room[bucket] as usize);
            // SAFETY: made by `make_room` from a box of this length.
            drop(unsafe { Box::from_raw(slots) });
            (self.count[bucket], self.room[bucket]) = (0, 0);
        }
    }
}

/// One site, in the layout translated code knows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Site {
    /// Page address, or [`Site::EMPTY`].
    pub tag: u64,
    /// Host address minus guest address; for a constant address, the host address itself, 0 if empty.
    pub addend: u64,
    /// Host code that does the check again.
    pub retry: u32,
    /// Host code that asks the MMU.
    pub slow: u32,
    /// 4096 minus the size of the access.
    pub limit: u16,
    /// Misses left before the access is translated anew.
    pub misses: u8,
    /// The period in which they are counted ([`Sites::period`]).
    pub period: u8,
    /// The bucket by guest page that it is noted in, or [`Site::NOWHERE`].
    pub guest: u16,
    /// The bucket by host page that it is noted in, or the low byte of [`Site::NOWHERE`].
    pub host: u8,
    /// [`Site::LOW`], [`Site::HIGH`] (on that list), [`Site::CONSTANT`], [`Site::WRITE`].
    pub bits: u8,
}

impl Site {
    /// No canonical address is in this page, and an access to it faults on the host: [`Site::EMPTY_ADDEND`] leaves it as it is.
    pub const EMPTY: u64 = 0xffff_0000_0000_0000;
    /// See [`Site::EMPTY`].
    pub const EMPTY_ADDEND: u64 = 0;
    /// On the list of sites with addresses in the lower half.
    pub const LOW: u8 = 1;
    /// On the list of sites with addresses in the upper half.
    pub const HIGH: u8 = 2;
    /// The address is a constant; `addend` is the whole host address.
    pub const CONSTANT: u8 = 4;
    /// The access writes.
    pub const WRITE: u8 = 8;
    /// Seen, while buckets are tidied.
    const MARK: u8 = 16;
    /// No bucket.
    pub const NOWHERE: u16 = 0xffff;

    /// A new one.
    pub fn new(retry: usize, size: usize, bits: u8) -> Self {
        Self {
            tag: Self::EMPTY,
            addend: Self::EMPTY_ADDEND,
            retry: retry as u32,
            slow: 0,
            limit: 0x1000 - size as u16,
            misses: PATIENCE,
            period: 0,
            guest: Self::NOWHERE,
            host: Self::NOWHERE as u8,
            bits,
        }
    }

    fn clear(&mut self) {
        self.tag = Self::EMPTY;
        self.addend = Self::EMPTY_ADDEND;
    }

    fn host_page(&self) -> u64 {
        let host = if self.bits & Self::CONSTANT != 0 { self.addend } else { self.tag.wrapping_add(self.addend) };
        host & !(PAGE_SIZE - 1)
    }
}

/// All sites of an engine. Zeroed memory is one without any.
#[repr(C)]
pub struct Sites {
    sites: *mut Site,
    capacity: usize,
    used: usize,
    /// Two lists of `capacity` addresses of sites: lower half, upper half.
    lists: [*mut u32; 2],
    /// Where the lists end; translated code appends to them.
    pub ends: [u64; 2],
    /// Sites by guest page.
    pub by_guest: Notes<GUEST_BUCKETS>,
    /// Sites that write, by host page.
    pub by_host: Notes<HOST_BUCKETS>,
    /// Counts events at which a filled site may have been emptied.
    pub emptied: u64,
    /// The current period, in its low byte.
    pub period: u64,
}

impl Sites {
    /// Bytes needed for `capacity` sites.
    pub const fn bytes(capacity: usize) -> usize {
        capacity * (size_of::<Site>() + 2 * size_of::<u32>())
    }

    /// Sites in the memory at `start`, which is below 2 GiB.
    ///
    /// # Safety
    /// `Sites::bytes(capacity)` bytes at `start` must be used by nothing but this and translated code as long as this lives.
    pub unsafe fn new(start: *mut u8, capacity: usize) -> Self {
        let sites = start.cast::<Site>();
        let low = sites.wrapping_add(capacity).cast::<u32>();
        let mut all = Self {
            sites,
            capacity,
            used: 0,
            lists: [low, low.wrapping_add(capacity)],
            ends: [0; 2],
            by_guest: Notes::new(),
            by_host: Notes::new(),
            emptied: 0,
            period: 0,
        };
        all.reset();
        all
    }

    /// Forgets that there are any sites (all code is gone).
    pub fn reset(&mut self) {
        self.used = 0;
        self.set_len(0, 0);
        self.set_len(1, 0);
        self.by_guest.count.fill(0);
        self.by_host.count.fill(0);
    }
    /// Host address of the next site to be added.
    pub fn next(&self) -> u32 {
        self.sites.wrapping_add(self.used) as usize as u32
    }
    /// Whether `n` more may be too many.
    pub fn is_full(&self, n: usize) -> bool {
        self.capacity - self.used < n
    }
    /// Adds an empty site at [`Sites::next`].
    ///
    /// # Panics
    /// If there is no room.
    pub fn add(&mut self, site: Site) {
        assert!(self.used < self.capacity, "more sites than {}", self.capacity);
        // SAFETY: inside our memory.
        unsafe { self.sites.add(self.used).write(site) };
        self.used += 1;
    }
    /// Misses left of the site at a host address that translated code passed on.
    pub fn misses_left(&self, address: u64) -> u8 {
        self.at(address as u32).misses
    }
    /// The bytes of the group that this site is for cannot be accessed as one, now. Says whether that has happened too often.
    pub fn group_failed(&self, address: u64) -> bool {
        let period = self.period as u8;
        let site = self.at(address as u32);
        if site.period != period {
            (site.period, site.misses) = (period, PATIENCE);
        }
        site.misses = site.misses.saturating_sub(GROUP_FAILED);
        site.misses == 0
    }
    /// What the site at `address`, which serves as a counter, stands at.
    pub fn count_of(&self, address: u32) -> u64 {
        self.at(address).tag
    }
    /// Where the code that does the check of the site at `address` is.
    pub fn retry_of(&self, address: u32) -> u32 {
        self.at(address).retry
    }
    /// Whether the site at `address` is close to being translated anew.
    pub fn is_restless(&self, address: u32) -> bool {
        let site = self.at(address);
        site.period == self.period as u8 && site.misses < PATIENCE / 2
    }

    #[allow(clippy::mut_from_ref)]
    fn at(&self, address: u32) -> &mut Site {
        let i = (address as usize - self.sites as usize) / size_of::<Site>();
        assert!(i < self.used, "no site at {address:#x}");
        // SAFETY: a site that was added; one borrow at a time, each ends before the next begins.
        unsafe { &mut *self.sites.add(i) }
    }
    fn len(&self, half: usize) -> usize {
        (self.ends[half] as usize - self.lists[half] as usize) / size_of::<u32>()
    }
    fn set_len(&mut self, half: usize, len: usize) {
        self.ends[half] = self.lists[half].wrapping_add(len) as u64;
    }
    fn list(&self, half: usize) -> &'static [u32] {
        if self.capacity == 0 {
            return &[];
        }
        // SAFETY: the first `len` entries were written by code; the memory lives as long as `self`, and no result outlives a method.
        unsafe { std::slice::from_raw_parts(self.lists[half], self.len(half)) }
    }

    /// Empties the sites of one half (0 lower, 1 upper) of the address space.
    pub fn clear_half(&mut self, half: usize) {
        self.emptied += 1;
        let list = self.list(half);
        for &address in list {
            let site = self.at(address);
            site.bits &= !(Site::LOW << half);
            if (site.tag >> 63) as usize == half {
                site.clear();
            }
            if site.guest as usize / HALF_BUCKETS == half {
                site.guest = Site::NOWHERE;
            }
        }
        self.by_guest.count[half * HALF_BUCKETS..][..HALF_BUCKETS].fill(0);
        self.set_len(half, 0);
    }
    /// Empties the sites of the guest pages in the range of `1 << shift` bytes that holds `va`.
    pub fn clear_range(&mut self, va: u64, shift: u32) {
        self.emptied += 1;
        if shift == 12 {
            for &address in self.by_guest.of(guest_bucket(va)).iter() {
                let site = self.at(address);
                if site.tag == va & !(PAGE_SIZE - 1) {
                    site.clear();
                }
            }
            return;
        }
        for &address in self.list((va >> 63) as usize) {
            let site = self.at(address);
            if (site.tag ^ va) >> shift == 0 {
                site.clear();
            }
        }
    }
    /// Empties the writing sites of the RAM page at host address `host`.
    pub fn forbid_writes(&mut self, host: u64) {
        self.emptied += 1;
        for &address in self.by_host.of(host_bucket(host)).iter() {
            let site = self.at(address);
            if site.bits & Site::WRITE != 0 && site.tag != Site::EMPTY && site.host_page() == host {
                site.clear();
            }
        }
    }
    /// Empties all writing sites.
    pub fn forbid_all_writes(&mut self) {
        self.emptied += 1;
        for half in 0..2 {
            for &address in self.list(half) {
                let site = self.at(address);
                if site.bits & Site::WRITE != 0 && site.tag != Site::EMPTY {
                    site.clear();
                }
            }
        }
    }
    /// Makes room to note one more site of a guest page and of the host page it is at, where there is none left.
    pub fn make_room(&mut self, page: u64, host: u64) {
        let at = |address: u32| address as usize as *mut Site;
        // SAFETY: noted addresses are those of sites; one borrow at a time.
        let mark = |there: &dyn Fn(&Site) -> bool, address: u32| unsafe {
            let site = &mut *at(address);
            let fresh = there(site) && site.bits & Site::MARK == 0;
            if fresh {
                site.bits |= Site::MARK;
            }
            fresh
        };
        let bucket = guest_bucket(page);
        if self.by_guest.make_room(bucket, |address| mark(&|site| site.guest as usize == bucket, address)) {
            self.unmark(self.by_guest.of(bucket));
        }
        let bucket = host_bucket(host);
        if self.by_host.make_room(bucket, |address| mark(&|site| site.host as usize == bucket, address)) {
            self.unmark(self.by_host.of(bucket));
        }
    }
    fn unmark(&self, noted: &[u32]) {
        for &address in noted {
            self.at(address).bits &= !Site::MARK;
        }
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        (0..GUEST_BUCKETS).for_each(|b| self.by_guest.free(b));
        (0..HOST_BUCKETS).for_each(|b| self.by_host.free(b));
    }
}

const _: () = assert!(size_of::<Site>() == 32);
