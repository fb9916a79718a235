//! The engine: runs translated code and stops at exact positions.
//!
//! **In:** a [`Bus`], a position. **Out:** an [`Exit`], with the state exact at an instruction boundary.
//!
//! The loop in [`Core::run`] looks up a block, enters it, and acts upon the reason for which it was left. Everything out of the
//! ordinary is done by [`Core::step_alone`], one instruction at a time: faults, devices, watched pages, shadows, the
//! last few instructions before a stop. The helpers at the end are what translated code calls.
//!
//! Invariant: whether an instruction ran in a block, alone, or was retried makes no difference to the state or to the position.
mod alone;
mod fetch;
mod helpers;
mod mode;
mod onward;
mod vectors;

use crate::activity::{Activity, ActivityCell};
use crate::cache::{Cache, CodeNote, Key};
use crate::classify::image;
use crate::emit::{Emit, Helpers, Shared};
use crate::exception::Vector;
use crate::frame::{Frame, FrameAt, LowArea, exit};
use crate::mmu::{Mmu, canonical};
use crate::priority;
use crate::signals::Running;
use crate::sites::Sites;
use crate::state::{cr4, gpr, rflags};
use crate::stats::{CpuGauges, CpuStats};
use crate::sys::{self, Cx, Delivery, Flow};
use crate::translate::{MAX_TRACE, Manner, Mode, SHORT_TRACE, Source, Workshop, translate};
use crate::{Bus, CpuModel, CpuState, Exception, Exit, Features, PAGE_SIZE, PageFlags, PhysMem, Position};
use alone::{ALONE_KEPT, Alone};
use fetch::Bytes;
use helpers::{mem_alone_helper, mem_helper, sys_helper, write_back_helper};
use std::cell::Cell;
use std::sync::Arc;

/// How an engine is built. None of it but the model is visible to the guest.
#[derive(Debug, Clone)]
pub struct CpuConfig {
    /// The CPU model the guest sees.
    pub model: CpuModel,
    /// Bytes of translated code kept at most (at least 1 MiB is used).
    pub code_cache_bytes: usize,
    /// Guest instructions in a block at most (1..=96); 1 runs everything one instruction a block.
    pub max_block_instructions: u32,
    /// Runs of a block after which it is translated anew as a trace; 0: every block is a trace at once.
    pub trace_after: u32,
    /// Address spaces whose caches are kept while another one is current (0: none, 64 at most).
    pub cache_groups: usize,
}

impl CpuConfig {
    /// Sensible sizes for a model.
    pub fn new(model: CpuModel) -> Self {
        Self { model, code_cache_bytes: 64 << 20, max_block_instructions: MAX_TRACE, trace_after: 50, cache_groups: 16 }
    }
}

/// One deterministic processor.
pub struct Cpu {
    // Boxed: translated code and helpers know its address.
    core: Box<Core>,
}

