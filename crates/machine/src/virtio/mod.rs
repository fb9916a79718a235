//! Virtio 1.2 devices behind the PCI transport.
//!
//! **In:** register accesses, doorbells, [`Received`] input, guest time. **Out:** outputs, interrupt messages, guest RAM. **Invariant:** all work on a queue
//! happens at the position of its doorbell (or input, or deadline), is bounded by the queue's size, and depends on guest RAM and device
//! state only. A queue that breaks the rules stops its own device (DEVICE_NEEDS_RESET) and nothing else.
//!
//! A device is one file that implements [`VirtioDevice`]; the transport (`transport.rs`) does everything that all devices share.
//! Reference: Virtual I/O Device (VIRTIO) 1.2; section numbers below are its own.
mod block;
mod chacha;
mod console;
mod net;
mod queues;
mod rng;
mod transport;

pub(crate) use block::Block;
pub(crate) use console::Console;
pub(crate) use net::Net;
pub(crate) use queues::{Broken, Chain, Queues};
pub(crate) use rng::Rng;
pub(crate) use transport::{BAR_LEN, VirtioPci};

use crate::apic::Message;
use crate::disk::DiskWanted;
use crate::door::Output;
use crate::memory::GuestRam;
use crate::payload::{Payload, RestoreError};
use std::fmt::Debug;
use twinstep_x86::Position;

/// Feature bits all devices share (section 6).
pub(crate) mod feature {
    /// Indirect descriptors.
    pub(crate) const INDIRECT: u64 = 1 << 28;
    /// Event indexes instead of flags.
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// What a device may touch while it works.
pub(crate) struct Cx<'a> {
    pub(crate) ram: &'a GuestRam,
    /// Position of whatever made the device work.
    pub(crate) position: Position,
    /// Guest time.
    pub(crate) now_ns: u64,
    pub(crate) outputs: &'a mut Vec<(Position, Output)>,
    /// Interrupt messages on their way to the local APIC.
    pub(crate) messages: &'a mut Vec<Message>,
    /// Set by [`Cx::fail`].
    pub(crate) failure: &'a mut Option<Failure>,
    /// A device waits for the host.
    pub(crate) asks: &'a mut bool,
}

/// The host could not do its part. The machine stops, and the work is done again, as of the same position, when it runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) position: Position,
    pub(crate) message: String,
}

impl Cx<'_> {
    /// The host could not do its part.
    pub(crate) fn fail(&mut self, message: String) {
        self.failure.get_or_insert(Failure { position: self.position, message });
    }
}

/// Something from outside for one device.
#[derive(Debug)]
pub(crate) enum Received {
    /// An Ethernet frame.
    Frame(Vec<u8>),
    /// Several as one ([`crate::Input::NetRxGso`]).
    LargeSegment {
        /// The whole.
        frame: Vec<u8>,
        /// The size of its pieces.
        segment_size: u16,
    },
    /// Typed bytes.
    Bytes(Vec<u8>),
    /// Entropy.
    Seed([u8; 32]),
    /// The host has done what a disk waited for.
    DiskDone {
        /// Which request.
        request: u64,
        /// What was read.
        data: Vec<u8>,
    },
}

/// One kind of device.
pub(crate) trait VirtioDevice: Debug + Send {
    /// Name of its payload without the number: `virtio-net`.
    fn kind(&self) -> &'static str;
    /// Newest version of its saved state.
    fn newest_version(&self) -> u16 {
        1
    }
    /// The version its state is saved in: the oldest that can hold it, so that a device of old goes on having the bytes, and the digests, it had.
    fn version(&self) -> u16 {
        1
    }
    /// A state saved in this version is about to be restored: offer the features of that version and no more, since the guest knows no others.
    fn become_version(&mut self, version: u16) {
        let _ = version;
    }
    /// Device type (section 5).
    fn device_type(&self) -> u16;
    /// PCI class, subclass and interface.
    fn class(&self) -> u32;
    /// Features beyond those the transport offers for all.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];
    /// The device-specific configuration.
    fn config(&self) -> Vec<u8>;
    /// The driver accepted `features`.
    fn negotiated(&mut self, features: u64);
    /// The driver resets the device: forget all work and negotiated features.
    fn reset(&mut self);
    /// The driver rang the doorbell of `queue`, or made the device ready (then called for every queue).
    fn notify(&mut self, queue: usize, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken>;
    /// Something from outside. Called also while the device is not ready; then without queues that are.
    fn receive(&mut self, received: Received, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        let _ = (received, queues, cx);
        Ok(())
    }
    /// What it waits for the host to do, oldest first: request number, what.
    fn waits_for(&self) -> Vec<(u64, DiskWanted)> {
        Vec::new()
    }
    /// Guest time of the next thing it does by itself.
    fn deadline_ns(&self) -> Option<u64> {
        None
    }
    /// Does what is due at `cx.now_ns`.
    fn fire_due(&mut self, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        let _ = (queues, cx);
        Ok(())
    }
    /// Its own part of the saved state.
    fn save(&self) -> Vec<u8>;
    /// Takes its own part of a saved state.
    fn restore(&mut self, payload: &Payload, bytes: &[u8]) -> Result<(), RestoreError>;
}

#[cfg(test)]
pub(crate) mod testing;
