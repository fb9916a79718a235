//! Recordings: written while a machine runs, replayed and checked later; snapshots.
//!
//! *Invariant*: a recording that cannot be written any more is said so once and harms nobody; one that cannot be read is refused with the
//! place where it is broken.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use twinstep_log::recording::NicMetadata;
use twinstep_log::{
    Compression, Entry, ImageReader, ReadError, RecordingEnd, RecordingMetadata, RecordingReader, RecordingStart,
    RecordingWriter, ReplayOptions, Replayable, Replayer, Report, RunOutcome, encode_into,
};
use twinstep_machine::{Config, Digest, Input, Machine, Output, Pause};
use xxhash_rust::xxh3::Xxh3;

use super::build::{self, DiskMaker};
use super::live::EntrySink;
use crate::control::VmFigures;
use crate::error::{Context, Error, Result};
use crate::identity;
use crate::perf_map::PerfMap;
use crate::stat::measure::Measure;
use crate::stat::{self, sampler::Sampler};

/// A machine as a replay sees it, and the map of its code for `perf`, if one is kept.
pub struct Vm(pub Machine, pub Option<PerfMap>);

/// A machine that forgets all it has cached at positions drawn from a seed. That must make no difference.
struct Forgetful {
    vm: Vm,
    /// The state of the sequence; `None`: never.
    random: Option<u64>,
    next: u64,
}

/// Positions between two times at most.
const FORGET_WITHIN: u64 = 1 << 24;

impl Forgetful {
    fn new(machine: Machine, seed: Option<u64>) -> Self {
        let next = machine.position();
        // An odd number gives a sequence that is never zero.
        Self { vm: Vm(machine, None), random: seed.map(|s| s.wrapping_mul(2) | 1), next }
    }
}

impl Replayable for Forgetful {
    fn position(&self) -> u64 {
        self.vm.position()
    }
    fn run_to(&mut self, position: u64) -> RunOutcome {
        while let Some(random) = &mut self.random
            && self.next < position
        {
            if self.next > self.vm.position()
                && let stopped @ (RunOutcome::Waiting | RunOutcome::Stopped(_) | RunOutcome::HostFailure(_)) =
                    self.vm.run_to(self.next)
            {
                return stopped;
            }
            self.vm.0.drop_caches();
            // xorshift64
            for (left, by) in [(true, 13), (false, 7), (true, 17)] {
                *random ^= if left { *random << by } else { *random >> by };
            }
            self.next += 1 + *random % FORGET_WITHIN;
        }
        self.vm.run_to(position)
    }
    fn input(&mut self, input: Input) -> std::result::Result<(), String> {
        self.vm.input(input)
    }
    fn take_outputs(&mut self) -> Vec<(u64, Output)> {
        self.vm.take_outputs()
    }
    fn digest(&mut self) -> Vec<u8> {
        self.vm.digest()
    }
    fn explain(&self, ours: &[u8], recorded: &[u8]) -> String {
        self.vm.explain(ours, recorded)
    }
}

impl Replayable for Vm {
    fn position(&self) -> u64 {
        self.0.position()
    }
    fn run_to(&mut self, position: u64) -> RunOutcome {
        let pause = loop {
            // The log has the answer.
            match self.0.run(position) {
                Pause::DiskRequest if self.0.position() < position => {}
                pause => break pause,
            }
        };
        match pause {
            Pause::DiskRequest | Pause::Position => RunOutcome::Reached,
            // What ended the run, or put it to sleep, may have happened at the very position asked for.
            _ if self.0.position() == position => RunOutcome::Reached,
            Pause::Idle { .. } => RunOutcome::Waiting,
            Pause::PoweredOff => RunOutcome::Stopped("the guest switched itself off".into()),
            Pause::DebugExit { status } => RunOutcome::Stopped(format!("the guest ended with status {status}")),
            Pause::Reset => RunOutcome::Stopped("the guest asked for a reset".into()),
            Pause::Crashed { reason } => RunOutcome::Stopped(format!("the guest crashed: {reason}")),
            Pause::HostFailure(why) => RunOutcome::HostFailure(format!("this host failed: {why}")),
        }
    }
    fn input(&mut self, input: Input) -> std::result::Result<(), String> {
        self.0.input(input).map_err(|e| e.to_string())
    }
    fn take_outputs(&mut self) -> Vec<(u64, Output)> {
        self.0.drain_outputs()
    }
    fn digest(&mut self) -> Vec<u8> {
        if let Some(map) = &mut self.1 {
            map.write(&self.0.take_code_notes());
        }
        minicbor::to_vec(self.0.digest()).expect("encoding into memory cannot fail")
    }
    fn explain(&self, ours: &[u8], recorded: &[u8]) -> String {
        match (minicbor::decode::<Digest>(ours), minicbor::decode::<Digest>(recorded)) {
            (Ok(ours), Ok(recorded)) => format!("differs in {}", ours.differences(&recorded).join(", ")),
            _ => "the digests cannot be compared part by part".into(),
        }
    }
}

/// A recording that is being written.
struct FileSink {
    writer: RecordingWriter<BufWriter<File>>,
    path: PathBuf,
}

