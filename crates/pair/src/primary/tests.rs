//! The primary, step by step: when outputs leave, whom it asks, when it gives up.

use super::*;
use crate::config::OnMismatch;
use crate::testing::*;
use crate::wire::{Kind, MAX_LOOKAHEAD};

struct Bench {
    primary: Primary,
    now: Nanos,
    outputs: u64,
}

/// A secondary's heartbeat.
fn beat(time: u64, echo: u64) -> Message {
    Message::Heartbeat { time: Nanos(time), position: 10, echo: Nanos(echo) }
}

/// What the primary did in one step: its messages, and everything else but notices.
#[derive(Debug, Default, PartialEq)]
struct Done {
    sent: Vec<Message>,
    actions: Vec<PrimaryAction>,
}

impl Bench {
    fn new() -> Bench {
        Bench { primary: Primary::new(primary_setup()).unwrap(), now: Nanos(0), outputs: 0 }
    }

    /// With these rules instead of the default ones, protected.
    fn ruled(commit: Commit, on_mismatch: OnMismatch) -> Bench {
        let mut bench = Bench::protected();
        bench.primary.setup.config.commit = commit;
        bench.primary.setup.config.on_mismatch = on_mismatch;
        bench
    }

    fn tell(&mut self, event: PrimaryEvent) -> Done {
        self.primary.handle(self.now, event);
        let mut done = Done::default();
        while let Some(action) = self.primary.poll() {
            match action {
                PrimaryAction::Send(bytes) => done.sent.extend(messages(&bytes)),
                PrimaryAction::Notice(notice) => assert!(!notice.to_string().is_empty()),
                other => done.actions.push(other),
            }
        }
        done
    }

    fn hear(&mut self, message: Message) -> Done {
        self.tell(PrimaryEvent::Bytes(frame(&message)))
    }

    fn output(&mut self, position: u64) -> Done {
        self.outputs += 1;
        self.tell(PrimaryEvent::Output { id: self.outputs, note: record(position, 8) })
    }

    fn ack(&mut self, received_seq: u64, replayed_seq: u64, replayed_position: u64) -> Done {
        self.hear(Message::Ack(Ack {
            received_seq,
            replayed_seq,
            replayed_position,
            image_bytes: 4,
            matched: 0,
            agreed_position: 0,
        }))
    }

    /// Lets time pass in steps a host would make.
    fn wait(&mut self, until: Nanos) -> Done {
        let mut all = Done::default();
        while let Some(deadline) = self.primary.deadline().filter(|deadline| *deadline <= until) {
            assert!(deadline > self.now, "a deadline that has passed was not met: the host would spin");
            self.now = deadline;
            let done = self.tell(PrimaryEvent::Tick);
            all.sent.extend(done.sent);
            all.actions.extend(done.actions);
        }
        self.now = until;
        all
    }

    fn copying() -> Bench {
        let mut bench = Bench::new();
        let done = bench.tell(connected());
        assert_eq!(done.sent, [Message::Hello(hello())]);
        let done = bench.hear(Message::HelloReply(reply()));
        let bytes = config().image_window_bytes;
        assert_eq!(done.actions, [PrimaryAction::StartImage, PrimaryAction::WantImage { bytes }]);
        bench
    }

    fn copied() -> Bench {
        let mut bench = Bench::copying();
        bench.tell(PrimaryEvent::ImageCut { position: 10 });
        assert_eq!(bench.tell(PrimaryEvent::ImageChunk(vec![1; 4])).sent, [Message::ImageChunk(vec![1; 4])]);
        let done = bench.tell(PrimaryEvent::ImageEnd);
        assert_eq!(done.sent, [Message::ImageEnd { position: 10, total_bytes: 4 }]);
        bench
    }

    fn protected() -> Bench {
        let mut bench = Bench::copied();
        let done = bench.hear(Message::ImageReady { position: 10 });
        assert_eq!(done.sent, [Message::ProtectionStart { last_seq: 0 }]);
        assert_eq!(bench.primary.state(), PrimaryState::Protected);
        bench
    }

    fn deciding() -> Bench {
        let mut bench = Bench::protected();
        bench.output(11);
        let done = bench.tell(PrimaryEvent::PeerClosed { reason: "reset".to_owned() });
        assert_eq!(done.actions, [PrimaryAction::Throttle(true), PrimaryAction::AskArbiter(claim(2))]);
        bench
    }
}

fn claim(epoch: u64) -> Claim {
    Claim { vm: VM, epoch: Epoch(epoch), owner: PRIMARY }
}

fn release(up_to: u64) -> PrimaryAction {
    PrimaryAction::Release { up_to }
}

