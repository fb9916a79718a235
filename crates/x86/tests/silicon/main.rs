//! The silicon is the oracle: guest and host have the same instruction set, so every instruction form runs with random operands on the
//! host CPU and through the engine, and registers, flags, FPU state, memory, exceptions and positions must agree.
//!
//! `TWINSTEP_SEED` chooses the cases, `TWINSTEP_CASES` their number; a failure prints what to set to see it again. With
//! `TWINSTEP_COVERAGE=1` (and `--nocapture`) the forms that were compared and those that were not are listed.
mod bus;
mod case;
mod compare;
mod forms;
mod fpu;
mod generate;
mod guest;
mod layout;
mod memory;
mod native;
mod operands;
mod prng;
mod rep;
mod run;
mod sandbox;
mod segments;
mod system;

use forms::Level;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v} is no number")))
}

/// The tables of what is not compared say nothing that is not so.
#[test]
fn tables_are_sound() {
    forms::check_tables();
}

/// The silicon agrees with itself: what is compared is the same when run twice, and in single steps.
#[test]
fn silicon_agrees_with_itself() {
    for level in [Level::V2, Level::Host] {
        run::check(few(level), false, &run::against_itself);
    }
}

/// The same for 32-bit code.
#[test]
fn silicon_agrees_with_itself_in_32_bit_code() {
    run::check(few(Level::V2), true, &run::against_itself);
}

/// The engine agrees with the silicon in 32-bit code, with flat segments and with others.
#[test]
fn engine_agrees_with_silicon_in_32_bit_code() {
    agree(Level::V2, true, 100_000);
}

/// And for what the host has beyond x86-64-v2 in 32-bit code.
#[test]
fn engine_agrees_with_silicon_beyond_v2_in_32_bit_code() {
    agree(Level::Host, true, 40_000);
}

/// The engine agrees with the silicon.
#[test]
fn engine_agrees_with_silicon() {
    agree(Level::V2, false, 100_000);
}

/// The same for what the host has beyond x86-64-v2, AVX2 and all.
#[test]
fn engine_agrees_with_silicon_beyond_v2() {
    agree(Level::Host, false, 60_000);
}

fn settings(level: Level, cases: u64) -> run::Settings {
    let first = setting("TWINSTEP_FIRST", 0);
    run::Settings { seed: setting("TWINSTEP_SEED", 1), first, cases: setting("TWINSTEP_CASES", cases), level }
}

/// Enough for the silicon alone.
fn few(level: Level) -> run::Settings {
    let all = settings(level, 20_000);
    run::Settings { first: 0, cases: all.cases.min(20_000), ..all }
}

fn agree(level: Level, narrow: bool, cases: u64) {
    let missing = level.model().missing();
    if !missing.is_empty() {
        println!("left out: this host lacks {missing}");
        return;
    }
    run::check(settings(level, cases), narrow, &move || run::against_engine(level));
}
