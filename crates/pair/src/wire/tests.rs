//! The codec: goldens of released bytes, round trips in pieces of any size, and garbage of every kind.

use proptest::prelude::*;

use super::*;
use crate::config::{Commit, OnMismatch};
use crate::types::{Epoch, OwnerId, VmId};

fn host() -> HostIdentity {
    HostIdentity {
        build: "twinstep 0.1.0".to_owned(),
        engine: "x86 1".to_owned(),
        cpu_vendor: "GenuineIntel".to_owned(),
        cpu_family: 6,
    }
}

fn hello() -> Hello {
    Hello {
        min_version: MIN_VERSION,
        max_version: MAX_VERSION,
        vm: VmIdentity { vm: VmId([0x11; 16]), name: "db".to_owned(), cpu_model: "x86-64-v2".to_owned(), ram_bytes: 1 << 28 },
        epoch: Epoch(3),
        commit: Commit::Matched,
        on_mismatch: OnMismatch::Stop,
        owner: OwnerId([0x22; 16]),
        host: host(),
        standbys: vec!["there:7171".to_owned(), "elsewhere:7171".to_owned()],
    }
}

fn reply() -> HelloReply {
    HelloReply {
        version: MAX_VERSION,
        vm: VmId([0x11; 16]),
        epoch: Epoch(3),
        owner: OwnerId([0x33; 16]),
        host: host(),
        beats: Some("10.0.0.2:7171".to_owned()),
    }
}

fn record(position: u64, kind: u8, bytes: &[u8]) -> Record {
    Record { position, kind, bytes: bytes.to_vec() }
}

