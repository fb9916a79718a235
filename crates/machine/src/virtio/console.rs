//! The console (section 5.3): one port, no multiport, no size.
//!
//! **In:** typed bytes, what the driver writes. **Out:** written bytes. **Invariant:** typed bytes wait in a bounded backlog until the driver has buffers;
//! what comes beyond is lost, always at the same byte.
use super::{Broken, Cx, Queues, Received, VirtioDevice};
use crate::door::Output;
use crate::payload::{Payload, RestoreError};
use minicbor::{Decode, Encode};
use std::collections::VecDeque;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Typed bytes that wait at most.
const BACKLOG: usize = 64 << 10;
/// The longest piece a driver may write at once; a longer one is dropped.
const LONGEST: usize = 1 << 20;

#[derive(Encode, Decode)]
struct Image {
    #[cbor(n(0), with = "minicbor::bytes")]
    backlog: Vec<u8>,
}

/// The console.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Console {
    backlog: VecDeque<u8>,
}

impl Console {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn fill(&mut self, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        while !self.backlog.is_empty() {
            let Some(chain) = queues.pop(cx, RECEIVE)? else { return queues.want_notify(cx, RECEIVE) };
            let n = chain.writable_len().min(self.backlog.len() as u64) as usize;
            let bytes: Vec<u8> = self.backlog.iter().take(n).copied().collect();
            let written = chain.write(cx.ram, 0, &bytes);
            if written == 0 {
                return Err(Broken);
            }
            self.backlog.drain(..written);
            queues.push(cx, RECEIVE, chain.head, written as u32)?;
        }
        Ok(())
    }

    fn drain(&mut self, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        while let Some(chain) = queues.pop(cx, TRANSMIT)? {
            if let Some(bytes) = chain.read(cx.ram, LONGEST).filter(|b| !b.is_empty()) {
                cx.outputs.push((cx.position, Output::Console(bytes)));
            }
            queues.push(cx, TRANSMIT, chain.head, 0)?;
        }
        queues.want_notify(cx, TRANSMIT)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> &'static str {
        "virtio-console"
    }
    fn device_type(&self) -> u16 {
        3
    }
    fn class(&self) -> u32 {
        0x07_8000
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> Vec<u8> {
        // cols, rows, max_nr_ports, emerg_wr: none is offered.
        vec![0; 12]
    }
    fn negotiated(&mut self, _features: u64) {}
    /// What was typed before the driver came is kept for it.
    fn reset(&mut self) {}

    fn notify(&mut self, queue: usize, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        if queue == RECEIVE { self.fill(queues, cx) } else { self.drain(queues, cx) }
    }

    fn receive(&mut self, received: Received, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        let Received::Bytes(bytes) = received else { return Ok(()) };
        let room = BACKLOG - self.backlog.len();
        self.backlog.extend(bytes.iter().take(room));
        self.fill(queues, cx)
    }

    fn save(&self) -> Vec<u8> {
        Payload::encode("", 1, &Image { backlog: self.backlog.iter().copied().collect() }).bytes
    }
    fn restore(&mut self, payload: &Payload, bytes: &[u8]) -> Result<(), RestoreError> {
        let image: Image = payload.decode_part(bytes)?;
        if image.backlog.len() > BACKLOG {
            return Err(payload.invalid("the backlog is too long"));
        }
        self.backlog = image.backlog.into();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Driver;

    #[test]
    fn bytes_go_both_ways() {
        let mut d = Driver::new(Box::new(Console::new()));
        d.receive(Received::Bytes(b"typed early".to_vec()));
        d.start(0);
        let a = d.add(0, &[], &[6]);
        let b = d.add(0, &[], &[6]);
        d.kick(0);
        assert_eq!(d.used(0), [(a.head, 6), (b.head, 5)]);
        assert_eq!(d.read(a.writable[0], 6), b"typed ");
        assert_eq!(d.read(b.writable[0], 5), b"early");
        assert_eq!(d.interrupts(), [d.vector(0)]);

        d.add(1, &[b"out", b"put"], &[]);
        d.kick(1);
        assert_eq!(d.outputs(), [Output::Console(b"output".to_vec())]);
    }

    #[test]
    fn the_backlog_is_bounded() {
        let mut console = Console::new();
        console.backlog.extend(vec![0; BACKLOG]);
        let mut d = Driver::new(Box::new(console));
        d.start(0);
        d.receive(Received::Bytes(b"lost".to_vec()));
        d.check_save_restore(Box::new(Console::new()));
    }

    #[test]
    fn endless_writes_are_dropped() {
        let mut d = Driver::new(Box::new(Console::new()));
        d.start(0);
        let chain = d.add_raw(1, &[(0x1000, u32::MAX - 1, false)]);
        d.kick(1);
        assert_eq!(d.used(1), [(chain, 0)]);
        assert_eq!(d.outputs(), []);
    }
}
