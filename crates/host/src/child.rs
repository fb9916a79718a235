//! A `twinstep` as a child, as the demo and the benchmark have it: started, listened to, ended.
//!
//! *In*: a program and its arguments; lines for its guest's console. *Out*: its events (JSON lines on its standard error) and its guest's console (standard
//! output), each line with the moment it came. *Invariant*: a child never outlives its parent.
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::events::Event;

/// The processes that run now.
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<u32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until a switch listens: then it has made its socket. It has nothing else to say, so the file is what is waited for.
///
/// # Errors
/// If it takes longer than `patience`.
pub fn wait_for_switch(socket: &Path, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !socket.exists() {
        if Instant::now() > deadline {
            return Err(Error::new(format!("the switch does not listen on {}", socket.display())));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Ends all of them, so that whoever waits for one of them waits no more. Says whether there were any.
pub fn end_all() -> bool {
    let running = running();
    for &process in running.iter() {
        // SAFETY: a signal to a child that was not waited for: it is taken off the list first.
        unsafe { libc::kill(process as libc::pid_t, libc::SIGKILL) };
    }
    !running.is_empty()
}

/// What a process said.
enum Said {
    Event(Event),
    /// Its guest's console showed this line then.
    Console(Instant, String),
}

/// A running process.
pub struct Process {
    name: String,
    child: Child,
    keyboard: Option<ChildStdin>,
    heard: Receiver<Said>,
    /// All events so far, in order.
    pub events: Vec<Event>,
    /// What its guest's console has shown: lines, and when each was complete.
    pub console: Vec<(Instant, String)>,
    /// What it said that is no event: complaints.
    complaints: Arc<Mutex<Vec<String>>>,
}

impl Process {
    /// Starts this very program with such arguments, without a keyboard.
    pub fn start(name: &str, arguments: &[&str]) -> Result<Self> {
        let program = std::env::current_exe().what("cannot find the program itself")?;
        let mut command = Command::new(program);
        command.args(arguments);
        Self::start_command(name, command, false)
    }

    /// Starts a program with such arguments and these variables; with a keyboard, if lines are to be typed.
    pub fn start_program(
        program: &Path,
        name: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
        keyboard: bool,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments).envs(environment.iter().copied());
        Self::start_command(name, command, keyboard)
    }

    fn start_command(name: &str, mut command: Command, keyboard: bool) -> Result<Self> {
        let stdin = if keyboard { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: prctl is async-signal-safe; it asks the kernel to end the process with this one.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut child = command.spawn().what(format!("cannot start the {name}"))?;
        running().push(child.id());
        let (to, heard) = channel();
        let complaints = Arc::new(Mutex::new(Vec::new()));
        let stdout = child.stdout.take().expect("piped");
        let stderr = child.stderr.take().expect("piped");
        listen(stdout, to.clone(), |line| Some(Said::Console(Instant::now(), line)))?;
        let aside = complaints.clone();
        listen(stderr, to, move |line| match serde_json::from_str(&line) {
            Ok(event) => Some(Said::Event(event)),
            Err(_) => {
                aside.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                None
            }
        })?;
        let keyboard = child.stdin.take();
        Ok(Self { name: name.to_owned(), child, keyboard, heard, events: Vec::new(), console: Vec::new(), complaints })
    }

    fn hear(&mut self, deadline: Instant) -> std::result::Result<(), RecvTimeoutError> {
        match self.heard.recv_timeout(deadline.saturating_duration_since(Instant::now()))? {
            Said::Event(event) => self.events.push(event),
            Said::Console(at, line) => self.console.push((at, line)),
        }
        Ok(())
    }

    /// Waits until `found` finds something in what it has said; `what` it is, for people.
    pub fn wait_until<T>(&mut self, what: &str, patience: Duration, found: impl Fn(&Self) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = found(self) {
                return Ok(found);
            }
            if let Err(e) = self.hear(deadline) {
                let last: Vec<&str> = self.console.iter().rev().take(5).rev().map(|(_, line)| line.as_str()).collect();
                let said = self.complaints.lock().unwrap_or_else(PoisonError::into_inner).join("\n");
                let why = match e {
                    RecvTimeoutError::Timeout => format!("did not get to '{what}' within {} s", patience.as_secs()),
                    RecvTimeoutError::Disconnected => format!("ended before '{what}'"),
                };
                return Err(Error::new(format!("the {} {why}; it said: {said}; console: {}", self.name, last.join(" | "))));
            }
        }
    }

    /// Waits for the first event of a kind.
    pub fn wait_for(&mut self, what: &str, patience: Duration) -> Result<Event> {
        self.wait_until(what, patience, |process| process.event(what).cloned())
    }
    /// Waits for text on the guest's console.
    pub fn wait_for_console(&mut self, text: &str, patience: Duration) -> Result<()> {
        self.wait_until(text, patience, |process| process.console.iter().any(|(_, line)| line.contains(text)).then_some(()))
    }
    /// Waits for an event of a kind after the first `before` of that kind.
    pub fn wait_for_next(&mut self, what: &str, before: usize, patience: Duration) -> Result<Event> {
        self.wait_until(what, patience, |process| process.events.iter().filter(|e| e.what == what).nth(before).cloned())
    }
    /// Events of a kind heard so far.
    pub fn count(&mut self, what: &str) -> usize {
        self.catch_up();
        self.events.iter().filter(|e| e.what == what).count()
    }
    /// Types a line on its guest's console.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let keyboard = self.keyboard.as_mut().ok_or_else(|| Error::new(format!("the {} has no keyboard", self.name)))?;
        keyboard.write_all(format!("{line}\n").as_bytes()).what(format!("the {} takes no input any more", self.name))
    }
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
    /// The first event of a kind heard so far.
    pub fn event(&self, what: &str) -> Option<&Event> {
        self.events.iter().find(|e| e.what == what)
    }
    /// The last event of a kind heard so far.
    pub fn event_last(&self, what: &str) -> Option<&Event> {
        self.events.iter().rfind(|e| e.what == what)
    }
    /// Takes in what was said up to now, or, of a process that has ended, all of it.
    pub fn catch_up(&mut self) {
        while self.hear(Instant::now()).is_ok() {}
    }
    /// Kills it at once (SIGKILL), as a host that loses power.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().what(format!("cannot kill the {}", self.name))?;
        self.forget();
        self.child.wait().what(format!("cannot wait for the {}", self.name))?;
        Ok(())
    }
    /// Stops it for a while (SIGSTOP), or lets it go on (SIGCONT).
    pub fn stall(&self, stop: bool) {
        let signal = if stop { libc::SIGSTOP } else { libc::SIGCONT };
        // SAFETY: a signal to our own child, which was not waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }
    /// Tells it to end in good order and waits; then what it said last is there as well.
    pub fn end(&mut self, patience: Duration) -> Result<()> {
        // SAFETY: a signal to our own child, which was not waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        self.wait_end(patience)
    }
    /// Waits for its end.
    pub fn wait_end(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        // Both pipes close when it has ended.
        loop {
            match self.hear(deadline) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::new(format!("the {} does not end", self.name)));
                }
            }
        }
        self.forget();
        self.child.wait().what(format!("cannot wait for the {}", self.name))?;
        Ok(())
    }

    /// It is about to be waited for: its number may be another's afterwards.
    fn forget(&self) {
        running().retain(|process| *process != self.child.id());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        self.forget();
        let _ = self.child.wait();
    }
}

fn listen<R: Read + Send + 'static>(
    from: R,
    to: Sender<Said>,
    mut meaning: impl FnMut(String) -> Option<Said> + Send + 'static,
) -> Result<()> {
    let read = move || {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if let Some(said) = meaning(text)
                && to.send(said).is_err()
            {
                return;
            }
        }
    };
    std::thread::Builder::new().name("listen".into()).spawn(read).what("cannot start a thread")?;
    Ok(())
}
