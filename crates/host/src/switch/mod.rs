//! A small Ethernet switch between processes on one host: VMs, and passt or other switches as uplinks.
//!
//! *In*: connections on a Unix socket, each a port; sockets to connect out to. *Out*: frames between them. *Invariant*: one broken or
//! stuck peer costs the others nothing: its queue is bounded, its reads are bounded per round, and a length that can't be
//! meant closes its port.
//!
//! The switch is what makes a client's connection outlive a VM process: passt holds the client's side and stays
//! connected here, while the VM's address moves from the dead process's port to its successor's. What is decided is in
//! [`fabric`]; here are the sockets and the clock.

pub mod fabric;
mod tcp;

use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::{Context, Error, Result};
use crate::net::frames::Decoder;
use crate::socket::{self, SocketFile};
use crate::wake::Wake;
use fabric::{Event, Fabric, Limits, PortId};

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
}

/// A switch that is bound to its socket but does not run yet.
#[derive(Debug)]
pub struct Switch {
    listener: UnixListener,
    _socket: SocketFile,
    ports: BTreeMap<PortId, Connection>,
    uplinks: Vec<Uplink>,
    fabric: Fabric,
    wake: Wake,
    start: Instant,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    decoder: Decoder,
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
    wake: Wake,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Running {
    /// Stops the switch and says how it ended.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.wake.wake();
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
        let uplink = |path| Uplink { path, port: None, retry_at: Duration::ZERO, complained: false };
        Ok(Self {
            listener,
            _socket: socket,
            ports: BTreeMap::new(),
            uplinks: options.uplinks.into_iter().map(uplink).collect(),
            fabric: Fabric::new(options.limits),
            wake: Wake::new()?,
            start: Instant::now(),
        })
    }

    /// What ends [`Switch::run`] when it is woken.
    #[must_use]
    pub fn stopper(&self) -> Wake {
        self.wake.clone()
    }

    /// Runs in a thread of its own.
    pub fn spawn(self, mut tell: impl FnMut(Event) + Send + 'static) -> Result<Running> {
        let wake = self.wake.clone();
        let thread = std::thread::Builder::new().name("switch".to_owned()).spawn(move || self.run(&mut tell));
        Ok(Running { wake, thread: Some(thread.what("cannot start the switch's thread")?) })
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
        for (id, connection) in &self.ports {
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
            return Ok(None);
        }
        let readable = |fd: &PollFd<'_>| fd.revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        Ok(Some(Ready {
            listener: !fds[1].revents().is_empty(),
            readable: self.ports.keys().zip(&fds[2..]).filter(|(_, fd)| readable(fd)).map(|(id, _)| *id).collect(),
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
        self.ports.insert(id, Connection { stream, decoder: Decoder::default() });
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
            let now = self.now();
            let Some(connection) = self.ports.get_mut(&id) else { return };
            match connection.decoder.fill(&mut connection.stream) {
                Ok(0) => return self.detach(id, "it was closed".to_owned()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return self.detach(id, format!("it broke: {e}")),
            }
            loop {
                match connection.decoder.next_frame() {
                    Ok(Some(frame)) => self.fabric.frame(id, frame, now),
                    Ok(None) => break,
                    Err(e) => return self.detach(id, format!("its peer does not speak our protocol: {e}")),
                }
            }
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
