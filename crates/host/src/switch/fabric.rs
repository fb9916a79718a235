//! What a switch decides, without sockets or a clock: which frame goes to which port, and what is kept for an address whose port has died.
//!
//! *In*: ports that come and go, frames that arrive, frames that were passed on, each with the time. *Out*: a queue of wire
//! frames per port, and events for the log. *Invariant*: every queue and every store has a limit in frames and bytes, and a frame never goes back to
//! the port it came from.
//!
//! # Failover
//!
//! When the port that owns an address goes away, a protected machine has probably lost its host and will come back at another
//! port. So that the world loses nothing in between:
//!
//! 1. frames passed on to the dead port in its last moments are delivered again, since the dead process may have taken
//!    them from its socket without passing them on to its standby, or may never have taken them;
//! 2. frames still queued for the dead port follow;
//! 3. frames that arrive while the address is nowhere are kept, not flooded, and follow last.
//!
//! They are delivered, in this order, to the port where the address next shows up as a source. The same happens to the
//! first two kinds when an address moves away from a port that still stands (a host that hangs).
//!
//! Delivering again means that the guest may see a frame twice. Ethernet and IP allow that: TCP discards a segment
//! whose bytes it has and answers with an acknowledgement, an ARP packet says the same thing twice, and whoever
//! uses UDP must expect duplicates. Losing a frame is allowed too, but costs the sender's retransmission timeout, 200 ms at the
//! least and a second with some peers: that is the gap a client would see. A frame is delivered again at most once, so two ports that fight for
//! one address can't multiply traffic.
//!
//! What a guest has certainly got is not delivered again, because each frame costs its heir time in the very moment the client
//! is waiting for. A TCP segment is certain when the guest itself has acknowledged it: a protected machine's output leaves only after its
//! standby has all the input before it. Of segments without data only a connection's newest is kept, since acknowledgements are cumulative.
//!
//! # Fencing
//!
//! A port may say whose it is: a VM, an epoch, a process ([`Token`]). Once a later epoch of that VM has been seen, ports of earlier ones are *fenced*: what they
//! send is refused and counted, nothing is sent to them but word of it, and their addresses are waited for as if the port had gone. So a host that hung while another took its VM over
//! cannot draw the guest's traffic back to itself, whenever it wakes up. Ports that say nothing (passt, other switches, VMs that are not protected) are as on any switch.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::fences::Fences;
use super::tcp::Segment;
use crate::net::Token;
use crate::net::frames::{HEADER, Mac};
use crate::net::token::Message;

/// A frame with its length in front, as it goes over the wire.
pub type WireFrame = Arc<[u8]>;

/// A port's number; never used twice in one switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u64);

impl std::fmt::Display for PortId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "port {}", self.0)
    }
}

/// How much is kept, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Frames waiting to be written to one port.
    pub queue: Bound,
    /// Frames kept for one address that has lost its port.
    pub kept: Bound,
    /// How long they are kept.
    pub kept_for: Duration,
    /// Frames passed on to one port that are remembered.
    pub recent: Bound,
    /// How long before a port's death a frame may have been passed on to be delivered again.
    pub recent_for: Duration,
    /// Addresses known at a time, those without a port included. Beyond it the switch floods.
    pub addresses: usize,
}

/// A limit in both measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// In frames.
    pub frames: usize,
    /// In bytes.
    pub bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue: Bound { frames: 4096, bytes: 4 << 20 },
            kept: Bound { frames: 4096, bytes: 4 << 20 },
            kept_for: Duration::from_secs(10),
            recent: Bound { frames: 256, bytes: 1 << 20 },
            recent_for: Duration::from_millis(300),
            addresses: 4096,
        }
    }
}

/// What is worth telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A port was connected.
    Up(PortId),
    /// A port is gone, and why.
    Down(PortId, String),
    /// A port has said whose it is.
    Named(PortId, Token),
    /// A later epoch of a port's VM has been seen: its frames are refused from now on.
    Fenced {
        /// Which port.
        port: PortId,
        /// Whose it is.
        token: Token,
        /// The later epoch, or the same one with another owner.
        by: u64,
    },
    /// A fenced port is gone, after so many of its frames were refused.
    Refused {
        /// Which port.
        port: PortId,
        /// How many.
        frames: u64,
    },
    /// What a port says of itself could not be looked up at the arbiter; it is believed.
    Unproven(PortId, String),
    /// An address has lost its port; frames to it are kept.
    Lost(Mac),
    /// An address that had lost its port is back.
    Found {
        /// Which.
        mac: Mac,
        /// Where.
        port: PortId,
        /// Frames delivered a second time.
        again: usize,
        /// Frames that had been kept.
        kept: usize,
        /// Frames there was no room for.
        dropped: u64,
        /// How long it was away.
        after: Duration,
    },
    /// An address was away for too long: what was kept for it is thrown away.
    GivenUp {
        /// Which.
        mac: Mac,
        /// Frames thrown away.
        frames: usize,
    },
}

