//! Histories by the thousand. `TWINSTEP_SEEDS=n` sets how many, `TWINSTEP_SEED=first` where to begin; with only the latter, one.

use std::ops::Range;

use twinstep_sim::{Figures, run_seed};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, which is no number")))
}

/// Lives through these histories, each in one thread, several at a time.
fn run_all(seeds: Range<u64>) -> Figures {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|part| {
                let seeds = seeds.clone().skip(part).step_by(threads);
                scope.spawn(move || seeds.fold(Figures::default(), |total, seed| total.plus(run(seed))))
            })
            .collect();
        let figures = parts.into_iter().map(|part| part.join().expect("a history failed; see above"));
        figures.fold(Figures::default(), Figures::plus)
    })
}

fn run(seed: u64) -> Figures {
    run_seed(seed, None).unwrap_or_else(|violation| panic!("{violation}\nrun it alone with TWINSTEP_SEED={seed}"))
}

#[test]
fn no_history_violates_an_invariant() {
    let first = number("TWINSTEP_SEED");
    let count = number("TWINSTEP_SEEDS").unwrap_or(if first.is_some() { 1 } else { 10_000 });
    let first = first.unwrap_or(1);
    let total = run_all(first..first + count);
    println!("{count} seeds from {first}: {total:?}");
    if count >= 1_000 {
        assert!(
            total.alone > count / 20 && total.live > count / 10 && total.healed > count / 10,
            "the world has become too mild: {total:?}"
        );
    }
}

#[test]
fn a_seed_is_one_history() {
    for seed in 1..20 {
        assert_eq!(run_seed(seed, None).expect("it passes"), run_seed(seed, None).expect("it passes"));
    }
}
