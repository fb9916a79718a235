//! A third opinion: which of two machines that made different outputs is right.
//!
//! **In:** a machine in the last state that both were known to have, the log that the one of them (the primary) wrote from there on, and what they disagree about. **Out:** whose output a machine
//! makes that is neither of them. **Invariant:** an opinion follows from the log and the machine alone; whatever the log holds, there is one, or an error.
//!
//! The machine is given every input where the primary took it, and its outputs are compared with the primary's notes by the very rules by which the standby compared
//! its own. If they come to the same difference as the standby's, the standby is right. If they come to none, and the disputed output was among them, the primary is. Otherwise it
//! is neither: then this machine is wrong as well, or the state that both had was.
use crate::compare::{Comparer, Mismatch};
use crate::container::ReadError;
use crate::entry::{Entry, Event, OutputNote, OutputPort};
use crate::replay::{Replayable, RunOutcome};
use minicbor::{Decode, Encode};
use twinstep_machine::door::Output;

/// What two sides of a pair disagree about. Fields have numbers for ever; one that is added must be optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Dispute {
    /// Number of the first output that was not made by both.
    #[n(0)]
    pub output: u64,
    /// Where the standby stood when it knew.
    #[n(1)]
    pub position: u64,
    /// What the primary noted; none: nothing.
    #[n(2)]
    pub noted: Option<Disputed>,
    /// What the standby made instead; none: nothing.
    #[n(3)]
    pub made: Option<Disputed>,
    /// The standby's machine did not get as far, or refused an input: not an output is disputed.
    #[n(4)]
    #[cbor(default)]
    pub stuck: bool,
    /// The same for people, as the standby said it.
    #[n(5)]
    #[cbor(default)]
    pub text: String,
}

/// One of the outputs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Disputed {
    /// At which position it was made.
    #[n(0)]
    pub position: u64,
    /// 1 frame, 2 large segment, 3 serial, 4 console, 5 write to a shared disk, 6 flush of one.
    #[n(1)]
    pub kind: u8,
    /// Which network card or disk.
    #[n(2)]
    pub card: u8,
    /// Bytes of the pieces of a large segment.
    #[n(3)]
    pub segment_size: u16,
    /// How many bytes it has.
    #[n(4)]
    pub length: u32,
    /// XXH3-128 of its bytes, lowest byte first.
    #[n(5)]
    #[cbor(with = "minicbor::bytes")]
    pub digest: [u8; 16],
    /// Its bytes, if they are known.
    #[n(6)]
    #[cbor(with = "minicbor::bytes", default)]
    pub bytes: Vec<u8>,
    /// Where a write begins, or the number of a flush; if the bytes are known.
    #[n(7)]
    #[cbor(default)]
    pub number: u64,
}

impl Disputed {
    /// An output of which only the note is known.
    pub fn noted(position: u64, note: &OutputNote) -> Self {
        let (kind, card, segment_size) = match note.port {
            OutputPort::Nic(nic) => (1, nic, 0),
            OutputPort::NicGso { nic, segment_size } => (2, nic, segment_size),
            OutputPort::Serial => (3, 0, 0),
            OutputPort::Console => (4, 0, 0),
            OutputPort::Disk(disk) => (5, disk, 0),
            OutputPort::DiskFlush(disk) => (6, disk, 0),
        };
        let digest = note.digest.to_le_bytes();
        Self { position, kind, card, segment_size, length: note.length, digest, bytes: Vec::new(), number: 0 }
    }

    /// An output that was made; its bytes are kept if there are at most `max_bytes`.
    pub fn made(position: u64, output: &Output, max_bytes: usize) -> Self {
        let (bytes, number) = match output {
            Output::NetTx { frame: bytes, .. } | Output::NetTxGso { frame: bytes, .. } => (bytes.as_slice(), 0),
            Output::Serial(bytes) | Output::Console(bytes) => (bytes.as_slice(), 0),
            Output::DiskWrite { offset, data, .. } => (data.as_slice(), *offset),
            Output::DiskFlush { request, .. } => (&[][..], *request),
        };
        let kept = if bytes.len() <= max_bytes { bytes.to_vec() } else { Vec::new() };
        Self { bytes: kept, number, ..Self::noted(position, &OutputNote::of(output)) }
    }

    /// Its note; none if it is of a kind that this build does not know.
    pub fn note(&self) -> Option<OutputNote> {
        let port = match self.kind {
            1 => OutputPort::Nic(self.card),
            2 => OutputPort::NicGso { nic: self.card, segment_size: self.segment_size },
            3 => OutputPort::Serial,
            4 => OutputPort::Console,
            5 => OutputPort::Disk(self.card),
            6 => OutputPort::DiskFlush(self.card),
            _ => return None,
        };
        Some(OutputNote { port, length: self.length, digest: u128::from_le_bytes(self.digest) })
    }

    /// The output itself, if its bytes are known and are those of the note.
    pub fn output(&self) -> Option<Output> {
        let bytes = self.bytes.clone();
        let output = match self.kind {
            1 => Output::NetTx { nic: self.card, frame: bytes },
            2 => Output::NetTxGso { nic: self.card, frame: bytes, segment_size: self.segment_size },
            3 => Output::Serial(bytes),
            4 => Output::Console(bytes),
            5 => Output::DiskWrite { disk: self.card, offset: self.number, data: bytes },
            6 if bytes.is_empty() => Output::DiskFlush { disk: self.card, request: self.number },
            _ => return None,
        };
        (self.note() == Some(OutputNote::of(&output))).then_some(output)
    }

    fn is(&self, position: u64, note: OutputNote) -> bool {
        self.position == position && self.note() == Some(note)
    }
}

