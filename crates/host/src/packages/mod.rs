//! Debian packages without root: found, fetched, unpacked into a cache folder, and verified each time they are used.
//!
//! *In*: what is wanted (a package, a package with its shared libraries, a kernel). *Out*: folders with the unpacked files.
//! *Invariant*: a [`Package`] that is handed out is complete and has exactly the bytes apt verified when it was fetched: every
//! folder appears by rename once it is whole, and its digest is checked on every use. One process at a time
//! changes the cache (a lock file); a second one waits and then finds the work done.
//!
//! The packages are always Debian 12's, whatever the host is: the guest is the same everywhere. The host contributes its
//! mirror, its proxy settings and its keyring when it has them. See `apt` for the private apt state.

mod apt;
mod control;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use apt::Apt;

/// What may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// One package, nothing it depends on.
    Package(&'a str),
    /// A package, its sibling packages of the same version, and the shared libraries they need.
    WithLibraries(&'a str),
    /// The cloud kernel.
    Kernel(KernelLine),
}

/// Which of Debian's cloud kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelLine {
    /// Debian 12's own (6.1).
    Stable,
    /// The newer one from bookworm-backports (6.12).
    Backports,
}

/// What happens during the wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A step begins.
    Step(String),
    /// The running step is this far.
    Percent(u8),
}

/// An unpacked package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name, "busybox-static".
    pub name: String,
    /// Its full Debian version.
    pub version: String,
    /// The folder that plays the root directory.
    pub root: PathBuf,
}

/// A kernel with its modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// What `uname -r` says in the guest.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// `/lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// The package it came from.
    pub package: Package,
}

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// What a finished request looked like; kept beside the packages so that the next run needs neither apt nor a network.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    packages: Vec<ManifestEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct ManifestEntry {
    name: String,
    version: String,
    folder: String,
    digest: String,
}

const MANIFEST_FORMAT: u32 = 1;
const KERNEL_META: &str = "linux-image-cloud-amd64";

impl Request<'_> {
    fn key(&self) -> String {
        match self {
            Self::Package(name) => format!("package-{name}"),
            Self::WithLibraries(name) => format!("libraries-{name}"),
            Self::Kernel(KernelLine::Stable) => "kernel-stable".to_owned(),
            Self::Kernel(KernelLine::Backports) => "kernel-backports".to_owned(),
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Package(name) | Self::WithLibraries(name) => (*name).to_owned(),
            Self::Kernel(KernelLine::Stable) => "the Debian 12 cloud kernel".to_owned(),
            Self::Kernel(KernelLine::Backports) => "the cloud kernel from bookworm-backports".to_owned(),
        }
    }
}

/// Tells the progress on standard error, one line per step.
pub fn tell_on_stderr(progress: Progress) {
    use std::io::{IsTerminal, Write};
    let mut err = std::io::stderr().lock();
    // A progress line that can't be written is no reason to fail.
    let _ = match progress {
        Progress::Step(text) => writeln!(err, "{text}"),
        Progress::Percent(percent) if err.is_terminal() => write!(err, "  {percent:3} %\r"),
        Progress::Percent(_) => Ok(()),
    };
}

impl Store {
    /// The user's cache; see [`Store::default_folder`].
    pub fn open() -> Result<Self> {
        let root = Self::default_folder().ok_or_else(|| {
            Error::new("there is no folder to keep packages in: neither TWINSTEP_CACHE nor HOME is set")
                .next("set TWINSTEP_CACHE to a folder with about 400 MB of space")
        })?;
        Self::at(root)
    }