// SAFETY: a Cpu owns everything its raw pointers lead to, but for guest RAM, whose owner promised to keep it (PhysMem::new), and
// the bus, which is only followed during `run`.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A processor over `ram` in the state after reset.
    ///
    /// # Panics
    /// If the host has no executable memory below 2 GiB left for the code cache, or cannot execute the model's instructions
    /// ([`CpuModel::missing`]).
    pub fn new(config: CpuConfig, ram: PhysMem) -> Self {
        let mut core = Core::new(config, ram);
        // SAFETY: the frame is mapped as long as the core lives.
        unsafe { (*core.frame).core = &mut *core };
        Self { core }
    }
    /// The architectural state, exact.
    pub fn state(&self) -> &CpuState {
        // SAFETY: the frame is mapped as long as the core lives, and only `run` (&mut self) changes it.
        unsafe { &(*self.core.frame).st }
    }
    /// Replaces the architectural state (boot, snapshot restore); everything derived from the old one is dropped.
    pub fn set_state(&mut self, state: CpuState) {
        let cr3 = state.cr3;
        *self.core.st() = state;
        self.core.mmu.flush_all();
        self.core.mmu.switch(cr3);
    }
    /// Instructions retired since power-on.
    pub fn position(&self) -> Position {
        self.core.position
    }
    /// Sets the position (snapshot restore).
    pub fn set_position(&mut self, position: Position) {
        self.core.position = position;
    }
    /// Guest RAM.
    pub fn ram(&self) -> &PhysMem {
        self.core.mmu.ram()
    }
    /// Runs until position `until` at most. A halted processor returns [`Exit::Halted`] at once.
    pub fn run(&mut self, bus: &mut dyn Bus, until: Position) -> Exit {
        self.core.run(bus, until)
    }
    /// Whether an interrupt could be taken right now (IF set, no shadow; halted or not).
    pub fn can_interrupt(&self) -> bool {
        let st = self.state();
        st.rflags & rflags::IF != 0 && !st.interrupt_shadow
    }
    /// Delivers external interrupt `vector` at the current position. Wakes a halted processor.
    /// An error is how that ended the run.
    ///
    /// # Panics
    /// If [`Cpu::can_interrupt`] is false.
    pub fn interrupt(&mut self, bus: &mut dyn Bus, vector: u8) -> Result<(), Exit> {
        assert!(self.can_interrupt(), "interrupt {vector} at a place that takes none");
        self.core.stats.engine.interrupts += 1;
        let before = self.core.activity.replace(Activity::Exception);
        let delivery = sys::deliver_interrupt(&mut self.core.cx(bus), vector);
        self.core.activity.set(before);
        match delivery {
            Delivery::Done => Ok(()),
            Delivery::TripleFault => Err(Exit::TripleFault),
            Delivery::Unsupported(what) => Err(Exit::Unsupported(what)),
        }
    }
    /// Asks [`Cpu::run`] to return [`Exit::Window`] as soon as [`Cpu::can_interrupt`] holds.
    pub fn want_interrupt_window(&mut self, wanted: bool) {
        // SAFETY: the frame is mapped as long as the core lives.
        unsafe { (*self.core.frame).window = wanted as u64 };
    }
    /// Clears the dirty flags of all pages and makes the next store to each set it again.
    /// Calls `each` with every page that was dirty.
    pub fn harvest_dirty(&mut self, each: &mut dyn FnMut(usize)) {
        let flags = self.core.mmu.ram().flags().clone();
        for page in 0..flags.pages() {
            if flags.get(page) & PageFlags::DIRTY != 0 {
                flags.clear(page, PageFlags::DIRTY);
                each(page);
            }
        }
        self.core.mmu.forbid_all_writes();
    }
    /// Drops everything that is cached (translated code, TLBs). Invisible to the guest; for tests that prove just that.
    pub fn drop_caches(&mut self) {
        let flags = self.core.mmu.ram().flags().clone();
        self.core.mmu.flush_all();
        self.core.cache.flush(&flags);
        self.core.mmu.forget_code();
    }
    /// Notes from now on where translated code lies, for [`Cpu::take_code_notes`].
    pub fn note_code(&mut self) {
        self.core.note_code();
    }
    /// What was translated since this was called last. Nothing unless [`Cpu::note_code`] was called.
    pub fn take_code_notes(&mut self) -> Vec<CodeNote> {
        self.core.cache.notes.as_mut().map(std::mem::take).unwrap_or_default()
    }
    /// Counters since this processor was made.
    pub fn stats(&self) -> CpuStats {
        let (groups, kept) = self.core.mmu.group_counters();
        let (bytes, capacity) = self.core.cache.fill();
        let now = CpuGauges { code_bytes: bytes as u64, code_capacity: capacity as u64, address_spaces: kept as u64 };
        CpuStats { tlb: self.core.mmu.stats, code: self.core.cache.stats, groups, now, ..self.core.stats }
    }
    /// What this processor is doing, for other threads to look at.
    pub fn activity(&self) -> &Arc<ActivityCell> {
        &self.core.activity
    }
}

/// What stands in for memory that the single instruction now running cannot access in place.
#[derive(Debug, Clone, Copy, Default)]
struct Bounce {
    ea: u64,
    len: usize,
    active: bool,
}

