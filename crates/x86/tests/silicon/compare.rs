//! What has to be equal, and how a difference is told.
use crate::case::{Case, Program};
use crate::layout::{
    BREAKPOINT, CODE_AT, DATA_AT, IMAGE, NO_VECTOR, Outcome, PAGE_FAULT, RAN_AWAY, Regs, SHUT_DOWN, STACK_AT, STATUS_FLAGS,
    STRANGE_EXIT, TIMED_OUT, image_offset,
};
use crate::native::Slot;
use crate::operands::operand_size;
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic};

/// Where a program's addresses end on Linux.
const USER_END: u64 = 0x7fff_ffff_f000;
/// Resume flag: set in what a fault pushes, and in the kernel's picture of a single step inside a string instruction.
const RF: u64 = 1 << 16;
const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Parts of an FXSAVE image that are not compared: FOP, FIP and FDP (zero here by definition, docs/positions.md), MXCSR_MASK, and what
/// is reserved.
const FX_IGNORED: [(usize, usize); 3] = [(6, 24), (28, 32), (416, 512)];

/// Compares registers. Appends a line a difference.
pub fn registers(silicon: &Regs, engine: &Regs, out: &mut Vec<String>) {
    for (i, name) in NAMES.iter().enumerate() {
        value(name, silicon.gpr[i], engine.gpr[i], out);
    }
    value("rip", silicon.rip, engine.rip, out);
    value("rflags", silicon.rflags, engine.rflags, out);
    value("fs base", silicon.fs_base, engine.fs_base, out);
    value("gs base", silicon.gs_base, engine.gs_base, out);
    for (i, (a, b)) in silicon.ymm_high.iter().zip(&engine.ymm_high).enumerate() {
        if a != b {
            out.push(format!("ymm{i} high: silicon {:016x}{:016x} engine {:016x}{:016x}", a[1], a[0], b[1], b[0]));
        }
    }
    let compared = |i: usize| !FX_IGNORED.iter().any(|&(from, to)| (from..to).contains(&i));
    if (0..512).any(|i| compared(i) && silicon.fx.0[i] != engine.fx.0[i]) {
        for (from, len, name) in fx_fields() {
            let (a, b) = (&silicon.fx.0[from..from + len], &engine.fx.0[from..from + len]);
            if a != b && (from..from + len).any(compared) {
                out.push(format!("{name}: silicon {} engine {}", hex(a), hex(b)));
            }
        }
    }
}

fn fx_fields() -> Vec<(usize, usize, String)> {
    let mut fields = vec![(0, 2, "fcw".into()), (2, 2, "fsw".into()), (4, 2, "ftw".into()), (24, 4, "mxcsr".into())];
    fields.extend((0..8).map(|i| (32 + 16 * i, 16, format!("st{i}"))));
    fields.extend((0..16).map(|i| (160 + 16 * i, 16, format!("xmm{i}"))));
    fields
}

/// Most significant byte first.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

fn value(name: &str, silicon: u64, engine: u64, out: &mut Vec<String>) {
    if silicon != engine {
        out.push(format!("{name}: silicon {silicon:#x} engine {engine:#x}"));
    }
}

