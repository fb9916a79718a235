//! One run of one engine, watched. *In*: a command line. *Out*: how long each workload took between its marks. *Invariant*: the time of a line is taken
//! by a thread that does nothing else; a guest that hangs, dies or talks nonsense ends as a problem in words, and nothing outlives the run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Serialize;
use twinstep_host::error::Context;
use twinstep_host::{Error, Result};

use crate::engine::CommandLine;
use crate::host::{self, Memory};
use crate::marks::{self, Mark};

/// A guest that says nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(180);

/// A workload's figures.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measure {
    /// Host time from the line that gave the turn to the line that said that it is done.
    pub seconds: f64,
    /// CPU time the whole machine used meanwhile.
    pub cpu_seconds: Option<f64>,
    /// The workload's exit status.
    pub status: i32,
    /// Digest of what it printed.
    pub digest: Option<String>,
    /// What it complained.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What a run came to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Run {
    /// From the start of the process to the guest's first line.
    pub init: Option<Measure>,
    /// By workload.
    pub measures: BTreeMap<String, Measure>,
    /// The process's memory after the last workload.
    pub memory: Option<Memory>,
    /// From start to end.
    pub seconds: f64,
    /// What went wrong with the run as a whole.
    pub problem: Option<String>,
}

/// How to watch.
#[derive(Debug)]
pub struct Watch {
    /// The processor to run on.
    pub cpu: Option<usize>,
    /// The guest's RAM; 0 if there is none (a native run).
    pub ram_mib: u64,
    /// Whether it does not take turns (a replay): its time begins when it says so.
    pub waits_for_nobody: bool,
    /// Where the console goes, each line with its time.
    pub console: PathBuf,
}

struct Line {
    at: Instant,
    text: Vec<u8>,
}

/// A child whose whole process group is killed when this is dropped. (`setsid` made it the first of its group.)
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // It may all be gone already.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

/// An engine that runs. It does one workload at a time, each when it is told to (a replay goes on by itself).
pub struct Session {
    group: Group,
    input: Option<ChildStdin>,
    waits_for_nobody: bool,
    lines: mpsc::Receiver<Line>,
    console: BufWriter<File>,
    errors: PathBuf,
    state: State,
}

impl Session {
    /// Starts an engine.
    pub fn start(line: &CommandLine, watch: &Watch) -> Result<Self> {
        let errors = watch.console.with_extension("err");
        let console = BufWriter::new(File::create(&watch.console).at("create", &watch.console)?);
        let mut command = command(line, watch.cpu);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(&errors).at("create", &errors)?);
        let start = Instant::now();
        let mut group = Group(command.spawn().map_err(|e| {
            Error::new(format!("cannot start {}", line.shown()))
                .because(e)
                .next("is util-linux (setsid, setpriv, taskset, unshare) installed?")
        })?);
        let (pid, input, stdout) = (group.0.id(), group.0.stdin.take(), group.0.stdout.take());
        let lines = listen(BufReader::new(stdout.ok_or_else(|| Error::new("the console is no pipe"))?));
        let state = State {
            pid,
            guest_kib: watch.ram_mib << 10,
            start,
            ready: None,
            turn: None,
            running: None,
            done: false,
            run: Run::default(),
        };
        Ok(Self { group, input, waits_for_nobody: watch.waits_for_nobody, lines, console, errors, state })
    }

    /// Lets it go on until it is ready for the next workload, whose name is returned; or to its end.
    pub fn go_on(&mut self) -> Option<String> {
        if self.state.ready.take().is_some()
            && let (Some(input), false) = (&mut self.input, self.waits_for_nobody)
        {
            // Taken before the line is sent: from here on, whoever is late, the time can only seem longer, never shorter.
            self.state.turn = Some((host::cpu_seconds(self.state.pid), Instant::now()));
            // One that does not read any more will be found at its end.
            let _ = input.write_all(b"\n").and_then(|()| input.flush());
        }
        while self.state.ready.is_none() && self.state.run.problem.is_none() {
            match self.lines.recv_timeout(SILENCE) {
                Ok(line) => {
                    let since = line.at.duration_since(self.state.start).as_secs_f64();
                    // A lost console file must not spoil the figures.
                    let _ = write!(self.console, "{since:.6} ").and_then(|()| self.console.write_all(&line.text));
                    if let Some(mark) = marks::parse(&line.text) {
                        self.state.mark(mark, line.at);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let doing = self.state.doing();
                    self.state.run.problem = Some(format!("said nothing for {} s {doing}; it was given up", SILENCE.as_secs()));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        self.state.ready.clone()
    }

    /// Lets it go on to its end, and says what it came to.
    pub fn finish(mut self) -> Result<Run> {
        while self.go_on().is_some() {}
        let doing = self.state.doing();
        let mut run = self.state.run;
        if run.problem.is_none() {
            let status = self.group.0.wait().what("cannot wait for the engine")?;
            if !status.success() {
                let said = std::fs::read_to_string(&self.errors).unwrap_or_default();
                run.problem = Some(format!("ended with {status} {doing}: {}", in_short(&said)));
            } else if !self.state.done {
                run.problem = Some(format!("ended {doing}, without a word"));
            }
        }
        run.seconds = self.state.start.elapsed().as_secs_f64();
        Ok(run)
    }
}

/// Makes its new session's scheduling group more important than the host's other ones, where that exists and is allowed. (With it, a process's own
/// priority counts only inside its session.)
const HURRY: &str = "{ echo -10 > /proc/self/autogroup; } 2> /dev/null; exec \"$@\"";

/// In a session of its own, on its processor.
fn command(line: &CommandLine, cpu: Option<usize>) -> Command {
    let mut command = Command::new("setsid");
    // When the benchmark is interrupted, what it has started goes with it.
    command.args(["sh", "-c", HURRY, "sh", "setpriv", "--pdeathsig", "KILL"]);
    if let Some(cpu) = cpu {
        command.arg("taskset").arg("-c").arg(cpu.to_string());
    }
    command.args(&line.words).envs(line.variables.iter().map(|(name, value)| (name, value)));
    command
}

/// Lines as they come, with their times.
fn listen(mut from: impl BufRead + Send + 'static) -> mpsc::Receiver<Line> {
    let (say, hear) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            let mut text = Vec::new();
            // The time of a line is that of its end.
            match from.read_until(b'\n', &mut text) {
                Ok(n) if n > 0 && say.send(Line { at: Instant::now(), text }).is_ok() => {}
                _ => break,
            }
        }
    });
    hear
}

