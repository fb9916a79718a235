//! TCP segments that arrive together, made one: "generic receive offload", as Linux does it for itself.
//!
//! *In*: frames in the order of their arrival. *Out*: the same bytes of the same streams in the same order, in fewer frames. *Invariant*: a segment becomes part
//! of another only if both have right checksums and their headers say the same but for what follows from their place in the stream; so
//! whoever cuts the whole again gets segments that mean what the original ones meant. All else passes as it is, and in its place.
//!
//! A guest pays for frames far more than for bytes: some 40 in one are received for little more than one.

use std::ops::{ControlFlow, Range};

use twinstep_machine::MAX_FRAME;
use twinstep_machine::offload::{MAX_LARGE_SEGMENT, MIN_SEGMENT_SIZE, TcpFrame, tcp_flag};

use super::Receive;

/// The smallest segment that others are added to.
const LEAST: usize = MIN_SEGMENT_SIZE as usize;

/// A frame that has come for the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// The frame.
    pub frame: Vec<u8>,
    /// 0 for an ordinary frame, else the size of a large segment's pieces ([`twinstep_machine::offload`]).
    pub segment_size: u16,
}

/// A segment to which others may be added.
#[derive(Debug)]
struct Open {
    frame: Vec<u8>,
    headers: TcpFrame,
    segment_size: usize,
    /// The sequence number behind it.
    next: u32,
    /// Its checksums are known to be right.
    verified: bool,
}

/// Makes few frames of many. One stream at a time: bursts come from one sender.
#[derive(Debug, Default)]
pub struct Coalescer {
    open: Option<Open>,
}

impl Coalescer {
    /// Takes a frame, and passes on what it ends.
    pub fn push(&mut self, frame: &[u8], receive: &mut Receive) -> ControlFlow<()> {
        let candidate = TcpFrame::parse(frame).filter(|headers| joinable(frame, headers));
        if let (Some(open), Some(headers)) = (&mut self.open, &candidate)
            && open.add(frame, headers)
        {
            // After a short one, or one that shall be handed over at once, nothing follows.
            let last = headers.payload_len() < open.segment_size || headers.flags(frame) & tcp_flag::PSH != 0;
            return if last { self.flush(receive) } else { ControlFlow::Continue(()) };
        }
        self.flush(receive)?;
        match candidate {
            Some(headers) if headers.flags(frame) & tcp_flag::PSH == 0 && headers.payload_len() >= LEAST => {
                let segment_size = headers.payload_len();
                let next = headers.sequence(frame).wrapping_add(segment_size as u32);
                self.open = Some(Open { frame: frame.to_vec(), headers, segment_size, next, verified: false });
                ControlFlow::Continue(())
            }
            _ => receive(Arrival { frame: frame.to_vec(), segment_size: 0 }),
        }
    }

    /// Passes on what is still held.
    pub fn flush(&mut self, receive: &mut Receive) -> ControlFlow<()> {
        let Some(Open { mut frame, headers, segment_size, .. }) = self.open.take() else { return ControlFlow::Continue(()) };
        let segment_size = segment_size as u16;
        // With a single one there is nothing to cut, and it stays as it came.
        let large = headers.seal(&mut frame, segment_size).is_some();
        receive(Arrival { frame, segment_size: if large { segment_size } else { 0 } })
    }
}

/// Whether a segment may be part of a larger one at all: plain data, in a frame and a packet without anything unusual.
fn joinable(frame: &[u8], headers: &TcpFrame) -> bool {
    let plain_ip = headers.tcp - headers.ip == if headers.ipv6 { 40 } else { 20 };
    let flags = headers.flags(frame) & !tcp_flag::PSH;
    plain_ip && headers.end == frame.len() && frame.len() <= MAX_FRAME && headers.payload_len() > 0 && flags == tcp_flag::ACK
}

/// The bytes of the headers that must be the same: all but lengths, IPv4's identification and checksum, sequence number, flags, TCP's checksum.
fn fixed(headers: &TcpFrame) -> [Range<usize>; 7] {
    let TcpFrame { ipv6, ip, tcp, payload, .. } = *headers;
    let in_ip = if ipv6 { [0..ip + 4, ip + 6..tcp, tcp..tcp] } else { [0..ip + 2, ip + 6..ip + 10, ip + 12..tcp] };
    let [a, b, c] = in_ip;
    // Ports; acknowledgement and header length; window; urgent pointer and options.
    [a, b, c, tcp..tcp + 4, tcp + 8..tcp + 13, tcp + 14..tcp + 16, tcp + 18..payload]
}

impl Open {
    /// Adds a segment if it goes on where this one ends.
    fn add(&mut self, frame: &[u8], headers: &TcpFrame) -> bool {
        let payload = &frame[headers.payload..headers.end];
        let same_place = (headers.ipv6, headers.ip, headers.tcp, headers.payload)
            == (self.headers.ipv6, self.headers.ip, self.headers.tcp, self.headers.payload);
        let goes_on = same_place
            && headers.sequence(frame) == self.next
            && payload.len() <= self.segment_size
            && self.frame.len() + payload.len() <= MAX_LARGE_SEGMENT.min(self.headers.ip + usize::from(u16::MAX))
            && fixed(headers).into_iter().all(|part| frame[part.clone()] == self.frame[part]);
        if !goes_on {
            return false;
        }
        self.verified = self.verified || self.headers.checksums_hold(&self.frame);
        if !self.verified || !headers.checksums_hold(frame) {
            return false;
        }
        self.frame.extend_from_slice(payload);
        self.next = self.next.wrapping_add(payload.len() as u32);
        // It ends with the last one's wish.
        self.frame[self.headers.tcp + 13] |= headers.flags(frame) & tcp_flag::PSH;
        true
    }
}

#[cfg(test)]
#[path = "coalesce_tests.rs"]
mod tests;
