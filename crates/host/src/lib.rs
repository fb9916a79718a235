//! The real world: sockets, taps, disk images, arbiters, terminals, packages.
//!
//! *In*: what people and networks do. *Out*: values the rooms above the door understand (frames, bytes, verdicts).
//! *Invariant*: nothing here decides what a machine does; it only carries things to it and from it. Whatever comes from
//! outside (a peer on a socket, a package, a file) may be broken, late or hostile, so every queue has a bound and every
//! length is checked before it is believed.

#![forbid(unsafe_op_in_unsafe_fn)]

pub mod arbiter;
pub mod channel;
pub mod child;
pub mod control;
pub mod demo;
pub mod disk;
pub mod doctor;
pub mod error;
pub mod events;
pub mod guest;
pub mod identity;
pub mod metrics;
pub mod net;
pub mod packages;
pub mod passt;
pub mod perf_map;
pub mod pki;
pub mod redis_check;
mod secret_file;
pub mod signals;
pub mod socket;
pub mod stat;
pub mod status;
pub mod switch;
pub mod terminal;
pub mod vm;
pub mod wake;

pub use error::{Error, Result};