fn answer(verdict: Verdict) -> PrimaryEvent {
    PrimaryEvent::ArbiterAnswer { epoch: Epoch(2), verdict }
}

#[test]
fn outputs_leave_at_once_until_protection_starts() {
    let mut bench = Bench::new();
    assert_eq!(bench.output(1).actions, [release(1)]);
    let mut bench = Bench::copied();
    let done = bench.output(11);
    assert_eq!(done.actions, [release(1)]);
    assert_eq!(done.sent, [Message::Log { first_seq: 1, records: vec![record(11, 8)] }]);
}

#[test]
fn an_output_is_held_until_its_note_is_received() {
    let mut bench = Bench::protected();
    let done = bench.tell(PrimaryEvent::Record(record(11, 3)));
    assert_eq!(done.sent, [Message::Log { first_seq: 1, records: vec![record(11, 3)] }]);
    assert_eq!(bench.output(12).actions, []);
    assert_eq!(bench.output(13).actions, []);
    assert_eq!(bench.ack(1, 0, 10).actions, []);
    assert_eq!(bench.ack(2, 0, 10).actions, [release(1)]);
    assert_eq!(bench.ack(3, 3, 13).actions, [release(2)]);
}

/// That outputs have left is no message of its own: it goes with the next records or heartbeat, unless it is of many.
#[test]
fn what_has_left_is_told_on_occasion() {
    let mut bench = Bench::protected();
    (1..=3).for_each(|position| _ = bench.output(10 + position));
    bench.ack(3, 3, 13);
    assert_eq!(bench.tell(PrimaryEvent::OutputsLeft { up_to: 2 }).sent, []);
    let records = vec![record(14, 1)];
    let done = bench.tell(PrimaryEvent::Record(record(14, 1)));
    assert_eq!(done.sent, [Message::Log { first_seq: 4, records }, Message::Released { up_to: 2 }]);
    assert_eq!(bench.tell(PrimaryEvent::OutputsLeft { up_to: 3 }).sent, []);
    bench.now = bench.now.plus(config().heartbeat_interval);
    let done = bench.tell(PrimaryEvent::Tick);
    assert!(matches!(done.sent[..], [Message::Heartbeat { .. }, Message::Released { up_to: 3 }]), "{done:?}");
    (4..=4 + MAX_UNTOLD).for_each(|id| _ = bench.output(11 + id));
    bench.ack(5 + MAX_UNTOLD, 4, 14);
    assert_eq!(bench.tell(PrimaryEvent::OutputsLeft { up_to: 3 + MAX_UNTOLD }).sent, []);
    let up_to = 4 + MAX_UNTOLD;
    assert_eq!(bench.tell(PrimaryEvent::OutputsLeft { up_to }).sent, [Message::Released { up_to }]);
}

#[test]
fn records_between_two_polls_travel_together() {
    let mut bench = Bench::protected();
    bench.primary.handle(bench.now, PrimaryEvent::Record(record(11, 1)));
    bench.primary.handle(bench.now, PrimaryEvent::Record(record(12, 2)));
    let done = bench.tell(PrimaryEvent::Record(record(13, 3)));
    let records = vec![record(11, 1), record(12, 2), record(13, 3)];
    assert_eq!(done.sent, [Message::Log { first_seq: 1, records }]);
}

#[test]
fn what_left_before_protection_is_noted_before_protection_starts() {
    let mut bench = Bench::copied();
    bench.primary.handle(bench.now, PrimaryEvent::Output { id: 1, note: record(11, 8) });
    let done = bench.hear(Message::ImageReady { position: 10 });
    assert_eq!(done.actions, [release(1)]);
    assert_eq!(done.sent[0].kind(), Kind::Log);
    assert_eq!(done.sent[1], Message::ProtectionStart { last_seq: 1 });
}

#[test]
fn protection_waits_until_outputs_before_the_cut_have_left() {
    let mut bench = Bench::copying();
    bench.output(5);
    bench.tell(PrimaryEvent::ImageCut { position: 10 });
    bench.tell(PrimaryEvent::ImageChunk(vec![1; 4]));
    bench.tell(PrimaryEvent::ImageEnd);
    assert_eq!(bench.hear(Message::ImageReady { position: 10 }).sent, []);
    assert_eq!(bench.primary.state(), PrimaryState::Copying);
    let done = bench.tell(PrimaryEvent::OutputsLeft { up_to: 1 });
    assert!(done.sent.contains(&Message::ProtectionStart { last_seq: 0 }));
}

