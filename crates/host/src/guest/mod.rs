//! The demo's guests: Debian's kernel as it is, and an initial RAM file system made of Debian's busybox, Debian's Redis
//! and one shell script of ours.
//!
//! *In*: packages from [`crate::packages`]. *Out*: a bzImage, an initramfs and a kernel command line. *Invariant*: the same packages give the same
//! bytes.
//!
//! The archive is not compressed: unpacking is work the guest would do at every boot, at several host instructions each, while the
//! host reads the file from its page cache. For the same reason only what is used goes in.

pub mod cpio;
mod elf;
mod modules;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::packages::{Kernel, KernelLine, Package, Progress, Request, Store};
use cpio::Archive;
use elf::Elf;

const INIT: &str = include_str!("init.sh");
const REDIS_CONF: &str = include_str!("redis.conf");

/// What the guest's virtio devices and its power button need.
const MODULES: [&str; 7] = ["virtio_pci", "virtio_rng", "virtio_net", "virtio_blk", "virtio_console", "button", "evdev"];

/// The guest's port of Redis.
pub const REDIS_PORT: u16 = 6379;

/// The line the guest prints on its console when its work has begun starts like this.
pub const READY: &str = "TWINSTEP READY";

/// Which guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// busybox on the serial console, and the small workloads of the init script.
    Shell,
    /// The same with a Redis server.
    Redis,
}

/// A guest ready to boot.
#[derive(Debug)]
pub struct Guest {
    /// The kernel it was built for.
    pub kernel: Kernel,
    /// The initramfs.
    pub initrd: Vec<u8>,
}

/// The guest's network, as its command line has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Address and prefix length, "10.0.2.15/24".
    pub address: String,
    /// The gateway.
    pub gateway: String,
}

impl Default for Network {
    /// The addresses of the demo; passt is told the same.
    fn default() -> Self {
        Self { address: "10.0.2.15/24".to_owned(), gateway: "10.0.2.2".to_owned() }
    }
}

impl std::str::FromStr for Kind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "shell" => Ok(Self::Shell),
            "redis" => Ok(Self::Redis),
            _ => Err(Error::new(format!("there is no guest image called {name}")).next("say shell or redis")),
        }
    }
}

/// Builds a guest, fetching what is missing.
pub fn build(store: &Store, kind: Kind, line: KernelLine, progress: &mut dyn FnMut(Progress)) -> Result<Guest> {
    let kernel = store.kernel(line, progress)?;
    let busybox = store.package("busybox-static", progress)?;
    let mut archive = Archive::new();
    skeleton(&mut archive);
    add_busybox(&mut archive, &busybox)?;
    add_modules(&mut archive, &kernel)?;
    if kind == Kind::Redis {
        let packages = store.fetch(Request::WithLibraries("redis-server"), progress)?;
        add_program(&mut archive, &packages, "usr/bin/redis-server")?;
        archive.file("etc/redis.conf", 0o644, REDIS_CONF.as_bytes());
    }
    Ok(Guest { kernel, initrd: archive.finish() })
}

/// Builds a guest and leaves `vmlinuz` and `initrd` in a folder.
pub fn build_into(
    folder: &Path,
    store: &Store,
    kind: Kind,
    line: KernelLine,
    progress: &mut dyn FnMut(Progress),
) -> Result<(PathBuf, PathBuf)> {
    let guest = build(store, kind, line, progress)?;
    fs::create_dir_all(folder).at("create", folder)?;
    let (kernel, initrd) = (folder.join("vmlinuz"), folder.join("initrd"));
    fs::copy(&guest.kernel.image, &kernel).at("write", &kernel)?;
    fs::write(&initrd, &guest.initrd).at("write", &initrd)?;
    Ok((kernel, initrd))
}

/// The kernel command line: `run` is what the init script shall do (see init.sh).
#[must_use]
pub fn command_line(run: &str, network: Option<&Network>) -> String {
    // panic=-1: a guest that panics resets at once, which the VMM sees; it does not hang there.
    let mut line = format!("console=ttyS0 quiet panic=-1 twinstep.run={run}");
    if let Some(Network { address, gateway }) = network {
        line.push_str(&format!(" twinstep.ip={address} twinstep.gw={gateway}"));
    }
    line
}

fn skeleton(archive: &mut Archive) {
    for folder in ["bin", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sys", "tmp", "usr/bin", "var"] {
        archive.folder(folder);
    }
    // The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    // The event's name is acpid's: type, code and value of the button's input event.
    archive.file("etc/acpi/PWRF/00000080", 0o755, b"#!/bin/sh\nkill \"$(cat /run/workload)\" 2> /dev/null || poweroff -f\n");
}

