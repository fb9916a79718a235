//! `twinstep standby`.
use std::net::TcpListener;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use twinstep_host::channel;
use twinstep_host::control::Control;
use twinstep_host::events::Events;
use twinstep_host::identity;
use twinstep_host::metrics;
use twinstep_host::signals::Signals;
use twinstep_host::vm::session::{self, RunOptions};
use twinstep_host::vm::standby::{self, Outcome, StandbyWiring};
use twinstep_pair::{Expectation, OwnerId, SecondarySetup, wire};

#[derive(Args)]
#[command(mut_arg("arbiter", |arg| arg.required(true)))]
pub struct Arguments {
    /// Where to wait for the primary, such as 0.0.0.0:7171
    #[arg(long, value_name = "ADDRESS")]
    listen: String,
    #[command(flatten)]
    channel: super::channel::ChannelArguments,
    /// With TLS: a name or address that the primary's certificate must be for [default: any that the authority vouches for] (several times: one of them)
    #[arg(long, value_name = "NAME")]
    expect_peer: Vec<String>,
    /// The name of a VM that may be protected here [default: any] (several times: one of them)
    #[arg(long, value_name = "NAME", value_parser = vm_name)]
    expect_vm: Vec<String>,
    #[command(flatten)]
    arbiter: super::arbiter::ArbiterArguments,
    /// Where the guest's network cards and disks are on this host, and what is expected of the VM (--mem, --cpu); the kernel comes
    /// from the primary
    #[command(flatten)]
    machine: super::run::MachineArguments,
    /// Once live, protect with a standby at one of these addresses [default: those that the primary names, which are its own other ones]
    #[arg(long, value_name = "ADDRESS,...", value_delimiter = ',')]
    protect: Vec<String>,
    /// The VM's name for `twinstep status` and others [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// End when a primary was refused, or was lost without this standby going live, instead of waiting for the next one
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    pair: super::run::PairArguments,
    #[command(flatten)]
    visibility: super::run::Visibility,
}

fn vm_name(name: &str) -> Result<String, String> {
    if wire::is_name(name) { Ok(name.to_owned()) } else { Err("no VM can have this name".into()) }
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let spec = arguments.machine.spec(None)?;
    let arbiter = arguments.arbiter.spec()?.context("a standby needs an arbiter: give --arbiter")?;
    let security = arguments.channel.options(None).open(&arguments.expect_peer)?;
    let cpu_model = session::cpu_model(&spec)?;
    let signals = Signals::take()?;
    let v = arguments.visibility;
    let events = Events::new("standby", v.quiet, v.events.as_deref())?;
    let control = Control::open(arguments.name.as_deref(), "standby", &events)?;
    if let Some(address) = &v.metrics {
        metrics::serve(address, control.inquiry(), &events)?;
    }
    if arguments.pair.debug_faults {
        control.allow_faults();
    }
    let listen = |address: &str| {
        TcpListener::bind(address)
            .with_context(|| format!("cannot listen on {address} (is another standby there? choose another port with --listen)"))
    };
    let taps = session::Taps::open(&spec)?;
    let mut listener = listen(&arguments.listen)?;
    // The same for every primary, also if the system has chosen it.
    let address = listener.local_addr()?;
    security.allows(address.ip())?;
    let address = address.to_string();
    let options = RunOptions {
        no_input: v.no_input,
        serial: v.serial,
        protect: arguments.protect,
        security: security.clone(),
        arbiter: Some(arbiter.clone()),
        pair: arguments.pair.config(),
        ..RunOptions::default()
    };
    loop {
        control.no_machine("this standby waits for a primary");
        let opened = session::open_arbiter(&arbiter, &control, &events)?;
        let figures = serde_json::Map::from_iter([("address".to_owned(), address.clone().into())]);
        events.say_with("listening", format!("waiting for a primary on {address}"), figures);
        let stream = channel::accept(&listener, &security, &events)?;
        // Another primary is told at once that nobody waits for it here.
        drop(listener);
        let outcome = standby::serve(StandbyWiring {
            setup: SecondarySetup {
                config: arguments.pair.config(),
                expect: Expectation {
                    vm: None,
                    names: arguments.expect_vm.clone(),
                    cpu_model: cpu_model.clone(),
                    ram_bytes: spec.mem.map(|m| u64::from(m.0) << 20),
                },
                host: identity::host(),
                // Another one for each primary: what this process had won for one VM is not another's.
                owner: OwnerId(identity::random_id()),
            },
            stream,
            arbiter: opened,
            disks: spec.disk.clone(),
            force_stale_disk: arguments.pair.force_stale_disk,
            cables: spec.net.len(),
            events: events.clone(),
            signals: signals.clone(),
            control: control.clone(),
            tune: |_| {},
        })?;
        let reason = match outcome {
            Outcome::Live(live) => {
                let session = session::run_live(*live, &spec, &options, &events, &signals, &control, taps)?;
                return Ok(super::run::exit_code(&session.end));
            }
            Outcome::Stopped(reason) => reason,
        };
        use twinstep_pair::StopReason::*;
        match reason {
            // The primary ended in good order: nothing was to be done here.
            PeerEnded { .. } => return Ok(ExitCode::SUCCESS),
            Ended { .. } => return Ok(ExitCode::from(5)),
            // The VM is over, for people to look at.
            Mismatch { .. } => return Ok(ExitCode::FAILURE),
            LostArbitration { .. } | NotProtected { .. } | Refused { .. } | HandedOver { .. } if arguments.once => {
                return Ok(ExitCode::FAILURE);
            }
            LostArbitration { .. } | NotProtected { .. } | Refused { .. } | HandedOver { .. } => {}
        }
        signals.listen_no_more();
        control.board().waits_again();
        listener = listen(&address)?;
    }
}
