//! Arbitrary bytes as a copy of a machine: the target gets only units of the layout it has agreed to, of the right size.
#![no_main]
use libfuzzer_sys::fuzz_target;
use twinstep_migrate::{Destination, Layout, Target};

#[derive(Default)]
struct Room(Option<Layout>);

impl Room {
    fn region(&self, region: usize, unit: u64) -> usize {
        let region = self.0.as_ref().expect("the layout comes first").regions()[region];
        assert!(unit < region.units);
        region.unit_bytes as usize
    }
}

impl Target for Room {
    fn begin(&mut self, layout: &Layout, _preface: &[u8]) -> Result<(), String> {
        assert!(self.0.is_none());
        if layout.regions().iter().map(|r| r.units).sum::<u64>() > 1 << 16 {
            return Err("too large".into());
        }
        self.0 = Some(layout.clone());
        Ok(())
    }
    fn unit(&mut self, region: usize, unit: u64, bytes: &[u8]) -> Result<(), String> {
        assert_eq!(bytes.len(), self.region(region, unit));
        Ok(())
    }
    fn zero(&mut self, region: usize, unit: u64, _first: bool) -> Result<(), String> {
        self.region(region, unit);
        Ok(())
    }
}

/// Where a beginning is to have its checksum, and its blocks theirs: what a fuzzer does not find by itself. All else stays as it is, if it can.
fn repair(bytes: &mut [u8]) {
    const HEAD: usize = 32;
    if bytes.len() < HEAD {
        return;
    }
    bytes[..8].copy_from_slice(b"TWINMOVE");
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    bytes[24..28].fill(0);
    let number = |bytes: &[u8], at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i])) as usize;
    // Few regions, and a short preface.
    bytes[13..16].fill(0);
    bytes[17..20].fill(0);
    let mut at = HEAD + number(bytes, 12) * 16 + number(bytes, 16);
    let Some(rest) = bytes.get(HEAD..at) else { return };
    let check = crc32fast::hash(rest);
    bytes[20..24].copy_from_slice(&check.to_le_bytes());
    let check = crc32fast::hash(&bytes[..28]);
    bytes[28..32].copy_from_slice(&check.to_le_bytes());
    while let Some(block) = bytes.get_mut(at..).filter(|block| block.len() >= HEAD) {
        let length = number(block, 8) % 1024;
        let Some(body) = block.get(HEAD..HEAD + length) else { return };
        let check = crc32fast::hash(body);
        block[8..12].copy_from_slice(&(length as u32).to_le_bytes());
        block[12..16].copy_from_slice(&check.to_le_bytes());
        let check = crc32fast::hash(&block[4..HEAD]);
        block[..4].copy_from_slice(&check.to_le_bytes());
        at += HEAD + length;
    }
}

fuzz_target!(|input: (bool, &[u8])| {
    let (sound, bytes) = input;
    let mut bytes = bytes.to_vec();
    if sound {
        repair(&mut bytes);
    }
    let (mut destination, mut room) = (Destination::new(), Room::default());
    for piece in bytes.chunks(97) {
        if destination.push(piece, &mut room).is_err() {
            return;
        }
    }
    let _ = destination.finish();
});
