//! The entropy device (section 5.4).
//!
//! **In:** [`Input::Seed`](crate::Input::Seed), buffers. **Out:** random bytes. **Invariant:** the bytes follow from the seeds and the requests before them, so that two machines with the
//! same inputs draw the same; without having been seeded it gives out nothing and lets requests wait.
use super::{Broken, Cx, Queues, Received, VirtioDevice, chacha};
use crate::payload::{Payload, RestoreError};
use minicbor::{Decode, Encode};

const REQUESTS: usize = 0;
const QUEUE_SIZES: [u16; 1] = [64];
/// The most one request gets; a driver takes what it gets and asks again.
const MOST: u64 = 64 << 10;

/// The entropy device; its fields are what is saved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Rng {
    #[n(0)]
    seeded: bool,
    #[cbor(n(1), with = "minicbor::bytes")]
    key: [u8; 32],
}

impl Rng {
    /// A generator that waits for its first seed.
    pub(crate) fn new() -> Self {
        Self { seeded: false, key: [0; 32] }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> &'static str {
        "virtio-rng"
    }
    fn device_type(&self) -> u16 {
        4
    }
    fn class(&self) -> u32 {
        0x10_0000
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn negotiated(&mut self, _features: u64) {}
    /// Entropy is not the driver's to take away.
    fn reset(&mut self) {}

    fn notify(&mut self, queue: usize, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        if !self.seeded {
            return Ok(());
        }
        while let Some(chain) = queues.pop(cx, queue)? {
            let bytes = chacha::draw(&mut self.key, chain.writable_len().min(MOST) as usize);
            let written = chain.write(cx.ram, 0, &bytes);
            queues.push(cx, queue, chain.head, written as u32)?;
        }
        queues.want_notify(cx, queue)
    }

    fn receive(&mut self, received: Received, queues: &mut Queues, cx: &mut Cx) -> Result<(), Broken> {
        let Received::Seed(seed) = received else { return Ok(()) };
        self.key.iter_mut().zip(seed).for_each(|(k, s)| *k ^= s);
        chacha::draw(&mut self.key, 0);
        self.seeded = true;
        self.notify(REQUESTS, queues, cx)
    }

    fn save(&self) -> Vec<u8> {
        Payload::encode("", 1, self).bytes
    }
    fn restore(&mut self, payload: &Payload, bytes: &[u8]) -> Result<(), RestoreError> {
        *self = payload.decode_part(bytes)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Driver;

    #[test]
    fn requests_wait_for_the_seed() {
        let mut d = Driver::new(Box::new(Rng::new()));
        d.start(0);
        let buffer = d.add(0, &[], &[100]);
        d.kick(0);
        assert_eq!(d.used(0), []);
        d.receive(Received::Seed([5; 32]));
        assert_eq!(d.used(0), [(buffer.head, 100)]);
        assert_eq!(d.interrupts(), [d.vector(0)]);
        assert!(d.read(buffer.writable[0], 100).iter().filter(|&&b| b == 0).count() < 20);
    }

    #[test]
    fn equal_seeds_equal_bytes() {
        let draw = |seeds: &[u8]| {
            let mut d = Driver::new(Box::new(Rng::new()));
            d.start(0);
            for &seed in seeds {
                d.receive(Received::Seed([seed; 32]));
            }
            let buffer = d.add(0, &[], &[32, 32]);
            d.kick(0);
            let mut bytes = d.read(buffer.writable[0], 32);
            bytes.extend(d.read(buffer.writable[1], 32));
            bytes
        };
        assert_eq!(draw(&[1, 2]), draw(&[1, 2]));
        assert_ne!(draw(&[1, 2]), draw(&[2, 1]));
    }

    #[test]
    fn greedy_requests_get_a_part() {
        let mut d = Driver::new(Box::new(Rng::new()));
        d.start(0);
        d.receive(Received::Seed([5; 32]));
        let buffer = d.add(0, &[], &[1 << 20]);
        d.kick(0);
        assert_eq!(d.used(0), [(buffer.head, MOST as u32)]);
    }

    #[test]
    fn state_survives_saving() {
        let mut d = Driver::new(Box::new(Rng::new()));
        d.start(0);
        d.receive(Received::Seed([5; 32]));
        d.check_save_restore(Box::new(Rng::new()));
    }
}
