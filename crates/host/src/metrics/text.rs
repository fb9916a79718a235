//! Figures in Prometheus' text exposition format, version 0.0.4.
//!
//! *In*: a [`Status`], and what the machine counted, if there is one. *Out*: the page. *Invariant*: base units (seconds, bytes); every metric has one HELP and
//! one TYPE line, before its samples, which stand together; every sample has the labels `vm` and `side`; what is not known is left out.
use std::fmt::Write;

use crate::control::wire::Stat;
use crate::status::Status;

/// A page in the making.
struct Page {
    text: String,
    /// The labels of all samples.
    labels: String,
}

/// A label's value, as it stands between quotes.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Page {
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP twinstep_{name} {help}\n# TYPE twinstep_{name} {kind}");
    }
    /// A sample of the metric that was begun last.
    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.text, "twinstep_{name}{{{}", self.labels);
        for (label, text) in labels {
            let _ = write!(self.text, ",{label}=\"{}\"", escaped(text));
        }
        // Whole numbers are printed as such: a double has them exactly up to 2^53.
        let _ = writeln!(self.text, "}} {value}");
    }
    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.metric(name, "gauge", help);
        self.sample(name, &[], value);
    }
    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.metric(name, "counter", help);
        self.sample(name, &[], value);
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// The page.
pub fn exposition(status: &Status, stat: Option<&Stat>) -> String {
    let labels = format!("vm=\"{}\",side=\"{}\"", escaped(&status.name), escaped(&status.side));
    let mut page = Page { text: String::new(), labels };
    pair(&mut page, status);
    if let Some(stat) = stat {
        machine(&mut page, stat);
    }
    page.text
}

fn pair(page: &mut Page, status: &Status) {
    page.metric("state", "gauge", "Where the pair's protocol stands: 1, with the state as a label.");
    page.sample("state", &[("state", &status.state)], 1.0);
    if let Some(epoch) = status.epoch {
        page.gauge("epoch", "The epoch; each failover begins the next.", epoch as f64);
    }
    page.gauge("throttled", "1 while the guest is held back.", f64::from(u8::from(status.throttled)));
    page.counter("throttled_total", "How often the guest was held back.", status.counts.throttled as f64);
    if let Some(age) = status.heartbeat_age_ns {
        page.gauge("heartbeat_age_seconds", "Time since the other side was heard.", seconds(age));
    }
    let lag = &status.lag;
    page.gauge("lag_instructions", "Instructions that the secondary still has to replay.", lag.instructions as f64);
    page.gauge(
        "lag_receive_seconds",
        "Age of the oldest log record that is not acknowledged as received.",
        seconds(lag.received_ns),
    );
    page.gauge("lag_replay_seconds", "Age of the oldest log record that is not replayed.", seconds(lag.replayed_ns));
    page.gauge("log_unreceived_bytes", "Log that is not acknowledged as received.", lag.unreceived_bytes as f64);
    page.gauge("log_unreplayed_bytes", "Log that is not replayed.", lag.unreplayed_bytes as f64);
    if !status.log.is_empty() {
        page.metric("log_entries_total", "counter", "Entries of the log, by kind.");
        status.log.iter().for_each(|(kind, rate)| page.sample("log_entries_total", &[("kind", kind)], rate.entries as f64));
        page.metric("log_bytes_total", "counter", "Bytes of the log, by kind.");
        status.log.iter().for_each(|(kind, rate)| page.sample("log_bytes_total", &[("kind", kind)], rate.bytes as f64));
    }
    page.gauge("outputs_held", "Outputs that may not leave yet.", status.held as f64);
    page.counter("outputs_released_total", "Outputs that left.", status.counts.outputs_released as f64);
    page.counter("failovers_total", "How often this process took the VM over.", status.counts.failovers as f64);
    page.counter("resyncs_total", "How often the secondary was made equal again.", status.counts.resyncs as f64);
    let (minute, total) = (&status.commit.minute, &status.commit.total);
    page.metric(
        "commit_latency_seconds",
        "summary",
        "From an output's making to its release, while outputs are held; quantiles are of the last minute.",
    );
    for (quantile, ns) in [("0.5", minute.p50_ns), ("0.99", minute.p99_ns)] {
        let value = if minute.count == 0 { f64::NAN } else { seconds(ns) };
        page.sample("commit_latency_seconds", &[("quantile", quantile)], value);
    }
    page.sample("commit_latency_seconds_sum", &[], seconds(total.sum_ns));
    page.sample("commit_latency_seconds_count", &[], total.count as f64);
    if minute.count > 0 {
        page.gauge("commit_latency_max_seconds", "The longest commit latency of the last minute.", seconds(minute.max_ns));
    }
}

