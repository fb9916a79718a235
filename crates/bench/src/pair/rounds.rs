//! Hosts that are lost: primaries killed, given up in good order, asleep and back; standbys that come anew to a busy guest, and bits that flip in them.
//!
//! *In*: how often. *Out*: gaps and pauses; what the client lost. *Invariant*: a client that knows every acknowledged write judges every round; a round it does not end is a problem.
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use twinstep_host::error::Context;
use twinstep_host::events::Event;
use twinstep_host::redis_check::{self, Running};
use twinstep_host::{Error, Result};

use super::Bench;
use super::world::{Column, PATIENCE, World};

/// The load lasts so long before and after what happens.
const LOAD: Duration = Duration::from_millis(1500);
/// A primary that falls asleep sleeps so much longer than it takes the standby to go live.
const ASLEEP: Duration = Duration::from_secs(1);
/// RAM of the busy guest, and of that what is kept and what is written anew, in MiB.
const BUSY: (u64, u64) = (1024, 300);

impl Bench {
    /// All of them.
    pub(super) fn rounds(&mut self) -> Result<()> {
        let plan = self.report.plan.clone();
        for column in self.columns.clone().into_iter().filter(|c| c.rule.is_some()) {
            if plan.has("kills") {
                let kills = if column.name.ends_with("matched") { plan.kills.div_ceil(5) } else { plan.kills };
                self.kills(&column, kills)?;
                self.write()?;
            }
            if plan.has("failover") {
                for n in 0..plan.failovers {
                    self.round(&column, &format!("failover {}/{}", n + 1, plan.failovers), Self::fail_over)?;
                }
                for n in 0..plan.stalls {
                    self.round(&column, &format!("stall {}/{}", n + 1, plan.stalls), Self::stall)?;
                }
                self.write()?;
            }
            if plan.has("copy") {
                self.show(&format!("copy: {}", column.name));
                if let Err(e) = self.copies(&column, plan.copies) {
                    self.report.problems.push(format!("copy, {}: {e}", column.name));
                }
                self.write()?;
            }
        }
        Ok(())
    }

    /// The demo, which kills a primary in each round.
    fn kills(&mut self, column: &Column, kills: u32) -> Result<()> {
        if kills == 0 {
            return Ok(());
        }
        self.show(&format!("{kills} kills: {}", column.name));
        let output = std::process::Command::new(&column.program)
            .args(["demo", "--json", "--kills", &kills.to_string(), "--commit", column.rule.unwrap_or("received")])
            .stdin(Stdio::null())
            .output()
            .at("run", &column.program)?;
        let report: Value = serde_json::from_slice(&output.stdout).map_err(|e| {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Error::new("twinstep demo gives no JSON").because(format!("{e}; it says: {said}"))
        })?;
        for round in report["rounds"].as_array().into_iter().flatten() {
            if let Some(ms) = round["time_line"]["first_reply_ms"].as_f64() {
                self.add("kill", column, ms);
            }
            self.judge(column, "kill", round["failure"].as_str(), round["client"]["reset"].as_bool().unwrap_or(false));
        }
        self.report.kills.push(report);
        Ok(())
    }

    /// Counts a round in which the primary was lost.
    fn judge(&mut self, column: &Column, what: &str, failure: Option<&str>, reset: bool) {
        let one = |so: bool| if so { 1.0 } else { 0.0 };
        self.add("rounds", column, 1.0);
        self.add("lost", column, one(failure.is_some() && !reset));
        self.add("reset", column, one(reset));
        if let Some(failure) = failure {
            self.report.problems.push(format!("{what}, {}: {failure}", column.name));
        }
    }

