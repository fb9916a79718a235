//! The two calls into the kernel that no library here offers.
//!
//! *In*: names of namespaces and interfaces. *Out*: a thread elsewhere, a socket for whole frames. *Invariant*: all `unsafe` of this test is here.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Where `ip netns` keeps its namespaces.
pub fn path(namespace: &str) -> String {
    format!("/run/netns/{namespace}")
}

/// Runs this in a thread inside a network namespace. Sockets that it makes stay there for good.
pub fn within<T: Send>(namespace: &str, what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let place = File::open(path(namespace)).expect("the namespace was made");
            // SAFETY: setns with a network namespace changes this thread only, which ends with the closure.
            let entered = unsafe { libc::setns(place.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(entered, 0, "cannot enter {namespace}: {}", Error::last_os_error());
            what()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A socket for whole frames on one interface of the current namespace. It hears what comes in there, and not what goes out.
pub fn frames(interface: &str) -> Result<OwnedFd> {
    let name = std::ffi::CString::new(interface).expect("a plain name");
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: if_nametoindex reads a string that ends with a zero byte. `address` is a `sockaddr_ll`, of which all bytes zero are a valid value, and
    // bind and setsockopt read the sizes that they are told. The descriptor is new and has no other owner.
    unsafe {
        let index = libc::if_nametoindex(name.as_ptr());
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if index == 0 || fd < 0 {
            return Err(Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = index as i32;
        let yes: libc::c_int = 1;
        let option = libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, (&raw const yes).cast(), 4);
        let bound = libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as libc::socklen_t);
        if option < 0 || bound < 0 { Err(Error::last_os_error()) } else { Ok(socket) }
    }
}
