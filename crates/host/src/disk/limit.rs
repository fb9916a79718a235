//! To how many bytes a second a guest's writes are held while its disks are copied, and how much it has written that must be sent.
//!
//! *In*: whoever copies says the limit; each write says what became unsent. *Out*: both, to whoever runs the guest. *Invariant*: asking takes no lock, since it is done between any two slices of the guest.
use std::sync::atomic::{AtomicU64, Ordering};

/// See the head of this module.
#[derive(Debug, Default)]
pub(super) struct WriteLimit {
    /// 0: none.
    bytes_per_s: AtomicU64,
    /// Bytes of blocks that became unsent, ever.
    unsent: AtomicU64,
}

impl WriteLimit {
    pub(super) fn set(&self, bytes_per_s: Option<u64>) {
        self.bytes_per_s.store(bytes_per_s.unwrap_or(0), Ordering::Relaxed);
    }
    pub(super) fn get(&self) -> Option<u64> {
        Some(self.bytes_per_s.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }
    pub(super) fn count(&self, bytes: u64) {
        self.unsent.fetch_add(bytes, Ordering::Relaxed);
    }
    pub(super) fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }
}
