//! A small Ethernet switch between processes on one host: VMs, and passt or other switches as uplinks.
//!
//! *In*: connections on a Unix socket, each a port; sockets to connect out to. *Out*: frames between them. *Invariant*: one broken or
//! stuck peer costs the others nothing: its queue is bounded, its reads are bounded per round, and a length that can't be
//! meant closes its port.
//!
//! The switch is what makes a client's connection outlive a VM process: passt holds the client's side and stays
//! connected here, while the VM's address moves from the dead process's port to its successor's. What is decided is in
//! [`fabric`]; here are the sockets and the clock, and who may speak for a VM that was taken over: [`fences`], and the arbiter, if there is one to ask.

pub mod fabric;
pub mod fences;
mod proof;
mod tcp;

use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::arbiter::ArbiterSpec;
use crate::error::{Context, Error, Result};
use crate::net::frames::{Decoder, Piece};
use crate::net::token::Message;
use crate::socket::{self, SocketFile};
use crate::wake::Wake;
use fabric::{Event, Fabric, Limits, PortId};
use fences::{Fences, FencesFile};
use proof::{Proof, Prover};

/// How long until an uplink that could not be reached is tried again.
const UPLINK_RETRY: Duration = Duration::from_millis(200);
/// Connections at a time; more are refused.
const MAX_PORTS: usize = 256;
/// Frames given to the kernel in one call.
const FRAMES_PER_WRITE: usize = 64;
/// Reads from one port before the others get their turn.
const READS_PER_ROUND: usize = 8;

/// What a switch is made of.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where VMs connect to.
    pub listen: PathBuf,
    /// Sockets to connect out to (passt), tried again and again.
    pub uplinks: Vec<PathBuf>,
    /// Sizes.
    pub limits: Limits,
    /// Who knows whose an epoch is. Without it ports are believed.
    pub arbiter: Option<ArbiterSpec>,
}

/// A switch that is bound to its socket but does not run yet.
#[derive(Debug)]
pub struct Switch {
    listener: UnixListener,
    _socket: SocketFile,
    ports: BTreeMap<PortId, Connection>,
    uplinks: Vec<Uplink>,
    fabric: Fabric,
    /// Where epochs are kept for the next switch on this socket.
    file: FencesFile,
    /// What is in it.
    stored: Fences,
    prover: Option<Prover>,
    wake: Wake,
    stop: Arc<AtomicBool>,
    start: Instant,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    /// The arbiter is asked whose this is; until it answers nothing is read from it.
    asked: bool,
}

/// Ends a switch.
#[derive(Debug, Clone)]
pub struct Stopper {
    wake: Wake,
    stop: Arc<AtomicBool>,
}

impl Stopper {
    /// Ends it soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake.wake();
    }
}

#[derive(Debug)]
struct Uplink {
    path: PathBuf,
    port: Option<PortId>,
    retry_at: Duration,
    complained: bool,
}

/// A switch running in a thread of this process; dropping it stops the switch.
#[derive(Debug)]
pub struct Running {
    stopper: Stopper,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Running {
    /// Stops the switch and says how it ended.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.stopper.stop();
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::new("the switch's thread has panicked")),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            tracing::error!("{e}");
        }
    }
}

impl Switch {
    /// Binds the socket. Once this has returned, VMs can connect.
    pub fn bind(options: Options) -> Result<Self> {
        let (listener, socket) = socket::listen(&options.listen, "stop it, or give this switch another socket with --listen")?;
        let file = FencesFile::beside(&options.listen);
        let stored = file.load()?;
        let wake = Wake::new()?;
        let prover = options.arbiter.as_ref().map(|spec| Prover::start(spec.open()?, wake.clone())).transpose()?;
        let uplink = |path| Uplink { path, port: None, retry_at: Duration::ZERO, complained: false };
        Ok(Self {
            listener,
            _socket: socket,
            ports: BTreeMap::new(),
            uplinks: options.uplinks.into_iter().map(uplink).collect(),
            fabric: Fabric::new(options.limits).with_fences(stored.clone()),
            file,
            stored,
            prover,
            wake,
            stop: Arc::default(),
            start: Instant::now(),
        })
    }

