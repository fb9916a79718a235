//! One connection of the logging channel, as either side sees it: framing, heartbeats, silence.
//!
//! In: bytes, time. Out: messages, the moment of the next heartbeat, a suspicion. Invariant: nothing survives
//! a connection; the next one starts with a new `Link`, so a half-received frame can't leak into it.

use crate::config::Config;
use crate::detector::{Detector, Grace};
use crate::types::Nanos;
use crate::wire::{Decoder, Message, WireError};

/// One connection.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    decoder: Decoder,
    detector: Detector,
    beat_at: Nanos,
}

impl Link {
    /// A connection that was made now.
    pub(crate) fn new(now: Nanos, config: &Config) -> Link {
        Link { decoder: Decoder::new(), detector: Detector::new(now), beat_at: now.plus(config.heartbeat_interval) }
    }

    /// The greeting is over.
    pub(crate) fn greeted(&mut self) {
        self.decoder.greeted();
    }

    /// Bytes came in; take the messages out with [`Link::next_message`].
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.decoder.push(bytes);
    }

    /// The next message, if it is complete. Only whole, sound messages are signs of life: a peer whose machine is
    /// failing may well go on sending noise.
    pub(crate) fn next_message(&mut self, now: Nanos) -> Result<Option<Message>, WireError> {
        let message = self.decoder.next_message()?;
        if message.is_some() {
            self.detector.heard(now);
        }
        Ok(message)
    }

    /// Whether a heartbeat is due; if so, the next one is due an interval from now.
    pub(crate) fn beat_due(&mut self, now: Nanos, config: &Config) -> bool {
        let due = now >= self.beat_at;
        if due {
            self.beat_at = now.plus(config.heartbeat_interval);
        }
        due
    }

    /// The copy is over, during which the peer had better things to do than to answer.
    pub(crate) fn is_protected(&mut self) {
        self.detector.forget();
    }

    /// The peer gave a sign of life beside the channel.
    pub(crate) fn beat(&mut self, now: Nanos) {
        self.detector.beat(now);
    }

    /// How long the peer has been silent, in words, if that is too long.
    pub(crate) fn silence(&mut self, now: Nanos, timeout: Nanos, grace: Grace) -> Option<String> {
        let silence = self.detector.look(now, timeout, grace)?;
        let alive = if self.detector.beats(now, timeout) { " on the channel, though it is alive" } else { "" };
        Some(format!("{silence}{alive}"))
    }

    /// When time alone makes something happen here.
    pub(crate) fn deadline(&self, timeout: Nanos, grace: Grace) -> Nanos {
        self.beat_at.min(self.detector.deadline(timeout, grace))
    }
}
