//! What this host says in `/proc`: CPU time and memory of what is measured, and what machine it is.
//!
//! *Invariant*: a process that is gone, or a file that this kernel does not have, is no figure, not an error.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// Memory of a process, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Resident.
    pub rss: u64,
    /// Resident, shared pages counted in parts.
    pub pss: u64,
    /// Resident of the guest's RAM.
    pub guest_rss: u64,
}

impl Memory {
    /// What the machine costs beyond the RAM the guest was promised.
    #[must_use]
    pub fn beyond_guest(&self) -> u64 {
        self.pss.saturating_sub(self.guest_rss)
    }
}

/// The memory of a process whose guest has so much RAM.
#[must_use]
pub fn memory(pid: u32, guest_kib: u64) -> Option<Memory> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    parse_smaps(&maps, guest_kib)
}

/// The guest's RAM is the largest mapping, if it is large enough. (A neighbour may have been merged with it, so no more than the RAM's size is counted.)
fn parse_smaps(maps: &str, guest_kib: u64) -> Option<Memory> {
    let mut sum = Memory::default();
    let (mut size, mut largest, mut any) = (0, 0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (words.next(), words.next().and_then(|v| v.parse::<u64>().ok()));
        match (key, value) {
            (Some("Size:"), Some(v)) => size = v,
            (Some("Rss:"), Some(v)) => {
                any = true;
                sum.rss += v;
                if size >= guest_kib && size > largest {
                    largest = size;
                    sum.guest_rss = v.min(guest_kib);
                }
            }
            (Some("Pss:"), Some(v)) => sum.pss += v,
            _ => {}
        }
    }
    any.then_some(sum)
}

/// CPU time of a process group so far, children that were waited for included, in seconds.
#[must_use]
pub fn cpu_seconds(group: u32) -> Option<f64> {
    let mut sum = None;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let (name, folder) = (entry.file_name(), entry.path());
        if !name.to_str().is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit())) {
            continue;
        }
        let Ok(stat) = fs::read_to_string(folder.join("stat")) else { continue };
        if let Some((of, ticks)) = parse_stat(&stat)
            && of == group
        {
            let rough = ticks as f64 / TICKS;
            // Equal but for rounding: then all its threads are alive, it has no dead children, and nanoseconds are known.
            let exact = threads_seconds(&folder).filter(|s| (s - rough).abs() < 5.0 / TICKS);
            sum = Some(sum.unwrap_or(0.0) + exact.unwrap_or(rough));
        }
    }
    sum
}

/// USER_HZ, which is 100 on every Linux of this architecture.
const TICKS: f64 = 100.0;

/// CPU time of a process's living threads.
fn threads_seconds(process: &Path) -> Option<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(process.join("task")).ok()?.flatten() {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        nanoseconds += text.split(' ').next()?.parse::<u64>().ok()?;
    }
    Some(nanoseconds as f64 / 1e9)
}

/// Process group, and utime + stime + cutime + cstime. The command's name may hold anything, so counting starts behind its bracket.
fn parse_stat(stat: &str) -> Option<(u32, u64)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some((u32::try_from(number(5)?).ok()?, number(14)? + number(15)? + number(16)? + number(17)?))
}

/// The machine, in words.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor, by its own account.
    pub cpu: String,
    /// How many processors this process may use.
    pub cpus: usize,
    /// RAM in MiB.
    pub ram_mib: u64,
    /// RAM that was free for use when the run began, in MiB.
    pub available_mib: u64,
    /// The kernel.
    pub kernel: String,
    /// The compiler of the C kernels.
    pub compiler: String,
    /// QEMU, if it is installed.
    pub qemu: Option<String>,
    /// Load average when the run began: what else was going on.
    pub load: String,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let value = |text: &str, key: &str| {
            let line = text.lines().find(|l| l.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let meminfo = read("/proc/meminfo");
        let mib = |key| value(&meminfo, key).and_then(|v| v.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) / 1024;
        Self {
            cpu: value(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".into()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            ram_mib: mib("MemTotal"),
            available_mib: mib("MemAvailable"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            compiler: first_line("cc", &["--version"]).unwrap_or_default(),
            qemu: first_line(crate::engine::QEMU, &["--version"]),
            load: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
        }
    }
}

/// The first line a program prints, if it can be run.
#[must_use]
pub fn first_line(program: &str, words: &[&str]) -> Option<String> {
    let output = Command::new(program).args(words).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
}

/// The time, fit for the name of a folder.
#[must_use]
pub fn now() -> String {
    first_line("date", &["+%Y-%m-%dT%H-%M-%S"]).unwrap_or_else(|| std::process::id().to_string())
}

/// Keeps the measured processes and this one apart: the number of the last processor this process may use is for them, the others for us.
/// `None` where there is only one.
#[must_use]
pub fn set_apart(wanted: Option<usize>) -> Option<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let allowed = sched_getaffinity(None).ok()?;
    let all: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let theirs = wanted.or_else(|| all.last().copied()).filter(|cpu| all.len() > 1 && all.contains(cpu))?;
    let mut ours = allowed;
    ours.unset(theirs);
    // If it cannot be done, the figures are noisier, no more.
    let _ = sched_setaffinity(None, &ours);
    Some(theirs)
}

/// Puts this thread, and all that it starts from now on, before what else this host does, if that is allowed; and says whether it was.
#[must_use]
pub fn hurry() -> bool {
    // On Linux this is the thread's own. Where it is not allowed, a busy host makes times less exact, no more.
    rustix::process::setpriority_process(None, -10).is_ok()
}

/// Whether a program is in the search path.
#[must_use]
pub fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| Path::new(&folder).join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let maps = "00400000-00500000 r-xp 00000000 00:00 0 /bin/x\nSize:  1024 kB\nRss:  800 kB\nPss:  400 kB\n\
                    7f0000000000-7f0040000000 rw-p 0 00:00 0 \nSize:  1048576 kB\nRss:  5000 kB\nPss:  5000 kB\nVmFlags: rd wr\n";
        let memory = parse_smaps(maps, 1 << 20).unwrap();
        assert_eq!(memory, Memory { rss: 5800, pss: 5400, guest_rss: 5000 });
        assert_eq!(memory.beyond_guest(), 400);
        assert_eq!(parse_smaps(maps, 2 << 20).unwrap().guest_rss, 0);
        assert_eq!(parse_smaps("", 1), None);
    }

    #[test]
    fn process_times() {
        let stat = "12 (a) b) S 1 77 77 0 -1 4194560 1 2 3 4 10 20 300 400 20 0 1 0";
        assert_eq!(parse_stat(stat), Some((77, 730)));
        assert_eq!(parse_stat("12 (a"), None);
        assert_eq!(parse_stat("12 (a) S 1"), None);
    }

    #[test]
    fn this_process_has_memory_and_this_machine_a_processor() {
        let this = rustix::process::getpgrp().as_raw_nonzero().get().unsigned_abs();
        assert!(cpu_seconds(this).is_some() && threads_seconds(Path::new("/proc/self")).unwrap() > 0.0);
        assert!(memory(std::process::id(), u64::MAX).unwrap().rss > 0);
        assert!(!Machine::this().cpu.is_empty());
        assert!(in_path("sh") && !in_path("no such program"));
    }
}
