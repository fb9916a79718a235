//! What the end-to-end tests share: guests, and `twinstep` as a process that is watched.
//!
//! *In*: arguments, as a user types them. *Out*: what the process prints, and its exit status. *Invariants*: nothing is timed: a test waits for what is
//! printed, with patience for a busy machine; no process outlives its test; a process that panics fails its test, whatever else it did.

// Each test program uses its part of this.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use twinstep_host::guest::{self, Kind, Network};
use twinstep_host::packages::{KernelLine, Store, tell_on_stderr};

/// Bytes that nobody can guess from those before, other ones for each number.
pub fn content(number: u64, len: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// How long anything may take; what is waited for comes in seconds on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Guests that run at a time, over all tests of a program. More would only wait for each other.
const GUESTS: usize = 2;

/// A kernel and an initramfs, as arguments.
#[derive(Debug, Clone)]
pub struct Image {
    /// The bzImage.
    pub kernel: String,
    /// The initramfs.
    pub initrd: String,
}

/// The stable kernel with a shell. Built once.
pub fn guest() -> &'static Image {
    static GUEST: OnceLock<Image> = OnceLock::new();
    GUEST.get_or_init(|| stable(Kind::Shell))
}

/// The same with Redis in it. Built once.
pub fn redis_guest() -> &'static Image {
    static GUEST: OnceLock<Image> = OnceLock::new();
    GUEST.get_or_init(|| stable(Kind::Redis))
}

fn stable(kind: Kind) -> Image {
    build(kind, KernelLine::Stable).expect("the guest is built from Debian packages; is the mirror in reach?")
}

/// Builds a guest. Test programs may do so at the same time: the files appear by rename, and they have equal bytes.
pub fn build(kind: Kind, line: KernelLine) -> twinstep_host::error::Result<Image> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("guest-{kind:?}-{line:?}"));
    let draft = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for the draft");
    let (kernel, initrd) = guest::build_into(draft.path(), &Store::open()?, kind, line, &mut tell_on_stderr)?;
    std::fs::create_dir_all(&folder).expect("a folder for the guest");
    let place = |file: PathBuf| {
        let to = folder.join(file.file_name().expect("a file has a name"));
        std::fs::rename(&file, &to).expect("moving a file inside a file system");
        text(&to)
    };
    Ok(Image { kernel: place(kernel), initrd: place(initrd) })
}

/// The arguments that boot the guest with this much RAM to do this (see init.sh).
pub fn boot(mem: &str, run: &str) -> Vec<String> {
    boot_image(guest(), mem, &guest::command_line(run, None))
}

/// The same with Redis and the network of the demo.
pub fn boot_with_network(mem: &str, run: &str, net: &str) -> Vec<String> {
    let mut arguments = boot_image(redis_guest(), mem, &guest::command_line(run, Some(&Network::default())));
    arguments.extend(["--net".to_owned(), net.to_owned()]);
    arguments
}

/// The same with any image and command line.
pub fn boot_image(image: &Image, mem: &str, cmdline: &str) -> Vec<String> {
    words(&["--kernel", &image.kernel, "--initrd", &image.initrd, "--mem", mem, "--cmdline", cmdline])
}

/// Arguments, owned.
pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// A path as an argument.
pub fn text(path: &Path) -> String {
    path.to_str().expect("temporary folders have plain names").to_owned()
}

/// A folder that goes away with its test.
pub fn folder() -> TempDir {
    tempfile::Builder::new().prefix("twinstep-e2e-").tempdir().expect("a temporary folder")
}

/// A user of their own: the folder of their VMs' control sockets.
pub struct User(TempDir);

impl User {
    pub fn new() -> Self {
        Self(folder())
    }
    /// The runtime folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
    /// Starts `twinstep NAME ARGUMENTS...`.
    pub fn start(&self, name: &str, arguments: &[&[String]]) -> Twinstep {
        let arguments = [&words(&[name])[..], &arguments.concat()].concat();
        Twinstep::start_with(name, &arguments, &[("XDG_RUNTIME_DIR", &text(self.path()))])
    }
    /// Runs it to its end.
    pub fn ask(&self, name: &str, arguments: &[&str]) -> Ended {
        self.start(name, &[&words(arguments)]).end()
    }
    /// What `status` says of a VM, with all its events.
    pub fn status(&self, name: &str) -> serde_json::Value {
        self.ask("status", &[name, "--json", "--events", "1000"]).with(0).json()
    }
    /// Asks again until it is so: some figures are published ten times a second and not at once.
    pub fn status_with(&self, name: &str, what: &str, so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status(name);
            if so(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{name} does not come to {what}: {status}");
        }
    }
}

