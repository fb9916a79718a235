//! The secondary, step by step: what it acknowledges, when it may go live, and what it sends again.

use super::*;
use crate::testing::*;
use crate::wire::Kind;

struct Bench {
    secondary: Secondary,
    now: Nanos,
}

/// What the secondary did in one step: its messages, and everything else but notices.
#[derive(Debug, Default, PartialEq)]
struct Done {
    sent: Vec<Message>,
    actions: Vec<SecondaryAction>,
}

impl Bench {
    fn new() -> Bench {
        let mut bench = Bench { secondary: Secondary::new(secondary_setup()).unwrap(), now: millis(1) };
        assert_eq!(bench.tell(SecondaryEvent::PeerConnected), Done::default());
        bench
    }

    fn tell(&mut self, event: SecondaryEvent) -> Done {
        self.secondary.handle(self.now, event);
        let mut done = Done::default();
        while let Some(action) = self.secondary.poll() {
            match action {
                SecondaryAction::Send(bytes) => done.sent.extend(messages(&bytes)),
                SecondaryAction::Notice(notice) => assert!(!notice.to_string().is_empty()),
                other => done.actions.push(other),
            }
        }
        done
    }

    fn hear(&mut self, message: Message) -> Done {
        self.tell(SecondaryEvent::Bytes(frame(&message)))
    }

    fn log(&mut self, first_seq: u64, positions: &[u64]) -> Done {
        let records = positions.iter().map(|position| record(*position, 1)).collect();
        self.hear(Message::Log { first_seq, records })
    }

    fn close(&mut self) -> Done {
        self.tell(SecondaryEvent::PeerClosed { reason: "reset".to_owned() })
    }

    fn copying() -> Bench {
        let mut bench = Bench::new();
        let done = bench.hear(Message::Hello(hello()));
        assert_eq!(done.sent, [Message::HelloReply(reply())]);
        assert_eq!(done.actions, [SecondaryAction::Prepare(hello())]);
        bench
    }

    fn following() -> Bench {
        let mut bench = Bench::copying();
        let done = bench.hear(Message::ImageChunk(vec![1, 2, 3]));
        assert_eq!(done.actions, [SecondaryAction::ImageChunk(vec![1, 2, 3])]);
        assert_eq!(done.sent, [], "there is no room for more yet");
        let done = bench.tell(SecondaryEvent::ImageTaken { bytes: 3 });
        assert_eq!(done.sent, [Message::Ack(Ack { image_bytes: 3, ..Ack::default() })]);
        let done = bench.hear(Message::ImageEnd { position: 10, total_bytes: 3 });
        assert_eq!(done.actions, [SecondaryAction::Restore { position: 10 }]);
        let done = bench.tell(SecondaryEvent::ImageRestored { position: 10, last_output: 5 });
        assert_eq!(done.sent, [Message::ImageReady { position: 10 }]);
        bench
    }

    fn entitled() -> Bench {
        let mut bench = Bench::following();
        bench.hear(Message::ProtectionStart { last_seq: 0 });
        assert!(bench.secondary.status().entitled);
        bench
    }

    /// Has received records up to 3 and replayed up to 1, has made outputs 6 and 7, and 6 has left.
    fn behind() -> Bench {
        let mut bench = Bench::entitled();
        bench.log(1, &[11, 12, 13]);
        bench.tell(SecondaryEvent::Output { id: 6 });
        bench.tell(SecondaryEvent::Output { id: 7 });
        bench.tell(SecondaryEvent::Replayed { seq: 1, position: 11 });
        let done = bench.hear(Message::Released { up_to: 6 });
        assert_eq!(done.actions, [SecondaryAction::Discard { up_to: 6 }]);
        bench
    }
}

fn answer(verdict: Verdict) -> SecondaryEvent {
    SecondaryEvent::ArbiterAnswer { epoch: Epoch(2), verdict }
}

fn ask() -> SecondaryAction {
    SecondaryAction::AskArbiter(Claim { vm: VM, epoch: Epoch(2), owner: SECONDARY })
}

