//! The world: its queue of happenings, its sides, and how it carries out what the state machines ask for.
//!
//! In: a seed. Out: a history, and the first violation in it. Invariant: what happens next follows from the queue and the
//! generator alone; happenings at the same time keep the order in which they were planned.

use std::collections::BTreeMap;

use twinstep_pair::{
    Bug, Claim, Epoch, Nanos, Notice, PrimaryAction, PrimaryEvent, PrimaryState, Record, SecondaryAction, SecondaryEvent, Verdict,
};

use crate::arbiter::{Fate, ToyArbiter};
use crate::check::Checker;
use crate::machine::{Input, Output};
use crate::network::Connection;
use crate::outside::Outside;
use crate::profile::{CALM_FROM, END, Fault, MAX_HOSTS, Profile};
use crate::random::Random;
use crate::side::{INPUT, Item, NOTE, Role, Side};

/// Something that will happen.
#[derive(Debug, Clone)]
pub(crate) enum Happening {
    /// The guest gets a slice.
    Run(usize),
    /// The host gets round to doing what it was asked for.
    Poll(usize),
    /// Replay gets a slice.
    Replay(usize),
    /// A deadline; only the one the side waits for counts.
    Tick(usize, Nanos),
    /// Bytes may have arrived: connection, end.
    Deliver(usize, usize),
    /// A sign of life beside the channel arrives: connection, end.
    Beat(usize, usize),
    /// Released outputs leave the host.
    Leave(usize, u64),
    /// A claim arrives; the answer takes so long, if it gets back at all, and so long if it is said again.
    Claim(usize, Claim, Option<u64>, Option<u64>),
    /// An answer arrives.
    Answer(usize, Epoch, Verdict),
    /// A writer of the client sends.
    Client(usize),
    /// What it sent arrives.
    Input(usize, u64),
    /// The host feeds the image.
    Feed(usize),
    /// The host uses a piece of the image up.
    Take(usize),
    /// The image is restored.
    Restored(usize),
    /// The host says what its machine has made since it differed.
    Diverged(usize),
    /// The host has done for a resync what can be done while the guest runs.
    Prepared(usize),
    /// A primary looks for a standby.
    Heal(usize),
    /// It tries this host.
    Reach(usize, usize),
    /// A host whose process has ended starts a standby.
    Restart(usize),
    Fault,
}

impl Happening {
    /// The side that takes part in it with its process.
    fn side(&self, connections: &[Connection]) -> Option<usize> {
        match *self {
            Happening::Run(side)
            | Happening::Poll(side)
            | Happening::Replay(side)
            | Happening::Tick(side, _)
            | Happening::Leave(side, _)
            | Happening::Answer(side, ..)
            | Happening::Input(side, _)
            | Happening::Feed(side)
            | Happening::Take(side)
            | Happening::Restored(side)
            | Happening::Prepared(side)
            | Happening::Diverged(side)
            | Happening::Heal(side)
            | Happening::Reach(side, _) => Some(side),
            Happening::Deliver(connection, end) | Happening::Beat(connection, end) => Some(connections[connection].ends[end]),
            Happening::Claim(..) | Happening::Client(_) | Happening::Restart(_) | Happening::Fault => None,
        }
    }
}

/// The world.
pub(crate) struct World {
    pub(crate) now: Nanos,
    pub(crate) profile: Profile,
    pub(crate) random: Random,
    pub(crate) sides: Vec<Side>,
    pub(crate) connections: Vec<Connection>,
    pub(crate) outside: Outside,
    pub(crate) arbiter: ToyArbiter,
    pub(crate) checker: Checker,
    /// Until when nothing gets from one host to another.
    pub(crate) apart: [[Nanos; MAX_HOSTS]; MAX_HOSTS],
    queue: BTreeMap<(Nanos, u64), Happening>,
    planned: u64,
    /// The side to which the network sends what the client sends.
    location: usize,
    pub(crate) bug: Option<Bug>,
    /// What happened, if anybody wants to read it.
    pub(crate) trace: Option<Vec<String>>,
}

