//! The thread behind a cable, and the queue in front of it.
//!
//! *In*: frames from the VM (`send`), frames from the other side. *Out*: the same, on the other side. *Invariant*: `send` never blocks; the lock is held for
//! one write at most; the queue is bounded; a frame is written whole or, when its socket broke half-way, not continued on the next one; a cable that was told whose it is
//! says so to its switch on every connection before any frame.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use twinstep_machine::offload::LargeSegment;

use super::coalesce::Coalescer;
use super::frames::{self, Decoder, ETHERNET_HEADER, HEADER, MAX_FRAME, Mac, Piece};
use super::tap::Tap;
use super::token::{Message, Token};
use super::{Receive, announcement};
use crate::error::{Context, Error, Result};
use crate::wake::Wake;

/// What may wait to be sent.
const QUEUE_BYTES: usize = 4 << 20;
/// How long until a broken socket is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// A VM's cable. Dropping it ends its thread.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What a cable has carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames sent or queued.
    pub sent: u64,
    /// Frames received.
    pub received: u64,
    /// Frames there was no room or no connection for.
    pub dropped: u64,
    /// How often the connection was made again.
    pub reconnected: u64,
}

/// Who is told when a switch refuses a cable's frames, and with which epoch of the VM it explains that. It is called in the cable's thread.
pub type TellFenced = Box<dyn FnMut(u64) + Send>;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: Wake,
    stop: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
    dropped: AtomicU64,
    reconnected: AtomicU64,
}

#[derive(Debug)]
struct State {
    line: Line,
    /// Wire bytes that wait; they may begin in the middle of a frame.
    queue: VecDeque<u8>,
    /// The guest's address, so that a new connection can be told at once where it is.
    mac: Option<Mac>,
    /// The longest large segment that is sent as it is; longer ones are cut.
    whole: usize,
    fence: Fence,
}

/// What a cable has to do with epochs.
#[derive(Default)]
struct Fence {
    /// The other side is a switch, which understands tokens.
    switch: bool,
    /// Whose cable this is.
    token: Option<Token>,
    /// The switch refuses our frames, since the VM is live elsewhere in this epoch.
    fenced: Option<u64>,
    tell: Option<TellFenced>,
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fence").field("token", &self.token).field("fenced", &self.fenced).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Line {
    Socket(Arc<UnixStream>),
    Broken,
    Tap(Arc<Tap>),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the queue as it was: bytes, still in order.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes or queues wire frames, all or none. `false` if they were dropped.
    fn put(&self, state: &mut State, stream: &UnixStream, wire: [&[u8]; 2]) -> bool {
        let was_empty = state.queue.is_empty();
        let taken = state.put(stream, wire);
        if was_empty && !state.queue.is_empty() {
            // From here on the thread has to wait for room too.
            self.wake.wake();
        }
        taken
    }