/// Frames in order, with a limit.
#[derive(Debug)]
struct Store<T> {
    items: VecDeque<T>,
    bytes: usize,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self { items: VecDeque::new(), bytes: 0 }
    }
}

impl<T: AsRef<WireFrame>> Store<T> {
    /// Appends unless that would pass the limit.
    fn push(&mut self, item: T, bound: Bound) -> bool {
        let size = item.as_ref().len();
        if self.items.len() >= bound.frames || self.bytes + size > bound.bytes {
            return false;
        }
        self.bytes += size;
        self.items.push_back(item);
        true
    }

    /// Throws some out.
    fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        let bytes = &mut self.bytes;
        self.items.retain(|item| {
            let kept = keep(item);
            if !kept {
                *bytes -= item.as_ref().len();
            }
            kept
        });
    }

    fn pop(&mut self) -> Option<T> {
        let item = self.items.pop_front()?;
        self.bytes -= item.as_ref().len();
        Some(item)
    }

    /// Takes out everything addressed to `mac`, leaving the first `fixed` items where they are.
    fn take(&mut self, mac: Mac, fixed: usize) -> Vec<T> {
        let mut left: Vec<T> = self.items.drain(..fixed.min(self.items.len())).collect();
        let (taken, rest): (Vec<T>, Vec<T>) = self.items.drain(..).partition(|item| destination(item.as_ref()) == Some(mac));
        left.extend(rest);
        self.bytes = left.iter().map(|item| item.as_ref().len()).sum();
        self.items = left.into();
        taken
    }
}

/// A frame in a port's queue.
#[derive(Debug, Clone)]
struct Queued {
    frame: WireFrame,
    again: bool,
}

impl AsRef<WireFrame> for Queued {
    fn as_ref(&self) -> &WireFrame {
        &self.frame
    }
}

/// A frame that was passed on.
#[derive(Debug)]
struct Passed {
    frame: WireFrame,
    at: Duration,
    segment: Option<Segment>,
}

impl AsRef<WireFrame> for Passed {
    fn as_ref(&self) -> &WireFrame {
        &self.frame
    }
}

#[derive(Debug, Default)]
struct Port {
    queue: Store<Queued>,
    recent: Store<Passed>,
    dropped: u64,
    /// Bytes of the first frame in the queue that are on their way already.
    written: usize,
    /// Whose it is, if it has said so.
    token: Option<Token>,
    /// It is stale, on account of this epoch.
    fenced: Option<u64>,
    /// Frames refused.
    refused: u64,
}

impl Port {
    /// The guest has said something: what it confirms to have got need not be remembered.
    fn heard(&mut self, frame: &[u8]) {
        if self.recent.items.is_empty() {
            return;
        }
        if let Some(said) = Segment::of(frame) {
            self.recent.retain(|passed| !passed.segment.is_some_and(|segment| !segment.empty && said.confirms(&segment)));
        }
    }

    /// What the next owner of `mac` shall get: what was passed on lately, then what is still queued.
    fn legacy(&mut self, mac: Mac, now: Duration, limits: &Limits) -> Vec<Queued> {
        let lately = |passed: &Passed| now.saturating_sub(passed.at) <= limits.recent_for;
        let again = self.recent.take(mac, 0).into_iter().filter(lately).map(|passed| Queued { frame: passed.frame, again: true });
        let mut legacy: Vec<_> = again.collect();
        // A frame that is half written must be finished, or the peer loses the frames' boundaries; the heir gets it as well.
        let fixed = usize::from(self.written > 0);
        let half = self.queue.items.front().filter(|item| fixed == 1 && !item.again && destination(&item.frame) == Some(mac));
        legacy.extend(half.map(|item| Queued { frame: item.frame.clone(), again: true }));
        if let Some(first) = self.queue.items.front_mut().filter(|_| fixed == 1) {
            first.again = true;
        }
        legacy.extend(self.queue.take(mac, fixed));
        legacy
    }

    /// A frame was passed on: it may have to be delivered again.
    fn remember(&mut self, item: Queued, now: Duration, limits: &Limits) {
        // Frames for everyone are no address's own; frames that were delivered again are not delivered a third time.
        if item.again || destination(&item.frame).is_none_or(Mac::is_group) {
            return;
        }
        let segment = Segment::of(&item.frame[HEADER..]);
        if let Some(new) = segment {
            self.recent.retain(|old| !old.segment.is_some_and(|old| old.empty && old.flow == new.flow));
        }
        // Rarely more than one round: make room for the newcomer, oldest first.
        while self.recent.items.len() >= limits.recent.frames || self.recent.bytes + item.frame.len() > limits.recent.bytes {
            if self.recent.pop().is_none() {
                return;
            }
        }
        self.recent.push(Passed { frame: item.frame, at: now, segment }, limits.recent);
    }
}

