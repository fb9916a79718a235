//! The switch's decisions, step by step.

use super::*;
use proptest::prelude::*;

const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const C: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
const ALL: [u8; 6] = [0xff; 6];

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn frame(to: [u8; 6], from: [u8; 6], text: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    crate::net::frames::encode(&[&to[..], &from, &[8, 0], text.as_bytes()].concat(), &mut wire);
    wire
}

/// Writes everything a port has to be given and returns the payloads.
fn drain(fabric: &mut Fabric, port: PortId, now: Duration) -> Vec<String> {
    let mut texts = Vec::new();
    loop {
        let Some(frame) = fabric.waiting(port, 1).next().map(<[u8]>::to_vec) else { break };
        texts.push(String::from_utf8(frame[HEADER + 14..].to_vec()).unwrap());
        fabric.wrote(port, frame.len(), now);
    }
    texts
}

#[test]
fn learns_and_floods() {
    let mut f = Fabric::new(Limits::default());
    let [a, b, c] = [f.attach(), f.attach(), f.attach()];
    f.frame(a, &frame(B, A, "who"), at(0));
    assert_eq!(drain(&mut f, b, at(0)), ["who"]);
    assert_eq!(drain(&mut f, c, at(0)), ["who"]);
    f.frame(b, &frame(A, B, "me"), at(0));
    assert_eq!(drain(&mut f, a, at(0)), ["me"]);
    assert!(!f.has_waiting(c));
    f.frame(c, &frame(ALL, C, "everyone"), at(0));
    assert_eq!(drain(&mut f, a, at(0)), ["everyone"]);
    assert_eq!(drain(&mut f, b, at(0)), ["everyone"]);
    assert!(!f.has_waiting(c));
    // To itself, and too short to say: nowhere.
    f.frame(a, &frame(A, A, "self"), at(0));
    f.frame(a, &[0, 0, 0, 1, 7], at(0));
    assert!([a, b, c].iter().all(|p| !f.has_waiting(*p)));
}

#[test]
fn nothing_is_lost_in_a_failover() {
    let mut f = Fabric::new(Limits::default());
    let [world, primary] = [f.attach(), f.attach()];
    f.frame(primary, &frame(ALL, B, "hello"), at(0));
    f.frame(world, &frame(B, A, "long ago"), at(0));
    drain(&mut f, primary, at(0));
    f.frame(world, &frame(B, A, "passed on"), at(900));
    drain(&mut f, primary, at(900));
    f.frame(world, &frame(B, A, "queued"), at(990));
    f.detach(primary, "killed", at(1000));
    f.frame(world, &frame(B, A, "kept"), at(1010));
    let standby = f.attach();
    assert!(!f.has_waiting(standby));
    f.frame(standby, &frame(ALL, B, "it is me"), at(1100));
    assert_eq!(drain(&mut f, standby, at(1100)), ["passed on", "queued", "kept"]);
    let events: Vec<_> = f.take_events().collect();
    assert!(events.contains(&Event::Lost(Mac(B))));
    assert!(events.contains(&Event::Found { mac: Mac(B), port: standby, again: 1, kept: 2, dropped: 0, after: at(100) }));
    // From here on as ever.
    f.frame(world, &frame(B, A, "later"), at(1200));
    assert_eq!(drain(&mut f, standby, at(1200)), ["later"]);
}

#[test]
fn what_the_guest_has_acknowledged_is_not_delivered_again() {
    use super::super::tcp::tests::segment;
    let wire = |frame: Vec<u8>| {
        let mut wire = Vec::new();
        crate::net::frames::encode(&frame, &mut wire);
        wire
    };
    let mut f = Fabric::new(Limits::default());
    let [world, primary] = [f.attach(), f.attach()];
    f.frame(primary, &frame(ALL, B, "hello"), at(0));
    let (client, guest) = ((A, 1), (B, 2));
    let sent = [
        segment(client, guest, 100, 1, b"first"),
        segment(client, guest, 105, 1, b""),
        segment(client, guest, 105, 1, b"second"),
        segment(client, guest, 111, 1, b""),
        segment(client, guest, 111, 5, b""),
    ];
    for (n, frame) in sent.iter().enumerate() {
        f.frame(world, &wire(frame.clone()), at(n as u64));
        let length = f.waiting(primary, 1).next().unwrap().len();
        f.wrote(primary, length, at(n as u64));
    }
    f.frame(primary, &wire(segment(guest, client, 1, 105, b"answer to the first")), at(10));
    f.detach(primary, "killed", at(20));
    let standby = f.attach();
    f.frame(standby, &frame(ALL, B, "it is me"), at(30));
    // The second request, and the newest of the empty ones.
    let again: Vec<Vec<u8>> = f.waiting(standby, 9).map(<[u8]>::to_vec).collect();
    assert_eq!(again, [wire(sent[2].clone()), wire(sent[4].clone())]);
}

