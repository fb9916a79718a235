//! A [`Status`] for people: a table of one VM, a line of each of several, lines of events.
//!
//! *In*: what VMs say. *Out*: text. *Invariant*: what a side does not know is a dash, never a 0.
use std::fmt::Write;

use super::Status;
use crate::events::Kept;

/// A span of time, with as many digits as matter.
pub fn span(ns: u64) -> String {
    match ns as f64 {
        0.0 => "0".into(),
        ns if ns < 999_500.0 => format!("{:.0} µs", (ns / 1e3).max(1.0)),
        ns if ns < 99_950_000.0 => format!("{:.1} ms", ns / 1e6),
        ns if ns < 999_500_000.0 => format!("{:.0} ms", ns / 1e6),
        ns => format!("{:.1} s", ns / 1e9),
    }
}

/// An amount of bytes.
pub fn bytes(n: f64) -> String {
    match n {
        n if n < 9_999.5 => format!("{n:.0} B"),
        n if n < 9_999_500.0 => format!("{:.0} kB", n / 1e3),
        n => format!("{:.1} MB", n / 1e6),
    }
}

/// How far behind, in the time that it takes.
pub fn lag(status: &Status) -> String {
    match status.state.as_str() {
        "protected" | "deciding" | "following" | "consuming" | "copying" => span(status.lag.replayed_ns),
        _ => "-".into(),
    }
}

/// A quantile of the last minute, if there is one.
pub fn p99(status: &Status) -> String {
    if status.commit.minute.count == 0 { "-".into() } else { span(status.commit.minute.p99_ns) }
}

/// An epoch, if there is one.
pub fn epoch(status: &Status) -> String {
    status.epoch.map_or("-".into(), |epoch| epoch.to_string())
}

/// What the columns of [`line`] are.
pub fn head() -> String {
    format!("{:<20} {:<9} {:<12} {:>5} {:>8} {:>6} {:>8}", "name", "side", "state", "epoch", "lag", "held", "p99")
}

/// One VM of several.
pub fn line(s: &Status) -> String {
    format!("{:<20} {:<9} {:<12} {:>5} {:>8} {:>6} {:>8}", s.name, s.side, s.state, epoch(s), lag(s), s.held, p99(s))
}

/// Columns of a row's name.
pub const NAME: usize = 15;

/// Rows of one VM: what, and how much. A row without a name goes on with the one before.
pub fn rows(s: &Status) -> Vec<(&'static str, String)> {
    let dash = || "-".to_owned();
    let mut rows = vec![("state", format!("{}, epoch {}", s.state, epoch(s))), ("VM", s.vm.clone().unwrap_or_else(dash))];
    let other = match (&s.peer, s.heartbeat_age_ns) {
        (Some(peer), Some(age)) => format!("{peer}, heard {} ago", span(age)),
        (Some(peer), None) => format!("{peer}, not heard yet"),
        (None, _) => dash(),
    };
    rows.push(("other side", other));
    let standby = s.side == "standby";
    if lag(s) != "-" {
        let l = &s.lag;
        let (age, rest) = (span(l.replayed_ns), bytes(l.unreplayed_bytes as f64));
        rows.push(("lag", format!("{age}, {} instructions, {rest} to replay", l.instructions)));
        if !standby {
            rows.push(("", format!("{}, {} to acknowledge", span(l.received_ns), bytes(l.unreceived_bytes as f64))));
        }
    }
    if let Some(copy) = &s.copy {
        let (left, sent) = (bytes(copy.remaining_bytes as f64), bytes(copy.sent_bytes as f64));
        let (rate, dirty) = (bytes(copy.bytes_per_s as f64), bytes(copy.dirty_bytes_per_s as f64));
        rows.push(("copy", format!("round {}, {left} left, {sent} sent at {rate}/s, the guest writes {dirty}/s", copy.round)));
        if copy.slowed_percent > 0 {
            rows.push(("", format!("the guest loses {} % of its time", copy.slowed_percent)));
        }
    }
    let guest = s.throttle_reason.as_ref().map_or("runs freely".into(), |why| format!("held back: {why}"));
    rows.push(("guest", guest));
    let moving = s.log.iter().filter(|(_, rate)| rate.entries_per_s > 0.0);
    let mut kinds: Vec<_> = moving
        .map(|(kind, rate)| format!("{kind} {:.0}/s, {}/s", rate.entries_per_s.max(1.0), bytes(rate.bytes_per_s)))
        .collect();
    if kinds.is_empty() {
        kinds.push(dash());
    }
    rows.extend(kinds.into_iter().enumerate().map(|(n, kind)| (if n == 0 { "log" } else { "" }, kind)));
    let held = if standby { "not known to have left" } else { "held" };
    rows.push(("outputs", format!("{} {held}, {} released", s.held, s.counts.outputs_released)));
    for (name, times) in [("commit, 1 min", &s.commit.minute), ("commit, all", &s.commit.total)] {
        if times.count > 0 {
            let (p50, p99, max) = (span(times.p50_ns), span(times.p99_ns), span(times.max_ns));
            rows.push((name, format!("p50 {p50}, p99 {p99}, max {max} of {}", times.count)));
        }
    }
    let c = &s.counts;
    rows.push(("so far", format!("{} failovers, {} resyncs, {} times held back", c.failovers, c.resyncs, c.throttled)));
    rows
}