/// One message of each kind, in the order of the kinds.
fn one_of_each() -> Vec<Message> {
    vec![
        Message::Hello(hello()),
        Message::HelloReply(reply()),
        Message::Refuse { reason: "another build".to_owned() },
        Message::ImageChunk(vec![1, 2, 3]),
        Message::ImageEnd { position: 5, total_bytes: 3 },
        Message::ImageReady { position: 5 },
        Message::ProtectionStart { last_seq: 2 },
        Message::Log { first_seq: 3, records: vec![record(6, 1, b"ab"), record(7, 2, b"")] },
        Message::Ack(Ack {
            received_seq: 4,
            replayed_seq: 3,
            replayed_position: 6,
            image_bytes: 3,
            matched: 8,
            agreed_position: 2,
        }),
        Message::Released { up_to: 9 },
        Message::Heartbeat { time: Nanos(10), position: 7, echo: Nanos(9) },
        Message::Goodbye { reason: "over".to_owned() },
        Message::Changed(vec![4, 5]),
        Message::Mismatch { output: 9, position: 8, detail: vec![6] },
        Message::HandOver { reason: "maintenance".to_owned() },
        Message::CopyReport(vec![6, 7]),
        Message::StandStill { position: 11 },
        Message::Listed,
        Message::Lookahead { position: 300 },
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decoder() -> Decoder {
    let mut decoder = Decoder::new();
    decoder.greeted();
    decoder
}

fn decode_all(decoder: &mut Decoder) -> Result<Vec<Message>, WireError> {
    let mut messages = Vec::new();
    while let Some(message) = decoder.next_message()? {
        messages.push(message);
    }
    Ok(messages)
}

fn decode_one(frame: &[u8]) -> Result<Option<Message>, WireError> {
    let mut decoder = decoder();
    decoder.push(frame);
    decoder.next_message()
}

fn header_bytes(frame: &[u8]) -> usize {
    if frame[0] == MAGIC[0] { HEADER_BYTES } else { SHORT_HEADER_BYTES }
}

/// The frame with another payload, checksums made right again.
fn with_payload(frame: &[u8], payload: &[u8]) -> Vec<u8> {
    let header_bytes = header_bytes(frame);
    let mut frame = [&frame[..header_bytes], payload].concat();
    let (length, crc) = (payload.len() as u32, crc32fast::hash(payload).to_le_bytes());
    if header_bytes == HEADER_BYTES {
        frame[8..12].copy_from_slice(&length.to_le_bytes());
        frame[12..16].copy_from_slice(&crc);
    } else {
        frame[1..4].copy_from_slice(&length.to_le_bytes()[..3]);
        frame[6..10].copy_from_slice(&crc);
    }
    fix_header(&mut frame);
    frame
}

fn fix_header(frame: &mut [u8]) {
    if header_bytes(frame) == HEADER_BYTES {
        let crc = crc32fast::hash(&frame[..28]);
        frame[28..32].copy_from_slice(&crc.to_le_bytes());
    } else {
        let check = crc32fast::hash(&frame[..4]) as u16;
        frame[4..6].copy_from_slice(&check.to_le_bytes());
    }
}

#[test]
fn every_kind_is_here_once() {
    let kinds: Vec<Kind> = one_of_each().iter().map(Message::kind).collect();
    assert_eq!(kinds, Kind::ALL);
}

/// The bytes of version 5, for ever. If this fails, the change needs a new version and not a new golden.
#[test]
fn version_5_has_these_bytes() {
    let text: String = one_of_each().iter().map(|message| hex(&encode(message)) + "\n").collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/wire/golden-5.txt");
    if std::env::var_os("TWINSTEP_WRITE_GOLDENS").is_some() {
        std::fs::write(path, &text).expect("the golden file can be written");
    }
    assert_eq!(text, include_str!("golden-5.txt"));
}

#[test]
fn the_golden_bytes_still_decode() {
    let bytes: Vec<u8> = include_str!("golden-5.txt")
        .lines()
        .flat_map(|line| (0..line.len()).step_by(2).map(move |at| u8::from_str_radix(&line[at..at + 2], 16).unwrap()))
        .collect();
    let mut decoder = decoder();
    decoder.push(&bytes);
    assert_eq!(decode_all(&mut decoder).unwrap(), one_of_each());
}

#[test]
fn other_protocols_are_told_apart_at_once() {
    let mut decoder = Decoder::new();
    decoder.push(b"GET / HTTP/1.1\r\nHost: standby:7700\r\n\r\n");
    let error = decoder.next_message().unwrap_err();
    assert_eq!(error, WireError::Magic { found: *b"GET " });
    assert!(error.to_string().contains("not a Twinstep logging channel"), "{error}");
    decoder.push(&encode(&Message::Hello(hello())));
    assert_eq!(decoder.next_message(), Err(error), "after an error there is nothing more to be had");
}

#[test]
fn the_greeting_comes_first() {
    let mut decoder = Decoder::new();
    decoder.push(&encode(&Message::Hello(hello())));
    assert_eq!(decoder.next_message(), Ok(Some(Message::Hello(hello()))));
    decoder.push(&encode(&Message::Heartbeat { time: Nanos(1 << 60), position: 1 << 60, echo: Nanos(0) }));
    decoder.push(&encode(&Message::ImageChunk(vec![0; 100])));
    assert!(matches!(decoder.next_message(), Err(WireError::Magic { .. })));
    // A refusal may come when the other side believes the greeting to be over.
    let refuse = Message::Refuse { reason: "no".to_owned() };
    assert_eq!(decode_one(&encode(&refuse)), Ok(Some(refuse)));
}

#[test]
fn each_broken_rule_of_a_header_has_its_error() {
    let broken = |message: &Message, at: usize, value: u8| {
        let mut frame = encode(message);
        frame[at] = value;
        fix_header(&mut frame);
        decode_one(&frame).unwrap_err()
    };
    let (released, kind) = (Message::Released { up_to: 1 }, Kind::Released);
    assert_eq!(broken(&released, 0, 99), WireError::UnknownKind(99));
    assert_eq!(broken(&released, 3, 0xff), WireError::TooLong { kind, length_bytes: (0xff << 16) + 1 });
    let problem = "a greeting has another header";
    assert_eq!(broken(&released, 0, 3), WireError::Payload { kind: Kind::Refuse, problem });
    let (refuse, kind) = (Message::Refuse { reason: "no".to_owned() }, Kind::Refuse);
    assert_eq!(broken(&refuse, 4, 1), WireError::Version { kind, found: 1, expected: 0 });
    assert_eq!(broken(&refuse, 6, 99), WireError::UnknownKind(99));
    assert_eq!(broken(&refuse, 11, 1), WireError::TooLong { kind, length_bytes: 2 + (1 << 24) });
    assert_eq!(broken(&refuse, 20, 1), WireError::Reserved { kind });
    assert!(matches!(broken(&refuse, 6, Kind::Log as u8), WireError::Payload { kind: Kind::Log, .. }));
}

#[test]
fn each_flipped_bit_is_noticed() {
    for message in one_of_each() {
        let frame = encode(&message);
        for bit in 0..frame.len() * 8 {
            let mut flipped = frame.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_one(&flipped).is_err(), "bit {bit} of {:?}", message.kind());
        }
    }
}

#[test]
fn a_cut_frame_is_no_message_and_no_error() {
    for message in one_of_each() {
        let frame = encode(&message);
        for length in 0..frame.len() {
            assert_eq!(decode_one(&frame[..length]), Ok(None));
        }
    }
}

#[test]
fn payloads_with_right_checksums_and_no_sense_are_refused() {
    let log = encode(&Message::Log { first_seq: 3, records: vec![record(6, 1, b"ab")] });
    let refused = |payload: &[u8]| decode_one(&with_payload(&log, payload)).unwrap_err().to_string();
    assert_eq!(log[SHORT_HEADER_BYTES..], [3, 1, 6, 2, b'a', b'b']);
    assert!(refused(&[0, 1, 6, 2, b'a', b'b']).contains("can't have such numbers"));
    assert!(refused(&[3]).contains("no records"));
    assert!(refused(&[3, 1]).contains("a number is cut off"));
    assert!(refused(&[3, 1, 6, 3, b'a', b'b']).contains("a record is cut off"));
    assert!(refused(&[3, 1, 6, 1, b'a', b'b']).contains("a number is cut off"));
    assert!(refused(&[3, 1, 0x86, 0, 2, b'a', b'b']).contains("longer than it need be"));
    assert!(refused(&[3, 1, 6, 0x81, 0x80, 0x40, b'a', b'b']).contains("a record is too long"));
    let ack = encode(&Message::Ack(Ack::default()));
    assert!(decode_one(&with_payload(&ack, &[0; 7])).unwrap_err().to_string().contains("left over"));
    let refuse = encode(&Message::Refuse { reason: String::new() });
    assert!(decode_one(&with_payload(&refuse, &[0xff])).unwrap_err().to_string().contains("UTF-8"));
    let chunk = encode(&Message::ImageChunk(vec![1]));
    assert!(decode_one(&with_payload(&chunk, &[])).unwrap_err().to_string().contains("empty"));
    let greeting = encode(&Message::Hello(hello()));
    let longer = [&greeting[HEADER_BYTES..], &[0]].concat();
    assert!(decode_one(&with_payload(&greeting, &longer)).unwrap_err().to_string().contains("left over"));
    for message in
        one_of_each().into_iter().filter(|message| !matches!(message.kind(), Kind::ImageChunk | Kind::Changed | Kind::CopyReport))
    {
        let frame = encode(&message);
        let may = matches!(message.kind(), Kind::Refuse | Kind::Goodbye | Kind::HandOver | Kind::Listed);
        assert_eq!(decode_one(&with_payload(&frame, &[])).is_ok(), may, "an empty {:?}", message.kind());
    }
}

#[test]
fn a_long_reason_is_cut_at_a_character() {
    let frame = encode(&Message::Goodbye { reason: "ä".repeat(2_000) });
    let Ok(Some(Message::Goodbye { reason })) = decode_one(&frame) else { panic!("it decodes") };
    assert_eq!(reason, "ä".repeat(512));
}

#[test]
fn unknown_fields_of_a_newer_greeting_are_ignored() {
    let frame = encode(&Message::Hello(hello()));
    let mut payload = frame[HEADER_BYTES..].to_vec();
    assert_eq!(payload[0], 0xaf, "a map of fifteen fields");
    payload[0] = 0xb0;
    payload.extend([0x18, 0x63, 0x01]); // Field 99 is 1.
    assert_eq!(decode_one(&with_payload(&frame, &payload)), Ok(Some(Message::Hello(hello()))));
}

#[test]
fn a_vms_name_is_plain() {
    let with_name = |name: &str| {
        let mut hello = hello();
        hello.vm.name = name.to_owned();
        decode_one(&encode(&Message::Hello(hello)))
    };
    assert!(with_name("vm-7_a.b").is_ok());
    let long = "x".repeat(MAX_NAME_BYTES + 1);
    for name in ["", ".hidden", "a b", "a/b", "\u{1b}[2J", "ä", &long] {
        let problem = "its VM's name is none";
        assert_eq!(with_name(name), Err(WireError::Payload { kind: Kind::Hello, problem }), "{name:?}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let other = HostIdentity { build: "twinstep 0.2.0".to_owned(), cpu_vendor: "AuthenticAMD".to_owned(), ..host() };
    let found = host().differences(&other);
    assert_eq!(found.len(), 2);
    assert!(found[0].contains("twinstep 0.1.0") && found[0].contains("twinstep 0.2.0"), "{found:?}");
    assert!(found[1].contains("GenuineIntel") && found[1].contains("AuthenticAMD"), "{found:?}");
    assert!(host().differences(&host()).is_empty());
    let expect = Expectation {
        ram_bytes: Some(1),
        cpu_model: Some("v3".to_owned()),
        vm: Some(VmId([9; 16])),
        names: vec!["web".to_owned(), "mail".to_owned()],
    };
    let found = expect.differences(&hello().vm);
    assert_eq!(found.len(), 4);
    assert!(found[1].contains("web or mail") && found[1].contains("\"db\""), "{found:?}");
    let names = vec!["web".to_owned(), "db".to_owned()];
    assert!(Expectation { names, ..Expectation::default() }.differences(&hello().vm).is_empty());
    assert!(Expectation::default().differences(&hello().vm).is_empty());
}

#[test]
fn versions_are_negotiated() {
    let offer = |min_version, max_version| greeting_version(&Hello { min_version, max_version, ..hello() });
    assert_eq!(offer(MIN_VERSION, MAX_VERSION), Ok(MAX_VERSION));
    assert_eq!(offer(0, 7), Ok(MAX_VERSION));
    assert!(offer(6, 7).unwrap_err().contains("6 to 7"));
    assert!(offer(1, 1).is_err());
}

fn any_record() -> impl Strategy<Value = Record> {
    (any::<u64>(), any::<u8>(), proptest::collection::vec(any::<u8>(), 0..200)).prop_map(|(position, kind, bytes)| Record {
        position,
        kind,
        bytes,
    })
}

fn any_message() -> impl Strategy<Value = Message> {
    let numbers = any::<[u64; 6]>();
    prop_oneof![
        proptest::sample::select(one_of_each()),
        ".{0,100}".prop_map(|reason| Message::Refuse { reason }),
        proptest::collection::vec(any::<u8>(), 1..300).prop_map(Message::ImageChunk),
        (1..u64::MAX / 2, proptest::collection::vec(any_record(), 1..10))
            .prop_map(|(first_seq, records)| Message::Log { first_seq, records }),
        numbers.prop_map(|[received_seq, replayed_seq, replayed_position, image_bytes, matched, agreed_position]| {
            Message::Ack(Ack { received_seq, replayed_seq, replayed_position, image_bytes, matched, agreed_position })
        }),
        numbers.prop_map(|[time, position, echo, ..]| Message::Heartbeat { time: Nanos(time), position, echo: Nanos(echo) }),
    ]
}

proptest! {
    #[test]
    fn what_was_encoded_decodes_in_pieces_of_any_size(
        messages in proptest::collection::vec(any_message(), 1..8),
        pieces in proptest::collection::vec(1_usize..90, 1..20),
    ) {
        let bytes: Vec<u8> = messages.iter().flat_map(encode).collect();
        let (mut decoder, mut decoded, mut rest) = (decoder(), Vec::new(), &bytes[..]);
        for length in pieces.iter().cycle() {
            let (piece, after) = rest.split_at(rest.len().min(*length));
            decoder.push(piece);
            decoded.extend(decode_all(&mut decoder).unwrap());
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(decoded, messages);
    }

    #[test]
    fn arbitrary_bytes_end_in_an_error_or_wait(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut decoder = decoder();
        decoder.push(&bytes);
        let result = decode_all(&mut decoder);
        // It may be the beginning of a frame, by a chance of one in some thousands.
        prop_assert!(result.is_ok_and(|messages| messages.is_empty()) || bytes.len() >= SHORT_HEADER_BYTES);
    }

    #[test]
    fn arbitrary_payloads_never_panic(kind in 0_usize..17, payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        let frame = encode(&one_of_each()[kind]);
        let _ = decode_one(&with_payload(&frame, &payload));
    }

    #[test]
    fn damaged_payloads_with_right_checksums_never_panic(
        kind in 0_usize..17,
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..5),
    ) {
        let frame = encode(&one_of_each()[kind]);
        let mut payload = frame[header_bytes(&frame)..].to_vec();
        for (at, value) in damage {
            let length = payload.len();
            payload[at % length] = value;
        }
        let _ = decode_one(&with_payload(&frame, &payload));
    }
}
