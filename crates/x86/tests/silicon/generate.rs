//! Random cases: an instruction form in the middle, random instructions around it, and starting registers with which its memory
//! operands reach the windows.
//!
//! Some general registers are *pinned*: they start with a known value (a pointer into a window, a small index, a count), and other
//! instructions mostly leave them alone.
use crate::case::{Case, Item, Place};
use crate::forms::{self, FLAG_READERS, Form, Level, NARROW_FLAG_READERS};
use crate::fpu::{fcw, fx, legacy_fpu, mxcsr, vector_half};
use crate::layout::{
    CODE_AT, DATA, DATA_AT, DATA_BYTES, DATA_HIGH, DF, IF, IMAGE, PAGE, Regs, STACK, STACK_AT, STACK_PAGES, STATUS_FLAGS,
    image_offset,
};
use crate::operands::{Memory, gpr, gpr_number, gpr_part, is_gather, operand_size};
use crate::prng::Rng;
use crate::rep;
use crate::segments::{self, Segments};
use iced_x86::{Code, Instruction, InstructionInfoFactory, MemorySize, OpAccess};

/// What a pinned register holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A pointer into the data window.
    Low,
    /// A pointer into its high mapping.
    High,
    /// A small number, perhaps negative.
    Index,
    /// A small positive count.
    Count,
    /// A pointer into the stack.
    Stack,
    /// The address of an item.
    Address,
}

/// A pinned register.
#[derive(Debug, Clone, Copy)]
pub struct Pin {
    pub number: usize,
    pub kind: Kind,
    pub value: u64,
    /// Still holds `value`.
    pub exact: bool,
    /// Still holds something near it.
    pub usable: bool,
}

/// A case in the making.
pub struct Builder<'a> {
    pub rng: &'a mut Rng,
    pub case: Case,
    pub pins: Vec<Pin>,
    /// Whether the next choice between register and memory is already made.
    pub force_memory: Option<bool>,
    /// 32-bit code.
    pub narrow: bool,
    /// String instructions use 32-bit addresses.
    pub narrow_strings: bool,
    /// Implicit memory operands may point anywhere.
    pub allow_wild: bool,
    /// Address places that wait for an item after this one.
    waiting: Vec<(Place, usize)>,
    info: InstructionInfoFactory,
    forms: &'a [Form],
}

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// The contents the image starts with.
pub fn template(rng: &mut Rng) -> Box<[u8; IMAGE]> {
    let mut image = Box::new([0xcc; IMAGE]);
    for word in image[DATA_AT..].as_chunks_mut::<8>().0 {
        *word = if rng.chance(50) { rng.double() } else { rng.value() }.to_le_bytes();
    }
    image
}

/// A random case about `focus`.
pub fn case(rng: &mut Rng, forms: &[Form], focus: Form, level: Level, narrow: bool) -> Case {
    for _ in 0..10_000 {
        if let Some(case) = attempt(rng, forms, focus, level, narrow)
            && let Some(program) = case.assemble()
            && program.bytes.len() <= crate::native::CODE_BYTES
            && case.code_at + program.bytes.len() <= CODE_AT + crate::layout::CODE_PAGES * PAGE
        {
            return case;
        }
    }
    panic!("cannot build a case of {:?}", focus.code);
}

