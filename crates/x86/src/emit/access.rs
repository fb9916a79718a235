//! Memory accesses of blocks of many instructions: the check by site, the check by soft TLB, and the routine that fills sites.
//!
//! **In:** the linear address in r11. **Out:** in r10 what leads to the host's bytes ([`At`]); r11 is free. Flags are clobbered.
use super::{Emit, Shared};
use crate::mmu::first::{First, TLB_ENTRIES};
use crate::sites::{GUEST_BUCKETS, HALF_BUCKETS, HOST_BUCKETS, Notes, PATIENCE, Site, Sites};
use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, dynasm};
use std::mem::offset_of;

/// Where the bytes of a checked access are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// At register + r10 + displacement.
    Sum(u8, i32),
    /// At r10.
    Host,
    /// So many bytes from r10.
    Beyond(i32),
}

const TAG: i32 = offset_of!(Site, tag) as i32;
const ADDEND: i32 = offset_of!(Site, addend) as i32;
const RETRY: i32 = offset_of!(Site, retry) as i32;
const SLOW: i32 = offset_of!(Site, slow) as i32;
const LIMIT: i32 = offset_of!(Site, limit) as i32;
const MISSES: i32 = offset_of!(Site, misses) as i32;
const PERIOD: i32 = offset_of!(Site, period) as i32;
const GUEST: i32 = offset_of!(Site, guest) as i32;
const HOST: i32 = offset_of!(Site, host) as i32;
const BITS: i32 = offset_of!(Site, bits) as i32;

impl Emit {
    /// Checks the address in r11 by the site at `site`. Returns the place of the jump to be made when it fails.
    pub fn site_check(&mut self, site: i32, size: usize, at: At) -> usize {
        let limit = 0x1000 - size as i32;
        dynasm!(self.ops ; .arch x64 ; mov r10, [site + ADDEND]);
        if at == At::Host {
            dynasm!(self.ops ; .arch x64 ; add r10, r11);
        }
        dynasm!(self.ops ; .arch x64 ; xor r11, [site + TAG] ; cmp r11, limit);
        self.jcc_out(7)
    }
    /// r10 = the addend of a site that was checked before. No flags.
    pub fn load_addend(&mut self, site: i32) {
        dynasm!(self.ops ; .arch x64 ; mov r10, [site + ADDEND]);
    }
    /// The same for an address that is a constant, which need not be in r11.
    pub fn site_check_constant(&mut self, site: i32) -> usize {
        dynasm!(self.ops ; .arch x64 ; mov r10, [site + ADDEND] ; test r10, r10);
        self.jcc_out(4)
    }
    /// Checks the address in r11 by the soft TLB. Returns the place of the jump to be made when it fails: on a miss, a missing permission or
    /// a page crossing.
    pub fn tlb_check(&mut self, size: usize, write: bool, at: At) -> usize {
        let tags = if write { self.at.tlb_write(self.user) } else { self.at.tlb_read(self.user) };
        let addends = self.at.tlb_addend(self.user);
        let limit = 0x1000 - size as i32;
        dynasm!(self.ops ; .arch x64
            ; mov r10d, r11d
            ; shr r10d, 12
            ; and r10d, (TLB_ENTRIES - 1) as i32
            ; xor r11, [r10 * 8 + tags]
            ; cmp r11, limit);
        let out = self.jcc_out(7);
        if at == At::Host {
            // The address once more.
            dynasm!(self.ops ; .arch x64 ; xor r11, [r10 * 8 + tags] ; mov r10, [r10 * 8 + addends] ; add r10, r11);
        } else {
            dynasm!(self.ops ; .arch x64 ; mov r10, [r10 * 8 + addends]);
        }
        out
    }

