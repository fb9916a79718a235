//! The secondary's door: all that goes in, all that comes out, and what can be seen of it from outside.
//!
//! Invariant: plain values; whatever a host must know to drive a secondary is written here.

use std::ops::Range;

use crate::arbiter::{Claim, Verdict};
use crate::config::Config;
use crate::notice::{Notice, StopReason};
use crate::types::{Epoch, OutputId, OwnerId, Record, Seq};
use crate::wire::{Expectation, Hello, HostIdentity};

/// Something that happened to the secondary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecondaryEvent {
    /// A primary has connected.
    PeerConnected,
    /// Bytes arrived on the connection.
    Bytes(Vec<u8>),
    /// The connection is gone, after everything that could be read from it was given in as `Bytes`.
    PeerClosed {
        /// What the socket said.
        reason: String,
    },
    /// So many further bytes of the image are used up, and the host has room for as many. The primary sends no more than its window ahead of this, so the
    /// host keeps no more of an image than that.
    ImageTaken {
        /// In addition to earlier ones.
        bytes: u64,
    },
    /// What the host says of the initial copy, for the primary's host: sent as long as the image is not complete.
    CopyReport(Vec<u8>),
    /// The machine is restored from the image; replay can begin.
    ImageRestored {
        /// The position of the machine.
        position: u64,
        /// The last output it had made.
        last_output: OutputId,
    },
    /// Replay made an output, and it is the one that was noted (or [`SecondaryAction::Diverge`] was asked for). The host keeps its data until
    /// [`SecondaryAction::Discard`] or until it has gone live and sent it again.
    Output {
        /// The machine's running number of the output.
        id: OutputId,
    },
    /// Replay has consumed all records up to `seq`. The note of an output is consumed when the output is made, so its
    /// `Output` comes first.
    Replayed {
        /// The last one; 0 for none.
        seq: Seq,
        /// Where the machine is.
        position: u64,
    },
    /// The machine was seen to be equal to the primary's, in all of its state.
    Agreed {
        /// Where.
        position: u64,
    },
    /// Replay has made another output than the one noted, or none, or one too many. It goes on as far as it can, and what it makes is not reported but kept, until
    /// [`SecondaryAction::Restore`] or [`SecondaryAction::Diverge`].
    Mismatch {
        /// The first output that is not matched.
        output: OutputId,
        /// Where the machine is.
        position: u64,
        /// What was made instead, in the host's words.
        detail: Vec<u8>,
    },
    /// After a mismatch, some of what has changed in this machine since it was last known to equal the primary's, in the host's words: at most
    /// [`MAX_CHANGED_BYTES`](crate::wire::MAX_CHANGED_BYTES).
    Changed(Vec<u8>),
    /// All that has changed was said, as [`SecondaryAction::ListChanges`] has asked for.
    Listed,
    /// Since [`SecondaryAction::Diverge`], what the machine had made was reported as outputs.
    Diverged,
    /// The arbiter's answer to [`SecondaryAction::AskArbiter`].
    ArbiterAnswer {
        /// Of the claim.
        epoch: Epoch,
        /// The answer.
        verdict: Verdict,
    },
    /// The administrator wants this standby to end. The primary is told. Refused once the primary is lost, since the machine
    /// may live on only here.
    Shutdown {
        /// For people.
        reason: String,
    },
    /// This host can't go on: the image can't be restored, replay went wrong. The primary is told, if there is one.
    Failed {
        /// For people.
        reason: String,
    },
    /// A sign of life came beside the channel, and it is certain that it is of the one who is connected: see [`SecondaryAction::OpenBeats`].
    Beat,
    /// Time has passed; due at [`super::Secondary::deadline`].
    Tick,
}

