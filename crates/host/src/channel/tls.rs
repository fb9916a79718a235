//! TLS 1.3 over the logging channel, for two threads.
//!
//! *In*: plain bytes from one thread, sealed bytes from the socket of the other. *Out*: the reverse. *Invariants*: the TLS state is shared under a lock that is
//! held for arithmetic on at most [`PIECE_BYTES`] and never while a socket blocks, so neither direction waits for the other; only the [`Sealer`] puts
//! records on the wire, so their order is the order of their numbers.
//!
//! What TLS itself wants to answer (an update of keys, RFC 8446 section 4.6.3) goes out with the next bytes that are written; both sides of a pair send heartbeats
//! all the time.
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::Connection;

/// What is sealed or opened under one lock: four full records, tens of microseconds.
const PIECE_BYTES: usize = 64 << 10;

type Shared = Arc<Mutex<Connection>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Connection> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken(e: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

/// Goes through the handshake. If it fails, the other side is told why as far as TLS has words for it.
pub(super) fn shake_hands(tls: &mut Connection, stream: &mut (impl Read + Write)) -> io::Result<()> {
    while tls.is_handshaking() || tls.wants_write() {
        let done = tls.complete_io(stream);
        if done.is_err() {
            while tls.wants_write() && tls.write_tls(stream).is_ok_and(|n| n > 0) {}
        }
        if done? == (0, 0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Both directions of a connection whose handshake is over.
pub(super) fn directions(mut tls: Connection) -> (Opener, Sealer) {
    // A piece at a time is put in and taken out again at once: that is the bound.
    tls.set_buffer_limit(None);
    let shared = Arc::new(Mutex::new(tls));
    let opener = Opener { shared: shared.clone(), sealed: vec![0; PIECE_BYTES], left: 0..0, failure: None };
    (opener, Sealer { shared, sealed: Vec::new() })
}

/// Opens what arrives.
pub(super) struct Opener {
    shared: Shared,
    sealed: Vec<u8>,
    /// What of `sealed` has not been opened yet.
    left: Range<usize>,
    /// Told after what came before it.
    failure: Option<io::Error>,
}

impl Opener {
    /// A secret of this session's two ends, for this purpose (RFC 8446, section 7.5).
    pub(super) fn export(&self, purpose: &[u8]) -> io::Result<[u8; 32]> {
        lock(&self.shared).export_keying_material([0; 32], purpose, None).map_err(broken)
    }

    /// As [`Read::read`]: at least one byte, or 0 once the other side has said that no more comes. A connection that ends without
    /// that word was cut, and is an error.
    pub(super) fn read(&mut self, stream: &mut impl Read, plain: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(n) = self.open(plain) {
                return Ok(n);
            }
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
            match stream.read(&mut self.sealed)? {
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was cut")),
                n => self.left = 0..n,
            }
        }
    }

    /// Opens what is there, as much as fits. Nothing if more has to come.
    fn open(&mut self, plain: &mut [u8]) -> Option<usize> {
        let mut tls = lock(&self.shared);
        let mut filled = 0;
        loop {
            match tls.reader().read(&mut plain[filled..]) {
                // No more comes, or no more fits.
                Ok(0) => return Some(filled),
                Ok(n) => {
                    filled += n;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => self.failure = self.failure.take().or(Some(e)),
            }
            if self.failure.is_none() && !self.left.is_empty() {
                let mut left = &self.sealed[self.left.clone()];
                let fed = tls.read_tls(&mut left).and_then(|_| tls.process_new_packets().map_err(broken));
                self.left.start = self.left.end - left.len();
                // Of what came before a broken record, nothing is lost.
                self.failure = fed.err();
                continue;
            }
            return (filled > 0).then_some(filled);
        }
    }
}

/// Seals what is sent.
pub(super) struct Sealer {
    shared: Shared,
    sealed: Vec<u8>,
}

impl Sealer {
    /// As [`Write::write_all`].
    pub(super) fn write_all(&mut self, stream: &mut impl Write, plain: &[u8]) -> io::Result<()> {
        for piece in plain.chunks(PIECE_BYTES) {
            self.send(stream, |tls| tls.writer().write_all(piece))?;
        }
        Ok(())
    }

    /// Says that no more comes.
    pub(super) fn close(&mut self, stream: &mut impl Write) -> io::Result<()> {
        self.send(stream, |tls| {
            tls.send_close_notify();
            Ok(())
        })
    }

    fn send(&mut self, stream: &mut impl Write, put: impl FnOnce(&mut Connection) -> io::Result<()>) -> io::Result<()> {
        self.sealed.clear();
        {
            let mut tls = lock(&self.shared);
            put(&mut tls)?;
            while tls.wants_write() {
                tls.write_tls(&mut self.sealed)?;
            }
        }
        stream.write_all(&self.sealed)
    }
}

// The state holds keys: nothing of it is shown.
impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opener")
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer")
    }
}
