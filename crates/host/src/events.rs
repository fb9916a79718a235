//! What happened, for people and for programs: one line an event.
//!
//! *In*: any thread says what happened. *Out*: a readable line on standard error, and, if asked for, a JSON line in a file, with the
//! host's monotonic clock, which all processes of a host share, so that the story of several processes can be told in order.
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

/// One event.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Event {
    /// Nanoseconds on the host's monotonic clock.
    pub at_ns: u64,
    /// Who says it: "primary", "standby".
    pub side: String,
    /// What kind of event: a fixed word ("protected", "peer-lost", "live" ...).
    pub what: String,
    /// The sentence for people.
    pub text: String,
    /// Figures that go with it.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub figures: serde_json::Map<String, serde_json::Value>,
}

/// Nanoseconds on the host's monotonic clock.
pub fn now_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Where events go. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    side: Arc<str>,
    quiet: bool,
    start_ns: u64,
    file: Option<Arc<Mutex<File>>>,
}

impl Events {
    /// Events of `side`; readable lines on standard error unless `quiet`; JSON lines to `file` if given.
    pub fn new(side: &str, quiet: bool, file: Option<&Path>) -> Result<Self> {
        let file = match file {
            None => None,
            Some(path) => {
                let file = File::options().create(true).append(true).open(path).at("open the event file", path)?;
                Some(Arc::new(Mutex::new(file)))
            }
        };
        Ok(Self { side: side.into(), quiet, start_ns: now_ns(), file })
    }
    /// Says that something happened.
    pub fn say(&self, what: &str, text: impl Into<String>) {
        self.say_with(what, text, serde_json::Map::new());
    }
    /// The same with figures.
    pub fn say_with(&self, what: &str, text: impl Into<String>, figures: serde_json::Map<String, serde_json::Value>) {
        let event = self.make(what, text.into(), figures);
        if !self.quiet {
            let ms = (event.at_ns - self.start_ns) as f64 / 1e6;
            // Carriage return: the terminal may be raw for the guest's console.
            eprint!("[{} {ms:10.3} ms] {}: {}\r\n", event.side, event.what, event.text);
        }
        self.write(&event);
    }
    /// Figures for programs only.
    pub fn figures(&self, what: &str, figures: serde_json::Map<String, serde_json::Value>) {
        if self.file.is_some() {
            self.write(&self.make(what, String::new(), figures));
        }
    }

    fn make(&self, what: &str, text: String, figures: serde_json::Map<String, serde_json::Value>) -> Event {
        Event { at_ns: now_ns(), side: self.side.to_string(), what: what.into(), text, figures }
    }

    fn write(&self, event: &Event) {
        if let Some(file) = &self.file
            && let Ok(mut line) = serde_json::to_string(event)
        {
            line.push('\n');
            let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // Whoever reads the events notices that they stop; the machine does not stop for it.
            let _ = file.write_all(line.as_bytes());
        }
    }
}