/// An address without a port.
#[derive(Debug)]
struct Away {
    since: Duration,
    frames: Store<Queued>,
    dropped: u64,
}

/// The switch's decisions.
#[derive(Debug, Default)]
pub struct Fabric {
    limits: Limits,
    ports: BTreeMap<PortId, Port>,
    addresses: BTreeMap<Mac, PortId>,
    away: BTreeMap<Mac, Away>,
    fences: Fences,
    next_port: u64,
    events: VecDeque<Event>,
}

fn destination(frame: &WireFrame) -> Option<Mac> {
    Mac::destination(&frame[HEADER..])
}

impl Fabric {
    /// An empty switch.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// The newest epochs that an earlier switch has seen.
    #[must_use]
    pub fn with_fences(mut self, fences: Fences) -> Self {
        self.fences = fences;
        self
    }

    /// The newest epochs seen.
    #[must_use]
    pub fn fences(&self) -> &Fences {
        &self.fences
    }

    /// A new port.
    pub fn attach(&mut self) -> PortId {
        let id = PortId(self.next_port);
        self.next_port += 1;
        self.ports.insert(id, Port::default());
        self.events.push_back(Event::Up(id));
        id
    }

    /// A port is gone. Its addresses are waited for.
    pub fn detach(&mut self, id: PortId, why: impl Into<String>, now: Duration) {
        if !self.ports.contains_key(&id) {
            return;
        }
        self.events.push_back(Event::Down(id, why.into()));
        self.lose_addresses(id, now);
        let port = self.ports.remove(&id).expect("just seen");
        if port.fenced.is_some() {
            self.events.push_back(Event::Refused { port: id, frames: port.refused });
        }
    }