/// An access that is to be translated in another way.
#[derive(Debug, Clone, Copy)]
struct GiveUp {
    /// Host address of its check.
    code: usize,
    /// Which instruction of its block it is.
    instruction: usize,
    /// It led a group whose bytes could not be accessed as one, rather than having missed.
    group: bool,
}

/// The engine proper. Translated code knows its address through the frame.
pub struct Core {
    frame: *mut Frame,
    mmu: Mmu,
    cache: Cache,
    shared: Shared,
    workshop: Workshop,
    model: CpuModel,
    /// The model has AVX.
    avx: bool,
    max: u32,
    trace_after: u32,
    /// The bus, during `run`.
    bus: Option<*mut dyn Bus>,
    /// The position at which the budget is used up, while code runs.
    limit: Position,
    /// The position, while no code runs.
    position: Position,
    /// The exception that ended an instruction run alone.
    fault: Option<Exception>,
    bounce: Bounce,
    /// Accesses whose sites miss too often, or whose groups cannot be accessed as one.
    give_up: Vec<GiveUp>,
    /// Instructions that ran alone not long ago.
    alone: Box<[Option<Alone>; ALONE_KEPT]>,
    code: (usize, usize),
    stats: CpuStats,
    activity: Arc<ActivityCell>,
    // Last: unmapped after everything that points into it is gone.
    _area: LowArea,
}

impl Drop for Core {
    fn drop(&mut self) {
        // SAFETY: written by `new`, and used no more. The rest of the frame owns nothing.
        unsafe { (&raw mut (*self.frame).first.sites).drop_in_place() };
    }
}

/// Room for the shared routines at the start of the code area.
const SHARED_BYTES: usize = 12 << 10;
/// Translated code a site: there is one for each memory access, and an access is some 100 bytes with all that is put apart.
const BYTES_PER_SITE: usize = 96;

