//! The copy of a running machine to a standby: the thread that drives [`twinstep_migrate::Source`], and what the machine's thread does for it.
//!
//! *In*: what the pair's thread wants of the image ([`Copying::room`]); copies of pages, made by the machine's thread between two slices of the guest. *Out*:
//! bytes of the image to the pair's thread, word of the cut and of the end. *Invariant*: only the machine's thread reads the guest's memory, and never
//! while the guest runs, so no page is torn; the cut is told to the pair's thread in its place among the log's records.
//!
//! Hashing and packing happen on the copy's own thread: neither the guest nor its outputs wait for them.
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Map, json};
use twinstep_log::{Compression, ImageWriter};
use twinstep_machine::{ConsumerId, Machine, PageSet, Start};
use twinstep_migrate::writes::STANDSTILL;
use twinstep_migrate::{Action, Config, Copied, Event, Layout, Progress, Region, Report, Source, WritePace};

use super::build;
use super::disks;
use super::live::ToVm;
use super::mirror;
use super::pairing::ToPair;
use super::resync::Baseline;
use super::turns::Post;
use crate::disk::{self, BLOCK_BYTES, Replica};
use crate::error::{Context, Error, Result};
use crate::events::{Events, now_ns};
use crate::status::board::Board;

/// Names a copy: what a copy that was given up still says must not be taken for the next one's.
pub type CopyId = u64;

/// What the copy's thread is told.
#[derive(Debug)]
enum ToCopy {
    /// What the machine is.
    Begun { preface: Vec<u8>, pages: usize },
    /// An answer of the machine's thread, or room in the stream.
    Event(Event),
    /// The copy is given up.
    GiveUp,
}

/// What the machine's thread is asked for.
#[derive(Debug)]
pub struct CopyAsk {
    id: CopyId,
    what: Wanted,
    answer: Sender<ToCopy>,
}

#[derive(Debug)]
enum Wanted {
    Begin,
    Collect,
    Read {
        units: Vec<u64>,
    },
    Cut {
        rest: Vec<PageSet>,
        most_bytes: u64,
        /// Blocks of disks that may be left.
        most_blocks: usize,
        /// For the copies: memory that is there already, so that the guest does not wait for the host to find some.
        buffer: Vec<u8>,
        disks: Option<MirroredDisks>,
    },
    Slow {
        percent: u8,
    },
    /// The copy is over; nothing of it is to remain.
    End,
}

/// What a copy says to the pair's thread.
#[derive(Debug)]
pub enum CopyNews {
    /// The next bytes of the image.
    Bytes(Vec<u8>),
    /// Pieces of disks: what was written since the mirror's last round.
    Blocks {
        /// The pieces.
        pieces: Vec<u8>,
        /// Whether they were made in room that was given.
        in_room: bool,
    },
    /// The cut was made; from the machine's thread.
    Cut {
        /// Where.
        position: u64,
        /// Blocks of disks that were left for it.
        blocks: usize,
    },
    /// All is sent.
    Done(Report),
    /// It cannot be made.
    Failed(String),
}

/// Disks that were mirrored: what the copy needs to send the rest of them.
#[derive(Debug, Clone, Copy)]
pub struct MirroredDisks {
    /// The mirror's number.
    pub mirror: u64,
    /// The name of the moment of the cut.
    pub baseline: disk::Baseline,
}

/// What a copy needs.
pub(super) struct CopyWiring {
    pub(super) id: CopyId,
    pub(super) config: Config,
    pub(super) disks: Option<(Vec<Replica>, MirroredDisks)>,
    pub(super) vm: Sender<ToVm>,
    pub(super) pair: Post<ToPair>,
    pub(super) events: Events,
    pub(super) board: Board,
}

/// A copy under way, as the pair's thread sees it. Dropped, it is given up.
#[derive(Debug)]
pub(super) struct Copying {
    id: CopyId,
    to: Sender<ToCopy>,
}

