//! The primary: the side whose outputs the world sees.
//!
//! In: [`PrimaryEvent`]s with the time. Out: [`PrimaryAction`]s. Invariants:
//!
//! - **Output rule.** From the moment protection starts until the primary goes alone by right, an output leaves only when the
//!   secondary has acknowledged the record that notes it, and with it all records before; if so configured ([`Commit::Matched`]), only when the
//!   secondary has said as well that it has made the same.
//! - **Resync.** What is held when the guest stands still for it is held until the secondary has confirmed that it has become equal, outputs included.
//! - **No split brain.** Once protection has started the primary goes on alone only as the winner of the next epoch, or after
//!   the secondary has said that it has stopped for good.
//! - **Stalls.** A primary that was not woken for half of the peer's timeout lets nothing leave until it has heard a beat that answers one sent since: what it finds in
//!   its sockets may be as old as the stall, and the epoch may be the secondary's by now.
//! - **Bounds.** Image, log and held outputs each have a limit; the guest is throttled before, the secondary given up beyond.
//!
//! ```text
//!             PeerConnected          HelloReply       ImageReady, level
//! Unprotected ─────────────▶ Greeting ─────────▶ Copying ───────────────▶ Protected ◀───────────┐ ImageReady
//!     ▲  ▲                      │                   │                         │ Mismatch        │
//!     │  │                      │                   │                         ▼         level   │
//!     │  │                      │                   │                    CatchingUp ◀──────▶ Resyncing
//!     │  └──────────────────────┴───────────────────┘                         too much differs
//!     │        peer lost or refused: no arbiter
//!     │                                      peer lost in one of the three on the right
//!     └───────────────────────────── Deciding ◀──────────────────────────────────
//!       Won: GoAlone in the next epoch   └──▶ Stopped (Lost)
//! ```
//!
//! When outputs are held, exactly: outputs made in `Unprotected`, `Greeting` and `Copying` leave at once (with [`Commit::Matched`], those made last in
//! `Copying` are held until the secondary has made all that left before). Protection starts in the
//! step after which the secondary has said `ImageReady` and has caught up, and the host has said that the outputs before the
//! image's cut have left: every output made afterwards is held. In the same step, behind all records of outputs that have left already, the
//! primary sends `ProtectionStart`; a secondary is entitled to go live only after it has read that. So a secondary that
//! is entitled has every record that the world may have seen an effect of.
//!
//! Why no arbiter before that: a secondary that has not read `ProtectionStart` never goes live, so as long as the primary has not sent it, it
//! has no rival and needs nobody's leave, not even that of an arbiter which is away. From the
//! moment it has sent it the primary can't know whether it was read, and must win the epoch.

mod backlog;
mod bounds;
mod door;
mod handover;
mod image;
mod lookahead;
mod outputs;
mod resync;
mod stall;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::arbiter::{Arbitration, Claim, Next, Verdict};
use crate::bugs::{Bug, Bugs};
use crate::config::{Commit, ConfigError};
use crate::detector::Grace;
use crate::link::Link;
use crate::notice::{Notice, StopReason};
use crate::types::{Epoch, Nanos, OutputId, Record, Seq};
use crate::wire::{Ack, Hello, HelloReply, LOG_BATCH_BYTES, MAX_VERSION, MIN_VERSION, Message, VmIdentity, encode};

use backlog::Backlog;
use bounds::{TOO_FAR_BEHIND, TOO_LATE};
pub use door::{PrimaryAction, PrimaryEvent, PrimarySetup, PrimaryState, PrimaryStatus};
use handover::Handing;
use image::Image;
use lookahead::Lookahead;
use outputs::HeldOutputs;
use resync::Resync;

