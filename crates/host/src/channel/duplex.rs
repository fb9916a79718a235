//! A channel in use: both directions in the hands of one owner, who never blocks on it and waits for it in `poll`.
//!
//! *In*: bytes to send. *Out*: bytes that arrived. *Invariants*: neither sending nor receiving blocks; what the socket does not take at once waits here, in
//! order, and never more than [`MOST_WAITING`]; nothing is sent after [`Duplex::finish`].
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::tls::Session;

/// Bytes that may wait for a socket which takes none. The pair's own bounds, on the log and on the image under way, are passed before; this one holds whatever
/// they are set to.
const MOST_WAITING: usize = 512 << 20;

/// Bytes before what waits that are kept rather than moved for.
const SLACK: usize = 64 << 10;

/// A connection to the other side that does not block.
pub struct Duplex {
    stream: Arc<TcpStream>,
    session: Option<Box<Session>>,
    /// Read already, in order to know who speaks.
    first: Vec<u8>,
    /// Bytes as they go on the wire; those before `sent` have gone.
    waiting: Vec<u8>,
    sent: usize,
    finishing: bool,
}

/// A handle to wait on while others use the [`Duplex`].
#[derive(Debug, Clone)]
pub struct Waitable(Arc<TcpStream>);

impl AsFd for Waitable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Duplex {
    /// Of a stream that was set not to block.
    pub(super) fn new(stream: TcpStream, session: Option<Box<Session>>, first: Vec<u8>) -> Self {
        Self { stream: Arc::new(stream), session, first, waiting: Vec::new(), sent: 0, finishing: false }
    }

    /// What to wait on.
    pub fn waitable(&self) -> Waitable {
        Waitable(self.stream.clone())
    }

    /// Whether something waits for the socket to take it.
    pub fn wants_write(&self) -> bool {
        self.sent < self.waiting.len()
    }

    /// Takes what has arrived: at least one byte, or 0 once no more comes.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing has; else that the connection is broken.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.first.is_empty() {
            let n = self.first.len().min(buffer.len());
            buffer[..n].copy_from_slice(&self.first[..n]);
            self.first.drain(..n);
            return Ok(n);
        }
        loop {
            let mut stream = &*self.stream;
            let read = match &mut self.session {
                Some(session) => session.read(&mut stream, buffer),
                None => stream.read(buffer),
            };
            match read {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    /// Sends bytes, now or as soon as the socket takes them.
    ///
    /// # Errors
    /// If the connection is broken, or the other side has not read for so long that too much waits. It is of no use any more then.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.finishing {
            return Ok(());
        }
        let mut direct = 0;
        match &mut self.session {
            Some(session) => session.seal(bytes, &mut self.waiting)?,
            None => {
                if !self.wants_write() {
                    direct = write_some(&self.stream, bytes)?;
                }
                self.waiting.extend_from_slice(&bytes[direct..]);
            }
        }
        if self.waiting.len() - self.sent > MOST_WAITING {
            return Err(io::Error::other("the other side does not read what it is sent"));
        }
        self.flush()
    }

    /// Sends what waits, as far as the socket takes it.
    ///
    /// # Errors
    /// If the connection is broken.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.wants_write() {
            self.sent += write_some(&self.stream, &self.waiting[self.sent..])?;
        }
        if !self.wants_write() {
            self.waiting.clear();
            self.sent = 0;
            if self.finishing {
                // Who is gone needs no end.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        } else if self.sent > SLACK.max(self.waiting.len() / 2) {
            self.waiting.drain(..self.sent);
            self.sent = 0;
        }
        // What was needed for a burst is not kept for ever.
        if self.waiting.is_empty() && self.waiting.capacity() > 1 << 20 {
            self.waiting = Vec::new();
        }
        Ok(())
    }

    /// No more is sent; the other side reads the end of the stream behind what waits.
    ///
    /// # Errors
    /// If the connection is broken.
    pub fn finish(&mut self) -> io::Result<()> {
        if self.finishing {
            return Ok(());
        }
        self.finishing = true;
        if let Some(session) = &mut self.session {
            session.seal_end(&mut self.waiting)?;
        }
        self.flush()
    }

    /// Finishes, and reads until the other side has finished as well, for so long at most. A socket that is closed over unread bytes resets the
    /// connection, and the other side loses what it has not read yet: a refusal would have no reason, and a goodbye that is not heard is a death.
    pub fn part(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0; 64 << 10];
        let mut done = self.finish().is_err();
        while !done {
            let interest = if self.wants_write() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&*self.stream, interest)], Some(&timeout)) {
                Ok(0) => return,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
            done = self.flush().is_err();
            match self.receive(&mut buffer) {
                Ok(0) => done = true,
                Ok(_) => {}
                Err(e) => done |= e.kind() != io::ErrorKind::WouldBlock,
            }
        }
    }

    /// The socket, for tests that tamper with it.
    #[cfg(test)]
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

// What waits may be the guest's own bytes.
impl fmt::Debug for Duplex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = self.waiting.len() - self.sent;
        f.debug_struct("Duplex").field("stream", &self.stream).field("session", &self.session).field("waiting", &waiting).finish()
    }
}

/// Writes as much as the socket takes.
fn write_some(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match stream.write(&bytes[written..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => written += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    Ok(written)
}
