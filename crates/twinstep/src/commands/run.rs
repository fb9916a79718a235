//! `twinstep run`.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use twinstep_host::events::Events;
use twinstep_host::vm::live::End;
use twinstep_host::vm::session::{self, RunOptions};
use twinstep_host::vm::spec::{DiskSpec, Memory, NetSpec, VmSpec};
use twinstep_migrate::NotConverging;
use twinstep_pair::{Commit, Config, Nanos, OnMismatch};

/// The machine, as flags.
#[derive(Args, Clone)]
pub struct MachineArguments {
    /// Linux kernel (bzImage), ELF image with a PVH note, or multiboot image
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initramfs; the module of a PVH or multiboot kernel
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// RAM, such as 512M or 2G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    mem: Option<Memory>,
    /// CPU model: x86-64-v2, x86-64-v3 (AVX2), or host-common (v3 and what this host has of AES, SHA and the like) [default: x86-64-v2]
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// A debug-exit port at 0xf4, as QEMU's isa-debug-exit: a guest that writes N there ends the run with status 2N+1
    #[arg(long)]
    debug_exit: bool,
    /// Address spaces whose translations are kept while another one runs (0: none) [default: 16]; the guest cannot see it
    #[arg(long, value_name = "N")]
    cache_groups: Option<usize>,
    /// A disk: PATH[,format=raw|qcow2][,ro][,serial=TEXT][,share=on] (can be given several times). With share=on all hosts of a pair have this one (raw) image. Without a format a name that ends in .qcow2 is a qcow2 image, any other a raw one
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskSpec>,
    /// A network card: user[,forward=HOSTPORT:GUESTPORT], switch=PATH, passt=PATH or tap=NAME, each with [,mac=...] (several times)
    #[arg(long, value_name = "NET")]
    net: Vec<NetSpec>,
}

impl MachineArguments {
    /// The spec that flags and file make together.
    pub fn spec(self, file: Option<&PathBuf>) -> anyhow::Result<VmSpec> {
        let flags = VmSpec {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            mem: self.mem,
            cpu: self.cpu,
            debug_exit: self.debug_exit,
            cache_groups: self.cache_groups,
            disk: self.disk,
            net: self.net,
            ..VmSpec::default()
        };
        Ok(match file {
            Some(path) => VmSpec::from_file(path)?.overridden_by(flags),
            None => flags,
        })
    }
}

/// What people can see of a run.
#[derive(Args, Clone)]
pub struct Visibility {
    /// No terminal: nothing is read from standard input
    #[arg(long)]
    pub no_input: bool,
    /// The serial port's output goes to this file
    #[arg(long, value_name = "FILE")]
    pub serial: Option<PathBuf>,
    /// Events as JSON lines go to this file
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    /// Serve metrics for Prometheus at http://ADDRESS/metrics, such as 127.0.0.1:9100; whoever reaches it may read them
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// No events on standard error
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Args)]
pub struct Arguments {
    /// A TOML file with the same names as the flags, which win over it
    config: Option<PathBuf>,
    #[command(flatten)]
    machine: MachineArguments,
    /// Record everything, for `twinstep replay`
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Positions (retired instructions) between two state digests in the recording
    #[arg(long, value_name = "N")]
    digest_interval: Option<u64>,
    /// Start from a snapshot instead of a kernel
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Protect with a standby at one of these addresses, such as a:7171,b:7171: with the first that can be reached, and when it is lost with
    /// the next, and so on, while the guest runs; `registered` stands for all standbys that say at the arbiter that they wait (standby --register)
    #[arg(long, value_name = "ADDRESS,...", requires = "arbiter", value_delimiter = ',')]
    protect: Vec<String>,
    #[command(flatten)]
    channel: super::channel::ChannelArguments,
    /// With TLS: the name or address that the standby's certificate must be for [default: the one it is reached by]
    #[arg(long, value_name = "NAME")]
    peer_name: Option<String>,
    #[command(flatten)]
    arbiter: super::arbiter::ArbiterArguments,
    /// When an output may leave a protected VM: `received`, as soon as the standby has all that led to it, or `matched`, when the standby has
    /// made the same output itself, which also catches what goes wrong silently (a bad core, a flipped bit)
    #[arg(long, value_name = "RULE", default_value = "received")]
    commit: CommitRule,
    /// What to do when the two sides make different outputs: `primary` believes the primary and makes the standby equal to it, `stop` stops the VM
    #[arg(long, value_name = "POLICY", default_value = "primary")]
    on_mismatch: MismatchPolicy,
    /// Hold the guest back when the standby is more instructions than this behind
    #[arg(long, value_name = "N")]
    max_lag: Option<u64>,
    /// Bring the standby's copy of the running guest so near that it is complete so many milliseconds after the cut; the guest stands still for a part of that
    #[arg(long, value_name = "MS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    copy_pause: u64,
    /// What to do with a guest that writes faster than can be copied: `slow` takes time from it until it does not, `stop` lets it stand still for as long as
    /// the rest takes
    #[arg(long, value_name = "POLICY", default_value = "slow")]
    copy_policy: CopyPolicy,
    /// The VM's name for `twinstep status` and others [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Write /tmp/perf-PID.map, in which `perf` finds what translated code is
    #[arg(long)]
    perf_map: bool,
    #[command(flatten)]
    pair: PairArguments,
    #[command(flatten)]
    visibility: Visibility,
}

