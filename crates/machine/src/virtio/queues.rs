//! The queues of one device: taking chains, giving them back, and remembering whom to interrupt.
//!
//! A thin layer over the `virtio-queue` crate (split rings, section 2.7) that turns every broken ring into one error.
use super::Cx;
use crate::memory::GuestRam;
use minicbor::{Decode, Encode};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// The driver broke the rules of a queue; the device needs a reset (section 2.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

/// One descriptor chain, read out of the ring: what the device may read and what it may write.
#[derive(Debug, Clone)]
pub(crate) struct Chain {
    /// Names the chain when it is given back.
    pub(crate) head: u16,
    /// Readable pieces (address, length), then writable ones.
    pub(crate) readable: Vec<(u64, u32)>,
    pub(crate) writable: Vec<(u64, u32)>,
}

impl Chain {
    /// Bytes the device may read.
    pub(crate) fn readable_len(&self) -> u64 {
        self.readable.iter().map(|p| u64::from(p.1)).sum()
    }
    /// Bytes the device may write.
    pub(crate) fn writable_len(&self) -> u64 {
        self.writable.iter().map(|p| u64::from(p.1)).sum()
    }

    /// Copies all readable bytes, unless they are more than `limit` or not RAM.
    pub(crate) fn read(&self, ram: &GuestRam, limit: usize) -> Option<Vec<u8>> {
        self.read_after(ram, [], limit).map(|([], bytes)| bytes)
    }

    /// Copies all readable bytes, the first of them into `header` and at most `limit` that follow into memory of their own: each byte once. `None` if
    /// there are more, or not enough for the header, or some are not RAM.
    pub(crate) fn read_after<const N: usize>(
        &self,
        ram: &GuestRam,
        mut header: [u8; N],
        limit: usize,
    ) -> Option<([u8; N], Vec<u8>)> {
        let rest = self.readable_len().checked_sub(N as u64).filter(|&rest| rest <= limit as u64)?;
        let mut bytes = Vec::with_capacity(rest as usize);
        let mut at = 0;
        for &(address, len) in &self.readable {
            let len = len as usize;
            let part = len.min(N - at);
            ram.read_slice(&mut header[at..at + part], GuestAddress(address)).ok()?;
            at += part;
            if len > part {
                let from = GuestAddress(address.checked_add(part as u64)?);
                ram.write_all_volatile_to(from, &mut bytes, len - part).ok()?;
            }
        }
        Some((header, bytes))
    }

    /// Writes `bytes` from `offset` of the writable part on. Returns how many went in.
    pub(crate) fn write(&self, ram: &GuestRam, offset: usize, bytes: &[u8]) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for &(address, len) in &self.writable {
            let len = len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let part = (len - skip).min(bytes.len() - done);
            let Some(to) = address.checked_add(skip as u64) else { break };
            if ram.write_slice(&bytes[done..done + part], GuestAddress(to)).is_err() {
                break;
            }
            (skip, done) = (0, done + part);
            if done == bytes.len() {
                break;
            }
        }
        done
    }
}

/// Saved state of one queue.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct QueueImage {
    #[n(0)]
    size: u16,
    #[n(1)]
    ready: bool,
    #[n(2)]
    desc_table: u64,
    #[n(3)]
    avail_ring: u64,
    #[n(4)]
    used_ring: u64,
    #[n(5)]
    next_avail: u16,
    #[n(6)]
    next_used: u16,
    #[n(7)]
    event_idx: bool,
    #[n(8)]
    vector: u16,
}

/// No interrupt vector.
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// All queues of one device.
#[derive(Debug)]
pub(crate) struct Queues {
    queues: Vec<Queue>,
    /// MSI-X vector of each queue.
    pub(super) vectors: Vec<u16>,
    /// Chains were given back to these queues and the driver was not told yet, a bit each.
    used: u64,
    /// DRIVER_OK is set and the device is not broken.
    pub(super) live: bool,
}

impl Queues {
    pub(super) fn new(sizes: &[u16]) -> Self {
        let queues: Vec<_> = sizes.iter().map(|&n| Queue::new(n).expect("queue sizes are powers of two")).collect();
        Self { vectors: vec![NO_VECTOR; queues.len()], queues, used: 0, live: false }
    }
    pub(super) fn len(&self) -> usize {
        self.queues.len()
    }
    pub(super) fn get(&self, index: usize) -> Option<&Queue> {
        self.queues.get(index)
    }
    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Queue> {
        self.queues.get_mut(index)
    }

    /// Whether the device may use `queue` now.
    pub(crate) fn usable(&self, queue: usize) -> bool {
        self.live && self.queues.get(queue).is_some_and(|q| q.ready())
    }

