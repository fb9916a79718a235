//! A switch on its own: `switch LISTEN [UPLINK...]`.

use std::process::ExitCode;

use twinstep_host::switch::{Options, Switch};

fn main() -> ExitCode {
    let mut paths = std::env::args_os().skip(1).map(std::path::PathBuf::from);
    let Some(listen) = paths.next() else {
        eprintln!("usage: switch LISTEN [UPLINK...]");
        return ExitCode::from(2);
    };
    let options = Options { listen, uplinks: paths.collect(), ..Options::default() };
    match Switch::bind(options).and_then(|switch| switch.run(&mut |event| eprintln!("{event:?}"))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("switch: {e}");
            ExitCode::FAILURE
        }
    }
}
