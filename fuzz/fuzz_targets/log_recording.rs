//! Arbitrary bytes as a recording: an error or entries, never a panic, never memory without bound.
#![no_main]
use libfuzzer_sys::fuzz_target;
use std::io::Cursor;
use twinstep_log::RecordingReader;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut reader) = RecordingReader::open(Cursor::new(bytes)) else { return };
    if let Ok(mut image) = reader.image() {
        while let Ok(Some(_)) = image.next_item() {}
    }
    while let Ok(Some(_)) = reader.next_entry() {}
});