#[test]
fn protection_waits_until_the_standby_has_caught_up() {
    let mut bench = Bench::copied();
    bench.tell(PrimaryEvent::Record(record(5_000, 1)));
    let done = bench.hear(Message::ImageReady { position: 10 });
    assert_eq!(done.actions, [PrimaryAction::Throttle(true)]);
    assert_eq!(bench.primary.state(), PrimaryState::Copying);
    let done = bench.ack(1, 0, 4_500);
    assert_eq!(done.actions, [PrimaryAction::Throttle(false)]);
    assert_eq!(done.sent, [Message::ProtectionStart { last_seq: 1 }]);
}

#[test]
fn the_image_keeps_to_its_window() {
    let mut bench = Bench::copying();
    let ack = |image_bytes| Message::Ack(Ack { image_bytes, ..Ack::default() });
    bench.tell(PrimaryEvent::ImageChunk(vec![1; 1_000_000]));
    assert_eq!(bench.hear(ack(600_000)).actions, [PrimaryAction::WantImage { bytes: 600_000 }]);
    let done = bench.hear(ack(1_000_001));
    assert_eq!(done.actions, [PrimaryAction::Disconnect], "it acknowledges what was not sent");
    assert_eq!(bench.primary.state(), PrimaryState::Unprotected);
}

#[test]
fn before_protection_a_loss_needs_no_arbiter() {
    let mut bench = Bench::copied();
    let done = bench.tell(PrimaryEvent::PeerClosed { reason: "reset".to_owned() });
    assert_eq!(done, Done::default());
    assert_eq!((bench.primary.state(), bench.primary.epoch()), (PrimaryState::Unprotected, Epoch::FIRST));
    assert_eq!(bench.output(11).actions, [release(1)]);
    assert_eq!(bench.tell(connected()).sent, [Message::Hello(hello())], "and it can try again");
}

#[test]
fn the_winner_goes_alone_and_releases() {
    let mut bench = Bench::deciding();
    assert_eq!(bench.output(12).actions, [], "a guest that is still stopping may make another one");
    let done = bench.tell(answer(Verdict::Won));
    let [PrimaryAction::GoAlone { epoch, reason }, second, third] = &done.actions[..] else { panic!("{done:?}") };
    assert_eq!(*epoch, Epoch(2));
    assert!(reason.contains("reset"));
    assert_eq!([second, third], [&release(2), &PrimaryAction::Throttle(false)]);
    let done = bench.tell(connected());
    assert_eq!(done.sent, [Message::Hello(Hello { epoch: Epoch(2), ..hello() })]);
}

#[test]
fn the_loser_stops_and_releases_nothing() {
    let mut bench = Bench::deciding();
    let done = bench.tell(answer(Verdict::Lost));
    assert_eq!(done.actions, [PrimaryAction::Stop(StopReason::LostArbitration { epoch: Epoch(2) })]);
    assert_eq!(bench.tell(answer(Verdict::Won)), Done::default());
    assert_eq!(bench.output(13), Done::default());
    assert_eq!(bench.primary.deadline(), None);
}

#[test]
fn an_arbiter_that_does_not_answer_is_asked_again_for_ever() {
    let mut bench = Bench::deciding();
    assert_eq!(bench.tell(answer(Verdict::Unreachable)).actions, []);
    let done = bench.wait(millis(20_000));
    assert!(done.actions.len() >= 5, "{done:?}");
    assert!(done.actions.iter().all(|action| *action == PrimaryAction::AskArbiter(claim(2))));
    assert_eq!(bench.primary.state(), PrimaryState::Deciding);
    assert!(bench.primary.deadline().is_some());
    let stale = PrimaryEvent::ArbiterAnswer { epoch: Epoch(1), verdict: Verdict::Won };
    assert_eq!(bench.tell(stale), Done::default(), "an answer about another epoch says nothing");
    assert!(matches!(bench.tell(answer(Verdict::Won)).actions[0], PrimaryAction::GoAlone { .. }));
}

#[test]
fn a_silent_standby_is_lost_after_the_timeout_and_not_before() {
    let mut bench = Bench::protected();
    let timeout = config().peer_timeout;
    let done = bench.wait(Nanos(timeout.0 - 1));
    assert!(done.sent.len() >= 10 && done.sent.iter().all(|message| message.kind() == Kind::Heartbeat));
    assert_eq!(bench.primary.state(), PrimaryState::Protected);
    let done = bench.wait(timeout);
    assert!(done.actions.contains(&PrimaryAction::Disconnect));
    assert!(done.actions.contains(&PrimaryAction::AskArbiter(claim(2))));
}

