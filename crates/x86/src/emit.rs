//! Emission of host code: the engine's own sequences (dynasm) and rewritten guest instructions (iced encoder).
//!
//! **In:** what to do. **Out:** bytes for a known address. Nothing here knows what a guest instruction means.
//!
//! Register convention of translated code: guest registers live in the host registers of the same name, but for r10, r11
//! (scratch: addend and address) and r15 (budget), whose guest values live in the frame. RSP is the guest's: code here never uses
//! the host stack, and `call` does not exist.
mod access;
mod fpu;
mod second;
mod system;

pub use access::At;

use crate::frame::FrameAt;
use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, VecAssembler, dynasm, x64::X64Relocation};
use iced_x86::{Encoder, Instruction};

/// Host addresses of the shared routines at the start of the code cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shared {
    /// `extern "sysv64" fn(code)`: enters translated code; returns when it leaves.
    pub enter: i32,
    /// Saves everything and leaves; `exit` is set already.
    pub leave: i32,
    /// Saves everything and leaves with the reason in the upper half of r10 and the argument in the lower.
    pub leave_with: i32,
    /// The same, where flags may be owed.
    pub leave_owing: i32,
    /// Leaves with [`crate::frame::exit::LOOKUP`] at the address in r11.
    pub leave_lookup: i32,
    /// Goes on at the guest address in r11, which the jump cache does not know.
    pub lookup: i32,
    /// Calls the memory helper of multi-instruction blocks with the argument in the upper half of r10, then jumps to the lower half, or leaves.
    pub mem: i32,
    /// Calls the memory helper of single-instruction blocks.
    pub mem_alone: i32,
    /// Calls the write-back helper of single-instruction blocks.
    pub write_back: i32,
    /// Calls the helper for system instructions.
    pub sys: i32,
    /// Where the signal handler sends a faulting host instruction.
    pub fault: i32,
    /// Saves the host's flags for the guest and leaves with [`crate::frame::exit::FLAGS`].
    pub flags: i32,
    /// Saves the host's flags, which were owed, and goes back to who asked for them.
    pub made: i32,
    /// Fill sites; by [`Shared::site`].
    pub sites: [i32; 8],
}

impl Shared {
    /// Every routine with a name, in the order of addresses.
    pub fn named(&self) -> Vec<(i32, &'static str)> {
        let mut all = vec![
            (self.enter, "enter"),
            (self.leave, "leave"),
            (self.leave_with, "leave_with"),
            (self.leave_owing, "leave_owing"),
            (self.leave_lookup, "leave_lookup"),
            (self.lookup, "lookup"),
            (self.mem, "mem"),
            (self.mem_alone, "mem_alone"),
            (self.write_back, "write_back"),
            (self.sys, "sys"),
            (self.fault, "fault"),
            (self.flags, "flags"),
            (self.made, "made"),
        ];
        all.extend(self.sites.iter().map(|&at| (at, "fill_site")));
        all.sort_unstable();
        all
    }
    /// Which of `sites`.
    pub fn site(user: bool, write: bool, constant: bool) -> usize {
        user as usize | (write as usize) << 1 | (constant as usize) << 2
    }
}

/// Addresses of the Rust helpers. Each returns 0 to go on in translated code, 1 to leave.
#[derive(Clone, Copy)]
pub struct Helpers {
    /// See [`Shared::mem`].
    pub mem: extern "sysv64" fn(*mut crate::frame::Frame) -> u32,
    /// See [`Shared::mem_alone`].
    pub mem_alone: extern "sysv64" fn(*mut crate::frame::Frame) -> u32,
    /// See [`Shared::write_back`].
    pub write_back: extern "sysv64" fn(*mut crate::frame::Frame) -> u32,
    /// See [`Shared::sys`].
    pub sys: extern "sysv64" fn(*mut crate::frame::Frame) -> u32,
}

/// Hardware numbers of the registers that hold themselves.
const IDENTITY: [u8; 12] = [0, 1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 14];

/// An assembler for one piece of code at a known address.
pub struct Emit {
    pub(crate) ops: VecAssembler<X64Relocation>,
    encoder: Encoder,
    at: FrameAt,
    base: usize,
    user: bool,
    shared: Shared,
    avx: bool,
}

fn is_imm32(v: u64) -> bool {
    v as i64 == v as i32 as i64
}

