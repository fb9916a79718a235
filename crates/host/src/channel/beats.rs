//! Signs of life beside the channel: datagrams that a blocked or cut connection does not hold up.
//!
//! *In*: when to send one; the channel's key; whose they are to be. *Out*: word of each that comes, to who drives the pair; what they mean is decided in
//! `twinstep_pair`. *Invariant*: one that was not made by the process at the other end of this very channel counts for nothing, nor does one that came before.
//!
//! A datagram is in `docs/protocol-pair.md`, "Signs of life beside the channel". The key comes out of the TLS session (RFC 8446, section 7.5); without TLS it is no secret, as
//! nothing is on a channel in the clear.
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ring::hmac;
use rustix::net::{SendFlags, sendto};

use crate::error::{Context, Error, Result};

const MAGIC: [u8; 4] = *b"TWHB";
const VERSION: u16 = 1;
/// Bytes that are authenticated, and all.
const SIGNED: usize = 32;
const LENGTH: usize = SIGNED + 32;
/// How often a thread that hears nothing looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// What the two ends of a channel know of each other, and others do not if the channel is encrypted.
#[derive(Clone)]
pub struct BeatKey {
    pub(super) key: [u8; 32],
    pub(super) peer: Option<IpAddr>,
}

impl std::fmt::Debug for BeatKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BeatKey")
    }
}

/// Sends them, and hears them until it is dropped.
#[derive(Debug)]
pub struct Beats {
    socket: Arc<UdpSocket>,
    key: hmac::Key,
    own: [u8; 16],
    sent: u64,
    to: Arc<Mutex<Option<SocketAddr>>>,
    over: Arc<AtomicBool>,
}

impl Beats {
    /// The standby's end: they come at `socket`, and go to where the last one came from. `own` and `peer` are the two processes' identities; `heard` is called for
    /// each, in a thread of its own, until it says `false`.
    ///
    /// # Errors
    /// If the system has no thread.
    pub fn listen(
        socket: Arc<UdpSocket>,
        key: &BeatKey,
        own: [u8; 16],
        peer: [u8; 16],
        heard: impl FnMut() -> bool + Send + 'static,
    ) -> Result<Self> {
        Self::begin(socket, None, key, own, peer, heard)
    }

    /// The primary's end: they go to where the standby takes them.
    ///
    /// # Errors
    /// If that is no address, or if there is no socket to be had.
    pub fn toward(
        place: &str,
        key: &BeatKey,
        own: [u8; 16],
        peer: [u8; 16],
        heard: impl FnMut() -> bool + Send + 'static,
    ) -> Result<Self> {
        let mut to: SocketAddr =
            place.parse().map_err(|_| Error::new(format!("`{place}` is no place for heartbeats beside the channel")))?;
        // A standby that listens everywhere is where its channel leads to.
        if let (true, Some(peer)) = (to.ip().is_unspecified(), key.peer) {
            to.set_ip(peer);
        }
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
        let socket = UdpSocket::bind(any).what("cannot open a socket for heartbeats")?;
        Self::begin(Arc::new(socket), Some(to), key, own, peer, heard)
    }

    fn begin(
        socket: Arc<UdpSocket>,
        to: Option<SocketAddr>,
        key: &BeatKey,
        own: [u8; 16],
        peer: [u8; 16],
        mut heard: impl FnMut() -> bool + Send + 'static,
    ) -> Result<Self> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key.key);
        socket.set_read_timeout(Some(LOOK)).what("cannot set up the socket for heartbeats")?;
        let beats = Self { socket, key, own, sent: 0, to: Arc::new(Mutex::new(to)), over: Arc::default() };
        let (socket, key, to, over) = (beats.socket.clone(), beats.key.clone(), beats.to.clone(), beats.over.clone());
        let listen = move || {
            let (mut buffer, mut last) = ([0; LENGTH + 1], 0);
            while !over.load(Ordering::Relaxed) {
                match socket.recv_from(&mut buffer) {
                    Ok((n, from)) => {
                        let Some(number) = open(&buffer[..n], &key, &peer).filter(|number| *number > last) else { continue };
                        last = number;
                        *to.lock().unwrap_or_else(PoisonError::into_inner) = Some(from);
                        if !heard() {
                            return;
                        }
                    }
                    // That nobody is there may come back as an error of a later call.
                    Err(e)
                        if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionRefused) => {}
                    // Without beats the channel's own heartbeats decide.
                    Err(e) => return tracing::warn!("heartbeats beside the channel are not heard any more: {e}"),
                }
            }
        };
        std::thread::Builder::new().name("beats".into()).spawn(listen).what("cannot start a thread")?;
        Ok(beats)
    }

    /// Sends one, if it is known where to. It never blocks, and may get lost.
    pub fn send(&mut self) {
        let Some(to) = *self.to.lock().unwrap_or_else(PoisonError::into_inner) else { return };
        self.sent += 1;
        let datagram = seal(self.sent, &self.own, &self.key);
        let _ = sendto(&*self.socket, &datagram, SendFlags::DONTWAIT, &to);
    }
}

