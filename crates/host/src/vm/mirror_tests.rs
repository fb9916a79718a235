//! Tests of the mirror: two sides without a network between them.
use super::*;
use crate::disk::Role;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use twinstep_machine::Disk;

const BLOCKS: usize = 40;
/// The last block is a short one.
const BYTES: u64 = (BLOCKS as u64 - 1) * BLOCK_BYTES + 512;
const WRITER: Writer = Writer { vm: [1; 16], epoch: 1, owner: [2; 16] };

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// A disk with something in it, of a VM that is to be protected.
    fn primary(&self) -> Replica {
        let disk = Replica::create(&self.path("primary.img"), None, BYTES).unwrap();
        for block in 0..BLOCKS / 2 {
            disk.write_block(block, &vec![block as u8; disk.block_bytes(block)]).unwrap();
        }
        disk.begin(WRITER, true).unwrap();
        disk
    }
    fn target(&self, name: &str, force: bool) -> Target {
        let spec: DiskSpec = self.path(name).to_str().unwrap().parse().unwrap();
        Target::new(vec![spec], force, [3; 16])
    }
}

fn no_image(_: &[u8], _: &[Replica]) -> Result<()> {
    Err(Error::new("no machine was sent"))
}

/// Mirrors to the end. Gives how many blocks were sent before the cut.
fn mirror(disk: &Replica, target: &mut Target) -> Result<usize> {
    let (to, from) = Post::new().unwrap();
    let mirror = Mirror::start(vec![disk.clone()], WRITER, 7, to)?;
    mirror.room(1 << 20);
    loop {
        match from.recv().unwrap() {
            ToPair::Copied { number: 7, bytes } => {
                let report = target.take(&bytes, &mut no_image)?;
                // In pieces, as a network does.
                report.chunks(1000).for_each(|piece| mirror.report(piece.to_vec()));
                mirror.room(bytes.len() as u64);
            }
            ToPair::Mirrored { number: 7, outcome } => {
                let done = outcome.map_err(Error::new)?;
                // The machine's image comes before the rest and after it.
                let blocks = rest(std::slice::from_ref(disk), 7, done.baseline)?.expect("nobody gave it up");
                let bytes = [image_head(6), b"the ma".to_vec(), blocks, image_head(0), image_head(5), b"chine".to_vec()].concat();
                let mut machine = Vec::<u8>::new();
                for piece in bytes.chunks(1000) {
                    target.take(piece, &mut |part, replicas| {
                        machine.extend(part);
                        assert_eq!(replicas.len(), 1);
                        Ok(())
                    })?;
                }
                target.finish()?;
                assert_eq!(machine, b"the machine");
                return Ok(done.figures["blocks"].as_u64().unwrap() as usize);
            }
            other => panic!("{other:?}"),
        }
    }
}

fn assert_equal(disk: &Replica, target: &Target) {
    for block in 0..BLOCKS {
        assert!(disk.read_block(block).unwrap() == target.replicas()[0].read_block(block).unwrap(), "block {block}");
    }
}

fn write(disk: &Replica, block: usize, byte: u8) {
    disk.write_block(block, &vec![byte; disk.block_bytes(block)]).unwrap();
}

#[test]
fn a_missing_image_is_made_and_only_what_changed_is_sent_again() {
    let world = World::new();
    let disk = world.primary();
    for name in ["standby.img", "standby.qcow2"] {
        let mut target = world.target(name, false);
        // The first block of the primary's is zero as well.
        assert_eq!(mirror(&disk, &mut target).unwrap(), BLOCKS / 2 - 1);
        assert_equal(&disk, &target);
        assert_eq!(target.replicas()[0].state().unwrap().role, Role::Following);
    }
    // Both sides write on: the same, and each something of its own.
    let target = world.target("standby.qcow2", false);
    let standby = Replica::open(&world.path("standby.qcow2"), None, Access::ReadWrite).unwrap();
    write(&disk, 3, 77);
    write(&standby, 3, 77);
    write(&disk, BLOCKS - 1, 78);
    write(&standby, 5, 79);
    standby.close().unwrap();
    drop((standby, target));
    let mut target = world.target("standby.qcow2", false);
    assert_eq!(mirror(&disk, &mut target).unwrap(), 2);
    assert_equal(&disk, &target);
}