fn add_busybox(archive: &mut Archive, package: &Package) -> Result<()> {
    let path = package.root.join("bin/busybox");
    archive.file("bin/busybox", 0o755, &fs::read(&path).at("read", &path)?);
    for applet in busybox_applets(package)? {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    if !archive.has("bin/sh") {
        return Err(Error::new(format!("{} has no shell in it", path.display())));
    }
    Ok(())
}

/// The commands that busybox knows, by its own account.
pub fn busybox_applets(package: &Package) -> Result<Vec<String>> {
    let path = package.root.join("bin/busybox");
    let list = Command::new(&path).arg("--list").output().at("run", &path)?;
    let names = String::from_utf8_lossy(&list.stdout);
    Ok(names.lines().filter(|a| !a.is_empty() && *a != "busybox").map(str::to_owned).collect())
}

fn add_modules(archive: &mut Archive, kernel: &Kernel) -> Result<()> {
    let mut order = String::new();
    for module in modules::in_loading_order(&kernel.modules, &MODULES)? {
        archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.content);
        order.push_str(&module.name);
        order.push('\n');
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    Ok(())
}

/// A program with its loader and every library it and they ask for.
fn add_program(archive: &mut Archive, packages: &[Package], path: &str) -> Result<()> {
    for (path, content) in program_files(packages, path)? {
        archive.file(&path, 0o755, &content);
    }
    Ok(())
}

/// The files a program needs to start, as (path in the guest, content): itself, its loader, and every library it and they ask for.
pub fn program_files(packages: &[Package], path: &str) -> Result<BTreeMap<String, Vec<u8>>> {
    let content = find(packages, &[path])?;
    let elf = Elf::parse(&content).ok_or_else(|| Error::new(format!("{path} is not a program")))?;
    let mut files = BTreeMap::new();
    if let Some(loader) = elf.interpreter() {
        let name = loader.rsplit('/').next().unwrap_or(loader);
        files.insert(loader.trim_start_matches('/').to_owned(), find_library(packages, name)?);
    }
    let mut queue = elf.needed();
    let mut seen = BTreeSet::new();
    while let Some(name) = queue.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let library = find_library(packages, &name)?;
        queue.extend(Elf::parse(&library).map(|elf| elf.needed()).unwrap_or_default());
        // Debian's loader looks here without a cache file.
        files.insert(format!("lib/x86_64-linux-gnu/{name}"), library);
    }
    files.insert(path.to_owned(), content);
    Ok(files)
}

fn find_library(packages: &[Package], name: &str) -> Result<Vec<u8>> {
    let folders = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "lib", "usr/lib"];
    let paths: Vec<String> = folders.iter().map(|folder| format!("{folder}/{name}")).collect();
    find(packages, &paths.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A file's content from whichever package has it. Links are followed across packages (redis-server is a link into redis-tools).
fn find(packages: &[Package], paths: &[&str]) -> Result<Vec<u8>> {
    let mut candidates: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    let mut tried = 0;
    while let Some(path) = candidates.get(tried).cloned() {
        tried += 1;
        // Chains of links in Debian's packages are short; the bound is against loops.
        if tried > 64 {
            break;
        }
        for package in packages {
            let full = package.root.join(&path);
            let Ok(metadata) = fs::symlink_metadata(&full) else { continue };
            if metadata.is_symlink() {
                let target = fs::read_link(&full).at("read", &full)?;
                let above = path.parent().unwrap_or(Path::new(""));
                let target = above.join(&target);
                // An absolute target means the guest's root, not the host's.
                candidates.push(target.strip_prefix("/").unwrap_or(&target).to_owned());
            } else if metadata.is_file() {
                return fs::read(&full).at("read", &full);
            }
        }
    }
    let names: Vec<_> = packages.iter().map(|p| p.name.as_str()).collect();
    Err(Error::new(format!("{} is in none of the packages {}", paths.join(" or "), names.join(", ")))
        .next("remove the cache folder's `sets` folder and try again; report it if that does not help"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn package(root: &Path, name: &str) -> Package {
        let root = root.join(name);
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        Package { name: name.into(), version: "1".into(), root }
    }

    #[test]
    fn links_are_followed_across_packages_and_never_out_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (package(dir.path(), "a"), package(dir.path(), "b"));
        symlink("real", a.root.join("usr/bin/tool")).unwrap();
        symlink("/usr/bin/tool", a.root.join("usr/bin/absolute")).unwrap();
        symlink("loop", a.root.join("usr/bin/loop")).unwrap();
        fs::write(b.root.join("usr/bin/real"), b"it").unwrap();
        let both = [a, b];
        assert_eq!(find(&both, &["usr/bin/tool"]).unwrap(), b"it");
        assert_eq!(find(&both, &["usr/bin/absolute"]).unwrap(), b"it");
        let error = find(&both, &["usr/bin/loop"]).unwrap_err().to_string();
        assert!(error.contains("in none of the packages a, b"), "{error}");
    }

    #[test]
    fn command_lines() {
        assert_eq!(command_line("shell", None), "console=ttyS0 quiet panic=-1 twinstep.run=shell");
        assert!(command_line("redis", Some(&Network::default())).ends_with("twinstep.ip=10.0.2.15/24 twinstep.gw=10.0.2.2"));
    }
}