/// The primary of a pair; see the head of the module.
#[derive(Debug, Clone)]
pub struct Primary {
    setup: PrimarySetup,
    bugs: Bugs,
    state: PrimaryState,
    epoch: Epoch,
    position: u64,
    link: Option<Link>,
    /// The secondary takes signs of life beside the channel.
    beats: bool,
    image: Image,
    /// There is one from the image's cut until the secondary is lost.
    backlog: Option<Backlog>,
    lookahead: Lookahead,
    outputs: HeldOutputs,
    /// The newest output that the secondary has made alike.
    matched: OutputId,
    /// Outputs are held already, although protection has not started.
    holding: bool,
    /// From a difference until the secondary is equal again.
    resync: Option<Resync>,
    resyncs: u64,
    agreed_position: u64,
    arbitration: Option<Arbitration>,
    lost_reason: String,
    throttled: bool,
    held_back_for: Option<&'static str>,
    last_progress: Nanos,
    ending: Option<String>,
    handing: Option<Handing>,
    /// When the arbiter is asked, if the secondary has been told to go live.
    claim_at: Option<Nanos>,
    /// When it was called last.
    called: Nanos,
    /// It was stalled, until then, and has not heard of the secondary since.
    woken: Option<Nanos>,
    actions: VecDeque<PrimaryAction>,
}

/// So many outputs may have left without the secondary having been told. It keeps their data.
const MAX_UNTOLD: u64 = 64;

/// More actions than this between two calls of `poll` mean that the host does not call it.
const MAX_ACTIONS: usize = 1 << 20;

impl Primary {
    /// A machine that runs without a secondary so far: just powered on, or just gone live.
    pub fn new(setup: PrimarySetup) -> Result<Primary, ConfigError> {
        setup.config.check()?;
        Ok(Primary {
            bugs: Bugs::default(),
            state: PrimaryState::Unprotected,
            epoch: setup.epoch,
            position: 0,
            link: None,
            beats: false,
            image: Image::default(),
            backlog: None,
            lookahead: Lookahead::default(),
            outputs: HeldOutputs::new(setup.last_output, setup.last_left),
            matched: setup.last_output,
            holding: false,
            resync: None,
            resyncs: 0,
            agreed_position: 0,
            arbitration: None,
            lost_reason: String::new(),
            throttled: false,
            held_back_for: None,
            last_progress: Nanos(0),
            ending: None,
            handing: None,
            claim_at: None,
            called: Nanos(0),
            woken: None,
            actions: VecDeque::new(),
            setup,
        })
    }

