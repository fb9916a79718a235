//! The low area: everything translated code addresses directly, below 2 GiB, so that an address is a plain 32-bit
//! displacement and no register is spent on it. One area a machine; its addresses are baked into that machine's code.
//!
//! Layout: [`Frame`], the sites with their lists ([`crate::sites`]), the code cache. Invariant: the area never moves and is unmapped only when the engine is dropped.
use crate::CpuState;
pub use crate::mmu::first::JUMP_ENTRIES;
use crate::mmu::first::{First, Jump, Tlb};
use crate::sites::Sites;
use std::mem::offset_of;

/// Memory aligned as no access of a guest asks for more.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; 768]);

/// Whole YMM registers, aligned for translated code.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Vectors(pub [[u8; 32]; 16]);

/// Groups of accesses with an index in a trace at most.
pub const BASES: usize = 16;

/// What translated code shares with Rust.
#[repr(C, align(64))]
pub struct Frame {
    /// Architectural state; `rflags` holds all but the six status flags while code runs, those are in `flags`.
    pub st: CpuState,
    /// The YMM registers while the engine runs a CPU model with AVX. `st.fx` and `st.ymm_high` get them when somebody looks
    /// (`engine::vectors`).
    pub vectors: Vectors,
    /// Status flags as LAHF and SETO AL leave them in AX.
    pub flags: u64,
    /// Instructions left until the stop; in r15 while code runs.
    pub budget: u64,
    /// Rust's stack pointer while code runs.
    pub host_rsp: u64,
    /// Where a helper returns to, in translated code.
    pub ret: u64,
    /// A helper's argument: index of the instruction in its block and what it wants.
    pub arg: u64,
    /// Linear address of a memory access on its way to a helper.
    pub ea: u64,
    /// Host address minus linear address, a helper's answer (single-instruction blocks).
    pub addend: u64,
    /// Scratch for code sequences.
    pub tmp: [u64; 4],
    /// Operands kept to make flags again; two, for one more may be kept while the last one is still asked for; and what INC or DEC left in memory.
    pub kept: [u64; 3],
    /// Host addresses that groups of accesses with an index go out from.
    pub bases: [u64; BASES],
    /// Registers of the routine that fills sites.
    pub save: [u64; 3],
    /// The site that a failed check belongs to, or 0.
    pub site: u64,
    /// Not 0 if Rust has to see to that site.
    pub hard: u64,
    /// Host code that makes the flags which the frame is owed ([`crate::translate`]), or 0.
    pub owed: u64,
    /// Where that code goes back to; 0 if nobody asked for it.
    pub owed_return: u64,
    /// Why code was left ([`exit`]).
    pub exit: u64,
    /// What goes with `exit`.
    pub exit_arg: u64,
    /// The host fault that was caught in code: trap number, address of the code, host flags.
    pub fault_trap: u64,
    #[allow(missing_docs)]
    pub fault_pc: u64,
    #[allow(missing_docs)]
    pub fault_flags: u64,
    /// MXCSR of Rust code.
    pub host_mxcsr: u32,
    /// MXCSR for single-instruction detours.
    pub pad: u32,
    /// The engine, for helpers.
    pub core: *mut crate::engine::Core,
    /// Stand-in for memory that an instruction cannot access in place (two pages, a device, a watched page).
    pub bounce: Bounce,
    /// Soft TLBs and jump caches.
    pub first: First,
    /// An interrupt waits for a place where it can be taken (0 or 1).
    pub window: u64,
    /// The mode, but for USER, of the blocks that each of the jump caches is for: kernel, user.
    pub jump_kinds: [u16; 4],
    /// Scratch of the shared routines.
    pub spill: [u64; 4],
    /// For RDTSC: what the budget is taken from to give the instructions since the counter was `tsc`; 0 if nobody knows.
    pub tsc_origin: u64,
    /// See `tsc_origin`.
    pub tsc: u64,
    /// What each instruction adds to `tsc`, in thousandths.
    pub tsc_thousandths: u64,
}

