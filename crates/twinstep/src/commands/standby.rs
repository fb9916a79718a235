//! `twinstep standby`.
use std::net::{TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use twinstep_host::arbiter::Registration;
use twinstep_host::channel::{self, Security};
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
    /// Where to take heartbeats beside the channel (UDP): best an address in another network than --listen's, so that a cut channel is told from a dead host
    /// [default: the address of --listen]
    #[arg(long, value_name = "ADDRESS")]
    heartbeat: Option<String>,
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
    /// Say at the arbiter, which is etcd then, that this standby waits, and that primaries reach it at this host (with the port of --listen) or
    /// address: they find it with `run --protect registered`
    #[arg(long, value_name = "HOST[:PORT]")]
    register: Option<String>,
    /// Keep in this folder the last state that both sides had, and when they make different outputs, a recording of what led to it, with which
    /// `twinstep vote` on a third host says which side is right. Takes the guest's RAM there once, and once more for each of at most four recordings, with what
    /// the guest has read and written of its disks (at most 256 MiB)
    #[arg(long, value_name = "DIR")]
    record_window: Option<PathBuf>,
    #[command(flatten)]
    pair: super::run::PairArguments,
    #[command(flatten)]
    visibility: super::run::Visibility,
}

/// Where heartbeats beside the channel come: where it was said, or else where the channel does, if that can be had.
fn open_for_heartbeats(
    wanted: Option<&str>,
    listening: &str,
    security: &Security,
    events: &Events,
) -> anyhow::Result<Option<Arc<UdpSocket>>> {
    match (wanted, UdpSocket::bind(wanted.unwrap_or(listening))) {
        (_, Ok(socket)) => {
            security.allows(socket.local_addr()?.ip())?;
            Ok(Some(Arc::new(socket)))
        }
        (Some(place), Err(e)) => Err(e).with_context(|| {
            format!("cannot take heartbeats at {place} (--heartbeat: an address of this host, and a free port)")
        }),
        (None, Err(e)) => {
            events.say("no-heartbeats", format!("no heartbeats beside the channel: cannot open {listening} for UDP: {e}"));
            Ok(None)
        }
    }
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
    let registration = match &arguments.register {
        None => None,
        Some(place) => {
            let place = if place.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
                place.clone()
            } else {
                format!("{place}:{}", address.port())
            };
            Some(Registration::start(arbiter.registry()?, place, events.clone())?)
        }
    };
    let address = address.to_string();
    let beat_socket = open_for_heartbeats(arguments.heartbeat.as_deref(), &address, &security, &events)?;
    let beats = beat_socket.as_ref().map(|socket| socket.local_addr()).transpose()?;
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
        if let Some(registration) = &registration {
            registration.waits(true);
        }
        let stream = channel::accept(&listener, &security, &events)?;
        if let Some(registration) = &registration {
            registration.waits(false);
        }
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
                beats: beats.map(|address| address.to_string()),
            },
            stream,
            beat_socket: beat_socket.clone(),
            arbiter: opened,
            disks: spec.disk.clone(),
            force_stale_disk: arguments.pair.force_stale_disk,
            cables: spec.net.len(),
            events: events.clone(),
            signals: signals.clone(),
            control: control.clone(),
            tune: |_| {},
            record_window: arguments.record_window.clone(),
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
