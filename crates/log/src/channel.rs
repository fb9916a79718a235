//! Entries on the logging channel of a pair, where position, kind, length and checksum are the channel's business.
//!
//! **In:** entries, or kinds and payloads. **Out:** the other. **Invariant:** a payload decodes only if encoding what it means gives the same bytes. Payloads are those of a
//! recording, but for the note of an output, which has no room there for what is not said: on a connection it matters how long it is.
//!
//! ```text
//!   output, on the channel: port u8 · card or disk u8 · of a large segment: size of its pieces u16 · length, seven bits a byte · digest u128
//! ```
use crate::codec::{self, EncodeError, Fault, MAX_PAYLOAD};
use crate::entry::{Entry, EntryKind, Event};

/// The payload of an entry.
///
/// # Errors
/// If it would be over [`MAX_PAYLOAD`].
pub fn encode_payload(entry: &Entry) -> Result<Vec<u8>, EncodeError> {
    let mut out = Vec::new();
    match &entry.event {
        Event::Output(note) => codec::encode_short_note(note, &mut out),
        event => codec::encode_payload(event, &mut out),
    }
    let (kind, length) = (entry.event.kind(), out.len());
    if length > MAX_PAYLOAD { Err(EncodeError { kind, length }) } else { Ok(out) }
}

/// The entry of a kind, a position and a payload.
///
/// # Errors
/// What is wrong with it.
pub fn decode_payload(position: u64, kind: u8, payload: &[u8]) -> Result<Entry, Fault> {
    let kind = EntryKind::from_number(kind).ok_or(Fault::UnknownKind(kind))?;
    if payload.len() > MAX_PAYLOAD {
        return Err(Fault::TooLong(payload.len()));
    }
    let event = match kind {
        EntryKind::Output => codec::decode_short_note(payload).map(Event::Output),
        kind => codec::decode_payload(kind, payload),
    };
    event.map(|event| Entry { position, event }).map_err(|what| Fault::Payload { kind, what })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{EndReason, OutputNote, OutputPort};
    use twinstep_machine::Input;

    fn note(port: OutputPort, length: u32) -> Event {
        Event::Output(OutputNote { port, length, digest: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10 })
    }

    /// What each kind of entry looks like, for the version of the channel that is spoken.
    #[test]
    fn payloads() {
        let clock = Input::Clock { advance_to_ns: 0x0102_0304, picoseconds_per_instruction: 300 };
        let digest = "100f0e0d0c0b0a090807060504030201";
        for (event, bytes) in [
            (note(OutputPort::Nic(3), 66), format!("010342{digest}")),
            (note(OutputPort::Serial, 300), format!("0200ac02{digest}")),
            (note(OutputPort::Console, 0), format!("030000{digest}")),
            (note(OutputPort::Disk(2), 520), format!("05028804{digest}")),
            (note(OutputPort::DiskFlush(1), 8), format!("060108{digest}")),
            (note(OutputPort::NicGso { nic: 1, segment_size: 1448 }, 65_000), format!("0401a805e8fb03{digest}")),
            (Event::Input(clock), "ac0204030201".to_owned()),
            (Event::Input(Input::NetRx { nic: 1, frame: vec![7, 8] }), "010708".to_owned()),
            (Event::Digest(vec![1, 2]), "0102".to_owned()),
            (Event::Progress, String::new()),
            (Event::End { reason: EndReason::Reset }, "02".to_owned()),
        ] {
            let entry = Entry { position: 9, event };
            let payload = encode_payload(&entry).unwrap();
            assert_eq!(payload.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), bytes, "{entry:?}");
            let kind = entry.event.kind().number();
            assert_eq!(decode_payload(9, kind, &payload), Ok(entry));
            for cut in 0..payload.len() {
                if let Ok(other) = decode_payload(9, kind, &payload[..cut]) {
                    assert_eq!(encode_payload(&other).unwrap(), payload[..cut], "{other:?} has two forms");
                }
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |kind: EntryKind, payload: &[u8]| match decode_payload(1, kind.number(), payload) {
            Err(Fault::Payload { what, .. }) => what,
            other => panic!("{other:?}"),
        };
        assert_eq!(decode_payload(1, 0, &[]), Err(Fault::UnknownKind(0)));
        let over = vec![0; MAX_PAYLOAD + 1];
        assert_eq!(decode_payload(1, EntryKind::Digest.number(), &over), Err(Fault::TooLong(MAX_PAYLOAD + 1)));
        let tail = [0; 16];
        let with = |head: &[u8]| [head, &tail].concat();
        assert_eq!(refused(EntryKind::Output, &with(&[9, 0, 1])), "the output port is not known");
        assert_eq!(refused(EntryKind::Output, &with(&[2, 1, 1])), "a network card is named for an output that has none");
        assert_eq!(refused(EntryKind::Output, &with(&[1, 0, 0x81, 0])), "the length has a leading zero");
        assert_eq!(refused(EntryKind::Output, &with(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0x1f])), "the length is too large");
        assert_eq!(refused(EntryKind::Output, &with(&[1, 0, 1, 1])), "the digest has 16 bytes");
        assert_eq!(refused(EntryKind::Output, &[1, 0]), "an output note is cut short");
        assert_eq!(refused(EntryKind::Progress, &[1]), "a progress entry has no payload");
        let long = Entry { position: 1, event: Event::Digest(over) };
        assert_eq!(encode_payload(&long), Err(EncodeError { kind: EntryKind::Digest, length: MAX_PAYLOAD + 1 }));
    }
}
