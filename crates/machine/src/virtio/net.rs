//! The network card (section 5.1): one queue pair, mergeable receive buffers, no offloads.
//!
//! **In:** frames from the world, frames from the driver. **Out:** frames. **Invariant:** a received frame is put into guest RAM as soon as the driver has
//! buffers for all of it; until then it waits in a queue of [`BACKLOG`] frames, and what comes when that is full is lost, always the same
//! frame. A card whose driver is not ready loses every frame.
use super::{Broken, Cx, Queues, Received, VirtioDevice};
use crate::door::Output;
use crate::machine::{MAX_FRAME, MIN_FRAME};
use crate::payload::{Payload, RestoreError};
use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use std::collections::VecDeque;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Frames that wait for buffers at most.
pub(crate) const BACKLOG: usize = 1024;

const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
/// The link is up.
const LINK_UP: u16 = 1;
/// virtio_net_hdr with num_buffers, which a 1.x device always has.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;

#[derive(Encode, Decode)]
struct Image {
    #[n(0)]
    backlog: Vec<ByteVec>,
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Net {
    number: u8,
    mac: [u8; 6],
    mergeable: bool,
    backlog: VecDeque<Vec<u8>>,
}

impl Net {
    /// Card `number` with its address.
    pub(crate) fn new(number: u8, mac: [u8; 6]) -> Self {
        Self { number, mac, mergeable: false, backlog: VecDeque::new() }
    }

    fn fill(&mut self, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        while let Some(frame) = self.backlog.front() {
            if !Self::deliver(self.mergeable, frame, queues, cx)? {
                return queues.want_notify(cx, RECEIVE);
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    /// Puts one frame into the driver's buffers. False if there are not enough of them.
    fn deliver(mergeable: bool, frame: &[u8], queues: &mut Queues, cx: &mut Cx) -> Result<bool, Broken> {
        let mut bytes = vec![0; HEADER];
        bytes.extend(frame);
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < bytes.len() as u64 {
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
            if !mergeable {
                break;
            }
        }
        if room < bytes.len() as u64 {
            // One buffer, too small for this frame: the frame is lost, the buffer stays the device's.
            queues.unpop(RECEIVE);
            return Ok(true);
        }
        let buffers = chains.len() as u16;
        bytes[NUM_BUFFERS..HEADER].copy_from_slice(&buffers.to_le_bytes());
        let mut at = 0;
        for chain in chains {
            let n = (bytes.len() - at).min(chain.writable_len() as usize);
            if chain.write(cx.ram, 0, &bytes[at..at + n]) != n {
                return Err(Broken);
            }
            queues.push(cx, RECEIVE, chain.head, n as u32)?;
            at += n;
        }
        Ok(true)
    }

    fn drain(&mut self, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        while let Some(chain) = queues.pop(cx, TRANSMIT)? {
            // Frames that are none, and buffers outside RAM, are dropped as a switch drops runts.
            if let Some(mut frame) = chain.read(cx.ram, HEADER + MAX_FRAME).filter(|b| b.len() >= HEADER + MIN_FRAME) {
                frame.drain(..HEADER);
                cx.outputs.push((cx.position, Output::NetTx { nic: self.number, frame }));
            }
            queues.push(cx, TRANSMIT, chain.head, 0)?;
        }
        queues.want_notify(cx, TRANSMIT)
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> &'static str {
        "virtio-net"
    }
    fn device_type(&self) -> u16 {
        1
    }
    fn class(&self) -> u32 {
        0x02_0000
    }
    fn features(&self) -> u64 {
        F_MAC | F_MRG_RXBUF | F_STATUS
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> Vec<u8> {
        [&self.mac[..], &LINK_UP.to_le_bytes()].concat()
    }
    fn negotiated(&mut self, features: u64) {
        self.mergeable = features & F_MRG_RXBUF != 0;
    }
    fn reset(&mut self) {
        self.mergeable = false;
        self.backlog.clear();
    }

    fn notify(&mut self, queue: usize, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        if queue == RECEIVE { self.fill(queues, cx) } else { self.drain(queues, cx) }
    }

    fn receive(&mut self, received: Received, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        let Received::Frame(frame) = received else { return Ok(()) };
        if !queues.usable(RECEIVE) || self.backlog.len() >= BACKLOG {
            return Ok(());
        }
        self.backlog.push_back(frame);
        // Whoever waits already has asked to be told of new buffers.
        if self.backlog.len() == 1 { self.fill(queues, cx) } else { Ok(()) }
    }

    fn save(&self) -> Vec<u8> {
        Payload::encode("", 1, &Image { backlog: self.backlog.iter().map(|f| f.clone().into()).collect() }).bytes
    }
    fn restore(&mut self, payload: &Payload, bytes: &[u8]) -> Result<(), RestoreError> {
        let image: Image = payload.decode_part(bytes)?;
        if image.backlog.len() > BACKLOG || image.backlog.iter().any(|f| !(MIN_FRAME..=MAX_FRAME).contains(&f.len())) {
            return Err(payload.invalid("impossible frames wait"));
        }
        self.backlog = image.backlog.into_iter().map(Vec::from).collect();
        Ok(())
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
