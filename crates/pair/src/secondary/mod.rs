//! The secondary: the side that replays, and goes live when the primary is lost.
//!
//! In: [`SecondaryEvent`]s with the time. Out: [`SecondaryAction`]s. Invariants:
//!
//! - **Entitled.** It goes live only if the primary has said `ProtectionStart`, that is, only if it has every record whose effects
//!   the world may have seen.
//! - **No split brain.** It goes live only as the winner of the next epoch. It takes no silence for a yes.
//! - **Nothing lost.** It acknowledges a record only when it has handed it to replay, consumes every record it has handed over
//!   before it goes live, and then sends again every output that it does not know to have left.
//! - **Ahead.** The machine runs beyond the log only as far as the primary's has run, or will, with nothing entering it.
//!
//! ```text
//!            Hello           ImageRestored             peer lost, entitled          Won             log consumed
//! Listening ───────▶ Copying ─────────────▶ Following ───────────────────▶ Deciding ─────▶ Consuming ───────────▶ Live
//!     │                 │                      │ not entitled, goodbye         │ Lost
//!     └─────────────────┴──────────────────────┴──────────────▶ Stopped ◀──────┘
//! ```
//!
//! An output that differs takes it from Following to Resyncing: the machine replays on, and what it makes counts for nothing, until the primary's image has replaced it; then it follows on.
//! If the primary is lost before, that machine is the one to go live with ([`SecondaryAction::Diverge`]), and what it has made counts: it has made every output that
//! was matched.
//!
//! One `Secondary` serves one connection. A standby that is to wait for the next primary makes a new one.

mod door;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::arbiter::{Arbitration, Claim, Next, Verdict};
use crate::bugs::{Bug, Bugs};
use crate::config::{Commit, Config, ConfigError};
use crate::detector::Grace;
use crate::heal::Healer;
use crate::link::Link;
use crate::notice::{Notice, StopReason};
use crate::primary::{Primary, PrimarySetup};
use crate::types::{Epoch, Nanos, OutputId, Record, Seq};
use crate::wire::{Ack, Hello, HelloReply, LOG_BATCH_BYTES, MAX_LOOKAHEAD, MAX_REPORT_BYTES, Message, encode, greeting_version};

pub use door::{SecondaryAction, SecondaryEvent, SecondarySetup, SecondaryState, SecondaryStatus};

/// The secondary of a pair; see the head of the module.
#[derive(Debug, Clone)]
pub struct Secondary {
    setup: SecondarySetup,
    bugs: Bugs,
    state: SecondaryState,
    link: Option<Link>,
    hello: Option<Hello>,
    /// The epoch we have won.
    won: Option<Epoch>,
    entitled: bool,
    image_bytes: u64,
    /// Bytes of it that the host has used up.
    image_taken: u64,
    /// The cut, once the image is complete.
    image_position: Option<u64>,
    received_seq: Seq,
    replayed_seq: Seq,
    replayed_position: u64,
    primary_position: u64,
    /// Of the newest record, or of the image's cut.
    log_position: u64,
    /// The newest beat of the primary, by its clock.
    primary_clock: Nanos,
    /// Outputs that the machine has made, its life before the cut included.
    produced: OutputId,
    /// The machine has made another output than the primary's, and what it has made since counts for nothing.
    diverged: bool,
    /// It is the one to go live with, and the host has not said yet what it has made.
    diverging: bool,
    /// An image of a resync is being restored: it may be too late to go on without it.
    restoring: bool,
    agreed_position: u64,
    /// Outputs that have certainly left, as far as we were told.
    confirmed: OutputId,
    discarded: OutputId,
    ack_due: bool,
    /// When progress of replay is reported at the latest, if there is any.
    report_at: Option<Nanos>,
    last_ack_at: Nanos,
    /// The time of the last event.
    now: Nanos,
    arbitration: Option<Arbitration>,
    lost_reason: String,
    /// Only for [`Bug::AckBeforeReceive`].
    staged: Option<(Seq, Vec<Record>)>,
    actions: VecDeque<SecondaryAction>,
}

