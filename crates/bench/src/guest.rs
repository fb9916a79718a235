//! The benchmark's guest, and the same files as a folder for the native run.
//!
//! *In*: Debian packages, the C kernels, the scripts, a plan. *Out*: a root folder, an initramfs with exactly its files, and a small initramfs that
//! boots and switches off. *Invariant*: what runs natively and what runs in a guest are the same bytes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use twinstep_host::error::Context;
use twinstep_host::guest::cpio::Archive;
use twinstep_host::guest::{self, busybox_applets, program_files};
use twinstep_host::packages::{KernelLine, Package, Progress, Request, Store};
use twinstep_host::{Error, Result};

use crate::workload::Plan;

/// The script that does the workloads.
pub const SUITE: &str = include_str!("guest/suite.sh");
const INIT: &str = include_str!("guest/init.sh");
const PAIR: &str = include_str!("guest/pair.sh");
const KERNELS: &str = include_str!("guest/kernels.c");
const FILES: [(&str, &str); 4] = [
    ("bench/suite.sh", SUITE),
    ("bench/fannkuch.py", include_str!("guest/fannkuch.py")),
    ("bench/nbody.py", include_str!("guest/nbody.py")),
    ("bench/queries.sql", include_str!("guest/queries.sql")),
];

/// Programs by package: (package, path in it, name in the guest).
const PROGRAMS: [(&str, &str, &str); 9] = [
    ("python3.11-minimal", "usr/bin/python3.11", "python3"),
    ("sqlite3", "usr/bin/sqlite3", "sqlite3"),
    ("openssl", "usr/bin/openssl", "openssl"),
    ("gzip", "bin/gzip", "gzip"),
    ("xz-utils", "usr/bin/xz", "xz"),
    ("tcc", "usr/bin/tcc", "tcc"),
    ("redis-server", "usr/bin/redis-server", "redis-server"),
    ("redis-server", "usr/bin/redis-cli", "redis-cli"),
    ("redis-server", "usr/bin/redis-benchmark", "redis-benchmark"),
];

/// Everything a run needs.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// All programs.
    pub initrd: PathBuf,
    /// The shell alone.
    pub boot_initrd: PathBuf,
    /// The files of `initrd`, for the native run.
    pub root: PathBuf,
    /// What is in it, with versions.
    pub packages: Vec<String>,
}

/// Builds it in `folder`, fetching what is missing.
pub fn build(store: &Store, folder: &Path, plan: &Plan, progress: &mut dyn FnMut(Progress)) -> Result<Guest> {
    let kernel = store.kernel(KernelLine::Stable, progress)?;
    let busybox = store.package("busybox-static", progress)?;
    let mut used = vec![kernel.package.clone(), busybox.clone()];

    let boot_root = fresh(folder, "boot-root")?;
    skeleton(&boot_root, &busybox)?;
    write(&boot_root, "bench/suite.sh", 0o755, b"echo 'BENCH done'\n")?;

    let root = fresh(folder, "root")?;
    skeleton(&root, &busybox)?;
    for (path, text) in FILES {
        write(&root, path, 0o755, text.as_bytes())?;
    }
    write(&root, "bench/plan", 0o644, plan.script().as_bytes())?;
    if plan.needs_suite() {
        progress(Progress::Step("Building the benchmark's guest".to_owned()));
        compile_kernels(folder, &root.join("bench/kernels"))?;
        for (name, path, short) in PROGRAMS {
            let packages = store.fetch(Request::WithLibraries(name), progress)?;
            add_program(&root, &packages, path, short)?;
            if name == "python3.11-minimal" {
                add_library(&root, &packages, "usr/lib/python3.11")?;
            }
            for package in packages {
                if !used.contains(&package) {
                    used.push(package);
                }
            }
        }
        add_rsa_key(folder, &root)?;
    }

    let guest = Guest {
        kernel: folder.join("vmlinuz"),
        initrd: folder.join("initrd"),
        boot_initrd: folder.join("initrd-boot"),
        packages: used.iter().map(|p| format!("{} {}", p.name, p.version)).collect(),
        root,
    };
    fs::copy(&kernel.image, &guest.kernel).at("write", &guest.kernel)?;
    for (root, initrd) in [(&guest.root, &guest.initrd), (&boot_root, &guest.boot_initrd)] {
        fs::write(initrd, archive(root)?).at("write", initrd)?;
    }
    Ok(guest)
}