#[test]
fn heartbeats_keep_the_standby() {
    let mut bench = Bench::protected();
    for step in 1..50 {
        bench.wait(millis(step * 100));
        bench.hear(beat(step, 0));
    }
    assert_eq!(bench.primary.state(), PrimaryState::Protected);
}

/// A host that was stopped finds acknowledgements in its sockets that are as old as its sleep: they say nothing of whose epoch it is now.
#[test]
fn after_a_stall_nothing_leaves_before_the_standby_was_heard_again() {
    let mut bench = Bench::protected();
    bench.output(11);
    bench.wait(millis(100));
    // It is not woken for half of the timeout.
    bench.now = millis(250);
    let done = bench.ack(1, 1, 11);
    assert_eq!(done.actions, [], "the acknowledgement may be old");
    assert!(matches!(done.sent[..], [Message::Heartbeat { time, .. }] if time == millis(250)), "{done:?}");
    assert!(bench.primary.is_unsure());
    assert_eq!(bench.hear(beat(1, millis(100).0)).actions, [], "so may be this beat");
    bench.now = millis(251);
    assert_eq!(bench.hear(beat(2, millis(250).0)).actions, [release(1)]);
    assert!(!bench.primary.is_unsure());
    // One that has lost it meanwhile learns of it from the arbiter.
    bench.output(12);
    bench.now = millis(600);
    assert_eq!(bench.ack(2, 2, 12).actions, []);
    bench.tell(PrimaryEvent::PeerClosed { reason: "gone".to_owned() });
    assert!(bench.primary.is_unsure());
    assert_eq!(bench.tell(answer(Verdict::Lost)).actions, [PrimaryAction::Stop(StopReason::LostArbitration { epoch: Epoch(2) })]);
}

#[test]
fn the_guest_is_throttled_at_each_bound_and_freed_at_half() {
    let mut bench = Bench::protected();
    assert_eq!(bench.tell(PrimaryEvent::Record(record(11, 1_200))).actions, [PrimaryAction::Throttle(true)]);
    assert!(bench.primary.status().throttled);
    assert_eq!(bench.ack(1, 0, 10).actions, [PrimaryAction::Throttle(false)], "what is not replayed is within its own bound");
    assert_eq!(bench.tell(PrimaryEvent::Record(record(12, 900))).actions, [PrimaryAction::Throttle(true)]);
    assert_eq!(bench.ack(2, 0, 10).actions, [], "received, but more than half the bound is not replayed");
    assert_eq!(bench.ack(2, 1, 11).actions, [PrimaryAction::Throttle(false)]);
    assert_eq!(bench.tell(PrimaryEvent::Record(record(1_500, 1))).actions, [PrimaryAction::Throttle(true)]);
    assert_eq!(bench.ack(3, 2, 900).actions, [], "600 behind is more than half of 1000");
    assert_eq!(bench.ack(3, 2, 1_100).actions, [PrimaryAction::Throttle(false)]);
}

#[test]
fn a_standby_far_beyond_a_bound_is_given_up() {
    let mut bench = Bench::protected();
    let done: Vec<PrimaryAction> =
        (0..5).flat_map(|step| bench.tell(PrimaryEvent::Record(record(11 + step, 1_000))).actions).collect();
    assert!(done.contains(&PrimaryAction::AskArbiter(claim(2))), "{done:?}");
}

#[test]
fn a_standby_without_progress_is_given_up() {
    let mut bench = Bench::protected();
    bench.tell(PrimaryEvent::Record(record(11, 1_200)));
    let mut asked = false;
    for step in 1..=110 {
        let done = bench.wait(millis(step * 100));
        asked |= done.actions.contains(&PrimaryAction::AskArbiter(claim(2)));
        if !asked {
            bench.hear(beat(step, 0));
        }
        assert_eq!(asked, step >= 100, "at step {step}");
    }
}

#[test]
fn impossible_acknowledgements_end_the_connection() {
    for ack in [(2, 0), (1, 2)] {
        let mut bench = Bench::protected();
        bench.output(11);
        let done = bench.ack(ack.0, ack.1, 10);
        assert!(done.actions.contains(&PrimaryAction::AskArbiter(claim(2))), "{ack:?}");
        assert!(!done.actions.contains(&release(1)), "{ack:?}");
    }
}

#[test]
fn garbage_ends_the_connection() {
    let mut bench = Bench::protected();
    let done = bench.tell(PrimaryEvent::Bytes(vec![0x55; 40]));
    let ask = PrimaryAction::AskArbiter(claim(2));
    assert_eq!(done.actions, [PrimaryAction::Disconnect, PrimaryAction::Throttle(true), ask]);
    let late = bench.tell(PrimaryEvent::Bytes(frame(&Message::Ack(Ack::default()))));
    assert_eq!(late, Done::default(), "nobody listens to a connection that was given up");
}

