//! Where control sockets are: a folder of the user's own, a socket a VM.
//!
//! *In*: the environment, a VM's name. *Out*: a socket that is listened on, or the sockets of VMs that run. *Invariant*: nothing is bound, and nobody
//! is believed, in a folder that another user could have touched.
//!
//! The folder is `$XDG_RUNTIME_DIR/twinstep` if that variable names a folder of this user, else `/tmp/twinstep-UID`; it is made with mode 0700.
//! Whoever binds holds a lock on the folder, so that two processes do not both take a stale socket for theirs to replace.
use std::fs::{self, DirBuilder, File, Metadata};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use twinstep_pair::wire::{MAX_NAME_BYTES, is_name};

use crate::error::{Context, Error, Result};
use crate::socket::{self, SocketFile};

/// How a socket's name ends.
const SUFFIX: &str = ".sock";

/// The folder of this process's user. It need not exist.
pub fn of_this_user() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    // After `su`, the variable may still name somebody else's.
    let own = |path: &PathBuf| path.is_absolute() && fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == user);
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(own) {
        Some(runtime) => runtime.join("twinstep"),
        None => PathBuf::from(format!("/tmp/twinstep-{user}")),
    }
}

/// Checks that nobody else can have put anything into the folder.
fn check(folder: &Path, found: &Metadata) -> Result<()> {
    let user = rustix::process::geteuid().as_raw();
    let refused = |why: String, next: String| {
        Err(Error::new(format!("the folder of control sockets, {}, is not safe: {why}", folder.display())).next(next))
    };
    let elsewhere = "or set XDG_RUNTIME_DIR to a folder of your own";
    if !found.is_dir() {
        return refused("it is no folder".into(), format!("remove it, {elsewhere}"));
    }
    if found.uid() != user {
        let why = format!("it belongs to user {}, not to user {user}", found.uid());
        return refused(why, format!("have it removed, {elsewhere}"));
    }
    if found.mode() & 0o077 != 0 {
        let why = format!("its mode is {:04o}, so that others can look in", found.mode() & 0o7777);
        return refused(why, format!("chmod 700 {}, {elsewhere}", folder.display()));
    }
    Ok(())
}

/// A name for a VM that was given none.
pub fn default_name() -> String {
    format!("vm-{}", std::process::id())
}

fn check_name(name: &str) -> Result<()> {
    if !is_name(name) {
        return Err(Error::new(format!("'{name}' cannot be a VM's name"))
            .next(format!("take 1 to {MAX_NAME_BYTES} letters, digits, '-', '_' and '.', not beginning with '.'")));
    }
    Ok(())
}

/// The socket of the VM called `name`.
pub fn socket_of(folder: &Path, name: &str) -> Result<PathBuf> {
    check_name(name)?;
    Ok(folder.join(format!("{name}{SUFFIX}")))
}

/// Makes the folder if need be and listens on the socket of the VM called `name`. Sockets of processes that are gone are removed.
pub fn bind(folder: &Path, name: &str) -> Result<(UnixListener, SocketFile)> {
    let path = socket_of(folder, name)?;
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(e)
                .at("make the folder of control sockets", folder)
                .map_err(|e| e.next("set XDG_RUNTIME_DIR to a folder of your own"));
        }
        _ => {}
    }
    let found = fs::symlink_metadata(folder).at("look at the folder of control sockets", folder)?;
    check(folder, &found)?;
    let lock = File::open(folder).at("open the folder of control sockets", folder)?;
    flock(&lock, FlockOperation::LockExclusive).at("lock the folder of control sockets", folder)?;
    for (_, stale) in entries(folder)?.into_iter().filter(|(_, path)| !socket::is_served(path)) {
        // Perhaps somebody has tidied up by hand.
        let _ = fs::remove_file(stale);
    }
    if socket::is_served(&path) {
        return Err(Error::new(format!("a VM called '{name}' runs already; it listens on {}", path.display()))
            .next("give this one another name with --name"));
    }
    socket::listen(&path, "give this VM another name with --name")
}

fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).at("list", folder)? {
        let entry = entry.at("list", folder)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let socket = entry.file_type().is_ok_and(|t| t.is_socket());
        if let Some(name) = name.strip_suffix(SUFFIX).filter(|_| socket) {
            found.push((name.to_owned(), entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Whether the folder is there; an error if it is not safe.
pub fn is_there(folder: &Path) -> Result<bool> {
    match fs::symlink_metadata(folder) {
        Ok(found) => check(folder, &found).map(|()| true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).at("look at the folder of control sockets", folder),
    }
}

/// Names and sockets of all VMs of this user that run.
pub fn running(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    if !is_there(folder)? {
        return Ok(Vec::new());
    }
    Ok(entries(folder)?.into_iter().filter(|(_, path)| socket::is_served(path)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn names_are_plain_words() {
        for good in ["db", "vm-17", "a.b_c", &"x".repeat(64)] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "../x", "a b", "ü", &"x".repeat(65)] {
            let error = check_name(bad).unwrap_err().to_string();
            assert!(error.contains("cannot be a VM's name"), "{error}");
        }
    }

    #[test]
    fn one_process_a_name_and_the_dead_make_room() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("twinstep");
        assert_eq!(running(&folder).unwrap(), []);
        // Two sockets of processes that are gone.
        let first = bind(&folder, "db").unwrap();
        for name in ["db2", "web"] {
            drop(UnixListener::bind(socket_of(&folder, name).unwrap()).unwrap());
        }
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o700);
        assert_eq!(fs::metadata(first.1.path()).unwrap().mode() & 0o777, 0o600);
        let error = bind(&folder, "db").unwrap_err().to_string();
        assert!(error.contains("a VM called 'db' runs already") && error.contains("--name"), "{error}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "stale sockets are gone, that of the living is not");
        let second = bind(&folder, "web").unwrap();
        let names = |folder| running(folder).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&folder), ["db", "web"]);
        drop(first);
        assert_eq!(names(&folder), ["web"]);
        drop(second);
        bind(&folder, "db").unwrap();
    }

    #[test]
    fn a_folder_that_others_can_touch_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("twinstep");
        fs::create_dir(&folder).unwrap();
        for mode in [0o755, 0o770, 0o701] {
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
            for error in [bind(&folder, "db").unwrap_err().to_string(), running(&folder).unwrap_err().to_string()] {
                assert!(error.contains("is not safe") && error.contains(&format!("{mode:04o}")), "{error}");
                assert!(error.contains("chmod 700"), "{error}");
            }
        }
        let linked = place.path().join("linked");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&folder, &linked).unwrap();
        let error = bind(&linked, "db").unwrap_err().to_string();
        assert!(error.contains("it is no folder"), "{error}");
    }

    #[test]
    fn a_folder_of_another_user_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("twinstep");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
        // Only root can give a folder away; for others, the system has one that is not theirs.
        let other = if std::os::unix::fs::chown(&folder, Some(12345), None).is_ok() { folder } else { PathBuf::from("/") };
        let error = running(&other).unwrap_err().to_string();
        assert!(error.contains("it belongs to user"), "{error}");
    }
}
