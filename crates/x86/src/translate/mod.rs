//! From guest bytes to host code, one block at a time.
//!
//! **In:** the bytes of a page from one address on, and the mode. **Out:** host code for a known place, with the notes that make
//! it exact: where each instruction starts, where jumps to other blocks can be linked.
//!
//! Two kinds of blocks:
//! - *Many* instructions: touches only plain RAM through the soft TLB. Whatever is out of the ordinary (a fault, a device, a store to
//!   a watched page, an access across pages) leaves the block *before* the instruction, which then runs alone.
//! - *Alone*: one instruction, every access through a helper that can do everything; it leaves after it.
//!
//! Invariant: at every point where code can be left, general registers, flags, RIP and the number of retired instructions are exact.
//! Flags are kept lazily: in the host, in the frame, or both ([`FlagsIn`]); at block borders the frame's copy is valid.
mod branch;
mod insn;
mod legacy;
mod system;

use crate::classify::{Kind, classify};
use crate::emit::{Emit, Shared};
use crate::frame::{FrameAt, exit};
use dynasmrt::DynamicLabel;
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register, RflagsBits};

/// What translated code depends on besides its bytes and addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mode(pub u8);

impl Mode {
    /// User permissions.
    pub const USER: u8 = 1;
    /// CR0.TS or CR0.EM is set.
    pub const FPU_OFF: u8 = 2;
    /// One instruction, all accesses through helpers.
    pub const ALONE: u8 = 4;
    /// GS can be accessed up to 4 GiB without a check ([`crate::segmentation::is_open`]). In 32-bit code only.
    pub const GS_OPEN: u8 = 1 << 5;
    /// The same for FS.
    pub const FS_OPEN: u8 = 1 << 6;
    /// Code that is not 64-bit: 32-bit code, with flat segments unless it runs alone.
    pub const CODE_32: u8 = 1 << 7;
    /// Whether a bit is set.
    pub fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }
}

/// Where the status flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FlagsIn {
    Host,
    Frame,
    Both,
}

/// The start of one guest instruction in host code.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// Host address.
    pub host: u32,
    /// Offset of the guest instruction from the block's start.
    pub guest: u16,
    /// When the instruction itself executes, the guest's status flags are in the host's.
    pub flags_in_host: bool,
}

/// A direct jump to another block.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// Host address of the 32-bit displacement to patch.
    pub patch: u32,
    /// Where it points while unlinked.
    pub stub: u32,
    /// Guest address of the target.
    pub target: u64,
}

/// A translated block.
pub struct Translation {
    /// Host code, for the address it was translated for.
    pub code: Vec<u8>,
    /// One a guest instruction.
    pub points: Vec<Point>,
    /// Instructions that `sys` executes, by index.
    pub sys: Vec<(u16, Instruction)>,
    /// Direct jumps.
    pub links: Vec<Link>,
    /// Bytes of guest code.
    pub guest_len: u16,
}

/// What a block is to be made of.
pub struct Source<'a> {
    /// Guest bytes from `rip` on: to the end of the page, or a whole instruction across pages.
    pub bytes: &'a [u8],
    /// Guest virtual address.
    pub rip: u64,
    /// Mode.
    pub mode: Mode,
    /// Instructions at most.
    pub max: u32,
    /// The first instruction crosses the page: the block is it alone and has no links.
    pub straddles: bool,
    /// Host address for the code.
    pub host: usize,
    /// The block's number, and the number its first link will get.
    pub block: u32,
    /// See `block`.
    pub first_link: u32,
}

/// Decoder options: what the CPU models lack decodes as their older hardware did (F3 0F BC is BSF, not TZCNT; the hint space
/// 0F0D, 0F18..0F1F is nothing but NOPs).
pub const DECODER_OPTIONS: u32 = DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::FORCE_RESERVED_NOP;

/// A decoder for code of a mode.
pub fn decoder(bytes: &[u8], rip: u64, mode: Mode) -> Decoder<'_> {
    Decoder::with_ip(if mode.has(Mode::CODE_32) { 32 } else { 64 }, bytes, rip, DECODER_OPTIONS)
}

