//! Where the next instruction is, and its bytes.
//!
//! **In:** the state. **Out:** the guest-physical address of the instruction at RIP and the bytes of its page; or the exception of fetching it.
//! Invariant: what is fetched is mapped and may be executed now, and lies inside the code segment's limit; only the length of the first
//! instruction is still to be held against that.
use super::{Core, Stop};
use crate::mmu::canonical;
use crate::segmentation;
use crate::state::{cr0, seg};
use crate::translate::{Mode, decode};
use crate::{Exception, PAGE_SIZE, Segment};

impl Core {
    /// RIP and where its bytes are.
    pub(super) fn fetch(&mut self, mode: Mode) -> Result<(u64, u64), Stop> {
        let user = mode.has(Mode::USER);
        let st = self.st();
        let rip = st.rip;
        let mut va = rip;
        if mode.has(Mode::CODE_32) {
            if st.cr0 & cr0::PE == 0 {
                return Err(Stop::Unsupported("real mode"));
            }
            let cs = &st.seg[seg::CS];
            if cs.attributes & Segment::BIG == 0 {
                // A user program that jumps to a 16-bit segment hurts only itself.
                return Err(if user { Stop::Fault(Exception::UD) } else { Stop::Unsupported("16-bit code") });
            }
            va = (cs.base as u32).wrapping_add(rip as u32).into();
            if !segmentation::holds_code(st, rip as u32, 1) {
                return Err(Stop::Fault(Exception::gp(0)));
            }
        } else if !canonical(rip) {
            return Err(Stop::Fault(Exception::gp(0)));
        }
        // SAFETY: the state is not part of the MMU.
        let st = unsafe { &(*self.frame).st };
        Ok((rip, self.mmu.fetch(st, va, user)?))
    }

    /// The guest bytes at RIP: to the end of the page, and beyond if the first instruction needs it.
    pub(super) fn bytes(&mut self, rip: u64, gpa: u64) -> Result<Bytes, Stop> {
        let Some((page, host)) = self.mmu.ram().page(gpa) else {
            return Err(Stop::Unsupported("code outside RAM"));
        };
        let mode = self.mode();
        // In 32-bit code the linear address is another than RIP where the code segment has a base.
        let narrow = mode.has(Mode::CODE_32);
        let va = if narrow { (self.st().seg[seg::CS].base as u32).wrapping_add(rip as u32).into() } else { rip };
        let offset = (va % PAGE_SIZE) as usize;
        let here = PAGE_SIZE as usize - offset;
        // SAFETY: a page of RAM; nothing writes it while the slice lives.
        let whole = unsafe { std::slice::from_raw_parts(host, PAGE_SIZE as usize) };
        let slice = &whole[offset..];
        let mut bytes = Bytes { joined: [0; 16], whole, slice, page, second: None, second_va: None, second_page: None };
        if here >= 15 || !decode(slice, rip, mode, self.model.features).is_invalid() {
            return Ok(bytes);
        }
        // Cut off by the end of the page, or invalid. If more bytes could make it an instruction, they are fetched.
        let mut decoder = crate::translate::decoder(slice, rip, mode, self.model.features);
        let _ = decoder.decode();
        if decoder.last_error() != iced_x86::DecoderError::NoMoreBytes {
            return Ok(bytes);
        }
        let mut next = (va | (PAGE_SIZE - 1)).wrapping_add(1);
        if narrow {
            next &= 0xffff_ffff;
            if !segmentation::holds_code(self.st(), rip as u32, here + 1) {
                return Err(Stop::Fault(Exception::gp(0)));
            }
        }
        let user = mode.has(Mode::USER);
        // SAFETY: the state is not part of the MMU.
        let st = unsafe { &(*self.frame).st };
        let second = self.mmu.fetch(st, next, user)?;
        let Some((second_page, host)) = self.mmu.ram().page(second) else {
            return Err(Stop::Unsupported("code outside RAM"));
        };
        bytes.joined[..here].copy_from_slice(slice);
        // SAFETY: the first bytes of a page of RAM.
        bytes.joined[here..15].copy_from_slice(unsafe { std::slice::from_raw_parts(host, 15 - here) });
        bytes.second = Some(second);
        bytes.second_va = Some(next);
        bytes.second_page = Some(second_page);
        Ok(bytes)
    }
}

/// Guest bytes at an address.
pub(super) struct Bytes {
    /// The instruction, if it crosses the page.
    pub joined: [u8; 16],
    /// The page of its first byte. Valid until guest RAM is written.
    pub whole: &'static [u8],
    /// From its first byte to the end of the page.
    pub slice: &'static [u8],
    pub page: usize,
    pub second: Option<u64>,
    pub second_va: Option<u64>,
    pub second_page: Option<usize>,
}
