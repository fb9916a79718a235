//! The out-of-line ways to the second level ([`crate::mmu::groups`]), in translated code: nothing of Rust runs if they hit.
//!
//! **In:** a linear address whose first-level check failed, or a guest address that the jump cache does not know. **Out:** the first level
//! filled, or the way to the helper. Invariant: what is filled in is what [`crate::mmu`] would fill in.
use super::Emit;
use crate::PageFlags;
use crate::mmu::first::{First, JUMP_ENTRIES, Jump, TLB_ENTRIES, TLB_FILLS, Tlb};
use crate::mmu::groups::{
    Entry, FAR_FACTOR, FAR_GROUP, FAR_JUMPS, FAR_SHIFT, FOLD, LARGE, LARGE_SHIFT, SMALL, UPPER_FACTOR, UPPER_JUMPS, USER,
    USER_INDEX,
};
use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, dynasm};
use std::mem::offset_of;

/// What a page may be for its stores to be invisible to Rust: known to be dirty, neither code nor table.
const LOOK: i32 = (PageFlags::CODE | PageFlags::TABLE | PageFlags::DIRTY) as i32;
const PLAIN: i32 = PageFlags::DIRTY as i32;

const _: () = assert!(size_of::<Entry>() == 64 && size_of::<Jump>() == 16 && USER == 2);

impl Emit {
    /// The second-level TLB for the access to the address in r11 that [`crate::frame::Frame::arg`] describes. Goes to `slow` with r11 as
    /// it was if it does not hit. Clobbers r10 and flags.
    pub(super) fn second_level(&mut self, slow: DynamicLabel) {
        let at = self.at;
        let (arg, cpl, ea, ret, hard) = (at.arg(), at.cpl(), at.ea(), at.ret(), at.hard());
        let (spill0, spill1) = (at.spill(0), at.spill(1));
        let first = at.first();
        let small = [0, 8].map(|i| first + offset_of!(First, small) as i32 + i);
        let large = [0, 8].map(|i| first + offset_of!(First, large) as i32 + i);
        let small_mask = SMALL.map(|n| (n as i32 - 1) << 6);
        let large_mask = LARGE.map(|n| (n as i32 - 1) << 6);
        let (fills, list) = (first + offset_of!(First, tlb_fills) as i32, first + offset_of!(First, tlb_list) as i32);
        let (addend, flags) = (offset_of!(Entry, addend) as i32, offset_of!(Entry, flags) as i32);
        let miss = self.label();
        let found = self.label();
        let done = self.label();
        dynasm!(self.ops ; .arch x64
            ; cmp QWORD [hard], 0 ; jne =>slow
            ; mov [spill0], rax ; mov [spill1], rcx
            // Across pages?
            ; movzx eax, WORD [arg] ; mov ecx, r11d ; and ecx, 0xfff ; add eax, ecx ; cmp eax, 0x1000 ; ja =>miss
            // rcx = 2 for user permissions, rax = the tag.
            ; movzx ecx, BYTE [cpl] ; inc ecx ; and ecx, 4 ; shr ecx, 1
            ; mov rax, r11 ; and rax, -0x1000 ; or rax, rcx
            // r10 = the small page's entry.
            ; shl ecx, USER_INDEX.trailing_zeros() as i8 + 5
            ; mov r10, r11 ; shr r10, 6 + FOLD as i8 ; xor ecx, r10d
            ; mov r10, r11 ; shr r10, 6
            ; test r11, r11 ; js >upper
            ; xor r10d, ecx
            ; and r10d, small_mask[0] ; add r10, [small[0]] ; jmp >probe
            ; upper:
            // Without what user permissions change.
            ; mov rcx, r11 ; shr rcx, 6 + FOLD as i8 ; xor r10d, ecx
            ; and r10d, small_mask[1] ; add r10, [small[1]]
            ; probe:
            // rcx = 1 for writes.
            ; movzx ecx, BYTE [arg + 2] ; and ecx, 1
            ; cmp rax, [r10 + rcx * 8] ; jne >try_large
            ; test ecx, ecx ; je =>found
            ; mov rcx, [r10 + flags]
            ; checked:
            ; mov al, [rcx] ; and al, LOOK as i8 ; cmp al, PLAIN as i8 ; jne =>miss
            ; or BYTE [rcx], PageFlags::WRITE_CACHED as i8
            ; mov ecx, 1 ; jmp =>found
            // r10 = the large page's entry, rax = its tag.
            ; try_large:
            ; and eax, USER as i32
            ; mov rcx, r11 ; and rcx, -(1 << LARGE_SHIFT) ; or rax, rcx
            ; mov r10, r11 ; shr r10, LARGE_SHIFT as i8 - 6
            ; test r11, r11 ; js >upper
            ; and r10d, large_mask[0] ; add r10, [large[0]] ; jmp >probe
            ; upper:
            ; and r10d, large_mask[1] ; add r10, [large[1]]
            ; probe:
            ; movzx ecx, BYTE [arg + 2] ; and ecx, 1
            ; cmp rax, [r10 + rcx * 8] ; jne =>miss
            ; test ecx, ecx ; je =>found
            ; mov ecx, r11d ; shr ecx, 12 ; and ecx, (1 << (LARGE_SHIFT - 12)) - 1 ; add rcx, [r10 + flags]
            ; jmp <checked);
        // r10 = the entry, ecx = 1 for writes: into the first level.
        self.bind(found);
        dynasm!(self.ops ; .arch x64 ; mov r10, [r10 + addend] ; cmp BYTE [cpl], 3 ; je >user);
        for user in [false, true] {
            if user {
                dynasm!(self.ops ; .arch x64 ; user:);
            }
            let (read, write, add) = (at.tlb_read(user), at.tlb_write(user), at.tlb_addend(user));
            dynasm!(self.ops ; .arch x64
                ; mov rax, r11 ; and rax, -0x1000
                ; shr r11d, 12 ; and r11d, TLB_ENTRIES as i32 - 1
                ; mov [r11 * 8 + add], r10
                ; mov [r11 * 8 + read], rax
                ; dec ecx ; je >store
                // A write entry of this page may stay, one of another must go.
                ; cmp [r11 * 8 + write], rax ; je >list
                ; mov ecx, r11d ; xor ecx, 1 ; shl ecx, 12 ; mov [r11 * 8 + write], rcx ; jmp >list
                ; store:
                ; mov [r11 * 8 + write], rax
                ; list:
                ; test rax, rax ; js =>done
                ; mov ecx, [fills] ; cmp ecx, TLB_FILLS as i32 - 1 ; ja =>done);
            if user {
                dynasm!(self.ops ; .arch x64 ; or r11d, 1 << 9);
            }
            dynasm!(self.ops ; .arch x64 ; mov [rcx * 2 + list], r11w ; inc ecx ; mov [fills], rcx);
            if !user {
                self.jmp(done);
            }
        }
        self.bind(done);
        dynasm!(self.ops ; .arch x64
            ; mov rax, [spill0] ; mov rcx, [spill1] ; mov r11, [ea] ; jmp QWORD [ret]);
        self.bind(miss);
        dynasm!(self.ops ; .arch x64 ; mov rax, [spill0] ; mov rcx, [spill1] ; mov r11, [ea]);
        self.jmp(slow);
    }

