//! Images: round trips, goldens, damage of every kind.
mod common;
use common::golden;
use proptest::prelude::*;
use std::collections::BTreeMap;
use twinstep_log::image::{PAGE_BYTES, read_image, write_image};
use twinstep_log::*;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Contents {
    metadata: ImageMetadata,
    payloads: Vec<ImagePayload>,
    pages: BTreeMap<u64, Vec<u8>>,
}

fn write(contents: &Contents, compression: Compression) -> (Vec<u8>, ImageSummary) {
    let fill = |number, page: &mut [u8; PAGE_BYTES]| match contents.pages.get(&number) {
        Some(bytes) => page.copy_from_slice(bytes),
        None => page.fill(0),
    };
    write_image(Vec::new(), &contents.metadata, compression, &contents.payloads, fill, |_| {}).unwrap()
}

fn read(bytes: &[u8]) -> Result<(Contents, ImageSummary), ReadError> {
    let mut reader = ImageReader::open(bytes)?;
    let metadata = reader.metadata().clone();
    let (mut payloads, mut pages) = (Vec::new(), BTreeMap::new());
    let take_payload = |payload| {
        payloads.push(payload);
        Ok::<_, ReadError>(())
    };
    let take_page = |number, page: &[u8; PAGE_BYTES]| {
        assert!(pages.insert(number, page.to_vec()).is_none(), "no page comes twice");
    };
    let summary = read_image(&mut reader, take_payload, take_page, |_| {})?;
    assert_eq!(reader.into_inner(), [0u8; 0], "the image was all there was");
    Ok((Contents { metadata, payloads, pages }, summary))
}

fn payload(kind: &str, version: u16, bytes: &[u8]) -> ImagePayload {
    ImagePayload { kind: kind.to_owned(), version, bytes: bytes.to_vec() }
}

fn sample() -> Contents {
    let text: Vec<u8> = b"Twinstep ".iter().copied().cycle().take(PAGE_BYTES).collect();
    let counting: Vec<u8> = (0..PAGE_BYTES).map(|index| (index / 16) as u8).collect();
    Contents {
        metadata: ImageMetadata {
            ram_pages: 200,
            position: 123_456_789,
            engine: "twinstep 0.1.0".into(),
            cpu_model: "x86-64-v2".into(),
            host_vendor: "AuthenticAMD".into(),
            host_family: "25/1".into(),
            note: "a sample".into(),
        },
        payloads: vec![payload("cpu", 1, &[1, 2, 3]), payload("serial", 3, &[])],
        pages: BTreeMap::from([(0, text.clone()), (1, counting.clone()), (70, counting), (199, text)]),
    }
}

/// Pages that do not compress, and pages that do.
fn any_page() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<u8>().prop_map(|byte| vec![byte; PAGE_BYTES]),
        prop::collection::vec(any::<u8>(), PAGE_BYTES),
        (0..PAGE_BYTES).prop_map(|place| {
            let mut page = vec![0; PAGE_BYTES];
            page[place] = 1;
            page
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn round_trip(
        ram_pages in 1u64..300,
        position in any::<u64>(),
        note in ".{0,20}",
        payloads in prop::collection::btree_map("[a-z0-9.-]{1,12}", (any::<u16>(), prop::collection::vec(any::<u8>(), 0..5000)), 0..6),
        pages in prop::collection::btree_map(0u64..300, any_page(), 0..40),
        compression in prop_oneof![Just(Compression::Stored), Just(Compression::Lz4)],
    ) {
        let contents = Contents {
            metadata: ImageMetadata { ram_pages, position, note, ..ImageMetadata::default() },
            payloads: payloads.into_iter().map(|(kind, (version, bytes))| payload(&kind, version, &bytes)).collect(),
            pages: pages.into_iter().filter(|(number, _)| *number < ram_pages).collect(),
        };
        let (bytes, written) = write(&contents, compression);
        prop_assert_eq!(written.bytes, bytes.len() as u64);
        let (found, summary) = read(&bytes).unwrap();
        prop_assert_eq!(summary, written);
        let mut expected = contents.clone();
        expected.pages.retain(|_, page| page.iter().any(|byte| *byte != 0));
        prop_assert_eq!(found, expected);
        prop_assert_eq!(write(&contents, Compression::Stored).1.digest, written.digest);
    }

    #[test]
    fn arbitrary_damage(place in any::<prop::sample::Index>(), value in prop::collection::vec(any::<u8>(), 1..40)) {
        let (mut bytes, _) = write(&sample(), Compression::Lz4);
        let place = place.index(bytes.len());
        let length = value.len().min(bytes.len() - place);
        let before = bytes.clone();
        bytes[place..place + length].copy_from_slice(&value[..length]);
        prop_assert_eq!(read(&bytes).is_ok(), bytes == before);
    }

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(read(&bytes).is_err());
    }
}

