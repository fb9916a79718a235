//! Groups of accesses: one check for all accesses of a trace that go out from the same value of a register.
//!
//! **In:** the instructions of a trace. **Out:** for each access, whether an earlier check covers it, or which bytes a check made now should
//! cover so that later ones need none.
//!
//! A register's value is known relative to an *origin*: the value it had when it was last loaded with something unknown. PUSH, POP, CALL, LEA
//! and additions of constants move it, copies share its origin. Accesses at known distances from one origin make a group; the first of them
//! checks the bytes of all, as far as they lie close together, with permission to write if any of them writes.
//!
//! Invariant: what a check covers stays accessible until the trace is left: while a trace runs nothing empties a site but helpers, and
//! those do not go back to a trace after they did ([`crate::engine`]). Whether a group's check fails decides only *how* its instruction is
//! executed: it then runs alone, and only what it accesses itself is accessed.
use super::trace::Step;
use super::{full_number, in_frame, writes};
use crate::classify::Kind;
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

/// An access at a known distance from an origin.
#[derive(Debug, Clone, Copy)]
struct Access {
    step: usize,
    origin: u16,
    /// Of its first byte.
    offset: i32,
    size: i32,
    write: bool,
}

/// Bytes that have been checked.
#[derive(Debug, Clone, Copy)]
struct Checked {
    origin: u16,
    start: i32,
    end: i32,
    write: bool,
    /// The site that holds the addend.
    site: i32,
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
    /// Its bytes are checked; the addend is in this site.
    Checked(i32),
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
        let mut add = |register: usize, disp: i32, size: usize, write: bool| {
            let value = registers.values[register];
            if size <= SIZE
                && let Some(offset) = value.offset.checked_add(disp).filter(|o| NEAR.contains(o))
            {
                self.accesses.push(Access { step, origin: value.origin, offset, size: size as i32, write });
            }
        };
        match what.kind {
            Kind::Sys => match insn.code() {
                Code::Pushfq => add(RSP, -8, 8, true),
                Code::Popfq => add(RSP, 0, 8, false),
                _ => {}
            },
            Kind::Silicon | Kind::Branch => {
                let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory);
                if let Some(i) = operand
                    && super::is_simple(insn)
                    && !matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Pop)
                    && !is_bit_string(insn)
                    && let Some((register, disp)) = base(insn)
                {
                    let write = writes(info.info(insn).op_access(i));
                    add(register, disp, insn.memory_size().size(), write);
                }
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

    /// How instruction `step` should access `size` bytes at a register's value plus `disp`.
    pub(super) fn plan(&self, step: usize, register: u8, disp: i32, size: usize, write: bool) -> Plan {
        let value = self.now.values[register as usize];
        let alone = Plan::Check(Cover { start: disp, size, write, many: false });
        let start = value.offset.checked_add(disp).filter(|o| size <= SIZE && NEAR.contains(o));
        let Some(start) = start else { return alone };
        let end = start + size as i32;
        let covers = |c: &&Checked| c.origin == value.origin && c.start <= start && end <= c.end && c.write >= write;
        if let Some(checked) = self.checked.iter().rev().find(covers) {
            return Plan::Checked(checked.site);
        }
        let span = if value.origin == self.now.values[RSP].origin { STACK_SPAN } else { SPAN };
        let (mut from, mut to, mut writes, mut many) = (start, end, write, false);
        let after = self.accesses.partition_point(|a| a.step < step);
        for a in self.accesses[after..].iter().filter(|a| a.origin == value.origin) {
            let (low, high) = (from.min(a.offset), to.max(a.offset + a.size));
            if high - low <= span {
                many |= a.step > step;
                (from, to, writes) = (low, high, writes | a.write);
            }
        }
        if !many {
            return alone;
        }
        Plan::Check(Cover { start: disp - (start - from), size: (to - from) as usize, write: writes, many })
    }
    /// For each instruction of a trace whether all it accesses is covered by checks before it. `restless`: it has no site.
    pub(super) fn quiet(
        &self,
        steps: &[Step],
        restless: &dyn Fn(&Step) -> bool,
        info: &mut InstructionInfoFactory,
        quiet: &mut Vec<bool>,
    ) {
        let mut trial = Self { accesses: self.accesses.clone(), now: self.now.clone(), checked: Vec::new() };
        for (k, step) in steps.iter().enumerate() {
            let (from, to) = (self.accesses.partition_point(|a| a.step < k), self.accesses.partition_point(|a| a.step <= k));
            // What the engine does of system instructions is its own affair.
            let mut all = step.kind != Kind::Sys && to - from == count(step);
            for access in &self.accesses[from..to] {
                // Any register with that origin does.
                let Some(register) = trial.now.values.iter().position(|v| v.origin == access.origin) else {
                    all = false;
                    continue;
                };
                let disp = access.offset - trial.now.values[register].offset;
                let plan = trial.plan(k, register as u8, disp, access.size as usize, access.write);
                if let Plan::Check(cover) = plan {
                    all = false;
                    if !restless(step) {
                        trial.check(register as u8, cover, 0);
                    }
                }
            }
            quiet.push(all);
            trial.step(step, info);
        }
    }
    /// That check is made, with its addend in `site`. Registers are as they were in `plan`.
    pub(super) fn check(&mut self, register: u8, cover: Cover, site: i32) {
        let value = self.now.values[register as usize];
        let Some(start) = value.offset.checked_add(cover.start).filter(|o| NEAR.contains(o)) else { return };
        self.checked.push(Checked { origin: value.origin, start, end: start + cover.size as i32, write: cover.write, site });
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

/// Whether a register's accesses can be in groups: it must be in the host's.
pub(super) fn can_lead(register: u8) -> bool {
    !in_frame(register)
}
