//! Is the simulator any good? Each of these seeded bugs must be found, and soon. A checker that finds nothing in a wrong pair says nothing
//! about a right one.

use twinstep_pair::Bug;
use twinstep_sim::run_seed;

/// A bug that needs more histories than this to be found is one that CI, which lives through as many (`seeds.rs`), would let pass.
const WITHIN_SEEDS: u64 = 10_000;

#[test]
fn every_seeded_bug_is_found() {
    // A seeded bug may well end in a failed assertion of the pair; its text is in the violation.
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for bug in Bug::ALL {
        match (1..=WITHIN_SEEDS).find_map(|seed| run_seed(seed, Some(bug)).err()) {
            Some(violation) => {
                println!("{bug:?}: seed {}: {}", violation.seed, violation.problem);
                run_seed(violation.seed, None).expect("without the bug the same world is survived");
            }
            None => missed.push(bug),
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not found within {WITHIN_SEEDS} seeds: {missed:?}");
}
