//! Tests of the disk.
use super::*;
use crate::disk::MemoryDisk;
use crate::virtio::testing::{Added, Driver};

fn config(read_only: bool) -> DiskConfig {
    DiskConfig { read_only, serial: "serial-number-of-more-than-20".into(), shared: false }
}
fn disk(read_only: bool) -> Driver {
    let contents = (0..64 * 512).map(|i| (i / 512) as u8).collect();
    let mut d = Driver::new(Box::new(Block::new(Box::new(MemoryDisk(contents)), 0, &config(read_only))));
    d.start(F_FLUSH);
    d
}
fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}
fn status(d: &Driver, chain: &Added) -> u8 {
    d.read(*chain.writable.last().unwrap(), 1)[0]
}
/// Adds, rings, waits. Returns the chain and the bytes reported as written.
fn request(d: &mut Driver, kind: u32, sector: u64, data: &[u8], room: &[u32]) -> (Added, u32) {
    let header = header(kind, sector);
    let readable: &[&[u8]] = if data.is_empty() { &[&header] } else { &[&header, data] };
    let chain = d.add(0, readable, &[room, &[1]].concat());
    d.kick(0);
    d.fire(d.now_ns + LATENCY_NS);
    let used = d.used(0);
    assert_eq!((used.len(), used[0].0), (1, chain.head));
    (chain, used[0].1)
}

#[test]
fn reads_and_writes() {
    let mut d = disk(false);
    let (chain, written) = request(&mut d, TYPE_IN, 3, &[], &[512, 512]);
    assert_eq!((status(&d, &chain), written), (STATUS_OK, 1025));
    assert_eq!(d.read(chain.writable[0], 512), [3; 512]);
    assert_eq!(d.read(chain.writable[1], 512), [4; 512]);
    let (chain, written) = request(&mut d, TYPE_OUT, 4, &[9; 512], &[]);
    assert_eq!((status(&d, &chain), written), (STATUS_OK, 1));
    let (chain, _) = request(&mut d, TYPE_IN, 4, &[], &[512]);
    assert_eq!(d.read(chain.writable[0], 512), [9; 512]);
    let (chain, _) = request(&mut d, TYPE_FLUSH, 0, &[], &[]);
    assert_eq!(status(&d, &chain), STATUS_OK);
    let (chain, _) = request(&mut d, TYPE_GET_ID, 0, &[], &[20]);
    assert_eq!(d.read(chain.writable[0], 20), b"serial-number-of-mor");
    assert_eq!(d.get(0x2000, 8), 64);
}

#[test]
fn completions_take_their_time_and_their_order() {
    let mut d = disk(false);
    d.now_ns = 1000;
    let header = header(TYPE_IN, 0);
    let a = d.add(0, &[&header], &[512, 1]);
    d.kick(0);
    d.now_ns = 2000;
    let b = d.add(0, &[&header], &[512, 1]);
    d.kick(0);
    assert_eq!(d.pci.deadline_ns(), Some(1000 + LATENCY_NS));
    d.fire(LATENCY_NS + 999);
    assert_eq!((d.used(0), d.interrupts()), (vec![], vec![]));
    d.check_save_restore(Box::new(Block::new(Box::new(MemoryDisk(vec![0; 64 * 512])), 0, &config(false))));
    d.fire(LATENCY_NS + 1000);
    assert_eq!((d.used(0), d.interrupts()), (vec![(a.head, 513)], vec![d.vector(0)]));
    assert_eq!(d.pci.deadline_ns(), Some(2000 + LATENCY_NS));
    d.fire(LATENCY_NS + 9999);
    assert_eq!(d.used(0), [(b.head, 513)]);
    assert_eq!(d.pci.deadline_ns(), None);
}

#[test]
fn wrong_requests_fail_for_the_guest() {
    let mut d = disk(true);
    for (kind, sector, data, room, expected) in [
        (TYPE_IN, 64, &[][..], &[512][..], STATUS_IO_ERROR),
        (TYPE_IN, u64::MAX, &[], &[512], STATUS_IO_ERROR),
        (TYPE_IN, 0, &[], &[511], STATUS_IO_ERROR),
        (TYPE_IN, 0, &[], &[16 << 20], STATUS_IO_ERROR),
        (TYPE_OUT, 0, &[1; 512], &[], STATUS_IO_ERROR),
        (99, 0, &[], &[], STATUS_UNSUPPORTED),
    ] {
        let (chain, written) = request(&mut d, kind, sector, data, room);
        assert_eq!((status(&d, &chain), written), (expected, 1), "type {kind} sector {sector}");
    }
    assert_eq!(d.offered() & F_RO, F_RO);
    // A header that is cut off.
    let chain = d.add(0, &[&[0; 15]], &[1]);
    d.kick(0);
    d.fire(d.now_ns + LATENCY_NS);
    assert_eq!(status(&d, &chain), STATUS_IO_ERROR);
    // No room for a status: the device is stopped.
    d.add(0, &[&[0; 16]], &[]);
    d.kick(0);
    assert_eq!(d.status() & 64, 64);
}

#[test]
fn offering_the_same_chain_for_ever_is_bounded() {
    let mut d = disk(false);
    let chain = d.add(0, &[&header(TYPE_FLUSH, 0)], &[1]);
    for _ in 0..1000 {
        d.offer(0, chain.head);
        d.kick(0);
    }
    assert_eq!(d.status() & 64, 64);
}

/// Fails as long as it is told to.
#[derive(Debug)]
struct Flaky(MemoryDisk, u32);

