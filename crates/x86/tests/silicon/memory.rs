//! Guest RAM and page tables for tests.
use std::ptr;
use twinstep_x86::{PageFlags, PhysMem, RamRegion};

const PAGE: usize = 4096;

/// Guest RAM from address 0, owned by a test.
pub struct GuestRam {
    phys: PhysMem,
    host: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for GuestRam {}

impl GuestRam {
    /// Zeroed RAM of `len` bytes.
    pub fn new(len: usize) -> Self {
        // SAFETY: a fresh anonymous mapping that lives until the value is dropped; the engine that uses it is dropped before (field
        // order of those who own both) or never touches it again.
        unsafe {
            let at = libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert!(at != libc::MAP_FAILED, "mmap");
            let host = at.cast::<u8>();
            let region = RamRegion { gpa: 0, len: len as u64, host };
            Self { phys: PhysMem::new(vec![region], PageFlags::new(len / PAGE)), host, len }
        }
    }
    /// What the engine gets.
    pub fn phys(&self) -> &PhysMem {
        &self.phys
    }
    /// Writes like a device.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let at = gpa as usize;
        assert!(at + bytes.len() <= self.len);
        // SAFETY: inside the mapping; no reference into it lives (`&mut self`), and the engine runs only between calls.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.add(at), bytes.len()) };
        for page in at / PAGE..(at + bytes.len()).div_ceil(PAGE) {
            self.phys.flags().device_wrote(page);
        }
    }
    /// Bytes of it.
    pub fn bytes(&self, gpa: u64, len: usize) -> &[u8] {
        assert!(gpa as usize + len <= self.len);
        // SAFETY: inside the mapping; the engine, which could write it, does not run while it is borrowed.
        unsafe { std::slice::from_raw_parts(self.host.add(gpa as usize), len) }
    }
    /// A little-endian word of it.
    pub fn word(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().expect("eight bytes"))
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: our mapping, not used any more.
        unsafe { libc::munmap(self.host.cast(), self.len) };
    }
}

/// Builds four-level page tables in guest RAM.
pub struct PageTables {
    root: u64,
    next: u64,
    end: u64,
}

/// Present, writable, user bits.
pub const PRESENT: u64 = 1;
/// Writable.
pub const WRITABLE: u64 = 2;
/// User.
pub const USER: u64 = 4;
/// Not executable.
pub const NO_EXECUTE: u64 = 1 << 63;

impl PageTables {
    /// Empty tables in `from..end`.
    pub fn new(from: u64, end: u64) -> Self {
        Self { root: from, next: from + PAGE as u64, end }
    }
    /// CR3.
    pub fn root(&self) -> u64 {
        self.root
    }
    /// Guest-physical address of the last-level entry for `va`; makes the tables above it.
    pub fn entry(&mut self, ram: &mut GuestRam, va: u64) -> u64 {
        let mut table = self.root;
        for level in [39, 30, 21] {
            let entry = table + (va >> level & 511) * 8;
            let mut value = ram.word(entry);
            if value & PRESENT == 0 {
                assert!(self.next < self.end, "no room for page tables");
                value = self.next | PRESENT | WRITABLE | USER;
                self.next += PAGE as u64;
                ram.write(entry, &value.to_le_bytes());
            }
            table = value & 0x000f_ffff_ffff_f000;
        }
        table + (va >> 12 & 511) * 8
    }
    /// Maps one page.
    pub fn map(&mut self, ram: &mut GuestRam, va: u64, gpa: u64, write: bool, user: bool, execute: bool) {
        let entry = self.entry(ram, va);
        let mut value = gpa | PRESENT;
        if write {
            value |= WRITABLE;
        }
        if user {
            value |= USER;
        }
        if !execute {
            value |= NO_EXECUTE;
        }
        ram.write(entry, &value.to_le_bytes());
    }
}
