//! The door of a machine: all that goes in, all that comes out.
//!
//! Guest time in nanoseconds is `base_ns + (position - base_position) * picoseconds_per_instruction / 1000`, where the last
//! [`Input::Clock`] set the base. The guest's TSC runs at 1 GHz and equals guest time.

/// Something the world does to the machine, at the current position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Pulls guest time toward real time. Guest time never goes back: an `advance_to_ns` in the past only changes the rate.
    Clock {
        /// Guest time is at least this from here on, in nanoseconds since power-on.
        advance_to_ns: u64,
        /// How fast guest time passes per retired instruction from here on.
        picoseconds_per_instruction: u32,
    },
    /// An Ethernet frame (without FCS) arrives at a network card.
    NetRx {
        /// Which card, from 0.
        nic: u8,
        /// Destination, source, type, payload.
        frame: Vec<u8>,
    },
    /// Several TCP segments arrive at a network card as one, their checksums verified: a large segment ([`crate::offload`]).
    NetRxGso {
        /// Which card, from 0.
        nic: u8,
        /// A whole TCP segment; its checksum is partial.
        frame: Vec<u8>,
        /// Bytes of payload each of them had, but for the last, which may have had less.
        segment_size: u16,
    },
    /// Bytes typed at the serial port.
    Serial(Vec<u8>),
    /// Bytes typed at the virtio console.
    Console(Vec<u8>),
    /// Seeds the machine's entropy source (virtio-rng). Given once at power-on, and again whenever the host likes.
    Seed([u8; 32]),
    /// Wall-clock time at guest time 0, in nanoseconds since 1970; given once at power-on.
    WallClock(u64),
    /// Somebody pressed the power button (ACPI).
    PowerButton,
    /// A request to a shared disk is done ([`crate::disk`]).
    DiskDone {
        /// Which disk, from 0.
        disk: u8,
        /// Which request.
        request: u64,
        /// What was read; nothing for a flush.
        data: Vec<u8>,
    },
}

/// Something the machine does to the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// An Ethernet frame leaves a network card.
    NetTx {
        /// Which card, from 0.
        nic: u8,
        /// Destination, source, type, payload.
        frame: Vec<u8>,
    },
    /// A large segment leaves a network card ([`crate::offload`]); the host cuts it where the network wants that.
    NetTxGso {
        /// Which card, from 0.
        nic: u8,
        /// A whole TCP segment; its checksum is partial.
        frame: Vec<u8>,
        /// Bytes of payload after cutting.
        segment_size: u16,
    },
    /// Bytes written to the serial port.
    Serial(Vec<u8>),
    /// Bytes written to the virtio console.
    Console(Vec<u8>),
    /// The guest writes to a shared disk ([`crate::disk`]).
    DiskWrite {
        /// Which disk, from 0.
        disk: u8,
        /// First byte; a multiple of 512.
        offset: u64,
        /// Whole sectors.
        data: Vec<u8>,
    },
    /// The guest waits until all its writes so far are on a shared disk's stable storage.
    DiskFlush {
        /// Which disk, from 0.
        disk: u8,
        /// The request, for [`Input::DiskDone`].
        request: u64,
    },
}
