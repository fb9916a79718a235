//! The arbiter: a directory that every host sees through a link of its own, or etcd in a namespace of its own.
//!
//! *In*: which host is cut off from it. *Out*: what a host gives as `--arbiter`. *Invariant*: what one host can reach changes nothing for another.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use twinstep_host::packages::{Store, tell_on_stderr};

use crate::common::{PATIENCE, text};
use crate::street::{self, COURT, COURT_ADDRESS};
use crate::sys;

/// Where an arbiter is.
pub enum Court {
    /// The shared directory, and where the hosts' links to it are.
    Directory { shared: PathBuf, links: PathBuf },
    /// A cluster of one.
    Etcd(Child),
}

/// Etcd's program, fetched if it is not there; nothing where there is no apt.
pub fn etcd() -> Option<PathBuf> {
    if Command::new("apt-get").arg("--version").output().is_err() {
        eprintln!("skipped: this host has no apt-get");
        return None;
    }
    let package = Store::open().expect("the cache folder").package("etcd-server", &mut tell_on_stderr);
    Some(package.expect("the package etcd-server").root.join("usr/bin/etcd"))
}

impl Court {
    /// A directory inside of this folder.
    pub fn directory(folder: &Path) -> Self {
        let (shared, links) = (folder.join("arbiter"), folder.join("arbiters"));
        std::fs::create_dir(&shared).expect("a folder");
        std::fs::create_dir(&links).expect("a folder");
        let court = Self::Directory { shared, links };
        (0..street::HOSTS).for_each(|host| court.open(host, true));
        court
    }

    /// Etcd with its data in this folder, once it answers.
    pub fn etcd(program: &Path, folder: &Path) -> Self {
        let [clients, peers] = [2379, 2380].map(|port| format!("http://{COURT_ADDRESS}:{port}"));
        let log = std::fs::File::create(folder.join("etcd.log")).expect("a file");
        let child = Command::new("nsenter")
            .args([&format!("--net={}", sys::path(COURT)), "--"])
            .arg(program)
            .args(["--name", "storm", "--initial-cluster", &format!("storm={peers}")])
            .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
            .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
            .arg("--data-dir")
            .arg(folder.join("etcd"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("nsenter starts");
        let begun = Instant::now();
        let answers = || sys::within(COURT, || std::net::TcpStream::connect((COURT_ADDRESS, 2379)).is_ok());
        while !answers() {
            assert!(begun.elapsed() < PATIENCE, "etcd does not listen: {}", text(folder));
            std::thread::sleep(Duration::from_millis(20));
        }
        Self::Etcd(child)
    }

    /// What a host is told.
    pub fn spec(&self, host: usize) -> String {
        match self {
            Self::Directory { links, .. } => text(&links.join(street::namespace(host))),
            Self::Etcd(_) => format!("etcd://{COURT_ADDRESS}:2379/storm"),
        }
    }

    /// Whether a host reaches it.
    pub fn open(&self, host: usize, open: bool) {
        match self {
            Self::Directory { shared, links } => {
                let link = links.join(street::namespace(host));
                // There is none at first, and cut off twice is cut off.
                let _ = std::fs::remove_file(&link);
                if open {
                    symlink(shared, &link).expect("a link to the arbiter's folder");
                }
            }
            Self::Etcd(_) => street::way_to_court(host, open),
        }
    }
}

impl Drop for Court {
    fn drop(&mut self) {
        if let Self::Etcd(child) = self {
            // It may have ended; either way it ends with the namespaces.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
