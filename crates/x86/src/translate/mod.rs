//! From guest bytes to host code, one block at a time.
//!
//! **In:** the bytes of a page, an address in it, and the mode. **Out:** host code for two known places, what is likely to run and what is not, with
//! the notes that make it exact: where each instruction starts, where jumps to other blocks can be linked, the sites of its accesses.
//!
//! Two kinds of blocks:
//! - *Many* instructions, a trace ([`trace`]): touches only plain RAM, through sites ([`crate::sites`]) and the soft TLB. Whatever is out of
//!   the ordinary (a fault, a device, a store to a watched page, an access across pages) leaves the block *before* the instruction, which then runs alone.
//! - *Alone*: one instruction, every access through a helper that can do everything; it leaves after it.
//!
//! Invariant: at every point where code can be left, general registers, flags, RIP and the number of retired instructions are exact, or
//! can be made so from what is there ([`flags`]). At block borders the frame's copy of the flags is valid, or owed ([`owed`]).
mod access;
mod branch;
mod flags;
mod forms;
mod groups;
mod insn;
mod legacy;
mod owed;
mod system;
mod trace;
mod vex;

use crate::Features;
use crate::classify::{Kind, Unit, unit};
use crate::emit::{Emit, Shared};
use crate::frame::{FrameAt, exit};
use crate::sites::Site;
use crate::undefined::{Independent, independent};
use flags::{Flags, Next, STATUS, clobbered, effect, liveness};
use groups::{By, Groups, Place};
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
pub use owed::Owing;
use trace::{Follow, Step, gather};

/// What translated code depends on besides its bytes and addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mode(pub u16);

impl Mode {
    /// User permissions.
    pub const USER: u16 = 1;
    /// CR0.TS is set.
    pub const TS: u16 = 2;
    /// One instruction, all accesses through helpers.
    pub const ALONE: u16 = 4;
    /// GS can be accessed up to 4 GiB without a check ([`crate::segmentation::is_open`]). In 32-bit code only.
    pub const GS_OPEN: u16 = 1 << 5;
    /// The same for FS.
    pub const FS_OPEN: u16 = 1 << 6;
    /// Code that is not 64-bit: 32-bit code, with flat segments unless it runs alone.
    pub const CODE_32: u16 = 1 << 7;
    /// [`SHORT_TRACE`] instructions at most: for the last steps before a stop.
    pub const SHORT: u16 = 8;
    /// CR0.EM is set.
    pub const EM: u16 = 1 << 4;
    /// VEX-encoded vector instructions are switched on.
    pub const AVX: u16 = 1 << 8;
    /// Each access is checked by itself: where a trace goes on when the bytes of a group turn out to lie on two pages.
    pub const UNGROUPED: u16 = 1 << 9;
    /// Whether any of these bits is set.
    pub fn has(self, bits: u16) -> bool {
        self.0 & bits != 0
    }
}

/// The start of one guest instruction in host code.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// Host address.
    pub host: u32,
    /// Offset of the guest instruction in its page.
    pub guest: u16,
    /// When the instruction itself executes, the guest's status flags are in the host's.
    pub flags_in_host: bool,
    /// If they are neither there nor in the frame: host code that makes them and leaves; else 0.
    pub fix: u32,
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
    /// Another way there, for targets that take flags that are owed.
    pub owing: Option<Owing>,
    /// To its block of mode [`Mode::UNGROUPED`].
    pub ungrouped: bool,
}

/// A translated block.
#[derive(Default)]
pub struct Translation {
    /// Host code that is likely to run, for [`Source::host`].
    pub code: Vec<u8>,
    /// Host code that is not, for [`Source::cold`].
    pub cold: Vec<u8>,
    /// New sites, from [`Source::first_site`] on.
    pub sites: Vec<Site>,
    /// One a guest instruction.
    pub points: Vec<Point>,
    /// Instructions that `sys` executes, by index.
    pub sys: Vec<(u16, Instruction)>,
    /// Direct jumps.
    pub links: Vec<Link>,
    /// Host address of the entry for whoever is linked.
    pub entry: u32,
    /// The same for whoever comes by the jump cache, who may owe flags that are made from RSP.
    pub published: u32,
    /// The same for whoever is linked and owes flags, and the registers that may not be needed to make them.
    pub takes: Option<(u32, u16)>,
    /// Offsets in the page of the first byte of guest code and of the one behind the last.
    pub guest: (u16, u16),
}

