//! What the pair's figures come to: asked and measured side by side.
//!
//! *In*: every single figure, by what it is and by column. *Out*: lines with medians, ratios and a verdict each; a table. *Invariant*: a ratio or a difference compares figures of the
//! same repetition; what was not measured has no line; a line that does not reach what is asked says so.
use std::collections::BTreeMap;

use serde::Serialize;

use crate::stats::median;
use crate::table::render;

/// The column that protected ones are compared with.
pub const UNPROTECTED: &str = "unprotected";
/// What stands before the name of a column of the second build.
pub const AGAINST: &str = "against ";

/// How a line is made of its figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Figures are rates: protected by unprotected.
    Rates,
    /// Figures are times: unprotected by protected, so that it is the ratio of speeds.
    Times,
    /// Figures are times: what protection adds.
    Added,
    /// The median of the figures themselves.
    Median,
    /// The largest of them.
    Largest,
    /// Their sum.
    Sum,
}

/// What is asked of a line: the least, and the aim.
type Asked = Option<(f64, f64)>;

/// A line of the table of what a pair must reach.
struct Wanted {
    figure: &'static str,
    title: &'static str,
    unit: &'static str,
    how: How,
    received: Asked,
    matched: Asked,
}

const fn w(figure: &'static str, title: &'static str, unit: &'static str, how: How, received: Asked, matched: Asked) -> Wanted {
    Wanted { figure, title, unit, how, received, matched }
}

const SPEED: Asked = Some((0.95, 0.99));
const NONE: Asked = Some((0.0, 0.0));

/// All lines, in the order of the table.
const WANTED: [Wanted; 22] = [
    w("shell", "shell loop, speed", "×", How::Times, SPEED, SPEED),
    w("kernel", "compiled kernel, speed", "×", How::Times, SPEED, SPEED),
    w("latency50", "one small request, added latency, median", "ms", How::Added, Some((1.0, 0.2)), Some((5.0, 1.0))),
    w("latency99", "one small request, added latency, p99", "ms", How::Added, None, None),
    w("redis1", "redis, one at a time, requests/s", "×", How::Rates, Some((0.8, 0.95)), None),
    w("redis16", "redis, 16 at a time, requests/s", "×", How::Rates, Some((0.7, 0.9)), None),
    w("http", "HTTP download of 16 MiB, MiB/s", "×", How::Rates, Some((0.5, 0.9)), None),
    w("idle", "log of an idle guest", "kbit/s", How::Median, Some((50.0, 10.0)), Some((50.0, 10.0))),
    w("setlog", "log under SETs beyond the received frames", "kbit/s", How::Median, Some((500.0, 100.0)), Some((500.0, 100.0))),
    w("kill", "SIGKILL to the first reply, median", "ms", How::Median, Some((300.0, 50.0)), Some((300.0, 50.0))),
    w("kill", "SIGKILL to the first reply, longest", "ms", How::Largest, Some((1000.0, 200.0)), Some((1000.0, 200.0))),
    w("failover", "planned failover, gap, median", "ms", How::Median, Some((100.0, 20.0)), Some((100.0, 20.0))),
    w("failover", "planned failover, gap, longest", "ms", How::Largest, Some((100.0, 20.0)), Some((100.0, 20.0))),
    w("copy", "first copy of a busy 1 GiB guest, pause, longest", "ms", How::Largest, Some((50.0, 50.0)), Some((50.0, 50.0))),
    w("resync", "resync of it after a flipped bit, pause, median", "ms", How::Median, Some((100.0, 20.0)), Some((100.0, 20.0))),
    w("resync", "resync of it after a flipped bit, pause, longest", "ms", How::Largest, Some((100.0, 20.0)), Some((100.0, 20.0))),
    w("resynctotal", "from the difference to the end of it, median", "ms", How::Median, None, None),
    w("resyncpages", "pages that differed at a resync, median", "", How::Median, None, None),
    w("lost", "acknowledged writes lost or repeated, rounds", "", How::Sum, NONE, NONE),
    w("reset", "connections reset or unanswered, rounds", "", How::Sum, NONE, NONE),
    w("split", "split brains, rounds", "", How::Sum, NONE, NONE),
    w("rounds", "rounds of kills, failovers and stalls", "", How::Sum, None, None),
];

