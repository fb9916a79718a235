//! passt: the guest's way to the host's network without privileges.
//!
//! *In*: which host ports lead to which ports of the guest. *Out*: a running passt and the socket a switch (or a VM) connects to. *Invariant*: once
//! [`start`] has returned, the ports are bound and the socket listens; dropping the handle ends passt.
//!
//! What is particular about the version Debian 12 has (2023-03-09), all found by trying:
//! - Started as root it becomes `nobody` before it creates its socket, and when it may not create it there it says that it did
//!   and goes on. So the socket gets a folder of its own that belongs to the user passt will be.
//! - `--debug` and `--fd` crash with the first TCP connection. Neither is used.
//! - Until it has heard one frame of the guest, it sends to the broadcast address, and a guest ignores a TCP connection opened
//!   to everyone. The guest must say something first (ours sends a gratuitous ARP).
//! - It refuses to start where there is no default route, unless it is given an interface: `lo` will do for port forwards.
//! - Every line goes to syslog as well, and it complains on standard error where there is none; those lines are left out.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::guest::Network;
use crate::packages::{Progress, Store};

/// How long passt may take to start; it needs a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// The line passt prints when everything is set up.
const READY: &str = "You can now start qemu";
/// The address passt has on the guest's network.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";

/// A host port that leads into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Where clients connect to on the host.
    pub host: SocketAddrV4,
    /// The guest's port.
    pub guest: u16,
}

impl fmt::Display for Forward {
    /// As passt wants it: `127.0.0.1/2222:22`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.host.ip(), self.host.port(), self.guest)
    }
}

/// What passt is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program.
    pub program: PathBuf,
    /// TCP ports.
    pub forwards: Vec<Forward>,
    /// The guest's address, and the gateway passt plays.
    pub network: Network,
}

/// A running passt.
#[derive(Debug)]
pub struct Passt {
    child: Child,
    folder: PathBuf,
    socket: PathBuf,
}

/// The passt of the package cache. The host's own, if there is one, may be confined by an AppArmor profile that forbids our socket.
pub fn program(store: &Store, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    Ok(store.package("passt", progress)?.root.join("usr/bin/passt"))
}

/// A TCP port of the loopback address that is free now.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).what("cannot find a free TCP port")?;
    Ok(listener.local_addr().what("cannot find a free TCP port")?.port())
}