    /// Where the user's cache is or would be: `$TWINSTEP_CACHE`, else `$XDG_CACHE_HOME/twinstep`, else `~/.cache/twinstep`.
    #[must_use]
    pub fn default_folder() -> Option<PathBuf> {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        set("TWINSTEP_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").filter(|p| p.is_absolute()).map(|p| p.join("twinstep")))
            .or_else(|| set("HOME").map(|p| p.join(".cache/twinstep")))
    }

    /// A cache in a folder of the caller's choice, which is created if need be.
    pub fn at(root: impl Into<PathBuf>) -> Result<Self> {
        let given: PathBuf = root.into();
        let usable = fs::create_dir_all(&given).and_then(|()| fs::canonicalize(&given));
        let root = usable.map_err(|e| {
            Error::new(format!("cannot create the cache folder {}", given.display()))
                .because(e)
                .next("set TWINSTEP_CACHE to a folder you may write to")
        })?;
        // apt's configuration files know no way to write a quote inside a quoted path.
        if root.to_str().is_none_or(|s| s.contains(['"', '\n', '\\'])) {
            return Err(Error::new(format!("the cache folder {} has a quote or a strange byte in its name", root.display()))
                .next("set TWINSTEP_CACHE to a folder with a plain name"));
        }
        Ok(Self { root })
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// One package.
    pub fn package(&self, name: &str, progress: &mut dyn FnMut(Progress)) -> Result<Package> {
        let mut found = self.fetch(Request::Package(name), progress)?;
        found.pop().ok_or_else(|| Error::new(format!("package {name} resolved to nothing")))
    }

    /// A kernel and its modules.
    pub fn kernel(&self, line: KernelLine, progress: &mut dyn FnMut(Progress)) -> Result<Kernel> {
        let package = self.fetch(Request::Kernel(line), progress)?.pop();
        let package = package.ok_or_else(|| Error::new("the kernel's metapackage resolved to nothing"))?;
        let release = package.name.strip_prefix("linux-image-").unwrap_or(&package.name).to_owned();
        let image = package.root.join(format!("boot/vmlinuz-{release}"));
        let modules = package.root.join(format!("lib/modules/{release}"));
        for path in [&image, &modules] {
            if !path.exists() {
                return Err(Error::new(format!("package {} {} has no {}", package.name, package.version, path.display()))
                    .next("report this: Debian's kernel package has changed its layout"));
            }
        }
        Ok(Kernel { release, image, modules, package })
    }

    /// What was asked for, from the cache or from the mirror. The package that was named is the first of the list.
    pub fn fetch(&self, request: Request<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Vec<Package>> {
        let _lock = self.lock(progress)?;
        if let Some(found) = self.cached(request)? {
            return Ok(found);
        }
        progress(Progress::Step(format!("Looking for {} in Debian's archive", request.words())));
        let apt = Apt::prepare(&self.root.join("apt"))?;
        apt.update_once(progress)?;
        let packages = match self.look_up_and_bring(&apt, request, progress) {
            Ok(packages) => packages,
            // The lists may be older than the archive (a superseded version is removed from it): look again, once.
            Err(e) if apt.lists_are_old() => {
                tracing::info!("the package lists may be out of date ({})", e.what());
                apt.update(progress)?;
                self.look_up_and_bring(&apt, request, progress)?
            }
            Err(e) => return Err(e),
        };
        self.write_manifest(request, &packages)?;
        Ok(packages.into_iter().map(|entry| self.package_of(entry)).collect())
    }

    fn lock(&self, progress: &mut dyn FnMut(Progress)) -> Result<fs::File> {
        use rustix::fs::{FlockOperation, flock};
        let path = self.root.join("lock");
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).at("open", &path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                progress(Progress::Step(format!("Waiting for another twinstep that is filling {}", self.root.display())));
            }
            Err(e) => return Err(Error::new(format!("cannot lock {}", path.display())).because(e)),
        }
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::new(format!("cannot lock {}", path.display())).because(e)),
            }
        }
    }

    fn manifest_path(&self, request: Request<'_>) -> PathBuf {
        self.root.join("sets").join(format!("{}.json", request.key()))
    }

    /// The packages of an earlier run, if every byte is still as it was.
    fn cached(&self, request: Request<'_>) -> Result<Option<Vec<Package>>> {
        let Ok(text) = fs::read(self.manifest_path(request)) else { return Ok(None) };
        let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else { return Ok(None) };
        if manifest.format != MANIFEST_FORMAT {
            return Ok(None);
        }
        for entry in &manifest.packages {
            let folder = self.root.join("packages").join(&entry.folder);
            if tree::digest(&folder).ok().as_deref() != Some(entry.digest.as_str()) {
                tracing::warn!(folder = %folder.display(), "an unpacked package has changed or vanished; fetching it again");
                return Ok(None);
            }
        }
        Ok(Some(manifest.packages.into_iter().map(|entry| self.package_of(entry)).collect()))
    }

    fn package_of(&self, entry: ManifestEntry) -> Package {
        Package { root: self.root.join("packages").join(&entry.folder), name: entry.name, version: entry.version }
    }

    fn write_manifest(&self, request: Request<'_>, packages: &[ManifestEntry]) -> Result<()> {
        let path = self.manifest_path(request);
        let folder = self.root.join("sets");
        fs::create_dir_all(&folder).at("create", &folder)?;
        let manifest = Manifest { format: MANIFEST_FORMAT, packages: packages.to_vec() };
        let text = serde_json::to_vec_pretty(&manifest).what("cannot write down what was fetched")?;
        let draft = path.with_extension("new");
        fs::write(&draft, text).at("write", &draft)?;
        fs::rename(&draft, &path).at("create", &path)
    }

    fn look_up_and_bring(
        &self,
        apt: &Apt,
        request: Request<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<ManifestEntry>> {
        let wanted = resolve(apt, request)?;
        self.bring(apt, &wanted, progress)
    }

    /// Downloads and unpacks what is not there yet.
    fn bring(&self, apt: &Apt, wanted: &[Wanted], progress: &mut dyn FnMut(Progress)) -> Result<Vec<ManifestEntry>> {
        let debs = self.root.join("debs");
        let packages = self.root.join("packages");
        for folder in [&debs, &packages] {
            fs::create_dir_all(folder).at("create", folder)?;
        }
        let known = self.known_digests();
        let mut missing = Vec::new();
        let mut done = BTreeMap::new();
        for want in wanted {
            let folder = want.folder();
            match (known.get(&folder), tree::digest(&packages.join(&folder))) {
                (Some(recorded), Ok(found)) if *recorded == found => {
                    done.insert(want.name.clone(), found);
                }
                _ => missing.push(want),
            }
        }
        if !missing.is_empty() {
            let megabytes = missing.iter().map(|w| w.size).sum::<u64>() as f64 / 1e6;
            let names: Vec<_> = missing.iter().map(|w| w.name.as_str()).collect();
            progress(Progress::Step(format!("Fetching {} ({megabytes:.1} MB)", names.join(", "))));
            apt.download(&missing.iter().map(|w| format!("{}={}", w.name, w.version)).collect::<Vec<_>>(), &debs, progress)?;
        }
        for want in missing {
            let deb = debs.join(&want.deb);
            let folder = packages.join(want.folder());
            let digest = tree::unpack(&deb, &folder)?;
            // Unpacked and measured: the archive itself is not needed any more.
            fs::remove_file(&deb).at("remove", &deb)?;
            done.insert(want.name.clone(), digest);
        }
        Ok(wanted
            .iter()
            .map(|want| ManifestEntry {
                name: want.name.clone(),
                version: want.version.clone(),
                folder: want.folder(),
                digest: done.remove(&want.name).unwrap_or_default(),
            })
            .collect())
    }

    /// Digests other requests have written down, by folder: a library shared by two requests is fetched once.
    fn known_digests(&self) -> BTreeMap<String, String> {
        let Ok(entries) = fs::read_dir(self.root.join("sets")) else { return BTreeMap::new() };
        entries
            .filter_map(|entry| fs::read(entry.ok()?.path()).ok())
            .filter_map(|text| serde_json::from_slice::<Manifest>(&text).ok())
            .flat_map(|manifest| manifest.packages)
            .map(|entry| (entry.folder, entry.digest))
            .collect()
    }
}

