//! The network card (section 5.1): one queue pair, mergeable receive buffers, TCP and checksum offloads.
//!
//! **In:** frames from the world, frames from the driver. **Out:** frames. **Invariant:** a received frame is put into guest RAM as soon as the driver has
//! buffers for all of it; until then it waits in a queue with bounds, and what comes when that is full is lost, always the same
//! frame. A card whose driver is not ready loses every frame. What leaves has whole checksums, but for large segments ([`crate::offload`]), which
//! the host completes.
//!
//! The driver is told that a checksum need not be looked at for large segments only, and whoever made one of several has verified theirs.
use super::{Broken, Chain, Cx, Queues, Received, VirtioDevice};
use crate::door::Output;
use crate::machine::{MAX_FRAME, MIN_FRAME};
use crate::memory::GuestRam;
use crate::offload::{self, LargeSegment, MAX_LARGE_SEGMENT, TcpFrame};
use crate::payload::{Payload, RestoreError};
use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use std::collections::VecDeque;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Frames that wait for buffers at most.
pub(crate) const BACKLOG: usize = 1024;
/// Their bytes at most: never less than so many ordinary frames have.
const BACKLOG_BYTES: usize = BACKLOG * MAX_FRAME;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
/// What a card of version 1 does not offer.
const OFFLOADS: u64 = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN;
const WITH_OFFLOADS: u16 = 2;

/// The link is up.
const LINK_UP: u16 = 1;
/// virtio_net_hdr with num_buffers, which a 1.x device always has.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
const FLAG_NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// What is saved. The second field came with version 2.
#[derive(Encode, Decode)]
struct Image {
    #[n(0)]
    backlog: Vec<ByteVec>,
    /// The size of each one's pieces, 0 for an ordinary frame.
    #[n(1)]
    segment_sizes: Option<Vec<u16>>,
}

/// A frame that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Waiting {
    frame: Vec<u8>,
    /// 0 for an ordinary frame, else the size of a large segment's pieces.
    segment_size: u16,
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Net {
    number: u8,
    mac: [u8; 6],
    /// Whether offloads are offered.
    offloads: bool,
    /// What the driver accepted.
    accepted: u64,
    backlog: VecDeque<Waiting>,
    backlog_bytes: usize,
}

impl Net {
    /// Card `number` with its address.
    pub(crate) fn new(number: u8, mac: [u8; 6]) -> Self {
        Self { number, mac, offloads: true, accepted: 0, backlog: VecDeque::new(), backlog_bytes: 0 }
    }

    fn accepted(&self, features: u64) -> bool {
        self.accepted & features == features
    }

    // Receiving.

    /// Whether the driver takes large segments of this kind. Without mergeable buffers, each of its buffers would have to hold the largest; that is
    /// not relied on.
    fn takes_large(&self, ipv6: bool) -> bool {
        self.accepted(F_GUEST_CSUM | F_MRG_RXBUF | if ipv6 { F_GUEST_TSO6 } else { F_GUEST_TSO4 })
    }

    /// Lets a frame wait, if there is room.
    fn enqueue(&mut self, frame: Vec<u8>, segment_size: u16) {
        if self.backlog.len() < BACKLOG && self.backlog_bytes + frame.len() <= BACKLOG_BYTES {
            self.backlog_bytes += frame.len();
            self.backlog.push_back(Waiting { frame, segment_size });
        }
    }

    /// Puts into the driver's buffers what fits. At a `doorbell` the driver has just added what it can: a large segment that does not fit even
    /// then would wait for ever, and is cut instead.
    fn fill(&mut self, doorbell: bool, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        let mut cut_it = doorbell;
        while let Some(waiting) = self.backlog.front() {
            if self.deliver(waiting, queues, cx)? {
                self.backlog_bytes -= waiting.frame.len();
                self.backlog.pop_front();
                cut_it = false;
            } else if cut_it && waiting.segment_size != 0 {
                self.cut_first();
            } else {
                return queues.want_notify(cx, RECEIVE);
            }
        }
        Ok(())
    }

