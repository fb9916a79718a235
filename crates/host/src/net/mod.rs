//! A VM's network cable: frames to and from a switch, a passt, or a TAP device.
//!
//! *In*: a [`Backend`], which says where the cable goes, and somebody to give received frames to. *Out*: a [`Link`], whose `send` never blocks. *Invariant*:
//! what can't be sent at once waits in a bounded queue, and what does not fit is dropped and counted, as on any Ethernet; one frame
//! stays one frame, but for TCP: segments that arrive together come as one, and one that is larger than the network carries is cut. A socket that breaks is connected again for as long as the link lives.

mod coalesce;
pub mod frames;
mod link;
pub mod tap;
pub mod token;

use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::error::{Error, Result};
pub use coalesce::Arrival;
use frames::Mac;
pub use link::{Link, Statistics};
use tap::Tap;
pub use token::Token;

/// Where a cable goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// A switch's socket.
    Switch(PathBuf),
    /// A passt's socket: the same protocol, but for one client only.
    Passt(PathBuf),
    /// A TAP device of this name.
    Tap(String),
}

/// Who is given the received frames, in the link's own thread. `Break` ends the thread.
///
/// An engine's loop usually has one channel for everything that happens to it, so it wraps its sender here:
/// `Box::new(move |frame| if channel.send(Event::Frame(frame)).is_ok() { Continue(()) } else { Break(()) })`.
/// A bounded channel slows the sender down instead of filling memory.
pub type Receive = Box<dyn FnMut(Arrival) -> ControlFlow<()> + Send>;

/// The longest frame passt takes (`ETH_MAX_MTU` in its sources); it throws longer ones away.
const LONGEST_FOR_PASST: usize = 65_535;

impl Backend {
    /// Connects or opens it and starts receiving. It is an error if that is not possible now; later troubles are the link's to mend.
    pub fn open(&self, receive: Receive) -> Result<Link> {
        match self {
            Self::Switch(path) | Self::Passt(path) => {
                let stream = UnixStream::connect(path).map_err(|e| self.unreachable(e))?;
                // passt ends the guest's connections itself, and takes segments as long as IP allows. Behind a switch is an Ethernet.
                match self {
                    Self::Passt(_) => Link::over_socket(stream, Some(path.clone()), LONGEST_FOR_PASST, receive),
                    _ => Link::over_switch(stream, path.clone(), receive),
                }
            }
            Self::Tap(name) => Link::over_tap(Tap::open(name)?, receive),
        }
    }

    fn unreachable(&self, e: std::io::Error) -> Error {
        match self {
            Self::Passt(path) => Error::new(format!("cannot connect to passt at {}", path.display()))
                .because(e)
                .next("passt takes one client only: is another VM connected to it?"),
            Self::Switch(path) => Error::new(format!("cannot connect to the switch at {}", path.display()))
                .because(e)
                .next(format!("start it first: twinstep switch --listen {}", path.display())),
            Self::Tap(name) => Error::new(format!("cannot open the TAP device {name}")).because(e),
        }
    }
}

impl std::str::FromStr for Backend {
    type Err = Error;

    /// `switch:PATH`, `passt:PATH`, `tap:NAME`.
    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            Some(("switch", path)) if !path.is_empty() => Ok(Self::Switch(path.into())),
            Some(("passt", path)) if !path.is_empty() => Ok(Self::Passt(path.into())),
            Some(("tap", name)) => tap::check_name(name).map(|()| Self::Tap(name.to_owned())),
            _ => Err(Error::new(format!("`{text}` is not a network")).next("say switch:SOCKET, passt:SOCKET or tap:DEVICE")),
        }
    }
}

/// A frame that tells switches where an address is now: a reverse ARP request to everyone, as QEMU sends after a migration. It needs
/// no IP address, and hosts ignore it.
#[must_use]
pub fn announcement(mac: Mac) -> Vec<u8> {
    let mut frame = Vec::with_capacity(60);
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac.0);
    // RARP; Ethernet, IPv4, six and four bytes of address, "who am I".
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&mac.0);
    // The target's IP address is unknown too; the rest pads to the shortest frame Ethernet has.
    frame.resize(60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_by_name() {
        assert_eq!("switch:/run/s".parse::<Backend>().unwrap(), Backend::Switch("/run/s".into()));
        assert_eq!("tap:tap0".parse::<Backend>().unwrap(), Backend::Tap("tap0".into()));
        for bad in ["", "tap", "tap:", "tap:a name", "switch:", "user"] {
            bad.parse::<Backend>().unwrap_err();
        }
    }

    #[test]
    fn an_announcement_says_where_and_to_all() {
        let mac = Mac([2, 1, 2, 3, 4, 5]);
        let frame = announcement(mac);
        assert_eq!((Mac::source(&frame), Mac::destination(&frame)), (Some(mac), Some(Mac([0xff; 6]))));
        assert_eq!(frame.len(), 60);
    }
}
