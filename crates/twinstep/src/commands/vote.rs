//! `twinstep vote`.
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use twinstep_host::vm::vote;
use twinstep_log::Verdict;

#[derive(Args)]
pub struct Arguments {
    /// A window that `twinstep standby --record-window DIR` wrote when the two sides differed
    recording: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut last = Instant::now();
    let show = !arguments.json && std::io::stderr().is_terminal();
    let vote = vote::ask(&arguments.recording, &mut |position| {
        if show && last.elapsed().as_millis() >= 200 {
            last = Instant::now();
            eprint!("\rposition {position}");
        }
    });
    if show {
        eprint!("\r\x1b[K");
    }
    let vote = vote?;
    let (word, code) = match vote.opinion.verdict {
        Verdict::Primary => ("primary", 0),
        Verdict::Standby => ("standby", 7),
        Verdict::Neither => ("neither", 8),
    };
    let opinion = &vote.opinion;
    let (agreed, differing) = opinion.digests;
    if arguments.json {
        let value = json!({
            "verdict": word, "text": vote.text, "output": vote.dispute.output, "from": vote.from, "position": opinion.position,
            "outputs_agreed": opinion.outputs_agreed, "digests_agreed": agreed, "digests_differing": differing,
        });
        println!("{value}");
    } else {
        println!("{word}: {}", vote.text);
        println!(
            "positions {} to {} replayed: {} outputs and {agreed} state digests are the primary's, {differing} digests are not",
            vote.from, opinion.position, opinion.outputs_agreed
        );
    }
    Ok(ExitCode::from(code))
}