/// Builds the guest of the pair's benchmark: the demo's, and in a second archive behind it the C kernels and a script of its own. Gives kernel and initramfs.
pub fn build_for_pair(store: &Store, folder: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(PathBuf, PathBuf)> {
    let (kernel, initrd) = guest::build_into(folder, store, guest::Kind::Redis, KernelLine::Stable, progress)?;
    let kernels = folder.join("kernels");
    compile_kernels(folder, &kernels)?;
    let mut more = Archive::new();
    more.folder("bench");
    more.file("bench/kernels", 0o755, &fs::read(&kernels).at("read", &kernels)?);
    more.file("bench/pair.sh", 0o755, PAIR.as_bytes());
    let mut both = fs::read(&initrd).at("read", &initrd)?;
    // The kernel looks for the next archive at a multiple of four.
    both.resize(both.len().next_multiple_of(4), 0);
    both.extend(more.finish());
    fs::write(&initrd, both).at("write", &initrd)?;
    Ok((kernel, initrd))
}

fn fresh(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if path.exists() {
        fs::remove_dir_all(&path).at("remove", &path)?;
    }
    fs::create_dir_all(&path).at("create", &path)?;
    Ok(path)
}

fn write(root: &Path, path: &str, permissions: u32, content: &[u8]) -> Result<()> {
    let path = root.join(path);
    if let Some(above) = path.parent() {
        fs::create_dir_all(above).at("create", above)?;
    }
    fs::write(&path, content).at("write", &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(permissions)).at("set the permissions of", &path)
}

fn skeleton(root: &Path, busybox: &Package) -> Result<()> {
    for folder in ["bin", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sys", "tmp", "usr/bin", "var"] {
        let path = root.join(folder);
        fs::create_dir_all(&path).at("create", &path)?;
    }
    write(root, "init", 0o755, INIT.as_bytes())?;
    write(root, "etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    write(root, "etc/group", 0o644, b"root:x:0:\n")?;
    let path = busybox.root.join("bin/busybox");
    write(root, "bin/busybox", 0o755, &fs::read(&path).at("read", &path)?)?;
    let ours: Vec<&str> = PROGRAMS.iter().map(|(.., short)| *short).collect();
    for applet in busybox_applets(busybox)?.iter().filter(|a| !ours.contains(&a.as_str())) {
        let link = root.join("bin").join(applet);
        symlink("busybox", &link).at("create", &link)?;
    }
    Ok(())
}

fn add_program(root: &Path, packages: &[Package], path: &str, short: &str) -> Result<()> {
    for (file, content) in program_files(packages, path)? {
        let file = if file == path { format!("usr/bin/{short}") } else { file };
        // A library that two programs share is written twice, with the same bytes.
        write(root, &file, 0o755, &content)?;
    }
    Ok(())
}

/// A folder of a package as it is.
fn add_library(root: &Path, packages: &[Package], folder: &str) -> Result<()> {
    let mut todo: Vec<(PathBuf, PathBuf)> = packages.iter().map(|p| (p.root.join(folder), root.join(folder))).collect();
    while let Some((from, to)) = todo.pop() {
        if from.is_dir() {
            fs::create_dir_all(&to).at("create", &to)?;
            for entry in fs::read_dir(&from).at("list", &from)? {
                let name = entry.at("list", &from)?.file_name();
                todo.push((from.join(&name), to.join(&name)));
            }
        } else if from.is_file() {
            fs::copy(&from, &to).at("write", &to)?;
        }
    }
    Ok(())
}

/// The kernels are static, so that no library of the host's compiler is needed in the guest.
fn compile_kernels(folder: &Path, to: &Path) -> Result<()> {
    let source = folder.join("kernels.c");
    fs::write(&source, KERNELS).at("write", &source)?;
    let output = Command::new("cc").args(["-O2", "-static", "-o"]).arg(to).arg(&source).output().map_err(|e| {
        Error::new("cannot run the C compiler (cc)")
            .because(e)
            .next("install gcc and libc6-dev; Rust needs them for linking, too")
    })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::new("cannot compile the C kernels with cc -O2 -static")
        .because(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        .next("install libc6-dev (it has the static C library)"))
}

/// A key for the RSA workload, made once and kept, since making one takes a while. It protects nothing.
fn add_rsa_key(folder: &Path, root: &Path) -> Result<()> {
    let kept = folder.join("rsa.pem");
    if !kept.exists() {
        let (key, certificate, config) = (folder.join("key.pem"), folder.join("certificate.pem"), folder.join("openssl.cnf"));
        fs::write(&config, "[req]\ndistinguished_name = name\n[name]\n").at("write", &config)?;
        // The guest's own openssl, with the guest's libraries.
        let output = Command::new(root.join("lib64/ld-linux-x86-64.so.2"))
            .arg("--library-path")
            .arg(root.join("lib/x86_64-linux-gnu"))
            .arg(root.join("usr/bin/openssl"))
            .args(["req", "-x509", "-newkey", "rsa:4096", "-nodes", "-days", "36500", "-subj", "/CN=bench", "-config"])
            .arg(&config)
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .output()
            .what("cannot run the guest's openssl on this host")?;
        if !output.status.success() {
            return Err(Error::new("cannot make an RSA key with the guest's openssl")
                .because(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        let both = [fs::read(&certificate).at("read", &certificate)?, fs::read(&key).at("read", &key)?].concat();
        let draft = folder.join("rsa.new");
        fs::write(&draft, both).at("write", &draft)?;
        fs::rename(&draft, &kept).at("create", &kept)?;
    }
    write(root, "bench/rsa.pem", 0o644, &fs::read(&kept).at("read", &kept)?)
}

/// A folder as an initramfs.
fn archive(root: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    // The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", 0o600, 5, 1);
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let full = root.join(&folder);
        let mut names = Vec::new();
        for entry in fs::read_dir(&full).at("list", &full)? {
            names.push(entry.at("list", &full)?.file_name());
        }
        names.sort();
        for name in names {
            let path = folder.join(name);
            let (full, shown) = (root.join(&path), path.to_string_lossy().into_owned());
            let metadata = fs::symlink_metadata(&full).at("look at", &full)?;
            if metadata.is_symlink() {
                archive.link(&shown, &fs::read_link(&full).at("read", &full)?.to_string_lossy());
            } else if metadata.is_dir() {
                archive.folder(&shown);
                folders.push(path);
            } else {
                let permissions = metadata.permissions().mode() & 0o777;
                archive.file(&shown, permissions, &fs::read(&full).at("read", &full)?);
            }
        }
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_becomes_the_same_archive_every_time() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a/b/c", 0o755, b"x").unwrap();
        symlink("b", dir.path().join("a/link")).unwrap();
        let first = archive(dir.path()).unwrap();
        assert_eq!(first, archive(dir.path()).unwrap());
        let text = String::from_utf8_lossy(&first);
        for path in ["dev/console\0", "a\0", "a/b/c\0", "a/link\0"] {
            assert!(text.contains(path), "{path}");
        }
    }
}
