//! One VM of the pair's benchmark with all that is around it: passt, a switch, and, if it is protected, its standby.
//!
//! *In*: a build of `twinstep`, a rule, the guest. *Out*: jobs done on the guest's console with their times, figures from `twinstep status`, addresses of its Redis and its
//! HTTP server. *Invariant*: what is measured is what everybody uses, as processes of its own; none of them outlives this; a pair that is not protected where it should be is an error,
//! not a figure.
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use twinstep_host::child::{Process, wait_for_switch};
use twinstep_host::error::Context;
use twinstep_host::guest::{self, Network};
use twinstep_host::passt::{self, Forward, Passt};
use twinstep_host::{Error, Result};

/// How long a step may take on a slow, busy machine.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// The guest's port of HTTP.
const HTTP_PORT: u16 = 80;

/// What all VMs share.
pub struct Stage {
    /// A folder of this run, for sockets and arbiters.
    pub folder: PathBuf,
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// The guest.
    pub initrd: PathBuf,
    /// The program of the package cache.
    pub passt: PathBuf,
}

/// One way to run the guest.
#[derive(Debug, Clone)]
pub struct Column {
    /// "unprotected", "received", "matched"; of a second build with "against " before it.
    pub name: String,
    /// Which build.
    pub program: PathBuf,
    /// The output rule; none: the VM is not protected.
    pub rule: Option<&'static str>,
}

/// A VM under way.
pub struct World {
    /// Its Redis.
    pub redis: SocketAddr,
    /// Its HTTP server.
    pub http: SocketAddr,
    /// The VM.
    pub primary: Process,
    /// Its standby.
    pub standby: Option<Process>,
    /// How it is run.
    pub column: Column,
    folder: PathBuf,
    standby_address: String,
    _switch: Process,
    _passt: Passt,
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::new(format!("{} is not UTF-8", path.display())))
}

fn forward(guest: u16) -> Result<Forward> {
    Ok(Forward { host: SocketAddrV4::new(Ipv4Addr::LOCALHOST, passt::free_port()?), guest })
}

impl World {
    /// Boots a guest of so much RAM in a folder called `name`; protected, if the column says so, and ready for jobs.
    pub fn start(stage: &Stage, column: &Column, name: &str, ram_mib: u64) -> Result<Self> {
        let folder = stage.folder.join(name);
        let arbiter = folder.join("arbiter");
        fs::create_dir_all(&arbiter).at("create", &arbiter)?;
        let network = Network::default();
        let (redis, http) = (forward(guest::REDIS_PORT)?, forward(HTTP_PORT)?);
        let forwards = vec![redis, http];
        let passt = passt::start(&passt::Options { program: stage.passt.clone(), forwards, network: network.clone() })?;
        let socket = folder.join("switch");
        let words = ["switch", "--quiet", "--listen", text(&socket)?, "--uplink", text(passt.socket())?];
        let switch = Process::start_program(&column.program, "switch", &words, &[], false)?;
        wait_for_switch(&socket, PATIENCE)?;

        let (standby, standby_address) = match column.rule {
            None => (None, String::new()),
            Some(_) => {
                let (standby, address) = start_standby(&folder, column, "127.0.0.1:0")?;
                (Some(standby), address)
            }
        };
        let (mem, cmdline) = (format!("{ram_mib}M"), guest::command_line("shell", Some(&network)));
        let common = common(&folder)?;
        let mut words = vec!["run", "--name", "db", "--kernel", text(&stage.kernel)?, "--initrd", text(&stage.initrd)?];
        words.extend(["--mem", &mem, "--cmdline", &cmdline]);
        words.extend(common.iter().map(String::as_str));
        if let Some(rule) = column.rule {
            words.extend(["--protect", &standby_address, "--commit", rule]);
        }
        let environment = [("XDG_RUNTIME_DIR", text(&folder)?)];
        let mut primary = Process::start_program(&column.program, &column.name, &words, &environment, true)?;
        if column.rule.is_some() {
            primary.wait_for("protected", PATIENCE)?;
        }
        primary.wait_for_console(guest::READY, PATIENCE)?;
        primary.type_line("exec sh /bench/pair.sh")?;
        primary.wait_for_console("PAIR ready", PATIENCE)?;
        let (redis, http) = (redis.host.into(), http.host.into());
        let column = column.clone();
        Ok(Self { redis, http, primary, standby, column, folder, standby_address, _switch: switch, _passt: passt })
    }