/// How an instruction is to check its accesses, as was learnt when it ran.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manner {
    /// It accesses so many pages in turn that a site does not help: by the soft TLB.
    pub restless: bool,
    /// By itself: those of a group it led too often crossed into another page.
    pub loner: bool,
}

/// What a block is to be made of.
pub struct Source<'a> {
    /// The guest bytes of the page of `rip`; or, if it straddles or runs alone, from the instruction on.
    pub bytes: &'a [u8],
    /// Where in its page the first byte is. Not as `rip` says if the code segment has a base.
    pub offset: u16,
    /// Guest virtual address.
    pub rip: u64,
    /// Mode.
    pub mode: Mode,
    /// The CPU model's features.
    pub features: Features,
    /// Instructions at most.
    pub max: u32,
    /// The first instruction crosses the page: the block is it alone and has no links.
    pub straddles: bool,
    /// Host address for the code that is likely to run.
    pub host: usize,
    /// Host address for the rest.
    pub cold: usize,
    /// The block's number, and the number its first link will get.
    pub block: u32,
    /// See `block`.
    pub first_link: u32,
    /// Host address that its first site will get.
    pub first_site: u32,
    /// It ran often: it is worth a trace, and sites. Else it is a block up to its first branch, which counts how often it runs.
    pub hot: bool,
    /// How often, then.
    pub trace_after: u32,
    /// How the instruction at an offset of the page is to check its accesses.
    pub manner: &'a dyn Fn(u16) -> Manner,
    /// How often the block at an offset of the page has run, as far as is known.
    pub runs: &'a dyn Fn(u16) -> u64,
}

impl Source<'_> {
    /// The bytes of an instruction of the block.
    fn bytes_of(&self, insn: &Instruction) -> &[u8] {
        let single = self.straddles || self.mode.has(Mode::ALONE);
        let from = if single { 0 } else { (insn.ip() & 0xfff) as usize };
        &self.bytes[from..from + insn.len()]
    }
}

/// Instructions in a trace at most.
pub const MAX_TRACE: u32 = 96;
/// The same for a block of mode [`Mode::SHORT`].
pub const SHORT_TRACE: u32 = 8;

/// A decoder for code of a mode, and for a model: what it lacks decodes as older hardware did (without BMI1 F3 0F BC is BSF, not TZCNT; the hint space
/// 0F0D, 0F18..0F1F is nothing but NOPs).
pub fn decoder(bytes: &[u8], rip: u64, mode: Mode, features: Features) -> Decoder<'_> {
    let mut options = DecoderOptions::FORCE_RESERVED_NOP;
    if !features.has(Features::BMI1) {
        options |= DecoderOptions::NO_MPFX_0FBC;
    }
    if !features.has(Features::LZCNT) {
        options |= DecoderOptions::NO_MPFX_0FBD;
    }
    Decoder::with_ip(if mode.has(Mode::CODE_32) { 32 } else { 64 }, bytes, rip, options)
}

/// Decodes one instruction.
pub fn decode(bytes: &[u8], rip: u64, mode: Mode, features: Features) -> Instruction {
    decoder(bytes, rip, mode, features).decode()
}

/// The length of what is no instruction only because of its operands or prefixes (a gather that names a register twice).
pub fn length_if_refused(bytes: &[u8], rip: u64, mode: Mode) -> Option<usize> {
    let bits = if mode.has(Mode::CODE_32) { 32 } else { 64 };
    let insn = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NO_INVALID_CHECK).decode();
    (!insn.is_invalid()).then_some(insn.len())
}

/// Bits of the argument of the helper for accesses in blocks of many instructions, besides the size (bits 0 to 15), write (16) and the instruction's
/// number (from bit 20 on).
pub mod helper_arg {
    /// The bytes are those of a group: the instruction accesses only some of them, and perhaps does not write.
    pub const GROUP: i32 = 1 << 17;
}

/// Scratch registers of translated code.
const T0: u8 = 11;
const T1: u8 = 10;

