//! Who runs the workloads. *In*: names and programs people choose. *Out*: command lines. *Invariant*: all guests get the same kernel, initramfs,
//! kernel command line and RAM, and one processor; the native run uses the very files of the initramfs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use twinstep_host::{Error, Result};

use crate::host;

/// The peer's program.
pub const QEMU: &str = "qemu-system-x86_64";

/// The engines one can choose, in the order in which they take turns.
pub const NAMES: [&str; 6] = ["native", "twinstep", "record", "replay", "qemu", "qemu-record"];

/// What the kernel is told. A guest that panics resets at once, which ends the run.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// How a Twinstep runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `run`
    Plain,
    /// `run --record`
    Record,
    /// `replay` of what was just recorded
    Replay,
}

/// One build of Twinstep with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    /// What it is called in the table; empty for the first.
    pub label: String,
    /// The program.
    pub program: PathBuf,
    /// Variables for it.
    pub variables: Vec<(String, String)>,
    /// Words that follow `run`.
    pub words: Vec<String>,
    /// Words that follow `replay`.
    pub replay_words: Vec<String>,
}

impl Family {
    /// A program as it is.
    #[must_use]
    pub fn plain(label: &str, program: &Path) -> Self {
        let (label, program) = (label.to_owned(), program.to_owned());
        Self { label, program, variables: Vec::new(), words: Vec::new(), replay_words: Vec::new() }
    }

    /// A variant: `NAME=[VARIABLE=VALUE ...] [ARGUMENT ...] [-- ARGUMENT-OF-REPLAY ...]`, split at blanks.
    pub fn variant(text: &str, program: &Path) -> Result<Self> {
        let (label, rest) = text.split_once('=').filter(|(label, _)| plain_name(label)).ok_or_else(|| {
            Error::new(format!("--variant {text}: not a NAME='ARGUMENTS'"))
                .next("write, for example, --variant small='--some-flag 7' or --variant loud='TWINSTEP_LOG=debug'")
        })?;
        let mut family = Self::plain(label, program);
        let mut words = rest.split_whitespace();
        for word in words.by_ref().take_while(|w| *w != "--") {
            match word.split_once('=') {
                Some((name, value)) if family.words.is_empty() && !name.starts_with('-') => {
                    family.variables.push((name.to_owned(), value.to_owned()));
                }
                _ => family.words.push(word.to_owned()),
            }
        }
        family.replay_words = words.map(str::to_owned).collect();
        Ok(family)
    }

    /// What its runs in this mode are called.
    #[must_use]
    pub fn name(&self, mode: Mode) -> String {
        let word = match mode {
            Mode::Plain => "twinstep",
            Mode::Record => "record",
            Mode::Replay => "replay",
        };
        match (self.label.as_str(), mode) {
            ("", _) => word.to_owned(),
            (label, Mode::Plain) => label.to_owned(),
            (label, _) => format!("{label}-{word}"),
        }
    }
}

fn plain_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') && !NAMES.contains(&name)
}

/// What an engine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The programs on this host's kernel, in a folder of their own.
    Native,
    /// Twinstep.
    Twinstep(Family, Mode),
    /// QEMU's translator.
    Qemu,
    /// The same, recording: what it offers for deterministic execution.
    QemuRecord,
}

/// Someone who runs the workloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// Its name in tables and files.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

/// The engines called `wanted` (all, if there are none); each family runs in the modes wanted. QEMU is left out where it is not installed, unless asked for.
pub fn choose(wanted: &[String], families: &[Family]) -> Result<Vec<Engine>> {
    if let Some(unknown) = wanted.iter().find(|w| !NAMES.contains(&w.as_str())) {
        return Err(Error::new(format!("there is no engine called {unknown}"))
            .next(format!("choose among {}; for more, see --variant and --against", NAMES.join(", "))));
    }
    let asked = |name: &str| wanted.iter().any(|w| w == name);
    let qemu = host::in_path(QEMU);
    if !qemu && (asked("qemu") || asked("qemu-record")) {
        return Err(Error::new(format!("{QEMU} is not installed"))
            .next("install the package qemu-system-x86, or leave the engines qemu and qemu-record out"));
    }
    // A replay needs something to replay.
    let on = |name: &str| wanted.is_empty() || asked(name) || name == "record" && asked("replay");
    let mut engines = Vec::new();
    let mut add = |name: String, kind: Kind| engines.push(Engine { name, kind });
    if on("native") {
        check_native()?;
        add("native".into(), Kind::Native);
    }
    // The same mode of all families one after the other: these are the columns that will be compared.
    for (mode, name) in [(Mode::Plain, "twinstep"), (Mode::Record, "record"), (Mode::Replay, "replay")] {
        for family in families.iter().filter(|_| on(name)) {
            add(family.name(mode), Kind::Twinstep(family.clone(), mode));
        }
    }
    if qemu && on("qemu") {
        add("qemu".into(), Kind::Qemu);
    }
    if qemu && on("qemu-record") {
        add("qemu-record".into(), Kind::QemuRecord);
    }
    Ok(engines)
}

/// The native run has namespaces of its own, so that nothing stays mounted or running afterwards.
fn namespaces() -> Vec<&'static str> {
    let mut words = vec!["unshare"];
    if !rustix::process::geteuid().is_root() {
        words.extend(["--user", "--map-root-user"]);
    }
    words.extend(["--mount", "--pid", "--fork", "--kill-child"]);
    words
}

/// Whether this host lets us run natively.
pub fn check_native() -> Result<()> {
    let words = namespaces();
    let output = std::process::Command::new(words[0]).args(&words[1..]).arg("true").output();
    let why = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(e) => e.to_string(),
    };
    Err(Error::new("cannot run programs natively in a folder of their own: no namespaces").because(why).next(
        "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, or the container's settings), install util-linux, \
         or leave the engine native out",
    ))
}

