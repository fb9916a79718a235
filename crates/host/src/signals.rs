//! The signals that ask a process to end, as messages.
//!
//! *In*: SIGTERM, SIGINT, SIGHUP. *Out*: a call of whoever can end what runs in good order; where nobody can, the process ends. *Invariant*: no
//! thread of ours is ever interrupted by one of them. So this is started before all other threads, which inherit the blocked signals; programs that we
//! start do not.
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Context, Result};
use crate::terminal;

/// The exit status of a process that was told to end and had nothing to end: the same as that of a machine that was stopped.
pub const STOPPED: i32 = 5;

type Listener = Box<dyn Fn(String) + Send>;

/// The signals of this process.
#[derive(Clone)]
pub struct Signals {
    listener: Arc<Mutex<Option<Listener>>>,
}

impl Signals {
    /// Takes the signals over. To be called once, before other threads are started.
    pub fn take() -> Result<Self> {
        // SAFETY: plain libc calls on a set of our own.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            set
        };
        let signals = Self { listener: Arc::default() };
        let listener = signals.listener.clone();
        let wait = move || {
            let mut signal = 0;
            // SAFETY: both point to values of this thread.
            while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
                match &*listener.lock().unwrap_or_else(PoisonError::into_inner) {
                    Some(tell) => tell(format!("signal {signal}")),
                    None => {
                        terminal::restore_now();
                        std::process::exit(STOPPED);
                    }
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait).what("cannot start a thread")?;
        Ok(signals)
    }

    /// From now on nobody is told, and a signal ends the process.
    pub fn listen_no_more(&self) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// From now on `tell` is called, with the reason to end.
    pub fn listen(&self, tell: impl Fn(String) + Send + 'static) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(tell));
    }
}
