//! What was written since two machines were last known to be equal.
//!
//! **In:** the units written since the last call, with the position at which an era ends; word that the machines were equal at a position. **Out:** all units
//! in which they may differ by what this side wrote. **Invariant:** nothing written after the last agreed position is forgotten; at most [`MAX_ERAS`] sets
//! are kept, the older ones as one.
use std::collections::VecDeque;

use twinstep_machine::PageSet;

/// Eras that are told apart; older ones are one.
pub const MAX_ERAS: usize = 32;

/// Sets of units, by the position up to which they were written.
#[derive(Debug, Clone, Default)]
pub struct Eras(VecDeque<(u64, PageSet)>);

impl Eras {
    /// These were written up to `position`, since the era before.
    pub fn mark(&mut self, position: u64, written: PageSet) {
        self.0.push_back((position, written));
        if self.0.len() > MAX_ERAS
            && let Some((_, oldest)) = self.0.pop_front()
            && let Some((_, next)) = self.0.front_mut()
        {
            next.join(&oldest);
        }
    }
    /// The other side was equal at `position`.
    pub fn agreed(&mut self, position: u64) {
        while self.0.front().is_some_and(|(end, _)| *end <= position) {
            self.0.pop_front();
        }
    }
    /// They are equal now.
    pub fn clear(&mut self) {
        self.0.clear();
    }
    /// All that was written: in the eras, and `since` the last one.
    pub fn all(&self, since: PageSet) -> PageSet {
        let mut all = since;
        self.0.iter().for_each(|(_, era)| all.join(era));
        all
    }
    /// How many eras are told apart.
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(units: &[usize]) -> PageSet {
        let mut set = PageSet::none(200);
        units.iter().for_each(|&unit| set.insert(unit));
        set
    }
    fn list(set: &PageSet) -> Vec<usize> {
        set.iter().collect()
    }

    #[test]
    fn what_was_agreed_upon_is_forgotten() {
        let mut eras = Eras::default();
        eras.mark(10, set(&[3]));
        eras.mark(20, set(&[4]));
        assert_eq!(list(&eras.all(set(&[5]))), [3, 4, 5]);
        eras.agreed(19);
        assert_eq!(list(&eras.all(set(&[5]))), [4, 5]);
        eras.clear();
        assert!(eras.is_empty() && eras.all(set(&[])).is_empty());
    }

    #[test]
    fn old_eras_become_one_and_lose_nothing() {
        let mut eras = Eras::default();
        (0..3 * MAX_ERAS).for_each(|unit| eras.mark(unit as u64, set(&[unit])));
        assert_eq!(eras.len(), MAX_ERAS);
        assert_eq!(eras.all(set(&[])).len(), 3 * MAX_ERAS);
        eras.agreed(2 * MAX_ERAS as u64 + 5);
        assert_eq!(eras.all(set(&[])).len(), MAX_ERAS - 6);
    }
}
