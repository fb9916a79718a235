//! The disk (section 5.2): a raw block device with flush and serial number.
//!
//! **In:** requests, the host's [`Disk`]. **Out:** data, completions. **Invariant:** the data moves at the position of the doorbell; the completion comes a fixed
//! guest time later, in order. What the guest did wrong is its own I/O error; what the host cannot do is a host failure, and
//! the request stays in the ring to be done again. Of a shared disk ([`crate::disk`]) reads and flushes complete when the host says so, at any position, in any order.
use super::{Broken, Chain, Cx, Queues, Received, VirtioDevice};
use crate::config::DiskConfig;
use crate::disk::{Disk, DiskError, DiskWanted, MAX_SHARED_BYTES};
use crate::door::Output;
use crate::payload::{Payload, RestoreError};
use minicbor::{Decode, Encode};
use std::collections::VecDeque;
use vm_memory::{Bytes, GuestAddress};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const REQUESTS: usize = 0;
const QUEUE_SIZES: [u16; 1] = [256];
/// Guest time from a request to its completion.
pub(crate) const LATENCY_NS: u64 = 50_000;
const SECTOR: u64 = 512;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
/// Longest segment and most segments of a request; together the longest request.
const SIZE_MAX: u32 = 64 << 10;
const SEG_MAX: u32 = 126;
const LONGEST: u64 = SIZE_MAX as u64 * SEG_MAX as u64;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;
const HEADER: usize = 16;
const ID_LEN: usize = 20;

/// A request that is done and waits for its time.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct Done {
    #[n(0)]
    due_ns: u64,
    #[n(1)]
    head: u16,
    #[n(2)]
    written: u32,
    #[n(3)]
    status: u8,
    #[n(4)]
    status_address: u64,
}

/// The payload's version from which on it has [`Block::written`].
const WITH_WRITTEN: u16 = 2;

/// The payload's version of a shared disk, which has [`Shared`].
const SHARED: u16 = 3;
/// Most segments of a request to a shared disk.
const SHARED_SEG_MAX: u32 = MAX_SHARED_BYTES / SIZE_MAX;

/// A request that waits for the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct Waiting {
    #[n(0)]
    request: u64,
    #[n(1)]
    head: u16,
    #[n(2)]
    status_address: u64,
    /// Of a read; none for a flush.
    #[n(3)]
    read: Option<WaitingRead>,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct WaitingRead {
    #[n(0)]
    offset: u64,
    #[n(1)]
    length: u32,
    /// Where the data goes, address and length; the status byte's place may be part of the last.
    #[n(2)]
    pieces: Vec<(u64, u32)>,
}

impl Waiting {
    fn wanted(&self) -> DiskWanted {
        match &self.read {
            Some(read) => DiskWanted::Read { offset: read.offset, length: read.length },
            None => DiskWanted::Flush,
        }
    }
}

/// What a shared disk has besides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
struct Shared {
    /// Requests that have waited so far.
    #[n(0)]
    requests: u64,
    #[n(1)]
    waiting: Vec<Waiting>,
}

/// One disk.
#[derive(Debug)]
pub(crate) struct Block {
    /// Which one it is.
    number: u8,
    shared: Option<Shared>,
    disk: Box<dyn Disk>,
    /// A running hash of all that was written and where: what is on the disk is part of the machine's state, and so part of its digest. `None` for a disk that was restored
    /// from a payload without, so that old recordings replay with equal digests.
    written: Option<u64>,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_LEN],
    in_flight: VecDeque<Done>,
}

/// What became of a request: data bytes written to the guest, or a status.
type Outcome = Result<u32, u8>;

impl Block {
    pub(crate) fn new(disk: Box<dyn Disk>, number: u8, config: &DiskConfig) -> Self {
        let mut id = [0; ID_LEN];
        let n = config.serial.len().min(ID_LEN);
        id[..n].copy_from_slice(&config.serial.as_bytes()[..n]);
        Self {
            number,
            shared: config.shared.then(Shared::default),
            sectors: disk.size() / SECTOR,
            disk,
            written: Some(0),
            read_only: config.read_only,
            id,
            in_flight: VecDeque::new(),
        }
    }

