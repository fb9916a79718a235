//! The other end of the control socket: a program that asks a VM of the same user.
//!
//! *In*: a VM's name, requests. *Out*: answers, or an error a person can act on. *Invariant*: a VM that does not answer is waited for with patience that
//! ends, and of what it sends no more is read than a response may have.
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use twinstep_machine::faults::Bit;

use super::folder;
use super::wire::{self, Begun, Flipped, History, Identity, Overridden, Request, Stat, Status};
use crate::error::{Error, Result};
use crate::events::Kept;

/// How long a VM may take to answer; longer than it gives its machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same where several are asked and one that hangs is not to hide the others.
const SHORT_PATIENCE: Duration = Duration::from_secs(2);

/// What to do where no VM runs.
const START: &str = "start one with `twinstep run`; this sees VMs of the same user only";

/// A connection to a VM.
#[derive(Debug)]
pub struct Connection {
    name: String,
    stream: BufReader<UnixStream>,
}

impl Connection {
    /// Connects to the VM called `name`.
    pub fn open(folder: &Path, name: &str) -> Result<Self> {
        Self::open_with(folder, name, PATIENCE)
    }
    /// The same, for one VM of several: whoever hangs is given up sooner.
    pub fn open_one_of_several(folder: &Path, name: &str) -> Result<Self> {
        Self::open_with(folder, name, SHORT_PATIENCE)
    }
    fn open_with(folder: &Path, name: &str, patience: Duration) -> Result<Self> {
        let path = folder::socket_of(folder, name)?;
        let fail = |e: std::io::Error| Error::new(format!("cannot reach the VM '{name}' at {}", path.display())).because(e);
        folder::is_there(folder)?;
        let stream = match UnixStream::connect(&path) {
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                let names: Vec<_> = folder::running(folder)?.into_iter().map(|(name, _)| name).collect();
                let what = format!("no VM called '{name}' runs here (looked in {})", folder.display());
                return Err(Error::new(what).next(match &names[..] {
                    [] => START.to_owned(),
                    names => format!("name one of these: {}", names.join(", ")),
                }));
            }
            other => other.map_err(fail)?,
        };
        stream.set_read_timeout(Some(patience)).map_err(fail)?;
        stream.set_write_timeout(Some(patience)).map_err(fail)?;
        Ok(Self { name: name.to_owned(), stream: BufReader::new(stream) })
    }
    /// Connects to the VM called `name`, or without a name to the only one there is.
    pub fn open_named(folder: &Path, name: Option<&str>) -> Result<Self> {
        name.map_or_else(|| Self::open_only(folder), |name| Self::open(folder, name))
    }
    /// Connects to the only VM there is. An error if there is none, or more than one, which are then named.
    pub fn open_only(folder: &Path) -> Result<Self> {
        let there = folder::running(folder)?;
        match &there[..] {
            [] => Err(Error::new(format!("no VM runs here (looked in {})", folder.display())).next(START)),
            [(name, _)] => Self::open(folder, name),
            several => {
                // One that ends while it is asked is not worth an error.
                let about = |name: &str| Self::open(folder, name).and_then(|mut c| c.identify());
                let lines = several.iter().map(|(name, _)| match about(name) {
                    Ok(id) => format!("\n  {name}  (process {}, {})", id.pid, id.side),
                    Err(_) => format!("\n  {name}"),
                });
                Err(Error::new(format!("several VMs run here:{}", lines.collect::<String>())).next("name one of them"))
            }
        }
    }

    /// Who is there.
    pub fn identify(&mut self) -> Result<Identity> {
        self.request(Request::Identify)
    }
    /// What the machine did so far.
    pub fn stat(&mut self) -> Result<Stat> {
        self.request(Request::Stat)
    }

    /// How its pair does.
    pub fn status(&mut self) -> Result<Status> {
        self.request(Request::Status)
    }
    /// What happened so far.
    pub fn events(&mut self) -> Result<Vec<Kept>> {
        Ok(self.request::<History>(Request::Events)?.events)
    }

    /// Has the standby go live.
    pub fn fail_over(&mut self) -> Result<Begun> {
        self.request(Request::FailOver)
    }
    /// Decides in place of an arbiter that cannot be reached.
    pub fn override_arbiter(&mut self) -> Result<Overridden> {
        self.request(Request::Override)
    }
    /// Flips a bit of the machine.
    pub fn flip(&mut self, bit: Bit) -> Result<Flipped> {
        self.request(Request::FlipBit(bit))
    }

    fn request<T: for<'a> Deserialize<'a>>(&mut self, request: Request) -> Result<T> {
        let name = &self.name;
        let lost = |e: std::io::Error| match e.kind() {
            ErrorKind::WouldBlock => Error::new(format!("the VM '{name}' does not answer")).next("ask again later"),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => {
                Error::new(format!("the VM '{name}' has closed the connection")).next("see whether it still runs")
            }
            _ => Error::new(format!("the connection to the VM '{name}' failed")).because(e),
        };
        let sent = self.stream.get_mut().write_all(request.line().as_bytes());
        let mut line = Vec::new();
        // A server that refuses the connection says why, whatever it was sent.
        let read = (&mut self.stream).take(wire::MAX_RESPONSE as u64).read_until(b'\n', &mut line);
        match (read, sent) {
            (Ok(1..), _) if line.ends_with(b"\n") => {}
            (Ok(_), Err(e)) | (Err(e), _) => return Err(lost(e)),
            (Ok(_), Ok(())) => return Err(lost(ErrorKind::UnexpectedEof.into())),
        }
        match wire::parse_response(&line) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(refusal)) => Err(Error::new(format!("the VM '{name}' says: {}", refusal.text))),
            Err(why) => Err(Error::new(format!("the answer of the VM '{name}' cannot be understood: {why}"))
                .next("use the same build of twinstep as the VM does")),
        }
    }
}
