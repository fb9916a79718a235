//! Looks about a thousand times a second at what a machine's thread is doing, as long as somebody wants to know.
//!
//! *In*: a machine's [`ActivityCell`]. *Out*: how often it was seen at what. *Invariant*: the thread that looks exists only while there is a
//! [`Watch`]. It looks at irregular times, or whatever the guest does a thousand times a second would be seen always or never.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use twinstep_machine::{Activity, ActivityCell};

/// Mean time between two looks; each is somewhere between half of it and one and a half.
const PERIOD_US: u64 = 1000;

#[derive(Debug, Default)]
struct State {
    watches: usize,
    /// A thread looks.
    running: bool,
    cell: Option<Arc<ActivityCell>>,
    samples: [u64; Activity::ALL.len()],
}

/// One for each machine. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Sampler(Arc<Mutex<State>>);

/// Somebody wants to know.
#[derive(Debug)]
pub struct Watch(Sampler);

impl Sampler {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// From now on this machine is looked at.
    pub fn look_at(&self, cell: &Arc<ActivityCell>) {
        self.state().cell = Some(cell.clone());
    }
    /// Looks from now on, until the watch is dropped.
    pub fn watch(&self) -> Watch {
        let mut state = self.state();
        state.watches += 1;
        if !state.running {
            let sampler = self.clone();
            // A host that has no thread left has other worries; there are no samples then.
            state.running = std::thread::Builder::new().name("sampler".into()).spawn(move || sampler.run()).is_ok();
        }
        drop(state);
        Watch(self.clone())
    }
    /// How often each of [`Activity::ALL`] was seen so far.
    pub fn samples(&self) -> [u64; Activity::ALL.len()] {
        self.state().samples
    }

    fn run(&self) {
        // xorshift64: irregular is all it has to be.
        let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
        loop {
            for (left, by) in [(true, 13), (false, 7), (true, 17)] {
                random ^= if left { random << by } else { random >> by };
            }
            std::thread::sleep(Duration::from_micros(PERIOD_US / 2 + random % PERIOD_US));
            let mut state = self.state();
            if state.watches == 0 {
                state.running = false;
                return;
            }
            if let Some(seen) = state.cell.as_ref().map(|cell| cell.get()) {
                state.samples[seen as usize] += 1;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.state().watches -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_until(what: &str, done: impl Fn() -> bool) {
        for _ in 0..10_000 {
            if done() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("{what} does not come");
    }

    #[test]
    fn looks_only_while_somebody_wants_to_know() {
        let (sampler, cell) = (Sampler::default(), Arc::new(ActivityCell::default()));
        cell.set(Activity::Guest);
        sampler.look_at(&cell);
        let seen = |activity: Activity| sampler.samples()[activity as usize];
        assert!(!sampler.state().running);
        let (one, two) = (sampler.watch(), sampler.watch());
        wait_until("a sample", || seen(Activity::Guest) > 3);
        drop(one);
        cell.set(Activity::Translator);
        wait_until("a sample", || seen(Activity::Translator) > 3);
        drop(two);
        wait_until("the end", || !sampler.state().running);
        let before = sampler.samples();
        assert_eq!(before.iter().sum::<u64>(), seen(Activity::Guest) + seen(Activity::Translator));
        // And once more.
        let _again = sampler.watch();
        wait_until("a sample", || sampler.samples() != before);
    }
}
