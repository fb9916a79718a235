//! Tests of the offloads, against the plainest checksum there is.
use super::*;
use proptest::prelude::*;

/// RFC 1071 as it is written, word by word.
fn plain_sum(parts: &[&[u8]]) -> u16 {
    let mut bytes = parts.concat();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let total: u64 = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair[1])).sum();
    let mut folded = total;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    folded as u16
}

/// What an IP stack checks: `None` if the checksums are right.
fn fault(frame: &[u8], vlan: bool) -> Option<&'static str> {
    let ip = if vlan { 18 } else { 14 };
    let packet = &frame[ip..];
    if packet[0] >> 4 == 4 {
        let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let header = usize::from(packet[0] & 15) * 4;
        if plain_sum(&[&packet[..header]]) != 0xffff {
            return Some("IP checksum");
        }
        let tcp = &packet[header..length];
        let pseudo = [0, 6, (tcp.len() >> 8) as u8, tcp.len() as u8];
        (plain_sum(&[&packet[12..20], &pseudo, tcp]) != 0xffff).then_some("TCP checksum")
    } else {
        let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
        let tcp = &packet[40..40 + length];
        let pseudo = [0, 0, (tcp.len() >> 8) as u8, tcp.len() as u8, 0, 0, 0, 6];
        (plain_sum(&[&packet[8..40], &pseudo, tcp]) != 0xffff).then_some("TCP checksum")
    }
}

/// A TCP frame with everything in place but its checksums.
pub(crate) fn tcp_frame(ipv6: bool, vlan: bool, options: usize, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if vlan {
        frame.extend([0x81, 0, 0, 5]);
    }
    let tcp_len = 20 + options * 4 + payload.len();
    if ipv6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, (tcp_len >> 8) as u8, tcp_len as u8, 6, 64]);
        frame.extend((0..32).map(|i| i * 7 + 1));
    } else {
        let length = tcp_len + 20;
        frame.extend([8, 0, 0x45, 0, (length >> 8) as u8, length as u8, 0xff, 0xfe, 0x40, 0, 64, 6, 0, 0]);
        frame.extend([10, 0, 2, 15, 192, 168, 200, 3]);
    }
    frame.extend([0x13, 0x88, 0xc0, 0x01]);
    frame.extend(0xffff_ff00u32.to_be_bytes());
    frame.extend(77u32.to_be_bytes());
    frame.extend([((5 + options) << 4) as u8, flags, 2, 0, 0, 0, 0, 0]);
    frame.extend((0..options * 4).map(|_| 1));
    frame.extend(payload);
    frame
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed).collect()
}

proptest! {
    #[test]
    fn the_fast_sum_is_the_plain_one(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
        prop_assert_eq!(sum(&bytes), plain_sum(&[&bytes]));
        let cut = cut.min(bytes.len()) & !1;
        prop_assert_eq!(add(sum(&bytes[..cut]), sum(&bytes[cut..])), plain_sum(&[&bytes]));
    }

    #[test]
    fn pieces_are_whole_segments_of_the_same_stream(
        ipv6: bool, vlan: bool, options in 0usize..=10, flags: u8, len in 1usize..20_000, size in 8u16..9000, seed: u8,
    ) {
        let payload = bytes(len, seed);
        let frame = tcp_frame(ipv6, vlan, options, flags, &payload);
        let Some(large) = LargeSegment::of(&frame, size, 9216) else {
            let headers = frame.len() - len;
            prop_assert!(len <= usize::from(size) || headers + usize::from(size) > 9216);
            return Ok(());
        };
        let pieces = large.frames(&frame);
        prop_assert_eq!(pieces.len(), len.div_ceil(usize::from(size)));
        let mut stream: Vec<u8> = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            prop_assert_eq!(fault(piece, vlan), None);
            let h = TcpFrame::parse(piece).unwrap();
            prop_assert!(h.checksums_hold(piece));
            prop_assert_eq!(h.end, piece.len());
            prop_assert_eq!(h.sequence(piece), 0xffff_ff00u32.wrapping_add(stream.len() as u32));
            let (first, last) = (i == 0, i + 1 == pieces.len());
            let mut expected = flags;
            if !first { expected &= !tcp_flag::CWR }
            if !last { expected &= !(tcp_flag::FIN | tcp_flag::PSH) }
            prop_assert_eq!(h.flags(piece), expected);
            if !ipv6 {
                prop_assert_eq!(word(piece, h.ip + 4).unwrap(), 0xfffeu16.wrapping_add(i as u16));
            }
            stream.extend(&piece[h.payload..h.end]);
        }
        prop_assert_eq!(&stream, &payload);

        // Sent whole, its checksum is right as well; sealed, it is the partial one.
        let mut whole = frame.clone();
        let sealed = TcpFrame::parse(&whole).unwrap().seal(&mut whole, size).unwrap();
        prop_assert_eq!(sealed, large);
        let partial = word(&whole, large.headers.checksum().start).unwrap();
        large.complete(&mut whole);
        prop_assert_eq!(fault(&whole, vlan), None);
        prop_assert_eq!(sum(&whole[large.headers.tcp..]) , !partial);
        prop_assert!(large.headers.checksums_hold(&whole));
        let at = large.headers.payload + len / 2;
        whole[at] ^= 1;
        prop_assert!(!large.headers.checksums_hold(&whole), "a flipped bit is seen");
    }

    #[test]
    fn damaged_frames_hurt_nobody(
        ipv6: bool, vlan: bool, options in 0usize..=10, len in 0usize..3000, size: u16, cut in 0usize..3100,
        damage in prop::collection::vec((0usize..100, any::<u8>()), 0..6),
    ) {
        let mut frame = tcp_frame(ipv6, vlan, options, 0x10, &bytes(len, 0));
        for (at, value) in damage {
            let at = at % frame.len();
            frame[at] = value;
        }
        frame.truncate(cut.max(1));
        if let Some(headers) = TcpFrame::parse(&frame) {
            let _ = headers.checksums_hold(&frame);
            prop_assert!(headers.end <= frame.len() && headers.payload <= headers.end);
            let mut sealed = frame.clone();
            let _ = headers.seal(&mut sealed, size);
        }
        if let Some(large) = LargeSegment::of(&frame, size, 9216) {
            prop_assert!(large.frames(&frame).iter().all(|piece| piece.len() <= 9216));
            large.complete(&mut frame);
        }
    }

    #[test]
    fn noise_hurts_nobody(bytes in prop::collection::vec(any::<u8>(), 0..200), size: u16, start in 0usize..300, offset in 0usize..300) {
        let mut frame = bytes.clone();
        let done = complete_at(&mut frame, start, offset);
        prop_assert_eq!(done, start + offset + 2 <= bytes.len());
        if !done {
            prop_assert_eq!(&frame, &bytes);
        }
        let _ = (TcpFrame::parse(&bytes), LargeSegment::of(&bytes, size, 9216));
    }
}