impl Disk for Flaky {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        if self.1 > 0 {
            self.1 -= 1;
            return Err(DiskError("no space left on device".into()));
        }
        self.0.read_at(offset, data)
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.0.write_at(offset, data)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

#[test]
fn the_hosts_errors_are_not_the_guests() {
    let mut d = Driver::new(Box::new(Block::new(Box::new(Flaky(MemoryDisk(vec![7; 4096]), 2)), 0, &config(false))));
    d.start(0);
    let chain = d.add(0, &[&header(TYPE_IN, 0)], &[512, 1]);
    d.kick(0);
    assert_eq!(d.failure.as_ref().map(|f| f.message.as_str()), Some("disk: no space left on device"));
    d.retry();
    assert!(d.failure.is_some());
    d.retry();
    assert_eq!(d.failure, None);
    d.fire(LATENCY_NS);
    assert_eq!(d.used(0), [(chain.head, 513)]);
    assert_eq!((status(&d, &chain), d.read(chain.writable[0], 1)), (STATUS_OK, vec![7]));
}

#[test]
fn another_disks_state_is_refused() {
    use crate::payload::Payloads;
    use crate::virtio::VirtioPci;
    let d = disk(false);
    let mut other = VirtioPci::new(Box::new(Block::new(Box::new(MemoryDisk(vec![0; 512])), 0, &config(false))), 0);
    other.assign(0);
    let error = other.restore(&mut Payloads::new(vec![d.pci.save()]).unwrap()).unwrap_err();
    assert!(error.to_string().contains("virtio-block0"), "{error}");
}

/// Two disks of which different things were written are different machines, although nothing else differs.
#[test]
fn what_was_written_is_part_of_the_state() {
    let saved = |data: u8, sector: u64| {
        let mut d = disk(false);
        request(&mut d, TYPE_OUT, sector, &[data; 512], &[]);
        d.with(|device, _| device.save().bytes)
    };
    assert_eq!(saved(1, 4), saved(1, 4));
    assert_ne!(saved(1, 4), saved(2, 4));
    assert_ne!(saved(1, 4), saved(1, 5));
}

#[test]
fn a_disk_of_old_stays_one() {
    let old = Payload::encode("virtio-block0", 1, &(64u64, Vec::<Done>::new()));
    let mut block = Block::new(Box::new(MemoryDisk(vec![0; 64 * 512])), 0, &config(false));
    assert_eq!(block.version(), WITH_WRITTEN);
    block.become_version(1);
    block.restore(&old, &old.bytes).unwrap();
    assert_eq!((block.version(), block.save()), (1, old.bytes.clone()));
    let mut new = Block::new(Box::new(MemoryDisk(vec![0; 64 * 512])), 0, &config(false));
    assert!(new.restore(&old, &old.bytes).is_err(), "the transport says which version it is");
}

fn shared() -> Block {
    let config = DiskConfig { shared: true, ..DiskConfig::default() };
    Block::new(Box::new(crate::disk::ElsewhereDisk(64 * 512)), 1, &config)
}

#[test]
fn a_shared_disk_waits_for_the_host() {
    let mut d = Driver::new(Box::new(shared()));
    d.start(F_FLUSH);
    // A write leaves, and is complete in its own time.
    let (chain, _) = request(&mut d, TYPE_OUT, 3, &[9; 512], &[]);
    assert_eq!(status(&d, &chain), STATUS_OK);
    assert!(!d.asks);
    // A read and a flush wait, also for long.
    let read = d.add(0, &[&header(TYPE_IN, 3)], &[512, 512, 1]);
    let flush = d.add(0, &[&header(TYPE_FLUSH, 0)], &[1]);
    d.kick(0);
    d.fire(d.now_ns + 10 * LATENCY_NS);
    assert!(d.asks && d.used(0).is_empty());
    let outputs = [Output::DiskWrite { disk: 1, offset: 3 * 512, data: vec![9; 512] }, Output::DiskFlush { disk: 1, request: 1 }];
    assert_eq!(d.outputs(), outputs);
    let waits = d.with(|pci, _| pci.waits_for());
    assert_eq!(waits, [(0, DiskWanted::Read { offset: 3 * 512, length: 1024 }), (1, DiskWanted::Flush)]);
    d.check_save_restore(Box::new(shared()));
    // They are done in any order.
    d.with(|pci, cx| pci.receive(cx, Received::DiskDone { request: 1, data: Vec::new() }));
    assert_eq!((d.used(0).as_slice(), status(&d, &flush)), (&[(flush.head, 1)][..], STATUS_OK));
    d.with(|pci, cx| pci.receive(cx, Received::DiskDone { request: 0, data: (0..1024).map(|i| (i / 512) as u8 + 5).collect() }));
    assert_eq!((d.used(0).as_slice(), status(&d, &read)), (&[(read.head, 1025)][..], STATUS_OK));
    assert_eq!((d.read(read.writable[0], 512), d.read(read.writable[1], 512)), (vec![5; 512], vec![6; 512]));
    // What nobody waits for changes nothing.
    d.with(|pci, cx| pci.receive(cx, Received::DiskDone { request: 0, data: vec![0; 1024] }));
    assert!(d.used(0).is_empty());
    // Beyond its end, or longer than the log can carry.
    for (sector, room) in [(64, 512), (0, MAX_SHARED_BYTES + 512)] {
        let (chain, _) = request(&mut d, TYPE_IN, sector, &[], &[room]);
        assert_eq!(status(&d, &chain), STATUS_IO_ERROR);
    }
    // A reset forgets.
    d.add(0, &[&header(TYPE_IN, 3)], &[512, 1]);
    d.kick(0);
    d.write(0x14, &[0]);
    assert!(d.with(|pci, _| pci.waits_for()).is_empty());
}