impl Copying {
    /// Starts the thread. If that fails, it says so like a copy that fails later.
    pub(super) fn start(wiring: CopyWiring) -> Self {
        let CopyWiring { id, config, disks, vm, pair, events, board } = wiring;
        let (to, inbox) = channel();
        let thread = Thread { id, disks, inbox, answer: to.clone(), vm, pair: pair.clone(), events, board };
        if let Err(e) = std::thread::Builder::new().name("copy".into()).spawn(move || thread.run(config)) {
            let _ = pair.send(ToPair::Copy(id, CopyNews::Failed(format!("cannot start a thread: {e}"))));
        }
        Self { id, to }
    }
    /// Its name.
    pub(super) fn id(&self) -> CopyId {
        self.id
    }
    /// The pair takes so many bytes more.
    pub(super) fn room(&self, bytes: u64) {
        // A copy that has ended wants none.
        let _ = self.to.send(ToCopy::Event(Event::Room { bytes }));
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        let _ = self.to.send(ToCopy::GiveUp);
    }
}

/// Says what a copy was; so many blocks of disks were left for the cut.
pub(super) fn say_done(events: &Events, report: &Report, cut_blocks: usize) {
    let figures = Map::from_iter([
        ("rounds".to_owned(), json!(report.rounds)),
        ("image_bytes".to_owned(), json!(report.sent_bytes)),
        ("pages".to_owned(), json!(report.units)),
        ("zero_pages".to_owned(), json!(report.zeroes)),
        ("unchanged_pages".to_owned(), json!(report.unchanged)),
        ("cut_pages".to_owned(), json!(report.cut_units)),
        ("cut_blocks".to_owned(), json!(cut_blocks)),
        ("total_ns".to_owned(), json!(report.total_ns)),
        ("pause_ns".to_owned(), json!(report.pause_ns)),
        ("slowed_percent".to_owned(), json!(report.slowed_percent)),
    ]);
    let slowed = match report.slowed_percent {
        0 => String::new(),
        percent => format!(", and lost up to {percent} % of its time before"),
    };
    let text = format!(
        "the machine is copied: {} rounds, {} KiB in {:.2} s; at the cut the guest stood still for {:.1} ms{slowed}",
        report.rounds,
        report.sent_bytes >> 10,
        report.total_ns as f64 / 1e9,
        report.pause_ns as f64 / 1e6
    );
    events.say_with("image", text, figures);
}

struct Thread {
    id: CopyId,
    disks: Option<(Vec<Replica>, MirroredDisks)>,
    inbox: Receiver<ToCopy>,
    answer: Sender<ToCopy>,
    vm: Sender<ToVm>,
    pair: Post<ToPair>,
    events: Events,
    board: Board,
}

impl Thread {
    fn run(self, config: Config) {
        self.drive(config);
        if let Some((replicas, MirroredDisks { mirror, .. })) = &self.disks {
            replicas.iter().for_each(|disk| disk.limit_writes(*mirror, None));
        }
        self.board.set_copy(None);
        self.ask(Wanted::End);
    }

