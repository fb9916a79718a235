//! The silicon is the oracle: guest and host have the same instruction set, so every instruction form runs with random operands on the
//! host CPU and through the engine, and registers, flags, FPU state, memory, exceptions and positions must agree.
//!
//! `TWINSTEP_SEED` chooses the cases, `TWINSTEP_CASES` their number; a failure prints what to set to see it again. With
//! `TWINSTEP_COVERAGE=1` (and `--nocapture`) the forms that were compared and those that were not are listed.
mod bus;
mod case;
mod compare;
mod forms;
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
    let settings =
        run::Settings { seed: setting("TWINSTEP_SEED", 1), first: 0, cases: setting("TWINSTEP_CASES", 20_000).min(20_000) };
    run::check(settings, false, &run::against_itself);
}

/// The same for 32-bit code.
#[test]
fn silicon_agrees_with_itself_in_32_bit_code() {
    let settings =
        run::Settings { seed: setting("TWINSTEP_SEED", 1), first: 0, cases: setting("TWINSTEP_CASES", 20_000).min(20_000) };
    run::check(settings, true, &run::against_itself);
}

/// The engine agrees with the silicon in 32-bit code, with flat segments and with others.
#[test]
fn engine_agrees_with_silicon_in_32_bit_code() {
    let settings = run::Settings {
        seed: setting("TWINSTEP_SEED", 1),
        first: setting("TWINSTEP_FIRST", 0),
        cases: setting("TWINSTEP_CASES", 100_000),
    };
    run::check(settings, true, &run::against_engine);
}

/// The engine agrees with the silicon.
#[test]
fn engine_agrees_with_silicon() {
    let settings = run::Settings {
        seed: setting("TWINSTEP_SEED", 1),
        first: setting("TWINSTEP_FIRST", 0),
        cases: setting("TWINSTEP_CASES", 100_000),
    };
    run::check(settings, false, &run::against_engine);
}