/// Compares how two runs ended.
pub fn outcomes(case: &Case, program: &Program, silicon: &Outcome, engine: &Outcome, out: &mut Vec<String>) {
    let large = case.segments.narrow && faulting(case, program, silicon).is_some_and(|i| touches_in_any_order(i) > 16);
    // Which of two operands, or of several elements, is found wanting first is each silicon's own affair: Zen 3 checks both segments of CMPS
    // before any page, and finds pages of masked moves before segments.
    let two = faulting(case, program, silicon).is_some_and(|i| is_cmps(i.code()) || is_masked(i.mnemonic()));
    // Part of the operand in the last page before addresses that are not canonical, which is not there, and part of it beyond.
    let border = |o: &Outcome| o.vector == PAGE_FAULT && o.cr2 >> 12 == USER_END >> 12;
    let edge = border(silicon) || border(engine);
    if (large || two || edge)
        && silicon.vector != engine.vector
        && [silicon, engine].iter().all(|o| matches!(o.vector, 12 | 13 | PAGE_FAULT))
    {
        // Part of the operand is, or one of two operands is, beyond its segment, and part of it in a page that is not there.
    } else if silicon.vector != engine.vector {
        let (a, b) = (vector_name(silicon.vector), vector_name(engine.vector));
        out.push(format!("end: silicon {a} engine {b}, cr2 {:#x} {:#x}", silicon.cr2, engine.cr2));
    } else {
        let mut ignored = 0;
        if silicon.vector == PAGE_FAULT {
            if case.cpl != 3 {
                ignored |= 4; // user
            }
            if silicon.cr2 >= USER_END {
                ignored |= 1; // Linux says "present" of all addresses that are not a program's
            }
        }
        value("error code", silicon.error & !ignored, engine.error & !ignored, out);
        let slack = faulting(case, program, silicon).map_or(0, touches_in_any_order);
        let apart = silicon.cr2.wrapping_sub(engine.cr2);
        if apart.min(apart.wrapping_neg()) >= slack.max(1) && !two {
            value("cr2", silicon.cr2, engine.cr2, out);
        }
    }
    let (silicon_regs, mut engine) = (&mut silicon.regs.clone(), engine.regs);
    if let Some(i) = faulting(case, program, silicon)
        && is_repeated_comparison(i)
        && silicon.vector != BREAKPOINT
    {
        // They are put back to what they were when the instruction began, or went on after an interrupt of the host.
        silicon_regs.rflags |= STATUS_FLAGS;
        engine.rflags |= STATUS_FLAGS;
    }
    if matches!(silicon.vector, 12 | 13 | PAGE_FAULT)
        && faulting(case, program, silicon).is_some_and(|i| i.code() == Code::Maskmovq_rDI_mm_mm)
    {
        // The silicon has already left x87 mode when it finds the fault.
        for part in [2..6, 32..160] {
            engine.fx.0[part.clone()].copy_from_slice(&silicon.regs.fx.0[part]);
        }
    }
    registers(silicon_regs, &engine, out);
}

/// The instruction that faulted.
fn faulting<'a>(case: &'a Case, program: &Program, silicon: &Outcome) -> Option<&'a Instruction> {
    program.at[..case.items.len()].iter().position(|&at| at == silicon.regs.rip).map(|i| &case.items[i].instruction)
}

/// Bytes within which the silicon may touch its operand in any order, so that any of them may be the one a fault is reported for.
fn touches_in_any_order(instruction: &Instruction) -> u64 {
    match instruction.code() {
        Code::Maskmovq_rDI_mm_mm | Code::Maskmovdqu_rDI_xmm_xmm | Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => 16,
        Code::Fnstenv_m14byte | Code::Fldenv_m14byte => 16,
        code if code.encoding() == EncodingKind::VEX => 0,
        _ => Some(operand_size(instruction)).filter(|&size| size > 16).unwrap_or(0),
    }
}

