//! Builds a demo guest: `build-guest KIND OUTDIR [--backports]` leaves OUTDIR/vmlinuz and OUTDIR/initrd.
//!
//! KIND is `shell` or `redis`.

use std::path::Path;
use std::process::ExitCode;

use twinstep_host::guest::{self, Kind};
use twinstep_host::packages::{KernelLine, Store, tell_on_stderr};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (kind, folder, line) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [kind, folder] => (kind.to_owned(), folder.to_owned(), KernelLine::Stable),
        [kind, folder, "--backports"] => (kind.to_owned(), folder.to_owned(), KernelLine::Backports),
        _ => {
            eprintln!("usage: build-guest shell|redis OUTDIR [--backports]");
            return ExitCode::from(2);
        }
    };
    let built = kind
        .parse::<Kind>()
        .and_then(|kind| guest::build_into(Path::new(&folder), &Store::open()?, kind, line, &mut tell_on_stderr));
    match built {
        Ok((kernel, initrd)) => {
            println!("{}\n{}", kernel.display(), initrd.display());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("build-guest: {e}");
            ExitCode::FAILURE
        }
    }
}
