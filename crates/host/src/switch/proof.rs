//! The arbiter, as a switch asks it: whether a token is what it says.
//!
//! *In*: tokens. *Out*: proofs, each once, later. *Invariant*: the switch never waits for an arbiter; an arbiter that does not answer proves nothing, neither
//! that a token is good nor that it is stale.

use std::sync::mpsc::{Receiver, Sender, channel};

use twinstep_pair::{Epoch, OwnerId, VmId};

use super::fabric::PortId;
use crate::arbiter::Arbiter;
use crate::error::{Context, Result};
use crate::net::Token;
use crate::wake::Wake;

/// What the arbiter says of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// The epoch is its owner's, and nobody has won a later one.
    Good,
    /// It is not: this epoch is somebody else's.
    Stale {
        /// The epoch.
        by: u64,
    },
    /// That cannot be known now.
    Unknown(String),
}

/// What `arbiter` says of a token. An epoch beyond the first was claimed; the first one belongs to who powered the VM on, and nobody has claimed it.
#[must_use]
pub fn prove(arbiter: &dyn Arbiter, token: &Token) -> Proof {
    let vm = VmId(token.vm).to_string();
    let owner = OwnerId(token.owner).to_string();
    let look = |epoch: u64, none_is_good: bool| match arbiter.owner(&vm, epoch) {
        Ok(Some(found)) if found == owner => Proof::Good,
        Ok(Some(_)) => Proof::Stale { by: epoch },
        Ok(None) if none_is_good => Proof::Good,
        // A person may have decided while the arbiter was away.
        Ok(None) => Proof::Unknown(format!("the arbiter has no entry for epoch {epoch} of VM {vm}")),
        Err(why) => Proof::Unknown(why),
    };
    match look(token.epoch, token.epoch <= Epoch::FIRST.0) {
        Proof::Stale { by } => Proof::Stale { by },
        proof => match look(token.epoch.saturating_add(1), true) {
            Proof::Stale { by } => Proof::Stale { by },
            Proof::Unknown(why) => Proof::Unknown(why),
            Proof::Good => proof,
        },
    }
}

/// A thread that asks.
#[derive(Debug)]
pub struct Prover {
    questions: Sender<(PortId, Token)>,
    answers: Receiver<(PortId, Token, Proof)>,
}

impl Prover {
    /// Starts it. `wake` is called for each answer.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start(arbiter: Box<dyn Arbiter>, wake: Wake) -> Result<Self> {
        let (questions, inbox) = channel::<(PortId, Token)>();
        let (to, answers) = channel();
        let ask = move || {
            while let Ok((port, token)) = inbox.recv() {
                if to.send((port, token, prove(&*arbiter, &token))).is_err() {
                    return;
                }
                wake.wake();
            }
        };
        std::thread::Builder::new().name("arbiter".into()).spawn(ask).what("cannot start a thread")?;
        Ok(Self { questions, answers })
    }

    /// Asks; false if nobody is there any more to answer. At most one question of a port is under way, and ports are bounded.
    #[must_use]
    pub fn ask(&self, port: PortId, token: Token) -> bool {
        self.questions.send((port, token)).is_ok()
    }

    /// An answer, if there is one.
    #[must_use]
    pub fn answer(&self) -> Option<(PortId, Token, Proof)> {
        self.answers.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::{DirectoryArbiter, Verdict};

    #[test]
    fn the_arbiter_knows_whose_an_epoch_is() {
        let dir = tempfile::tempdir().unwrap();
        let arbiter = DirectoryArbiter::open(dir.path()).unwrap();
        let token = |epoch, owner| Token { vm: [7; 16], epoch, owner: [owner; 16] };
        let (vm, right) = (VmId([7; 16]).to_string(), OwnerId([2; 16]).to_string());
        assert_eq!(prove(&arbiter, &token(1, 1)), Proof::Good);
        assert!(matches!(prove(&arbiter, &token(2, 2)), Proof::Unknown(why) if why.contains("no entry for epoch 2")));
        assert_eq!(arbiter.claim(&vm, 2, &right), Verdict::Won);
        assert_eq!(prove(&arbiter, &token(2, 2)), Proof::Good);
        assert_eq!(prove(&arbiter, &token(2, 1)), Proof::Stale { by: 2 });
        assert_eq!(prove(&arbiter, &token(1, 1)), Proof::Stale { by: 2 });
        assert_eq!(prove(&arbiter, &token(1, 2)), Proof::Good, "it has won the next one itself");
        std::fs::write(arbiter.path(&vm, 3), "").unwrap();
        assert!(matches!(prove(&arbiter, &token(2, 2)), Proof::Unknown(why) if why.contains("is empty")));
    }
}