#[test]
fn goldens() {
    let (bytes, _) = write(&sample(), Compression::Stored);
    golden("image-1-stored.bin", &bytes);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/image-1-lz4.bin");
    // What LZ4 makes of a page is its own business; what it made once must be readable for ever.
    if !std::path::Path::new(path).exists() {
        golden("image-1-lz4.bin", &write(&sample(), Compression::Lz4).0);
    }
    let (found, summary) = read(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(found, sample());
    assert_eq!(summary.digest, read(&bytes).unwrap().1.digest);
}

#[test]
fn every_cut_and_every_flip_is_found() {
    let mut contents = sample();
    contents.pages.remove(&199);
    let (bytes, _) = write(&contents, Compression::Lz4);
    assert!(bytes.len() < 3000, "small enough to try everything: {}", bytes.len());
    for cut in 0..bytes.len() {
        match read(&bytes[..cut]) {
            Err(ReadError::Cut { offset, .. }) => assert!(offset as usize <= cut),
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
    for place in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[place] ^= 1 << bit;
            match read(&bad) {
                Err(ReadError::Damaged { offset, .. } | ReadError::Cut { offset, .. }) => assert!(offset as usize <= place),
                Err(ReadError::Foreign { .. }) => assert!(place < 8),
                Err(ReadError::Newer { .. }) => assert!((8..12).contains(&place)),
                other => panic!("flip at {place}: {other:?}"),
            }
        }
    }
}

#[test]
fn newer_and_foreign_are_told() {
    let (mut bytes, _) = write(&sample(), Compression::Lz4);
    bytes[8] = 2;
    let error = read(&bytes).unwrap_err().to_string();
    assert_eq!(error, "this image was written by a newer Twinstep (format 2, this one reads up to 1)");
    assert_eq!(read(b"#!/bin/sh").unwrap_err().to_string(), "this is not a Twinstep image");
    assert_eq!(read(b"x").unwrap_err().to_string(), "this is not a Twinstep image");
}

#[test]
fn mistakes_of_the_caller_are_refused() {
    let metadata = ImageMetadata { ram_pages: 10, ..ImageMetadata::default() };
    let mut writer = ImageWriter::new(Vec::new(), &metadata, Compression::Lz4).unwrap();
    let page = [1; PAGE_BYTES];
    writer.page(5, &page).unwrap();
    let refused = |result: Result<(), WriteError>| matches!(result, Err(WriteError::Invalid { .. }));
    assert!(refused(writer.page(5, &page)));
    assert!(refused(writer.page(4, &page)));
    assert!(refused(writer.page(10, &page)));
    writer.payload(&payload("cpu", 1, &[])).unwrap();
    assert!(refused(writer.payload(&payload("cpu", 2, &[]))));
    assert!(refused(writer.payload(&payload("", 2, &[]))));
    assert!(refused(writer.payload(&payload("two words", 2, &[]))));
    assert!(refused(writer.payload(&payload(&"x".repeat(65), 2, &[]))));
    writer.page(9, &page).unwrap();
    let (bytes, summary) = writer.finish().unwrap();
    assert_eq!((summary.pages, summary.payloads), (2, 1));
    let (found, _) = read(&bytes).unwrap();
    assert_eq!(found.pages.keys().copied().collect::<Vec<_>>(), [5, 9]);
    let metadata = ImageMetadata { ram_pages: u64::MAX, ..metadata };
    assert!(refused(ImageWriter::new(Vec::new(), &metadata, Compression::Lz4).map(|_| ())));
}

/// On a socket something else follows; it must not be eaten.
#[test]
fn takes_only_its_own_bytes() {
    let (mut bytes, _) = write(&sample(), Compression::Lz4);
    bytes.extend_from_slice(b"next");
    let mut reader = ImageReader::open(&bytes[..]).unwrap();
    while reader.next_item().unwrap().is_some() {}
    assert_eq!(reader.progress().pages_passed, 200);
    assert!(reader.next_item().unwrap().is_none());
    assert_eq!(reader.into_inner(), b"next");
}

#[test]
fn progress_is_shown() {
    let contents = sample();
    let mut seen = Vec::new();
    let fill = |_, page: &mut [u8; PAGE_BYTES]| page.fill(3);
    write_image(Vec::new(), &contents.metadata, Compression::Lz4, &[], fill, |progress| seen.push(progress)).unwrap();
    assert_eq!(seen.iter().map(|progress| progress.pages_passed).collect::<Vec<_>>(), [64, 128, 192, 200]);
    assert!(seen.is_sorted_by_key(|progress| progress.bytes));
    assert!(seen.iter().all(|progress| progress.pages_total == 200));
}