impl Emit {
    /// Starts a piece of code at host address `base`.
    pub fn new(base: usize, at: FrameAt, user: bool, shared: Shared) -> Self {
        // Nothing here refers to addresses outside of the piece, so the assembler need not know where it is.
        Self { ops: VecAssembler::new(0), encoder: Encoder::new(64), at, base, user, shared, avx: false }
    }
    /// Bytes so far.
    pub fn offset(&self) -> usize {
        self.ops.offset().0
    }
    /// Host address of the next byte.
    pub fn here(&self) -> usize {
        self.base + self.offset()
    }
    /// A new label inside this piece of code.
    pub fn label(&mut self) -> DynamicLabel {
        self.ops.new_dynamic_label()
    }
    /// Binds a label here.
    pub fn bind(&mut self, label: DynamicLabel) {
        dynasm!(self.ops ; .arch x64 ; =>label);
    }
    /// jmp to a label.
    pub fn jmp(&mut self, label: DynamicLabel) {
        dynasm!(self.ops ; .arch x64 ; jmp =>label);
    }

    /// jrcxz (or jecxz) to a label.
    pub fn jrcxz(&mut self, label: DynamicLabel, wide: bool) {
        if !wide {
            self.ops.push(0x67);
        }
        // Over the next jump, to the one behind it, which reaches everywhere.
        self.ops.extend([0xe3, 2, 0xeb, 5].iter());
        self.jmp(label);
    }

    /// Begins another piece of code, at host address `base`. Cheaper than a new one.
    ///
    /// # Panics
    /// If there is code that was not taken.
    pub fn restart(&mut self, base: usize, user: bool) {
        assert_eq!(self.offset(), 0, "code was emitted and not taken");
        self.base = base;
        self.user = user;
    }
    /// Appends the finished bytes to `to`. Nothing is left here.
    pub fn take(&mut self, to: &mut Vec<u8>) {
        to.extend(self.ops.drain().expect("labels are used inside a sequence only"));
    }

    /// Encodes an instruction that has no branch target and no RIP-relative operand.
    /// Returns false if it cannot be encoded.
    pub fn raw(&mut self, insn: &Instruction) -> bool {
        let ok = self.encoder.encode(insn, self.here() as u64).is_ok();
        let mut bytes = self.encoder.take_buffer();
        if ok {
            self.ops.extend(bytes.iter());
        }
        // The same memory for the next one.
        bytes.clear();
        self.encoder.set_buffer(bytes);
        ok
    }
    /// Emits an instruction that needs no rewriting as it is.
    pub fn copy(&mut self, bytes: &[u8]) {
        self.ops.extend(bytes.iter());
    }

    /// jmp to an absolute host address.
    pub fn jmp_abs(&mut self, target: i32) {
        let rel = target.wrapping_sub(self.here() as i32 + 5);
        self.ops.push(0xe9);
        self.ops.push_i32(rel);
    }
    /// jcc to a place outside this piece of code; returns where its 32-bit displacement is, to be filled in later.
    pub fn jcc_out(&mut self, cc: u8) -> usize {
        self.ops.push(0x0f);
        self.ops.push(0x80 | cc & 15);
        self.ops.push_i32(0);
        self.offset() - 4
    }
    /// jmp to a place outside this piece of code; like [`Emit::jcc_out`].
    pub fn jmp_out(&mut self) -> usize {
        self.ops.push(0xe9);
        self.ops.push_i32(0);
        self.offset() - 4
    }
    /// jrcxz (or jecxz) to a place outside this piece of code; like [`Emit::jcc_out`].
    pub fn jrcxz_out(&mut self, wide: bool) -> usize {
        if !wide {
            self.ops.push(0x67);
        }
        // jrcxz over the next jump, to the one behind it, which reaches everywhere.
        self.ops.extend([0xe3, 2, 0xeb, 5].iter());
        self.jmp_out()
    }
    /// lea rcx,[rcx-1] or its 32-bit form.
    pub fn dec_rcx(&mut self, wide: bool) {
        if wide {
            dynasm!(self.ops ; .arch x64 ; lea rcx, [rcx - 1]);
        } else {
            dynasm!(self.ops ; .arch x64 ; lea ecx, [rcx - 1]);
        }
    }

