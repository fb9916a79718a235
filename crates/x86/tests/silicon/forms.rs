//! Which instruction forms exist, and which of them are compared with the silicon.
//!
//! Every `Code` of the decoder that is valid in 64-bit mode and belongs to x86-64-v2 (or is a hint that older processors take for a NOP)
//! or to what `host-common` has here is a form. Each is either compared or in one of the two tables below, with the reason.
use iced_x86::{Code, CpuidFeature, EncodingKind, OpCodeInfo};
use twinstep_x86::{CpuModel, Features};

/// Which forms are looked at, on which CPU model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Those of x86-64-v2.
    V2,
    /// Those that `host-common` has beyond, among all forms.
    Host,
}

impl Level {
    /// The model.
    pub fn model(self) -> CpuModel {
        match self {
            Self::V2 => CpuModel::x86_64_v2(),
            Self::Host => CpuModel::host_common(Features::of_host()),
        }
    }
}

/// What a feature beyond x86-64-v2 is called by the decoder.
fn beyond(feature: CpuidFeature) -> Option<Features> {
    use CpuidFeature as F;
    Some(match feature {
        F::ADX => Features::ADX,
        F::AES => Features::AES,
        F::AVX => Features::AVX,
        F::AVX2 => Features::AVX2,
        F::BMI1 => Features::BMI1,
        F::BMI2 => Features::BMI2,
        F::F16C => Features::F16C,
        F::FMA => Features::FMA,
        F::GFNI => Features::GFNI,
        F::LZCNT => Features::LZCNT,
        F::MOVBE => Features::MOVBE,
        F::PCLMULQDQ => Features::PCLMULQDQ,
        F::SHA => Features::SHA,
        F::VAES => Features::VAES,
        F::VPCLMULQDQ => Features::VPCLMULQDQ,
        F::XSAVE | F::XSAVEOPT | F::XSAVEC => Features::XSAVE,
        _ => return None,
    })
}

/// The features whose instructions are forms.
const FEATURES: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::CX8,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CPUID,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FXSR,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::POPCNT,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::CLFSH,
    CpuidFeature::PREFETCHW,
    CpuidFeature::CET_IBT,
    CpuidFeature::TSC,
    CpuidFeature::MSR,
    CpuidFeature::SYSCALL,
    CpuidFeature::SEP,
    CpuidFeature::RDTSCP,
];

