//! The virtual PC behind one door.
//!
//! **In:** [`Input`]s, given at the current position. **Out:** [`Output`]s, each with the position at which the guest made it.
//! There is no other door: no host clock, no host randomness, no thread, no socket, no file in here.
pub mod door;
pub use door::{Input, Output};
