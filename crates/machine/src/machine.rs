//! The machine: processor, RAM and board, run to exact positions.
//!
//! **In:** [`Input`]s at the current position, positions to run to. **Out:** [`Output`]s, and why it stopped. **Invariant:** what the guest sees, and the
//! position at which it sees it, depend on the configuration, the disks and the inputs; not on how the run is cut into calls of
//! [`Machine::run`]. To that end the machine is *settled* whenever it is not running guest code: all that is due has fired and every interrupt that
//! can be taken has been taken.
use crate::board::Board;
use crate::boot::{self, BootError};
use crate::config::{Config, ConfigError};
use crate::digest::{Digest, RamDigest};
use crate::dirty::{ConsumerId, DirtyTracker, PageSet, Start};
use crate::disk::{Disk, DiskRequest, DiskWanted};
use crate::door::{Input, Output};
use crate::memory;
use crate::offload::LargeSegment;
use crate::payload::{Payload, Payloads, RestoreError};
use crate::pci::PciHost;
use crate::power::Ending;
use crate::stats::MachineStats;
use crate::virtio::{self, Failure, Received, VirtioPci};
use minicbor::{Decode, Encode};
use std::sync::Arc;
use twinstep_x86::{Activity, ActivityCell, CodeNote, Cpu, CpuConfig, CpuModel, CpuState, Exit, PAGE_SIZE, PhysMem, Position};

/// The longest Ethernet frame (without FCS) a network card takes from the world.
pub const MAX_FRAME: usize = 9216;
/// The shortest: two addresses and a type.
pub(crate) const MIN_FRAME: usize = 14;
/// Interrupts taken at one position; a guest that takes more is broken (its stack writes to its own interrupt controller).
const MAX_INTERRUPTS_AT_ONCE: u32 = 256;

/// Why [`Machine::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pause {
    /// The position asked for is reached.
    Position,
    /// The guest sleeps (HLT). Only an input wakes it: one for a device, or a clock input that reaches `wake_ns`.
    Idle {
        /// Guest time at which it wakes by itself, if ever.
        wake_ns: Option<u64>,
    },
    /// The guest waits for a shared disk ([`Machine::disk_requests`]). It may run on meanwhile.
    DiskRequest,
    /// The guest switched itself off.
    PoweredOff,
    /// The guest asked for a reset: build a new machine.
    Reset,
    /// The guest wrote to the debug-exit port.
    DebugExit {
        /// The exit status it asks for: twice what it wrote, plus one, cut off at eight bits.
        status: u8,
    },
    /// The processor shut down.
    Crashed {
        /// Why, for people.
        reason: String,
    },
    /// The host could not do its part (a disk's I/O error). The guest does not know; running again tries again.
    HostFailure(String),
}

/// Why an input was refused. The machine is as before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// No such network card.
    #[error("there is no network card {nic}; the machine has {cards}")]
    NoSuchNic {
        /// The one named.
        nic: u8,
        /// How many there are.
        cards: usize,
    },
    /// No request of a shared disk waits for this.
    #[error("no request {request} of disk {disk} waits for {bytes} bytes")]
    DiskDone {
        /// The disk named.
        disk: u8,
        /// The request named.
        request: u64,
        /// Bytes given.
        bytes: usize,
    },
    /// Not an Ethernet frame a card can take.
    #[error("a frame of {0} bytes is outside 14..=9216")]
    FrameLength(usize),
    /// Not a large segment that a card could cut.
    #[error("a frame of {bytes} bytes in pieces of {segment_size} is no large TCP segment")]
    LargeSegment {
        /// Its length.
        bytes: usize,
        /// The size of its pieces.
        segment_size: u16,
    },
    /// The machine waits for its host; it must be run until it no longer reports [`Pause::HostFailure`].
    #[error("the machine waits for its host: {0}")]
    HostFailure(String),
}