struct State {
    pid: u32,
    guest_kib: u64,
    start: Instant,
    ready: Option<String>,
    turn: Option<(Option<f64>, Instant)>,
    running: Option<(String, Instant, Option<f64>)>,
    done: bool,
    run: Run,
}

impl State {
    fn mark(&mut self, mark: Mark, at: Instant) {
        let cpu = || host::cpu_seconds(self.pid);
        match mark {
            Mark::Init => {
                let seconds = at.duration_since(self.start).as_secs_f64();
                self.run.init = Some(Measure { seconds, cpu_seconds: cpu(), ..Measure::default() });
            }
            Mark::Ready(name) => self.ready = Some(name),
            Mark::Begin(name) => {
                let (before, since) = self.turn.take().unwrap_or_else(|| (cpu(), at));
                self.running = Some((name, since, before));
            }
            Mark::End(name, status) => {
                let now = cpu();
                if let Some((begun, since, before)) = self.running.take()
                    && begun == name
                {
                    let cpu_seconds = now.zip(before).map(|(now, before)| now - before);
                    let seconds = at.duration_since(since).as_secs_f64();
                    self.run.measures.insert(name, Measure { seconds, cpu_seconds, status, ..Measure::default() });
                }
                if self.guest_kib > 0 {
                    self.run.memory = host::memory(self.pid, self.guest_kib).or(self.run.memory);
                }
            }
            Mark::Digest(name, digest) => {
                if let Some(measure) = self.run.measures.get_mut(&name) {
                    measure.digest = Some(digest);
                }
            }
            Mark::Note(name, note) => {
                if let Some(measure) = self.run.measures.get_mut(&name) {
                    measure.notes.push(note);
                }
            }
            Mark::Done => self.done = true,
        }
    }

    /// Where it is, for messages.
    fn doing(&self) -> String {
        match (&self.running, self.done) {
            (Some((name, ..)), _) => format!("during {name}"),
            (None, true) => "while switching off".into(),
            (None, false) if self.run.measures.is_empty() => "before the first workload".into(),
            (None, false) => "between two workloads".into(),
        }
    }
}

/// What it said, in one line of bearable length.
fn in_short(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match words.chars().count() {
        0 => "it gave no reason".to_owned(),
        n if n > 400 => format!("... {}", words.chars().skip(n - 400).collect::<String>()),
        _ => words,
    }
}

/// Where a run's console is kept.
#[must_use]
pub fn console_file(folder: &Path, repetition: usize, engine: &str, image: &str) -> PathBuf {
    folder.join(format!("{repetition}-{engine}-{image}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, folder: &Path) -> Session {
        let line = CommandLine { variables: Vec::new(), words: ["sh", "-c", script].map(Into::into).to_vec() };
        Session::start(&line, &Watch { cpu: None, ram_mib: 0, waits_for_nobody: false, console: folder.join("c.log") }).unwrap()
    }

    fn run(script: &str) -> Run {
        let dir = tempfile::tempdir().unwrap();
        start(script, dir.path()).finish().unwrap()
    }

    #[test]
    fn a_whole_run() {
        let run = run("echo BENCH init; echo BENCH begin a; echo noise; echo BENCH end a 0; echo BENCH digest a 77; \
                       echo BENCH begin b; echo BENCH end b 3; echo BENCH note b it broke; echo BENCH done");
        assert_eq!(run.problem, None);
        assert!(run.init.is_some());
        assert_eq!(run.measures["a"].digest.as_deref(), Some("77"));
        assert_eq!((run.measures["b"].status, run.measures["b"].notes.join("")), (3, "it broke".into()));
    }

    #[test]
    fn a_workload_waits_for_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let mut session = start(
            "for w in a b; do echo BENCH ready $w; read turn; echo BENCH begin $w; echo BENCH end $w 0; done; echo BENCH done",
            dir.path(),
        );
        assert_eq!(session.go_on().as_deref(), Some("a"));
        assert!(session.state.run.measures.is_empty());
        assert_eq!(session.go_on().as_deref(), Some("b"));
        assert!(session.state.run.measures.contains_key("a"));
        let run = session.finish().unwrap();
        assert_eq!((run.problem, run.measures.len()), (None, 2));
    }

    #[test]
    fn ends_that_are_none_are_told_with_their_place() {
        assert!(run("echo BENCH begin a; echo why >&2; exit 3").problem.unwrap().contains("during a: why"));
        assert!(run("echo BENCH begin a; echo BENCH end a 0").problem.unwrap().contains("between two workloads, without a word"));
        let long = run("yes | head -n 1000 >&2; exit 1").problem.unwrap();
        assert!(long.len() < 500 && long.contains(": ... "), "{long}");
        assert!(run("true").problem.unwrap().contains("before the first workload"));
    }
}
