//! What the tests of both state machines share: identities, configurations, frames.

use crate::config::{Commit, Config, OnMismatch};
use crate::types::{Epoch, Nanos, OwnerId, Record, VmId};
use crate::wire::{Decoder, Expectation, Hello, HelloReply, HostIdentity, MAX_VERSION, MIN_VERSION, Message, VmIdentity, encode};
use crate::{PrimaryEvent, PrimarySetup, SecondarySetup};

pub(crate) const VM: VmId = VmId([1; 16]);
pub(crate) const PRIMARY: OwnerId = OwnerId([2; 16]);
pub(crate) const SECONDARY: OwnerId = OwnerId([3; 16]);

pub(crate) fn millis(millis: u64) -> Nanos {
    Nanos::from_millis(millis)
}

pub(crate) fn config() -> Config {
    Config { max_unacked_bytes: 1_000, max_unreplayed_bytes: 2_000, max_replay_lag: 1_000, ..Config::default() }
}

pub(crate) fn host() -> HostIdentity {
    HostIdentity { build: "test".to_owned(), engine: "toy".to_owned(), cpu_vendor: "GenuineIntel".to_owned(), cpu_family: 6 }
}

pub(crate) fn vm() -> VmIdentity {
    VmIdentity { vm: VM, name: "db".to_owned(), cpu_model: "x86-64-v2".to_owned(), ram_bytes: 4096 }
}

pub(crate) fn primary_setup() -> PrimarySetup {
    PrimarySetup { config: config(), vm: vm(), host: host(), owner: PRIMARY, epoch: Epoch::FIRST, last_output: 0, last_left: 0 }
}

pub(crate) fn secondary_setup() -> SecondarySetup {
    SecondarySetup { config: config(), host: host(), owner: SECONDARY, expect: Expectation::default(), beats: None }
}

pub(crate) fn hello() -> Hello {
    Hello {
        min_version: MIN_VERSION,
        max_version: MAX_VERSION,
        vm: vm(),
        epoch: Epoch::FIRST,
        commit: Commit::Received,
        on_mismatch: OnMismatch::Primary,
        owner: PRIMARY,
        host: host(),
        standbys: vec!["there:7171".to_owned(), "elsewhere:7171".to_owned()],
    }
}

pub(crate) fn reply() -> HelloReply {
    HelloReply { version: MAX_VERSION, vm: VM, epoch: Epoch::FIRST, owner: SECONDARY, host: host(), beats: None }
}

/// A connection to that standby was made.
pub(crate) fn connected() -> PrimaryEvent {
    PrimaryEvent::PeerConnected { standbys: hello().standbys }
}

pub(crate) fn record(position: u64, length: usize) -> Record {
    Record { position, kind: 1, bytes: vec![7; length] }
}

pub(crate) fn frame(message: &Message) -> Vec<u8> {
    encode(message)
}

/// The messages in bytes that were sent.
pub(crate) fn messages(bytes: &[u8]) -> Vec<Message> {
    let mut decoder = Decoder::new();
    decoder.greeted();
    decoder.push(bytes);
    let mut found = Vec::new();
    while let Some(message) = decoder.next_message().expect("what is sent is sound") {
        found.push(message);
    }
    found
}