#[test]
fn a_standby_that_would_replay_otherwise_is_refused() {
    let mut bench = Bench::new();
    bench.tell(connected());
    let mut other = reply();
    other.host.cpu_vendor = "AuthenticAMD".to_owned();
    let done = bench.hear(Message::HelloReply(other));
    let Message::Refuse { reason } = &done.sent[0] else { panic!("{done:?}") };
    assert!(reason.contains("AuthenticAMD"));
    assert_eq!(done.actions, [PrimaryAction::Disconnect]);
    assert_eq!(bench.primary.state(), PrimaryState::Unprotected);
}

#[test]
fn a_standbys_goodbye_lets_the_primary_go_on_without_an_arbiter() {
    let mut bench = Bench::protected();
    bench.output(11);
    let done = bench.hear(Message::Goodbye { reason: "maintenance".to_owned() });
    assert!(matches!(&done.actions[1], PrimaryAction::GoAlone { epoch: Epoch(1), .. }), "{done:?}");
    assert_eq!(done.actions[2], release(1));
}

#[test]
fn the_end_of_the_guest_waits_for_its_last_output() {
    let mut bench = Bench::protected();
    bench.output(11);
    assert_eq!(bench.tell(PrimaryEvent::Shutdown { reason: "powered off".to_owned() }), Done::default());
    let done = bench.ack(1, 1, 11);
    assert_eq!(done.sent, [Message::Goodbye { reason: "powered off".to_owned() }]);
    let stop = PrimaryAction::Stop(StopReason::Ended { reason: "powered off".to_owned() });
    assert_eq!(done.actions, [release(1), PrimaryAction::Disconnect, stop]);
}

#[test]
#[should_panic(expected = "numbered without gaps")]
fn a_host_that_skips_an_output_is_stopped() {
    Bench::new().tell(PrimaryEvent::Output { id: 2, note: record(1, 8) });
}

#[test]
#[should_panic(expected = "only those up to 0 were released")]
fn a_host_that_lets_a_held_output_leave_is_stopped() {
    let mut bench = Bench::protected();
    bench.output(11);
    bench.tell(PrimaryEvent::OutputsLeft { up_to: 1 });
}

#[test]
fn a_configuration_that_can_not_work_is_refused() {
    let mut setup = primary_setup();
    setup.config.peer_timeout = setup.config.heartbeat_interval;
    let error = Primary::new(setup).unwrap_err();
    assert!(error.to_string().contains("peer_timeout: must be at least four heartbeat intervals"), "{error}");
}

fn mismatch() -> Message {
    Message::Mismatch { output: 2, position: 12, detail: vec![7] }
}

#[test]
fn a_matched_output_is_held_until_it_was_made_twice() {
    let mut bench = Bench::ruled(Commit::Matched, OnMismatch::Primary);
    bench.output(11);
    bench.output(12);
    assert_eq!(bench.ack(2, 2, 12).actions, []);
    let ack = Ack { received_seq: 2, replayed_seq: 2, replayed_position: 12, image_bytes: 4, matched: 1, agreed_position: 0 };
    assert_eq!(bench.hear(Message::Ack(ack)).actions, [release(1)]);
    assert_eq!(bench.hear(Message::Ack(Ack { matched: 2, ..ack })).actions, [release(2)]);
    bench.hear(Message::Ack(Ack { matched: 3, ..ack }));
    assert_eq!(bench.primary.state(), PrimaryState::Deciding, "it has matched what was not made");
}

/// Protection starts when all that has left was made twice, and nothing more leaves until then.
#[test]
fn what_left_before_protection_is_matched_as_well() {
    let mut bench = Bench::copied();
    bench.primary.setup.config.commit = Commit::Matched;
    assert_eq!(bench.output(11).actions, [release(1)]);
    bench.tell(PrimaryEvent::OutputsLeft { up_to: 1 });
    assert_eq!(bench.hear(Message::ImageReady { position: 10 }).sent, []);
    assert_eq!(bench.output(12).actions, []);
    let ack = Ack { received_seq: 2, replayed_seq: 1, replayed_position: 11, image_bytes: 4, matched: 1, agreed_position: 0 };
    let done = bench.hear(Message::Ack(ack));
    assert!(done.sent.contains(&Message::ProtectionStart { last_seq: 2 }), "{done:?}");
    assert_eq!(done.actions, []);
    assert_eq!(bench.hear(Message::Ack(Ack { matched: 2, ..ack })).actions, [release(2)]);
}

