//! Compares the outputs of two machines that need not be in step.
//!
//! **In:** the notes of one machine's outputs, in the order of its log; the outputs of the other, as it makes them. **Out:** those that both have made, in the
//! order of the notes; or that they differ. **Invariant:** an output comes out once, and only if its note has come and says the same; whatever
//! comes out is preceded by everything noted before it.
//!
//! Two machines may do the same thing at different moments, and two things in another order, without anybody seeing a difference: a network orders
//! nothing. So a frame matches any outstanding note of the same frame at the same card. Bytes on a console are a stream: there, order counts.
//! What is noted and not made, or made and not noted, counts as different when the machine is far beyond ([`SLACK`]), or at once if the other has done something
//! else at the very same position, which is what a machine does whose memory went bad.
use crate::entry::{OutputNote, OutputPort};
use std::collections::{BTreeMap, VecDeque};
use twinstep_machine::door::Output;

/// So many instructions later a machine may do what the other did.
pub const SLACK: u64 = 2_000_000;

/// A note that waits for its output.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Noted {
    id: u64,
    position: u64,
    note: OutputNote,
}

/// In what two machines differ first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Number of the first output that was not made by both.
    pub output: u64,
    /// What was noted, and where; `None`: nothing.
    pub noted: Option<(u64, OutputNote)>,
    /// What was made instead, and where; `None`: nothing.
    pub made: Option<(u64, Output)>,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "output {}: ", self.output)?;
        match &self.noted {
            Some((position, note)) => write!(f, "noted: {note} at position {position}; ")?,
            None => f.write_str("noted: none; ")?,
        }
        match &self.made {
            Some((position, output)) => write!(f, "made: {} at position {position}", OutputNote::of(output)),
            None => f.write_str("made: none"),
        }
    }
}

/// Outputs of two machines on their way to each other.
#[derive(Debug)]
pub struct Comparer {
    /// The number of the note that comes next, and of the output that comes out next.
    next_note: u64,
    next_out: u64,
    noted: VecDeque<Noted>,
    made: VecDeque<(u64, Output)>,
    /// Made by both, behind one that is not.
    ready: BTreeMap<u64, Output>,
}

fn is_stream(port: OutputPort) -> bool {
    matches!(port, OutputPort::Serial | OutputPort::Console)
}

impl Comparer {
    /// For machines that have made outputs up to `last`.
    pub fn new(last: u64) -> Self {
        Self { next_note: last + 1, next_out: last + 1, noted: VecDeque::new(), made: VecDeque::new(), ready: BTreeMap::new() }
    }
    /// The one machine made an output at `position`.
    pub fn noted(&mut self, position: u64, note: OutputNote) {
        self.noted.push_back(Noted { id: self.next_note, position, note });
        self.next_note += 1;
        self.pair_up();
    }
    /// The other machine made one.
    pub fn made(&mut self, position: u64, output: Output) {
        self.made.push_back((position, output));
        self.pair_up();
    }
    /// The next output that both have made, with its number.
    pub fn matched(&mut self) -> Option<(u64, Output)> {
        let output = self.ready.remove(&self.next_out)?;
        self.next_out += 1;
        Some((self.next_out - 1, output))
    }
    /// Whether everything noted was made and everything made was noted.
    pub fn is_even(&self) -> bool {
        self.noted.is_empty() && self.made.is_empty()
    }
    /// The two differ, with a machine that stands at `position`, as far as that can be known.
    pub fn mismatch(&self, position: u64) -> Option<Mismatch> {
        let late = |at: u64| at.saturating_add(SLACK) < position;
        let other = |noted: &Noted| {
            let same_place = |(at, output): &&(u64, Output)| *at == noted.position && same_port(output, noted.note.port);
            self.made.iter().find(same_place)
        };
        let differs = self.noted.iter().any(|noted| late(noted.position) || other(noted).is_some() || self.is_overtaken(noted));
        (differs || self.made.iter().any(|(at, _)| late(*at))).then(|| self.first()).flatten()
    }
    /// The first thing in which they are not even, for whoever has waited long enough.
    pub fn first(&self) -> Option<Mismatch> {
        let noted = self.noted.front();
        let made = match noted {
            Some(noted) => self.made.iter().find(|(_, output)| same_port(output, noted.note.port)).or(self.made.front()),
            None => self.made.front(),
        };
        (noted.is_some() || made.is_some()).then(|| Mismatch {
            output: noted.map_or(self.next_note, |noted| noted.id),
            noted: noted.map(|noted| (noted.position, noted.note)),
            made: made.cloned(),
        })
    }
    /// What was made and matched by nobody, in order; the comparison is over.
    pub fn into_made(self) -> Vec<Output> {
        let ready = self.ready.into_values();
        ready.chain(self.made.into_iter().map(|(_, output)| output)).collect()
    }

    /// Whether the other machine has written something else to the stream that this was noted for.
    fn is_overtaken(&self, noted: &Noted) -> bool {
        is_stream(noted.note.port) && self.made.iter().any(|(_, output)| same_port(output, noted.note.port))
    }