/// One VM.
pub fn table(s: &Status) -> String {
    let mut text = format!("{} (process {}, {})\n", s.name, s.pid, s.side);
    for (name, value) in rows(s) {
        let _ = writeln!(text, "  {name:<NAME$} {value}");
    }
    text
}

/// Hours, minutes and seconds of a moment, in UTC.
fn clock(unix_ms: u64) -> String {
    let s = unix_ms / 1000;
    format!("{:02}:{:02}:{:02}.{:03}", s / 3600 % 24, s / 60 % 60, s % 60, unix_ms % 1000)
}

/// An event.
pub fn event(kept: &Kept) -> String {
    let text = kept.event.text.replace(|c: char| c.is_control(), " ");
    let times = if kept.times > 1 { format!(" ({} times)", kept.times) } else { String::new() };
    format!("{}Z  {:<14} {text}{times}", clock(kept.unix_ms), kept.event.what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Event;
    use crate::status::{Counts, Lag, LogRate, Quantiles};

    fn protected() -> Status {
        let mut status = Status {
            name: "db".into(),
            pid: 7,
            side: "primary".into(),
            state: "protected".into(),
            epoch: Some(2),
            vm: Some("cafe".into()),
            peer: Some("10.0.0.2:7171".into()),
            heartbeat_age_ns: Some(3_000_000),
            throttled: true,
            throttle_reason: Some("too many outputs are held".into()),
            lag: Lag {
                instructions: 500,
                received_ns: 120_000,
                replayed_ns: 4_200_000,
                unreceived_bytes: 80,
                unreplayed_bytes: 12_345,
            },
            held: 9,
            counts: Counts { outputs_released: 1000, failovers: 0, resyncs: 0, throttled: 1 },
            ..Status::default()
        };
        status.log.insert("clock".into(), LogRate { entries: 10, bytes: 200, entries_per_s: 950.0, bytes_per_s: 19_000.0 });
        status.commit.minute = Quantiles { count: 5, sum_ns: 9, p50_ns: 300_000, p99_ns: 2_000_000, max_ns: 150_000_000 };
        status
    }

    #[test]
    fn a_table_says_all_of_it() {
        let text = table(&protected());
        for part in [
            "db (process 7, primary)",
            "protected, epoch 2",
            "10.0.0.2:7171, heard 3.0 ms ago",
            "lag             4.2 ms, 500 instructions, 12 kB to replay\n",
            "                120 µs, 80 B to acknowledge\n",
            "held back: too many outputs are held",
            "log             clock 950/s, 19 kB/s\n",
            "9 held, 1000 released",
            "p50 300 µs, p99 2.0 ms, max 150 ms of 5\n",
            "0 failovers, 0 resyncs, 1 times held back",
        ] {
            assert!(text.contains(part), "'{part}' is missing:\n{text}");
        }
        assert!(!text.contains("commit, all"), "{text}");
    }

    #[test]
    fn lines_fit_their_head_and_what_is_not_known_is_a_dash() {
        let alone = Status { name: "x".into(), side: "alone".into(), state: "unprotected".into(), ..Status::default() };
        let columns = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(columns(&line(&alone)), ["x", "alone", "unprotected", "-", "-", "0", "-"]);
        assert_eq!(columns(&line(&protected())), ["db", "primary", "protected", "2", "4.2", "ms", "9", "2.0", "ms"]);
        assert_eq!(columns(&head()).len(), 7);
        assert!(!table(&alone).contains("lag"));
    }

    #[test]
    fn events_are_one_line_each() {
        let event_of = |text: &str| Kept {
            number: 1,
            times: 1,
            unix_ms: 86_400_000 * 3 + 3_723_004,
            event: Event {
                at_ns: 1,
                side: "primary".into(),
                what: "live".into(),
                text: text.into(),
                figures: Default::default(),
            },
        };
        assert!(event(&Kept { times: 3, ..event_of("a") }).ends_with(" a (3 times)"));
        assert_eq!(event(&event_of("a\n\x1b[2Jb")), "01:02:03.004Z  live           a  [2Jb");
    }

    #[test]
    fn spans_and_bytes() {
        let spans = [0, 1, 999_000, 999_999, 1_500_000, 99_949_999, 250_000_000, 1_000_000_000].map(span);
        assert_eq!(spans, ["0", "1 µs", "999 µs", "1.0 ms", "1.5 ms", "99.9 ms", "250 ms", "1.0 s"]);
        assert_eq!([0.0, 9999.0, 10_000.0, 12_300_000.0].map(bytes), ["0 B", "9999 B", "10 kB", "12.3 MB"]);
    }
}