/// Forms the silicon cannot be asked about from a user program, or whose answer is not to be compared.
const NOT_COMPARED: &[(&[Code], &str)] = &[
    (
        &[
            Code::Jo_rel16,
            Code::Jno_rel16,
            Code::Jb_rel16,
            Code::Jae_rel16,
            Code::Je_rel16,
            Code::Jne_rel16,
            Code::Jbe_rel16,
            Code::Ja_rel16,
            Code::Js_rel16,
            Code::Jns_rel16,
            Code::Jp_rel16,
            Code::Jnp_rel16,
            Code::Jl_rel16,
            Code::Jge_rel16,
            Code::Jle_rel16,
            Code::Jg_rel16,
            Code::Jo_rel8_16,
            Code::Jno_rel8_16,
            Code::Jb_rel8_16,
            Code::Jae_rel8_16,
            Code::Je_rel8_16,
            Code::Jne_rel8_16,
            Code::Jbe_rel8_16,
            Code::Ja_rel8_16,
            Code::Js_rel8_16,
            Code::Jns_rel8_16,
            Code::Jp_rel8_16,
            Code::Jnp_rel8_16,
            Code::Jl_rel8_16,
            Code::Jge_rel8_16,
            Code::Jle_rel8_16,
            Code::Jg_rel8_16,
            Code::Loopne_rel8_16_ECX,
            Code::Loope_rel8_16_ECX,
            Code::Loop_rel8_16_ECX,
            Code::Jecxz_rel8_16,
            Code::Loopne_rel8_16_RCX,
            Code::Loope_rel8_16_RCX,
            Code::Loop_rel8_16_RCX,
            Code::Jrcxz_rel8_16,
            Code::Call_rel16,
            Code::Jmp_rel16,
            Code::Jmp_rel8_16,
            Code::Call_rm16,
            Code::Jmp_rm16,
            Code::Retnw,
            Code::Retnw_imm16,
        ],
        "a near branch with a 66 prefix: the vendors decode it differently, and no compiler makes one",
    ),
    (
        &[
            Code::Retfw,
            Code::Retfw_imm16,
            Code::Retfd,
            Code::Retfd_imm16,
            Code::Retfq,
            Code::Retfq_imm16,
            Code::Iretw,
            Code::Iretd,
            Code::Iretq,
            Code::Call_m1616,
            Code::Call_m1632,
            Code::Call_m1664,
            Code::Jmp_m1616,
            Code::Jmp_m1632,
            Code::Jmp_m1664,
        ],
        "a far transfer depends on the host's descriptor tables",
    ),
    (
        &[
            Code::Mov_Sreg_rm16,
            Code::Mov_Sreg_r32m16,
            Code::Mov_Sreg_r64m16,
            Code::Popw_FS,
            Code::Popq_FS,
            Code::Popw_GS,
            Code::Popq_GS,
            Code::Lss_r16_m1616,
            Code::Lss_r32_m1632,
            Code::Lss_r64_m1664,
            Code::Lfs_r16_m1616,
            Code::Lfs_r32_m1632,
            Code::Lfs_r64_m1664,
            Code::Lgs_r16_m1616,
            Code::Lgs_r32_m1632,
            Code::Lgs_r64_m1664,
            Code::Lar_r16_rm16,
            Code::Lar_r32_r32m16,
            Code::Lar_r64_r64m16,
            Code::Lsl_r16_rm16,
            Code::Lsl_r32_r32m16,
            Code::Lsl_r64_r64m16,
            Code::Verr_rm16,
            Code::Verr_r32m16,
            Code::Verr_r64m16,
            Code::Verw_rm16,
            Code::Verw_r32m16,
            Code::Verw_r64m16,
        ],
        "depends on the host's descriptor tables",
    ),
    (
        &[
            Code::Sgdt_m1664,
            Code::Sidt_m1664,
            Code::Sldt_rm16,
            Code::Sldt_r32m16,
            Code::Sldt_r64m16,
            Code::Str_rm16,
            Code::Str_r32m16,
            Code::Str_r64m16,
            Code::Smsw_rm16,
            Code::Smsw_r32m16,
            Code::Smsw_r64m16,
        ],
        "tells the host's system registers, or is emulated by its kernel (UMIP)",
    ),
    (&[Code::Cpuid, Code::Rdtsc, Code::Rdtscp], "its answer is the machine's, not the silicon's"),
    (&[Code::Syscall, Code::Sysenter], "would call the host's kernel"),
    (
        &[Code::Sysretd, Code::Sysretq, Code::Sysexitd, Code::Sysexitq],
        "the vendors differ on which exception a user program gets",
    ),
    (
        &[
            Code::Finit,
            Code::Fclex,
            Code::Fstcw_m2byte,
            Code::Fstsw_m2byte,
            Code::Fstsw_AX,
            Code::Fstenv_m14byte,
            Code::Fstenv_m28byte,
            Code::Fsave_m94byte,
            Code::Fsave_m108byte,
            Code::Fsetpm,
            Code::Feni,
            Code::Fdisi,
        ],
        "two instructions: WAIT and the form without it, which are compared",
    ),
    (
        &[Code::Reservednop_rm16_r16_0F0D, Code::Reservednop_rm32_r32_0F0D, Code::Reservednop_rm64_r64_0F0D],
        "with a register it is #UD for one vendor and a NOP for the other",
    ),
    (
        &[
            Code::Xsave_mem,
            Code::Xsave64_mem,
            Code::Xsaveopt_mem,
            Code::Xsaveopt64_mem,
            Code::Xsavec_mem,
            Code::Xsavec64_mem,
            Code::Xrstor_mem,
            Code::Xrstor64_mem,
            Code::Xgetbv,
        ],
        "depends on the host's XCR0; compared where both agree on it, in src/sys/xsave.rs",
    ),
    (&[Code::Int1], "a host that is itself a virtual machine may be told the wrong RIP"),
    (&[Code::Ud0], "the vendors differ on whether a ModRM byte is fetched"),
];

/// A table of forms with a reason.
type Table = &'static [(&'static [Code], &'static str)];

