//! Hosts, each with one `twinstep`, and what those say of themselves.
//!
//! *In*: what a process prints. *Out*: which part it plays ([`Part`]), and the epochs it says it holds. *Invariant*: parts follow from the processes' own words alone,
//! in the order in which they were said.

use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::common::{Image, Twinstep, boot_image, text, words};
use crate::court::Court;
use crate::street::{self, GUEST, GUEST_MAC, HOSTS, namespace};
use crate::{namespaces, sys};

/// The VM's name.
pub const VM: &str = "storm";
/// How long a silent peer is believed to be alive at least, in milliseconds. Three times the default: whole hosts share two processors here.
const PEER_TIMEOUT: &str = "1000";
/// The guest's disk, and what a host has room for.
const DISK_BYTES: u64 = 96 << 20;
const ROOM: &str = "size=64m";
/// Where standbys listen.
const PORT: u16 = 7171;

/// What a process says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// It has not said anything yet, or nothing that matters.
    Begins,
    /// A standby without a primary.
    Waits,
    /// A standby that could not go live yet.
    Follows,
    /// A standby that may go live.
    Guards,
    /// It runs the VM, and has no standby that could.
    Alone,
    /// It runs the VM, and every output waits for a standby.
    Protected,
    /// It has lost its peer and asks the arbiter.
    Asks,
    /// It has stopped for good, or until the next primary comes.
    Stopped,
}

/// What a process has said so far.
#[derive(Debug, Default)]
struct Story {
    /// Bytes of it that are read.
    read: usize,
    part: Option<Part>,
    /// Epochs in which it said that it went on.
    epochs: Vec<u64>,
    /// How often it could not hear the arbiter.
    unheard: usize,
    /// How often it stopped since somebody else had the epoch.
    fenced: usize,
}

