//! The networks: hosts, the client and the arbiter as network namespaces, joined by two Ethernets.
//!
//! ```text
//!   street (here) ── bridge `lan`:  the guests' Ethernet                   client eth0 10.0.2.100
//!                 │     lan0, lan1, lan2 ── eth0 ─ br0 ─ tap0 in h0, h1, h2     (guest 10.0.2.15)
//!                 │     heartbeats beside the channel go by this one: br0 10.0.2.201 to 203
//!                 └─ bridge `hosts`: between them                         court eth0 10.77.0.100
//!                       host0, host1, host2 ── eth1 10.77.0.1 to 3 in h0, h1, h2
//! ```
//!
//! *In*: which way is cut. *Out*: networks on which it is. *Invariant*: a cut in one direction takes away frames on their way and tells nobody, as a bad cable does: the
//! sender's entry for its neighbour names an Ethernet address that nobody has. It needs no module of the kernel.

use std::io::Write;
use std::process::{Command, Stdio};

/// Hosts.
pub const HOSTS: usize = 3;
/// The place of the etcd.
pub const COURT: &str = "court";
/// The place of the client.
pub const CLIENT: &str = "client";
/// The guest's address on the LAN, as its command line has it.
pub const GUEST: &str = "10.0.2.15";
/// Its Ethernet address.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 1];

/// A host's namespace.
pub fn namespace(host: usize) -> String {
    format!("h{host}")
}

/// A host's address for other hosts.
pub fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

/// Its address on the LAN.
pub fn lan_address(host: usize) -> String {
    format!("10.0.2.{}", 201 + host)
}

/// The etcd's.
pub const COURT_ADDRESS: &str = "10.77.0.100";

fn mac(host: usize) -> String {
    format!("02:77:00:00:00:{:02x}", host + 1)
}
const COURT_MAC: &str = "02:77:00:00:00:64";
/// Nobody's.
const NOWHERE: &str = "02:77:00:00:ff:ff";

/// Commands for `ip`, in a namespace or here.
#[track_caller]
fn ip(namespace: Option<&str>, commands: &str) {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-netns", namespace]);
    }
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("ip starts");
    child.stdin.take().expect("piped").write_all(commands.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "ip ({namespace:?}): {}\n{commands}", String::from_utf8_lossy(&output.stderr));
}

/// Makes them all.
pub fn build() {
    ip(None, "link add lan type bridge\nlink add hosts type bridge\nlink set lan up\nlink set hosts up\n");
    let join = |namespace: &str, bridge: &str, port: &str, end: &str, mac: &str| {
        let address = if mac.is_empty() { String::new() } else { format!("address {mac}") };
        ip(
            None,
            &format!(
                "link add {port} type veth peer name {end} netns {namespace} {address}\nlink set {port} master {bridge}\nlink set {port} up\n"
            ),
        );
    };
    let new = |namespace: &str| ip(None, &format!("netns add {namespace}\n"));
    for host in 0..HOSTS {
        let place = namespace(host);
        new(&place);
        join(&place, "lan", &lan_port(host), "eth0", "");
        join(&place, "hosts", &host_port(host), "eth1", &mac(host));
        ip(
            Some(&place),
            &format!(
                "link set lo up\nlink add br0 type bridge\nlink set eth0 master br0\ntuntap add dev tap0 mode tap\nlink set tap0 master br0\n\
                 link set br0 up\naddress add {}/24 dev br0\nlink set eth0 up\nlink set tap0 up\naddress add {}/24 dev eth1\nlink set eth1 up\n",
                lan_address(host),
                address(host)
            ),
        );
    }
    new(CLIENT);
    join(CLIENT, "lan", "lanc", "eth0", "");
    ip(Some(CLIENT), "link set lo up\naddress add 10.0.2.100/24 dev eth0\nlink set eth0 up\n");
    new(COURT);
    join(COURT, "hosts", "hostc", "eth0", COURT_MAC);
    ip(Some(COURT), &format!("link set lo up\naddress add {COURT_ADDRESS}/24 dev eth0\nlink set eth0 up\n"));
    for from in 0..HOSTS {
        (0..HOSTS).filter(|to| *to != from).for_each(|to| way(from, to, true));
        way_to_court(from, true);
    }
}

/// The port on which the LAN has a host.
pub fn lan_port(host: usize) -> String {
    format!("lan{host}")
}

fn host_port(host: usize) -> String {
    format!("host{host}")
}

/// Whether frames from one host to another arrive.
pub fn way(from: usize, to: usize, open: bool) {
    let right = mac(to);
    neighbour(from, &address(to), if open { &right } else { NOWHERE });
}

/// Whether frames from a host to the arbiter arrive.
pub fn way_to_court(from: usize, open: bool) {
    neighbour(from, COURT_ADDRESS, if open { COURT_MAC } else { NOWHERE });
}

fn neighbour(host: usize, address: &str, mac: &str) {
    ip(Some(&namespace(host)), &format!("neighbour replace {address} lladdr {mac} nud permanent dev eth1\n"));
}

/// Whether a host has its cables in.
pub fn cables(host: usize, plugged: bool) {
    let word = if plugged { "up" } else { "down" };
    ip(None, &format!("link set {} {word}\nlink set {} {word}\n", lan_port(host), host_port(host)));
}
