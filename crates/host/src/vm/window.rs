//! What a standby keeps so that a third host can say which side is right: the last state that both sides were known to have, and the log since.
//!
//! *In*: the machine where both agree; records before they are replayed; word of a difference. *Out*: recordings with a dispute in their metadata
//! ([`twinstep_log::vote`]). *Invariant*: a page gets into the state kept only if it is what its hash in the agreed digest says, so memory of this host that went bad is not in it;
//! memory is bounded, and what cannot be kept or written is said and harms nobody.
//!
//! RAM is kept in a file without a name in the folder of the windows, and only what has changed is written there when the sides agree anew: state digests are compared every
//! [`DIGEST_INTERVAL`](super::session::DIGEST_INTERVAL) instructions. It is written out on a thread of its own; until that is done nothing is kept.
//!
//! Of disks the window has the blocks that this side's machine has read or written since, as they were where both sides agreed (`kept_blocks`): their images go on changing, so what is
//! overwritten is kept ([`Replica::keep_checkpoint`]). The data that was read would not do: a third machine need not read what this one did, and this one may have read what it had written
//! wrong. A third machine that wants a block that this one did not touch gives no opinion. What was on a shared disk is in the log.
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use twinstep_log::{
    Compression, Decoder, Dispute, Disputed, Entry, ImageMetadata, ImagePayload, Mismatch, RecordingMetadata, RecordingStart,
    encode_into, encoded_length,
};
use twinstep_machine::{ConsumerId, Machine, PAGE_SIZE, PageSet, Start};
use twinstep_migrate::unit_hash;

use super::{build, disks, kept_blocks, replay};
use crate::disk::Replica;
use crate::error::{Context, Error, Result};
use crate::events::Events;

/// Bytes of the log that are kept in memory.
const MAX_LOG_BYTES: usize = 128 << 20;
/// Windows that one standby writes for one primary: each has the whole RAM, and a guest that differs all the time must not fill the disk.
const MAX_WINDOWS: usize = 4;
/// The state kept is not brought up to date more often, unless the log has grown beyond this.
const SPAN: Duration = Duration::from_secs(1);
const SPAN_BYTES: usize = 8 << 20;
/// Bytes of a disk's blocks that are kept in memory because they were overwritten, and after which the state kept is brought up to date.
const MAX_DISK_BYTES: usize = 256 << 20;
const SPAN_DISK_BYTES: usize = 32 << 20;
/// Bytes of all disks' blocks in a window, packed. They are put together while the guest stands still.
const MAX_BLOCK_BYTES: usize = 256 << 20;
/// Bytes of an output that are kept in a dispute.
const MAX_OUTPUT_BYTES: usize = 128 << 10;

/// What people should know of a window.
#[derive(Debug)]
enum WindowNews {
    /// It is written.
    Written { path: PathBuf, output: u64, from: u64, to: u64 },
    /// There is none, and why.
    Missing(String),
    /// This page changed though nobody wrote to it.
    Damaged { page: usize, kept: u64 },
}

impl WindowNews {
    fn say(self, events: &Events) {
        let (what, text, figures) = self.event();
        events.say_with(what, text, figures);
    }
    /// Kind, text and figures of the event.
    fn event(self) -> (&'static str, String, Map<String, Value>) {
        match self {
            Self::Written { path, output, from, to } => {
                let figures = Map::from_iter([
                    ("path".to_owned(), json!(path)),
                    ("output".to_owned(), json!(output)),
                    ("from".to_owned(), json!(from)),
                    ("to".to_owned(), json!(to)),
                ]);
                let text = format!(
                    "positions {from} to {to}, which led to output {output}, are recorded: `twinstep vote {}` on a third host says which side is right",
                    path.display()
                );
                ("window", text, figures)
            }
            Self::Missing(why) => ("window-missing", why, Map::new()),
            Self::Damaged { page, kept } => {
                let text = format!(
                    "memory of this standby's host is bad: page {page} of the guest's RAM changed without being written; the state of position {kept} stays the one that is kept for a third opinion"
                );
                ("damaged", text, Map::from_iter([("pages".to_owned(), json!([page]))]))
            }
        }
    }
}

/// The state both had.
struct Agreed {
    position: u64,
    recording: RecordingMetadata,
    image: ImageMetadata,
    payloads: Vec<ImagePayload>,
}

/// See the head of this module.
pub(super) struct Window {
    folder: PathBuf,
    events: Events,
    ram: Arc<File>,
    consumer: Option<ConsumerId>,
    /// The machine's disks, with a checkpoint while a state is kept.
    disks: Vec<Replica>,
    /// Pages that are not zero in the file.
    filled: PageSet,
    /// Pages that have changed since they were written to the file, but for what the machine knows.
    behind: PageSet,
    agreed: Option<Agreed>,
    /// Encoded entries since.
    log: Vec<u8>,
    since: Instant,
    /// The file is being read.
    busy: Arc<AtomicBool>,
    written: usize,
    /// It was said that a page is bad.
    damaged: bool,
}

