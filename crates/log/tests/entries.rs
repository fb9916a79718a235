//! Entries and streams of them: round trips, goldens, damage of every kind.
mod common;
use common::*;
use proptest::prelude::*;
use twinstep_log::{DecodeError, Decoder, Entry, EntryKind, Event, Fault, encode_into, encoded_length};
use twinstep_machine::Input;

fn encode(log: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in log {
        let length = encode_into(entry, &mut bytes).unwrap();
        assert_eq!(length, encoded_length(entry));
    }
    bytes
}

/// Decodes `bytes` given in pieces of these sizes (again and again), and what ended it, if anything did.
fn decode(bytes: &[u8], pieces: &[usize]) -> (Vec<Entry>, Option<DecodeError>, Decoder) {
    let mut decoder = Decoder::new();
    let mut entries = Vec::new();
    let mut rest = bytes;
    let mut sizes = pieces.iter().cycle();
    loop {
        loop {
            match decoder.pop() {
                Ok(Some(entry)) => entries.push(entry),
                Ok(None) => break,
                Err(error) => return (entries, Some(error), decoder),
            }
        }
        if rest.is_empty() {
            return (entries, None, decoder);
        }
        let size = (*sizes.next().unwrap()).clamp(1, rest.len());
        let taken = decoder.push(&rest[..size]);
        assert!(taken > 0, "after pop gave nothing there is room");
        assert!(decoder.pending() <= Decoder::CAPACITY);
        rest = &rest[taken..];
    }
}

#[test]
fn goldens() {
    for (name, event) in samples() {
        let entry = Entry { position: 0x0102_0304_0506_0708, event };
        let bytes = encode(std::slice::from_ref(&entry));
        let golden = golden(&format!("entry-{name}.bin"), &bytes);
        assert_eq!(decode(&golden, &[usize::MAX]).0, [entry]);
    }
    let sampled: std::collections::BTreeSet<EntryKind> = samples().iter().map(|(_, event)| event.kind()).collect();
    assert_eq!(sampled.len(), EntryKind::ALL.len(), "every kind has a golden");
}

#[test]
fn every_cut_is_incomplete_and_every_flip_is_found() {
    let log = sample_log(1 << 33);
    let bytes = encode(&log);
    let mut ends = vec![0];
    ends.extend(log.iter().scan(0, |end, entry| {
        *end += encoded_length(entry);
        Some(*end)
    }));
    for cut in 0..bytes.len() {
        let (entries, error, decoder) = decode(&bytes[..cut], &[13]);
        assert_eq!(error, None, "cut at {cut}");
        let whole = ends.iter().rposition(|end| *end <= cut).unwrap();
        assert_eq!(entries, log[..whole], "cut at {cut}");
        assert_eq!(decoder.pending(), cut - ends[whole]);
        assert_eq!(decoder.offset(), ends[whole] as u64);
        assert!(!decoder.ended());
    }
    for place in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[place] ^= 1 << bit;
            let (entries, error, decoder) = decode(&bad, &[4096]);
            let hit = ends.iter().rposition(|end| *end <= place).unwrap();
            assert_eq!(entries, log[..hit], "flip of bit {bit} at {place}");
            match error {
                Some(error) => {
                    assert_eq!((error.offset, error.entry), (ends[hit] as u64, hit as u64));
                    assert!(matches!(error.fault, Fault::Check { .. } | Fault::EndCheck { .. }), "{error}");
                }
                // A length that grew can only ask for more bytes within the part the header's check covers.
                None => assert!(decoder.pending() > 0 && decoder.pending() < 48, "flip of bit {bit} at {place}"),
            }
        }
    }
}

