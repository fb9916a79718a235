//! The single examinations.
//!
//! *In*: a [`Host`], which in tests is a folder with made-up files. *Out*: one [`Finding`] each. *Invariant*: a file that is missing or reads
//! strangely is an answer too.

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use twinstep_machine::{CpuModel, Features};

use super::{Cpu, Finding, Report, State};

/// What x86-64-v2 has beyond the first x86-64, in the words of /proc/cpuinfo (pni is SSE3).
const V2: [&str; 7] = ["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"];
/// `KVM_GET_API_VERSION`, and the answer every kernel since 2007 gives.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_API_VERSION: libc::c_int = 12;
/// Where an etcd listens by default.
const ETCD_PORT: u16 = 2379;
/// What the demo's two machines and everything around them take.
const DEMO_MEMORY: u64 = 1 << 30;
/// Packages, unpacked, with apt's lists.
const CACHE_SPACE: u64 = 400 << 20;
const CAP_NET_ADMIN: u32 = 12;

/// The host that is examined.
pub struct Host {
    root: PathBuf,
    path: OsString,
    cache: Option<PathBuf>,
}

fn finding(subject: &str, state: State, found: impl Into<String>, therefore: &str, advice: Option<&str>) -> Finding {
    Finding {
        subject: subject.to_owned(),
        state,
        found: found.into(),
        therefore: therefore.to_owned(),
        advice: advice.map(str::to_owned),
    }
}

