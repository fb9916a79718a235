//! Reads and writes of guest memory: through what is cached, by walking, or to a device.
//!
//! **In:** a virtual address and whose permissions count. **Out:** bytes moved, or the exception the guest gets, and then nothing moved.
//! Invariant: stores to pages that hold code or page tables go through [`Mmu::write_ram`].
use super::{Access, Mmu};
use crate::{Bus, CpuState, Exception, PAGE_SIZE, PageFlags, Position};

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

impl Mmu {
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
                    let gpa = self.fill(st, at, Access::Read, user)?;
                    match self.ram.page(gpa) {
                        // SAFETY: offset inside the page.
                        Some((_, page)) => Some(unsafe { page.add((at % PAGE_SIZE) as usize) }),
                        None => {
                            bus.mmio_read(position, gpa, piece);
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
                    let gpa = self.fill(st, at, Access::Write, user)?;
                    if self.ram.page(gpa).is_some() {
                        self.write_ram(gpa, piece);
                    } else {
                        bus.mmio_write(position, gpa, piece);
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
        if flags & PageFlags::DIRTY == 0 {
            self.ram.flags().set(page, PageFlags::DIRTY);
        }
        // SAFETY: inside the page; nothing writes it while the slice is used.
        if flags & PageFlags::CODE != 0 && unsafe { std::slice::from_raw_parts(host.add(offset), data.len()) } != data {
            self.stats.code_stores += 1;
            self.pending.code.push((page, offset as u16, (offset + data.len() - 1) as u16));
        }
        if flags & PageFlags::TABLE == 0 {
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host.add(offset), data.len()) };
            return;
        }
        self.stats.table_stores += 1;
        // Entry by entry: what it was, the bytes of it that are stored, what it is.
        let mut done = 0;
        while done < data.len() {
            let at = offset + done;
            let n = (8 - at % 8).min(data.len() - done);
            // SAFETY: an aligned word inside the page, and the bytes of it from `at` on; no other view of it is used meanwhile.
            let (was, now) = unsafe {
                let word = host.add(at & !7).cast::<u64>();
                let was = word.read();
                std::ptr::copy_nonoverlapping(data[done..].as_ptr(), host.add(at), n);
                (was, word.read())
            };
            if was != now {
                self.table_entry_changed(page, at / 8, was);
            }
            done += n;
        }
    }
}

// Used by `sys`.
impl Mmu {
    /// Translates for reading: the result is good for the rest of the page, until the next call of any method.
    #[inline]
    pub(crate) fn place_for_read(&mut self, st: &CpuState, va: u64, user: bool) -> Result<Place, Exception> {
        if let Some(host) = self.hit(va, false, user) {
            return Ok(Place::Plain(host));
        }
        let gpa = self.fill(st, va, Access::Read, user)?;
        Ok(match self.ram.page(gpa) {
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
        let gpa = self.fill(st, va, Access::Write, user)?;
        let Some((page, host)) = self.ram.page(gpa) else { return Ok(Place::Device) };
        if self.ram.flags().get(page) & (PageFlags::CODE | PageFlags::TABLE) != 0 {
            return Ok(Place::Special(gpa));
        }
        Ok(Place::Plain(host.wrapping_add((va % PAGE_SIZE) as usize)))
    }
}