    /// Tells a switch whose cable this is, if it is anybody's.
    fn say_token(&self, state: &mut State, stream: &UnixStream) {
        if let Some(token) = state.fence.token.filter(|_| state.fence.switch) {
            let wire = Message::Token(token).wire();
            if !self.put(state, stream, [&wire, &[]]) {
                // The queue is full, or the socket broken. Frames must not go out as if they were an earlier epoch's: on the next connection it is said first.
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// The switch has said something.
    fn told(&self, message: &[u8]) -> std::result::Result<(), super::token::Unknown> {
        let Message::Fenced { epoch } = Message::parse(message)? else { return Ok(()) };
        let mut state = self.state();
        // An answer to an earlier word of ours may still have been on its way.
        if state.fence.token.is_some_and(|token| token.epoch <= epoch) && state.fence.fenced.is_none() {
            state.fence.fenced = Some(epoch);
            if let Some(tell) = &mut state.fence.tell {
                tell(epoch);
            }
        }
        Ok(())
    }
}

impl Link {
    /// Over a connected socket. With `path`, it is connected again when it breaks. Large segments of up to `whole` bytes are sent as they are.
    pub fn over_socket(stream: UnixStream, path: Option<PathBuf>, whole: usize, receive: Receive) -> Result<Self> {
        stream.set_nonblocking(true).what("cannot set up the network's socket")?;
        let stream = Arc::new(stream);
        let for_thread = Arc::clone(&stream);
        Self::start(Line::Socket(stream), whole, move |shared| socket_thread(shared, for_thread, path, receive))
    }

    /// Over a socket connected to a switch of ours.
    pub fn over_switch(stream: UnixStream, path: PathBuf, receive: Receive) -> Result<Self> {
        let link = Self::over_socket(stream, Some(path), 0, receive)?;
        link.shared.state().fence.switch = true;
        Ok(link)
    }

    /// Over an open TAP device.
    pub fn over_tap(tap: Tap, receive: Receive) -> Result<Self> {
        let tap = Arc::new(tap);
        let for_thread = Arc::clone(&tap);
        Self::start(Line::Tap(tap), 0, move |shared| tap_thread(shared, &for_thread, receive))
    }

    fn start(line: Line, whole: usize, work: impl FnOnce(&Shared) + Send + 'static) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { line, queue: VecDeque::new(), mac: None, whole, fence: Fence::default() }),
            wake: Wake::new()?,
            stop: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            reconnected: AtomicU64::new(0),
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("network".to_owned()).spawn(move || work(&for_thread));
        Ok(Self { shared, thread: Some(thread.what("cannot start the network's thread")?) })
    }

    /// Sends a frame now or soon, or drops it. Frames no Ethernet would carry are dropped: a guest may try anything.
    pub fn send(&self, frame: &[u8]) {
        let shared = &*self.shared;
        if !(ETHERNET_HEADER..=MAX_FRAME).contains(&frame.len()) {
            return Shared::count(&shared.dropped);
        }
        let mut state = shared.state();
        state.mac = Mac::source(frame).filter(|mac| !mac.is_group()).or(state.mac);
        let taken = match &state.line {
            Line::Broken => false,
            // The switch would refuse it as well.
            _ if state.fence.fenced.is_some() => false,
            Line::Tap(tap) => tap.send(frame).unwrap_or(false),
            Line::Socket(stream) => {
                let stream = Arc::clone(stream);
                shared.put(&mut state, &stream, [&(frame.len() as u32).to_be_bytes(), frame])
            }
        };
        Shared::count(if taken { &shared.sent } else { &shared.dropped });
    }

    /// Sends a large segment ([`twinstep_machine::offload`]): as it is to who takes it so, else in pieces.
    pub fn send_large(&self, frame: &mut [u8], segment_size: u16) {
        let shared = &*self.shared;
        let Some(large) = LargeSegment::of(frame, segment_size, twinstep_machine::MAX_FRAME) else {
            return Shared::count(&shared.dropped);
        };
        let mut state = shared.state();
        if frame.len() <= state.whole {
            drop(state);
            large.complete(frame);
            return self.send(frame);
        }
        state.mac = Mac::source(frame).filter(|mac| !mac.is_group()).or(state.mac);
        let taken = match &state.line {
            Line::Broken => 0,
            _ if state.fence.fenced.is_some() => 0,
            Line::Tap(tap) => {
                let tap = Arc::clone(tap);
                large.frames(frame).iter().filter(|piece| tap.send(piece).unwrap_or(false)).count()
            }
            Line::Socket(stream) => {
                let stream = Arc::clone(stream);
                // All pieces in one write: the other side is as glad of that as this one.
                let mut wire = Vec::with_capacity(frame.len() + large.pieces() * (HEADER + large.headers.payload));
                large.cut(frame, |headers, payload| frames::encode_parts(headers, payload, &mut wire));
                if shared.put(&mut state, &stream, [&wire, &[]]) { large.pieces() } else { 0 }
            }
        };
        shared.sent.fetch_add(taken as u64, Ordering::Relaxed);
        shared.dropped.fetch_add((large.pieces() - taken) as u64, Ordering::Relaxed);
    }

    /// Tells switches where this address is: to be called when a machine goes live.
    pub fn announce(&self, mac: [u8; 6]) {
        self.send(&announcement(Mac(mac)));
    }

    /// Says whose cable this is: frames sent from now on are this one's. Only switches are told; to others it means nothing.
    pub fn identify(&self, token: Token) {
        let mut state = self.shared.state();
        state.fence.token = Some(token);
        state.fence.fenced = None;
        if let Line::Socket(stream) = &state.line {
            let stream = Arc::clone(stream);
            self.shared.say_token(&mut state, &stream);
        }
    }

    /// Who is to be told when the switch refuses this cable's frames; at once, if it does already.
    pub fn when_fenced(&self, mut tell: TellFenced) {
        let mut state = self.shared.state();
        if let Some(epoch) = state.fence.fenced {
            tell(epoch);
        }
        state.fence.tell = Some(tell);
    }

    /// What has gone through.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let s = &*self.shared;
        Statistics { sent: get(&s.sent), received: get(&s.received), dropped: get(&s.dropped), reconnected: get(&s.reconnected) }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake.wake();
        // A receiver that blocks (a full channel nobody reads any more) would hold its caller up for ever: the thread
        // is left to itself then, and ends at its next frame. It holds nothing that is missed.
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

impl State {
    /// Writes wire frames, or queues what is left of them. `false` if they were dropped.
    fn put(&mut self, stream: &UnixStream, wire: [&[u8]; 2]) -> bool {
        let mut written = 0;
        if self.queue.is_empty() {
            match (&*stream).write_vectored(&wire.map(IoSlice::new)) {
                Ok(n) => written = n,
                // The thread notices a broken socket by itself, and empties the queue.
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => return false,
            }
        }
        let [first, second] = wire;
        if written == 0 && self.queue.len() + first.len() + second.len() > QUEUE_BYTES {
            return false;
        }
        // Slices, since they are copied as a whole and not byte by byte.
        self.queue.extend(&first[written.min(first.len())..]);
        self.queue.extend(&second[written.saturating_sub(first.len())..]);
        true
    }

    /// Writes what waits, as far as it goes.
    fn flush(&mut self, stream: &UnixStream) -> std::io::Result<()> {
        while !self.queue.is_empty() {
            let (front, back) = self.queue.as_slices();
            match (&*stream).write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(n) => drop(self.queue.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Waits for a descriptor or for the wake-up; says which of read and write is possible.
fn wait(fd: Option<BorrowedFd<'_>>, wake: &Wake, write: bool, timeout: Option<Duration>) -> Result<PollFlags> {
    let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
    let interest = if write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(fd.map(|fd| PollFd::from_borrowed_fd(fd, interest)));
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::new("cannot wait for the network").because(e)),
        }
    }
    if !fds[0].revents().is_empty() {
        wake.clear();
    }
    Ok(fds.get(1).map_or(PollFlags::empty(), |fd| fd.revents()))
}

fn socket_thread(shared: &Shared, mut stream: Arc<UnixStream>, path: Option<PathBuf>, mut receive: Receive) {
    loop {
        match serve(shared, &stream, &mut receive) {
            Ok(ControlFlow::Break(())) => return,
            Ok(ControlFlow::Continue(())) => {}
            Err(why) => tracing::warn!("the network connection broke: {why}"),
        }
        {
            let mut state = shared.state();
            state.line = Line::Broken;
            // The rest of a half-written frame would be nonsense on a new connection.
            state.queue.clear();
        }
        let Some(path) = &path else { return };
        stream = loop {
            if shared.stop.load(Ordering::Relaxed) {
                return;
            }
            match UnixStream::connect(path).and_then(|s| s.set_nonblocking(true).map(|()| s)) {
                Ok(stream) => break Arc::new(stream),
                Err(_) if wait(None, &shared.wake, false, Some(RETRY)).is_ok() => {}
                Err(_) => return,
            }
        };
        tracing::info!("connected to {} again", path.display());
        Shared::count(&shared.reconnected);
        let mut state = shared.state();
        state.line = Line::Socket(Arc::clone(&stream));
        // A switch that was started anew may know less than the one before.
        state.fence.fenced = None;
        shared.say_token(&mut state, &stream);
        // The other side may have frames for us, and knows us by what we send.
        if let Some(mac) = state.mac {
            let frame = announcement(mac);
            state.put(&stream, [&(frame.len() as u32).to_be_bytes(), &frame]);
        }
    }
}

/// Works until the socket breaks (`Continue` or an error) or nobody wants it any more (`Break`).
fn serve(shared: &Shared, stream: &UnixStream, receive: &mut Receive) -> Result<ControlFlow<()>> {
    let mut decoder = Decoder::default();
    let mut coalescer = Coalescer::default();
    let mut reader: &UnixStream = stream;
    loop {
        let write = !shared.state().queue.is_empty();
        let ready = wait(Some(stream.as_fd()), &shared.wake, write, None)?;
        if shared.stop.load(Ordering::Relaxed) {
            return Ok(ControlFlow::Break(()));
        }
        if ready.contains(PollFlags::OUT) {
            shared.state().flush(stream).what("cannot send")?;
        }
        if !ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            continue;
        }
        match decoder.fill(&mut reader) {
            Ok(0) => return Ok(ControlFlow::Continue(())),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
            Err(e) => return Err(e).what("cannot receive"),
        }
        while let Some(piece) = decoder.next_piece().what("the other side does not speak our protocol")? {
            let frame = match piece {
                Piece::Frame(frame) => frame,
                Piece::Message(message) => {
                    shared.told(message).what("the switch is of another build")?;
                    continue;
                }
            };
            Shared::count(&shared.received);
            if shared.stop.load(Ordering::Relaxed) || coalescer.push(&frame[HEADER..], receive).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        // Nothing waits for what may come.
        if coalescer.flush(receive).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
}

fn tap_thread(shared: &Shared, tap: &Tap, mut receive: Receive) {
    let mut work = || -> Result<()> {
        let mut coalescer = Coalescer::default();
        let mut buffer = vec![0; MAX_FRAME];
        loop {
            wait(Some(tap.as_fd()), &shared.wake, false, None)?;
            // A busy device must not keep the thread from noticing that it shall end.
            while !shared.stop.load(Ordering::Relaxed) {
                let Some(frame) = tap.receive(&mut buffer)? else { break };
                Shared::count(&shared.received);
                if coalescer.push(frame, &mut receive).is_break() {
                    return Ok(());
                }
            }
            if coalescer.flush(&mut receive).is_break() || shared.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    };
    if let Err(e) = work() {
        tracing::error!("the network is lost: {e}");
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