    /// Loads a guest register (any) into a host register; no flags.
    pub fn load(&mut self, host: u8, guest: usize) {
        let slot = self.at.gpr(guest);
        match guest {
            10 | 11 | 15 => dynasm!(self.ops ; .arch x64 ; mov Rq(host), [slot]),
            _ if guest as u8 != host => dynasm!(self.ops ; .arch x64 ; mov Rq(host), Rq(guest as u8)),
            _ => {}
        }
    }
    /// Stores a host register into the slot of a guest register that lives in memory.
    pub fn store(&mut self, guest: usize, host: u8) {
        let slot = self.at.gpr(guest);
        dynasm!(self.ops ; .arch x64 ; mov [slot], Rq(host));
    }
    /// mov host, host (64 bits).
    pub fn mov(&mut self, to: u8, from: u8) {
        dynasm!(self.ops ; .arch x64 ; mov Rq(to), Rq(from));
    }
    /// Loads a constant; no flags.
    pub fn imm(&mut self, to: u8, value: u64) {
        if let Ok(short) = u32::try_from(value) {
            // The upper half becomes 0.
            dynasm!(self.ops ; .arch x64 ; mov Rd(to), DWORD short as i32);
        } else if is_imm32(value) {
            dynasm!(self.ops ; .arch x64 ; mov Rq(to), DWORD value as i32);
        } else {
            dynasm!(self.ops ; .arch x64 ; mov Rq(to), QWORD value as i64);
        }
    }
    /// Loads a word of the frame.
    pub fn load_word(&mut self, to: u8, addr: i32) {
        dynasm!(self.ops ; .arch x64 ; mov Rq(to), [addr]);
    }
    /// Stores a word of the frame.
    pub fn store_word(&mut self, addr: i32, from: u8) {
        dynasm!(self.ops ; .arch x64 ; mov [addr], Rq(from));
    }
    /// One instruction of 32 or (`wide`) 64 bits with a register and a memory operand [base + index*scale + disp], as short as it goes.
    pub(super) fn reg_mem(&mut self, opcode: &[u8], wide: bool, reg: u8, base: u8, index: Option<(u8, u32)>, disp: i32) {
        let x = index.map_or(0, |(i, _)| i >> 3);
        let rex = 0x40 | (wide as u8) << 3 | (reg >> 3) << 2 | x << 1 | base >> 3;
        if rex != 0x40 {
            self.ops.push(rex);
        }
        self.ops.extend(opcode.iter());
        let short = i8::try_from(disp);
        // Without a displacement, RBP and R13 cannot be encoded as a base.
        let mode = match short {
            Ok(0) if base & 7 != 5 => 0,
            Ok(_) => 1,
            Err(_) => 2,
        };
        match index {
            Some((i, scale)) => {
                assert!(i != 4, "RSP is no index");
                self.ops.push(mode << 6 | (reg & 7) << 3 | 4);
                self.ops.push((scale.trailing_zeros() as u8) << 6 | (i & 7) << 3 | base & 7);
            }
            None => {
                self.ops.push(mode << 6 | (reg & 7) << 3 | base & 7);
                if base & 7 == 4 {
                    self.ops.push(0x24);
                }
            }
        }
        match (mode, short) {
            (1, Ok(short)) => self.ops.push_i8(short),
            (2, _) => self.ops.push_i32(disp),
            _ => {}
        }
    }
    /// lea to, [base + disp]
    pub fn lea(&mut self, to: u8, base: u8, disp: i32) {
        match disp {
            0 if to == base => {}
            0 => self.mov(to, base),
            _ => self.reg_mem(&[0x8d], true, to, base, None, disp),
        }
    }
    /// lea to, [base + index*scale + disp]; scale 1, 2, 4 or 8.
    pub fn lea_index(&mut self, to: u8, base: u8, index: u8, scale: u32, disp: i32) {
        self.reg_mem(&[0x8d], true, to, base, Some((index, scale)), disp);
    }
    /// lea to, [index*scale + disp]
    pub fn lea_scaled(&mut self, to: u8, index: u8, scale: u32, disp: i32) {
        match scale {
            1 => dynasm!(self.ops ; .arch x64 ; lea Rq(to), [Rq(index) + disp]),
            2 => dynasm!(self.ops ; .arch x64 ; lea Rq(to), [Rq(index) * 2 + disp]),
            4 => dynasm!(self.ops ; .arch x64 ; lea Rq(to), [Rq(index) * 4 + disp]),
            _ => dynasm!(self.ops ; .arch x64 ; lea Rq(to), [Rq(index) * 8 + disp]),
        }
    }
    /// Truncates a register to 32 bits; no flags.
    pub fn zero_extend(&mut self, reg: u8) {
        dynasm!(self.ops ; .arch x64 ; mov Rd(reg), Rd(reg));
    }
    /// add reg, word of the frame. Clobbers flags.
    pub fn add_word(&mut self, reg: u8, addr: i32) {
        dynasm!(self.ops ; .arch x64 ; add Rq(reg), [addr]);
    }
    /// add reg, imm as lea; no flags.
    pub fn add_no_flags(&mut self, reg: u8, other: u8) {
        dynasm!(self.ops ; .arch x64 ; lea Rq(reg), [Rq(reg) + Rq(other)]);
    }

