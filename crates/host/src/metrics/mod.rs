//! `/metrics`: a VM's figures for Prometheus and whoever else reads its text format.
//!
//! *In*: HTTP requests on the address that was given, and on no other. *Out*: one text ([`text`]) for `GET /metrics`; refusals for the rest. *Invariant*: whoever
//! connects is a stranger: a request has a bound in bytes and in time, connections have one in number, and nothing is changed by any request.
//!
//! A server of our own: one path, one method, no state. Whatever knows more HTTP than that ([`http`]) would know more than is needed here.
pub mod http;
pub mod text;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::control::Inquiry;
use crate::error::{Context, Error, Result};
use crate::events::Events;
use http::Refused;

/// Connections at a time.
const MAX_CONNECTIONS: usize = 8;
/// Refused ones that are still open, at most.
const MAX_REFUSED: usize = 16;
/// How long a request may take to arrive.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer may take to be taken.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// How long the other side may take to close after its answer.
const CLOSING_PATIENCE: Duration = Duration::from_secs(1);
/// Bytes that are still read, and thrown away, after an answer.
const MAX_REST: usize = 64 << 10;

/// Serves what `inquiry` says on `address` until its VM's control socket is closed. Gives the address with the port that was really taken.
pub fn serve(address: &str, inquiry: Inquiry, events: &Events) -> Result<SocketAddr> {
    let refuse = |e: std::io::Error| {
        Error::new(format!("cannot serve metrics on {address}"))
            .because(e)
            .next("give --metrics an address of this host and a free port, such as 127.0.0.1:9100")
    };
    let listener = TcpListener::bind(address).map_err(refuse)?;
    listener.set_nonblocking(true).map_err(refuse)?;
    let taken = listener.local_addr().map_err(refuse)?;
    let accept = move || accept(&listener, &inquiry);
    std::thread::Builder::new().name("metrics".into()).spawn(accept).what("cannot start a thread")?;
    let figures = serde_json::Map::from_iter([("address".to_owned(), taken.to_string().into())]);
    events.say_with("metrics", format!("metrics at http://{taken}/metrics"), figures);
    Ok(taken)
}

