//! A map of translated code for `perf` (its documented format for just-in-time compilers: `/tmp/perf-PID.map`, a line a piece of code).
//!
//! *In*: where code was translated to. *Out*: the file, which outlives the process so that `perf report` finds it. *Invariant*: what cannot be
//! written harms nobody but the profile.
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use twinstep_machine::CodeNote;

use crate::error::{Context, Result};

/// The map of this process's code.
pub struct PerfMap {
    file: BufWriter<File>,
}

impl PerfMap {
    /// Begins it.
    pub fn new() -> Result<Self> {
        let path = PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()));
        // Whatever is there is of a process that had this number before, or bait: everybody may write to /tmp.
        let _ = std::fs::remove_file(&path);
        Ok(Self { file: BufWriter::new(File::create_new(&path).at("create", &path)?) })
    }
    /// Adds pieces of code.
    pub fn write(&mut self, notes: &[CodeNote]) {
        if notes.is_empty() {
            return;
        }
        for CodeNote { start, len, rip, kind, user } in notes {
            let _ = match (rip, user) {
                (0, _) => writeln!(self.file, "{start:x} {len:x} twinstep:{}", kind.replace(' ', "-")),
                (_, true) => writeln!(self.file, "{start:x} {len:x} user:{rip:x}:{}", kind.replace(' ', "-")),
                (_, false) => writeln!(self.file, "{start:x} {len:x} kernel:{rip:x}:{}", kind.replace(' ', "-")),
            };
        }
        let _ = self.file.flush();
    }
}