    /// Until the copy is over or given up.
    fn drive(&self, config: Config) {
        self.ask(Wanted::Begin);
        let mut room = 0;
        let mut source = loop {
            match self.inbox.recv() {
                Ok(ToCopy::Begun { preface, pages }) => match Layout::new(vec![Region::pages(pages)]) {
                    Ok(layout) => break Source::new(now_ns(), layout, &preface, config),
                    Err(e) => return self.tell(CopyNews::Failed(e.to_string())),
                },
                Ok(ToCopy::Event(Event::Room { bytes })) => room += bytes,
                Ok(ToCopy::Event(_)) => {}
                Ok(ToCopy::GiveUp) | Err(_) => return,
            }
        };
        source.handle(now_ns(), Event::Room { bytes: room });
        let block = BLOCK_BYTES;
        let mut writes = WritePace::new(config, block, mirror::SMALL as u64 * block);
        loop {
            while let Some(action) = source.poll() {
                match action {
                    Action::Send(bytes) => self.tell(CopyNews::Bytes(bytes)),
                    Action::Collect => {
                        if let Err(e) = self.send_blocks(&mut source, &mut writes, false) {
                            return self.tell(CopyNews::Failed(e.to_string()));
                        }
                        self.ask(Wanted::Collect);
                    }
                    Action::Read { units, .. } => self.ask(Wanted::Read { units }),
                    Action::Cut { rest, most_bytes } => {
                        if let Err(e) = self.send_blocks(&mut source, &mut writes, true) {
                            return self.tell(CopyNews::Failed(e.to_string()));
                        }
                        // Not zero: such memory would be mapped only when it is written to.
                        let mut buffer = vec![1; most_bytes as usize];
                        buffer.clear();
                        let disks = self.disks.as_ref().map(|(_, mirrored)| *mirrored);
                        let most_blocks = (config.stop_bytes / BLOCK_BYTES) as usize;
                        self.ask(Wanted::Cut { rest, most_bytes, most_blocks, buffer, disks });
                    }
                    Action::Slow { percent } => {
                        self.say_slow(percent);
                        self.ask(Wanted::Slow { percent });
                    }
                    Action::Round(progress) => self.say_round(&progress),
                    Action::Done(report) => return self.tell(CopyNews::Done(report)),
                }
            }
            match self.inbox.recv() {
                Ok(ToCopy::Event(event)) => source.handle(now_ns(), event),
                Ok(ToCopy::Begun { .. }) => {}
                Ok(ToCopy::GiveUp) | Err(_) => return,
            }
            self.board.set_copy(Some(source.progress()));
        }
    }

    /// Sends what was written to disks since that was done last, if it is more than may be left for the cut; with `for_cut` until it is not, and holds the guest's writes if it does not
    /// become so. Takes the room it needs from the machine's image, of which nothing is sent now.
    fn send_blocks(&self, source: &mut Source, writes: &mut WritePace, for_cut: bool) -> Result<()> {
        let Some((replicas, MirroredDisks { mirror, .. })) = &self.disks else { return Ok(()) };
        let unsent = || mirror::unsent(replicas, *mirror) as u64 * BLOCK_BYTES;
        writes.begin(source.progress().bytes_per_s);
        let mut room = source.take_room();
        while unsent() > writes.may_be_left() {
            let started = now_ns();
            let blocks = mirror::round(replicas, *mirror, &mut |pieces| {
                while room < pieces.len() as u64 {
                    match self.inbox.recv() {
                        Ok(ToCopy::Event(Event::Room { bytes })) => room += bytes,
                        // Nothing else was asked for.
                        Ok(ToCopy::Event(_) | ToCopy::Begun { .. }) => {}
                        Ok(ToCopy::GiveUp) | Err(_) => return Err(Error::new("the copy is given up")),
                    }
                }
                room -= pieces.len() as u64;
                self.tell(CopyNews::Blocks { pieces, in_room: true });
                Ok(())
            })?;
            let (sent, left) = (blocks as u64 * BLOCK_BYTES, unsent());
            let limit = writes.pass(sent, now_ns() - started, left);
            if limit.is_some() {
                replicas.iter().for_each(|disk| disk.limit_writes(*mirror, limit));
            }
            self.say_blocks(sent, left, limit);
            if !for_cut {
                break;
            }
        }
        source.handle(now_ns(), Event::Room { bytes: room });
        Ok(())
    }

