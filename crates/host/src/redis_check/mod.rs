//! The demo's client, and its judge: one TCP connection to a Redis server, used hard, every acknowledged write remembered.
//!
//! *In*: an address. *Out*: a [`Report`]. *Invariant*: a report without a failure means that on a single connection, which was never reset,
//! every reply came, in order; the counter's values followed each other without a loss or a repetition; and at the end every key had the
//! last value the server had acknowledged for it.
//!
//! The load is a closed loop: so many commands are on their way at any time, and each reply makes room for the next command. INCR
//! and SET alternate, and now and then a GET looks at a key in passing. Because it is one connection, Redis works on the
//! commands in the order they were sent, so each GET has exactly one right answer.

mod measure;
pub mod resp;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use measure::Measure;
pub use measure::{Interruption, Latency};
use resp::{Parser, Reply};

/// How the server is used.
#[derive(Debug, Clone)]
pub struct Options {
    /// The forwarded port.
    pub address: SocketAddr,
    /// Commands on their way at a time.
    pub pipeline: usize,
    /// Different keys that are written, in turn.
    pub keys: usize,
    /// Bytes of each value.
    pub value_size: usize,
    /// How long a reply may take before the check has failed.
    pub patience: Duration,
}

impl Options {
    /// A moderate load.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self { address, pipeline: 4, keys: 20_000, value_size: 64, patience: Duration::from_secs(30) }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What went wrong; nothing if all is well.
    pub failure: Option<String>,
    /// The connection was closed or reset, or a reply did not come in time.
    #[serde(default)]
    pub reset: bool,
    /// Seconds under load.
    pub seconds: f64,
    /// Replies under load.
    pub replies: u64,
    /// Replies per second under load.
    pub replies_per_second: f64,
    /// Acknowledged INCRs.
    pub increments: u64,
    /// Acknowledged SETs.
    pub sets: u64,
    /// GETs that gave the right value under load.
    pub gets: u64,
    /// The counter's last value.
    pub counter: i64,
    /// Keys compared with their last acknowledged value at the end.
    pub keys_verified: u64,
    /// From command to reply.
    pub latency: Latency,
    /// The longest time without any reply, in milliseconds.
    pub longest_gap_ms: f64,
    /// What the client saw of each interruption it was told about.
    pub interruptions: Vec<Interruption>,
}

impl Report {
    /// Whether nothing was lost, repeated or reset.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failure.is_none()
    }
}

/// A check under way.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Report>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Who wants all keys read back now, and waits to hear how many there were.
    verify: Mutex<Option<Sender<u64>>>,
    replies: AtomicU64,
    marks: Mutex<Vec<Instant>>,
}

impl Running {
    /// Connects, waits for the first reply, and goes on in a thread of its own.
    pub fn start(options: Options) -> Result<Self> {
        let mut session = Session::connect(options)?;
        session.greet()?;
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("redis-check".to_owned()).spawn(move || session.run(&for_thread));
        Ok(Self { shared, thread: Some(thread.what("cannot start the client's thread")?) })
    }

    /// Replies so far.
    #[must_use]
    pub fn replies(&self) -> u64 {
        self.shared.replies.load(Ordering::Relaxed)
    }

    /// Whether the check has ended before it was told to, which means that it failed.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Says that the server's host is killed now: the gap around this moment is measured.
    pub fn mark(&self, now: Instant) {
        self.shared.marks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(now);
    }

