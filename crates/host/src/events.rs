//! What happened, for people and for programs: one line an event.
//!
//! *In*: any thread says what happened. *Out*: a readable line on standard error, and, if asked for, a JSON line in a file, with the
//! host's monotonic clock, which all processes of a host share, so that the story of several processes can be told in order. The newest are kept for
//! whoever asks later. *Invariant*: what is kept has a bound, in events and in bytes.
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

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

/// An event that was said, as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Kept {
    /// Its number: 1 is the first that this process said.
    pub number: u64,
    /// How often it was said. One that comes again, or again after one other, is kept once, with the newest time and number: a guest that is held back and let
    /// go over and over would leave room for nothing else.
    pub times: u64,
    /// Wall-clock time, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The event.
    #[serde(flatten)]
    pub event: Event,
}

/// Events that are kept.
pub const MAX_KEPT: usize = 256;
/// Bytes of all of them, as JSON.
pub const MAX_KEPT_BYTES: usize = 128 << 10;
/// Bytes of a text that is kept; the rest is cut off.
const MAX_TEXT: usize = 2048;
/// Bytes of figures that are kept; larger ones are left out.
const MAX_FIGURES: usize = 8192;

/// The newest events.
#[derive(Debug, Default)]
struct History {
    /// Each with its bytes as JSON.
    kept: VecDeque<(Kept, usize)>,
    bytes: usize,
    said: u64,
}

impl History {
    fn keep(&mut self, event: &Event, unix_ms: u64) {
        let mut event = event.clone();
        if event.text.len() > MAX_TEXT {
            event.text.truncate(event.text.floor_char_boundary(MAX_TEXT));
            event.text.push('…');
        }
        if serde_json::to_vec(&event.figures).is_ok_and(|json| json.len() > MAX_FIGURES) {
            event.figures.clear();
        }
        self.said += 1;
        let mut kept = Kept { number: self.said, times: 1, unix_ms, event };
        let last = self.kept.len().saturating_sub(2)..self.kept.len();
        let same = |at: &usize| {
            let before = &self.kept[*at].0.event;
            (&before.what, &before.text) == (&kept.event.what, &kept.event.text)
        };
        if let Some((before, bytes)) = last.into_iter().find(same).and_then(|at| self.kept.remove(at)) {
            kept.times += before.times;
            self.bytes -= bytes;
        }
        let Ok(json) = serde_json::to_vec(&kept) else { return };
        self.bytes += json.len();
        self.kept.push_back((kept, json.len()));
        while self.kept.len() > MAX_KEPT || self.bytes > MAX_KEPT_BYTES {
            let (_, bytes) = self.kept.pop_front().expect("one alone is within the bounds");
            self.bytes -= bytes;
        }
    }
}

