//! Copies by the thousand: a guest writes at random during the rounds, and at the end the destination holds what the guest held at the cut.
mod common;

use common::{Memory, STATE, World};
use proptest::prelude::*;
use twinstep_migrate::{Config, Copied, Destination, Event, Layout, Region, Source};

#[test]
fn the_destination_is_the_source_at_the_cut() {
    let (mut rounds, mut slowed, mut unchanged) = (0, 0, 0);
    for seed in 0..3_000 {
        let mut world = World::new(seed);
        world.run();
        let report = world.report.unwrap();
        assert!(world.at_cut.as_ref() == Some(&world.there.bytes), "seed {seed}: {report:?}");
        assert_eq!(world.percent, 0, "seed {seed}: the guest is free again");
        rounds = rounds.max(report.rounds);
        slowed += u64::from(report.slowed_percent > 0);
        unchanged += report.unchanged;
        let arrived = world.arrived();
        assert_eq!((arrived.state, arrived.rounds), (STATE.to_vec(), report.rounds), "seed {seed}");
        assert_eq!(arrived.units, report.units + report.zeroes, "seed {seed}");
    }
    assert!(rounds > 3 && slowed > 100 && unchanged > 1000, "the world has become too mild: {rounds}, {slowed}, {unchanged}");
}

#[test]
fn a_lost_way_leaves_the_source_as_it_was_and_the_destination_knows() {
    for seed in 0..1_500 {
        let mut world = World::new(seed);
        let mut left = world.random.below(60);
        while left > 0 && world.step() {
            left -= 1;
        }
        let over = world.report.is_some() && world.way.is_empty();
        assert_eq!(world.destination.finish().is_ok(), over, "seed {seed}");
        // The guest's memory was never touched, only read: what it wrote is all that there is, and the next copy finds it.
        let mut again = World::new(seed);
        again.guest.bytes = world.guest.bytes.clone();
        again.run();
        assert!(again.at_cut.as_ref() == Some(&again.there.bytes), "seed {seed}");
    }
}

/// The stream of a small copy.
fn stream() -> (Layout, Vec<u8>) {
    let layout = Layout::new(vec![Region { unit_bytes: 512, units: 70 }, Region { unit_bytes: 4096, units: 2 }]).unwrap();
    let mut guest = Memory::zero(&layout);
    guest.bytes[0].iter_mut().enumerate().for_each(|(i, byte)| *byte = if i < 20_000 { (i / 7) as u8 } else { 0 });
    guest.bytes[1][5000] = 9;
    let mut source = Source::new(0, layout.clone(), b"preface", Config::default());
    source.handle(0, Event::Room { bytes: u64::MAX });
    let mut stream = Vec::new();
    loop {
        match source.poll() {
            Some(twinstep_migrate::Action::Send(bytes)) => stream.extend(bytes),
            Some(twinstep_migrate::Action::Collect) => source.handle(1, Event::Dirty(layout.nothing())),
            Some(twinstep_migrate::Action::Read { region, units }) => {
                source.handle(2, Event::Copied(guest.copy(region, units.into_iter())));
            }
            Some(twinstep_migrate::Action::Cut { .. }) => {
                let copied: Vec<Copied> = vec![guest.copy(0, [1, 2].into_iter())];
                source.handle(3, Event::Finished { copied, state: STATE.to_vec(), pause_ns: 1 });
            }
            Some(_) => {}
            None => return (layout, stream),
        }
    }
}

fn take(layout: &Layout, stream: &[u8], piece: usize) -> Result<(), String> {
    let (mut destination, mut there) = (Destination::new(), Memory::zero(layout));
    for piece in stream.chunks(piece) {
        destination.push(piece, &mut there).map_err(|e| e.to_string())?;
    }
    destination.finish().map(drop).map_err(|e| e.to_string())
}