/// Whether what is asked was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The aim, too.
    Aim,
    /// The least.
    Least,
    /// Not even that.
    Missed,
}

/// A line with what was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// What it is.
    pub what: String,
    /// The figures it is made of.
    pub figure: String,
    /// Under which rule; of a second build with "against " before it.
    pub column: String,
    /// The unit of `value`; "×" is a ratio.
    pub unit: String,
    /// Median of the figures without protection, if it is compared with that.
    pub unprotected: Option<f64>,
    /// Median of the figures of this column, in that case.
    pub protected: Option<f64>,
    /// What is asked for: the ratio, the difference, the median, the largest or the sum.
    pub value: f64,
    /// The lowest of what `value` is made of.
    pub low: f64,
    /// The highest of it.
    pub high: f64,
    /// How many figures it is made of.
    pub number: usize,
    /// What is asked at least.
    pub least: Option<f64>,
    /// What is aimed at.
    pub aim: Option<f64>,
    /// Whether it is reached.
    pub verdict: Option<Verdict>,
}

/// All figures: by name and column, in the order of the repetitions. One that failed is not there for any column.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Figures(BTreeMap<String, BTreeMap<String, Vec<f64>>>);

impl Figures {
    /// Adds one.
    pub fn add(&mut self, figure: &str, column: &str, value: f64) {
        self.0.entry(figure.to_owned()).or_default().entry(column.to_owned()).or_default().push(value);
    }

    fn of(&self, figure: &str, column: &str) -> &[f64] {
        self.0.get(figure).and_then(|columns| columns.get(column)).map_or(&[], Vec::as_slice)
    }

    /// The lines of the table that there are figures for.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for wanted in &WANTED {
            let columns = self.0.get(wanted.figure).into_iter().flat_map(BTreeMap::keys);
            // Received before matched.
            let mut columns: Vec<&String> = columns.filter(|c| !c.ends_with(UNPROTECTED)).collect();
            columns.sort_by_key(|c| (c.starts_with(AGAINST), !c.ends_with("received")));
            lines.extend(columns.into_iter().filter_map(|column| self.line(wanted, column)));
        }
        lines
    }

    fn line(&self, wanted: &Wanted, column: &str) -> Option<Line> {
        let against = if column.starts_with(AGAINST) { AGAINST } else { "" };
        let (with, without) = (self.of(wanted.figure, column), self.of(wanted.figure, &format!("{against}{UNPROTECTED}")));
        let pairs = with.iter().zip(without);
        let values: Vec<f64> = match wanted.how {
            How::Rates => pairs.map(|(with, without)| with / without).collect(),
            How::Times => pairs.map(|(with, without)| without / with).collect(),
            How::Added => pairs.map(|(with, without)| with - without).collect(),
            How::Median | How::Largest | How::Sum => with.to_vec(),
        };
        let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(*v), high.max(*v)));
        let value = match wanted.how {
            How::Largest => values.iter().copied().reduce(f64::max)?,
            How::Sum => values.iter().sum(),
            _ => median(&values)?,
        };
        let compared = matches!(wanted.how, How::Rates | How::Times | How::Added);
        let asked = if column.ends_with("matched") { wanted.matched } else { wanted.received };
        let reached = |bound: f64| if wanted.unit == "×" { value >= bound } else { value <= bound };
        let verdict = asked.map(|(least, aim)| match (reached(least), reached(aim)) {
            (true, true) => Verdict::Aim,
            (true, false) => Verdict::Least,
            (false, _) => Verdict::Missed,
        });
        Some(Line {
            what: wanted.title.to_owned(),
            figure: wanted.figure.to_owned(),
            column: column.to_owned(),
            unit: wanted.unit.to_owned(),
            unprotected: compared.then(|| median(without)).flatten(),
            protected: compared.then(|| median(with)).flatten(),
            value,
            low,
            high,
            number: values.len(),
            least: asked.map(|(least, _)| least),
            aim: asked.map(|(_, aim)| aim),
            verdict,
        })
    }
}