/// Whose output the third machine makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The primary's.
    Primary,
    /// The standby's.
    Standby,
    /// Neither's.
    Neither,
}

/// What the third machine did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opinion {
    /// Whose output it makes.
    pub verdict: Verdict,
    /// Where it stands.
    pub position: u64,
    /// What it made where the two differ, and where; none: nothing.
    pub made: Option<(u64, Output)>,
    /// Outputs that both this machine and the primary made.
    pub outputs_agreed: u64,
    /// State digests of the primary that the machine's was equal to, and those that it was not.
    pub digests: (u64, u64),
    /// Why it did not get to the end of the log, if it did not.
    pub stuck: Option<String>,
}

/// Why there is no opinion.
#[derive(Debug, thiserror::Error)]
pub enum VoteError {
    /// The log cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The host could not do its part, which says nothing of the machine.
    #[error("{0}")]
    Host(String),
    /// The log goes back in time.
    #[error("the log goes back from position {0} to {1}")]
    Order(u64, u64),
    /// The log ends before what is disputed.
    #[error("the log ends at position {0}, before the disputed output was noted at {1}")]
    Short(u64, u64),
}

struct Third<'a, M> {
    machine: &'a mut M,
    dispute: &'a Dispute,
    comparer: Comparer,
    /// The disputed output, as the primary made it.
    seen: Option<Output>,
    outputs_agreed: u64,
    digests: (u64, u64),
    stuck: Option<String>,
}

/// Runs the machine, which has made outputs up to `last_output`, through the log that `next` gives, until it gives `None`, and says whose output it makes.
///
/// # Errors
/// If the log or the host fails, or the log does not hold what is disputed.
pub fn vote<M: Replayable>(
    machine: &mut M,
    last_output: u64,
    dispute: &Dispute,
    mut next: impl FnMut() -> Result<Option<Entry>, ReadError>,
) -> Result<Opinion, VoteError> {
    let comparer = Comparer::new(last_output);
    let mut third = Third { machine, dispute, comparer, seen: None, outputs_agreed: 0, digests: (0, 0), stuck: None };
    let mut last = third.machine.position();
    while third.stuck.is_none()
        && let Some(entry) = next()?
    {
        if entry.position < last {
            return Err(VoteError::Order(last, entry.position));
        }
        last = entry.position;
        third.follow(entry)?;
    }
    third.opinion(last)
}

impl<M: Replayable> Third<'_, M> {
    fn follow(&mut self, entry: Entry) -> Result<(), VoteError> {
        self.stuck = match self.machine.run_to(entry.position) {
            RunOutcome::Reached => None,
            RunOutcome::Waiting => Some(format!("it is halted at {} and waits for an input", self.machine.position())),
            RunOutcome::Stopped(why) => Some(format!("it stopped at {}: {why}", self.machine.position())),
            RunOutcome::HostFailure(why) => return Err(VoteError::Host(why)),
        };
        self.collect();
        if self.stuck.is_some() {
            return Ok(());
        }
        match entry.event {
            Event::Input(input) => {
                self.stuck = self.machine.input(input).err().map(|why| format!("it refuses an input: {why}"));
            }
            Event::Output(note) => self.comparer.noted(entry.position, note),
            Event::Digest(theirs) if self.machine.digest() == theirs => self.digests.0 += 1,
            Event::Digest(_) => self.digests.1 += 1,
            Event::Progress | Event::End { .. } => {}
        }
        self.collect();
        while let Some((id, output)) = self.comparer.matched() {
            self.outputs_agreed += 1;
            if id == self.dispute.output {
                self.seen = Some(output);
            }
        }
        Ok(())
    }

    fn collect(&mut self) {
        self.machine.take_outputs().into_iter().for_each(|(position, output)| self.comparer.made(position, output));
    }

    fn opinion(self, last: u64) -> Result<Opinion, VoteError> {
        let Self { machine, dispute, comparer, seen, outputs_agreed, digests, stuck } = self;
        let first = comparer.first();
        // The note of what was made last may not be in the log.
        let not_noted_yet = |first: &Mismatch| first.noted.is_none() && first.made.as_ref().is_some_and(|(at, _)| *at == last);
        let as_standby = match (&first, dispute.stuck) {
            (_, true) => stuck.is_some(),
            (Some(first), false) => stuck.is_none() && is_same(dispute, first),
            (None, false) => false,
        };
        let as_primary = stuck.is_none() && first.as_ref().is_none_or(not_noted_yet);
        let verdict = match (as_standby, as_primary, &dispute.noted) {
            (true, ..) => Verdict::Standby,
            (_, true, Some(noted)) if seen.is_none() => return Err(VoteError::Short(last, noted.position)),
            (_, true, _) => Verdict::Primary,
            _ => Verdict::Neither,
        };
        let made = match (verdict, &dispute.noted) {
            (Verdict::Primary, Some(noted)) => seen.map(|output| (noted.position, output)),
            (Verdict::Primary, None) => None,
            _ => first.and_then(|first| first.made),
        };
        Ok(Opinion { verdict, position: machine.position(), made, outputs_agreed, digests, stuck })
    }
}

/// Whether a machine differs from the primary in the same way as the standby.
fn is_same(dispute: &Dispute, found: &Mismatch) -> bool {
    let noted = match (&dispute.noted, found.noted) {
        (Some(theirs), Some((position, note))) => theirs.is(position, note),
        (theirs, ours) => theirs.is_none() && ours.is_none(),
    };
    let made = match (&dispute.made, &found.made) {
        (Some(theirs), Some((position, output))) => theirs.is(*position, OutputNote::of(output)),
        (theirs, ours) => theirs.is_none() && ours.is_none(),
    };
    noted && made
}
