//! Redis's wire protocol (RESP2), the client's side of the few commands the check uses.
//!
//! *In*: bytes in pieces. *Out*: replies. *Invariant*: a reply that is longer than anything the check asks for, or that is not RESP, is an error
//! and not waited for.

/// The longest line or value that is taken.
const LIMIT: usize = 1 << 20;

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Simple(String),
    /// `-ERR ...`
    Error(String),
    /// `:7`
    Integer(i64),
    /// `$3` and three bytes.
    Bulk(Vec<u8>),
    /// `$-1`
    Nil,
}

/// Cuts a byte stream into replies.
#[derive(Debug, Default)]
pub struct Parser {
    buffer: Vec<u8>,
    start: usize,
}

impl Parser {
    /// Takes what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole reply, if there is one.
    pub fn next_reply(&mut self) -> Result<Option<Reply>, String> {
        let rest = &self.buffer[self.start..];
        let Some((reply, length)) = parse(rest)? else {
            return if rest.len() > LIMIT { Err(format!("a reply of more than {LIMIT} bytes")) } else { Ok(None) };
        };
        self.start += length;
        Ok(Some(reply))
    }
}

fn parse(bytes: &[u8]) -> Result<Option<(Reply, usize)>, String> {
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else { return Ok(None) };
    let strange = || format!("not a Redis reply: {:?}", String::from_utf8_lossy(&bytes[..end.min(60)]));
    let (kind, line) = bytes[..end].split_first().ok_or_else(strange)?;
    let line = std::str::from_utf8(line).map_err(|_| strange())?;
    let number = || line.parse::<i64>().map_err(|_| strange());
    let after = end + 2;
    let reply = match kind {
        b'+' => Reply::Simple(line.to_owned()),
        b'-' => Reply::Error(line.to_owned()),
        b':' => Reply::Integer(number()?),
        b'$' => match usize::try_from(number()?) {
            Err(_) => Reply::Nil,
            Ok(length) if length > LIMIT => return Err(format!("a value of {length} bytes")),
            Ok(length) => {
                let Some(value) = bytes.get(after..after + length + 2) else { return Ok(None) };
                let (value, tail) = value.split_at(length);
                if tail != b"\r\n" {
                    return Err(strange());
                }
                return Ok(Some((Reply::Bulk(value.to_vec()), after + length + 2)));
            }
        },
        _ => return Err(strange()),
    };
    Ok(Some((reply, after)))
}

/// Appends a command.
pub fn command(words: &[&[u8]], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn replies_in_pieces() {
        let wire = b"+OK\r\n:-7\r\n$5\r\na\r\nbc\r\n$-1\r\n-ERR no\r\n$0\r\n\r\n";
        let expected = [
            Reply::Simple("OK".into()),
            Reply::Integer(-7),
            Reply::Bulk(b"a\r\nbc".to_vec()),
            Reply::Nil,
            Reply::Error("ERR no".into()),
            Reply::Bulk(vec![]),
        ];
        for piece in 1..wire.len() {
            let mut parser = Parser::default();
            let mut seen = Vec::new();
            for bytes in wire.chunks(piece) {
                parser.feed(bytes);
                while let Some(reply) = parser.next_reply().unwrap() {
                    seen.push(reply);
                }
            }
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn what_is_not_redis_is_told() {
        for wire in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"\r\n", b":x\r\n", b"$2\r\nabc\r\n", b"$99999999999\r\n"] {
            let mut parser = Parser::default();
            parser.feed(wire);
            parser.next_reply().unwrap_err();
        }
        let mut parser = Parser::default();
        parser.feed(&vec![b'+'; LIMIT + 1]);
        parser.next_reply().unwrap_err();
    }

    #[test]
    fn commands() {
        let mut out = Vec::new();
        command(&[b"SET", b"k", b""], &mut out);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n");
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut parser = Parser::default();
            parser.feed(&bytes);
            while let Ok(Some(_)) = parser.next_reply() {}
        }
    }
}