    /// What ends [`Switch::run`].
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper { wake: self.wake.clone(), stop: self.stop.clone() }
    }

    /// Runs in a thread of its own.
    pub fn spawn(self, mut tell: impl FnMut(Event) + Send + 'static) -> Result<Running> {
        let stopper = self.stopper();
        let thread = std::thread::Builder::new().name("switch".to_owned()).spawn(move || self.run(&mut tell));
        Ok(Running { stopper, thread: Some(thread.what("cannot start the switch's thread")?) })
    }

    /// Switches until it is told to stop.
    pub fn run(mut self, tell: &mut dyn FnMut(Event)) -> Result<()> {
        loop {
            self.connect_uplinks();
            self.fabric.expire(self.now());
            for event in self.fabric.take_events() {
                tell(event);
            }
            let Some(ready) = self.wait()? else { return Ok(()) };
            self.take_proofs();
            if ready.listener {
                self.accept();
            }
            for id in ready.readable {
                self.read(id);
            }
            // Whatever was queued just now is written at once; poll is asked only about those that are full.
            let waiting: Vec<PortId> = self.ports.keys().copied().filter(|id| self.fabric.has_waiting(*id)).collect();
            for id in waiting {
                self.write(id);
            }
            self.store_fences();
        }
    }

    /// Epochs that were seen are kept for the next switch.
    fn store_fences(&mut self) {
        if *self.fabric.fences() == self.stored {
            return;
        }
        self.stored = self.fabric.fences().clone();
        if let Err(e) = self.file.store(&self.stored) {
            tracing::warn!("{e}; a switch started anew would not know who is stale");
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Waits for something to do; `None` means stop.
    fn wait(&self) -> Result<Option<Ready>> {
        let now = self.now();
        let retries = self.uplinks.iter().filter(|u| u.port.is_none()).map(|u| u.retry_at);
        let deadline = retries.chain(self.fabric.next_expiry()).min();
        // One millisecond more, so that the deadline has passed when poll comes back.
        let timeout = deadline.map(|d| d.saturating_sub(now) + Duration::from_millis(1));
        let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });

        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(2 + self.ports.len());
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        fds.push(PollFd::new(&self.listener, PollFlags::IN));
        // Of a port that the arbiter is asked about nothing is wanted yet, not even its end.
        let looked_at: Vec<PortId> = self.ports.iter().filter(|(_, connection)| !connection.asked).map(|(id, _)| *id).collect();
        for id in &looked_at {
            let connection = &self.ports[id];
            let write = if self.fabric.has_waiting(*id) { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::new(&connection.stream, PollFlags::IN | write));
        }
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::new("the switch cannot wait for its ports").because(e)),
            }
        }
        if !fds[0].revents().is_empty() {
            self.wake.clear();
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
        }
        let readable = |fd: &PollFd<'_>| fd.revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        Ok(Some(Ready {
            listener: !fds[1].revents().is_empty(),
            readable: looked_at.iter().zip(&fds[2..]).filter(|(_, fd)| readable(fd)).map(|(id, _)| *id).collect(),
        }))
    }

    fn connect_uplinks(&mut self) {
        let now = self.now();
        for index in 0..self.uplinks.len() {
            let uplink = &mut self.uplinks[index];
            if uplink.port.is_some() || uplink.retry_at > now {
                continue;
            }
            match socket::connect_without_waiting(&uplink.path) {
                Ok(stream) => {
                    uplink.complained = false;
                    let port = self.attach(stream);
                    self.uplinks[index].port = port;
                }
                Err(e) => {
                    if !std::mem::replace(&mut uplink.complained, true) {
                        tracing::warn!("the uplink {} can't be reached ({e}); trying again", uplink.path.display());
                    }
                }
            }
            self.uplinks[index].retry_at = now + UPLINK_RETRY;
        }
    }

    fn attach(&mut self, stream: UnixStream) -> Option<PortId> {
        if let Err(e) = stream.set_nonblocking(true) {
            tracing::warn!("cannot use a connection: {e}");
            return None;
        }
        let id = self.fabric.attach();
        self.ports.insert(id, Connection { stream, decoder: Decoder::default(), asked: false });
        Some(id)
    }

    fn accept(&mut self) {
        // A burst of connections is taken over several rounds.
        for _ in 0..READS_PER_ROUND {
            match self.listener.accept() {
                Ok((stream, _)) if self.ports.len() >= MAX_PORTS => {
                    tracing::warn!("a connection was refused: all {MAX_PORTS} ports are in use");
                    drop(stream);
                }
                Ok((stream, _)) => {
                    self.attach(stream);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    tracing::warn!("cannot accept a connection: {e}");
                    return;
                }
            }
        }
    }

    fn detach(&mut self, id: PortId, why: String) {
        let now = self.now();
        self.ports.remove(&id);
        self.fabric.detach(id, why, now);
        for uplink in self.uplinks.iter_mut().filter(|u| u.port == Some(id)) {
            uplink.port = None;
            uplink.retry_at = now + UPLINK_RETRY;
        }
    }

    fn read(&mut self, id: PortId) {
        for _ in 0..READS_PER_ROUND {
            let Some(connection) = self.ports.get_mut(&id) else { return };
            match connection.decoder.fill(&mut connection.stream) {
                Ok(0) => return self.detach(id, "it was closed".to_owned()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return self.detach(id, format!("it broke: {e}")),
            }
            if !self.take_in(id) {
                return;
            }
        }
    }

    /// Passes on what was read from a port. False if nothing more is to be read now.
    fn take_in(&mut self, id: PortId) -> bool {
        let now = self.now();
        let Some(connection) = self.ports.get_mut(&id) else { return false };
        loop {
            let why = match connection.decoder.next_piece() {
                Ok(Some(Piece::Frame(frame))) => {
                    self.fabric.frame(id, frame, now);
                    continue;
                }
                Ok(Some(Piece::Message(message))) => match Message::parse(message) {
                    Ok(Message::Token(token)) => {
                        let proven = match &self.prover {
                            Some(prover) => prover.ask(id, token),
                            None => false,
                        };
                        if proven {
                            // What follows waits for the answer: it may be a stale side's.
                            connection.asked = true;
                            return false;
                        }
                        self.fabric.name(id, token, None, now);
                        continue;
                    }
                    Ok(Message::Fenced { .. }) => "its peer speaks as a switch".to_owned(),
                    Err(e) => format!("its peer is of another build: {e}"),
                },
                Ok(None) => return true,
                Err(e) => format!("its peer does not speak our protocol: {e}"),
            };
            self.detach(id, why);
            return false;
        }
    }

    /// Takes the arbiter's answers in.
    fn take_proofs(&mut self) {
        while let Some((id, token, proof)) = self.prover.as_ref().and_then(Prover::answer) {
            // Its port may have gone meanwhile.
            let Some(connection) = self.ports.get_mut(&id) else { continue };
            connection.asked = false;
            let over = match proof {
                Proof::Good => None,
                Proof::Stale { by } => Some(by),
                Proof::Unknown(why) => {
                    self.fabric.unproven(id, why);
                    None
                }
            };
            let now = self.now();
            self.fabric.name(id, token, over, now);
            self.take_in(id);
        }
    }

    fn write(&mut self, id: PortId) {
        while self.fabric.has_waiting(id) {
            let now = self.now();
            let Some(connection) = self.ports.get_mut(&id) else { return };
            let mut slices = [IoSlice::new(&[]); FRAMES_PER_WRITE];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(self.fabric.waiting(id, FRAMES_PER_WRITE)) {
                *slice = IoSlice::new(piece);
                count += 1;
            }
            let result = connection.stream.write_vectored(&slices[..count]);
            match result {
                Ok(bytes) => self.fabric.wrote(id, bytes, now),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return self.detach(id, format!("it broke: {e}")),
            }
        }
    }
}

struct Ready {
    listener: bool,
    readable: Vec<PortId>,
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