/// Decodes one instruction.
pub fn decode(bytes: &[u8], rip: u64, mode: Mode) -> Instruction {
    decoder(bytes, rip, mode).decode()
}

/// Scratch registers of translated code.
const T0: u8 = 11;
const T1: u8 = 10;

/// An effective address, as often as it is needed.
#[derive(Clone, Copy)]
enum Ea {
    /// The memory operand of the instruction.
    Operand(Instruction),
    /// A register that holds itself, plus a displacement (stack).
    Plain(u8, i32),
    /// The same in 32-bit code.
    Plain32(u8, i32),
    /// Kept in a scratch word of the frame; the memory operand of the instruction.
    Kept(Instruction),
}

enum Cold {
    /// A TLB check failed.
    Slow { label: DynamicLabel, resume: DynamicLabel, ea: Ea, arg: i32 },
    /// Unlinked direct jump.
    Stub { label: DynamicLabel, link: usize },
    /// Conditional jump to another page.
    Far { label: DynamicLabel, target: u64 },
}

struct Translator<'a> {
    src: &'a Source<'a>,
    emit: Emit,
    at: FrameAt,
    shared: Shared,
    flags: FlagsIn,
    info: InstructionInfoFactory,
    points: Vec<Point>,
    sys: Vec<(u16, Instruction)>,
    links: Vec<Link>,
    cold: Vec<Cold>,
}

fn full_number(reg: Register) -> Option<u8> {
    let full = reg.full_register();
    (full.is_gpr64()).then(|| full.number() as u8)
}

/// The register with number `number` (8..=15) and the width of `like`.
fn same_width(like: Register, number: u8) -> Register {
    let table = match like.size() {
        1 => [Register::R10L, Register::R11L],
        2 => [Register::R10W, Register::R11W],
        4 => [Register::R10D, Register::R11D],
        _ => [Register::R10, Register::R11],
    };
    table[(number - 10) as usize]
}

/// Whether a guest register lives in the frame.
fn in_frame(number: u8) -> bool {
    matches!(number, 10 | 11 | 15)
}

fn is_high_byte(reg: Register) -> bool {
    matches!(reg, Register::AH | Register::CH | Register::DH | Register::BH)
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

const STATUS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

fn is_shift(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd)
}

/// Whether an instruction may change a status flag. The decoder says that a rotation through carry all the way round (RCR of a byte by
/// 9) does not; the silicon writes OF.
fn touches_flags(insn: &Instruction) -> bool {
    insn.rflags_modified() & STATUS != 0 || matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
}

/// Whether the address of the memory operand is 32 bits wide.
fn is_narrow(insn: &Instruction) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    base.is_gpr32()
        || index.is_gpr32()
        || base == Register::EIP
        || insn.memory_displ_size() == 4 && base == Register::None && index == Register::None
}

/// Translates one block.
pub fn translate(src: &Source, at: FrameAt, shared: Shared) -> Translation {
    let mut t = Translator {
        src,
        emit: Emit::new(src.host, at, src.mode.has(Mode::USER), shared),
        at,
        shared,
        flags: FlagsIn::Frame,
        info: InstructionInfoFactory::new(),
        points: Vec::new(),
        sys: Vec::new(),
        links: Vec::new(),
        cold: Vec::new(),
    };
    t.block()
}