    /// Byte offset of `len` bytes at `sector`, if they are whole sectors of this disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, u8> {
        let end = sector.checked_add(len / SECTOR);
        let longest = if self.shared.is_some() { u64::from(MAX_SHARED_BYTES) } else { LONGEST };
        if !len.is_multiple_of(SECTOR) || len > longest || end.is_none_or(|end| end > self.sectors) {
            return Err(STATUS_IO_ERROR);
        }
        Ok(sector * SECTOR)
    }

    /// Does what a request asks for, all but its status byte.
    fn execute(&mut self, chain: &Chain, cx: &mut Cx) -> Result<Outcome, DiskError> {
        // An OUT request's readable part is the header and the data; it is read as one.
        let Some(bytes) = chain.read(cx.ram, HEADER + LONGEST as usize).filter(|b| b.len() >= HEADER) else {
            return Ok(Err(STATUS_IO_ERROR));
        };
        let (header, data) = bytes.split_at(HEADER);
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let room = chain.writable_len() - 1;
        Ok(match kind {
            TYPE_IN => match self.range(sector, room) {
                Ok(offset) => {
                    let mut data = vec![0; room as usize];
                    self.disk.read_at(offset, &mut data)?;
                    if chain.write(cx.ram, 0, &data) == data.len() { Ok(room as u32) } else { Err(STATUS_IO_ERROR) }
                }
                Err(status) => Err(status),
            },
            TYPE_OUT if self.read_only => Err(STATUS_IO_ERROR),
            TYPE_OUT => match self.range(sector, data.len() as u64) {
                Ok(offset) => {
                    if self.shared.is_none() {
                        self.disk.write_at(offset, data)?;
                    } else if !data.is_empty() {
                        cx.outputs.push((cx.position, Output::DiskWrite { disk: self.number, offset, data: data.to_vec() }));
                    }
                    self.written = self.written.map(|before| xxh3_64_with_seed(data, before.wrapping_add(sector)));
                    Ok(0)
                }
                Err(status) => Err(status),
            },
            TYPE_FLUSH => {
                self.disk.flush()?;
                Ok(0)
            }
            TYPE_GET_ID => {
                let n = (room as usize).min(ID_LEN);
                Ok(chain.write(cx.ram, 0, &self.id[..n]) as u32)
            }
            _ => Err(STATUS_UNSUPPORTED),
        })
    }
}

/// A read or a flush of a shared disk; other requests, and bad ones, are none.
enum Waits {
    Read { offset: u64, length: u32 },
    Flush,
}

impl Block {
    /// What a request waits for, if it is one that does.
    fn waits(&self, chain: &Chain, cx: &Cx) -> Option<Waits> {
        self.shared.as_ref()?;
        let bytes = chain.read(cx.ram, HEADER + LONGEST as usize).filter(|bytes| bytes.len() >= HEADER)?;
        let sector = u64::from_le_bytes(std::array::from_fn(|i| bytes[8 + i]));
        let room = chain.writable_len() - 1;
        match u32::from_le_bytes(std::array::from_fn(|i| bytes[i])) {
            TYPE_IN if room > 0 => self.range(sector, room).ok().map(|offset| Waits::Read { offset, length: room as u32 }),
            TYPE_FLUSH => Some(Waits::Flush),
            _ => None,
        }
    }

    /// Lets a request wait for the host.
    fn wait(&mut self, waits: Waits, chain: &Chain, status_address: u64, cx: &mut Cx) {
        let shared = self.shared.as_mut().expect("only shared disks wait");
        let request = shared.requests;
        shared.requests += 1;
        let read = match waits {
            Waits::Read { offset, length } => Some(WaitingRead { offset, length, pieces: chain.writable.clone() }),
            Waits::Flush => {
                cx.outputs.push((cx.position, Output::DiskFlush { disk: self.number, request }));
                None
            }
        };
        shared.waiting.push(Waiting { request, head: chain.head, status_address, read });
        *cx.asks = true;
    }

    fn waiting(&self) -> usize {
        self.shared.as_ref().map_or(0, |shared| shared.waiting.len())
    }

    /// The host has done what request `request` waits for.
    fn done(&mut self, request: u64, data: &[u8], queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        let Some(shared) = &mut self.shared else { return Ok(()) };
        // The guest may have reset the device meanwhile.
        let Some(at) = shared.waiting.iter().position(|waiting| waiting.request == request) else { return Ok(()) };
        let waiting = shared.waiting.remove(at);
        let (mut status, mut written, mut rest) = (STATUS_OK, 1, data);
        if let Some(read) = &waiting.read {
            for (address, length) in &read.pieces {
                let (now, later) = rest.split_at((*length as usize).min(rest.len()));
                rest = later;
                if cx.ram.write_slice(now, GuestAddress(*address)).is_err() {
                    status = STATUS_IO_ERROR;
                }
            }
            written = if status == STATUS_OK { read.length + 1 } else { 1 };
        }
        cx.ram.write_slice(&[status], GuestAddress(waiting.status_address)).map_err(|_| Broken)?;
        queues.push(cx, REQUESTS, waiting.head, written)
    }
}

/// Address of the last writable byte, where the status goes.
fn status_address(chain: &Chain) -> Option<u64> {
    let &(address, len) = chain.writable.iter().rev().find(|p| p.1 > 0)?;
    address.checked_add(u64::from(len) - 1)
}

