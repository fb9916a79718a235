//! TCP offloads without hardware: Internet checksums, and the cutting of large TCP segments.
//!
//! **In:** Ethernet frames of anybody. **Out:** what a network card with offloads would make of them. **Invariant:** everything depends on the bytes given and on
//! nothing else; nothing is read beyond a frame, whatever it says of its own lengths.
//!
//! A *large segment* is a frame with more TCP payload than its network carries, and the payload's size after cutting ("generic segmentation offload", GSO). Its
//! TCP checksum is *partial*: the field holds the sum of the pseudo header, and whoever cuts it or sends it whole completes it. So payload is
//! summed once, where it leaves for the world, and never by a machine that only replays.
//! References: RFC 1071 (checksums), RFC 9293 (TCP), RFC 8200 section 4 (extension headers), VIRTIO 1.2 section 5.1.6.
use std::ops::Range;

/// The longest large segment: an Ethernet header and the longest IPv4 packet, one byte of room (VIRTIO 1.2, section 5.1.6.3.1).
pub const MAX_LARGE_SEGMENT: usize = 65_550;
/// The smallest size of the pieces: what is left of TCP's smallest segment (48) behind the most options (40). A smaller one would only
/// multiply frames.
pub const MIN_SEGMENT_SIZE: u16 = 8;

const ETHERNET: usize = 14;
const TYPE_AT: usize = 12;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
const TYPE_VLAN: u16 = 0x8100;
const VLAN_TAG: usize = 4;
const PROTOCOL_TCP: u8 = 6;
const IPV4_LEAST: usize = 20;
const IPV6_HEADER: usize = 40;
/// IPv6 extension headers that may stand before TCP: hop-by-hop options, destination options. (A routing header would make another address part
/// of the pseudo header than the one in the IP header.)
const EXTENSIONS: [u8; 2] = [0, 60];
/// More of them in one packet than any sender has use for.
const MOST_EXTENSIONS: usize = 8;
const TCP_LEAST: usize = 20;
/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM: usize = 16;
const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;

/// Flags of a TCP header.
pub mod tcp_flag {
    /// No more data follows.
    pub const FIN: u8 = 0x01;
    /// Hand over at once.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement counts.
    pub const ACK: u8 = 0x10;
    /// Congestion window reduced (RFC 3168).
    pub const CWR: u8 = 0x80;
}

