//! What the silicon cannot execute for a guest: instructions that touch privileged state, and the delivery of exceptions and
//! interrupts.
//!
//! **In:** a decoded instruction and the context [`Cx`]. **Out:** the state after it, or an [`Exception`] with the state
//! untouched.
//!
//! **Invariant:** an instruction either retires completely or leaves no trace (string instructions: see `docs/positions.md`).
//! Reading and checking therefore comes first in every function here, changing the state last.
//!
//! One submodule per idea: [`string`] (REP and friends), [`stack`] (flags, ENTER, segment pushes), [`segments`] (descriptors
//! and what looks at them), [`transfer`] (far jumps, IRET, SYSCALL), [`near`] (near branches and the stack, where 32-bit segments have
//! limits), [`decimal`] (what exists outside 64-bit code only), [`delivery`] (the IDT), [`legacy`] (the IDT and the gates of protected
//! mode), [`control`] (control and debug registers), [`msr`], [`io`], [`fpu`] (images of the FPU), [`xsave`] (XSAVE areas and XCR0),
//! [`vector`] (vector accesses element by element), [`offered`] (which instructions exist at all).
//!
//! References: APM vol. 2 and 3, SDM vol. 2. Where the makers differ, the CPU models here are AMD's, with the exceptions noted at the
//! functions.
use crate::mmu::{Mmu, Place};
use crate::segmentation;
use crate::state::{Segment, gpr, seg};
use crate::stats::SystemStats;
use crate::{Bus, CpuState, Exception, Features, PAGE_SIZE, Position};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

mod control;
mod decimal;
mod delivery;
mod fpu;
mod io;
mod legacy;
mod msr;
mod near;
mod offered;
mod pcid;
mod segments;
mod stack;
mod string;
mod transfer;
mod vector;
mod xsave;

#[cfg(test)]
mod hostile;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use control::{CR0_ALLOWED, CR3_KEPT_LEGACY, CR4_ALLOWED, DR6_FIXED, DR6_WRITABLE, DR7_FIXED, DR7_WRITABLE};
pub use delivery::{Delivery, deliver_exception, deliver_interrupt};
pub(crate) use fpu::{MXCSR_MASK, settle as settle_fx};
pub(crate) use msr::{EFER_ALLOWED, MISC_ENABLE_ALLOWED, mtrr_def_type_ok, mtrr_fixed_ok, mtrr_var_ok, pat_ok};
pub use near::handles as handles_near;
pub(crate) use pcid::cr3_kept;
pub(crate) use xsave::xcr0_ok;

/// What an instruction or a delivery works on.
pub struct Cx<'a> {
    /// Architectural state.
    pub st: &'a mut CpuState,
    /// Memory.
    pub mmu: &'a mut Mmu,
    /// All that is not RAM.
    pub bus: &'a mut dyn Bus,
    /// Position before the instruction retires.
    pub position: Position,
    /// The CPU model.
    pub model: &'a crate::CpuModel,
    /// Set by what this engine does not do: the machine ends with this as its reason, whatever else was answered.
    pub unsupported: Option<&'static str>,
    /// Instructions by kind.
    pub counts: &'a mut SystemStats,
}

/// How execution goes on after an instruction that retired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// At the following instruction; nothing but general registers, flags (not TF, not IF from 0 to 1) and FPU changed.
    Next,
    /// At the following instruction, but privileged state changed (mode, paging, interrupt flag, segment ...): look at everything afresh.
    Sync,
    /// `st.rip` was set (jump, return, or a REP step that goes on at the same instruction); look at everything afresh.
    Jump,
}

/// Whether [`execute`] is to be asked for this instruction on a model with these features. What it does not handle, the silicon executes.
pub fn handles(insn: &Instruction, features: Features) -> bool {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Mov => {
            let system = |r: Register| r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr();
            system(insn.op0_register()) || system(insn.op1_register())
        }
        M::Push | M::Pop => insn.op0_register().is_segment_register(),
        M::Call | M::Jmp => transfer::is_far(insn),
        _ => kind(insn).is_some() || !offered::exists(insn, features),
    }
}

/// The module an instruction belongs to, for those whose mnemonic decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    String,
    Stack,
    Segments,
    Transfer,
    Control,
    Fpu,
    Xsave,
    Vector,
    Io,
    Near,
    Decimal,
}

