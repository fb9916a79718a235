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

/// A set of pages of RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet(Vec<u64>);

impl PageSet {
    /// None of `pages` pages.
    pub fn none(pages: usize) -> Self {
        Self(vec![0; pages.div_ceil(64)])
    }
    /// All of `pages` pages.
    pub fn all(pages: usize) -> Self {
        let mut words = vec![u64::MAX; pages.div_ceil(64)];
        if let Some(last) = words.last_mut().filter(|_| !pages.is_multiple_of(64)) {
            *last = (1 << (pages % 64)) - 1;
        }
        Self(words)
    }
    /// Adds one.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn insert(&mut self, page: usize) {
        self.0[page / 64] |= 1 << (page % 64);
    }
    /// Takes one away.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn remove(&mut self, page: usize) {
        self.0[page / 64] &= !(1 << (page % 64));
    }
    /// The first that is `page` or behind it.
    pub fn first_from(&self, page: usize) -> Option<usize> {
        let mut mask = u64::MAX << (page % 64);
        for (i, word) in self.0.iter().enumerate().skip(page / 64) {
            match word & mask {
                0 => mask = u64::MAX,
                found => return Some(i * 64 + found.trailing_zeros() as usize),
            }
        }
        None
    }
    /// Whether it is there.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn contains(&self, page: usize) -> bool {
        self.0[page / 64] >> (page % 64) & 1 != 0
    }
    /// Adds those of another set, of as many pages.
    pub fn join(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(to, from)| *to |= from);
    }
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
    /// All, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().flat_map(|(i, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(i * 64 + bit)
            })
        })
    }
}

#[derive(Debug)]
struct Consumer {
    id: ConsumerId,
    name: &'static str,
    pages: PageSet,
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
        let pages = match start {
            Start::Nothing => PageSet::none(self.pages),
            Start::Everything => PageSet::all(self.pages),
        };
        self.consumers.push(Consumer { id, name, pages });
        id
    }

    /// Removes a consumer.
    pub(crate) fn unregister(&mut self, id: ConsumerId) {
        self.consumers.retain(|c| c.id != id);
    }

    /// A page changed.
    pub(crate) fn mark(&mut self, page: usize) {
        for consumer in &mut self.consumers {
            consumer.pages.insert(page);
        }
    }

    /// What `id` has not seen yet. Nothing for a consumer that is gone.
    pub(crate) fn take(&mut self, id: ConsumerId) -> PageSet {
        let none = PageSet::none(self.pages);
        match self.consumers.iter_mut().find(|c| c.id == id) {
            Some(consumer) => std::mem::replace(&mut consumer.pages, none),
            None => none,
        }
    }

    /// At most `most` of what `id` has not seen yet, from page `from` on and then from the first one; and how many are left.
    pub(crate) fn take_some(&mut self, id: ConsumerId, from: usize, most: usize) -> (Vec<usize>, usize) {
        let Some(consumer) = self.consumers.iter_mut().find(|c| c.id == id) else { return (Vec::new(), 0) };
        let pages = &mut consumer.pages;
        let mut taken = Vec::new();
        for (mut at, end) in [(from, usize::MAX), (0, from)] {
            while taken.len() < most
                && let Some(page) = pages.first_from(at).filter(|page| *page < end)
            {
                pages.remove(page);
                taken.push(page);
                at = page + 1;
            }
        }
        (taken, pages.len())
    }

    /// The consumers' names and how many pages wait for each, for diagnosis.
    pub(crate) fn waiting(&self) -> Vec<(&'static str, usize)> {
        self.consumers.iter().map(|c| (c.name, c.pages.len())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_walked_and_emptied() {
        for pages in [0, 1, 63, 64, 65, 200] {
            let mut set = PageSet::all(pages);
            assert_eq!(set.len(), pages);
            let mut at = 0;
            while let Some(page) = set.first_from(at) {
                assert_eq!(page, at, "of {pages}");
                set.remove(page);
                at = page + 1;
            }
            assert!(set.is_empty() && at == pages);
        }
        let mut set = PageSet::none(300);
        [5, 64, 299].iter().for_each(|&page| set.insert(page));
        assert_eq!([0, 5, 6, 65, 299].map(|from| set.first_from(from)), [5, 5, 64, 299, 299].map(Some));
        assert_eq!([300, 1000].map(|from| set.first_from(from)), [None; 2]);
    }

    #[test]
    fn what_changed_is_taken_bit_by_bit() {
        let mut tracker = DirtyTracker::new(200);
        let id = tracker.register("a", Start::Nothing);
        [3, 70, 130, 199].iter().for_each(|&page| tracker.mark(page));
        assert_eq!(tracker.take_some(id, 70, 2), (vec![70, 130], 2));
        tracker.mark(70);
        assert_eq!(tracker.take_some(id, 131, 2), (vec![199, 3], 1));
        assert_eq!(tracker.take_some(id, 4, 9), (vec![70], 0));
        assert_eq!(tracker.take_some(id, 71, 9), (vec![], 0));
    }

    #[test]
    fn every_consumer_sees_every_page_once() {
        let mut tracker = DirtyTracker::new(130);
        let a = tracker.register("a", Start::Nothing);
        tracker.mark(3);
        let b = tracker.register("b", Start::Nothing);
        tracker.mark(129);
        tracker.mark(3);
        tracker.mark(64);
        let list = |pages: PageSet| pages.iter().collect::<Vec<_>>();
        assert_eq!(list(tracker.take(a)), [3, 64, 129]);
        assert!(tracker.take(a).is_empty());
        assert_eq!(list(tracker.take(b)), [3, 64, 129]);
        let c = tracker.register("c", Start::Everything);
        assert_eq!(list(tracker.take(c)), (0..130).collect::<Vec<_>>());
        tracker.unregister(a);
        tracker.mark(5);
        assert_eq!(tracker.waiting(), [("b", 1), ("c", 1)]);
        assert!(tracker.take(a).is_empty());
    }
}
