//! An arbiter that is asked while its questioner goes on.
//!
//! *In*: claims. *Out*: one message for each verdict. *Invariant*: one question is under way at a time, and nobody but its own thread waits for the answer.
use std::sync::{Arc, Mutex};

use twinstep_pair::{Arbiter, Claim, Epoch, Verdict};

use super::turns::Post;

/// An arbiter that is asked on a thread of its own, one question at a time, since it may take long to answer.
pub(super) struct Asker<M: Send + 'static> {
    arbiter: Arc<Mutex<Box<dyn Arbiter + Send>>>,
    asking: Option<Claim>,
    to: Post<M>,
    answer: fn(Epoch, Verdict) -> M,
}

impl<M: Send + 'static> Asker<M> {
    pub(super) fn new(arbiter: Box<dyn Arbiter + Send>, to: Post<M>, answer: fn(Epoch, Verdict) -> M) -> Self {
        Self { arbiter: Arc::new(Mutex::new(arbiter)), asking: None, to, answer }
    }
    /// Puts a claim, unless the same one is still waiting for its answer.
    pub(super) fn ask(&mut self, claim: Claim) {
        if self.asking == Some(claim) {
            return;
        }
        self.asking = Some(claim);
        let (arbiter, to, answer) = (self.arbiter.clone(), self.to.clone(), self.answer);
        let asked = std::thread::Builder::new().name("arbiter".into()).spawn(move || {
            let verdict = arbiter.lock().unwrap_or_else(std::sync::PoisonError::into_inner).test_and_set(&claim);
            let _ = to.send(answer(claim.epoch, verdict));
        });
        if asked.is_err() {
            let _ = self.to.send((self.answer)(claim.epoch, Verdict::Unreachable));
        }
    }
    /// The answer has come.
    pub(super) fn answered(&mut self) {
        self.asking = None;
    }
}
