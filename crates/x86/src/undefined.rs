//! What this host's silicon makes of flags that the manuals leave undefined.
//!
//! **In:** nothing. **Out:** for each class of instructions, whether the status flags it leaves depend on the flags before it.
//!
//! Undefined flags are whatever the silicon makes of them (docs/positions.md). Where the silicon makes them from the operands alone, an
//! instruction kills all flags, and the translator need not keep the old ones. That is asked of the silicon itself, once.
use std::sync::OnceLock;

/// Classes of instructions that leave no trace of the flags before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Independent {
    /// AND, OR, XOR, TEST; and TEST of the result leaves the same flags.
    pub logic: bool,
    /// SHL, SHR, SAR by a constant that is not 0.
    pub shift: bool,
    /// SHLD, SHRD by a constant that is not 0.
    pub double_shift: bool,
    /// BSF, BSR.
    pub scan: bool,
}

const STATUS: u64 = 0x8d5;
/// The two settings of all status flags that are tried.
const BEFORE: [u64; 2] = [2, 2 | STATUS];

/// Runs one instruction on rax and rcx with given flags; gives the status flags it leaves.
macro_rules! flags_after {
    ($insn:literal, $a:expr, $b:expr, $before:expr) => {{
        let after: u64;
        // SAFETY: changes registers that are declared; the stack is used below no red zone (no `nostack`).
        unsafe {
            std::arch::asm!(
                "push {f}", "popfq", $insn, "pushfq", "pop {f}",
                f = inout(reg) $before => after,
                inout("rax") $a => _,
                in("rcx") $b,
            );
        }
        after & STATUS
    }};
}

/// Whether the flags after an instruction are the same whatever they were before.
macro_rules! same {
    ($a:expr, $b:expr, $($insn:literal),+) => {
        $(flags_after!($insn, $a, $b, BEFORE[0]) == flags_after!($insn, $a, $b, BEFORE[1]))&&+
    };
}

fn probe() -> Independent {
    let mut found = Independent { logic: true, shift: true, double_shift: true, scan: true };
    // Corner values, and a fixed sequence of others.
    let mut values = vec![0u64, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, 1 << 63, u64::MAX];
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    values.extend((0..52).map(|_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    }));
    for (i, &a) in values.iter().enumerate() {
        for &b in [values[(i * 7 + 3) % values.len()], a].iter() {
            found.logic &= same!(
                a,
                b,
                "and rax, rcx",
                "or rax, rcx",
                "xor rax, rcx",
                "test rax, rcx",
                "and eax, ecx",
                "or eax, ecx",
                "xor eax, ecx",
                "test eax, ecx",
                "and ax, cx",
                "or ax, cx",
                "xor ax, cx",
                "test ax, cx",
                "and al, cl",
                "or al, cl",
                "xor al, cl",
                "test al, cl"
            );
            found.logic &= flags_after!("and rax, rcx", a, b, BEFORE[1]) == flags_after!("test rax, rax", a & b, b, BEFORE[0])
                && flags_after!("or rax, rcx", a, b, BEFORE[1]) == flags_after!("test rax, rax", a | b, b, BEFORE[0])
                && flags_after!("xor al, cl", a, b, BEFORE[1]) == flags_after!("test al, al", a ^ b, b, BEFORE[0]);
            found.shift &= same!(
                a,
                b,
                "shl rax, 1",
                "shr rax, 1",
                "sar rax, 1",
                "shl rax, 5",
                "shr rax, 5",
                "sar rax, 63",
                "shl eax, 1",
                "shr eax, 1",
                "sar eax, 1",
                "shl eax, 31",
                "shr eax, 9",
                "sar eax, 9",
                "shl ax, 1",
                "shr ax, 1",
                "sar ax, 1",
                "shl ax, 9",
                "shr ax, 20",
                "sar ax, 31",
                "shl al, 1",
                "shr al, 1",
                "sar al, 1",
                "shl al, 5",
                "shr al, 9",
                "sar al, 31"
            );
            found.double_shift &= same!(
                a,
                b,
                "shld rax, rcx, 1",
                "shrd rax, rcx, 1",
                "shld rax, rcx, 9",
                "shrd rax, rcx, 63",
                "shld eax, ecx, 1",
                "shrd eax, ecx, 9",
                "shld ax, cx, 9",
                "shrd ax, cx, 9",
                "shld ax, cx, 21",
                "shrd ax, cx, 17"
            );
            found.scan &= same!(a, b, "bsf rax, rcx", "bsr rax, rcx", "bsf eax, ecx", "bsr eax, ecx", "bsf ax, cx", "bsr ax, cx");
        }
    }
    found
}

/// The host's answer.
pub fn independent() -> Independent {
    static FOUND: OnceLock<Independent> = OnceLock::new();
    *FOUND.get_or_init(probe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_twice_gives_the_same_answer() {
        assert_eq!(probe(), probe());
        assert_eq!(independent(), probe());
    }

    #[test]
    fn a_rotation_does_depend_on_the_flags_before() {
        assert!(!same!(5u64, 0u64, "rol rax, 3"), "the probe sees nothing");
    }
}