/// Starts passt and waits until it is ready.
pub fn start(options: &Options) -> Result<Passt> {
    let owner = is_root().then(nobody);
    let folder = socket_folder(owner)?;
    let socket = folder.join("passt");
    let mut command = Command::new(&options.program);
    command.args(arguments(options, &socket, owner, has_default_route()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: prctl is async-signal-safe. If we die before anybody is connected to it, passt shall not wait for ever. (As root it changes its user, which
    // clears this. Once somebody is connected, it ends with that connection anyway: `--one-off`.)
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let child = command.spawn().map_err(|e| {
        // Nothing is in it yet.
        let _ = fs::remove_dir(&folder);
        Error::new(format!("cannot start {}", options.program.display()))
            .because(e)
            .next("install passt, or let Twinstep fetch it")
    })?;
    let mut passt = Passt { child, folder, socket };
    match passt.wait_until_ready() {
        Ok(()) => Ok(passt),
        Err(said) => {
            let ports: Vec<_> = options.forwards.iter().map(|f| f.host.to_string()).collect();
            let next = if said.contains("Failed to bind") {
                format!("another process uses {}: stop it or choose another port", ports.join(" or "))
            } else {
                "see what it says; `twinstep doctor` checks what passt needs".to_owned()
            };
            Err(Error::new("passt did not start").because(said).next(next))
        }
    }
}

fn arguments(options: &Options, socket: &Path, owner: Option<(u32, u32)>, default_route: bool) -> Vec<String> {
    let (address, prefix) = options.network.address.split_once('/').unwrap_or((&options.network.address, "24"));
    let mut list: Vec<String> = ["--foreground", "--stderr", "--one-off", "--ipv4-only"].map(str::to_owned).to_vec();
    let mut set = |name: &str, value: &str| list.extend([name.to_owned(), value.to_owned()]);
    set("--socket", &socket.display().to_string());
    set("--address", address);
    set("--netmask", prefix);
    set("--gateway", &options.network.gateway);
    set("--mac-addr", GATEWAY_MAC);
    for forward in &options.forwards {
        set("--tcp-ports", &forward.to_string());
    }
    if let Some((user, group)) = owner {
        set("--runas", &format!("{user}:{group}"));
    }
    if !default_route {
        set("--interface", "lo");
    }
    // The guest must not reach the services of the host's loopback address through its gateway; and it has a fixed address.
    list.extend(["--no-map-gw".to_owned(), "--no-dhcp".to_owned()]);
    list
}

impl Passt {
    /// Where a switch connects to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// passt's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn wait_until_ready(&mut self) -> std::result::Result<(), String> {
        let Some(stderr) = self.child.stderr.take() else { return Err("it has no standard error".to_owned()) };
        let (say, hear) = channel();
        // The thread goes on reading after passt is ready, so that it never waits for a full pipe; it ends with passt.
        std::thread::spawn(move || listen(BufReader::new(stderr), &say));
        let deadline = Instant::now() + PATIENCE;
        let mut said = String::new();
        loop {
            match hear.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with(READY) => break,
                Ok(line) => {
                    said.push_str(&line);
                    said.push('\n');
                }
                Err(RecvTimeoutError::Disconnected) => return Err(said.trim().to_owned()),
                Err(RecvTimeoutError::Timeout) => return Err(format!("{said}(no more for {} s)", PATIENCE.as_secs())),
            }
        }
        if self.socket.exists() { Ok(()) } else { Err(format!("it could not create {}", self.socket.display())) }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_dir(&self.folder);
    }
}

fn listen(stderr: impl BufRead, say: &Sender<String>) {
    for line in stderr.lines().map_while(std::result::Result::ok) {
        if line.starts_with("Failed to send") && line.ends_with("syslog") {
            continue;
        }
        tracing::debug!("passt: {line}");
        // After the start nobody listens any more.
        let _ = say.send(line);
    }
}

/// A new folder only passt's user (and root) can enter. Every folder above it must let that user through, so it is in /tmp.
fn socket_folder(owner: Option<(u32, u32)>) -> Result<PathBuf> {
    let base = if owner.is_some() { PathBuf::from("/tmp") } else { std::env::temp_dir() };
    // Processes have different ids, and calls within one process different numbers; what a dead process left is passed over.
    for number in 0..10_000 {
        let folder = base.join(format!("twinstep-passt-{}-{number}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => {
                if let Some((user, group)) = owner {
                    chown(&folder, Some(user), Some(group)).at("give passt the folder", &folder)?;
                }
                return Ok(folder);
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).at("create", &folder),
        }
    }
    Err(Error::new(format!("{} is full of old twinstep-passt folders", base.display())).next("remove them"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The user passt shall be when root starts it.
fn nobody() -> (u32, u32) {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let entry = passwd.lines().find_map(|line| {
        let mut fields = line.strip_prefix("nobody:")?.split(':').skip(1);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    });
    entry.unwrap_or((65534, 65534))
}

fn has_default_route() -> bool {
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    routes.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next() == Some("00000000")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            program: "/nowhere/passt".into(),
            forwards: vec![Forward { host: "127.0.0.1:2222".parse().unwrap(), guest: 22 }],
            network: Network::default(),
        }
    }

    #[test]
    fn the_command_line() {
        let line = arguments(&options(), Path::new("/s"), Some((65534, 65534)), false).join(" ");
        assert_eq!(
            line,
            "--foreground --stderr --one-off --ipv4-only --socket /s --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 \
             --mac-addr 52:55:0a:00:02:02 --tcp-ports 127.0.0.1/2222:22 --runas 65534:65534 --interface lo --no-map-gw --no-dhcp"
        );
        assert!(!arguments(&options(), Path::new("/s"), None, true).join(" ").contains("runas"));
    }

    #[test]
    fn a_missing_program_is_named_and_leaves_no_folder() {
        let error = start(&options()).unwrap_err().to_string();
        assert!(error.contains("/nowhere/passt"), "{error}");
    }

    #[test]
    fn what_passt_says_on_failing_is_told() {
        // Any program that complains and ends will do.
        let error = start(&Options { program: "/bin/ls".into(), ..options() }).unwrap_err().to_string();
        assert!(error.contains("passt did not start") && error.contains("foreground"), "{error}");
    }
}
