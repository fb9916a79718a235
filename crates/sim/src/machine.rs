//! The toy machine: a deterministic state machine with positions, inputs, outputs, and a client's writes.
//!
//! In: inputs at the current position, steps. Out: at most one output a step. Invariant: state and outputs follow from the
//! inputs and their positions alone. Its state is a hash chain, so any input that one side has and the other has not shows in
//! every later output.

use std::collections::{BTreeSet, VecDeque};

use crate::random::mix;

/// What the machine does to the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) id: u64,
    pub(crate) position: u64,
    /// Of all outputs before this one.
    pub(crate) chain_before: u64,
    /// Of the machine's state.
    pub(crate) digest: u64,
    /// The client's write that this acknowledges.
    pub(crate) acknowledges: Option<u64>,
}

impl Output {
    /// The chain of outputs up to and including this one.
    pub(crate) fn chain_after(&self) -> u64 {
        let mut chain = mix(self.chain_before ^ self.id);
        for part in [self.position, self.digest, self.acknowledges.map_or(0, |write| write + 1)] {
            chain = mix(chain.rotate_left(7) ^ part);
        }
        chain
    }
}

/// An input; any other number than a write's is noise such as a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    Write(u64),
    Noise(u64),
}

impl Input {
    pub(crate) fn to_bytes(self, padding: usize) -> Vec<u8> {
        let (tag, number) = match self {
            Input::Write(number) => (0, number),
            Input::Noise(number) => (1, number),
        };
        let mut bytes = vec![tag];
        bytes.extend(number.to_le_bytes());
        bytes.resize(bytes.len() + padding, 0xa5);
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Input {
        let number = u64::from_le_bytes(bytes[1..9].try_into().expect("eight bytes"));
        if bytes[0] == 0 { Input::Write(number) } else { Input::Noise(number) }
    }
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) position: u64,
    digest: u64,
    /// How many outputs it has made.
    pub(crate) outputs: u64,
    /// Of all of them.
    pub(crate) chain: u64,
    /// The client's writes it knows.
    pub(crate) writes: BTreeSet<u64>,
    /// Acknowledgements to make, with their positions.
    replies: VecDeque<(u64, u64)>,
}

impl Machine {
    /// Power-on.
    pub(crate) fn new() -> Machine {
        Machine { position: 0, digest: 1, outputs: 0, chain: 0, writes: BTreeSet::new(), replies: VecDeque::new() }
    }

    /// A bit of the state flips.
    pub(crate) fn flip(&mut self) {
        self.digest ^= 1 << 20;
    }

    /// Whether it pauses here: a slice ends, for a reason that lies in the state alone.
    pub(crate) fn pauses(&self) -> bool {
        self.digest.is_multiple_of(97)
    }

    /// One instruction.
    pub(crate) fn step(&mut self) -> Option<Output> {
        self.position += 1;
        self.digest = mix(self.digest.wrapping_add(self.position));
        let acknowledges = match self.replies.front() {
            Some((due, write)) if *due <= self.position => Some(*write),
            _ if self.digest.is_multiple_of(61) => None,
            _ => return None,
        };
        if acknowledges.is_some() {
            self.replies.pop_front();
        }
        let output =
            Output { id: self.outputs + 1, position: self.position, chain_before: self.chain, digest: self.digest, acknowledges };
        self.outputs += 1;
        self.chain = output.chain_after();
        Some(output)
    }

    /// An input at the current position.
    pub(crate) fn input(&mut self, input: Input) {
        let (Input::Write(number) | Input::Noise(number)) = input;
        self.digest = mix(self.digest ^ mix(number));
        if let Input::Write(write) = input {
            // A write the client sends again is acknowledged again.
            self.writes.insert(write);
            let delay = 1 + self.digest % 40;
            self.replies.push_back((self.position + delay, write));
        }
    }

    /// The whole state, with so many bytes of padding behind it.
    pub(crate) fn to_image(&self, padding: usize) -> Vec<u8> {
        let mut words = vec![self.position, self.digest, self.outputs, self.chain];
        words.push(self.writes.len() as u64);
        words.extend(&self.writes);
        words.push(self.replies.len() as u64);
        words.extend(self.replies.iter().flat_map(|(due, write)| [*due, *write]));
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize(bytes.len() + padding, 0x5a);
        bytes
    }

    /// The machine and outputs of it, as a resync carries them.
    pub(crate) fn to_resync(&self, outputs: &[Output], padding: usize) -> Vec<u8> {
        let mut words = vec![outputs.len() as u64];
        for o in outputs {
            words.extend([o.id, o.position, o.chain_before, o.digest, o.acknowledges.map_or(0, |write| write + 1)]);
        }
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(self.to_image(padding));
        bytes
    }

    /// The reverse.
    pub(crate) fn from_resync(bytes: &[u8]) -> (Machine, Vec<Output>) {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
        let count = word(0) as usize;
        let outputs = (0..count).map(|i| 1 + i * 5).map(|at| Output {
            id: word(at),
            position: word(at + 1),
            chain_before: word(at + 2),
            digest: word(at + 3),
            acknowledges: word(at + 4).checked_sub(1),
        });
        (Machine::from_image(&bytes[(1 + count * 5) * 8..]), outputs.collect())
    }

    /// The machine of an image.
    pub(crate) fn from_image(bytes: &[u8]) -> Machine {
        let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let mut next = || words.next().expect("an image is complete");
        let (position, digest, outputs, chain) = (next(), next(), next(), next());
        let count = next();
        let writes = (0..count).map(|_| next()).collect();
        let count = next();
        let replies = (0..count).map(|_| (next(), next())).collect();
        Machine { position, digest, outputs, chain, writes, replies }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_the_machine() {
        let mut machine = Machine::new();
        for number in 0..200 {
            machine.step();
            if number % 9 == 0 {
                machine.input(Input::Write(number));
            }
        }
        let mut copy = Machine::from_image(&machine.to_image(13));
        assert_eq!(copy, machine);
        for _ in 0..500 {
            assert_eq!(copy.step(), machine.step());
        }
    }

    #[test]
    fn a_missed_input_shows_in_every_later_output() {
        let (mut one, mut other) = (Machine::new(), Machine::new());
        one.input(Input::Noise(7));
        other.input(Input::Noise(8));
        let outputs = |machine: &mut Machine| (0..5_000).filter_map(|_| machine.step()).collect::<Vec<_>>();
        let (ones, others) = (outputs(&mut one), outputs(&mut other));
        assert!(!ones.is_empty() && ones.iter().zip(&others).all(|(a, b)| a != b));
    }
}
