//! Cables on real sockets.

use super::*;
use crate::net::Backend;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, channel};

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];
const PATIENCE: Duration = Duration::from_secs(10);

fn frame(text: &str) -> Vec<u8> {
    [&[0xff; 6][..], &GUEST, &[8, 0], text.as_bytes()].concat()
}

fn receiver() -> (Receive, Receiver<Vec<u8>>) {
    let (say, hear) = channel();
    (
        Box::new(move |arrival| if say.send(arrival.frame).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }),
        hear,
    )
}

fn read_frame(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(header) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn both_ways() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (receive, heard) = receiver();
    let link = Link::over_socket(ours, None, 0, receive).unwrap();
    link.send(&frame("out"));
    assert_eq!(read_frame(&mut theirs), frame("out"));
    let mut wire = Vec::new();
    crate::net::frames::encode(&frame("in"), &mut wire);
    theirs.write_all(&wire).unwrap();
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), frame("in"));
    // What no Ethernet carries.
    link.send(&[0; 13]);
    link.send(&vec![0; MAX_FRAME + 1]);
    assert_eq!(link.statistics(), Statistics { sent: 1, received: 1, dropped: 2, reconnected: 0 });
}

#[test]
fn a_slow_reader_gets_whole_frames_in_order_and_never_blocks_the_sender() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let link = Link::over_socket(ours, None, 0, receiver().0).unwrap();
    let big = "x".repeat(50_000);
    // More than socket and queue hold together: some are dropped, none is cut.
    for n in 0..400 {
        link.send(&frame(&format!("{n}:{big}")));
    }
    let statistics = link.statistics();
    assert!(statistics.dropped > 0 && statistics.sent > 0, "{statistics:?}");
    let mut last = None;
    for _ in 0..statistics.sent {
        let got = read_frame(&mut theirs);
        let text = String::from_utf8(got[14..].to_vec()).unwrap();
        let (n, rest) = text.split_once(':').unwrap();
        let n: u32 = n.parse().unwrap();
        assert!(rest == big && last.is_none_or(|last| last < n));
        last = Some(n);
    }
    link.send(&frame("after"));
    assert_eq!(read_frame(&mut theirs), frame("after"));
}

#[test]
fn a_connection_that_breaks_is_made_again_and_told_who_is_here() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("switch");
    let listener = UnixListener::bind(&path).unwrap();
    let (receive, heard) = receiver();
    let link = Backend::Switch(path).open(receive).unwrap();
    let (mut theirs, _) = listener.accept().unwrap();
    link.send(&frame("one"));
    assert_eq!(read_frame(&mut theirs), frame("one"));
    // Half a frame, then gone.
    theirs.write_all(&[0, 0, 0, 60, 1, 2]).unwrap();
    drop(theirs);
    let (mut theirs, _) = listener.accept().unwrap();
    assert_eq!(read_frame(&mut theirs), announcement(Mac(GUEST)));
    // A peer that talks nonsense is left as well.
    theirs.write_all(&[0xff; 8]).unwrap();
    let (mut theirs, _) = listener.accept().unwrap();
    assert_eq!(read_frame(&mut theirs), announcement(Mac(GUEST)));
    let mut wire = Vec::new();
    crate::net::frames::encode(&frame("in"), &mut wire);
    theirs.write_all(&wire).unwrap();
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), frame("in"));
    assert_eq!(link.statistics().reconnected, 2);
    // Dropping the link closes the connection.
    drop(link);
    assert_eq!(theirs.read(&mut [0; 100]).unwrap(), 0);
}

#[test]
fn nobody_there_is_told_with_a_way_out() {
    let error = Backend::Switch("/nowhere/switch".into()).open(receiver().0).unwrap_err().to_string();
    assert!(error.contains("twinstep switch --listen /nowhere/switch"), "{error}");
}

/// A large TCP segment, without its checksum.
fn large() -> Vec<u8> {
    let mut frame = frame("");
    frame.extend([0x45, 0, 0x13, 0xb0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    frame.extend([1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 2, 0, 0, 0, 0, 0]);
    frame.extend((0..5000).map(|i| i as u8));
    frame
}

#[test]
fn large_segments_leave_in_pieces_or_whole() {
    use twinstep_machine::offload::TcpFrame;
    for whole in [0, 5053, 5054] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let link = Link::over_socket(ours, None, whole, receiver().0).unwrap();
        link.send_large(&mut large(), 1448);
        let lengths: &[usize] = if whole == 5054 { &[5000] } else { &[1448, 1448, 1448, 656] };
        let mut stream: Vec<u8> = Vec::new();
        for length in lengths {
            let got = read_frame(&mut theirs);
            let h = TcpFrame::parse(&got).unwrap();
            assert_eq!(h.payload_len(), *length);
            // That of the IP header is the guest's, unless it is cut.
            assert!(whole == 5054 || h.checksums_hold(&got));
            stream.extend(&got[h.payload..]);
        }
        assert_eq!(stream, large()[54..]);
        link.send_large(&mut large()[..100], 1448);
        link.send_large(&mut large(), 0);
        let sent = lengths.len() as u64;
        assert_eq!(link.statistics(), Statistics { sent, received: 0, dropped: 2, reconnected: 0 });
    }
}
