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
    /// Of general register number 0 to 15 (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 ...); 0 to 63.
    Register(u8, u8),
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
        self.digest();
        self.rehash()
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