#[test]
fn a_port_that_hangs_is_left_behind() {
    let mut f = Fabric::new(Limits::default());
    let [world, hanging, standby] = [f.attach(), f.attach(), f.attach()];
    f.frame(hanging, &frame(ALL, B, "hello"), at(0));
    drain(&mut f, standby, at(0));
    f.frame(world, &frame(B, A, "1"), at(10));
    drain(&mut f, hanging, at(10));
    f.frame(world, &frame(B, A, "2"), at(20));
    f.frame(standby, &frame(ALL, B, "it is me"), at(30));
    assert_eq!(drain(&mut f, standby, at(30)), ["1", "2"]);
    // The two now fight for the address; nothing is delivered a third time.
    f.frame(hanging, &frame(ALL, B, "no, me"), at(40));
    assert_eq!(drain(&mut f, hanging, at(40)), ["it is me", "2"]);
    drain(&mut f, standby, at(40));
    for round in 0..10 {
        f.frame(standby, &frame(ALL, B, "x"), at(50 + round));
        f.frame(hanging, &frame(ALL, B, "x"), at(50 + round));
        assert!(drain(&mut f, standby, at(50 + round)).iter().all(|text| text == "x"));
        assert!(drain(&mut f, hanging, at(50 + round)).iter().all(|text| text == "x"));
    }
}

#[test]
fn a_frame_half_written_is_finished_and_the_heir_gets_it_too() {
    let mut f = Fabric::new(Limits::default());
    let [world, old, new] = [f.attach(), f.attach(), f.attach()];
    f.frame(old, &frame(ALL, B, "hello"), at(0));
    drain(&mut f, new, at(0));
    f.frame(world, &frame(B, A, "first"), at(10));
    f.frame(world, &frame(B, A, "second"), at(10));
    let whole = frame(B, A, "first");
    f.wrote(old, 10, at(10));
    f.frame(new, &frame(ALL, B, "it is me"), at(20));
    // The rest of the half-written frame, then what is for everyone; nothing that belongs to the address now.
    let pieces: Vec<Vec<u8>> = f.waiting(old, 9).map(<[u8]>::to_vec).collect();
    assert_eq!(pieces, [whole[10..].to_vec(), frame(ALL, B, "it is me")]);
    assert_eq!(drain(&mut f, new, at(20)), ["first", "second"]);
}

#[test]
fn several_frames_in_one_write() {
    let mut f = Fabric::new(Limits::default());
    let [a, b] = [f.attach(), f.attach()];
    for text in ["1", "2", "3"] {
        f.frame(a, &frame(B, A, text), at(0));
    }
    let length = frame(B, A, "1").len();
    f.wrote(b, 2 * length + 3, at(0));
    assert_eq!(f.waiting(b, 9).collect::<Vec<_>>(), [&frame(B, A, "3")[3..]]);
    f.wrote(b, length - 3, at(0));
    assert!(!f.has_waiting(b));
}

#[test]
fn what_is_kept_has_an_end() {
    let limits = Limits { kept: Bound { frames: 2, bytes: 1000 }, ..Limits::default() };
    let mut f = Fabric::new(limits);
    let [world, primary] = [f.attach(), f.attach()];
    f.frame(primary, &frame(ALL, B, ""), at(0));
    f.detach(primary, "killed", at(0));
    for text in ["1", "2", "3"] {
        f.frame(world, &frame(B, A, text), at(1));
    }
    assert_eq!(f.next_expiry(), Some(at(10_000)));
    f.expire(at(9_999));
    let standby = f.attach();
    f.frame(standby, &frame(ALL, B, ""), at(9_999));
    assert_eq!(drain(&mut f, standby, at(9_999)), ["1", "2"]);
    assert!(f.take_events().any(|e| matches!(e, Event::Found { dropped: 1, .. })));

    f.detach(standby, "killed", at(20_000));
    f.frame(world, &frame(B, A, "4"), at(20_000));
    f.expire(at(30_000));
    assert_eq!(f.next_expiry(), None);
    assert!(f.take_events().any(|e| e == Event::GivenUp { mac: Mac(B), frames: 1 }));
}

