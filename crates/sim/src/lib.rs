//! The seeded world in which the sans-IO crates are tortured.
//!
//! In: a seed. Out: `Ok` with figures of what happened, or the first [`Violation`] of an invariant, with a trace.
//! Invariant: one seed is one history, bit by bit, on every machine: own generator, no floats, no clock, one thread.
//!
//! The code under test is the code that ships: `twinstep_pair::Primary` and `Secondary`. Everything around them is a toy, small
//! enough to be obviously right:
//!
//! ```text
//!   client ◀─outputs──┐                                 faults, drawn from the seed: delay, cut at any byte, partition,
//!     │ writes        │                                 crash, stall, slow replay, arbiter slow / away / answer lost
//!     ▼               │
//!   Side (machine + Primary) ◀──connection──▶ Side (machine + Secondary)      ... and fresh standbys afterwards
//!         └───────────claims──▶ arbiter ◀──────────┘
//! ```
//!
//! What is checked, from outside, at every step (module `check` and `outside`):
//! 1. Never two sides that run on their own; no epoch has two owners.
//! 2. No output leaves under protection before the secondary's host has the record that notes it.
//! 3. Nothing the client was told is missing in a machine that goes live.
//! 4. The outputs the world sees are those of one machine: no gap, no other content; twice only after a go-live.
//! 5. The log's bounds hold, but for the one slice of guest execution that passes them.
//! 6. After the faults have stopped: whoever is left runs, and the client gets answers again.
//!
//! `mutations` in the tests seeds known bugs into the pair, each of which must be found.

mod arbiter;
mod check;
mod faults;
mod images;
mod machine;
mod network;
mod outside;
mod profile;
mod random;
mod run;
mod side;
mod wires;
mod world;

pub use run::{Figures, Violation, run_seed};
