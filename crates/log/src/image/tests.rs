//! Images that only a forger writes: every checksum right, the contents wrong.
use super::*;
use crate::container::{Output, ReadError, encode_metadata};

/// An image of these blocks, with an end that fits them.
fn forge(ram_pages: u64, blocks: &[(BlockHeader, Vec<u8>)], end: EndLayout) -> Vec<u8> {
    let metadata = encode_metadata(&ImageMetadata { ram_pages, ..ImageMetadata::default() });
    let mut bytes = Vec::new();
    CONTAINER.begin(&mut Output::new(&mut bytes, "image"), &metadata).unwrap();
    let mut add = |header: &BlockHeader, body: &[u8]| {
        let mut header = BlockHeader::read_from_bytes(header.as_bytes()).unwrap();
        header.length = U32::new(body.len() as u32);
        header.body_check = U32::new(crc32fast::hash(body));
        header.check = U32::new(header.computed_check());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(body);
    };
    for (header, body) in blocks {
        add(header, body);
    }
    add(&block(BLOCK_END, 0, 0, 0), end.as_bytes());
    bytes
}

fn block(kind: u8, encoding: u8, number: u64, present: u64) -> BlockHeader {
    let (number, present) = (U64::new(number), U64::new(present));
    let zero = U32::ZERO;
    BlockHeader { check: zero, kind, encoding, version: U16::ZERO, length: zero, body_check: zero, number, present }
}

fn stored(first: u64, present: u64) -> (BlockHeader, Vec<u8>) {
    (block(BLOCK_PAGES, STORED, first, present), vec![1; present.count_ones() as usize * PAGE_BYTES])
}

fn end(pages: u64, payloads: u32) -> EndLayout {
    EndLayout { pages: U64::new(pages), payloads: U32::new(payloads), reserved: U32::ZERO, digest: U128::ZERO }
}

/// What reading says.
fn fault(bytes: &[u8]) -> String {
    let mut reader = ImageReader::open(bytes).unwrap();
    loop {
        match reader.next_item() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it was taken"),
            Err(ReadError::Damaged { fault, .. }) => return fault,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn pages_out_of_range_or_order() {
    let pages_fault = |ram_pages, blocks: &[_]| fault(&forge(ram_pages, blocks, end(0, 0)));
    assert_eq!(pages_fault(2, &[stored(0, 0b100)]), "page 2 of a machine that has 2 pages");
    assert_eq!(pages_fault(0, &[stored(0, 1)]), "page 0 of a machine that has 0 pages");
    assert_eq!(pages_fault(1000, &[stored(64, 1), stored(0, 1)]), "page 0 comes after page 64");
    assert_eq!(pages_fault(1000, &[stored(0, 0b11), stored(0, 0b10)]), "page 1 comes after page 1");
    assert_eq!(pages_fault(1000, &[stored(1, 1)]), "the block's header makes no sense");
    assert_eq!(pages_fault(1000, &[stored(0, 0)]), "the block's header makes no sense");
    assert_eq!(pages_fault(1000, &[stored(u64::MAX - 63, 1 << 63)]), "the block's header makes no sense");
}

#[test]
fn pages_of_a_wrong_size() {
    let pages_fault = |encoding, body: Vec<u8>| fault(&forge(9, &[(block(BLOCK_PAGES, encoding, 0, 3), body)], end(0, 0)));
    assert_eq!(pages_fault(STORED, vec![1; PAGE_BYTES]), format!("{PAGE_BYTES} bytes for 2 pages"));
    assert_eq!(pages_fault(LZ4, lz4_flex::block::compress(&[1; 100])), "100 bytes for 2 pages");
    let too_much = pages_fault(LZ4, lz4_flex::block::compress(&[1; 3 * PAGE_BYTES]));
    assert!(too_much.starts_with("pages cannot be unpacked"), "{too_much}");
    let garbage = pages_fault(LZ4, vec![0xff; 50]);
    assert!(garbage.starts_with("pages cannot be unpacked"), "{garbage}");
    assert_eq!(pages_fault(STORED, vec![1; GROUP_BYTES + 1]), "the block is larger than it may be");
    assert_eq!(pages_fault(7, vec![]), "the block's header makes no sense");
}

#[test]
fn payloads_that_make_no_sense() {
    let payload_fault = |number, body: &[u8]| fault(&forge(1, &[(block(BLOCK_PAYLOAD, 0, number, 0), body.to_vec())], end(0, 0)));
    assert_eq!(payload_fault(4, b"cpu"), "a payload is shorter than its kind's name");
    assert_eq!(payload_fault(0, b"cpu"), "the block's header makes no sense");
    assert_eq!(payload_fault(u64::MAX, b"cpu"), "the block's header makes no sense");
    assert_eq!(payload_fault(2, &[0xff, 0xff]), "the name of a payload's kind is not text");
    assert_eq!(payload_fault(3, b"c u"), "the name of a payload's kind has a character that is not allowed");
    let twice = || (block(BLOCK_PAYLOAD, 0, 3, 0), b"cpu".to_vec());
    assert_eq!(fault(&forge(1, &[twice(), twice()], end(0, 2))), "payload cpu comes twice");
    let many: Vec<_> =
        (0..=MAX_IMAGE_PAYLOADS).map(|index| (block(BLOCK_PAYLOAD, 0, 5, 0), format!("x{index:04}").into_bytes())).collect();
    assert_eq!(fault(&forge(1, &many, end(0, 0))), "there are more than 1024 payloads");
}

#[test]
fn ends_that_do_not_fit() {
    assert_eq!(fault(&forge(1, &[], end(1, 0))), "1 pages and 0 payloads were written, 0 and 0 came");
    assert_eq!(fault(&forge(1, &[], end(0, 1))), "0 pages and 1 payloads were written, 0 and 0 came");
    assert!(fault(&forge(1, &[], end(0, 0))).starts_with("the whole was 0000"));
    let mut reserved = end(0, 0);
    reserved.reserved = U32::new(1);
    assert_eq!(fault(&forge(1, &[], reserved)), "reserved bytes of the end block are not zero");
    assert_eq!(fault(&forge(1, &[(block(9, 0, 0, 0), vec![])], end(0, 0))), "a block is of a kind that is not known");
    assert_eq!(fault(&forge(1, &[(block(BLOCK_END, 0, 0, 0), vec![0])], end(0, 0))), "the end block has the wrong size");
}