/// [`Commit`], as a word.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum CommitRule {
    Received,
    Matched,
}

impl From<CommitRule> for Commit {
    fn from(rule: CommitRule) -> Self {
        match rule {
            CommitRule::Received => Self::Received,
            CommitRule::Matched => Self::Matched,
        }
    }
}

/// [`OnMismatch`], as a word.
#[derive(Clone, Copy, clap::ValueEnum)]
enum MismatchPolicy {
    Primary,
    Stop,
}

/// [`NotConverging`], as a word.
#[derive(Clone, Copy, clap::ValueEnum)]
enum CopyPolicy {
    Slow,
    Stop,
}

/// What both sides of a pair can be told.
#[derive(Args, Clone)]
pub struct PairArguments {
    /// A peer that is silent for so many milliseconds is suspected dead; one that has been late lately gets up to five times as many
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(80..=30_000))]
    peer_timeout: u64,
    /// Take disk images although they are not the newest of their disk (`run`), or are newer than the primary's or of another disk and
    /// are about to be overwritten (`standby`)
    #[arg(long)]
    pub force_stale_disk: bool,
    /// Let `twinstep debug` break this VM on purpose
    #[arg(long, hide_short_help = true)]
    pub debug_faults: bool,
}

impl PairArguments {
    /// The pair's bounds and times.
    pub fn config(&self) -> Config {
        Config { peer_timeout: Nanos::from_millis(self.peer_timeout), ..Config::default() }
    }
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut spec = arguments.machine.spec(arguments.config.as_ref())?;
    let channel = arguments.channel.options(arguments.peer_name);
    if arguments.protect.is_empty() && !channel.is_empty() {
        bail!(
            "--tls, --plaintext and their kind are for the way to a standby, and there is none\n  what to do: give --protect ADDRESS, or leave them away"
        );
    }
    let channel = std::mem::take(&mut spec.channel).overridden_by(channel);
    let security = if !arguments.protect.is_empty() { channel.open(&[])? } else { Default::default() };
    let v = arguments.visibility;
    let events = Events::new("primary", v.quiet, v.events.as_deref())?;
    let mut options = RunOptions {
        record: arguments.record,
        digest_interval: arguments.digest_interval,
        from: arguments.from,
        protect: arguments.protect,
        security,
        arbiter: arguments.arbiter.spec()?,
        copy: twinstep_migrate::Config {
            target_ns: arguments.copy_pause * 1_000_000,
            not_converging: match arguments.copy_policy {
                CopyPolicy::Slow => NotConverging::Slow,
                CopyPolicy::Stop => NotConverging::Stop,
            },
            ..Default::default()
        },
        no_input: v.no_input,
        serial: v.serial,
        pair: arguments.pair.config(),
        name: arguments.name,
        metrics: v.metrics,
        perf_map: arguments.perf_map,
        debug_faults: arguments.pair.debug_faults,
        force_stale_disk: arguments.pair.force_stale_disk,
    };
    options.pair.commit = arguments.commit.into();
    options.pair.on_mismatch = match arguments.on_mismatch {
        MismatchPolicy::Primary => OnMismatch::Primary,
        MismatchPolicy::Stop => OnMismatch::Stop,
    };
    if let Some(lag) = arguments.max_lag {
        options.pair.max_replay_lag = lag;
    }
    let session = session::run(&spec, &options, &events)?;
    Ok(exit_code(&session.end))
}

/// The exit status that says how a machine ended.
pub fn exit_code(end: &End) -> ExitCode {
    ExitCode::from(match end {
        End::PoweredOff => 0,
        End::DebugExit(status) => *status,
        End::HostFailure(_) => 1,
        End::Crashed(_) => 3,
        End::Reset => 4,
        End::Stopped(_) => 5,
    })
}
