//! The control socket: how other processes of the same user ask a running VM.
//!
//! *In*: lines of JSON on a Unix socket ([`wire`], `docs/protocol-control.md`). *Out*: one line for each, with what the machine's own thread
//! answered. *Invariant*: a client costs the machine one short message a request: it never waits for one, and questions on their way
//! are bounded. Nobody but the VM's user (and root) gets in ([`folder`]).
//!
//! | module | what |
//! | --- | --- |
//! | [`folder`] | where the sockets are, whose they are, which VMs run |
//! | [`wire`] | requests and responses as lines |
//! | [`server`] | the VM's end |
//! | [`client`] | the other end |
//!
//! A new request gets its place in [`wire::Request`]; if the machine's thread has to answer it, also in [`Question`] and [`Answer`].
pub mod client;
pub mod folder;
pub mod server;
pub mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use twinstep_machine::faults::Bit;
use twinstep_machine::{ActivityCell, Machine, MachineStats};

use crate::events::now_ns;
use crate::vm::pace::cpu_ns;

pub use server::{Control, Inquiry};

/// Questions that may be on their way to a machine's thread at a time.
const MAX_OPEN: usize = 16;

/// What only the machine's thread knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// What did it do so far?
    Stat,
    /// Flip this bit.
    Flip(Bit),
    /// Have the standby go live.
    FailOver,
}

/// What the machine's thread says.
#[derive(Debug)]
pub enum Answer {
    /// To [`Question::Stat`].
    Stat(Box<VmFigures>),
    /// To [`Question::FailOver`]: the protocol was told; `false`: there is no pair.
    FailingOver(bool),
    /// To [`Question::Flip`]: at which position; `None`: there is no such bit.
    Flipped(Option<u64>),
    /// There is no machine yet, or no more; why.
    NoMachine(String),
}

/// What a machine did so far.
#[derive(Debug, Clone)]
pub struct VmFigures {
    /// The host's monotonic clock.
    pub at_ns: u64,
    /// Instructions retired since power-on.
    pub position: u64,
    /// Guest time.
    pub guest_ns: u64,
    /// Processor time that the machine's thread has used.
    pub cpu_ns: u64,
    /// Counters.
    pub stats: MachineStats,
    /// Where to see what it is doing.
    pub activity: Arc<ActivityCell>,
}

impl VmFigures {
    /// Those of a machine. To be called by the thread that runs it.
    pub fn of(machine: &Machine) -> Self {
        Self {
            at_ns: now_ns(),
            position: machine.position(),
            guest_ns: machine.guest_ns(),
            cpu_ns: cpu_ns(),
            stats: machine.stats(),
            activity: machine.activity().clone(),
        }
    }
}

/// A question on its way, with the way back.
#[derive(Debug)]
pub struct Ask {
    question: Question,
    back: SyncSender<Answer>,
    _open: Open,
}

/// One of the questions on their way.
#[derive(Debug)]
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Ask {
    /// A question, and where its answer will arrive. `None` if too many are on their way.
    fn new(question: Question, open: &Arc<AtomicUsize>) -> Option<(Self, Receiver<Answer>)> {
        if open.fetch_add(1, Ordering::Relaxed) >= MAX_OPEN {
            open.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let (back, answer) = sync_channel(1);
        Some((Self { question, back, _open: Open(open.clone()) }, answer))
    }
    /// Answers it from a machine. Never blocks.
    pub fn answer(self, machine: &mut Machine) {
        let answer = match self.question {
            Question::Stat => Answer::Stat(Box::new(VmFigures::of(machine))),
            // Whoever drives a primary's machine takes this one itself.
            Question::FailOver => Answer::FailingOver(false),
            Question::Flip(bit) => Answer::Flipped(machine.flip(bit).then(|| machine.position())),
        };
        // Whoever asked may have lost patience.
        let _ = self.back.try_send(answer);
    }
    /// Whether it is for the protocol, and not for the machine.
    pub fn is_failover(&self) -> bool {
        self.question == Question::FailOver
    }
    /// Answers that the protocol was told. Never blocks.
    pub fn failing_over(self) {
        let _ = self.back.try_send(Answer::FailingOver(true));
    }
    /// Answers that there is no machine. Never blocks.
    pub fn no_machine(self, why: &str) {
        let _ = self.back.try_send(Answer::NoMachine(why.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_on_their_way_are_bounded() {
        let open = Arc::new(AtomicUsize::new(0));
        let mut asked: Vec<_> = (0..MAX_OPEN).map(|_| Ask::new(Question::Stat, &open).expect("there is room")).collect();
        assert!(Ask::new(Question::Stat, &open).is_none());
        let (ask, answer) = asked.pop().unwrap();
        ask.no_machine("it is gone");
        assert!(matches!(answer.recv(), Ok(Answer::NoMachine(why)) if why == "it is gone"));
        // One that is dropped unanswered makes room as well, and whoever waits for it sees so.
        let (ask, answer) = asked.pop().unwrap();
        drop(ask);
        assert!(answer.recv().is_err());
        assert_eq!(open.load(Ordering::Relaxed), MAX_OPEN - 2);
    }
}
