//! The client of the pair's benchmark, on the host: an ordinary TCP client of the guest's Redis and of its HTTP server.
//!
//! *In*: an address. *Out*: rates, latencies, the bytes of a download. *Invariant*: every reply is looked at; one that is not what was asked for is an error,
//! not a figure.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use twinstep_host::error::Context;
use twinstep_host::redis_check::resp::{Parser, Reply, command};
use twinstep_host::{Error, Result};

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the values that are written.
const VALUE: [u8; 64] = [b'x'; 64];

/// What a load came to.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// Requests a second.
    pub per_second: f64,
    /// How long each batch took, in milliseconds.
    pub batches_ms: Vec<f64>,
}

/// A connection to Redis.
pub struct Redis {
    stream: TcpStream,
    parser: Parser,
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let what = || format!("cannot connect to the guest at {address}");
    let stream = TcpStream::connect_timeout(&address, PATIENCE).what(what())?;
    stream.set_nodelay(true).what(what())?;
    stream.set_read_timeout(Some(PATIENCE)).what(what())?;
    Ok(stream)
}

impl Redis {
    /// Connects.
    pub fn connect(address: SocketAddr) -> Result<Self> {
        Ok(Self { stream: connect(address)?, parser: Parser::default() })
    }

    /// Writes the same key so often, `batch` at a time: a batch is sent when the one before is acknowledged.
    pub fn set(&mut self, requests: usize, batch: usize) -> Result<Load> {
        let mut one = Vec::new();
        command(&[b"SET", b"key:1", &VALUE], &mut one);
        let wire = one.repeat(batch);
        let mut load = Load::default();
        let begin = Instant::now();
        for _ in 0..requests.div_ceil(batch) {
            let sent = Instant::now();
            self.stream.write_all(&wire).what("the guest's Redis takes no more")?;
            for _ in 0..batch {
                match self.reply()? {
                    Reply::Simple(ok) if ok == "OK" => {}
                    other => return Err(Error::new(format!("SET was answered by {other:?}"))),
                }
            }
            load.batches_ms.push(sent.elapsed().as_secs_f64() * 1e3);
        }
        load.per_second = (load.batches_ms.len() * batch) as f64 / begin.elapsed().as_secs_f64();
        Ok(load)
    }

    /// Does so for a while, one at a time.
    pub fn set_for(&mut self, span: Duration) -> Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < span {
            self.set(50, 1)?;
        }
        Ok(())
    }

    fn reply(&mut self) -> Result<Reply> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(reply) = self.parser.next_reply().map_err(Error::new)? {
                return Ok(reply);
            }
            match self.stream.read(&mut buffer).what("the guest's Redis does not answer")? {
                0 => return Err(Error::new("the guest's Redis closed the connection")),
                n => self.parser.feed(&buffer[..n]),
            }
        }
    }
}

/// Downloads a file; gives the seconds from the connection's beginning to the last byte, and the file.
pub fn download(address: SocketAddr, path: &str) -> Result<(f64, Vec<u8>)> {
    let begin = Instant::now();
    let mut stream = connect(address)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).what("the guest's HTTP server takes no request")?;
    let mut answer = Vec::with_capacity(17 << 20);
    stream.read_to_end(&mut answer).what("the download broke off")?;
    let seconds = begin.elapsed().as_secs_f64();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
    let head = String::from_utf8_lossy(&answer[..end.unwrap_or(0)]).into_owned();
    let status = head.lines().next().unwrap_or_default();
    if !status.contains(" 200 ") {
        return Err(Error::new(format!("the guest's HTTP server answers '{status}' for {path}")));
    }
    Ok((seconds, answer.split_off(head.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn server(answer: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(&answer).unwrap();
        });
        address
    }

    #[test]
    fn a_download_is_what_follows_the_head() {
        let address = server(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\na\r\n\r\nb".to_vec());
        assert_eq!(download(address, "/file").unwrap().1, b"a\r\n\r\nb");
        let error = download(server(b"HTTP/1.0 404 Not Found\r\n\r\n".to_vec()), "/x").unwrap_err().to_string();
        assert!(error.contains("404 Not Found"), "{error}");
        assert!(download(server(Vec::new()), "/x").is_err());
    }

    #[test]
    fn every_reply_is_looked_at() {
        let load = Redis::connect(server(b"+OK\r\n+OK\r\n".to_vec())).unwrap().set(2, 2).unwrap();
        assert!(load.per_second > 0.0 && load.batches_ms.len() == 1);
        let error = Redis::connect(server(b"-ERR no\r\n".to_vec())).unwrap().set(1, 1).unwrap_err().to_string();
        assert!(error.contains("ERR no"), "{error}");
        assert!(Redis::connect(server(b"+OK\r\n".to_vec())).unwrap().set(2, 2).is_err());
    }
}
