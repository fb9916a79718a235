//! What a cable and a switch say to each other beside frames: whose cable it is, and that its time is over.
//!
//! *In*, *out*: messages and their bytes. *Invariant*: no frame can be taken for a message, so no guest can speak as its host does: the word in front of a message has its highest bit set,
//! and a frame's length, which the host writes, never has. What is not known is refused. The page for it is `docs/protocol-switch.md`.

use std::fmt;

use super::frames::HEADER;

/// Set in the word in front of a message.
pub const MESSAGE: u32 = 1 << 31;
/// The longest message, without the word in front.
pub const LONGEST: usize = 64;

const VERSION: u8 = 1;
const TOKEN: u8 = 1;
const FENCED: u8 = 2;
const TOKEN_BYTES: usize = 4 + 16 + 8 + 16;
const FENCED_BYTES: usize = 4 + 8;

/// Whose frames these are: a process that runs a VM in an epoch. Of an epoch beyond the first the arbiter knows whose it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// This life of the VM.
    pub vm: [u8; 16],
    /// Its epoch.
    pub epoch: u64,
    /// The process.
    pub owner: [u8; 16],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (vm, owner) = (twinstep_pair::VmId(self.vm), twinstep_pair::OwnerId(self.owner));
        write!(f, "VM {vm}, epoch {}, process {owner}", self.epoch)
    }
}

/// A message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// From the cable: frames from here on are this one's.
    Token(Token),
    /// From the switch: frames of this cable are refused, since the VM is live elsewhere in this epoch.
    Fenced {
        /// The epoch.
        epoch: u64,
    },
}

/// A message that this build does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of kind {kind}, version {version} and {length} bytes is none that this build knows")]
pub struct Unknown {
    kind: u8,
    version: u8,
    length: usize,
}

impl Message {
    /// As it goes over the wire, with the word in front.
    #[must_use]
    pub fn wire(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        match self {
            Self::Token(token) => {
                bytes.extend([TOKEN, VERSION, 0, 0]);
                bytes.extend(token.vm);
                bytes.extend(token.epoch.to_le_bytes());
                bytes.extend(token.owner);
            }
            Self::Fenced { epoch } => {
                bytes.extend([FENCED, VERSION, 0, 0]);
                bytes.extend(epoch.to_le_bytes());
            }
        }
        let word = MESSAGE | (bytes.len() - HEADER) as u32;
        bytes[..HEADER].copy_from_slice(&word.to_be_bytes());
        bytes
    }

    /// From its bytes, without the word in front.
    ///
    /// # Errors
    /// If it is none that this build knows.
    pub fn parse(bytes: &[u8]) -> Result<Self, Unknown> {
        let at = |index: usize| bytes.get(index).copied().unwrap_or_default();
        let unknown = Unknown { kind: at(0), version: at(1), length: bytes.len() };
        if at(1) != VERSION || at(2) != 0 || at(3) != 0 {
            return Err(unknown);
        }
        let number = |from: usize| u64::from_le_bytes(std::array::from_fn(|i| at(from + i)));
        let id = |from: usize| std::array::from_fn(|i| at(from + i));
        match (at(0), bytes.len()) {
            (TOKEN, TOKEN_BYTES) => Ok(Self::Token(Token { vm: id(4), epoch: number(20), owner: id(28) })),
            (FENCED, FENCED_BYTES) => Ok(Self::Fenced { epoch: number(4) }),
            _ => Err(unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_as_they_were_and_keep_their_bytes() {
        let token = Message::Token(Token { vm: [1; 16], epoch: 0x0203, owner: [4; 16] });
        let wire = token.wire();
        let golden = [&[0x80, 0, 0, 44, 1, 1, 0, 0][..], &[1; 16], &[3, 2, 0, 0, 0, 0, 0, 0], &[4; 16]].concat();
        assert_eq!(wire, golden);
        assert_eq!(Message::parse(&wire[HEADER..]), Ok(token));
        let fenced = Message::Fenced { epoch: 9 };
        assert_eq!(fenced.wire(), [0x80, 0, 0, 12, 2, 1, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Message::parse(&fenced.wire()[HEADER..]), Ok(fenced));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let wire = Message::Fenced { epoch: 9 }.wire();
        for (at, value) in [(0, 3), (1, 2), (2, 1), (3, 1)] {
            let mut bytes = wire[HEADER..].to_vec();
            bytes[at] = value;
            Message::parse(&bytes).unwrap_err();
        }
        for length in 0..wire.len() - HEADER {
            Message::parse(&wire[HEADER..][..length]).unwrap_err();
        }
    }
}