    fn pair_up(&mut self) {
        let mut i = 0;
        while i < self.made.len() {
            let note = OutputNote::of(&self.made[i].1);
            let found = if is_stream(note.port) {
                let first = self.noted.iter().position(|noted| noted.note.port == note.port);
                first.filter(|&at| self.noted[at].note == note)
            } else {
                self.noted.iter().position(|noted| noted.note == note)
            };
            match found {
                Some(at) => {
                    let (_, output) = self.made.remove(i).expect("just seen");
                    let noted = self.noted.remove(at).expect("just found");
                    self.ready.insert(noted.id, output);
                }
                None => i += 1,
            }
        }
    }
}

fn same_port(output: &Output, port: OutputPort) -> bool {
    match output {
        Output::NetTx { nic, .. } | Output::NetTxGso { nic, .. } => nic_of(port) == Some(*nic),
        Output::Serial(_) => port == OutputPort::Serial,
        Output::Console(_) => port == OutputPort::Console,
        Output::DiskWrite { disk, .. } => port == OutputPort::Disk(*disk),
        Output::DiskFlush { disk, .. } => port == OutputPort::DiskFlush(*disk),
    }
}

fn nic_of(port: OutputPort) -> Option<u8> {
    match port {
        OutputPort::Nic(nic) | OutputPort::NicGso { nic, .. } => Some(nic),
        OutputPort::Serial | OutputPort::Console | OutputPort::Disk(_) | OutputPort::DiskFlush(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(nic: u8, text: &str) -> Output {
        Output::NetTx { nic, frame: text.as_bytes().to_vec() }
    }
    fn serial(text: &str) -> Output {
        Output::Serial(text.as_bytes().to_vec())
    }
    fn all(comparer: &mut Comparer) -> Vec<(u64, Output)> {
        std::iter::from_fn(|| comparer.matched()).collect()
    }

    #[test]
    fn what_both_make_comes_out_in_the_order_of_the_notes() {
        let mut comparer = Comparer::new(10);
        for (position, output) in [(5, frame(0, "a")), (6, serial("x")), (7, frame(0, "b"))] {
            comparer.noted(position, OutputNote::of(&output));
        }
        // Frames in another order, at other positions; nothing is ready before the first.
        comparer.made(4, frame(0, "b"));
        comparer.made(9, serial("x"));
        assert!(all(&mut comparer).is_empty() && !comparer.is_even());
        assert_eq!(comparer.mismatch(10), None);
        comparer.made(9, frame(0, "a"));
        assert_eq!(all(&mut comparer), [(11, frame(0, "a")), (12, serial("x")), (13, frame(0, "b"))]);
        assert!(comparer.is_even());
        // The output may come before its note.
        comparer.made(20, serial("y"));
        assert_eq!(comparer.mismatch(20), None);
        comparer.noted(21, OutputNote::of(&serial("y")));
        assert_eq!(all(&mut comparer), [(14, serial("y"))]);
        assert_eq!((comparer.mismatch(u64::MAX), comparer.first()), (None, None));
    }

    #[test]
    fn something_else_at_the_same_position_differs_at_once() {
        let mut comparer = Comparer::new(0);
        comparer.noted(5, OutputNote::of(&frame(1, "good")));
        comparer.made(5, frame(0, "good"));
        assert_eq!(comparer.mismatch(5), None, "another card");
        comparer.made(5, frame(1, "bad"));
        let found = comparer.mismatch(5).unwrap();
        assert_eq!((found.output, &found.made), (1, &Some((5, frame(1, "bad")))));
        assert!(found.to_string().contains("network card 1"), "{found}");
        assert_eq!(comparer.into_made(), [frame(0, "good"), frame(1, "bad")]);
    }

    #[test]
    fn a_stream_has_an_order() {
        let mut comparer = Comparer::new(0);
        comparer.noted(5, OutputNote::of(&serial("ab")));
        comparer.made(8, serial("a"));
        assert_eq!(comparer.mismatch(8).unwrap().output, 1);
        let mut comparer = Comparer::new(0);
        comparer.noted(5, OutputNote::of(&serial("a")));
        comparer.noted(6, OutputNote::of(&serial("b")));
        comparer.made(5, serial("b"));
        assert!(all(&mut comparer).is_empty() && comparer.mismatch(6).is_some());
    }

    #[test]
    fn what_is_missing_or_too_many_is_known_after_a_while() {
        let mut comparer = Comparer::new(0);
        comparer.noted(5, OutputNote::of(&frame(0, "a")));
        assert_eq!(comparer.mismatch(5 + SLACK), None);
        let found = comparer.mismatch(6 + SLACK).unwrap();
        assert_eq!((found.output, found.made), (1, None));
        let mut comparer = Comparer::new(0);
        comparer.made(5, frame(0, "a"));
        assert_eq!(comparer.mismatch(5 + SLACK), None);
        let found = comparer.mismatch(6 + SLACK).unwrap();
        assert_eq!((found.output, found.noted), (1, None));
        assert_eq!(comparer.first(), comparer.mismatch(u64::MAX));
    }
}