fn attempt(rng: &mut Rng, forms: &[Form], focus: Form, level: Level, narrow: bool) -> Option<Case> {
    let single = rng.chance(35);
    let (before, after) = if single { (0, 0) } else { (rng.below(5), rng.below(5)) };
    let mut b = Builder::new(rng, forms, focus, level, narrow);
    // A counted loop inside another would start its second round with a count of zero, which is 2^64 rounds.
    let counted = focus.code.is_loop() || focus.code.is_loopcc();
    let looping = !single && !focus.faulting && !focus.last && !counted && b.rng.chance(8);
    let counter = if looping { Some(b.pin_new(Kind::Count, None)) } else { None };
    b.require(focus.code)?;
    b.random_pins();
    let start = b.case.items.len();
    let patcher = !single && !focus.last && b.case.segments.is_flat() && b.rng.chance(6);
    if patcher {
        b.patcher();
    }
    for _ in 0..before {
        b.filler()?;
    }
    b.focus(focus, start)?;
    if focus.last {
        return b.finish();
    }
    for _ in 0..after {
        b.filler()?;
    }
    if let Some(counter) = counter {
        let mut step = Instruction::default();
        step.set_code(if narrow { Code::Dec_rm32 } else { Code::Dec_rm64 });
        step.set_op0_register(b.whole(counter));
        b.push(step, None, false);
        let mut back = Instruction::default();
        back.set_code(if narrow { Code::Jne_rel32_32 } else { Code::Jne_rel32_64 });
        back.set_op0_kind(if narrow { iced_x86::OpKind::NearBranch32 } else { iced_x86::OpKind::NearBranch64 });
        b.push(back, Some(start), true);
    }
    if !single && b.rng.chance(70) {
        for _ in 0..1 + b.rng.below(3) {
            let code = b.flag_reader();
            b.ordinary(code)?;
        }
    }
    if patcher {
        b.patch(start)?;
    }
    b.finish()
}

impl<'a> Builder<'a> {
    fn new(rng: &'a mut Rng, forms: &'a [Form], focus: Form, level: Level, narrow: bool) -> Self {
        let mut init = Regs::ZERO;
        for value in &mut init.gpr {
            *value = rng.value();
        }
        init.rflags = 2 | IF | (rng.next() & STATUS_FLAGS);
        if rng.chance(if focus.code.is_string_instruction() { 40 } else { 5 }) {
            init.rflags |= DF;
        }
        init.fs_base = match rng.below(3) {
            0 => rng.below(0x1000),
            1 => DATA + rng.below(DATA_BYTES as u64),
            _ => DATA_HIGH + rng.below(DATA_BYTES as u64),
        };
        init.gs_base = match rng.below(3) {
            0 => rng.below(0x1000),
            1 => DATA + rng.below(DATA_BYTES as u64),
            _ => DATA_HIGH + rng.below(DATA_BYTES as u64),
        };
        init.fx = fx(rng);
        if level == Level::Host && rng.chance(90) {
            init.ymm_high = [(); 16].map(|()| [(); 2].map(|()| vector_half(rng)));
        }
        let cpl = if narrow || focus.privileged || needs_user(focus.code) || rng.chance(70) { 3 } else { 0 };
        let code_at = CODE_AT + if rng.chance(25) { PAGE - 1 - rng.below(60) as usize } else { rng.below(1500) as usize };
        let segments = if narrow { segments::random(rng, &mut init, code_at) } else { Segments::WIDE };
        let case = Case {
            items: Vec::new(),
            focus: focus.code,
            init,
            cpl,
            segments,
            code_at,
            pokes: Vec::new(),
            addresses: Vec::new(),
            ignored: Vec::new(),
            stepping: true,
            rep_mask: None,
        };
        let narrow_strings = narrow || rng.chance(15);
        let mut builder = Self {
            rng,
            case,
            pins: Vec::new(),
            force_memory: None,
            narrow,
            narrow_strings,
            allow_wild: false,
            waiting: Vec::new(),
            info: InstructionInfoFactory::new(),
            forms,
        };
        builder.pin_new(Kind::Stack, Some(RSP));
        builder
    }

    /// General registers there are.
    pub fn registers(&self) -> u64 {
        if self.narrow { 8 } else { 16 }
    }
    /// A whole general register.
    fn whole(&self, number: usize) -> iced_x86::Register {
        if self.narrow { gpr_part(number, 32) } else { gpr(number) }
    }
    /// A random value of a register.
    fn value(&mut self) -> u64 {
        let value = self.rng.value();
        if self.narrow { value & 0xffff_ffff } else { value }
    }
    fn flag_reader(&mut self) -> Code {
        self.rng.pick(if self.narrow { NARROW_FLAG_READERS } else { FLAG_READERS })
    }