/// A package whose version and file name are decided.
#[derive(Debug, Clone)]
struct Wanted {
    name: String,
    version: String,
    deb: String,
    size: u64,
}

impl Wanted {
    fn from(stanza: &control::Stanza) -> Result<Self> {
        let field =
            |name: &str| stanza.get(name).ok_or_else(|| Error::new(format!("apt's record of {} has no {name}", stanza.name())));
        let version = field("Version")?.to_owned();
        let architecture = field("Architecture")?;
        // apt writes the colon of an epoch as %3a into the file's name.
        let deb = format!("{}_{}_{architecture}.deb", stanza.name(), version.replace(':', "%3a"));
        let size = field("Size")?.parse().unwrap_or(0);
        Ok(Self { name: stanza.name().to_owned(), version, deb, size })
    }

    fn folder(&self) -> String {
        format!("{}_{}", self.name, self.version.replace(':', "%3a"))
    }
}

fn resolve(apt: &Apt, request: Request<'_>) -> Result<Vec<Wanted>> {
    match request {
        Request::Package(name) => Ok(vec![Wanted::from(&apt.candidate(name)?)?]),
        Request::WithLibraries(name) => with_libraries(apt, name),
        Request::Kernel(line) => {
            let meta = match line {
                KernelLine::Stable => apt.candidate(KERNEL_META)?,
                KernelLine::Backports => apt.candidate_of_suite(KERNEL_META, "bookworm-backports")?,
            };
            let kernel = meta.depends().into_iter().find(|d| d.name.starts_with("linux-image-"));
            let kernel = kernel.ok_or_else(|| {
                Error::new(format!("{KERNEL_META} {} names no kernel package", meta.get("Version").unwrap_or("?")))
            })?;
            let exact = match &kernel.exactly {
                Some(version) => format!("{}={version}", kernel.name),
                None => kernel.name.clone(),
            };
            Ok(vec![Wanted::from(&apt.candidate(&exact)?)?])
        }
    }
}

