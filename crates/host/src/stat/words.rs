//! A [`Measure`] for people: a table, a line, and the one sentence that says what stands out.
//!
//! *In*: a measure. *Out*: text. *Invariant*: the sentence names the largest thing that is not guest code, if it is large, and what probably causes it.
use std::fmt::Write;

use super::measure::Measure;
use crate::control::wire::Identity;

/// Below this share of the busy time, nothing stands out.
const NOTABLE: f64 = 0.15;

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// A rate: three digits are enough.
fn rate(value: f64) -> String {
    match value {
        v if v >= 9_999_500.0 => format!("{:.0} M", v / 1e6),
        v if v >= 999_950.0 => format!("{:.1} M", v / 1e6),
        v if v >= 9_999.5 => format!("{:.0} k", v / 1e3),
        v if v >= 999.95 => format!("{:.1} k", v / 1e3),
        v if v >= 9.95 || v == 0.0 => format!("{v:.0}"),
        v => format!("{v:.1}"),
    }
}

fn highest<'a>(m: &'a Measure, set: &str) -> (&'a str, f64) {
    m.set(set).first().copied().unwrap_or(("nothing", 0.0))
}

fn words(name: &str) -> String {
    name.replace('_', " ")
}

/// What stands out.
pub fn verdict(m: &Measure) -> String {
    if m.samples == 0 {
        return "the machine was not looked at: measure for longer".into();
    }
    let busy = m.busy();
    if m.share("waiting") > 0.5 {
        let share = percent(m.share("waiting"));
        return format!("the machine waits {share} of the time for the other side of its pair");
    }
    if m.share("halted") > 0.8 {
        return format!(
            "the guest sleeps {} of the time: it waits for its timers, its network or its users",
            percent(m.share("halted"))
        );
    }
    let largest = ["translator", "engine", "memory", "system", "exception", "device", "host"]
        .into_iter()
        .map(|activity| (activity, m.share(activity) / busy))
        .max_by(|a, b| a.1.total_cmp(&b.1));
    let (activity, share) = largest.unwrap_or_default();
    // Processor time that it wanted and did not get.
    if busy > 0.3 && m.processor < 0.75 * busy {
        let (got, wanted) = (percent(m.processor), percent(busy));
        return format!("the host is busy with other work: the machine got {got} of a processor and had work for {wanted}");
    }
    if share < NOTABLE {
        let sleeps =
            if m.share("halted") > NOTABLE { format!("; it sleeps {}", percent(m.share("halted"))) } else { String::new() };
        return format!(
            "nothing stands out: {} of the busy time is the guest's own code{sleeps}",
            percent(m.share("guest") / busy)
        );
    }
    let takes = percent(share);
    match activity {
        "translator" if m.rate("code.full_flushes") > 0.0 => {
            format!("the translator takes {takes}: the code cache is too small for this guest and was emptied")
        }
        "translator" if m.rate("code.overwritten") * 3.0 > m.rate("code.blocks") => {
            format!(
                "the translator takes {takes}: the guest writes over code it runs ({} blocks/s), as just-in-time compilers do",
                rate(m.rate("code.overwritten"))
            )
        }
        "translator" => {
            format!("the translator takes {takes}: much new code ({} instructions/s)", rate(m.rate("code.instructions")))
        }
        "engine" => {
            let (cause, times) = highest(m, "exits");
            format!("finding the next piece of code takes {takes}: most exits are '{}' ({}/s)", words(cause), rate(times))
        }
        "memory" => format!(
            "memory accesses that miss the TLB or run alone take {takes}: {} misses/s, {} walks/s, {} alone/s",
            rate(m.rate("tlb.misses")),
            rate(m.rate("tlb.walks")),
            rate(m.rate("engine.alone"))
        ),
        "system" => {
            let (kind, times) = highest(m, "system");
            format!("system instructions take {takes}: most are '{}' ({}/s)", words(kind), rate(times))
        }
        "exception" => format!(
            "exceptions and interrupts take {takes}: {} exceptions/s, {} interrupts/s",
            rate(m.rate("engine.exceptions")),
            rate(m.rate("engine.interrupts"))
        ),
        "device" => format!("devices dominate, with {takes}: {} accesses/s", rate(m.device_accesses())),
        _ => format!("the host's side takes {takes}: inputs, outputs, the log"),
    }
}

/// Shares in the order of a table.
const TIME: [&str; 10] =
    ["guest", "translator", "engine", "memory", "system", "exception", "device", "host", "halted", "waiting"];

/// Figures in a row of the table, and rows a set has at most: a whole table fits on an old terminal.
const CELLS: usize = 3;
const ROWS: usize = 2;

fn row(text: &mut String, head: &str, cells: &[(String, String)]) {
    for (i, some) in cells.chunks(CELLS).enumerate() {
        let _ = write!(text, "{:<9}", if i == 0 { head } else { "" });
        for (name, value) in some {
            let _ = write!(text, " {name:>15} {value:>6}");
        }
        text.push('\n');
    }
}

/// A measure as a table.
pub fn table(vm: &Identity, m: &Measure) -> String {
    let seconds = m.guest_ns as f64 / 1e9;
    let head = format!("{} (process {}, {})   position {}   guest time {seconds:.1} s", vm.name, vm.pid, vm.side, m.position);
    format!("{head}\n{}", figures(m))
}