    /// Saves the host's status flags; they stay valid in the host. Clobbers r11.
    pub fn save_flags(&mut self) {
        let flags = self.at.flags();
        dynasm!(self.ops ; .arch x64 ; mov r11, rax ; lahf ; seto al ; mov [flags], ax ; mov rax, r11);
    }
    /// Restores the status flags from the frame. Clobbers a scratch word only.
    pub fn restore_flags(&mut self) {
        let (flags, tmp) = (self.at.flags(), self.at.tmp(3));
        dynasm!(self.ops ; .arch x64
            ; mov [tmp], rax ; movzx eax, WORD [flags] ; add al, 0x7f ; sahf ; mov rax, [tmp]);
    }

    /// Restores CF alone; the host's other status flags are anything then.
    pub fn restore_carry(&mut self) {
        let flags = self.at.flags();
        // CF is bit 0 of AH.
        dynasm!(self.ops ; .arch x64 ; bt WORD [flags], 8);
    }

    /// CF = bit 0 of a register.
    pub fn carry_from_bit_0(&mut self, reg: u8) {
        dynasm!(self.ops ; .arch x64 ; bt Rd(reg), 0);
    }

    /// add or sub of a constant, `bytes` wide.
    pub fn arith_imm(&mut self, add: bool, reg: u8, c: i32, bytes: usize) {
        match (add, bytes) {
            (true, 1) => dynasm!(self.ops ; .arch x64 ; add Rb(reg), c as i8),
            (true, 2) => dynasm!(self.ops ; .arch x64 ; add Rw(reg), c as i16),
            (true, 4) => dynasm!(self.ops ; .arch x64 ; add Rd(reg), c),
            (true, _) => dynasm!(self.ops ; .arch x64 ; add Rq(reg), c),
            (false, 1) => dynasm!(self.ops ; .arch x64 ; sub Rb(reg), c as i8),
            (false, 2) => dynasm!(self.ops ; .arch x64 ; sub Rw(reg), c as i16),
            (false, 4) => dynasm!(self.ops ; .arch x64 ; sub Rd(reg), c),
            (false, _) => dynasm!(self.ops ; .arch x64 ; sub Rq(reg), c),
        }
    }
    /// add or sub of a guest register, `bytes` wide.
    pub fn arith_guest(&mut self, add: bool, reg: u8, guest: usize, bytes: usize) {
        if matches!(guest, 10 | 11 | 15) {
            return self.arith_word(add, reg, self.at.gpr(guest), bytes);
        }
        let g = guest as u8;
        match (add, bytes) {
            (true, 1) => dynasm!(self.ops ; .arch x64 ; add Rb(reg), Rb(g)),
            (true, 2) => dynasm!(self.ops ; .arch x64 ; add Rw(reg), Rw(g)),
            (true, 4) => dynasm!(self.ops ; .arch x64 ; add Rd(reg), Rd(g)),
            (true, _) => dynasm!(self.ops ; .arch x64 ; add Rq(reg), Rq(g)),
            (false, 1) => dynasm!(self.ops ; .arch x64 ; sub Rb(reg), Rb(g)),
            (false, 2) => dynasm!(self.ops ; .arch x64 ; sub Rw(reg), Rw(g)),
            (false, 4) => dynasm!(self.ops ; .arch x64 ; sub Rd(reg), Rd(g)),
            (false, _) => dynasm!(self.ops ; .arch x64 ; sub Rq(reg), Rq(g)),
        }
    }
    /// add or sub of a word of the frame, `bytes` wide.
    pub fn arith_word(&mut self, add: bool, reg: u8, slot: i32, bytes: usize) {
        match (add, bytes) {
            (true, 1) => dynasm!(self.ops ; .arch x64 ; add Rb(reg), [slot]),
            (true, 2) => dynasm!(self.ops ; .arch x64 ; add Rw(reg), [slot]),
            (true, 4) => dynasm!(self.ops ; .arch x64 ; add Rd(reg), [slot]),
            (true, _) => dynasm!(self.ops ; .arch x64 ; add Rq(reg), [slot]),
            (false, 1) => dynasm!(self.ops ; .arch x64 ; sub Rb(reg), [slot]),
            (false, 2) => dynasm!(self.ops ; .arch x64 ; sub Rw(reg), [slot]),
            (false, 4) => dynasm!(self.ops ; .arch x64 ; sub Rd(reg), [slot]),
            (false, _) => dynasm!(self.ops ; .arch x64 ; sub Rq(reg), [slot]),
        }
    }
    /// test reg, reg, `bytes` wide.
    pub fn test_self(&mut self, reg: u8, bytes: usize) {
        match bytes {
            1 => dynasm!(self.ops ; .arch x64 ; test Rb(reg), Rb(reg)),
            2 => dynasm!(self.ops ; .arch x64 ; test Rw(reg), Rw(reg)),
            4 => dynasm!(self.ops ; .arch x64 ; test Rd(reg), Rd(reg)),
            _ => dynasm!(self.ops ; .arch x64 ; test Rq(reg), Rq(reg)),
        }
    }
    /// reg = 0, with the flags of that.
    pub fn zero(&mut self, reg: u8) {
        dynasm!(self.ops ; .arch x64 ; xor Rd(reg), Rd(reg));
    }

