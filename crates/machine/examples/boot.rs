//! Bring-up: boots a kernel in a naive host loop.
//!
//! `boot KERNEL INITRD CMDLINE [RAM_MIB]`: serial and console output go to standard output. Guest time runs at a fixed rate, so two runs are alike;
//! while the guest sleeps, guest time jumps to its next timer. The digest at the end can be compared between runs.
use std::io::Write;
use std::time::Instant;
use twinstep_machine::{Config, Input, Machine, Output, Pause};

/// Instructions between two looks at the outputs.
const SLICE: u64 = 1_000_000;
/// The fixed rate of guest time.
const PICOSECONDS_PER_INSTRUCTION: u32 = 1000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, cmdline, rest @ ..] = args.as_slice() else {
        return Err("usage: boot KERNEL INITRD CMDLINE [RAM_MIB] (INITRD may be - for none)".into());
    };
    let ram_mib = rest.first().map_or(Ok(512), |mib| mib.parse())?;
    let kernel = std::fs::read(kernel)?;
    let initrd = if initrd == "-" { None } else { Some(std::fs::read(initrd)?) };
    let mut machine = Machine::new(Config { ram_mib, ..Config::default() }, Vec::new())?;
    machine.boot_linux(&kernel, initrd.as_deref(), cmdline)?;
    machine.input(Input::WallClock(1_795_000_000_000_000_000))?;
    machine.input(Input::Seed([7; 32]))?;

    let started = Instant::now();
    let mut out = std::io::stdout().lock();
    let pause = loop {
        let pause = machine.run(machine.position() + SLICE);
        for (_, output) in machine.drain_outputs() {
            if let Output::Serial(bytes) | Output::Console(bytes) = output {
                out.write_all(&bytes)?;
            }
        }
        out.flush()?;
        let now = machine.guest_ns();
        let advance_to_ns = match pause {
            Pause::Position => now,
            Pause::Idle { wake_ns: Some(ns) } => ns,
            other => break other,
        };
        machine.input(Input::Clock { advance_to_ns, picoseconds_per_instruction: PICOSECONDS_PER_INSTRUCTION })?;
    };
    let seconds = started.elapsed().as_secs_f64();
    let position = machine.position();
    eprintln!("\n{pause:?} at position {position}, guest time {:.3} s", machine.guest_ns() as f64 / 1e9);
    eprintln!("rip {:#x}, {:.1} million instructions/s", machine.cpu_state().rip, position as f64 / seconds / 1e6);
    eprintln!("{}", machine.digest());
    Ok(())
}