#[test]
fn a_stream_may_be_cut_anywhere_but_not_off() {
    let (layout, stream) = stream();
    for piece in [1, 2, 31, 32, 33, 1000, stream.len()] {
        take(&layout, &stream, piece).unwrap();
    }
    for end in 0..stream.len() {
        assert!(take(&layout, &stream[..end], 500).is_err(), "{end}");
    }
    let longer = [&stream[..], b"x"].concat();
    assert!(take(&layout, &longer, 500).is_err());
}

#[test]
fn a_damaged_stream_is_refused() {
    let (layout, stream) = stream();
    for at in 0..stream.len() {
        let mut other = stream.clone();
        other[at] ^= 1 << (at % 8);
        assert!(take(&layout, &other, 4000).is_err(), "byte {at}");
    }
}

#[test]
fn the_format_stays() {
    let (_, stream) = stream();
    let hex: String = stream.iter().map(|byte| format!("{byte:02x}")).collect();
    let golden = include_str!("golden-1.txt").trim();
    assert!(hex == golden, "the stream's format has changed; if that is wanted, it needs a new number. It is now\n{hex}");
}

#[test]
fn a_copy_that_lacks_units_or_lies_about_them_is_refused() {
    use twinstep_migrate::stream::Encoder;
    let layout = Layout::new(vec![Region { unit_bytes: 512, units: 3 }]).unwrap();
    let copy = |units: &[u64], digest: u128, sent: u64, rounds: &[u64]| {
        let (mut encoder, mut bytes) = (Encoder::new(layout.clone()), Vec::new());
        encoder.begin(b"preface", &mut bytes);
        rounds.iter().for_each(|&round| encoder.round(round, &mut bytes));
        encoder.zeroes(0, units, &mut bytes);
        encoder.end(b"", &[digest], sent, &mut bytes);
        take(&layout, &bytes, 100)
    };
    copy(&[0, 1, 2], 0, 3, &[1, 2]).unwrap();
    for (found, named) in [
        (copy(&[0, 2], 0, 2, &[1]), "1 units of region 0 never came"),
        (copy(&[0, 1, 2], 0, 4, &[1]), "3 units came, 4 were sent"),
        (copy(&[0, 1, 2], 5, 3, &[1]), "the digest of region 0 is not the source's"),
        (copy(&[0, 1, 2], 0, 3, &[1, 3]), "round 3 comes after round 1"),
    ] {
        assert!(found.as_ref().unwrap_err().contains(named), "{found:?}");
    }
    // A target that wants another machine says so.
    let (other, stream) = stream();
    let mut there = Memory::zero(&Layout::new(vec![Region::pages(1)]).unwrap());
    assert_ne!(other, there.layout);
    let mut destination = Destination::new();
    assert_eq!(destination.push(&stream, &mut there).unwrap_err().to_string(), "another machine");
    assert_eq!(destination.push(&stream, &mut there).unwrap_err().to_string(), "the copy has failed before");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Arbitrary bytes, behind a sound beginning or none, end in an error or wait for more.
    #[test]
    fn nonsense_never_panics(begun: bool, noise in proptest::collection::vec(any::<u8>(), 0..300), kind in 0_u8..8, length in 0_u32..100, number: u64, present: u64) {
        let (layout, stream) = stream();
        let mut bytes = if begun { stream[..32 + 32 + 7].to_vec() } else { Vec::new() };
        // A header with a sound checksum, so that what is behind the checksums is reached.
        let mut header = vec![0; 4];
        header.extend([kind, noise.first().copied().unwrap_or(0) % 3, kind / 4, 0]);
        header.extend(length.to_le_bytes());
        let body: Vec<u8> = noise.iter().copied().cycle().take(if noise.is_empty() { 0 } else { length as usize }).collect();
        header.extend(crc32fast::hash(&body).to_le_bytes());
        header.extend(if number % 3 == 0 { number } else { number % 2 * 64 }.to_le_bytes());
        header.extend(present.to_le_bytes());
        let check = crc32fast::hash(&header[4..]);
        header[..4].copy_from_slice(&check.to_le_bytes());
        bytes.extend(header);
        bytes.extend(body);
        bytes.extend(&noise);
        let _ = take(&layout, &bytes, 64);
    }
}