/// The lines as a table, for terminals and for Markdown alike.
#[must_use]
pub fn table(lines: &[Line]) -> String {
    let head = ["figure", "rule", "unprotected", "protected", "measured", "lowest", "highest", "of", "at least", "aim", ""];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for line in lines {
        let unit = |v: f64| format!("{}{}", digits(v), if line.unit == "×" { "×".into() } else { format!(" {}", line.unit) });
        let plain = |v: Option<f64>| v.map(digits).unwrap_or_default();
        let verdict = match line.verdict {
            None => "",
            Some(Verdict::Aim) => "aim reached",
            Some(Verdict::Least) => "reached",
            Some(Verdict::Missed) => "MISSED",
        };
        rows.push(vec![
            line.what.clone(),
            line.column.clone(),
            plain(line.unprotected),
            plain(line.protected),
            unit(line.value).trim().to_owned(),
            digits(line.low),
            digits(line.high),
            line.number.to_string(),
            plain(line.least),
            plain(line.aim),
            verdict.to_owned(),
        ]);
    }
    render(&rows)
}

/// Three digits that matter, and not more than two of them after the point.
fn digits(value: f64) -> String {
    match value {
        v if v.fract() == 0.0 || v.abs() >= 99.95 => format!("{v:.0}"),
        v if v.abs() >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line<'a>(lines: &'a [Line], figure: &str, column: &str) -> &'a Line {
        lines.iter().find(|l| l.figure == figure && l.column == column).expect("there are figures for it")
    }

    #[test]
    fn ratios_are_of_the_same_repetition() {
        let mut figures = Figures::default();
        // A host that is twice as slow in the second repetition changes no ratio.
        for (slow, extra) in [(1.0, 0.4), (2.0, 0.4), (1.0, 3.0)] {
            figures.add("redis1", UNPROTECTED, 1000.0 / slow);
            figures.add("redis1", "received", 900.0 / slow);
            figures.add("shell", UNPROTECTED, slow);
            figures.add("shell", "matched", slow * 1.25);
            figures.add("latency50", UNPROTECTED, slow);
            figures.add("latency50", "received", slow + extra);
        }
        let lines = figures.lines();
        let redis = line(&lines, "redis1", "received");
        assert!((redis.value - 0.9).abs() < 1e-9 && redis.verdict == Some(Verdict::Least), "{redis:?}");
        assert_eq!((redis.unprotected, redis.protected), (Some(1000.0), Some(900.0)));
        let shell = line(&lines, "shell", "matched");
        assert!((shell.value - 0.8).abs() < 1e-9 && shell.verdict == Some(Verdict::Missed), "{shell:?}");
        let latency = line(&lines, "latency50", "received");
        assert!((latency.value - 0.4).abs() < 1e-9 && (latency.high - 3.0).abs() < 1e-9, "{latency:?}");
        let table = table(&lines);
        assert!(table.contains("MISSED") && table.contains("0.90×"), "{table}");
    }

    #[test]
    fn a_second_build_is_compared_with_itself_and_told_apart() {
        let mut figures = Figures::default();
        for (column, rate) in
            [("unprotected", 10.0), ("received", 5.0), ("against unprotected", 20.0), ("against received", 19.0)]
        {
            figures.add("redis16", column, rate);
        }
        let lines = figures.lines();
        assert_eq!(lines.len(), 2);
        assert!((line(&lines, "redis16", "received").value - 0.5).abs() < 1e-9);
        assert!((line(&lines, "redis16", "against received").value - 0.95).abs() < 1e-9);
    }

    #[test]
    fn what_may_never_happen_is_missed_if_it_happens_once() {
        let mut figures = Figures::default();
        for kill in [30.0, 40.0, 1200.0] {
            figures.add("kill", "received", kill);
            figures.add("lost", "received", 0.0);
        }
        figures.add("split", "received", 1.0);
        let lines = figures.lines();
        let of = |title: &str| lines.iter().find(|l| l.what.contains(title)).unwrap();
        assert_eq!(of("first reply, median").verdict, Some(Verdict::Aim));
        assert_eq!(of("first reply, longest").verdict, Some(Verdict::Missed));
        assert_eq!(of("lost").verdict, Some(Verdict::Aim));
        assert_eq!(of("split").verdict, Some(Verdict::Missed));
        assert!(lines.iter().all(|l| l.figure != "redis1"), "what was not measured has no line");
    }
}