/// The same without its first line.
pub fn figures(m: &Measure) -> String {
    let mut text = format!("{}\n\n", m.verdict);
    let cell = |name: &str, value: String| (words(name), value);
    let gauge = |name: &str| *m.gauges.get(name).unwrap_or(&0) as f64;
    let guest = [
        cell("MIPS", format!("{:.1}", m.mips)),
        cell("MIPS while busy", format!("{:.1}", m.busy_mips)),
        cell("processors", format!("{:.2}", m.processor)),
    ];
    row(&mut text, "guest", &guest);
    row(&mut text, "time", &TIME.map(|activity| cell(activity, percent(m.share(activity)))));
    let now = [
        cell("code MiB", format!("{:.1}", gauge("code_bytes") / f64::from(1 << 20))),
        cell("code cache full", percent(gauge("code_bytes") / gauge("code_capacity").max(1.0))),
        cell("spaces kept", format!("{}", gauge("address_spaces"))),
    ];
    row(&mut text, "now", &now);
    for (head, set) in [
        ("exits/s", "exits"),
        ("engine/s", "engine"),
        ("TLB/s", "tlb"),
        ("code/s", "code"),
        ("spaces/s", "groups"),
        ("system/s", "system"),
        ("devices/s", "devices"),
    ] {
        let cells: Vec<_> = m.set(set).into_iter().take(CELLS * ROWS).map(|(name, times)| cell(name, rate(times))).collect();
        row(&mut text, head, &cells);
    }
    text
}

/// What the columns of [`line`] are.
pub fn head() -> String {
    let names = ["MIPS", "guest", "transl", "engine", "memory", "system", "except", "device", "host", "halted", "waits"];
    let rates = ["exits/s", "misses/s", "walks/s", "transl/s", "killed/s", "dev/s"];
    let mut text = String::new();
    for name in names {
        let _ = write!(text, "{name:>7}");
    }
    for name in rates {
        let _ = write!(text, "{name:>10}");
    }
    text
}

/// A measure as a line.
pub fn line(m: &Measure) -> String {
    let mut text = format!("{:>7.1}", m.mips);
    for activity in TIME {
        let _ = write!(text, "{:>7}", percent(m.share(activity)));
    }
    let exits = m.set("exits").iter().map(|(_, times)| times).sum();
    let counted = ["tlb.misses", "tlb.walks", "code.blocks", "code.killed"].map(|name| m.rate(name));
    for value in [exits].into_iter().chain(counted).chain([m.device_accesses()]) {
        let _ = write!(text, "{:>10}", rate(value));
    }
    let _ = write!(text, "  {}", m.verdict);
    text
}

#[cfg(test)]
mod tests {
    use super::super::measure::tests::measure;
    use super::*;

    #[track_caller]
    fn says(seen: &[(&str, u64)], counted: &[(&str, u64)], expected: &[&str]) {
        let said = verdict(&measure(seen, counted));
        for part in expected {
            assert!(said.contains(part), "'{part}' is not in '{said}'");
        }
    }

    #[test]
    fn what_stands_out_is_named() {
        says(&[("guest", 90), ("engine", 10)], &[], &["nothing stands out", "90 %"]);
        says(&[("guest", 5), ("halted", 95)], &[], &["the guest sleeps 95 %"]);
        says(&[("guest", 20), ("waiting", 80)], &[], &["waits 80 %", "other side"]);
        let translated = [("code.blocks", 100), ("code.instructions", 50_000)];
        says(&[("guest", 70), ("translator", 30)], &translated, &["the translator takes 30 %", "much new code", "100 k"]);
        let written = [("code.blocks", 100), ("code.overwritten", 90)];
        says(&[("guest", 70), ("translator", 30)], &written, &["30 %", "writes over code", "180 blocks/s"]);
        says(&[("guest", 70), ("translator", 30)], &[("code.full_flushes", 1)], &["too small"]);
        says(&[("guest", 60), ("device", 40)], &[("devices.port_reads", 500)], &["devices dominate", "40 %", "1.0 k accesses/s"]);
        let system = [("system.string", 9_000), ("system.time_stamp", 50)];
        says(&[("guest", 60), ("system", 40)], &system, &["system instructions take 40 %", "'string' (18 k/s)"]);
        says(&[("guest", 60), ("engine", 40)], &[("exits.host_fault", 9)], &["'host fault'"]);
        // Shares are of the busy time.
        says(&[("guest", 30), ("memory", 20), ("halted", 50)], &[("tlb.walks", 5)], &["take 40 %", "10 walks/s"]);
        says(&[], &[], &["measure for longer"]);
    }

    #[test]
    fn a_host_that_is_busy() {
        let mut m = measure(&[("guest", 60), ("device", 40)], &[]);
        m.processor = 0.5;
        assert_eq!(verdict(&m), "the host is busy with other work: the machine got 50 % of a processor and had work for 100 %");
    }

    #[test]
    fn rates_have_three_digits() {
        for (value, text) in [(0.0, "0"), (0.25, "0.2"), (12.3, "12"), (999.9, "1000"), (1_000.0, "1.0 k"), (12_345.0, "12 k")] {
            assert_eq!(rate(value), text);
        }
        assert_eq!((rate(1_234_567.0), rate(45_678_901.0)), ("1.2 M".into(), "46 M".into()));
    }

    #[test]
    fn tables_and_lines_hold_what_was_measured() {
        let m = measure(&[("guest", 60), ("halted", 40)], &[("exits.host_fault", 110), ("tlb.walks", 3)]);
        let vm = Identity { name: "db".into(), pid: 17, side: "alone".into(), build: String::new(), requests: Vec::new() };
        let text = table(&vm, &m);
        for part in ["db (process 17, alone)", "100.0", "host fault    220", "walks    6.0", "60 %", "nothing stands out"] {
            assert!(text.contains(part), "'{part}' is not in\n{text}");
        }
        let (head, line) = (head(), line(&m));
        assert!(line.starts_with("  100.0   60 %"), "{line}");
        assert_eq!(head.len(), line.find("  nothing").unwrap(), "{head}\n{line}");
    }
}