#[test]
fn nothing_goes_back_and_nothing_follows_the_end() {
    let at = |position| Entry { position, event: Event::Progress };
    let bytes = encode(&[at(5), at(5), at(4)]);
    let (entries, error, mut decoder) = decode(&bytes, &[1]);
    assert_eq!(entries.len(), 2);
    let error = error.unwrap();
    assert_eq!(error, DecodeError { offset: 32, entry: 2, fault: Fault::Backwards { last: 5, position: 4 } });
    assert_eq!(error.to_string(), "byte 32, entry 2: position 4 follows position 5");
    assert_eq!(decoder.pop(), Err(error), "an error stays");

    let mut log = sample_log(1);
    log.push(at(u64::MAX));
    let (entries, error, decoder) = decode(&encode(&log), &[1]);
    assert_eq!(entries, log[..log.len() - 1]);
    assert_eq!(error.unwrap().fault, Fault::AfterEnd);
    assert!(decoder.ended());

    let mut late = Decoder::starting_at(1000, 6);
    late.push(&encode(&[at(5)]));
    let fault = Fault::Backwards { last: 6, position: 5 };
    assert_eq!(late.pop(), Err(DecodeError { offset: 1000, entry: 0, fault }));
}

/// What the pair and the file may cost: the numbers of the design.
#[test]
fn rates() {
    let clock = |millisecond: u64| Entry {
        position: millisecond * 200_000,
        event: Event::Input(Input::Clock { advance_to_ns: millisecond * 1_000_000, picoseconds_per_instruction: 5000 }),
    };
    let bits = |log: &[Entry]| encode(log).len() * 8;
    let busy_second: Vec<Entry> = (86_400_000..86_401_000).map(clock).collect();
    assert!(bits(&busy_second) < 200_000, "a busy guest's second takes {} bits", bits(&busy_second));
    let idle_second: Vec<Entry> = (86_400_000..86_401_000).step_by(4).map(clock).collect();
    assert!(bits(&idle_second) < 50_000, "a second of a guest that wakes up 250 times takes {} bits", bits(&idle_second));
}

proptest! {
    #[test]
    fn round_trip(log in any_log(), pieces in prop::collection::vec(1usize..300, 1..10)) {
        let bytes = encode(&log);
        let (entries, error, decoder) = decode(&bytes, &pieces);
        prop_assert_eq!(error, None);
        prop_assert_eq!(&entries, &log);
        prop_assert_eq!(decoder.pending(), 0);
        prop_assert_eq!(decoder.stats().total().bytes, bytes.len() as u64);
        prop_assert_eq!(decoder.entries(), log.len() as u64);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        pieces in prop::collection::vec(1usize..300, 1..10),
    ) {
        let (whole, whole_error, _) = decode(&bytes, &[usize::MAX]);
        let (pieced, pieced_error, _) = decode(&bytes, &pieces);
        prop_assert_eq!(whole, pieced);
        prop_assert_eq!(whole_error, pieced_error);
    }

    /// What damage does is the same however the bytes come, and what came out before it is right.
    #[test]
    fn damaged_logs(
        log in any_log(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        pieces in prop::collection::vec(1usize..300, 1..10),
    ) {
        let mut bytes = encode(&log);
        prop_assume!(!bytes.is_empty());
        for (place, value) in damage {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        let (whole, whole_error, _) = decode(&bytes, &[usize::MAX]);
        let (pieced, pieced_error, _) = decode(&bytes, &pieces);
        prop_assert_eq!(&whole, &pieced);
        prop_assert_eq!(whole_error, pieced_error);
        prop_assert_eq!(&whole[..], &log[..whole.len()]);
    }

    /// Bytes that decode are the bytes that encoding gives: there is one encoding only.
    #[test]
    fn one_encoding(kind in any::<u8>(), position in any::<u64>(), payload in prop::collection::vec(any::<u8>(), 0..40)) {
        let mut bytes = vec![0; 4];
        bytes.push(kind % 72);
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes()[..3]);
        bytes.extend_from_slice(&position.to_le_bytes());
        bytes.extend_from_slice(&payload);
        let check = crc32fast::hash(&bytes[4..bytes.len().min(48)]).to_le_bytes();
        bytes[..4].copy_from_slice(&check);
        if payload.len() > 32 {
            let end_check = crc32fast::hash(&bytes[4..]).to_le_bytes();
            bytes.extend_from_slice(&end_check);
        }
        let (entries, error, _) = decode(&bytes, &[usize::MAX]);
        prop_assert!(entries.len() == 1 || error.is_some());
        if error.is_none() {
            prop_assert_eq!(encode(&entries), bytes);
        }
    }
}
