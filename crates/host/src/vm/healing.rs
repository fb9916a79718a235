//! Finds standbys for a VM that has none: drives [`twinstep_pair::Healer`], and makes connections on a thread of its own.
//!
//! *In*: where the primary stands; what became of attempts. *Out*: connections, and word for people. *Invariant*: the thread that drives the
//! primary never waits for a connection to be made, and one attempt is under way at a time.

use serde_json::{Map, json};
use twinstep_pair::wire::MAX_STANDBYS;
use twinstep_pair::{Healer, Nanos, PrimaryState, Setback};

use super::turns::Post;
use crate::channel::{Channel, REGISTERED, Reach, Reached, patience};
use crate::error::{Error, Result};
use crate::events::{Events, now_ns};

/// What looks for standbys.
pub struct Standbys {
    /// Which, and in which order.
    pub healer: Healer,
    /// How they are reached.
    pub reach: Reach,
    /// Where the one is that is connected already.
    pub at: Option<String>,
}

/// At work, for a thread that is told of attempts by messages `M`.
pub(super) struct Healing<M> {
    healer: Healer,
    reach: Reach,
    /// Where the one is that was connected last.
    at: Option<String>,
    to: Post<M>,
    reached: fn(Result<Reached>) -> M,
    events: Events,
}

impl<M: Send + 'static> Healing<M> {
    pub(super) fn new(standbys: Standbys, to: Post<M>, reached: fn(Result<Reached>) -> M, events: Events) -> Self {
        let Standbys { healer, reach, at } = standbys;
        Self { healer, reach, at, to, reached, events }
    }

    /// The standby that was connected does not fit.
    pub(super) fn refused(&mut self) {
        let setback = self.healer.refused(Nanos(now_ns()));
        self.say(setback, None);
    }

    /// Takes in where the primary stands, and tries the next standby if one is wanted and it is time.
    pub(super) fn follow(&mut self, state: PrimaryState) {
        let now = Nanos(now_ns());
        let setback = self.healer.follow(now, state);
        self.say(setback, None);
        let Some(standby) = self.healer.poll(now) else { return };
        let (reach, to, reached) = (self.reach.clone(), self.to.clone(), self.reached);
        let (place, patience) = (self.place(standby), patience(self.healer.failures(standby)));
        // A thread that is left over when the VM has ended ends with the process.
        let started = std::thread::Builder::new().name("connect".into()).spawn(move || {
            let _ = to.send(reached(reach.reach(&place, patience)));
        });
        if let Err(e) = started {
            let _ = self.to.send((self.reached)(Err(Error::new("cannot start a thread").because(e))));
        }
    }

    /// What became of the attempt: the connection, and what the standby is told of the others.
    pub(super) fn reached(&mut self, result: Result<Reached>) -> Option<(Channel, Vec<String>)> {
        match result {
            Ok((stream, address)) => {
                self.healer.connected();
                let standby = self.healer.standby()?;
                let figures = Map::from_iter([("standby".to_owned(), json!(address))]);
                self.events.say_with("reached", format!("the standby at {address} is reached"), figures);
                self.at = Some(address);
                Some((stream, self.told(standby)))
            }
            Err(e) => {
                let setback = self.healer.not_reached(Nanos(now_ns()));
                self.say(setback, Some(&e));
                None
            }
        }
    }

    /// What the standby that is connected is told of the others.
    pub(super) fn greeting(&self) -> Vec<String> {
        self.healer.standby().map_or(Vec::new(), |standby| self.told(standby))
    }

    /// What a standby is told: itself first. One that was found among those registered is told where it was found, and to look there itself.
    fn told(&self, standby: usize) -> Vec<String> {
        let mut places = self.healer.greeting(standby);
        if let (REGISTERED, Some(at)) = (self.place(standby).as_str(), &self.at) {
            places.insert(0, at.clone());
            places.truncate(MAX_STANDBYS);
        }
        places
    }

    /// When to follow again, if nothing else happens.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        self.healer.deadline()
    }

    fn place(&self, standby: usize) -> String {
        self.healer.places().nth(standby).unwrap_or_default().to_owned()
    }

    /// Tells people of a standby that is of no use, seldom if it stays so.
    fn say(&self, setback: Option<Setback>, why: Option<&Error>) {
        let Some(Setback { standby, failures, not_before }) = setback else { return };
        if !failures.is_power_of_two() {
            return;
        }
        let place = match self.place(standby) {
            registered if registered == REGISTERED => "one of the registered places".to_owned(),
            place => place,
        };
        let pause_ns = not_before.since(Nanos(now_ns())).0;
        let figures = Map::from_iter([
            ("standby".to_owned(), json!(place)),
            ("failures".to_owned(), json!(failures)),
            ("pause_ns".to_owned(), json!(pause_ns)),
        ]);
        let why = why.map_or(String::new(), |why| format!(" ({why})"));
        let text =
            format!("the standby at {place} does not protect the VM{why}; it is tried again in {:.1} s", pause_ns as f64 / 1e9);
        self.events.say_with("no-standby", text, figures);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};

    use super::*;
    use crate::channel::{CONNECT_PATIENCE, Security};

    /// A host that died: whoever connects gets no answer at all. Lives as long as what it gives.
    fn silent() -> (String, impl Sized) {
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&listener, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        listen(&listener, 0).unwrap();
        let address: std::net::SocketAddr = getsockname(&listener).unwrap().try_into().unwrap();
        let mut waiting = Vec::new();
        // Who comes when the queue is full is not answered.
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            waiting.push(stream);
            assert!(waiting.len() < 100, "the queue has an end");
        }
        (address.to_string(), (listener, waiting))
    }

    #[test]
    fn a_host_that_is_silent_does_not_keep_a_vm_from_the_next() {
        let (first, _silent) = silent();
        let second = TcpListener::bind("127.0.0.1:0").unwrap();
        let list = [first, second.local_addr().unwrap().to_string()];
        let healer = Healer::new(list.clone(), None, &twinstep_pair::Config::default());
        let standbys = Standbys { healer, reach: Reach::new(Security::default(), None), at: None };
        let (to, inbox) = Post::new().unwrap();
        let mut healing = Healing::new(standbys, to, |result| result, Events::new("test", true, None).unwrap());
        let started = Instant::now();
        healing.follow(PrimaryState::Unprotected);
        assert!(healing.reached(inbox.recv().unwrap()).is_none());
        healing.follow(PrimaryState::Unprotected);
        let (_channel, told) = healing.reached(inbox.recv().unwrap()).expect("the second answers");
        assert_eq!(told[0], list[1]);
        assert!(started.elapsed() < CONNECT_PATIENCE / 2, "{:?}", started.elapsed());
    }

    #[test]
    fn patience_grows_with_failures() {
        let all: Vec<Duration> = (0..40).map(patience).collect();
        assert!(all.is_sorted() && all[0] < CONNECT_PATIENCE / 5, "{all:?}");
        assert!(all[3..].iter().all(|patience| *patience == CONNECT_PATIENCE), "{all:?}");
    }
}
