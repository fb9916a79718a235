//! apt with a state of its own, so that it works for any user, even where `apt-get update` was never run.
//!
//! *In*: names of packages. *Out*: their records and their archive files, verified by apt against the archive's signatures.
//! *Invariant*: nothing outside the cache folder is written, and nothing that is installed on the host changes what is found.
//!
//! The private configuration is given with `-c`, so it is read last: the host's own configuration (proxies above all)
//! holds where it does not contradict. Sources are written by us: Debian 12 with updates, security and backports, from the host's own mirror where
//! its sources name one.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use super::Progress;
use super::control::{self, Stanza};
use crate::error::{Context, Error, Result};

const CODENAME: &str = "bookworm";
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";
const DEFAULT_SECURITY: &str = "http://deb.debian.org/debian-security";
const KEYRINGS: [&str; 3] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/etc/apt/trusted.gpg.d/debian-archive-bookworm-stable.asc",
];
/// Lists younger than this are not fetched again because a package was not found.
const LISTS_ARE_YOUNG: Duration = Duration::from_secs(600);

/// A prepared private apt.
pub struct Apt {
    config: PathBuf,
    stamp: PathBuf,
}

impl Apt {
    /// Writes the private configuration into `folder`.
    pub fn prepare(folder: &Path) -> Result<Self> {
        let parts = folder.join("parts");
        for sub in ["state/lists/partial", "cache/archives/partial", "parts"] {
            let path = folder.join(sub);
            fs::create_dir_all(&path).at("create", &path)?;
        }
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).at("write", &path).map(|()| path)
        };
        let status = write("status", "")?;
        let sources = write("sources.list", &Sources::of_host(Path::new("/etc/apt")).render(keyring()?))?;
        let config = write(
            "apt.conf",
            &format!(
                "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n\
                 #clear APT::Default-Release;\n#clear Acquire::IndexTargets::deb::DEP-11;\n\
                 Dir::State \"{folder}/state\";\nDir::State::lists \"lists/\";\nDir::State::status \"{status}\";\n\
                 Dir::Cache \"{folder}/cache\";\nDir::Cache::pkgcache \"pkgcache.bin\";\n\
                 Dir::Cache::srcpkgcache \"srcpkgcache.bin\";\n\
                 Dir::Etc::sourcelist \"{sources}\";\nDir::Etc::sourceparts \"{parts}\";\n\
                 Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"{parts}\";\n\
                 APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; }};\n\
                 APT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\nAcquire::Retries \"2\";\n",
                folder = folder.display(),
                status = status.display(),
                sources = sources.display(),
                parts = parts.display(),
            ),
        )?;
        Ok(Self { config, stamp: folder.join("updated") })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // LC_ALL: the messages are looked at. DEBIAN_FRONTEND: nothing may ask.
        command.arg("-c").arg(&self.config).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command.env_remove("APT_CONFIG").stdin(Stdio::null());
        command
    }

    /// Fetches the package lists unless there are some.
    pub fn update_once(&self, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        if self.stamp.exists() { Ok(()) } else { self.update(progress) }
    }

    /// Whether fetching the lists again could tell something new.
    pub fn lists_are_old(&self) -> bool {
        let age =
            fs::metadata(&self.stamp).and_then(|m| m.modified()).ok().and_then(|t| SystemTime::now().duration_since(t).ok());
        age.is_none_or(|age| age > LISTS_ARE_YOUNG)
    }

    /// Fetches the package lists.
    pub fn update(&self, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        progress(Progress::Step("Reading Debian's package lists (about 10 MB)".to_owned()));
        let mut command = self.command("apt-get");
        command.args(["-q2", "-o", "APT::Status-Fd=1", "update"]);
        let complaints = run_with_progress(command, progress, "cannot read Debian's package lists")?;
        // apt-get calls it a success when some lists are missing. One missing suite must not stop the others.
        if !complaints.is_empty() {
            tracing::warn!("apt-get update: {complaints}");
        }
        // Without the main list there is nothing to go on with.
        if self.show(&["base-files"])?.is_empty() {
            return Err(Error::new("cannot read Debian's package lists")
                .because(complaints)
                .next("check the network and the proxy settings of apt (apt-get update), then try again"));
        }
        fs::write(&self.stamp, "").at("write", &self.stamp)
    }

    fn show(&self, names: &[&str]) -> Result<Vec<Stanza>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let output = self
            .command("apt-cache")
            .args(["show", "--no-all-versions"])
            .args(names)
            .output()
            .map_err(|e| no_apt("apt-cache", e))?;
        // A name that is not found makes the exit status 100 although the others are shown: what counts is the text.
        Ok(control::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    /// The records of the packages that exist, in no particular order.
    pub fn candidates(&self, names: &[&str]) -> Result<Vec<Stanza>> {
        let mut found = self.show(names)?;
        found.dedup_by(|a, b| a.name() == b.name());
        Ok(found)
    }

    /// The record of one package (`name` or `name=version`).
    pub fn candidate(&self, name: &str) -> Result<Stanza> {
        self.show(&[name])?.into_iter().next().ok_or_else(|| {
            Error::new(format!("the Debian archive has no package {name}")).next(format!(
                "see which mirror is used in {} and whether it carries {CODENAME} for amd64",
                self.config.with_file_name("sources.list").display()
            ))
        })
    }

    /// The record of a package as a certain suite has it.
    pub fn candidate_of_suite(&self, name: &str, suite: &str) -> Result<Stanza> {
        let output = self.command("apt-cache").args(["madison", name]).output().map_err(|e| no_apt("apt-cache", e))?;
        let version = madison_version(&String::from_utf8_lossy(&output.stdout), suite).ok_or_else(|| {
            Error::new(format!("the mirror has no {name} in {suite}"))
                .next("use the stable kernel, or a mirror that carries backports")
        })?;
        self.candidate(&format!("{name}={version}"))
    }

    /// Downloads packages (`name=version`) into `folder`.
    pub fn download(&self, packages: &[String], folder: &Path, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let mut command = self.command("apt-get");
        command.args(["-q2", "-o", "APT::Status-Fd=1", "download"]).args(packages).current_dir(folder);
        run_with_progress(command, progress, &format!("cannot fetch {}", packages.join(", ")))?;
        Ok(())
    }
}