impl Window {
    /// Windows in this folder, which is made if it is not there.
    pub(super) fn new(folder: &Path, events: Events) -> Result<Self> {
        fs::create_dir_all(folder).at("create", folder)?;
        let path = folder.join(format!(".window-{}", std::process::id()));
        let ram = File::options().read(true).write(true).create(true).truncate(true).open(&path).at("create", &path)?;
        // The file lives as long as somebody has it open.
        fs::remove_file(&path).at("remove", &path)?;
        Ok(Self {
            folder: folder.to_owned(),
            events,
            ram: Arc::new(ram),
            consumer: None,
            disks: Vec::new(),
            filled: PageSet::none(0),
            behind: PageSet::none(0),
            agreed: None,
            log: Vec::new(),
            since: Instant::now(),
            busy: Arc::default(),
            written: 0,
            damaged: false,
        })
    }

    fn say(&self, news: WindowNews) {
        news.say(&self.events);
    }

    /// The machine has come, equal to the primary's.
    pub(super) fn begin(&mut self, machine: &mut Machine, disks: &[Replica], last_output: u64) {
        self.disks = disks.to_vec();
        let pages = machine.ram().flags().pages();
        self.consumer = Some(machine.track_dirty("window", Start::Everything));
        (self.filled, self.behind) = (PageSet::none(pages), PageSet::none(pages));
        machine.digest_ram();
        self.keep(machine, last_output);
    }

    /// The machine is equal to the primary's where it stands, and its digest is up to date.
    pub(super) fn agreed(&mut self, machine: &mut Machine, last_output: u64) {
        let overwritten = || self.disks.iter().map(Replica::checkpoint_bytes).sum::<usize>();
        if self.agreed.is_none()
            || self.since.elapsed() >= SPAN
            || self.log.len() >= SPAN_BYTES
            || overwritten() >= SPAN_DISK_BYTES
        {
            self.keep(machine, last_output);
        }
    }

    /// An entry of the log is about to be replayed.
    pub(super) fn entry(&mut self, entry: &Entry) {
        if self.agreed.is_none() {
            return;
        }
        if self.log.len() + encoded_length(entry) > MAX_LOG_BYTES {
            // Until both agree again.
            self.forget();
            return;
        }
        encode_into(entry, &mut self.log).expect("what was decoded can be encoded");
    }

    fn forget(&mut self) {
        self.agreed = None;
        self.log = Vec::new();
        self.disks.iter().for_each(Replica::drop_checkpoint);
    }

    /// Nobody is to be compared with any more.
    pub(super) fn end(mut self, machine: &mut Machine) {
        self.forget();
        if let Some(consumer) = self.consumer {
            machine.untrack_dirty(consumer);
        }
    }

    /// Brings the state kept up to date.
    fn keep(&mut self, machine: &mut Machine, last_output: u64) {
        let Some(consumer) = self.consumer else { return };
        if self.busy.load(Ordering::Acquire) {
            // What is in the file is of another moment than the log from here on.
            self.forget();
            return;
        }
        let mut pages = machine.take_dirty(consumer);
        pages.join(&self.behind);
        // Before the file is touched: the state of before is better than none.
        let bad = pages.iter().find(|&page| !is_sound(machine, page));
        if let Some(page) = bad {
            self.behind = pages;
            if let (Some(agreed), false) = (&self.agreed, self.damaged) {
                self.damaged = true;
                self.say(WindowNews::Damaged { page, kept: agreed.position });
            }
            return;
        }
        self.damaged = false;
        self.forget();
        match self.write_pages(machine, pages) {
            Ok(()) => {
                self.disks.iter().for_each(|disk| disk.keep_checkpoint(MAX_DISK_BYTES));
                self.agreed = Some(Agreed {
                    position: machine.position(),
                    recording: replay::metadata(machine, 0),
                    image: build::image_metadata(machine),
                    payloads: build::image_payloads(machine, &disks::bytes(&self.disks), last_output, None),
                });
                self.since = Instant::now();
            }
            Err(e) => self.say(WindowNews::Missing(format!("the state that both sides have is not kept: {e}"))),
        }
    }

