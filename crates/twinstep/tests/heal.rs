//! A VM that has lost a host finds itself another one, while its guest runs.
mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Twinstep, boot, folder, text, turn, words};
use rustix::process::Signal;
use twinstep_host::arbiter::ArbiterOptions;
use twinstep_host::packages::{Store, tell_on_stderr};
use twinstep_host::passt::free_port;

/// A standby that listens, and where.
fn standby(name: &'static str, listen: &str, arbiter: &Path) -> (Twinstep, String) {
    let standby = Twinstep::start(name, &words(&["standby", "--listen", listen, "--arbiter", &text(arbiter)]));
    let address = standby.wait_said("waiting for a primary on ");
    (standby, address)
}

/// Gives the guest's shell something to remember, and something to do meanwhile.
fn begin(primary: &mut Twinstep) {
    primary.wait_console("# ");
    primary.type_line("while :; do i=$((i + 1)); done & token=$((6 * 7)); echo begun $token");
    primary.wait_console("begun 42");
}

/// The guest is the same that began, and ends.
fn remembers(mut survivor: Twinstep) {
    survivor.type_line("echo remembered $((token + 1)); poweroff -f");
    survivor.end().with(0).shows("remembered 43");
}

#[test]
fn two_hosts_die_one_after_the_other_and_the_guest_does_not() {
    let _turn = turn(2);
    let folder = folder();
    let (mut second, to_second) = standby("second", "127.0.0.1:0", folder.path());
    let (third, to_third) = standby("third", "127.0.0.1:0", folder.path());
    let both = format!("{to_second},{to_third}");
    let protect = words(&["--protect", &both, "--arbiter", &text(folder.path())]);
    let mut primary = Twinstep::run(&[&boot("128M", "shell"), &protect]);
    primary.wait_said("protected: ");
    begin(&mut primary);
    primary.kill();
    // Nobody told it of the third one but the primary.
    second.wait_said("live: live in epoch 2");
    second.wait_said("reached: the standby at ");
    // Before it has heard that, it is not to go live.
    third.wait_said("protection has started");
    second.kill();
    third.wait_said("live: live in epoch 3");
    remembers(third);
}

#[test]
fn a_primary_goes_on_to_the_next_standby() {
    let _turn = turn(2);
    let folder = folder();
    let (mut second, to_second) = standby("second", "127.0.0.1:0", folder.path());
    let (third, to_third) = standby("third", "127.0.0.1:0", folder.path());
    let list = format!("{to_second},{to_third}");
    let protect = words(&["--protect", &list, "--arbiter", &text(folder.path())]);
    let mut primary = Twinstep::run(&[&boot("128M", "shell"), &protect]);
    primary.wait_said("protected: ");
    begin(&mut primary);
    second.kill();
    primary.wait_said("alone: going on alone in epoch 2");
    third.wait_said("following VM ");
    primary.wait_said(&format!("reached: the standby at {to_third}"));
    third.wait_said("machine restored");
    third.wait_said("protection has started");
    primary.kill();
    third.wait_said("live: live in epoch 3");
    remembers(third);
}