impl Translator<'_> {
    fn alone(&self) -> bool {
        self.src.mode.has(Mode::ALONE)
    }

    fn block(&mut self) -> Translation {
        // Decode first: the budget is paid for all at entry.
        let mut decoder = decoder(self.src.bytes, self.src.rip, self.src.mode);
        let mut insns = Vec::new();
        let mut ended = false;
        while !ended && (insns.len() as u32) < self.src.max && decoder.can_decode() {
            let insn = decoder.decode();
            let kind = classify(&insn, self.src.mode.has(Mode::FPU_OFF));
            if matches!(kind, Kind::Invalid | Kind::NoFpu) {
                // Runs alone, where it raises its exception. (Also bytes cut at the end of the page.)
                break;
            }
            if self.code_32() && !self.alone() && self.needs_checks(&insn) {
                break;
            }
            ended = kind == Kind::Branch || kind == Kind::Sys && insn.flow_control() != iced_x86::FlowControl::Next;
            insns.push((insn, kind));
            if self.src.straddles {
                break;
            }
        }
        let n = insns.len() as i32;
        let short = self.emit.label();
        if self.alone() {
            self.emit.refund(-1);
        } else {
            self.emit.pay(n, short);
        }
        let mut next = self.src.rip;
        for (k, (insn, kind)) in insns.iter().enumerate() {
            self.points.push(Point {
                host: self.emit.here() as u32,
                guest: (insn.ip() - self.src.rip) as u16,
                flags_in_host: false,
            });
            next = insn.next_ip();
            match kind {
                Kind::Nop => {}
                Kind::Sys => self.sys_insn(k, insn, k + 1 == insns.len()),
                Kind::Direction => {
                    self.clobber_flags();
                    self.emit.direction(insn.mnemonic() == Mnemonic::Std);
                }
                Kind::Branch if self.code_32() => self.branch_32(insn),
                Kind::Silicon if self.code_32() => self.silicon_32(insn),
                Kind::Branch => self.branch(insn),
                Kind::Silicon => self.silicon(insn),
                Kind::Invalid | Kind::NoFpu => unreachable!("never put into a block"),
            }
        }
        if insns.is_empty() {
            // The first instruction must run alone.
            self.emit.imm(T0, self.src.rip);
            self.emit.store_word(self.at.rip(), T0);
            self.emit.leave(exit::ALONE, 0);
        } else if !matches!(insns.last(), Some((_, Kind::Branch))) {
            self.settle_flags();
            self.go_to(self.wrapped(next));
        }
        if !self.alone() {
            self.emit.bind(short);
            self.emit.refund(n);
            self.emit.leave(exit::BUDGET, self.src.block as i32);
        }
        self.cold_code();
        Translation {
            code: std::mem::replace(&mut self.emit, Emit::new(0, self.at, false, self.shared)).finish(),
            points: std::mem::take(&mut self.points),
            sys: std::mem::take(&mut self.sys),
            links: std::mem::take(&mut self.links),
            guest_len: (next - self.src.rip) as u16,
        }
    }

    fn cold_code(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            match cold {
                Cold::Slow { label, resume, ea, arg } => {
                    self.emit.bind(label);
                    self.checked_address(ea, arg as usize & 0xffff);
                    self.emit.call_helper(self.shared.mem, arg, resume);
                }
                Cold::Stub { label, link } => {
                    self.emit.bind(label);
                    self.links[link].stub = self.emit.here() as u32;
                    self.emit.leave(exit::LINK, (self.src.first_link + link as u32) as i32);
                }
                Cold::Far { label, target } => {
                    self.emit.bind(label);
                    self.emit.imm(T0, target);
                    if self.alone() {
                        self.emit.leave_lookup();
                    } else {
                        self.emit.jump_cache();
                    }
                }
            }
        }
    }

    // ---- flags ----

    /// The host's flags are about to be overwritten by the engine.
    fn clobber_flags(&mut self) {
        if self.flags == FlagsIn::Host {
            self.emit.save_flags();
        }
        self.flags = FlagsIn::Frame;
    }
    /// The guest's flags must be in the host's.
    fn need_flags(&mut self) {
        if self.flags == FlagsIn::Frame {
            self.emit.restore_flags();
            self.flags = FlagsIn::Both;
        }
    }
    /// The frame's copy must be valid.
    fn settle_flags(&mut self) {
        if self.flags == FlagsIn::Host {
            self.emit.save_flags();
            self.flags = FlagsIn::Both;
        }
    }
    /// Before an instruction that reads flags, or writes only some of them.
    fn flags_before(&mut self, insn: &Instruction) {
        let killed = insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set();
        let touched = touches_flags(insn);
        let partial = touched && (killed & STATUS != STATUS || is_shift(insn.mnemonic()));
        if insn.rflags_read() & STATUS != 0 || partial {
            self.need_flags();
        }
    }
    /// Right before the instruction itself: what a host fault in it finds.
    fn note_flags(&mut self) {
        let host = self.flags != FlagsIn::Frame;
        self.points.last_mut().expect("inside an instruction").flags_in_host = host;
    }
    fn flags_after(&mut self, insn: &Instruction) {
        if touches_flags(insn) {
            self.flags = FlagsIn::Host;
        }
    }

    // ---- addresses ----

    /// r11 = the address. May clobber r10 and flags.
    fn address(&mut self, ea: Ea) {
        match ea {
            Ea::Operand(insn) => self.operand_address(&insn, true),
            Ea::Plain(reg, disp) => self.emit.lea(T0, reg, disp),
            Ea::Plain32(reg, disp) => self.emit.lea32(T0, reg, disp),
            Ea::Kept(_) => self.emit.load_word(T0, self.at.tmp(1)),
        }
    }

    fn operand_address(&mut self, insn: &Instruction, segment: bool) {
        let base = insn.memory_base();
        let index = insn.memory_index();
        let disp = insn.memory_displacement64();
        let disp32 = disp as i32;
        let host = |t: &mut Self, reg: Register, scratch: u8| {
            let n = full_number(reg).expect("general register in an address");
            if in_frame(n) {
                t.emit.load(scratch, n as usize);
                scratch
            } else {
                n
            }
        };
        if base == Register::RIP || base == Register::EIP || base == Register::None && index == Register::None {
            self.emit.imm(T0, disp);
        } else if index == Register::None {
            let b = host(self, base, T0);
            self.emit.lea(T0, b, disp32);
        } else if base == Register::None {
            let i = host(self, index, T1);
            self.emit.lea_scaled(T0, i, insn.memory_index_scale(), disp32);
        } else {
            let b = host(self, base, T0);
            let i = host(self, index, T1);
            self.emit.lea_index(T0, b, i, insn.memory_index_scale(), disp32);
        }
        self.wrap_address(insn);
        if segment {
            self.add_segment(insn);
        }
    }

    /// Cuts r11 off at the width of the operand's address.
    fn wrap_address(&mut self, insn: &Instruction) {
        if self.code_32() {
            self.wrap_address_32(insn);
        } else if is_narrow(insn) {
            self.emit.zero_extend(T0);
        }
    }

    /// r11 += the base of the operand's segment.
    fn add_segment(&mut self, insn: &Instruction) {
        if self.code_32() {
            return self.add_segment_32(insn);
        }
        match insn.memory_segment() {
            Register::FS => self.emit.add_word(T0, self.at.seg_base(crate::state::seg::FS)),
            Register::GS => self.emit.add_word(T0, self.at.seg_base(crate::state::seg::GS)),
            _ => {}
        }
    }

    /// Makes `size` bytes at `ea` accessible: afterwards r10 is the addend. Flags are in the frame.
    fn access(&mut self, ea: Ea, size: usize, write: bool) {
        self.clobber_flags();
        let arg = size as i32 | (write as i32) << 16 | self.checked_segment(ea);
        self.checked_address(ea, size);
        if self.alone() {
            let resume = self.emit.label();
            self.emit.call_helper(self.shared.mem_alone, arg, resume);
            self.emit.bind(resume);
        } else {
            // On a miss the address is computed again there and the whole check is repeated.
            let (label, resume) = (self.emit.label(), self.emit.label());
            self.emit.bind(resume);
            // r11 must be the address when the check is repeated: the helper leaves it in the frame.
            self.emit.tlb_check(size, write, label);
            self.cold.push(Cold::Slow { label, resume, ea, arg: arg | (self.points.len() as i32 - 1) << 20 });
        }
    }

    /// After a store in a block of one instruction: takes the bytes to where they belong.
    fn stored(&mut self) {
        if self.alone() {
            self.settle_flags();
            self.flags = FlagsIn::Frame;
            let resume = self.emit.label();
            self.emit.call_helper(self.shared.write_back, 0, resume);
            self.emit.bind(resume);
        }
    }
}
