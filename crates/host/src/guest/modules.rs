//! Which kernel modules the guest loads, in which order.
//!
//! *In*: a kernel's module folder and the names wanted. *Out*: the modules' contents, uncompressed, dependencies first.
//! *Invariant*: every module of the list comes after all it needs. What is built into this kernel is left out; what is neither
//! built in nor there is an error that names it.
//!
//! Debian's package carries no `modules.dep` (depmod makes it at installation), so the dependencies are read from the modules
//! themselves. Debian 12's modules are plain; those from backports are compressed with xz.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::elf::Elf;
use crate::error::{Context, Error, Result};

/// A module ready for `insmod`.
#[derive(Debug)]
pub struct Module {
    /// Its name with underscores, as `lsmod` shows it.
    pub name: String,
    /// The ELF file.
    pub content: Vec<u8>,
}

/// The modules wanted and all they depend on, in loading order.
pub fn in_loading_order(folder: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut search = Search {
        files: module_files(&folder.join("kernel"))?,
        built_in: built_in(&folder.join("modules.builtin"))?,
        folder,
        started: BTreeSet::new(),
        found: Vec::new(),
    };
    for name in wanted {
        search.visit(name, "the guest")?;
    }
    Ok(search.found)
}

struct Search<'a> {
    folder: &'a Path,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    started: BTreeSet<String>,
    found: Vec<Module>,
}

impl Search<'_> {
    /// Depth first, so that a module is appended after its dependencies. The kernel allows no cycles, and each name is visited once.
    fn visit(&mut self, name: &str, wanted_by: &str) -> Result<()> {
        let name = canonical(name);
        if self.built_in.contains(&name) || !self.started.insert(name.clone()) {
            return Ok(());
        }
        let path = self.files.get(&name).ok_or_else(|| {
            Error::new(format!("kernel module {name}, needed by {wanted_by}, is not in {}", self.folder.display()))
                .next("use a Debian cloud kernel; it carries all virtio drivers")
        })?;
        let content = read_module(path)?;
        let elf = Elf::parse(&content).ok_or_else(|| Error::new(format!("{} is not a kernel module", path.display())))?;
        let depends = elf.module_info("depends").unwrap_or("").to_owned();
        for dependency in depends.split(',').filter(|d| !d.is_empty()) {
            self.visit(dependency, &name)?;
        }
        self.found.push(Module { name, content });
        Ok(())
    }
}

/// The kernel takes "-" and "_" in module names for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// "drivers/x/virtio-rng.ko.xz" is the module `virtio_rng`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, rest) = name.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".gz" | ".zst").then(|| canonical(stem))
}

fn module_files(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).at("list", &folder)? {
            let entry = entry.at("list", &folder)?;
            if entry.file_type().at("look at", &entry.path())?.is_dir() {
                folders.push(entry.path());
            } else if let Some(name) = module_name(&entry.path()) {
                files.insert(name, entry.path());
            }
        }
    }
    Ok(files)
}

fn built_in(list: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(list).at("read", list)?;
    Ok(text.lines().filter_map(|line| module_name(Path::new(line))).collect())
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let (program, package) = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => ("xz", "xz-utils"),
        Some("gz") => ("gzip", "gzip"),
        Some("zst") => ("zstd", "zstd"),
        _ => return fs::read(path).at("read", path),
    };
    // Uncompressed here and not in the guest, where each of its instructions costs several of ours.
    let output = Command::new(program).arg("-dc").arg(path).output().map_err(|e| {
        Error::new(format!("cannot uncompress {}: {program} does not start", path.display()))
            .because(e)
            .next(format!("install the package {package}, or use Debian's stable kernel, whose modules are not compressed"))
    })?;
    if !output.status.success() {
        return Err(Error::new(format!("cannot uncompress {}", path.display()))
            .because(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(module_name(Path::new("kernel/drivers/char/hw_random/virtio-rng.ko.xz")).as_deref(), Some("virtio_rng"));
        assert_eq!(module_name(Path::new("a/virtio.ko")).as_deref(), Some("virtio"));
        assert_eq!(module_name(Path::new("a/notes.kotlin")), None);
    }

    #[test]
    fn a_missing_module_is_named_and_a_built_in_one_is_not_missed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("kernel")).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/drivers/virtio/virtio_ring.ko\n").unwrap();
        assert!(in_loading_order(dir.path(), &["virtio-ring"]).unwrap().is_empty());
        let error = in_loading_order(dir.path(), &["virtio_net"]).unwrap_err().to_string();
        assert!(error.contains("virtio_net, needed by the guest"), "{error}");
    }
}