/// A feature's name in /proc/cpuinfo, which calls LZCNT by the name of AMD's group it came in.
fn cpuinfo_name(feature: &str) -> &str {
    if feature == "lzcnt" { "abm" } else { feature }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

impl Host {
    /// This one.
    pub fn here(cache: Option<PathBuf>) -> Self {
        Self { root: PathBuf::from("/"), path: std::env::var_os("PATH").unwrap_or_default(), cache }
    }

    /// Everything.
    pub fn examine(&self) -> Report {
        let cpu = self.cpu();
        let findings = vec![
            self.processor(&cpu),
            self.models(),
            self.own_code(),
            self.kvm(),
            self.memory(),
            self.huge_pages(),
            self.tap(),
            self.passt(),
            self.user_namespaces(),
            self.packages(),
            self.space(),
            self.etcd(),
        ];
        Report { cpu, findings }
    }

    fn file(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.file(path)).ok()
    }

    /// A line `key : value` of the first processor.
    fn cpuinfo(&self, key: &str) -> Option<String> {
        let text = self.text("/proc/cpuinfo")?;
        text.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            (found.trim() == key).then(|| value.trim().to_owned())
        })
    }

    fn has_flag(&self, flag: &str) -> bool {
        self.cpuinfo("flags").is_some_and(|flags| flags.split_whitespace().any(|f| f == flag))
    }

    fn program(&self, name: &str) -> Option<PathBuf> {
        std::env::split_paths(&self.path).map(|folder| folder.join(name)).find(|path| path.is_file())
    }

    fn cpu(&self) -> Cpu {
        Cpu {
            vendor: self.cpuinfo("vendor_id").unwrap_or_default(),
            model: self.cpuinfo("model name").unwrap_or_default(),
            family: self.cpuinfo("cpu family").and_then(|text| text.parse().ok()),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    fn processor(&self, cpu: &Cpu) -> Finding {
        let subject = "processor";
        let name = format!("{} ({}, family {}), {} threads", cpu.model, cpu.vendor, cpu.family.unwrap_or(0), cpu.threads);
        if self.cpuinfo("flags").is_none() {
            return finding(
                subject,
                State::Failure,
                "no x86-64 processor is described in /proc/cpuinfo",
                "guests can't run",
                Some("use an x86-64 Linux host with /proc mounted"),
            );
        }
        let missing: Vec<_> = V2.into_iter().filter(|flag| !self.has_flag(flag)).collect();
        if !missing.is_empty() {
            return finding(
                subject,
                State::Failure,
                format!("{name}, lacks {}", missing.join(", ")),
                "guests can't run: their processor is an x86-64-v2, and its instructions are run by this one",
                Some(
                    "use a host with a processor made since about 2010; if this is a virtual machine, give it a newer CPU model",
                ),
            );
        }
        if cpu.threads < 2 {
            return finding(
                subject,
                State::Warning,
                name,
                "everything works, but the two sides of a pair on this host share one thread",
                Some("give this host two threads or more"),
            );
        }
        finding(subject, State::Good, name, "the other host of a pair needs a processor of the same vendor and family", None)
    }

    /// Which CPU models guests can have here.
    fn models(&self) -> Finding {
        let subject = "CPU models";
        let missing: Vec<_> = Features::V3.names().filter(|feature| !self.has_flag(cpuinfo_name(feature))).collect();
        if !missing.is_empty() {
            return finding(
                subject,
                State::Absent,
                format!("x86-64-v2; not x86-64-v3, for lack of {}", missing.join(", ")),
                "guests see an x86-64-v2",
                None,
            );
        }
        let optional = Features::OPTIONAL.names().filter(|feature| self.has_flag(cpuinfo_name(feature)));
        let common = optional.filter_map(Features::by_name).fold(Features::NONE, Features::with);
        let found = format!("x86-64-v2, x86-64-v3, and host-common, which is {}", CpuModel::host_common(common).name);
        let therefore = "guests see an x86-64-v2 unless --cpu says otherwise; both hosts of a pair must have what the model has";
        finding(subject, State::Good, found, therefore, None)
    }

    /// The engine writes code and runs it. Some hardened systems forbid that.
    fn own_code(&self) -> Finding {
        let subject = "translated code";
        match may_run_what_it_wrote() {
            Ok(()) => finding(
                subject,
                State::Good,
                "this process may run code it has written",
                "guests run on the deterministic engine",
                None,
            ),
            Err(e) => finding(
                subject,
                State::Failure,
                format!("this process may not run code it has written ({e})"),
                "the deterministic engine can't work",
                Some(
                    "allow executable memory: look at SELinux (execmem), the systemd setting MemoryDenyWriteExecute, or the seccomp profile of the container",
                ),
            ),
        }
    }

    /// /dev/kvm alone proves nothing: a kernel with page-table-based virtualisation (CONFIG_KVM_PVM) offers it, answers the API version, and
    /// can't boot stock kernels. So the processor's own word is asked first.
    fn kvm(&self) -> Finding {
        let subject = "KVM";
        let therefore = "guests run on the deterministic engine, which needs no KVM";
        let hardware = ["svm", "vmx"].into_iter().find(|flag| self.has_flag(flag));
        let device = self.file("/dev/kvm");
        match (hardware, device.exists()) {
            (None, true) => finding(
                subject,
                State::Absent,
                "/dev/kvm is there, but the processor shows neither svm nor vmx, so it is no hardware virtualisation and stock kernels don't boot on it",
                therefore,
                None,
            ),
            (None, false) => finding(subject, State::Absent, "the processor shows neither svm nor vmx", therefore, None),
            (Some(flag), false) => finding(
                subject,
                State::Absent,
                format!("the processor has {flag}, but there is no /dev/kvm"),
                therefore,
                Some("only for later use: load the module kvm_intel or kvm_amd (it may be switched off in the firmware)"),
            ),
            (Some(flag), true) => match kvm_api(&device) {
                Ok(KVM_API_VERSION) => finding(subject, State::Good, format!("usable ({flag})"), therefore, None),
                Ok(version) => finding(
                    subject,
                    State::Absent,
                    format!("/dev/kvm answers with API version {version} instead of {KVM_API_VERSION}"),
                    therefore,
                    None,
                ),
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => finding(
                    subject,
                    State::Absent,
                    "/dev/kvm is there, but this user may not open it",
                    therefore,
                    Some("only for later use: add the user to the group kvm (usermod -aG kvm NAME) and log in again"),
                ),
                Err(e) => finding(subject, State::Absent, format!("/dev/kvm can't be used ({e})"), therefore, None),
            },
        }
    }

    /// A value of /proc/meminfo, in bytes.
    fn meminfo(&self, key: &str) -> Option<u64> {
        let text = self.text("/proc/meminfo")?;
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let mut words = value.split_whitespace();
        let number: u64 = words.next()?.parse().ok()?;
        Some(if words.next() == Some("kB") { number << 10 } else { number })
    }

    fn memory(&self) -> Finding {
        let subject = "memory";
        let (Some(total), Some(available)) = (self.meminfo("MemTotal"), self.meminfo("MemAvailable")) else {
            return finding(subject, State::Warning, "unknown: /proc/meminfo can't be read", "guests may fail to start", None);
        };
        let limit = self.text("/sys/fs/cgroup/memory.max").and_then(|text| text.trim().parse::<u64>().ok());
        let usable = limit.map_or(available, |limit| limit.min(available));
        let found = match limit {
            Some(limit) => format!(
                "{} of {} available, and this control group may use {}",
                gigabytes(available),
                gigabytes(total),
                gigabytes(limit)
            ),
            None => format!("{} of {} available", gigabytes(available), gigabytes(total)),
        };
        if usable < DEMO_MEMORY {
            finding(
                subject,
                State::Warning,
                found,
                "the demo needs about 1 GB and may not fit",
                Some("stop other programs, or choose small guests (--mem)"),
            )
        } else {
            finding(subject, State::Good, found, "each side of a pair takes the guest's memory once", None)
        }
    }

    fn huge_pages(&self) -> Finding {
        let subject = "huge pages";
        let modes = self.text("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        let mode = modes.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        let reserved = self.meminfo("HugePages_Free").unwrap_or(0);
        // Guest memory does not ask for them (madvise), so only a kernel that gives them to everyone counts.
        match mode {
            Some("always") => finding(
                subject,
                State::Good,
                format!("transparent for everyone, {reserved} reserved ones free"),
                "guest memory is put on transparent huge pages",
                None,
            ),
            _ => finding(
                subject,
                State::Absent,
                format!("transparent ones: {}, {reserved} reserved ones free", mode.unwrap_or("not offered")),
                "guest memory is put on small pages, which costs a few per cent",
                Some("to try: echo always > /sys/kernel/mm/transparent_hugepage/enabled (as root)"),
            ),
        }
    }

    fn tap(&self) -> Finding {
        let subject = "TAP devices";
        let device = self.file("/dev/net/tun");
        let therefore = "guests use the network through the switch and passt, which need no privileges";
        if !device.exists() {
            return finding(subject, State::Absent, "there is no /dev/net/tun", therefore, None);
        }
        if fs::OpenOptions::new().read(true).write(true).open(&device).is_err() {
            return finding(subject, State::Absent, "/dev/net/tun is there, but this user may not open it", therefore, None);
        }
        if self.capability(CAP_NET_ADMIN) {
            finding(subject, State::Good, "this process may create them", "--net tap:NAME works, with new devices too", None)
        } else {
            finding(
                subject,
                State::Good,
                "this user may open those that root has made for it",
                "--net tap:NAME works with such devices",
                Some("to make one: ip tuntap add dev NAME mode tap user $(id -un) (as root)"),
            )
        }
    }

    fn capability(&self, number: u32) -> bool {
        let status = self.text("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> number & 1 == 1)
    }

    fn cached_passt(&self) -> Option<PathBuf> {
        let folders = fs::read_dir(self.cache.as_ref()?.join("packages")).ok()?;
        let found = folders.filter_map(|entry| Some(entry.ok()?.path()));
        found
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("passt_")))
            .find(|path| path.join("usr/bin/passt").is_file())
    }

    fn passt(&self) -> Finding {
        let subject = "passt";
        let therefore = "guests get port forwards from this host without privileges";
        if let Some(path) = self.cached_passt() {
            return finding(subject, State::Good, format!("in the package cache ({})", path.display()), therefore, None);
        }
        if let Some(path) = self.program("passt") {
            return finding(subject, State::Good, format!("installed ({})", path.display()), therefore, None);
        }
        finding(subject, State::Absent, "not installed", "it is fetched as a Debian package when it is first needed", None)
    }

    fn user_namespaces(&self) -> Finding {
        let subject = "user namespaces";
        let number = |path: &str| self.text(path).and_then(|text| text.trim().parse::<u64>().ok());
        let forbidden = [
            ("/proc/sys/user/max_user_namespaces", 0, "user.max_user_namespaces is 0"),
            ("/proc/sys/kernel/unprivileged_userns_clone", 0, "kernel.unprivileged_userns_clone is 0"),
            ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", 1, "kernel.apparmor_restrict_unprivileged_userns is 1"),
        ];
        match forbidden.into_iter().find(|(path, value, _)| number(path) == Some(*value)) {
            None => finding(subject, State::Good, "allowed", "passt can shut itself in", None),
            Some((_, _, why)) => finding(
                subject,
                State::Warning,
                format!("restricted: {why}"),
                "passt shuts itself into one before it works, so it may not start for users other than root",
                Some("set that value with sysctl (as root), or use a TAP device"),
            ),
        }
    }

    fn packages(&self) -> Finding {
        let subject = "Debian packages";
        let missing: Vec<_> =
            ["apt-get", "apt-cache", "dpkg-deb"].into_iter().filter(|name| self.program(name).is_none()).collect();
        let unpacked = self.cache.as_ref().is_some_and(|cache| cache.join("sets").is_dir());
        match (missing.is_empty(), unpacked) {
            (true, _) => finding(
                subject,
                State::Good,
                "apt-get and dpkg-deb are there",
                "the demo fetches its guest by itself, without root",
                None,
            ),
            (false, true) => finding(
                subject,
                State::Good,
                format!("{} not installed, but the cache is filled", missing.join(", ")),
                "the demo uses the cache",
                None,
            ),
            (false, false) => finding(
                subject,
                State::Warning,
                format!("{} not installed", missing.join(", ")),
                "the demo can't fetch its guest; `twinstep run` with a kernel of your own works",
                Some("install apt and dpkg, or copy the cache folder of a Debian machine and name it in TWINSTEP_CACHE"),
            ),
        }
    }

    fn space(&self) -> Finding {
        let subject = "space for packages";
        let Some(cache) = &self.cache else {
            return finding(
                subject,
                State::Warning,
                "no cache folder is known",
                "packages can't be fetched",
                Some("set TWINSTEP_CACHE to a folder"),
            );
        };
        // The folder may not be there yet: what counts is the file system it will be on.
        let place = cache.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        match rustix::fs::statvfs(place) {
            Ok(stat) => {
                let free = stat.f_bavail.saturating_mul(stat.f_frsize);
                let found = format!("{} free at {}", gigabytes(free), place.display());
                if free < CACHE_SPACE {
                    finding(
                        subject,
                        State::Warning,
                        found,
                        "the demo's packages may not fit",
                        Some("make room, or set TWINSTEP_CACHE to another folder"),
                    )
                } else {
                    finding(subject, State::Good, found, "packages are kept there", None)
                }
            }
            Err(e) => finding(
                subject,
                State::Warning,
                format!("unknown: {} can't be asked ({e})", place.display()),
                "packages may not fit",
                None,
            ),
        }
    }

    fn etcd(&self) -> Finding {
        let subject = "etcd";
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ETCD_PORT));
        let answers = TcpStream::connect_timeout(&address, Duration::from_millis(100)).is_ok();
        let installed = self.program("etcd").or_else(|| self.program("etcdctl"));
        let therefore =
            "pairs use a shared directory as their arbiter (--arbiter DIR), or an etcd elsewhere (--arbiter etcd://HOST)";
        match (answers, installed) {
            (true, _) => {
                let therefore = "it can be the arbiter of pairs (--arbiter etcd://HOST, where HOST is this one)";
                finding(subject, State::Good, format!("something listens on {address}"), therefore, None)
            }
            (false, Some(path)) => finding(
                subject,
                State::Absent,
                format!("installed ({}), but nothing listens on {address}", path.display()),
                therefore,
                None,
            ),
            (false, None) => finding(subject, State::Absent, "not installed", therefore, None),
        }
    }
}