/// An effective address, as often as it is needed.
#[derive(Clone, Copy, Debug)]
enum Ea {
    /// The memory operand of the instruction.
    Operand(Instruction),
    /// A register that holds itself, plus a displacement (stack).
    Plain(u8, i32),
    /// The same in 32-bit code.
    Plain32(u8, i32),
    /// Kept in a scratch word of the frame; the memory operand of the instruction.
    Kept(Instruction),
    /// What a group's check begins at.
    Place(Place),
}

/// Code to be put apart, and where the jumps to it are (offsets of displacements in the hot code).
enum Cold {
    /// A check failed, of `arg`'s bytes at `ea`.
    /// `counter`: the site that notes how often a group fails which is checked by the soft TLB.
    Slow {
        from: usize,
        site: Option<(i32, bool)>,
        counter: Option<i32>,
        ea: Ea,
        write: bool,
        arg: i32,
        retry: usize,
        flags: Flags,
    },
    /// Unlinked direct jump from hot code.
    Stub { from: usize, link: usize },
    /// A conditional jump leaves the trace, which was paid for `rest` instructions more.
    Exit { from: usize, target: u64, rest: i32, flags: Flags },
    /// After a host fault: makes the flags.
    Fix { point: usize, flags: Flags },
    /// Makes the flags that a loop owes to itself; the address goes to `owed` in the hot code.
    Maker { place: usize, flags: Flags },
    /// The budget is too small.
    Short { from: usize, n: i32 },
    /// The jump cache does not know an address that the guest computed, after RSP was moved.
    LookUp { from: usize, moved: i32 },
    /// The block ran often.
    Hot { from: usize },
    /// Somebody came by the jump cache who owes flags, which this block does not take; it goes on at `back`.
    Owed { from: usize, back: usize },
}

/// What one translation leaves to the next: memory, and nothing else.
pub struct Workshop {
    hot: Emit,
    cold: Emit,
    info: InstructionInfoFactory,
    apart: Vec<Cold>,
    steps: Vec<Step>,
    live: Vec<bool>,
    clobbered: Vec<bool>,
    quiet: Vec<bool>,
    done: Translation,
}

impl Workshop {
    /// Takes back what a translation was made of.
    pub fn recycle(&mut self, mut done: Translation) {
        done.code.clear();
        done.cold.clear();
        done.sites.clear();
        done.points.clear();
        done.sys.clear();
        done.links.clear();
        self.done = done;
    }
    /// For code that uses this frame and these routines.
    pub fn new(at: FrameAt, shared: Shared) -> Self {
        let emit = || Emit::new(0, at, false, shared);
        Self {
            hot: emit(),
            cold: emit(),
            info: InstructionInfoFactory::new(),
            apart: Vec::new(),
            steps: Vec::new(),
            live: Vec::new(),
            clobbered: Vec::new(),
            quiet: Vec::new(),
            done: Translation::default(),
        }
    }
}

struct Translator<'a> {
    src: &'a Source<'a>,
    /// Where code goes: at first what is likely to run, then the rest.
    emit: &'a mut Emit,
    /// The other one.
    apart: &'a mut Emit,
    at: FrameAt,
    shared: Shared,
    silicon: Independent,
    flags: Flags,
    info: &'a mut InstructionInfoFactory,
    points: Vec<Point>,
    sys: Vec<(u16, Instruction)>,
    links: Vec<Link>,
    sites: Vec<Site>,
    cold: &'a mut Vec<Cold>,
    /// Memory for code.
    buffers: (Vec<u8>, Vec<u8>),
    /// Instructions in the trace.
    len: usize,
    /// The instruction being translated.
    current: usize,
    /// For each instruction, whether the flags after it can be seen.
    live: &'a mut Vec<bool>,
    /// For each instruction, whether a check will clobber its flags ([`flags::clobbered`]).
    clobbered: &'a mut Vec<bool>,
    /// The word of the frame that an operand was kept in last.
    slot: usize,
    /// Accesses that share checks.
    groups: Groups,
    /// What r10 still holds from an access before, if anything.
    held: Option<By>,
    /// For each instruction, whether all it accesses was checked before.
    quiet: &'a mut Vec<bool>,
    /// See [`Translation`].
    entry: usize,
    published: usize,
    takes: Option<(u32, u16)>,
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

/// Whether the address of the memory operand is 32 bits wide.
fn is_narrow(insn: &Instruction) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    base.is_gpr32()
        || index.is_gpr32()
        || base == Register::EIP
        || insn.memory_displ_size() == 4 && base == Register::None && index == Register::None
}