fn kind(insn: &Instruction) -> Option<Kind> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Movsb | M::Movsw | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq => Kind::String,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq | M::Cmpsb | M::Cmpsw | M::Cmpsq => Kind::String,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => Kind::String,
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => Kind::String,
        // These two mnemonics are also SSE2's.
        M::Movsd | M::Cmpsd if string::is_string(insn) => Kind::String,
        M::Pushf | M::Pushfd | M::Pushfq | M::Popf | M::Popfd | M::Popfq | M::Enter | M::Xlatb => Kind::Stack,
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss | M::Lar | M::Lsl | M::Verr | M::Verw => Kind::Segments,
        M::Lldt | M::Ltr | M::Sldt | M::Str | M::Lgdt | M::Lidt | M::Sgdt | M::Sidt | M::Swapgs => Kind::Segments,
        M::Int | M::Int1 | M::Int3 | M::Into | M::Iret | M::Iretd | M::Iretq | M::Retf => Kind::Transfer,
        M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq => Kind::Transfer,
        M::Smsw | M::Lmsw | M::Clts | M::Invlpg | M::Invd | M::Wbinvd | M::Wbnoinvd | M::Hlt => Kind::Control,
        M::Invpcid | M::Cli | M::Sti | M::Rdmsr | M::Wrmsr | M::Cpuid | M::Rdtsc | M::Rdtscp => Kind::Control,
        M::Rdsspd | M::Rdsspq => Kind::Control,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Fnstenv | M::Fnsave | M::Fstenv | M::Fsave => Kind::Fpu,
        M::Fldenv | M::Frstor | M::Ldmxcsr | M::Maskmovq | M::Maskmovdqu => Kind::Fpu,
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 | M::Xrstor | M::Xrstor64 => Kind::Xsave,
        M::Xgetbv | M::Xsetbv => Kind::Xsave,
        M::Vldmxcsr | M::Vmaskmovdqu | M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => Kind::Vector,
        M::Vgatherdps | M::Vgatherdpd | M::Vgatherqps | M::Vgatherqpd => Kind::Vector,
        M::Vpgatherdd | M::Vpgatherdq | M::Vpgatherqd | M::Vpgatherqq => Kind::Vector,
        M::In | M::Out => Kind::Io,
        M::Pusha | M::Pushad | M::Popa | M::Popad => Kind::Near,
        M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad | M::Salc | M::Bound | M::Arpl => Kind::Decimal,
        _ => return None,
    })
}

/// Executes one instruction that [`handles`] claims. On `Err` the instruction has not retired and nothing has changed but what
/// a REP step did before its faulting iteration.
///
/// `st.interrupt_shadow` is false after an instruction that does not cast one.
pub fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let shadow = std::mem::replace(&mut cx.st.interrupt_shadow, false);
    let result = dispatch(cx, insn);
    if result.is_err() {
        cx.st.interrupt_shadow = shadow;
    }
    result
}

fn count(counts: &mut SystemStats, kind: Option<Kind>, mnemonic: Mnemonic) {
    let counter = match (kind, mnemonic) {
        (Some(Kind::String), _) => &mut counts.string,
        (Some(Kind::Stack), _) => &mut counts.stack,
        (Some(Kind::Segments), _) => &mut counts.segments,
        (Some(Kind::Transfer), _) => &mut counts.transfer,
        (Some(Kind::Control), Mnemonic::Cli | Mnemonic::Sti) => &mut counts.interrupt_flag,
        (Some(Kind::Control), Mnemonic::Rdmsr | Mnemonic::Wrmsr) => &mut counts.msr,
        (Some(Kind::Control), Mnemonic::Cpuid) => &mut counts.cpuid,
        (Some(Kind::Control), Mnemonic::Rdtsc | Mnemonic::Rdtscp) => &mut counts.time_stamp,
        (Some(Kind::Control), Mnemonic::Invlpg | Mnemonic::Invpcid) => &mut counts.invalidate,
        (Some(Kind::Control), Mnemonic::Hlt) => &mut counts.halt,
        (Some(Kind::Control), _) => &mut counts.control,
        (Some(Kind::Fpu), _) => &mut counts.fpu,
        (Some(Kind::Xsave), _) => &mut counts.xsave,
        (Some(Kind::Vector), _) => &mut counts.vector,
        (Some(Kind::Io), _) => &mut counts.io,
        (Some(Kind::Near | Kind::Decimal) | None, _) => &mut counts.other,
    };
    *counter += 1;
}

