//! Virtual machines in the real world: the short compositions on the machine's one door.
//!
//! | module | what |
//! | --- | --- |
//! | [`spec`] | what a VM is built from: flags, TOML |
//! | [`build`] | a machine from a spec, an image or a recording |
//! | [`pace`] | guest time pulled toward real time |
//! | [`live`] | run and record: real I/O to inputs, outputs to real I/O |
//! | [`turns`] | drivers that others drive in their place |
//! | `line` | the logging channel as a driver has it |
//! | `asker` | the arbiter, asked on a thread of its own |
//! | `precopy` | the copy of a running machine to a standby |
//! | `arrival` | the machine that comes of it there |
//! | [`pairing`] | the primary's end of the logging channel |
//! | [`standby`] | the secondary: replay from the network, go live |
//! | `follow` | the standby's thread that owns the machine: replay, comparison |
//! | [`resync`] | what makes a secondary equal to its primary again |
//! | `preparation`, `survey`, `told`, `ahead` | what is done for that while the guest runs: on the primary; on both; what the standby tells; what is sent |
//! | `window` | what a standby keeps for a third opinion |
//! | `kept_blocks` | what of the disks is in a window |
//! | [`vote`] | the third opinion |
//! | [`difference`] | in what two outputs differ, for people |
//! | [`disks`] | images opened as a machine's disks |
//! | [`mirror`] | a standby's images made equal to the primary's |
//! | `writes` | a guest that writes to its disks faster than they can be copied |
//! | [`session`] | one VM from the command to its end |
//! | [`replay`] | a recording replayed and checked |
//!
//! *Invariant*: a machine is driven by one thread; everything else reaches it as a message.
mod ahead;
mod arrival;
mod asker;
pub mod build;
pub mod difference;
mod disk_writer;
pub mod disks;
mod follow;
mod healing;
mod kept_blocks;
mod line;
pub mod live;
pub mod mirror;
pub mod pace;
pub mod pairing;
pub mod precopy;
mod preparation;
pub mod replay;
pub mod resync;
pub mod session;
pub mod spec;
pub mod standby;
mod survey;
mod told;
pub mod turns;
pub mod vote;
mod window;
mod writes;
