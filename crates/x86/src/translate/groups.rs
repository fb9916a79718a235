//! Groups of accesses: one check for all accesses of a trace that go out from the same value of a register.
//!
//! **In:** the instructions of a trace. **Out:** for each access, whether an earlier check covers it, or which bytes a check made now should
//! cover so that later ones need none.
//!
//! A register's value is known relative to an *origin*: the value it had when it was last loaded with something unknown. PUSH, POP, CALL, LEA
//! and additions of constants move it, copies share its origin. Accesses at known distances from one origin make a group; the first of them
//! checks the bytes of all, as far as they lie close together, with permission to write if any of them writes. The same goes for a register and an
//! index times a scale; there the host address that the check found is kept in the frame.
//!
//! Invariant: what a check covers stays accessible until the trace is left: while a trace runs nothing empties a site but helpers, and
//! those do not go back to a trace after they did ([`crate::engine`]). Whether a group's check fails decides only *how* its instruction is
//! executed: it then runs in ungrouped code ([`super::Mode::UNGROUPED`]), and only what it accesses itself is accessed.
use super::trace::Step;
use super::{Manner, full_number, in_frame, writes};
use crate::classify::Kind;
use crate::frame::BASES;
use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

/// Bytes from the first to the last of a group at most. What is far apart is likely to lie on two pages.
const SPAN: i32 = 128;
/// The same for groups on the stack, whose depth differs less between two visits.
const STACK_SPAN: i32 = 256;
/// Bytes of one access that can be in a group.
const SIZE: usize = 64;
const RSP: usize = 4;
/// Distances from an origin that are looked at; sums of these do not overflow.
const NEAR: std::ops::Range<i32> = -(1 << 28)..1 << 28;

/// A register's value: so many bytes from an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Value {
    origin: u16,
    offset: i32,
}

/// An address as an instruction names it: a register, and perhaps one more times 1, 2, 4 or 8, plus a displacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub base: u8,
    pub index: Option<(u8, u8)>,
    pub disp: i32,
}

impl Place {
    /// A register plus a displacement.
    pub(super) fn plain(base: u8, disp: i32) -> Self {
        Self { base, index: None, disp }
    }
    /// The memory operand, if its registers hold themselves and it is not relative to FS or GS.
    pub(super) fn of(insn: &Instruction) -> Option<Self> {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let held = |reg: Register| (reg.is_gpr64() && !in_frame(reg.number() as u8)).then_some(reg.number() as u8);
        if matches!(insn.memory_segment(), Register::FS | Register::GS) {
            return None;
        }
        let index = match index {
            Register::None => None,
            _ => Some((held(index)?, insn.memory_index_scale() as u8)),
        };
        Some(Self { base: held(base)?, index, disp: insn.memory_displacement64() as i32 })
    }
}

/// What the addresses of a group have in common: the origins of base and index, and the scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Origin {
    base: u16,
    index: Option<(u16, u8)>,
}

/// An access at a known distance from an origin.
#[derive(Debug, Clone, Copy)]
struct Access {
    step: usize,
    place: Place,
    origin: Origin,
    /// Of its first byte.
    offset: i32,
    size: i32,
    write: bool,
}

/// Bytes that have been checked.
#[derive(Debug, Clone, Copy)]
struct Checked {
    origin: Origin,
    start: i32,
    end: i32,
    write: bool,
    /// What leads to them.
    by: By,
}

/// What leads to bytes that have been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// The addend in this site.
    Addend(i32),
    /// The addend, in this word of [`crate::frame::Frame::bases`].
    Kept(usize),
    /// The host address of the first of them, in this word of [`crate::frame::Frame::bases`].
    Base(usize),
}

/// What a new check should cover, relative to the register now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cover {
    /// Displacement of the first byte.
    pub start: i32,
    pub size: usize,
    pub write: bool,
    /// More than the access itself.
    pub many: bool,
}

/// How an access is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Its bytes are checked: they begin so far behind the first that was.
    Checked(By, i32),
    /// It needs a check, which may cover more.
    Check(Cover),
}

/// What registers hold.
#[derive(Clone)]
struct Registers {
    values: [Value; 16],
    next: u16,
}