/// The guest runs, slowed, until the secondary has caught up; then it stands still, and nothing leaves until the secondary is equal.
#[test]
fn a_mismatch_is_repaired_before_anything_leaves() {
    for (commit, slowed, early) in [(Commit::Matched, 90, &[][..]), (Commit::Received, 50, &[release(3)])] {
        let mut bench = Bench::ruled(commit, OnMismatch::Primary);
        let ack = Ack { received_seq: 1, replayed_seq: 1, replayed_position: 11, image_bytes: 4, matched: 1, agreed_position: 0 };
        bench.output(11);
        bench.hear(Message::Ack(ack));
        bench.tell(PrimaryEvent::OutputsLeft { up_to: 1 });
        bench.output(12);
        let done = bench.hear(mismatch());
        let bytes = config().image_window_bytes;
        let start = PrimaryAction::StartResync { output: 2, position: 12, detail: vec![7] };
        assert_eq!(done.actions, [start, PrimaryAction::WantImage { bytes }, PrimaryAction::Slow { percent: slowed }]);
        assert_eq!(bench.hear(Message::Changed(vec![1, 2])).actions, [PrimaryAction::Changed(vec![1, 2])]);
        // The guest runs on, and what leaves is what the rule lets leave. Some of the image may be on its way.
        bench.now = bench.now.plus(Nanos(config().max_matched_lag.0 + 1));
        bench.output(16);
        let ack = Ack { received_seq: 3, image_bytes: 0, ..ack };
        assert_eq!(bench.hear(Message::Ack(ack)).actions, early, "{commit:?}");
        assert_eq!(bench.tell(PrimaryEvent::ImageChunk(vec![8])).sent, [Message::ImageChunk(vec![8])]);
        assert_eq!(bench.tell(PrimaryEvent::ResyncPrepared).actions, [], "it is not level");
        let done = bench.hear(Message::Ack(Ack { replayed_seq: 2, replayed_position: 13, ..ack }));
        assert_eq!(done.actions, [PrimaryAction::Throttle(true), PrimaryAction::StandStill]);
        assert_eq!(bench.primary.state(), PrimaryState::Resyncing);
        // What the guest did before it was stopped goes to the log, and is in the image as well.
        bench.output(17);
        let done = bench.tell(PrimaryEvent::StandsStill { position: 17 });
        assert_eq!(done.sent.last(), Some(&Message::StandStill { position: 17 }));
        let ack = Ack { received_seq: 4, replayed_seq: 4, replayed_position: 17, ..ack };
        assert_eq!(bench.hear(Message::Ack(ack)).actions, [], "{commit:?}: nothing leaves before the secondary is equal");
        assert_eq!(bench.hear(Message::Listed).actions, [PrimaryAction::MakeDelta]);
        bench.tell(PrimaryEvent::ImageCut { position: 17 });
        assert_eq!(bench.tell(PrimaryEvent::ImageChunk(vec![9; 2])).sent, [Message::ImageChunk(vec![9; 2])]);
        let done = bench.tell(PrimaryEvent::ImageEnd);
        assert_eq!(done.sent, [Message::ImageEnd { position: 17, total_bytes: 3 }]);
        let ack = Ack { image_bytes: 3, ..ack };
        assert!(!bench.hear(Message::Ack(ack)).actions.contains(&release(4)), "{commit:?}");
        let done = bench.hear(Message::ImageReady { position: 17 });
        assert_eq!(done.actions, [release(4), PrimaryAction::Throttle(false)]);
        let status = bench.primary.status();
        assert_eq!((status.state, status.resyncs, status.unreplayed_bytes), (PrimaryState::Protected, 1, 0));
        assert_eq!(bench.hear(Message::Ack(Ack { matched: 4, ..ack })).actions, []);
        bench.output(18);
        let ack = Ack { received_seq: 5, replayed_seq: 5, replayed_position: 18, matched: 5, ..ack };
        assert_eq!(bench.hear(Message::Ack(ack)).actions, [release(5)]);
    }
}

/// However far the secondary is behind: the guest is slowed more and more, and stopped in the end.
#[test]
fn a_secondary_that_does_not_catch_up_is_waited_for_within_bounds() {
    let mut bench = Bench::ruled(Commit::Received, OnMismatch::Primary);
    for n in 0..20 {
        bench.wait(bench.now.plus(millis(2)));
        bench.output(11 + n);
    }
    let begin = bench.now;
    assert!(bench.hear(mismatch()).actions.contains(&PrimaryAction::Slow { percent: 50 }));
    bench.tell(PrimaryEvent::ResyncPrepared);
    let mut all = Vec::new();
    for step in 1..=45 {
        all.extend(bench.wait(begin.plus(millis(100 * step))).actions.into_iter().map(|action| (step, action)));
        bench.hear(beat(0, 0));
    }
    let slower = |percent| PrimaryAction::Slow { percent };
    let stopped = [(40, PrimaryAction::Throttle(true)), (40, PrimaryAction::StandStill)];
    assert_eq!(all, [&[(10, slower(75)), (20, slower(90))][..], &stopped].concat());
}

