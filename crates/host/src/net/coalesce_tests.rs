//! Coalescing, against cutting: whatever is joined comes apart again as it was.

use super::*;
use proptest::prelude::*;
use std::sync::mpsc::{Receiver, channel};
use twinstep_machine::offload::{self, LargeSegment};

/// An IPv4 or IPv6 TCP segment with right checksums.
fn segment(ipv6: bool, port: u8, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let length = 20 + payload.len() as u16;
    let [high, low] = length.to_be_bytes();
    if ipv6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, high, low, 6, 64]);
        frame.extend(0..32);
    } else {
        let [high, low] = (length + 20).to_be_bytes();
        frame.extend([8, 0, 0x45, 0, high, low, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 2, 10, 0, 2, 15]);
        let checksum = !offload::sum(&frame[14..34]);
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    }
    let tcp = frame.len();
    frame.extend([0, port, 0x13, 0x88]);
    frame.extend(sequence.to_be_bytes());
    frame.extend([0, 0, 0, 9, 0x50, flags, 1, 0, 0, 0, 0, 0]);
    frame.extend(payload);
    let addresses = if ipv6 { &frame[22..54] } else { &frame[26..34] };
    let pseudo = offload::add(offload::sum(addresses), offload::add(6, length));
    let checksum = !offload::add(pseudo, offload::sum(&frame[tcp..]));
    frame[tcp + 16..tcp + 18].copy_from_slice(&checksum.to_be_bytes());
    frame
}

fn receiver() -> (Receive, Receiver<Arrival>) {
    let (say, hear) = channel();
    (
        Box::new(move |arrival| {
            say.send(arrival).unwrap();
            ControlFlow::Continue(())
        }),
        hear,
    )
}

/// What becomes of a burst.
fn burst(frames: &[Vec<u8>]) -> Vec<Arrival> {
    let (mut receive, heard) = receiver();
    let mut coalescer = Coalescer::default();
    for frame in frames {
        assert!(coalescer.push(frame, &mut receive).is_continue());
    }
    assert!(coalescer.flush(&mut receive).is_continue());
    assert!(coalescer.open.is_none());
    heard.try_iter().collect()
}

/// Arrivals as ordinary frames.
fn apart(arrivals: &[Arrival]) -> Vec<Vec<u8>> {
    let cut = |arrival: &Arrival| match arrival.segment_size {
        0 => vec![arrival.frame.clone()],
        size => LargeSegment::of(&arrival.frame, size, MAX_FRAME).expect("a large segment").frames(&arrival.frame),
    };
    arrivals.iter().flat_map(cut).collect()
}

/// A frame without what cutting numbers anew: IPv4's identification and the checksum over it.
fn plain(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame[12..14] == [8, 0] {
        frame[18..20].fill(0);
        frame[24..26].fill(0);
    }
    frame
}

/// Segments of a stream, in order.
fn stream(ipv6: bool, start: u32, sizes: &[usize]) -> Vec<Vec<u8>> {
    let mut sequence = start;
    let mut frames = Vec::new();
    for &size in sizes {
        let payload: Vec<u8> = (0..size).map(|i| (i as u32).wrapping_add(sequence) as u8).collect();
        frames.push(segment(ipv6, 1, sequence, tcp_flag::ACK, &payload));
        sequence = sequence.wrapping_add(size as u32);
    }
    frames
}

#[test]
fn a_burst_becomes_one() {
    for ipv6 in [false, true] {
        let frames = stream(ipv6, u32::MAX - 2000, &[1448, 1448, 1448, 700]);
        let arrivals = burst(&frames);
        assert_eq!((arrivals.len(), arrivals[0].segment_size), (1, 1448));
        assert_eq!(
            apart(&arrivals).iter().map(|f| plain(f)).collect::<Vec<_>>(),
            frames.iter().map(|f| plain(f)).collect::<Vec<_>>()
        );
        assert!(apart(&arrivals).iter().all(|f| TcpFrame::parse(f).unwrap().checksums_hold(f)));
    }
}

#[test]
fn the_longest_is_as_long_as_ip_allows() {
    for ipv6 in [false, true] {
        let arrivals = burst(&stream(ipv6, 0, &[1000; 150]));
        assert_eq!(arrivals.len(), 3);
        assert_eq!(apart(&arrivals).len(), 150);
    }
}

