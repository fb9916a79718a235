//! Blocks of disks in a window: what a standby's machine has read and written since the state that both sides had, as it was then.
//!
//! *In*: replicas with a checkpoint; or the payloads of an image. *Out*: payloads; or disks in memory that hold these blocks. *Invariant*: what is not there is never made up: a machine that
//! wants another block stops with a failure of the host, which says so.
//!
//! A payload of kind `disk-blocks-N` (N from 0) holds blocks one after the other, as the mirror sends them ([`super::mirror::put_block`]). An image whose machine has disks that are not shared has
//! the first one, if there are no blocks in it, too.
use std::collections::BTreeMap;
use std::sync::Arc;

use twinstep_log::ImagePayload;
use twinstep_machine::{Disk, DiskError, ElsewhereDisk};
use twinstep_migrate::packing;

use super::build::DiskExtra;
use super::mirror;
use crate::disk::{BLOCK_BYTES, Replica};
use crate::error::{Error, Result};

const KIND: &str = "disk-blocks-";
const VERSION: u16 = 1;
/// Bytes of a payload after which the next one begins.
const PAYLOAD_BYTES: usize = 32 << 20;

/// The payloads of what these disks' machine has touched since their checkpoint, at most so many bytes of them.
pub(super) fn payloads(disks: &[Replica], most_bytes: usize) -> Result<Vec<ImagePayload>> {
    let too_much = || Error::new(format!("more of the disks was read and written than is kept ({} MiB)", most_bytes >> 20));
    let mut payloads = vec![Vec::new()];
    let mut bytes = 0;
    for (number, disk) in disks.iter().enumerate() {
        let touched = disk.touched().ok_or_else(too_much)?;
        for block in touched.iter() {
            let payload = match payloads.last_mut() {
                Some(payload) if payload.len() < PAYLOAD_BYTES => payload,
                _ => payloads.push_mut(Vec::new()),
            };
            let before = payload.len();
            mirror::put_block(number, block, &disk.read_block_before(block)?, payload);
            bytes += payload.len() - before;
            if bytes > most_bytes {
                return Err(too_much());
            }
        }
    }
    let payload = |(number, bytes)| ImagePayload { kind: format!("{KIND}{number}"), version: VERSION, bytes };
    Ok(payloads.into_iter().enumerate().map(payload).collect())
}

/// Blocks of the disks of one machine, packed; empty ones are zero.
type Blocks = BTreeMap<(usize, usize), Vec<u8>>;

/// Takes the blocks out of an image's payloads; `None` if it says nothing of the contents of disks.
pub(super) fn take(payloads: &mut Vec<ImagePayload>) -> Result<Option<Blocks>> {
    let ours: Vec<ImagePayload> = payloads.extract_if(.., |payload| payload.kind.starts_with(KIND)).collect();
    if ours.is_empty() {
        return Ok(None);
    }
    let mut blocks = Blocks::new();
    for payload in ours {
        if payload.version != VERSION {
            let what =
                format!("the image's payload '{}' has version {}, this build reads {VERSION}", payload.kind, payload.version);
            return Err(Error::new(what).next("use the Twinstep that wrote it"));
        }
        mirror::each_block(&payload.bytes, &mut |disk, block, data| {
            let twice = blocks.insert((disk, block), data.to_vec()).is_some();
            if twice { Err(Error::new(format!("block {block} of disk {disk} comes twice in the image"))) } else { Ok(()) }
        })?;
    }
    Ok(Some(blocks))
}