    /// Reads back every key with an acknowledged write, and goes on with the load. Says how many keys; nothing if the check has failed, and then
    /// [`Self::finish`] tells how.
    #[must_use]
    pub fn verify(&self) -> Option<u64> {
        let (sender, verified) = channel();
        *self.shared.verify.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(sender);
        loop {
            match verified.recv_timeout(Duration::from_millis(50)) {
                Ok(keys) => return Some(keys),
                Err(RecvTimeoutError::Disconnected) => return None,
                // The thread may have ended before it saw the question, which then lies there.
                Err(RecvTimeoutError::Timeout) if self.has_ended() => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Ends the load, verifies all keys, and tells.
    pub fn finish(mut self) -> Result<Report> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| Error::new("the check was finished already"))?;
        thread.join().map_err(|_| Error::new("the client's thread has panicked"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// A command whose reply is awaited.
#[derive(Debug)]
struct Awaited {
    what: Expect,
    sent: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// The counter's next value.
    Increment,
    /// OK for this version of this key.
    Set { key: usize, version: u64 },
    /// This version of this key (0: never written).
    Get { key: usize, version: u64 },
}

struct Session {
    options: Options,
    stream: TcpStream,
    /// The connection is of no use any more.
    reset: bool,
    parser: Parser,
    /// Keys of an earlier client of the same server don't get in the way.
    name: String,
    awaited: VecDeque<Awaited>,
    outgoing: Vec<u8>,
    /// The version of each key that was sent last.
    sent: Vec<u64>,
    /// The version of each key that was acknowledged last.
    acknowledged: Vec<u64>,
    commands: u64,
    writes: usize,
    counter: Option<i64>,
    increments: u64,
    sets: u64,
    gets: u64,
}

impl Session {
    fn connect(options: Options) -> Result<Self> {
        let address = options.address;
        let stream = TcpStream::connect_timeout(&address, options.patience).map_err(|e| {
            Error::new(format!("cannot connect to the Redis server at {address}"))
                .because(e)
                .next("is the guest up, and the port forwarded?")
        })?;
        stream.set_nodelay(true).what("cannot set up the connection")?;
        stream.set_read_timeout(Some(options.patience)).what("cannot set up the connection")?;
        stream.set_write_timeout(Some(options.patience)).what("cannot set up the connection")?;
        let local = stream.local_addr().what("cannot set up the connection")?;
        Ok(Self {
            name: format!("twinstep:{}:{}", std::process::id(), local.port()),
            stream,
            reset: false,
            parser: Parser::default(),
            awaited: VecDeque::new(),
            outgoing: Vec::new(),
            sent: vec![0; options.keys.max(1)],
            acknowledged: vec![0; options.keys.max(1)],
            commands: 0,
            writes: 0,
            counter: None,
            increments: 0,
            sets: 0,
            gets: 0,
            options,
        })
    }

    /// One PING, so that a server that can't answer is an error at the start and not a failed check.
    fn greet(&mut self) -> Result<()> {
        let address = self.options.address;
        resp::command(&[b"PING"], &mut self.outgoing);
        let reply = self.flush().and_then(|()| self.reply());
        match reply {
            Ok(Reply::Simple(text)) if text == "PONG" => Ok(()),
            Ok(other) => Err(Error::new(format!("the server at {address} is no Redis: it answers PING with {other:?}"))),
            Err(e) => Err(Error::new(format!("the Redis server at {address} does not answer")).because(e)),
        }
    }

    fn run(mut self, shared: &Shared) -> Report {
        let start = Instant::now();
        let mut measure = Measure::new(start);
        let under_load = self.load(shared, &mut measure);
        let seconds = start.elapsed().as_secs_f64();
        let (failure, keys_verified) = match under_load.and_then(|()| self.verify()) {
            Ok(keys) => (None, keys),
            Err(why) => (Some(why), 0),
        };
        let marks = shared.marks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let replies = self.increments + self.sets + self.gets;
        Report {
            failure,
            reset: self.reset,
            seconds,
            replies,
            replies_per_second: replies as f64 / seconds.max(1e-9),
            increments: self.increments,
            sets: self.sets,
            gets: self.gets,
            counter: self.counter.unwrap_or(0),
            keys_verified,
            latency: measure.latency(),
            longest_gap_ms: measure.longest_gap_ms(),
            interruptions: measure.interruptions(&marks),
        }
    }

    fn load(&mut self, shared: &Shared, measure: &mut Measure) -> std::result::Result<(), String> {
        loop {
            let stop = shared.stop.load(Ordering::Relaxed);
            if stop && self.awaited.is_empty() {
                return Ok(());
            }
            let mut asked = shared.verify.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if self.awaited.is_empty()
                && let Some(asker) = asked.take()
            {
                drop(asked);
                let keys = self.verify()?;
                measure.replies_arrived(Instant::now());
                // Whoever asked may be gone.
                let _ = asker.send(keys);
                continue;
            }
            let pause = stop || asked.is_some();
            drop(asked);
            while !pause && self.awaited.len() < self.options.pipeline.max(1) {
                self.next_command();
            }
            self.flush()?;
            // One reply is waited for, and those that came with it are taken too.
            let mut reply = Some(self.reply()?);
            let now = Instant::now();
            measure.replies_arrived(now);
            while let Some(got) = reply {
                let awaited = self.awaited.pop_front().ok_or("a reply came that nothing had been asked for")?;
                measure.latency_of(now - awaited.sent);
                self.judge(awaited.what, &got)?;
                shared.replies.fetch_add(1, Ordering::Relaxed);
                reply = if self.awaited.is_empty() { None } else { self.parser.next_reply()? };
            }
        }
    }

    fn next_command(&mut self) {
        let n = self.commands;
        self.commands += 1;
        let what = match n % 8 {
            7 => {
                // Some key, not in the order of writing: a multiplicative step through all of them.
                let key = (n.wrapping_mul(2_654_435_761) % self.sent.len() as u64) as usize;
                Expect::Get { key, version: self.sent[key] }
            }
            even if even % 2 == 0 => Expect::Increment,
            _ => {
                let key = self.writes % self.sent.len();
                self.writes += 1;
                self.sent[key] += 1;
                Expect::Set { key, version: self.sent[key] }
            }
        };
        match what {
            Expect::Increment => resp::command(&[b"INCR", format!("{}:counter", self.name).as_bytes()], &mut self.outgoing),
            Expect::Set { key, version } => {
                let value = self.value(key, version);
                resp::command(&[b"SET", self.key(key).as_bytes(), &value], &mut self.outgoing);
            }
            Expect::Get { key, .. } => resp::command(&[b"GET", self.key(key).as_bytes()], &mut self.outgoing),
        }
        self.awaited.push_back(Awaited { what, sent: Instant::now() });
    }

    fn key(&self, key: usize) -> String {
        format!("{}:{key}", self.name)
    }

    /// A value that belongs to one version of one key only.
    fn value(&self, key: usize, version: u64) -> Vec<u8> {
        let mut value = format!("{key}/{version}/").into_bytes();
        value.resize(self.options.value_size.max(value.len()), b'.');
        value
    }

    fn judge(&mut self, what: Expect, got: &Reply) -> std::result::Result<(), String> {
        match (what, got) {
            (Expect::Increment, Reply::Integer(value)) => {
                if let Some(before) = self.counter.filter(|before| before + 1 != *value) {
                    return Err(format!("the counter went from {before} to {value}: {}", lost_or_repeated(before, *value)));
                }
                self.counter = Some(*value);
                self.increments += 1;
                Ok(())
            }
            (Expect::Set { key, version }, Reply::Simple(text)) if text == "OK" => {
                self.acknowledged[key] = version;
                self.sets += 1;
                Ok(())
            }
            (Expect::Get { key, version }, got) if self.is_version(key, version, got) => {
                self.gets += 1;
                Ok(())
            }
            (what, got) => Err(format!("{what:?} was answered by {got:?}")),
        }
    }

    fn is_version(&self, key: usize, version: u64, got: &Reply) -> bool {
        match got {
            Reply::Nil => version == 0,
            Reply::Bulk(bytes) => version > 0 && *bytes == self.value(key, version),
            _ => false,
        }
    }

    /// Reads back every key with an acknowledged write, in batches.
    fn verify(&mut self) -> std::result::Result<u64, String> {
        let keys: Vec<usize> = (0..self.acknowledged.len()).filter(|key| self.acknowledged[*key] > 0).collect();
        for batch in keys.chunks(128) {
            for key in batch {
                resp::command(&[b"GET", self.key(*key).as_bytes()], &mut self.outgoing);
            }
            self.flush()?;
            for key in batch {
                let (version, got) = (self.acknowledged[*key], self.reply()?);
                if !self.is_version(*key, version, &got) {
                    return Err(format!(
                        "an acknowledged write is missing: key {key} should have version {version} and has {got:?}"
                    ));
                }
            }
        }
        resp::command(&[b"GET", format!("{}:counter", self.name).as_bytes()], &mut self.outgoing);
        self.flush()?;
        let expected = self.counter.map_or(Reply::Nil, |value| Reply::Bulk(value.to_string().into_bytes()));
        match self.reply()? {
            got if got == expected => Ok(keys.len() as u64),
            got => Err(format!("the counter should be {expected:?} and is {got:?}")),
        }
    }

    fn flush(&mut self) -> std::result::Result<(), String> {
        if !self.outgoing.is_empty() {
            if let Err(e) = self.stream.write_all(&self.outgoing) {
                return Err(self.broken(&e));
            }
            self.outgoing.clear();
        }
        Ok(())
    }

    /// The next reply, waited for.
    fn reply(&mut self) -> std::result::Result<Reply, String> {
        loop {
            if let Some(reply) = self.parser.next_reply()? {
                return Ok(reply);
            }
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.reset = true;
                    return Err("the server's side closed the connection".to_owned());
                }
                Ok(n) => self.parser.feed(&buffer[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(&e)),
            }
        }
    }

    fn broken(&mut self, e: &std::io::Error) -> String {
        self.reset = true;
        match e.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                format!("no reply for {} s", self.options.patience.as_secs())
            }
            _ => format!("the connection broke: {e}"),
        }
    }
}

fn lost_or_repeated(before: i64, value: i64) -> &'static str {
    if value > before { "a reply was lost" } else { "an acknowledged increment was lost" }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
