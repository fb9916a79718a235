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
//! | [`image`] | a machine's state as a stream of bytes: snapshots, and what a recording or a standby starts from |
//! | [`recording`] | an image and the entries since, in a file |
//! | [`replay`] | a machine driven through a log again, and the first difference |
//! | [`compare`] | outputs of two machines that need not be in step |
//! | [`vote`] | whose output a third machine makes |
//! | [`container`] | how files begin, and how they can be wrong |
//! | [`stats`] | how much of what |
pub mod channel;
pub mod codec;
pub mod compare;
pub mod container;
pub mod decoder;
pub mod entry;
pub mod image;
mod input;
pub mod recorder;
pub mod recording;
pub mod replay;
pub mod stats;
pub mod vote;

pub use codec::{EncodeError, Fault, MAX_ENTRY, MAX_PAYLOAD, encode_into, encoded_length};
pub use compare::{Comparer, Mismatch};
pub use container::{ReadError, WriteError};
pub use decoder::{DecodeError, Decoder};
pub use entry::{EndReason, Entry, EntryKind, Event, OutputNote, OutputPort};
pub use image::{Compression, ImageItem, ImageMetadata, ImagePayload, ImageProgress, ImageReader, ImageSummary, ImageWriter};
pub use recorder::{RecordError, Recorder};
pub use recording::{RecordingEnd, RecordingMetadata, RecordingReader, RecordingStart, RecordingWriter};
pub use replay::{Difference, Divergence, ReplayError, ReplayOptions, Replayable, Replayer, Report, RunOutcome};
pub use stats::{KindStats, LogStats};
pub use vote::{Dispute, Disputed, Opinion, Verdict, VoteError};