impl World {
    pub(crate) fn new(seed: u64, bug: Option<Bug>, traced: bool) -> World {
        let mut random = Random::new(seed);
        let profile = Profile::draw(&mut random);
        let standbys = (1..profile.hosts).map(|host| Side::secondary(host, host, &profile, bug));
        let sides = std::iter::once(Side::primary(0, &profile, bug)).chain(standbys).collect();
        let mut world = World {
            now: Nanos(0),
            outside: Outside::new(profile.clients),
            sides,
            connections: Vec::new(),
            arbiter: ToyArbiter::default(),
            checker: Checker::default(),
            apart: Default::default(),
            queue: BTreeMap::new(),
            planned: 0,
            location: 0,
            bug,
            trace: traced.then(Vec::new),
            random,
            profile,
        };
        world.note(|world| format!("{:?}", world.profile));
        world.plan(0, Happening::Run(0));
        for writer in 0..world.profile.clients as usize {
            world.plan(0, Happening::Client(writer));
        }
        for _ in 0..world.profile.faults {
            let at = world.random.between(0, CALM_FROM.0);
            world.plan(at, Happening::Fault);
        }
        let at = world.random.between(0, 5_000_000);
        world.plan(at, Happening::Heal(0));
        world
    }

    /// Plans a happening `delay` nanoseconds from now.
    pub(crate) fn plan(&mut self, delay: u64, happening: Happening) {
        self.plan_at(Nanos(self.now.0 + delay), happening);
    }

    pub(crate) fn plan_at(&mut self, at: Nanos, happening: Happening) {
        self.planned += 1;
        self.queue.insert((at, self.planned), happening);
    }

    pub(crate) fn note(&mut self, text: impl FnOnce(&World) -> String) {
        if let Some(mut trace) = self.trace.take() {
            trace.push(format!("{:>12}  {}", self.now.to_string(), text(self)));
            self.trace = Some(trace);
        }
    }

    /// Lets the next thing happen; `false` when the world is over.
    pub(crate) fn step(&mut self) -> Result<bool, String> {
        let Some(((at, _), happening)) = self.queue.pop_first() else {
            return Err("nothing happens any more".to_owned());
        };
        if at >= END {
            self.checker.check_end(self)?;
            return Ok(false);
        }
        self.now = at;
        if let Some(side) = happening.side(&self.connections) {
            let side = &self.sides[side];
            if !side.alive {
                return Ok(true);
            }
            if side.stalled_until > at {
                self.plan_at(side.stalled_until, happening);
                return Ok(true);
            }
        }
        self.happen(happening)?;
        self.checker.check_lives(&self.sides)?;
        Ok(true)
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        match happening {
            Happening::Run(side) => self.run_guest(side),
            Happening::Poll(side) => self.carry_out(side),
            Happening::Replay(side) => self.run_replay(side),
            Happening::Tick(side, at) => {
                if self.sides[side].tick_at == Some(at) {
                    self.sides[side].tick_at = None;
                    self.tick(side)?;
                }
                Ok(())
            }
            Happening::Deliver(connection, end) => self.deliver(connection, end),
            Happening::Beat(connection, end) => self.beat_arrives(connection, end),
            Happening::Leave(side, up_to) => self.leave(side, up_to),
            Happening::Claim(side, claim, answers, again) => {
                let verdict = self.arbiter.decide(&claim);
                self.note(|_| format!("arbiter: epoch {} to side {side}: {verdict:?}", claim.epoch));
                for delay in [answers, again].into_iter().flatten() {
                    self.plan(delay, Happening::Answer(side, claim.epoch, verdict));
                }
                Ok(())
            }
            Happening::Answer(side, epoch, verdict) => self.answer(side, epoch, verdict),
            Happening::Client(writer) => {
                self.client(writer);
                Ok(())
            }
            Happening::Input(side, write) => {
                // What a standby or a full queue can't take is lost, as it would be in a network card.
                if self.sides[side].inputs.len() < 64 {
                    self.sides[side].inputs.push_back(write);
                }
                Ok(())
            }
            Happening::Feed(side) => self.feed_image(side),
            Happening::Take(side) => self.take_image(side),
            Happening::Restored(side) => self.restored(side),
            Happening::Diverged(side) => self.diverged(side),
            Happening::Prepared(side) => self.tell_primary(side, PrimaryEvent::ResyncPrepared),
            Happening::Heal(side) => {
                self.heal(side);
                Ok(())
            }
            Happening::Reach(side, host) => self.reach(side, host),
            Happening::Restart(host) => {
                self.restart(host);
                Ok(())
            }
            Happening::Fault => self.fault(),
        }
    }