/// Whether an instruction can leave the trace before it executes: it accesses memory, is a branch or a system instruction, or can
/// fault on the host. `quiet`: all that it accesses was checked before.
fn leaves(step: &Step, quiet: bool) -> bool {
    match step.kind {
        Kind::Branch | Kind::Sys => true,
        Kind::Silicon => checks(&step.insn) && !quiet || can_fault(&step.insn),
        _ => false,
    }
}

/// Whether the code for an instruction leaves r10 alone, but for what it says itself ([`Translator::held`]).
fn keeps_r10(step: &Step) -> bool {
    match step.kind {
        Kind::Nop | Kind::Silicon => true,
        Kind::Branch => step.follow != Follow::No,
        _ => false,
    }
}

/// Whether an instruction that the silicon executes accesses memory.
fn checks(insn: &Instruction) -> bool {
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) && insn.mnemonic() != Mnemonic::Lea;
    memory || insn.is_stack_instruction()
}

/// Whether the instruction itself, without its memory operand, can fault on the host.
fn can_fault(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Wait) || unit(insn) != Unit::Integer
}

/// Translates one block.
pub fn translate(src: &Source, at: FrameAt, shared: Shared, workshop: &mut Workshop) -> Translation {
    workshop.hot.restart(src.host, src.mode.has(Mode::USER));
    workshop.cold.restart(src.cold, src.mode.has(Mode::USER));
    workshop.apart.clear();
    workshop.steps.clear();
    let done = std::mem::take(&mut workshop.done);
    let t = Translator {
        src,
        emit: &mut workshop.hot,
        apart: &mut workshop.cold,
        at,
        shared,
        silicon: independent(),
        flags: Flags::FRAME,
        info: &mut workshop.info,
        points: done.points,
        sys: done.sys,
        links: done.links,
        sites: done.sites,
        buffers: (done.code, done.cold),
        cold: &mut workshop.apart,
        len: 0,
        current: 0,
        live: &mut workshop.live,
        clobbered: &mut workshop.clobbered,
        slot: 0,
        groups: Groups::none(),
        held: None,
        quiet: &mut workshop.quiet,
        entry: src.host,
        published: src.host,
        takes: None,
    };
    t.block(&mut workshop.steps)
}

