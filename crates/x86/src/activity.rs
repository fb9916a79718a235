//! What a machine's thread is doing now, in a word that other threads may look at.
//!
//! **In:** the thread that owns the machine says whenever it begins to do something else. **Out:** whoever looks sees the latest word; looking
//! often enough gives the shares of time, without a clock where none may be read. Invariant: nothing in the machine reads it, so it has no
//! influence; saying it costs one plain store.
use std::sync::atomic::{AtomicU8, Ordering};

/// Kinds of work, and of rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Activity {
    /// The process works for the machine: inputs, outputs, the log, the recording.
    Host,
    /// The guest sleeps (HLT), and the thread with it.
    Halted,
    /// The guest may not run: it is held back, or there is nothing to replay.
    Waiting,
    /// Guest code runs.
    Guest,
    /// Guest code is translated.
    Translator,
    /// The engine looks for blocks, links them, and acts upon what changed.
    Engine,
    /// A memory access that translated code could not make: TLB misses, walks of page tables, accesses that run alone.
    Memory,
    /// A system instruction.
    System,
    /// An exception or an interrupt is delivered.
    Exception,
    /// A device, a timer or an interrupt controller works, the host's disks behind it included.
    Device,
}

impl Activity {
    /// All of them.
    pub const ALL: [Activity; 10] = [
        Activity::Host,
        Activity::Halted,
        Activity::Waiting,
        Activity::Guest,
        Activity::Translator,
        Activity::Engine,
        Activity::Memory,
        Activity::System,
        Activity::Exception,
        Activity::Device,
    ];
    /// Its name, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Activity::Host => "host",
            Activity::Halted => "halted",
            Activity::Waiting => "waiting",
            Activity::Guest => "guest",
            Activity::Translator => "translator",
            Activity::Engine => "engine",
            Activity::Memory => "memory",
            Activity::System => "system",
            Activity::Exception => "exception",
            Activity::Device => "device",
        }
    }
}

/// The word.
#[derive(Debug)]
pub struct ActivityCell(AtomicU8);

impl Default for ActivityCell {
    fn default() -> Self {
        Self(AtomicU8::new(Activity::Host as u8))
    }
}

impl ActivityCell {
    /// Says what begins now. To be called by the one thread that the machine is owned by.
    #[inline]
    pub fn set(&self, activity: Activity) {
        self.0.store(activity as u8, Ordering::Relaxed);
    }
    /// The same; gives what was done before, to be [`ActivityCell::set`] again afterwards.
    #[inline]
    pub fn replace(&self, activity: Activity) -> Activity {
        let before = self.get();
        self.set(activity);
        before
    }
    /// What is being done.
    #[inline]
    pub fn get(&self) -> Activity {
        Activity::ALL[usize::from(self.0.load(Ordering::Relaxed)) % Activity::ALL.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_seen() {
        let cell = ActivityCell::default();
        assert_eq!(cell.get(), Activity::Host);
        for (i, activity) in Activity::ALL.into_iter().enumerate() {
            assert_eq!(activity as usize, i, "{}", activity.name());
            cell.set(activity);
            assert_eq!(cell.get(), activity);
        }
        assert_eq!(cell.replace(Activity::Guest), Activity::Device);
        assert_eq!(cell.get(), Activity::Guest);
    }
}
