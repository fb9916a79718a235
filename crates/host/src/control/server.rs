//! The VM's end of the control socket.
//!
//! *In*: connections, and from the session, where questions go just now. *Out*: a response a request. *Invariant*: the machine's thread is sent
//! messages and never waited for under a lock; a client that is slow, silent, or talks nonsense costs its own thread and connection only, and there is
//! a bound to their number.
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use twinstep_machine::faults::Bit;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::wire::{self, Begun, Code, Flipped, History, Identity, Overridden, Refusal, Request, Stat, Status};
use super::{Answer, Ask, Question, VmFigures, folder};
use crate::arbiter::ManualOverride;
use crate::error::{Context, Result};
use crate::events::Events;
use crate::identity;
use crate::socket::SocketFile;
use crate::stat;
use crate::stat::sampler::{Sampler, Watch};
use crate::status::Board;
use crate::wake::Wake;

/// Connections at a time.
const MAX_CLIENTS: usize = 16;
/// How long the machine's thread may take to answer: an image of a large guest takes seconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a client may take to read a response.
const WRITE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a client may be silent.
const SILENCE: Duration = Duration::from_secs(300);

/// Brings a question to the machine's thread; false if that is gone.
type Courier = Box<dyn Fn(Ask) -> bool + Send>;

/// Who answers now.
struct Desk {
    side: String,
    /// `Err`: nobody, and why.
    courier: std::result::Result<Courier, String>,
}

struct Shared {
    name: String,
    desk: Mutex<Desk>,
    open: Arc<AtomicUsize>,
    clients: AtomicUsize,
    sampler: Sampler,
    board: Board,
    events: Events,
    /// Bits may be flipped.
    faults: AtomicBool,
    manual: ManualOverride,
    /// Woken once, at the end; never cleared.
    end: Wake,
}

/// The control socket of a VM, from the process's beginning to its end. Cheap to clone; the socket goes with the last clone.
#[derive(Clone)]
pub struct Control(Arc<Owner>);

/// What goes with the last clone, in this order: the file while somebody still listens, so that it can't be another process's by then, and then the
/// threads. They are not waited for; a process that ends meanwhile leaves nothing behind.
struct Owner {
    _file: SocketFile,
    end: End,
}

struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end.wake();
    }
}

impl Control {
    /// Opens the socket of the VM called `name` (or, without, as its process's number says) in the user's folder.
    /// What `events` says can be asked for.
    pub fn open(name: Option<&str>, side: &str, events: &Events) -> Result<Self> {
        let name = name.map_or_else(folder::default_name, str::to_owned);
        Self::open_in(&folder::of_this_user(), &name, side, events)
    }
    /// The same in another folder.
    pub fn open_in(folder: &Path, name: &str, side: &str, events: &Events) -> Result<Self> {
        let (listener, file) = folder::bind(folder, name)?;
        let desk = Desk { side: side.into(), courier: Err("the machine is not built yet".into()) };
        let shared = Arc::new(Shared {
            name: name.into(),
            desk: Mutex::new(desk),
            open: Arc::default(),
            clients: AtomicUsize::new(0),
            sampler: Sampler::default(),
            board: Board::new(if side == "standby" { "listening" } else { "unprotected" }),
            events: events.clone(),
            faults: AtomicBool::new(false),
            manual: ManualOverride::default(),
            end: Wake::new()?,
        });
        let accepting = shared.clone();
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accepting.accept(&listener))
            .what("cannot start a thread")?;
        Ok(Self(Arc::new(Owner { _file: file, end: End(shared) })))
    }
    fn shared(&self) -> &Shared {
        &self.0.end.0
    }
    /// From now on whoever may ask may also break this VM on purpose.
    pub fn allow_faults(&self) {
        self.shared().faults.store(true, Ordering::Relaxed);
    }
    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.shared().name
    }
    /// What a person may decide here.
    pub fn manual_override(&self) -> &ManualOverride {
        &self.shared().manual
    }
    /// Where the pair's figures are published.
    pub fn board(&self) -> &Board {
        &self.shared().board
    }
    /// What can be asked here, for another door.
    pub fn inquiry(&self) -> Inquiry {
        Inquiry(self.0.end.0.clone())
    }
    /// From now on this process is `side`, and `courier` brings questions to the machine's thread; false: that is gone.
    pub fn serve(&self, side: &str, courier: impl Fn(Ask) -> bool + Send + 'static) {
        *self.shared().desk() = Desk { side: side.into(), courier: Ok(Box::new(courier)) };
    }
    /// From now on there is no machine to ask.
    pub fn no_machine(&self, why: &str) {
        self.shared().desk().courier = Err(why.into());
    }
}

