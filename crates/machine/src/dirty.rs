//! Which pages changed, for several consumers at once.
//!
//! The processor knows one set of dirty pages, and asking for it clears it. Checkpoints, migration and digests each need their own "since I
//! last asked". **In:** every page the processor reports. **Out:** for each consumer, the pages since it last asked. **Invariant:** a page reported once reaches
//! every consumer exactly once.

/// Names a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerId(u64);

/// What a consumer gets the first time it asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Pages that change from now on.
    Nothing,
    /// All pages.
    Everything,
}

#[derive(Debug)]
struct Consumer {
    id: ConsumerId,
    name: &'static str,
    bits: Vec<u64>,
}

/// The pages changed, by consumer.
#[derive(Debug)]
pub(crate) struct DirtyTracker {
    pages: usize,
    consumers: Vec<Consumer>,
    next: u64,
}

impl DirtyTracker {
    pub(crate) fn new(pages: usize) -> Self {
        Self { pages, consumers: Vec::new(), next: 0 }
    }

    /// Adds a consumer.
    pub(crate) fn register(&mut self, name: &'static str, start: Start) -> ConsumerId {
        let id = ConsumerId(self.next);
        self.next += 1;
        self.consumers.push(Consumer { id, name, bits: vec![0; self.pages.div_ceil(64)] });
        if start == Start::Everything {
            let last = self.consumers.len() - 1;
            for page in 0..self.pages {
                self.consumers[last].bits[page / 64] |= 1 << (page % 64);
            }
        }
        id
    }

    /// Removes a consumer.
    pub(crate) fn unregister(&mut self, id: ConsumerId) {
        self.consumers.retain(|c| c.id != id);
    }

    /// A page changed.
    pub(crate) fn mark(&mut self, page: usize) {
        for consumer in &mut self.consumers {
            consumer.bits[page / 64] |= 1 << (page % 64);
        }
    }

    /// What `id` has not seen yet, ascending. Nothing for a consumer that is gone.
    pub(crate) fn take(&mut self, id: ConsumerId) -> Vec<usize> {
        let Some(consumer) = self.consumers.iter_mut().find(|c| c.id == id) else { return Vec::new() };
        let mut pages = Vec::new();
        for (i, word) in consumer.bits.iter_mut().enumerate() {
            let mut left = std::mem::take(word);
            while left != 0 {
                pages.push(i * 64 + left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
        pages
    }

    /// The consumers' names and how many pages wait for each, for diagnosis.
    pub(crate) fn waiting(&self) -> Vec<(&'static str, usize)> {
        let count = |c: &Consumer| c.bits.iter().map(|word| word.count_ones() as usize).sum();
        self.consumers.iter().map(|c| (c.name, count(c))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_consumer_sees_every_page_once() {
        let mut tracker = DirtyTracker::new(130);
        let a = tracker.register("a", Start::Nothing);
        tracker.mark(3);
        let b = tracker.register("b", Start::Nothing);
        tracker.mark(129);
        tracker.mark(3);
        tracker.mark(64);
        assert_eq!(tracker.take(a), [3, 64, 129]);
        assert!(tracker.take(a).is_empty());
        assert_eq!(tracker.take(b), [3, 64, 129]);
        let c = tracker.register("c", Start::Everything);
        assert_eq!(tracker.take(c), (0..130).collect::<Vec<_>>());
        tracker.unregister(a);
        tracker.mark(5);
        assert_eq!(tracker.waiting(), [("b", 1), ("c", 1)]);
        assert!(tracker.take(a).is_empty());
    }
}