/// What a third host says of what the two sides made, once the standby has recorded what led to it; and its exit status.
pub fn vote(user: &User, standby: &Twinstep, says: &str, status: i32) {
    let window = standby.wait_said("are recorded: `twinstep vote ");
    let path = window.split_once('`').expect("the command ends").0;
    let vote = user.ask("vote", &[path, "--json"]).with(status).json();
    assert_eq!(vote["verdict"], says, "{vote}");
    user.ask("vote", &[path]).with(status).shows(says).shows("bytes at the serial port");
}

/// Leave to run so many guests at once.
pub struct Turn(usize);

static TURNS: (Mutex<usize>, Condvar) = (Mutex::new(GUESTS), Condvar::new());

/// Waits for leave to run so many guests at once. To be asked for once in a test, and before anything is waited for.
pub fn turn(guests: usize) -> Turn {
    assert!(guests <= GUESTS, "it would wait for ever");
    let free = TURNS.0.lock().unwrap_or_else(PoisonError::into_inner);
    let mut free = TURNS.1.wait_while(free, |free| *free < guests).unwrap_or_else(PoisonError::into_inner);
    *free -= guests;
    Turn(guests)
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TURNS.0.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        TURNS.1.notify_all();
    }
}

/// What a process has printed so far.
#[derive(Default)]
struct Printed {
    /// Standard output and standard error.
    streams: [Vec<u8>; 2],
    closed: usize,
}

/// Which of a process's outputs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

/// A running `twinstep`.
pub struct Twinstep {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    printed: Arc<(Mutex<Printed>, Condvar)>,
}

/// A `twinstep` that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// Standard output: the guest's console.
    pub console: String,
    /// Standard error: events and complaints.
    pub said: String,
}

impl Ended {
    /// It ended with this status.
    #[track_caller]
    pub fn with(self, status: i32) -> Self {
        assert_eq!(self.status, Some(status), "the exit status; {self:#?}");
        self
    }
    /// It ended with an error that names all this and says what to do.
    #[track_caller]
    pub fn refused(self, named: &[&str]) -> Self {
        assert!(matches!(self.status, Some(1 | 2)), "an error has status 1, a wrong command line 2; {self:#?}");
        self.says(named)
    }
    /// It said all this on standard error.
    #[track_caller]
    pub fn says(self, named: &[&str]) -> Self {
        for name in named {
            assert!(self.said.contains(name), "'{name}' is not said; {self:#?}");
        }
        self
    }
    /// The guest showed this on its console.
    #[track_caller]
    pub fn shows(self, what: &str) -> Self {
        assert!(self.console.contains(what), "'{what}' is not shown; {self:#?}");
        self
    }
    /// Its output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.console).unwrap_or_else(|e| panic!("this is no JSON: {e}; {self:#?}"))
    }
}

/// Runs `twinstep` to its end.
#[track_caller]
pub fn twinstep(arguments: &[&str]) -> Ended {
    let process = Twinstep::start(arguments[0], &words(arguments));
    process.end()
}

impl Twinstep {
    /// Starts `twinstep ARGUMENTS`.
    pub fn start(name: &str, arguments: &[String]) -> Self {
        Self::start_with(name, arguments, &[])
    }

    /// The same with more in its environment.
    pub fn start_with(name: &str, arguments: &[String], environment: &[(&str, &str)]) -> Self {
        Self::start_program(env!("CARGO_BIN_EXE_twinstep"), name, arguments, environment)
    }

    /// The same with another program, which becomes `twinstep`.
    pub fn start_program(program: &str, name: &str, arguments: &[String], environment: &[(&str, &str)]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("twinstep starts");
        let printed = Arc::new((Mutex::new(Printed::default()), Condvar::new()));
        listen(child.stdout.take().expect("piped"), Stream::Out, printed.clone());
        listen(child.stderr.take().expect("piped"), Stream::Err, printed.clone());
        Self { name: name.to_owned(), input: child.stdin.take(), child, printed }
    }

    /// Starts `twinstep run ARGUMENTS...`.
    pub fn run(arguments: &[&[String]]) -> Self {
        Self::start("run", &[&words(&["run"])[..], &arguments.concat()].concat())
    }