/// What a VM says, for another door than the socket. It does not keep the socket open.
#[derive(Clone)]
pub struct Inquiry(Arc<Shared>);

impl Inquiry {
    /// How its pair does.
    pub fn status(&self) -> Status {
        self.0.status()
    }
    /// What its machine did so far. What it does is not sampled for this.
    pub fn stat(&self) -> std::result::Result<Stat, Refusal> {
        self.0.stat()
    }
    /// Waits until something can be read; false if the VM's control socket is closed.
    pub fn wait(&self, readable: impl AsFd) -> bool {
        self.0.wait(readable, None)
    }
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something can be read; false if the end came, or nothing for too long.
    fn wait(&self, readable: impl AsFd, patience: Option<Duration>) -> bool {
        let mut fds = [PollFd::new(&readable, PollFlags::IN), PollFd::new(&self.end, PollFlags::IN)];
        let timeout = patience.map(|p| Timespec { tv_sec: p.as_secs() as i64, tv_nsec: p.subsec_nanos().into() });
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) | Ok(0) => return false,
                Ok(_) => return fds[1].revents().is_empty(),
            }
        }
    }

    fn accept(self: Arc<Self>, listener: &UnixListener) {
        while self.wait(listener, None) {
            let Ok((stream, _)) = listener.accept() else {
                // Out of descriptors, perhaps: not to be tried a million times a second.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            if self.clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
                self.clients.fetch_sub(1, Ordering::Relaxed);
                let text = format!("{MAX_CLIENTS} clients are connected already");
                let _ = Client::new(stream).and_then(|mut client| client.say(&Err::<(), _>(Refusal::new(Code::Busy, text))));
                continue;
            }
            let shared = self.clone();
            let serve = move || {
                // Whoever does not read or write as agreed is left alone.
                let _ = Client::new(stream).and_then(|mut client| client.serve(&shared));
                shared.clients.fetch_sub(1, Ordering::Relaxed);
            };
            if std::thread::Builder::new().name("control-client".into()).spawn(serve).is_err() {
                self.clients.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn identity(&self) -> Identity {
        Identity {
            name: self.name.clone(),
            pid: std::process::id(),
            side: self.desk().side.clone(),
            build: identity::build(),
            requests: Request::ALL.iter().map(|(name, _)| (*name).to_owned()).collect(),
        }
    }

    fn status(&self) -> Status {
        let side = self.desk().side.clone();
        self.board.report(&self.name, &side)
    }

    fn ask(&self, question: Question) -> std::result::Result<Answer, Refusal> {
        let Some((ask, answer)) = Ask::new(question, &self.open) else {
            return Err(Refusal::new(Code::Busy, "too many questions wait for the machine already: ask again later"));
        };
        match &self.desk().courier {
            Err(why) => return Err(Refusal::new(Code::NoMachine, why.clone())),
            Ok(courier) if !courier(ask) => return Err(Refusal::new(Code::NoMachine, "the machine has ended")),
            Ok(_) => {}
        }
        use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
        match answer.recv_timeout(PATIENCE) {
            Ok(Answer::NoMachine(why)) => Err(Refusal::new(Code::NoMachine, why)),
            Ok(answer) => Ok(answer),
            Err(Timeout) => Err(Refusal::new(
                Code::Busy,
                "the machine's thread does not answer: perhaps an image is being made; ask again later",
            )),
            Err(Disconnected) => Err(Refusal::new(Code::NoMachine, "the machine has ended, or goes live just now: ask again")),
        }
    }

    fn stat(&self) -> std::result::Result<Stat, Refusal> {
        let figures: Box<VmFigures> = match self.ask(Question::Stat)? {
            Answer::Stat(figures) => figures,
            Answer::NoMachine(why) => return Err(Refusal::new(Code::NoMachine, why)),
            Answer::Flipped(_) | Answer::FailingOver(_) => unreachable!("another question was asked"),
        };
        self.sampler.look_at(&figures.activity);
        Ok(stat::report(&figures, &self.sampler.samples()))
    }
}

impl Shared {
    /// Tells the protocol to hand the VM over.
    fn fail_over(&self) -> std::result::Result<Begun, Refusal> {
        match self.ask(Question::FailOver)? {
            Answer::FailingOver(true) => Ok(Begun {}),
            _ => {
                let text = "this is no primary of a pair: there is nowhere to go";
                Err(Refusal::new(Code::BadRequest, text))
            }
        }
    }
    /// Flips a bit, and says in the events that it was asked to.
    fn flip(&self, bit: Bit) -> std::result::Result<Flipped, Refusal> {
        if !self.faults.load(Ordering::Relaxed) {
            let text = "this VM was not started with --debug-faults, so nobody can break it on purpose";
            return Err(Refusal::new(Code::Forbidden, text));
        }
        match self.ask(Question::Flip(bit))? {
            Answer::Flipped(Some(position)) => {
                self.events.say("fault-injected", format!("{bit:?} was flipped at position {position}, as somebody asked"));
                Ok(Flipped { position })
            }
            _ => Err(Refusal::new(Code::BadRequest, format!("the machine has no {bit:?}"))),
        }
    }
}

/// A connection.
struct Client {
    stream: UnixStream,
    /// What was read and is not a whole line yet.
    read: Vec<u8>,
    watch: Option<Watch>,
}

impl Client {
    fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE_PATIENCE))?;
        Ok(Self { stream, read: Vec::new(), watch: None })
    }

    fn say<T: serde::Serialize>(&mut self, result: &std::result::Result<T, Refusal>) -> std::io::Result<()> {
        self.stream.write_all(wire::response(result).as_bytes())
    }

    /// Answers until the client leaves or breaks a rule.
    fn serve(&mut self, shared: &Shared) -> std::io::Result<()> {
        let mut buffer = [0; 1024];
        loop {
            while let Some(end) = self.read.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                self.answer(&line[..end], shared)?;
            }
            if self.read.len() > wire::MAX_REQUEST {
                let text = format!("a request has {} bytes at most", wire::MAX_REQUEST);
                return self.say(&Err::<(), _>(Refusal::new(Code::TooLong, text)));
            }
            if !shared.wait(&self.stream, Some(SILENCE)) {
                return Ok(());
            }
            match self.stream.read(&mut buffer)? {
                0 => return Ok(()),
                n => self.read.extend(&buffer[..n]),
            }
        }
    }

    fn answer(&mut self, line: &[u8], shared: &Shared) -> std::io::Result<()> {
        match Request::parse(line) {
            Err(refusal) => self.say(&Err::<(), _>(refusal)),
            Ok(Request::Identify) => self.say(&Ok(shared.identity())),
            Ok(Request::FlipBit(bit)) => self.say(&shared.flip(bit)),
            Ok(Request::FailOver) => self.say(&shared.fail_over()),
            Ok(Request::Override) => {
                let decided = shared.manual.decide().map(|epoch| Overridden { epoch });
                self.say(&decided.map_err(|why| Refusal::new(Code::BadRequest, why)))
            }
            Ok(Request::Status) => self.say(&Ok(shared.status())),
            Ok(Request::Events) => self.say(&Ok(History { events: shared.events.history() })),
            Ok(Request::Stat) => {
                let stat = shared.stat();
                if stat.is_ok() && self.watch.is_none() {
                    self.watch = Some(shared.sampler.watch());
                }
                self.say(&stat)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::client::Connection;
    use std::io::{BufRead, BufReader};
    use std::sync::mpsc::channel;
    use twinstep_machine::{Config, Machine};

    struct Place {
        _place: tempfile::TempDir,
        folder: std::path::PathBuf,
        control: Control,
    }

    fn open() -> Place {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("twinstep");
        let control = Control::open_in(&folder, "db", "alone", &Events::new("primary", true, None).unwrap()).unwrap();
        Place { _place: place, folder, control }
    }

    fn raw(place: &Place) -> BufReader<UnixStream> {
        BufReader::new(UnixStream::connect(folder::socket_of(&place.folder, "db").unwrap()).unwrap())
    }

    fn line(stream: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn a_machine_is_asked_by_its_thread_and_the_socket_goes_with_its_owner() {
        let place = open();
        let mut client = Connection::open(&place.folder, "db").unwrap();
        let id = client.identify().unwrap();
        assert_eq!((id.name.as_str(), id.pid, id.side.as_str()), ("db", std::process::id(), "alone"));
        let refused = client.stat().unwrap_err().to_string();
        assert!(refused.contains("the machine is not built yet"), "{refused}");

        let (to, inbox) = channel::<Ask>();
        place.control.serve("survivor", move |ask| to.send(ask).is_ok());
        let machine = std::thread::spawn(move || {
            let mut machine = Machine::new(Config { ram_mib: 64, ..Config::default() }, Vec::new()).unwrap();
            inbox.into_iter().take(2).for_each(|ask| ask.answer(&mut machine));
        });
        let stat = client.stat().unwrap();
        assert_eq!((stat.position, stat.counters["exits.lookup"]), (0, 0));
        assert!(stat.gauges["code_capacity"] > 1 << 20);
        assert_eq!(client.identify().unwrap().side, "survivor");
        let later = client.stat().unwrap();
        assert!(later.at_ns > stat.at_ns && later.samples.len() == 10);
        machine.join().unwrap();
        let refused = client.stat().unwrap_err().to_string();
        assert!(refused.contains("the machine has ended"), "{refused}");
        place.control.no_machine("it went away");
        assert!(client.stat().unwrap_err().to_string().contains("it went away"));

        let socket = folder::socket_of(&place.folder, "db").unwrap();
        drop(place.control);
        assert!(!socket.exists(), "the file goes at once");
        let gone = client.identify().unwrap_err().to_string();
        assert!(gone.contains("closed"), "{gone}");
    }

    #[test]
    fn a_pair_is_seen_without_asking_the_machine() {
        let place = open();
        let mut client = Connection::open(&place.folder, "db").unwrap();
        let status = client.status().unwrap();
        assert_eq!((status.name.as_str(), status.side.as_str(), status.state.as_str()), ("db", "alone", "unprotected"));
        assert_eq!(client.events().unwrap(), []);
        // A machine's thread that never answers is in nobody's way.
        let (to, _inbox) = channel::<Ask>();
        place.control.serve("survivor", move |ask| to.send(ask).is_ok());
        place.control.board().took_over(2);
        place.control.shared().events.say("live", "live in epoch 2");
        let status = client.status().unwrap();
        assert_eq!((status.side.as_str(), status.epoch, status.counts.failovers), ("survivor", Some(2), 1));
        let events = client.events().unwrap();
        assert_eq!((events.len(), events[0].event.what.as_str(), events[0].number), (1, "live", 1));
    }

    #[test]
    fn nonsense_is_answered_and_long_lines_end_the_connection() {
        let place = open();
        let mut stream = raw(&place);
        for (request, code) in [
            ("hello", "bad-request"),
            ("{\"v\":1,\"do\":\"dance\"}", "unknown-request"),
            ("{\"v\":3,\"do\":\"stat\"}", "version"),
        ] {
            stream.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
            let answer = line(&mut stream);
            assert!(answer.contains(&format!("\"code\":\"{code}\"")), "{answer}");
        }
        // Two at once, cut anywhere, are two.
        let two = [Request::Identify.line(), Request::Identify.line()].concat();
        for piece in two.as_bytes().chunks(7) {
            stream.get_mut().write_all(piece).unwrap();
        }
        assert!(line(&mut stream).contains("\"ok\"") && line(&mut stream).contains("\"ok\""));
        stream.get_mut().write_all(&[b'x'; wire::MAX_REQUEST + 100]).unwrap();
        let answer = line(&mut stream);
        assert!(answer.contains("too-long"), "{answer}");
        // The rest of what was sent is not read, so the end may come as a reset.
        assert!(!matches!(stream.read_line(&mut String::new()), Ok(1..)));
    }

    #[test]
    fn clients_are_bounded() {
        let place = open();
        let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| Connection::open(&place.folder, "db").unwrap()).collect();
        clients.iter_mut().for_each(|client| _ = client.identify().unwrap());
        let one_more = Connection::open(&place.folder, "db").and_then(|mut client| client.identify()).unwrap_err().to_string();
        assert!(one_more.contains("clients are connected already"), "{one_more}");
        drop(clients);
        for _ in 0..5000 {
            if Connection::open(&place.folder, "db").and_then(|mut client| client.identify()).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("nobody gets in any more");
    }
}