    /// Pins a register (`number`, or any) to a value of `kind`.
    fn pin_new(&mut self, kind: Kind, number: Option<usize>) -> usize {
        let number = number.unwrap_or_else(|| {
            loop {
                let n = self.rng.below(self.registers()) as usize;
                if self.pins.iter().all(|p| p.number != n) {
                    return n;
                }
            }
        });
        let inside = self.rng.below(DATA_BYTES as u64 - 512) + 128;
        let value = match kind {
            Kind::Low => DATA + inside,
            Kind::High => DATA_HIGH + inside,
            Kind::Index => self.rng.within(-64, 64) as u64,
            Kind::Count => 1 + self.rng.below(20),
            Kind::Stack => STACK + (STACK_PAGES * PAGE / 2) as u64 - 600 + self.rng.below(1200),
            Kind::Address => 0,
        };
        // In 32-bit code it is an offset, and there is no high window.
        let base = |s: usize| self.case.segments.base(s);
        let value = match kind {
            Kind::High | Kind::Low if self.narrow => (DATA + inside).wrapping_sub(base(segments::DS)) & 0xffff_ffff,
            Kind::Stack => value.wrapping_sub(base(segments::SS)),
            Kind::Index if self.narrow => value & 0xffff_ffff,
            _ => value,
        };
        // The stack is mostly aligned, as in real programs.
        let value = if kind == Kind::Stack && self.rng.chance(80) { value & !7 } else { value };
        self.case.init.gpr[number] = value;
        self.pins.push(Pin { number, kind, value, exact: true, usable: true });
        number
    }

    /// Pins what `code` uses without naming it.
    fn require(&mut self, code: Code) -> Option<()> {
        let pointer = if self.narrow_strings || self.rng.chance(50) { Kind::Low } else { Kind::High };
        if self.pins.iter().any(|p| p.number != RSP && implicit_registers(code).contains(&p.number)) {
            return None;
        }
        for &number in implicit_registers(code) {
            let kind = match number {
                RCX => Kind::Count,
                RBP => Kind::Stack,
                _ => pointer,
            };
            self.pin_new(kind, Some(number));
        }
        Some(())
    }

    fn random_pins(&mut self) {
        self.pin_new(Kind::Low, None);
        self.pin_new(Kind::Index, None);
        if !self.narrow && self.rng.chance(60) {
            self.pin_new(Kind::High, None);
        }
        if self.rng.chance(30) {
            self.pin_new(Kind::Low, None);
        }
    }

    /// Adds an instruction as it is.
    fn push(&mut self, instruction: Instruction, target: Option<usize>, glued: bool) {
        self.case.items.push(Item { instruction, prefix: None, target, glued, patches: None });
    }

    /// Adds a store into the program itself.
    fn patcher(&mut self) {
        let mut store = Instruction::default();
        store.set_code(Code::Mov_rm8_imm8);
        store.set_op0_kind(iced_x86::OpKind::Memory);
        if !self.narrow {
            store.set_memory_base(iced_x86::Register::RIP);
        }
        store.set_memory_displ_size(if self.narrow { 4 } else { 8 });
        store.set_op1_kind(iced_x86::OpKind::Immediate8);
        store.set_immediate8(self.rng.next() as u8);
        self.push(store, None, false);
    }

    /// Chooses which item the store at `store` changes: one that ends in an immediate.
    fn patch(&mut self, store: usize) -> Option<()> {
        use iced_x86::OpKind as K;
        let ends_in_immediate = |item: &Item| {
            let i = &item.instruction;
            let constant = i.op_count() > 0
                && matches!(
                    i.op_kind(i.op_count() - 1),
                    K::Immediate8 | K::Immediate32 | K::Immediate32to64 | K::Immediate8to64 | K::Immediate8to32
                );
            let free = !i.is_stack_instruction()
                && i.code() != Code::Int_imm8
                && i.code().op_code().op_kinds().last() != Some(&iced_x86::OpCodeOperandKind::imm8_const_1);
            constant && free
        };
        let found: Vec<usize> = (store + 1..self.case.items.len()).filter(|&n| ends_in_immediate(&self.case.items[n])).collect();
        if found.is_empty() {
            return None;
        }
        self.case.items[store].patches = Some(self.rng.pick(&found));
        Some(())
    }