impl VirtioDevice for Block {
    fn kind(&self) -> &'static str {
        "virtio-block"
    }
    fn newest_version(&self) -> u16 {
        if self.shared.is_some() { SHARED } else { WITH_WRITTEN }
    }
    fn version(&self) -> u16 {
        if self.shared.is_some() {
            SHARED
        } else if self.written.is_some() {
            WITH_WRITTEN
        } else {
            1
        }
    }
    fn become_version(&mut self, version: u16) {
        self.written = (version >= WITH_WRITTEN).then_some(0);
    }
    fn device_type(&self) -> u16 {
        2
    }
    fn class(&self) -> u32 {
        0x01_8000
    }
    fn features(&self) -> u64 {
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | if self.read_only { F_RO } else { 0 }
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 36];
        config[0..8].copy_from_slice(&self.sectors.to_le_bytes());
        config[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        let seg_max = if self.shared.is_some() { SHARED_SEG_MAX } else { SEG_MAX };
        config[12..16].copy_from_slice(&seg_max.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config
    }
    fn negotiated(&mut self, _features: u64) {}
    fn reset(&mut self) {
        self.in_flight.clear();
        if let Some(shared) = &mut self.shared {
            shared.waiting.clear();
        }
    }

    fn notify(&mut self, queue: usize, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        while let Some(chain) = queues.pop(cx, queue)? {
            // A driver that offers chains it has not got back yet could make this list grow for ever.
            if self.in_flight.len() + self.waiting() >= usize::from(QUEUE_SIZES[REQUESTS]) {
                return Err(Broken);
            }
            let status_address = status_address(&chain).ok_or(Broken)?;
            if let Some(waits) = self.waits(&chain, cx) {
                self.wait(waits, &chain, status_address, cx);
                continue;
            }
            let outcome = match self.execute(&chain, cx) {
                Ok(outcome) => outcome,
                Err(e) => {
                    queues.unpop(queue);
                    cx.fail(format!("disk: {e}"));
                    return Ok(());
                }
            };
            let (written, status) = match outcome {
                Ok(data) => (data + 1, STATUS_OK),
                Err(status) => (1, status),
            };
            let due_ns = cx.now_ns.saturating_add(LATENCY_NS);
            self.in_flight.push_back(Done { due_ns, head: chain.head, written, status, status_address });
        }
        queues.want_notify(cx, queue)
    }

    fn receive(&mut self, received: Received, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        match received {
            Received::DiskDone { request, data } => self.done(request, &data, queues, cx),
            _ => Ok(()),
        }
    }
    fn waits_for(&self) -> Vec<(u64, DiskWanted)> {
        let waiting = self.shared.iter().flat_map(|shared| &shared.waiting);
        waiting.map(|waiting| (waiting.request, waiting.wanted())).collect()
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.in_flight.front().map(|done| done.due_ns)
    }

    fn fire_due(&mut self, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        while let Some(done) = self.in_flight.pop_front_if(|done| done.due_ns <= cx.now_ns) {
            cx.ram.write_slice(&[done.status], GuestAddress(done.status_address)).map_err(|_| Broken)?;
            queues.push(cx, REQUESTS, done.head, done.written)?;
        }
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let in_flight: Vec<Done> = self.in_flight.iter().cloned().collect();
        match (&self.shared, self.written) {
            (Some(shared), written) => {
                let written = written.unwrap_or_default();
                Payload::encode("", SHARED, &(self.sectors, in_flight, written, shared.clone())).bytes
            }
            (None, Some(written)) => Payload::encode("", WITH_WRITTEN, &(self.sectors, in_flight, written)).bytes,
            (None, None) => Payload::encode("", 1, &(self.sectors, in_flight)).bytes,
        }
    }
    fn restore(&mut self, payload: &Payload, bytes: &[u8]) -> Result<(), RestoreError> {
        let mut shared = None;
        let (sectors, in_flight, written): (u64, Vec<Done>, _) = match (&self.shared, self.written) {
            (Some(_), _) => {
                let (sectors, in_flight, written, own): (u64, Vec<Done>, u64, Shared) = payload.decode_part(bytes)?;
                let waits = own.waiting.iter().all(|waiting| {
                    let good = |read: &WaitingRead| read.length <= MAX_SHARED_BYTES && read.pieces.len() <= 1 + SEG_MAX as usize;
                    waiting.request < own.requests && waiting.read.as_ref().is_none_or(good)
                });
                if !waits || own.waiting.len() > usize::from(QUEUE_SIZES[REQUESTS]) {
                    return Err(payload.invalid("impossible requests wait"));
                }
                shared = Some(own);
                (sectors, in_flight, Some(written))
            }
            (None, Some(_)) => {
                payload.decode_part(bytes).map(|(sectors, in_flight, written)| (sectors, in_flight, Some(written)))?
            }
            (None, None) => payload.decode_part(bytes).map(|(sectors, in_flight)| (sectors, in_flight, None))?,
        };
        if sectors != self.sectors {
            return Err(payload.invalid(format!("its disk has {sectors} sectors, this machine's {}", self.sectors)));
        }
        if in_flight.len() > usize::from(QUEUE_SIZES[REQUESTS]) || !in_flight.is_sorted_by_key(|done| done.due_ns) {
            return Err(payload.invalid("impossible requests are in flight"));
        }
        self.in_flight = in_flight.into();
        self.written = written;
        self.shared = shared;
        Ok(())
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
