//! Which epoch of which VM is the newest that a switch has seen: what decides whether a port may still speak for its VM.
//!
//! *In*: tokens, a file. *Out*: whether a token is stale, and the file's next content. *Invariant*: the epoch of a VM never goes down; of one epoch the first owner that came is the owner;
//! the number of VMs remembered has a limit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::net::Token;

/// VMs remembered at most. Beyond it those are forgotten first whose epoch was raised longest ago.
pub const MAX_VMS: usize = 4096;
/// The first line of the file.
const HEAD: &str = "twinstep-fences 1";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Newest {
    epoch: u64,
    owner: [u8; 16],
    /// Order of the last change.
    age: u64,
}

/// The newest epochs, by VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fences {
    vms: BTreeMap<[u8; 16], Newest>,
    changes: u64,
}

impl Fences {
    /// Takes a token in. The epoch that makes it a stale one, if it is.
    pub fn enter(&mut self, token: &Token) -> Option<u64> {
        if let Some(epoch) = self.over(token) {
            return Some(epoch);
        }
        if self.vms.get(&token.vm).is_some_and(|newest| newest.epoch >= token.epoch) {
            return None;
        }
        self.changes += 1;
        self.vms.insert(token.vm, Newest { epoch: token.epoch, owner: token.owner, age: self.changes });
        if self.vms.len() > MAX_VMS {
            let oldest = self.vms.iter().min_by_key(|(_, newest)| newest.age).map(|(vm, _)| *vm);
            self.vms.remove(&oldest.expect("there are many"));
        }
        None
    }

    /// The epoch that makes a token a stale one, if it is. An owner is not stale on account of an epoch that it has won itself.
    #[must_use]
    pub fn over(&self, token: &Token) -> Option<u64> {
        let newest = self.vms.get(&token.vm)?;
        (newest.epoch >= token.epoch && newest.owner != token.owner).then_some(newest.epoch)
    }

    /// As the file has it.
    fn text(&self) -> String {
        let mut newest: Vec<_> = self.vms.iter().collect();
        newest.sort_by_key(|(_, newest)| newest.age);
        let line = |(vm, n): &(&[u8; 16], &Newest)| {
            format!("{} {} {}\n", twinstep_pair::VmId(**vm), n.epoch, twinstep_pair::OwnerId(n.owner))
        };
        format!("{HEAD}\n{}", newest.iter().map(line).collect::<String>())
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next()? != HEAD {
            return None;
        }
        let mut fences = Self::default();
        for line in lines {
            let mut words = line.split(' ');
            let token = Token { vm: id(words.next()?)?, epoch: words.next()?.parse().ok()?, owner: id(words.next()?)? };
            if words.next().is_some() || fences.enter(&token).is_some() {
                return None;
            }
        }
        Some(fences)
    }
}

fn id(text: &str) -> Option<[u8; 16]> {
    let good = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    good.then(|| u128::from_str_radix(text, 16).ok()).flatten().map(u128::to_be_bytes)
}

/// Where fences outlive the switch's process: beside its socket, so they are gone when the host has been booted, and with it all who could be stale.
#[derive(Debug)]
pub struct FencesFile(PathBuf);

impl FencesFile {
    /// The file of the switch that listens there.
    #[must_use]
    pub fn beside(socket: &Path) -> Self {
        let mut name = socket.as_os_str().to_owned();
        name.push(".fences");
        Self(name.into())
    }

    /// What is in it; nothing if it is not there.
    ///
    /// # Errors
    /// If it cannot be read, or is not understood.
    pub fn load(&self) -> Result<Fences> {
        let text = match std::fs::read_to_string(&self.0) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Fences::default()),
            Err(e) => return Err(e).at("read", &self.0),
        };
        Fences::parse(&text).ok_or_else(|| {
            Error::new(format!("{} does not say which epochs the switch has seen", self.0.display()))
                .because("it is damaged, or of another build")
                .next("remove it, once no VM runs here that was taken over elsewhere and does not know it yet")
        })
    }

    /// Replaces its content, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn store(&self, fences: &Fences) -> Result<()> {
        let mut draft = self.0.clone().into_os_string();
        draft.push(".draft");
        let draft = PathBuf::from(draft);
        std::fs::write(&draft, fences.text()).and_then(|()| std::fs::rename(&draft, &self.0)).at("write", &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn token(vm: u8, epoch: u64, owner: u8) -> Token {
        Token { vm: [vm; 16], epoch, owner: [owner; 16] }
    }

    #[test]
    fn an_epoch_goes_up_only() {
        let mut fences = Fences::default();
        assert_eq!(fences.enter(&token(1, 1, 1)), None);
        assert_eq!(fences.enter(&token(1, 1, 1)), None, "another card of the same VM");
        assert_eq!(fences.enter(&token(1, 1, 2)), Some(1), "an epoch has one owner");
        assert_eq!(fences.enter(&token(1, 3, 2)), None);
        assert_eq!(fences.enter(&token(1, 1, 1)), Some(3));
        assert_eq!(fences.enter(&token(1, 2, 1)), Some(3));
        assert_eq!(fences.over(&token(1, 1, 2)), None, "it has won the later one itself");
        assert_eq!(fences.enter(&token(2, 1, 1)), None, "another VM");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_newest_stays() {
        let mut fences = Fences::default();
        for n in 0..=MAX_VMS as u64 {
            let vm = u128::from(n).to_be_bytes();
            assert_eq!(fences.enter(&Token { vm, epoch: 2, owner: [1; 16] }), None);
        }
        let over = |n: u128| fences.over(&Token { vm: n.to_be_bytes(), epoch: 1, owner: [2; 16] });
        assert_eq!((over(0), over(1), over(MAX_VMS as u128)), (None, Some(2), Some(2)));
    }

    #[test]
    fn they_outlive_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let file = FencesFile::beside(&dir.path().join("switch"));
        assert_eq!(file.load().unwrap(), Fences::default());
        let mut fences = Fences::default();
        for token in [token(9, 4, 1), token(3, 2, 0xab)] {
            fences.enter(&token);
        }
        file.store(&fences).unwrap();
        assert_eq!(file.load().unwrap(), fences);
        for wrong in ["", "twinstep-fences 2\n", "twinstep-fences 1\nabc 1 def\n", &format!("{}extra line\n", fences.text())] {
            std::fs::write(&file.0, wrong).unwrap();
            assert!(file.load().unwrap_err().to_string().contains("switch.fences"), "{wrong}");
        }
    }
}