    /// Adds a random instruction that is not the case's focus.
    fn filler(&mut self) -> Option<()> {
        for _ in 0..200 {
            let form = if self.rng.chance(15) {
                let code = self.flag_reader();
                *self.forms.iter().find(|f| f.code == code)?
            } else {
                self.rng.pick(self.forms)
            };
            if form.last
                || (form.faulting && !self.rng.chance(2))
                || self.case.cpl != 3 && (form.privileged || needs_user(form.code))
            {
                continue;
            }
            if is_special(form.code) || form.code.is_string_instruction() && !self.has_pins(form.code) {
                continue;
            }
            if self.ordinary(form.code).is_some() {
                return Some(());
            }
        }
        None
    }

    fn has_pins(&self, code: Code) -> bool {
        implicit_registers(code).iter().all(|n| self.pins.iter().any(|p| p.number == *n && p.usable))
    }

    /// Adds an instruction of form `code` that does not spoil the pins (mostly).
    fn ordinary(&mut self, code: Code) -> Option<()> {
        let length = self.case.items.len();
        self.add(code)?;
        let item = *self.case.items.last().expect("just added");
        if is_branch(&item.instruction) {
            self.branch_forward();
        }
        if self.spoils(&item.instruction) {
            self.case.items.truncate(length);
            return None;
        }
        Some(())
    }

    /// Whether an instruction writes a pinned register. If so, now and then that is let pass and the pin is given up.
    fn spoils(&mut self, instruction: &Instruction) -> bool {
        let mut written = 0u32;
        for used in self.info.info(instruction).used_registers() {
            let writes =
                matches!(used.access(), OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite);
            if let Some(n) = gpr_number(used.register())
                && writes
            {
                written |= 1 << n;
            }
        }
        let stack = instruction.is_stack_instruction();
        let string = instruction.is_string_instruction();
        let let_pass = self.rng.chance(10);
        for pin in &mut self.pins {
            if written >> pin.number & 1 == 0 || !pin.usable {
                continue;
            }
            let moves = stack && pin.number == RSP || string && matches!(pin.number, RSI | RDI);
            if moves {
                pin.exact = false;
            } else if let_pass && pin.kind != Kind::Count && pin.kind != Kind::Address {
                pin.usable = false;
            } else {
                return true;
            }
        }
        false
    }

    /// Encodes and adds an instruction of form `code` with random operands.
    fn add(&mut self, code: Code) -> Option<Memory> {
        let (mut item, memory) = self.instruction(code)?;
        if matches!(code, Code::Popfw | Code::Popfd | Code::Popfq) {
            let mut image = Instruction::default();
            const NT_ID: u64 = 1 << 14 | 1 << 21;
            let value = 2 | IF | (self.rng.next() & (STATUS_FLAGS | DF | NT_ID));
            if self.narrow {
                image.set_code(Code::Pushd_imm32);
                image.set_op0_kind(iced_x86::OpKind::Immediate32);
                image.set_immediate32(value as u32);
            } else {
                image.set_code(Code::Pushq_imm32);
                image.set_op0_kind(iced_x86::OpKind::Immediate32to64);
                image.set_immediate32to64(value as i64);
            }
            self.push(image, None, false);
            item.glued = true;
        }
        if forms::disturbs_stepping(code) {
            self.case.stepping = false;
        }
        self.case.items.push(item);
        Some(memory)
    }

    /// The near branch just added goes to an item that is not there yet.
    fn branch_forward(&mut self) {
        let item = self.case.items.len() - 1;
        self.case.items[item].target = Some(usize::MAX);
    }

