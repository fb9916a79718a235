//! Iterative pre-copy without I/O: what a running machine keeps in memory (and on disks), copied to another host while the machine runs.
//!
//! The **source** sends everything once while the guest goes on, then what was written meanwhile, then what was written during that, in
//! **rounds** that become smaller, until what is left is little enough to be copied while the guest stands still: the **cut**. The
//! **destination** takes the rounds in and, at the end, holds what the source had at the cut, or says what is missing.
//!
//! ```text
//!                 source's host                                          destination's host
//!   machine ◀─Collect, Read, Cut── Source ──Send(bytes)──▶ ... ──bytes──▶ Destination ──units──▶ machine
//!           ──Dirty, Copied, state──▶ │ ◀──Room(bytes)──── ... ◀──taken──┘
//!                                     └──Slow──▶ machine (if it writes faster than can be sent)
//! ```
//!
//! What is copied is made of **units**, named by region and number: region 0 may be RAM in pages of 4 KiB, region 1 a disk in blocks of 64 KiB. Which units were
//! written comes in as sets; the crate knows neither machines nor disks nor networks. Time comes in as values, in nanoseconds of any clock that never
//! goes back.
//!
//! **Invariants:** at the cut the destination's units are the source's (a digest says so) or it fails; a copy that is given up at any moment
//! leaves the source as it was; memory is bounded: 16 bytes a unit on either side, and a few MiB ([`Config::stop_bytes`] at the cut).
//!
//! | module | what |
//! | --- | --- |
//! | [`layout`] | regions and units |
//! | [`stream`] | the bytes between source and destination (docs/formats/migration.md) |
//! | [`source`] | rounds, and when to cut |
//! | [`pace`] | rates, and what follows from them |
//! | [`writes`] | disks that are written faster than can be sent |
//! | [`destination`] | checks, and the machine's other half |
//! | [`eras`] | what was written since two machines were last known to be equal |
//! | [`changes`] | which units two machines must exchange to be equal again |
//!
//! Pre-copy is as Clark et al. describe it for live migration (NSDI 2005).
pub mod changes;
pub mod destination;
pub mod eras;
pub mod layout;
pub mod pace;
pub mod packing;
pub mod source;
pub mod stream;
pub mod writes;

pub use destination::{Arrived, Destination, Target};
pub use eras::Eras;
pub use layout::{Layout, LayoutError, Region, unit_hash};
pub use pace::{Config, NotConverging};
pub use source::{Action, Copied, Event, Progress, Report, Source};
pub use stream::StreamError;
pub use writes::WritePace;
