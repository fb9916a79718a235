//! `twinstep failover`.
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use twinstep_host::control::client::Connection;
use twinstep_host::control::folder;

#[derive(Args)]
pub struct Arguments {
    /// The primary's name (`run --name`); not needed if only one VM runs here
    vm: Option<String>,
}

/// How long the other host may take. It needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let folder = folder::of_this_user();
    let mut connection = Connection::open_named(&folder, arguments.vm.as_deref())?;
    let name = connection.identify()?.name;
    let before = connection.status()?.state;
    if before != "protected" {
        bail!("the VM '{name}' has no standby that could take over: it is {before}");
    }
    connection.fail_over()?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        // Its process ends when the standby has taken over.
        let Ok(status) = connection.status() else {
            println!("the standby runs '{name}' now");
            return Ok(ExitCode::SUCCESS);
        };
        match status.state.as_str() {
            "unprotected" => bail!("the standby was lost before it took over; '{name}' goes on here, unprotected"),
            "stopped" => {
                println!("the standby runs '{name}' now");
                return Ok(ExitCode::SUCCESS);
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    bail!(
        "the standby of '{name}' has not taken over within {} s; `twinstep status {name}` tells how it stands",
        PATIENCE.as_secs()
    );
}
