//! The logging channel's connection: how two hosts reach each other, know each other, and keep others out.
//!
//! *In*: an address, and how to be sure of the other side ([`Security`]). *Out*: a [`Channel`], a stream of bytes each way, encrypted or not; what the bytes
//! say is the business of `twinstep_pair`. *Invariant*: a channel is handed out only when the other side is who it has to be: with TLS it has shown a
//! certificate of the same authority and a name that was asked for; in the clear both ends lie on this host, or somebody has said `--plaintext`.
//!
//! ```text
//!   Security::open (files, flags)
//!        ├──▶ reach()   the primary's side ──TCP──▶ ┐
//!        └──▶ accept()  the standby's side ◀────────┘ many strangers at a time, one primary
//!                  │
//!               Channel ── open ──▶ Duplex (whoever drives the protocol)
//! ```
//!
//! The bytes on the wire before the first frame are in `docs/protocol-pair.md`, "Encryption"; who can do what is in `docs/threat-model.md`.
mod accept;
mod beats;
mod duplex;
mod reach;
mod revocation;
mod security;
mod standbys;
mod tls;

#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

pub use accept::accept;
pub use beats::{BeatKey, Beats};
pub use duplex::{Duplex, Waitable};
pub use reach::{PATIENCE as CONNECT_PATIENCE, patience, reach};
pub use security::{ChannelOptions, Security};
pub use standbys::{REGISTERED, Reach, Reached};

/// What files and names of certificates are called and how they are checked, for who makes them.
pub(crate) mod names {
    pub(crate) use super::security::{CA, CERT, CRL, KEY, server_name};
}

use crate::error::{Context, Result};
use tls::Session;

/// What a standby says over TLS when it takes the primary: before it, nobody knows whether the standby likes the certificate it was shown.
const TAKEN: [u8; 8] = *b"TWTAKEN1";

/// How long each step of a beginning may take: the handshake, and then the first word. Whoever means it needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// A connection to the other side.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
    tls: Option<Box<Session>>,
    /// What was read already in order to know who speaks.
    first: Vec<u8>,
}

impl Channel {
    /// The other side's address.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.stream.peer_addr().ok()
    }

    /// What signs of life beside this channel are sealed with.
    ///
    /// # Errors
    /// If TLS has no key for it.
    pub fn beat_key(&self) -> Result<BeatKey> {
        let key = match &self.tls {
            Some(session) => session.export(b"EXPORTER-twinstep-heartbeat").what("cannot make a key for heartbeats")?,
            None => [0; 32],
        };
        Ok(BeatKey { key, peer: self.peer().map(|peer| peer.ip()) })
    }

    /// For use: from here on nothing blocks.
    ///
    /// # Errors
    /// If the system does not want to.
    pub fn open(self) -> Result<Duplex> {
        // Acknowledgements are small, and outputs wait for them.
        self.stream.set_nodelay(true).what("cannot set up the connection")?;
        self.stream.set_nonblocking(true).what("cannot set up the connection")?;
        Ok(Duplex::new(self.stream, self.tls, self.first))
    }
}

/// A stream on which nothing lasts longer than until `deadline`, however slowly the other side drips.
struct Hurried<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl<'a> Hurried<'a> {
    fn new(stream: &'a TcpStream) -> Self {
        Self { stream, deadline: Instant::now() + PATIENCE }
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(late()) } else { Ok(left) }
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("it does not go on within {} s", PATIENCE.as_secs()))
}

fn lateness(e: io::Error) -> io::Error {
    if e.kind() == io::ErrorKind::WouldBlock { late() } else { e }
}

impl Read for Hurried<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer).map_err(lateness)
    }
}

impl Write for Hurried<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(bytes).map_err(lateness)
    }
    fn write_vectored(&mut self, bytes: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_vectored(bytes).map_err(lateness)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The hurry is over.
fn take_your_time(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)
}