/// The version a suite offers, from `apt-cache madison`: "name | version | mirror suite/section arch Packages".
fn madison_version(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        let (_name, version, origin) = (columns.next()?, columns.next()?, columns.next()?);
        let from = origin.split_whitespace().nth(1)?;
        (from.split('/').next() == Some(suite)).then(|| version.to_owned())
    })
}

/// Runs apt-get, passes its percentages on, and returns its complaints. An exit status other than 0 is an error.
fn run_with_progress(mut command: Command, progress: &mut dyn FnMut(Progress), failure: &str) -> Result<String> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|e| no_apt("apt-get", e))?;
    let stderr = child.stderr.take();
    let complaints = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut pipe) = stderr {
            // What can't be read is missing from a message, no more.
            let _ = pipe.read_to_string(&mut text);
        }
        text
    });
    if let Some(stdout) = child.stdout.take() {
        let mut last = None;
        for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
            if let Some(percent) = status_percent(&line).filter(|p| last != Some(*p)) {
                last = Some(percent);
                progress(Progress::Percent(percent));
            }
        }
    }
    let status = child.wait().what("cannot wait for apt-get")?;
    let complaints = complaints.join().unwrap_or_default().trim().to_owned();
    if status.success() {
        return Ok(complaints);
    }
    Err(Error::new(failure)
        .because(if complaints.is_empty() { status.to_string() } else { complaints })
        .next("check the network, the proxy settings of apt and the free space (df -h), then try again"))
}

/// apt's status lines: `dlstatus:1:45.3000:Retrieving file 1 of 2`.
fn status_percent(line: &str) -> Option<u8> {
    let mut parts = line.split(':');
    (parts.next()? == "dlstatus").then_some(())?;
    let percent: f64 = parts.nth(1)?.parse().ok()?;
    Some(percent.clamp(0.0, 100.0) as u8)
}

fn no_apt(program: &str, e: std::io::Error) -> Error {
    Error::new(format!("cannot run {program}")).because(e).next(
        "Twinstep builds its demo guest from Debian packages and needs apt for it: install apt, \
         or copy the cache folder from a Debian machine and name it in TWINSTEP_CACHE",
    )
}

fn keyring() -> Result<&'static str> {
    KEYRINGS.into_iter().find(|path| Path::new(path).exists()).ok_or_else(|| {
        Error::new("this host has no keys to check Debian packages with (debian-archive-keyring.gpg)")
            .next("install the package debian-archive-keyring (Debian and Ubuntu have it)")
    })
}

/// Where to fetch from.
#[derive(Debug, PartialEq, Eq)]
struct Sources {
    mirror: String,
    security: String,
}

