//! Arbitrary bytes in pieces of arbitrary size, as the other side of a pair could send them: the same messages however they are cut, and what decodes
//! encodes and decodes to itself.
#![no_main]
use libfuzzer_sys::fuzz_target;
use twinstep_pair::wire::{Decoder, Message, WireError, encode};

fn decode(bytes: &[u8], piece: usize) -> (Vec<Message>, Option<WireError>) {
    let mut decoder = Decoder::new();
    decoder.greeted();
    let mut messages = Vec::new();
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

/// Gives frames their checksums, which a fuzzer does not find by itself.
fn repair(bytes: &mut [u8]) {
    const HEAD: usize = 10;
    let mut at = 0;
    while let Some(frame) = bytes.get_mut(at..).filter(|frame| frame.len() >= HEAD) {
        let length = usize::from(u16::from_le_bytes([frame[1], frame[2]])) % 1024;
        let Some(payload) = frame.get(HEAD..HEAD + length) else { return };
        let check = crc32fast::hash(payload);
        frame[1..4].copy_from_slice(&(length as u32).to_le_bytes()[..3]);
        frame[6..10].copy_from_slice(&check.to_le_bytes());
        let check = crc32fast::hash(&frame[..4]);
        frame[4..6].copy_from_slice(&check.to_le_bytes()[..2]);
        at += HEAD + length;
    }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    let mut bytes = bytes.to_vec();
    if piece >= 128 {
        repair(&mut bytes);
    }
    let bytes = bytes.as_slice();
    let (messages, error) = decode(bytes, 1 << 16);
    assert_eq!((messages.clone(), error), decode(bytes, usize::from(piece) + 1));
    for message in messages {
        assert_eq!(decode(&encode(&message), 1 << 16), (vec![message], None));
    }
});
