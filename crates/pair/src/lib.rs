//! Fault tolerance without I/O: the logging channel, the output rule, failover, arbitration.
//!
//! Two hosts run the same deterministic machine. The **primary** sends the log of everything that enters its machine to the **secondary**
//! over the **logging channel**; the secondary replays it. An output leaves the primary only when the secondary has what it
//! needs to make that output itself (the **output rule**), so the world never sees an effect that could be forgotten. When one side
//! loses the other, an **arbiter** decides by one test-and-set for the next **epoch** who goes on: exactly one.
//!
//! ```text
//!            host of the primary                                   host of the secondary
//!   machine ──records, outputs──▶ Primary ──frames──▶ TCP ──▶ Secondary ──records──▶ machine
//!   world   ◀──Release─────────── Primary ◀──acks──── TCP ◀── Secondary ◀──progress── machine
//!                                    └──────claim──▶ arbiter ◀──claim──┘
//! ```
//!
//! In: events and the time, as values. Out: actions, taken with `poll`. There is no other door: no socket, clock, thread,
//! file or randomness in this crate, so that a seeded simulator runs the very code that ships through any history of failures.
//!
//! What holds, whatever the network, the hosts and the arbiter do (crate `sim` checks it):
//! 1. Never two sides that run on their own: [`Primary`] and [`Secondary`] each go on alone only by right of an epoch.
//! 2. No output leaves against the rule.
//! 3. Nothing whose acknowledgement the world has seen is missing after go-live.
//! 4. If the arbiter answers and a side is left, one goes on.
//! 5. Every queue has a bound.
//!
//! Driving it: call `handle(now, event)` for whatever happened, then `poll()` until `None`, then wait until `deadline()` or the
//! next event. Outputs and records are opaque here; the host keeps outputs' data by id.
//!
//! Sources: the output rule, the logging channel and going live follow the published design of VMware's fault tolerance (2010);
//! receipt and match as two acknowledgements, and the resync after a mismatch, follow US 8,201,169.

mod arbiter;
mod bugs;
mod config;
mod detector;
mod heal;
mod link;
mod notice;
mod primary;
mod secondary;
#[cfg(test)]
mod testing;
mod types;
pub mod wire;

pub use arbiter::{Arbiter, Claim, TableArbiter, Verdict, verdict_for};
pub use bugs::{Bug, Bugs};
pub use config::{Commit, Config, ConfigError, OnMismatch};
pub use heal::{Healer, Setback};
pub use notice::{Notice, StopReason};
pub use primary::{Primary, PrimaryAction, PrimaryEvent, PrimarySetup, PrimaryState, PrimaryStatus};
pub use secondary::{Secondary, SecondaryAction, SecondaryEvent, SecondarySetup, SecondaryState, SecondaryStatus};
pub use types::{Epoch, Nanos, OutputId, OwnerId, Record, Seq, VmId};
pub use wire::{Expectation, HostIdentity, VmIdentity};
