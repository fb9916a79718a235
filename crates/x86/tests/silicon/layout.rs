//! What both sides run on: the same virtual addresses with the same contents, and the same starting registers.
//!
//! The memory of a case is one *image*: pages of code, data and stack, one after the other. Each window of it is mapped at the same
//! virtual address on the host (in the child process) and in the guest (through its page tables); the data
//! window a second time at a high address.

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// Code: readable, writable, executable.
pub const CODE: u64 = 0x2000_0000;
/// Pages of code.
pub const CODE_PAGES: usize = 2;
/// Data: not executable. Below 2 GiB, so that every way of addressing reaches it.
pub const DATA: u64 = 0x1000_0000;
/// The data window once more.
pub const DATA_HIGH: u64 = 0x2345_1000_0000;
/// Pages of data that may be written.
pub const DATA_PAGES: usize = 6;
/// Pages of data that may only be read, after them. The page after these is not present.
pub const READ_ONLY_PAGES: usize = 1;
/// Stack.
pub const STACK: u64 = 0x3000_0000;
/// Pages of stack; those around them are not present.
pub const STACK_PAGES: usize = 2;

/// Offset of the code in the image.
pub const CODE_AT: usize = 0;
/// Offset of the data in the image.
pub const DATA_AT: usize = CODE_PAGES * PAGE;
/// Offset of the stack in the image.
pub const STACK_AT: usize = DATA_AT + (DATA_PAGES + READ_ONLY_PAGES) * PAGE;
/// Bytes of the image.
pub const IMAGE: usize = STACK_AT + STACK_PAGES * PAGE;

/// Bytes of data that may be written.
pub const DATA_BYTES: usize = DATA_PAGES * PAGE;

/// One mapping of a part of the image.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Where it is mapped.
    pub va: u64,
    /// Offset in the image.
    pub at: usize,
    /// Length.
    pub pages: usize,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub execute: bool,
}

const fn data_window(va: u64, at: usize, pages: usize, write: bool) -> Window {
    Window { va, at, pages, write, execute: false }
}

/// All mappings.
pub const WINDOWS: [Window; 6] = [
    Window { va: CODE, at: CODE_AT, pages: CODE_PAGES, write: true, execute: true },
    data_window(DATA, DATA_AT, DATA_PAGES, true),
    data_window(DATA + DATA_BYTES as u64, DATA_AT + DATA_BYTES, READ_ONLY_PAGES, false),
    data_window(DATA_HIGH, DATA_AT, DATA_PAGES, true),
    data_window(DATA_HIGH + DATA_BYTES as u64, DATA_AT + DATA_BYTES, READ_ONLY_PAGES, false),
    data_window(STACK, STACK_AT, STACK_PAGES, true),
];

/// The offset in the image of virtual address `va`.
pub fn image_offset(va: u64) -> Option<usize> {
    WINDOWS.iter().find(|w| va >= w.va && va - w.va < (w.pages * PAGE) as u64).map(|w| w.at + (va - w.va) as usize)
}

/// An FXSAVE image.
#[repr(C, align(16))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fx(pub [u8; 512]);

/// The registers a user program sees.
#[repr(C, align(16))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Regs {
    /// In the hardware's numbering.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub fx: Fx,
    /// The upper halves of the YMM registers; zero where there is no AVX.
    pub ymm_high: [[u64; 2]; 16],
}

impl Regs {
    /// All zero.
    pub const ZERO: Self =
        Self { gpr: [0; 16], rip: 0, rflags: 0, fs_base: 0, gs_base: 0, fx: Fx([0; 512]), ymm_high: [[0; 2]; 16] };
}

/// How a run ended: registers at the exception that ended it.
#[repr(C, align(16))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    pub regs: Regs,
    /// Exception vector, or [`NO_VECTOR`] and the following.
    pub vector: u64,
    /// Error code; zero for those without.
    pub error: u64,
    /// Faulting address of a page fault; zero otherwise.
    pub cr2: u64,
}

impl Outcome {
    /// Nothing happened yet.
    pub const NONE: Self = Self { regs: Regs::ZERO, vector: NO_VECTOR, error: 0, cr2: 0 };
}

/// No exception at all.
pub const NO_VECTOR: u64 = 1000;
/// The native side did not come to an end in time.
pub const TIMED_OUT: u64 = 1001;
/// The guest shut down (triple fault).
pub const SHUT_DOWN: u64 = 1002;
/// The guest retired far more instructions than the case can have.
pub const RAN_AWAY: u64 = 1003;
/// The engine came back for a reason that makes no sense here.
pub const STRANGE_EXIT: u64 = 1004;

/// The trap that ends every case.
pub const BREAKPOINT: u64 = 3;
/// Page fault.
pub const PAGE_FAULT: u64 = 14;

/// Carry, parity, adjust, zero, sign, overflow.
pub const STATUS_FLAGS: u64 = 0x8d5;
/// Trap flag.
pub const TF: u64 = 1 << 8;
/// Interrupt flag.
pub const IF: u64 = 1 << 9;
/// Direction flag.
pub const DF: u64 = 1 << 10;