#[test]
fn records_are_handed_to_replay_and_then_acknowledged() {
    let mut bench = Bench::entitled();
    let done = bench.log(1, &[11, 12]);
    let records = vec![record(11, 1), record(12, 1)];
    assert_eq!(done.actions, [SecondaryAction::Replay { first_seq: 1, records }]);
    let Message::Ack(ack) = done.sent[0] else { panic!("{done:?}") };
    assert_eq!((ack.received_seq, ack.replayed_seq), (2, 0));
}

#[test]
fn records_come_before_the_image_is_restored_too() {
    let mut bench = Bench::copying();
    let done = bench.log(1, &[11]);
    assert_eq!(done.actions.len(), 1);
    let Message::Ack(ack) = done.sent[0] else { panic!("{done:?}") };
    assert_eq!(ack.received_seq, 1);
}

#[test]
fn a_gap_in_the_log_ends_the_connection() {
    let mut bench = Bench::entitled();
    let done = bench.log(2, &[11]);
    assert_eq!(done.actions, [SecondaryAction::Disconnect, ask()]);
    assert_eq!(done.sent, [], "what was not taken is not acknowledged");
}

#[test]
fn going_live_takes_the_epoch_and_the_whole_log() {
    let mut bench = Bench::behind();
    assert_eq!(bench.close().actions, [ask()]);
    assert_eq!(bench.tell(answer(Verdict::Won)), Done::default());
    assert_eq!(bench.secondary.state(), SecondaryState::Consuming);
    assert_eq!(bench.tell(SecondaryEvent::Replayed { seq: 2, position: 12 }), Done::default());
    bench.tell(SecondaryEvent::Output { id: 8 });
    let done = bench.tell(SecondaryEvent::Replayed { seq: 3, position: 13 });
    assert_eq!(done.actions, [SecondaryAction::GoLive { epoch: Epoch(2), reissue: 7..9 }]);
    let (primary, healer) = bench.secondary.into_primary();
    assert_eq!(primary.epoch(), Epoch(2));
    // It is told of itself, so that it can tell others, and looks for the rest.
    assert_eq!(healer.places().collect::<Vec<_>>(), ["elsewhere:7171"]);
    assert_eq!(healer.greeting(0), ["elsewhere:7171", "there:7171"]);
}

#[test]
fn the_new_primary_numbers_outputs_on_and_knows_what_has_left() {
    let mut bench = Bench::behind();
    bench.close();
    bench.tell(answer(Verdict::Won));
    bench.tell(SecondaryEvent::Replayed { seq: 3, position: 13 });
    let (mut primary, _) = bench.secondary.into_primary();
    primary.handle(millis(2), crate::PrimaryEvent::OutputsLeft { up_to: 7 });
    primary.handle(millis(2), crate::PrimaryEvent::Output { id: 8, note: record(14, 8) });
    assert_eq!(primary.poll(), Some(crate::PrimaryAction::Release { up_to: 8 }));
}

#[test]
fn replay_may_be_over_before_the_answer_comes() {
    let mut bench = Bench::behind();
    bench.close();
    assert_eq!(bench.tell(SecondaryEvent::Replayed { seq: 3, position: 13 }), Done::default());
    let done = bench.tell(answer(Verdict::Won));
    assert_eq!(done.actions, [SecondaryAction::GoLive { epoch: Epoch(2), reissue: 7..8 }]);
}

#[test]
fn nothing_is_sent_again_when_all_has_left() {
    let mut bench = Bench::entitled();
    bench.hear(Message::Released { up_to: 9 });
    bench.close();
    let done = bench.tell(answer(Verdict::Won));
    let [SecondaryAction::GoLive { reissue, .. }] = &done.actions[..] else { panic!("{done:?}") };
    assert!(reissue.is_empty());
}

#[test]
fn the_loser_stops() {
    let mut bench = Bench::behind();
    bench.close();
    let done = bench.tell(answer(Verdict::Lost));
    assert_eq!(done.actions, [SecondaryAction::Stop(StopReason::LostArbitration { epoch: Epoch(2) })]);
    assert_eq!(bench.tell(answer(Verdict::Won)), Done::default());
}

