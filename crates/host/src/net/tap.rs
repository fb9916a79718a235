//! TAP devices: the host kernel's own Ethernet cable into a process.
//!
//! *In*: a device's name. *Out*: a descriptor on which one read or write is one frame. *Invariant*: frames carry neither the packet
//! information nor the virtio header the kernel can put in front of them, and no offloads are on, so what is read is what was
//! on the wire.
//!
//! Interface: Documentation/networking/tuntap.rst of the Linux kernel.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};

use crate::error::{Context, Error, Result};

/// The device that makes TAP devices.
pub const CLONE_DEVICE: &str = "/dev/net/tun";

const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;

/// An open TAP device.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

/// Whether a name can be a network device's.
pub fn check_name(name: &str) -> Result<()> {
    let good = (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%');
    if good {
        Ok(())
    } else {
        Err(Error::new(format!("`{name}` cannot be the name of a network device"))
            .next(format!("use 1 to {} letters, digits, dots or dashes", libc::IFNAMSIZ - 1)))
    }
}

impl Tap {
    /// Opens an existing device this user may use, or makes a new one (which needs the capability CAP_NET_ADMIN, and is gone when it is closed).
    pub fn open(name: &str) -> Result<Self> {
        check_name(name)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = open(CLONE_DEVICE, flags, Mode::empty()).map_err(|e| {
            Error::new(format!("cannot open {CLONE_DEVICE}"))
                .because(e)
                .next("load the module tun (modprobe tun), or use passt instead of a TAP device")
        })?;
        // SAFETY: all bytes zero are a valid `ifreq`: it holds numbers and arrays only.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is, and keeps no pointer to it.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        if result < 0 {
            let e = IoError::last_os_error();
            let next = match e.kind() {
                ErrorKind::PermissionDenied => format!(
                    "let root make it for you: ip tuntap add dev {name} mode tap user $(id -un); ip link set {name} up; or use passt"
                ),
                ErrorKind::ResourceBusy => "another process has it open: stop it, or use another device".to_owned(),
                _ => format!("if {name} exists, it must be a TAP device (ip -details link show {name})"),
            };
            return Err(Error::new(format!("cannot use the TAP device {name}")).because(e).next(next));
        }
        Ok(Self { file: File::from(fd), name: name.to_owned() })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is administratively up, as far as the host tells.
    #[must_use]
    pub fn is_up(&self) -> bool {
        let flags = std::fs::read_to_string(Path::new("/sys/class/net").join(&self.name).join("flags")).unwrap_or_default();
        u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).is_ok_and(|flags| flags & 1 != 0)
    }

    /// One frame, if there is one, in `buffer`, which should have room for [`MAX_FRAME`](super::frames::MAX_FRAME) bytes.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>> {
        loop {
            match (&self.file).read(buffer) {
                Ok(length) => return Ok(Some(&buffer[..length])),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).what(format!("cannot read from the TAP device {}", self.name)),
            }
        }
    }

    /// Throws away what has come so far.
    pub fn empty(&self) -> Result<()> {
        // More than a device's queue holds (1000 frames, if nobody changed it), and an end if frames come as fast as they are read.
        let mut buffer = [0; 1];
        for _ in 0..100_000 {
            if self.receive(&mut buffer)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Sends one frame. `false` if the device does not take it now.
    pub fn send(&self, frame: &[u8]) -> Result<bool> {
        loop {
            match (&self.file).write(frame) {
                Ok(_) => return Ok(true),
                // A device that is down answers EIO; a guest may well talk before its host is ready.
                Err(e) if e.kind() == ErrorKind::WouldBlock || e.raw_os_error() == Some(libc::EIO) => return Ok(false),
                // The kernel refuses frames shorter than an Ethernet header; a guest may try.
                Err(e) if e.kind() == ErrorKind::InvalidInput => return Ok(false),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).what(format!("cannot write to the TAP device {}", self.name)),
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::frames::MAX_FRAME;

    #[test]
    fn names() {
        for good in ["tap0", "vm-1.a", "abcdefghijklmno"] {
            check_name(good).unwrap();
        }
        for bad in ["", "abcdefghijklmnop", "a/b", "a b", "..", "tap%d", "a:1"] {
            check_name(bad).unwrap_err();
        }
    }

    /// Runs in a network namespace of its own where that is allowed, and says so where it is not.
    #[test]
    fn frames_go_through_a_real_device() {
        std::thread::spawn(|| {
            // SAFETY: unshare changes this thread only, and the thread ends with the test.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                eprintln!("skipped: no right to make a network namespace");
                return;
            }
            let Ok(tap) = Tap::open("twintest0") else {
                eprintln!("skipped: no TAP devices here");
                return;
            };
            assert!(!tap.is_up() || tap.name() == "twintest0");
            assert!(Tap::open("twintest0").unwrap_err().to_string().contains("another process has it open"));
            assert!(Tap::open("lo").unwrap_err().to_string().contains("must be a TAP device"));
            // Down: nothing goes and nothing breaks.
            assert!(!tap.send(&[0; 60]).unwrap());
            assert!(!tap.send(&[0; 5]).unwrap());
            let mut buffer = vec![0; MAX_FRAME];
            assert_eq!(tap.receive(&mut buffer).unwrap(), None);
            let up = std::process::Command::new("ip").args(["link", "set", "twintest0", "up"]).status();
            if !up.is_ok_and(|status| status.success()) {
                eprintln!("skipped the rest: no ip command");
                return;
            }
            assert!(tap.send(&super::super::announcement(super::super::Mac([2, 0, 0, 0, 0, 1]))).unwrap());
            // The kernel says something by itself on a new interface (IPv6 router solicitations), if it has IPv6. And some packets of ours.
            let send = "ip addr add 10.9.9.1/24 dev twintest0; ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev twintest0; \
                        for i in 1 2 3; do echo > /dev/udp/10.9.9.2/9; done";
            let sent = std::process::Command::new("bash").args(["-c", send]).status();
            if !sent.is_ok_and(|status| status.success()) {
                eprintln!("skipped the rest: no bash");
                return;
            }
            assert!(tap.receive(&mut buffer).unwrap().is_some());
            tap.empty().unwrap();
            assert_eq!(tap.receive(&mut buffer).unwrap(), None);
        })
        .join()
        .unwrap();
    }
}