fn machine(page: &mut Page, stat: &Stat) {
    page.counter(
        "instructions_retired_total",
        "Guest instructions since power-on; a millionth of its rate is MIPS.",
        stat.position as f64,
    );
    page.counter("guest_time_seconds_total", "Guest time since power-on.", seconds(stat.guest_ns));
    page.counter("machine_cpu_seconds_total", "Processor time of the machine's thread.", seconds(stat.cpu_ns));
    page.metric("machine_counts_total", "counter", "What the engine and the devices counted; twinstep stat explains.");
    for (name, value) in &stat.counters {
        let (set, counter) = name.split_once('.').unwrap_or(("", name));
        page.sample("machine_counts_total", &[("set", set), ("counter", counter)], *value as f64);
    }
    for (name, metric, help) in [
        ("code_bytes", "code_cache_bytes", "Translated code."),
        ("code_capacity", "code_cache_capacity_bytes", "Room for translated code."),
        ("address_spaces", "address_spaces", "Address spaces whose translations are kept."),
    ] {
        if let Some(value) = stat.gauges.get(name) {
            page.gauge(metric, help, *value as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::LogRate;
    use std::collections::BTreeMap;

    #[test]
    fn a_page() {
        let mut status = Status {
            name: "d\"b\\\n".into(),
            side: "primary".into(),
            state: "protected".into(),
            epoch: Some(3),
            heartbeat_age_ns: Some(1_500_000),
            ..Status::default()
        };
        status.log.insert("clock".into(), LogRate { entries: 7, bytes: 90, ..LogRate::default() });
        status.commit.total.sum_ns = 250_000_000;
        status.commit.total.count = 2;
        let stat = Stat {
            position: 9_007_199_254_740_992,
            counters: BTreeMap::from([("exits.link".into(), 5)]),
            gauges: BTreeMap::from([("code_bytes".into(), 4096), ("address_spaces".into(), 3)]),
            ..Stat::default()
        };
        let page = exposition(&status, Some(&stat));
        let all = "vm=\"d\\\"b\\\\\\n\",side=\"primary\"";
        for line in [
            "# TYPE twinstep_state gauge".to_owned(),
            format!("twinstep_state{{{all},state=\"protected\"}} 1"),
            format!("twinstep_epoch{{{all}}} 3"),
            format!("twinstep_heartbeat_age_seconds{{{all}}} 0.0015"),
            format!("twinstep_log_entries_total{{{all},kind=\"clock\"}} 7"),
            "# TYPE twinstep_commit_latency_seconds summary".to_owned(),
            format!("twinstep_commit_latency_seconds{{{all},quantile=\"0.5\"}} NaN"),
            format!("twinstep_commit_latency_seconds_sum{{{all}}} 0.25"),
            format!("twinstep_commit_latency_seconds_count{{{all}}} 2"),
            format!("twinstep_instructions_retired_total{{{all}}} 9007199254740992"),
            format!("twinstep_machine_counts_total{{{all},set=\"exits\",counter=\"link\"}} 5"),
            format!("twinstep_code_cache_bytes{{{all}}} 4096"),
        ] {
            assert!(page.lines().any(|found| found == line), "'{line}' is missing:\n{page}");
        }
        assert!(!page.contains("code_cache_capacity") && !page.contains("commit_latency_max"), "{page}");
        // Without a machine, nothing of one.
        let waiting = exposition(&Status::default(), None);
        assert!(!waiting.contains("instructions_retired") && !waiting.contains("epoch{") && waiting.ends_with('\n'), "{waiting}");
    }
}
