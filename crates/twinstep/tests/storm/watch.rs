//! Who speaks for the guest: every frame with its Ethernet address, on the ports of the LAN.
//!
//! *In*: frames from the ports of the hosts; questions that are asked all the time (ARP, each with a sender address that no other has had, to everybody, so that every
//! live machine answers). *Out*: what must not be. *Invariant*: once a host has announced the guest (it went live), no other host answers a question that was asked
//! after that. What another host was about to send before, and finds itself sending later (it was stopped in the middle), is known to the one that went live, and
//! is only counted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::street::{self, CLIENT, GUEST, GUEST_MAC, HOSTS};
use crate::sys;

/// Time between two questions.
const PACE: Duration = Duration::from_millis(20);
/// Questions that are remembered: those of a minute. An older one is answered by nobody.
const QUESTIONS: u32 = 3000;

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Where the guest is, and since when; at first it is where it answers first.
    home: Option<(usize, Instant)>,
    /// When each question was asked.
    asked: BTreeMap<u32, Instant>,
    /// Questions answered.
    pub answers: u64,
    /// Announcements.
    pub moves: u64,
    /// Frames that left a host after another one had announced the guest.
    pub late: u64,
    /// What must not be, in words.
    pub wrong: Vec<String>,
}

const ARP: [u8; 2] = [0x08, 0x06];
const RARP: [u8; 2] = [0x80, 0x35];
/// Questions come from Ethernet addresses that begin so.
const ASKER: [u8; 2] = [0x02, 0xaa];

impl Seen {
    fn asks(&mut self, question: u32, now: Instant) {
        self.asked.insert(question, now);
        self.asked.remove(&question.wrapping_sub(QUESTIONS));
    }

    /// A frame came from a host.
    fn frame(&mut self, host: usize, frame: &[u8], now: Instant) {
        if frame.get(6..12) != Some(&GUEST_MAC[..]) {
            return;
        }
        let (home, since) = *self.home.get_or_insert((host, now));
        if frame[12..14] == RARP {
            self.home = Some((host, now));
            self.moves += 1;
            return;
        }
        self.late += u64::from(host != home);
        // An answer: operation 2, to the address that asked.
        if frame[12..14] == ARP && frame.get(20..22) == Some(&[0, 2]) && frame.get(32..34) == Some(&ASKER[..]) {
            let question = u32::from_be_bytes(frame[34..38].try_into().expect("four bytes"));
            self.answers += 1;
            match self.asked.get(&question) {
                Some(asked) if host != home && *asked > since => {
                    self.wrong.push(format!("h{host} answered question {question}, which was asked when h{home} had gone live"))
                }
                _ => {}
            }
        }
    }
}

/// The watch.
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    over: Arc<AtomicBool>,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Begins.
    pub fn start() -> Self {
        let watch = Self { seen: Arc::default(), over: Arc::default() };
        for host in 0..HOSTS {
            let mut port = File::from(sys::frames(&street::lan_port(host)).expect("a port of the LAN"));
            let seen = watch.seen.clone();
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65536];
                loop {
                    match port.read(&mut buffer) {
                        Ok(n) => lock(&seen).frame(host, &buffer[..n], Instant::now()),
                        // Its cable was pulled out.
                        Err(e) if e.raw_os_error() == Some(libc::ENETDOWN) => {}
                        Err(e) => return lock(&seen).wrong.push(format!("the port of h{host} cannot be watched: {e}")),
                    }
                }
            });
        }
        let client: OwnedFd = sys::within(CLIENT, || sys::frames("eth0")).expect("the client's interface");
        let (seen, over) = (watch.seen.clone(), watch.over.clone());
        std::thread::spawn(move || {
            let mut client = File::from(client);
            for question in 0.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let frame = ask(question);
                lock(&seen).asks(question, Instant::now());
                // What is not sent is not answered.
                let _ = client.write(&frame);
                std::thread::sleep(PACE);
            }
        });
        watch
    }

    /// What was seen so far.
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Who has the guest's address?
fn ask(question: u32) -> Vec<u8> {
    let guest: std::net::Ipv4Addr = GUEST.parse().expect("an address");
    let asker = [&ASKER[..], &question.to_be_bytes()].concat();
    // The frame itself comes from an address that is always the same: switches need not learn those of the questions.
    let frame = [&[0xff; 6][..], &[2, 0xaa, 0xff, 0xff, 0xff, 0xff], &ARP, &[0, 1, 8, 0, 6, 4, 0, 1]].concat();
    let mut frame = [&frame[..], &asker, &[10, 0, 2, 200], &[0; 6], &guest.octets()].concat();
    frame.resize(60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(question: u32) -> Vec<u8> {
        let asker = [&ASKER[..], &question.to_be_bytes()].concat();
        let head = [&asker[..], &GUEST_MAC, &ARP, &[0, 1, 8, 0, 6, 4, 0, 2], &GUEST_MAC, &[10, 0, 2, 15]].concat();
        [&head[..], &asker, &[10, 0, 2, 200]].concat()
    }

    fn announcement() -> Vec<u8> {
        twinstep_host::net::announcement(twinstep_host::net::frames::Mac(GUEST_MAC))
    }

    #[test]
    fn two_that_answer_are_found_and_what_is_late_is_not() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut seen = Seen::default();
        (0..10).for_each(|n| seen.asks(n, at(u64::from(n) * 10)));
        seen.frame(0, &answer(0), at(5));
        seen.frame(1, &announcement(), at(55));
        // Both have made the answer to a question of before.
        seen.frame(1, &answer(3), at(56));
        seen.frame(0, &answer(3), at(99));
        assert_eq!((seen.answers, seen.moves, seen.late), (3, 1, 1));
        assert_eq!(seen.wrong, [""; 0]);
        seen.frame(1, &answer(7), at(99));
        assert_eq!(seen.wrong, [""; 0]);
        seen.frame(0, &answer(7), at(99));
        assert_eq!(seen.wrong.len(), 1);
        // Who has announced it may answer.
        seen.frame(0, &announcement(), at(100));
        seen.asks(10, at(101));
        seen.frame(0, &answer(10), at(102));
        assert_eq!((seen.wrong.len(), seen.answers, seen.late), (1, 6, 2));
        // Not the guest's.
        seen.frame(2, &ask(11), at(103));
        assert_eq!(seen.late, 2);
    }
}