    fn say_blocks(&self, sent: u64, left: u64, limit: Option<u64>) {
        let figures = Map::from_iter([
            ("sent_bytes".to_owned(), json!(sent)),
            ("left_bytes".to_owned(), json!(left)),
            ("limit_bytes_per_s".to_owned(), json!(limit)),
        ]);
        let text = format!("disks: {} KiB of blocks sent, {} KiB written meanwhile", sent >> 10, left >> 10);
        self.events.say_with("copy-disks", text, figures);
        let held = match limit {
            None => return,
            Some(STANDSTILL) => "until it is sent".to_owned(),
            Some(limit) => format!("to {} KiB a second", limit.div_ceil(1024)),
        };
        let text = format!("the guest writes to its disks faster than can be sent: what it writes is held {held}");
        self.events.say_with("copy-disks-slow", text, Map::from_iter([("limit_bytes_per_s".to_owned(), json!(limit))]));
    }

    fn ask(&self, what: Wanted) {
        // A machine that has ended answers nothing, and the pair, which ends with it, gives the copy up.
        let _ = self.vm.send(ToVm::Copy(CopyAsk { id: self.id, what, answer: self.answer.clone() }));
    }

    fn tell(&self, news: CopyNews) {
        let _ = self.pair.send(ToPair::Copy(self.id, news));
    }

    fn say_round(&self, progress: &Progress) {
        let figures = Map::from_iter([
            ("round".to_owned(), json!(progress.round)),
            ("remaining_bytes".to_owned(), json!(progress.remaining_bytes)),
            ("sent_bytes".to_owned(), json!(progress.sent_bytes)),
            ("bytes_per_s".to_owned(), json!(progress.bytes_per_s)),
            ("dirty_bytes_per_s".to_owned(), json!(progress.dirty_bytes_per_s)),
        ]);
        let text = format!(
            "round {}: {} MiB to look at, {} MiB sent so far",
            progress.round,
            progress.remaining_bytes >> 20,
            progress.sent_bytes >> 20
        );
        self.events.say_with("copy-round", text, figures);
    }

    fn say_slow(&self, percent: u8) {
        let text = match percent {
            0 => "the guest has all of its time again".to_owned(),
            100 => "the guest writes faster than can be sent: it stands still until the rest is sent".to_owned(),
            _ => format!("the guest writes faster than can be sent: it loses {percent} % of its time"),
        };
        self.events.say_with("copy-slow", text, Map::from_iter([("percent".to_owned(), json!(percent))]));
    }
}

/// A copy as the machine's thread sees it.
#[derive(Debug)]
pub(super) struct Copier {
    id: CopyId,
    consumer: ConsumerId,
    /// How much of its time the guest loses, in hundredths.
    slowed: u8,
}

/// What the machine's thread knows besides the machine.
pub(super) struct Surroundings<'a> {
    pub(super) disks: &'a [Replica],
    pub(super) last_output: u64,
    pub(super) pair: &'a Post<ToPair>,
}

/// How much of its time the guest loses, in hundredths.
pub(super) fn slowed(copier: Option<&Copier>) -> u8 {
    copier.map_or(0, |copier| copier.slowed)
}