/// What a recording of this machine says about itself.
pub(super) fn metadata(machine: &Machine, digest_interval: u64) -> RecordingMetadata {
    let (vendor, family) = identity::cpu();
    let config = machine.config();
    RecordingMetadata {
        engine: identity::build(),
        cpu_model: config.cpu_model.clone(),
        ram_mib: config.ram_mib,
        host_vendor: vendor,
        host_family: family.to_string(),
        nics: config.nics.iter().map(|&mac| NicMetadata { mac }).collect(),
        digest_interval,
        ..RecordingMetadata::default()
    }
}

pub(super) fn write_error(path: &Path, e: twinstep_log::WriteError) -> Error {
    let full = e.is_disk_full();
    let error = Error::new(format!("cannot write the recording {}", path.display())).because(e);
    if full { error.next("make room on that file system, and record again") } else { error }
}

/// Starts a recording of the machine as it is now.
pub fn record(
    machine: &Machine,
    path: &Path,
    digest_interval: u64,
    disk_bytes: &[u64],
    last_output: u64,
) -> Result<Box<dyn EntrySink>> {
    let file = File::create(path).at("create the recording", path)?;
    let metadata = metadata(machine, digest_interval);
    let fail = |e| write_error(path, e);
    let output = BufWriter::with_capacity(1 << 20, file);
    let mut start = RecordingStart::new(output, &metadata, &build::image_metadata(machine), Compression::Lz4).map_err(fail)?;
    for payload in build::image_payloads(machine, disk_bytes, last_output, None) {
        start.image.payload(&payload).map_err(fail)?;
    }
    for page in 0..machine.ram().flags().pages() {
        start.image.page(page as u64, machine.ram().page_bytes(page)).map_err(fail)?;
    }
    let (writer, _) = start.finish_image().map_err(fail)?;
    Ok(Box::new(FileSink { writer, path: path.to_owned() }))
}

impl EntrySink for FileSink {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.writer.entry(entry).map_err(|e| write_error(&self.path, e))
    }
    fn close(self: Box<Self>) -> Result<()> {
        let (mut output, _) = self.writer.close().map_err(|e| write_error(&self.path, e))?;
        output.flush().at("write the recording", &self.path)
    }
}

/// What cannot be read, why, and the way out.
pub(super) fn unreadable(what: &str, path: &Path, e: ReadError) -> Error {
    let next = match &e {
        ReadError::Newer { .. } => Some("use the Twinstep that wrote it, or a later one"),
        ReadError::Foreign { .. } if what == "recording" => Some("give a file that `twinstep run --record` wrote"),
        ReadError::Foreign { .. } => Some("give a file that `twinstep replay --save` wrote"),
        ReadError::Damaged { .. } | ReadError::Cut { .. } => Some("use another copy of the file, or make it again"),
        ReadError::Io { .. } => None,
    };
    let error = Error::new(format!("cannot use the {what} {}", path.display())).because(e);
    match next {
        Some(next) => error.next(next),
        None => error,
    }
}

/// Writes a snapshot of the machine.
fn save_snapshot(machine: &Machine, disk_bytes: &[u64], last_output: u64, log_digest: u64, path: &Path) -> Result<()> {
    let file = File::create(path).at("create the snapshot", path)?;
    let output = BufWriter::with_capacity(1 << 20, file);
    let (mut output, _) = build::write_image(machine, disk_bytes, last_output, Some(log_digest), output, Compression::Lz4)
        .map_err(|e| Error::new(format!("cannot write the snapshot {}", path.display())).because(e))?;
    output.flush().at("write the snapshot", path)
}

/// Loads the machine of a snapshot.
pub fn load_snapshot(path: &Path, disks: DiskMaker, tune: &dyn Fn(&mut Config)) -> Result<(Machine, build::Extra)> {
    let file = File::open(path).at("open the snapshot", path)?;
    let mut reader = ImageReader::open(BufReader::with_capacity(1 << 20, file)).map_err(|e| unreadable("snapshot", path, e))?;
    build::from_image(&mut reader, disks, tune).what(format!("cannot use the snapshot {}", path.display()))
}

/// A digest of a recording up to a position: its machine, where it began, and all that happened.
#[derive(Default)]
struct LogDigest {
    hash: Xxh3,
    bytes: Vec<u8>,
}

impl LogDigest {
    fn new(reader: &RecordingReader<impl Read + Seek>) -> Self {
        let mut digest = Self::default();
        let metadata = reader.metadata();
        digest.hash.update(&reader.image_metadata().position.to_le_bytes());
        digest.hash.update(&metadata.ram_mib.to_le_bytes());
        digest.hash.update(metadata.cpu_model.as_bytes());
        digest
    }
    fn add(&mut self, entry: &Entry) {
        self.bytes.clear();
        encode_into(entry, &mut self.bytes).expect("what was decoded can be encoded");
        self.hash.update(&self.bytes);
    }
}