    // ---- the state machines' doors ----

    pub(crate) fn tell_primary(&mut self, side: usize, event: PrimaryEvent) -> Result<(), String> {
        self.give_primary(side, event);
        self.carry_out(side)
    }

    /// Gives an event in without polling: the host batches.
    pub(crate) fn give_primary(&mut self, side: usize, event: PrimaryEvent) {
        if let Role::Primary(primary) = &mut self.sides[side].role {
            primary.handle(self.now, event);
        }
    }

    pub(crate) fn tell_secondary(&mut self, side: usize, event: SecondaryEvent) -> Result<(), String> {
        if let Role::Secondary(secondary) = &mut self.sides[side].role {
            secondary.handle(self.now, event);
        }
        self.carry_out(side)?;
        self.checker.check_entitled(side, &self.sides[side], self.outside.seen(), &self.arbiter.table)
    }

    fn tick(&mut self, side: usize) -> Result<(), String> {
        match self.sides[side].role {
            Role::Primary(_) => self.tell_primary(side, PrimaryEvent::Tick),
            Role::Secondary(_) => self.tell_secondary(side, SecondaryEvent::Tick),
        }
    }

    fn answer(&mut self, side: usize, epoch: Epoch, verdict: Verdict) -> Result<(), String> {
        match self.sides[side].role {
            Role::Primary(_) => self.tell_primary(side, PrimaryEvent::ArbiterAnswer { epoch, verdict }),
            Role::Secondary(_) => self.tell_secondary(side, SecondaryEvent::ArbiterAnswer { epoch, verdict }),
        }
    }

    /// Polls a side and does what it asks for.
    fn carry_out(&mut self, side: usize) -> Result<(), String> {
        loop {
            if let Some(actions_left) = self.sides[side].doomed.as_mut() {
                if *actions_left == 0 {
                    self.note(|_| format!("side {side} dies between two actions"));
                    self.sides[side].doomed = None;
                    self.kill(side, false);
                    return Ok(());
                }
                *actions_left -= 1;
            }
            match &mut self.sides[side].role {
                Role::Primary(primary) => match primary.poll() {
                    Some(action) => self.do_for_primary(side, action)?,
                    None => break,
                },
                Role::Secondary(secondary) => match secondary.poll() {
                    Some(action) => self.do_for_secondary(side, action)?,
                    None => break,
                },
            }
        }
        if self.sides[side].primary_state() != Some(PrimaryState::Copying) {
            self.sides[side].paused = false;
        }
        if !matches!(self.sides[side].primary_state(), Some(PrimaryState::CatchingUp | PrimaryState::Resyncing)) {
            self.sides[side].slowed = 0;
        }
        self.follow(side);
        if let Some(deadline) = self.sides[side].deadline() {
            let earlier = self.sides[side].tick_at.is_none_or(|at| deadline < at);
            if earlier {
                // Timers are late, never early.
                let at = Nanos(deadline.max(self.now).0 + self.random.between(0, 100_000));
                self.sides[side].tick_at = Some(at);
                self.plan_at(at, Happening::Tick(side, at));
            }
        }
        Ok(())
    }

