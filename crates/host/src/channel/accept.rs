//! The standby's beginning of a channel.
//!
//! *In*: a listening socket, to which anybody may connect. *Out*: one channel, to a primary. *Invariants*: who is not a primary costs a bounded time and bounded memory, is
//! sent away, and ends or holds up nothing: [`GREETINGS`] are met at once, each on a thread of its own, each with a deadline, and when there are more the
//! oldest gives way. At most one is told that it is taken.
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::CertificateDer;
use rustls::{ContentType, ServerConnection};
use twinstep_pair::wire::{self, Message};

use super::security::{PROTOCOL, Security, Tls};
use super::tls::{self, Session};
use super::{Channel, Hurried, TAKEN, take_your_time};
use crate::error::{Context, Result};
use crate::events::Events;
use crate::wake::Wake;

/// Strangers that are listened to at a time. Each has a thread and at most some 100 KiB of TLS.
const GREETINGS: usize = 16;

/// Bytes that are read, and thrown away, from somebody who was refused, so that it hears why.
const LAST_BYTES: usize = 64 << 10;

/// Waits for a primary. Strangers come to any open port: scanners, health checks, people with a wrong address. They are sent away, and the waiting goes on.
///
/// # Errors
/// If the socket cannot be listened on any more.
pub fn accept(listener: &TcpListener, security: &Security, events: &Events) -> Result<Channel> {
    listener.set_nonblocking(true).what("cannot set up the port")?;
    let wake = Wake::new()?;
    let (tell, told) = channel();
    let door = Arc::new(Door { security: security.clone(), taken: AtomicBool::new(false), tell, wake: wake.clone() });
    let mut greeted: Vec<(u64, TcpStream)> = Vec::new();
    let mut number = 0;
    loop {
        match poll(&mut [PollFd::new(listener, PollFlags::IN), PollFd::new(&wake, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(io::Error::from(e)).what("cannot wait for a primary"),
        }
        wake.clear();
        for Greeted { number, from, result } in told.try_iter() {
            greeted.retain(|(other, _)| *other != number);
            match result {
                Ok((channel, who)) => {
                    greeted.iter().for_each(|(_, stream)| _ = stream.shutdown(Shutdown::Both));
                    events.say("connected", format!("a primary connected from {from} ({}{who})", security.word()));
                    return Ok(channel);
                }
                Err(why) => events.say("stranger", format!("{from} is no primary: {why}; waiting on")),
            }
        }
        let (stream, from) = match listener.accept() {
            Ok(accepted) => accepted,
            // Nobody there, or somebody who has gone again.
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {
                continue;
            }
            Err(e) => return Err(e).what("cannot accept a primary"),
        };
        if greeted.len() == GREETINGS {
            // Its thread sees the end and says so.
            let _ = greeted.remove(0).1.shutdown(Shutdown::Both);
        }
        let Ok(known) = stream.try_clone() else { continue };
        number += 1;
        greeted.push((number, known));
        let greeter = door.clone();
        let greet = move || {
            let result = greeter.greet(stream);
            let _ = greeter.tell.send(Greeted { number, from, result });
            greeter.wake.wake();
        };
        if let Err(e) = std::thread::Builder::new().name("greeting".into()).spawn(greet) {
            greeted.pop();
            events.say("stranger", format!("{from} could not be listened to: cannot start a thread: {e}; waiting on"));
        }
    }
}

/// What came of one connection.
struct Greeted {
    number: u64,
    from: SocketAddr,
    /// The channel and, after a comma, who it leads to; or what is wrong.
    result: std::result::Result<(Channel, String), String>,
}

/// What the greetings share.
struct Door {
    security: Security,
    /// Somebody is being taken.
    taken: AtomicBool,
    tell: Sender<Greeted>,
    wake: Wake,
}

impl Door {
    fn greet(&self, stream: TcpStream) -> std::result::Result<(Channel, String), String> {
        match self.meet(&stream) {
            Ok(met) => Ok((Channel { stream, tls: met.tls, first: met.first }, met.who)),
            Err(why) => {
                part(&stream);
                Err(why)
            }
        }
    }

    fn meet(&self, stream: &TcpStream) -> std::result::Result<Met, String> {
        let say = |e: io::Error| match e.kind() {
            ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
            _ => e.to_string(),
        };
        // How it begins tells what it speaks. Nothing is taken out yet.
        let mut begins = [0];
        stream.set_read_timeout(Some(super::PATIENCE)).map_err(say)?;
        match stream.peek(&mut begins) {
            Ok(0) => return Err("it closed the connection".into()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Err("it says nothing".into()),
            Err(e) => return Err(say(e)),
            Ok(_) => {}
        }
        let speaks_tls = begins[0] == u8::from(ContentType::Handshake);
        let met = match &self.security {
            Security::Tls(configured) if speaks_tls => self.meet_over_tls(stream, configured),
            Security::Tls(_) if begins[0] == wire::MAGIC[0] => {
                let reason = "this standby speaks TLS only: give `run` --tls DIR as well".to_owned();
                // If it is a primary, it shows that to people.
                let _ = Hurried::new(stream).write_all(&wire::encode(&Message::Refuse { reason }));
                return Err("it does not speak TLS".into());
            }
            Security::OnThisHost | Security::Plaintext if speaks_tls => {
                return Err("it speaks TLS, for which this standby was given no --tls".into());
            }
            Security::Tls(_) => return Err("it does not speak TLS".into()),
            Security::OnThisHost | Security::Plaintext => {
                let mut hurried = Hurried::new(stream);
                let first = first_word(|buffer| hurried.read(buffer))?;
                self.take(|| Ok(Met { tls: None, first, who: String::new() }))
            }
        };
        met.and_then(|met| take_your_time(stream).map(|()| met).map_err(say))
    }

    fn meet_over_tls(&self, stream: &TcpStream, configured: &Tls) -> std::result::Result<Met, String> {
        let server = ServerConnection::new(configured.server.clone()).map_err(|e| e.to_string())?;
        let mut tls = rustls::Connection::from(server);
        tls::shake_hands(&mut tls, &mut Hurried::new(stream)).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => "it closed the connection in the middle of the handshake".to_owned(),
            _ => format!("the handshake failed: {e}"),
        })?;
        if tls.alpn_protocol() != Some(PROTOCOL) {
            return Err("it wants another service".into());
        }
        let who = names(tls.peer_certificates());
        let mut session = Box::new(Session::new(tls));
        self.take(move || {
            let mut hurried = Hurried::new(stream);
            let mut taken = Vec::new();
            session.seal(&TAKEN, &mut taken).and_then(|()| hurried.write_all(&taken)).map_err(|e| e.to_string())?;
            let first = first_word(|buffer| session.read(&mut hurried, buffer))?;
            Ok(Met { tls: Some(session), first, who })
        })
    }

    /// One at a time may be told that it is taken; should it turn out to be none, the next one may.
    fn take(&self, begin: impl FnOnce() -> std::result::Result<Met, String>) -> std::result::Result<Met, String> {
        if self.taken.swap(true, Ordering::SeqCst) {
            return Err("another one came first".into());
        }
        let met = begin();
        if met.is_err() {
            self.taken.store(false, Ordering::SeqCst);
        }
        met
    }
}

/// Somebody who may be a primary.
struct Met {
    tls: Option<Box<Session>>,
    first: Vec<u8>,
    who: String,
}

/// Reads until it is plain that a frame begins, or that none does.
fn first_word(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> std::result::Result<Vec<u8>, String> {
    let mut first = Vec::new();
    let mut buffer = [0; wire::MAGIC.len()];
    while first.len() < wire::MAGIC.len() {
        let wanted = wire::MAGIC.len() - first.len();
        match read(&mut buffer[..wanted]) {
            Ok(0) => return Err("it closed the connection".into()),
            Ok(n) => first.extend(&buffer[..n]),
            Err(e) => return Err(e.to_string()),
        }
        if !wire::MAGIC.starts_with(&first) {
            return Err("it speaks another protocol".into());
        }
    }
    Ok(first)
}

/// Hangs up on somebody so that it can still hear why: a socket that is closed over unread bytes resets the connection.
fn part(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let mut hurried = Hurried::new(stream);
    let (mut buffer, mut thrown_away) = ([0; 4096], 0);
    while thrown_away < LAST_BYTES
        && let Ok(n @ 1..) = hurried.read(&mut buffer)
    {
        thrown_away += n;
    }
}

/// Whom the certificate names, for people.
fn names(chain: Option<&[CertificateDer<'_>]>) -> String {
    let certificate = chain.and_then(|chain| webpki::EndEntityCert::try_from(chain.first()?).ok());
    let names: Vec<&str> = certificate.iter().flat_map(|certificate| certificate.valid_dns_names()).take(4).collect();
    if names.is_empty() { String::new() } else { format!(", {}", names.join(", ")) }
}
