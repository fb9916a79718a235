//! `twinstep replay`.
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use twinstep_host::stat::words;
use twinstep_host::vm::disks;
use twinstep_host::vm::replay::{self, Options};
use twinstep_host::vm::spec::DiskSpec;
use twinstep_log::RecordingEnd;
use twinstep_machine::Output;

#[derive(Args)]
pub struct Arguments {
    /// The recording
    recording: PathBuf,
    /// Stop at this position (retired instructions since power-on)
    #[arg(long, value_name = "POSITION")]
    until: Option<u64>,
    /// Write a snapshot where the replay stops
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Start from a snapshot that an earlier replay of this recording saved
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Instructions in a translated block at most (1: each alone); must make no difference
    #[arg(long, value_name = "N")]
    block: Option<u32>,
    /// Address spaces whose translations are kept while another one runs (0: none); must make no difference
    #[arg(long, value_name = "N")]
    cache_groups: Option<usize>,
    /// Forget all translations at positions drawn from this seed; must make no difference
    #[arg(long, value_name = "SEED")]
    forget: Option<u64>,
    /// A copy of each disk as it was when the recording began
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskSpec>,
    /// Show what the guest wrote to its console
    #[arg(long)]
    console: bool,
    /// Write /tmp/perf-PID.map, in which `perf` finds what translated code is
    #[arg(long)]
    perf_map: bool,
    /// Say where the time went, and what was counted: exits, misses, translations
    #[arg(long)]
    stats: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let options = Options {
        until: arguments.until,
        save: arguments.save,
        from: arguments.from,
        block: arguments.block,
        cache_groups: arguments.cache_groups,
        forget: arguments.forget,
        perf_map: arguments.perf_map,
        stats: arguments.stats,
    };
    let started = Instant::now();
    let mut last = Instant::now();
    let show = !arguments.json && std::io::stderr().is_terminal();
    let outcome = replay::replay(
        &arguments.recording,
        &options,
        &mut |wanted| disks::matching(&disks::open(&arguments.disk)?, wanted),
        &mut |output| {
            if arguments.console
                && let Output::Serial(bytes) | Output::Console(bytes) = output
            {
                let _ = std::io::stdout().write_all(&bytes);
            }
        },
        &mut |position| {
            if show && last.elapsed().as_millis() >= 200 {
                last = Instant::now();
                eprint!("\rposition {position}");
            }
        },
    );
    if show {
        eprint!("\r\x1b[K");
    }
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(e) if e.to_string().contains("the replay differs") => {
            eprintln!("twinstep: {e}");
            return Ok(ExitCode::from(6));
        }
        Err(e) => return Err(e.into()),
    };
    let seconds = started.elapsed().as_secs_f64();
    let end = match &outcome.end {
        None => "stopped where asked".to_owned(),
        Some(RecordingEnd::Complete { reason, .. }) => format!("the recording is complete: {reason}"),
        Some(cut @ RecordingEnd::Truncated { .. }) => format!("the recording is cut: {cut}"),
    };
    let report = &outcome.report;
    if let (Some((measure, totals)), false) = (&outcome.stats, arguments.json) {
        eprintln!("{}", words::figures(measure));
        totals.iter().filter(|(_, n)| **n > 0).for_each(|(name, n)| eprintln!("{name:<30} {n:>14}"));
    }
    if arguments.json {
        let mut value = json!({
            "start": report.start, "position": report.position, "outputs_checked": report.outputs_checked,
            "digests_checked": report.digests_checked, "digest": outcome.digest.to_string(), "end": end,
            "guest_ns": outcome.guest_ns, "seconds": seconds,
        });
        if let Some((measure, totals)) = &outcome.stats {
            value["stats"] = json!({ "measure": measure, "totals": totals });
        }
        println!("{value}");
    } else {
        println!("{report}");
        println!("{end}");
        println!("digest {} at position {}, after {seconds:.2} s", outcome.digest, report.position);
    }
    Ok(ExitCode::SUCCESS)
}
