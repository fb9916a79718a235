//! Where the guest's status flags are while a trace runs, and how they are had back.
//!
//! The engine's own checks clobber the host's flags all the time, and whoever leaves a trace must find the guest's exact. Saving them costs
//! about six instructions, so it is put off: most flags come from an instruction that can be run again, or undone and done again, on
//! registers that still hold what is needed ([`Recipe`]). Where they do not, and a check is near, the missing operand is kept in the frame
//! ([`Translator::keeping`]). Only when neither the frame nor a recipe has them are the flags saved.
//!
//! Invariant: at every point where code can be left, at least one of host, frame and recipe has the flags.
use super::forms::{carries, general_form, register_form};
use super::{T0, T1, Translator, full_number, in_frame, is_high_byte, same_width};
use crate::emit::At;
use crate::undefined::Independent;
use iced_x86::{Instruction, Mnemonic, OpKind, Register, RflagsBits};

pub(super) const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What an instruction does to the status flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// Some of the flags before it show through.
    Partial,
    /// All flags follow from its operands.
    Full,
}

/// How flags are made again from registers. Clobbers r11 at most.
#[derive(Debug, Clone, Copy)]
pub(super) enum Recipe {
    /// Run this CMP or TEST of registers and constants once more.
    Again(Instruction),
    /// The instruction is ADD (or SUB) of something to this register, to which `moved` was added since without a trace in the flags: undo it in r11,
    /// and do it again there.
    Undo { add: bool, reg: u8, bytes: usize, source: Source, moved: i32 },
    /// TEST of this register with itself.
    Result { reg: u8, bytes: usize },
    /// TEST of the kept word `slot` with itself.
    KeptResult { slot: usize, bytes: usize },
    /// As `Undo`, of the kept word `slot`.
    KeptUndo { add: bool, slot: usize, bytes: usize, source: Source },
    /// The flags of a zero.
    Zero,
    /// Run this CMP or TEST, of a memory operand, with the kept word `slot` in its place.
    Memory(Instruction, usize),
    /// Run this instruction, on a register and perhaps a constant, on the kept word `slot`.
    Old(Instruction, usize),
    /// This ADC or SBB of a register or constant was made of the kept word `slot`. What it left there says what the carry was; with that, run it again.
    Carried(Instruction, usize),
}

/// What was added or subtracted.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    Constant(i32),
    Register(u8),
    Kept(usize),
}

impl Recipe {
    /// The guest registers it needs, a bit each.
    pub(super) fn inputs(&self) -> u16 {
        match *self {
            Self::Again(insn) | Self::Memory(insn, _) | Self::Carried(insn, _) => (0..insn.op_count())
                .filter(|&i| insn.op_kind(i) == OpKind::Register)
                .filter_map(|i| full_number(insn.op_register(i)))
                .fold(0, |mask, n| mask | 1 << n),
            Self::Undo { reg, source: Source::Register(other), .. } => 1 << reg | 1 << other,
            Self::Undo { reg, .. } | Self::Result { reg, .. } => 1 << reg,
            Self::KeptUndo { source: Source::Register(other), .. } => 1 << other,
            Self::Zero | Self::Old(..) | Self::KeptResult { .. } | Self::KeptUndo { .. } => 0,
        }
    }
}

/// What the host's flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    /// Anything.
    Other,
    /// The guest's, but for CF, which is anything.
    AllButCarry,
    /// The guest's.
    All,
}

/// INC or DEC: changed all flags but CF.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counted {
    inc: bool,
    /// The guest register; `None`: memory, the result is in [`COUNTED`].
    reg: Option<u8>,
    bytes: usize,
}

/// The word of the frame in which what INC or DEC left in memory is kept.
const COUNTED: usize = 2;

/// Where the flags are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flags {
    pub(super) host: Host,
    /// The frame has them, as they were before `counted`.
    frame: bool,
    /// How they are made again, as they were before `counted`.
    recipe: Option<Recipe>,
    /// What came after.
    counted: Option<Counted>,
    /// The frame has them only if none are owed ([`super::owed`]).
    pub(super) owed: bool,
}