/// The same for the forms that only 32-bit code has.
const NARROW_NOT_COMPARED: Table = &[
    (
        &[Code::Loopne_rel8_16_CX, Code::Loope_rel8_16_CX, Code::Loop_rel8_16_CX, Code::Jcxz_rel8_16],
        "a near branch with a 66 prefix leads below 64 KiB, where a host has no memory (tests/directed)",
    ),
    (
        &[Code::Call_ptr1616, Code::Call_ptr1632, Code::Jmp_ptr1616, Code::Jmp_ptr1632],
        "a far transfer depends on the host's descriptor tables",
    ),
    (
        &[
            Code::Popw_ES,
            Code::Popd_ES,
            Code::Popw_SS,
            Code::Popd_SS,
            Code::Popw_DS,
            Code::Popd_DS,
            Code::Popd_FS,
            Code::Popd_GS,
            Code::Les_r16_m1616,
            Code::Les_r32_m1632,
            Code::Lds_r16_m1616,
            Code::Lds_r32_m1632,
        ],
        "depends on the host's descriptor tables",
    ),
    (
        &[Code::Sgdt_m1632_16, Code::Sgdt_m1632, Code::Sidt_m1632_16, Code::Sidt_m1632],
        "tells the host's system registers, or is emulated by its kernel (UMIP)",
    ),
];

/// Forms the engine is known to answer otherwise. Each is still run: one that agrees in every case makes the test fail.
pub const KNOWN_GAPS: &[(&[Code], &str)] = &[];

/// One instruction form.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    pub code: Code,
    pub info: &'static OpCodeInfo,
    /// Faults in a user program, always.
    pub privileged: bool,
    /// Stores bytes that are not compared, so nothing may come after it.
    pub last: bool,
    /// Ends most sequences it is in (a fault is certain or likely).
    pub faulting: bool,
}

/// The level a form of 64-bit code, or of 32-bit code (`narrow`), belongs to; `None` if it is none, here.
fn level(code: Code, narrow: bool) -> Option<Level> {
    let (info, features) = (code.op_code(), code.cpuid_features());
    let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    let exists = if narrow { info.mode32() } else { info.mode64() };
    if !info.is_instruction() || !exists || !encoding || features.is_empty() {
        return None;
    }
    let mut needed = Features::NONE;
    for &f in features.iter().filter(|f| !FEATURES.contains(f)) {
        needed = needed.with(beyond(f)?);
    }
    match needed {
        Features::NONE => Some(Level::V2),
        _ => Level::Host.model().features.has(needed).then_some(Level::Host),
    }
}

/// Why a form is not compared.
pub fn not_compared(code: Code, narrow: bool) -> Option<&'static str> {
    let more: Table = if narrow { NARROW_NOT_COMPARED } else { &[] };
    NOT_COMPARED.iter().chain(more).find(|(codes, _)| codes.contains(&code)).map(|(_, reason)| *reason)
}

/// All forms of a level that are compared.
pub fn compared(of: Level, narrow: bool) -> Vec<Form> {
    Code::values().filter(|&c| level(c, narrow) == Some(of) && not_compared(c, narrow).is_none()).map(form).collect()
}

/// What may surround a form of a level.
pub fn around(of: Level, narrow: bool) -> Vec<Form> {
    let mut forms = compared(Level::V2, narrow);
    if of == Level::Host {
        forms.extend(compared(Level::Host, narrow));
    }
    forms
}

/// The number of forms that are not compared.
pub fn skipped(narrow: bool) -> usize {
    let more: Table = if narrow { NARROW_NOT_COMPARED } else { &[] };
    NOT_COMPARED.iter().chain(more).map(|(codes, _)| codes.len()).sum()
}

/// The tables for people.
pub fn tables() -> String {
    let mut text = String::new();
    let tables =
        [("not compared", NOT_COMPARED), ("not compared in 32-bit code", NARROW_NOT_COMPARED), ("known gap", KNOWN_GAPS)];
    for (title, table) in tables {
        for (codes, reason) in table {
            text += &format!("{title}: {reason}: {codes:?}\n");
        }
    }
    text
}

/// Every entry of a table is a form, and in one table only.
pub fn check_tables() {
    let mut seen = Vec::new();
    for &code in NOT_COMPARED.iter().chain(KNOWN_GAPS).flat_map(|(codes, _)| codes.iter()) {
        assert!(level(code, false).is_some(), "{code:?} in a table of forms.rs is no form");
        assert!(!seen.contains(&code), "{code:?} is twice in the tables of forms.rs");
        seen.push(code);
    }
    for &code in NARROW_NOT_COMPARED.iter().flat_map(|(codes, _)| codes.iter()) {
        assert!(level(code, true).is_some(), "{code:?} in a table of forms.rs is no form of 32-bit code");
        assert!(!seen.contains(&code), "{code:?} is twice in the tables of forms.rs");
        seen.push(code);
    }
}

