//! The switch with fake peers on real sockets.

use super::*;
use crate::arbiter::{Arbiter, DirectoryArbiter, Verdict};
use crate::net::frames::{HEADER, Mac, encode};
use crate::net::{Backend, Link, Token};
use std::fs;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

const WORLD: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];
const ALL: [u8; 6] = [0xff; 6];

struct Peer {
    stream: UnixStream,
    decoder: Decoder,
}

impl Peer {
    fn connect(path: &Path) -> Self {
        Self::of(UnixStream::connect(path).unwrap())
    }

    fn of(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { stream, decoder: Decoder::default() }
    }

    fn send(&mut self, to: [u8; 6], from: [u8; 6], text: &str) {
        let mut wire = Vec::new();
        encode(&[&to[..], &from, &[8, 0], text.as_bytes()].concat(), &mut wire);
        self.stream.write_all(&wire).unwrap();
    }

    /// The payload of the next frame; fails after ten seconds.
    fn hear(&mut self) -> String {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return String::from_utf8(frame[HEADER + 14..].to_vec()).unwrap();
            }
            assert!(self.decoder.fill(&mut self.stream).unwrap() > 0, "the switch has hung up");
        }
    }
}

fn start(options: Options) -> (Running, Receiver<Event>) {
    let (tell, events) = channel();
    let running = Switch::bind(options).unwrap().spawn(move |event| drop(tell.send(event))).unwrap();
    (running, events)
}

fn wait_for(events: &Receiver<Event>, what: impl Fn(&Event) -> bool) -> Event {
    loop {
        let event = events.recv_timeout(Duration::from_secs(10)).expect("the event comes");
        if what(&event) {
            return event;
        }
    }
}

fn options(dir: &tempfile::TempDir) -> Options {
    Options { listen: dir.path().join("switch"), ..Options::default() }
}

#[test]
fn a_failover_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (switch, events) = start(options(&dir));
    let path = dir.path().join("switch");
    let (mut world, mut primary) = (Peer::connect(&path), Peer::connect(&path));
    wait_for(&events, |e| *e == Event::Up(PortId(1)));
    primary.send(ALL, GUEST, "hello");
    assert_eq!(world.hear(), "hello");
    // This one is in the dead process's socket and was never read.
    world.send(GUEST, WORLD, "one");
    let arrived = poll(&mut [PollFd::new(&primary.stream, PollFlags::IN)], Some(&Timespec { tv_sec: 10, tv_nsec: 0 }));
    assert_eq!(arrived, Ok(1));
    drop(primary);
    wait_for(&events, |e| matches!(e, Event::Down(..)));
    world.send(GUEST, WORLD, "two");
    let mut standby = Peer::connect(&path);
    wait_for(&events, |e| matches!(e, Event::Up(_)));
    world.send(GUEST, WORLD, "three");
    standby.send(ALL, GUEST, "it is me");
    assert_eq!(world.hear(), "it is me");
    for text in ["one", "two", "three"] {
        assert_eq!(standby.hear(), text);
    }
    let found = wait_for(&events, |e| matches!(e, Event::Found { .. }));
    assert!(matches!(found, Event::Found { mac: Mac(GUEST), again: 1, kept: 2, .. }), "{found:?}");
    switch.stop().unwrap();
    assert!(!path.exists());
}

#[test]
fn a_peer_that_talks_nonsense_loses_its_port_and_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let (_switch, events) = start(options(&dir));
    let path = dir.path().join("switch");
    let (mut world, mut bad, mut guest) = (Peer::connect(&path), Peer::connect(&path), Peer::connect(&path));
    wait_for(&events, |e| *e == Event::Up(PortId(2)));
    bad.stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let Event::Down(_, why) = wait_for(&events, |e| matches!(e, Event::Down(..))) else { unreachable!() };
    assert!(why.contains("1195725856 bytes was announced"), "{why}");
    assert!(matches!(bad.stream.read(&mut [0; 9]), Ok(0) | Err(_)));
    guest.send(ALL, GUEST, "still here");
    assert_eq!(world.hear(), "still here");
}

#[test]
fn a_peer_that_never_reads_stops_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (_switch, events) = start(options(&dir));
    let path = dir.path().join("switch");
    let (mut world, mut stuck, mut guest) = (Peer::connect(&path), Peer::connect(&path), Peer::connect(&path));
    wait_for(&events, |e| *e == Event::Up(PortId(2)));
    stuck.send(WORLD, [2, 0, 0, 0, 0, 9], "I exist");
    guest.send(WORLD, GUEST, "I exist");
    // More than its queue and all buffers on the way hold.
    let big = "x".repeat(60_000);
    for _ in 0..200 {
        world.send([2, 0, 0, 0, 0, 9], WORLD, &big);
    }
    world.send(GUEST, WORLD, "through");
    while guest.hear() != "through" {}
}