/// Values of [`Frame::exit`].
#[allow(missing_docs)]
pub mod exit {
    /// `st.rip` says where to go on.
    pub const LOOKUP: u64 = 1;
    /// A direct jump that is not linked yet; `exit_arg` is its slot.
    pub const LINK: u64 = 2;
    /// Too little budget for the block `exit_arg`; nothing of it ran.
    pub const BUDGET: u64 = 3;
    /// A helper decided; `st.rip` and `budget` are exact.
    pub const HELPER: u64 = 4;
    /// The instruction at `st.rip` must run alone; `st.rip` and `budget` are exact.
    pub const ALONE: u64 = 5;
    /// The host faulted in translated code.
    pub const HOST_FAULT: u64 = 6;
    /// As `ALONE`, after a helper tried.
    pub const BAIL: u64 = 7;
    /// After a host fault: the frame's flags are the guest's now.
    pub const FLAGS: u64 = 8;
    /// The block `exit_arg` has run often enough to become a trace; nothing of it ran this time.
    pub const HOT: u64 = 9;
}

/// Field addresses for the emitter.
macro_rules! field {
    ($self:expr, $($f:tt)+) => { ($self + offset_of!(Frame, $($f)+) as i32) };
}

/// The frame's address with named offsets.
#[derive(Clone, Copy)]
pub struct FrameAt(pub i32);

#[allow(missing_docs)]
impl FrameAt {
    pub fn gpr(self, n: usize) -> i32 {
        field!(self.0, st.gpr) + 8 * n as i32
    }
    pub fn rip(self) -> i32 {
        field!(self.0, st.rip)
    }
    pub fn rflags(self) -> i32 {
        field!(self.0, st.rflags)
    }
    pub fn seg_base(self, n: usize) -> i32 {
        field!(self.0, st.seg) + (size_of::<crate::Segment>() * n + offset_of!(crate::Segment, base)) as i32
    }
    pub fn fx(self) -> i32 {
        field!(self.0, st.fx)
    }
    pub fn vectors(self) -> i32 {
        field!(self.0, vectors)
    }
    pub fn flags(self) -> i32 {
        field!(self.0, flags)
    }
    pub fn budget(self) -> i32 {
        field!(self.0, budget)
    }
    pub fn host_rsp(self) -> i32 {
        field!(self.0, host_rsp)
    }
    pub fn ret(self) -> i32 {
        field!(self.0, ret)
    }
    pub fn arg(self) -> i32 {
        field!(self.0, arg)
    }
    pub fn ea(self) -> i32 {
        field!(self.0, ea)
    }
    pub fn addend(self) -> i32 {
        field!(self.0, addend)
    }
    pub fn tmp(self, n: usize) -> i32 {
        field!(self.0, tmp) + 8 * n as i32
    }
    pub fn save(self, n: usize) -> i32 {
        field!(self.0, save) + 8 * n as i32
    }
    pub fn site(self) -> i32 {
        field!(self.0, site)
    }
    pub fn kept(self, n: usize) -> i32 {
        field!(self.0, kept) + 8 * n as i32
    }
    pub fn base(self, n: usize) -> i32 {
        field!(self.0, bases) + 8 * n as i32
    }
    pub fn owed(self) -> i32 {
        field!(self.0, owed)
    }
    pub fn owed_return(self) -> i32 {
        field!(self.0, owed_return)
    }
    pub fn hard(self) -> i32 {
        field!(self.0, hard)
    }
    pub fn site_end(self, half: usize) -> i32 {
        field!(self.0, first.sites.ends) + 8 * half as i32
    }
    pub fn exit(self) -> i32 {
        field!(self.0, exit)
    }
    pub fn exit_arg(self) -> i32 {
        field!(self.0, exit_arg)
    }
    pub fn host_mxcsr(self) -> i32 {
        field!(self.0, host_mxcsr)
    }
    pub fn tlb_read(self, user: bool) -> i32 {
        field!(self.0, first.tlb) + (user as usize * size_of::<Tlb>() + offset_of!(Tlb, read)) as i32
    }
    pub fn tlb_write(self, user: bool) -> i32 {
        field!(self.0, first.tlb) + (user as usize * size_of::<Tlb>() + offset_of!(Tlb, write)) as i32
    }
    pub fn tlb_addend(self, user: bool) -> i32 {
        field!(self.0, first.tlb) + (user as usize * size_of::<Tlb>() + offset_of!(Tlb, addend)) as i32
    }
    pub fn state(self) -> i32 {
        field!(self.0, st)
    }
    pub fn jump_kind(self, user: bool) -> i32 {
        field!(self.0, jump_kinds) + 2 * user as i32
    }
    pub fn window(self) -> i32 {
        field!(self.0, window)
    }
    pub fn first(self) -> i32 {
        field!(self.0, first)
    }
    pub fn cpl(self) -> i32 {
        field!(self.0, st.cpl)
    }
    pub fn spill(self, n: usize) -> i32 {
        field!(self.0, spill) + 8 * n as i32
    }
    pub fn tsc_origin(self) -> i32 {
        field!(self.0, tsc_origin)
    }
    pub fn tsc(self) -> i32 {
        field!(self.0, tsc)
    }
    pub fn tsc_thousandths(self) -> i32 {
        field!(self.0, tsc_thousandths)
    }
    pub fn jumps(self, user: bool) -> i32 {
        field!(self.0, first.jumps) + (user as usize * JUMP_ENTRIES * size_of::<Jump>()) as i32
    }
}