impl Drop for Beats {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// What is sealed.
fn head(number: u64, own: &[u8; 16]) -> [u8; SIGNED] {
    let mut head = [0; SIGNED];
    head[..4].copy_from_slice(&MAGIC);
    head[4..6].copy_from_slice(&VERSION.to_le_bytes());
    head[8..16].copy_from_slice(&number.to_le_bytes());
    head[16..].copy_from_slice(own);
    head
}

fn seal(number: u64, own: &[u8; 16], key: &hmac::Key) -> [u8; LENGTH] {
    let mut datagram = [0; LENGTH];
    let (signed, tag) = datagram.split_at_mut(SIGNED);
    signed.copy_from_slice(&head(number, own));
    tag.copy_from_slice(hmac::sign(key, signed).as_ref());
    datagram
}

/// The number of a datagram that the peer has sealed.
fn open(datagram: &[u8], key: &hmac::Key, peer: &[u8; 16]) -> Option<u64> {
    let (signed, tag) = datagram.split_at_checked(SIGNED)?;
    hmac::verify(key, signed, tag).ok()?;
    let number = u64::from_le_bytes(signed[8..16].try_into().expect("eight bytes"));
    (signed == head(number, peer)).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    const KEY: BeatKey = BeatKey { key: [7; 32], peer: Some(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)) };
    const PRIMARY: [u8; 16] = [1; 16];
    const STANDBY: [u8; 16] = [2; 16];
    const PATIENCE: Duration = Duration::from_secs(10);

    fn ear() -> (impl FnMut() -> bool + Send + 'static, Receiver<()>) {
        let (sender, heard) = channel();
        (move || sender.send(()).is_ok(), heard)
    }

    #[test]
    fn both_hear_each_other_and_nobody_else() {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
        let port = socket.local_addr().unwrap().port();
        let ((at_standby, standby_heard), (at_primary, primary_heard)) = (ear(), ear());
        let mut standby = Beats::listen(socket, &KEY, STANDBY, PRIMARY, at_standby).unwrap();
        // It does not know yet where to.
        standby.send();
        let mut primary = Beats::toward(&format!("0.0.0.0:{port}"), &KEY, PRIMARY, STANDBY, at_primary).unwrap();
        primary.send();
        standby_heard.recv_timeout(PATIENCE).unwrap();
        standby.send();
        primary_heard.recv_timeout(PATIENCE).unwrap();
        // Another key, another process, an old one, noise; and what is good comes after them.
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &KEY.key);
        let other = hmac::Key::new(hmac::HMAC_SHA256, &[8; 32]);
        let bad = [&seal(9, &PRIMARY, &other)[..], &seal(9, &STANDBY, &key), &seal(1, &PRIMARY, &key), &[], &[0; 200]];
        for datagram in bad {
            stranger.send_to(datagram, ("127.0.0.1", port)).unwrap();
        }
        primary.send();
        standby_heard.recv_timeout(PATIENCE).unwrap();
        assert!(standby_heard.try_recv().is_err(), "only the good one counted");
        standby.send();
        primary_heard.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn not_a_bit_may_differ() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &KEY.key);
        let sealed = seal(5, &PRIMARY, &key);
        assert_eq!(open(&sealed, &key, &PRIMARY), Some(5));
        for bit in 0..LENGTH * 8 {
            let mut flipped = sealed;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&flipped, &key, &PRIMARY), None, "bit {bit}");
        }
        assert_eq!(open(&sealed[..LENGTH - 1], &key, &PRIMARY), None);
        assert!(Beats::toward("nowhere", &KEY, PRIMARY, STANDBY, || true).is_err());
    }
}
