//! A driver for tests: plays the guest's side of one virtio function, with queues in a little RAM of its own.
use super::*;
use crate::apic::Message;
use crate::memory;
use crate::payload::Payloads;
use twinstep_x86::PhysMem;
use vm_memory::{Bytes, GuestAddress};

const QUEUE_SIZE: u16 = 64;
const QUEUES: u64 = 0x10_0000;
const PER_QUEUE: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
const BUFFERS: u64 = 0x40_0000;
/// Offsets into the function's memory range.
const COMMON: u64 = 0;
const NOTIFY: u64 = 0x3000;
const MSIX: u64 = 0x4000;
/// Configuration offset of the MSI-X capability's control word.
const MSIX_CONTROL: usize = 0x42;
/// Vectors 0x40, 0x41, ... in table order; the last entry is for configuration changes.
const FIRST_VECTOR: u8 = 0x40;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A chain the driver added.
pub(crate) struct Added {
    pub(crate) head: u16,
    pub(crate) writable: Vec<u64>,
}

/// The driver.
pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    _phys: PhysMem,
    pub(crate) pci: VirtioPci,
    pub(crate) now_ns: u64,
    pub(crate) failure: Option<Failure>,
    pub(crate) asks: bool,
    outputs: Vec<(Position, Output)>,
    messages: Vec<Message>,
    features: u64,
    next_descriptor: Vec<u16>,
    next_buffer: u64,
    seen_used: Vec<u16>,
}

