//! Just enough TCP to know which frames a guest has certainly got.
//!
//! *In*: Ethernet frames. *Out*: for a TCP segment, its connection, the end of its data, and what it acknowledges. *Invariant*: whatever is not
//! plainly one whole TCP segment (fragments, tunnels, VLANs, damage) is `None`, and then nothing is concluded from it.

use crate::net::frames::ETHERNET_HEADER;

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TCP: u8 = 6;
const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// One end of a connection. An IPv4 address stands in the last four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    address: [u8; 16],
    port: [u8; 2],
}

/// A connection, seen in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    from: End,
    to: End,
}

impl Flow {
    /// The other direction.
    pub fn reversed(self) -> Self {
        Self { from: self.to, to: self.from }
    }
}

/// A TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its connection and direction.
    pub flow: Flow,
    /// The sequence number after its last byte.
    pub end: u32,
    /// Whether it carries nothing: no data, no SYN, no FIN.
    pub empty: bool,
    /// What it acknowledges: all sequence numbers before this one.
    pub acknowledges: Option<u32>,
}

impl Segment {
    /// Reads a frame.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let packet = frame.get(ETHERNET_HEADER..)?;
        let kind: [u8; 2] = frame.get(12..14)?.try_into().ok()?;
        let (from, to, tcp) = match kind {
            IPV4 => ipv4(packet)?,
            IPV6 => ipv6(packet)?,
            _ => return None,
        };
        let number = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
        let header = usize::from(*tcp.get(12)? >> 4) * 4;
        if header < 20 {
            return None;
        }
        let data = u32::try_from(tcp.len().checked_sub(header)?).ok()?;
        let flags = *tcp.get(13)?;
        // SYN and FIN take a sequence number each, like a byte.
        let length = data + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let end = |address, port: &[u8]| Some(End { address, port: port.try_into().ok()? });
        Some(Self {
            flow: Flow { from: end(from, tcp.get(..2)?)?, to: end(to, tcp.get(2..4)?)? },
            end: number(4)?.wrapping_add(length),
            empty: length == 0,
            acknowledges: if flags & ACK != 0 { Some(number(8)?) } else { None },
        })
    }

    /// Whether this segment says that its sender has got `other` to its end.
    pub fn confirms(&self, other: &Self) -> bool {
        // Sequence numbers go round: "not before" within half of the circle (RFC 9293, section 3.4).
        self.flow == other.flow.reversed() && self.acknowledges.is_some_and(|ack| ack.wrapping_sub(other.end) < 1 << 31)
    }
}

type Parts<'a> = ([u8; 16], [u8; 16], &'a [u8]);

fn ipv4(packet: &[u8]) -> Option<Parts<'_>> {
    let header = usize::from(*packet.first()? & 15) * 4;
    let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
    // More fragments, or not the first one.
    let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x3fff != 0;
    if packet[0] >> 4 != 4 || header < 20 || fragment || *packet.get(9)? != TCP {
        return None;
    }
    let address = |at: usize| {
        let mut address = [0; 16];
        address[12..].copy_from_slice(packet.get(at..at + 4)?);
        Some(address)
    };
    Some((address(12)?, address(16)?, packet.get(header..total)?))
}

fn ipv6(packet: &[u8]) -> Option<Parts<'_>> {
    let length = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
    // Extension headers are rare in front of TCP; such a packet is left alone.
    if packet[0] >> 4 != 6 || *packet.get(6)? != TCP {
        return None;
    }
    let address = |at: usize| packet.get(at..at + 16)?.try_into().ok();
    Some((address(8)?, address(24)?, packet.get(40..40 + length)?))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A TCP segment over IPv4 between two hosts named by their last byte and MAC address.
    pub fn segment(from: ([u8; 6], u8), to: ([u8; 6], u8), seq: u32, ack: u32, data: &[u8]) -> Vec<u8> {
        let mut frame = [&to.0[..], &from.0, &IPV4].concat();
        let total = (40 + data.len()) as u16;
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, from.1, 10, 0, 0, to.1]);
        frame.extend([0x10, from.1, 0x10, to.1]);
        frame.extend(seq.to_be_bytes());
        frame.extend(ack.to_be_bytes());
        frame.extend([0x50, ACK, 1, 0, 0, 0, 0, 0]);
        frame.extend(data);
        frame
    }

    const A: ([u8; 6], u8) = ([2, 0, 0, 0, 0, 1], 1);
    const B: ([u8; 6], u8) = ([2, 0, 0, 0, 0, 2], 2);

    #[test]
    fn what_confirms_what() {
        let read = |frame: Vec<u8>| Segment::of(&frame).unwrap();
        let data = read(segment(A, B, 100, 7, b"0123456789"));
        assert!((data.end, data.empty) == (110, false));
        assert!(read(segment(B, A, 7, 110, b"")).confirms(&data));
        assert!(read(segment(B, A, 7, 500, b"x")).confirms(&data));
        assert!(!read(segment(B, A, 7, 109, b"")).confirms(&data));
        assert!(!read(segment(A, B, 7, 110, b"")).confirms(&data));
        // Round the corner.
        let late = read(segment(A, B, u32::MAX - 2, 0, b"012345"));
        assert!(read(segment(B, A, 0, 3, b"")).confirms(&late) && !read(segment(B, A, 0, u32::MAX, b"")).confirms(&late));
    }

    #[test]
    fn what_is_no_whole_segment_is_none() {
        let good = segment(A, B, 1, 1, b"data");
        let mut padded = good.clone();
        padded.extend([0; 9]);
        assert_eq!(Segment::of(&padded), Segment::of(&good));
        assert!(Segment::of(&good[..good.len() - 1]).is_none());
        for (at, value) in [(12, 0x81), (14, 0x46 ^ 0xff), (20, 0x20), (21, 1), (23, 17), (46, 0x10)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Segment::of(&bad).is_none(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100), kind in prop_oneof![Just(IPV4), Just(IPV6)]) {
            let mut bytes = bytes;
            if bytes.len() >= 14 {
                bytes[12..14].copy_from_slice(&kind);
            }
            let _ = Segment::of(&bytes);
        }
    }
}
