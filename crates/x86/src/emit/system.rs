//! System instructions that translated code does by itself, in the common case.
//!
//! **In:** the frame's architectural state; status flags in the frame. **Out:** the state after the instruction, exactly as [`crate::sys`] makes
//! it, or a jump to `slow` with nothing changed. Invariant: kernel code here has privilege level 0 (code of levels 1 and 2 runs one
//! instruction at a time), and TF, RF and the interrupt shadow are clear, or it would not be running.
use super::Emit;
use crate::Segment;
use crate::state::{CpuState, cr4, efer, rflags, seg};
use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, dynasm};
use std::mem::offset_of;

/// Flags that POPF and SYSRET load at privilege level 0, but for the status flags and TF (which is not for here).
const LOADED: u64 = rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
/// Flags that POPF loads in user code with IOPL 0.
const LOADED_USER: u64 = rflags::DF | rflags::NT | rflags::AC | rflags::ID;
/// The second word of a flat segment without its selector: limit and attributes.
const fn flat(attributes: u64) -> i64 {
    (0xffff_ffff | attributes << 48) as i64
}

macro_rules! state {
    ($self:ident, $($f:tt)+) => { $self.at.state() + offset_of!(CpuState, $($f)+) as i32 };
}

impl Emit {
    /// CLI. Clobbers flags.
    pub fn interrupts_off(&mut self) {
        let flags = self.at.rflags();
        dynasm!(self.ops ; .arch x64 ; and DWORD [flags], !(rflags::IF as i32));
    }
    /// STI, if the next instruction is in the same block and no interrupt waits: then nobody can see the shadow. Clobbers flags.
    pub fn interrupts_on(&mut self, slow: DynamicLabel) {
        let (flags, window) = (self.at.rflags(), self.at.window());
        dynasm!(self.ops ; .arch x64 ; cmp QWORD [window], 0 ; jne =>slow ; or DWORD [flags], rflags::IF as i32);
    }
    /// r11 = RFLAGS as PUSHF and SYSCALL store it. Clobbers r10 and flags.
    pub fn flags_image(&mut self) {
        let (rest, status) = (self.at.rflags(), self.at.flags());
        dynasm!(self.ops ; .arch x64
            ; mov r11d, [rest] ; and r11d, !((rflags::STATUS | rflags::RF | rflags::VM) as i32)
            ; movzx r10d, BYTE [status + 1] ; or r11d, r10d
            ; movzx r10d, BYTE [status] ; shl r10d, 11 ; or r11d, r10d);
    }
    /// Loads the flags POPF (`user`: at level 3) and SYSRET do from the image in r11. Clobbers r10, r11 and flags.
    pub fn load_flags(&mut self, user: bool, slow: DynamicLabel) {
        let (rest, status, window) = (self.at.rflags(), self.at.flags(), self.at.window());
        dynasm!(self.ops ; .arch x64 ; test r11d, rflags::TF as i32 ; jne =>slow);
        if user {
            dynasm!(self.ops ; .arch x64 ; test DWORD [rest], rflags::IOPL as i32 ; jne =>slow);
        } else {
            // Interrupts that may be let in now have to be taken.
            dynasm!(self.ops ; .arch x64
                ; cmp QWORD [window], 0 ; je >none ; test r11d, rflags::IF as i32 ; jne =>slow ; none:);
        }
        dynasm!(self.ops ; .arch x64
            ; mov r10d, r11d ; and r10d, 0xd5 ; or r10d, 2 ; mov [status + 1], r10b
            ; mov r10d, r11d ; shr r10d, 11 ; and r10d, 1 ; mov [status], r10b);
        if user {
            dynasm!(self.ops ; .arch x64
                ; and r11d, LOADED_USER as i32
                ; mov r10d, [rest] ; and r10d, (rflags::IF | rflags::IOPL) as i32 ; or r11d, r10d);
        } else {
            dynasm!(self.ops ; .arch x64 ; and r11d, LOADED as i32);
        }
        dynasm!(self.ops ; .arch x64 ; or r11d, rflags::ONE as i32 ; mov [rest], r11);
    }
    /// SWAPGS. No flags.
    pub fn swap_gs(&mut self) {
        let (base, other) = (self.at.seg_base(seg::GS), state!(self, kernel_gs_base));
        dynasm!(self.ops ; .arch x64 ; mov r10, [base] ; mov r11, [other] ; mov [base], r11 ; mov [other], r10);
    }

