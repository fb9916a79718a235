//! Bring-up: boots a kernel in a naive host loop.
//!
//! `boot KERNEL INITRD CMDLINE [option ...]`: serial and console output go to standard output. Guest time runs at a fixed rate, and while the guest sleeps it
//! jumps to the next timer; so two runs are alike, and the digest at the end must not depend on `slice`, `block` and `move`.
//!
//! | option | |
//! | --- | --- |
//! | `ram=MIB` | RAM |
//! | `slice=N` | instructions between two looks at the outputs |
//! | `block=N` | instructions translated as one block |
//! | `disk=FILE` | a disk with the file's contents; what is written is lost |
//! | `nic` | a network card, connected to nothing |
//! | `type=TEXT` | typed at the serial port once the guest has said "READY" (`\n` for a new line) |
//! | `press` | the power button is pressed after that |
//! | `move=N` | saves the machine after N instructions and goes on in another one |
//! | `stop=N` | stops after N instructions |
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use twinstep_machine::{Config, Disk, DiskConfig, DiskError, Input, Machine, MemoryDisk, Output, Pause};

/// The fixed rate of guest time.
const PICOSECONDS_PER_INSTRUCTION: u32 = 1000;

/// A disk that two machines have in turn.
#[derive(Debug, Clone)]
struct Shared(Arc<Mutex<MemoryDisk>>);

impl Disk for Shared {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().size()
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.0.lock().unwrap().read_at(offset, data)
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.0.lock().unwrap().write_at(offset, data)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// Another machine in the same state.
fn moved(mut from: Machine, disks: &[Shared]) -> Result<Machine, Box<dyn std::error::Error>> {
    let started = Instant::now();
    let mut to = Machine::new(from.config().clone(), boxed(disks))?;
    let digest = from.digest();
    // Pages of zeroes need not travel: that is what the other machine begins with.
    let pages: Vec<usize> = (0..from.page_hashes().len()).filter(|&page| from.page_hashes()[page] != 0).collect();
    for &page in &pages {
        to.write_ram_page(page, from.ram().page_bytes(page));
    }
    to.restore(from.save())?;
    let differences = to.digest().differences(&digest);
    eprintln!(
        "moved {} pages in {:.3} s at position {}, differences: {differences:?}",
        pages.len(),
        started.elapsed().as_secs_f64(),
        to.position()
    );
    Ok(to)
}

fn boxed(disks: &[Shared]) -> Vec<Box<dyn Disk>> {
    disks.iter().map(|d| Box::new(d.clone()) as Box<dyn Disk>).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, cmdline, options @ ..] = args.as_slice() else {
        return Err("usage: boot KERNEL INITRD CMDLINE [option=value ...] (INITRD may be - for none)".into());
    };
    let (mut config, mut slice, mut typed, mut press, mut stop) = (Config::default(), 1_000_000, None, false, u64::MAX);
    let mut move_at = u64::MAX;
    let mut disks: Vec<Shared> = Vec::new();
    for option in options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("ram", mib) => config.ram_mib = mib.parse()?,
            ("slice", n) => slice = n.parse()?,
            ("press", _) => press = true,
            ("move", n) => move_at = n.parse()?,
            ("stop", n) => stop = n.parse()?,
            ("block", n) => config.max_block_instructions = n.parse()?,
            ("type", text) => typed = Some(text.replace("\\n", "\n")),
            ("nic", _) => config.nics.push([2, 0, 0, 0, 0, 1]),
            ("disk", file) => {
                config.disks.push(DiskConfig::default());
                disks.push(Shared(Arc::new(Mutex::new(MemoryDisk(std::fs::read(file)?)))));
            }
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    let kernel = std::fs::read(kernel)?;
    let initrd = if initrd == "-" { None } else { Some(std::fs::read(initrd)?) };
    let mut machine = Machine::new(config, boxed(&disks))?;
    machine.boot(&kernel, initrd.as_deref(), cmdline)?;
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
        if machine.position() >= move_at {
            machine = moved(machine, &disks)?;
            move_at = u64::MAX;
        }
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
