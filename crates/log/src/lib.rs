//! The event log: entries, encoding, files and streams.
//!
//! **In:** what goes through a machine's door, with positions. **Out:** bytes, and the same entries from these bytes again.
//! **Never here:** policy, clocks, threads, sockets, files: only `std::io::Read` and `Write` of whoever owns them.
//!
//! | module | what |
//! | --- | --- |
//! | [`entry`] | what a log is made of |
//! | [`codec`], [`decoder`] | entries to bytes and back, the same in files and on the logging channel |
//! | [`recorder`] | what happens to a machine, turned into entries |
//! | [`stats`] | how much of what |
pub mod codec;
pub mod decoder;
pub mod entry;
mod input;
pub mod recorder;
pub mod stats;

pub use codec::{EncodeError, Fault, MAX_ENTRY, MAX_PAYLOAD, encode_into, encoded_length};
pub use decoder::{DecodeError, Decoder};
pub use entry::{EndReason, Entry, EntryKind, Event, OutputNote, OutputPort};
pub use recorder::{RecordError, Recorder};
pub use stats::{KindStats, LogStats};