impl Driver {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let (ram, phys) = memory::map(64).unwrap();
        let queues = device.queue_sizes().len();
        Self {
            ram,
            _phys: phys,
            pci: VirtioPci::new(device, 0),
            now_ns: 0,
            failure: None,
            asks: false,
            outputs: Vec::new(),
            messages: Vec::new(),
            features: 0,
            next_descriptor: vec![0; queues],
            next_buffer: BUFFERS,
            seen_used: vec![0; queues],
        }
    }

    /// Runs `f` on the function.
    pub(crate) fn with<T>(&mut self, f: impl FnOnce(&mut VirtioPci, &mut Cx) -> T) -> T {
        let mut cx = Cx {
            ram: &self.ram,
            position: 7,
            now_ns: self.now_ns,
            outputs: &mut self.outputs,
            messages: &mut self.messages,
            failure: &mut self.failure,
            asks: &mut self.asks,
        };
        f(&mut self.pci, &mut cx)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.with(|pci, cx| pci.write_bar(cx, offset, data));
    }
    pub(crate) fn get(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.with(|pci, cx| pci.read_bar(cx, offset, &mut data[..len]));
        u64::from_le_bytes(data)
    }
    pub(crate) fn config(&mut self, offset: usize, len: usize) -> u64 {
        let mut data = [0; 8];
        self.with(|pci, cx| pci.read_config(cx, offset, &mut data[..len]));
        u64::from_le_bytes(data)
    }
    pub(crate) fn set_config(&mut self, offset: usize, data: &[u8]) {
        self.with(|pci, cx| pci.write_config(cx, offset, data));
    }
    pub(crate) fn status(&mut self) -> u8 {
        self.get(COMMON + 0x14, 1) as u8
    }

    /// All features the device offers.
    pub(crate) fn offered(&mut self) -> u64 {
        self.write(0, &0u32.to_le_bytes());
        let low = self.get(4, 4);
        self.write(0, &1u32.to_le_bytes());
        low | self.get(4, 4) << 32
    }

    /// Resets the device and brings it up with `features` (VERSION_1 is added) and MSI-X.
    pub(crate) fn start(&mut self, features: u64) {
        self.features = features | feature::VERSION_1;
        self.write(0x14, &[0]);
        self.write(0x14, &[3]);
        for half in 0..2u32 {
            self.write(0x08, &half.to_le_bytes());
            self.write(0x0c, &((self.features >> (half * 32)) as u32).to_le_bytes());
        }
        self.write(0x14, &[0xb]);
        assert_eq!(self.status(), 0xb, "features refused");
        self.set_config(MSIX_CONTROL, &0x8000u16.to_le_bytes());
        let queues = self.next_descriptor.len() as u64;
        for entry in 0..=queues {
            self.write(MSIX + entry * 16, &0xfee0_0000u64.to_le_bytes());
            self.write(MSIX + entry * 16 + 8, &(u64::from(FIRST_VECTOR) + entry).to_le_bytes());
        }
        self.write(0x10, &(queues as u16).to_le_bytes());
        for queue in 0..queues {
            let base = QUEUES + queue * PER_QUEUE;
            for page in 0..PER_QUEUE / 4096 {
                self.ram.write_slice(&[0; 4096], GuestAddress(base + page * 4096)).unwrap();
            }
            self.write(0x16, &(queue as u16).to_le_bytes());
            self.write(0x18, &QUEUE_SIZE.to_le_bytes());
            self.write(0x1a, &(queue as u16).to_le_bytes());
            self.write(0x20, &base.to_le_bytes());
            self.write(0x28, &(base + AVAIL).to_le_bytes());
            self.write(0x30, &(base + USED).to_le_bytes());
            self.write(0x1c, &1u16.to_le_bytes());
        }
        self.next_descriptor.fill(0);
        self.seen_used.fill(0);
        self.write(0x14, &[0xf]);
    }

    pub(crate) fn vector(&self, queue: u8) -> u8 {
        FIRST_VECTOR + queue
    }
    pub(crate) fn config_vector(&self) -> u8 {
        FIRST_VECTOR + self.next_descriptor.len() as u8
    }

    fn descriptor(&mut self, queue: u64, index: u16, piece: (u64, u32, bool), next: Option<u16>) {
        let flags = if piece.2 { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&piece.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&piece.1.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
        self.ram.write_slice(&bytes, GuestAddress(QUEUES + queue * PER_QUEUE + u64::from(index) * 16)).unwrap();
    }

    /// Makes `head` available.
    pub(crate) fn offer(&mut self, queue: u64, head: u16) {
        let avail = QUEUES + queue * PER_QUEUE + AVAIL;
        let index: u16 = self.ram.read_obj(GuestAddress(avail + 2)).unwrap();
        self.ram.write_obj(head, GuestAddress(avail + 4 + u64::from(index % QUEUE_SIZE) * 2)).unwrap();
        self.ram.write_obj(index.wrapping_add(1), GuestAddress(avail + 2)).unwrap();
    }

    /// Adds a chain of arbitrary pieces (address, length, writable). Returns its head.
    pub(crate) fn add_raw(&mut self, queue: u64, pieces: &[(u64, u32, bool)]) -> u16 {
        let first = self.next_descriptor[queue as usize];
        for (i, &piece) in (0u16..).zip(pieces) {
            let index = (first + i) % QUEUE_SIZE;
            let next = (usize::from(i) + 1 < pieces.len()).then_some((index + 1) % QUEUE_SIZE);
            self.descriptor(queue, index, piece, next);
        }
        self.next_descriptor[queue as usize] = (first + pieces.len() as u16) % QUEUE_SIZE;
        self.offer(queue, first);
        first
    }

    /// Adds a chain with contents to read and room to write.
    pub(crate) fn add(&mut self, queue: u64, readable: &[&[u8]], writable: &[u32]) -> Added {
        let mut pieces = Vec::new();
        for bytes in readable {
            self.ram.write_slice(bytes, GuestAddress(self.next_buffer)).unwrap();
            pieces.push((self.next_buffer, bytes.len() as u32, false));
            self.next_buffer += bytes.len() as u64;
        }
        let mut addresses = Vec::new();
        for &len in writable {
            addresses.push(self.next_buffer);
            pieces.push((self.next_buffer, len, true));
            self.next_buffer += u64::from(len);
        }
        Added { head: self.add_raw(queue, &pieces), writable: addresses }
    }

    pub(crate) fn kick(&mut self, queue: u16) {
        self.write(NOTIFY + u64::from(queue) * 4, &queue.to_le_bytes());
    }
    pub(crate) fn receive(&mut self, received: Received) {
        self.with(|pci, cx| pci.receive(cx, received));
    }
    pub(crate) fn fire(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.with(|pci, cx| pci.fire_due(cx));
    }
    pub(crate) fn retry(&mut self) {
        self.failure = None;
        self.with(|pci, cx| pci.retry(cx));
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
    /// Chains given back since the last call: (head, bytes written).
    pub(crate) fn used(&mut self, queue: u64) -> Vec<(u16, u32)> {
        let used = QUEUES + queue * PER_QUEUE + USED;
        let index: u16 = self.ram.read_obj(GuestAddress(used + 2)).unwrap();
        let mut out = Vec::new();
        while self.seen_used[queue as usize] != index {
            let at = used + 4 + u64::from(self.seen_used[queue as usize] % QUEUE_SIZE) * 8;
            let head: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
            out.push((head as u16, self.ram.read_obj(GuestAddress(at + 4)).unwrap()));
            self.seen_used[queue as usize] = self.seen_used[queue as usize].wrapping_add(1);
        }
        out
    }
    /// Sets the used_event word: interrupt me when this many were given back.
    pub(crate) fn set_used_event(&mut self, queue: u64, value: u16) {
        let avail = QUEUES + queue * PER_QUEUE + AVAIL;
        self.ram.write_obj(value, GuestAddress(avail + 4 + u64::from(QUEUE_SIZE) * 2)).unwrap();
    }
    /// The avail_event word: tell me when this one is offered.
    pub(crate) fn avail_event(&mut self, queue: u64) -> u16 {
        let used = QUEUES + queue * PER_QUEUE + USED;
        self.ram.read_obj(GuestAddress(used + 4 + u64::from(QUEUE_SIZE) * 8)).unwrap()
    }
    /// Flags word of the available ring: 1 asks for silence.
    pub(crate) fn set_avail_flags(&mut self, queue: u64, value: u16) {
        self.ram.write_obj(value, GuestAddress(QUEUES + queue * PER_QUEUE + AVAIL)).unwrap();
    }
    /// Sets the index of the available ring.
    pub(crate) fn set_avail_index(&mut self, queue: u64, value: u16) {
        self.ram.write_obj(value, GuestAddress(QUEUES + queue * PER_QUEUE + AVAIL + 2)).unwrap();
    }

    /// Interrupts since the last call.
    pub(crate) fn interrupts(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.messages).into_iter().map(|m| m.vector).collect()
    }
    /// Outputs since the last call.
    pub(crate) fn outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs).into_iter().map(|(_, output)| output).collect()
    }

    /// What was saved, restored into `fresh`, saves alike.
    pub(crate) fn check_save(&mut self, fresh: Box<dyn VirtioDevice>) {
        let saved = self.pci.save();
        let mut other = VirtioPci::new(fresh, 0);
        other.restore(&mut Payloads::new(vec![saved.clone()]).unwrap()).unwrap();
        assert_eq!(other.save(), saved);
    }

    /// The same, and no prefix of it restores. Goes on with what was restored.
    pub(crate) fn check_save_restore(&mut self, fresh: Box<dyn VirtioDevice>) {
        let saved = self.pci.save();
        let mut other = VirtioPci::new(fresh, 0);
        for len in 0..saved.bytes.len() {
            let cut = Payload { bytes: saved.bytes[..len].to_vec(), ..saved.clone() };
            assert!(other.restore(&mut Payloads::new(vec![cut]).unwrap()).is_err());
        }
        other.restore(&mut Payloads::new(vec![saved.clone()]).unwrap()).unwrap();
        assert_eq!(other.save(), saved);
        self.pci = other;
    }
}
