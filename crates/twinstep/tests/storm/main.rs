//! Hosts as network namespaces, with TAP devices on bridges, under faults at random moments: a VM that lives on one host after the other, while a client counts.
//!
//! One guest, one Redis connection, and files that come and go, through all rounds. Each round begins with a VM that is protected, does one thing to its hosts
//! (`plan.rs`), undoes it, starts anew what has ended, and waits until the VM is protected again. Then all that was ever acknowledged must be there, and nobody may have answered for
//! the guest but the host that had gone live.
//!
//! `TWINSTEP_ROUNDS` says how many rounds, `TWINSTEP_SEED` which ones, `TWINSTEP_FIRST` from which on. With `TWINSTEP_ROUNDS=100` and `-- --nocapture` one sees them go by.
#[path = "../common/mod.rs"]
mod common;

mod client;
mod court;
mod hosts;
mod namespaces;
mod plan;
mod street;
mod sys;
mod watch;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Image, PATIENCE, folder, redis_guest, text, turn, twinstep};
use rustix::process::Signal;

use client::Client;
use court::Court;
use hosts::{Host, Part};
use plan::{Fault, Round, Side};
use watch::Watch;

/// Rounds of a usual run of the tests, with either arbiter.
const ROUNDS: std::ops::Range<u64> = 0..4;
const ROUNDS_WITH_ETCD: std::ops::Range<u64> = 4..6;
/// Chosen so that these are of different kinds: stopped, full disk, one way cut, killed twice; cut with and from the arbiter.
const SEED: u64 = 1_235_508;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

#[test]
fn a_vm_survives_a_storm_with_a_directory_for_an_arbiter() {
    let _turn = turn(2);
    let test = "a_vm_survives_a_storm_with_a_directory_for_an_arbiter";
    namespaces::inside(test, || _ = redis_guest(), || storm(ROUNDS, Court::directory));
}

#[test]
fn a_vm_survives_a_storm_with_etcd_for_an_arbiter() {
    let _turn = turn(2);
    let Some(etcd) = court::etcd() else { return };
    let test = "a_vm_survives_a_storm_with_etcd_for_an_arbiter";
    namespaces::inside(test, || _ = redis_guest(), || storm(ROUNDS_WITH_ETCD, |folder| Court::etcd(&etcd, folder)));
}

fn storm(rounds: std::ops::Range<u64>, court: impl Fn(&Path) -> Court) {
    let (seed, first) = (setting("TWINSTEP_SEED", SEED), setting("TWINSTEP_FIRST", rounds.start));
    let folder = folder();
    let mut storm = Storm::begin(folder.path(), court, redis_guest());
    for number in first..first + setting("TWINSTEP_ROUNDS", rounds.end - rounds.start) {
        let round = plan::round(seed, number);
        match storm.round(round) {
            Ok(story) => println!("round {number}: {round}: {story}"),
            Err(why) => panic!(
                "round {number}: {round}: {why}\nagain: TWINSTEP_SEED={seed} TWINSTEP_FIRST={number} TWINSTEP_ROUNDS=1\n{}",
                storm.last_words()
            ),
        }
    }
    storm.end();
}

/// All of it.
struct Storm<'a> {
    folder: &'a Path,
    court: Court,
    hosts: Vec<Host>,
    watch: Watch,
    client: Option<Client>,
}

type Outcome<T> = Result<T, String>;