#[test]
fn silence_of_the_arbiter_is_no_consent() {
    let mut bench = Bench::behind();
    bench.close();
    let mut asked = 0;
    for _ in 0..100 {
        bench.now = bench.secondary.deadline().expect("it goes on trying").max(bench.now);
        let done = bench.tell(SecondaryEvent::Tick);
        assert!(done.actions.iter().all(|action| *action == ask()));
        asked += done.actions.len();
    }
    assert_eq!((asked, bench.secondary.state()), (50, SecondaryState::Deciding));
}

#[test]
fn before_protection_it_never_goes_live() {
    for mut bench in [Bench::new(), Bench::copying(), Bench::following()] {
        let done = bench.close();
        let [SecondaryAction::Stop(StopReason::NotProtected { reason })] = &done.actions[..] else { panic!("{done:?}") };
        assert!(reason.contains("reset"));
    }
}

#[test]
fn a_silent_primary_is_lost_after_the_timeout() {
    let mut bench = Bench::entitled();
    let lost_at = bench.now.plus(config().peer_timeout);
    while bench.secondary.state() == SecondaryState::Following {
        let deadline = bench.secondary.deadline().unwrap();
        assert!(deadline > bench.now && deadline <= lost_at);
        bench.now = deadline;
        let done = bench.tell(SecondaryEvent::Tick);
        assert!(done.sent.iter().all(|message| message.kind() == Kind::Heartbeat));
    }
    assert_eq!(bench.now, lost_at);
}

#[test]
fn progress_of_replay_is_reported_but_not_too_often() {
    let mut bench = Bench::entitled();
    bench.log(1, &[11, 12, 13]);
    bench.now = millis(10);
    assert_eq!(bench.tell(SecondaryEvent::Replayed { seq: 1, position: 11 }).sent.len(), 1);
    assert_eq!(bench.tell(SecondaryEvent::Replayed { seq: 2, position: 12 }).sent, []);
    bench.now = bench.secondary.deadline().unwrap();
    assert_eq!(bench.now, millis(10).plus(config().replay_report_interval));
    let done = bench.tell(SecondaryEvent::Tick);
    let Some(Message::Ack(ack)) = done.sent.last() else { panic!("{done:?}") };
    assert_eq!((ack.replayed_seq, ack.replayed_position), (2, 12));
}

#[test]
fn a_machine_it_was_not_told_to_expect_is_refused() {
    let mut setup = secondary_setup();
    setup.expect.ram_bytes = Some(8192);
    setup.host.build = "other".to_owned();
    let mut bench = Bench { secondary: Secondary::new(setup).unwrap(), now: millis(1) };
    bench.tell(SecondaryEvent::PeerConnected);
    let done = bench.hear(Message::Hello(hello()));
    let Message::Refuse { reason } = &done.sent[0] else { panic!("{done:?}") };
    assert!(reason.contains("8192") && reason.contains("4096") && reason.contains("\"other\""), "{reason}");
    let [SecondaryAction::Disconnect, SecondaryAction::Stop(StopReason::Refused { .. })] = &done.actions[..] else {
        panic!("{done:?}")
    };
}

#[test]
fn an_image_that_is_not_whole_is_not_restored() {
    let mut bench = Bench::copying();
    bench.hear(Message::ImageChunk(vec![1, 2, 3]));
    let done = bench.hear(Message::ImageEnd { position: 10, total_bytes: 4 });
    assert!(matches!(done.actions[..], [SecondaryAction::Disconnect, SecondaryAction::Stop(_)]), "{done:?}");
}

#[test]
fn a_machine_restored_elsewhere_is_given_up() {
    let mut bench = Bench::copying();
    bench.hear(Message::ImageChunk(vec![1, 2, 3]));
    bench.hear(Message::ImageEnd { position: 10, total_bytes: 3 });
    let done = bench.tell(SecondaryEvent::ImageRestored { position: 11, last_output: 5 });
    assert!(matches!(done.actions[..], [SecondaryAction::Disconnect, SecondaryAction::Stop(_)]), "{done:?}");
}