    /// Notes what code makes the flags (0: they are in the frame). Returns where its address is, to be filled in later.
    pub fn owe(&mut self, maker: i32) -> usize {
        let owed = self.at.owed();
        dynasm!(self.ops ; .arch x64 ; mov DWORD [owed], maker);
        self.offset() - 4
    }
    /// Has the flags made and saved, if they are owed. Clobbers r11 and flags.
    pub fn settle_owed(&mut self) {
        let (owed, back) = (self.at.owed(), self.at.owed_return());
        // Load, test, skip, store and jump are 8 + 3 + 2 + 12 + 3 bytes.
        let resume = self.here() as i32 + 28;
        // The jump goes over store and jump. (Labels cost more than all the rest.)
        dynasm!(self.ops ; .arch x64
            ; mov r11, [owed] ; test r11, r11 ; .bytes [0x74, 15]
            ; mov QWORD [back], resume ; jmp r11);
        assert_eq!(self.here() as i32, resume);
    }
    /// Returns the place of the jump to be made if flags are owed. Clobbers flags.
    pub fn if_owed(&mut self) -> usize {
        let owed = self.at.owed();
        dynasm!(self.ops ; .arch x64 ; cmp DWORD [owed], 0);
        self.jcc_out(5)
    }
    /// inc or dec, `bytes` wide. Changes all flags but CF.
    pub fn count(&mut self, inc: bool, reg: u8, bytes: usize) {
        match (inc, bytes) {
            (true, 1) => dynasm!(self.ops ; .arch x64 ; inc Rb(reg)),
            (true, 2) => dynasm!(self.ops ; .arch x64 ; inc Rw(reg)),
            (true, 4) => dynasm!(self.ops ; .arch x64 ; inc Rd(reg)),
            (true, _) => dynasm!(self.ops ; .arch x64 ; inc Rq(reg)),
            (false, 1) => dynasm!(self.ops ; .arch x64 ; dec Rb(reg)),
            (false, 2) => dynasm!(self.ops ; .arch x64 ; dec Rw(reg)),
            (false, 4) => dynasm!(self.ops ; .arch x64 ; dec Rd(reg)),
            (false, _) => dynasm!(self.ops ; .arch x64 ; dec Rq(reg)),
        }
    }

    /// Counts the word at `counter` down. Returns the place of the jump to be made when it was 0. Clobbers flags.
    pub fn count_down(&mut self, counter: i32) -> usize {
        dynasm!(self.ops ; .arch x64 ; sub QWORD [counter], 1);
        self.jcc_out(8)
    }
    /// Pays for `n` instructions. Returns the place of the jump to be made (with the budget still reduced) if the budget is too small.
    /// Clobbers flags.
    pub fn pay(&mut self, n: i32) -> usize {
        match i8::try_from(n) {
            Ok(n) => dynasm!(self.ops ; .arch x64 ; sub r15, BYTE n),
            Err(_) => dynasm!(self.ops ; .arch x64 ; sub r15, n),
        }
        self.jcc_out(8)
    }
    /// Gives back `n` instructions; no flags.
    pub fn refund(&mut self, n: i32) {
        if n != 0 {
            self.lea(15, 15, n);
        }
    }