impl<'a> Storm<'a> {
    /// A protected VM with a client.
    fn begin(folder: &'a Path, court: impl Fn(&Path) -> Court, image: &Image) -> Self {
        street::build();
        let pki = folder.join("pki");
        twinstep(&["pki", "init", &text(&pki)]).with(0);
        for host in 0..street::HOSTS {
            twinstep(&["pki", "issue", &text(&pki), &street::namespace(host), "--address", &street::address(host)]).with(0);
        }
        let hosts = (0..street::HOSTS).map(|number| Host::new(number, folder)).collect();
        let mut storm = Self { folder, court: court(folder), hosts, watch: Watch::start(), client: None };
        for host in &mut storm.hosts[1..] {
            host.stand_by(folder, &storm.court);
        }
        storm
            .until("standbys that wait", |storm| (1..street::HOSTS).all(|host| storm.part(host) == Some(Part::Waits)))
            .expect("they start");
        let first = &mut storm.hosts[0];
        first.power_on(folder, &storm.court, image);
        first.wait_console("# ");
        first.type_line(client::SET_UP);
        first.wait_console(client::IS_SET_UP);
        storm.settle().unwrap_or_else(|why| panic!("{why}\n{}", storm.last_words()));
        storm.client = Some(Client::start());
        storm
    }

    fn client(&self) -> &Client {
        self.client.as_ref().expect("until the end there is one")
    }

    fn part(&mut self, host: usize) -> Option<Part> {
        self.hosts[host].part()
    }

    /// The host with this part.
    fn who(&mut self, part: Part) -> Option<usize> {
        (0..self.hosts.len()).find(|host| self.part(*host) == Some(part))
    }