#[test]
fn a_checksum_is_completed_where_the_driver_says() {
    // The pseudo header's sum of a UDP datagram whose sum is all ones, which would be zero: "no checksum".
    let mut frame = vec![0xaa; 20];
    frame.extend([0, 0, 0xff, 0xff]);
    assert!(complete_at(&mut frame, 20, 2));
    assert_eq!(frame[20..], [0, 0, 0xff, 0xff]);
    let mut frame = vec![1, 2, 3, 4, 5, 6, 7];
    assert!(complete_at(&mut frame, 1, 2));
    assert_eq!(word(&frame, 3), Some(!plain_sum(&[&[2, 3, 4, 5, 6, 7]])));
    // From an odd place on, and at the very end.
    let mut frame = vec![0; 6];
    assert!(complete_at(&mut frame, 3, 1));
    assert!(!complete_at(&mut frame, 3, 2));
    assert!(!complete_at(&mut frame, 60, 0));
}

#[test]
fn what_is_no_large_segment() {
    let payload = bytes(5000, 3);
    let frame = tcp_frame(false, false, 3, 0x10, &payload);
    let of = |frame: &[u8], size| LargeSegment::of(frame, size, 9216).is_some();
    assert!(of(&frame, 1448) && of(&frame, 8) && of(&frame, 4999));
    assert!(!of(&frame, 0) && !of(&frame, 7), "pieces too small");
    assert!(!of(&frame, 5000), "nothing to cut");
    assert!(LargeSegment::of(&frame, 1448, 1513).is_none() && LargeSegment::of(&frame, 1448, 1514).is_some(), "pieces too long");
    let with = |change: fn(&mut Vec<u8>)| {
        let mut frame = frame.clone();
        change(&mut frame);
        frame
    };
    assert!(!of(&with(|f| f.push(0)), 1448), "padded");
    assert!(!of(&with(|f| _ = f.pop()), 1448), "cut short");
    assert!(!of(&with(|f| f[20] = 0x20), 1448), "a fragment");
    assert!(!of(&with(|f| f[21] = 1), 1448), "a later fragment");
    assert!(!of(&with(|f| f[23] = 17), 1448), "UDP");
    assert!(!of(&with(|f| f[14] = 0x44), 1448), "an IP header that is too short");
    assert!(!of(&with(|f| f[46] = 0x40), 1448), "a TCP header that is too short");
    assert!(!of(&with(|f| f[14] = 0x65), 1448), "a version that is not its type's");
    assert!(!of(&[], 1448) && !of(&frame[..14], 1448) && !of(&frame[..40], 1448));
    let long = tcp_frame(false, false, 0, 0x10, &bytes(65_496, 0));
    assert_eq!(long.len(), MAX_LARGE_SEGMENT);
    assert!(!of(&long, 1448), "its length does not fit an IPv4 header");
    assert!(of(&tcp_frame(false, false, 0, 0x10, &bytes(65_495, 0)), 1448), "the longest");
}

#[test]
fn ipv6_extension_headers_are_passed() {
    let plain = tcp_frame(true, false, 0, 0x10, &bytes(4000, 9));
    let with = |first: u8, extension: &[u8]| {
        let mut frame = plain.clone();
        frame.splice(54..54, extension.iter().copied());
        frame[20] = first;
        set_word(&mut frame, 18, (plain.len() - 54 + extension.len()) as u16);
        frame
    };
    // Hop-by-hop options, then destination options of 16 bytes.
    let frame = with(0, &[60, 0, 1, 4, 0, 0, 0, 0, 6, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let large = LargeSegment::of(&frame, 1000, 9216).unwrap();
    assert_eq!((large.headers.tcp, large.pieces()), (54 + 24, 4));
    assert!(large.frames(&frame).iter().all(|piece| TcpFrame::parse(piece).unwrap().checksums_hold(piece)));
    // Routing and fragment headers, one without an end, one that leads out.
    assert!(LargeSegment::of(&with(43, &[6, 0, 0, 0, 0, 0, 0, 0]), 1000, 9216).is_none());
    assert!(LargeSegment::of(&with(44, &[6, 0, 0, 0, 0, 0, 0, 0]), 1000, 9216).is_none());
    assert!(LargeSegment::of(&with(0, &[0, 0, 0, 0, 0, 0, 0, 0].repeat(9)), 1000, 9216).is_none());
    assert!(LargeSegment::of(&with(60, &[60, 255, 0, 0, 0, 0, 0, 0]), 1000, 9216).is_none());
}
