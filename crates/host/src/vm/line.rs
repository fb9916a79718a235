//! The logging channel as the driver of a protocol has it: bytes out, bytes in, and the end.
//!
//! *In*: a channel; bytes to send. *Out*: bytes that came, and why none come any more. *Invariant*: nothing here blocks. A connection that fails while it is written to is
//! reported by who reads it, after everything that came before.
use std::io::ErrorKind;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::channel::{BeatKey, Channel, Duplex, Waitable};
use crate::error::Result;

/// Bytes read from a connection at once at most.
const READ_BYTES: usize = 256 << 10;

/// How long the other side is waited for at the end. It closes at once if it is alive.
const CLOSING_PATIENCE: Duration = Duration::from_secs(2);

/// A connection in use.
pub(super) struct Line {
    duplex: Duplex,
    /// For signs of life beside it.
    beat_key: BeatKey,
    buffer: Vec<u8>,
    /// There may be more than was read, also if the socket is empty.
    more: bool,
    /// What failed when it was written to.
    failure: Option<String>,
}

/// What waiting for a line needs to know.
pub(super) struct Interest {
    /// Its socket.
    pub(super) socket: Waitable,
    /// Something waits to be written.
    pub(super) write: bool,
    /// Something may be there already.
    pub(super) at_once: bool,
}

impl Line {
    pub(super) fn new(channel: Channel) -> Result<Self> {
        let beat_key = channel.beat_key()?;
        Ok(Self { duplex: channel.open()?, beat_key, buffer: vec![0; READ_BYTES], more: true, failure: None })
    }
    /// What signs of life beside it are sealed with.
    pub(super) fn beat_key(&self) -> &BeatKey {
        &self.beat_key
    }
    /// Sends bytes, now or as soon as the socket takes them.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        if self.failure.is_none() {
            self.failure = self.duplex.send(bytes).err().map(|e| e.to_string());
        }
    }
    /// Sends what waits.
    pub(super) fn flush(&mut self) {
        if self.failure.is_none() {
            self.failure = self.duplex.flush().err().map(|e| e.to_string());
        }
    }
    /// What has come, or why nothing comes any more. `None`: nothing now.
    pub(super) fn receive(&mut self) -> Option<std::result::Result<Vec<u8>, String>> {
        match self.duplex.receive(&mut self.buffer) {
            Ok(0) => Some(Err("the other side closed the connection".to_owned())),
            Ok(n) => {
                self.more = n == self.buffer.len();
                Some(Ok(self.buffer[..n].to_vec()))
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.more = false;
                self.failure.take().map(Err)
            }
            Err(e) => Some(Err(e.to_string())),
        }
    }
    /// Whether its owner has to wait for it in another way than to read.
    pub(super) fn wants_owner(&self) -> bool {
        self.failure.is_some() || self.duplex.wants_write()
    }
    /// For who waits.
    pub(super) fn interest(&self) -> Interest {
        let at_once = self.more || self.failure.is_some();
        Interest { socket: self.duplex.waitable(), write: self.duplex.wants_write(), at_once }
    }
    /// Puts nothing more in. What was put in is still sent, and the other side's end waited for, on a thread.
    pub(super) fn close(self) -> Closing {
        let part = move || self.duplex.part(CLOSING_PATIENCE);
        // Without a thread the last words may get lost, as on any connection.
        Closing(std::thread::Builder::new().name("closing".into()).spawn(part).ok())
    }
}

/// A connection that nothing more is put into.
#[derive(Default)]
pub(super) struct Closing(Option<JoinHandle<()>>);

impl Closing {
    /// Waits until the last words have arrived. To be called before the process ends, which would cut them off.
    pub(super) fn wait(&self) {
        let deadline = Instant::now() + CLOSING_PATIENCE;
        while self.0.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