impl Flags {
    /// In the frame: how every block begins.
    pub(super) const FRAME: Self = Self { host: Host::Other, frame: true, recipe: None, counted: None, owed: false };
    /// In the frame, unless they are owed.
    pub(super) const OWED: Self = Self { owed: true, ..Self::FRAME };
    /// In the host, where an instruction has just put them.
    fn made(recipe: Option<Recipe>) -> Self {
        Self { host: Host::All, frame: false, recipe, counted: None, owed: false }
    }
    /// Whether they can be made from RSP and kept operands alone, and must be.
    pub(super) fn passes(&self) -> bool {
        self.inputs().is_some_and(|inputs| inputs & !super::owed::RSP == 0)
    }
    /// The same where the host's flags are anything.
    pub(super) fn elsewhere(self) -> Self {
        Self { host: Host::Other, ..self }
    }
    /// There is another way to make them.
    pub(super) fn set_recipe(&mut self, recipe: Option<Recipe>) {
        self.recipe = recipe;
    }
    /// Whether the frame has them, or is owed them.
    pub(super) fn in_frame(&self) -> bool {
        self.frame && self.counted.is_none()
    }
    /// Whether the frame has them for whoever leaves here.
    pub(super) fn settled(&self) -> bool {
        self.in_frame() && !self.owed
    }
    /// Whether they can be had without the host's.
    fn can_be_made(&self) -> bool {
        self.frame || self.recipe.is_some()
    }
    /// The guest registers they are made from, if they must be and can be made.
    pub(super) fn inputs(&self) -> Option<u16> {
        let counted = self.counted.and_then(|c| c.reg).map_or(0, |reg| 1 << reg);
        (!self.in_frame() && self.can_be_made()).then(|| self.recipe.map_or(0, |r| r.inputs()) | counted)
    }
}

/// What an instruction that the silicon executes does to the status flags.
pub(super) fn effect(insn: &Instruction, silicon: &Independent) -> Effect {
    use Mnemonic::*;
    let m = insn.mnemonic();
    // The decoder says that a rotation through carry all the way round (RCR of a byte by 9) does not touch flags; the silicon writes OF.
    let touched = insn.rflags_modified() & STATUS != 0 || matches!(m, Rcl | Rcr);
    if !touched {
        return Effect::None;
    }
    let constant_shift = || {
        let mask = if insn.memory_size().size() == 8 || insn.op0_register().size() == 8 { 63 } else { 31 };
        let last = insn.op_count() - 1;
        match insn.op_kind(last) {
            OpKind::Immediate8 => insn.immediate8() as u32 & mask != 0,
            _ => false,
        }
    };
    let full = match m {
        And | Or | Xor | Test => silicon.logic,
        Shl | Sal | Shr | Sar => silicon.shift && constant_shift(),
        Shld | Shrd => silicon.double_shift && constant_shift(),
        Bsf | Bsr => silicon.scan,
        Rol | Ror | Rcl | Rcr => false,
        _ => (insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set()) & STATUS == STATUS,
    };
    if full { Effect::Full } else { Effect::Partial }
}

/// How the flags that an instruction leaves can be made again, if its inputs and result stay in registers.
pub(super) fn recipe(insn: &Instruction, silicon: &Independent) -> Option<Recipe> {
    use Mnemonic::*;
    let m = insn.mnemonic();
    let high = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && is_high_byte(insn.op_register(i)));
    if high {
        return None;
    }
    let reg0 = (insn.op0_kind() == OpKind::Register).then(|| insn.op0_register());
    let constant = matches!(
        insn.op_kind(insn.op_count().saturating_sub(1)),
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    );
    let reg1 = (insn.op_count() == 2 && insn.op1_kind() == OpKind::Register).then(|| insn.op1_register());
    let number = |r: Register| full_number(r).expect("general register");
    match m {
        Cmp | Test => {
            let (a, b) = (reg0?, reg1);
            if b.is_none() && !constant {
                return None;
            }
            let spilled = [Some(a), b].into_iter().flatten().filter(|&r| in_frame(number(r))).count();
            let same = b.is_some_and(|b| b == a);
            (spilled <= 1 || same).then_some(Recipe::Again(*insn))
        }
        Xor | Sub if reg0.is_some() && reg0 == reg1 => (m == Sub || silicon.logic).then_some(Recipe::Zero),
        And | Or | Xor if silicon.logic => {
            let reg = reg0?;
            Some(Recipe::Result { reg: number(reg), bytes: reg.size() })
        }
        Add | Sub => {
            let reg = reg0?;
            let source = if constant {
                Source::Constant(insn.immediate(1) as i32)
            } else {
                let other = reg1?;
                if number(other) == number(reg) {
                    return None;
                }
                Source::Register(number(other))
            };
            Some(Recipe::Undo { add: m == Add, reg: number(reg), bytes: reg.size(), source, moved: 0 })
        }
        _ => None,
    }
}