#[test]
fn a_full_queue_drops_the_newest() {
    let limits = Limits { queue: Bound { frames: 100, bytes: 60 }, ..Limits::default() };
    let mut f = Fabric::new(limits);
    let [a, b] = [f.attach(), f.attach()];
    for text in ["0123456789", "0123456789", "x"] {
        f.frame(a, &frame(B, A, text), at(0));
    }
    // Two frames of 28 bytes fit into 60, the third of 19 does not.
    assert_eq!(drain(&mut f, b, at(0)).len(), 2);
    assert_eq!(f.dropped(b), 1);
}

#[test]
fn made_up_addresses_fill_a_bounded_table() {
    let mut f = Fabric::new(Limits { addresses: 10, ..Limits::default() });
    let [a, b] = [f.attach(), f.attach()];
    for n in 0..200 {
        f.frame(a, &frame(ALL, [2, 9, 9, 9, 9, n], ""), at(0));
    }
    assert_eq!(f.addresses.len(), 10);
    drain(&mut f, b, at(0));
    f.frame(a, &frame(B, A, "still goes"), at(0));
    assert_eq!(drain(&mut f, b, at(0)), ["still goes"]);
}

#[derive(Debug, Clone)]
enum Step {
    Attach,
    Detach(usize),
    Send { from: usize, source: u8, to: u8 },
    Drain(usize),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => Just(Step::Attach),
        1 => (0usize..6).prop_map(Step::Detach),
        10 => (0usize..6, 0u8..5, 0u8..6).prop_map(|(from, source, to)| Step::Send { from, source, to }),
        4 => (0usize..6).prop_map(Step::Drain),
        2 => (0u64..4000).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// Whatever happens: limits hold, byte counts are right, and the copies of a frame that flooding made are delivered at most twice each.
    #[test]
    fn any_history(steps in steps()) {
        let small = Bound { frames: 8, bytes: 300 };
        let limits = Limits { queue: small, kept: small, recent: small, addresses: 4, ..Limits::default() };
        let mut f = Fabric::new(limits);
        let mut ports = Vec::new();
        let mut now = at(0);
        let mut serial = 0;
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Attach if ports.len() < 6 => ports.push(f.attach()),
                Step::Attach => {}
                Step::Detach(i) => if i < ports.len() { f.detach(ports.remove(i), "gone", now) },
                Step::Send { from, source, to } => if let Some(port) = ports.get(from) {
                    serial += 1;
                    let to = if to == 5 { ALL } else { [2, 0, 0, 0, 0, to] };
                    f.frame(*port, &frame(to, [2, 0, 0, 0, 0, source], &serial.to_string()), now);
                },
                Step::Drain(i) => if let Some(port) = ports.get(i) {
                    for text in drain(&mut f, *port, now) {
                        *seen.entry(text).or_default() += 1;
                    }
                },
                Step::Wait(ms) => { now += at(ms); f.expire(now); }
            }
            for port in f.ports.values() {
                for (len, bytes, total) in [
                    (port.queue.items.len(), port.queue.bytes, port.queue.items.iter().map(|i| i.frame.len()).sum::<usize>()),
                    (port.recent.items.len(), port.recent.bytes, port.recent.items.iter().map(|i| i.frame.len()).sum()),
                ] {
                    prop_assert!(len <= small.frames && bytes <= small.bytes && bytes == total);
                }
            }
            prop_assert!(f.away.values().all(|a| a.frames.items.len() <= small.frames && a.frames.bytes <= small.bytes));
            prop_assert!(f.addresses.len() + f.away.len() <= 4);
            prop_assert!(f.addresses.values().all(|p| f.ports.contains_key(p)));
            prop_assert!(f.away.keys().all(|mac| !f.addresses.contains_key(mac)));
        }
        // Flooded to at most five others.
        prop_assert!(seen.values().all(|n| *n <= 10));
    }
}

fn token(epoch: u64, owner: u8) -> Token {
    Token { vm: [7; 16], epoch, owner: [owner; 16] }
}