#[test]
fn what_the_guest_writes_meanwhile_arrives_too() {
    let world = World::new();
    let disk = world.primary();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut machine = disk.clone();
        let done = &done;
        // The guest is stopped at the cut, as the machine's thread makes it: `mirror` cuts when it has heard of the end.
        let guest = scope.spawn(move || {
            let mut random = 1u64;
            let mut writes = 0;
            while !done.load(Ordering::Acquire) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let offset = (random >> 33) % (BYTES / 512) * 512;
                machine.write_at(offset, &[random as u8; 512]).unwrap();
                writes += 1;
            }
            writes
        });
        let mut target = world.target("standby.img", false);
        let (to, from) = Post::new().unwrap();
        let mirror = Mirror::start(vec![disk.clone()], WRITER, 7, to).unwrap();
        mirror.room(1 << 30);
        let baseline = loop {
            match from.recv().unwrap() {
                ToPair::Copied { bytes, .. } => mirror.report(target.take(&bytes, &mut no_image).unwrap()),
                ToPair::Mirrored { outcome, .. } => break outcome.unwrap().baseline,
                other => panic!("{other:?}"),
            }
        };
        done.store(true, Ordering::Release);
        assert!(guest.join().unwrap() > 0);
        let bytes = rest(std::slice::from_ref(&disk), 7, baseline).unwrap().unwrap();
        target.take(&bytes, &mut no_image).unwrap();
        target.finish().unwrap();
        assert_equal(&disk, &target);
    });
}

#[test]
fn rounds_go_on_while_the_machine_is_copied() {
    let world = World::new();
    let blocks = 2 * SMALL;
    let disk = [Replica::create(&world.path("primary.img"), None, blocks as u64 * BLOCK_BYTES).unwrap()];
    disk[0].begin(WRITER, true).unwrap();
    let mut target = world.target("standby.img", false);
    let (to, from) = Post::new().unwrap();
    let mirror = Mirror::start(disk.to_vec(), WRITER, 7, to).unwrap();
    mirror.room(1 << 30);
    let baseline = loop {
        match from.recv().unwrap() {
            ToPair::Copied { bytes, .. } => mirror.report(target.take(&bytes, &mut no_image).unwrap()),
            ToPair::Mirrored { outcome, .. } => break outcome.unwrap().baseline,
            other => panic!("{other:?}"),
        }
    };
    let a_round = |target: &mut Target| {
        let mut sent = 0;
        let mut send = |pieces: Vec<u8>| {
            sent += pieces.len();
            target.take(&pieces, &mut no_image).map(|_| ())
        };
        round(&disk, 7, &mut send).unwrap();
        sent
    };
    (0..blocks - 1).for_each(|block| write(&disk[0], block, 2));
    assert_eq!(unsent(&disk, 7), blocks - 1);
    assert!(a_round(&mut target) > 0);
    assert_eq!(disk[0].unsent(7), 0);
    write(&disk[0], blocks - 1, 3);
    assert_eq!(unsent(&disk, 7), 1);
    let bytes = rest(&disk, 7, baseline).unwrap().unwrap();
    target.take(&bytes, &mut no_image).unwrap();
    target.finish().unwrap();
    for block in 0..blocks {
        assert!(disk[0].read_block(block).unwrap() == target.replicas()[0].read_block(block).unwrap(), "block {block}");
    }
    assert!(rest(&disk, 7, baseline).unwrap().is_none(), "it is over");
}

#[test]
fn a_mirror_that_was_given_up_takes_nothing_from_the_next() {
    let world = World::new();
    let disk = [world.primary()];
    disk[0].begin_mirror(1);
    disk[0].begin_mirror(2);
    write(&disk[0], 5, 1);
    assert!(disk[0].take_unsent(1).is_none() && disk[0].unsent(1) == 0);
    assert!(rest(&disk, 1, Baseline([9; 16])).unwrap().is_none());
    disk[0].end_mirror(1);
    assert_eq!(disk[0].take_unsent(2).unwrap().iter().collect::<Vec<_>>(), [5]);
}