#[test]
fn bytes_in_dribbles_and_frames_in_bursts() {
    let dir = tempfile::tempdir().unwrap();
    let (_switch, events) = start(options(&dir));
    let path = dir.path().join("switch");
    let (mut a, mut b) = (Peer::connect(&path), Peer::connect(&path));
    wait_for(&events, |e| *e == Event::Up(PortId(1)));
    let mut wire = Vec::new();
    encode(&[&ALL[..], &WORLD, &[8, 0], b"slow"].concat(), &mut wire);
    for byte in wire {
        a.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(b.hear(), "slow");
    let writer = std::thread::spawn(move || {
        for n in 0..2000 {
            a.send(ALL, WORLD, &n.to_string());
        }
        a
    });
    for n in 0..2000 {
        assert_eq!(b.hear(), n.to_string());
    }
    drop(writer.join().unwrap());
}

#[test]
fn an_uplink_is_connected_when_it_appears_and_again_after_it_died() {
    let dir = tempfile::tempdir().unwrap();
    let uplink = dir.path().join("passt");
    let (_switch, events) = start(Options { uplinks: vec![uplink.clone()], ..options(&dir) });
    let listener = UnixListener::bind(&uplink).unwrap();
    let mut passt = Peer::of(listener.accept().unwrap().0);
    let mut guest = Peer::connect(&dir.path().join("switch"));
    wait_for(&events, |e| *e == Event::Up(PortId(1)));
    guest.send(ALL, GUEST, "up");
    assert_eq!(passt.hear(), "up");
    drop(passt);
    wait_for(&events, |e| matches!(e, Event::Down(..)));
    let mut passt = Peer::of(listener.accept().unwrap().0);
    wait_for(&events, |e| matches!(e, Event::Up(_)));
    guest.send(ALL, GUEST, "up again");
    assert_eq!(passt.hear(), "up again");
}

#[test]
fn two_switches_can_not_share_a_socket_but_a_dead_ones_file_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let first = Switch::bind(options(&dir)).unwrap();
    let error = Switch::bind(options(&dir)).unwrap_err().to_string();
    assert!(error.contains("another process is listening"), "{error}");
    // What a SIGKILL leaves behind: the file without its listener.
    let path = dir.path().join("switch");
    let stale = dir.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    drop(first);
    fs::rename(&stale, &path).unwrap();
    Switch::bind(options(&dir)).unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let error = Switch::bind(Options { listen: "/nowhere/at/all".into(), ..Options::default() }).unwrap_err().to_string();
    assert!(error.contains("/nowhere/at/all") && error.contains("what to do"), "{error}");
}

/// A VM's cable, as a host has it: a link that says whose it is, and word of being fenced.
fn cable(path: &Path, epoch: u64, owner: u8) -> (Link, Receiver<u64>) {
    let receive = Box::new(|_| ControlFlow::Continue(()));
    let link = Backend::Switch(path.to_owned()).open(receive).unwrap();
    link.identify(Token { vm: [7; 16], epoch, owner: [owner; 16] });
    let (say, hear) = channel();
    link.when_fenced(Box::new(move |epoch| _ = say.send(epoch)));
    (link, hear)
}

fn guest_frame(text: &str) -> Vec<u8> {
    [&ALL[..], &GUEST, &[8, 0], text.as_bytes()].concat()
}

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_stale_host_is_refused_and_told_also_by_the_next_switch() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("switch");
    let (switch, events) = start(options(&dir));
    let mut world = Peer::connect(&path);
    let (stale, told) = cable(&path, 1, 1);
    stale.send(&guest_frame("before"));
    assert_eq!(world.hear(), "before");
    let (survivor, survivor_told) = cable(&path, 2, 2);
    survivor.send(&guest_frame("live"));
    assert_eq!(world.hear(), "live");
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 2);
    stale.send(&guest_frame("late"));
    survivor.send(&guest_frame("still live"));
    assert_eq!(world.hear(), "still live", "and nothing else");
    assert!(stale.statistics().dropped > 0);
    let fenced = wait_for(&events, |e| matches!(e, Event::Fenced { .. }));
    assert!(matches!(fenced, Event::Fenced { by: 2, .. }), "{fenced:?}");

    // Another switch on the same socket knows it as well, even if the stale one is the first that comes back.
    drop(survivor);
    switch.stop().unwrap();
    let (_switch, events) = start(options(&dir));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 2);
    wait_for(&events, |e| matches!(e, Event::Fenced { by: 2, .. }));
    assert!(survivor_told.try_recv().is_err());
}

#[test]
fn the_arbiter_knows_a_stale_host_that_the_switch_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("switch");
    let place = dir.path().join("arbiter");
    fs::create_dir(&place).unwrap();
    let arbiter = DirectoryArbiter::open(&place).unwrap();
    let [vm, right] = [twinstep_pair::VmId([7; 16]).to_string(), twinstep_pair::OwnerId([2; 16]).to_string()];
    assert_eq!(arbiter.claim(&vm, 2, &right), Verdict::Won);
    let spec = ArbiterSpec::Directory(place);
    let (_switch, events) = start(Options { arbiter: Some(spec), ..options(&dir) });
    let mut world = Peer::connect(&path);
    let (stale, told) = cable(&path, 1, 1);
    stale.send(&guest_frame("late"));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 2);
    // One that says it is the later epoch's, and is not.
    let (liar, told) = cable(&path, 2, 1);
    liar.send(&guest_frame("a lie"));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 2);
    let (survivor, _told) = cable(&path, 2, 2);
    survivor.send(&guest_frame("live"));
    assert_eq!(world.hear(), "live");
    // An epoch that nobody has entered may be one that a person has decided.
    let (decided, _told) = cable(&path, 3, 3);
    decided.send(&guest_frame("by hand"));
    assert_eq!(world.hear(), "by hand");
    let unproven = wait_for(&events, |e| matches!(e, Event::Unproven(..)));
    assert!(matches!(&unproven, Event::Unproven(_, why) if why.contains("no entry for epoch 3")), "{unproven:?}");
}

#[test]
fn a_message_that_is_not_known_costs_its_port() {
    let dir = tempfile::tempdir().unwrap();
    let (_switch, events) = start(options(&dir));
    let mut peer = Peer::connect(&dir.path().join("switch"));
    peer.stream.write_all(&[0x80, 0, 0, 4, 1, 9, 0, 0]).unwrap();
    let Event::Down(_, why) = wait_for(&events, |e| matches!(e, Event::Down(..))) else { unreachable!() };
    assert!(why.contains("kind 1, version 9"), "{why}");
}