    /// Has the guest do a job, and gives the seconds from the line that asked for it to the line that it is done, and what came of it.
    pub fn job(&mut self, name: &str, size: u64) -> Result<(f64, String)> {
        let (before, end) = (self.primary.console.len(), format!("PAIR end {name} "));
        let begin = Instant::now();
        self.primary.type_line(&format!("{name} {size}"))?;
        self.primary.wait_until(&end, PATIENCE, |process| {
            let (at, line) = process.console.iter().skip(before).find(|(_, line)| line.contains(&end))?;
            Some(((*at - begin).as_secs_f64(), line.trim().to_owned()))
        })
    }

    /// What `twinstep status` says.
    pub fn status(&self) -> Result<Value> {
        let output =
            self.command(&["status", "db", "--json"])?.stderr(Stdio::piped()).output().at("run", &self.column.program)?;
        serde_json::from_slice(&output.stdout).map_err(|e| {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Error::new("twinstep status gives no JSON").because(format!("{e}; it says: {said}"))
        })
    }

    /// A command of the same build by the same user.
    pub fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(&self.column.program);
        command.args(words).env("XDG_RUNTIME_DIR", text(&self.folder)?).stdin(Stdio::null());
        Ok(command)
    }

    /// Fails if the VM is not as well protected as its column says.
    pub fn check(&self) -> Result<()> {
        if self.column.rule.is_none() {
            return Ok(());
        }
        match self.status()?["state"].as_str() {
            Some("protected") => Ok(()),
            state => {
                Err(Error::new(format!("the pair '{}' is {} and not protected", self.column.name, state.unwrap_or("silent")))
                    .next("measure on a machine with less other load"))
            }
        }
    }

    /// Kills the standby, waits until the VM goes on alone, and starts another standby at the same address.
    pub fn next_standby(&mut self) -> Result<()> {
        let alone = self.primary.count("alone");
        if let Some(mut standby) = self.standby.take() {
            standby.kill()?;
        }
        self.primary.wait_for_next("alone", alone, PATIENCE)?;
        let (standby, _) = start_standby(&self.folder, &self.column, &self.standby_address)?;
        self.standby = Some(standby);
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The pair first, so that neither side finds the other gone and says so.
        let _ = self.primary.kill();
        self.standby = None;
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// What both sides are told.
fn common(folder: &Path) -> Result<Vec<String>> {
    let (net, arbiter) = (format!("switch={}", text(&folder.join("switch"))?), folder.join("arbiter"));
    let words = ["--net", &net, "--arbiter", text(&arbiter)?, "--quiet", "--events", "/dev/stderr", "--debug-faults"];
    Ok(words.map(str::to_owned).to_vec())
}

/// A standby and its address.
fn start_standby(folder: &Path, column: &Column, listen: &str) -> Result<(Process, String)> {
    let common = common(folder)?;
    let mut words = vec!["standby", "--listen", listen, "--name", "twin", "--no-input"];
    words.extend(common.iter().map(String::as_str));
    let environment = [("XDG_RUNTIME_DIR", text(folder)?)];
    let mut standby = Process::start_program(&column.program, "standby", &words, &environment, false)?;
    let listening = standby.wait_for("listening", PATIENCE)?;
    let address = listening.figures.get("address").and_then(Value::as_str);
    let address = address.ok_or_else(|| Error::new("the standby does not say where it listens"))?.to_owned();
    Ok((standby, address))
}
