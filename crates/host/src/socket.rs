//! Unix sockets in the file system: listening on one that only this user may connect to, connecting without waiting.
//!
//! *In*: a path. *Out*: a listener, with its file, which goes when the listener's owner drops it; a connection. *Invariant*: the file of a process that is
//! alive is never taken away from it.
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// A listening socket's file, removed with it.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = fs::remove_file(&self.0);
    }
}

/// Whether somebody listens at `path`; a queue of connections that is full says so as well.
pub fn is_served(path: &Path) -> bool {
    match connect_without_waiting(path) {
        Ok(_) => true,
        Err(e) => e.kind() == ErrorKind::WouldBlock,
    }
}

/// Listens on a Unix socket only this user may connect to. The file of a process that is gone is replaced; if one listens there, `in_use` says what to
/// do. The listener does not block.
pub fn listen(path: &Path, in_use: &str) -> Result<(UnixListener, SocketFile)> {
    let bind = || UnixListener::bind(path);
    let listener = match bind() {
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            if is_served(path) {
                return Err(Error::new(format!("another process is listening on {}", path.display())).next(in_use));
            }
            fs::remove_file(path).at("remove the stale socket", path)?;
            bind()
        }
        other => other,
    };
    let listener = listener.map_err(|e| {
        Error::new(format!("cannot listen on {}", path.display()))
            .because(e)
            .next("the folder must exist and be writable, and the path must be shorter than 108 bytes")
    })?;
    let file = SocketFile(path.to_owned());
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).at("protect", path)?;
    listener.set_nonblocking(true).at("prepare", path)?;
    Ok((listener, file))
}

/// Connects, but not by waiting: a peer whose queue of connections is full is an error here, to be tried again. The connection does not block.
pub fn connect_without_waiting(path: &Path) -> std::io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}