/// The disks that a machine wants, with these blocks.
pub(super) fn disks(blocks: Blocks, wanted: &[DiskExtra]) -> Result<Vec<Box<dyn Disk>>> {
    let known = |number: usize, block: usize| {
        wanted.get(number).is_some_and(|want| !want.shared && (block as u64) < want.bytes.div_ceil(BLOCK_BYTES))
    };
    if let Some((number, block)) = blocks.keys().find(|(number, block)| !known(*number, *block)) {
        return Err(Error::new(format!("the image has block {block} of disk {number}, which the machine has not")));
    }
    let blocks = Arc::new(blocks);
    let disk = |(number, want): (usize, &DiskExtra)| match want.shared {
        true => Box::new(ElsewhereDisk(want.bytes)) as Box<dyn Disk>,
        false => Box::new(KeptDisk { number, size: want.bytes, blocks: blocks.clone(), written: BTreeMap::new() }),
    };
    Ok(wanted.iter().enumerate().map(disk).collect())
}

/// A disk of which some blocks are known.
#[derive(Debug)]
struct KeptDisk {
    number: usize,
    size: u64,
    blocks: Arc<Blocks>,
    /// What the machine has changed.
    written: BTreeMap<usize, Vec<u8>>,
}

impl KeptDisk {
    fn block_bytes(&self, block: usize) -> usize {
        (self.size - block as u64 * BLOCK_BYTES).min(BLOCK_BYTES) as usize
    }
    fn block(&self, block: usize) -> std::result::Result<Vec<u8>, DiskError> {
        if let Some(written) = self.written.get(&block) {
            return Ok(written.clone());
        }
        let length = self.block_bytes(block);
        match self.blocks.get(&(self.number, block)).map(Vec::as_slice) {
            Some([]) => Ok(vec![0; length]),
            Some(packed) => packing::unpack(packed, length)
                .map_err(|e| DiskError(format!("block {block} of disk {} cannot be unpacked: {e}", self.number))),
            None => Err(DiskError(format!(
                "this machine wants block {block} of disk {}, which the standby's machine did not read or write, and which is not in the recording",
                self.number
            ))),
        }
    }
    /// Splits a range at the borders of blocks: block, where in it, and where in the range.
    fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>, std::ops::Range<usize>)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let (at, left) = (offset + done as u64, length - done);
            let start = (at % BLOCK_BYTES) as usize;
            let now = left.min(BLOCK_BYTES as usize - start);
            let piece = ((at / BLOCK_BYTES) as usize, start..start + now, done..done + now);
            done += now;
            (now > 0).then_some(piece)
        })
    }
}

impl Disk for KeptDisk {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> std::result::Result<(), DiskError> {
        for (block, within, range) in Self::pieces(offset, data.len()) {
            data[range].copy_from_slice(&self.block(block)?[within]);
        }
        Ok(())
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> std::result::Result<(), DiskError> {
        for (block, within, range) in Self::pieces(offset, data.len()) {
            // Whoever overwrites all of it need not know what was there.
            let mut bytes = if within.len() == self.block_bytes(block) { vec![0; within.len()] } else { self.block(block)? };
            bytes[within].copy_from_slice(&data[range]);
            self.written.insert(block, bytes);
        }
        Ok(())
    }
    fn flush(&mut self) -> std::result::Result<(), DiskError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::SECTOR;

    fn wanted(bytes: u64, shared: bool) -> DiskExtra {
        DiskExtra { read_only: false, serial: String::new(), bytes, shared }
    }

    #[test]
    fn what_was_touched_is_there_as_it_was_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        // The last block is a short one.
        let size = 5 * BLOCK_BYTES + SECTOR;
        let mut disk = Replica::create(&dir.path().join("a.img"), None, size).unwrap();
        let block = |byte: u8| vec![byte; BLOCK_BYTES as usize];
        disk.write_block(1, &block(1)).unwrap();
        disk.write_block(5, &[5; SECTOR as usize]).unwrap();
        disk.keep_checkpoint(1 << 20);
        disk.write_at(2 * BLOCK_BYTES - 1024, &[7; 2048]).unwrap();
        disk.read_at(size - SECTOR, &mut [0; SECTOR as usize]).unwrap();