#[test]
fn what_is_not_joined() {
    let [a, b] = &stream(false, 100, &[1000, 1000])[..] else { unreachable!() };
    let as_they_came = |frames: &[&Vec<u8>]| {
        let frames: Vec<Vec<u8>> = frames.iter().map(|f| f.to_vec()).collect();
        let arrivals = burst(&frames);
        assert!(arrivals.iter().all(|arrival| arrival.segment_size == 0));
        assert_eq!(arrivals.into_iter().map(|arrival| arrival.frame).collect::<Vec<_>>(), frames);
    };
    assert_eq!(burst(&[a.clone(), b.clone()]).len(), 1);
    as_they_came(&[b, a]);
    as_they_came(&[a, a]);
    as_they_came(&[a, &segment(false, 2, 1100, tcp_flag::ACK, &[0; 1000])]);
    as_they_came(&[a, &segment(false, 1, 1100, tcp_flag::ACK, &[0; 1001])]);
    as_they_came(&[a, &segment(false, 1, 1100, tcp_flag::ACK, &[])]);
    for flags in [tcp_flag::FIN | tcp_flag::ACK, 0x12, 0x14, 0x30, 0x50, tcp_flag::CWR | tcp_flag::ACK, 0] {
        as_they_came(&[a, &segment(false, 1, 1100, flags, &[0; 1000])]);
        as_they_came(&[&segment(false, 1, 100, flags, &[0; 1000]), b]);
    }
    // Another window, another time to live, another acknowledgement: each with right checksums.
    for (at, ip) in [(48, false), (22, true), (45, false)] {
        let mut other = b.clone();
        other[at] ^= 1;
        let (checksum, sum) = if ip { (24, &mut other[..]) } else { (50, &mut other[..]) };
        let old = u16::from_be_bytes([sum[checksum], sum[checksum + 1]]);
        let (before, after) = (word_of(b, at), word_of(sum, at));
        let new = !offload::add(offload::add(!old, !before), after);
        sum[checksum..checksum + 2].copy_from_slice(&new.to_be_bytes());
        assert!(TcpFrame::parse(&other).unwrap().checksums_hold(&other), "{at}");
        as_they_came(&[a, &other]);
    }
    // Damaged on the way: the guest shall see it, and say so by not acknowledging.
    for place in [60, 500, 1053] {
        let mut damaged = b.clone();
        damaged[place] ^= 0x10;
        as_they_came(&[a, &damaged]);
        let mut damaged = a.clone();
        damaged[place] ^= 0x10;
        as_they_came(&[&damaged, b]);
    }
    as_they_came(&[&vec![0; 60], &vec![1; 1]]);
    // Pieces too small to be cut again.
    as_they_came(&stream(false, 0, &[7, 7, 7]).iter().collect::<Vec<_>>());
}

fn word_of(frame: &[u8], at: usize) -> u16 {
    let at = at & !1;
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

#[test]
fn a_push_or_a_short_one_ends_it() {
    let mut frames = stream(false, 0, &[1000, 1000, 500, 1000, 1000]);
    assert_eq!(burst(&frames).iter().map(|a| a.segment_size).collect::<Vec<_>>(), [1000, 1000]);
    frames[1] = segment(false, 1, 1000, tcp_flag::ACK | tcp_flag::PSH, &[5; 1000]);
    let arrivals = burst(&frames);
    assert_eq!(arrivals.iter().map(|a| a.segment_size).collect::<Vec<_>>(), [1000, 0, 1000]);
    let pieces = apart(&arrivals[..1]);
    let flags: Vec<u8> = pieces.iter().map(|f| TcpFrame::parse(f).unwrap().flags(f)).collect();
    assert_eq!(flags, [tcp_flag::ACK, tcp_flag::ACK | tcp_flag::PSH]);
}

proptest! {
    #[test]
    fn joined_and_cut_is_as_before(
        steps in prop::collection::vec((any::<bool>(), 0u8..3, 0usize..4, 0u8..20, any::<bool>()), 1..60),
    ) {
        let mut sequences = [[0u32; 3]; 2];
        let frames: Vec<Vec<u8>> = steps.into_iter().map(|(ipv6, port, size, flags, gap)| {
            let size = [0, 9, 500, 1448][size];
            let sequence = &mut sequences[usize::from(ipv6)][usize::from(port)];
            *sequence = sequence.wrapping_add(u32::from(gap && flags == 3));
            // Mostly plain data, sometimes with other flags.
            let flags = if flags < 18 { tcp_flag::ACK } else { tcp_flag::ACK | flags };
            let frame = segment(ipv6, port, *sequence, flags, &vec![port + 1; size]);
            *sequence = sequence.wrapping_add(size as u32);
            frame
        }).collect();
        let arrivals = burst(&frames);
        let back: Vec<_> = apart(&arrivals).iter().map(|f| plain(f)).collect();
        prop_assert_eq!(back, frames.iter().map(|f| plain(f)).collect::<Vec<_>>());
    }

    #[test]
    fn noise_passes(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..10)) {
        let arrivals = burst(&frames);
        prop_assert_eq!(arrivals.into_iter().map(|a| a.frame).collect::<Vec<_>>(), frames);
    }
}