/// Does what a copy asks for. Once the cut is made, `baseline` knows what changes from there on. An error is one of this host's disks.
pub(super) fn serve(
    copier: &mut Option<Copier>,
    baseline: &mut Option<Baseline>,
    machine: &mut Machine,
    ask: CopyAsk,
    around: &Surroundings,
) -> Result<()> {
    // A copy that is given up wants no answer.
    let answer = |event| _ = ask.answer.send(ToCopy::Event(event));
    let fail = |e: Error| _ = around.pair.send(ToPair::Copy(ask.id, CopyNews::Failed(e.to_string())));
    if let Wanted::Begin = ask.what {
        drop_copier(copier, machine);
        *copier = Some(Copier { id: ask.id, consumer: machine.track_dirty("copy", Start::Nothing), slowed: 0 });
        match preface(machine, around) {
            Ok(preface) => _ = ask.answer.send(ToCopy::Begun { preface, pages: machine.ram().flags().pages() }),
            Err(e) => fail(e),
        }
        return Ok(());
    }
    let Some(current) = copier.as_mut().filter(|copier| copier.id == ask.id) else { return Ok(()) };
    match ask.what {
        Wanted::Begin => {}
        Wanted::Collect => answer(Event::Dirty(vec![machine.take_dirty(current.consumer)])),
        Wanted::Read { units } => answer(Event::Copied(copy(
            machine,
            Vec::with_capacity(units.len() * twinstep_machine::PAGE_SIZE as usize),
            units.into_iter(),
        ))),
        Wanted::Slow { percent } => current.slowed = percent,
        Wanted::End => drop_copier(copier, machine),
        Wanted::Cut { mut rest, most_bytes, most_blocks, mut buffer, disks } => {
            let started = now_ns();
            let written = machine.take_dirty(current.consumer);
            rest.iter_mut().for_each(|rest| rest.join(&written));
            let pages = rest.first().map_or(0, PageSet::len);
            let blocks = disks.map_or(0, |mirrored| mirror::unsent(around.disks, mirrored.mirror));
            if pages as u64 * twinstep_machine::PAGE_SIZE > most_bytes || blocks > most_blocks {
                answer(Event::TooMuch(rest));
                return Ok(());
            }
            let copied = rest.iter().map(|rest| copy(machine, std::mem::take(&mut buffer), rest.iter().map(|page| page as u64)));
            let copied = copied.collect();
            let state = match state(machine, around) {
                Ok(state) => state,
                Err(e) => {
                    fail(e);
                    return Ok(());
                }
            };
            if let Some(MirroredDisks { mirror, baseline }) = disks {
                let Some(pieces) = mirror::rest(around.disks, mirror, baseline)? else {
                    fail(Error::new("the mirror of the disks was given up"));
                    return Ok(());
                };
                let _ = around.pair.send(ToPair::Copy(ask.id, CopyNews::Blocks { pieces, in_room: false }));
            }
            if let Some(before) = baseline.replace(Baseline::adopt(current.consumer, around.disks.to_vec())) {
                before.end(machine);
            }
            *copier = None;
            // In its place among the records.
            let _ = around.pair.send(ToPair::Copy(ask.id, CopyNews::Cut { position: machine.position(), blocks }));
            answer(Event::Finished { copied, state, pause_ns: now_ns() - started });
        }
    }
    Ok(())
}

fn drop_copier(copier: &mut Option<Copier>, machine: &mut Machine) {
    if let Some(before) = copier.take() {
        machine.untrack_dirty(before.consumer);
    }
}

/// Copies pages, into an empty buffer.
fn copy(machine: &Machine, bytes: Vec<u8>, pages: impl Iterator<Item = u64>) -> Copied {
    let mut copied = Copied { bytes, ..Copied::default() };
    pages.for_each(|page| copied.push(page, machine.ram().page_bytes(page as usize)));
    copied
}

/// What the standby must know before pages come: an image without pages or state.
fn preface(machine: &Machine, around: &Surroundings) -> Result<Vec<u8>> {
    let what = "cannot say what the machine is";
    let mut writer = ImageWriter::new(Vec::new(), &build::image_metadata(machine), Compression::Stored).what(what)?;
    writer.payload(&build::extra_payload(machine, &disks::bytes(around.disks), around.last_output, None)).what(what)?;
    Ok(writer.finish().what(what)?.0)
}

/// All but the pages: an image without pages.
fn state(machine: &Machine, around: &Surroundings) -> Result<Vec<u8>> {
    let what = "cannot save the machine's state";
    let mut writer = ImageWriter::new(Vec::new(), &build::image_metadata(machine), Compression::Stored).what(what)?;
    for payload in build::image_payloads(machine, &disks::bytes(around.disks), around.last_output, None) {
        writer.payload(&payload).what(what)?;
    }
    Ok(writer.finish().what(what)?.0)
}
