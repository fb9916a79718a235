//! What several tests of this crate need: arbitrary entries, one entry of every kind, golden files.
#![allow(dead_code, reason = "every test file uses its own part of this")]
use proptest::prelude::*;
use std::path::PathBuf;
use twinstep_log::{EndReason, Entry, Event, OutputNote, OutputPort};
use twinstep_machine::{Input, Output};

/// Any input.
pub fn any_input() -> impl Strategy<Value = Input> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        (any::<u64>(), 0u32..64, any::<u32>(), 0u32..32).prop_map(|(time, time_shift, rate, rate_shift)| Input::Clock {
            advance_to_ns: time >> time_shift,
            picoseconds_per_instruction: rate >> rate_shift,
        }),
        (any::<u8>(), bytes()).prop_map(|(nic, frame)| Input::NetRx { nic, frame }),
        (any::<u8>(), bytes(), any::<u16>()).prop_map(|(nic, frame, segment_size)| Input::NetRxGso { nic, frame, segment_size }),
        (any::<u8>(), any::<u64>(), bytes()).prop_map(|(disk, request, data)| Input::DiskDone { disk, request, data }),
        bytes().prop_map(Input::Serial),
        bytes().prop_map(Input::Console),
        any::<[u8; 32]>().prop_map(Input::Seed),
        any::<u64>().prop_map(Input::WallClock),
        Just(Input::PowerButton),
    ]
}

/// Anything that can stand in the middle of a log.
pub fn any_event() -> impl Strategy<Value = Event> {
    let port = prop_oneof![
        any::<u8>().prop_map(OutputPort::Nic),
        (any::<u8>(), any::<u16>()).prop_map(|(nic, segment_size)| OutputPort::NicGso { nic, segment_size }),
        any::<u8>().prop_map(OutputPort::Disk),
        any::<u8>().prop_map(OutputPort::DiskFlush),
        Just(OutputPort::Serial),
        Just(OutputPort::Console),
    ];
    prop_oneof![
        4 => any_input().prop_map(Event::Input),
        1 => (port, any::<u32>(), any::<u128>())
            .prop_map(|(port, length, digest)| Event::Output(OutputNote { port, length, digest })),
        1 => prop::collection::vec(any::<u8>(), 0..200).prop_map(Event::Digest),
        1 => Just(Event::Progress),
    ]
}

/// Any reason for a log to end.
pub fn any_end() -> impl Strategy<Value = EndReason> {
    prop_oneof![
        Just(EndReason::PowerOff),
        Just(EndReason::Reset),
        Just(EndReason::Stopped),
        ".{0,50}".prop_map(EndReason::Failed),
    ]
}

/// A log: positions rise or stay, and it may or may not have its end.
pub fn any_log() -> impl Strategy<Value = Vec<Entry>> {
    let steps = prop::collection::vec((0u64..1 << 40, any_event()), 0..30);
    (any::<u32>(), steps, prop::option::of(any_end())).prop_map(|(start, steps, end)| {
        let mut position = u64::from(start);
        let mut log = Vec::new();
        for (step, event) in steps {
            position += step;
            log.push(Entry { position, event });
        }
        log.extend(end.map(|reason| Entry { position, event: Event::End { reason } }));
        log
    })
}

/// Entries of every kind and shape, with names for their golden files. Only ever add to this list.
pub fn samples() -> Vec<(&'static str, Event)> {
    let frame: Vec<u8> = (0..60).collect();
    let note = |output: Output| Event::Output(OutputNote::of(&output));
    vec![
        ("clock", Event::Input(Input::Clock { advance_to_ns: 1_234_567_890, picoseconds_per_instruction: 1000 })),
        ("clock-largest", Event::Input(Input::Clock { advance_to_ns: u64::MAX, picoseconds_per_instruction: u32::MAX })),
        ("clock-smallest", Event::Input(Input::Clock { advance_to_ns: 0, picoseconds_per_instruction: 0 })),
        ("net-rx", Event::Input(Input::NetRx { nic: 1, frame: frame.clone() })),
        ("net-rx-short", Event::Input(Input::NetRx { nic: 0, frame: frame[..31].to_vec() })),
        ("net-rx-gso", Event::Input(Input::NetRxGso { nic: 1, frame: frame.clone(), segment_size: 1448 })),
        ("serial", Event::Input(Input::Serial(b"root\r".to_vec()))),
        ("console", Event::Input(Input::Console(b"uname -a\n".to_vec()))),
        ("seed", Event::Input(Input::Seed(std::array::from_fn(|index| index as u8 * 3)))),
        ("wall-clock", Event::Input(Input::WallClock(1_795_000_000_000_000_000))),
        ("disk-done", Event::Input(Input::DiskDone { disk: 1, request: 7, data: vec![9; 24] })),
        ("power-button", Event::Input(Input::PowerButton)),
        ("output-net", note(Output::NetTx { nic: 2, frame: frame.clone() })),
        ("output-net-gso", note(Output::NetTxGso { nic: 2, frame, segment_size: 1448 })),
        ("output-disk-write", note(Output::DiskWrite { disk: 1, offset: 4096, data: vec![5; 512] })),
        ("output-disk-flush", note(Output::DiskFlush { disk: 1, request: 8 })),
        ("output-serial", note(Output::Serial(b"login: ".to_vec()))),
        ("output-console", note(Output::Console(vec![]))),
        ("digest", Event::Digest((0..100).collect())),
        ("progress", Event::Progress),
        ("end-power-off", Event::End { reason: EndReason::PowerOff }),
        ("end-reset", Event::End { reason: EndReason::Reset }),
        ("end-stopped", Event::End { reason: EndReason::Stopped }),
        ("end-failed", Event::End { reason: EndReason::Failed("triple fault at 0xfff0".into()) }),
    ]
}

/// Samples that came after the golden recording was made, which holds all the others.
const LATER: [&str; 5] = ["net-rx-gso", "output-net-gso", "disk-done", "output-disk-write", "output-disk-flush"];

/// A small log with something of everything the first recordings had.
pub fn sample_log(start: u64) -> Vec<Entry> {
    let middle = samples().into_iter().filter(|(name, event)| !matches!(event, Event::End { .. }) && !LATER.contains(name));
    let mut log: Vec<Entry> =
        middle.enumerate().map(|(index, (_, event))| Entry { position: start + index as u64 * 7, event }).collect();
    let position = start + 1000;
    log.push(Entry { position, event: Event::End { reason: EndReason::PowerOff } });
    log
}

/// Compares `bytes` with a golden file. With `TWINSTEP_GOLDEN=write` a missing file is written; one that exists never is,
/// because what a released version wrote must be readable for ever. Gives what the file holds.
pub fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "golden", name].iter().collect();
    if !path.exists() && std::env::var_os("TWINSTEP_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, bytes).unwrap();
    }
    let expected = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(expected == bytes, "{name}: the encoding changed\nexpected {expected:02x?}\nfound    {bytes:02x?}");
    expected
}
