//! The virtual PC behind one door.
//!
//! **In:** [`Input`]s, given at the current position. **Out:** [`Output`]s, each with the position at which the guest made it.
//! There is no other door: no host clock, no host randomness, no thread, no socket, no file in here. The host supplies [`Disk`]s, whose contents
//! count as part of the machine.
//!
//! A [`Machine`] is built from a [`Config`], loaded with [`Machine::boot`] or [`Machine::restore`], and run with [`Machine::run`]. What the guest
//! finds: one processor with its local APIC, an I/O APIC, RAM, a serial port, a CMOS clock, kvmclock, and on the PCI bus
//! virtio disks, network cards, a console and an entropy source, described by ACPI tables.
//!
//! **Invariant:** what happens is a function of the configuration, the disks' contents and the inputs with their positions. How a run is cut into calls
//! of [`Machine::run`] changes nothing.
//!
//! | to add | do |
//! | --- | --- |
//! | a virtio device | one file in `virtio/` that implements `VirtioDevice`, one line in `machine.rs` (`functions`) |
//! | another device | one file with state, `save`, `restore` and tests; its place in `layout.rs`; its accesses in `board.rs`; its lines in `Machine::save` and `restore` |
mod acpi;
mod apic;
mod board;
mod boot;
mod clock;
mod config;
mod cpu_payload;
mod digest;
mod dirty;
mod disk;
pub mod door;
pub mod faults;
mod kvmclock;
pub mod layout;
mod machine;
mod memory;
pub mod offload;
mod payload;
mod pci;
mod power;
mod rtc;
mod serial;
mod stats;
mod virtio;

pub use boot::BootError;
pub use config::{Config, ConfigError, DiskConfig};
pub use digest::Digest;
pub use dirty::{ConsumerId, PageSet, Start};
pub use disk::{Disk, DiskError, DiskRequest, DiskWanted, ElsewhereDisk, MemoryDisk};
pub use door::{Input, Output};
pub use machine::{InputError, MAX_FRAME, Machine, Pause};
pub use payload::{Payload, RestoreError};
pub use stats::{DeviceStats, MachineStats};
pub use twinstep_x86::{Activity, ActivityCell, CodeNote, CpuGauges, CpuModel, CpuStats, Features, PAGE_SIZE, PhysMem, Position};
