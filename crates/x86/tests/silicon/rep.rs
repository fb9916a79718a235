//! Positions of string instructions with REP (docs/positions.md).

/// Iterations in a step at most.
pub const STEP: u64 = 4096;

/// Positions passed by a REP instruction after `iterations`, if it came to its end or else to a fault.
pub fn positions(iterations: u64, ended: bool) -> u64 {
    if ended { iterations.div_ceil(STEP).max(1) } else { iterations / STEP }
}