    fn do_for_primary(&mut self, side: usize, action: PrimaryAction) -> Result<(), String> {
        match action {
            PrimaryAction::Send(bytes) => self.send(side, bytes),
            PrimaryAction::Disconnect => self.disconnect(side),
            PrimaryAction::StartImage => {
                let rounds = self.profile.rounds_bytes as usize;
                self.sides[side].image = vec![0xc3; rounds];
                self.sides[side].image_wanted = 0;
                self.sides[side].cut_due = true;
                if rounds == 0 {
                    self.cut_image(side);
                }
            }
            PrimaryAction::StartResync { .. } => {
                let state = &mut self.sides[side];
                state.image.clear();
                state.ahead = 0;
                state.cut_due = true;
                state.image_wanted = 0;
                let delay = self.random.between(0, 3_000_000);
                self.plan(delay, Happening::Prepared(side));
            }
            PrimaryAction::Changed(_) => {}
            PrimaryAction::Slow { percent } => self.sides[side].slowed = percent,
            PrimaryAction::StandStill => {
                let position = self.sides[side].machine.position;
                self.give_primary(side, PrimaryEvent::StandsStill { position });
            }
            PrimaryAction::MakeDelta => self.make_delta(side)?,
            PrimaryAction::Agreed { .. } | PrimaryAction::CopyReport(_) | PrimaryAction::OpenBeats { .. } => {}
            PrimaryAction::Beat => self.beat(side),
            PrimaryAction::WantImage { bytes } => {
                self.sides[side].image_wanted += bytes;
                let delay = self.random.between(0, 100_000);
                self.plan(delay, Happening::Feed(side));
            }
            PrimaryAction::Release { up_to } => {
                self.checker.check_late(&self.sides, side, up_to, &self.profile.config)?;
                self.checker.check_release(&self.sides, side, up_to, self.profile.config.commit)?;
                // Some hosts write at once and report later, others have a queue.
                if self.sides[side].last_leave <= self.now && self.random.percent(50) {
                    self.emit(side, up_to)?;
                }
                self.plan_leave(side, up_to);
            }
            PrimaryAction::AskArbiter(claim) => self.ask(side, claim),
            PrimaryAction::GoAlone { epoch, reason } => {
                self.note(|_| format!("side {side}: alone in epoch {epoch}: {reason}"));
                self.checker.check_owner(side, epoch)?;
                self.outside.check_survivor(&self.sides[side].machine)?;
                self.checker.alone += 1;
                self.sides[side].made_freely = self.sides[side].machine.outputs;
            }
            PrimaryAction::Stop(reason) => {
                self.note(|_| format!("side {side}: stopped: {reason}"));
                self.checker.check_stop(side, &reason, &self.arbiter.table)?;
                self.sides[side].stopped = Some(reason);
                self.plan_restart(side);
            }
            PrimaryAction::Throttle(on) => self.sides[side].throttled = on,
            PrimaryAction::Notice(notice) => {
                // From that moment on it held nothing back, even if it has ended before the host does what it asked for.
                if matches!(notice, Notice::State { to: "unprotected", .. }) {
                    self.sides[side].made_freely = self.sides[side].machine.outputs;
                }
                self.announce(side, &notice);
            }
        }
        Ok(())
    }

