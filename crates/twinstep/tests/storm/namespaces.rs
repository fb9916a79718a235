//! Namespaces of the test's own: networks, mounts and processes that nobody else sees, and that end with it.
//!
//! *In*: a test. *Out*: the same test, run again by this program inside. *Invariant*: whatever happens inside, nothing of it is left: processes end with the first of
//! their namespace, mounts and interfaces with the last process.
//!
//! Root may make them; others may where the kernel lets users have namespaces of their own. Where neither is so, the test is skipped, and says so.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Set inside.
const INSIDE: &str = "TWINSTEP_STORM_INSIDE";

/// What this makes, as words for `unshare` (util-linux).
fn unshare() -> Command {
    // The first process of the namespaces dies with `unshare`, and that with the thread that runs the test.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare"]);
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.arg("--");
    command
}

/// Why there can be no namespaces here, if so.
fn forbidden() -> Option<String> {
    if let Err(e) = Command::new("ip").arg("-Version").output() {
        return Some(format!("this host has no `ip` (package iproute2): {e}"));
    }
    match unshare().arg("true").output() {
        Err(e) => Some(format!("this host has no `setpriv` (package util-linux): {e}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("namespaces are not permitted: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Runs `body`, the body of the test of this name, in namespaces of its own; `before` outside, where packages can be fetched.
pub fn inside(test: &str, before: impl FnOnce(), body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        // Names of network namespaces are kept under /run, and are nobody else's business.
        run("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
        run("ip", &["link", "set", "lo", "up"]);
        return body();
    }
    if let Some(why) = forbidden() {
        eprintln!("skipped: {why}");
        return;
    }
    before();
    let (output, both) = std::io::pipe().expect("a pipe");
    let mut child = unshare()
        .arg(std::env::current_exe().expect("this program"))
        .args([test, "--exact", "--include-ignored", "--nocapture"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .stdout(both.try_clone().expect("a pipe"))
        .stderr(both)
        .spawn()
        .expect("unshare has just been run");
    // Printed here, the test's harness shows it if it is asked to, or if the test fails.
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        println!("{line}");
    }
    let status = child.wait().expect("waiting for a child");
    assert!(status.success(), "{test}, inside of its namespaces: {status}");
}

/// Runs a command that has to work.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program} does not start: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