    /// RDTSC and (`aux`) RDTSCP of an instruction that has `unused` instructions of its block before it, itself included. Clobbers flags.
    pub fn time_stamp(&mut self, unused: i32, user: bool, aux: bool, slow: DynamicLabel) {
        let (origin, base, rate) = (self.at.tsc_origin(), self.at.tsc(), self.at.tsc_thousandths());
        let (offset, control, tsc_aux) = (state!(self, tsc_offset), state!(self, cr4), state!(self, tsc_aux));
        if user {
            dynasm!(self.ops ; .arch x64 ; test DWORD [control], cr4::TSD as i32 ; jne =>slow);
        }
        // What is overwritten on the way to `slow` is what the instruction overwrites.
        dynasm!(self.ops ; .arch x64
            ; lea r10, [r15 + unused]
            ; mov rax, [origin] ; sub rax, r10 ; jb =>slow
            ; mul QWORD [rate]
            ; mov r10d, 1000 ; cmp rdx, r10 ; jae =>slow
            ; div r10
            ; add rax, [base] ; jc =>slow
            ; add rax, [offset]
            ; mov rdx, rax ; shr rdx, 32 ; mov eax, eax);
        if aux {
            dynasm!(self.ops ; .arch x64 ; mov ecx, [tsc_aux]);
        }
    }
    /// r11 = the selector of segment register `segment`. No flags.
    pub fn selector(&mut self, segment: usize) {
        let at = self.at.seg_base(segment) + offset_of!(Segment, selector) as i32 - offset_of!(Segment, base) as i32;
        dynasm!(self.ops ; .arch x64 ; movzx r11d, WORD [at]);
    }
    /// Goes to `slow` unless a string instruction goes up and, with REP (`done`: where it goes on after no iteration), all of it lies in
    /// one page for each of the registers. Clobbers r10 and flags.
    pub fn string_fits(&mut self, registers: &[u8], size: usize, done: Option<DynamicLabel>, slow: DynamicLabel) {
        let rflags = self.at.rflags();
        dynasm!(self.ops ; .arch x64 ; test DWORD [rflags], rflags::DF as i32 ; jne =>slow);
        let Some(done) = done else { return };
        dynasm!(self.ops ; .arch x64 ; test rcx, rcx ; je =>done ; cmp rcx, 0x1000 / size as i32 ; ja =>slow);
        for &r in registers {
            dynasm!(self.ops ; .arch x64 ; mov r10d, Rd(r) ; and r10d, 0xfff);
            match size {
                1 => dynasm!(self.ops ; .arch x64 ; add r10d, ecx),
                2 => dynasm!(self.ops ; .arch x64 ; lea r10d, [r10 + rcx * 2]),
                4 => dynasm!(self.ops ; .arch x64 ; lea r10d, [r10 + rcx * 4]),
                _ => dynasm!(self.ops ; .arch x64 ; lea r10d, [r10 + rcx * 8]),
            }
            dynasm!(self.ops ; .arch x64 ; cmp r10d, 0x1000 ; ja =>slow);
        }
    }
    /// The instruction itself, on the host's addresses: RDI's is r10 more than the guest's, RSI's (`copy`) r11. Clobbers flags.
    pub fn string(&mut self, size: usize, copy: bool, rep: bool) {
        self.add_no_flags(7, 10);
        if copy {
            self.add_no_flags(6, 11);
        }
        if size == 2 {
            self.ops.push(0x66);
        }
        if rep {
            self.ops.push(0xf3);
        }
        if size == 8 {
            self.ops.push(0x48);
        }
        self.ops.push(if copy { 0xa4 } else { 0xaa } | (size > 1) as u8);
        self.take_off(7, 10);
        if copy {
            self.take_off(6, 11);
        }
    }
    /// sub reg, other. Clobbers flags.
    pub fn take_off(&mut self, reg: u8, other: u8) {
        dynasm!(self.ops ; .arch x64 ; sub Rq(reg), Rq(other));
    }

