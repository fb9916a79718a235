//! The primary's door: all that goes in, all that comes out, and what can be seen of it from outside.
//!
//! Invariant: plain values; whatever a host must know to drive a primary is written here.

use crate::arbiter::{Claim, Verdict};
use crate::config::Config;
use crate::notice::{Notice, StopReason};
use crate::types::{Epoch, Nanos, OutputId, OwnerId, Record, Seq};
use crate::wire::{HostIdentity, VmIdentity};

/// Something that happened to the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrimaryEvent {
    /// A connection to a standby was made. Any earlier one must have been closed.
    PeerConnected {
        /// Where the VM's standbys are ([`Hello::standbys`](crate::wire::Hello::standbys)): this one first, then those that it is to try itself once it is live.
        standbys: Vec<String>,
    },
    /// Bytes arrived on the connection.
    Bytes(Vec<u8>),
    /// The connection is gone, after everything that could be read from it was given in as `Bytes`.
    PeerClosed {
        /// What the socket said.
        reason: String,
    },
    /// The log grew by an input (or anything else that is not the note of an output).
    Record(Record),
    /// The machine made an output, and the log grew by the note that says so. The host keeps the data until
    /// [`PrimaryAction::Release`].
    Output {
        /// The machine's running number of the output.
        id: OutputId,
        /// The note. A secondary that has it replays at least so far before it goes live, and so makes the output itself.
        note: Record,
    },
    /// The host has really sent all outputs up to this one: the system call has returned.
    OutputsLeft {
        /// The last one.
        up_to: OutputId,
    },
    /// More bytes of the image; no more than [`PrimaryAction::WantImage`] has asked for.
    ImageChunk(Vec<u8>),
    /// For a resync all has been done that can be done while the guest runs, on both sides. The guest is stopped once the secondary has caught up.
    ResyncPrepared,
    /// As asked for by [`PrimaryAction::StandStill`] the guest stands still at this position. All records so far were given in, and nothing enters the machine until it is
    /// no longer throttled.
    StandsStill {
        /// The position.
        position: u64,
    },
    /// Instead of the cut that [`PrimaryAction::MakeDelta`] asks for: more differs than can be sent while the guest stands still. It runs on, much of that is given in as chunks meanwhile, and
    /// [`PrimaryEvent::ResyncPrepared`] is said again.
    ResyncGoesOn,
    /// The image holds the machine as it is at this position: every record from here on goes to the secondary. May come before,
    /// between or after the chunks, but exactly once; the last output so far is `last_output`.
    ImageCut {
        /// The position.
        position: u64,
    },
    /// The image is complete; the cut has been made.
    ImageEnd,
    /// From here on the machine runs to this position, and nothing enters it before it gets there or pauses: halts, asks its host for something, or
    /// ends. What pauses it must follow from its state alone. Any later `Record` makes this void; an `Output` does not.
    /// Without meaning unless outputs are to be matched.
    Lookahead {
        /// The position.
        position: u64,
    },
    /// The machine has paused before it got there. To be said before the outputs it made meanwhile.
    Paused,
    /// The guest has come so far.
    Progress {
        /// Its position.
        position: u64,
    },
    /// The arbiter's answer to [`PrimaryAction::AskArbiter`].
    ArbiterAnswer {
        /// Of the claim.
        epoch: Epoch,
        /// The answer.
        verdict: Verdict,
    },
    /// The guest is over (powered off, crashed) or the administrator wants an end. The secondary is told, so that it does not go live,
    /// once no output is held any more.
    Shutdown {
        /// For people.
        reason: String,
    },
    /// The administrator wants the secondary to go live and this side to end. Refused unless protection is on.
    HandOver {
        /// For people.
        reason: String,
    },
    /// A sign of life came beside the channel, and it is certain that it is of the one who is connected: see [`PrimaryAction::OpenBeats`].
    Beat,
    /// Time has passed; due at [`super::Primary::deadline`].
    Tick,
}