fn kvm_api(device: &Path) -> std::io::Result<libc::c_int> {
    let file = fs::OpenOptions::new().read(true).write(true).open(device)?;
    // SAFETY: KVM_GET_API_VERSION takes no argument and touches no memory of ours; on another device it is an unknown number.
    let version = unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    if version < 0 { Err(std::io::Error::last_os_error()) } else { Ok(version) }
}

/// Writes a page and asks for it to become executable. It is not run.
fn may_run_what_it_wrote() -> rustix::io::Result<()> {
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
    const PAGE: usize = 4096;
    // SAFETY: a new private mapping at an address the kernel chooses overlaps nothing.
    let page = unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)? };
    // SAFETY: the page is ours, writable, and nobody else knows of it. 0xc3 is RET.
    unsafe { page.cast::<u8>().write(0xc3) };
    // SAFETY: as before; nothing refers to the page.
    let allowed = unsafe { mprotect(page, PAGE, MprotectFlags::READ | MprotectFlags::EXEC) };
    // SAFETY: the mapping was made above, has this size, and nothing refers to it.
    let unmapped = unsafe { munmap(page, PAGE) };
    allowed.and(unmapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake {
        dir: tempfile::TempDir,
    }

    impl Fake {
        fn new() -> Self {
            let fake = Self { dir: tempfile::tempdir().unwrap() };
            fake.cpu(&V2.join(" "));
            fake.write("/proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\nHugePages_Free: 3\n");
            fake
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(&path[1..]);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn cpu(&self, flags: &str) {
            self.write(
                "/proc/cpuinfo",
                &format!(
                    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel name\t: EPYC\nflags\t\t: fpu {flags}\n"
                ),
            );
        }

        fn report(&self) -> Report {
            let path = self.dir.path().join("bin").into_os_string();
            Host { root: self.dir.path().to_owned(), path, cache: Some(self.dir.path().join("cache")) }.examine()
        }

        fn found(&self, subject: &str) -> (State, String) {
            let report = self.report();
            let finding = report.about(subject).unwrap();
            (finding.state, finding.found.clone())
        }
    }

    #[test]
    fn kvm_without_hardware_is_not_believed() {
        let fake = Fake::new();
        assert!(fake.found("KVM").1.contains("neither svm nor vmx"));
        fake.write("/dev/kvm", "");
        let (state, found) = fake.found("KVM");
        assert!(state == State::Absent && found.contains("no hardware virtualisation"), "{found}");
        // With the flag the device is asked; this one is an ordinary file.
        fake.cpu(&format!("{} svm", V2.join(" ")));
        let (state, found) = fake.found("KVM");
        assert!(state == State::Absent && found.contains("can't be used"), "{found}");
    }

    #[test]
    fn an_old_processor_is_refused_by_name_of_what_it_lacks() {
        let fake = Fake::new();
        assert_ne!(fake.found("processor").0, State::Failure);
        fake.cpu("cx16 lahf_lm pni ssse3 sse4_1");
        let report = fake.report();
        assert!(!report.healthy());
        assert!(report.about("processor").unwrap().found.contains("lacks popcnt, sse4_2"));
        assert!(report.in_words().contains("!!  processor"));
        assert_eq!((report.cpu.vendor.as_str(), report.cpu.family), ("AuthenticAMD", Some(25)));
    }

    #[test]
    fn models_are_told_with_what_is_missing() {
        let fake = Fake::new();
        let (state, found) = fake.found("CPU models");
        assert!(state == State::Absent && found.contains("for lack of avx, avx2"), "{found}");
        let v3 = format!("{} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave", V2.join(" "));
        fake.cpu(&format!("{v3} sha_ni aes"));
        let (state, found) = fake.found("CPU models");
        assert!(state == State::Good && found.ends_with("which is host-common+aes+sha_ni"), "{found}");
        fake.cpu(&v3);
        assert!(fake.found("CPU models").1.ends_with("which is x86-64-v3"));
    }

    #[test]
    fn memory_minds_the_control_group() {
        let fake = Fake::new();
        assert_eq!(fake.found("memory").0, State::Good);
        fake.write("/sys/fs/cgroup/memory.max", "500000000\n");
        let (state, found) = fake.found("memory");
        assert!(state == State::Warning && found.contains("may use 0.5 GB"), "{found}");
        fake.write("/sys/fs/cgroup/memory.max", "max\n");
        assert_eq!(fake.found("memory").0, State::Good);
    }

    #[test]
    fn programs_and_settings() {
        let fake = Fake::new();
        assert_eq!(fake.found("passt"), (State::Absent, "not installed".to_owned()));
        fake.write("/bin/passt", "");
        assert_eq!(fake.found("passt").0, State::Good);
        fake.write("/cache/packages/passt_0.1/usr/bin/passt", "");
        assert!(fake.found("passt").1.contains("package cache"));

        assert_eq!(fake.found("Debian packages").0, State::Warning);
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            fake.write(&format!("/bin/{program}"), "");
        }
        assert_eq!(fake.found("Debian packages").0, State::Good);

        assert_eq!(fake.found("user namespaces").0, State::Good);
        fake.write("/proc/sys/user/max_user_namespaces", "0\n");
        assert!(fake.found("user namespaces").1.contains("max_user_namespaces"));

        assert_eq!(fake.found("huge pages").0, State::Absent);
        fake.write("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
        assert_eq!(fake.found("huge pages").0, State::Absent);
        fake.write("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n");
        assert_eq!(fake.found("huge pages"), (State::Good, "transparent for everyone, 3 reserved ones free".to_owned()));

        assert_eq!(fake.found("TAP devices").0, State::Absent);
        fake.write("/dev/net/tun", "");
        fake.write("/proc/self/status", "CapEff:\t0000000000001000\n");
        assert!(fake.found("TAP devices").1.contains("may create"));
        fake.write("/proc/self/status", "CapEff:\t0000000000000000\n");
        assert!(fake.found("TAP devices").1.contains("root has made"));
    }

    #[test]
    fn an_empty_host_is_told_and_not_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host { root: dir.path().to_owned(), path: OsString::new(), cache: None };
        let report = host.examine();
        assert!(!report.healthy());
        assert!(report.about("memory").unwrap().found.contains("unknown"));
    }
}