#[test]
fn an_image_of_unknown_content_is_compared_by_hashes() {
    let world = World::new();
    let disk = world.primary();
    let copy = |name: &str| std::fs::copy(world.path("primary.img"), world.path(name)).unwrap();
    copy("copy.img");
    write(&disk, 7, 99);
    let mut target = world.target("copy.img", false);
    assert_eq!(mirror(&disk, &mut target).unwrap(), 1);
    assert_equal(&disk, &target);
    // Somebody else writes to it: the sidecar's word is not taken.
    target.replicas()[0].close().unwrap();
    drop(target);
    let mut bytes = std::fs::read(world.path("copy.img")).unwrap();
    bytes[9 * BLOCK_BYTES as usize] ^= 1;
    std::fs::write(world.path("copy.img"), bytes).unwrap();
    let mut target = world.target("copy.img", false);
    assert_eq!(mirror(&disk, &mut target).unwrap(), 1);
    assert_equal(&disk, &target);
}

#[test]
fn images_that_must_not_be_overwritten_are_not() {
    let world = World::new();
    let disk = world.primary();
    std::fs::File::create(world.path("small.img")).unwrap().set_len(4096).unwrap();
    let refused = mirror(&disk, &mut world.target("small.img", true)).unwrap_err().to_string();
    assert!(refused.contains("has 4096 bytes, the primary's disk"), "{refused}");

    let other = Replica::create(&world.path("other.img"), None, BYTES).unwrap();
    other.begin(WRITER, true).unwrap();
    other.close().unwrap();
    drop(other);
    let refused = mirror(&disk, &mut world.target("other.img", false)).unwrap_err().to_string();
    assert!(refused.contains("a replica of another disk") && refused.contains("--force-stale-disk"), "{refused}");
    mirror(&disk, &mut world.target("other.img", true)).unwrap();

    // A replica that went on alone is newer than the primary's.
    let survivor = Replica::open(&world.path("other.img"), None, Access::ReadWrite).unwrap();
    survivor.alone(2, Some([3; 16])).unwrap();
    drop(survivor);
    let refused = mirror(&disk, &mut world.target("other.img", false)).unwrap_err().to_string();
    assert!(refused.contains("it is newer: generation 2 here, 1 there"), "{refused}");
    // A disk that the guest writes to cannot be read-only here.
    let refused = mirror(&disk, &mut world.target("other.img,ro", true)).unwrap_err().to_string();
    assert!(refused.contains("without ,ro"), "{refused}");
}

#[test]
fn nonsense_is_refused() {
    let world = World::new();
    let disk = Replica::create(&world.path("a.img"), None, BYTES).unwrap();
    let piece = |kind: u8, body: &[u8]| {
        let mut bytes = Vec::new();
        put_piece(kind, &[body], &mut bytes);
        bytes
    };
    let block = |disk: u32, block: u32, data: &[u8]| [&disk.to_le_bytes()[..], &block.to_le_bytes(), data].concat();
    for wrong in [block(1, 0, &[]), block(0, BLOCKS as u32, &[]), block(0, 0, &[9; 5]), vec![0; 7]] {
        assert!(take_blocks(&piece(BLOCK, &wrong), std::slice::from_ref(&disk)).is_err(), "{wrong:?}");
    }
    let short = packing::pack(&[1; 100]);
    assert!(take_blocks(&piece(BLOCK, &block(0, 0, &short)), std::slice::from_ref(&disk)).is_err());
    let whole = piece(BLOCK, &block(0, 0, &[]));
    assert_eq!(take_blocks(&whole, std::slice::from_ref(&disk)).unwrap(), 1);
    assert!(take_blocks(&whole[..whole.len() - 1], std::slice::from_ref(&disk)).is_err());
    for wrong in [
        piece(9, b""),
        piece(OFFER, b"x"),
        [&[OFFER, 1, 0, 0][..], &[0; 4]].concat(),
        [&[BLOCK, 0, 0, 0][..], &[255; 4]].concat(),
    ] {
        assert!(world.target("b.img", false).take(&wrong, &mut no_image).is_err(), "{wrong:?}");
    }
    assert!(!Path::new(&world.path("b.img")).exists());
}
