//! The switch with fake peers on real sockets.

use super::*;
use crate::net::frames::{HEADER, Mac, encode};
use std::fs;
use std::io::Read;
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