impl Translator<'_> {
    /// Puts the flags of a recipe into the host's. Clobbers r11.
    pub(super) fn cook(&mut self, recipe: Recipe) {
        match recipe {
            Recipe::Again(insn) => self.run_again(insn),
            Recipe::Undo { add, reg, bytes, source, moved } => {
                self.emit.load(T0, reg as usize);
                if moved != 0 {
                    self.emit.lea(T0, T0, -moved);
                }
                self.undo_and_redo(add, bytes, source);
            }
            Recipe::KeptUndo { add, slot, bytes, source } => {
                self.emit.load_word(T0, self.at.kept(slot));
                self.undo_and_redo(add, bytes, source);
            }
            Recipe::KeptResult { slot, bytes } => {
                self.emit.load_word(T0, self.at.kept(slot));
                self.emit.test_self(T0, bytes);
            }
            Recipe::Result { reg, bytes } => {
                let host = if in_frame(reg) {
                    self.emit.load(T0, reg as usize);
                    T0
                } else {
                    reg
                };
                self.emit.test_self(host, bytes);
            }
            Recipe::Zero => self.emit.zero(T0),
            Recipe::Memory(insn, slot) => {
                let mut out = insn;
                Self::set_memory(&mut out, Register::None, Register::None, self.at.kept(slot));
                self.run_again(out);
            }
            Recipe::Old(insn, slot) => {
                let mut out = insn;
                let n = full_number(insn.op0_register()).expect("general register");
                self.emit.load_word(T0, self.at.kept(slot));
                Self::rename(&mut out, n, T0);
                assert!(self.emit.raw(&out), "cannot encode {out:?}");
            }
            Recipe::Carried(insn, slot) => self.carry_again(&insn, slot),
        }
    }

    /// [`Recipe::Carried`].
    fn carry_again(&mut self, insn: &Instruction, slot: usize) {
        let dest = insn.op0_register();
        let (n, bytes) = (full_number(dest).expect("general register"), dest.size());
        let kept = self.at.kept(slot);
        if insn.mnemonic() == Mnemonic::Adc {
            self.emit.load(T0, n.into());
            self.emit.arith_word(false, T0, kept, bytes);
        } else {
            self.emit.load_word(T0, kept);
            self.emit.arith_guest(false, T0, n.into(), bytes);
        }
        match insn.op1_kind() {
            OpKind::Register => {
                let other = full_number(insn.op1_register()).expect("general register");
                self.emit.arith_guest(false, T0, other.into(), bytes);
            }
            _ => self.emit.arith_imm(false, T0, insn.immediate(1) as i32, bytes),
        }
        self.emit.carry_from_bit_0(T0);
        self.emit.load_word(T0, kept);
        let mut out = *insn;
        Self::rename(&mut out, n, T0);
        assert!(self.emit.raw(&out), "cannot encode {out:?}");
    }

    /// Undoes an addition (or subtraction) in r11, and does it again.
    fn undo_and_redo(&mut self, add: bool, bytes: usize, source: Source) {
        for add in [!add, add] {
            match source {
                Source::Constant(c) => self.emit.arith_imm(add, T0, c, bytes),
                Source::Register(n) => self.emit.arith_guest(add, T0, n as usize, bytes),
                Source::Kept(slot) => self.emit.arith_word(add, T0, self.at.kept(slot), bytes),
            }
        }
    }

    /// Runs a CMP or TEST that names at most one register that lives in the frame. Clobbers r11.
    fn run_again(&mut self, mut insn: Instruction) {
        let spilled = (0..insn.op_count())
            .filter(|&i| insn.op_kind(i) == OpKind::Register)
            .filter_map(|i| full_number(insn.op_register(i)))
            .find(|&n| in_frame(n));
        if let Some(n) = spilled {
            self.emit.load(T0, n as usize);
            Self::rename(&mut insn, n, T0);
        }
        assert!(self.emit.raw(&insn), "cannot encode {insn:?}");
    }

    /// The host's flags are about to be overwritten by the engine. Clobbers r11 if they must be saved.
    pub(super) fn clobber_flags(&mut self) {
        if !self.flags.can_be_made() {
            self.emit.save_flags();
            self.flags.frame = true;
        }
        self.flags.host = Host::Other;
    }
    /// The guest's flags must be in the host's. Clobbers r11.
    pub(super) fn need_flags(&mut self) {
        if self.flags.host == Host::All {
            return;
        }
        assert!(!self.flags.owed, "flags are asked for at the head of a block that is owed them");
        match (self.flags.recipe, self.flags.counted) {
            (Some(recipe), _) => self.cook(recipe),
            (None, Some(_)) => self.emit.restore_carry(),
            (None, None) => self.emit.restore_flags(),
        }
        if let Some(Counted { inc, reg, bytes }) = self.flags.counted {
            match reg {
                Some(reg) => self.emit.load(T0, reg as usize),
                None => self.emit.load_word(T0, self.at.kept(COUNTED)),
            }
            self.emit.lea(T0, T0, if inc { -1 } else { 1 });
            self.emit.count(inc, T0, bytes);
        }
        self.flags.host = Host::All;
    }
    /// Those of the guest's flags that `read` names must be in the host's. Clobbers r11.
    pub(super) fn need(&mut self, read: u32) {
        if self.flags.host == Host::Other || read & RflagsBits::CF != 0 {
            self.need_flags();
        }
    }
    /// The host's CF must be the guest's, its other flags may be anything. Clobbers r11.
    pub(super) fn need_carry(&mut self) {
        if self.flags.host == Host::All {
            return;
        }
        match self.flags.recipe {
            Some(_) => self.need_flags(),
            None => {
                self.emit.restore_carry();
                self.flags.host = Host::Other;
            }
        }
    }
    /// The frame's copy must be valid. Clobbers r11.
    pub(super) fn settle_flags(&mut self) {
        if std::mem::take(&mut self.flags.owed) {
            self.emit.settle_owed();
        }
        if !self.flags.in_frame() {
            self.need_flags();
            self.emit.save_flags();
            self.flags = Flags { frame: true, counted: None, ..self.flags };
        }
    }
    /// Guest registers (a bit each) are about to be overwritten by the current instruction, which leaves the flags alone or changes only some.
    /// Clobbers r11 and host flags.
    pub(super) fn protect(&mut self, written: u16) {
        let Some(inputs) = self.flags.inputs() else {
            // The frame has them: then the recipe is not needed. Or only the host.
            if self.flags.recipe.is_some_and(|r| r.inputs() & written != 0) {
                self.flags.recipe = None;
            }
            return;
        };
        if inputs & written == 0 {
            return;
        }
        if self.flags.host != Host::All && self.live_after() {
            self.need_flags();
        }
        // If nobody will ask for them, whatever the host's are pass for the guest's.
        self.flags = Flags::made(None);
    }
    /// A constant is about to be added to a guest register, which leaves the flags alone. Clobbers r11 and host flags.
    pub(super) fn protect_moved(&mut self, register: u8, by: i32) {
        if let Some(Recipe::Undo { reg, moved, source, .. }) = &mut self.flags.recipe
            && *reg == register
            && !matches!(source, Source::Register(n) if *n == register)
            && self.flags.counted.is_none_or(|c| c.reg != Some(register))
            && let Some(sum) = moved.checked_add(by)
        {
            *moved = sum;
            return;
        }
        self.protect(1 << register);
    }
    /// Before the silicon executes an instruction, after its address was checked: readers get their flags, and flags that would be lost
    /// are made. Clobbers r11.
    pub(super) fn flags_before(&mut self, insn: &Instruction, effect: Effect) {
        let read = insn.rflags_read() & STATUS;
        let partial = effect == Effect::Partial && self.live_after();
        if only_carry_matters(insn, read, effect) {
            // The others come out of the instruction, or stay in the frame.
            self.need_carry();
        } else if partial {
            self.need_flags();
        } else if read != 0 {
            self.need(read);
        }
        // What an instruction writes is dear to know; without recipes nobody wants to.
        if effect != Effect::Full && (self.flags.recipe.is_some() || self.flags.counted.is_some()) {
            let written = self.written(insn);
            self.protect(written);
        }
    }
    /// After the instruction.
    pub(super) fn flags_after(&mut self, insn: &Instruction, effect: Effect) {
        if effect != Effect::None {
            let recipe = if effect == Effect::Full { recipe(insn, &self.silicon) } else { None };
            self.flags = Flags::made(recipe);
        }
    }
    /// INC or DEC of a register whose flags before it can be made again: does it without them. Says whether it did.
    pub(super) fn count(&mut self, insn: &Instruction) -> bool {
        if !matches!(insn.mnemonic(), Mnemonic::Inc | Mnemonic::Dec) || is_high_byte(insn.op0_register()) {
            return false;
        }
        let Some(reg) = full_number(insn.op0_register()) else { return false };
        if self.flags.owed || !self.flags.can_be_made() || self.flags.recipe.is_some_and(|r| r.inputs() >> reg & 1 != 0) {
            return false;
        }
        let (inc, bytes) = (insn.mnemonic() == Mnemonic::Inc, insn.op0_register().size());
        if in_frame(reg) {
            self.emit.load(T0, reg as usize);
            self.emit.count(inc, T0, bytes);
            self.emit.store(reg as usize, T0);
        } else {
            self.emit.count(inc, reg, bytes);
        }
        let host = if self.flags.host == Host::All { Host::All } else { Host::AllButCarry };
        self.flags = Flags { host, counted: Some(Counted { inc, reg: Some(reg), bytes }), ..self.flags };
        true
    }
    /// Keeps what the flags are made from, where that is one register, so that it may change. RSP may stay, but will have changed by `moved`.
    /// Clobbers r11.
    pub(super) fn freeze_flags(&mut self, moved: i32) {
        if self.flags.inputs().is_none_or(|inputs| inputs == 0) {
            return;
        }
        if let Some(Counted { reg: Some(reg), inc, bytes }) = self.flags.counted {
            self.keep(reg, 0, COUNTED);
            self.flags.counted = Some(Counted { reg: None, inc, bytes });
        }
        let one = |insn: &Instruction| {
            let reg = insn.op0_register();
            let same = insn.op1_kind() != OpKind::Register || insn.op1_register() == reg;
            (insn.op0_kind() == OpKind::Register && same).then(|| full_number(reg)).flatten()
        };
        let recipe = match self.flags.recipe {
            Some(Recipe::Undo { reg: 4, add, bytes, source, moved: before })
                if !matches!(source, Source::Register(_)) && before.checked_add(moved).is_some() =>
            {
                Recipe::Undo { reg: 4, add, bytes, source, moved: before + moved }
            }
            Some(Recipe::Undo { reg, add, bytes, source, moved: before }) if !matches!(source, Source::Register(_)) => {
                let slot = self.next_slot();
                self.keep(reg, -before, slot);
                Recipe::KeptUndo { add, slot, bytes, source }
            }
            Some(Recipe::Result { reg, bytes }) => {
                let slot = self.next_slot();
                self.keep(reg, 0, slot);
                Recipe::KeptResult { slot, bytes }
            }
            Some(Recipe::Again(insn)) if one(&insn).is_some() => {
                let slot = self.next_slot();
                self.keep(one(&insn).unwrap_or_default(), 0, slot);
                let mut general = insn;
                general.set_code(general_form(insn.code()));
                Recipe::Old(general, slot)
            }
            _ => return,
        };
        self.flags.recipe = Some(recipe);
    }
    /// Keeps a guest register plus a constant. Clobbers r11.
    fn keep(&mut self, reg: u8, plus: i32, slot: usize) {
        let host = if in_frame(reg) || plus != 0 {
            self.emit.load(T0, reg as usize);
            if plus != 0 {
                self.emit.lea(T0, T0, plus);
            }
            T0
        } else {
            reg
        };
        self.emit.store_word(self.at.kept(slot), host);
    }
    /// The word to keep an operand in.
    fn next_slot(&mut self) -> usize {
        self.slot ^= 1;
        self.slot
    }
    /// Whether it pays to keep an operand of the current instruction for its flags: they will be clobbered by a check before they are overwritten.
    pub(super) fn keeping(&self) -> bool {
        !self.alone() && self.clobbered[self.current]
    }
    /// Before a silicon instruction without a memory operand, whose flags no recipe of registers makes: keeps the old value, if that helps.
    pub(super) fn keep_old(&mut self, insn: &Instruction, effect: Effect) -> Option<Recipe> {
        use Mnemonic::*;
        let fits = match insn.mnemonic() {
            Shl | Sal | Shr | Sar => true,
            Neg => true,
            Add => insn.op1_kind() == OpKind::Register && insn.op0_register() == insn.op1_register(),
            Adc | Sbb => carries(insn),
            _ => false,
        };
        if effect != Effect::Full || !fits || !self.keeping() || is_high_byte(insn.op0_register()) {
            return None;
        }
        let n = full_number(insn.op0_register())?;
        let slot = self.next_slot();
        let host = if in_frame(n) {
            self.emit.load(T0, n as usize);
            T0
        } else {
            n
        };
        self.emit.store_word(self.at.kept(slot), host);
        let carried = matches!(insn.mnemonic(), Adc | Sbb);
        Some(if carried { Recipe::Carried(*insn, slot) } else { Recipe::Old(*insn, slot) })
    }
    /// For a silicon instruction with a memory operand, whose bytes are at `at`: if it can be done on a register loaded with them, and
    /// the operand be kept, does so. Says whether it did.
    pub(super) fn with_kept_operand(&mut self, insn: &Instruction, at: At) -> bool {
        use Mnemonic::*;
        let m = insn.mnemonic();
        let bytes = insn.memory_size().size();
        let reg = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Register).map(|i| insn.op_register(i));
        let adds = matches!(m, Add | Sub) && insn.op1_kind() == OpKind::Memory;
        if !(adds || matches!(m, Cmp | Test) && (m == Cmp || self.silicon.logic))
            || !self.keeping()
            || reg.is_some_and(is_high_byte)
        {
            return false;
        }
        let Some(code) = register_form(insn.code()) else { return false };
        let slot = self.next_slot();
        self.emit.load_sized(T0, at, bytes);
        self.emit.store_word(self.at.kept(slot), T0);
        let n = reg.map(|r| full_number(r).expect("general register"));
        let mut out = *insn;
        let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory).expect("caller saw one");
        // r10 has served its turn.
        let host = n.map(|n| {
            if in_frame(n) {
                self.held = None;
                self.emit.load(T1, n as usize);
                T1
            } else {
                n
            }
        });
        if let (Some(n), Some(host)) = (n, host)
            && n != host
        {
            Self::rename(&mut out, n, host);
        }
        out.set_code(code);
        out.set_op_kind(operand, OpKind::Register);
        out.set_op_register(operand, same_width_of(bytes, T0));
        assert!(self.emit.raw(&out), "cannot encode {out:?}");
        let recipe = if adds {
            let n = n.expect("an operand that is a register");
            if in_frame(n) {
                self.emit.store(n as usize, T1);
            }
            Recipe::Undo { add: m == Add, reg: n, bytes, source: Source::Kept(slot), moved: 0 }
        } else {
            Recipe::Memory(*insn, slot)
        };
        self.flags = Flags::made(Some(recipe));
        true
    }
    /// For a silicon instruction whose destination is memory, at `at`: if its flags will be asked for in vain again and again, and can be made
    /// from its result, works on r11 and keeps that. Says whether it did.
    pub(super) fn with_kept_result(&mut self, insn: &Instruction, at: At) -> bool {
        use Mnemonic::*;
        let m = insn.mnemonic();
        let counts = matches!(m, Inc | Dec);
        let logic = matches!(m, And | Or | Xor);
        if !(counts || matches!(m, Add | Sub) || logic && self.silicon.logic)
            || insn.op0_kind() != OpKind::Memory
            || !self.keeping()
            || counts && (self.flags.owed || !self.flags.can_be_made())
        {
            return false;
        }
        let bytes = insn.memory_size().size();
        let reg = (!counts && insn.op1_kind() == OpKind::Register).then(|| insn.op1_register());
        let n = reg.map(|r| full_number(r).expect("general register"));
        if reg.is_some_and(is_high_byte) || n.is_some_and(in_frame) {
            return false;
        }
        let slot = if counts { COUNTED } else { self.next_slot() };
        self.emit.load_sized(T0, at, bytes);
        let mut out = *insn;
        out.set_op0_kind(OpKind::Register);
        out.set_op0_register(same_width_of(bytes, T0));
        assert!(self.emit.raw(&out), "cannot encode {out:?}");
        self.emit.store_sized(at, T0, bytes);
        self.emit.store_word(self.at.kept(slot), T0);
        if counts {
            let host = if self.flags.host == Host::All { Host::All } else { Host::AllButCarry };
            let counted = Some(Counted { inc: m == Inc, reg: None, bytes });
            self.flags = Flags { host, counted, ..self.flags };
            return true;
        }
        let source = n.map_or_else(|| Source::Constant(insn.immediate(1) as i32), Source::Register);
        self.flags = Flags::made(Some(match m {
            Add | Sub => Recipe::KeptUndo { add: m == Add, slot, bytes, source },
            _ => Recipe::KeptResult { slot, bytes },
        }));
        true
    }
    /// The current instruction may fault on the host from here on: where the fault will find the flags. Nothing that the instruction itself
    /// does to flags or registers may come before this.
    pub(super) fn note_flags(&mut self) {
        let k = self.points.len() - 1;
        self.points[k].flags_in_host = self.flags.host == Host::All;
        if self.flags.host != Host::All && !self.flags.in_frame() {
            self.cold.push(super::Cold::Fix { point: k, flags: self.flags });
        }
    }
    /// Whether anybody can see the flags as they are after the current instruction.
    fn live_after(&self) -> bool {
        self.live[self.current]
    }
}

