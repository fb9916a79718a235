//! As much HTTP/1.1 as one page needs (RFC 9112): the head of a request is read, its headers are not.
//!
//! *In*: the bytes so far. *Out*: whether they ask for the page, or why not; answers as bytes. *Invariant*: never panics, whatever the bytes; a head that grows
//! beyond its bound is refused.

/// Bytes of a request's head at most.
pub const MAX_HEAD: usize = 8192;
/// The page.
const PATH: &str = "/metrics";

/// Why a request is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// This is no HTTP.
    Bad,
    /// There is no such page.
    NotFound,
    /// A page can only be read.
    Method,
    /// The head did not come in time.
    TooSlow,
    /// The head is too long.
    TooLong,
    /// Too many connections.
    Busy,
    /// Another version of HTTP.
    Version,
}

/// Looks at the head of a request; none while it is not complete. Only its first line matters.
pub fn request(bytes: &[u8]) -> Option<Result<(), Refused>> {
    // Servers may take a bare line feed for a line's end.
    let ends = |(at, byte): (usize, &u8)| (*byte == b'\n').then_some(at);
    let mut first = None;
    for end in bytes.iter().enumerate().take(MAX_HEAD).filter_map(ends) {
        let first = *first.get_or_insert(end);
        let rest = &bytes[end + 1..];
        if rest.starts_with(b"\n") || rest.starts_with(b"\r\n") {
            return Some(first_line(&bytes[..first]));
        }
    }
    (bytes.len() > MAX_HEAD).then_some(Err(Refused::TooLong))
}

fn first_line(line: &[u8]) -> Result<(), Refused> {
    let line = std::str::from_utf8(line).map_err(|_| Refused::Bad)?;
    let mut words = line.strip_suffix('\r').unwrap_or(line).split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next()) else {
        return Err(Refused::Bad);
    };
    if method.is_empty() || !method.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)) {
        return Err(Refused::Bad);
    }
    match version.strip_prefix("HTTP/") {
        Some("1.0" | "1.1") => {}
        Some(_) => return Err(Refused::Version),
        None => return Err(Refused::Bad),
    }
    // Who speaks through a proxy says the whole address.
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    if path.split('?').next() != Some(PATH) {
        return Err(Refused::NotFound);
    }
    if method == "GET" { Ok(()) } else { Err(Refused::Method) }
}

fn response(status: &str, more: &str, kind: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n{more}\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The page as an answer.
pub fn answer(page: &str) -> Vec<u8> {
    response("200 OK", "", "text/plain; version=0.0.4; charset=utf-8", page)
}

/// A refusal as an answer.
pub fn refusal(why: Refused) -> Vec<u8> {
    let (status, more, text) = match why {
        Refused::Bad => ("400 Bad Request", "", "this is no HTTP request\n"),
        Refused::NotFound => ("404 Not Found", "", "there is one page here: /metrics\n"),
        Refused::Method => ("405 Method Not Allowed", "Allow: GET\r\n", "this can only be read: GET\n"),
        Refused::TooSlow => ("408 Request Timeout", "", "the request did not come in time\n"),
        Refused::TooLong => ("431 Request Header Fields Too Large", "", "the request's head is too long\n"),
        Refused::Busy => ("503 Service Unavailable", "Retry-After: 1\r\n", "too many connections: ask again later\n"),
        Refused::Version => ("505 HTTP Version Not Supported", "", "HTTP/1.1 is spoken here\n"),
    };
    response(status, more, "text/plain; charset=utf-8", text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests() {
        for (text, expected) in [
            ("", None),
            ("GET /metrics HTTP/1.1\r\n", None),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r", None),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Some(Ok(()))),
            ("GET /metrics HTTP/1.0\n\n", Some(Ok(()))),
            ("GET /metrics?a=b HTTP/1.1\r\n\r\nmore", Some(Ok(()))),
            ("GET http://host:9100/metrics HTTP/1.1\r\n\r\n", Some(Ok(()))),
            ("GET http://host HTTP/1.1\r\n\r\n", Some(Err(Refused::NotFound))),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", Some(Err(Refused::NotFound))),
            ("GET / HTTP/1.1\r\n\r\n", Some(Err(Refused::NotFound))),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", Some(Err(Refused::Method))),
            ("DELETE /metrics HTTP/1.1\r\n\r\n", Some(Err(Refused::Method))),
            ("GET  /metrics HTTP/1.1\r\n\r\n", Some(Err(Refused::Bad))),
            ("GET /metrics\r\n\r\n", Some(Err(Refused::Bad))),
            ("G(T /metrics HTTP/1.1\r\n\r\n", Some(Err(Refused::Bad))),
            ("GET /metrics HTTP/2\r\n\r\n", Some(Err(Refused::Version))),
            ("GET /metrics FTP/1\r\n\r\n", Some(Err(Refused::Bad))),
            ("\r\n\r\n", Some(Err(Refused::Bad))),
        ] {
            assert_eq!(request(text.as_bytes()), expected, "{text:?}");
        }
        assert_eq!(request(b"GET /\xff HTTP/1.1\r\n\r\n"), Some(Err(Refused::Bad)));
    }

    #[test]
    fn a_head_has_a_bound() {
        let of = |filler: usize| format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(filler)).into_bytes();
        assert_eq!(request(&of(8000)), Some(Ok(())));
        assert_eq!(request(&of(9000)), Some(Err(Refused::TooLong)));
        assert_eq!(request(&[b'x'; MAX_HEAD]), None);
        assert_eq!(request(&[b'x'; MAX_HEAD + 1]), Some(Err(Refused::TooLong)));
        assert_eq!(request(&[b'\n'; MAX_HEAD]), Some(Err(Refused::Bad)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_borne(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..40_usize) {
            let _ = request(&bytes);
            // What is complete stays what it is, whatever comes after; what is cut is not complete.
            let whole = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
            let cut = cut.min(whole.len());
            prop_assert_eq!(request(&whole[..cut]), (cut == whole.len()).then_some(Ok(())));
            prop_assert_eq!(request(&[&whole[..], &bytes].concat()), Some(Ok(())));
        }
    }
}
