//! Tests of the network card.
use super::*;
use crate::offload::tests::tcp_frame;
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

/// Frames that enter while the guest does not run: it is interrupted for the first, and for the next only after it has looked.
#[test]
fn a_burst_makes_one_interrupt() {
    let mut d = card();
    d.start(feature::EVENT_IDX | F_MRG_RXBUF);
    for _ in 0..20 {
        d.add(0, &[], &[1600]);
    }
    d.set_used_event(0, 0);
    (0..10).for_each(|_| d.receive(Received::Frame(frame(60))));
    assert_eq!((d.used(0).len(), d.interrupts()), (10, vec![d.vector(0)]));
    d.set_used_event(0, 10);
    (0..10).for_each(|_| d.receive(Received::Frame(frame(60))));
    assert_eq!((d.used(0).len(), d.interrupts()), (10, vec![d.vector(0)]));
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

// Offloads.

const ACK: u8 = 0x10;
const ALL: u64 = F_MRG_RXBUF | OFFLOADS;

fn header(flags: u8, gso: u8, segment_size: u16, start: u16, offset: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    (header[0], header[1]) = (flags, gso);
    for (at, value) in [(4, segment_size), (6, start), (8, offset)] {
        header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    header
}

/// A TCP frame with its checksums.
fn checked(ipv6: bool, payload: usize) -> Vec<u8> {
    let mut bytes = tcp_frame(ipv6, false, 0, ACK, &frame(payload));
    let large = LargeSegment::of(&bytes, 8, MAX_FRAME).unwrap();
    large.headers.seal(&mut bytes, 8).unwrap();
    large.complete(&mut bytes);
    bytes
}

fn sent(features: u64, header: [u8; HEADER], frame: &[u8]) -> Vec<Output> {
    let mut d = card();
    d.start(features);
    // In pieces that end in the middle of everything.
    let (a, b) = frame.split_at(frame.len() / 3);
    let chain = d.add(1, &[&header[..5], &[&header[5..], a].concat(), b], &[]);
    d.kick(1);
    assert_eq!(d.used(1), [(chain.head, 0)], "whatever it is, the driver gets it back");
    d.outputs()
}

#[test]
fn checksums_are_completed() {
    let whole = checked(false, 100);
    let mut partial = whole.clone();
    // The pseudo header's sum.
    let h = TcpFrame::parse(&whole).unwrap();
    let sum = offload::add(offload::sum(&whole[26..34]), offload::add(6, 120));
    partial[h.checksum()].copy_from_slice(&sum.to_be_bytes());
    let expected = [Output::NetTx { nic: 3, frame: whole.clone() }];
    assert_eq!(sent(F_CSUM, header(1, 0, 0, 34, 16), &partial), expected);
    assert_eq!(sent(F_CSUM, header(0, 0, 0, 34, 16), &whole), expected, "not asked for");
    assert_eq!(sent(0, header(1, 1, 9, 34, 16), &whole), expected, "not negotiated: the header means nothing");
    // Large only in name.
    assert_eq!(sent(ALL, header(1, GSO_TCPV4, 100, 34, 16), &partial), expected);
}

#[test]
fn large_segments_leave_whole() {
    for (ipv6, gso) in [(false, GSO_TCPV4), (true, GSO_TCPV6), (false, GSO_TCPV4 | GSO_ECN)] {
        let frame = tcp_frame(ipv6, false, 0, ACK, &frame(65_000));
        let start = if ipv6 { 54 } else { 34 };
        let outputs = sent(ALL, header(1, gso, 1440, start, 16), &frame);
        let [Output::NetTxGso { nic: 3, frame: left, segment_size: 1440 }] = &outputs[..] else { panic!("{outputs:?}") };
        let pieces = LargeSegment::of(left, 1440, MAX_FRAME).unwrap().frames(left);
        assert_eq!(pieces.len(), 65_000usize.div_ceil(1440));
        assert!(pieces.iter().all(|piece| TcpFrame::parse(piece).unwrap().checksums_hold(piece)));
    }
}

#[test]
fn what_cannot_be_cut_is_dropped() {
    let frame = tcp_frame(false, false, 0, ACK, &frame(5000));
    let drop = |features, header, frame: &[u8]| assert_eq!(sent(features, header, frame), []);
    drop(ALL, header(1, GSO_TCPV4, 0, 34, 16), &frame);
    drop(ALL, header(1, GSO_TCPV4, 7, 34, 16), &frame);
    drop(ALL, header(0, GSO_TCPV4, 1448, 34, 16), &frame);
    drop(ALL, header(1, GSO_TCPV4, 1448, 35, 16), &frame);
    drop(ALL, header(1, GSO_TCPV6, 1448, 34, 16), &frame);
    drop(ALL, header(1, 3, 1448, 34, 16), &frame);
    drop(ALL, header(1, 5, 1448, 34, 16), &frame);
    drop(ALL, header(1, 0xff, 0xffff, 0xffff, 0xffff), &frame);
    drop(ALL, header(1, GSO_TCPV4, 1448, 34, 16), &frame[..1000]);
    drop(ALL & !F_HOST_TSO4, header(1, GSO_TCPV4, 1448, 34, 16), &frame);
    drop(ALL & !F_HOST_TSO6, header(1, GSO_TCPV6, 1448, 54, 16), &tcp_frame(true, false, 0, ACK, &frame));
    // Pieces longer than the longest frame; the frame itself longer than that, and not to be cut; checksums outside.
    let long = tcp_frame(false, false, 0, ACK, &vec![1; 30_000]);
    drop(ALL, header(1, GSO_TCPV4, 9200, 34, 16), &long);
    drop(ALL, header(1, 0, 0, 34, 16), &long);
    drop(ALL, header(1, 0, 0, 5030, 23), &frame);
    drop(ALL, header(1, 0, 0, 0xffff, 0xffff), &frame);
    drop(ALL, header(1, GSO_TCPV4, 1448, 34, 16), &vec![0; MAX_LARGE_SEGMENT + 1]);
}

fn large(payload: usize) -> Received {
    let mut bytes = tcp_frame(false, false, 0, ACK, &frame(payload));
    TcpFrame::parse(&bytes).unwrap().seal(&mut bytes, 1000).unwrap();
    Received::LargeSegment { frame: bytes, segment_size: 1000 }
}

#[test]
fn large_segments_arrive_whole() {
    let mut d = card();
    d.start(ALL);
    let Received::LargeSegment { frame, .. } = large(2500) else { unreachable!() };
    let buffers = [d.add(0, &[], &[1000]), d.add(0, &[], &[500, 500]), d.add(0, &[], &[1000])];
    d.receive(large(2500));
    assert_eq!(d.used(0), [(buffers[0].head, 1000), (buffers[1].head, 1000), (buffers[2].head, 566)]);
    let mut expected = header(1, GSO_TCPV4, 1000, 34, 16);
    (expected[2], expected[10]) = (54, 3);
    assert_eq!(d.read(buffers[0].writable[0], 12), expected);
    let places = [(buffers[0].writable[0] + 12, 988), (buffers[1].writable[0], 500), (buffers[1].writable[1], 500)];
    let mut got: Vec<u8> = places.iter().flat_map(|&(at, len)| d.read(at, len)).collect();
    got.extend(d.read(buffers[2].writable[0], 566));
    assert_eq!(got, frame);
    assert_eq!(d.interrupts(), [d.vector(0)]);
}

#[test]
fn a_driver_without_offloads_gets_pieces() {
    for features in [F_MRG_RXBUF, ALL & !F_GUEST_TSO4, ALL & !F_GUEST_CSUM, ALL & !F_MRG_RXBUF] {
        let mut d = card();
        d.start(features);
        let buffers: Vec<_> = (0..4).map(|_| d.add(0, &[], &[1600])).collect();
        d.receive(large(2500));
        let lengths: Vec<_> = d.used(0).iter().map(|used| used.1).collect();
        assert_eq!(lengths, [1066, 1066, 566]);
        for (buffer, len) in buffers.iter().zip(lengths) {
            assert_eq!(d.read(buffer.writable[0], 10), [0; 10]);
            let piece = d.read(buffer.writable[0] + 12, len as usize - 12);
            assert!(TcpFrame::parse(&piece).unwrap().checksums_hold(&piece));
        }
    }
}

#[test]
fn a_large_segment_waits_for_a_doorbell_and_no_longer() {
    let mut d = card();
    d.start(ALL);
    d.add(0, &[], &[1600]);
    d.receive(large(2500));
    d.receive(Received::Frame(frame(60)));
    assert_eq!(d.used(0), [], "it does not fit yet");
    d.check_save_restore(Box::new(Net::new(3, MAC)));
    d.add(0, &[], &[1600]);
    d.add(0, &[], &[1600]);
    d.kick(0);
    assert_eq!(d.used(0).iter().map(|used| used.1).collect::<Vec<_>>(), [1600, 966, 72], "whole");
    // A driver that has no more than this.
    d.receive(large(2500));
    d.receive(Received::Frame(frame(61)));
    d.add(0, &[], &[1500]);
    d.kick(0);
    d.check_save(Box::new(Net::new(3, MAC)));
    let mut lengths = Vec::new();
    for _ in 0..6 {
        lengths.extend(d.used(0).iter().map(|used| used.1));
        d.add(0, &[], &[1500]);
        d.kick(0);
    }
    assert_eq!(lengths, [1066, 1066, 566, 73]);
}

#[test]
fn waiting_bytes_are_bounded() {
    let mut d = card();
    d.start(ALL);
    for _ in 0..200 {
        d.receive(large(60_000));
    }
    d.check_save(Box::new(Net::new(3, MAC)));
    assert!(d.pci.save().bytes.len() <= BACKLOG_BYTES + 10_000);
}

/// What a version 1 card saved, and that it stays one.
#[test]
fn a_card_of_old_stays_as_it_was() {
    let mut old = Net::new(3, MAC);
    old.become_version(1);
    assert_eq!(old.features() & OFFLOADS, 0);
    old.enqueue(vec![7; 20], 0);
    let bytes = [&[0x81, 0x81, 0x54][..], &[7; 20]].concat();
    assert_eq!((old.version(), old.save()), (1, bytes), "CBOR: a list of one, the backlog; one frame of 20 bytes");

    let mut d = Driver::new(Box::new(old));
    assert_eq!(d.offered() & OFFLOADS, 0);
    d.start(F_MRG_RXBUF);
    d.receive(Received::Frame(frame(60)));
    d.check_save_restore(Box::new(Net::new(3, MAC)));
    assert_eq!((d.offered() & OFFLOADS, d.pci.save().version), (0, 1));
    d.add(0, &[], &[1600]);
    d.kick(0);
    d.receive(large(2500));
    d.start(F_MRG_RXBUF);
    assert_eq!(d.offered() & OFFLOADS, 0, "a reset does not make it younger");
    d.check_save_restore(Box::new(Net::new(3, MAC)));
}

#[test]
fn impossible_states_are_refused() {
    let refused = |version: u16, image: &Image, accepted: u64| {
        let mut net = Net::new(3, MAC);
        net.become_version(version);
        net.negotiated(accepted);
        let payload = Payload::encode("virtio-net0", version, image);
        net.restore(&payload, &payload.bytes).is_err()
    };
    let Received::LargeSegment { frame: whole, .. } = large(2500) else { unreachable!() };
    let image = |frame: &[u8], sizes: Option<Vec<u16>>| Image { backlog: vec![frame.to_vec().into()], segment_sizes: sizes };
    assert!(!refused(1, &image(&whole, None), 0));
    assert!(!refused(2, &image(&whole, Some(vec![0])), 0));
    assert!(!refused(2, &image(&whole, Some(vec![1000])), ALL));
    assert!(refused(1, &image(&whole, Some(vec![0])), 0));
    assert!(refused(2, &image(&whole, None), 0));
    assert!(refused(2, &image(&whole, Some(vec![])), ALL));
    assert!(refused(2, &image(&whole, Some(vec![1000, 0])), ALL));
    assert!(refused(2, &image(&whole, Some(vec![7])), ALL));
    assert!(refused(2, &image(&whole, Some(vec![1000])), ALL & !F_GUEST_TSO4), "the driver does not take it");
    assert!(refused(2, &image(&[0; 13], Some(vec![0])), ALL));
    assert!(refused(2, &image(&vec![0; MAX_FRAME + 1], Some(vec![0])), ALL));
}