    fn there(&mut self, opcode: &[u8], wide: bool, reg: u8, at: At) {
        match at {
            At::Sum(base, disp) => self.reg_mem(opcode, wide, reg, base, Some((10, 1)), disp),
            At::Host => self.reg_mem(opcode, wide, reg, 10, None, 0),
            At::Beyond(disp) => self.reg_mem(opcode, wide, reg, 10, None, disp),
        }
    }
    /// to = the 64 bits there.
    pub fn load_at(&mut self, to: u8, at: At) {
        self.there(&[0x8b], true, to, at);
    }
    /// The 64 bits there = from.
    pub fn store_at(&mut self, at: At, from: u8) {
        self.there(&[0x89], true, from, at);
    }
    /// to = the 32 bits there, zero-extended.
    pub fn load_at32(&mut self, to: u8, at: At) {
        self.there(&[0x8b], false, to, at);
    }
    /// The 32 bits there = from.
    pub fn store_at32(&mut self, at: At, from: u8) {
        self.there(&[0x89], false, from, at);
    }
    /// to = the 16 bits there, zero-extended.
    pub fn load_at16(&mut self, to: u8, at: At) {
        self.there(&[0x0f, 0xb7], false, to, at);
    }
    /// to = the `bytes` bytes there, zero-extended.
    pub fn load_sized(&mut self, to: u8, at: At, bytes: usize) {
        match bytes {
            1 => self.there(&[0x0f, 0xb6], false, to, at),
            2 => self.load_at16(to, at),
            4 => self.load_at32(to, at),
            _ => self.load_at(to, at),
        }
    }
    /// The 16 bits there = from.
    pub fn store_at16(&mut self, at: At, from: u8) {
        // The operand size prefix comes before REX.
        self.ops.push(0x66);
        self.there(&[0x89], false, from, at);
    }

    /// Jumps to the label unless the `size` bytes from the address in r11 on lie on two pages. Clobbers r10 and flags.
    pub fn unless_across(&mut self, size: i32) -> DynamicLabel {
        let on_one = self.label();
        dynasm!(self.ops ; .arch x64 ; mov r10d, r11d ; and r10d, 0xfff ; cmp r10d, 0x1000 - size ; jbe =>on_one);
        on_one
    }

    /// Tells a helper which site a check belongs to.
    pub fn note_site(&mut self, site: i32) {
        let slot = self.at.site();
        dynasm!(self.ops ; .arch x64 ; mov QWORD [slot], site);
    }
    /// Goes to the routine that fills `site`, for the address in r11.
    pub fn site_miss(&mut self, site: i32, write: bool, constant: bool) {
        let slot = self.at.site();
        dynasm!(self.ops ; .arch x64 ; mov QWORD [slot], site);
        self.jmp_abs(self.shared.sites[Shared::site(self.user, write, constant)]);
    }
    /// r11 = the address again, after a check by the soft TLB that failed ([`Emit::tlb_check`]).
    pub fn unchecked(&mut self, write: bool) {
        let tags = if write { self.at.tlb_write(self.user) } else { self.at.tlb_read(self.user) };
        dynasm!(self.ops ; .arch x64 ; xor r11, [r10 * 8 + tags]);
    }

    /// The `bytes` bytes there = from.
    pub fn store_sized(&mut self, at: At, from: u8, bytes: usize) {
        match bytes {
            1 => self.there(&[0x88], false, from, at),
            2 => self.store_at16(at, from),
            4 => self.store_at32(at, from),
            _ => self.store_at(at, from),
        }
    }

