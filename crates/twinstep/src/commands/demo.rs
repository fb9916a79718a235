//! `twinstep demo`.
use std::process::ExitCode;

use clap::Args;
use twinstep_host::demo::{self, Audience, Options, Story};
use twinstep_host::packages::{KernelLine, Progress, tell_on_stderr};
use twinstep_host::vm::spec::Memory;

use super::run::CommitRule;

#[derive(Args)]
pub struct Arguments {
    /// `failover`: the primary is killed and the standby goes on; `heal`: the VM then finds itself a third host, and the second is killed as well
    #[arg(long, value_name = "STORY", default_value = "failover")]
    story: StoryName,
    /// Tell the whole story so many times
    #[arg(long, default_value_t = 1)]
    kills: u32,
    /// Print one JSON object with every figure
    #[arg(long)]
    json: bool,
    /// The guest's RAM
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    mem: Memory,
    /// Commands the client has on their way at a time
    #[arg(long, default_value_t = 4)]
    pipeline: usize,
    /// When an output may leave (see `run --help`)
    #[arg(long, value_name = "RULE", default_value = "received")]
    commit: CommitRule,
    /// The two sides speak TLS, with certificates made for the occasion
    #[arg(long)]
    tls: bool,
    /// Use the newer kernel of Debian's backports
    #[arg(long)]
    backports: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum StoryName {
    Failover,
    Heal,
}

struct People {
    quiet: bool,
}

impl Audience for People {
    fn line(&mut self, text: &str) {
        if self.quiet { eprintln!("{text}") } else { println!("{text}") }
    }
    fn progress(&mut self, progress: Progress) {
        tell_on_stderr(progress);
    }
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let options = Options {
        story: match arguments.story {
            StoryName::Failover => Story::Failover,
            StoryName::Heal => Story::Heal,
        },
        kills: arguments.kills,
        ram_mib: arguments.mem.0,
        kernel: if arguments.backports { KernelLine::Backports } else { KernelLine::Stable },
        pipeline: arguments.pipeline,
        matched: matches!(arguments.commit, CommitRule::Matched),
        tls: arguments.tls,
        ..Options::default()
    };
    let report = demo::run(&options, &mut People { quiet: arguments.json })?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        let verdict = if report.passed { "PASSED" } else { "FAILED" };
        println!(
            "{verdict}: {} of {} rounds without loss; client-visible gap: median {:.1} ms, longest {:.1} ms",
            report.passed_rounds,
            report.rounds.len(),
            report.gap_median_ms,
            report.gap_max_ms
        );
    }
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