/// More differs than a pause has room for: the guest runs on while it is sent, and is stopped again.
#[test]
fn a_resync_may_need_several_attempts() {
    let mut bench = Bench::ruled(Commit::Received, OnMismatch::Primary);
    bench.output(11);
    bench.output(12);
    bench.hear(mismatch());
    assert!(bench.tell(PrimaryEvent::ResyncPrepared).actions.contains(&PrimaryAction::StandStill), "it is close");
    bench.tell(PrimaryEvent::StandsStill { position: 12 });
    bench.hear(Message::Listed);
    let done = bench.tell(PrimaryEvent::ResyncGoesOn);
    assert_eq!(done.actions, [PrimaryAction::Slow { percent: 50 }, PrimaryAction::Throttle(false)]);
    bench.output(13);
    bench.tell(PrimaryEvent::ImageChunk(vec![9; 2]));
    let done = bench.tell(PrimaryEvent::ResyncPrepared);
    assert_eq!(done.actions, [PrimaryAction::Throttle(true), PrimaryAction::StandStill]);
    assert_eq!(bench.tell(PrimaryEvent::StandsStill { position: 13 }).sent, [Message::StandStill { position: 13 }]);
    assert_eq!(bench.hear(Message::Listed).actions, [PrimaryAction::MakeDelta]);
    // It lists once, when it was asked.
    bench.hear(Message::Listed);
    assert_eq!(bench.primary.state(), PrimaryState::Deciding);
}

/// The secondary may go live, so its loss is decided by the arbiter, in the middle of a resync as well.
#[test]
fn a_peer_lost_in_a_resync_is_a_matter_for_the_arbiter() {
    let mut bench = Bench::ruled(Commit::Matched, OnMismatch::Primary);
    bench.output(11);
    bench.output(12);
    bench.hear(mismatch());
    let done = bench.tell(PrimaryEvent::PeerClosed { reason: "reset".to_owned() });
    assert_eq!(done.actions, [PrimaryAction::Throttle(true), PrimaryAction::AskArbiter(claim(2))]);
    let done = bench.tell(answer(Verdict::Won));
    assert!(done.actions.contains(&release(2)) && done.actions.contains(&PrimaryAction::Throttle(false)), "{done:?}");
}

/// What a guest did last leaves although its standby was not equal, once it is certain that nobody goes on with the VM.
#[test]
fn a_guest_may_end_during_a_resync() {
    for stopped in [false, true] {
        let mut bench = Bench::ruled(Commit::Matched, OnMismatch::Primary);
        bench.output(11);
        bench.output(12);
        bench.hear(mismatch());
        if stopped {
            bench.tell(PrimaryEvent::ResyncPrepared);
            bench.tell(PrimaryEvent::StandsStill { position: 12 });
        }
        let done = bench.tell(PrimaryEvent::Shutdown { reason: "off".to_owned() });
        assert!(done.actions.contains(&PrimaryAction::AskArbiter(claim(2))), "{done:?}");
        let done = bench.tell(answer(Verdict::Won));
        assert!(done.actions.contains(&release(2)), "{done:?}");
        assert_eq!(bench.primary.state(), PrimaryState::Stopped);
    }
}

#[test]
fn nobody_is_believed_if_so_configured() {
    let mut bench = Bench::ruled(Commit::Received, OnMismatch::Stop);
    bench.output(11);
    bench.output(12);
    let done = bench.hear(mismatch());
    assert_eq!(done.actions, [PrimaryAction::Disconnect, PrimaryAction::Stop(StopReason::Mismatch { output: 2 })]);
    assert!(matches!(&done.sent[..], [Message::Goodbye { reason }] if reason.contains("output 2")), "{done:?}");
}

#[test]
fn a_secondary_that_lists_without_being_asked_is_given_up() {
    for message in [Message::Changed(vec![0]), Message::Listed] {
        let mut bench = Bench::protected();
        bench.hear(message);
        assert_eq!(bench.primary.state(), PrimaryState::Deciding);
    }
}