fn accept(listener: &TcpListener, inquiry: &Inquiry) {
    let connections = Arc::new(AtomicUsize::new(0));
    let mut refused = VecDeque::new();
    while inquiry.wait(listener) {
        let Ok((stream, _)) = listener.accept() else {
            // Out of descriptors, perhaps: not to be tried a million times a second.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::Relaxed);
            // Small enough for the socket's buffer; nobody is waited for.
            let said = stream.set_nonblocking(true).and_then(|()| (&stream).write_all(&http::refusal(Refused::Busy)));
            let _ = said.and_then(|()| stream.shutdown(Shutdown::Write));
            // It stays open for a while: closed over a request that nobody has read, the connection would be reset, and the answer with it.
            refused.push_back(stream);
            if refused.len() > MAX_REFUSED {
                refused.pop_front();
            }
            continue;
        }
        let (inquiry, open) = (inquiry.clone(), connections.clone());
        let answer = move || {
            // Whoever does not read or write as agreed is left alone.
            let _ = converse(stream, &inquiry);
            open.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("metrics-client".into()).spawn(answer).is_err() {
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// One request, one answer.
fn converse(mut stream: TcpStream, inquiry: &Inquiry) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(ANSWER_PATIENCE))?;
    let answer = match read_request(&mut stream)? {
        Some(Ok(())) => http::answer(&text::exposition(&inquiry.status(), inquiry.stat().ok().as_ref())),
        Some(Err(refused)) => http::refusal(refused),
        None => return Ok(()),
    };
    stream.write_all(&answer)?;
    stream.shutdown(Shutdown::Write)?;
    // A socket that is closed over unread bytes resets the connection, and the answer with it.
    let (deadline, mut left, mut buffer) = (Instant::now() + CLOSING_PATIENCE, MAX_REST, [0; 4096]);
    while let Some(n @ 1..) = read_until(&mut stream, &mut buffer, deadline)? {
        left = left.saturating_sub(n);
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// Reads a request; none if the other side has left.
fn read_request(stream: &mut TcpStream) -> std::io::Result<Option<std::result::Result<(), Refused>>> {
    let (deadline, mut head, mut buffer) = (Instant::now() + REQUEST_PATIENCE, Vec::new(), [0; 1024]);
    loop {
        match read_until(stream, &mut buffer, deadline)? {
            None => return Ok(Some(Err(Refused::TooSlow))),
            Some(0) => return Ok(None),
            Some(n) => head.extend(&buffer[..n]),
        }
        if let Some(request) = http::request(&head) {
            return Ok(Some(request));
        }
    }
}

/// Reads some; none if the time is over.
fn read_until(stream: &mut TcpStream, buffer: &mut [u8], deadline: Instant) -> std::io::Result<Option<usize>> {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(None);
    }
    stream.set_read_timeout(Some(left))?;
    match stream.read(buffer) {
        Ok(n) => Ok(Some(n)),
        Err(e) if e.kind() == Interrupted => read_until(stream, buffer, deadline),
        Err(e) if matches!(e.kind(), WouldBlock | TimedOut) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Control;

    struct Place {
        _folder: tempfile::TempDir,
        control: Control,
        address: SocketAddr,
    }

    fn open() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let events = Events::new("primary", true, None).unwrap();
        let control = Control::open_in(&folder.path().join("twinstep"), "db", "alone", &events).unwrap();
        let address = serve("127.0.0.1:0", control.inquiry(), &events).unwrap();
        assert!(events.history()[0].event.text.contains(&address.to_string()));
        Place { _folder: folder, control, address }
    }

    fn ask(place: &Place, pieces: &[&[u8]]) -> String {
        let mut stream = TcpStream::connect(place.address).unwrap();
        for piece in pieces {
            // It may have answered already.
            let _ = stream.write_all(piece);
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn one_path_and_one_method() {
        let place = open();
        for pieces in [&[&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..]][..], &[b"GET /met", b"rics HTTP/1.0\r", b"\n\r\n"]] {
            let answer = ask(&place, pieces);
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("text/plain; version=0.0.4"), "{head}");
            assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
            assert!(body.contains("twinstep_failovers_total{vm=\"db\",side=\"alone\"} 0\n"), "{body}");
        }
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("hello\r\n\r\n", "400"),
            (&"x".repeat(20_000), "431"),
        ] {
            let answer = ask(&place, &[request.as_bytes()]);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        }
        // A VM that took over says so in what it is called.
        place.control.serve("survivor", |_| false);
        place.control.board().took_over(2);
        let answer = ask(&place, &[b"GET /metrics HTTP/1.1\r\n\r\n"]);
        assert!(answer.contains("twinstep_failovers_total{vm=\"db\",side=\"survivor\"} 1\n"), "{answer}");
    }

    #[test]
    fn connections_are_bounded_and_end_with_the_vm() {
        let place = open();
        let silent: Vec<_> = (0..MAX_CONNECTIONS).map(|_| TcpStream::connect(place.address).unwrap()).collect();
        let answer = ask(&place, &[]);
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        drop(silent);
        let again = || ask(&place, &[b"GET /metrics HTTP/1.1\r\n\r\n"]).starts_with("HTTP/1.1 200 ");
        assert!((0..100_000).any(|_| again()), "nobody gets in any more");
        let address = place.address;
        drop(place);
        assert!((0..100_000).any(|_| TcpStream::connect(address).is_err()), "it still listens");
    }

    #[test]
    fn an_address_that_cannot_be_had() {
        let place = open();
        let events = Events::new("primary", true, None).unwrap();
        for address in [place.address.to_string().as_str(), "nowhere", "192.0.2.1:1"] {
            let error = serve(address, place.control.inquiry(), &events).unwrap_err().to_string();
            assert!(error.contains(&format!("cannot serve metrics on {address}")) && error.contains("--metrics"), "{error}");
        }
    }
}