    /// Replaces the large segment in front by its pieces. What no longer fits behind them is lost.
    fn cut_first(&mut self) {
        let Some(Waiting { frame, segment_size }) = self.backlog.pop_front() else { return };
        self.backlog_bytes -= frame.len();
        let behind = std::mem::take(&mut self.backlog);
        self.backlog_bytes = 0;
        if let Some(large) = LargeSegment::of(&frame, segment_size, MAX_FRAME) {
            large.cut(&frame, |headers, payload| self.enqueue([headers, payload].concat(), 0));
        }
        behind.into_iter().for_each(|waiting| self.enqueue(waiting.frame, waiting.segment_size));
    }

    /// The header in front of a frame that the driver gets.
    fn header(waiting: &Waiting) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        if let Some(large) = LargeSegment::of(&waiting.frame, waiting.segment_size, MAX_FRAME) {
            let h = large.headers;
            header[0] = FLAG_NEEDS_CSUM;
            header[1] = if h.ipv6 { GSO_TCPV6 } else { GSO_TCPV4 };
            header[2..4].copy_from_slice(&(h.payload as u16).to_le_bytes());
            header[4..6].copy_from_slice(&waiting.segment_size.to_le_bytes());
            header[6..8].copy_from_slice(&(h.tcp as u16).to_le_bytes());
            header[8..10].copy_from_slice(&(offload::TCP_CHECKSUM as u16).to_le_bytes());
        }
        header
    }

    /// Puts one frame into the driver's buffers. False if there are not enough of them.
    fn deliver(&self, waiting: &Waiting, queues: &mut Queues, cx: &mut Cx) -> Result<bool, Broken> {
        let (frame, whole) = (&waiting.frame, (HEADER + waiting.frame.len()) as u64);
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < whole {
            let Some(chain) = queues.pop(cx, RECEIVE)? else {
                chains.iter().for_each(|_| queues.unpop(RECEIVE));
                return Ok(false);
            };
            // Empty buffers would let a frame take any number of them.
            let len = chain.writable_len();
            if len == 0 || (chains.is_empty() && len < HEADER as u64) {
                return Err(Broken);
            }
            room += len;
            chains.push(chain);
            if !self.accepted(F_MRG_RXBUF) {
                break;
            }
        }
        if room < whole {
            // One buffer, too small for this frame: the frame is lost, the buffer stays the device's.
            queues.unpop(RECEIVE);
            return Ok(true);
        }
        let mut header = Self::header(waiting);
        header[NUM_BUFFERS..].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let (mut in_front, mut at) = (&header[..], 0);
        for chain in chains {
            let n = (frame.len() - at).min(chain.writable_len() as usize - in_front.len());
            let written = chain.write(cx.ram, 0, in_front) + chain.write(cx.ram, in_front.len(), &frame[at..at + n]);
            if written != in_front.len() + n {
                return Err(Broken);
            }
            queues.push(cx, RECEIVE, chain.head, written as u32)?;
            (in_front, at) = (&[], at + n);
        }
        Ok(true)
    }

    // Sending.

    fn drain(&mut self, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        while let Some(chain) = queues.pop(cx, TRANSMIT)? {
            // What is no frame, or lies outside RAM, is dropped as a switch drops runts.
            if let Some(output) = self.sent(&chain, cx.ram) {
                cx.outputs.push((cx.position, output));
            }
            queues.push(cx, TRANSMIT, chain.head, 0)?;
        }
        queues.want_notify(cx, TRANSMIT)
    }

    /// What the driver wants to send with this chain.
    fn sent(&self, chain: &Chain, ram: &GuestRam) -> Option<Output> {
        let (header, mut frame) = chain.read_after(ram, [0; HEADER], MAX_LARGE_SEGMENT)?;
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        // Without the feature, the header means nothing.
        if self.accepted(F_CSUM) {
            let (partial, gso) = (header[0] & FLAG_NEEDS_CSUM != 0, header[1] & !GSO_ECN);
            let (segment_size, start) = (half(4), usize::from(half(6)));
            if gso != GSO_NONE {
                let ipv6 = gso == GSO_TCPV6;
                let feature = if ipv6 { F_HOST_TSO6 } else { F_HOST_TSO4 };
                if !matches!(gso, GSO_TCPV4 | GSO_TCPV6) || !self.accepted(feature) || !partial {
                    return None;
                }
                let parsed = TcpFrame::parse(&frame).filter(|p| p.ipv6 == ipv6 && p.tcp == start)?;
                // Drivers may ask for this even if there is nothing to cut.
                if parsed.payload_len() > usize::from(segment_size) {
                    LargeSegment::of(&frame, segment_size, MAX_FRAME)?;
                    parsed.seal(&mut frame, segment_size)?;
                    return Some(Output::NetTxGso { nic: self.number, frame, segment_size });
                }
            }
            if partial && !offload::complete_at(&mut frame, start, usize::from(half(8))) {
                return None;
            }
        }
        (MIN_FRAME..=MAX_FRAME).contains(&frame.len()).then_some(Output::NetTx { nic: self.number, frame })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> &'static str {
        "virtio-net"
    }
    fn newest_version(&self) -> u16 {
        WITH_OFFLOADS
    }
    fn version(&self) -> u16 {
        if self.offloads { WITH_OFFLOADS } else { 1 }
    }
    fn become_version(&mut self, version: u16) {
        self.offloads = version >= WITH_OFFLOADS;
    }
    fn device_type(&self) -> u16 {
        1
    }
    fn class(&self) -> u32 {
        0x02_0000
    }
    fn features(&self) -> u64 {
        F_MAC | F_MRG_RXBUF | F_STATUS | if self.offloads { OFFLOADS } else { 0 }
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> Vec<u8> {
        [&self.mac[..], &LINK_UP.to_le_bytes()].concat()
    }
    fn negotiated(&mut self, features: u64) {
        self.accepted = features;
    }
    fn reset(&mut self) {
        self.accepted = 0;
        self.backlog.clear();
        self.backlog_bytes = 0;
    }

    fn notify(&mut self, queue: usize, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        if queue == RECEIVE { self.fill(true, queues, cx) } else { self.drain(queues, cx) }
    }

    fn receive(&mut self, received: Received, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        if !queues.usable(RECEIVE) {
            return Ok(());
        }
        let waited = !self.backlog.is_empty();
        match received {
            Received::Frame(frame) => self.enqueue(frame, 0),
            Received::LargeSegment { frame, segment_size } => match LargeSegment::of(&frame, segment_size, MAX_FRAME) {
                Some(large) if !self.takes_large(large.headers.ipv6) => {
                    large.cut(&frame, |headers, payload| self.enqueue([headers, payload].concat(), 0));
                }
                _ => self.enqueue(frame, segment_size),
            },
            Received::Bytes(_) | Received::Seed(_) | Received::DiskDone { .. } => return Ok(()),
        }
        // Whoever waits already has asked to be told of new buffers.
        if waited { Ok(()) } else { self.fill(false, queues, cx) }
    }

    fn save(&self) -> Vec<u8> {
        let segment_sizes = self.offloads.then(|| self.backlog.iter().map(|w| w.segment_size).collect());
        let backlog = self.backlog.iter().map(|w| w.frame.clone().into()).collect();
        Payload::encode("", self.version(), &Image { backlog, segment_sizes }).bytes
    }
    fn restore(&mut self, payload: &Payload, bytes: &[u8]) -> Result<(), RestoreError> {
        let image: Image = payload.decode_part(bytes)?;
        if image.segment_sizes.is_some() != self.offloads {
            return Err(payload.invalid("sizes of pieces, which its version does not have, or none, which it has"));
        }
        let sizes = image.segment_sizes.unwrap_or_else(|| vec![0; image.backlog.len()]);
        if image.backlog.len() > BACKLOG || sizes.len() != image.backlog.len() {
            return Err(payload.invalid("an impossible number of frames waits"));
        }
        let backlog: VecDeque<_> = std::iter::zip(image.backlog, sizes)
            .map(|(frame, segment_size)| Waiting { frame: frame.into(), segment_size })
            .collect();
        let bytes = backlog.iter().map(|w| w.frame.len()).sum();
        let possible = |w: &Waiting| match w.segment_size {
            0 => (MIN_FRAME..=MAX_FRAME).contains(&w.frame.len()),
            size => LargeSegment::of(&w.frame, size, MAX_FRAME).is_some_and(|large| self.takes_large(large.headers.ipv6)),
        };
        if bytes > BACKLOG_BYTES || !backlog.iter().all(possible) {
            return Err(payload.invalid("impossible frames wait"));
        }
        (self.backlog, self.backlog_bytes) = (backlog, bytes);
        Ok(())
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
