//! The architectural state of the processor.
//!
//! Plain data: what a snapshot stores, what a digest covers, what two runs must agree on. The layout is fixed (`repr(C)`)
//! because translated code addresses the first fields directly.

/// A segment register with its hidden part.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes, after granularity was applied.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Access rights: descriptor bits 40..=47 (type, S, DPL, P) in bits 0..=7, bits 52..=55 (AVL, L, D/B, G) in bits 12..=15.
    /// Zero means unusable (null selector).
    pub attributes: u16,
}

impl Segment {
    /// Present bit in `attributes`.
    pub const PRESENT: u16 = 1 << 7;
    /// Code or data (not system) bit in `attributes`.
    pub const NON_SYSTEM: u16 = 1 << 4;
    /// 64-bit code bit in `attributes`.
    pub const LONG: u16 = 1 << 13;
    /// Default operand size bit in `attributes`.
    pub const BIG: u16 = 1 << 14;
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attributes >> 5) as u8 & 3
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes (offset of the last byte).
    pub limit: u16,
}

/// Indexes of [`CpuState::seg`] (the hardware's numbering).
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Indexes of [`CpuState::gpr`] (the hardware's numbering).
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// RFLAGS bits.
#[allow(missing_docs)]
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const ONE: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six status flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
#[allow(missing_docs)]
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// XCR0 bits: which state components are on, and which component is which in an XSAVE area.
#[allow(missing_docs)]
pub mod xcr0 {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const ALL: u64 = X87 | SSE | AVX;
}

/// EFER bits.
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// The 512-byte FXSAVE image (SDM vol. 1 section 10.5), in the 64-bit layout.
#[repr(C, align(16))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FxImage(pub [u8; 512]);

impl FxImage {
    /// The image after reset (FCW 037f, MXCSR 1f80, all else zero).
    pub const RESET: Self = {
        let mut image = [0; 512];
        image[0] = 0x7f;
        image[1] = 0x03;
        image[24] = 0x80;
        image[25] = 0x1f;
        Self(image)
    };
}

/// The whole architectural state of one processor.
///
/// All fields are exact whenever Rust code looks at them; only while translated code runs do host registers hold some of them.
#[repr(C, align(64))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuState {
    /// General registers in the hardware's numbering ([`gpr`]).
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS; bit 1 is always set, reserved bits clear.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS ([`seg`]).
    pub seg: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table register.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table register.
    pub idtr: TableRegister,
    /// CR0 ([`cr0`]).
    pub cr0: u64,
    /// CR2, the last page fault's linear address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4 ([`cr4`]).
    pub cr4: u64,
    /// Debug registers; 4 and 5 are unused.
    pub dr: [u64; 8],
    /// EFER ([`efer`]).
    pub efer: u64,
    /// STAR, LSTAR, CSTAR, SFMASK.
    pub star: u64,
    #[allow(missing_docs)]
    pub lstar: u64,
    #[allow(missing_docs)]
    pub cstar: u64,
    #[allow(missing_docs)]
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP.
    pub sysenter: [u64; 3],
    /// PAT.
    pub pat: u64,
    /// TSC_AUX.
    pub tsc_aux: u64,
    /// What the guest added to the machine's time-stamp counter (TSC_ADJUST and TSC writes), modulo 2^64.
    pub tsc_offset: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// MTRR state: default type, 11 fixed ranges, 8 variable base/mask pairs. Stored, without effect (RAM is write-back).
    pub mtrr_def_type: u64,
    #[allow(missing_docs)]
    pub mtrr_fixed: [u64; 11],
    #[allow(missing_docs)]
    pub mtrr_var: [u64; 16],
    /// Current privilege level, 0..=3.
    pub cpl: u8,
    /// The processor executed HLT and waits for an interrupt.
    pub halted: bool,
    /// The next instruction boundary is no place to take an interrupt (after STI that set IF, after MOV SS / POP SS).
    pub interrupt_shadow: bool,
    /// The page-directory pointers of PAE paging outside long mode, as last loaded (SDM vol. 3 section 4.4.1).
    pub pdpte: [u64; 4],
    /// x87, MMX and SSE registers and control words. FIP, FDP and FOP are zero by definition here (docs/positions.md).
    pub fx: FxImage,
    /// The upper halves of the YMM registers; the lower ones are in `fx`.
    pub ymm_high: [[u64; 2]; 16],
    /// XCR0 ([`xcr0`]).
    pub xcr0: u64,
}

impl CpuState {
    /// The state after power-on reset: real mode at F000:FFF0 (APM vol. 2 table 14-1). The machine's boot code replaces it by
    /// a long-mode state.
    pub fn reset() -> Self {
        let data = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x93 };
        let mut seg = [data; 6];
        seg[self::seg::CS] = Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attributes: 0x9b };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::ONE,
            seg,
            tr: Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x8b },
            ldtr: Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x82 },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::ET | cr0::NW | cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter: [0; 3],
            pat: 0x0007_0406_0007_0406,
            tsc_aux: 0,
            tsc_offset: 0,
            misc_enable: 1,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_var: [0; 16],
            cpl: 0,
            halted: false,
            interrupt_shadow: false,
            pdpte: [0; 4],
            fx: FxImage::RESET,
            ymm_high: [[0; 2]; 16],
            xcr0: xcr0::X87,
        }
    }
    /// Whether VEX-encoded vector instructions are switched on: CR4.OSXSAVE, and SSE and AVX in XCR0 (SDM vol. 2 section 2.4).
    pub fn avx_on(&self) -> bool {
        let both = xcr0::SSE | xcr0::AVX;
        self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & both == both
    }
    /// Whether the code segment is a 64-bit one and long mode is active.
    pub fn is_64_bit_code(&self) -> bool {
        self.efer & efer::LMA != 0 && self.seg[seg::CS].attributes & Segment::LONG != 0
    }
}
