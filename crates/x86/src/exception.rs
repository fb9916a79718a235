//! Architectural exceptions (SDM vol. 3 chapter 6, APM vol. 2 chapter 8).

/// Exception vectors the engine raises itself.
#[allow(missing_docs)]
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Breakpoint = 3,
    Overflow = 4,
    Bound = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    MathFault = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFault = 19,
}

/// One exception on its way to the guest. The state it is raised with is that before the faulting instruction, except for
/// traps (`Debug`, `Breakpoint`, `Overflow`), whose instruction has retired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// Which one.
    pub vector: Vector,
    /// The error code, for those that push one (SDM vol. 3 table 6-1).
    pub error: Option<u32>,
    /// The faulting linear address, for page faults; goes to CR2.
    pub address: Option<u64>,
}

impl Exception {
    /// #UD
    pub const UD: Self = Self { vector: Vector::InvalidOpcode, error: None, address: None };
    /// #NM
    pub const NM: Self = Self { vector: Vector::DeviceNotAvailable, error: None, address: None };

    /// #GP with an error code (0 or a selector with its low bits).
    pub const fn gp(error: u32) -> Self {
        Self { vector: Vector::GeneralProtection, error: Some(error), address: None }
    }
    /// #SS with an error code.
    pub const fn ss(error: u32) -> Self {
        Self { vector: Vector::StackFault, error: Some(error), address: None }
    }
    /// #NP with a selector.
    pub const fn np(error: u32) -> Self {
        Self { vector: Vector::SegmentNotPresent, error: Some(error), address: None }
    }
    /// #TS with a selector.
    pub const fn ts(error: u32) -> Self {
        Self { vector: Vector::InvalidTss, error: Some(error), address: None }
    }
    /// #PF with its error code (P, W, U, RSVD, I/D bits) and linear address.
    pub const fn pf(error: u32, address: u64) -> Self {
        Self { vector: Vector::PageFault, error: Some(error), address: Some(address) }
    }
    /// An exception without error code.
    pub const fn plain(vector: Vector) -> Self {
        Self { vector, error: None, address: None }
    }
}