/// Something the host has to do for the secondary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecondaryAction {
    /// Send these bytes on the connection, in order.
    Send(Vec<u8>),
    /// Close the connection, after sending what is queued, and forget it: no event of it is wanted any more.
    Disconnect,
    /// Until the connection is gone, a sign of life from this process beside the channel is a [`SecondaryEvent::Beat`]; they come at the place that this standby has named.
    OpenBeats {
        /// The primary's process.
        peer: OwnerId,
    },
    /// Send a sign of life beside the channel, to where the last one came from, if any has come; it may get lost.
    Beat,
    /// A primary was accepted: make room for its machine.
    Prepare(Hello),
    /// The next bytes of the image.
    ImageChunk(Vec<u8>),
    /// The image is complete. If there is a machine already (a resync), the image says what it lacks: it replaces that, and with it all records
    /// handed over so far and all data of outputs. Restore the machine, with ticks going on meanwhile (or the primary misses our heartbeats), and report with [`SecondaryEvent::ImageRestored`].
    Restore {
        /// The position the machine must be at.
        position: u64,
    },
    /// Replay these records, once the machine is restored; report with [`SecondaryEvent::Output`] and
    /// [`SecondaryEvent::Replayed`]. Between them the machine may run as far as the last record's position and no further, but for [`SecondaryAction::RunAhead`].
    Replay {
        /// The number of the first.
        first_seq: Seq,
        /// In order.
        records: Vec<Record>,
    },
    /// Behind the records handed over so far, the machine may run to this position, and stops where it pauses before: the primary's has taken nothing until there. Records of
    /// outputs that follow may lie before where it then is, all others do not. What it makes there counts once its note has come.
    RunAhead {
        /// The position.
        position: u64,
    },
    /// During a resync the primary's guest stands still at this position, and all records before were handed over. Replay them as far as that goes, and run to the position; report what has
    /// changed with [`SecondaryEvent::Changed`], and then [`SecondaryEvent::Listed`]. More may come to be replayed later, and this be asked again.
    ListChanges {
        /// The position.
        position: u64,
    },
    /// The primary is lost, and outputs have differed: what the machine has made since then counts. Report it as [`SecondaryEvent::Output`], then
    /// [`SecondaryEvent::Diverged`], and go on without comparing. What the world has seen under [`crate::Commit::Matched`] fits that machine.
    Diverge,
    /// Outputs up to this one have certainly left the primary; their data is not needed any more.
    Discard {
        /// The last one.
        up_to: OutputId,
    },
    /// Put the claim to the arbiter and report with [`SecondaryEvent::ArbiterAnswer`]. The same claim may come again when the
    /// answer is late; a host that still waits for the first may ignore it. Replay goes on meanwhile.
    AskArbiter(Claim),
    /// The log is consumed and the epoch ours: announce the MAC address, send the outputs `reissue` (first to one past the last; the world may not have
    /// seen them), then run. [`super::Secondary::into_primary`] makes what drives the machine from here on.
    GoLive {
        /// The epoch.
        epoch: Epoch,
        /// Which outputs to send again.
        reissue: Range<OutputId>,
    },
    /// Give the machine up.
    Stop(StopReason),
    /// For people.
    Notice(Notice),
}

/// Where a secondary stands. See the diagram at the head of [`super`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SecondaryState {
    /// No greeting yet.
    Listening,
    /// The image comes in.
    Copying,
    /// The machine is restored and replays.
    Following,
    /// An output differed; what the machine lacks comes in.
    Resyncing,
    /// The primary is lost, the arbiter is asked; replay goes on to the end of the log.
    Deciding,
    /// The epoch is ours; the rest of the log is consumed.
    Consuming,
    /// The machine is ours.
    Live,
    /// Over.
    Stopped,
}

impl SecondaryState {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            SecondaryState::Listening => "listening",
            SecondaryState::Copying => "copying",
            SecondaryState::Following => "following",
            SecondaryState::Resyncing => "resyncing",
            SecondaryState::Deciding => "deciding",
            SecondaryState::Consuming => "consuming",
            SecondaryState::Live => "live",
            SecondaryState::Stopped => "stopped",
        }
    }
}

/// The figures of a secondary, for people and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecondaryStatus {
    /// Where it stands.
    pub state: SecondaryState,
    /// The epoch of the primary, or ours once we are live.
    pub epoch: Option<Epoch>,
    /// Whether it may go live if the primary is lost.
    pub entitled: bool,
    /// The newest record received.
    pub received_seq: Seq,
    /// The newest record replayed.
    pub replayed_seq: Seq,
    /// Where the machine is.
    pub replayed_position: u64,
    /// Where the primary was when it was last heard.
    pub primary_position: u64,
    /// Outputs made here that are not known to have left the primary.
    pub unconfirmed_outputs: u64,
    /// Image bytes received.
    pub image_bytes: u64,
}

/// Who the secondary is and what it may accept.
#[derive(Debug, Clone)]
pub struct SecondarySetup {
    /// Bounds and times.
    pub config: Config,
    /// This host.
    pub host: HostIdentity,
    /// This process.
    pub owner: OwnerId,
    /// Which machines it may accept.
    pub expect: Expectation,
    /// Where this host takes signs of life beside the channel, if it does.
    pub beats: Option<String>,
}