/// What a run needs to know.
#[derive(Debug, Clone)]
pub struct Setting<'a> {
    /// The bzImage.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initrd: &'a Path,
    /// The same files as a folder.
    pub root: &'a Path,
    /// The guest's RAM.
    pub ram_mib: u64,
    /// Where recordings go.
    pub recordings: PathBuf,
}

/// A command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// Variables.
    pub variables: Vec<(String, String)>,
    /// Program and arguments.
    pub words: Vec<OsString>,
}

impl Engine {
    /// Whether it repeats what another one recorded.
    #[must_use]
    pub fn is_replay(&self) -> bool {
        matches!(self.kind, Kind::Twinstep(_, Mode::Replay))
    }

    /// The file that this engine records to or replays.
    #[must_use]
    pub fn recording(&self, folder: &Path) -> Option<PathBuf> {
        match &self.kind {
            Kind::Twinstep(family, Mode::Record | Mode::Replay) => {
                Some(folder.join(format!("{}.rec", family.name(Mode::Record))))
            }
            Kind::QemuRecord => Some(folder.join("qemu.rec")),
            _ => None,
        }
    }

    /// How it is started.
    #[must_use]
    pub fn command(&self, setting: &Setting) -> CommandLine {
        let mut line = CommandLine::default();
        let recording = self.recording(&setting.recordings).unwrap_or_default();
        match &self.kind {
            Kind::Native => {
                line.add(&namespaces()).add(&["sh", "-c"]);
                line.add(&["mount --rbind /dev \"$1/dev\" && mount -t tmpfs tmpfs \"$1/tmp\" && \
                            { mount -t proc proc \"$1/proc\" || mount --rbind /proc \"$1/proc\"; } && \
                            PATH=$PATH:/usr/sbin:/sbin exec chroot \"$1\" /bin/sh /bench/suite.sh"]);
                line.add(&["sh"]).path(setting.root);
            }
            Kind::Twinstep(family, mode) => {
                line.variables.clone_from(&family.variables);
                line.path(&family.program);
                if *mode == Mode::Replay {
                    line.add(&["replay"]).path(&recording).add(&["--console"]).add(&family.replay_words);
                    return line;
                }
                line.add(&["run", "--quiet", "--mem", &format!("{}M", setting.ram_mib), "--cmdline", CMDLINE]);
                line.add(&["--kernel"]).path(setting.kernel).add(&["--initrd"]).path(setting.initrd);
                if *mode == Mode::Record {
                    line.add(&["--record"]).path(&recording);
                }
                line.add(&family.words);
            }
            Kind::Qemu | Kind::QemuRecord => {
                line.add(&[QEMU, "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", &setting.ram_mib.to_string()]);
                line.add(&["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-net", "none"]);
                line.add(&["-kernel"]).path(setting.kernel).add(&["-initrd"]).path(setting.initrd).add(&["-append", CMDLINE]);
                if self.kind == Kind::QemuRecord {
                    line.add(&["-icount"]).words.push(format!("shift=auto,rr=record,rrfile={}", recording.display()).into());
                }
            }
        }
        line
    }
}

impl CommandLine {
    fn add(&mut self, words: &[impl AsRef<str>]) -> &mut Self {
        self.words.extend(words.iter().map(|w| OsString::from(w.as_ref())));
        self
    }

    fn path(&mut self, path: &Path) -> &mut Self {
        self.words.push(path.into());
        self
    }

    /// As a person would type it (for reading; nothing is quoted).
    #[must_use]
    pub fn shown(&self) -> String {
        let variables = self.variables.iter().map(|(name, value)| format!("{name}={value}"));
        variables.chain(self.words.iter().map(|w| w.to_string_lossy().into_owned())).collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn family(label: &str) -> Family {
        Family::plain(label, Path::new("/t"))
    }

    #[test]
    fn variants_are_data() {
        let v = Family::variant("plain=A=1 --x=2 B=3 -- --y 4", Path::new("/t")).unwrap();
        assert_eq!(v.variables, [("A".to_owned(), "1".to_owned())]);
        assert_eq!((v.words.join(" "), v.replay_words.join(" ")), ("--x=2 B=3".into(), "--y 4".into()));
        assert_eq!((v.name(Mode::Plain), v.name(Mode::Replay)), ("plain".into(), "plain-replay".into()));
        for wrong in ["x", "=--x", "a b=--x", "native=--x"] {
            assert!(Family::variant(wrong, Path::new("/t")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn engines_are_chosen_by_name_for_every_family() {
        let names = |wanted: &[&str]| {
            let wanted: Vec<_> = wanted.iter().map(|&w| w.to_owned()).collect();
            choose(&wanted, &[family(""), family("b")]).map(|e| e.into_iter().map(|e| e.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["replay"]).unwrap(), ["record", "b-record", "replay", "b-replay"]);
        assert_eq!(names(&["twinstep"]).unwrap(), ["twinstep", "b"]);
        assert!(names(&["bochs"]).unwrap_err().to_string().contains("choose among native"));
    }

    #[test]
    fn a_replay_reads_what_the_record_wrote() {
        let setting = Setting {
            kernel: Path::new("k"),
            initrd: Path::new("i"),
            root: Path::new("r"),
            ram_mib: 512,
            recordings: "/rec".into(),
        };
        let line = |mode| Engine { name: String::new(), kind: Kind::Twinstep(family("b"), mode) }.command(&setting).shown();
        assert!(line(Mode::Record).ends_with("--kernel k --initrd i --record /rec/b-record.rec"), "{}", line(Mode::Record));
        assert_eq!(line(Mode::Replay), "/t replay /rec/b-record.rec --console");
    }
}