/// Nanoseconds on the host's monotonic clock.
pub fn now_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Wall-clock time, in milliseconds since 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// Where events go. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    side: Arc<str>,
    quiet: bool,
    start_ns: u64,
    file: Option<Arc<Mutex<File>>>,
    history: Arc<Mutex<History>>,
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
        Ok(Self { side: side.into(), quiet, start_ns: now_ns(), file, history: Arc::default() })
    }
    /// Says that something happened.
    pub fn say(&self, what: &str, text: impl Into<String>) {
        self.say_with(what, text, serde_json::Map::new());
    }
    /// The same with figures.
    pub fn say_with(&self, what: &str, text: impl Into<String>, figures: serde_json::Map<String, serde_json::Value>) {
        let event = self.make(what, text.into(), figures);
        // Before anybody can know of it and ask.
        self.history.lock().unwrap_or_else(PoisonError::into_inner).keep(&event, unix_ms());
        if !self.quiet {
            let ms = (event.at_ns - self.start_ns) as f64 / 1e6;
            // Carriage return: the terminal may be raw for the guest's console.
            eprint!("[{} {ms:10.3} ms] {}: {}\r\n", event.side, event.what, event.text);
        }
        self.write(&event);
    }
    /// The newest that were said, oldest first.
    pub fn history(&self) -> Vec<Kept> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).kept.iter().map(|(kept, _)| kept.clone()).collect()
    }
    /// Figures for programs only.
    pub fn figures(&self, what: &str, figures: serde_json::Map<String, serde_json::Value>) {
        if self.file.is_some() {
            self.write(&self.make(what, String::new(), figures));
        }
    }

    // Much of a text can be the other side's words, and terminals obey control characters.
    fn make(&self, what: &str, text: String, figures: serde_json::Map<String, serde_json::Value>) -> Event {
        let text = text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}");
        Event { at_ns: now_ns(), side: self.side.to_string(), what: what.into(), text, figures }
    }

    fn write(&self, event: &Event) {
        if let Some(file) = &self.file
            && let Ok(mut line) = serde_json::to_string(event)
        {
            line.push('\n');
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            // Whoever reads the events notices that they stop; the machine does not stop for it.
            let _ = file.write_all(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn quiet() -> Events {
        Events::new("primary", true, None).unwrap()
    }

    #[test]
    fn the_newest_are_kept_in_order() {
        let events = quiet();
        assert_eq!(events.history(), []);
        for n in 0..MAX_KEPT + 10 {
            events.say_with("notice", format!("event {n}"), Map::from_iter([("n".to_owned(), json!(n))]));
            events.clone().figures("status", Map::new());
        }
        let kept = events.history();
        assert_eq!((kept.len(), kept[0].number, kept[0].event.text.as_str()), (MAX_KEPT, 11, "event 10"));
        assert!(kept.iter().zip(&kept[1..]).all(|(a, b)| a.number + 1 == b.number && a.event.at_ns <= b.event.at_ns));
        let newest = &kept[MAX_KEPT - 1];
        assert_eq!((newest.event.what.as_str(), &newest.event.figures["n"]), ("notice", &json!(MAX_KEPT + 9)));
        // One object each, without a level for the event.
        let line = serde_json::to_value(newest).unwrap();
        assert!(line["text"].is_string() && line["unix_ms"].is_u64() && line["side"] == "primary", "{line}");
        assert_eq!(&serde_json::from_value::<Kept>(line).unwrap(), newest);
    }

    #[test]
    fn nobodys_words_command_a_terminal() {
        let events = quiet();
        events.say("notice", "the other side says \u{1b}]0;ha\u{7}\u{9b}2J\rno\nyes");
        let said = events.history().pop().unwrap().event.text;
        assert_eq!(said, "the other side says \u{fffd}]0;ha\u{fffd}\u{fffd}2J\u{fffd}no\nyes");
    }

    #[test]
    fn what_is_said_over_and_over_is_kept_once() {
        let events = quiet();
        for what in ["protected", "held", "freed", "held", "freed", "held", "live", "freed"] {
            events.say(what, "it happened");
        }
        events.say("freed", "otherwise");
        let kept = events.history();
        let told: Vec<_> = kept.iter().map(|kept| (kept.event.what.as_str(), kept.number, kept.times)).collect();
        assert_eq!(
            told,
            [("protected", 1, 1), ("freed", 5, 2), ("held", 6, 3), ("live", 7, 1), ("freed", 8, 1), ("freed", 9, 1)]
        );
        assert_eq!(
            events.history.lock().unwrap().bytes,
            kept.iter().map(|k| serde_json::to_vec(k).unwrap().len()).sum::<usize>()
        );
    }

    #[test]
    fn long_ones_push_others_out() {
        let events = quiet();
        // Each line break takes two bytes as JSON.
        for n in 0..MAX_KEPT {
            events.say("notice", format!("{n}{}", "\n".repeat(5000)));
        }
        let kept = events.history();
        assert!(kept.len() > 5 && kept.len() < MAX_KEPT);
        assert!(serde_json::to_vec(&kept).unwrap().len() <= MAX_KEPT_BYTES + 2 + kept.len());
        // A character is not cut in two, and figures that are too large are left out.
        events.say_with("notice", "ü".repeat(2000) + "x", Map::from_iter([("big".to_owned(), json!("x".repeat(10_000)))]));
        let newest = events.history().pop().unwrap();
        assert!(newest.event.text.ends_with("ü…") && newest.event.text.len() <= MAX_TEXT + 3);
        assert!(newest.event.figures.is_empty() && newest.number == MAX_KEPT as u64 + 1);
    }
}