fn number_after(line: &str, words: &str) -> Option<u64> {
    let rest = line.split_once(words)?.1;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

impl Story {
    /// Reads on: whole lines only.
    fn hear(&mut self, said: &[u8]) {
        let Some(end) = said.iter().rposition(|byte| *byte == b'\n') else { return };
        self.read += end + 1;
        String::from_utf8_lossy(&said[..end]).lines().for_each(|line| self.line(line));
    }

    fn line(&mut self, line: &str) {
        let Some((_, what)) = line.split_once(" ms] ") else { return };
        let Some((what, text)) = what.split_once(": ") else { return };
        let part = match what {
            "listening" => Part::Waits,
            "accepted" => Part::Follows,
            "live" => Part::Alone,
            "alone" => Part::Alone,
            "protected" => Part::Protected,
            "stopped" => Part::Stopped,
            "notice" if text.contains(" -> following: protection has started") => Part::Guards,
            "notice" if text.contains(" -> deciding: ") => Part::Asks,
            "notice" if text.contains(" -> unprotected: ") => Part::Alone,
            "notice" if text.starts_with("the arbiter does not say") => return self.unheard += 1,
            _ => return,
        };
        self.part = Some(part);
        let went_on = match what {
            "live" => number_after(text, "live in epoch "),
            "alone" => number_after(text, "going on alone in epoch "),
            "stopped" => {
                self.fenced += usize::from(text.contains("the arbiter gave epoch"));
                None
            }
            _ => None,
        };
        // A standby that says goodbye leaves the primary in the epoch it has.
        self.epochs.extend(went_on.filter(|epoch| self.epochs.last() != Some(epoch)));
    }
}

/// A host.
pub struct Host {
    number: usize,
    /// A small file system of its own, with its disk image.
    room: PathBuf,
    /// Its certificate, its control sockets.
    folder: PathBuf,
    process: Option<Twinstep>,
    story: Story,
    /// Epochs of processes that are over.
    past: Vec<u64>,
    /// How often those were fenced.
    past_fenced: usize,
    /// What processes that are over have said.
    said_before: Vec<u8>,
}

impl Host {
    /// A host without a process.
    pub fn new(number: usize, storm: &Path) -> Self {
        let (room, folder) = (storm.join(format!("room-{number}")), storm.join(format!("host-{number}")));
        std::fs::create_dir(&room).expect("a folder");
        std::fs::create_dir(&folder).expect("a folder");
        namespaces::run("mount", &["-t", "tmpfs", "-o", ROOM, "tmpfs", &text(&room)]);
        Self {
            number,
            room,
            folder,
            process: None,
            story: Story::default(),
            past: Vec::new(),
            past_fenced: 0,
            said_before: Vec::new(),
        }
    }

    fn start(&mut self, command: &str, storm: &Path, court: &Court, more: &[String]) {
        assert!(self.process.is_none(), "{} runs one process at a time", self.name());
        let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let others: Vec<_> = (1..HOSTS).map(|n| format!("{}:{PORT}", street::address((self.number + n) % HOSTS))).collect();
        let disk = format!("{},format=raw", text(&self.image()));
        let common = words(&[
            &format!("--net={}", sys::path(&namespace(self.number))),
            "--",
            env!("CARGO_BIN_EXE_twinstep"),
            command,
            "--name",
            VM,
            "--tls",
            &text(&storm.join("pki").join(namespace(self.number))),
            "--arbiter",
            &court.spec(self.number),
            "--protect",
            &others.join(","),
            "--peer-timeout",
            PEER_TIMEOUT,
            "--net",
            &format!("tap=tap0,mac={mac}"),
            "--disk",
            &disk,
        ]);
        let environment = [("XDG_RUNTIME_DIR", &*text(&self.folder))];
        let process = Twinstep::start_program("nsenter", &self.name(), &[common, more.to_vec()].concat(), &environment);
        self.process = Some(process);
    }

    /// Starts the VM here.
    pub fn power_on(&mut self, storm: &Path, court: &Court, image: &Image) {
        std::fs::File::create(self.image()).and_then(|file| file.set_len(DISK_BYTES)).expect("a sparse image");
        let cmdline = format!("{} twinstep.ip={GUEST}/24", twinstep_host::guest::command_line("shell", None));
        self.start("run", storm, court, &boot_image(image, "128M", &cmdline));
    }

    /// Starts a standby here.
    pub fn stand_by(&mut self, storm: &Path, court: &Court) {
        let listen = format!("{}:{PORT}", street::address(self.number));
        let heartbeat = format!("{}:{PORT}", street::lan_address(self.number));
        self.start("standby", storm, court, &words(&["--listen", &listen, "--heartbeat", &heartbeat, "--expect-vm", VM]));
    }

    /// Its disk image.
    pub fn image(&self) -> PathBuf {
        self.room.join("disk.img")
    }

    /// `h0`, `h1` ...
    pub fn name(&self) -> String {
        namespace(self.number)
    }

    /// The part it plays; nothing if no process runs.
    pub fn part(&mut self) -> Option<Part> {
        let process = self.process.as_ref()?;
        self.story.hear(&process.said_after(self.story.read));
        Some(self.story.part.unwrap_or(Part::Begins))
    }

    /// All epochs in which processes of this host said that they went on.
    pub fn epochs(&mut self) -> Vec<u64> {
        self.part();
        [&self.past[..], &self.story.epochs].concat()
    }

    /// How often its processes have stopped because the epoch was another's.
    pub fn fenced(&mut self) -> usize {
        self.part();
        self.past_fenced + self.story.fenced
    }

    /// How often its present process found that the arbiter does not answer.
    pub fn unheard(&mut self) -> usize {
        self.part();
        self.story.unheard
    }

    /// Its process has ended; with this status, if no signal ended it.
    pub fn has_ended(&mut self) -> Option<Option<i32>> {
        self.process.as_mut()?.has_ended()
    }

    /// Forgets a process that has ended, but not what it said. Gives its status.
    pub fn bury(&mut self) -> Option<i32> {
        let process = self.process.take().expect("there is one");
        let ended = process.end();
        self.story.hear(ended.said.as_bytes().get(self.story.read..).unwrap_or_default());
        let story = std::mem::take(&mut self.story);
        self.past.extend(story.epochs);
        self.past_fenced += story.fenced;
        self.said_before.extend(ended.said.as_bytes());
        ended.status
    }

    /// A signal for its process.
    pub fn signal(&self, signal: Signal) {
        self.process().signal(signal);
    }

    fn process(&self) -> &Twinstep {
        self.process.as_ref().expect("there is one")
    }

    /// Types on the guest's console.
    pub fn type_line(&mut self, line: &str) {
        self.process.as_mut().expect("there is one").type_line(line);
    }

    /// Waits for text on the guest's console.
    pub fn wait_console(&self, text: &str) {
        self.process().wait_console(text);
    }

    /// Asks the VM to go to its standby (`twinstep failover`). Whether it agreed.
    pub fn hand_over(&self) -> bool {
        let environment = [("XDG_RUNTIME_DIR", &*text(&self.folder))];
        Twinstep::start_with("failover", &words(&["failover", VM]), &environment).end().status == Some(0)
    }

    /// Fills its disk to the last byte, or removes what filled it.
    pub fn fill(&self, full: bool) {
        let filler = self.room.join("filler");
        if !full {
            return std::fs::remove_file(filler).expect("it was made");
        }
        let mut file = std::fs::File::create(filler).expect("a name");
        for piece in [1 << 20, 4096, 1] {
            while std::io::Write::write_all(&mut file, &vec![b'x'; piece]).is_ok() {}
        }
    }

    /// What its processes have said, at the end of it, for the report of a test that fails.
    pub fn last_words(&mut self) -> String {
        let mut said = self.said_before.clone();
        if let Some(process) = &self.process {
            said.extend(process.said_after(0));
        }
        let text = String::from_utf8_lossy(&said).into_owned();
        let dull = |line: &&str| {
            !line.contains("held back")
                && !line.contains("runs freely")
                && !line.contains("copy-round")
                && !line.contains("copy-disks: ")
        };
        let lines: Vec<_> = text.lines().filter(dull).collect();
        format!("--- {}, {:?}\n{}\n", self.name(), self.part(), lines[lines.len().saturating_sub(60)..].join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_is_read_in_pieces() {
        let said = "[standby   1.0 ms] listening: waiting for a primary on 10.77.0.2:7171\r\n\
                    [standby 3 ms] notice: following -> following: protection has started\r\n[standby 4 ms] notice: following -> deciding: silent\r\n";
        let mut story = Story::default();
        let second = said.find("protection").expect("it is there");
        story.hear(&said.as_bytes()[..second]);
        assert_eq!(story.part, Some(Part::Waits));
        story.hear(&said.as_bytes()[story.read..]);
        assert_eq!((story.part, story.read), (Some(Part::Asks), said.len()));
        story.hear(b"[standby 5 ms] live: live in epoch 12; 0 outputs sent again\r\n[standby 5 ms] stopped: the arbiter gave epoch 13 to the other side\r\n");
        assert_eq!((story.part, &story.epochs[..], story.fenced), (Some(Part::Stopped), &[12][..], 1));
    }
}
