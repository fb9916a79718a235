//! One case: a short program, what it starts with, and how it becomes bytes.
use crate::layout::{CODE, CODE_AT, Regs};
use crate::segments::{CS, Segments};
use iced_x86::{Code, Encoder, FastFormatter, Instruction, OpKind};

/// One instruction of a case.
#[derive(Debug, Clone, Copy)]
pub struct Item {
    pub instruction: Instruction,
    /// A redundant prefix before it.
    pub prefix: Option<u8>,
    /// Where a near branch goes: an index into the items, or their number for the end.
    pub target: Option<usize>,
    /// Makes no sense without the item before it.
    pub glued: bool,
    /// Its memory operand is the last byte of this item: the program changes itself.
    pub patches: Option<usize>,
}

/// A place that has to hold the address of an item.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// A general register.
    Register(usize),
    /// Eight bytes at this offset of the image.
    Memory(usize),
}

/// A program with all it needs.
#[derive(Debug, Clone)]
pub struct Case {
    pub items: Vec<Item>,
    /// The form it is about.
    pub focus: Code,
    /// Starting registers, but for RIP and what `addresses` says.
    pub init: Regs,
    /// The privilege the guest runs it with. The silicon always uses 3.
    pub cpl: u8,
    /// Its segments, if it is 32-bit code.
    pub segments: Segments,
    /// Offset of the code in the image.
    pub code_at: usize,
    /// Bytes to put into the image.
    pub pokes: Vec<(usize, Vec<u8>)>,
    /// Addresses of items to put somewhere.
    pub addresses: Vec<(Place, usize)>,
    /// Parts of the image that are not compared.
    pub ignored: Vec<(usize, usize)>,
    /// Can be run in single steps: nothing sees the trap flag, and there are not too many.
    pub stepping: bool,
    /// The count and its mask if this is a single string instruction with REP.
    pub rep_mask: Option<u64>,
}

/// A case as bytes.
#[derive(Debug, Clone)]
pub struct Program {
    pub bytes: Vec<u8>,
    /// Address of each item, and of the end.
    pub at: Vec<u64>,
    pub init: Regs,
    pub segments: Segments,
    pub pokes: Vec<(usize, Vec<u8>)>,
}

/// Sets the target of a near branch, however wide it is.
fn set_target(instruction: &mut Instruction, target: u64) {
    match instruction.op0_kind() {
        OpKind::NearBranch32 => instruction.set_near_branch32(target as u32),
        _ => instruction.set_near_branch64(target),
    }
}

impl Case {
    /// Encodes it. `None` if some instruction cannot be encoded that way.
    pub fn assemble(&self) -> Option<Program> {
        let start = CODE + (self.code_at - CODE_AT) as u64 - self.segments.base(CS);
        let mut at = vec![start; self.items.len() + 1];
        let mut bytes = Vec::new();
        for pass in 0..2 {
            bytes.clear();
            let mut encoder = Encoder::new(if self.segments.narrow { 32 } else { 64 });
            for (i, item) in self.items.iter().enumerate() {
                let address = start + bytes.len() as u64;
                if pass == 0 {
                    at[i] = address;
                } else if at[i] != address {
                    return None;
                }
                bytes.extend(item.prefix);
                let rip = start + bytes.len() as u64;
                let mut instruction = item.instruction;
                if let Some(target) = item.target {
                    set_target(&mut instruction, if pass == 0 { rip } else { at[target] });
                }
                if let Some(item) = item.patches {
                    instruction.set_memory_displacement64(if pass == 0 { rip } else { at[item + 1] - 1 });
                }
                encoder.encode(&instruction, rip).ok()?;
                bytes.extend(encoder.take_buffer());
            }
            at[self.items.len()] = start + bytes.len() as u64;
        }
        bytes.push(0xcc);
        let mut init = self.init;
        init.rip = start;
        let mut pokes = self.pokes.clone();
        for &(place, item) in &self.addresses {
            match place {
                Place::Register(n) => init.gpr[n] = at[item],
                Place::Memory(offset) => pokes.push((offset, at[item].to_le_bytes().to_vec())),
            }
        }
        Some(Program { bytes, at, init, segments: self.segments, pokes })
    }
    /// The case without item `i` (and what is glued to it). `None` if nothing would be left.
    pub fn without(&self, i: usize) -> Option<Self> {
        let mut end = i + 1;
        while self.items.get(end).is_some_and(|item| item.glued) {
            end += 1;
        }
        if self.items[i].glued || end - i >= self.items.len() {
            return None;
        }
        let moved = |target: usize| if target >= end { target - (end - i) } else { target.min(i) };
        let mut case = self.clone();
        case.items.drain(i..end);
        for item in &mut case.items {
            item.target = item.target.map(moved);
        }
        if case.items.iter().any(|item| item.patches.is_some_and(|n| (i..end).contains(&n))) {
            return None;
        }
        for item in &mut case.items {
            item.patches = item.patches.map(moved);
        }
        for (_, target) in &mut case.addresses {
            *target = moved(*target);
        }
        // A branch to itself would never end, nor be seen in single steps.
        let endless = case.items.iter().enumerate().any(|(n, item)| item.target == Some(n));
        (!endless).then_some(case)
    }
    /// Whether memory at this offset of the image is compared.
    pub fn compares(&self, offset: usize) -> bool {
        !self.ignored.iter().any(|&(from, to)| (from..to).contains(&offset))
    }
}

/// The listing of a program.
pub fn listing(case: &Case, program: &Program) -> String {
    let mut formatter = FastFormatter::new();
    let mut text = String::new();
    for (i, item) in case.items.iter().enumerate() {
        let mut instruction = item.instruction;
        if let Some(target) = item.target {
            set_target(&mut instruction, program.at[target]);
        }
        if let Some(patched) = item.patches {
            instruction.set_memory_displacement64(program.at[patched + 1] - 1);
        }
        let (from, to) = ((program.at[i] - program.at[0]) as usize, (program.at[i + 1] - program.at[0]) as usize);
        let bytes: String = program.bytes[from..to].iter().map(|b| format!("{b:02x}")).collect();
        text += &format!("  {:#x}  {bytes:<30}", program.at[i]);
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        text += &format!("{line}   ({:?})\n", instruction.code());
    }
    text
}
