//! Waking a thread that waits in `poll`: an eventfd with a name.
//!
//! *In*: any thread says `wake`. *Out*: the descriptor becomes readable until `clear`. *Invariant*: waking never blocks and a wake-up before
//! the wait is not lost.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Context, Result};

/// A shared wake-up.
#[derive(Debug, Clone)]
pub struct Wake(Arc<OwnedFd>);

impl Wake {
    /// A new one, not yet woken.
    pub fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).what("cannot create an eventfd")?;
        Ok(Self(Arc::new(fd)))
    }

    /// Makes the waiting thread go on.
    pub fn wake(&self) {
        // It can only fail when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Forgets the wake-ups so far.
    pub fn clear(&self) {
        let mut count = [0; 8];
        // Nothing to read is fine: nobody has called.
        let _ = rustix::io::read(&*self.0, &mut count);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    #[test]
    fn a_wake_up_is_kept_until_cleared() {
        let wake = Wake::new().unwrap();
        let ready = |wake: &Wake| {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(wake, PollFlags::IN)], Some(&now)).unwrap() == 1
        };
        assert!(!ready(&wake));
        wake.clone().wake();
        wake.wake();
        assert!(ready(&wake));
        wake.clear();
        assert!(!ready(&wake));
    }
}