/// REP CMPS and SCAS.
fn is_repeated_comparison(instruction: &Instruction) -> bool {
    use Code as C;
    let compares = matches!(
        instruction.code(),
        C::Cmpsb_m8_m8
            | C::Cmpsw_m16_m16
            | C::Cmpsd_m32_m32
            | C::Cmpsq_m64_m64
            | C::Scasb_AL_m8
            | C::Scasw_AX_m16
            | C::Scasd_EAX_m32
            | C::Scasq_RAX_m64
    );
    compares && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// Moves of those elements that a mask names.
fn is_masked(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
}

fn is_cmps(code: Code) -> bool {
    matches!(code, Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64)
}

/// Compares two images as they are at the end.
pub fn images(case: &Case, program: &Program, end: &Outcome, silicon: &[u8; IMAGE], engine: &[u8; IMAGE], out: &mut Vec<String>) {
    if silicon == engine {
        return;
    }
    let below_stack = match faulting(case, program, end).map(|i| i.code()) {
        // The silicon leaves what it has pushed before it finds the fault.
        Some(Code::Enterw_imm16_imm8 | Code::Enterd_imm16_imm8 | Code::Enterq_imm16_imm8) => 33 * 8,
        // The engine has pushed the return address before it finds that the target is not canonical.
        Some(Code::Call_rm64) => 8,
        _ => 0,
    };
    let unknown = image_offset(end.regs.gpr[4]).map_or(0..0, |top| top.saturating_sub(below_stack)..top);
    bytes(silicon, engine, &|i| case.compares(i) && !unknown.contains(&i), out);
}

/// Compares those bytes of two images that `compared` says.
fn bytes(silicon: &[u8; IMAGE], engine: &[u8; IMAGE], compared: &dyn Fn(usize) -> bool, out: &mut Vec<String>) {
    let differing: Vec<usize> = (0..IMAGE).filter(|&i| silicon[i] != engine[i] && compared(i)).collect();
    let (Some(&first), Some(&last)) = (differing.first(), differing.last()) else { return };
    let window = match first {
        _ if first >= STACK_AT => format!("stack+{:#x}", first - STACK_AT),
        _ if first >= DATA_AT => format!("data+{:#x}", first - DATA_AT),
        _ => format!("code+{:#x}", first - CODE_AT),
    };
    let end = last.min(first + 31) + 1;
    out.push(format!(
        "memory at {window}, {} bytes up to +{}: silicon {} engine {} (highest byte first)",
        differing.len(),
        last - first,
        hex(&silicon[first..end]),
        hex(&engine[first..end])
    ));
}

/// Compares the silicon's picture at a position with the engine's state there.
pub fn picture(case: &Case, slot: &Slot, regs: &Regs, image: &[u8; IMAGE], out: &mut Vec<String>) {
    let (mut silicon, mut engine) = (slot.picture, *regs);
    silicon.rflags &= !RF;
    engine.rflags &= !RF;
    registers(&silicon, &engine, out);
    if slot.picture_memory != *image {
        bytes(&slot.picture_memory, image, &|i| case.compares(i), out);
    }
}

/// The silicon at full speed and in single steps.
pub fn stepping(case: &Case, program: &Program, slot: &Slot, out: &mut Vec<String>) {
    if slot.single_step != 0 && slot.end != slot.stepped_end {
        let mut same = slot.stepped_end;
        // The step before a fault in the middle of a string instruction leaves the resume flag as the fault does.
        same.regs.rflags = slot.end.regs.rflags & RF | same.regs.rflags & !RF;
        outcomes(case, program, &slot.end, &same, out);
    }
}

/// A vector for people.
pub fn vector_name(vector: u64) -> String {
    match vector {
        BREAKPOINT => "the final int3".into(),
        NO_VECTOR => "nothing".into(),
        TIMED_OUT => "a time-out".into(),
        SHUT_DOWN => "triple fault".into(),
        RAN_AWAY => "far too many instructions".into(),
        STRANGE_EXIT => "an exit that makes no sense".into(),
        0 => "#DE".into(),
        4 => "#OF".into(),
        5 => "#BR".into(),
        1 => "#DB".into(),
        6 => "#UD".into(),
        7 => "#NM".into(),
        8 => "#DF".into(),
        10 => "#TS".into(),
        11 => "#NP".into(),
        12 => "#SS".into(),
        13 => "#GP".into(),
        14 => "#PF".into(),
        16 => "#MF".into(),
        17 => "#AC".into(),
        19 => "#XM".into(),
        _ => format!("vector {vector}"),
    }
}

/// Starting registers for people.
pub fn start(regs: &Regs) -> String {
    let mut text = String::new();
    for (i, name) in NAMES.iter().enumerate() {
        text += &format!("  {name:<3} {:016x}{}", regs.gpr[i], if i % 4 == 3 { "\n" } else { "" });
    }
    text += &format!("  rflags {:x} fs {:x} gs {:x}\n", regs.rflags, regs.fs_base, regs.gs_base);
    for (from, len, name) in fx_fields() {
        text += &format!(
            "  {name} {}{}",
            hex(&regs.fx.0[from..from + len]),
            if name.starts_with("st") || name.starts_with("xmm") { "\n" } else { "" }
        );
    }
    for (i, half) in regs.ymm_high.iter().enumerate().filter(|(_, half)| **half != [0; 2]) {
        text += &format!("  ymm{i} high {:016x}{:016x}\n", half[1], half[0]);
    }
    text
}