    fn do_for_secondary(&mut self, side: usize, action: SecondaryAction) -> Result<(), String> {
        match action {
            SecondaryAction::OpenBeats { .. } => {}
            SecondaryAction::Beat => self.beat(side),
            SecondaryAction::Send(bytes) => self.send(side, bytes),
            SecondaryAction::Disconnect => self.disconnect(side),
            SecondaryAction::Prepare(_) => self.sides[side].image.clear(),
            SecondaryAction::ImageChunk(bytes) => {
                self.sides[side].untaken += bytes.len() as u64;
                self.checker.check_untaken(&self.sides[side], &self.profile.config)?;
                self.sides[side].image.extend(bytes);
                let delay = self.random.between(0, self.profile.take_delay_max_ns);
                self.plan(delay, Happening::Take(side));
            }
            SecondaryAction::Restore { .. } => {
                let delay = self.random.between(0, 5_000_000);
                self.plan(delay, Happening::Restored(side));
            }
            SecondaryAction::ListChanges { position } => self.sides[side].list_at = Some(position),
            SecondaryAction::Diverge => {
                self.note(|_| format!("side {side}: goes on by itself"));
                self.sides[side].diverging = true;
                let delay = self.random.between(0, 1_000_000);
                self.plan(delay, Happening::Diverged(side));
            }
            SecondaryAction::Replay { first_seq, records } => {
                self.sides[side].received = first_seq + records.len() as u64 - 1;
                for record in &records {
                    if record.kind == NOTE {
                        self.sides[side].noted = noted_output(record);
                    }
                }
                self.sides[side].replay.extend(records.into_iter().map(Item::Record));
            }
            SecondaryAction::RunAhead { position } => self.sides[side].replay.push_back(Item::Ahead(position)),
            SecondaryAction::Discard { up_to } => {
                let seen = self.outside.seen();
                if up_to > seen {
                    return Err(format!("side {side} forgets output {up_to}, but the world has seen only {seen}"));
                }
                self.sides[side].outputs.retain(|id, _| *id > up_to);
            }
            SecondaryAction::AskArbiter(claim) => self.ask(side, claim),
            SecondaryAction::GoLive { epoch, reissue } => {
                self.note(|_| format!("side {side}: live in epoch {epoch}, sends outputs {reissue:?} again"));
                self.checker.check_owner(side, epoch)?;
                self.outside.check_survivor(&self.sides[side].machine)?;
                if self.sides[side].diverging {
                    return Err(format!("side {side} goes live before its host has said what its machine has made"));
                }
                self.checker.live += 1;
                self.sides[side].live_at = Some(self.now);
                self.outside.duplicates_allowed = true;
                self.sides[side].outputs.retain(|id, _| reissue.contains(id));
                self.sides[side].become_primary(self.bug);
                self.location = side;
                if !reissue.is_empty() {
                    self.plan_leave(side, reissue.end - 1);
                }
                // What it made and the primary had not noted is new to the world.
                for output in std::mem::take(&mut self.sides[side].made) {
                    self.give_output(side, output);
                }
                self.plan(0, Happening::Run(side));
            }
            SecondaryAction::Stop(reason) => {
                self.note(|_| format!("side {side}: stopped: {reason}"));
                self.checker.check_stop(side, &reason, &self.arbiter.table)?;
                self.sides[side].stopped = Some(reason);
                self.plan_restart(side);
            }
            SecondaryAction::Notice(notice) => self.announce(side, &notice),
        }
        Ok(())
    }

    fn announce(&mut self, side: usize, notice: &Notice) {
        self.note(|_| format!("side {side}: {notice}"));
        let change = matches!(notice, Notice::State { .. });
        if change && self.now < CALM_FROM && self.random.percent(self.profile.fault_at_change_percent) {
            if self.profile.allows(Fault::Crash) && self.random.percent(50) {
                self.checker.faults += 1;
                self.sides[side].doomed = Some(self.random.pick(&[0, 0, 0, 1, 2, 4]));
                return;
            }
            let delay = self.random.between(0, 1_000_000);
            self.plan(delay, Happening::Fault);
        }
    }

    // ---- machines ----

    fn run_guest(&mut self, side: usize) -> Result<(), String> {
        let pause = self.random.between(200_000, 1_000_000);
        if self.sides[side].stopped.is_some() {
            return Ok(());
        }
        self.plan(pause, Happening::Run(side));
        // However lazy a host is, it looks for a throttle before it lets the guest run on.
        self.carry_out(side)?;
        if !self.sides[side].may_run() {
            return Ok(());
        }
        self.checker.check_bounds(&self.sides[side], &self.profile.config)?;
        if self.random.percent(u64::from(self.sides[side].slowed)) {
            return Ok(());
        }
        let batched = self.random.percent(50);
        while let Some(write) = self.sides[side].inputs.pop_front() {
            self.give_input(side, Input::Write(write));
        }
        if self.random.percent(40) {
            let noise = self.random.number();
            self.give_input(side, Input::Noise(noise));
        }
        let steps = self.random.between(1, self.profile.slice_max);
        if self.random.percent(self.profile.lookahead_percent) {
            let position = self.sides[side].machine.position + steps;
            self.give_primary(side, PrimaryEvent::Lookahead { position });
            if self.random.percent(50) {
                self.carry_out(side)?;
            }
        }
        for _ in 0..steps {
            let made = if self.sides[side].paused { None } else { self.sides[side].machine.step() };
            let state = &self.sides[side];
            let pauses = state.paused || state.machine.pauses();
            if pauses {
                // Before anything else is said.
                self.give_primary(side, PrimaryEvent::Paused);
            }
            let Some(output) = made else {
                if pauses {
                    break;
                }
                continue;
            };
            let id = output.id;
            self.give_output(side, output);
            if self.sides[side].lets_go() {
                self.sides[side].made_freely = id;
            }
            if !batched {
                self.carry_out(side)?;
            }
            if pauses {
                break;
            }
        }
        let position = self.sides[side].machine.position;
        self.give_primary(side, PrimaryEvent::Progress { position });
        if !self.random.percent(self.profile.lazy_percent) {
            return self.carry_out(side);
        }
        // The host's loop has other events to take in first.
        let delay = self.random.between(0, 800_000);
        self.plan(delay, Happening::Poll(side));
        Ok(())
    }

