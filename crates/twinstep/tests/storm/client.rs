//! The client: a Redis connection that never ends, and files that come and go; every acknowledged write is remembered.
//!
//! *In*: the guest's address. *Out*: what is wrong, in words. *Invariant*: a file counts as acknowledged when the guest has written it to its disk, has forgotten its
//! copy in memory, and has sent back what it then read; from then on it must be there, byte by byte.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use twinstep_host::redis_check::{Options, Report, Running};

use crate::common::content;
use crate::street::{CLIENT, GUEST};
use crate::sys;

/// How long the guest may be silent: a side that has lost the other waits for its arbiter as long as that is cut off.
const PATIENCE: Duration = Duration::from_secs(90);
/// Redis's keys.
const KEYS: usize = 500;
/// The guest's port for files.
const FILES_PORT: u16 = 7000;
/// Bytes of a file.
const FILE: usize = 96 << 10;
/// Names that are used again and again, so that the disk does not fill up.
const NAMES: u64 = 6;
/// Between two files.
const PAUSE: Duration = Duration::from_millis(100);

/// What the guest is told on its console: a file system, Redis, files; and what it shows then.
pub const SET_UP: &str = "mkdir -p /mnt && mke2fs -F /dev/vda > /dev/null && mount /dev/vda /mnt && echo 1 > /proc/sys/vm/overcommit_memory && \
     printf '%s\\n' '#!/bin/sh' 'read -r what name size' \
     '[ $what = put ] && { head -c $size > /mnt/$name; sync; echo 3 > /proc/sys/vm/drop_caches; }' 'cat /mnt/$name' > /file && chmod 755 /file && \
     (redis-server /etc/redis.conf & nc -ll -p 7000 -e /file & until grep -q ':18EB .* 0A ' /proc/net/tcp && grep -q ':1B58 .* 0A ' /proc/net/tcp*; do usleep 10000; \
     done; echo set up $((1 + 1)) )";
/// What it shows then.
pub const IS_SET_UP: &str = "set up 2";

/// Files that must be there.
#[derive(Default)]
struct Files {
    /// Each name's number and length.
    acknowledged: Mutex<BTreeMap<String, (u64, usize)>>,
    transfers: AtomicU64,
    /// Whether every file gets a name of its own, of which each needs room on the disk.
    growing: AtomicBool,
    over: AtomicBool,
}

/// A client at work.
pub struct Client {
    redis: Running,
    files: Arc<Files>,
    sender: JoinHandle<Result<(), String>>,
}

/// One connection: what is asked and sent, and what comes back.
fn exchange(ask: &str, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    sys::within(CLIENT, || {
        let address: SocketAddr = (GUEST.parse::<std::net::IpAddr>().expect("an address"), FILES_PORT).into();
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(ask.as_bytes())?;
        stream.write_all(bytes)?;
        let mut back = Vec::new();
        (&stream).read_to_end(&mut back)?;
        Ok(back)
    })
}

/// What is wrong with a file that came back, if anything.
fn compare(name: &str, sent: &[u8], got: std::io::Result<Vec<u8>>) -> Result<(), String> {
    match got {
        Err(e) => Err(format!("file {name}: its connection broke: {e}")),
        Ok(got) if got == sent => Ok(()),
        Ok(got) => {
            let same = sent.iter().zip(&got).take_while(|(a, b)| a == b).count();
            Err(format!("file {name} of {} bytes came back with {}, of which the first {same} are right", sent.len(), got.len()))
        }
    }
}

impl Files {
    fn send(&self) -> Result<(), String> {
        for number in 0.. {
            if self.over.load(Ordering::Relaxed) {
                return Ok(());
            }
            let name = match self.growing.load(Ordering::Relaxed) {
                true => format!("kept-{number}"),
                false => format!("file-{}", number % NAMES),
            };
            let bytes = content(number, FILE);
            // Until it is acknowledged it may be there or not.
            self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
            compare(&name, &bytes, exchange(&format!("put {name} {}\n", bytes.len()), &bytes))?;
            self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).insert(name, (number, FILE));
            self.transfers.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

impl Client {
    /// Begins, with a guest that is set up.
    pub fn start() -> Self {
        let address = (GUEST.parse::<std::net::IpAddr>().expect("an address"), 6379).into();
        let options = Options { keys: KEYS, patience: PATIENCE, ..Options::new(address) };
        let redis = sys::within(CLIENT, || Running::start(options)).expect("Redis answers");
        let files = Arc::<Files>::default();
        let sent = files.clone();
        let sender = std::thread::Builder::new().name("files".into()).spawn(move || sent.send()).expect("a thread");
        Self { redis, files, sender }
    }

    /// Files that were acknowledged.
    pub fn transfers(&self) -> u64 {
        self.files.transfers.load(Ordering::Relaxed)
    }

    /// Replies of Redis.
    pub fn replies(&self) -> u64 {
        self.redis.replies()
    }

    /// Whether each file from now on needs new room on the disk.
    pub fn grow(&self, growing: bool) {
        self.files.growing.store(growing, Ordering::Relaxed);
    }

    /// That all which was acknowledged is there: keys, and files but for the one under way.
    pub fn check(&self) -> Result<(), String> {
        if self.redis.verify().is_none() {
            return Err("Redis: the check has failed".into());
        }
        let files = self.files.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (name, (number, len)) in files {
            let sent = content(number, len);
            let got = exchange(&format!("get {name}\n"), &[]);
            let now = self.files.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied();
            // It may have been written anew meanwhile.
            if now == Some((number, len)) {
                compare(&name, &sent, got)?;
            }
        }
        if self.sender.is_finished() { Err("files: their transfer has failed".into()) } else { Ok(()) }
    }

    /// Ends, after a last look at all keys; what went wrong first is told.
    pub fn finish(self) -> Result<Report, String> {
        self.files.over.store(true, Ordering::Relaxed);
        let report = self.redis.finish().map_err(|e| e.to_string())?;
        let files = self.sender.join().map_err(|_| "the thread for files has panicked")?;
        match report.failure {
            Some(failure) => Err(format!("Redis: {failure}")),
            None => files.map(|()| report),
        }
    }
}
