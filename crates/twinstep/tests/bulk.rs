//! Much data through a guest's network card, both ways, with the offloads a stock kernel uses: what arrives is what was sent, a replay does the same, and a
//! primary that dies in the middle takes nothing with it.
mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::process::{Command, Stdio};

use common::{PATIENCE, Twinstep, boot_with_network, content, folder, text, turn, twinstep, words};
use twinstep_host::guest::Network;
use twinstep_host::packages::{Store, tell_on_stderr};
use twinstep_host::passt::{self, Forward, free_port};

fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum is there");
    child.stdin.take().expect("piped").write_all(bytes).expect("it reads");
    let said = child.wait_with_output().expect("it ends").stdout;
    String::from_utf8_lossy(&said).split_whitespace().next().expect("a digest").to_owned()
}

/// What the guest is told: take a file, say its digest, give it back, say how many frames that took.
const WORK: &str = "echo 'until cat /proc/net/tcp /proc/net/tcp6 | grep -q \":18EB .*:0000 0A\"; do usleep 10000; done; echo it listens for $1: $?' > /listens; \
     echo 'read x; cat /file' > /give; (sh /listens taking &) ; nc -l -p 6379 > /file; sha256sum /file; (sh /listens giving &) ; \
     nc -l -p 6379 -e sh /give; echo frames: $(cat /sys/class/net/eth0/statistics/rx_packets /sys/class/net/eth0/statistics/tx_packets) end; \
     poweroff -f";

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Takes from the guest what it was given.
fn take_back(port: u16) -> Vec<u8> {
    // The guest begins only when it is asked: passt ends a connection whose very first word comes from the guest.
    let mut stream = connect(port);
    stream.write_all(b"go\n").unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    back
}

#[test]
fn bulk_transfers_are_whole_and_replay() {
    let _turn = turn(1);
    let folder = folder();
    let path = |name: &str| text(&folder.path().join(name));
    let (recording, snapshot) = (path("recording"), path("snapshot"));
    let (port, sent) = (free_port().unwrap(), content(1, 12 << 20));
    let mut vm = Twinstep::run(&[
        &boot_with_network("256M", "shell", &format!("user,forward={port}:6379")),
        &words(&["--record", &recording, "--digest-interval", "50000000"]),
    ]);
    vm.wait_console("TWINSTEP READY shell");
    vm.type_line(WORK);
    vm.wait_console("it listens for taking: 0");
    let mut stream = connect(port);
    stream.write_all(&sent).unwrap();
    drop(stream);
    vm.wait_console(&sha256(&sent));
    vm.wait_console("it listens for giving: 0");
    assert!(take_back(port) == sent, "what comes back is what was sent");
    let ended = vm.end().with(0);
    // Ordinary frames would have been eight thousand and more each way.
    let frames = ended.console.split("frames: ").filter_map(|rest| rest.split_once(" end")).find_map(|(frames, _)| {
        let counts: Vec<u64> = frames.split_whitespace().map_while(|n| n.parse().ok()).collect();
        <[u64; 2]>::try_from(counts).ok()
    });
    assert!(frames.is_some_and(|frames| frames.iter().all(|&n| n < 4000)), "{frames:?}");

    let replay = |more: &[&str]| twinstep(&[&["replay", &recording, "--json"], more].concat()).with(0).json();
    let plain = replay(&[]);
    assert!(plain["end"].as_str().unwrap().contains("complete"), "{plain}");
    assert!(plain["digests_checked"].as_u64() > Some(3) && plain["outputs_checked"].as_u64() > Some(100), "{plain}");
    // From the middle of the transfers: frames may be on their way through the card.
    let middle = (plain["position"].as_u64().unwrap() / 5 * 4).to_string();
    replay(&["--until", &middle, "--save", &snapshot]);
    assert_eq!(replay(&["--from", &snapshot])["digest"], plain["digest"]);
}

#[test]
fn a_transfer_outlives_the_primary() {
    let _turn = turn(2);
    let folder = folder();
    let path = |name: &str| text(&folder.path().join(name));
    let (arbiter, switch) = (path("arbiter"), path("switch"));
    std::fs::create_dir(&arbiter).unwrap();
    let (port, sent) = (free_port().unwrap(), content(1, 12 << 20));
    let passt = passt::start(&passt::Options {
        program: passt::program(&Store::open().unwrap(), &mut tell_on_stderr).unwrap(),
        forwards: vec![Forward { host: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), guest: 6379 }],
        network: Network::default(),
    })
    .unwrap();
    let _switch = Twinstep::start("switch", &words(&["switch", "--listen", &switch, "--uplink", &text(passt.socket())]));
    while !std::path::Path::new(&switch).exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let net = format!("switch={switch}");
    let standby =
        Twinstep::start("standby", &words(&["standby", "--listen", "127.0.0.1:0", "--arbiter", &arbiter, "--net", &net]));
    let address = standby.wait_said("waiting for a primary on ");
    let mut primary =
        Twinstep::run(&[&boot_with_network("256M", "shell", &net), &words(&["--protect", &address, "--arbiter", &arbiter])]);
    primary.wait_said("protected: ");
    primary.wait_console("TWINSTEP READY shell");
    primary.type_line(WORK);
    primary.wait_console("it listens for taking: 0");
    let mut stream = connect(port);
    // More than passt, sockets and the guest's window hold: a good part of it is in the guest.
    stream.write_all(&sent[..9 << 20]).unwrap();
    primary.kill();
    stream.write_all(&sent[9 << 20..]).unwrap();
    drop(stream);
    standby.wait_said("live: live in epoch 2");
    standby.wait_console(&sha256(&sent));
    standby.wait_console("it listens for giving: 0");
    assert!(take_back(port) == sent, "what comes back is what was sent");
    standby.end().with(0).says(&["the guest switched itself off"]);
}
