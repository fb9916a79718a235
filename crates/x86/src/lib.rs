//! The deterministic x86-64 CPU.
//!
//! **In:** guest RAM ([`PhysMem`]), a [`Bus`] for everything that is not RAM, an architectural state
//! ([`CpuState`]) and a position to stop at. **Out:** the state after exactly that many retired instructions, or an
//! [`Exit`] that says why it stopped earlier.
//!
//! **Invariant:** what the guest can see is a function of the starting state, the RAM, and what the bus answered. It never
//! depends on the host clock, on block size, on what the translation cache or the soft TLB hold, or on host flags,
//! signals and FPU state. What counts as one retired instruction is written in `docs/positions.md`.
//!
//! Guest and host have the same instruction set, so the engine translates guest code to host code
//! that is mostly the same instructions with their memory operands rewritten. The silicon executes what it can; only
//! what touches privileged state is done by hand (module `sys`).
//!
//! References: AMD64 Architecture Programmer's Manual vol. 2 and 3 (APM), Intel SDM vol. 2 and 3.

mod activity;
mod bus;
mod cache;
mod classify;
mod emit;
mod engine;
mod exception;
mod features;
mod frame;
pub mod mmu;
mod model;
mod priority;
mod ram;
mod segmentation;
mod signals;
mod sites;
mod snapshot;
pub mod state;
mod stats;
pub mod sys;
mod translate;
mod undefined;

pub use activity::{Activity, ActivityCell};
pub use bus::{Bus, TscRate, UnknownMsr};
pub use cache::CodeNote;
pub use engine::{Cpu, CpuConfig};
pub use exception::{Exception, Vector};
pub use features::Features;
pub use model::{CpuModel, CpuidLeaf};
pub use ram::{PAGE_SIZE, PageFlags, PhysMem, RamRegion};
pub use snapshot::{STATE_VERSION, SnapshotError, decode_state, encode_state};
pub use state::{CpuState, Segment};
pub use stats::{CacheStats, CpuGauges, CpuStats, EngineStats, ExitStats, GroupStats, MmuStats, SystemStats};

/// A point in a machine's life: guest instructions retired since power-on. See `docs/positions.md`.
pub type Position = u64;

/// Why [`Cpu::run`] came back. In every case the state is exact at an instruction boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The position asked for is reached.
    Position,
    /// The guest executed HLT. The position is the one after HLT; [`Cpu::interrupt`] wakes it.
    Halted,
    /// The bus asked for attention ([`Bus::attention`]); the instruction that caused it has retired.
    Attention,
    /// An interrupt window was asked for ([`Cpu::want_interrupt_window`]) and is open now.
    Window,
    /// A fault while delivering a double fault: the processor shuts down.
    TripleFault,
    /// The guest does something this engine does not do (named); it cannot go on.
    Unsupported(&'static str),
}