/// The ones' complement sum of `bytes` as 16-bit big-endian words; an odd byte at the end counts as if a zero followed.
#[must_use]
pub fn sum(bytes: &[u8]) -> u16 {
    // The sum of wider words, in either byte order, folds to the same (RFC 1071, section 2). This form is one that compilers vectorise.
    let (words, rest) = bytes.as_chunks::<4>();
    let mut total: u64 = words.iter().map(|word| u64::from(u32::from_le_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_le_bytes(last));
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    (total as u16).swap_bytes()
}

/// The ones' complement sum of two sums.
#[must_use]
pub fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    // Two sums of 16 bits and a carry never carry again.
    sum + u16::from(carry)
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

fn set_word(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Completes a checksum as VIRTIO_NET_HDR_F_NEEDS_CSUM asks: the sum from `start` to the frame's end goes to `offset` bytes behind `start`, where the
/// pseudo header's sum was. False, and nothing changed, if that lies outside the frame.
#[must_use]
pub fn complete_at(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let at = start + offset;
    if at + 2 > frame.len() {
        return false;
    }
    let checksum = !sum(&frame[start..]);
    // To UDP, zero means that there is none; to the others both mean the same.
    set_word(frame, at, if checksum == 0 { 0xffff } else { checksum });
    true
}

/// Where the parts of a TCP segment are in its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpFrame {
    /// Whether it is IPv6, and not IPv4.
    pub ipv6: bool,
    /// Where the IP header begins.
    pub ip: usize,
    /// Where the TCP header begins.
    pub tcp: usize,
    /// Where the payload begins.
    pub payload: usize,
    /// Where the IP packet ends; what follows is Ethernet's padding.
    pub end: usize,
}

impl TcpFrame {
    /// Finds them. Whatever is not plainly one whole TCP segment (fragments, tunnels, damage) is `None`.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let mut ip = ETHERNET;
        let mut ethertype = word(frame, TYPE_AT)?;
        if ethertype == TYPE_VLAN {
            ip += VLAN_TAG;
            ethertype = word(frame, TYPE_AT + VLAN_TAG)?;
        }
        let packet = frame.get(ip..)?;
        let (header, length) = match (ethertype, packet.first()? >> 4) {
            (TYPE_IPV4, 4) => ipv4(packet)?,
            (TYPE_IPV6, 6) => ipv6(packet)?,
            _ => return None,
        };
        let (tcp, end) = (ip + header, ip + length);
        if end > frame.len() || tcp + TCP_LEAST > end {
            return None;
        }
        let payload = tcp + usize::from(frame[tcp + 12] >> 4) * 4;
        let whole = payload >= tcp + TCP_LEAST && payload <= end;
        whole.then_some(Self { ipv6: ethertype == TYPE_IPV6, ip, tcp, payload, end })
    }

    /// The sum of the pseudo header for a segment of `length` bytes, TCP header included.
    fn pseudo(&self, frame: &[u8], length: usize) -> u16 {
        let addresses = if self.ipv6 { &frame[self.ip + 8..self.ip + 40] } else { &frame[self.ip + 12..self.ip + 20] };
        add(sum(addresses), add(u16::from(PROTOCOL_TCP), sum(&(length as u32).to_be_bytes())))
    }

    /// Whether its checksums are right: TCP's, and that of an IPv4 header.
    #[must_use]
    pub fn checksums_hold(&self, frame: &[u8]) -> bool {
        let header = self.ipv6 || sum(&frame[self.ip..self.tcp]) == 0xffff;
        header && add(self.pseudo(frame, self.end - self.tcp), sum(&frame[self.tcp..self.end])) == 0xffff
    }

    /// The sequence number.
    #[must_use]
    pub fn sequence(&self, frame: &[u8]) -> u32 {
        let at = self.tcp + TCP_SEQUENCE;
        u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
    }

    /// The flags.
    #[must_use]
    pub fn flags(&self, frame: &[u8]) -> u8 {
        frame[self.tcp + TCP_FLAGS]
    }

    /// Bytes of payload.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        self.end - self.payload
    }

    /// The bytes of the TCP checksum.
    #[must_use]
    pub fn checksum(&self) -> Range<usize> {
        self.tcp + TCP_CHECKSUM..self.tcp + TCP_CHECKSUM + 2
    }

    /// Writes the length of a packet with `payload` bytes of payload into the IP header, with an IPv4 header's checksum.
    fn set_length(&self, frame: &mut [u8], payload: usize) {
        let length = self.payload - self.ip + payload;
        if self.ipv6 {
            set_word(frame, self.ip + 4, (length - IPV6_HEADER) as u16);
        } else {
            set_word(frame, self.ip + 2, length as u16);
            set_word(frame, self.ip + 10, 0);
            let checksum = !sum(&frame[self.ip..self.tcp]);
            set_word(frame, self.ip + 10, checksum);
        }
    }

    /// Makes `frame`, whose headers these are and whose payload may have grown behind them, a large segment: lengths right, checksum partial.
    /// `None` if it cannot be one with pieces of this size.
    #[must_use]
    pub fn seal(&self, frame: &mut [u8], segment_size: u16) -> Option<LargeSegment> {
        let sealed = Self { end: frame.len(), ..*self };
        let length = frame.len() - self.ip;
        let fits = frame.len() <= MAX_LARGE_SEGMENT && length - if self.ipv6 { IPV6_HEADER } else { 0 } <= usize::from(u16::MAX);
        if !fits || segment_size < MIN_SEGMENT_SIZE || sealed.payload_len() <= usize::from(segment_size) {
            return None;
        }
        sealed.set_length(frame, sealed.payload_len());
        let pseudo = sealed.pseudo(frame, sealed.end - sealed.tcp);
        set_word(frame, sealed.checksum().start, pseudo);
        Some(LargeSegment { headers: sealed, segment_size: usize::from(segment_size) })
    }
}

/// Length of the header and of the packet.
fn ipv4(packet: &[u8]) -> Option<(usize, usize)> {
    let header = usize::from(packet[0] & 0xf) * 4;
    let length = usize::from(word(packet, 2)?);
    // More fragments, or not the first.
    let fragment = word(packet, 6)? & 0x3fff != 0;
    let tcp = *packet.get(9)? == PROTOCOL_TCP;
    (tcp && !fragment && (IPV4_LEAST..=length).contains(&header)).then_some((header, length))
}