/// What is saved of the machine itself, beside its devices.
#[derive(Encode, Decode)]
struct Head {
    #[n(0)]
    position: Position,
    #[n(1)]
    ram_mib: u32,
    #[n(2)]
    cpu_model: String,
    /// Where the host failed, if the machine waits for it.
    #[n(3)]
    failed_at: Option<Position>,
}

/// Where the functions of each kind are on the PCI bus (index into the host's functions).
#[derive(Debug, Clone, Copy)]
struct Slots {
    disks: usize,
    nics: usize,
    console: usize,
    rng: usize,
}

/// A virtual PC with one processor.
#[derive(Debug)]
pub struct Machine {
    // First, so that it is dropped before the RAM it points to, which the board owns.
    cpu: CpuBox,
    model: CpuModel,
    board: Board,
    config: Config,
    slots: Slots,
    dirty: DirtyTracker,
    digest_pages: ConsumerId,
    /// Where [`Machine::digest_ram_some`] goes on.
    digest_next: usize,
    ram_digest: RamDigest,
}

/// The processor does not implement Debug.
struct CpuBox(Cpu);

impl std::fmt::Debug for CpuBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu").field("position", &self.0.position()).finish_non_exhaustive()
    }
}

const HEAD: &str = "machine";
const HEAD_VERSION: u16 = 1;

impl Machine {
    /// A machine at power-on, with `disks` in the order of `config.disks`.
    pub fn new(mut config: Config, disks: Vec<Box<dyn Disk>>) -> Result<Self, ConfigError> {
        config.check(&disks)?;
        let model = config.cpu()?;
        config.cpu_model = model.name.clone();
        let (ram, phys) = memory::map(config.ram_mib).map_err(ConfigError::Map)?;
        let pages = phys.flags().pages();
        let cpu_config = CpuConfig {
            code_cache_bytes: config.code_cache_bytes,
            max_block_instructions: config.max_block_instructions,
            cache_groups: config.cache_groups,
            ..CpuConfig::new(model.clone())
        };
        let mut cpu = Cpu::new(cpu_config, phys);

        let (functions, slots) = functions(&config, disks);
        let mut dirty = DirtyTracker::new(pages);
        // RAM is known to be all zero: whatever the flags say of it now is of no interest to anybody.
        cpu.harvest_dirty(&mut |_| {});
        let digest_pages = dirty.register("digest", Start::Nothing);
        Ok(Self {
            board: Board::new(ram, PciHost::new(functions), cpu.activity().clone()),
            cpu: CpuBox(cpu),
            model,
            config,
            slots,
            dirty,
            digest_pages,
            digest_next: 0,
            ram_digest: RamDigest::of_zeroes(pages),
        })
    }

