//! Faults of hardware, made on purpose: bits that flip where nobody wrote.
//!
//! **In:** which bit. **Out:** a machine that differs in it. **Invariant:** nothing that watches for writes (dirty pages, translated code, the digest of RAM)
//! notices, as nothing would notice a cosmic ray. Only tests do this, and a person who asks for it by a flag.
use crate::machine::Machine;
use twinstep_x86::PAGE_SIZE;

/// A bit of a machine's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bit {
    /// Of the byte of RAM at a guest-physical address; 0 to 7.
    Ram(u64, u8),
    /// Of one byte in each of so many pages, spread evenly over all that hold nothing but repetitions of a text; 0 to 7. So a test breaks what a guest's
    /// program has written, wherever it lies, and nothing else.
    Filled(Fill, u16, u8),
    /// Of general register number 0 to 15 (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 ...); 0 to 63.
    Register(u8, u8),
}

/// A text of 1 to 16 bytes that fills pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    bytes: [u8; Self::MAX],
    length: usize,
}

impl Fill {
    /// Longest, in bytes.
    pub const MAX: usize = 16;

    /// `None` if it is empty or too long.
    pub fn new(text: &[u8]) -> Option<Self> {
        let mut bytes = [0; Self::MAX];
        bytes.get_mut(..text.len())?.copy_from_slice(text);
        (!text.is_empty()).then_some(Self { bytes, length: text.len() })
    }

    /// The text.
    pub fn text(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Whether a page holds it again and again and nothing else, beginning with any of its bytes.
    fn fills(&self, page: &[u8]) -> bool {
        let n = self.length;
        page[n..] == page[..page.len() - n] && page[..2 * n].windows(n).any(|part| part == self.text())
    }
}

impl Machine {
    /// Flips a bit; false if there is no such bit.
    pub fn flip(&mut self, bit: Bit) -> bool {
        match bit {
            Bit::Ram(gpa, bit) if bit < 8 => {
                let Some((_, page)) = self.ram().page(gpa) else { return false };
                // SAFETY: `page` is the host address of a page of RAM, which is mapped as long as the machine lives; nothing else accesses it now, since the
                // machine is ours alone.
                unsafe { *page.add((gpa % PAGE_SIZE) as usize) ^= 1 << bit };
                true
            }
            Bit::Filled(fill, count, bit) if bit < 8 && count > 0 => {
                let ram = self.ram();
                let pages: Vec<usize> = (0..ram.flags().pages()).filter(|page| fill.fills(ram.page_bytes(*page))).collect();
                let count = usize::from(count);
                pages.len() >= count
                    && (0..count).all(|n| {
                        let page = pages[n * pages.len() / count];
                        self.flip(Bit::Ram(self.ram().gpa_of_page(page) + 0x123, bit))
                    })
            }
            Bit::Register(number, bit) if number < 16 && bit < 64 => {
                let mut state = self.cpu_state().clone();
                state.gpr[usize::from(number)] ^= 1 << bit;
                self.set_cpu_state(state);
                true
            }
            _ => false,
        }
    }

    /// Looks through all RAM for pages that are not what they were when they were digested last, although nobody wrote to them: memory that
    /// has gone bad. From then on they count as they are. The digest is brought up to date first.
    pub fn scrub(&mut self) -> Vec<usize> {
        self.scrub_pages(0..self.ram().flags().pages())
    }

    /// A part of [`Machine::scrub`]: these pages, as far as they exist.
    pub fn scrub_pages(&mut self, pages: std::ops::Range<usize>) -> Vec<usize> {
        self.digest_ram();
        self.rehash(pages.start..pages.end.min(self.ram().flags().pages()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    #[test]
    fn what_flips_is_seen_by_scrubbing_only() {
        let mut machine = Machine::new(Config { ram_mib: 64, ..Config::default() }, Vec::new()).unwrap();
        assert!(machine.write_ram_page(5, &[7; 4096]));
        let before = machine.digest();
        let consumer = machine.track_dirty("test", crate::Start::Nothing);
        assert!(machine.flip(Bit::Ram(5 * 4096 + 9, 3)));
        assert_eq!(machine.ram().page_bytes(5)[9], 7 ^ 8);
        assert!(machine.take_dirty(consumer).is_empty());
        assert!(machine.digest().differences(&before).is_empty());
        assert_eq!((machine.scrub_pages(0..5), machine.scrub_pages(6..usize::MAX)), (vec![], vec![]));
        assert_eq!(machine.scrub(), [5]);
        assert_eq!(machine.digest().differences(&before), ["ram"]);
        assert!(machine.scrub().is_empty());
        assert!(machine.flip(Bit::Ram(5 * 4096 + 9, 3)));
        assert!(machine.flip(Bit::Ram(6 * 4096, 0)), "a page of zeroes");
        assert_eq!(machine.scrub(), [5, 6]);
        assert_eq!(machine.digest().differences(&before), ["ram"]);
        assert!(machine.flip(Bit::Ram(6 * 4096, 0)));
        assert_eq!(machine.scrub(), [6]);
        assert!(machine.digest().differences(&before).is_empty());
    }

    #[test]
    fn pages_are_found_by_what_fills_them() {
        let mut machine = Machine::new(Config { ram_mib: 64, ..Config::default() }, Vec::new()).unwrap();
        let text = b"ABCDEFG\n";
        for page in [3, 5, 7, 11] {
            let filled: Vec<u8> = text.iter().cycle().skip(page).take(4096).copied().collect();
            assert!(machine.write_ram_page(page, filled.as_slice().try_into().unwrap()));
        }
        let mut other: Vec<u8> = text.iter().cycle().take(4096).copied().collect();
        other[4000] = b'x';
        assert!(machine.write_ram_page(9, other.as_slice().try_into().unwrap()));
        machine.scrub();
        let fill = Fill::new(text).unwrap();
        assert!(
            !machine.flip(Bit::Filled(fill, 5, 0))
                && !machine.flip(Bit::Filled(fill, 0, 0))
                && !machine.flip(Bit::Filled(fill, 1, 8))
        );
        assert!(machine.flip(Bit::Filled(fill, 2, 0)));
        assert_eq!(machine.scrub(), [3, 7]);
        assert!(machine.flip(Bit::Filled(fill, 2, 0)), "those that are still whole");
        assert_eq!(machine.scrub(), [5, 11]);
        assert_eq!((Fill::new(b""), Fill::new(&[1; 17])), (None, None));
    }

    #[test]
    fn registers_flip_and_what_is_not_there_does_not() {
        let mut machine = Machine::new(Config { ram_mib: 64, ..Config::default() }, Vec::new()).unwrap();
        let before = machine.digest();
        assert!(machine.flip(Bit::Register(3, 63)));
        assert_eq!(machine.digest().differences(&before), ["cpu.rbx"]);
        for bit in [Bit::Register(16, 0), Bit::Register(0, 64), Bit::Ram(0, 8), Bit::Ram(64 << 20, 0), Bit::Ram(u64::MAX, 0)] {
            assert!(!machine.flip(bit), "{bit:?}");
        }
    }
}