/// For each instruction of a trace: whether its flags, if it sets any, are clobbered by a check before they are overwritten or saved for good.
/// Where a trace ends they are best owed, too.
pub(super) fn clobbered(all: &mut Vec<bool>, steps: impl DoubleEndedIterator<Item = Next>) {
    let mut after = true;
    all.clear();
    all.extend(steps.rev().map(|next| {
        let here = after;
        after = match next {
            Next::Check => true,
            Next::Ends => false,
            Next::Passes => after,
        };
        here
    }));
    all.reverse();
}

/// What an instruction means for flags that were set before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// A check clobbers them.
    Check,
    /// They are overwritten, in part at least, or saved.
    Ends,
    /// Nothing.
    Passes,
}

/// r10 or r11, so many bytes wide.
fn same_width_of(bytes: usize, number: u8) -> Register {
    let like = match bytes {
        1 => Register::R8L,
        2 => Register::R8W,
        4 => Register::R8D,
        _ => Register::R8,
    };
    same_width(like, number)
}

/// Whether an instruction makes nothing of the flags before it but of CF: ADC and SBB (all flags are new), INC and DEC (all but CF are), and
/// what reads CF and changes none.
fn only_carry_matters(insn: &Instruction, read: u32, effect: Effect) -> bool {
    match insn.mnemonic() {
        Mnemonic::Adc | Mnemonic::Sbb | Mnemonic::Inc | Mnemonic::Dec => true,
        _ => read == RflagsBits::CF && effect == Effect::None,
    }
}

/// For each instruction of a trace: whether the flags after it can be seen before they are all overwritten. `leaves` says that the
/// instruction can leave the trace, or is an exit.
pub(super) fn liveness(after: &mut Vec<bool>, steps: impl DoubleEndedIterator<Item = (bool, bool, Effect)>) {
    let mut live = true;
    after.clear();
    after.extend(steps.rev().map(|(leaves, reads, effect)| {
        let here = live;
        live = leaves || reads || effect != Effect::Full && live;
        here
    }));
    after.reverse();
}
