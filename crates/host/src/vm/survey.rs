//! A look at all of a machine's RAM, part by part while its guest runs: hashes are brought up to date, and pages are found that changed though nobody wrote to them.
//!
//! *In*: the machine, now and then. *Out*: whether it is done, the pages that went bad. *Invariant*: what one part costs has a bound; a page counts as bad only if it is another than its
//! hash says while nobody has written to it since it was hashed.
use twinstep_machine::Machine;

/// See the head of the module.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// The first page that was not looked at.
    next: usize,
    /// Pages that went bad, ascending.
    pub(super) damaged: Vec<usize>,
}

impl Survey {
    /// Does a part: hashes at most so many pages that were written, and looks at as many others if no such ones are left. Says whether all hashes are up to date.
    pub(super) fn part(&mut self, machine: &mut Machine, pages: usize) -> bool {
        if machine.digest_ram_some(pages) > 0 {
            return false;
        }
        if !self.is_done(machine) {
            let end = self.next + pages;
            self.damaged.extend(machine.scrub_pages(self.next..end));
            self.next = end;
        }
        true
    }
    /// Does all that is left.
    pub(super) fn finish(&mut self, machine: &mut Machine) {
        machine.digest_ram();
        while !self.is_done(machine) {
            self.part(machine, usize::MAX / 2);
        }
    }
    /// Whether all pages were looked at.
    pub(super) fn is_done(&self, machine: &Machine) -> bool {
        self.next >= machine.ram().flags().pages()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinstep_machine::Config;
    use twinstep_machine::faults::Bit;

    #[test]
    fn bad_pages_are_found_while_others_are_written() {
        let mut machine = Machine::new(Config { ram_mib: 64, ..Config::default() }, Vec::new()).unwrap();
        machine.digest();
        assert!(machine.flip(Bit::Ram(100 * 4096, 0)) && machine.flip(Bit::Ram(9000 * 4096, 0)));
        let mut survey = Survey::default();
        let mut parts = 0;
        while !survey.is_done(&machine) {
            machine.write_ram_page(parts, &[7; 4096]);
            assert_eq!(survey.part(&mut machine, 1000), machine.digest_ram_some(0) == 0);
            parts += 1;
        }
        assert_eq!((survey.damaged, parts), (vec![100, 9000], 17));
        let mut survey = Survey::default();
        assert!(machine.flip(Bit::Ram(9 * 4096, 0)));
        survey.finish(&mut machine);
        assert!(survey.is_done(&machine) && survey.damaged == [9]);
    }
}
