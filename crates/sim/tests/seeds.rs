//! Histories by the thousand. `TWINSTEP_SEEDS=n` sets how many, `TWINSTEP_SEED=first` where to begin; with only the latter, one.

use twinstep_sim::{Figures, run_seed};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is {text:?}, which is no number")),
    )
}

#[test]
fn no_history_violates_an_invariant() {
    let first = number("TWINSTEP_SEED");
    let count = number("TWINSTEP_SEEDS").unwrap_or(if first.is_some() { 1 } else { 1_000 });
    let first = first.unwrap_or(1);
    let mut total = Figures::default();
    for seed in first..first + count {
        match run_seed(seed, None) {
            Ok(figures) => {
                total.steps += figures.steps;
                total.faults += figures.faults;
                total.alone += figures.alone;
                total.live += figures.live;
                total.outputs += figures.outputs;
                total.duplicates += figures.duplicates;
                total.acknowledged += figures.acknowledged;
            }
            Err(violation) => panic!("{violation}\nrun it alone with TWINSTEP_SEED={seed}"),
        }
    }
    println!("{count} seeds from {first}: {total:?}");
    if count >= 1_000 {
        assert!(
            total.alone > count / 20 && total.live > count / 10,
            "the world has become too mild: {total:?}"
        );
    }
}

#[test]
fn a_seed_is_one_history() {
    for seed in 1..20 {
        assert_eq!(
            run_seed(seed, None).expect("it passes"),
            run_seed(seed, None).expect("it passes")
        );
    }
}
