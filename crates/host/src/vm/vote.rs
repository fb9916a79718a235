//! `twinstep vote`: which side of a pair is right, on a host that is neither.
//!
//! *In*: a window, as a standby with `--record-window` writes it. *Out*: whose output this host's replay makes, and in what the other's differs. *Invariant*: without an opinion there is an
//! error, never a guess.
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use twinstep_log::{Dispute, Opinion, RecordingReader, Verdict, VoteError, vote};
use twinstep_machine::Output;

use super::replay::{self, Vm};
use super::{build, difference};
use crate::error::Context;
use crate::error::{Error, Result};

/// A vote.
#[derive(Debug)]
pub struct Vote {
    /// What the two sides disagree about.
    pub dispute: Dispute,
    /// Where the window begins.
    pub from: u64,
    /// What this host's machine did.
    pub opinion: Opinion,
    /// Both in a few sentences.
    pub text: String,
}

/// Replays a window. `progress` is given the position now and then.
pub fn ask(path: &Path, progress: &mut dyn FnMut(u64)) -> Result<Vote> {
    let file = File::open(path).at("open the recording", path)?;
    let broken = |e| replay::unreadable("recording", path, e);
    let mut reader = RecordingReader::open(BufReader::with_capacity(1 << 20, file)).map_err(broken)?;
    let dispute = reader.metadata().dispute.clone().ok_or_else(|| {
        Error::new(format!("there is nothing to vote about in {}: no two sides disagree in it", path.display()))
            .next("give a window that `twinstep standby --record-window DIR` wrote; `twinstep replay` replays other recordings")
    })?;
    let no_disks: build::DiskMaker = &mut |disks| match disks {
        [] => Ok(Vec::new()),
        _ => Err(Error::new("the machine has disks, and what was on them is not in the recording")),
    };
    let (machine, extra) = build::from_image(&mut reader.image().map_err(broken)?, no_disks, &|_| {})
        .what(format!("cannot use the recording {}", path.display()))?;
    reader.rewind();
    let from = machine.position();
    let opinion = vote::vote(&mut Vm(machine, None), extra.last_output, &dispute, || {
        let entry = reader.next_entry()?;
        if let Some(entry) = &entry {
            progress(entry.position);
        }
        Ok(entry)
    })
    .map_err(|e| {
        // The disks of a window cannot fail otherwise.
        let lacks_blocks = matches!(&e, VoteError::Host(_));
        let error = Error::new(format!("no opinion from {}", path.display())).because(e);
        let next =
            "the standby is not confirmed, since its machine went another way; whether the primary's is right cannot be said";
        if lacks_blocks { error.next(next) } else { error }
    })?;
    let text = words(&dispute, &opinion);
    Ok(Vote { dispute, from, opinion, text })
}

fn words(dispute: &Dispute, opinion: &Opinion) -> String {
    let made = opinion.made.as_ref().map(|(at, output)| (*at, output));
    let standbys: Option<(u64, Output)> = dispute.made.as_ref().and_then(|made| Some((made.position, made.output()?)));
    let standbys = standbys.as_ref().map(|(at, output)| (*at, output));
    let primarys = || match dispute.noted.as_ref().and_then(|noted| Some((noted.position, noted.note()?))) {
        Some((position, note)) => format!("the primary made {note} at position {position}"),
        None => "the primary made nothing".to_owned(),
    };
    let stuck = opinion.stuck.as_ref().map(|why| format!("; here, {why}")).unwrap_or_default();
    match opinion.verdict {
        // Its bytes are known only from here.
        Verdict::Primary if dispute.stuck => format!(
            "this host's replay goes where the primary went, to position {}, and the standby did not get there: {}",
            opinion.position, dispute.text
        ),
        Verdict::Primary => {
            format!("this host's replay makes what the primary made: {}", difference::describe(dispute.output, made, standbys))
        }
        Verdict::Standby => {
            let theirs = match (standbys, dispute.stuck) {
                (_, true) => format!("the standby did not get as far: {}", dispute.text),
                (Some((at, output)), _) => format!("the standby made {} at position {at}", difference::what(output)),
                (None, _) => "the standby made what it did".to_owned(),
            };
            format!("this host's replay does what the standby did: output {}: {theirs}, {}{stuck}", dispute.output, primarys())
        }
        Verdict::Neither => {
            let ours = match made {
                Some((at, output)) => format!("{} at position {at}", difference::what(output)),
                None => "nothing".to_owned(),
            };
            format!("this host's replay makes {ours}, as neither side did: {}{stuck}", dispute.text)
        }
    }
}
