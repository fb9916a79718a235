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
use crate::classify::{Kind, classify};
use crate::emit::{Emit, Shared};
use crate::frame::{FrameAt, exit};
use dynasmrt::DynamicLabel;
use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

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
pub const DECODER_OPTIONS: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::FORCE_RESERVED_NOP;

/// Decodes one instruction.
pub fn decode(bytes: &[u8], rip: u64) -> Instruction {
    Decoder::with_ip(64, bytes, rip, DECODER_OPTIONS).decode()
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
    /// Kept in a scratch word of the frame.
    Kept,
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
        let mut decoder = Decoder::with_ip(64, self.src.bytes, self.src.rip, DECODER_OPTIONS);
        let mut insns = Vec::new();
        let mut ended = false;
        while !ended && (insns.len() as u32) < self.src.max && decoder.can_decode() {
            let insn = decoder.decode();
            let kind = classify(&insn, self.src.mode.has(Mode::FPU_OFF));
            if matches!(kind, Kind::Invalid | Kind::NoFpu) {
                // Runs alone, where it raises its exception. (Also bytes cut at the end of the page.)
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
            self.points.push(Point { host: self.emit.here() as u32, guest: (insn.ip() - self.src.rip) as u16, flags_in_host: false });
            next = insn.next_ip();
            match kind {
                Kind::Nop => {}
                Kind::Sys => self.sys_insn(k, insn),
                Kind::Direction => {
                    self.clobber_flags();
                    self.emit.direction(insn.mnemonic() == Mnemonic::Std);
                }
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
            self.go_to(next);
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
                    self.address(ea);
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
            Ea::Kept => self.emit.load_word(T0, self.at.tmp(1)),
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
        if is_narrow(insn) {
            self.emit.zero_extend(T0);
        }
        if segment {
            self.add_segment(insn);
        }
    }

    /// r11 += the base of the operand's segment.
    fn add_segment(&mut self, insn: &Instruction) {
        match insn.memory_segment() {
            Register::FS => self.emit.add_word(T0, self.at.seg_base(crate::state::seg::FS)),
            Register::GS => self.emit.add_word(T0, self.at.seg_base(crate::state::seg::GS)),
            _ => {}
        }
    }

    /// Makes `size` bytes at `ea` accessible: afterwards r10 is the addend. Flags are in the frame.
    fn access(&mut self, ea: Ea, size: usize, write: bool) {
        self.clobber_flags();
        let arg = size as i32 | (write as i32) << 16;
        self.address(ea);
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

    // ---- jumps ----

    fn same_page(&self, target: u64) -> bool {
        !self.src.straddles && target >> 12 == self.src.rip >> 12
    }

    /// Goes on at a known address. The frame's flags are valid; host flags may be clobbered.
    fn go_to(&mut self, target: u64) {
        if self.alone() {
            self.emit.imm(T0, target);
            self.emit.leave_lookup();
        } else if self.same_page(target) {
            let label = self.emit.label();
            self.emit.jmp(label);
            self.link(label, target);
        } else {
            self.emit.imm(T0, target);
            self.emit.jump_cache();
        }
    }

    /// The jump just emitted, to `label`, can be linked to `target`.
    fn link(&mut self, label: DynamicLabel, target: u64) {
        let link = self.links.len();
        self.links.push(Link { patch: self.emit.here() as u32 - 4, stub: 0, target });
        self.cold.push(Cold::Stub { label, link });
    }

    /// Goes on at the address in r11, which may be any. `moved` is by how much the branch has changed RSP: if there can be no code,
    /// the branch is what faults, and [`crate::engine`] takes it back.
    fn go_to_register(&mut self, moved: i32) {
        self.settle_flags();
        if self.alone() {
            self.emit.leave_lookup();
        } else {
            self.emit.jump_cache_or(self.src.block as i32, moved);
        }
    }

    /// A label that, when jumped to, goes on at `target`. To be called right after the jump was emitted with that label.
    fn taken(&mut self, label: DynamicLabel, target: u64) {
        if self.same_page(target) && !self.alone() {
            self.link(label, target);
        } else {
            self.cold.push(Cold::Far { label, target });
        }
    }

    fn branch(&mut self, insn: &Instruction) {
        let next = insn.next_ip();
        if insn.is_jcc_short_or_near() {
            self.need_flags();
            self.settle_flags();
            let label = self.emit.label();
            self.emit.jcc(insn.condition_code() as u8 - 1, label);
            self.taken(label, insn.near_branch_target());
            self.go_to(next);
        } else if insn.is_jmp_short_or_near() {
            self.settle_flags();
            self.go_to(insn.near_branch_target());
        } else if insn.is_call_near() {
            self.push_value(next);
            self.settle_flags();
            self.go_to(insn.near_branch_target());
        } else if insn.is_jmp_near_indirect() {
            self.load_target(insn);
            self.go_to_register(0);
        } else if insn.is_call_near_indirect() {
            self.load_target(insn);
            self.emit.store_word(self.at.tmp(2), T0);
            self.push_value(next);
            self.emit.load_word(T0, self.at.tmp(2));
            // The push left the flags in the frame.
            self.go_to_register(-8);
        } else if insn.is_jcx_short() {
            self.settle_flags();
            let wide = insn.code() == Code::Jrcxz_rel8_64;
            let label = self.emit.label();
            self.count_jump(label, wide, insn.near_branch_target());
            self.go_to(next);
        } else if insn.is_loop() || insn.is_loopcc() {
            self.loop_insn(insn);
        } else {
            // RET, RET imm16.
            let extra = if insn.op_count() == 1 { insn.immediate(0) as i32 } else { 0 };
            let size = if matches!(insn.code(), Code::Retnw | Code::Retnw_imm16) { 2 } else { 8 };
            self.access(Ea::Plain(4, 0), size, false);
            if size == 8 {
                self.emit.load_sum(T0, 4, T1, 0);
            } else {
                self.emit.load_sum16(T0, 4, T1, 0);
            }
            self.emit.lea(4, 4, size as i32 + extra);
            self.go_to_register(size as i32 + extra);
        }
    }

    /// jrcxz/jecxz to `target`.
    fn count_jump(&mut self, label: DynamicLabel, wide: bool, target: u64) {
        self.emit.jrcxz(label, wide);
        self.taken(label, target);
    }

    fn loop_insn(&mut self, insn: &Instruction) {
        use Code::*;
        let wide = matches!(insn.code(), Loop_rel8_64_RCX | Loope_rel8_64_RCX | Loopne_rel8_64_RCX);
        let next = insn.next_ip();
        let is_e = insn.mnemonic() == Mnemonic::Loope;
        let is_ne = insn.mnemonic() == Mnemonic::Loopne;
        if is_e || is_ne {
            self.need_flags();
        }
        self.settle_flags();
        self.emit.dec_rcx(wide);
        let done = self.emit.label();
        self.count_jump(done, wide, next);
        if is_e || is_ne {
            let done = self.emit.label();
            self.emit.jcc(if is_e { 5 } else { 4 }, done);
            self.taken(done, next);
        }
        self.go_to(insn.near_branch_target());
    }

    /// r11 = target of an indirect jump or call.
    fn load_target(&mut self, insn: &Instruction) {
        if insn.op0_kind() == OpKind::Register {
            let n = full_number(insn.op0_register()).expect("general register");
            self.settle_flags();
            self.emit.load(T0, n as usize);
            if insn.op0_register().size() == 2 {
                self.emit.mov_zx16(T0);
            }
            return;
        }
        let size = insn.memory_size().size();
        self.access(Ea::Operand(*insn), size, false);
        self.operand_again(insn);
        if size == 2 {
            self.emit.load_sum16(T0, T0, T1, 0);
        } else {
            self.emit.load_sum(T0, T0, T1, 0);
        }
    }

    /// r11 = the operand's address once more; r10 stays the addend. Clobbers flags.
    fn operand_again(&mut self, insn: &Instruction) {
        let uses_t1 = full_number(insn.memory_index()).is_some_and(in_frame);
        if uses_t1 {
            self.emit.store_word(self.at.tmp(0), T1);
        }
        self.operand_address(insn, true);
        if uses_t1 {
            self.emit.load_word(T1, self.at.tmp(0));
        }
    }

    /// Pushes a 64-bit constant. Flags end up in the frame.
    fn push_value(&mut self, value: u64) {
        self.access(Ea::Plain(4, -8), 8, true);
        self.emit.imm(T0, value);
        self.emit.store_sum(T0, 4, T1, -8);
        self.emit.lea(4, 4, -8);
        self.stored();
    }

    // ---- instructions ----

    fn sys_insn(&mut self, k: usize, insn: &Instruction) {
        self.clobber_flags();
        self.sys.push((k as u16, *insn));
        let resume = self.emit.label();
        self.emit.call_helper(self.shared.sys, k as i32, resume);
        self.emit.bind(resume);
    }

    fn silicon(&mut self, insn: &Instruction) {
        match insn.mnemonic() {
            Mnemonic::Push => return self.push(insn),
            Mnemonic::Pop => return self.pop(insn),
            Mnemonic::Leave => {
                let size = if insn.code() == Code::Leavew { 2 } else { 8 };
                self.access(Ea::Plain(5, 0), size, false);
                if size == 2 {
                    self.emit.load_sum16(T0, 5, T1, 0);
                    self.emit.lea(4, 5, 2);
                    self.emit.mov16(5, T0);
                } else {
                    self.emit.load_sum(T0, 5, T1, 0);
                    self.emit.lea(4, 5, 8);
                    self.emit.mov(5, T0);
                }
                return;
            }
            Mnemonic::Lea => return self.lea(insn),
            Mnemonic::Clflush => return self.access(Ea::Operand(*insn), 1, false),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register =>
            {
                return self.bit_string(insn);
            }
            _ => {}
        }
        let mut insn = *insn;
        // Nothing else writes guest memory meanwhile, and the prefixes that older hardware ignores must not mean
        // something newer to this host.
        insn.set_has_lock_prefix(false);
        insn.set_has_rep_prefix(false);
        insn.set_has_repne_prefix(false);
        match (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory) {
            Some(_) => self.with_memory(&insn),
            None => self.registers_only(&insn),
        }
    }

    /// Guest registers in the frame that the explicit operands name: (number, must be loaded, must be stored).
    fn spilled(&mut self, insn: &Instruction) -> Vec<(u8, bool, bool)> {
        let mut found: Vec<(u8, bool, bool)> = Vec::new();
        let info = self.info.info(insn);
        for i in 0..insn.op_count() {
            if insn.op_kind(i) != OpKind::Register {
                continue;
            }
            let reg = insn.op_register(i);
            let Some(n) = full_number(reg).filter(|&n| in_frame(n)) else { continue };
            let access = info.op_access(i);
            let stores = writes(access);
            let loads = access != OpAccess::Write || reg.size() < 4;
            match found.iter_mut().find(|f| f.0 == n) {
                Some(f) => {
                    f.1 |= loads;
                    f.2 |= stores;
                }
                None => found.push((n, loads, stores)),
            }
        }
        found
    }

    fn rename(insn: &mut Instruction, guest: u8, host: u8) {
        for i in 0..insn.op_count() {
            if insn.op_kind(i) == OpKind::Register && full_number(insn.op_register(i)) == Some(guest) {
                let reg = same_width(insn.op_register(i), host);
                insn.set_op_register(i, reg);
            }
        }
    }

    fn registers_only(&mut self, insn: &Instruction) {
        let spilled = self.spilled(insn);
        let mut out = *insn;
        // At most two: no instruction here names three general registers.
        assert!(spilled.len() <= 2, "{insn:?} names too many registers");
        let mut hosts = [0u8; 2];
        for (i, &(n, ..)) in spilled.iter().enumerate() {
            let other = if i == 0 { spilled.get(1).map(|s| s.0) } else { Some(hosts[0]) };
            // r10 and r11 stand for themselves where they can.
            hosts[i] = match n {
                10 | 11 => n,
                _ => {
                    if other == Some(T0) {
                        T1
                    } else {
                        T0
                    }
                }
            };
        }
        self.flags_before(insn);
        for (i, &(n, loads, _)) in spilled.iter().enumerate() {
            if loads {
                self.emit.load(hosts[i], n as usize);
            }
        }
        // Rename in two steps is not needed: r10 and r11 keep their names, only r15 changes.
        for (i, &(n, ..)) in spilled.iter().enumerate() {
            if hosts[i] != n {
                Self::rename(&mut out, n, hosts[i]);
            }
        }
        self.note_flags();
        let ok = self.emit.raw(&out);
        assert!(ok, "cannot encode {out:?}");
        for (i, &(n, _, stores)) in spilled.iter().enumerate() {
            if stores {
                self.emit.store(n as usize, hosts[i]);
            }
        }
        self.flags_after(insn);
    }

    fn with_memory(&mut self, insn: &Instruction) {
        let op = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory).expect("caller saw one");
        let access = self.info.info(insn).op_access(op);
        let write = writes(access);
        let size = insn.memory_size().size();
        assert!(size > 0 && size <= 512, "{insn:?} has a memory operand of {size} bytes");
        self.access(Ea::Operand(*insn), size, write);
        let mut out = *insn;
        Self::plain_code(&mut out);

        let spilled = self.spilled(insn);
        let high = (0..insn.op_count())
            .filter(|&i| insn.op_kind(i) == OpKind::Register)
            .map(|i| insn.op_register(i))
            .find(|&r| is_high_byte(r));
        assert!(spilled.len() + high.is_some() as usize <= 1, "{insn:?} names too many registers");

        let base = insn.memory_base();
        let simple = !self.alone()
            && insn.memory_index() == Register::None
            && !matches!(insn.memory_segment(), Register::FS | Register::GS)
            && base.is_gpr64()
            && !in_frame(base.number() as u8);
        let data = if simple {
            // [base + addend + disp]; r11 is free.
            Self::set_memory(&mut out, base, Register::R10, insn.memory_displacement64() as i32);
            T0
        } else {
            self.operand_again(insn);
            if spilled.is_empty() && high.is_none() {
                Self::set_memory(&mut out, Register::R11, Register::R10, 0);
            } else {
                self.emit.add_no_flags(T0, T1);
                Self::set_memory(&mut out, Register::R11, Register::None, 0);
            }
            T1
        };
        self.flags_before(insn);
        if let Some(&(n, loads, _)) = spilled.first() {
            if loads {
                self.emit.load(data, n as usize);
            }
            Self::rename(&mut out, n, data);
        }
        if let Some(reg) = high {
            self.emit.load_high(data, reg.number() as u8 & 3);
            for i in 0..out.op_count() {
                if out.op_kind(i) == OpKind::Register && out.op_register(i) == reg {
                    out.set_op_register(i, if data == T0 { Register::R11L } else { Register::R10L });
                }
            }
        }
        // The exact place of a host fault: everything above only prepared.
        self.note_flags();
        let ok = self.emit.raw(&out);
        assert!(ok, "cannot encode {out:?}");
        if let Some(&(n, _, true)) = spilled.first() {
            self.emit.store(n as usize, data);
        }
        if let Some(reg) = high {
            let info = self.info.info(insn);
            let stores = (0..insn.op_count()).any(|i| {
                insn.op_kind(i) == OpKind::Register
                    && insn.op_register(i) == reg
                    && writes(info.op_access(i))
            });
            if stores {
                self.emit.store_high(data, reg.number() as u8 & 3);
            }
        }
        self.flags_after(insn);
        if write {
            self.stored();
        }
    }

    /// Forms whose memory operand is an absolute address become their general forms.
    fn plain_code(insn: &mut Instruction) {
        let code = match insn.code() {
            Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
            Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
            Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
            Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
            Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
            Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
            Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
            Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
            _ => return,
        };
        insn.set_code(code);
    }

    fn set_memory(insn: &mut Instruction, base: Register, index: Register, disp: i32) {
        insn.set_segment_prefix(Register::None);
        insn.set_memory_base(base);
        insn.set_memory_index(index);
        insn.set_memory_index_scale(1);
        insn.set_memory_displacement64(disp as i64 as u64);
        insn.set_memory_displ_size(match disp {
            0 => 0,
            -128..=127 => 1,
            _ => 8,
        });
    }

    fn lea(&mut self, insn: &Instruction) {
        let dest = insn.op0_register();
        let n = full_number(dest).expect("general register");
        self.operand_address(insn, false);
        match dest.size() {
            8 => {}
            4 => self.emit.zero_extend(T0),
            _ => {
                // The upper bits of the destination stay.
                self.emit.load(T1, n as usize);
                self.emit.mov16(T1, T0);
                self.emit.mov(T0, T1);
            }
        }
        if in_frame(n) {
            self.emit.store(n as usize, T0);
        } else {
            self.emit.mov(n, T0);
        }
    }

    fn push(&mut self, insn: &Instruction) {
        use OpKind::*;
        let size = if insn.stack_pointer_increment() == -2 { 2 } else { 8 };
        match insn.op0_kind() {
            Register => {
                let n = full_number(insn.op0_register()).expect("general register");
                self.access(Ea::Plain(4, -size), size as usize, true);
                let host = if in_frame(n) {
                    self.emit.load(T0, n as usize);
                    T0
                } else {
                    n
                };
                self.push_store(host, size);
            }
            Memory => {
                self.access(Ea::Operand(*insn), size as usize, false);
                self.operand_again(insn);
                if size == 2 {
                    self.emit.load_sum16(T0, T0, T1, 0);
                } else {
                    self.emit.load_sum(T0, T0, T1, 0);
                }
                self.emit.store_word(self.at.tmp(2), T0);
                self.access(Ea::Plain(4, -size), size as usize, true);
                self.emit.load_word(T0, self.at.tmp(2));
                self.push_store(T0, size);
            }
            _ => {
                self.access(Ea::Plain(4, -size), size as usize, true);
                self.emit.imm(T0, insn.immediate(0));
                self.push_store(T0, size);
            }
        }
    }

    fn push_store(&mut self, host: u8, size: i32) {
        if size == 2 {
            self.emit.store_sum16(host, 4, T1, -2);
        } else {
            self.emit.store_sum(host, 4, T1, -8);
        }
        self.emit.lea(4, 4, -size);
        self.stored();
    }

    fn pop(&mut self, insn: &Instruction) {
        let size = if insn.stack_pointer_increment() == 2 { 2 } else { 8 };
        self.access(Ea::Plain(4, 0), size as usize, false);
        if size == 2 {
            self.emit.load_sum16(T0, 4, T1, 0);
        } else {
            self.emit.load_sum(T0, 4, T1, 0);
        }
        if insn.op0_kind() == OpKind::Register {
            let n = full_number(insn.op0_register()).expect("general register");
            self.emit.lea(4, 4, size);
            if size == 2 {
                self.emit.load(T1, n as usize);
                self.emit.mov16(T1, T0);
                self.emit.mov(T0, T1);
            }
            if in_frame(n) {
                self.emit.store(n as usize, T0);
            } else {
                self.emit.mov(n, T0);
            }
            return;
        }
        // POP to memory: the address is computed with RSP already incremented (SDM vol. 2, POP); a fault leaves RSP as it was.
        self.emit.store_word(self.at.tmp(2), T0);
        let mut to = *insn;
        if insn.memory_base() == Register::ESP {
            // Before the sum is cut off at 32 bits.
            to.set_memory_displacement64(u64::from((insn.memory_displacement64() as u32).wrapping_add(size as u32)));
        }
        self.operand_address(&to, true);
        if insn.memory_base() == Register::RSP {
            self.emit.lea(T0, T0, size);
        }
        self.emit.store_word(self.at.tmp(1), T0);
        self.access(Ea::Kept, size as usize, true);
        self.address(Ea::Kept);
        self.emit.add_no_flags(T0, T1);
        self.emit.load_word(T1, self.at.tmp(2));
        if size == 2 {
            self.emit.store_at16(T1, T0);
        } else {
            self.emit.store_at(T1, T0);
        }
        self.emit.lea(4, 4, size);
        self.stored();
    }

    /// BT family with a register offset into memory: a bit string of any length (SDM vol. 2, BT).
    fn bit_string(&mut self, insn: &Instruction) {
        let reg = insn.op1_register();
        let n = full_number(reg).expect("general register") as usize;
        let bits = reg.size() as u32 * 8;
        self.clobber_flags();
        // The sum wraps at the address size; the segment's base comes after that.
        self.operand_address(insn, false);
        self.emit.bit_word_index(n, bits);
        self.emit.lea_index(T0, T0, T1, bits / 8, 0);
        if is_narrow(insn) {
            self.emit.zero_extend(T0);
        }
        self.add_segment(insn);
        self.emit.store_word(self.at.tmp(1), T0);
        let write = insn.mnemonic() != Mnemonic::Bt;
        self.access(Ea::Kept, bits as usize / 8, write);
        self.address(Ea::Kept);
        self.emit.add_no_flags(T0, T1);
        self.emit.bit_in_word(n, bits);
        self.need_flags();
        let mut out = *insn;
        out.set_has_lock_prefix(false);
        Self::set_memory(&mut out, Register::R11, Register::None, 0);
        out.set_op1_register(same_width(reg, T1));
        self.note_flags();
        let ok = self.emit.raw(&out);
        assert!(ok, "cannot encode {out:?}");
        self.flags = FlagsIn::Host;
        if write {
            self.stored();
        }
    }
}