    /// The addresses of a port are waited for, with what it was to get.
    fn lose_addresses(&mut self, id: PortId, now: Duration) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        let owned: Vec<Mac> = self.addresses.iter().filter(|(_, owner)| **owner == id).map(|(mac, _)| *mac).collect();
        for mac in owned {
            self.addresses.remove(&mac);
            let mut away = Away { since: now, frames: Store::default(), dropped: 0 };
            for item in port.legacy(mac, now, &self.limits) {
                away.dropped += u64::from(!away.frames.push(item, self.limits.kept));
            }
            self.away.insert(mac, away);
            self.events.push_back(Event::Lost(mac));
        }
    }

    /// A port says whose it is. `over`: an epoch that makes it a stale one, if somebody knows of one (the arbiter).
    pub fn name(&mut self, id: PortId, token: Token, over: Option<u64>, now: Duration) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        port.token = Some(token);
        self.events.push_back(Event::Named(id, token));
        let over = over.or_else(|| self.fences.enter(&token));
        match over {
            None => port.fenced = None,
            // Also if it was fenced before: it asks again, so it is told again.
            Some(by) => self.fence(id, by, now),
        }
        let stale = |port: &Port| port.token.filter(|_| port.fenced.is_none()).and_then(|token| self.fences.over(&token));
        let stale: Vec<(PortId, u64)> = self.ports.iter().filter_map(|(id, port)| Some((*id, stale(port)?))).collect();
        for (id, by) in stale {
            self.fence(id, by, now);
        }
    }

    fn fence(&mut self, id: PortId, by: u64, now: Duration) {
        self.lose_addresses(id, now);
        let Some(port) = self.ports.get_mut(&id) else { return };
        if let (None, Some(token)) = (port.fenced.replace(by), port.token) {
            self.events.push_back(Event::Fenced { port: id, token, by });
        }
        // But for a frame that is half written, nothing more than the word.
        let half = if port.written > 0 { port.queue.pop() } else { None };
        port.queue = Store::default();
        let word: WireFrame = Message::Fenced { epoch: by }.wire().into();
        for item in half.into_iter().chain([Queued { frame: word, again: true }]) {
            port.queue.push(item, self.limits.queue);
        }
    }

    /// A frame arrived at a port. Frames too short to have addresses are dropped.
    pub fn frame(&mut self, from: PortId, frame: &[u8], now: Duration) {
        let ethernet = &frame[HEADER..];
        if let Some(port) = self.ports.get_mut(&from).filter(|port| port.fenced.is_some()) {
            port.refused += 1;
            return;
        }
        let (Some(source), Some(destination)) = (Mac::source(ethernet), Mac::destination(ethernet)) else { return };
        if !source.is_group() {
            self.learn(source, from, now);
        }
        if let Some(port) = self.ports.get_mut(&from) {
            port.heard(ethernet);
        }
        let frame: WireFrame = frame.into();
        if destination.is_group() {
            self.flood(from, &frame);
        } else if let Some(owner) = self.addresses.get(&destination) {
            if *owner != from {
                self.enqueue(*owner, Queued { frame, again: false });
            }
        } else if let Some(away) = self.away.get_mut(&destination) {
            away.dropped += u64::from(!away.frames.push(Queued { frame, again: false }, self.limits.kept));
        } else {
            self.flood(from, &frame);
        }
    }

    fn flood(&mut self, from: PortId, frame: &WireFrame) {
        let others: Vec<PortId> = self.ports.keys().copied().filter(|id| *id != from).collect();
        for id in others {
            self.enqueue(id, Queued { frame: frame.clone(), again: false });
        }
    }

    fn enqueue(&mut self, id: PortId, item: Queued) {
        let Some(port) = self.ports.get_mut(&id).filter(|port| port.fenced.is_none()) else { return };
        // Like any switch: what does not fit is dropped, the newest first, and TCP slows down.
        port.dropped += u64::from(!port.queue.push(item, self.limits.queue));
    }

    fn learn(&mut self, mac: Mac, port: PortId, now: Duration) {
        let before = self.addresses.get(&mac).copied();
        if before == Some(port) {
            return;
        }
        let known = before.is_some() || self.away.contains_key(&mac);
        if !known && self.addresses.len() + self.away.len() >= self.limits.addresses {
            // A peer that makes up addresses fills the table; the others' frames are flooded then, not lost.
            return;
        }
        self.addresses.insert(mac, port);
        if let Some(away) = self.away.remove(&mac) {
            let again = away.frames.items.iter().filter(|item| item.again).count();
            let kept = away.frames.items.len() - again;
            let after = now.saturating_sub(away.since);
            self.events.push_back(Event::Found { mac, port, again, kept, dropped: away.dropped, after });
            for item in away.frames.items {
                self.enqueue(port, item);
            }
        } else if let Some(old) = before.and_then(|old| self.ports.get_mut(&old)) {
            for item in old.legacy(mac, now, &self.limits) {
                self.enqueue(port, item);
            }
        }
    }

    /// Up to `limit` pieces a port has to be given next: whole wire frames, but for the first, of which a part may have gone already.
    /// They stay in the queue until [`Fabric::wrote`].
    pub fn waiting(&self, id: PortId, limit: usize) -> impl Iterator<Item = &[u8]> {
        self.ports.get(&id).into_iter().flat_map(move |port| {
            let skip = std::iter::once(port.written).chain(std::iter::repeat(0));
            port.queue.items.iter().take(limit).zip(skip).map(|(item, skip)| &item.frame[skip..])
        })
    }

    /// Whether a port has anything to be given.
    #[must_use]
    pub fn has_waiting(&self, id: PortId) -> bool {
        self.ports.get(&id).is_some_and(|port| !port.queue.items.is_empty())
    }

    /// So many bytes of what was [`Fabric::waiting`] were written to a port.
    pub fn wrote(&mut self, id: PortId, bytes: usize, now: Duration) {
        let limits = self.limits;
        let Some(port) = self.ports.get_mut(&id) else { return };
        port.written += bytes;
        while let Some(length) = port.queue.items.front().map(|item| item.frame.len()).filter(|length| *length <= port.written) {
            port.written -= length;
            if let Some(item) = port.queue.pop() {
                port.remember(item, now, &limits);
            }
        }
    }

    /// Frames a port had no room for.
    #[must_use]
    pub fn dropped(&self, id: PortId) -> u64 {
        self.ports.get(&id).map_or(0, |port| port.dropped)
    }

    /// Frames of a port that were refused since it is stale.
    #[must_use]
    pub fn refused(&self, id: PortId) -> u64 {
        self.ports.get(&id).map_or(0, |port| port.refused)
    }

    /// Whether a port is stale.
    #[must_use]
    pub fn is_fenced(&self, id: PortId) -> bool {
        self.ports.get(&id).is_some_and(|port| port.fenced.is_some())
    }

    /// What a port says of itself is believed, although the arbiter could not say so.
    pub fn unproven(&mut self, id: PortId, why: impl Into<String>) {
        self.events.push_back(Event::Unproven(id, why.into()));
    }

    /// Throws away what was kept too long.
    pub fn expire(&mut self, now: Duration) {
        let late: Vec<Mac> =
            self.away.iter().filter(|(_, a)| a.since + self.limits.kept_for <= now).map(|(mac, _)| *mac).collect();
        for mac in late {
            if let Some(away) = self.away.remove(&mac) {
                self.events.push_back(Event::GivenUp { mac, frames: away.frames.items.len() });
            }
        }
    }

    /// When [`Fabric::expire`] will next have something to do.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Duration> {
        self.away.values().map(|away| away.since + self.limits.kept_for).min()
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }
}

#[cfg(test)]
#[path = "fabric_tests.rs"]
mod tests;
