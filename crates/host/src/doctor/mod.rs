//! The doctor: what this host offers, and what Twinstep will therefore use.
//!
//! *In*: the host's /proc, /sys and devices. *Out*: findings, each with what it means and what to do, for people and as JSON. *Invariant*: looking changes
//! nothing, needs no privileges, and takes well under a second; what can't be found out is said to be unknown, never guessed.

mod probes;

use std::fmt::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use probes::Host;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// There, and will be used.
    Good,
    /// Not there, and not needed.
    Absent,
    /// Something a person should do something about: without it something is slower or missing.
    Warning,
    /// Twinstep can't work here.
    Failure,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub subject: String,
    /// How good it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What Twinstep does therefore.
    pub therefore: String,
    /// What a person can do, if anything.
    pub advice: Option<String>,
}

/// The processor, as far as it matters for replaying elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// "AuthenticAMD", "GenuineIntel".
    pub vendor: String,
    /// The maker's name for it.
    pub model: String,
    /// Family number; hosts of a pair must have the same vendor and family.
    pub family: Option<u32>,
    /// Threads this process may use.
    pub threads: usize,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The processor.
    pub cpu: Cpu,
    /// In the order they are told.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether Twinstep can work here.
    #[must_use]
    pub fn healthy(&self) -> bool {
        self.findings.iter().all(|finding| finding.state != State::Failure)
    }

    /// The finding about a subject.
    #[must_use]
    pub fn about(&self, subject: &str) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.subject == subject)
    }

    /// For people.
    #[must_use]
    pub fn in_words(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let mark = match finding.state {
                State::Good => "ok",
                State::Absent => "--",
                State::Warning => "!",
                State::Failure => "!!",
            };
            // Writing into a String can't fail.
            let _ = writeln!(text, "{mark:>2}  {}: {}.\n      {}.", finding.subject, finding.found, finding.therefore);
            if let Some(advice) = &finding.advice {
                let _ = writeln!(text, "      To do: {advice}.");
            }
        }
        let verdict =
            if self.healthy() { "Twinstep works here." } else { "Twinstep does not work here; see the lines marked !!." };
        text.push_str(verdict);
        text.push('\n');
        text
    }

    /// For programs.
    #[must_use]
    pub fn in_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"))
    }
}

/// Looks at this host. `cache` is the package cache's folder, if it is known.
#[must_use]
pub fn examine(cache: Option<PathBuf>) -> Report {
    Host::here(cache).examine()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_told_in_words_and_in_json() {
        let report = examine(None);
        assert!(report.healthy(), "{}", report.in_words());
        assert!(report.in_words().ends_with("Twinstep works here.\n"));
        assert_eq!(serde_json::from_str::<Report>(&report.in_json()).unwrap(), report);
        assert!(!report.cpu.vendor.is_empty() && report.cpu.threads > 0);
        for finding in &report.findings {
            for text in [&finding.found, &finding.therefore].into_iter().chain(&finding.advice) {
                assert!(!text.is_empty() && !text.ends_with('.'), "{text}");
            }
        }
    }
}