/// The guest was idle for long, so there was no progress to be seen; that is not held against the secondary now.
#[test]
fn a_planned_failover_gives_the_secondary_its_time() {
    let mut bench = Bench::protected();
    let stall = config().stall_timeout;
    while bench.now < stall.plus(stall) {
        bench.wait(bench.now.plus(millis(200)));
        bench.hear(beat(0, 0));
    }
    bench.tell(PrimaryEvent::Record(record(11, 3)));
    let done = bench.tell(PrimaryEvent::HandOver { reason: "maintenance".to_owned() });
    assert_eq!(done.actions, [PrimaryAction::Throttle(true)]);
    bench.wait(bench.now.plus(millis(100)));
    assert_eq!(bench.primary.state(), PrimaryState::Protected, "it is behind, not stuck");
    let done = bench.ack(1, 1, 11);
    assert!(done.sent.contains(&Message::HandOver { reason: "maintenance".to_owned() }), "{done:?}");
    let done = bench.tell(PrimaryEvent::PeerClosed { reason: "it went live".to_owned() });
    assert_eq!(done.actions, [], "the epoch is the secondary's to claim");
    bench.wait(bench.now.plus(millis(5_000)));
    assert_eq!(bench.tell(answer(Verdict::Lost)).actions, [PrimaryAction::Stop(StopReason::HandedOver { epoch: Epoch(2) })]);
}

#[test]
fn how_far_the_machine_runs_is_told_behind_the_records() {
    let log = |first_seq, position| Message::Log { first_seq, records: vec![record(position, 8)] };
    let ahead = |position| Message::Lookahead { position };
    let mut bench = Bench::ruled(Commit::Matched, OnMismatch::Primary);
    let mut put = |event| bench.primary.handle(bench.now, event);
    put(PrimaryEvent::Record(record(11, 8)));
    put(PrimaryEvent::Lookahead { position: 20 });
    assert_eq!(bench.tell(PrimaryEvent::Progress { position: 11 }).sent, [log(1, 11), ahead(20)]);
    assert_eq!(bench.output(12).sent, [log(2, 12)], "it is told once");
    assert_eq!(bench.tell(PrimaryEvent::Lookahead { position: 30 }).sent, [ahead(30)], "also by itself");
    let mut put = |event| bench.primary.handle(bench.now, event);
    put(PrimaryEvent::Lookahead { position: 40 });
    assert_eq!(bench.tell(PrimaryEvent::Record(record(30, 8))).sent, [log(3, 30)], "what enters makes it void");
    let mut put = |event| bench.primary.handle(bench.now, event);
    put(PrimaryEvent::Lookahead { position: 40 });
    put(PrimaryEvent::Paused);
    assert_eq!(bench.output(31).sent, [log(4, 31)], "so does a pause");
    assert_eq!(bench.tell(PrimaryEvent::Lookahead { position: 31 }).sent, [], "no further than the log is nothing");
    assert_eq!(bench.tell(PrimaryEvent::Lookahead { position: 32 + MAX_LOOKAHEAD }).sent, [], "the standby would refuse it");
    bench.hear(Message::Mismatch { output: 1, position: 20, detail: vec![] });
    assert_eq!(bench.tell(PrimaryEvent::Lookahead { position: 40 }).sent, [], "a machine that stands still cannot use it");
    // Nobody can before there is a machine, or waits for it with the other rule.
    let mut bench = Bench::copied();
    bench.primary.setup.config.commit = Commit::Matched;
    bench.tell(PrimaryEvent::Lookahead { position: 20 });
    assert_eq!(bench.output(11).sent, [log(1, 11)]);
    let mut bench = Bench::protected();
    bench.tell(PrimaryEvent::Lookahead { position: 20 });
    assert_eq!(bench.output(11).sent, [log(1, 11)]);
}

#[test]
fn a_guest_whose_outputs_would_wait_too_long_is_held_back() {
    let mut bench = Bench::ruled(Commit::Matched, OnMismatch::Primary);
    bench.output(11);
    bench.now = config().max_matched_lag;
    assert_eq!(bench.output(12).actions, []);
    bench.now = Nanos(bench.now.0 + 1);
    assert_eq!(bench.output(13).actions, [PrimaryAction::Throttle(true)]);
    assert!(bench.primary.status().lag_time > config().max_matched_lag);
    assert_eq!(bench.ack(3, 1, 11).actions, [PrimaryAction::Throttle(false)]);
    assert_eq!(bench.primary.status().lag_time, Nanos(1));
    // With the other rule it is instructions alone that count.
    let mut bench = Bench::protected();
    bench.output(11);
    bench.now = Nanos(config().max_matched_lag.0 + 1);
    assert_eq!(bench.output(12).actions, []);
}