/// More actions than this between two calls of `poll` mean that the host does not call it.
const MAX_ACTIONS: usize = 1 << 20;

impl Secondary {
    /// A standby that waits for a primary.
    pub fn new(setup: SecondarySetup) -> Result<Secondary, ConfigError> {
        setup.config.check()?;
        Ok(Secondary {
            setup,
            bugs: Bugs::default(),
            state: SecondaryState::Listening,
            link: None,
            hello: None,
            won: None,
            entitled: false,
            image_bytes: 0,
            image_taken: 0,
            image_position: None,
            received_seq: 0,
            replayed_seq: 0,
            replayed_position: 0,
            primary_position: 0,
            log_position: 0,
            primary_clock: Nanos(0),
            produced: 0,
            diverged: false,
            diverging: false,
            restoring: false,
            agreed_position: 0,
            confirmed: 0,
            discarded: 0,
            ack_due: false,
            report_at: None,
            last_ack_at: Nanos(0),
            now: Nanos(0),
            arbitration: None,
            lost_reason: String::new(),
            staged: None,
            actions: VecDeque::new(),
        })
    }

    /// Switches a seeded bug on.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub fn with_bugs(mut self, bugs: Bugs) -> Secondary {
        self.bugs = bugs;
        self
    }

    /// Where it stands.
    pub fn state(&self) -> SecondaryState {
        self.state
    }

    /// The figures.
    pub fn status(&self) -> SecondaryStatus {
        SecondaryStatus {
            state: self.state,
            epoch: self.won.or(self.hello.as_ref().map(|hello| hello.epoch)),
            entitled: self.entitled,
            received_seq: self.received_seq,
            replayed_seq: self.replayed_seq,
            replayed_position: self.replayed_position,
            primary_position: self.primary_position,
            unconfirmed_outputs: self.produced.saturating_sub(self.confirmed),
            image_bytes: self.image_bytes,
        }
    }

    /// When a [`SecondaryEvent::Tick`] is due, if nothing else happens before.
    pub fn deadline(&self) -> Option<Nanos> {
        let link = self.link.as_ref().map(|link| link.deadline(self.peer_timeout(), self.grace()));
        let arbitration = self.arbitration.as_ref().map(Arbitration::deadline);
        [link, arbitration, self.report_at].into_iter().flatten().min()
    }

    /// Takes the next thing to do. Call until `None` after each batch of events; one acknowledgement answers the whole batch.
    pub fn poll(&mut self) -> Option<SecondaryAction> {
        if self.actions.is_empty() && self.ack_due {
            self.acknowledge();
        }
        self.actions.pop_front()
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, now: Nanos, event: SecondaryEvent) {
        if matches!(self.state, SecondaryState::Live | SecondaryState::Stopped) {
            return;
        }
        self.now = self.now.max(now);
        match event {
            SecondaryEvent::PeerConnected => self.on_connected(now),
            SecondaryEvent::Bytes(bytes) => self.on_bytes(now, &bytes),
            SecondaryEvent::PeerClosed { reason } => self.on_closed(now, &reason),
            SecondaryEvent::ImageTaken { bytes } => self.on_image_taken(bytes),
            SecondaryEvent::CopyReport(bytes) => self.on_copy_report(&bytes),
            SecondaryEvent::ImageRestored { position, last_output } => self.on_restored(now, position, last_output),
            SecondaryEvent::Output { id } => self.on_output(id),
            SecondaryEvent::Agreed { position } => self.agreed_position = self.agreed_position.max(position),
            SecondaryEvent::Mismatch { output, position, detail } => self.on_mismatch(output, position, detail),
            SecondaryEvent::Changed(bytes) => self.on_changed(bytes),
            SecondaryEvent::Listed => self.on_listed(),
            SecondaryEvent::Diverged => {
                self.diverging = false;
                self.go_live_if_consumed();
            }
            SecondaryEvent::Replayed { seq, position } => self.on_replayed(seq, position),
            SecondaryEvent::ArbiterAnswer { epoch, verdict } => self.on_arbiter_answer(now, epoch, verdict),
            SecondaryEvent::Shutdown { reason } => self.on_shutdown(reason),
            SecondaryEvent::Failed { reason } => self.say_goodbye(reason),
            SecondaryEvent::Beat => {
                if let Some(link) = &mut self.link {
                    link.beat(now);
                }
            }
            SecondaryEvent::Tick => self.on_tick(now),
        }
        assert!(self.actions.len() <= MAX_ACTIONS, "the host does not poll");
    }

    /// The primary that drives the machine after this secondary has gone live, which has no secondary itself yet; and who looks for one.
    ///
    /// # Panics
    /// If this secondary is not live.
    pub fn into_primary(self) -> (Primary, Healer) {
        assert_eq!(self.state, SecondaryState::Live, "only who is live becomes a primary");
        let hello = self.hello.expect("it had a primary once");
        let setup = PrimarySetup {
            // What the VM was promised holds on.
            config: Config { commit: hello.commit, on_mismatch: hello.on_mismatch, ..self.setup.config },
            vm: hello.vm,
            host: self.setup.host,
            owner: self.setup.owner,
            epoch: self.won.expect("it won an epoch"),
            last_output: self.produced,
            // The others are being sent again.
            last_left: self.confirmed.min(self.produced),
        };
        let mut standbys = hello.standbys.into_iter();
        let own = standbys.next();
        let standbys = standbys.take(if self.bugs.has(Bug::ForgetStandbys) { 0 } else { usize::MAX });
        let healer = Healer::new(standbys, own, &setup.config);
        (Primary::new(setup).expect("the configuration was checked before"), healer)
    }

    // ---- the connection ----

    fn on_connected(&mut self, now: Nanos) {
        assert!(self.state == SecondaryState::Listening && self.link.is_none(), "a secondary serves one connection");
        self.link = Some(Link::new(now, &self.setup.config));
    }

    fn on_bytes(&mut self, now: Nanos, bytes: &[u8]) {
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
        use SecondaryState::{Copying, Following, Listening, Resyncing};
        match (self.state, message) {
            (Listening, Message::Hello(hello)) => self.on_hello(hello),
            (Copying, Message::Refuse { reason }) => self.on_refused(reason),
            (Copying | Resyncing, Message::ImageChunk(bytes)) => self.on_image_chunk(now, bytes),
            (Copying | Resyncing, Message::ImageEnd { position, total_bytes }) => self.on_image_end(now, position, total_bytes),
            (Following | Resyncing, Message::ProtectionStart { last_seq }) => self.on_protection_start(now, last_seq),
            (Copying | Following | Resyncing, Message::Log { first_seq, records }) => self.on_log(now, first_seq, records),
            (Following | Resyncing, Message::Lookahead { position }) => self.on_lookahead(now, position),
            (Copying | Following | Resyncing, Message::Released { up_to }) => {
                self.confirmed = self.confirmed.max(up_to);
                self.discard();
            }
            (Copying | Following | Resyncing, Message::Heartbeat { time, position, .. }) => {
                self.primary_clock = self.primary_clock.max(time);
                self.primary_position = self.primary_position.max(position);
            }
            (Resyncing, Message::StandStill { position }) => self.actions.push_back(SecondaryAction::ListChanges { position }),
            // As if it were lost: the arbiter decides, as always.
            (Following, Message::HandOver { reason }) => self.lose_peer(now, &format!("the primary hands over: {reason}")),
            (_, Message::Goodbye { reason }) => self.stop(StopReason::PeerEnded { reason }),
            (state, message) => {
                let (kind, state) = (message.kind(), state.name());
                self.lose_peer(now, &format!("the primary sent {kind:?} while the secondary was {state}"));
            }
        }
    }

    fn on_hello(&mut self, hello: Hello) {
        let mut wrong = self.setup.expect.differences(&hello.vm);
        wrong.extend(self.setup.host.differences(&hello.host));
        if hello.owner == self.setup.owner {
            wrong.push("the primary has the standby's own process identity".to_owned());
        }
        let version = greeting_version(&hello).unwrap_or_else(|problem| {
            wrong.push(problem);
            0
        });
        if !wrong.is_empty() {
            let reason = wrong.join("; ");
            self.send(&Message::Refuse { reason: reason.clone() });
            return self.on_refused(reason);
        }
        self.send(&Message::HelloReply(HelloReply {
            version,
            vm: hello.vm.vm,
            epoch: hello.epoch,
            owner: self.setup.owner,
            host: self.setup.host.clone(),
            beats: self.setup.beats.clone(),
        }));
        if self.setup.beats.is_some() {
            self.actions.push_back(SecondaryAction::OpenBeats { peer: hello.owner });
        }
        self.link.as_mut().expect("the hello came over it").greeted();
        self.actions.push_back(SecondaryAction::Prepare(hello.clone()));
        self.enter(SecondaryState::Copying, &format!("VM {} in epoch {} is accepted", hello.vm.vm, hello.epoch));
        self.hello = Some(hello);
    }

    fn on_refused(&mut self, reason: String) {
        self.actions.push_back(SecondaryAction::Notice(Notice::Refused { reason: reason.clone() }));
        self.stop(StopReason::Refused { reason });
    }

    // ---- the image ----

    fn on_image_chunk(&mut self, now: Nanos, bytes: Vec<u8>) {
        if self.image_position.is_some() {
            return self.lose_peer(now, "the image goes on after its end");
        }
        self.image_bytes += bytes.len() as u64;
        if self.bugs.has(Bug::AckImageBeforeTaken) {
            self.image_taken = self.image_bytes;
            self.ack_due = true;
        }
        self.actions.push_back(SecondaryAction::ImageChunk(bytes));
    }

    fn on_image_taken(&mut self, bytes: u64) {
        if self.bugs.has(Bug::AckImageBeforeTaken) {
            return;
        }
        self.image_taken += bytes;
        assert!(self.image_taken <= self.image_bytes, "the host takes only what came");
        self.ack_due |= self.link.is_some();
    }

    fn on_copy_report(&mut self, bytes: &[u8]) {
        // Of a copy that is complete nobody wants to know any more.
        if self.state == SecondaryState::Copying {
            for piece in bytes.chunks(MAX_REPORT_BYTES) {
                self.send(&Message::CopyReport(piece.to_vec()));
            }
        }
    }

    fn on_image_end(&mut self, now: Nanos, position: u64, total_bytes: u64) {
        if self.image_position.is_some() || self.image_bytes != total_bytes {
            let received = self.image_bytes;
            return self.lose_peer(now, &format!("the image has {received} bytes instead of {total_bytes}"));
        }
        self.image_position = Some(position);
        self.restoring = self.state == SecondaryState::Resyncing;
        self.actions.push_back(SecondaryAction::Restore { position });
    }

    // ---- outputs that differ ----

    fn on_mismatch(&mut self, output: OutputId, position: u64, detail: Vec<u8>) {
        assert!(!self.diverged, "what a machine makes after a difference is not compared");
        assert_eq!(output, self.produced + 1, "all outputs before the one that differs are matched");
        self.diverged = true;
        match self.state {
            SecondaryState::Following => {}
            // Nobody is left to be compared with, or it is being found out.
            SecondaryState::Consuming => return self.diverge(),
            _ => return,
        }
        if self.bugs.has(Bug::MatchTheMismatch) {
            self.produced = output;
            self.acknowledge();
        }
        self.image_bytes = 0;
        self.image_taken = 0;
        self.image_position = None;
        self.send(&Message::Mismatch { output, position, detail });
        self.enter(SecondaryState::Resyncing, &format!("output {output} is not the primary's"));
    }

    fn on_changed(&mut self, bytes: Vec<u8>) {
        // Once the primary is lost nobody wants to know.
        if self.state == SecondaryState::Resyncing {
            self.send(&Message::Changed(bytes));
        }
    }

    fn on_listed(&mut self) {
        // A list is of a machine that has replayed all there is. If more has come, the primary has gone on.
        if self.state == SecondaryState::Resyncing && self.replayed_seq == self.received_seq {
            self.send(&Message::Listed);
        }
    }

    fn diverge(&mut self) {
        self.actions.push_back(SecondaryAction::Diverge);
        self.diverged = false;
        self.diverging = !self.bugs.has(Bug::LiveBeforeDiverged);
    }

    fn on_restored(&mut self, now: Nanos, position: u64, last_output: OutputId) {
        if std::mem::take(&mut self.restoring) {
            return self.on_resynced(position, last_output);
        }
        assert_eq!(self.state, SecondaryState::Copying, "a machine is restored once");
        if self.image_position != Some(position) {
            return self.lose_peer(now, &format!("the restored machine is at position {position}, not where its image was cut"));
        }
        self.replayed_position = position;
        self.log_position = self.log_position.max(position);
        self.produced = last_output;
        // The primary starts protection only after the outputs before the cut have left.
        self.confirmed = self.confirmed.max(last_output);
        self.discarded = last_output;
        if self.bugs.has(Bug::EntitledByImage) {
            self.entitled = true;
        }
        self.send(&Message::ImageReady { position });
        self.enter(SecondaryState::Following, "the machine is restored");
    }

    /// The image stands for all records received so far, and came with the data of all outputs that may not have left. The primary may be lost by now;
    /// then this is the machine to go live with.
    fn on_resynced(&mut self, position: u64, last_output: OutputId) {
        assert!(self.diverged, "only a machine that differs is made equal");
        self.diverged = false;
        self.replayed_seq = self.received_seq;
        self.replayed_position = position;
        self.produced = last_output;
        if self.bugs.has(Bug::ForgetPendingAtResync) {
            self.confirmed = self.confirmed.max(last_output);
        }
        self.discarded = self.discarded.max(self.confirmed.min(last_output));
        if self.state == SecondaryState::Resyncing {
            self.ack_due = true;
            self.send(&Message::ImageReady { position });
            self.enter(SecondaryState::Following, "the machine is the primary's again");
        }
        self.go_live_if_consumed();
    }

    fn on_protection_start(&mut self, now: Nanos, last_seq: Seq) {
        if self.entitled && !self.bugs.has(Bug::EntitledByImage) || last_seq != self.received_seq {
            let received = self.received_seq;
            return self.lose_peer(now, &format!("protection starts at record {last_seq}, but {received} were received"));
        }
        self.entitled = true;
        self.ack_due = true;
        if let Some(link) = &mut self.link {
            link.is_protected();
        }
        self.enter(SecondaryState::Following, "protection has started");
    }

    // ---- the log ----

    fn on_log(&mut self, now: Nanos, first_seq: Seq, records: Vec<Record>) {
        if first_seq != self.received_seq + 1 {
            let expected = self.received_seq + 1;
            return self.lose_peer(now, &format!("the log goes on at record {first_seq} instead of {expected}"));
        }
        self.received_seq += records.len() as u64;
        if self.matters() {
            // Nothing leaves before it is matched, and that is acknowledged at once.
            self.report_later();
        } else {
            self.ack_due = true;
        }
        if let Some(last) = records.last() {
            self.primary_position = self.primary_position.max(last.position);
            self.log_position = last.position;
        }
        let ready = if self.bugs.has(Bug::AckBeforeReceive) {
            self.staged.replace((first_seq, records))
        } else {
            Some((first_seq, records))
        };
        if let Some((first_seq, records)) = ready {
            self.actions.push_back(SecondaryAction::Replay { first_seq, records });
        }
    }

    fn on_lookahead(&mut self, now: Nanos, position: u64) {
        // What is on its way to a machine that is being replaced is older than what replaces it.
        let last = self.log_position;
        if position <= last || position - last > MAX_LOOKAHEAD {
            return self.lose_peer(now, &format!("the primary looks ahead from position {last} to {position}"));
        }
        if self.state == SecondaryState::Following {
            self.actions.push_back(SecondaryAction::RunAhead { position });
        }
    }

    fn on_output(&mut self, id: OutputId) {
        assert_eq!(id, self.produced + 1, "outputs are numbered without gaps");
        self.produced = id;
        if self.matters() {
            self.ack_due = true;
        }
        self.discard();
    }

    /// Whether the primary waits for outputs to be matched.
    fn matters(&self) -> bool {
        self.hello.as_ref().is_some_and(|hello| hello.commit == Commit::Matched)
    }

    fn discard(&mut self) {
        let up_to = self.confirmed.min(self.produced);
        if up_to > self.discarded {
            self.discarded = up_to;
            self.actions.push_back(SecondaryAction::Discard { up_to });
        }
    }

    fn on_replayed(&mut self, seq: Seq, position: u64) {
        assert!(seq >= self.replayed_seq && position >= self.replayed_position, "replay goes forward");
        assert!(seq <= self.received_seq, "replay has only what was received");
        if seq == self.replayed_seq && position == self.replayed_position {
            return;
        }
        self.replayed_seq = seq;
        self.replayed_position = position;
        self.report_later();
        self.go_live_if_consumed();
    }

    /// Has progress that nobody waits for acknowledged now and then.
    fn report_later(&mut self) {
        let due_at = self.last_ack_at.plus(self.setup.config.replay_report_interval);
        if self.now >= due_at {
            self.ack_due = true;
        } else if self.report_at.is_none() {
            self.report_at = Some(due_at);
        }
    }

    fn acknowledge(&mut self) {
        self.ack_due = false;
        self.report_at = None;
        self.last_ack_at = self.now;
        let ack = Ack {
            received_seq: self.received_seq,
            replayed_seq: self.replayed_seq,
            replayed_position: self.replayed_position,
            image_bytes: self.image_taken,
            matched: self.produced,
            agreed_position: self.agreed_position,
        };
        self.send(&Message::Ack(ack));
    }

    fn send(&mut self, message: &Message) {
        if self.link.is_none() {
            return;
        }
        match self.actions.back_mut() {
            Some(SecondaryAction::Send(bytes)) if bytes.len() < LOG_BATCH_BYTES => bytes.extend(encode(message)),
            _ => self.actions.push_back(SecondaryAction::Send(encode(message))),
        }
    }

    // ---- failure ----

    fn drop_link(&mut self) {
        if self.link.take().is_some() {
            self.actions.push_back(SecondaryAction::Disconnect);
        }
        self.ack_due = false;
        self.report_at = None;
    }

    fn lose_peer(&mut self, now: Nanos, reason: &str) {
        assert!(self.state < SecondaryState::Deciding, "there is no peer to lose any more");
        self.drop_link();
        if !self.entitled {
            return self.stop(StopReason::NotProtected { reason: reason.to_owned() });
        }
        let hello = self.hello.as_ref().expect("it is entitled, so it was greeted");
        let claim = Claim { vm: hello.vm.vm, epoch: hello.epoch.next(), owner: self.setup.owner };
        self.lost_reason = reason.to_owned();
        if let Some((_, records)) = self.staged.take() {
            self.received_seq -= records.len() as u64;
        }
        if self.bugs.has(Bug::LiveWithoutArbiter) {
            return self.consume(claim.epoch);
        }
        self.enter(SecondaryState::Deciding, reason);
        let (arbitration, claim) = Arbitration::begin(now, claim, &self.setup.config);
        self.arbitration = Some(arbitration);
        self.actions.push_back(SecondaryAction::AskArbiter(claim));
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
            Next::Ask(claim) => self.actions.push_back(SecondaryAction::AskArbiter(claim)),
            Next::RetryAt(_) if self.bugs.has(Bug::SilenceIsConsent) => self.consume(epoch),
            Next::RetryAt(retry_at) => {
                let notice = Notice::ArbiterUnreachable { epoch, attempts, retry_at };
                self.actions.push_back(SecondaryAction::Notice(notice));
            }
            Next::Won => self.consume(epoch),
            Next::Lost => self.stop(StopReason::LostArbitration { epoch }),
        }
    }

    fn consume(&mut self, epoch: Epoch) {
        self.arbitration = None;
        self.won = Some(epoch);
        let left = self.received_seq - self.replayed_seq;
        let reason = format!("epoch {epoch} is ours ({}); {left} records are left", self.lost_reason);
        self.enter(SecondaryState::Consuming, &reason);
        if self.diverged && !self.restoring {
            self.diverge();
        }
        self.go_live_if_consumed();
    }

    fn go_live_if_consumed(&mut self) {
        let consumed = self.replayed_seq == self.received_seq && !self.restoring && !self.diverging
            || self.bugs.has(Bug::LiveBeforeConsuming);
        if self.state != SecondaryState::Consuming || !consumed {
            return;
        }
        let epoch = self.won.expect("it is consuming because it won");
        // The primary says what has left only after it has, so it may have sent more than we know; never less.
        let first = self.confirmed.min(self.produced) + 1;
        let reissue = if self.bugs.has(Bug::ForgetReissue) { 0..0 } else { first..self.produced + 1 };
        self.enter(SecondaryState::Live, "the log is consumed");
        self.actions.push_back(SecondaryAction::GoLive { epoch, reissue });
    }

    fn on_shutdown(&mut self, reason: String) {
        if self.state >= SecondaryState::Deciding {
            let reason = "the primary is lost, and the VM may live on only here".to_owned();
            return self.actions.push_back(SecondaryAction::Notice(Notice::ShutdownRefused { reason }));
        }
        self.say_goodbye(reason);
    }

    fn say_goodbye(&mut self, reason: String) {
        self.send(&Message::Goodbye { reason: reason.clone() });
        self.stop(StopReason::Ended { reason });
    }

    fn stop(&mut self, reason: StopReason) {
        self.drop_link();
        self.arbitration = None;
        self.enter(SecondaryState::Stopped, &reason.to_string());
        self.actions.push_back(SecondaryAction::Stop(reason));
    }

    // ---- time ----

    fn grace(&self) -> Grace {
        if self.bugs.has(Bug::BeatIsEnough) { Grace::endless() } else { Grace::of_secondary(&self.setup.config) }
    }

    fn peer_timeout(&self) -> Nanos {
        if self.entitled { self.setup.config.peer_timeout } else { self.setup.config.copy_timeout }
    }

    fn on_tick(&mut self, now: Nanos) {
        let (timeout, grace) = (self.peer_timeout(), self.grace());
        if let Some(link) = &mut self.link {
            let greeted = self.state != SecondaryState::Listening;
            if link.beat_due(now, &self.setup.config) && greeted {
                let (position, echo) = (self.replayed_position, self.primary_clock);
                self.send(&Message::Heartbeat { time: now, position, echo });
                if self.setup.beats.is_some() {
                    self.actions.push_back(SecondaryAction::Beat);
                }
            }
        }
        if self.report_at.is_some_and(|at| now >= at) {
            self.report_at = None;
            self.ack_due = true;
        }
        if let Some(silence) = self.link.as_mut().and_then(|link| link.silence(now, timeout, grace)) {
            self.lose_peer(now, &format!("nothing was heard from the primary for {silence}"));
        }
        if let Some(arbitration) = &mut self.arbitration {
            let next = arbitration.tick(now, &self.setup.config);
            self.pursue(next);
        }
    }

    fn enter(&mut self, state: SecondaryState, reason: &str) {
        let (from, to) = (self.state.name(), state.name());
        self.state = state;
        self.actions.push_back(SecondaryAction::Notice(Notice::State { from, to, reason: reason.to_owned() }));
    }
}