fn form(code: Code) -> Form {
    let always_fault = matches!(
        code,
        Code::Ud1_r16_rm16
            | Code::Ud1_r32_rm32
            | Code::Ud1_r64_rm64
            | Code::Ud0_r16_rm16
            | Code::Ud0_r32_rm32
            | Code::Ud0_r64_rm64
            | Code::Ud2
            | Code::Int_imm8
            | Code::Int3
    );
    Form {
        code,
        info: code.op_code(),
        privileged: code.is_privileged(),
        last: unspecified_bytes(code).is_some(),
        faulting: always_fault || code.is_privileged() || is_divide(code),
    }
}

/// DIV and IDIV.
pub fn is_divide(code: Code) -> bool {
    matches!(
        code,
        Code::Div_rm8
            | Code::Div_rm16
            | Code::Div_rm32
            | Code::Div_rm64
            | Code::Idiv_rm8
            | Code::Idiv_rm16
            | Code::Idiv_rm32
            | Code::Idiv_rm64
    )
}

/// The bytes of its operand, from and to, that docs/positions.md fixes to something the silicon does not: FOP, FIP, FDP, MXCSR_MASK;
/// or that are reserved.
pub fn unspecified_bytes(code: Code) -> Option<&'static [(usize, usize)]> {
    match code {
        Code::Fnstenv_m14byte | Code::Fstenv_m14byte | Code::Fnsave_m94byte | Code::Fsave_m94byte => Some(&[(6, 14)]),
        Code::Fnstenv_m28byte | Code::Fstenv_m28byte | Code::Fnsave_m108byte | Code::Fsave_m108byte => Some(&[(12, 26)]),
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => Some(&[(6, 24), (28, 32), (416, 464)]),
        _ => None,
    }
}

/// Changes or stores the flags a debugger's single step is seen in, or is taken for one.
pub fn disturbs_stepping(code: Code) -> bool {
    matches!(code, Code::Pushfw | Code::Pushfd | Code::Pushfq | Code::Popfw | Code::Popfd | Code::Popfq)
}

/// [`FLAG_READERS`] of 32-bit code.
pub const NARROW_FLAG_READERS: &[Code] = &[
    Code::Lahf,
    Code::Pushfd,
    Code::Adc_rm32_r32,
    Code::Adc_r8_rm8,
    Code::Sbb_rm32_r32,
    Code::Rcl_rm32_1,
    Code::Rcr_rm32_CL,
    Code::Seto_rm8,
    Code::Sete_rm8,
    Code::Setp_rm8,
    Code::Setle_rm8,
    Code::Cmovo_r32_rm32,
    Code::Cmova_r16_rm16,
    Code::Cmovl_r32_rm32,
    Code::Cmc,
    Code::Salc,
    Code::Daa,
    Code::Aaa,
    Code::Jo_rel8_32,
    Code::Jb_rel32_32,
    Code::Je_rel8_32,
    Code::Js_rel32_32,
    Code::Jp_rel8_32,
    Code::Jl_rel8_32,
    Code::Jg_rel32_32,
];

/// Forms that make the flags before them visible.
pub const FLAG_READERS: &[Code] = &[
    Code::Lahf,
    Code::Pushfq,
    Code::Adc_rm64_r64,
    Code::Adc_r8_rm8,
    Code::Sbb_rm32_r32,
    Code::Sbb_r64_rm64,
    Code::Rcl_rm32_1,
    Code::Rcr_rm64_CL,
    Code::Seto_rm8,
    Code::Setb_rm8,
    Code::Sete_rm8,
    Code::Setbe_rm8,
    Code::Sets_rm8,
    Code::Setp_rm8,
    Code::Setl_rm8,
    Code::Setle_rm8,
    Code::Setg_rm8,
    Code::Cmovo_r64_rm64,
    Code::Cmovb_r32_rm32,
    Code::Cmove_r64_rm64,
    Code::Cmova_r16_rm16,
    Code::Cmovs_r64_rm64,
    Code::Cmovp_r64_rm64,
    Code::Cmovl_r64_rm64,
    Code::Cmovg_r32_rm32,
    Code::Cmc,
    Code::Jo_rel8_64,
    Code::Jb_rel32_64,
    Code::Je_rel8_64,
    Code::Jbe_rel8_64,
    Code::Js_rel32_64,
    Code::Jp_rel8_64,
    Code::Jl_rel8_64,
    Code::Jg_rel32_64,
];
