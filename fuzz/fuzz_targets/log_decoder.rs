//! Arbitrary bytes in pieces of arbitrary size: what decodes must encode to the same bytes, however it was cut.
#![no_main]
use libfuzzer_sys::fuzz_target;
use twinstep_log::{DecodeError, Decoder, Entry, encode_into};

fn decode(bytes: &[u8], piece: usize) -> (Vec<Entry>, Option<DecodeError>, u64) {
    let mut decoder = Decoder::new();
    let mut entries = Vec::new();
    for piece in bytes.chunks(piece) {
        assert_eq!(decoder.push(piece), piece.len());
        loop {
            match decoder.pop() {
                Ok(Some(entry)) => entries.push(entry),
                Ok(None) => break,
                Err(error) => return (entries, Some(error), decoder.offset()),
            }
        }
    }
    (entries, None, decoder.offset())
}

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    let (entries, error, good) = decode(bytes, 1 << 16);
    assert_eq!((entries.clone(), error, good), decode(bytes, usize::from(piece) + 1));
    let mut encoded = Vec::new();
    for entry in &entries {
        encode_into(entry, &mut encoded).expect("what was decoded can be encoded");
    }
    assert_eq!(encoded, bytes[..good as usize]);
});