    /// Writes pages to the file. Those that could not be written are left in `behind`.
    fn write_pages(&mut self, machine: &Machine, pages: PageSet) -> Result<()> {
        self.behind = pages.clone();
        let total = machine.ram().flags().pages() as u64;
        self.ram.set_len(total * PAGE_SIZE).what("the file of the window cannot be made larger")?;
        for page in pages.iter() {
            if machine.page_hashes()[page] != 0 || self.filled.contains(page) {
                let bytes = machine.ram().page_bytes(page);
                self.ram.write_all_at(bytes, page as u64 * PAGE_SIZE).what("the file of the window cannot be written")?;
                self.filled.insert(page);
            }
            self.behind.remove(page);
        }
        Ok(())
    }

    /// The two sides differ: what led to it is written, if it is there.
    pub(super) fn dispute(&mut self, output: u64, position: u64, text: &str, found: Option<&Mismatch>) {
        if self.consumer.is_none() {
            return;
        }
        let Some(mut agreed) = self.agreed.take() else {
            let why = "what led to this difference is not recorded: no state that both sides had was kept before it";
            return self.say(WindowNews::Missing(why.into()));
        };
        // Now: the images change as soon as the two sides are made equal again.
        let blocks = match self.written {
            MAX_WINDOWS => Err(Error::new(format!("{MAX_WINDOWS} windows are there already"))),
            _ if self.disks.is_empty() => Ok(Vec::new()),
            _ => kept_blocks::payloads(&self.disks, MAX_BLOCK_BYTES),
        };
        let log = std::mem::take(&mut self.log);
        self.forget();
        match blocks {
            Ok(blocks) => agreed.payloads.extend(blocks),
            Err(e) => return self.say(WindowNews::Missing(format!("this difference is not recorded: {e}"))),
        }
        self.written += 1;
        let dispute = Dispute {
            output,
            position,
            noted: found.and_then(|f| f.noted).map(|(at, note)| Disputed::noted(at, &note)),
            made: found.and_then(|f| f.made.as_ref()).map(|(at, made)| Disputed::made(*at, made, MAX_OUTPUT_BYTES)),
            stuck: found.is_none(),
            text: text.to_owned(),
        };
        let path = self.folder.join(format!("output-{output}-position-{position}.rec"));
        let (ram, events, busy) = (self.ram.clone(), self.events.clone(), self.busy.clone());
        busy.store(true, Ordering::Release);
        let (filled, from) = (self.filled.clone(), agreed.position);
        let write = move || {
            let news = match write(&path, agreed, dispute, &ram, &filled, &log) {
                Ok(()) => WindowNews::Written { path, output, from, to: position },
                Err(e) => WindowNews::Missing(format!("what led to this difference cannot be recorded: {e}")),
            };
            busy.store(false, Ordering::Release);
            // By itself: the protocol may have ended long ago, with this side gone live.
            news.say(&events);
        };
        if let Err(e) = std::thread::Builder::new().name("window".into()).spawn(write) {
            self.busy.store(false, Ordering::Release);
            self.say(WindowNews::Missing(format!("what led to this difference cannot be recorded: cannot start a thread: {e}")));
        }
    }
}

/// Whether a page is what its hash in the last digest says.
fn is_sound(machine: &Machine, page: usize) -> bool {
    unit_hash(page as u64, machine.ram().page_bytes(page)) == machine.page_hashes()[page]
}

/// Writes the recording under another name first, so that a file that is there is whole.
fn write(path: &Path, agreed: Agreed, dispute: Dispute, ram: &File, filled: &PageSet, log: &[u8]) -> Result<()> {
    let draft = path.with_extension("part");
    let fail = |e| replay::write_error(path, e);
    let file = BufWriter::with_capacity(1 << 20, File::create(&draft).at("create the recording", &draft)?);
    let metadata = RecordingMetadata { dispute: Some(dispute), ..agreed.recording };
    let mut start = RecordingStart::new(file, &metadata, &agreed.image, Compression::Lz4).map_err(fail)?;
    for payload in &agreed.payloads {
        start.image.payload(payload).map_err(fail)?;
    }
    let mut bytes = [0; PAGE_SIZE as usize];
    for page in filled.iter() {
        ram.read_exact_at(&mut bytes, page as u64 * PAGE_SIZE).what("the file of the window cannot be read")?;
        start.image.page(page as u64, &bytes).map_err(fail)?;
    }
    let (mut writer, _) = start.finish_image().map_err(fail)?;
    let mut decoder = Decoder::new();
    decoder.push(log);
    while let Some(entry) = decoder.pop().map_err(|e| Error::new("the log of the window cannot be read").because(e))? {
        writer.entry(&entry).map_err(fail)?;
    }
    let (mut file, _) = writer.close().map_err(fail)?;
    file.flush().at("write the recording", &draft)?;
    fs::rename(&draft, path).at("create the recording", path)
}
