//! `twinstep demo`, the README's first command, as it is.
mod common;

use common::{Twinstep, turn, twinstep, words};
use rustix::process::Signal;
use serde_json::Value;

#[test]
fn two_kills_and_nothing_lost() {
    let _turn = turn(2);
    let ended = twinstep(&["demo", "--json", "--kills", "2"]).with(0);
    let report = ended.json();
    let number = |value: &Value, name: &str| {
        let found = value.pointer(name).and_then(Value::as_f64);
        found.unwrap_or_else(|| panic!("{name} is no number in {value:#}"))
    };
    assert_eq!(report["passed"], Value::Bool(true), "{report:#}");
    assert!(number(&report, "/gap_median_ms") <= number(&report, "/gap_max_ms"));
    let rounds = report["rounds"].as_array().expect("rounds");
    assert_eq!((rounds.len(), number(&report, "/passed_rounds")), (2, 2.0));
    for (round, expected) in rounds.iter().zip(1..) {
        assert_eq!((number(round, "/round"), &round["failure"]), (f64::from(expected), &Value::Null));
        for figure in ["/ready_ms", "/gap_ms", "/client/replies", "/client/increments", "/client/sets", "/client/keys_verified"] {
            assert!(number(round, figure) > 0.0, "{figure} of {round:#}");
        }
        // Things happened in this order after the kill.
        let line = ["detected", "arbiter_won", "log_consumed", "live", "first_reply"]
            .map(|what| number(round, &format!("/time_line/{what}_ms")));
        assert!(line.is_sorted(), "{round:#}");
        for figure in ["/pair/lag_instructions", "/pair/log_bytes_per_s", "/pair/held_mean_ns"] {
            assert!(number(round, figure) >= 0.0, "{figure} of {round:#}");
        }
    }
}

/// Three hosts, two of which die: one client on one connection, over TLS.
#[test]
fn two_hosts_die_and_nothing_is_lost() {
    let _turn = turn(2);
    let report = twinstep(&["demo", "--json", "--story", "heal", "--tls"]).with(0).json();
    assert_eq!(report["passed"], Value::Bool(true), "{report:#}");
    let round = &report["rounds"][0];
    for figure in ["/healing/protected_again_ms", "/healing/gap_ms", "/healing/time_line/first_reply_ms", "/client/keys_verified"]
    {
        let value = round.pointer(figure).and_then(Value::as_f64);
        assert!(value.is_some_and(|value| value > 0.0), "{figure} of {round:#}");
    }
}

#[test]
fn an_end_in_the_middle_leaves_nothing_behind() {
    let _turn = turn(2);
    let demo = Twinstep::start("demo", &words(&["demo", "--json"]));
    let folder = std::env::temp_dir().join(format!("twinstep-demo-{}", demo.pid()));
    demo.wait_said("the client writes");
    assert!(folder.exists());
    demo.signal(Signal::INT);
    demo.end().with(1).says(&["the demo was ended by signal 2"]);
    assert!(!folder.exists(), "{} is left", folder.display());
}