impl Registers {
    fn new() -> Self {
        Self { values: std::array::from_fn(|i| Value { origin: i as u16, offset: 0 }), next: 16 }
    }
    fn forget(&mut self, register: usize) {
        self.values[register] = Value { origin: self.next, offset: 0 };
        self.next += 1;
    }
    /// The origin of an address, and how far from it it is.
    fn resolve(&self, place: Place) -> Option<(Origin, i32)> {
        let base = self.values[place.base as usize];
        let (index, beyond) = match place.index {
            Some((index, scale)) => {
                let value = self.values[index as usize];
                (Some((value.origin, scale)), value.offset.checked_mul(scale.into())?)
            }
            None => (None, 0),
        };
        let offset = base.offset.checked_add(beyond)?.checked_add(place.disp)?;
        NEAR.contains(&offset).then_some((Origin { base: base.origin, index }, offset))
    }
    fn forget_all(&mut self) {
        (0..16).for_each(|register| self.forget(register));
    }
    fn shift(&mut self, register: usize, by: i32) {
        match self.values[register].offset.checked_add(by) {
            Some(offset) => self.values[register].offset = offset,
            None => self.forget(register),
        }
    }
    /// After an instruction.
    fn step(&mut self, step: &Step, info: &mut InstructionInfoFactory) {
        let insn = &step.insn;
        match step.kind {
            Kind::Nop | Kind::Direction => return,
            Kind::Sys => {
                match insn.code() {
                    Code::Cli | Code::Sti | Code::Swapgs => {}
                    Code::Pushfq => self.shift(RSP, -8),
                    Code::Popfq => self.shift(RSP, 8),
                    // It may change what is mapped.
                    _ => self.forget_all(),
                }
                return;
            }
            _ => {}
        }
        let register = |i: u32| match insn.op_kind(i) {
            OpKind::Register if insn.op_register(i).is_gpr64() => full_number(insn.op_register(i)).map(usize::from),
            _ => None,
        };
        let constant = |i: u32| match insn.op_kind(i) {
            OpKind::Immediate8to64 | OpKind::Immediate32to64 => Some(insn.immediate(i) as i64 as i32),
            _ => None,
        };
        match insn.mnemonic() {
            Mnemonic::Push => self.shift(RSP, insn.stack_pointer_increment()),
            Mnemonic::Pop => {
                self.shift(RSP, insn.stack_pointer_increment());
                if insn.op0_kind() == OpKind::Register {
                    self.forget(full_number(insn.op0_register()).map_or(RSP, usize::from));
                }
            }
            Mnemonic::Call => self.shift(RSP, insn.stack_pointer_increment()),
            Mnemonic::Leave => {
                self.values[RSP] = self.values[5];
                self.shift(RSP, insn.stack_pointer_increment().clamp(2, 8));
                self.forget(5);
                if insn.code() != Code::Leaveq {
                    self.forget(RSP);
                }
            }
            Mnemonic::Add | Mnemonic::Sub if register(0).is_some() && constant(1).is_some() => {
                let (to, by) = (register(0).unwrap_or(0), constant(1).unwrap_or(0));
                match if insn.mnemonic() == Mnemonic::Add { Some(by) } else { by.checked_neg() } {
                    Some(by) => self.shift(to, by),
                    None => self.forget(to),
                }
            }
            Mnemonic::Inc | Mnemonic::Dec if register(0).is_some() => {
                self.shift(register(0).unwrap_or(0), if insn.mnemonic() == Mnemonic::Inc { 1 } else { -1 });
            }
            Mnemonic::Mov if register(0).is_some() && register(1).is_some() => {
                self.values[register(0).unwrap_or(0)] = self.values[register(1).unwrap_or(0)];
            }
            Mnemonic::Lea if register(0).is_some() && base(insn).is_some() => {
                let (to, (from, disp)) = (register(0).unwrap_or(0), base(insn).unwrap_or((0, 0)));
                self.values[to] = self.values[from];
                self.shift(to, disp);
            }
            _ => {
                for used in info.info(insn).used_registers() {
                    if writes(used.access())
                        && let Some(n) = full_number(used.register())
                    {
                        self.forget(n.into());
                    }
                }
            }
        }
    }
}

/// Base register and displacement of a memory operand that has nothing else.
fn base(insn: &Instruction) -> Option<(usize, i32)> {
    let base = insn.memory_base();
    let plain = insn.memory_index() == Register::None && base.is_gpr64();
    plain.then(|| (base.number(), insn.memory_displacement64() as i32))
}

/// All accesses of a trace that can be in groups, and what has been checked so far.
pub(super) struct Groups {
    accesses: Vec<Access>,
    now: Registers,
    checked: Vec<Checked>,
}

impl Groups {
    /// Those of a trace. None, if it is no use.
    pub(super) fn new(steps: &[Step], info: &mut InstructionInfoFactory) -> Self {
        let mut groups = Self::none();
        let mut registers = Registers::new();
        for (k, step) in steps.iter().enumerate() {
            groups.note(k, step, &registers, info);
            registers.step(step, info);
        }
        groups
    }
    /// For code without groups.
    pub(super) fn none() -> Self {
        Self { accesses: Vec::new(), now: Registers::new(), checked: Vec::new() }
    }

