//! `twinstep debug`: breaks things on purpose, to see what happens then.
use std::process::ExitCode;

use clap::{Args, Subcommand};
use twinstep_host::control::client::Connection;
use twinstep_host::control::folder;
use twinstep_machine::faults::{Bit, Fill};

#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Flips a bit of a running VM's memory or of a register of its processor, as bad hardware would: nothing that watches for writes notices
    FlipBit(FlipBit),
}

#[derive(Args)]
#[command(group = clap::ArgGroup::new("place").required(true))]
struct FlipBit {
    /// The VM's name; it must have been started with --debug-faults
    vm: String,
    /// The byte at this guest-physical address (0x... is hexadecimal)
    #[arg(long, value_name = "ADDRESS", group = "place", value_parser = number)]
    address: Option<u64>,
    /// A byte of pages that hold nothing but repetitions of this text (\n is the end of a line): what a program in the guest has written
    #[arg(long, value_name = "TEXT", group = "place", value_parser = fill)]
    filled: Option<Fill>,
    /// In so many of those pages, spread evenly over all of them
    #[arg(long, value_name = "N", default_value_t = 1, requires = "filled")]
    count: u16,
    /// The register: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15
    #[arg(long, value_name = "NAME", group = "place", value_parser = register)]
    register: Option<u8>,
    /// The bit, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    bit: u8,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("'{text}' is no address"))
}

fn fill(text: &str) -> Result<Fill, String> {
    let text = text.replace("\\n", "\n");
    Fill::new(text.as_bytes()).ok_or_else(|| format!("a text of 1 to {} bytes is wanted", Fill::MAX))
}

fn register(text: &str) -> Result<u8, String> {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let found = NAMES.iter().position(|name| *name == text);
    found.map(|n| n as u8).ok_or_else(|| format!("'{text}' is none of {}", NAMES.join(", ")))
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Command::FlipBit(flip) = arguments.command;
    let bit = match (flip.address, flip.register, flip.filled) {
        (Some(address), ..) => Bit::Ram(address, flip.bit),
        (_, Some(register), _) => Bit::Register(register, flip.bit),
        (.., Some(fill)) => Bit::Filled(fill, flip.count, flip.bit),
        (None, None, None) => unreachable!("one of them is required"),
    };
    let flipped = Connection::open(&folder::of_this_user(), &flip.vm)?.flip(bit)?;
    println!("flipped at position {}", flipped.position);
    Ok(ExitCode::SUCCESS)
}
