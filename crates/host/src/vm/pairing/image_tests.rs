//! A machine with a disk, copied from one side to the other without a network or a protocol, while a guest writes to both.
use twinstep_machine::{Config, DiskConfig, Machine};

use super::feed::Feed;
use super::*;
use crate::vm::arrival::Arrival;
use crate::vm::disks;
use crate::vm::mirror::Target;
use crate::vm::precopy::{CopyWiring, Copying, MirroredDisks, Surroundings, serve};

const BLOCKS: usize = 200;
const WRITER: Writer = Writer { vm: [1; 16], epoch: 1, owner: [2; 16] };
/// What the standby takes ahead of what it has used up; less than a cut makes.
const WINDOW: u64 = 1 << 20;

/// The standby.
struct There {
    target: Target,
    arrival: Option<Arrival>,
}

impl There {
    /// Takes all that it is given; gives what it says.
    fn take(&mut self, feed: &mut Feed) -> Vec<u8> {
        let mut said = Vec::new();
        while let Some(chunk) = feed.next() {
            let arrival = &mut self.arrival;
            let report = self.target.take(&chunk, &mut |image, replicas| {
                arrival.get_or_insert_with(|| Arrival::new(replicas.to_vec(), 0, |_| {})).push(image)
            });
            said.extend(report.unwrap());
            feed.want(chunk.len() as u64);
        }
        said
    }
}

/// What a guest does between two slices: `turn` after `turn` something else.
fn write(machine: &mut Machine, disk: &Replica, turn: usize) {
    machine.write_ram_page(turn * 7 % 1000, &[turn as u8; 4096]);
    disk.write_block(turn * 13 % BLOCKS, &[turn as u8; 65536]).unwrap();
}

#[test]
fn a_machine_and_its_disk_arrive_as_they_were_at_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let disk = [Replica::create(&dir.path().join("here.img"), None, BLOCKS as u64 * 65536).unwrap()];
    disk[0].begin(WRITER, true).unwrap();
    let config = Config { ram_mib: 64, disks: vec![DiskConfig::default()], ..Config::default() };
    let mut machine = Machine::new(config, disks::of_machine(&disk)).unwrap();
    (0..1000).for_each(|turn| write(&mut machine, &disk[0], turn));

    let (to_pair, pair) = Post::new().unwrap();
    let (to_vm, vm) = std::sync::mpsc::channel();
    let spec = dir.path().join("there.img").to_str().unwrap().parse().unwrap();
    let mut there = There { target: Target::new(vec![spec], false, [3; 16]), arrival: None };
    let mut feed = Feed::default();
    feed.want(WINDOW);
    let (mut mirror, mut copying) = (Some(Mirror::start(disk.to_vec(), WRITER, 7, to_pair.clone()).unwrap()), None);
    let (mut copier, mut baseline, mut cut, mut turn) = (None, None, None, 0);
    // The machine's thread, the pair's, and the standby are one here: whatever order their words come in is one that can happen.
    while !feed.is_over() {
        if let Ok(message) = pair.recv_timeout(Duration::from_micros(100)) {
            match message {
                ToPair::Copied { bytes, .. } => feed.pieces(bytes, true),
                ToPair::Mirrored { outcome, .. } => {
                    mirror = None;
                    feed.take_back();
                    let mirrored = MirroredDisks { mirror: 7, baseline: outcome.unwrap().baseline };
                    copying = Some(Copying::start(CopyWiring {
                        id: 1,
                        config: twinstep_migrate::Config::default(),
                        disks: Some((disk.to_vec(), mirrored)),
                        vm: to_vm.clone(),
                        pair: to_pair.clone(),
                        events: Events::new("test", true, None).unwrap(),
                        board: Board::new("test"),
                    }));
                    // More than may be left for the cut.
                    (0..100).for_each(|_| {
                        turn += 1;
                        write(&mut machine, &disk[0], turn);
                    });
                }
                ToPair::Copy(1, CopyNews::Bytes(bytes)) => feed.image(bytes),
                ToPair::Copy(1, CopyNews::Blocks { pieces, in_room }) => feed.pieces(pieces, in_room),
                ToPair::Copy(1, CopyNews::Cut { position, .. }) => {
                    assert!(cut.replace(position).is_none());
                }
                ToPair::Copy(1, CopyNews::Done(report)) => {
                    assert!(report.cut_units > 0, "the guest wrote on");
                    feed.end();
                }
                other => panic!("{other:?}"),
            }
        }
        while let Ok(ToVm::Copy(ask)) = vm.try_recv() {
            let around = Surroundings { disks: &disk, last_output: 5, pair: &to_pair };
            serve(&mut copier, &mut baseline, &mut machine, ask, &around).unwrap();
        }
        if baseline.is_none() {
            turn += 1;
            write(&mut machine, &disk[0], turn);
        }
        let said = there.take(&mut feed);
        match (&mirror, &copying) {
            (Some(mirror), _) => {
                mirror.report(said);
                mirror.room(feed.grant());
            }
            (None, Some(copying)) => copying.room(feed.grant()),
            (None, None) => unreachable!("one of them is under way"),
        }
    }

    let (mut arrived, extra) = there.arrival.unwrap().finish(cut.expect("a cut was made")).unwrap();
    there.target.finish().unwrap();
    assert_eq!(extra.last_output, 5);
    assert_eq!(machine.digest().differences(&arrived.digest()), Vec::<String>::new());
    for block in 0..BLOCKS {
        assert!(disk[0].read_block(block).unwrap() == there.target.replicas()[0].read_block(block).unwrap(), "block {block}");
    }
}