    fn note(&mut self, step: usize, what: &Step, registers: &Registers, info: &mut InstructionInfoFactory) {
        let insn = &what.insn;
        let mut at = |place: Place, size: usize, write: bool| {
            if size <= SIZE
                && let Some((origin, offset)) = registers.resolve(place)
            {
                self.accesses.push(Access { step, place, origin, offset, size: size as i32, write });
            }
        };
        match what.kind {
            Kind::Sys => match insn.code() {
                Code::Pushfq => at(Place::plain(RSP as u8, -8), 8, true),
                Code::Popfq => at(Place::plain(RSP as u8, 0), 8, false),
                _ => {}
            },
            Kind::Silicon | Kind::Branch => {
                let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory);
                if let Some(i) = operand
                    && !matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Pop)
                    && !is_bit_string(insn)
                    && let Some(place) = Place::of(insn)
                {
                    let write = writes(info.info(insn).op_access(i));
                    at(place, insn.memory_size().size(), write);
                }
                let mut add = |register: usize, disp, size, write| at(Place::plain(register as u8, disp), size, write);
                match insn.mnemonic() {
                    Mnemonic::Push => {
                        let by = insn.stack_pointer_increment();
                        add(RSP, by, -by as usize, true);
                    }
                    Mnemonic::Call => add(RSP, -8, 8, true),
                    Mnemonic::Pop => add(RSP, 0, insn.stack_pointer_increment() as usize, false),
                    Mnemonic::Ret => add(RSP, 0, 8, false),
                    Mnemonic::Leave => add(5, 0, 8, false),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// How instruction `step` should access `size` bytes at an address.
    pub(super) fn plan(&self, step: usize, place: Place, size: usize, write: bool, manner: Manner) -> Plan {
        let alone = Plan::Check(Cover { start: place.disp, size, write, many: false });
        let Some((origin, start)) = self.now.resolve(place).filter(|_| size <= SIZE) else { return alone };
        let end = start + size as i32;
        let covers = |c: &&Checked| c.origin == origin && c.start <= start && end <= c.end && c.write >= write;
        if let Some(checked) = self.checked.iter().rev().find(covers) {
            return Plan::Checked(checked.by, start - checked.start);
        }
        let needs_word = origin.index.is_some() || manner.restless;
        if manner.loner || needs_word && self.bases() == BASES {
            return alone;
        }
        let stack = origin.index.is_none() && origin.base == self.now.values[RSP].origin;
        let span = if stack { STACK_SPAN } else { SPAN };
        let (mut from, mut to, mut writes, mut many) = (start, end, write, false);
        let after = self.accesses.partition_point(|a| a.step < step);
        for a in self.accesses[after..].iter().filter(|a| a.origin == origin) {
            let (low, high) = (from.min(a.offset), to.max(a.offset + a.size));
            if high - low <= span {
                many |= a.step > step;
                (from, to, writes) = (low, high, writes | a.write);
            }
        }
        if !many {
            return alone;
        }
        Plan::Check(Cover { start: place.disp - (start - from), size: (to - from) as usize, write: writes, many })
    }
    /// How many words of [`crate::frame::Frame::bases`] are taken.
    pub(super) fn bases(&self) -> usize {
        self.checked.iter().filter(|c| matches!(c.by, By::Base(_) | By::Kept(_))).count()
    }
    /// For each instruction of a trace whether all it accesses is covered by checks before it. `manner`: how it checks.
    pub(super) fn quiet(
        &self,
        steps: &[Step],
        manner: &dyn Fn(&Step) -> Manner,
        info: &mut InstructionInfoFactory,
        quiet: &mut Vec<bool>,
    ) {
        let mut trial = Self { accesses: self.accesses.clone(), now: self.now.clone(), checked: Vec::new() };
        for (k, step) in steps.iter().enumerate() {
            let (from, to) = (self.accesses.partition_point(|a| a.step < k), self.accesses.partition_point(|a| a.step <= k));
            // What the engine does of system instructions is its own affair.
            let mut all = step.kind != Kind::Sys && to - from == count(step);
            for access in &self.accesses[from..to] {
                let plan = trial.plan(k, access.place, access.size as usize, access.write, manner(step));
                if let Plan::Check(cover) = plan {
                    all = false;
                    trial.check(access.place, cover, 0, manner(step));
                }
            }
            quiet.push(all);
            trial.step(step, info);
        }
    }
    /// That check is made, at `site` if it has one; says what leads to the bytes from now on. Registers are as they were in `plan`.
    pub(super) fn check(&mut self, place: Place, cover: Cover, site: i32, manner: Manner) -> Option<By> {
        let (origin, start) = self.now.resolve(Place { disp: cover.start, ..place })?;
        let by = match place.index {
            None if !manner.restless => By::Addend(site),
            None if cover.many => By::Kept(self.bases()),
            Some(_) if cover.many => By::Base(self.bases()),
            _ => return None,
        };
        self.checked.push(Checked { origin, start, end: start + cover.size as i32, write: cover.write, by });
        Some(by)
    }
    /// An instruction is translated.
    pub(super) fn step(&mut self, step: &Step, info: &mut InstructionInfoFactory) {
        self.now.step(step, info);
    }
}

/// How many accesses an instruction makes.
fn count(step: &Step) -> usize {
    let insn = &step.insn;
    let operand = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) && insn.mnemonic() != Mnemonic::Lea;
    operand as usize + insn.is_stack_instruction() as usize
}

/// BT and its like whose bit may lie anywhere.
fn is_bit_string(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc) && insn.op1_kind() == OpKind::Register
}

const _: () = assert!(SPAN <= 2048 && STACK_SPAN <= 2048, "a group's bytes should fit a page");