/// The kind of an instruction whose mnemonic decides, counted.
fn counted(cx: &mut Cx, insn: &Instruction) -> Option<Kind> {
    let kind = kind(insn);
    count(cx.counts, kind, insn.mnemonic());
    kind
}

fn dispatch(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    match insn.mnemonic() {
        Mnemonic::Mov => {
            let (to, from) = (insn.op0_register(), insn.op1_register());
            if to.is_segment_register() || from.is_segment_register() {
                cx.counts.segments += 1;
                segments::mov(cx, insn)
            } else {
                cx.counts.control += 1;
                control::mov(cx, to, from)
            }
        }
        Mnemonic::Push | Mnemonic::Pop if insn.op0_register().is_segment_register() => {
            cx.counts.segments += 1;
            segments::push_pop(cx, insn)
        }
        Mnemonic::Call | Mnemonic::Jmp if transfer::is_far(insn) => {
            cx.counts.transfer += 1;
            transfer::execute(cx, insn)
        }
        _ => match counted(cx, insn) {
            Some(Kind::Xsave | Kind::Vector) if !offered::exists(insn, cx.model.features) => Err(Exception::UD),
            Some(Kind::String) => string::execute(cx, insn),
            Some(Kind::Stack) => stack::execute(cx, insn),
            Some(Kind::Segments) => segments::execute(cx, insn),
            Some(Kind::Transfer) => transfer::execute(cx, insn),
            Some(Kind::Control) => control::execute(cx, insn),
            Some(Kind::Fpu) => fpu::execute(cx, insn),
            Some(Kind::Xsave) => xsave::execute(cx, insn),
            Some(Kind::Vector) => vector::execute(cx, insn),
            Some(Kind::Io) => io::execute(cx, insn),
            Some(Kind::Near) => near::execute(cx, insn),
            Some(Kind::Decimal) => decimal::execute(cx, insn),
            None if near::handles(insn) => near::execute(cx, insn),
            // Claimed because the model does not have it.
            None => Err(Exception::UD),
        },
    }
}

/// An address with what its segment says of faults.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ea {
    /// Linear address. Outside 64-bit code only its low 32 bits count.
    pub va: u64,
    /// Number of the segment register: outside 64-bit code its limit and type are checked, and an address that is not canonical gives
    /// #SS instead of #GP if it is SS.
    pub segment: usize,
}

impl Ea {
    /// The exception that counts for an access here.
    fn fault(&self, e: Exception) -> Exception {
        if self.segment == seg::SS { as_stack_fault(e) } else { e }
    }
}

/// A non-canonical address in a stack access is a stack fault (APM vol. 2 section 8.2.13).
fn as_stack_fault(e: Exception) -> Exception {
    if e == Exception::gp(0) { Exception::ss(0) } else { e }
}