    /// Takes the next chain of `queue`, if the driver has put one there.
    pub(crate) fn pop(&mut self, cx: &Cx, queue: usize) -> Result<Option<Chain>, Broken> {
        if !self.usable(queue) {
            return Ok(None);
        }
        let mut available = self.queues[queue].iter(cx.ram).map_err(|_| Broken)?;
        let Some(chain) = available.next() else { return Ok(None) };
        let mut out = Chain { head: chain.head_index(), readable: Vec::new(), writable: Vec::new() };
        for descriptor in chain {
            let descriptor: Descriptor = descriptor;
            let piece = (descriptor.addr().0, descriptor.len());
            if descriptor.is_write_only() {
                out.writable.push(piece);
            } else if out.writable.is_empty() {
                out.readable.push(piece);
            } else {
                // Readable after writable (2.7.4.2).
                return Err(Broken);
            }
        }
        if out.readable.is_empty() && out.writable.is_empty() {
            return Err(Broken);
        }
        Ok(Some(out))
    }

    /// Puts the chain taken last back, as if it had not been taken.
    pub(crate) fn unpop(&mut self, queue: usize) {
        self.queues[queue].go_to_previous_position();
    }

    /// Gives a chain back with `len` bytes written.
    pub(crate) fn push(&mut self, cx: &Cx, queue: usize, head: u16, len: u32) -> Result<(), Broken> {
        self.queues[queue].add_used(cx.ram, head, len).map_err(|_| Broken)?;
        self.used |= 1 << queue;
        Ok(())
    }

    /// Asks the driver to ring the bell when it adds chains from here on.
    pub(crate) fn want_notify(&mut self, cx: &Cx, queue: usize) -> Result<(), Broken> {
        if self.usable(queue) {
            self.queues[queue].enable_notification(cx.ram).map_err(|_| Broken)?;
        }
        Ok(())
    }

    /// The queues whose driver must be interrupted now. To be called once after all work at a position.
    pub(super) fn take_interrupts(&mut self, cx: &Cx) -> Result<Vec<usize>, Broken> {
        let used = std::mem::take(&mut self.used);
        let mut out = Vec::new();
        for index in (0..self.queues.len()).filter(|i| used >> i & 1 != 0) {
            let queue = &mut self.queues[index];
            // Without event indexes the driver can still ask for silence (2.7.7): flags word of the available ring.
            let silent = !queue.event_idx_enabled()
                && cx.ram.read_obj::<u16>(GuestAddress(queue.avail_ring())).is_ok_and(|flags| u16::from_le(flags) & 1 != 0);
            if queue.needs_notification(cx.ram).map_err(|_| Broken)? && !silent {
                out.push(index);
            }
        }
        Ok(out)
    }

    /// Back to the state after a device reset.
    pub(super) fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.reset();
        }
        self.vectors.fill(NO_VECTOR);
        self.used = 0;
        self.live = false;
    }

    pub(super) fn save(&self) -> Vec<QueueImage> {
        debug_assert_eq!(self.used, 0, "saved between work and its interrupts");
        let image = |(queue, &vector): (&Queue, &u16)| {
            let s = queue.state();
            QueueImage {
                size: s.size,
                ready: s.ready,
                desc_table: s.desc_table,
                avail_ring: s.avail_ring,
                used_ring: s.used_ring,
                next_avail: s.next_avail,
                next_used: s.next_used,
                event_idx: s.event_idx_enabled,
                vector,
            }
        };
        self.queues.iter().zip(&self.vectors).map(image).collect()
    }

    /// Takes saved queues. `Err` says what is wrong.
    pub(super) fn restore(&mut self, images: &[QueueImage]) -> Result<(), &'static str> {
        if images.len() != self.queues.len() {
            return Err("it has another number of queues");
        }
        for (i, q) in images.iter().enumerate() {
            let state = QueueState {
                max_size: self.queues[i].max_size(),
                next_avail: q.next_avail,
                next_used: q.next_used,
                event_idx_enabled: q.event_idx,
                size: q.size,
                ready: q.ready,
                desc_table: q.desc_table,
                avail_ring: q.avail_ring,
                used_ring: q.used_ring,
            };
            self.queues[i] = Queue::try_from(state).map_err(|_| "impossible queue state")?;
            self.vectors[i] = q.vector;
        }
        self.used = 0;
        Ok(())
    }
}

impl QueueImage {
    /// Its MSI-X vector.
    pub(super) fn vector(&self) -> u16 {
        self.vector
    }
}