    fn give_output(&mut self, side: usize, output: Output) {
        let (id, position, chain) = (output.id, output.position, output.chain_after());
        self.sides[side].outputs.insert(id, output);
        let note = Record { position, kind: NOTE, bytes: [id, chain].map(u64::to_le_bytes).concat() };
        self.give_primary(side, PrimaryEvent::Output { id, note });
    }

    fn give_input(&mut self, side: usize, input: Input) {
        let padding = self.random.between(0, self.profile.input_padding_max) as usize;
        let machine = &mut self.sides[side].machine;
        let record = Record { position: machine.position, kind: INPUT, bytes: input.to_bytes(padding) };
        machine.input(input);
        self.give_primary(side, PrimaryEvent::Record(record));
    }

    fn run_replay(&mut self, side: usize) -> Result<(), String> {
        if self.sides[side].stopped.is_some() || matches!(self.sides[side].role, Role::Primary(_)) {
            return Ok(());
        }
        let pause = self.random.between(100_000, 800_000);
        self.plan(pause, Happening::Replay(side));
        let state = &self.sides[side];
        if state.replay_stalled_until > self.now || state.replay.is_empty() && state.list_at.is_none() {
            return Ok(());
        }
        let mut budget = self.random.between(1, self.profile.replay_slice_max);
        while let Some(item) = self.sides[side].replay.front().cloned() {
            let (to, ahead) = match &item {
                Item::Record(record) => (record.position, false),
                // A machine that is another one runs ahead of nobody.
                Item::Ahead(_) if self.sides[side].differs => {
                    self.sides[side].replay.pop_front();
                    continue;
                }
                Item::Ahead(position) => (*position, true),
            };
            let mut paused = false;
            while self.sides[side].machine.position < to && budget > 0 && !paused {
                budget -= 1;
                if let Some(output) = self.sides[side].machine.step() {
                    if self.sides[side].diverged {
                        self.made(side, output)?;
                    } else {
                        self.sides[side].made.push_back(output);
                    }
                }
                paused = ahead && self.sides[side].machine.pauses();
            }
            if self.sides[side].machine.position < to && !paused {
                break;
            }
            let Item::Record(record) = item else {
                self.sides[side].replay.pop_front();
                continue;
            };
            self.consume(side, &record)?;
            self.sides[side].replay.pop_front();
            self.sides[side].replayed += 1;
        }
        let (seq, position) = (self.sides[side].replayed, self.sides[side].machine.position);
        self.tell_secondary(side, SecondaryEvent::Replayed { seq, position })?;
        if self.sides[side].replay.is_empty() && self.sides[side].differs {
            return self.list(side);
        }
        Ok(())
    }