    /// Loads CS and SS with flat segments at privilege level `dpl`; r10d is CS's selector, r11d SS's. Clobbers both and flags.
    fn flat_segments(&mut self, dpl: u8) {
        let (code_at, stack_at, cpl) = (self.at.seg_base(seg::CS), self.at.seg_base(seg::SS), self.at.cpl());
        let level = (dpl as u64) << 5;
        let (code, data, spill) = (flat(0x809b | level | Segment::LONG as u64), flat(0xc093 | level), self.at.spill(0));
        let rest = offset_of!(Segment, limit) as i32;
        dynasm!(self.ops ; .arch x64
            ; mov QWORD [code_at], 0 ; mov QWORD [stack_at], 0
            ; mov [spill], r11
            ; shl r10, 32 ; mov r11, QWORD code ; or r10, r11 ; mov [code_at + rest], r10
            ; mov r10, [spill]
            ; shl r10, 32 ; mov r11, QWORD data ; or r10, r11 ; mov [stack_at + rest], r10
            ; mov BYTE [cpl], dpl as i8);
    }
    /// SYSCALL from 64-bit user code: goes on at LSTAR. `next` is the following instruction's address. Clobbers everything it may.
    pub fn syscall(&mut self, next: u64, slow: DynamicLabel) {
        let (efer, star, lstar, sfmask) = (state!(self, efer), state!(self, star), state!(self, lstar), state!(self, sfmask));
        let (rest, status, spill) = (self.at.rflags(), self.at.flags(), self.at.spill(0));
        dynasm!(self.ops ; .arch x64 ; test BYTE [efer], efer::SCE as i8 ; je =>slow);
        self.flags_image();
        self.store(11, 11);
        self.imm(1, next);
        // The flags that the mask leaves.
        dynasm!(self.ops ; .arch x64
            ; mov r10d, [sfmask] ; not r10d ; and r11d, r10d
            ; mov [spill], r11
            ; mov r10d, r11d ; and r10d, 0xd5 ; or r10d, 2 ; mov [status + 1], r10b
            ; mov r10d, r11d ; shr r10d, 11 ; and r10d, 1 ; mov [status], r10b
            ; mov r11, [spill] ; or r11d, rflags::ONE as i32 ; mov [rest], r11
            ; mov r10d, [star + 4] ; and r10d, 0xfffc
            ; lea r11d, [r10 + 8] ; movzx r11d, r11w);
        self.flat_segments(0);
        dynasm!(self.ops ; .arch x64 ; mov r11, [lstar]);
        self.jump_cache_of(false);
    }
    /// SYSRET to 64-bit code: goes on at RCX. Clobbers everything it may.
    pub fn sysret(&mut self, slow: DynamicLabel) {
        let (efer, star) = (state!(self, efer), state!(self, star));
        dynasm!(self.ops ; .arch x64
            ; test BYTE [efer], efer::SCE as i8 ; je =>slow
            // Canonical?
            ; mov r10, rcx ; shl r10, 16 ; sar r10, 16 ; cmp r10, rcx ; jne =>slow);
        self.load(11, 11);
        self.load_flags(false, slow);
        dynasm!(self.ops ; .arch x64
            ; movzx r11d, WORD [star + 6]
            ; lea r10d, [r11 + 16] ; or r10d, 3 ; movzx r10d, r10w
            ; lea r11d, [r11 + 8] ; or r11d, 3 ; movzx r11d, r11w);
        self.flat_segments(3);
        dynasm!(self.ops ; .arch x64 ; mov r11, rcx);
        self.jump_cache_of(true);
    }
    /// Goes to `slow` unless the jump cache of user code (or not) is for blocks of this kind of mode. Clobbers flags.
    pub fn needs_jumps_of(&mut self, user: bool, kind: u16, slow: DynamicLabel) {
        let at = self.at.jump_kind(user);
        dynasm!(self.ops ; .arch x64 ; cmp WORD [at], kind as i16 ; jne =>slow);
    }
    /// Goes on at the guest address in r11, in user code or not. Clobbers flags.
    fn jump_cache_of(&mut self, user: bool) {
        let was = std::mem::replace(&mut self.user, user);
        self.jump_cache();
        self.user = was;
    }
}

const _: () = assert!(offset_of!(Segment, selector) == 12 && offset_of!(Segment, attributes) == 14);