impl Core {
    fn new(config: CpuConfig, ram: PhysMem) -> Box<Self> {
        let missing = config.model.missing();
        assert!(missing.is_empty(), "this host lacks {missing}, which {} has", config.model.name);
        let code = config.code_cache_bytes.max(1 << 20);
        let area = LowArea::new(code + SHARED_BYTES, code / BYTES_PER_SITE);
        let frame = area.frame();
        let (start, len) = area.code();
        let emit = Emit::new(start, FrameAt(frame as usize as i32), false, Shared::default());
        let helpers = Helpers { mem: mem_helper, mem_alone: mem_alone_helper, write_back: write_back_helper, sys: sys_helper };
        let avx = config.model.features.has(Features::AVX);
        let (code, shared) = emit.shared(frame as usize as i32, helpers, avx);
        assert!(code.len() <= SHARED_BYTES);
        // SAFETY: the area is ours; the code fits; the frame is zeroed memory of its type, and its pieces are set up here.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), start as *mut u8, code.len());
            (&raw mut (*frame).st).write(CpuState::reset());
            let (first_site, capacity) = area.sites();
            (&raw mut (*frame).first.sites).write(Sites::new(first_site, capacity));
            Box::new(Self {
                frame,
                mmu: Mmu::new(ram, &raw mut (*frame).first, config.cache_groups),
                cache: Cache::new(start + SHARED_BYTES, start + len),
                shared,
                workshop: Workshop::new(FrameAt(frame as usize as i32), shared),
                model: config.model,
                avx,
                max: config.max_block_instructions.clamp(1, MAX_TRACE),
                trace_after: config.trace_after,
                bus: None,
                limit: 0,
                position: 0,
                fault: None,
                bounce: Bounce::default(),
                give_up: Vec::new(),
                alone: Box::new([const { None }; ALONE_KEPT]),
                code: (start, len),
                stats: CpuStats::default(),
                activity: Arc::default(),
                _area: area,
            })
        }
    }

    fn note_code(&mut self) {
        let routines = self.shared.named();
        let ends = routines[1..].iter().map(|r| r.0).chain([self.code.0 as i32 + SHARED_BYTES as i32]);
        let notes = routines.iter().zip(ends).map(|(&(start, kind), end)| {
            let (start, len) = (start as usize, (end - start) as usize);
            CodeNote { start, len, rip: 0, kind, user: false }
        });
        self.cache.notes = Some(notes.collect());
    }

    #[allow(clippy::mut_from_ref)]
    fn st(&mut self) -> &mut CpuState {
        // SAFETY: mapped as long as `self` lives; one borrow at a time through &mut self.
        unsafe { &mut (*self.frame).st }
    }

    fn cx<'a>(&'a mut self, bus: &'a mut dyn Bus) -> Cx<'a> {
        // SAFETY: the frame's state is not part of any other field of `self`.
        let st = unsafe { &mut (*self.frame).st };
        let counts = &mut self.stats.system;
        Cx { st, mmu: &mut self.mmu, bus, position: self.position, model: &self.model, unsupported: None, counts }
    }

    fn bus(&self) -> &'static mut dyn Bus {
        // SAFETY: set by `run` for its duration, and everything that calls this runs inside it; the machine does not touch the bus
        // meanwhile. The lifetime is shortened to that by never being stored.
        unsafe { &mut *self.bus.expect("only during run") }
    }

    /// Whether an interrupt waits for a place where it can be taken.
    fn window(&self) -> bool {
        // SAFETY: the frame is ours.
        unsafe { (*self.frame).window != 0 }
    }

    // ---- flags between the frame's two forms ----

    fn split_flags(&mut self) {
        // SAFETY: the frame is ours.
        let frame = unsafe { &mut *self.frame };
        let f = frame.st.rflags;
        frame.flags = (f & 0xd5 | 2) << 8 | (f & rflags::OF != 0) as u64;
    }
    fn join_flags(&mut self) {
        // SAFETY: the frame is ours.
        let frame = unsafe { &mut *self.frame };
        let of = if frame.flags & 1 != 0 { rflags::OF } else { 0 };
        frame.st.rflags = frame.st.rflags & !rflags::STATUS | frame.flags >> 8 & 0xd5 | of | rflags::ONE;
    }

    // ---- the loop ----

    fn run(&mut self, bus: &mut dyn Bus, until: Position) -> Exit {
        // SAFETY: only the lifetime is erased; `bus()` is called inside this function's extent only.
        self.bus = Some(unsafe { std::mem::transmute::<*mut dyn Bus, *mut (dyn Bus + 'static)>(bus as *mut dyn Bus) });
        // SAFETY: code and frame live as long as `self`.
        let running = unsafe { Running::enter(self.code, self.shared.fault as usize, self.frame) };
        let mut host_fpu = crate::state::FxImage([0; 512]);
        // SAFETY: stores FPU registers into an aligned buffer.
        unsafe { std::arch::asm!("fxsave64 [{}]", in(reg) host_fpu.0.as_mut_ptr(), options(nostack)) };
        self.load_fpu();
        self.mmu.sites().period = self.position / crate::sites::PERIOD;
        let before = self.activity.replace(Activity::Engine);
        let exit = self.run_loop(until);
        self.activity.set(before);
        self.save_fpu();
        // SAFETY: loads what was stored above.
        unsafe { std::arch::asm!("fxrstor64 [{}]", in(reg) host_fpu.0.as_ptr(), clobber_abi("sysv64")) };
        drop(running);
        self.bus = None;
        exit
    }

    fn run_loop(&mut self, until: Position) -> Exit {
        // Up to here every instruction runs alone: the budget is too small for the next block.
        let mut alone_until = 0;
        // Up to here blocks are short, for the same reason.
        let mut short_until = 0;
        loop {
            self.settle();
            let window = self.window();
            let st = self.st();
            if window && st.rflags & rflags::IF != 0 && !st.interrupt_shadow {
                return Exit::Window;
            }
            if st.halted {
                return Exit::Halted;
            }
            // Code of privilege levels 1 and 2 goes alone as well: blocks know kernel and user only.
            let careful = st.interrupt_shadow || st.rflags & (rflags::TF | rflags::RF) != 0 || matches!(st.cpl, 1 | 2);
            if self.bus().attention() {
                return Exit::Attention;
            }
            if self.position >= until {
                return Exit::Position;
            }
            let step = if careful || self.position < alone_until || !self.is_flat() {
                self.step_alone()
            } else {
                match self.find_block(self.position < short_until) {
                    Ok(id) => {
                        if let Some(n) = self.run_block(id, until) {
                            let end = (self.position + n).min(until);
                            *if n > SHORT_TRACE as u64 { &mut short_until } else { &mut alone_until } = end;
                        }
                        Ok(())
                    }
                    Err(stop) => Err(stop),
                }
            };
            let step = match step {
                Err(Stop::Fault(e)) => self.deliver(e),
                other => other,
            };
            match step {
                Ok(()) => {}
                Err(Stop::Unsupported(what)) => return Exit::Unsupported(what),
                Err(Stop::Shutdown | Stop::Fault(_)) => return Exit::TripleFault,
            }
        }
    }

    /// Acts upon what the last instruction, or a device, changed under the caches.
    fn settle(&mut self) {
        self.mmu.sweep_device_writes();
        while let Some(access) = self.give_up.pop() {
            self.stats.engine.sites_given_up += 1;
            self.cache.give_up_sites(access.code, access.instruction, access.group, self.mmu.sites());
        }
        if self.mmu.take_upper_forgotten() {
            self.cache.unlink_far();
        }
        if !self.mmu.pending.any() && self.cache.dead.is_empty() {
            return;
        }
        let mut pending = std::mem::take(&mut self.mmu.pending);
        for &(page, first, last) in &pending.code {
            let gpa = self.mmu.ram().gpa_of_page(page);
            if self.cache.bytes_changed(page, gpa, first, last) {
                self.mmu.ram().flags().clear(page, PageFlags::CODE);
            }
        }
        for (rip, user) in self.cache.dead.drain(..) {
            self.mmu.forget_jump(rip, user);
        }
        // Code that may be running is found again by whoever called.
        pending.refetch = false;
        // Keep the allocation.
        pending.code.clear();
        self.mmu.pending = pending;
    }

    fn deliver(&mut self, e: Exception) -> Result<(), Stop> {
        self.stats.engine.exceptions += 1;
        let before = self.activity.replace(Activity::Exception);
        let bus = self.bus();
        let delivery = sys::deliver_exception(&mut self.cx(bus), e);
        self.activity.set(before);
        match delivery {
            Delivery::Done => Ok(()),
            Delivery::TripleFault => Err(Stop::Shutdown),
            Delivery::Unsupported(what) => Err(Stop::Unsupported(what)),
        }
    }

    fn enter(&mut self, entry: u32, budget: u64) {
        self.stats.engine.entries += 1;
        self.split_flags();
        // SAFETY: the frame is ours; `entry` is code made for this frame, which keeps the ABI through the shared routines.
        unsafe {
            (*self.frame).budget = budget;
            (*self.frame).owed = 0;
            let f: extern "sysv64" fn(usize) = std::mem::transmute(self.shared.enter as usize);
            let before = self.activity.replace(Activity::Guest);
            f(entry as usize);
            self.activity.set(before);
        }
        self.join_flags();
    }

    /// Runs from block `id` on. Returns how many instructions must run alone, or in shorter blocks, next, if any.
    fn run_block(&mut self, id: u32, until: Position) -> Option<u64> {
        self.limit = until;
        let budget = (until - self.position).min(i64::MAX as u64 / 2);
        self.limit = self.position + budget;
        self.note_clock();
        let mut entry = self.cache.block(id).entry;
        let mut left = budget;
        loop {
            self.enter(entry, left);
            // SAFETY: the frame is ours.
            let frame = unsafe { &*self.frame };
            let (reason, arg, pc) = (frame.exit, frame.exit_arg, frame.fault_pc);
            self.stats.exits.count(reason);
            left = frame.budget;
            self.position = self.limit - left;
            match reason {
                exit::LOOKUP if !canonical(self.st().rip) => {
                    // Only an indirect branch can have led there, and it is what faults: it runs again, alone.
                    let block = self.cache.block(arg as u32);
                    let rip = block.rip_of(block.len() as usize - 1);
                    // SAFETY: the frame is ours.
                    let moved = unsafe { (*self.frame).tmp[2] };
                    self.position -= 1;
                    let st = self.st();
                    st.rip = rip;
                    st.gpr[gpr::RSP] = st.gpr[gpr::RSP].wrapping_sub(moved);
                    return Some(1);
                }
                exit::LOOKUP | exit::HELPER => return None,
                exit::LINK if self.cache.is_far(arg as u32) => match self.far_entry(arg as u32) {
                    Some(far) => entry = far,
                    None => return None,
                },
                exit::LINK => {
                    let key = self.cache.link_target(arg as u32);
                    self.st().rip = key.rip;
                    // A block that is known is linked and entered at once; the rest is the main loop's.
                    let life = self.cache.life();
                    let to = match self.cache.find(key) {
                        None if key.mode.has(Mode::UNGROUPED) => self.ungrouped_block(key).ok()?,
                        known => known?,
                    };
                    if life != self.cache.life() {
                        entry = self.cache.block(to).entry;
                        continue;
                    }
                    self.cache.link(arg as u32, to);
                    if self.cache.block(to).second.is_some() {
                        return None;
                    }
                    entry = self.cache.block(to).entry;
                }
                exit::BUDGET => {
                    let block = self.cache.block(arg as u32);
                    let (rip, n) = (block.key.rip, block.len());
                    self.st().rip = rip;
                    self.cache.sample(arg as u32);
                    return Some(n);
                }
                exit::HOT => {
                    let id = arg as u32;
                    self.st().rip = self.cache.block(id).key.rip;
                    self.cache.heat(id);
                    return None;
                }
                exit::ALONE | exit::BAIL => return Some(1),
                exit::HOST_FAULT => {
                    let block = self.cache.block_at(pc as usize).expect("faults are caught in blocks only");
                    let k = block.instruction_at(pc as usize);
                    let (rip, unused) = (block.rip_of(k), block.len() - k as u64);
                    self.fix_flags_after_fault(pc as usize);
                    self.position -= unused;
                    self.st().rip = rip;
                    return Some(1);
                }
                _ => unreachable!("exit reason {reason}"),
            }
        }
    }

    /// Lets translated code know how the time-stamp counter counts.
    fn note_clock(&mut self) {
        let rate = self.bus().tsc_rate();
        // SAFETY: the frame is ours.
        let frame = unsafe { &mut *self.frame };
        frame.tsc_origin = 0;
        if let Some(rate) = rate
            && let Some(origin) = self.limit.checked_sub(rate.position)
        {
            (frame.tsc_origin, frame.tsc, frame.tsc_thousandths) = (origin, rate.tsc, rate.thousandths);
        }
    }

    /// After a host fault: makes the guest's flags exact, from the host's or as the block says.
    fn fix_flags_after_fault(&mut self, pc: usize) {
        let block = self.cache.block_at(pc).expect("faults are caught in blocks only");
        let point = block.points[block.instruction_at(pc)];
        if point.flags_in_host {
            // SAFETY: the frame is ours.
            let flags = unsafe { (*self.frame).fault_flags };
            let st = self.st();
            st.rflags = st.rflags & !rflags::STATUS | flags & rflags::STATUS;
        } else if point.fix != 0 {
            // Changes nothing but the flags.
            self.enter(point.fix, 0);
        }
    }

    /// The block at RIP, translated if need be, and published for jumps unless it is a short one.
    fn find_block(&mut self, short: bool) -> Result<u32, Stop> {
        self.stats.engine.lookups += 1;
        let mut mode = self.mode();
        let user = mode.has(Mode::USER);
        let kind = mode.0 & !Mode::USER;
        if kind != *self.jump_kind(user) {
            self.mmu.forget_jumps();
            *self.jump_kind(user) = kind;
        }
        let (rip, gpa) = self.fetch(mode)?;
        mode.0 |= short as u16 * Mode::SHORT;
        let max = if short { self.max.min(SHORT_TRACE) } else { self.max };
        let key = Key { gpa, rip, mode };
        let known = self.cache.find(key);
        let (id, second) = match known {
            Some(id) if self.cache.block(id).second.is_none() => (id, None),
            _ => {
                let bytes = self.bytes(rip, gpa)?;
                match known {
                    Some(id) if self.cache.block(id).second == bytes.second => (id, bytes.second_va),
                    _ => (self.translate(key, &bytes, max), bytes.second_va),
                }
            }
        };
        if !short {
            self.mmu.publish(rip, self.cache.block(id).published as u64, user, second);
        }
        Ok(id)
    }

    fn translate(&mut self, key: Key, bytes: &Bytes, max: u32) -> u32 {
        let before = self.activity.replace(Activity::Translator);
        let flags = self.mmu.ram().flags().clone();
        if self.cache.is_full() || self.mmu.sites().is_full(2 * MAX_TRACE as usize) {
            self.cache.flush(&flags);
            self.mmu.forget_code();
        }
        let (host, cold, block, first_link) = self.cache.next_place();
        let straddles = bytes.second.is_some();
        let first_site = self.mmu.sites().next();
        // SAFETY: the frame is ours; nothing changes the sites while code is made.
        let (cache, sites) = (&self.cache, unsafe { &(*self.frame).first.sites });
        let hot = max > SHORT_TRACE && !straddles && (self.trace_after == 0 || cache.is_hot(key));
        let marked = Cell::new(false);
        let source = Source {
            bytes: if straddles {
                &bytes.joined[..15]
            } else if key.mode.has(Mode::ALONE) {
                bytes.slice
            } else {
                bytes.whole
            },
            offset: bytes.whole.len() as u16 - bytes.slice.len() as u16,
            rip: key.rip,
            mode: key.mode,
            features: self.model.features,
            max,
            straddles,
            host,
            cold,
            block,
            first_link,
            first_site,
            hot,
            trace_after: self.trace_after,
            runs: &|offset| {
                let offset = u64::from(offset);
                let (gpa, rip) = (key.gpa & !(PAGE_SIZE - 1) | offset, key.rip & !(PAGE_SIZE - 1) | offset);
                cache.runs(Key { gpa, rip, mode: Mode(key.mode.0 & !Mode::UNGROUPED) }, self.trace_after, sites)
            },
            manner: &|offset| {
                let manner = cache.manner(key.gpa & !(PAGE_SIZE - 1) | offset as u64);
                marked.set(marked.get() | manner.restless | manner.loner);
                Manner { loner: manner.loner || key.mode.has(Mode::UNGROUPED), ..manner }
            },
        };
        let translation = translate(&source, FrameAt(self.frame as usize as i32), self.shared, &mut self.workshop);
        for &site in &translation.sites {
            self.mmu.sites().add(site);
        }
        let both = [bytes.page, bytes.second_page.unwrap_or_default()];
        let pages = &both[..1 + bytes.second_page.is_some() as usize];
        for &page in pages {
            if flags.get(page) & PageFlags::CODE == 0 {
                flags.set(page, PageFlags::CODE);
                self.mmu.forbid_writes(page);
            }
        }
        self.cache.stats.traces += u64::from(hot);
        let id = self.cache.add(key, &translation, first_site, bytes.second, pages, hot && marked.get());
        self.workshop.recycle(translation);
        self.activity.set(before);
        id
    }

    /// The block with this key, of mode [`Mode::UNGROUPED`]. Nothing finds it by the jump caches.
    fn ungrouped_block(&mut self, key: Key) -> Result<u32, Stop> {
        match self.cache.find(key) {
            Some(id) => Ok(id),
            None => {
                let bytes = self.bytes(key.rip, key.gpa)?;
                Ok(self.translate(key, &bytes, self.max))
            }
        }
    }

    // ---- one instruction ----

    /// Runs the instruction at RIP alone. On `Err(Stop::Fault)` it has not retired.
    fn step_alone(&mut self) -> Result<(), Stop> {
        self.stats.engine.alone += 1;
        let mut mode = self.mode();
        let (rip, gpa) = self.fetch(mode)?;
        let trap = self.st().rflags & rflags::TF != 0;
        mode.0 |= Mode::ALONE;
        let (insn, id) = self.alone_block(Key { gpa, rip, mode })?;
        match id {
            None => {
                self.execute_sys(&insn)?;
            }
            Some(id) => {
                self.limit = self.position + 1;
                self.fault = None;
                self.bounce.active = false;
                let entry = self.cache.block(id).entry;
                let rsp = self.st().gpr[gpr::RSP];
                self.enter(entry, 1);
                // SAFETY: the frame is ours.
                match unsafe { (*self.frame).exit } {
                    exit::LOOKUP if priority::branches_anywhere(&insn) && !canonical(self.st().rip) => {
                        let st = self.st();
                        st.rip = rip;
                        st.gpr[gpr::RSP] = rsp;
                        return Err(Stop::Fault(Exception::gp(0)));
                    }
                    exit::LOOKUP => {}
                    exit::HELPER => {
                        let raised = self.fault.take().expect("why else would it leave");
                        // SAFETY: the frame is ours.
                        let ea = unsafe { (*self.frame).ea };
                        let pending = self.x87_pending();
                        return Err(Stop::Fault(priority::resolve(&insn, self.st(), ea, pending, raised)));
                    }
                    exit::HOST_FAULT => return Err(self.host_fault(rip)),
                    reason => unreachable!("exit reason {reason} of a single instruction"),
                }
                self.st().interrupt_shadow = false;
            }
        }
        self.position += 1;
        let st = self.st();
        // RF was the previous instruction's business, unless this one loaded it (IRET).
        if !matches!(insn.mnemonic(), iced_x86::Mnemonic::Iretq | iced_x86::Mnemonic::Iretd | iced_x86::Mnemonic::Iret) {
            st.rflags &= !rflags::RF;
        }
        // The trap comes after the instruction, unless that was the one that left the mode (a gate or SYSCALL cleared TF).
        if trap && st.rflags & rflags::TF != 0 {
            self.deliver(Exception::plain(Vector::Debug))?;
        }
        Ok(())
    }

    /// Executes a system instruction at the current position, which it does not advance. RIP is set on success.
    fn execute_sys(&mut self, insn: &iced_x86::Instruction) -> Result<Flow, Stop> {
        let before = self.activity.replace(Activity::System);
        let image = image(insn);
        self.save_image(image);
        let bus = self.bus();
        let mut cx = self.cx(bus);
        let next = cx.next_ip(insn);
        let result = sys::execute(&mut cx, insn);
        let unsupported = cx.unsupported;
        self.load_image(image);
        self.activity.set(before);
        if let Some(what) = unsupported {
            return Err(Stop::Unsupported(what));
        }
        let flow = result?;
        if flow != Flow::Jump {
            self.st().rip = next;
        }
        Ok(flow)
    }

    /// The guest exception that a host fault in a single instruction stands for.
    fn host_fault(&mut self, rip: u64) -> Stop {
        // SAFETY: the frame is ours.
        let (trap, pc) = unsafe { ((*self.frame).fault_trap, (*self.frame).fault_pc as usize) };
        self.fix_flags_after_fault(pc);
        let st = self.st();
        st.rip = rip;
        Stop::Fault(match trap {
            0 => Exception::plain(Vector::DivideError),
            6 => Exception::UD,
            12 => Exception::ss(0),
            13 => Exception::gp(0),
            16 => Exception::plain(Vector::MathFault),
            17 => Exception { vector: Vector::AlignmentCheck, error: Some(0), address: None },
            19 if st.cr4 & cr4::OSXMMEXCPT != 0 => Exception::plain(Vector::SimdFault),
            19 => Exception::UD,
            _ => return Stop::Unsupported("an instruction that faulted on the host in a way no guest could cause"),
        })
    }
}

/// Why an instruction did not retire.
enum Stop {
    Fault(Exception),
    Unsupported(&'static str),
    Shutdown,
}

impl From<Exception> for Stop {
    fn from(e: Exception) -> Self {
        Self::Fault(e)
    }
}