/// The same with all extension headers as part of the header.
fn ipv6(packet: &[u8]) -> Option<(usize, usize)> {
    let length = IPV6_HEADER + usize::from(word(packet, 4)?);
    let (mut next, mut at) = (*packet.get(6)?, IPV6_HEADER);
    for _ in 0..MOST_EXTENSIONS {
        if !EXTENSIONS.contains(&next) {
            break;
        }
        let extension = at;
        next = *packet.get(extension)?;
        at += 8 + usize::from(*packet.get(extension + 1)?) * 8;
    }
    (next == PROTOCOL_TCP && at <= length).then_some((at, length))
}

/// A large segment's headers, and how it is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargeSegment {
    /// Its parts.
    pub headers: TcpFrame,
    segment_size: usize,
}

impl LargeSegment {
    /// Reads a frame that should be a large segment for a network with frames of `mtu` bytes at most. `None` if it is none: not one whole TCP segment, padded,
    /// nothing to cut, or with pieces that are too small or too long.
    #[must_use]
    pub fn of(frame: &[u8], segment_size: u16, mtu: usize) -> Option<Self> {
        let headers = TcpFrame::parse(frame)?;
        let sane = frame.len() <= MAX_LARGE_SEGMENT
            && headers.end == frame.len()
            && segment_size >= MIN_SEGMENT_SIZE
            && headers.payload_len() > usize::from(segment_size)
            && headers.payload + usize::from(segment_size) <= mtu;
        sane.then_some(Self { headers, segment_size: usize::from(segment_size) })
    }

    /// How many pieces it is cut into.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.headers.payload_len().div_ceil(self.segment_size)
    }

    /// Cuts `frame` into pieces with checksums of their own; gives headers and payload of each, in order.
    pub fn cut(&self, frame: &[u8], mut piece: impl FnMut(&[u8], &[u8])) {
        let h = &self.headers;
        let mut headers = frame[..h.payload].to_vec();
        let (first, flags) = (h.sequence(frame), h.flags(frame));
        let identification = u16::from_be_bytes([frame[h.ip + 4], frame[h.ip + 5]]);
        let pieces = self.pieces();
        for (i, payload) in frame[h.payload..h.end].chunks(self.segment_size).enumerate() {
            if !h.ipv6 {
                set_word(&mut headers, h.ip + 4, identification.wrapping_add(i as u16));
            }
            h.set_length(&mut headers, payload.len());
            let sequence = first.wrapping_add((i * self.segment_size) as u32);
            headers[h.tcp + TCP_SEQUENCE..h.tcp + TCP_SEQUENCE + 4].copy_from_slice(&sequence.to_be_bytes());
            let mut now = flags;
            // What concerns the stream's end comes with its end; "window reduced" is said once (RFC 3168, section 6.1.2).
            if i + 1 < pieces {
                now &= !(tcp_flag::FIN | tcp_flag::PSH);
            }
            if i > 0 {
                now &= !tcp_flag::CWR;
            }
            headers[h.tcp + TCP_FLAGS] = now;
            headers[h.checksum()].fill(0);
            let tcp_header = h.payload - h.tcp;
            // TCP headers have an even number of bytes, so the sums can be added.
            let whole = add(sum(&headers[h.tcp..]), sum(payload));
            let checksum = !add(h.pseudo(&headers, tcp_header + payload.len()), whole);
            set_word(&mut headers, h.checksum().start, checksum);
            piece(&headers, payload);
        }
    }

    /// The pieces as frames.
    #[must_use]
    pub fn frames(&self, frame: &[u8]) -> Vec<Vec<u8>> {
        let mut frames = Vec::with_capacity(self.pieces());
        self.cut(frame, |headers, payload| frames.push([headers, payload].concat()));
        frames
    }

    /// Completes the checksum of `frame`, so that it can be sent whole to somebody who takes it so.
    pub fn complete(&self, frame: &mut [u8]) {
        let h = &self.headers;
        frame[h.checksum()].fill(0);
        let checksum = !add(h.pseudo(frame, h.end - h.tcp), sum(&frame[h.tcp..h.end]));
        set_word(frame, h.checksum().start, checksum);
    }
}

#[cfg(test)]
#[path = "offload_tests.rs"]
pub(crate) mod tests;
