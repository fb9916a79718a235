//! Tests of the network card.
use super::*;
use crate::virtio::feature;
use crate::virtio::testing::Driver;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn card() -> Driver {
    Driver::new(Box::new(Net::new(3, MAC)))
}
fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| i as u8).collect()
}

#[test]
fn frames_leave() {
    let mut d = card();
    d.start(F_MAC);
    let (header, first, rest) = ([0; HEADER], frame(14), frame(50));
    let chain = d.add(1, &[&header, &first, &rest], &[]);
    d.kick(1);
    assert_eq!(d.used(1), [(chain.head, 0)]);
    assert_eq!(d.outputs(), [Output::NetTx { nic: 3, frame: [first, rest].concat() }]);
    assert_eq!(d.interrupts(), [d.vector(1)]);
    assert_eq!(d.get(0x2000, 6), u64::from_le_bytes([2, 0, 0, 0, 0, 1, 0, 0]));
    assert_eq!(d.get(0x2006, 2), 1);
}

#[test]
fn runts_and_giants_are_dropped() {
    let mut d = card();
    d.start(0);
    d.add(1, &[&[0; HEADER + 13]], &[]);
    d.add(1, &[&vec![0; HEADER + MAX_FRAME + 1]], &[]);
    d.add_raw(1, &[(0xdead_0000_0000, 100, false)]);
    d.kick(1);
    assert_eq!(d.used(1).len(), 3);
    assert_eq!(d.outputs(), []);
}

#[test]
fn frames_arrive_in_one_buffer() {
    let mut d = card();
    d.start(0);
    let buffer = d.add(0, &[], &[12, 1514]);
    d.receive(Received::Frame(frame(60)));
    assert_eq!(d.used(0), [(buffer.head, 72)]);
    assert_eq!(d.read(buffer.writable[0], 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(d.read(buffer.writable[1], 60), frame(60));
    assert_eq!(d.interrupts(), [d.vector(0)]);
    // Too large for a buffer: lost, and the buffer takes the next one.
    let buffer = d.add(0, &[], &[100]);
    d.receive(Received::Frame(frame(89)));
    d.receive(Received::Frame(frame(88)));
    assert_eq!(d.used(0), [(buffer.head, 100)]);
}

#[test]
fn frames_spread_over_mergeable_buffers() {
    let mut d = card();
    d.start(F_MRG_RXBUF);
    let a = d.add(0, &[], &[40]);
    d.receive(Received::Frame(frame(100)));
    assert_eq!(d.used(0), [], "not enough room yet");
    let b = d.add(0, &[], &[40]);
    let c = d.add(0, &[], &[40]);
    d.kick(0);
    assert_eq!(d.used(0), [(a.head, 40), (b.head, 40), (c.head, 32)]);
    assert_eq!(d.read(a.writable[0] + 10, 2), [3, 0]);
    let bytes = [d.read(a.writable[0] + 12, 28), d.read(b.writable[0], 40), d.read(c.writable[0], 32)].concat();
    assert_eq!(bytes, frame(100));
}

#[test]
fn the_backlog_is_bounded_and_saved() {
    let mut d = card();
    d.receive(Received::Frame(frame(60)));
    d.start(0);
    for i in 0..BACKLOG + 5 {
        d.receive(Received::Frame(frame(60 + i % 7)));
    }
    d.check_save_restore(Box::new(Net::new(3, MAC)));
    let mut sizes = Vec::new();
    while sizes.len() < BACKLOG {
        let buffer = d.add(0, &[], &[100]);
        d.kick(0);
        let used = d.used(0);
        assert_eq!(used[0].0, buffer.head);
        sizes.push(used[0].1 as usize);
    }
    assert!(sizes.iter().enumerate().all(|(i, &n)| n == HEADER + 60 + i % 7));
    d.add(0, &[], &[100]);
    d.kick(0);
    assert_eq!(d.used(0), []);
}

#[test]
fn event_indexes_spare_interrupts_and_doorbells() {
    let mut d = card();
    d.start(feature::EVENT_IDX);
    d.set_used_event(1, 1);
    d.add(1, &[&[0; HEADER + 60]], &[]);
    d.kick(1);
    assert_eq!(d.interrupts(), [], "the driver asked for the second");
    assert_eq!(d.avail_event(1), 1);
    d.add(1, &[&[0; HEADER + 60]], &[]);
    d.kick(1);
    assert_eq!(d.interrupts(), [d.vector(1)]);
    assert_eq!(d.outputs().len(), 2);
}

#[test]
fn the_driver_can_ask_for_silence() {
    let mut d = card();
    d.start(0);
    d.set_avail_flags(1, 1);
    d.add(1, &[&[0; HEADER + 60]], &[]);
    d.kick(1);
    assert_eq!((d.used(1).len(), d.interrupts().len()), (1, 0));
}

#[test]
fn bad_rings_stop_the_device_only() {
    // Nothing but empty buffers; a header that does not fit; readable after writable; a head outside; an index that runs away; a wild address.
    let cases: [fn(&mut Driver); 6] = [
        |d| {
            d.add(0, &[], &[0]);
        },
        |d| {
            d.add(0, &[], &[11]);
        },
        |d| {
            d.add_raw(0, &[(0x1000, 2000, true), (0x2000, 10, false)]);
        },
        |d| d.offer(0, 1000),
        |d| d.set_avail_index(0, 5000),
        |d| {
            d.add_raw(0, &[(u64::MAX - 3, 2000, true)]);
        },
    ];
    for case in cases {
        let mut d = card();
        d.start(F_MRG_RXBUF);
        case(&mut d);
        d.receive(Received::Frame(frame(60)));
        assert_eq!(d.status() & 64, 64, "needs reset");
        assert_eq!(d.interrupts(), [d.config_vector()]);
        d.receive(Received::Frame(frame(60)));
        d.kick(0);
        d.kick(1);
        d.check_save_restore(Box::new(Net::new(3, MAC)));
        // A reset makes it whole again.
        d.start(0);
        let buffer = d.add(0, &[], &[100]);
        d.receive(Received::Frame(frame(60)));
        assert_eq!(d.used(0), [(buffer.head, 72)]);
    }
}

#[test]
fn chains_that_bite_their_tail_end() {
    let mut d = card();
    d.start(0);
    // Two descriptors, each the other's next.
    d.add_raw(1, &[(0x1000, 0x1000_0000, false); 64]);
    let next: u16 = 0;
    let flags_next = [NEXT_FLAG.to_le_bytes(), next.to_le_bytes()].concat();
    use vm_memory::{Bytes, GuestAddress};
    d.ram.write_slice(&flags_next, GuestAddress(0x11_0000 + 63 * 16 + 12)).unwrap();
    d.kick(1);
    assert_eq!(d.outputs(), []);
}
const NEXT_FLAG: u16 = 1;