/// How to replay.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Stop at this position.
    pub until: Option<u64>,
    /// Write a snapshot where it stops.
    pub save: Option<PathBuf>,
    /// Start from this snapshot instead of the recording's beginning.
    pub from: Option<PathBuf>,
    /// Instructions a block at most (1: every instruction alone in its block).
    pub block: Option<u32>,
    /// Address spaces whose caches are kept.
    pub cache_groups: Option<usize>,
    /// Forget all that is cached at positions drawn from this seed.
    pub forget: Option<u64>,
    /// Tell `perf` what translated code is.
    pub perf_map: bool,
    /// Count, and look where the time goes.
    pub stats: bool,
}

/// What a replay came to.
#[derive(Debug)]
pub struct Outcome {
    /// What was done and found equal.
    pub report: Report,
    /// How the recording ends, if its end was reached.
    pub end: Option<RecordingEnd>,
    /// The machine's digest where it stands.
    pub digest: Digest,
    /// Guest time where it stands.
    pub guest_ns: u64,
    /// What the machine did, and how often in all, if that was wanted.
    pub stats: Option<(Measure, BTreeMap<String, u64>)>,
}

/// Replays a recording. `outputs` is given what the machine made; `progress` the position now and then.
pub fn replay(
    path: &Path,
    options: &Options,
    disks: DiskMaker,
    outputs: &mut dyn FnMut(Output),
    progress: &mut dyn FnMut(u64),
) -> Result<Outcome> {
    let file = File::open(path).at("open the recording", path)?;
    let broken = |e| unreadable("recording", path, e);
    let mut reader = RecordingReader::open(BufReader::with_capacity(1 << 20, file)).map_err(broken)?;
    let metadata = reader.metadata().clone();
    build::check_host(&metadata.host_vendor, &metadata.host_family)?;
    let tune = |config: &mut Config| {
        if let Some(block) = options.block {
            config.max_block_instructions = block;
        }
        if let Some(groups) = options.cache_groups {
            config.cache_groups = groups;
        }
    };
    let (machine, extra) = match &options.from {
        Some(snapshot) => load_snapshot(snapshot, disks, &tune)?,
        None => build::from_image(&mut reader.image().map_err(broken)?, disks, &tune)
            .what(format!("cannot use the recording {}", path.display()))?,
    };
    let mut machine = machine;
    let map = options.perf_map.then(PerfMap::new).transpose()?;
    if map.is_some() {
        machine.note_code();
    }
    let start = machine.position();
    if options.from.is_some() {
        let (first, until) = (reader.image_metadata().position, options.until.unwrap_or(u64::MAX));
        if !(first..=until).contains(&start) {
            return Err(Error::new(format!("the snapshot stands at position {start}, the replay goes from {first} to {until}"))
                .next("use a snapshot that a replay of this very recording saved"));
        }
    }
    reader.rewind();
    let mut log_digest = LogDigest::new(&reader);
    let mut ahead = None;
    if let Some(snapshot) = &options.from {
        // A snapshot holds everything up to and at its position.
        while let Some(entry) = reader.next_entry().map_err(broken)? {
            if entry.position > start {
                ahead = Some(entry);
                break;
            }
            log_digest.add(&entry);
        }
        if extra.log_digest.is_some_and(|digest| digest != log_digest.hash.digest()) {
            return Err(Error::new(format!(
                "the snapshot {} belongs to another recording than {}",
                snapshot.display(),
                path.display()
            ))
            .next("use a snapshot that a replay of this very recording saved"));
        }
    }
    let mut forgetful = Forgetful::new(machine, options.forget);
    forgetful.vm.1 = map;
    let sampler = Sampler::default();
    let before = options.stats.then(|| {
        sampler.look_at(forgetful.vm.0.activity());
        (stat::report(&VmFigures::of(&forgetful.vm.0), &sampler.samples()), sampler.watch())
    });
    let mut replayer = Replayer::new(start, ReplayOptions::default());
    let report = replayer
        .run(
            &mut forgetful,
            options.until,
            || {
                let entry = match ahead.take() {
                    Some(entry) => Some(entry),
                    None => reader.next_entry()?,
                };
                if let Some(entry) = &entry {
                    progress(entry.position);
                    if options.until.is_none_or(|until| entry.position <= until) {
                        log_digest.add(entry);
                    }
                }
                Ok(entry)
            },
            |_, output| outputs(output),
        )
        .what(format!("replaying {}", path.display()))?;
    let mut vm = forgetful.vm;
    let stats = before.map(|(before, _watch)| {
        let after = stat::report(&VmFigures::of(&vm.0), &sampler.samples());
        (Measure::between(&before, &after), after.counters)
    });
    if let Some(save) = &options.save {
        let disk_bytes: Vec<u64> = extra.disks.iter().map(|d| d.bytes).collect();
        save_snapshot(&vm.0, &disk_bytes, extra.last_output + report.outputs_checked, log_digest.hash.digest(), save)?;
    }
    if let Some(map) = &mut vm.1 {
        map.write(&vm.0.take_code_notes());
    }
    Ok(Outcome { stats, end: reader.end().cloned(), digest: vm.0.digest(), guest_ns: vm.0.guest_ns(), report })
}