/// Something the host has to do for the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrimaryAction {
    /// Send these bytes on the connection, in order.
    Send(Vec<u8>),
    /// Close the connection, after sending what is queued, and forget it: no event of it is wanted any more.
    Disconnect,
    /// The standby also takes signs of life beside the channel, at this place ([`HelloReply::beats`](crate::wire::HelloReply::beats)). Until the connection is gone, what comes back from
    /// this process is a [`PrimaryEvent::Beat`].
    OpenBeats {
        /// Where.
        to: String,
        /// The standby's process.
        peer: OwnerId,
    },
    /// Send a sign of life beside the channel; it may get lost.
    Beat,
    /// The standby can replay this machine. Begin to produce the image.
    StartImage,
    /// The secondary has made another output. Tell people what differs, and prepare the resync while the guest runs: find out what has changed here since the
    /// two machines were last known to be equal, then say [`PrimaryEvent::ResyncPrepared`].
    StartResync {
        /// The first output that is not matched.
        output: OutputId,
        /// The position of the secondary's machine.
        position: u64,
        /// What the secondary made, in the host's words.
        detail: Vec<u8>,
    },
    /// During a resync, some of what has changed in the secondary since the two machines were last known to be equal, in its host's words.
    Changed(Vec<u8>),
    /// During a resync, the guest is to lose so many hundredths of its time, so that the secondary catches up.
    Slow {
        /// Below 100.
        percent: u8,
    },
    /// The guest is throttled: say where it stands, with [`PrimaryEvent::StandsStill`].
    StandStill,
    /// The secondary has replayed all there is, and `Changed` has said all. Produce the image of the resync: whatever the
    /// secondary's machine lacks, and the data of all outputs that have not certainly left. The cut, where the guest stands, and the chunks are reported as for
    /// [`PrimaryAction::StartImage`]. Or say [`PrimaryEvent::ResyncGoesOn`].
    MakeDelta,
    /// What the secondary's host says of the initial copy, in its words.
    CopyReport(Vec<u8>),
    /// The two machines were equal there, in all of their state: what changed before needs not be remembered for a resync.
    Agreed {
        /// Where.
        position: u64,
    },
    /// Feed up to so many further bytes of the image.
    WantImage {
        /// In addition to earlier wishes.
        bytes: u64,
    },
    /// Outputs up to this one may leave, in order. Report with [`PrimaryEvent::OutputsLeft`].
    Release {
        /// The last one.
        up_to: OutputId,
    },
    /// Put the claim to the arbiter and report with [`PrimaryEvent::ArbiterAnswer`]. The same claim may come again when the
    /// answer is late; a host that still waits for the first may ignore it.
    AskArbiter(Claim),
    /// The VM runs without a secondary from now on, by right. Held outputs follow as `Release`.
    GoAlone {
        /// The epoch, which is ours.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// Stop the guest for good. Outputs that were not released must never leave; those that were may.
    Stop(StopReason),
    /// The guest must not run while this is on.
    Throttle(bool),
    /// For people.
    Notice(Notice),
}

/// Where a primary stands. See the diagram at the head of [`super`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PrimaryState {
    /// No secondary. Outputs leave at once.
    Unprotected,
    /// Connected, greeting sent. Outputs leave at once.
    Greeting,
    /// The image is on its way. Outputs leave at once.
    Copying,
    /// Outputs are held until the secondary has what it needs to make them itself.
    Protected,
    /// The secondary has made another output. It replays what it has not replayed yet, and both find out what has changed; the guest runs, perhaps slowed. Outputs leave by the rule, which
    /// means that with [`Commit::Matched`](crate::Commit::Matched) none does.
    CatchingUp,
    /// The secondary gets what it lacks. The guest is throttled, outputs are held.
    Resyncing,
    /// The secondary is lost, the arbiter is asked, the guest is throttled, outputs are held.
    Deciding,
    /// Over.
    Stopped,
}

impl PrimaryState {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            PrimaryState::Unprotected => "unprotected",
            PrimaryState::Greeting => "greeting",
            PrimaryState::Copying => "copying",
            PrimaryState::Protected => "protected",
            PrimaryState::CatchingUp => "catching up",
            PrimaryState::Resyncing => "resyncing",
            PrimaryState::Deciding => "deciding",
            PrimaryState::Stopped => "stopped",
        }
    }
}

/// The figures of a primary, for people and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrimaryStatus {
    /// Where it stands.
    pub state: PrimaryState,
    /// In which epoch.
    pub epoch: Epoch,
    /// Whether the guest is held back.
    pub throttled: bool,
    /// The newest record of the log; 0 without a secondary.
    pub appended_seq: Seq,
    /// The newest record that the secondary has.
    pub received_seq: Seq,
    /// The newest record that the secondary has replayed.
    pub replayed_seq: Seq,
    /// Log bytes that the secondary has not acknowledged.
    pub unacked_bytes: u64,
    /// Log bytes that the secondary has not replayed.
    pub unreplayed_bytes: u64,
    /// Instructions that the secondary still has to replay.
    pub lag_instructions: u64,
    /// How long the primary took for what the secondary still has to replay.
    pub lag_time: Nanos,
    /// Outputs that are held.
    pub held_outputs: u64,
    /// Image bytes that the secondary has received.
    pub image_bytes: u64,
    /// The newest output that both sides have made alike.
    pub matched: OutputId,
    /// How often the secondary was made equal again.
    pub resyncs: u64,
}

/// Who the primary is and what it runs.
#[derive(Debug, Clone)]
pub struct PrimarySetup {
    /// Bounds and times.
    pub config: Config,
    /// The machine.
    pub vm: VmIdentity,
    /// This host.
    pub host: HostIdentity,
    /// This process.
    pub owner: OwnerId,
    /// The epoch the machine runs in: [`Epoch::FIRST`] after power-on.
    pub epoch: Epoch,
    /// The last output the machine has made: 0 after power-on.
    pub last_output: OutputId,
    /// The last output that has certainly left; the host is still sending those between this and `last_output`.
    pub last_left: OutputId,
}
