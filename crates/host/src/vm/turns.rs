//! A driver that has a thread of its own, and that others may drive in its place.
//!
//! *In*: messages, from any thread. *Out*: the driver's turns, one at a time. *Invariant*: whatever is posted is taken in its order, and soon: by who posted it, or by the
//! driver's own thread. Nobody waits for anybody.
//!
//! A message that another thread has to be woken for costs a switch of threads, which on a busy host is most of what an output waits for. So the threads that
//! own a machine take a turn themselves when they have something to say; the driver's own thread waits for the socket and for time.
//!
//! ```text
//!   machine ──put, turn──▶ ┌───────┐
//!   copy, arbiter ──send─▶ │ inbox │──▶ driver ──▶ socket, cables
//!   own thread ◀─ wake ─── └───────┘      ▲
//!       └────── poll: socket, wake, time ─┘
//! ```
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::line::Interest;
use crate::error::{Context, Error, Result};
use crate::wake::Wake;

/// Where messages to a driver are posted.
#[derive(Debug)]
pub struct Post<M> {
    sender: Sender<M>,
    wake: Wake,
}

impl<M> Clone for Post<M> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), wake: self.wake.clone() }
    }
}

impl<M> Post<M> {
    /// One, and where its messages come out.
    ///
    /// # Errors
    /// If the system has no eventfd.
    pub fn new() -> Result<(Self, Receiver<M>)> {
        let (sender, inbox) = channel();
        Ok((Self { sender, wake: Wake::new()? }, inbox))
    }
    /// Posts a message, and wakes the driver's thread.
    ///
    /// # Errors
    /// If nobody will ever take it.
    pub fn send(&self, message: M) -> std::result::Result<(), SendError<M>> {
        self.sender.send(message)?;
        self.wake.wake();
        Ok(())
    }
    /// Wakes the driver's thread.
    pub(super) fn wake(&self) {
        self.wake.wake();
    }
}

/// What drives something.
pub(super) trait Turn: Send {
    /// Takes all messages there are, and does what follows.
    fn turn(&mut self);
    /// Whether its own thread has something to do that no other can.
    fn wants_owner(&self) -> bool;
}

/// A driver, for those who may take its turn.
pub struct Turns<M> {
    post: Post<M>,
    driver: Arc<Mutex<dyn Turn>>,
}

impl<M> Clone for Turns<M> {
    fn clone(&self) -> Self {
        Self { post: self.post.clone(), driver: self.driver.clone() }
    }
}

impl<M> Turns<M> {
    pub(super) fn new(post: Post<M>, driver: Arc<Mutex<dyn Turn>>) -> Self {
        Self { post, driver }
    }
    /// For messages that wake the driver's thread.
    pub fn post(&self) -> &Post<M> {
        &self.post
    }
    /// Posts a message that is taken in the next turn, whosever that is.
    pub(super) fn put(&self, message: M) {
        // The driver outlives us, and with it the inbox.
        let _ = self.post.sender.send(message);
    }
    /// Takes the driver's turn. If somebody else has it, the driver's thread will look again.
    ///
    /// # Errors
    /// If the driver has died.
    pub(super) fn turn(&self) -> Result<()> {
        match self.driver.try_lock() {
            Ok(mut driver) => {
                driver.turn();
                if driver.wants_owner() {
                    self.post.wake();
                }
                Ok(())
            }
            Err(TryLockError::WouldBlock) => {
                self.post.wake();
                Ok(())
            }
            Err(TryLockError::Poisoned(_)) => Err(Error::new("the thread that drives the pair is gone")),
        }
    }
}

/// Waits until a message is sent, something can be done with the line, or the time is over. Says whether the line may have something to read.
pub(super) fn wait<M>(post: &Post<M>, line: Option<&Interest>, patience: Duration) -> Result<bool> {
    let patience = if line.is_some_and(|line| line.at_once) { Duration::ZERO } else { patience };
    let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
    let mut fds = Vec::with_capacity(2);
    fds.push(PollFd::new(&post.wake, PollFlags::IN));
    if let Some(line) = line {
        let flags = if line.write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        fds.push(PollFd::new(&line.socket, flags));
    }
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(std::io::Error::from(e)).what("cannot wait for the other side"),
    }
    if !fds[0].revents().is_empty() {
        post.wake.clear();
    }
    let line_ready = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
    Ok(line_ready || line.is_some_and(|line| line.at_once))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sum {
        inbox: Receiver<u64>,
        taken: Vec<u64>,
    }

    impl Turn for Sum {
        fn turn(&mut self) {
            self.taken.extend(self.inbox.try_iter());
        }
        fn wants_owner(&self) -> bool {
            self.taken.contains(&7)
        }
    }

    #[test]
    fn what_is_put_is_taken_by_one_or_the_other() {
        let (post, inbox) = Post::new().unwrap();
        let driver = Arc::new(Mutex::new(Sum { inbox, taken: Vec::new() }));
        let turns = Turns::new(post.clone(), driver.clone());
        turns.put(1);
        turns.put(2);
        turns.turn().unwrap();
        assert_eq!(driver.lock().unwrap().taken, [1, 2]);
        assert!(!readable(&post), "nobody had to be woken");
        // While another one drives, it is its thread that looks again.
        let other = driver.lock().unwrap();
        turns.put(3);
        turns.turn().unwrap();
        drop(other);
        assert!(readable(&post));
        driver.lock().unwrap().turn();
        assert_eq!(driver.lock().unwrap().taken, [1, 2, 3]);
        turns.put(7);
        turns.turn().unwrap();
        assert!(readable(&post), "there is something for the owner");
        post.send(8).unwrap();
        assert!(readable(&post));
    }

    /// Whether its owner was woken; it is no more then.
    fn readable(post: &Post<u64>) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let woken = poll(&mut [PollFd::new(&post.wake, PollFlags::IN)], Some(&now)).unwrap() == 1;
        post.wake.clear();
        woken
    }
}