        let mut payloads = payloads(std::slice::from_ref(&disk), 1 << 20).unwrap();
        payloads.push(ImagePayload { kind: "cpu".into(), version: 1, bytes: vec![1] });
        let blocks = take(&mut payloads).unwrap().unwrap();
        assert_eq!(payloads.len(), 1, "the others stay");
        assert!(take(&mut payloads).unwrap().is_none());
        let mut disks = disks(blocks.clone(), &[wanted(size, false), wanted(SECTOR, true)]).unwrap();
        let kept = &mut disks[0];
        let mut read = vec![9; 2 * BLOCK_BYTES as usize];
        kept.read_at(BLOCK_BYTES, &mut read).unwrap();
        assert_eq!(read, [block(1), block(0)].concat());
        let mut last = [0; SECTOR as usize];
        kept.read_at(size - SECTOR, &mut last).unwrap();
        assert_eq!(last, [5; SECTOR as usize]);
        kept.write_at(2 * BLOCK_BYTES - 1024, &[7; 2048]).unwrap();
        kept.read_at(BLOCK_BYTES, &mut read).unwrap();
        let mut expected = [block(1), block(0)].concat();
        expected[BLOCK_BYTES as usize - 1024..][..2048].fill(7);
        assert_eq!(read, expected);
        // What nobody has touched is known again once it was overwritten.
        let unknown = kept.read_at(3 * BLOCK_BYTES, &mut last).unwrap_err();
        assert!(unknown.0.contains("block 3 of disk 0"), "{unknown}");
        assert!(kept.write_at(3 * BLOCK_BYTES, &last).is_err());
        kept.write_at(3 * BLOCK_BYTES, &block(3)).unwrap();
        kept.read_at(3 * BLOCK_BYTES, &mut last).unwrap();
        assert_eq!(last, [3; SECTOR as usize]);
        // Blocks that no disk has.
        assert!(super::disks(blocks.clone(), &[wanted(2 * BLOCK_BYTES, false)]).is_err());
        assert!(super::disks(blocks, &[wanted(size, true)]).is_err());
    }

    #[test]
    fn more_than_there_is_room_for_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Replica::create(&dir.path().join("a.img"), None, 4 * BLOCK_BYTES).unwrap();
        let noise: Vec<u8> = (0..BLOCK_BYTES).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8).collect();
        disk.write_block(0, &noise).unwrap();
        disk.keep_checkpoint(1 << 20);
        (&mut disk.clone() as &mut dyn Disk).read_at(0, &mut [0; 512]).unwrap();
        assert!(payloads(std::slice::from_ref(&disk), 1 << 20).is_ok());
        assert!(payloads(std::slice::from_ref(&disk), 1 << 10).unwrap_err().to_string().contains("than is kept"));
        disk.drop_checkpoint();
        assert!(payloads(&[disk], 1 << 20).is_err());
    }

    #[test]
    fn damaged_blocks_are_refused() {
        let payload = |bytes: Vec<u8>, version| vec![ImagePayload { kind: format!("{KIND}0"), version, bytes }];
        let mut twice = Vec::new();
        mirror::put_block(0, 1, &[1; 512], &mut twice);
        mirror::put_block(0, 1, &[2; 512], &mut twice);
        let mut cut = twice.clone();
        cut.pop();
        assert!(take(&mut payload(twice, VERSION)).is_err());
        assert!(take(&mut payload(cut, VERSION)).is_err());
        assert!(take(&mut payload(Vec::new(), VERSION + 1)).is_err());
        // It does not unpack to a block: the host fails, and nothing is made up.
        let mut short = Vec::new();
        mirror::put_block(0, 0, &[1; 512], &mut short);
        let blocks = take(&mut payload(short, VERSION)).unwrap().unwrap();
        let mut disks = disks(blocks, &[wanted(BLOCK_BYTES, false)]).unwrap();
        assert!(disks[0].read_at(0, &mut [0; 512]).unwrap_err().0.contains("cannot be unpacked"));
    }
}