/// A package and what it needs to be loaded. Debian marks co-installable libraries `Multi-Arch: same`, and siblings built from the same
/// source depend on each other by exact version; everything else (configuration tools, init scripts) is not needed to run a program.
fn with_libraries(apt: &Apt, name: &str) -> Result<Vec<Wanted>> {
    let top = apt.candidate(name)?;
    let mut chosen = vec![Wanted::from(&top)?];
    let mut seen: BTreeSet<String> = BTreeSet::from([top.name().to_owned()]);
    let mut frontier = vec![top];
    // Each round looks one level deeper; the archive's dependency graph is finite and every name is looked at once.
    while !frontier.is_empty() {
        let mut names = BTreeMap::new();
        for stanza in &frontier {
            for dependency in stanza.depends() {
                if seen.insert(dependency.name.clone()) {
                    let sibling = dependency.exactly.is_some() && dependency.exactly.as_deref() == stanza.get("Version");
                    names.insert(dependency.name.clone(), sibling);
                }
            }
        }
        let found = apt.candidates(&names.keys().map(String::as_str).collect::<Vec<_>>())?;
        frontier =
            found.into_iter().filter(|s| s.get("Multi-Arch") == Some("same") || names.get(s.name()) == Some(&true)).collect();
        for stanza in &frontier {
            chosen.push(Wanted::from(stanza)?);
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_package_is_not_handed_out() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).unwrap();
        let folder = store.root.join("packages/thing_1");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("file"), b"content").unwrap();
        let entry = ManifestEntry {
            name: "thing".into(),
            version: "1".into(),
            folder: "thing_1".into(),
            digest: tree::digest(&folder).unwrap(),
        };
        let request = Request::Package("thing");
        store.write_manifest(request, &[entry]).unwrap();
        assert_eq!(store.cached(request).unwrap().unwrap()[0].name, "thing");
        fs::write(folder.join("file"), b"contenT").unwrap();
        assert_eq!(store.cached(request).unwrap(), None);
    }

    #[test]
    fn a_damaged_or_newer_manifest_is_as_good_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).unwrap();
        let request = Request::Kernel(KernelLine::Stable);
        fs::create_dir_all(store.root.join("sets")).unwrap();
        for text in ["{", "{\"format\":2,\"packages\":[]}", ""] {
            fs::write(store.manifest_path(request), text).unwrap();
            assert_eq!(store.cached(request).unwrap(), None, "{text}");
        }
    }

    #[test]
    fn the_cache_folder_must_have_a_name_apt_can_take() {
        let dir = tempfile::tempdir().unwrap();
        let error = Store::at(dir.path().join("a\"b")).unwrap_err();
        assert!(error.to_string().contains("TWINSTEP_CACHE"), "{error}");
    }

    #[test]
    fn two_users_of_the_cache_take_turns() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).unwrap();
        let held = store.lock(&mut |_| panic!("nobody else is here")).unwrap();
        let (say, hear) = std::sync::mpsc::channel();
        let other = store.clone();
        let waiter = std::thread::spawn(move || {
            let _lock = other.lock(&mut |p| say.send(p).unwrap()).unwrap();
        });
        // The second user says that it waits, and gets the lock once the first lets go.
        assert!(matches!(hear.recv().unwrap(), Progress::Step(text) if text.contains("Waiting")));
        drop(held);
        waiter.join().unwrap();
    }
}