    /// Replay takes a record in, which may show that the sides differ.
    fn consume(&mut self, side: usize, record: &Record) -> Result<(), String> {
        let machine = &mut self.sides[side].machine;
        // A note may come after the machine has run ahead of it. A machine that is another one may also have run past an input.
        let past = machine.position != record.position && record.kind != NOTE;
        if past && !self.profile.allows(Fault::Flip) {
            return Err(format!("side {side}: replay is at {}, past {}", machine.position, record.position));
        }
        let (still_due, made) = match self.sides[side].made.front() {
            _ if self.sides[side].diverged || self.sides[side].differs => (false, None),
            _ if past => (true, None),
            Some(output) if record.kind == NOTE => (output.chain_after() != noted(record, 1), Some(output.clone())),
            Some(output) => (output.position < record.position, None),
            None => (record.kind == NOTE, None),
        };
        if still_due {
            let (output, position) = (self.sides[side].matched + 1, record.position);
            self.note(|_| format!("side {side}: output {output} differs"));
            self.sides[side].differs = true;
            self.sides[side].image.clear();
            self.tell_secondary(side, SecondaryEvent::Mismatch { output, position, detail: vec![1] })?;
        } else if let Some(output) = made {
            self.sides[side].made.pop_front();
            self.sides[side].matched = output.id;
            self.made(side, output)?;
        }
        if record.kind == INPUT {
            self.sides[side].machine.input(Input::from_bytes(&record.bytes));
        }
        Ok(())
    }

    /// Replay has made an output that counts.
    pub(crate) fn made(&mut self, side: usize, output: Output) -> Result<(), String> {
        let id = output.id;
        self.sides[side].outputs.insert(id, output);
        self.tell_secondary(side, SecondaryEvent::Output { id })
    }

    // ---- the outside ----

    fn plan_leave(&mut self, side: usize, up_to: u64) {
        let at = Nanos(self.now.0 + self.random.between(0, self.profile.leave_delay_max_ns));
        let at = at.max(self.sides[side].last_leave);
        self.sides[side].last_leave = at;
        self.plan_at(at, Happening::Leave(side, up_to));
    }

    fn leave(&mut self, side: usize, up_to: u64) -> Result<(), String> {
        self.emit(side, up_to)?;
        self.tell_primary(side, PrimaryEvent::OutputsLeft { up_to })
    }

    /// Outputs really leave.
    fn emit(&mut self, side: usize, up_to: u64) -> Result<(), String> {
        while let Some(entry) = self.sides[side].outputs.first_entry() {
            if *entry.key() > up_to {
                break;
            }
            let output = entry.remove();
            self.outside.see(&output).map_err(|problem| format!("side {side}: {problem}"))?;
        }
        Ok(())
    }

    fn client(&mut self, writer: usize) {
        let write = self.outside.write(writer);
        // The network may still send to the old place, or to both.
        let old = self.random.percent(10).then(|| self.random.between(0, self.sides.len() as u64 - 1) as usize);
        let places: &[usize] = &[self.location, old.unwrap_or(self.location)];
        let places = if places[0] == places[1] { &places[..1] } else { places }.to_vec();
        for place in places {
            let delay = self.random.between(20_000, 2_000_000);
            self.plan(delay, Happening::Input(place, write));
        }
        let pause = self.random.between(2_000_000, 12_000_000);
        self.plan(pause, Happening::Client(writer));
    }

    fn ask(&mut self, side: usize, claim: Claim) {
        let fate = ToyArbiter::fate(self.now, self.sides[side].host, CALM_FROM, &self.profile, &mut self.random);
        self.note(|_| format!("side {side}: claims epoch {}: {fate:?}", claim.epoch));
        match fate {
            Fate::Answered { arrives, answers, again } => {
                self.plan(arrives, Happening::Claim(side, claim, Some(answers), again));
            }
            Fate::AnswerLost { arrives } => self.plan(arrives, Happening::Claim(side, claim, None, None)),
            Fate::Refused { answers } => {
                self.plan(answers, Happening::Answer(side, claim.epoch, Verdict::Unreachable));
            }
            Fate::Lost => {}
        }
    }
}

/// The number of the output that a note is of.
fn noted_output(record: &Record) -> u64 {
    noted(record, 0)
}

fn noted(record: &Record, word: usize) -> u64 {
    u64::from_le_bytes(record.bytes[word * 8..word * 8 + 8].try_into().expect("a note holds the output's number and chain"))
}
