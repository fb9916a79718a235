//! TLS 1.3 over the logging channel: one state for both directions, in the hands of whoever owns the connection.
//!
//! *In*: plain bytes to be sent, sealed bytes that arrived. *Out*: the reverse. *Invariants*: at most [`PIECE_BYTES`] are sealed or opened at a time, so what TLS
//! itself keeps is bounded; of what came before a broken record, nothing is lost.
//!
//! What TLS itself wants to answer (an update of keys, RFC 8446 section 4.6.3) goes out with the next bytes that are sent; both sides of a pair send heartbeats
//! all the time.
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;

use rustls::Connection;

/// What is sealed or opened at a time: four full records, tens of microseconds.
const PIECE_BYTES: usize = 64 << 10;

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

/// A connection whose handshake is over.
pub(super) struct Session {
    tls: Connection,
    sealed: Vec<u8>,
    /// What of `sealed` has not been opened yet.
    left: Range<usize>,
    /// Told after what came before it.
    failure: Option<io::Error>,
}

impl Session {
    pub(super) fn new(mut tls: Connection) -> Self {
        // A piece at a time is put in and taken out again at once: that is the bound.
        tls.set_buffer_limit(None);
        Self { tls, sealed: vec![0; PIECE_BYTES], left: 0..0, failure: None }
    }

    /// A secret of this session's two ends, for this purpose (RFC 8446, section 7.5).
    pub(super) fn export(&self, purpose: &[u8]) -> io::Result<[u8; 32]> {
        self.tls.export_keying_material([0; 32], purpose, None).map_err(broken)
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
        let mut filled = 0;
        loop {
            match self.tls.reader().read(&mut plain[filled..]) {
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
                let fed = self.tls.read_tls(&mut left).and_then(|_| self.tls.process_new_packets().map_err(broken));
                self.left.start = self.left.end - left.len();
                // Of what came before a broken record, nothing is lost.
                self.failure = fed.err();
                continue;
            }
            return (filled > 0).then_some(filled);
        }
    }

    /// Appends the sealed form of `plain` to `out`.
    pub(super) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        for piece in plain.chunks(PIECE_BYTES) {
            self.tls.writer().write_all(piece)?;
            self.take_sealed(out)?;
        }
        Ok(())
    }

    /// Appends the word that no more comes.
    pub(super) fn seal_end(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        self.tls.send_close_notify();
        self.take_sealed(out)
    }

    fn take_sealed(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(out)?;
        }
        Ok(())
    }
}

// The state holds keys: nothing of it is shown.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Session")
    }
}