impl Sources {
    /// The mirrors named in the host's sources for Debian 12, else the public ones.
    fn of_host(etc_apt: &Path) -> Self {
        let mut files = vec![etc_apt.join("sources.list")];
        let mut parts: Vec<_> =
            fs::read_dir(etc_apt.join("sources.list.d")).into_iter().flatten().filter_map(|e| Some(e.ok()?.path())).collect();
        parts.sort();
        files.extend(parts);
        let mut entries = Vec::new();
        for file in files {
            let Ok(text) = fs::read_to_string(&file) else { continue };
            match file.extension().and_then(|e| e.to_str()) {
                Some("list") => entries.extend(text.lines().filter_map(one_line_entry)),
                Some("sources") => entries.extend(control::parse(&text).iter().flat_map(stanza_entries)),
                _ => {}
            }
        }
        let of_suite = |suite: &str| entries.iter().find(|(_, s)| s == suite).map(|(uri, _)| uri.clone());
        Self {
            mirror: of_suite(CODENAME).unwrap_or_else(|| DEFAULT_MIRROR.to_owned()),
            security: of_suite("bookworm-security").unwrap_or_else(|| DEFAULT_SECURITY.to_owned()),
        }
    }

    fn render(&self, keyring: &str) -> String {
        let Self { mirror, security } = self;
        format!(
            "deb [signed-by={keyring}] {mirror} {CODENAME} main\n\
             deb [signed-by={keyring}] {mirror} {CODENAME}-updates main\n\
             deb [signed-by={keyring}] {security} {CODENAME}-security main\n\
             deb [signed-by={keyring}] {mirror} {CODENAME}-backports main\n"
        )
    }
}

fn usable(uri: &str) -> bool {
    // A CD is not there when it is needed.
    !uri.starts_with("cdrom:")
}

/// (URI, suite) of `deb [options] URI SUITE COMPONENT...` when it has the component main.
fn one_line_entry(line: &str) -> Option<(String, String)> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let rest = match rest.strip_prefix('[') {
        Some(options) => options.split_once(']')?.1,
        None => rest,
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    (words.any(|c| c == "main") && usable(uri)).then(|| (uri.to_owned(), suite.to_owned()))
}

fn stanza_entries(stanza: &Stanza) -> Vec<(String, String)> {
    let words = |field: &str| stanza.get(field).unwrap_or("").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let enabled = !stanza.get("Enabled").is_some_and(|v| v.eq_ignore_ascii_case("no"));
    if !enabled || !words("Types").contains(&"deb".to_owned()) || !words("Components").contains(&"main".to_owned()) {
        return Vec::new();
    }
    let suites = words("Suites");
    words("URIs")
        .into_iter()
        .filter(|uri| usable(uri))
        .flat_map(|uri| suites.iter().map(move |suite| (uri.clone(), suite.clone())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_hosts_mirror() {
        let etc = tempfile::tempdir().unwrap();
        assert_eq!(Sources::of_host(etc.path()).mirror, DEFAULT_MIRROR);

        fs::create_dir(etc.path().join("sources.list.d")).unwrap();
        fs::write(
            etc.path().join("sources.list.d/debian.sources"),
            "Types: deb\n# snapshot\nURIs: http://near/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\n\
             Types: deb\nURIs: http://near/sec\nSuites: bookworm-security\nComponents: main contrib\n",
        )
        .unwrap();
        let found = Sources::of_host(etc.path());
        assert_eq!((found.mirror.as_str(), found.security.as_str()), ("http://near/debian", "http://near/sec"));

        fs::write(
            etc.path().join("sources.list"),
            "# deb http://no/ bookworm main\ndeb cdrom:[x]/ bookworm main\n\
             deb [arch=amd64 trusted=yes] mirror+file:/etc/apt/m.list bookworm main\n",
        )
        .unwrap();
        assert_eq!(Sources::of_host(etc.path()).mirror, "mirror+file:/etc/apt/m.list");
    }

    #[test]
    fn other_releases_and_disabled_sources_are_left_alone() {
        let stanza = "Types: deb\nURIs: http://x\nSuites: bookworm\nComponents: main\nEnabled: no\n";
        assert!(stanza_entries(&control::parse(stanza)[0]).is_empty());
        assert_eq!(one_line_entry("deb http://x bookworm contrib"), None);
        assert_eq!(one_line_entry("deb-src http://x bookworm main"), None);
    }

    #[test]
    fn reads_apts_status_and_madison() {
        assert_eq!(status_percent("dlstatus:2:10.8593:Retrieving file 2 of 2"), Some(10));
        assert_eq!(status_percent("pmstatus:a:1:b"), None);
        let text = "k | 6.12.95-1~bpo12+1 | http://d/debian bookworm-backports/main amd64 Packages\n\
                    k | 6.1.192-2 | http://d/s bookworm-security/main amd64 Packages\n";
        assert_eq!(madison_version(text, "bookworm-security").as_deref(), Some("6.1.192-2"));
        assert_eq!(madison_version(text, "bookworm"), None);
    }
}