    /// Goes on at the address in r11 by the second level's jumps: the current element's for user code of the lower half, those that are
    /// shared for kernel code of the upper half. Falls through with r11 as it was if they do not know it. Clobbers r10 and flags.
    pub(super) fn far_jump(&mut self) {
        let at = self.at;
        let (cpl, spill0) = (at.cpl(), at.spill(0));
        let first = at.first();
        let other = self.label();
        let miss = self.label();
        dynasm!(self.ops ; .arch x64 ; cmp BYTE [cpl], 3 ; je >user);
        for user in [false, true] {
            let half = !user as i32;
            let fills = first + offset_of!(First, jump_fills) as i32 + 8 * half;
            let list = first + offset_of!(First, jump_list) as i32 + 2 * JUMP_ENTRIES as i32 * half;
            let far = first + offset_of!(First, far) as i32 + 8 * half;
            let jumps = at.jumps(user);
            if user {
                dynasm!(self.ops ; .arch x64
                    ; user: ; test r11, r11 ; js =>miss
                    ; mov [spill0], rax
                    ; imul r10d, r11d, FAR_FACTOR as i32 ; shr r10d, FAR_SHIFT as i8 ; and r10d, FAR_GROUP as i32 - 1
                    ; mov eax, r11d ; shr eax, FAR_SHIFT as i8 ; and eax, -(FAR_GROUP as i32) ; or r10d, eax
                    ; and r10d, FAR_JUMPS as i32 - 1);
            } else {
                dynasm!(self.ops ; .arch x64
                    ; test r11, r11 ; jns =>miss
                    ; mov [spill0], rax
                    ; imul r10d, r11d, UPPER_FACTOR as i32
                    ; shr r10d, 32 - UPPER_JUMPS.trailing_zeros() as i8);
            }
            dynasm!(self.ops ; .arch x64
                ; shl r10d, 4 ; mov eax, r10d ; add r10, [far]
                // There or in the place beside it.
                ; cmp [r10], r11 ; je >found
                ; xor eax, size_of::<Jump>() as i32 ; add rax, [far] ; mov r10, rax
                ; cmp [r10], r11 ; jne =>other
                ; found: ; mov r10, [r10 + 8]
                // Into the first level.
                ; mov eax, r11d ; and eax, JUMP_ENTRIES as i32 - 1 ; shl eax, 4
                ; mov [rax + jumps], r11 ; mov [rax + jumps + 8], r10
                ; shr eax, 4);
            if user {
                dynasm!(self.ops ; .arch x64 ; or eax, 1 << 14);
            }
            dynasm!(self.ops ; .arch x64
                ; mov r11d, eax
                ; mov eax, [fills] ; cmp eax, JUMP_ENTRIES as i32 - 1 ; ja >full
                ; mov [rax * 2 + list], r11w ; inc eax ; mov [fills], rax
                ; full:
                ; mov rax, [spill0] ; jmp r10);
        }
        self.bind(other);
        dynasm!(self.ops ; .arch x64 ; mov rax, [spill0]);
        self.bind(miss);
    }
}

const _: () = assert!(size_of::<Tlb>() == 3 * 8 * TLB_ENTRIES);
const _: () = assert!(JUMP_ENTRIES == 1 << 14);