    /// Loads a kernel (a Linux bzImage, an ELF image with a PVH note, or a multiboot image) with its initramfs (or module) and command line; the machine
    /// must not have run yet.
    pub fn boot(&mut self, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<(), BootError> {
        if self.position() != 0 {
            return Err(BootError::NotFresh);
        }
        let state = boot::load(&self.board.ram, self.config.ram_mib, kernel, initrd, cmdline)?;
        self.cpu.0.set_state(state);
        Ok(())
    }

    /// Adds QEMU's debug-exit port (0xf4, four ports): a write to it ends the run ([`Pause::DebugExit`]). It is part of the machine's state, so whoever
    /// takes that has it as well. The machine must not have run yet.
    pub fn add_debug_exit(&mut self) {
        if self.position() == 0 {
            self.board.power.add_debug_exit();
        }
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// Instructions retired since power-on.
    pub fn position(&self) -> Position {
        self.cpu.0.position()
    }
    /// Guest time at the current position, in nanoseconds since power-on.
    pub fn guest_ns(&self) -> u64 {
        self.board.clock.ns_at(self.position())
    }
    /// The processor's state.
    pub fn cpu_state(&self) -> &CpuState {
        self.cpu.0.state()
    }
    /// Guest RAM. A clone of it must not outlive the machine.
    pub fn ram(&self) -> &PhysMem {
        self.cpu.0.ram()
    }
    /// Everything that came out since the last call, in order.
    pub fn drain_outputs(&mut self) -> Vec<(Position, Output)> {
        std::mem::take(&mut self.board.outputs)
    }

    // Running.

    /// Runs until position `until` at most.
    pub fn run(&mut self, until: Position) -> Pause {
        self.board.activity.set(Activity::Device);
        let pause = self.run_to(until);
        self.board.activity.set(Activity::Host);
        pause
    }

    fn run_to(&mut self, until: Position) -> Pause {
        if let Some(failure) = self.board.failure.take() {
            self.board.with_pci(failure.position, |pci, cx| pci.functions.iter_mut().for_each(|f| f.retry(cx)));
        }
        loop {
            self.settle();
            let position = self.position();
            if let Some(failure) = &self.board.failure {
                return Pause::HostFailure(failure.message.clone());
            }
            match self.board.ending() {
                Some(Ending::PoweredOff) => return Pause::PoweredOff,
                Some(Ending::Reset) => return Pause::Reset,
                Some(&Ending::DebugExit(value)) => return Pause::DebugExit { status: (value as u8) << 1 | 1 },
                Some(Ending::Crashed(reason)) => return Pause::Crashed { reason: reason.clone() },
                None => {}
            }
            if std::mem::take(&mut self.board.asks) {
                return Pause::DiskRequest;
            }
            if self.cpu.0.state().halted {
                return Pause::Idle { wake_ns: self.wake_ns() };
            }
            if position >= until {
                return Pause::Position;
            }
            let timer = self.board.deadline_ns().and_then(|ns| self.board.clock.position_of(ns));
            let stop = timer.map_or(until, |timer| until.min(timer));
            // All that was due has fired, so the next deadline lies ahead; an engine that does not move would spin for ever.
            debug_assert!(stop > position);
            self.cpu.0.want_interrupt_window(self.board.lapic.pending().is_some());
            match self.cpu.0.run(&mut self.board, stop) {
                Exit::TripleFault => self.board.power.crash("triple fault"),
                Exit::Unsupported(what) => self.board.power.crash(what),
                Exit::Position | Exit::Halted | Exit::Attention | Exit::Window => {}
            }
            self.board.attention = false;
        }
    }

    /// Guest time at which a sleeping guest wakes by itself. With interrupts off, nothing wakes it.
    fn wake_ns(&self) -> Option<u64> {
        let interruptible = self.cpu.0.state().rflags & twinstep_x86::state::rflags::IF != 0;
        self.board.deadline_ns().filter(|_| interruptible)
    }

    /// Fires what is due and delivers what can be delivered. Idempotent.
    fn settle(&mut self) {
        for _ in 0..MAX_INTERRUPTS_AT_ONCE {
            // What the host still owes comes before anything else, as it does where the host did not fail.
            if self.board.failure.is_some() {
                return;
            }
            let position = self.position();
            self.board.latch(position, self.cpu.0.state().tsc_offset);
            self.board.fire_due(position);
            self.board.attention = false;
            if self.board.ending().is_some() {
                return;
            }
            let Some(vector) = self.board.lapic.pending().filter(|_| self.cpu.0.can_interrupt()) else { return };
            self.board.lapic.take(vector);
            match self.cpu.0.interrupt(&mut self.board, vector) {
                Ok(()) => {}
                Err(Exit::Unsupported(what)) => self.board.power.crash(what),
                Err(_) => self.board.power.crash("triple fault while taking an interrupt"),
            }
        }
        self.board.power.crash("interrupts without end at one instruction");
    }

    /// What its shared disks wait for, by disk, then oldest first: reads, and flushes, which have left as outputs as well. Each waits until [`Input::DiskDone`] is given, also over a save and
    /// restore.
    pub fn disk_requests(&self) -> Vec<DiskRequest> {
        let disks = 0..self.config.disks.len();
        let of = |disk: usize| self.board.pci.functions.get(self.slots.disks + disk).map_or(Vec::new(), |f| f.waits_for());
        disks
            .flat_map(|disk| of(disk).into_iter().map(move |(request, wanted)| DiskRequest { disk: disk as u8, request, wanted }))
            .collect()
    }

    /// Counters since this machine was made.
    pub fn stats(&self) -> MachineStats {
        MachineStats { cpu: self.cpu.0.stats(), devices: self.board.stats }
    }
    /// What this machine is doing, for other threads to look at. Outside of the calls that work it is [`Activity::Host`]; whoever drives the
    /// machine may say better.
    pub fn activity(&self) -> &Arc<ActivityCell> {
        self.cpu.0.activity()
    }
    /// Notes from now on where translated code lies, for profilers ([`Machine::take_code_notes`]).
    pub fn note_code(&mut self) {
        self.cpu.0.note_code();
    }
    /// What was translated since this was called last.
    pub fn take_code_notes(&mut self) -> Vec<CodeNote> {
        self.cpu.0.take_code_notes()
    }

    // The door.

    /// Applies an input at the current position. After the run has ended, inputs are ignored.
    pub fn input(&mut self, input: Input) -> Result<(), InputError> {
        self.check(&input)?;
        let position = self.position();
        if self.board.ending().is_some() {
            return Ok(());
        }
        self.board.activity.set(Activity::Device);
        match input {
            Input::Clock { advance_to_ns, picoseconds_per_instruction } => {
                self.board.clock.pull(position, advance_to_ns, picoseconds_per_instruction);
            }
            Input::NetRx { nic, frame } => {
                self.board.receive(position, self.slots.nics + usize::from(nic), Received::Frame(frame));
            }
            Input::NetRxGso { nic, frame, segment_size } => {
                let received = Received::LargeSegment { frame, segment_size };
                self.board.receive(position, self.slots.nics + usize::from(nic), received);
            }
            Input::Serial(bytes) => self.board.type_serial(&bytes),
            Input::Console(bytes) => self.board.receive(position, self.slots.console, Received::Bytes(bytes)),
            Input::Seed(seed) => self.board.receive(position, self.slots.rng, Received::Seed(seed)),
            Input::WallClock(ns) => self.board.rtc.set_wall_clock(ns),
            Input::PowerButton => self.board.press_power_button(),
            Input::DiskDone { disk, request, data } => {
                self.board.receive(position, self.slots.disks + usize::from(disk), Received::DiskDone { request, data });
            }
        }
        self.settle();
        self.board.activity.set(Activity::Host);
        Ok(())
    }

    fn check(&self, input: &Input) -> Result<(), InputError> {
        if let Some(failure) = &self.board.failure {
            return Err(InputError::HostFailure(failure.message.clone()));
        }
        if let Input::DiskDone { disk, request, data } = input {
            let waits = self.disk_requests().into_iter().find(|waits| (waits.disk, waits.request) == (*disk, *request));
            let length = match waits.map(|waits| waits.wanted) {
                Some(DiskWanted::Read { length, .. }) => Some(length as usize),
                Some(DiskWanted::Flush) => Some(0),
                None => None,
            };
            return match length {
                Some(length) if length == data.len() => Ok(()),
                _ => Err(InputError::DiskDone { disk: *disk, request: *request, bytes: data.len() }),
            };
        }
        let (Input::NetRx { nic, frame } | Input::NetRxGso { nic, frame, .. }) = input else { return Ok(()) };
        let cards = self.config.nics.len();
        if usize::from(*nic) >= cards {
            return Err(InputError::NoSuchNic { nic: *nic, cards });
        }
        match *input {
            Input::NetRxGso { segment_size, .. } if LargeSegment::of(frame, segment_size, MAX_FRAME).is_none() => {
                Err(InputError::LargeSegment { bytes: frame.len(), segment_size })
            }
            Input::NetRx { .. } if !(MIN_FRAME..=MAX_FRAME).contains(&frame.len()) => Err(InputError::FrameLength(frame.len())),
            _ => Ok(()),
        }
    }

    // State.

    /// The state of everything but RAM and disks. Outputs not yet drained are not part of it.
    pub fn save(&self) -> Vec<Payload> {
        let b = &self.board;
        let head = Head {
            position: self.position(),
            ram_mib: self.config.ram_mib,
            cpu_model: self.config.cpu_model.clone(),
            failed_at: b.failure.as_ref().map(|f| f.position),
        };
        let mut payloads = vec![
            Payload::encode(HEAD, HEAD_VERSION, &head),
            crate::cpu_payload::save(self.cpu.0.state()),
            b.clock.save(),
            b.lapic.save(),
            b.ioapic.save(),
            b.serial.save(),
            b.rtc.save(),
            b.kvmclock.save(),
            b.power.save(),
            b.pci.save(),
        ];
        payloads.extend(b.pci.functions.iter().map(VirtioPci::save));
        payloads
    }

    /// Takes a saved state, of a machine with the same configuration. RAM is brought separately ([`Machine::write_ram_page`]), before or after.
    /// After an error the machine must be thrown away.
    pub fn restore(&mut self, payloads: Vec<Payload>) -> Result<(), RestoreError> {
        let mut payloads = Payloads::new(payloads)?;
        let payload = payloads.take(HEAD, HEAD_VERSION)?;
        let head: Head = payload.decode()?;
        if head.ram_mib != self.config.ram_mib {
            return Err(payload.invalid(format!("it has {} MiB of RAM, this machine {}", head.ram_mib, self.config.ram_mib)));
        }
        if head.cpu_model != self.config.cpu_model {
            return Err(
                payload.invalid(format!("its CPU model is '{}', this machine's '{}'", head.cpu_model, self.config.cpu_model))
            );
        }
        let state = crate::cpu_payload::restore(&mut payloads)?;
        if !self.model.allows(&state) {
            return Err(payload.invalid(format!("its processor is in a state that a '{}' cannot be in", self.model.name)));
        }
        let b = &mut self.board;
        b.clock.restore(&mut payloads, head.position)?;
        b.lapic.restore(&mut payloads)?;
        b.ioapic.restore(&mut payloads)?;
        b.serial.restore(&mut payloads)?;
        b.rtc.restore(&mut payloads)?;
        b.kvmclock.restore(&mut payloads)?;
        b.power.restore(&mut payloads)?;
        b.pci.restore(&mut payloads)?;
        for function in &mut b.pci.functions {
            function.restore(&mut payloads)?;
        }
        payloads.finish()?;
        b.outputs.clear();
        let message = "saved while it waited for its host".into();
        b.failure = head.failed_at.map(|position| Failure { position, message });
        self.cpu.0.set_state(state);
        self.cpu.0.set_position(head.position);
        Ok(())
    }

    /// Replaces a page of RAM (snapshot, migration). Returns false if there is no such page.
    pub fn write_ram_page(&mut self, page: usize, bytes: &[u8; PAGE_SIZE as usize]) -> bool {
        use vm_memory::Bytes;
        if page >= self.ram().flags().pages() {
            return false;
        }
        let gpa = self.ram().gpa_of_page(page);
        self.board.ram.write_slice(bytes, vm_memory::GuestAddress(gpa)).is_ok()
    }

    /// Somebody who wants to know which pages change from now on (or, with [`Start::Everything`], all pages first).
    pub fn track_dirty(&mut self, name: &'static str, start: Start) -> ConsumerId {
        self.harvest();
        self.dirty.register(name, start)
    }
    /// Ends a registration.
    pub fn untrack_dirty(&mut self, id: ConsumerId) {
        self.dirty.unregister(id);
    }
    /// The pages that changed since the same consumer asked last.
    pub fn take_dirty(&mut self, id: ConsumerId) -> PageSet {
        self.harvest();
        self.dirty.take(id)
    }

    /// Every consumer of dirty pages and how many wait for it, for diagnosis.
    pub fn dirty_waiting(&mut self) -> Vec<(&'static str, usize)> {
        self.harvest();
        self.dirty.waiting()
    }

    fn harvest(&mut self) {
        let dirty = &mut self.dirty;
        self.cpu.0.harvest_dirty(&mut |page| dirty.mark(page));
    }

    /// Drops everything the processor has cached. Invisible to the guest; for tests that prove just that.
    pub fn drop_caches(&mut self) {
        self.cpu.0.drop_caches();
    }

    /// The digest of the whole state but the disks. Costs time in proportion to the pages changed since the last one.
    pub fn digest(&mut self) -> Digest {
        self.digest_ram();
        Digest::new(&self.ram_digest, self.cpu.0.state(), &self.save())
    }

    /// Brings RAM's part of the digest up to date, so that there is less to do at the next [`Machine::digest`].
    pub fn digest_ram(&mut self) {
        for page in self.take_dirty(self.digest_pages).iter() {
            self.ram_digest.update(page, self.cpu.0.ram().page_bytes(page));
        }
    }

    /// A part of [`Machine::digest_ram`], of at most `most` pages. Says how many pages are left.
    pub fn digest_ram_some(&mut self, most: usize) -> usize {
        self.harvest();
        let (pages, left) = self.dirty.take_some(self.digest_pages, self.digest_next, most);
        self.digest_next = pages.last().map_or(0, |page| page + 1);
        for page in pages {
            self.ram_digest.update(page, self.cpu.0.ram().page_bytes(page));
        }
        left
    }

    /// Looks at these pages again; those that are not what their hash says.
    pub(crate) fn rehash(&mut self, pages: std::ops::Range<usize>) -> Vec<usize> {
        let changed = |&page: &usize| self.ram_digest.pages()[page] != RamDigest::hash(page, self.cpu.0.ram().page_bytes(page));
        let pages: Vec<usize> = pages.filter(changed).collect();
        for &page in &pages {
            self.ram_digest.update(page, self.cpu.0.ram().page_bytes(page));
        }
        pages
    }

    /// Replaces the processor's state.
    pub(crate) fn set_cpu_state(&mut self, state: CpuState) {
        self.cpu.0.set_state(state);
    }

    /// A hash for every page of RAM as of the last digest (0 for a page of zeroes), to find out which pages make two digests differ.
    pub fn page_hashes(&self) -> &[u128] {
        self.ram_digest.pages()
    }

    /// The bus, for tests that play the driver.
    #[cfg(test)]
    pub(crate) fn bus(&mut self) -> &mut dyn twinstep_x86::Bus {
        &mut self.board
    }
}

/// All PCI functions in the order of their devices: disks, network cards, console, entropy.
fn functions(config: &Config, disks: Vec<Box<dyn Disk>>) -> (Vec<VirtioPci>, Slots) {
    let mut functions = Vec::new();
    for (i, (disk, settings)) in disks.into_iter().zip(&config.disks).enumerate() {
        functions.push(VirtioPci::new(Box::new(virtio::Block::new(disk, i as u8, settings)), i));
    }
    let nics = functions.len();
    for (i, mac) in config.nics.iter().enumerate() {
        functions.push(VirtioPci::new(Box::new(virtio::Net::new(i as u8, *mac)), i));
    }
    let console = functions.len();
    functions.push(VirtioPci::new(Box::new(virtio::Console::new()), 0));
    functions.push(VirtioPci::new(Box::new(virtio::Rng::new()), 0));
    (functions, Slots { disks: 0, nics, console, rng: console + 1 })
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