impl Translator<'_> {
    fn alone(&self) -> bool {
        self.src.mode.has(Mode::ALONE)
    }
    /// Whether the block counts how often it runs.
    fn counts(&self) -> bool {
        !self.src.hot && !self.src.straddles && self.src.max > SHORT_TRACE
    }
    /// Host address of a new site. One that is never filled serves as a counter, in its first word.
    fn new_site(&mut self, retry: usize, size: usize, bits: u8) -> i32 {
        let address = self.src.first_site as i32 + (self.sites.len() * size_of::<Site>()) as i32;
        self.sites.push(Site::new(retry, size, bits));
        address
    }

    fn block(mut self, steps: &mut Vec<Step>) -> Translation {
        // Collect first: the budget is paid for all at entry.
        let next = gather(self.src, steps, self.info);
        let steps = &steps[..];
        self.len = steps.len();
        let grouped = self.src.hot && !self.alone() && !self.code_32();
        self.quiet.clear();
        if grouped {
            self.groups = Groups::new(steps, self.info);
            let manner = |step: &Step| (self.src.manner)((step.insn.ip() & 0xfff) as u16);
            self.groups.quiet(steps, &manner, self.info, self.quiet);
        } else {
            self.quiet.resize(steps.len(), false);
        }
        let quiet = &*self.quiet;
        let of = steps.iter().zip(quiet).map(|(s, &quiet)| {
            let reads = s.insn.rflags_read() & STATUS != 0;
            (leaves(s, quiet), reads, if s.kind == Kind::Silicon { effect(&s.insn, &self.silicon) } else { flags::Effect::None })
        });
        liveness(self.live, of);
        let of = steps.iter().zip(quiet).map(|(s, &quiet)| match s.kind {
            Kind::Nop => Next::Passes,
            Kind::Branch if s.insn.is_jcc_short_or_near() && s.follow != Follow::No => Next::Passes,
            Kind::Branch if s.insn.is_jmp_short_or_near() && s.follow != Follow::No => Next::Passes,
            Kind::Silicon if checks(&s.insn) && !quiet => Next::Check,
            // Their accesses are checked, and they end the trace.
            Kind::Branch => Next::Check,
            Kind::Silicon if effect(&s.insn, &self.silicon) == flags::Effect::None => Next::Passes,
            // They leave CF, for which the rest is asked for.
            Kind::Silicon if matches!(s.insn.mnemonic(), Mnemonic::Inc | Mnemonic::Dec) => Next::Passes,
            _ => Next::Ends,
        });
        clobbered(self.clobbered, of);
        let n = steps.len() as i32;
        self.open(steps);
        if self.counts() && n > 0 {
            let counter = self.new_site(0, 1, 0);
            let from = self.emit.count_down(counter);
            self.cold.push(Cold::Hot { from });
        }
        if self.alone() {
            self.emit.refund(-1);
        } else if n > 0 {
            let from = self.emit.pay(n);
            self.cold.push(Cold::Short { from, n });
        }
        for (k, step) in steps.iter().enumerate() {
            let insn = &step.insn;
            self.current = k;
            if !keeps_r10(step) {
                self.held = None;
            }
            self.points.push(Point {
                host: self.emit.here() as u32,
                guest: (insn.ip() & 0xfff) as u16,
                flags_in_host: false,
                fix: 0,
            });
            match step.kind {
                Kind::Nop => {}
                Kind::Sys => self.sys_insn(k, insn, k + 1 == steps.len()),
                Kind::Direction => {
                    self.clobber_flags();
                    self.emit.direction(insn.mnemonic() == Mnemonic::Std);
                }
                Kind::Branch if self.code_32() => self.branch_32(insn, step.follow),
                Kind::Silicon if self.code_32() => self.silicon_32(insn),
                Kind::Branch => self.branch(insn, step.follow),
                Kind::Silicon => self.silicon(insn),
                Kind::Invalid | Kind::NoFpu => unreachable!("never put into a block"),
            }
            if !keeps_r10(step) {
                self.held = None;
            }
            if grouped {
                self.groups.step(step, self.info);
            }
        }
        if steps.is_empty() {
            // The first instruction must run alone.
            self.emit.imm(T0, self.src.rip);
            self.emit.store_word(self.at.rip(), T0);
            self.emit.leave(exit::ALONE, 0);
        } else if !matches!(steps.last(), Some(Step { kind: Kind::Branch, follow: Follow::No, .. })) {
            self.end_at(self.wrapped(next));
        }
        // Where the code segment has a base, the instruction runs alone, and its address in the page is another.
        let start = self.src.offset;
        let offsets = |s: &Step| {
            let from = start.wrapping_add((s.insn.ip() & 0xfff) as u16).wrapping_sub((self.src.rip & 0xfff) as u16);
            (from, from + s.insn.len() as u16)
        };
        let guest = steps.iter().map(offsets).fold((start, start), |(a, b), (from, to)| (a.min(from), b.max(to)));
        let (code, cold) = self.cold_code();
        if self.counts() && n > 0 {
            self.sites[0].tag = self.src.trace_after.into();
        }
        let (entry, published, takes) = (self.entry as u32, self.published as u32, self.takes);
        let (points, sys, links, sites) = (self.points, self.sys, self.links, self.sites);
        Translation { code, cold, points, sys, links, sites, guest, entry, published, takes }
    }

    /// A group's check failed, of the bytes from r11 on. If they lie on two pages, goes on where each access is checked by itself.
    fn across_pages(&mut self, arg: i32, flags: Flags) {
        let size = arg & 0xffff;
        let k = (arg as u32 >> 20) as usize;
        let on_one = self.emit.unless_across(size);
        self.flags = flags;
        self.settle_flags();
        self.emit.refund((self.len - k) as i32);
        let (patch, stub) = self.link_out();
        let target = self.src.rip & !0xfff | u64::from(self.points[k].guest);
        self.links.push(Link { patch, stub, target, owing: None, ungrouped: true });
        self.emit.bind(on_one);
    }

    /// The way out by the next link, in cold code: a jump to be patched, which leads just behind itself while it is not (a displacement of 0, as emitted), where the block is left.
    /// The link's `patch` and `stub`.
    fn link_out(&mut self) -> (u32, u32) {
        let patch = (self.src.cold + self.emit.jmp_out()) as u32;
        let stub = self.emit.here() as u32;
        self.emit.leave(exit::LINK, (self.src.first_link as usize + self.links.len()) as i32);
        (patch, stub)
    }

    /// Emits what was put apart and leads the hot code's jumps there.
    fn cold_code(&mut self) -> (Vec<u8>, Vec<u8>) {
        let (mut hot, mut cold) = std::mem::take(&mut self.buffers);
        self.emit.take(&mut hot);
        std::mem::swap(&mut self.emit, &mut self.apart);
        let base = self.src.host;
        // Stubs that are found on the way are appended.
        let mut i = 0;
        while i < self.cold.len() {
            let mut here = self.emit.here();
            let from = match self.cold[i] {
                Cold::Slow { from, site, counter, ea, write, arg, retry, flags } => {
                    let group = arg & helper_arg::GROUP != 0;
                    if group || site.is_some() {
                        self.checked_address(ea, arg as usize & 0xffff);
                    }
                    if group {
                        self.across_pages(arg, flags);
                    }
                    if let Some((address, constant)) = site {
                        self.emit.site_miss(address, write, constant);
                        let index = (address as u32 - self.src.first_site) as usize / size_of::<Site>();
                        self.sites[index].slow = self.emit.here() as u32;
                    }
                    self.flags = flags;
                    if site.is_none() && self.flags.settled() {
                        if !group {
                            self.emit.unchecked(write);
                        }
                    } else {
                        self.settle_flags();
                        self.checked_address(ea, arg as usize & 0xffff);
                    }
                    if let Some(counter) = counter {
                        self.emit.note_site(counter);
                    }
                    self.emit.call_mem(arg, retry as i32);
                    Some(from)
                }
                Cold::Stub { from, link } => {
                    self.links[link].stub = here as u32;
                    self.emit.leave(exit::LINK, (self.src.first_link + link as u32) as i32);
                    Some(from)
                }
                Cold::Exit { from, target, rest, flags } if !self.can_link(target) && flags.passes() => {
                    let maker = here as i32;
                    self.maker(flags);
                    here = self.emit.here();
                    self.emit.refund(rest);
                    self.emit.owe(maker);
                    self.emit.jump_cache_to(target);
                    Some(from)
                }
                Cold::Exit { from, target, rest, flags } => {
                    self.emit.refund(rest);
                    self.flags = flags;
                    let owing = self.can_link(target).then(|| flags.inputs()).flatten();
                    self.settle_flags();
                    if self.can_link(target) {
                        let (patch, stub) = self.link_out();
                        let owing = owing.map(|needs| self.owing_exit(from, here as u32, rest, flags, needs));
                        self.links.push(Link { patch, stub, target, owing, ungrouped: false });
                    } else if self.alone() {
                        self.emit.imm(T0, target);
                        self.emit.leave_lookup();
                    } else {
                        self.emit.owe(0);
                        self.emit.jump_cache_to(target);
                    }
                    Some(from)
                }
                Cold::Fix { point, flags } => {
                    self.points[point].fix = here as u32;
                    self.flags = flags.elsewhere();
                    self.need_flags();
                    self.emit.jmp_abs(self.shared.flags);
                    None
                }
                Cold::Maker { place, flags } => {
                    self.maker(flags);
                    hot[place..place + 4].copy_from_slice(&(here as i32).to_le_bytes());
                    None
                }
                Cold::Owed { from, back } => {
                    self.emit.settle_and_go(back as i32);
                    Some(from)
                }
                Cold::LookUp { from, moved } => {
                    self.emit.look_up(self.src.block as i32, moved);
                    Some(from)
                }
                Cold::Hot { from } => {
                    self.leave_head(exit::HOT);
                    Some(from)
                }
                Cold::Short { from, n } => {
                    self.emit.refund(n);
                    self.leave_head(exit::BUDGET);
                    Some(from)
                }
            };
            if let Some(from) = from {
                let displacement = (here as i64 - (base + from + 4) as i64) as i32;
                hot[from..from + 4].copy_from_slice(&displacement.to_le_bytes());
            }
            i += 1;
        }
        self.emit.take(&mut cold);
        (hot, cold)
    }
}
