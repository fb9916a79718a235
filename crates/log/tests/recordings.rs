//! Recordings: round trips, goldens, damage of every kind, disks that fill up.
mod common;
use common::{any_log, golden, sample_log};
use proptest::prelude::*;
use std::io::{self, Cursor, Write};
use twinstep_log::image::{PAGE_BYTES, read_image};
use twinstep_log::recording::{DiskMetadata, NicMetadata};
use twinstep_log::*;

fn metadata() -> RecordingMetadata {
    RecordingMetadata {
        engine: "twinstep 0.1.0 (abcdef)".into(),
        cpu_model: "x86-64-v2".into(),
        ram_mib: 1,
        host_vendor: "GenuineIntel".into(),
        host_family: "6/106".into(),
        nics: vec![NicMetadata { mac: [2, 0, 0, 0, 0, 1] }],
        disks: vec![DiskMetadata { name: "root.img".into(), bytes: 1 << 20, digest: "xxh3:0011".into() }],
        digest_interval: 1_000_000,
        note: "a sample".into(),
        dispute: None,
    }
}

/// A recording whose image has two pages; and the offset of its first entry.
fn write(start: u64, log: &[Entry]) -> (Vec<u8>, usize) {
    let image = ImageMetadata { ram_pages: 256, position: start, ..ImageMetadata::default() };
    let mut recording = RecordingStart::new(Vec::new(), &metadata(), &image, Compression::Stored).unwrap();
    let cpu = ImagePayload { kind: "cpu".into(), version: 1, bytes: vec![1, 2, 3] };
    recording.image.payload(&cpu).unwrap();
    recording.image.page(7, &[1; PAGE_BYTES]).unwrap();
    let (mut writer, summary) = recording.finish_image().unwrap();
    assert_eq!((summary.pages, summary.payloads), (1, 1));
    let first_entry = writer.bytes() as usize;
    for entry in log {
        writer.entry(entry).unwrap();
    }
    let length = writer.bytes();
    let (bytes, stats) = writer.close().unwrap();
    assert_eq!(bytes.len() as u64, length);
    assert_eq!(stats.total().bytes, length - first_entry as u64);
    (bytes, first_entry)
}

/// All entries and the end, or the error and the entries before it.
fn read(bytes: &[u8]) -> (Vec<Entry>, Result<RecordingEnd, ReadError>) {
    let mut entries = Vec::new();
    let mut reader = match RecordingReader::open(Cursor::new(bytes)) {
        Ok(reader) => reader,
        Err(error) => return (entries, Err(error)),
    };
    loop {
        match reader.next_entry() {
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) => return (entries, Ok(reader.end().unwrap().clone())),
            Err(error) => return (entries, Err(error)),
        }
    }
}

/// The image of a recording.
fn read_whole_image(bytes: &[u8]) -> Result<ImageSummary, ReadError> {
    let mut reader = RecordingReader::open(Cursor::new(bytes))?;
    let mut image = reader.image()?;
    read_image(&mut image, |_| Ok::<_, ReadError>(()), |_, _| {}, |_| {})
}

#[test]
fn goldens() {
    let (bytes, _) = write(500, &sample_log(600));
    let golden = golden("recording-1.bin", &bytes);
    assert_eq!(read(&golden).0, sample_log(600));
    assert_eq!(RecordingReader::open(Cursor::new(&golden)).unwrap().metadata(), &metadata());
    assert_eq!(read_whole_image(&golden).unwrap().pages, 1);
}

