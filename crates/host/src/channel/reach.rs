//! The primary's beginning of a channel.
//!
//! *In*: the standby's address, how to be sure of it. *Out*: a channel. *Invariant*: with TLS the channel exists only when both sides have accepted each other's
//! certificate, so that a VM which was to be protected does not start unprotected by mistake.
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConnection};

use super::security::{PROTOCOL, Security, Tls, server_name};
use super::tls::{self, Session};
use super::{Channel, Hurried, TAKEN, take_your_time};
use crate::error::{Error, Result};

/// How long a standby may take to accept a connection, if it is the only hope. Where nobody answers at all, the system's own patience is minutes.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take at first when there may be others: enough for a request that was lost and sent again by the system a second later.
const FIRST_PATIENCE: Duration = Duration::from_millis(1500);

/// How long a standby may take to accept a connection that did not do so this many times in a row: a dead one must not keep a VM from the next one, and a slow one is reached in the end.
pub fn patience(failures: u32) -> Duration {
    FIRST_PATIENCE.saturating_mul(1 << failures.min(8)).min(PATIENCE)
}

/// Connects to the standby at `address`, a host's name or IP address and a port, which has `patience` for each of its addresses.
///
/// # Errors
/// If nobody is there, if it is not who it has to be, or if `security` does not allow that address.
pub fn reach(address: &str, security: &Security, patience: Duration) -> Result<Channel> {
    let refuse = |e: io::Error| {
        Error::new(format!("cannot reach the standby at {address}"))
            .because(e)
            .next(format!("start it there first: twinstep standby --listen {address} --arbiter ..."))
    };
    let mut failure = io::Error::other("the name has no address");
    for candidate in address.to_socket_addrs().map_err(refuse)? {
        security.allows(candidate.ip())?;
        match TcpStream::connect_timeout(&candidate, patience) {
            Ok(stream) => return begin(stream, address, security),
            Err(e) => failure = e,
        }
    }
    Err(refuse(failure))
}

fn begin(stream: TcpStream, address: &str, security: &Security) -> Result<Channel> {
    let Security::Tls(configured) = security else {
        return Ok(Channel { stream, tls: None, first: Vec::new() });
    };
    let name = expected_name(configured, address)?;
    match hello(&stream, configured, name.clone()) {
        Ok(tls) => Ok(Channel { stream, tls: Some(tls), first: Vec::new() }),
        Err(e) => {
            let next = way_out(&e, &name.to_str());
            Err(Error::new(format!("cannot agree on TLS with the standby at {address}")).because(e).next(next))
        }
    }
}

/// The name the standby's certificate must have: the one that was given, or the one it is reached by.
fn expected_name(tls: &Tls, address: &str) -> Result<ServerName<'static>> {
    if let Some(name) = &tls.peer_name {
        return Ok(name.clone());
    }
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    server_name(host.trim_start_matches('[').trim_end_matches(']'), "the address, or give --peer-name NAME")
}

fn hello(stream: &TcpStream, configured: &Tls, name: ServerName<'static>) -> io::Result<Box<Session>> {
    let client = ClientConnection::new(configured.client.clone(), name).map_err(io::Error::other)?;
    let mut tls = rustls::Connection::from(client);
    stream.set_nodelay(true)?;
    let mut hurried = Hurried::new(stream);
    tls::shake_hands(&mut tls, &mut hurried)?;
    if tls.alpn_protocol() != Some(PROTOCOL) {
        return Err(io::Error::other("it is no standby of Twinstep"));
    }
    let mut session = Box::new(Session::new(tls));
    // What it thinks of our certificate, it says only now.
    let (mut word, mut filled) = ([0; TAKEN.len()], 0);
    while filled < word.len() {
        match session.read(&mut hurried, &mut word[filled..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => filled += n,
        }
    }
    if word != TAKEN {
        return Err(io::Error::other("it speaks another version of Twinstep's protocol"));
    }
    take_your_time(stream)?;
    Ok(session)
}

/// What to do about a handshake that failed.
fn way_out(e: &io::Error, name: &str) -> String {
    let tls = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => {
            format!(
                "issue it a certificate for {name} (`twinstep pki issue DIR NAME --address {name}`), or say with --peer-name which name it has"
            )
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            "give both sides certificates of one authority, and its ca.pem".into()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => {
            "issue it a new certificate, and check both hosts' clocks".into()
        }
        Some(rustls::Error::AlertReceived(_)) => {
            "the standby does not like our certificate; its events say why (authority, --expect-peer, clocks)".into()
        }
        _ => "start the standby with --tls as well; its events say what it thinks of us, and whether it serves somebody else"
            .into(),
    }
}
