//! Bring-up: boots a kernel in a naive host loop.
//!
//! `boot KERNEL INITRD CMDLINE [ram=MIB] [slice=INSTRUCTIONS] [block=INSTRUCTIONS] [disk=FILE] [nic] [type=TEXT] [press] [stop=POSITION]`: serial and console output go to standard output. Guest
//! time runs at a fixed rate, and while the guest sleeps it jumps to the next timer; so two runs are alike, and the digest at the
//! end must not depend on `slice` or `block`. `type` is typed at the serial port once the guest has said "READY" (`\n` for a new line), `press` presses
//! the power button after that.
use std::io::Write;
use std::time::Instant;
use twinstep_machine::{Config, DiskConfig, Input, Machine, MemoryDisk, Output, Pause};

/// The fixed rate of guest time.
const PICOSECONDS_PER_INSTRUCTION: u32 = 1000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, cmdline, options @ ..] = args.as_slice() else {
        return Err("usage: boot KERNEL INITRD CMDLINE [option=value ...] (INITRD may be - for none)".into());
    };
    let (mut config, mut slice, mut typed, mut press, mut stop) = (Config::default(), 1_000_000, None, false, u64::MAX);
    let mut disks: Vec<Box<dyn twinstep_machine::Disk>> = Vec::new();
    for option in options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("ram", mib) => config.ram_mib = mib.parse()?,
            ("slice", n) => slice = n.parse()?,
            ("press", _) => press = true,
            ("stop", n) => stop = n.parse()?,
            ("block", n) => config.max_block_instructions = n.parse()?,
            ("type", text) => typed = Some(text.replace("\\n", "\n")),
            ("nic", _) => config.nics.push([2, 0, 0, 0, 0, 1]),
            ("disk", file) => {
                config.disks.push(DiskConfig::default());
                disks.push(Box::new(MemoryDisk(std::fs::read(file)?)));
            }
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    let kernel = std::fs::read(kernel)?;
    let initrd = if initrd == "-" { None } else { Some(std::fs::read(initrd)?) };
    let mut machine = Machine::new(config, disks)?;
    machine.boot_linux(&kernel, initrd.as_deref(), cmdline)?;
    machine.input(Input::WallClock(1_795_000_000_000_000_000))?;
    machine.input(Input::Seed([7; 32]))?;

    let started = Instant::now();
    let mut out = std::io::stdout().lock();
    let mut seen = Vec::new();
    let pause = loop {
        let pause = machine.run((machine.position() + slice).min(stop));
        for (_, output) in machine.drain_outputs() {
            if let Output::Serial(bytes) | Output::Console(bytes) = output {
                out.write_all(&bytes)?;
                seen.extend(bytes);
            }
        }
        out.flush()?;
        // While the guest is busy its time passes by itself, at the rate of the last clock input.
        match pause {
            Pause::Position if machine.position() < stop => {}
            // Only where the guest sleeps, so that the position does not depend on the slices.
            Pause::Idle { .. } if typed.is_some() && seen.windows(5).any(|w| w == b"READY") => {
                machine.input(Input::Serial(typed.take().unwrap_or_default().into_bytes()))?;
            }
            Pause::Idle { .. } if typed.is_none() && std::mem::take(&mut press) => machine.input(Input::PowerButton)?,
            Pause::Idle { wake_ns: Some(advance_to_ns) } => {
                machine.input(Input::Clock { advance_to_ns, picoseconds_per_instruction: PICOSECONDS_PER_INSTRUCTION })?;
            }
            other => break other,
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    let position = machine.position();
    eprintln!("\n{pause:?} at position {position}, guest time {:.3} s", machine.guest_ns() as f64 / 1e9);
    eprintln!(
        "rip {:#x}, {seconds:.2} s, {:.1} million instructions/s",
        machine.cpu_state().rip,
        position as f64 / seconds / 1e6
    );
    eprintln!("digest {}", machine.digest());
    Ok(())
}
