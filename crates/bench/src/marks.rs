//! Lines on the console that mean something. *In*: a line as it came. *Out*: a mark, if it is one. *Invariant*: whatever a guest prints, nothing here
//! fails; a mark may follow other text on its line (a kernel message that had no line end).

/// What the guest's scripts say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// The first process runs.
    Init,
    /// All is set up for a workload; it starts when a line comes in.
    Ready(String),
    /// A workload starts now.
    Begin(String),
    /// It ended, with this exit status.
    End(String, i32),
    /// What it printed has this digest.
    Digest(String, String),
    /// What it complained.
    Note(String, String),
    /// The whole plan is done.
    Done,
}

/// The mark of a line.
#[must_use]
pub fn parse(line: &[u8]) -> Option<Mark> {
    let text = String::from_utf8_lossy(line);
    let at = text.find("BENCH ")?;
    let mut words = text[at..].trim_end().splitn(4, ' ').skip(1);
    let mut name = || words.next().map(str::to_owned);
    match name()?.as_str() {
        "init" => Some(Mark::Init),
        "done" => Some(Mark::Done),
        "ready" => Some(Mark::Ready(name()?)),
        "begin" => Some(Mark::Begin(name()?)),
        "end" => Some(Mark::End(name()?, name()?.parse().ok()?)),
        "digest" => Some(Mark::Digest(name()?, name()?)),
        "note" => Some(Mark::Note(name()?, name().unwrap_or_default())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_and_other_lines_are_not() {
        let mark = |text: &str| parse(text.as_bytes());
        assert_eq!(mark("BENCH init\r\n"), Some(Mark::Init));
        assert_eq!(mark("[ 1.5] oops: BENCH begin fork\r\n"), Some(Mark::Begin("fork".into())));
        assert_eq!(mark("BENCH ready fork\n"), Some(Mark::Ready("fork".into())));
        assert_eq!(mark("BENCH end fork 127\n"), Some(Mark::End("fork".into(), 127)));
        assert_eq!(mark("BENCH digest fork 01ab\n"), Some(Mark::Digest("fork".into(), "01ab".into())));
        assert_eq!(mark("BENCH note fork sh: no such thing\n"), Some(Mark::Note("fork".into(), "sh: no such thing".into())));
        assert_eq!(mark("BENCH done"), Some(Mark::Done));
        for other in ["", "BENCH", "BENCH ", "BENCH end fork x", "BENCH begin", "BENCHMARK done", "bench done"] {
            assert_eq!(mark(other), None, "{other}");
        }
        assert_eq!(parse(&[0xff, 0xfe, b'\n']), None);
    }
}