#[test]
fn the_image_does_not_disturb_the_entries() {
    let log = sample_log(600);
    let (bytes, first_entry) = write(500, &log);
    let mut reader = RecordingReader::open(Cursor::new(&bytes)).unwrap();
    assert_eq!(reader.metadata(), &metadata());
    assert_eq!((reader.image_metadata().position, reader.image_metadata().ram_pages), (500, 256));
    for _ in 0..2 {
        for entry in &log {
            let mut image = reader.image().unwrap();
            let mut pages = Vec::new();
            let take_payload = |payload: ImagePayload| {
                assert_eq!(payload.bytes, [1, 2, 3]);
                Ok::<_, ReadError>(())
            };
            read_image(&mut image, take_payload, |number, page| pages.push((number, *page)), |_| {}).unwrap();
            assert_eq!(pages, [(7, [1; PAGE_BYTES])]);
            assert_eq!(reader.next_entry().unwrap().as_ref(), Some(entry));
        }
        assert_eq!(reader.next_entry().unwrap(), None);
        let end = reader.end().unwrap();
        let entries = log.len() as u64;
        assert_eq!(*end, RecordingEnd::Complete { reason: EndReason::PowerOff, position: 1600, entries });
        let text = "complete: 16 entries up to position 1600; the guest switched the machine off";
        assert_eq!(end.to_string(), text);
        assert_eq!(reader.stats().total().bytes, (bytes.len() - first_entry) as u64);
        reader.rewind();
        assert_eq!(reader.end(), None);
    }
}

#[test]
fn every_cut_is_told() {
    let log = sample_log(600);
    let (bytes, first_entry) = write(500, &log);
    let mut ends = vec![first_entry];
    ends.extend(log.iter().scan(first_entry, |end, entry| {
        *end += encoded_length(entry);
        Some(*end)
    }));
    for cut in 0..bytes.len() {
        let (entries, end) = read(&bytes[..cut]);
        if cut < first_entry {
            assert!(matches!(end, Err(ReadError::Cut { .. })), "cut at {cut}: {end:?}");
            continue;
        }
        let whole = ends.iter().rposition(|end| *end <= cut).unwrap();
        assert_eq!(entries, log[..whole]);
        let expected = RecordingEnd::Truncated {
            entries: whole as u64,
            position: log[..whole].last().map_or(500, |entry| entry.position),
            offset: ends[whole] as u64,
            lost_bytes: (cut - ends[whole]) as u64,
        };
        assert_eq!(end.unwrap(), expected, "cut at {cut}");
    }
}

/// Flips within the image's page are covered by reading the image; all others by reading the entries as well.
#[test]
fn every_flip_is_found() {
    let log = sample_log(600);
    let (bytes, first_entry) = write(500, &log);
    let end = read(&bytes).1.unwrap();
    assert!(read_whole_image(&bytes).is_ok());
    for place in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[place] ^= 1 << (place % 8);
        let (entries, found) = read(&bad);
        if place < first_entry {
            assert!(read_whole_image(&bad).is_err(), "flip at {place}");
            continue;
        }
        assert_eq!(entries, log[..entries.len()], "flip at {place}");
        match found {
            Err(ReadError::Damaged { what: "recording", offset, fault }) => {
                assert!(offset as usize <= place && place - (offset as usize) < 200, "flip at {place}: {offset}");
                assert!(fault.contains(&format!("the {} entries before it", entries.len())), "{fault}");
            }
            // Only of a length in the last bytes: that could as well be the beginning of a longer entry.
            Ok(RecordingEnd::Truncated { offset, .. }) => {
                assert!(offset as usize > bytes.len() - 48, "flip at {place}");
                assert!((5..8).contains(&(place - offset as usize)), "flip at {place}");
            }
            other => panic!("flip at {place}: {other:?}, {end:?}"),
        }
    }
}

#[test]
fn zeros_at_the_end_are_a_cut_and_zeros_within_are_damage() {
    let log = sample_log(600);
    let (mut bytes, _) = write(500, &log[..3]);
    let good = bytes.len();
    bytes.resize(good + 200_000, 0);
    let (entries, end) = read(&bytes);
    assert_eq!(entries, log[..3]);
    let position = log[2].position;
    let expected = RecordingEnd::Truncated { entries: 3, position, offset: good as u64, lost_bytes: 200_000 };
    assert_eq!(end.unwrap(), expected);
    bytes[good + 199_999] = 1;
    let (entries, end) = read(&bytes);
    assert_eq!(entries.len(), 3);
    assert!(matches!(end, Err(ReadError::Damaged { offset, .. }) if offset == good as u64));
}

#[test]
fn nothing_may_follow_the_end() {
    let log = sample_log(600);
    for extra in [&[0u8][..], &[1; 100]] {
        let (mut bytes, _) = write(500, &log);
        bytes.extend_from_slice(extra);
        let (entries, end) = read(&bytes);
        assert_eq!(entries, log[..log.len() - 1]);
        let error = end.unwrap_err().to_string();
        assert!(error.contains("there are entries after the end entry"), "{error}");
    }
}