    fn printed(&self) -> MutexGuard<'_, Printed> {
        self.printed.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything so far, for a failing test's report.
    fn transcript(&self) -> String {
        let printed = self.printed();
        let [out, err] = &printed.streams;
        // Kernels are talkative.
        let tail = |bytes: &[u8]| String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(6000)..]).into_owned();
        format!("--- {}: standard output\n{}\n--- {0}: standard error\n{}\n---", self.name, tail(out), tail(err))
    }

    /// Waits until `found` finds something in a stream.
    #[track_caller]
    fn wait<T>(&self, stream: Stream, what: &str, found: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut printed = self.printed();
        loop {
            if let Some(found) = found(&String::from_utf8_lossy(&printed.streams[stream as usize])) {
                return found;
            }
            let (ended, left) = (printed.closed == 2, deadline.saturating_duration_since(Instant::now()));
            if ended || left.is_zero() {
                drop(printed);
                let why = if ended { "ended before" } else { "did not come to" };
                panic!("{} {why} '{what}'\n{}", self.name, self.transcript());
            }
            printed = self.printed.1.wait_timeout(printed, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for text on the guest's console.
    #[track_caller]
    pub fn wait_console(&self, text: &str) {
        self.wait(Stream::Out, text, |printed| printed.contains(text).then_some(()));
    }

    /// Waits for text on standard error; gives the rest of its line.
    #[track_caller]
    pub fn wait_said(&self, text: &str) -> String {
        self.wait(Stream::Err, text, |printed| {
            let (_, rest) = printed.split_once(text)?;
            rest.split_once(['\r', '\n']).map(|(line, _)| line.to_owned())
        })
    }

    /// Waits until text has stood so often on standard error.
    #[track_caller]
    pub fn wait_said_times(&self, text: &str, times: usize) {
        self.wait(Stream::Err, text, |printed| (printed.matches(text).count() >= times).then_some(()));
    }

    /// Whether it has said this so far.
    pub fn has_said(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.printed().streams[Stream::Err as usize]).contains(text)
    }

    /// What it has said so far, but for so many bytes at the beginning.
    pub fn said_after(&self, bytes: usize) -> Vec<u8> {
        self.printed().streams[Stream::Err as usize].get(bytes..).unwrap_or_default().to_vec()
    }

    /// Whether it has ended, and how (nothing: by a signal).
    pub fn has_ended(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().expect("waiting for a child").map(|status| status.code())
    }

    /// Whether its guest has shown this so far.
    pub fn has_shown(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.printed().streams[Stream::Out as usize]).contains(text)
    }

    /// What its guest has shown so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.printed().streams[Stream::Out as usize]).into_owned()
    }

    /// Types a line on the guest's console.
    pub fn type_line(&mut self, line: &str) {
        let input = self.input.as_mut().expect("its input is open");
        input.write_all(format!("{line}\n").as_bytes()).expect("twinstep reads its input");
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("a signal to a child");
    }

    /// Kills it as a power failure does. What it had printed can still be looked at.
    pub fn kill(&mut self) {
        self.child.kill().expect("killing a child");
        self.child.wait().expect("waiting for a child");
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let mut printed = self.printed();
        while printed.closed < 2 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(printed);
                panic!("{} does not end\n{}", self.name, self.transcript());
            }
            printed = self.printed.1.wait_timeout(printed, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let [console, said] = printed.streams.each_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        drop(printed);
        let status = self.child.wait().expect("waiting for a child").code();
        let ended = Ended { status, console, said };
        assert!(!ended.said.contains("panicked"), "{} panicked; {ended:#?}", self.name);
        ended
    }
}

impl Drop for Twinstep {
    fn drop(&mut self) {
        // It may have ended already. SIGKILL ends a stopped process as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            assert!(!self.has_said("panicked"), "{} panicked\n{}", self.name, self.transcript());
        }
    }
}

fn listen(mut from: impl Read + Send + 'static, stream: Stream, to: Arc<(Mutex<Printed>, Condvar)>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let read = from.read(&mut buffer).unwrap_or(0);
            let mut printed = to.0.lock().unwrap_or_else(PoisonError::into_inner);
            printed.streams[stream as usize].extend(&buffer[..read]);
            printed.closed += usize::from(read == 0);
            to.1.notify_all();
            if read == 0 {
                return;
            }
        }
    });
}