    /// Calls the memory helper for the address in r11; execution goes on at host address `resume` unless it leaves. Clobbers r10.
    pub fn call_mem(&mut self, arg: i32, resume: i32) {
        let both = u64::from(arg as u32) << 32 | u64::from(resume as u32);
        dynasm!(self.ops ; .arch x64 ; mov r10, QWORD both as i64);
        self.jmp_abs(self.shared.mem);
    }
    /// Calls a helper and goes on behind the call.
    pub fn call_helper_here(&mut self, helper: i32, arg: i32) {
        let (ret, argument) = (self.at.ret(), self.at.arg());
        // The two stores and the jump are 12 + 12 + 5 bytes.
        let resume = self.here() as i32 + 29;
        dynasm!(self.ops ; .arch x64 ; mov QWORD [argument], arg ; mov QWORD [ret], resume);
        self.jmp_abs(helper);
        assert_eq!(self.here() as i32, resume);
    }

    /// Tells a helper which block calls it.
    pub fn note_block(&mut self, block: i32) {
        let exit_arg = self.at.exit_arg();
        dynasm!(self.ops ; .arch x64 ; mov QWORD [exit_arg], block);
    }

    /// Goes on at the guest address in r11 through the jump cache; the frame's flags are valid. Clobbers flags.
    pub fn jump_cache(&mut self) {
        self.owe(0);
        let known = self.look_into_jumps();
        // jne over the jump of 7 bytes.
        dynasm!(self.ops ; .arch x64 ; .bytes [0x75, 7]);
        let before = self.offset();
        dynasm!(self.ops ; .arch x64 ; jmp QWORD [r10 + known]);
        assert_eq!(self.offset() - before, 7);
        self.jmp_abs(self.shared.lookup);
    }
    /// Goes on at a known guest address through the jump cache, whoever goes on there being told what is owed ([`Emit::owe`]). Clobbers flags.
    pub fn jump_cache_to(&mut self, target: u64) {
        let entry = self.at.jumps(self.user) + ((target as usize & (crate::frame::JUMP_ENTRIES - 1)) << 4) as i32;
        self.imm(11, target);
        // jne over the jump of 7 bytes.
        dynasm!(self.ops ; .arch x64 ; cmp [entry], r11 ; .bytes [0x75, 7]);
        let before = self.offset();
        dynasm!(self.ops ; .arch x64 ; jmp QWORD [entry + 8]);
        assert_eq!(self.offset() - before, 7);
        self.jmp_abs(self.shared.lookup);
    }
    /// Goes on at the guest address in r11, which a guest computed, if the jump cache knows it; what is owed is noted. Returns the place of the jump to be
    /// made if not. Clobbers flags.
    pub fn jump_if_known(&mut self) -> usize {
        let known = self.look_into_jumps();
        let out = self.jcc_out(5);
        dynasm!(self.ops ; .arch x64 ; jmp QWORD [r10 + known]);
        out
    }
    /// Looks further for the guest address in r11. Whoever finds that no code can be there is told whence it came: the block, and by how much its last
    /// instruction has moved RSP.
    pub fn look_up(&mut self, block: i32, moved: i32) {
        let (exit_arg, tmp) = (self.at.exit_arg(), self.at.tmp(2));
        dynasm!(self.ops ; .arch x64 ; mov QWORD [exit_arg], block ; mov QWORD [tmp], moved);
        self.jmp_abs(self.shared.lookup);
    }
    /// ZF = the jump cache knows the guest address in r11; the result, added to r10, is where the code is noted.
    fn look_into_jumps(&mut self) -> i32 {
        let jumps = self.at.jumps(self.user);
        let mask = ((crate::frame::JUMP_ENTRIES - 1) << 4) as i32;
        dynasm!(self.ops ; .arch x64 ; mov r10d, r11d ; shl r10d, 4 ; and r10d, mask ; cmp [r10 + jumps], r11);
        jumps + 8
    }
    /// Leaves at the guest address in r11.
    pub fn leave_lookup(&mut self) {
        self.jmp_abs(self.shared.leave_lookup);
    }
    /// Leaves with a reason and an argument.
    pub fn leave(&mut self, reason: u64, arg: i32) {
        self.leave_by(self.shared.leave_with, reason, arg);
    }
    /// The same, where flags may be owed.
    pub fn leave_owing(&mut self, reason: u64, arg: i32) {
        self.leave_by(self.shared.leave_owing, reason, arg);
    }
    fn leave_by(&mut self, routine: i32, reason: u64, arg: i32) {
        let both = reason << 32 | u64::from(arg as u32);
        dynasm!(self.ops ; .arch x64 ; mov r10, QWORD both as i64);
        self.jmp_abs(routine);
    }
    /// Has the flags made and saved, which are owed, and goes on at host address `resume`.
    pub fn settle_and_go(&mut self, resume: i32) {
        let (owed, back) = (self.at.owed(), self.at.owed_return());
        dynasm!(self.ops ; .arch x64 ; mov QWORD [back], resume ; jmp QWORD [owed]);
    }
    /// r10 = sign-extended guest register `reg` (bits 16, 32, 64) shifted right by log2(bits): the word index of a bit string
    /// access. Clobbers flags.
    pub fn bit_word_index(&mut self, guest: usize, bits: u32) {
        self.load(10, guest);
        match bits {
            16 => dynasm!(self.ops ; .arch x64 ; movsx r10, r10w ; sar r10, 4),
            32 => dynasm!(self.ops ; .arch x64 ; movsxd r10, r10d ; sar r10, 5),
            _ => dynasm!(self.ops ; .arch x64 ; sar r10, 6),
        }
    }
    /// r11 = guest register & (bits - 1). Clobbers flags.
    pub fn bit_in_word(&mut self, guest: usize, bits: u32) {
        self.load(11, guest);
        dynasm!(self.ops ; .arch x64 ; and r11d, bits as i32 - 1);
    }
    /// r11b (or r10b) = one of AH, CH, DH, BH through a scratch word; no flags.
    pub fn load_high(&mut self, to: u8, holder: u8) {
        let tmp = self.at.tmp(0);
        dynasm!(self.ops ; .arch x64 ; mov [tmp], Rq(holder) ; movzx Rd(to), BYTE [tmp + 1]);
    }
    /// The reverse of [`Emit::load_high`]; the holder must still be what the scratch word says.
    pub fn store_high(&mut self, from: u8, holder: u8) {
        let tmp = self.at.tmp(0);
        dynasm!(self.ops ; .arch x64 ; mov [tmp], Rq(holder) ; mov [tmp + 1], Rb(from) ; mov Rq(holder), [tmp]);
    }
    /// to = zero-extended 16-bit part of itself; no flags.
    pub fn mov_zx16(&mut self, reg: u8) {
        dynasm!(self.ops ; .arch x64 ; movzx Rd(reg), Rw(reg));
    }
    /// The low 16 bits of `to` = those of `from`; no flags.
    pub fn mov16(&mut self, to: u8, from: u8) {
        dynasm!(self.ops ; .arch x64 ; mov Rw(to), Rw(from));
    }
    /// lea to, [base + disp], cut off at 32 bits; no flags.
    pub fn lea32(&mut self, to: u8, base: u8, disp: i32) {
        self.reg_mem(&[0x8d], false, to, base, None, disp);
    }
    /// Makes the address in r11 impossible if `size` bytes from its offset on, which is what it has beyond the 32-bit word at `base`, reach
    /// beyond 4 GiB. Clobbers r10 and flags.
    pub fn spoil_if_wrapped(&mut self, base: i32, size: i32) {
        dynasm!(self.ops ; .arch x64
            ; mov r10d, r11d
            ; sub r10d, [base]
            ; add r10, size - 1
            ; shr r10, 32
            ; shl r10, 62
            ; or r11, r10);
    }
    /// Sets or clears DF in the frame. Clobbers flags.
    pub fn direction(&mut self, set: bool) {
        let rflags = self.at.rflags();
        let df = crate::state::rflags::DF as i32;
        if set {
            dynasm!(self.ops ; .arch x64 ; or DWORD [rflags], df);
        } else {
            dynasm!(self.ops ; .arch x64 ; and DWORD [rflags], !df);
        }
    }