#[test]
fn a_stale_port_is_refused_and_told() {
    let mut f = Fabric::new(Limits::default());
    let [world, primary] = [f.attach(), f.attach()];
    f.name(primary, token(1, 1), None, at(0));
    f.frame(primary, &frame(ALL, B, "hello"), at(0));
    assert_eq!(drain(&mut f, world, at(0)), ["hello"]);
    f.frame(world, &frame(B, A, "for the guest"), at(10));
    // The host hangs, and another takes its VM over.
    let survivor = f.attach();
    f.name(survivor, token(2, 2), None, at(20));
    assert!(f.is_fenced(primary) && !f.is_fenced(survivor));
    f.frame(survivor, &frame(ALL, B, "here I am"), at(20));
    assert_eq!(drain(&mut f, world, at(20)), ["here I am"]);
    assert_eq!(drain(&mut f, survivor, at(20)), ["for the guest"]);
    // It returns: what it sends is nowhere to be seen, and the guest's traffic stays where the guest is.
    f.frame(primary, &frame(A, B, "late"), at(30));
    f.frame(primary, &frame(ALL, B, "late, too"), at(30));
    assert!(!f.has_waiting(world));
    f.frame(world, &frame(B, A, "again"), at(30));
    f.frame(world, &frame(ALL, A, "everyone"), at(30));
    assert_eq!(drain(&mut f, survivor, at(30)), ["again", "everyone"]);
    assert_eq!(f.refused(primary), 2);
    // All that it gets is the word.
    let told: Vec<Vec<u8>> = f.waiting(primary, 9).map(<[u8]>::to_vec).collect();
    assert_eq!(told, [Message::Fenced { epoch: 2 }.wire()]);
    f.detach(primary, "gone", at(40));
    let events: Vec<Event> = f.take_events().collect();
    assert!(events.contains(&Event::Fenced { port: primary, token: token(1, 1), by: 2 }), "{events:?}");
    assert!(events.contains(&Event::Refused { port: primary, frames: 2 }), "{events:?}");
    // Its return as a new port is no better.
    let again = f.attach();
    f.name(again, token(1, 1), None, at(50));
    f.frame(again, &frame(ALL, B, "still me"), at(50));
    assert!(!f.has_waiting(world) && f.is_fenced(again));
}

#[test]
fn a_side_that_wins_is_not_stale_on_any_of_its_cards() {
    let mut f = Fabric::new(Limits::default());
    let [world, left, right] = [f.attach(), f.attach(), f.attach()];
    for port in [left, right] {
        f.name(port, token(1, 1), None, at(0));
    }
    f.name(left, token(2, 1), None, at(1));
    f.frame(right, &frame(ALL, B, "between two words"), at(1));
    assert_eq!(drain(&mut f, world, at(1)), ["between two words"]);
    f.name(right, token(2, 1), None, at(2));
    assert!(!f.is_fenced(left) && !f.is_fenced(right));
    // One that was wrongly suspected, and wins afterwards, is heard again.
    let other = f.attach();
    f.name(other, token(3, 2), None, at(3));
    assert!(f.is_fenced(left));
    f.name(left, token(4, 1), None, at(4));
    assert!(!f.is_fenced(left) && f.is_fenced(other));
}

#[test]
fn what_somebody_else_knows_of_a_port_counts() {
    let mut f = Fabric::new(Limits::default());
    let [world, stale] = [f.attach(), f.attach()];
    f.name(stale, token(1, 1), Some(2), at(0));
    f.frame(stale, &frame(ALL, B, "late"), at(0));
    assert!(!f.has_waiting(world));
    // It has not become the newest by that.
    let live = f.attach();
    f.name(live, token(2, 2), None, at(0));
    assert!(!f.is_fenced(live));
}

#[test]
fn a_half_written_frame_is_finished_before_the_word() {
    let mut f = Fabric::new(Limits::default());
    let [world, primary] = [f.attach(), f.attach()];
    f.name(primary, token(1, 1), None, at(0));
    f.frame(primary, &frame(ALL, B, "hello"), at(0));
    let half = frame(B, A, "half");
    f.frame(world, &half, at(0));
    f.frame(world, &frame(B, A, "waits"), at(0));
    f.wrote(primary, 5, at(0));
    let survivor = f.attach();
    f.name(survivor, token(2, 2), None, at(1));
    let pieces: Vec<Vec<u8>> = f.waiting(primary, 9).map(<[u8]>::to_vec).collect();
    assert_eq!(pieces, [half[5..].to_vec(), Message::Fenced { epoch: 2 }.wire()]);
    f.frame(survivor, &frame(ALL, B, "me"), at(2));
    assert_eq!(drain(&mut f, survivor, at(2)), ["half", "waits"]);
}