    /// Switches a seeded bug on.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub fn with_bugs(mut self, bugs: Bugs) -> Primary {
        self.bugs = bugs;
        self
    }

    /// Where it stands.
    pub fn state(&self) -> PrimaryState {
        self.state
    }

    /// When its outputs leave under protection.
    pub fn commit(&self) -> Commit {
        self.setup.config.commit
    }

    /// The machine.
    pub fn vm(&self) -> &VmIdentity {
        &self.setup.vm
    }

    /// In which epoch the machine runs.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The figures.
    pub fn status(&self) -> PrimaryStatus {
        let backlog = self.backlog.as_ref();
        PrimaryStatus {
            state: self.state,
            epoch: self.epoch,
            throttled: self.throttled,
            appended_seq: backlog.map_or(0, Backlog::appended),
            received_seq: backlog.map_or(0, Backlog::received),
            replayed_seq: backlog.map_or(0, Backlog::replayed),
            unacked_bytes: backlog.map_or(0, Backlog::unacked_bytes),
            unreplayed_bytes: backlog.map_or(0, Backlog::unreplayed_bytes),
            lag_instructions: backlog.map_or(0, Backlog::lag_instructions),
            lag_time: backlog.map_or(Nanos(0), Backlog::lag_time),
            held_outputs: self.outputs.held(),
            image_bytes: self.image.acked_bytes,
            matched: self.matched,
            resyncs: self.resyncs,
        }
    }

    /// When a [`PrimaryEvent::Tick`] is due, if nothing else happens before.
    pub fn deadline(&self) -> Option<Nanos> {
        let link = self.link.as_ref().map(|link| link.deadline(self.peer_timeout(), self.grace()));
        let arbitration = self.arbitration.as_ref().map(Arbitration::deadline);
        let stall = self.may_stall().then(|| self.last_progress.plus(self.setup.config.stall_timeout));
        [link, arbitration, stall, self.claim_at, self.resync_deadline()].into_iter().flatten().min()
    }

    /// Takes the next thing to do. Call until `None` after each batch of events.
    ///
    /// Records given in since the last call go out together in one message when this is called, so the host decides by its own rhythm how
    /// much is batched.
    pub fn poll(&mut self) -> Option<PrimaryAction> {
        if self.actions.is_empty() && self.is_worth_a_message() {
            self.flush();
        }
        self.actions.pop_front()
    }

    /// Whether what waits to be sent is sent now. Word of what has left alone is not: it goes with the next records, or with a heartbeat. Until then the
    /// secondary keeps a few outputs more, and would send them again.
    fn is_worth_a_message(&self) -> bool {
        self.backlog.as_ref().is_some_and(Backlog::is_pending) || self.outputs.untold() > MAX_UNTOLD || self.can_look_ahead()
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, now: Nanos, event: PrimaryEvent) {
        if self.state == PrimaryState::Stopped {
            return;
        }
        if self.was_stalled(now) {
            self.on_stall(now);
        }
        self.called = now;
        match event {
            PrimaryEvent::PeerConnected { standbys } => self.on_connected(now, standbys),
            PrimaryEvent::Bytes(bytes) => self.on_bytes(now, &bytes),
            PrimaryEvent::PeerClosed { reason } => self.on_closed(now, &reason),
            PrimaryEvent::Record(record) => {
                self.disturbed();
                self.append(record);
            }
            PrimaryEvent::Output { id, note } => self.on_output(id, note),
            PrimaryEvent::OutputsLeft { up_to } => self.outputs.has_left(up_to),
            PrimaryEvent::ImageChunk(bytes) => self.on_image_chunk(&bytes),
            PrimaryEvent::ImageCut { position } => self.on_image_cut(position),
            PrimaryEvent::ImageEnd => self.on_image_end(now),
            PrimaryEvent::ResyncPrepared => self.on_resync_prepared(),
            PrimaryEvent::StandsStill { position } => self.on_stands_still(position),
            PrimaryEvent::ResyncGoesOn => self.on_resync_goes_on(now),
            PrimaryEvent::Lookahead { position } => self.on_lookahead(position),
            PrimaryEvent::Paused => self.disturbed(),
            PrimaryEvent::Progress { position } => self.position = self.position.max(position),
            PrimaryEvent::ArbiterAnswer { epoch, verdict } => self.on_arbiter_answer(now, epoch, verdict),
            PrimaryEvent::Shutdown { reason } => self.on_shutdown(now, reason),
            PrimaryEvent::HandOver { reason } => self.on_hand_over(now, reason),
            PrimaryEvent::Beat => {
                if let Some(link) = &mut self.link {
                    link.beat(now);
                }
            }
            PrimaryEvent::Tick => self.on_tick(now),
        }
        self.settle(now);
    }

    // ---- the connection ----

    fn on_connected(&mut self, now: Nanos, standbys: Vec<String>) {
        assert_eq!(self.state, PrimaryState::Unprotected, "a primary has one secondary at a time");
        self.link = Some(Link::new(now, &self.setup.config));
        self.send(&Message::Hello(Hello {
            min_version: MIN_VERSION,
            max_version: MAX_VERSION,
            vm: self.setup.vm.clone(),
            epoch: self.epoch,
            commit: self.setup.config.commit,
            on_mismatch: self.setup.config.on_mismatch,
            owner: self.setup.owner,
            host: self.setup.host.clone(),
            standbys,
        }));
        self.enter(PrimaryState::Greeting, "a standby is connected");
    }

    fn on_bytes(&mut self, now: Nanos, bytes: &[u8]) {
        // Bytes of a connection we gave up may still come in; nobody wants them.
        if let Some(link) = &mut self.link {
            link.push(bytes);
        }
        loop {
            let Some(link) = &mut self.link else { return };
            match link.next_message(now) {
                Ok(None) => return,
                Ok(Some(message)) => self.on_message(now, message),
                Err(error) => self.lose_peer(now, &error.to_string()),
            }
        }
    }

    fn on_closed(&mut self, now: Nanos, reason: &str) {
        if self.link.take().is_some() {
            self.lose_peer(now, &format!("connection closed ({reason})"));
        }
    }

    fn on_message(&mut self, now: Nanos, message: Message) {
        use PrimaryState::{CatchingUp, Copying, Greeting, Protected, Resyncing};
        match (self.state, message) {
            (Greeting, Message::HelloReply(reply)) => self.on_hello_reply(now, reply),
            (Greeting, Message::Refuse { reason }) => self.refuse(now, reason),
            (Copying | Protected | CatchingUp | Resyncing, Message::Ack(ack)) => self.on_ack(now, &ack),
            (Copying | Resyncing, Message::ImageReady { position }) => self.on_image_ready(now, position),
            (Copying | Protected | CatchingUp | Resyncing, Message::Heartbeat { echo, .. }) => self.on_beat(echo),
            (Copying, Message::CopyReport(bytes)) => self.actions.push_back(PrimaryAction::CopyReport(bytes)),
            (CatchingUp | Resyncing, Message::Changed(bytes)) => self.actions.push_back(PrimaryAction::Changed(bytes)),
            (Resyncing, Message::Listed) => self.on_listed(now),
            (Copying, Message::Mismatch { output, .. }) => {
                self.lose_peer(now, &format!("the standby makes another output {output} before protection has started"));
            }
            (Protected, Message::Mismatch { output, position, detail }) => self.on_mismatch(now, output, position, detail),
            (_, Message::Goodbye { reason }) => self.on_goodbye(now, &reason),
            (state, message) => {
                let (kind, state) = (message.kind(), state.name());
                self.lose_peer(now, &format!("the standby sent {kind:?} while the primary was {state}"));
            }
        }
    }

    fn on_hello_reply(&mut self, now: Nanos, reply: HelloReply) {
        let mut wrong = self.setup.host.differences(&reply.host);
        if reply.vm != self.setup.vm.vm || reply.epoch != self.epoch {
            wrong.push(format!("the standby answers for VM {} in epoch {}", reply.vm, reply.epoch));
        }
        if reply.owner == self.setup.owner {
            wrong.push("the standby has the primary's own process identity".to_owned());
        }
        if !(MIN_VERSION..=MAX_VERSION).contains(&reply.version) {
            wrong.push(format!("the standby picked protocol version {}, which was not offered", reply.version));
        }
        if !wrong.is_empty() {
            let reason = wrong.join("; ");
            self.send(&Message::Refuse { reason: reason.clone() });
            return self.refuse(now, reason);
        }
        let link = self.link.as_mut().expect("the reply came over it");
        link.greeted();
        self.image = Image::default();
        self.enter(PrimaryState::Copying, "the standby can replay this machine");
        self.beats = reply.beats.is_some();
        self.actions.extend(reply.beats.map(|to| PrimaryAction::OpenBeats { to, peer: reply.owner }));
        self.actions.push_back(PrimaryAction::StartImage);
        self.want_image();
    }

    fn refuse(&mut self, now: Nanos, reason: String) {
        self.actions.push_back(PrimaryAction::Notice(Notice::Refused { reason: reason.clone() }));
        self.lose_peer(now, &format!("refused: {reason}"));
    }

    fn on_goodbye(&mut self, now: Nanos, reason: &str) {
        let reason = format!("the standby said goodbye: {reason}");
        if !self.has_rival() {
            return self.lose_peer(now, &reason);
        }
        // It has stopped for good, so there is nobody to win an epoch against.
        self.drop_link();
        self.go_alone(self.epoch, reason);
    }

    // ---- releasing, and the start of protection ----

    fn release_what_may(&mut self) {
        if self.woken.is_some() && !self.bugs.has(Bug::ReleaseAfterStall) {
            return;
        }
        let received = self.backlog.as_ref().expect("there is one under protection").received();
        let matched = match self.setup.config.commit {
            Commit::Matched if !self.bugs.has(Bug::ReleaseBeforeMatch) => self.matched,
            _ => OutputId::MAX,
        };
        let up_to = self.outputs.release_acked(received, matched);
        self.release(up_to);
    }

    /// Starts protection once
    /// - the secondary has the image;
    /// - the outputs before the cut have really left: the secondary can't make those again, so as long as they are in our
    ///   host's queues our death would leave a gap;
    /// - the secondary has caught up, so that going live takes no longer at the beginning than later.
    fn start_protection_if_ready(&mut self, now: Nanos) {
        let Some((_, last_output)) = self.image.cut else {
            return;
        };
        let caught_up = self.all_beyond(1, 1).all(|what| what != TOO_FAR_BEHIND && what != TOO_LATE);
        let left = self.outputs.left() >= last_output || self.bugs.has(Bug::ProtectBeforeLeft);
        let ready = self.image.restored && left && caught_up;
        if self.state != PrimaryState::Copying || !ready {
            return;
        }
        // What has left was compared by nobody. From here on nothing more leaves until the secondary has made the same.
        if self.setup.config.commit == Commit::Matched && self.matched < self.outputs.released() {
            self.holding = true;
            return;
        }
        // All records of outputs that have left already must precede the message that entitles the secondary.
        if !self.bugs.has(Bug::ProtectBeforeFlush) {
            self.flush();
        }
        let last_seq = self.backlog.as_ref().expect("there is one since the cut").sent();
        self.send(&Message::ProtectionStart { last_seq });
        self.holding = false;
        self.last_progress = now;
        if let Some(link) = &mut self.link {
            link.is_protected();
        }
        self.enter(PrimaryState::Protected, "the standby has the whole machine");
        self.release_what_may();
    }

    // ---- the log and the outputs ----

    fn append(&mut self, record: Record) -> Seq {
        self.position = self.position.max(record.position);
        match &mut self.backlog {
            Some(backlog) => backlog.append(self.called, record),
            // Nobody is there to acknowledge it, ever.
            None => Seq::MAX,
        }
    }

    fn on_output(&mut self, id: OutputId, note: Record) {
        let note = self.append(note);
        self.outputs.produce(id, note);
        if self.state < PrimaryState::Protected && !self.holding || self.bugs.has(Bug::ReleaseBeforeAck) {
            self.release_all();
        }
    }

    fn release_all(&mut self) {
        let up_to = self.outputs.release_all();
        self.release(up_to);
    }

    fn release(&mut self, up_to: Option<OutputId>) {
        let Some(up_to) = up_to else { return };
        if self.bugs.has(Bug::ReleasedBeforeLeft) {
            self.outputs.has_left(up_to);
        }
        if let Some(PrimaryAction::Release { up_to: last }) = self.actions.back_mut() {
            *last = up_to;
        } else {
            self.actions.push_back(PrimaryAction::Release { up_to });
        }
    }

    fn on_ack(&mut self, now: Nanos, ack: &Ack) {
        if ack.image_bytes > self.image.fed_bytes || ack.image_bytes < self.image.acked_bytes {
            return self.lose_peer(now, "the standby acknowledges an image that was not sent");
        }
        if ack.matched > self.outputs.produced() {
            return self.lose_peer(now, "the standby says that it has made outputs which were not made here");
        }
        let image_news = ack.image_bytes > self.image.acked_bytes;
        self.image.acked_bytes = ack.image_bytes;
        if self.is_copying() {
            self.want_image();
        }
        let log_news = match &mut self.backlog {
            None if ack.received_seq > 0 => Err("it acknowledges records that were not sent"),
            None => Ok(false),
            Some(backlog) => backlog.acknowledge(ack),
        };
        match log_news {
            Err(problem) => {
                return self.lose_peer(now, &format!("the standby's acknowledgement is wrong: {problem}"));
            }
            Ok(log_news) if log_news || image_news => self.last_progress = now,
            Ok(_) => {}
        }
        if ack.agreed_position > self.agreed_position {
            self.agreed_position = ack.agreed_position;
            self.actions.push_back(PrimaryAction::Agreed { position: ack.agreed_position });
        }
        let match_news = ack.matched > self.matched;
        self.matched = self.matched.max(ack.matched);
        if match_news {
            self.last_progress = now;
        }
        if matches!(self.state, PrimaryState::Protected | PrimaryState::CatchingUp) {
            self.release_what_may();
        }
    }

    /// Sends what is pending.
    fn flush(&mut self) {
        if self.link.is_none() {
            return;
        }
        let Some(backlog) = &mut self.backlog else {
            return;
        };
        if let Some((first_seq, records)) = backlog.take_batch() {
            self.send(&Message::Log { first_seq, records });
        }
        self.tell_lookahead();
        // Behind the log, so that the secondary never hears of an output it has no note of.
        if let Some(up_to) = self.outputs.tell() {
            self.send(&Message::Released { up_to });
        }
    }

    fn send(&mut self, message: &Message) {
        if self.link.is_none() {
            return;
        }
        // What goes out together goes in one piece: each piece wakes the other side.
        match self.actions.back_mut() {
            Some(PrimaryAction::Send(bytes)) if bytes.len() < LOG_BATCH_BYTES => bytes.extend(encode(message)),
            _ => self.actions.push_back(PrimaryAction::Send(encode(message))),
        }
    }

    // ---- failure ----

    fn drop_link(&mut self) {
        if self.link.take().is_some() {
            self.actions.push_back(PrimaryAction::Disconnect);
        }
    }

    fn lose_peer(&mut self, now: Nanos, reason: &str) {
        self.drop_link();
        // Nobody will acknowledge these records any more.
        self.backlog = None;
        self.resync = None;
        match self.state {
            PrimaryState::Greeting | PrimaryState::Copying => {
                self.holding = false;
                self.set_throttle(None);
                self.enter(PrimaryState::Unprotected, reason);
                self.release_all();
            }
            PrimaryState::Protected | PrimaryState::CatchingUp | PrimaryState::Resyncing
                if self.bugs.has(Bug::AloneWithoutArbiter) =>
            {
                self.go_alone(self.epoch.next(), reason.to_owned());
            }
            PrimaryState::Protected | PrimaryState::CatchingUp | PrimaryState::Resyncing => {
                self.lost_reason = reason.to_owned();
                self.enter(PrimaryState::Deciding, reason);
                self.set_throttle(Some("the standby is lost and the arbiter is asked"));
                if matches!(self.handing, Some(Handing::Done)) {
                    // The epoch is the secondary's, unless it dies before it has claimed it.
                    self.claim_at = Some(now.plus(self.setup.config.peer_timeout).plus(self.setup.config.arbiter_timeout));
                } else {
                    self.handing = None;
                    self.claim(now);
                }
            }
            PrimaryState::Unprotected | PrimaryState::Deciding | PrimaryState::Stopped => {}
        }
    }

    fn claim(&mut self, now: Nanos) {
        self.claim_at = None;
        let claim = Claim { vm: self.setup.vm.vm, epoch: self.epoch.next(), owner: self.setup.owner };
        let (arbitration, claim) = Arbitration::begin(now, claim, &self.setup.config);
        self.arbitration = Some(arbitration);
        self.actions.push_back(PrimaryAction::AskArbiter(claim));
    }

    fn on_arbiter_answer(&mut self, now: Nanos, epoch: Epoch, verdict: Verdict) {
        let Some(arbitration) = &mut self.arbitration else {
            return;
        };
        let next = arbitration.answer(now, epoch, verdict, &self.setup.config);
        self.pursue(next);
    }

    fn pursue(&mut self, next: Next) {
        let Some(arbitration) = &self.arbitration else {
            return;
        };
        let (epoch, attempts) = (arbitration.epoch(), arbitration.attempts);
        match next {
            Next::Wait => {}
            Next::Ask(_) if self.bugs.has(Bug::AskOnce) => {}
            Next::Ask(claim) => self.actions.push_back(PrimaryAction::AskArbiter(claim)),
            Next::RetryAt(_) if self.bugs.has(Bug::SilenceIsConsent) => {
                self.go_alone(epoch, self.lost_reason.clone());
            }
            Next::RetryAt(retry_at) => {
                let notice = Notice::ArbiterUnreachable { epoch, attempts, retry_at };
                self.actions.push_back(PrimaryAction::Notice(notice));
            }
            Next::Won => self.go_alone(epoch, self.lost_reason.clone()),
            Next::Lost => {
                if self.bugs.has(Bug::ReleaseAfterLosing) {
                    self.release_all();
                }
                self.stop(match self.handing {
                    Some(Handing::Done) => StopReason::HandedOver { epoch },
                    _ => StopReason::LostArbitration { epoch },
                });
            }
        }
    }

    fn go_alone(&mut self, epoch: Epoch, reason: String) {
        assert!(self.has_rival() || self.state == PrimaryState::Deciding);
        self.epoch = epoch;
        self.backlog = None;
        self.resync = None;
        self.arbitration = None;
        self.handing = None;
        self.claim_at = None;
        self.woken = None;
        self.enter(PrimaryState::Unprotected, &reason);
        self.actions.push_back(PrimaryAction::GoAlone { epoch, reason });
        self.release_all();
        self.set_throttle(None);
    }

    fn stop(&mut self, reason: StopReason) {
        self.drop_link();
        self.backlog = None;
        self.arbitration = None;
        self.enter(PrimaryState::Stopped, &reason.to_string());
        self.actions.push_back(PrimaryAction::Stop(reason));
    }

    // ---- time and bounds ----

    fn grace(&self) -> Grace {
        if self.bugs.has(Bug::BeatIsEnough) { Grace::endless() } else { Grace::of_primary(&self.setup.config) }
    }

    fn peer_timeout(&self) -> Nanos {
        let config = &self.setup.config;
        if self.state >= PrimaryState::Protected { config.peer_timeout } else { config.copy_timeout }
    }

    /// Whether a secondary without progress holds the guest back.
    fn may_stall(&self) -> bool {
        self.throttled && self.link.is_some()
    }

    fn on_tick(&mut self, now: Nanos) {
        let (timeout, grace) = (self.peer_timeout(), self.grace());
        if let Some(link) = &mut self.link {
            let greeted = self.state != PrimaryState::Greeting;
            if link.beat_due(now, &self.setup.config) && greeted {
                let position = self.position;
                self.send(&Message::Heartbeat { time: now, position, echo: Nanos(0) });
                if self.beats {
                    self.actions.push_back(PrimaryAction::Beat);
                }
                self.flush();
            }
        }
        if let Some(silence) = self.link.as_mut().and_then(|link| link.silence(now, timeout, grace)) {
            self.lose_peer(now, &format!("nothing was heard from the standby for {silence}"));
        }
        if self.may_stall() && now.since(self.last_progress) >= self.setup.config.stall_timeout {
            self.lose_peer(now, "the standby answers but makes no progress, and holds the guest back");
        }
        if self.claim_at.is_some_and(|at| now >= at) {
            self.claim(now);
        }
        if let Some(arbitration) = &mut self.arbitration {
            let next = arbitration.tick(now, &self.setup.config);
            self.pursue(next);
        }
    }

    /// What follows from the new state, whatever the event was.
    fn settle(&mut self, now: Nanos) {
        self.start_protection_if_ready(now);
        self.go_on_with_resync(now);
        self.hand_over_if_even();
        if self.backlog.as_ref().is_some_and(Backlog::batch_full) {
            self.flush();
        }
        if self.link.is_some() {
            if let Some(what) = self.beyond(self.setup.config.hard_bound_factor, 1) {
                self.lose_peer(now, &format!("the standby is too slow: {what}, although the guest is throttled"));
            } else if !self.throttled
                && let Some(what) = self.beyond(1, 1)
            {
                if !self.bugs.has(Bug::NeverThrottle) {
                    self.hold_back(now, what);
                }
            } else if self.throttled && self.state != PrimaryState::Resyncing && self.handing.is_none() && self.may_run_on() {
                self.set_throttle(None);
            }
        }
        if self.ending.is_some() && self.outputs.held() == 0 && self.state != PrimaryState::Deciding {
            let reason = self.ending.take().expect("just seen");
            self.flush();
            self.send(&Message::Goodbye { reason: reason.clone() });
            self.stop(StopReason::Ended { reason });
        }
        assert!(self.actions.len() <= MAX_ACTIONS, "the host does not poll");
    }

    fn enter(&mut self, state: PrimaryState, reason: &str) {
        let (from, to) = (self.state.name(), state.name());
        self.state = state;
        self.actions.push_back(PrimaryAction::Notice(Notice::State { from, to, reason: reason.to_owned() }));
    }
}