    /// Adds what the case is about.
    fn focus(&mut self, focus: Form, start: usize) -> Option<()> {
        let code = focus.code;
        match code {
            _ if code.is_string_instruction() && !focus.privileged => return self.string_focus(code),
            _ if code.is_loop() || code.is_loopcc() => {
                if start == self.case.items.len() {
                    self.filler()?;
                }
                self.add(code)?;
                self.case.items.last_mut().expect("just added").target = Some(start);
                return Some(());
            }
            Code::Jmp_rm64 | Code::Call_rm64 | Code::Jmp_rm32 | Code::Call_rm32 => return self.indirect_focus(code),
            Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16 => return self.return_focus(code),
            _ if forms::is_divide(code) && self.rng.chance(60) => self.ease_divide(code),
            _ => {}
        }
        let memory = self.add(code)?;
        let instruction = self.case.items.last().expect("just added").instruction;
        if is_branch(&instruction) {
            self.branch_forward();
        }
        // What follows must not rely on a pin that this has overwritten.
        if self.spoils(&instruction) {
            return None;
        }
        self.set_operand(&instruction, memory);
        if let Some(ranges) = forms::unspecified_bytes(code) {
            let at = image_offset(memory.address?)?;
            self.case.ignored.extend(ranges.iter().map(|&(from, to)| (at + from, at + to)));
        }
        Some(())
    }

    /// Makes a quotient fit, more often than chance would.
    fn ease_divide(&mut self, code: Code) {
        if self.pins.iter().any(|p| p.number == RDX || p.number == RAX) || !self.case.items.is_empty() {
            return;
        }
        let wide = !matches!(code, Code::Div_rm8 | Code::Idiv_rm8);
        self.case.init.gpr[RDX] = if wide { self.rng.below(3) } else { self.rng.next() };
        self.case.init.gpr[RAX] = if wide { self.rng.value() } else { self.rng.below(1000) };
    }

    fn string_focus(&mut self, code: Code) -> Option<()> {
        let (mut item, _) = self.instruction(code)?;
        let alone = self.case.items.is_empty();
        let form = self.forms.iter().find(|f| f.code == code)?;
        if self.rng.chance(60) {
            if form.info.can_use_repne_prefix() && self.rng.chance(40) {
                item.instruction.set_has_repne_prefix(true);
            } else {
                item.instruction.set_has_rep_prefix(true);
            }
            let count = match self.rng.below(10) {
                0 => 0,
                1 | 2 if alone => self.rng.below(3 * rep::STEP),
                3 if alone => rep::STEP * (1 + self.rng.below(2)) + self.rng.below(3) - 1,
                _ => self.rng.below(60),
            };
            self.case.init.gpr[RCX] = count;
            if self.rng.chance(50) && matches!(code, Code::Stosb_m8_AL | Code::Scasb_AL_m8) {
                let base = self.case.segments.base(segments::ES);
                self.case.init.gpr[RDI] = (DATA + self.rng.below(DATA_BYTES as u64)).wrapping_sub(base);
            }
            let narrow = item.instruction.op_kinds().any(is_narrow_string);
            if narrow && self.rng.chance(50) {
                self.case.init.gpr[RCX] |= if self.narrow { 0 } else { self.rng.next() << 32 };
            }
            if alone {
                self.case.rep_mask = Some(if narrow { u64::from(u32::MAX) } else { u64::MAX });
            }
            self.case.stepping &= count < 100;
        }
        // Make it end early or late: fill with what is compared.
        if self.rng.chance(50) {
            let value = self.case.init.gpr[RAX].to_le_bytes();
            for pointer in [RSI, RDI] {
                if let Some(at) =
                    image_offset(self.case.init.gpr[pointer]).filter(|at| at + 128 <= DATA_AT + DATA_BYTES && *at >= DATA_AT + 64)
                {
                    let bytes = (0..128).map(|i| value[i % operand_size(&item.instruction) as usize]).collect();
                    self.case.pokes.push((at - 64, bytes));
                }
            }
        }
        self.case.items.push(item);
        self.spoils(&item.instruction);
        // LODS loads RAX, which must not be what counts the rounds of a loop.
        let counts = |p: &Pin| p.number == RAX && p.kind == Kind::Count;
        (!self.pins.iter().any(counts)).then_some(())
    }