#[test]
fn newer_and_foreign_are_told() {
    let (mut bytes, _) = write(500, &[]);
    bytes[8] = 2;
    let error = read(&bytes).1.unwrap_err().to_string();
    assert_eq!(error, "this recording was written by a newer Twinstep (format 2, this one reads up to 1)");
    assert_eq!(read(b"TWINSNAPxxx").1.unwrap_err().to_string(), "this is not a Twinstep recording");
}

/// A disk with room for so many bytes.
struct Disk {
    bytes: Vec<u8>,
    room: usize,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.room - self.bytes.len());
        if taken == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_told_once_and_the_rest_can_be_read() {
    let image = ImageMetadata { ram_pages: 1, ..ImageMetadata::default() };
    let mut disk = Disk { bytes: Vec::new(), room: 100_000 };
    let recording = RecordingStart::new(&mut disk, &metadata(), &image, Compression::Lz4).unwrap();
    let (mut writer, _) = recording.finish_image().unwrap();
    let entry = |position| Entry { position, event: Event::Input(twinstep_machine::Input::Serial(vec![1; 20])) };
    let (failed_at, error) =
        (1..).find_map(|position| writer.entry(&entry(position)).err().map(|error| (position, error))).unwrap();
    assert!(error.is_disk_full(), "{error}");
    assert!(error.to_string().starts_with("the recording cannot be written beyond byte"), "{error}");
    for position in failed_at + 1..failed_at + 10_000 {
        match writer.entry(&entry(position)) {
            Err(WriteError::Failed { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(writer.flush(), Err(WriteError::Failed { .. })));
    drop(writer);
    assert_eq!(disk.bytes.len(), 100_000);
    let (entries, end) = read(&disk.bytes);
    assert!(entries.len() > 2000 && entries.iter().zip(1..).all(|(found, position)| *found == entry(position)));
    assert!(matches!(end, Ok(RecordingEnd::Truncated { position, .. }) if position == entries.len() as u64));
}

#[test]
fn misplaced_entries_are_refused_alone() {
    let image = ImageMetadata { ram_pages: 1, position: 100, ..ImageMetadata::default() };
    let recording = RecordingStart::new(Vec::new(), &metadata(), &image, Compression::Lz4).unwrap();
    let (mut writer, _) = recording.finish_image().unwrap();
    let at = |position, event| Entry { position, event };
    let refused = |result| matches!(result, Err(WriteError::Invalid { .. }));
    assert!(refused(writer.entry(&at(99, Event::Progress))));
    writer.entry(&at(100, Event::Progress)).unwrap();
    assert!(refused(writer.entry(&at(101, Event::Digest(vec![0; MAX_PAYLOAD + 1])))));
    writer.entry(&at(102, Event::End { reason: EndReason::Stopped })).unwrap();
    assert!(refused(writer.entry(&at(103, Event::Progress))));
    let (bytes, _) = writer.close().unwrap();
    let (entries, end) = read(&bytes);
    assert_eq!(entries.len(), 2);
    assert!(matches!(end, Ok(RecordingEnd::Complete { position: 102, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn round_trip(log in any_log()) {
        let start = log.first().map_or(0, |entry| entry.position);
        let (bytes, _) = write(start, &log);
        let (entries, end) = read(&bytes);
        prop_assert_eq!(&entries, &log);
        let complete = matches!(log.last(), Some(Entry { event: Event::End { .. }, .. }));
        prop_assert_eq!(matches!(end.unwrap(), RecordingEnd::Complete { .. }), complete);
    }

    #[test]
    fn arbitrary_bytes_after_a_good_start(log in any_log(), garbage in prop::collection::vec(any::<u8>(), 1..500)) {
        let start = log.first().map_or(0, |entry| entry.position);
        let (mut bytes, _) = write(start, &log);
        bytes.extend_from_slice(&garbage);
        let (entries, _) = read(&bytes);
        prop_assert!(entries.len() <= log.len());
        prop_assert_eq!(&entries[..], &log[..entries.len()]);
    }
}