    /// One VM of its own, used by a client, to which something happens.
    fn round(&mut self, column: &Column, what: &str, happens: fn(&mut Self, &mut World, &Running) -> Result<()>) -> Result<()> {
        self.show(&format!("{what}: {}", column.name));
        let mut world = World::start(&self.stage, column, "round", 256)?;
        let client = Running::start(redis_check::Options { pipeline: 1, ..redis_check::Options::new(world.redis) })?;
        std::thread::sleep(LOAD);
        let happened = happens(self, &mut world, &client);
        std::thread::sleep(LOAD);
        let seen = client.finish()?;
        let failure = seen.failure.clone().or(happened.err().map(|e| e.to_string()));
        self.judge(column, what, failure.as_deref(), seen.reset);
        // Both live: the one has won the epoch, and the other goes on as well.
        let split = world.primary.count("alone") > 0;
        self.add("split", column, if split { 1.0 } else { 0.0 });
        if let (true, None, Some(gap)) = (what.starts_with("failover"), failure, seen.interruptions.first()) {
            self.add("failover", column, gap.longest_gap_ms);
        }
        Ok(())
    }

    /// The VM is given to its standby.
    fn fail_over(&mut self, world: &mut World, client: &Running) -> Result<()> {
        client.mark(Instant::now());
        let output = world.command(&["failover", "db"])?.output().at("run", &world.column.program)?;
        if !output.status.success() {
            return Err(Error::new("twinstep failover failed").because(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        world.primary.wait_end(PATIENCE)
    }

    /// The primary falls asleep; when it comes back it must find that it is not wanted any more.
    fn stall(&mut self, world: &mut World, client: &Running) -> Result<()> {
        client.mark(Instant::now());
        world.primary.stall(true);
        let standby = world.standby.as_mut().ok_or_else(|| Error::new("there is no standby"))?;
        standby.wait_for("live", PATIENCE)?;
        std::thread::sleep(ASLEEP);
        world.primary.stall(false);
        world.primary.wait_end(PATIENCE)
    }

    /// A busy guest gets its standbys, and bits flip in them.
    fn copies(&mut self, column: &Column, (copies, flips): (usize, usize)) -> Result<()> {
        let (ram, size) = BUSY;
        let mut world = World::start(&self.stage, column, "busy", ram)?;
        world.primary.type_line(&format!("busy {size}"))?;
        world.primary.wait_for_console("PAIR pass 2 ", PATIENCE)?;
        for _ in 0..copies {
            let protected = world.primary.count("protected");
            world.next_standby()?;
            world.primary.wait_for_next("protected", protected, PATIENCE)?;
            let image = world.primary.event_last("image").cloned();
            let image = image.ok_or_else(|| Error::new("the primary says nothing of the copy"))?;
            self.add("copy", column, figure(&image, "pause_ns")? / 1e6);
            for _ in 0..flips {
                let resynced = world.primary.count("resynced");
                let flip = ["debug", "flip-bit", "twin", "--filled", "ABCDEFG\\n", "--bit", "2"];
                let output = world.command(&flip)?.output().at("run", &column.program)?;
                if !output.status.success() {
                    let why = String::from_utf8_lossy(&output.stderr).into_owned();
                    return Err(Error::new("no bit can be flipped in the standby").because(why));
                }
                let event = world.primary.wait_for_next("resynced", resynced, PATIENCE)?;
                self.add("resync", column, figure(&event, "pause_ns")? / 1e6);
                // A build of before does not say it: its guest stood still all the time.
                let total_ns = figure(&event, "total_ns").or_else(|_| figure(&event, "pause_ns"))?;
                self.add("resynctotal", column, total_ns / 1e6);
                let delta = world.primary.event_last("delta").cloned();
                self.add("resyncpages", column, delta.map_or(Ok(0.0), |delta| figure(&delta, "pages"))?);
            }
        }
        // Whatever flipped, nobody has seen a wrong sum.
        let sums: Vec<&str> =
            world.primary.console.iter().filter_map(|(_, line)| line.split("PAIR pass ").nth(1)?.split(' ').nth(1)).collect();
        match sums.iter().find(|sum| **sum != sums[0]) {
            None => Ok(()),
            Some(wrong) => Err(Error::new(format!("the guest showed the sum {wrong} where {} is right", sums[0]))),
        }
    }
}

/// A figure of an event.
fn figure(event: &Event, name: &str) -> Result<f64> {
    let value = event.figures.get(name).and_then(Value::as_f64);
    value.ok_or_else(|| Error::new(format!("the event '{}' has no figure {name}", event.what)))
}