/// An etcd in a folder, and how it is written as an arbiter; nothing where there is no apt.
fn etcd(folder: &Path) -> Option<(Child, String)> {
    if Command::new("apt-get").arg("--version").output().is_err() {
        eprintln!("skipped: this host has no apt-get");
        return None;
    }
    let package = Store::open().unwrap().package("etcd-server", &mut tell_on_stderr).unwrap();
    // A port that was free may be taken by somebody else before etcd has it.
    for attempt in 0..5 {
        let [clients, peers] = [(); 2].map(|()| format!("http://127.0.0.1:{}", free_port().unwrap()));
        let mut child = Command::new(package.root.join("usr/bin/etcd"))
            .args(["--initial-cluster", &format!("default={peers}"), "--listen-peer-urls", &peers])
            .args([
                "--initial-advertise-peer-urls",
                &peers,
                "--listen-client-urls",
                &clients,
                "--advertise-client-urls",
                &clients,
            ])
            .arg("--data-dir")
            .arg(folder.join(format!("etcd-{attempt}")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let arbiter = clients.replace("http", "etcd");
        let options = ArbiterOptions { place: Some(arbiter.clone().into()), ..ArbiterOptions::default() };
        let spec = options.check().unwrap().unwrap();
        while child.try_wait().unwrap().is_none() {
            if spec.open().is_ok() {
                return Some((child, arbiter));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    panic!("etcd does not start");
}

/// Nobody is told where a standby is: those that wait say so at etcd, and whoever needs one looks there.
#[test]
fn standbys_are_found_where_they_are_registered() {
    let _turn = turn(2);
    let folder = folder();
    let Some((mut etcd, arbiter)) = etcd(folder.path()) else { return };
    let protect = words(&["--protect", "registered", "--arbiter", &arbiter]);
    let run = || Twinstep::run(&[&boot("128M", "shell"), &protect]);
    run().end().refused(&["no standby is registered at the arbiter", "twinstep standby --register"]);
    let standby = |name| {
        let listen = ["standby", "--listen", "127.0.0.1:0", "--arbiter", &arbiter, "--register", "127.0.0.1"];
        let standby = Twinstep::start(name, &words(&listen));
        let address = standby.wait_said("primaries find this standby at ");
        (standby, address)
    };
    let (mut second, _) = standby("second");
    let mut primary = run();
    primary.wait_said("protected: ");
    begin(&mut primary);
    let (third, to_third) = standby("third");
    primary.kill();
    // The survivor was told by nobody but etcd.
    second.wait_said("live: live in epoch 2");
    second.wait_said(&format!("reached: the standby at {to_third}"));
    third.wait_said("protection has started");
    second.kill();
    third.wait_said("live: live in epoch 3");
    remembers(third);
    etcd.kill().unwrap();
    etcd.wait().unwrap();
}

/// A standby that was lost and is there again, at the same place, is used again; and one that never went live waits for the next primary.
#[test]
fn a_standby_that_comes_back_is_used_again() {
    let _turn = turn(2);
    let folder = folder();
    let (standby, address) = standby("standby", "127.0.0.1:0", folder.path());
    let protect = words(&["--protect", &address, "--arbiter", &text(folder.path())]);
    let mut primary = Twinstep::run(&[&boot("128M", "shell"), &protect]);
    primary.wait_said("protected: ");
    begin(&mut primary);
    // Asleep for long enough to be given up; it finds that it has lost, and waits at the same address.
    standby.signal(Signal::STOP);
    primary.wait_said("alone: going on alone in epoch 2");
    standby.signal(Signal::CONT);
    standby.wait_said("the arbiter gave epoch 2 to the other side");
    standby.wait_said_times("protection has started", 2);
    primary.kill();
    standby.wait_said("live: live in epoch 3");
    remembers(standby);
}

/// What the guest has written to its disk goes to the next standby as well, though that has followed from nowhere near power-on.
#[test]
fn the_next_standby_gets_the_disk() {
    let _turn = turn(2);
    let folder = folder();
    let path = |name: &str| text(&folder.path().join(name));
    std::fs::write(path("first.img"), vec![0; 1 << 20]).unwrap();
    let arbiter = text(folder.path());
    // Their images are made.
    let standby = |name, image| {
        let listen = ["standby", "--listen", "127.0.0.1:0", "--arbiter", &arbiter, "--disk", &path(image)];
        let standby = Twinstep::start(name, &words(&listen));
        let address = standby.wait_said("waiting for a primary on ");
        (standby, address)
    };
    let ((mut second, to_second), (mut third, to_third)) = (standby("second", "second.img"), standby("third", "third.img"));
    let list = format!("{to_second},{to_third}");
    let protect = words(&["--protect", &list, "--arbiter", &arbiter, "--disk", &path("first.img")]);
    let mut primary = Twinstep::run(&[&boot("128M", "shell"), &protect]);
    primary.wait_said("protected: ");
    begin(&mut primary);
    primary.type_line("echo kept > /dev/vda && sync; echo written $((1 + 1))");
    primary.wait_console("written 2");
    second.kill();
    primary.wait_said("alone: going on alone in epoch 2");
    third.wait_said("protection has started");
    primary.kill();
    third.wait_said("live: live in epoch 3");
    third.type_line("echo $(head -c 4 /dev/vda) it is");
    third.wait_console("kept it is");
    remembers(third);
}
