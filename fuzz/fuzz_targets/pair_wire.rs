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

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    let (messages, error) = decode(bytes, 1 << 16);
    assert_eq!((messages.clone(), error), decode(bytes, usize::from(piece) + 1));
    for message in messages {
        assert_eq!(decode(&encode(&message), 1 << 16), (vec![message], None));
    }
});