    fn indirect_focus(&mut self, code: Code) -> Option<()> {
        self.force_memory = Some(self.rng.chance(50));
        let result = self.instruction(code);
        self.force_memory = None;
        let (mut item, memory) = result?;
        let place = if item.instruction.op0_kind() == iced_x86::OpKind::Memory {
            Place::Memory(image_offset(memory.address?).filter(|at| *at + 8 <= IMAGE)?)
        } else {
            let number = self.pin_new(Kind::Address, None);
            item.instruction.set_op0_register(self.whole(number));
            Place::Register(number)
        };
        self.case.items.push(item);
        self.spoils(&item.instruction);
        if self.rng.chance(95) {
            self.waiting.push((place, self.case.items.len() - 1));
        } else if let Place::Register(number) = place {
            // Mostly nowhere.
            self.case.init.gpr[number] = self.value();
        }
        Some(())
    }

    fn return_focus(&mut self, code: Code) -> Option<()> {
        let number = self.pin_new(Kind::Address, None);
        let mut push = Instruction::default();
        push.set_code(if self.narrow { Code::Push_r32 } else { Code::Push_r64 });
        push.set_op0_register(self.whole(number));
        self.push(push, None, false);
        self.add(code)?;
        let item = self.case.items.len() - 1;
        self.case.items[item].glued = true;
        if let Some(pin) = self.pins.iter_mut().find(|p| p.number == RSP) {
            pin.exact = false;
        }
        if self.rng.chance(95) {
            self.waiting.push((Place::Register(number), item));
        } else {
            self.case.init.gpr[number] = self.value();
        }
        Some(())
    }

    /// Gives the memory operand a value that makes sense for the instruction.
    fn set_operand(&mut self, instruction: &Instruction, memory: Memory) {
        let Some(at) = memory.address.and_then(image_offset) else { return };
        let size = operand_size(instruction) as usize;
        if at + size > IMAGE || !(DATA_AT..STACK_AT).contains(&at) || self.rng.chance(10) {
            return;
        }
        let rng = &mut *self.rng;
        let bytes: Vec<u8> = match instruction.memory_size() {
            MemorySize::Float32
            | MemorySize::Packed64_Float32
            | MemorySize::Packed128_Float32
            | MemorySize::Packed256_Float32 => (0..size / 4).flat_map(|_| rng.float().to_le_bytes()).collect(),
            MemorySize::Float64 | MemorySize::Packed128_Float64 | MemorySize::Packed256_Float64 => {
                (0..size / 8).flat_map(|_| rng.double().to_le_bytes()).collect()
            }
            MemorySize::Float80 => rng.extended().to_vec(),
            MemorySize::Bcd => {
                (0..10).map(|i| if i == 9 { rng.pick(&[0, 0x80]) } else { (rng.below(10) << 4 | rng.below(10)) as u8 }).collect()
            }
            MemorySize::Fxsave_512Byte | MemorySize::Fxsave64_512Byte => {
                let mut image = fx(rng).0.to_vec();
                // Where the pointers are: zero, as positions.md has them.
                image[464..].fill(0);
                image
            }
            MemorySize::FpuEnv14 | MemorySize::FpuEnv28 | MemorySize::FpuState94 | MemorySize::FpuState108 => {
                legacy_fpu(rng, size)
            }
            _ => match instruction.code() {
                Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32 => mxcsr(rng).to_le_bytes().to_vec(),
                Code::Fldcw_m2byte => fcw(rng).to_le_bytes().to_vec(),
                _ => return,
            },
        };
        self.case.pokes.push((at, bytes));
    }

    /// Resolves the branches forward, and hands over the case.
    fn finish(mut self) -> Option<Case> {
        let end = self.case.items.len();
        for i in 0..end {
            if self.case.items[i].target == Some(usize::MAX) {
                let target = self.forward(i, end);
                self.case.items[i].target = Some(target);
            }
        }
        for (place, item) in std::mem::take(&mut self.waiting) {
            let target = self.forward(item, end);
            self.case.addresses.push((place, target));
        }
        if self.case.items.len() > 1 {
            self.case.rep_mask = None;
        }
        (self.case.pokes.len() + self.case.addresses.len() <= crate::native::POKES).then_some(self.case)
    }