impl Cx<'_> {
    /// Whether the current code runs with user permissions.
    pub fn user(&self) -> bool {
        self.st.cpl == 3
    }
    /// Reads memory with the current privilege.
    pub fn read(&mut self, va: u64, buf: &mut [u8]) -> Result<(), Exception> {
        let user = self.user();
        self.read_as(va, buf, user)
    }
    /// Writes memory with the current privilege.
    pub fn write(&mut self, va: u64, data: &[u8]) -> Result<(), Exception> {
        let user = self.user();
        self.write_as(va, data, user)
    }
    /// Reads a little-endian value with supervisor permissions whatever the privilege (descriptor tables, TSS).
    pub fn read_system<const N: usize>(&mut self, va: u64) -> Result<[u8; N], Exception> {
        let mut buf = [0; N];
        self.read_as(va, &mut buf, false)?;
        Ok(buf)
    }
    /// Writes with supervisor permissions whatever the privilege.
    pub fn write_system(&mut self, va: u64, data: &[u8]) -> Result<(), Exception> {
        self.write_as(va, data, false)
    }

    /// Reads any number of bytes; devices see pieces of eight bytes at most.
    fn read_as(&mut self, va: u64, buf: &mut [u8], user: bool) -> Result<(), Exception> {
        if buf.len() <= 8 {
            return self.mmu.read(self.st, self.bus, self.position, va, buf, user);
        }
        if fits_in_page(va, buf.len())
            && let Place::Plain(host) = self.mmu.place_for_read(self.st, va, user)?
        {
            // SAFETY: the bytes lie in one page of RAM, and `buf` is not guest memory.
            unsafe { std::ptr::copy_nonoverlapping(host, buf.as_mut_ptr(), buf.len()) };
            return Ok(());
        }
        for (i, piece) in buf.chunks_mut(8).enumerate() {
            self.mmu.read(self.st, self.bus, self.position, va.wrapping_add(i as u64 * 8), piece, user)?;
        }
        Ok(())
    }

    /// Writes all bytes or none; devices see pieces of eight bytes at most.
    fn write_as(&mut self, va: u64, data: &[u8], user: bool) -> Result<(), Exception> {
        if data.len() <= 8 {
            return self.mmu.write(self.st, self.bus, self.position, va, data, user);
        }
        if fits_in_page(va, data.len())
            && let Place::Plain(host) = self.mmu.place_for_write(self.st, va, user)?
        {
            // SAFETY: the bytes lie in one page of RAM, and `data` is not guest memory.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()) };
            return Ok(());
        }
        self.mmu.probe_write(self.st, va, data.len(), user)?;
        for (i, piece) in data.chunks(8).enumerate() {
            self.mmu.write(self.st, self.bus, self.position, va.wrapping_add(i as u64 * 8), piece, user)?;
        }
        Ok(())
    }

    /// Reads a little-endian value of `size` bytes (at most 8) with the current privilege.
    fn read_value(&mut self, at: Ea, size: usize) -> Result<u64, Exception> {
        let mut buf = [0; 8];
        self.read_bytes(at, &mut buf[..size])?;
        Ok(u64::from_le_bytes(buf))
    }
    /// Writes the low `size` bytes (at most 8) of a value with the current privilege.
    fn write_value(&mut self, at: Ea, size: usize, value: u64) -> Result<(), Exception> {
        self.write_bytes(at, &value.to_le_bytes()[..size])
    }
    /// Reads any number of bytes with the current privilege.
    fn read_bytes(&mut self, at: Ea, buf: &mut [u8]) -> Result<(), Exception> {
        let (va, first) = self.checked(at, buf.len(), false)?;
        let (low, wrapped) = buf.split_at_mut(first);
        self.read(va, low).map_err(|e| at.fault(e))?;
        if wrapped.is_empty() { Ok(()) } else { self.read(0, wrapped) }
    }
    /// Writes any number of bytes with the current privilege.
    fn write_bytes(&mut self, at: Ea, data: &[u8]) -> Result<(), Exception> {
        let (va, first) = self.checked(at, data.len(), true)?;
        let (low, wrapped) = data.split_at(first);
        if !wrapped.is_empty() {
            let user = self.user();
            self.mmu.probe_write(self.st, va, first, user)?;
            self.mmu.probe_write(self.st, 0, wrapped.len(), user)?;
        }
        self.write(va, low).map_err(|e| at.fault(e))?;
        if wrapped.is_empty() { Ok(()) } else { self.write(0, wrapped) }
    }
    /// Checks that the bytes can be written, as a write would.
    fn probe_bytes(&mut self, at: Ea, len: usize) -> Result<(), Exception> {
        let (va, first) = self.checked(at, len, true)?;
        let user = self.user();
        self.mmu.probe_write(self.st, va, first, user).map_err(|e| at.fault(e))?;
        if first == len { Ok(()) } else { self.mmu.probe_write(self.st, 0, len - first, user) }
    }
    /// Checks an access against its segment. Says where it really is, and how many of its bytes lie before the end of the address space of
    /// code that is not 64-bit: a segment whose base is not 0 may wrap there.
    fn checked(&self, at: Ea, len: usize, write: bool) -> Result<(u64, usize), Exception> {
        if self.st.is_64_bit_code() {
            return Ok((at.va, len));
        }
        let va = at.va as u32;
        let offset = va.wrapping_sub(self.st.seg[at.segment].base as u32);
        segmentation::check(self.st, at.segment, offset, len.max(1), write)?;
        Ok((va.into(), len.min(((1u64 << 32) - u64::from(va)) as usize)))
    }

    /// The value of a general register of any size.
    fn reg(&self, r: Register) -> u64 {
        let value = self.st.gpr[r.full_register().number() & 15];
        match r.size() {
            2 => value as u16 as u64,
            4 => value as u32 as u64,
            _ => value,
        }
    }
    /// Writes a 16, 32 or 64-bit general register with the hardware's rules for the upper bits.
    fn set_reg(&mut self, r: Register, value: u64) {
        let slot = &mut self.st.gpr[r.full_register().number() & 15];
        *slot = match r.size() {
            2 => *slot & !0xffff | value & 0xffff,
            4 => value as u32 as u64,
            _ => value,
        };
    }

    /// The base that counts for an access through segment register number `s`: in 64-bit code only FS and GS have one.
    fn segment_base(&self, s: usize) -> u64 {
        if s >= seg::FS || !self.st.is_64_bit_code() { self.st.seg[s].base } else { 0 }
    }
    /// A linear address from a segment and an offset; 32 bits wide outside 64-bit code.
    fn linear(&self, s: usize, offset: u64) -> Ea {
        let va = self.segment_base(s).wrapping_add(offset);
        let va = if self.st.is_64_bit_code() { va } else { va as u32 as u64 };
        Ea { va, segment: s }
    }
    /// The address of the instruction's memory operand.
    fn ea(&self, insn: &Instruction) -> Ea {
        let op = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory).unwrap_or(0);
        let offset = insn.virtual_address(op, 0, |r, _, _| {
            // The segment's base is added below.
            Some(if r.is_segment_register() { 0 } else { self.st.gpr[r.full_register().number() & 15] })
        });
        self.linear(segment_number(insn.memory_segment()), offset.unwrap_or(0))
    }
    /// A 16-bit source operand in a register or memory.
    fn operand16(&mut self, insn: &Instruction, op: u32) -> Result<u16, Exception> {
        if insn.op_kind(op) == OpKind::Register {
            return Ok(self.reg(insn.op_register(op)) as u16);
        }
        let at = self.ea(insn);
        Ok(self.read_value(at, 2)? as u16)
    }
    /// Stores a system word: all of a register of any size, or 16 bits of memory.
    fn store_word(&mut self, insn: &Instruction, value: u64) -> Result<(), Exception> {
        if insn.op0_kind() == OpKind::Register {
            self.set_reg(insn.op0_register(), value);
            return Ok(());
        }
        let at = self.ea(insn);
        self.write_value(at, 2, value)
    }

    /// The address of the instruction after `insn`, as wide as the instruction pointer is.
    pub fn next_ip(&self, insn: &Instruction) -> u64 {
        let next = insn.next_ip();
        if self.st.is_64_bit_code() { next } else { next & 0xffff_ffff }
    }

    /// The part of RSP that addresses the stack.
    fn stack_mask(&self) -> u64 {
        if self.st.is_64_bit_code() {
            u64::MAX
        } else if self.st.seg[seg::SS].attributes & Segment::BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }
    /// Where `offset` (RSP plus something) lies on the current stack.
    fn stack_at(&self, offset: u64) -> Ea {
        self.linear(seg::SS, offset & self.stack_mask())
    }
    /// RSP moved by `by`, as wide as the stack is.
    fn moved_rsp(&self, by: i64) -> u64 {
        let (rsp, mask) = (self.st.gpr[gpr::RSP], self.stack_mask());
        let moved = rsp.wrapping_add_signed(by) & mask;
        // A 32-bit stack pointer zero-extends, a 16-bit one merges.
        if mask == 0xffff { rsp & !mask | moved } else { moved }
    }
    /// Pushes `size` bytes of `value`.
    fn push(&mut self, size: usize, value: u64) -> Result<(), Exception> {
        let rsp = self.moved_rsp(-(size as i64));
        let at = self.stack_at(rsp);
        self.write_value(at, size, value)?;
        self.st.gpr[gpr::RSP] = rsp;
        Ok(())
    }
    /// Reads the stack word number `index`, of `size` bytes each, without popping it.
    fn peek(&mut self, size: usize, index: usize) -> Result<u64, Exception> {
        let at = self.stack_at(self.st.gpr[gpr::RSP].wrapping_add((index * size) as u64));
        self.read_value(at, size)
    }

    /// #GP(0) unless the privilege level is 0.
    fn require_cpl0(&self) -> Result<(), Exception> {
        if self.st.cpl == 0 { Ok(()) } else { Err(Exception::gp(0)) }
    }
}

/// Whether an access stays in its page.
fn fits_in_page(va: u64, len: usize) -> bool {
    (va % PAGE_SIZE) as usize + len <= PAGE_SIZE as usize
}

/// The hardware's number of a segment register; DS for everything else.
pub(crate) fn segment_number(r: Register) -> usize {
    match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}