#[test]
fn a_goodbye_ends_it() {
    let mut bench = Bench::entitled();
    let done = bench.hear(Message::Goodbye { reason: "powered off".to_owned() });
    let stop = SecondaryAction::Stop(StopReason::PeerEnded { reason: "powered off".to_owned() });
    assert_eq!(done.actions, [SecondaryAction::Disconnect, stop]);
}

#[test]
fn it_can_be_drained_only_while_there_is_a_primary() {
    let drain = || SecondaryEvent::Shutdown { reason: "maintenance".to_owned() };
    let mut bench = Bench::behind();
    bench.close();
    assert_eq!(bench.tell(drain()), Done::default());
    assert_eq!(bench.secondary.state(), SecondaryState::Deciding);
    let failed = bench.tell(SecondaryEvent::Failed { reason: "replay went wrong".to_owned() });
    assert!(matches!(failed.actions[..], [SecondaryAction::Stop(StopReason::Ended { .. })]));
    let mut bench = Bench::behind();
    assert_eq!(bench.tell(drain()).sent, [Message::Goodbye { reason: "maintenance".to_owned() }]);
}

#[test]
fn every_message_in_every_state_is_survived() {
    let benches: [fn() -> Bench; 5] = [Bench::new, Bench::copying, Bench::following, Bench::entitled, Bench::behind];
    let all = [
        Message::Hello(hello()),
        Message::HelloReply(reply()),
        Message::Refuse { reason: String::new() },
        Message::ImageChunk(vec![1]),
        Message::ImageEnd { position: 1, total_bytes: 1 },
        Message::ImageReady { position: 1 },
        Message::ProtectionStart { last_seq: 9 },
        Message::Log { first_seq: 1, records: vec![record(11, 1)] },
        Message::Ack(Ack::default()),
        Message::Released { up_to: u64::MAX },
        Message::Heartbeat { time: Nanos(u64::MAX), position: u64::MAX, echo: Nanos(u64::MAX) },
        Message::Goodbye { reason: String::new() },
    ];
    for bench in benches {
        for first in &all {
            for second in &all {
                let mut bench = bench();
                bench.hear(first.clone());
                bench.hear(second.clone());
                bench.tell(SecondaryEvent::Tick);
                assert_ne!(bench.secondary.state(), SecondaryState::Live);
            }
        }
    }
}

fn differs() -> SecondaryEvent {
    SecondaryEvent::Mismatch { output: 8, position: 12, detail: vec![7] }
}

#[test]
fn an_output_that_differs_waits_for_the_primarys_machine() {
    let mut bench = Bench::behind();
    let done = bench.tell(differs());
    assert_eq!(done.sent, [Message::Mismatch { output: 8, position: 12, detail: vec![7] }]);
    assert_eq!(bench.secondary.state(), SecondaryState::Resyncing);
    assert_eq!(bench.tell(SecondaryEvent::Changed(vec![1, 2])).sent, [Message::Changed(vec![1, 2])]);
    // What was on its way is taken in and replayed; the image stands for it.
    assert_eq!(bench.log(4, &[14]).actions.len(), 1);
    assert_eq!(bench.hear(Message::StandStill { position: 15 }).actions, [SecondaryAction::ListChanges { position: 15 }]);
    bench.tell(SecondaryEvent::Replayed { seq: 4, position: 14 });
    assert_eq!(bench.tell(SecondaryEvent::Listed).sent, [Message::Listed]);
    let done = bench.hear(Message::ImageChunk(vec![5; 9]));
    assert_eq!(done.actions, [SecondaryAction::ImageChunk(vec![5; 9])]);
    let done = bench.tell(SecondaryEvent::ImageTaken { bytes: 9 });
    assert!(matches!(done.sent[..], [Message::Ack(Ack { image_bytes: 9, received_seq: 4, matched: 7, .. })]), "{done:?}");
    let done = bench.hear(Message::ImageEnd { position: 15, total_bytes: 9 });
    assert_eq!(done.actions, [SecondaryAction::Restore { position: 15 }]);
    let done = bench.tell(SecondaryEvent::ImageRestored { position: 15, last_output: 9 });
    let ack = Ack { received_seq: 4, replayed_seq: 4, replayed_position: 15, image_bytes: 9, matched: 9, agreed_position: 0 };
    assert_eq!(done.sent, [Message::ImageReady { position: 15 }, Message::Ack(ack)]);
    // What came with the image may not have left.
    bench.close();
    let done = bench.tell(answer(Verdict::Won));
    assert!(done.actions.contains(&SecondaryAction::GoLive { epoch: Epoch(2), reissue: 7..10 }), "{done:?}");
}