    /// The routine that fills the site in the frame from the soft TLB, for the address in r11. Goes on at the site's `retry`, or
    /// at its `slow` if the TLB does not know, the site missed too often or cannot be noted. Clobbers r10, r11 and flags.
    pub(super) fn site_routine(&mut self, user: bool, write: bool, constant: bool) {
        let at = self.at;
        let tags = if write { at.tlb_write(user) } else { at.tlb_read(user) };
        let (addends, slot, save0, save1) = (at.tlb_addend(user), at.site(), at.save(0), at.save(1));
        let (low, high, save2, hard) = (at.site_end(0), at.site_end(1), at.save(2), at.hard());
        let period = at.first() + (offset_of!(First, sites) + offset_of!(Sites, period)) as i32;
        let guest = at.first() + (offset_of!(First, sites) + offset_of!(Sites, by_guest)) as i32;
        let guest_slots = guest + offset_of!(Notes::<GUEST_BUCKETS>, slots) as i32;
        let guest_count = guest + offset_of!(Notes::<GUEST_BUCKETS>, count) as i32;
        let guest_room = guest + offset_of!(Notes::<GUEST_BUCKETS>, room) as i32;
        let host = at.first() + (offset_of!(First, sites) + offset_of!(Sites, by_host)) as i32;
        let host_slots = host + offset_of!(Notes::<HOST_BUCKETS>, slots) as i32;
        let host_count = host + offset_of!(Notes::<HOST_BUCKETS>, count) as i32;
        let host_room = host + offset_of!(Notes::<HOST_BUCKETS>, room) as i32;
        dynasm!(self.ops ; .arch x64
            ; mov [save0], rax ; mov [save1], rcx
            ; mov r10, [slot]
            ; mov eax, r11d ; shr eax, 12 ; and eax, (TLB_ENTRIES - 1) as i32
            ; mov rcx, r11 ; xor rcx, [rax * 8 + tags]
            ; cmp rcx, 0xfff ; ja >slow
            ; cmp cx, [r10 + LIMIT] ; ja >slow
            ; mov al, BYTE [period] ; cmp [r10 + PERIOD], al ; je >counted
            ; mov [r10 + PERIOD], al ; mov BYTE [r10 + MISSES], PATIENCE as i8
            ; counted:
            ; sub BYTE [r10 + MISSES], 1 ; jbe >hard
            // On the list of its half, unless it is.
            ; test r11, r11 ; js >upper
            ; test BYTE [r10 + BITS], Site::LOW as i8 ; jne >listed
            ; or BYTE [r10 + BITS], Site::LOW as i8
            ; mov rcx, [low] ; mov [rcx], r10d ; add QWORD [low], 4
            ; jmp >listed
            ; upper:
            ; test BYTE [r10 + BITS], Site::HIGH as i8 ; jne >listed
            ; or BYTE [r10 + BITS], Site::HIGH as i8
            ; mov rcx, [high] ; mov [rcx], r10d ; add QWORD [high], 4
            ; listed:
            // Noted under the guest page, unless it is.
            ; mov rcx, r11 ; shr rcx, 38 ; and ecx, HALF_BUCKETS as i32
            ; mov eax, r11d ; shr eax, 12 ; and eax, HALF_BUCKETS as i32 - 1 ; or ecx, eax
            ; cmp [r10 + GUEST], cx ; je >noted
            ; mov eax, [rcx * 4 + guest_count] ; cmp eax, [rcx * 4 + guest_room] ; jae >hard
            ; inc DWORD [rcx * 4 + guest_count]
            ; mov [r10 + GUEST], cx
            ; mov rcx, [rcx * 8 + guest_slots] ; mov [rcx + rax * 4], r10d
            ; noted:
            ; mov eax, r11d ; shr eax, 12 ; and eax, (TLB_ENTRIES - 1) as i32
            ; mov rax, [rax * 8 + addends]);
        if write {
            dynasm!(self.ops ; .arch x64
                // And under the host page.
                ; lea rcx, [rax + r11] ; shr rcx, 12 ; and ecx, HOST_BUCKETS as i32 - 1
                ; cmp [r10 + HOST], cl ; je >noted
                ; mov [save2], rax
                ; mov eax, [rcx * 4 + host_count] ; cmp eax, [rcx * 4 + host_room] ; jae >hard
                ; inc DWORD [rcx * 4 + host_count]
                ; mov [r10 + HOST], cl
                ; mov rcx, [rcx * 8 + host_slots] ; mov [rcx + rax * 4], r10d
                ; mov rax, [save2]
                ; noted:);
        }
        if constant {
            dynasm!(self.ops ; .arch x64 ; add rax, r11);
        }
        dynasm!(self.ops ; .arch x64
            ; mov rcx, r11 ; and rcx, -4096
            ; mov [r10 + TAG], rcx ; mov [r10 + ADDEND], rax
            ; mov rax, [save0] ; mov rcx, [save1]
            ; mov r10d, [r10 + RETRY] ; jmp r10
            ; hard:
            ; mov QWORD [hard], 1
            ; slow:
            ; mov rax, [save0] ; mov rcx, [save1]
            ; mov r10d, [r10 + SLOW] ; jmp r10);
    }
}

const _: () = assert!(HALF_BUCKETS == 1 << 9, "bit 47 of an address, shifted by 38");