    fn save_all(&mut self) {
        let at = self.at;
        for r in IDENTITY.into_iter().chain([4]) {
            self.store_word(at.gpr(r as usize), r);
        }
        self.store_word(at.budget(), 15);
        self.save_vectors();
    }
    fn restore_all(&mut self) {
        let at = self.at;
        self.restore_vectors();
        self.load_word(15, at.budget());
        for r in IDENTITY.into_iter().chain([4]) {
            self.load_word(r, at.gpr(r as usize));
        }
    }
    fn return_to_rust(&mut self) {
        let (host_sp, mxcsr) = (self.at.host_rsp(), self.at.host_mxcsr());
        dynasm!(self.ops ; .arch x64
            ; mov rsp, [host_sp] ; ldmxcsr [mxcsr]
            ; add rsp, 8 ; pop r15 ; pop r14 ; pop r13 ; pop r12 ; pop rbp ; pop rbx ; ret);
    }

    /// Emits the shared routines, for a CPU model with or without AVX. `self` must have been made at the start of the code cache.
    pub fn shared(mut self, frame: i32, helpers: Helpers, avx: bool) -> (Vec<u8>, Shared) {
        self.avx = avx;
        let at = self.at;
        let mut shared = Shared { enter: self.here() as i32, ..Shared::default() };
        let (host_sp, mxcsr, tmp) = (at.host_rsp(), at.host_mxcsr(), at.tmp(0));
        dynasm!(self.ops ; .arch x64
            ; push rbx ; push rbp ; push r12 ; push r13 ; push r14 ; push r15 ; sub rsp, 8
            ; mov [host_sp], rsp ; stmxcsr [mxcsr] ; mov [tmp], rdi);
        self.restore_all();
        dynasm!(self.ops ; .arch x64 ; jmp QWORD [tmp]);

        shared.lookup = self.here() as i32;
        self.far_jump();
        shared.leave_lookup = self.here() as i32;
        let (rip_slot, exit) = (at.rip(), at.exit());
        dynasm!(self.ops ; .arch x64 ; mov [rip_slot], r11);
        self.settle_owed();
        dynasm!(self.ops ; .arch x64 ; mov QWORD [exit], crate::frame::exit::LOOKUP as i32);
        shared.leave = self.here() as i32;
        self.save_all();
        self.return_to_rust();

        let leave_with = |emit: &mut Self, owing: bool| {
            let address = emit.here() as i32;
            let exit_arg = at.exit_arg();
            // The upper half of the argument is always 0.
            dynasm!(emit.ops ; .arch x64 ; mov [exit_arg], r10d ; shr r10, 32 ; mov [exit], r10);
            if owing {
                emit.settle_owed();
            }
            emit.jmp_abs(shared.leave);
            address
        };
        (shared.leave_with, shared.leave_owing) = (leave_with(&mut self, false), leave_with(&mut self, true));

        shared.fault = self.here() as i32;
        dynasm!(self.ops ; .arch x64 ; mov QWORD [exit], crate::frame::exit::HOST_FAULT as i32);
        self.jmp_abs(shared.leave);

        shared.flags = self.here() as i32;
        self.save_flags();
        dynasm!(self.ops ; .arch x64 ; mov QWORD [exit], crate::frame::exit::FLAGS as i32);
        self.jmp_abs(shared.leave);

        shared.made = self.here() as i32;
        self.save_flags();
        let (owed, back) = (at.owed(), at.owed_return());
        dynasm!(self.ops ; .arch x64
            ; mov r11, [back] ; mov QWORD [back], 0 ; mov QWORD [owed], 0 ; jmp r11);

        let helper = |emit: &mut Self, f: extern "sysv64" fn(*mut crate::frame::Frame) -> u32| {
            let address = emit.here() as i32;
            emit.save_all();
            let (host_sp, ret) = (at.host_rsp(), at.ret());
            dynasm!(emit.ops ; .arch x64
                ; mov rsp, [host_sp] ; mov edi, frame ; mov rax, QWORD f as usize as i64 ; call rax
                ; test eax, eax ; jne >out);
            emit.restore_all();
            emit.load_word(10, at.addend());
            emit.load_word(11, at.ea());
            dynasm!(emit.ops ; .arch x64 ; jmp QWORD [ret] ; out:);
            emit.return_to_rust();
            address
        };
        let store_ea = |emit: &mut Self| emit.store_word(at.ea(), 11);
        shared.mem = self.here() as i32;
        let (ret, argument) = (at.ret(), at.arg());
        // The upper half of `ret` is always 0.
        dynasm!(self.ops ; .arch x64 ; mov [ret], r10d ; shr r10, 32 ; mov [argument], r10);
        store_ea(&mut self);
        let slow = self.label();
        self.second_level(slow);
        self.bind(slow);
        helper(&mut self, helpers.mem);
        shared.mem_alone = self.here() as i32;
        store_ea(&mut self);
        helper(&mut self, helpers.mem_alone);
        shared.write_back = helper(&mut self, helpers.write_back);
        shared.sys = helper(&mut self, helpers.sys);
        for i in 0..8 {
            let (user, write, constant) = (i & 1 != 0, i & 2 != 0, i & 4 != 0);
            shared.sites[Shared::site(user, write, constant)] = self.here() as i32;
            self.site_routine(user, write, constant);
        }
        let mut code = Vec::new();
        self.take(&mut code);
        (code, shared)
    }
}