    /// An item after `i`, not one that needs the one before it.
    fn forward(&mut self, i: usize, end: usize) -> usize {
        let mut target = i + 1 + self.rng.below((end - i) as u64) as usize;
        while target < end && self.case.items[target].glued {
            target += 1;
        }
        target
    }
}

/// Whether an instruction has a near branch target.
fn is_branch(instruction: &Instruction) -> bool {
    use iced_x86::OpKind as K;
    matches!(instruction.op0_kind(), K::NearBranch32 | K::NearBranch64)
}

fn is_narrow_string(kind: iced_x86::OpKind) -> bool {
    use iced_x86::OpKind as K;
    matches!(kind, K::MemorySegESI | K::MemoryESEDI | K::MemorySegEDI)
}

/// General registers an instruction uses for addresses or counts without naming them.
fn implicit_registers(code: Code) -> &'static [usize] {
    match code {
        Code::Movsb_m8_m8
        | Code::Movsw_m16_m16
        | Code::Movsd_m32_m32
        | Code::Movsq_m64_m64
        | Code::Cmpsb_m8_m8
        | Code::Cmpsw_m16_m16
        | Code::Cmpsd_m32_m32
        | Code::Cmpsq_m64_m64 => &[RSI, RDI, RCX],
        Code::Stosb_m8_AL
        | Code::Stosw_m16_AX
        | Code::Stosd_m32_EAX
        | Code::Stosq_m64_RAX
        | Code::Scasb_AL_m8
        | Code::Scasw_AX_m16
        | Code::Scasd_EAX_m32
        | Code::Scasq_RAX_m64 => &[RDI, RCX],
        Code::Lodsb_AL_m8 | Code::Lodsw_AX_m16 | Code::Lodsd_EAX_m32 | Code::Lodsq_RAX_m64 => &[RSI, RCX],
        Code::Insb_m8_DX | Code::Insw_m16_DX | Code::Insd_m32_DX => &[RDI],
        Code::Outsb_DX_m8 | Code::Outsw_DX_m16 | Code::Outsd_DX_m32 => &[RSI],
        Code::Xlat_m8 => &[RBX],
        Code::Maskmovq_rDI_mm_mm | Code::Maskmovdqu_rDI_xmm_xmm | Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => &[RDI],
        Code::Leavew
        | Code::Leaved
        | Code::Leaveq
        | Code::Enterw_imm16_imm8
        | Code::Enterd_imm16_imm8
        | Code::Enterq_imm16_imm8 => &[RBP],
        _ if code.is_loop() || code.is_loopcc() => &[RCX],
        _ => &[],
    }
}

/// Forms that only make sense as a focus.
fn is_special(code: Code) -> bool {
    code.is_loop()
        || code.is_loopcc()
        || is_gather(code)
        || matches!(
            code,
            Code::VEX_Vmaskmovdqu_rDI_xmm_xmm
                | Code::VEX_Vldmxcsr_m32
                | Code::Jmp_rm64
                | Code::Call_rm64
                | Code::Retnq
                | Code::Retnq_imm16
                | Code::Jmp_rm32
                | Code::Call_rm32
                | Code::Retnd
                | Code::Retnd_imm16
                | Code::Leaved
                | Code::Enterd_imm16_imm8
                | Code::Leavew
                | Code::Leaveq
                | Code::Enterw_imm16_imm8
                | Code::Enterq_imm16_imm8
                | Code::Xlat_m8
                | Code::Maskmovq_rDI_mm_mm
                | Code::Maskmovdqu_rDI_xmm_xmm
                | Code::Fxrstor_m512byte
                | Code::Fxrstor64_m512byte
                | Code::Frstor_m94byte
                | Code::Frstor_m108byte
                | Code::Fldenv_m14byte
                | Code::Fldenv_m28byte
                | Code::Ldmxcsr_m32
                | Code::Fldcw_m2byte
        )
}

/// Forms whose result depends on the privilege.
fn needs_user(code: Code) -> bool {
    matches!(code, Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg | Code::Int_imm8 | Code::Int3)
}