    /// Waits until it is so.
    fn until(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) -> Outcome<()> {
        let begun = Instant::now();
        while !so(self) {
            if begun.elapsed() > PATIENCE {
                return Err(format!("it does not come to {what}"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// All epochs in which anybody said that it goes on. No two may have said the same.
    fn epoch(&mut self) -> Outcome<u64> {
        let mut epochs: Vec<u64> = self.hosts.iter_mut().flat_map(Host::epochs).collect();
        epochs.sort_unstable();
        match epochs.windows(2).find(|two| two[0] == two[1]) {
            Some(two) => Err(format!("two sides went on in epoch {}", two[0])),
            None => Ok(epochs.last().copied().unwrap_or(1)),
        }
    }

    /// Waits until the VM is protected and the third host waits; what has ended is started anew, as a standby. It says how processes have ended.
    fn settle(&mut self) -> Outcome<String> {
        let mut ended = String::new();
        self.until("a VM that is protected, with a third host that waits", |storm| {
            for host in 0..storm.hosts.len() {
                if storm.hosts[host].has_ended().is_some() {
                    let status = storm.hosts[host].bury().map_or("killed".to_owned(), |status| status.to_string());
                    ended += &format!(", h{host} ended: {status}");
                    storm.hosts[host].stand_by(storm.folder, &storm.court);
                }
            }
            [Part::Protected, Part::Guards, Part::Waits].into_iter().all(|part| storm.who(part).is_some())
        })?;
        Ok(ended)
    }

    /// Waits until somebody goes on in a later epoch, and says who.
    fn gone_on(&mut self, before: u64) -> Outcome<usize> {
        self.until("a side that goes on", |storm| storm.epoch().map_or(true, |epoch| epoch > before))?;
        let epoch = self.epoch()?;
        Ok((0..self.hosts.len()).find(|host| self.hosts[*host].epochs().contains(&epoch)).expect("one has said it"))
    }

    /// Waits until this host has found that the epoch is another's.
    fn fenced(&mut self, host: usize, before: usize) -> Outcome<()> {
        self.until(&format!("h{host} finding itself fenced"), |storm| storm.hosts[host].fenced() > before)
    }

    /// One round: what happened in it.
    fn round(&mut self, round: Round) -> Outcome<String> {
        let begun = Instant::now();
        let sides = [Part::Protected, Part::Guards, Part::Waits].map(|part| self.who(part));
        let [Some(primary), Some(standby), Some(third)] = sides else { return Err("the VM is not protected any more".into()) };
        let (late, before) = (self.watch.seen().late, (self.client().replies(), self.client().transfers()));
        std::thread::sleep(round.after);
        let what = self.strike(round, primary, standby, third)?;
        let ended = self.settle()?;
        let protected = begun.elapsed();
        self.epoch()?;
        self.client().check()?;
        // Somebody speaks for the guest.
        let answers = self.watch.seen().answers;
        self.until("an answer to ARP", |storm| storm.watch.seen().answers > answers)?;
        let seen = self.watch.seen();
        if let Some(wrong) = seen.wrong.first() {
            return Err(format!("two live machines: {wrong}"));
        }
        let (replies, files) = (self.client().replies() - before.0, self.client().transfers() - before.1);
        Ok(format!(
            "h{primary} was protected by h{standby}, {what}{ended}; protected again after {:.1} s, all in {:.1} s; {replies} replies, {files} files, {} late frames",
            protected.as_secs_f64(),
            begun.elapsed().as_secs_f64(),
            seen.late - late
        ))
    }

    /// Does it, and undoes what can be undone.
    fn strike(&mut self, round: Round, primary: usize, standby: usize, third: usize) -> Outcome<String> {
        let epoch = self.epoch()?;
        let lasts = || std::thread::sleep(round.lasts);
        let of = |side| if side == Side::Primary { (primary, standby) } else { (standby, primary) };
        let link = |open: bool| {
            street::way(primary, standby, open);
            street::way(standby, primary, open);
        };
        let is = |wanted: usize, who: usize| {
            if wanted == who { Ok(format!("h{who} went on")) } else { Err(format!("h{who} went on, and not h{wanted}")) }
        };
        match round.fault {
            Fault::Kill(side) => {
                let (victim, other) = of(side);
                self.hosts[victim].signal(Signal::KILL);
                is(other, self.gone_on(epoch)?)
            }
            Fault::KillTwice => {
                self.hosts[primary].signal(Signal::KILL);
                let story = is(standby, self.gone_on(epoch)?)?;
                self.until("a copy to the third host", |storm| storm.part(third) == Some(Part::Follows))?;
                lasts();
                // It may be done with it already, or just so; then it is lost like any standby.
                self.hosts[third].signal(Signal::KILL);
                Ok(story)
            }
            Fault::Nap(side) => {
                let (victim, _) = of(side);
                self.hosts[victim].signal(Signal::STOP);
                lasts();
                self.hosts[victim].signal(Signal::CONT);
                Ok(format!("h{victim} napped"))
            }
            Fault::Stop(side) => {
                let (victim, other) = of(side);
                let fenced = self.hosts[victim].fenced();
                self.hosts[victim].signal(Signal::STOP);
                let story = is(other, self.gone_on(epoch)?)?;
                lasts();
                self.hosts[victim].signal(Signal::CONT);
                self.fenced(victim, fenced)?;
                Ok(story)
            }
            Fault::CutLink | Fault::CutFrom(_) => {
                let fenced = [primary, standby].map(|host| self.hosts[host].fenced());
                match round.fault {
                    Fault::CutFrom(side) => street::way(of(side).0, of(side).1, false),
                    _ => link(false),
                }
                let winner = self.gone_on(epoch)?;
                let (loser, before) = if winner == primary { (standby, fenced[1]) } else { (primary, fenced[0]) };
                // It reaches the arbiter.
                self.fenced(loser, before)?;
                lasts();
                link(true);
                // Both hear at the same time that the other is alive, and the primary has less patience. Of a link that is cut one way, they learn at different times.
                if round.fault == Fault::CutLink { is(primary, winner) } else { Ok(format!("h{winner} went on")) }
            }
            Fault::CutArbiter => {
                (0..self.hosts.len()).for_each(|host| self.court.open(host, false));
                lasts();
                (0..self.hosts.len()).for_each(|host| self.court.open(host, true));
                Ok("nobody noticed".into())
            }
            Fault::CutLinkAndArbiter => {
                let fenced = [primary, standby].map(|host| self.hosts[host].fenced());
                let unheard = [primary, standby].map(|host| self.hosts[host].unheard());
                [primary, standby].into_iter().for_each(|host| self.court.open(host, false));
                link(false);
                self.until("two sides that ask in vain", |storm| {
                    storm.hosts[primary].unheard() > unheard[0] && storm.hosts[standby].unheard() > unheard[1]
                })?;
                lasts();
                if self.epoch()? != epoch {
                    return Err("somebody went on without the arbiter".into());
                }
                [primary, standby].into_iter().for_each(|host| self.court.open(host, true));
                let winner = self.gone_on(epoch)?;
                let (loser, before) = if winner == primary { (standby, fenced[1]) } else { (primary, fenced[0]) };
                self.fenced(loser, before)?;
                link(true);
                Ok(format!("both stood still, then h{winner} went on"))
            }
            Fault::CutLinkAndArbiterOf(side) => {
                let (victim, other) = of(side);
                let fenced = self.hosts[victim].fenced();
                self.court.open(victim, false);
                link(false);
                let story = is(other, self.gone_on(epoch)?)?;
                lasts();
                self.court.open(victim, true);
                self.fenced(victim, fenced)?;
                link(true);
                Ok(story)
            }
            Fault::Isolate(side) => {
                let (victim, other) = of(side);
                let fenced = self.hosts[victim].fenced();
                self.court.open(victim, false);
                street::cables(victim, false);
                let story = is(other, self.gone_on(epoch)?)?;
                lasts();
                street::cables(victim, true);
                self.court.open(victim, true);
                self.fenced(victim, fenced)?;
                Ok(story)
            }
            Fault::FillDisk(side) => {
                let (victim, other) = of(side);
                self.client().grow(true);
                self.hosts[victim].fill(true);
                self.until("the end of the host without room", |storm| storm.hosts[victim].has_ended().is_some())?;
                if self.hosts[victim].has_ended() != Some(Some(1)) {
                    return Err(format!("h{victim} ended with {:?}", self.hosts[victim].has_ended()));
                }
                self.until("the other side going on", |storm| {
                    matches!(storm.part(other), Some(Part::Alone | Part::Protected)) || storm.has_lost_it()
                })?;
                self.client().grow(false);
                self.hosts[victim].fill(false);
                Ok(format!("h{other} went on"))
            }
            Fault::HandOver => {
                if !self.hosts[primary].hand_over() {
                    return Err("it was not handed over".into());
                }
                let story = is(standby, self.gone_on(epoch)?)?;
                self.until("the end of its process", |storm| storm.hosts[primary].has_ended().is_some())?;
                Ok(story)
            }
        }
    }

    /// Nobody has the VM, or could have it.
    fn has_lost_it(&mut self) -> bool {
        (0..self.hosts.len()).all(|host| matches!(self.part(host), None | Some(Part::Waits | Part::Stopped | Part::Begins)))
    }

    fn last_words(&mut self) -> String {
        self.hosts.iter_mut().map(Host::last_words).collect()
    }

    /// The client is content, and the guest ends in good order.
    fn end(mut self) {
        let report =
            self.client.take().expect("it is there").finish().unwrap_or_else(|why| panic!("{why}\n{}", self.last_words()));
        let (moves, answers, late) = {
            let seen = self.watch.seen();
            (seen.moves, seen.answers, seen.late)
        };
        println!(
            "one connection: {} replies, {} keys verified at the end, longest gap {:.0} ms; {moves} announcements, {answers} answers to ARP, {late} late frames",
            report.replies, report.keys_verified, report.longest_gap_ms,
        );
        let [primary, standby] = [Part::Protected, Part::Guards].map(|part| self.who(part).expect("it is protected"));
        self.hosts[primary].type_line("poweroff -f");
        let both = [primary, standby];
        self.until("the guest's end", |storm| both.iter().all(|host| storm.hosts[*host].has_ended().is_some())).expect("it ends");
        let images = both.map(|host| std::fs::read(self.hosts[host].image()).expect("an image"));
        assert!(images[0] == images[1], "the images are equal when the guest has ended");
        assert_eq!(both.map(|host| self.hosts[host].bury()), [Some(0); 2], "{}", self.last_words());
    }
}