/// An owned low area.
pub struct LowArea {
    base: *mut u8,
    len: usize,
    sites: usize,
}

// SAFETY: plain memory, used by one thread at a time (the engine is not Sync).
unsafe impl Send for LowArea {}

impl LowArea {
    /// Maps an area with `code` bytes of code cache and `sites` sites.
    ///
    /// # Panics
    /// If the host has no memory left below 2 GiB, or forbids memory that is writable and executable.
    pub fn new(code: usize, sites: usize) -> Self {
        let len = (size_of::<Frame>() + Sites::bytes(sites) + 4096 + code).next_multiple_of(4096);
        let map = |at: usize, how: libc::c_int| {
            let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | how;
            // SAFETY: a fresh anonymous mapping, which replaces none.
            let base = unsafe { libc::mmap(at as *mut libc::c_void, len, access, flags, -1, 0) };
            (base != libc::MAP_FAILED && (base as usize + len) < 1 << 31).then_some(base)
        };
        // MAP_32BIT looks from 1 GiB to 2 GiB only. Where machines share a process there may be none left there.
        let below = || (1 << 24..1 << 30).step_by(1 << 24).find_map(|at| map(at, libc::MAP_FIXED_NOREPLACE));
        let base = map(0, libc::MAP_32BIT).or_else(below);
        let base = base
            .unwrap_or_else(|| panic!("no {len} bytes of executable memory below 2 GiB: {}", std::io::Error::last_os_error()));
        // Large pages for code and sites: both are spread wide, and small ones would cost a miss of the host's TLB at every turn.
        // SAFETY: mapped just now; the advice changes nothing that anybody can see.
        unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
        Self { base: base.cast(), len, sites }
    }
    /// The frame at its start. Zeroed memory at first, which is valid for every field.
    pub fn frame(&self) -> *mut Frame {
        self.base.cast()
    }
    /// Where the sites and their lists are, and how many sites there is room for.
    pub fn sites(&self) -> (*mut u8, usize) {
        (self.base.wrapping_add(size_of::<Frame>()), self.sites)
    }
    /// Host address and length of the code cache.
    pub fn code(&self) -> (usize, usize) {
        let start = (self.base as usize + size_of::<Frame>() + Sites::bytes(self.sites)).next_multiple_of(4096);
        (start, self.base as usize + self.len - start)
    }
}

impl Drop for LowArea {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and the engine that used it is gone.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_that_share_a_process_find_room() {
        // More than there is room for above 1 GiB.
        let areas: Vec<LowArea> = (0..6).map(|_| LowArea::new(192 << 20, 1000)).collect();
        assert!(areas.iter().any(|area| (area.frame() as usize) < 1 << 30));
        for (code, len) in areas.iter().map(LowArea::code) {
            assert!(code + len < 1 << 31);
        }
    }
}