#[test]
fn without_the_primary_it_goes_on_with_its_own() {
    let mut bench = Bench::behind();
    bench.tell(differs());
    bench.hear(Message::ImageChunk(vec![5; 9]));
    assert_eq!(bench.close().actions, [ask()]);
    assert_eq!(bench.tell(answer(Verdict::Won)).actions, [SecondaryAction::Diverge]);
    bench.tell(SecondaryEvent::Replayed { seq: 3, position: 13 });
    // What it has made since the difference counts from now on.
    assert_eq!(bench.tell(SecondaryEvent::Output { id: 8 }).actions, []);
    let done = bench.tell(SecondaryEvent::Diverged);
    assert_eq!(done.actions, [SecondaryAction::GoLive { epoch: Epoch(2), reissue: 7..9 }]);
}

#[test]
fn a_list_of_a_machine_that_has_not_replayed_all_is_none() {
    let mut bench = Bench::behind();
    bench.tell(differs());
    assert_eq!(bench.tell(SecondaryEvent::Listed), Done::default());
}

/// Restoring has begun, so the old machine is gone: the new one goes live.
#[test]
fn a_resync_that_is_complete_is_waited_for() {
    let mut bench = Bench::behind();
    bench.tell(differs());
    bench.hear(Message::ImageChunk(vec![5; 9]));
    bench.hear(Message::ImageEnd { position: 15, total_bytes: 9 });
    bench.close();
    assert_eq!(bench.tell(answer(Verdict::Won)).actions, []);
    let done = bench.tell(SecondaryEvent::ImageRestored { position: 15, last_output: 9 });
    assert_eq!(done.actions, [SecondaryAction::GoLive { epoch: Epoch(2), reissue: 7..10 }]);
}

/// Who waits for a match is told at once, not when the next report of progress is due.
#[test]
fn matches_are_acknowledged_at_once_if_anybody_waits_for_them() {
    for (commit, sent) in [(Commit::Received, 0), (Commit::Matched, 1)] {
        let mut bench = Bench::entitled();
        bench.secondary.hello.as_mut().unwrap().commit = commit;
        bench.log(1, &[11]);
        assert_eq!(bench.tell(SecondaryEvent::Output { id: 6 }).sent.len(), sent, "{commit:?}");
    }
}

#[test]
fn the_machine_may_run_ahead_of_the_log_within_a_bound() {
    let mut bench = Bench::entitled();
    let ahead = |position| SecondaryAction::RunAhead { position };
    assert_eq!(bench.hear(Message::Lookahead { position: 20 }).actions, [ahead(20)], "beyond the image's cut");
    bench.log(1, &[11]);
    assert_eq!(bench.hear(Message::Lookahead { position: 21 }).actions, [ahead(21)]);
    bench.tell(SecondaryEvent::Replayed { seq: 1, position: 21 });
    bench.log(2, &[15]);
    bench.tell(SecondaryEvent::Replayed { seq: 2, position: 21 });
    assert_eq!(bench.secondary.status().replayed_position, 21);
    // While it stands still it cannot.
    bench.tell(SecondaryEvent::Mismatch { output: 6, position: 21, detail: vec![1] });
    assert_eq!(bench.hear(Message::Lookahead { position: 22 }).actions, []);
    for position in [11, 12 + MAX_LOOKAHEAD, u64::MAX] {
        let mut bench = Bench::entitled();
        bench.log(1, &[11]);
        let done = bench.hear(Message::Lookahead { position });
        assert_eq!(done.actions, [SecondaryAction::Disconnect, ask()], "{position}");
    }
}
