//! What is run. *In*: names and sizes people ask for. *Out*: the plan, as the guest's script reads it. *Invariant*: every name here has its
//! `run_NAME` in `src/guest/suite.sh`, but for the boots.
//!
//! Full sizes take 0.3 to 0.6 s natively, so that start-up does not dominate and QEMU's slowest mode still ends in ten seconds or so.

use twinstep_host::{Error, Result};

/// What a workload stands for in the summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// From the start of the process to the guest's first line. Nothing to compare with natively.
    Boot,
    /// Counts in the geometric mean of compute workloads.
    Compute,
    /// The same cryptography with what an x86-64-v2 processor offers.
    Limited,
    /// The kernel's part: processes, pipes, sockets.
    System,
    /// Small kernels in C.
    Kernel,
}

/// A workload.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Its name on the command line, in the plan and in the files.
    pub name: &'static str,
    /// What people read; `{}` is the size.
    pub title: &'static str,
    /// What it stands for.
    pub group: Group,
    /// Its size.
    pub full: u64,
    /// Its size with `--quick`.
    pub quick: u64,
}

/// The boot of a kernel with next to nothing to unpack.
pub const BOOT: &str = "boot";
/// The boot of the guest with all programs.
pub const BOOT_SUITE: &str = "bootsuite";

const fn w(name: &'static str, title: &'static str, group: Group, full: u64, quick: u64) -> Workload {
    Workload { name, title, group, full, quick }
}

/// All workloads, in the order in which they run.
pub const ALL: &[Workload] = &[
    w(BOOT, "boot to init", Group::Boot, 1, 1),
    w(BOOT_SUITE, "boot to init, all programs in the initramfs", Group::Boot, 1, 1),
    w("shell", "busybox sh, loop of {}", Group::Compute, 150_000, 40_000),
    w("pyint", "python3 integers (fannkuch 8, {}×)", Group::Compute, 10, 2),
    w("pyfloat", "python3 floats (nbody, {} steps)", Group::Compute, 50_000, 10_000),
    w("sqlite", "sqlite3 in memory, {} rows", Group::Compute, 150_000, 30_000),
    w("sha256", "openssl sha256, {} MiB", Group::Compute, 128, 32),
    w("aes", "openssl aes-128-cbc, {} MiB", Group::Compute, 128, 32),
    w("rsa", "openssl RSA 4096, {} signatures", Group::Compute, 60, 12),
    w("gzip", "gzip -9, {} KiB of text", Group::Compute, 6144, 1536),
    w("xz", "xz -6, {} KiB of text", Group::Compute, 512, 192),
    w("sha256v2", "sha256 as x86-64-v2, {} MiB", Group::Limited, 128, 32),
    w("aesv2", "aes-128-cbc as x86-64-v2, {} MiB", Group::Limited, 32, 16),
    w("rsav2", "RSA 4096 as x86-64-v2, {} signatures", Group::Limited, 60, 12),
    w("tcc", "tcc compiles {} functions", Group::Kernel, 30_000, 6_000),
    w("int", "integer kernel (list, matrix, states, crc), {}×", Group::Kernel, 60_000, 12_000),
    w("chase", "pointer chase in 64 MiB, {} loads", Group::Kernel, 3_000_000, 1_000_000),
    w("stream", "stream copy of 32 MiB, {} passes", Group::Kernel, 60, 16),
    w("pipe", "pipe ping-pong, {} rounds", Group::System, 60_000, 12_000),
    w("fork", "fork+exec+wait, {}×", Group::System, 800, 200),
    w("redis1", "redis-benchmark set+get, {} each", Group::System, 10_000, 4_000),
    w("redis16", "redis-benchmark set+get, {} each, pipeline 16", Group::System, 100_000, 32_000),
];

/// A workload with its size.
#[derive(Debug, Clone, Copy)]
pub struct Item {
    /// Which.
    pub workload: &'static Workload,
    /// How much of it.
    pub size: u64,
}

impl Item {
    /// What people read.
    #[must_use]
    pub fn title(&self) -> String {
        self.workload.title.replace("{}", &grouped(self.size))
    }
}

/// What one run of the benchmark does.
#[derive(Debug, Clone)]
pub struct Plan {
    /// In order.
    pub items: Vec<Item>,
}

impl Plan {
    /// The workloads called `only` (all, if there are none), at full or quick size, but for `sizes` (`NAME=SIZE`).
    pub fn new(quick: bool, only: &[String], sizes: &[String]) -> Result<Self> {
        for name in only {
            find(name)?;
        }
        let wanted = |w: &&Workload| only.is_empty() || only.iter().any(|name| name == w.name);
        let size = |w: &Workload| if quick { w.quick } else { w.full };
        let mut items: Vec<Item> = ALL.iter().filter(wanted).map(|w| Item { workload: w, size: size(w) }).collect();
        for text in sizes {
            let wrong = || Error::new(format!("--sizes {text}: not a NAME=SIZE")).next("write, for example, --sizes fork=2000");
            let (name, size) = text.split_once('=').ok_or_else(wrong)?;
            let size = size.parse().map_err(|_| wrong())?;
            let name = find(name)?.name;
            items.iter_mut().filter(|item| item.workload.name == name).for_each(|item| item.size = size);
        }
        Ok(Self { items })
    }

    /// Whether this workload is part of it.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.items.iter().any(|item| item.workload.name == name)
    }

    /// What the script reads: a line for each workload that is not a boot.
    #[must_use]
    pub fn script(&self) -> String {
        let programs = self.items.iter().filter(|item| item.workload.group != Group::Boot);
        programs.map(|item| format!("{} {}\n", item.workload.name, item.size)).collect()
    }

    /// Whether the guest with all programs is needed.
    #[must_use]
    pub fn needs_suite(&self) -> bool {
        self.items.iter().any(|item| item.workload.name != BOOT)
    }
}

fn find(name: &str) -> Result<&'static Workload> {
    ALL.iter().find(|w| w.name == name).ok_or_else(|| {
        let all: Vec<_> = ALL.iter().map(|w| w.name).collect();
        Error::new(format!("there is no workload called {name}")).next(format!("choose among {}", all.join(", ")))
    })
}

/// 1234567 as "1,234,567".
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_has_its_function_in_the_script() {
        for w in ALL.iter().filter(|w| w.group != Group::Boot) {
            assert!(crate::guest::SUITE.contains(&format!("\nrun_{}() ", w.name)), "{}", w.name);
        }
    }

    #[test]
    fn people_choose_workloads_and_sizes() {
        let words = |words: &[&str]| words.iter().map(|&w| w.to_owned()).collect::<Vec<_>>();
        let plan = Plan::new(true, &words(&["fork", "shell", "boot"]), &words(&["fork=7"])).unwrap();
        assert_eq!(plan.script(), "shell 40000\nfork 7\n");
        assert!(plan.has("boot") && !plan.has("xz") && plan.needs_suite());
        assert!(!Plan::new(true, &words(&["boot"]), &[]).unwrap().needs_suite());
        assert!(Plan::new(false, &words(&["nothing"]), &[]).unwrap_err().to_string().contains("choose among boot, "));
        assert!(Plan::new(false, &[], &words(&["fork"])).is_err());
        assert_eq!(Plan::new(false, &[], &[]).unwrap().items.len(), ALL.len());
    }

    #[test]
    fn titles_show_sizes() {
        assert_eq!(Item { workload: find("fork").unwrap(), size: 1_234_567 }.title(), "fork+exec+wait, 1,234,567×");
    }
}
