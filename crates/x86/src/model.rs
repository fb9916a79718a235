//! CPU models: what CPUID tells the guest, by name. A model is fixed for ever: two hosts that offer it replay alike.
//!
//! **In:** a name; then a leaf and a subleaf. **Out:** a model; four registers, the same on every host.
//!
//! | name | what it has |
//! | --- | --- |
//! | `x86-64-v2` | SSE4.2, POPCNT, CX16 |
//! | `x86-64-v3` | and [`Features::V3`] |
//! | `host-common` | and what this host has of [`Features::OPTIONAL`]: stands for the next |
//! | `host-common+aes+...` | v3 and exactly the features named |
//!
//! **Invariant:** a model's name says all of it: models of the same name are the same on every host. So `host-common` is no model's name;
//! [`CpuModel::by_name`] makes the full one of it, which snapshots, recordings and pairs carry. A feature bit is set only if the
//! engine executes what it promises (see also `sys::offered`).
//!
//! References: APM vol. 3 appendix E (CPUID), SDM vol. 1 section 13.2 (leaf D), Linux Documentation/virt/kvm/x86/cpuid.rst (leaves
//! 4000_0000 and up).
use crate::mmu::PHYSICAL_BITS;
use crate::state::{cr4, xcr0};
use crate::{CpuState, Features};

/// One answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// EAX at entry.
    pub leaf: u32,
    /// ECX at entry; ignored for leaves without subleaves (`None`).
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX at exit.
    pub regs: [u32; 4],
}

/// A named CPU model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    /// Its name, as people and recordings write it.
    pub name: String,
    /// What it has beyond x86-64-v2.
    pub features: Features,
    /// What CPUID answers.
    pub leaves: Vec<CpuidLeaf>,
}

/// Frequency of the time-stamp counter, in kHz.
const TSC_KHZ: u32 = 1_000_000;

/// Family 19h, model 1, stepping 1: with the "not affected" bits below, Linux looks for none of its silicon's bugs.
const SIGNATURE: u32 = 0x00a0_0f11;

/// A word with the given bits set.
const fn bits(list: &[u32]) -> u32 {
    let (mut word, mut i) = (0, 0);
    while i < list.len() {
        word |= 1 << list[i];
        i += 1;
    }
    word
}

/// Bits of leaf 1.
mod leaf1 {
    use super::bits;
    /// Those of EDX that leaf 8000_0001 repeats: FPU, DE, PSE, TSC, MSR, PAE, CX8, APIC, MTRR, PGE, CMOV, PAT, PSE36, MMX, FXSR.
    pub const COMMON: u32 = bits(&[0, 2, 3, 4, 5, 6, 8, 9, 12, 13, 15, 16, 17, 23, 24]);
    /// And SEP, CLFSH, SSE, SSE2.
    pub const EDX: u32 = COMMON | bits(&[11, 19, 25, 26]);
    /// SSE3, SSSE3, CX16, PCID, SSE4.1, SSE4.2, x2APIC, POPCNT, TSC deadline, hypervisor.
    pub const ECX: u32 = bits(&[0, 9, 13, 17, 19, 20, 21, 23, 24, 31]);
    pub const XSAVE: u32 = 1 << 26;
    pub const OSXSAVE: u32 = 1 << 27;
}

/// Stands for v3 and what this host has of the optional features.
const HOST_COMMON: &str = "host-common";

/// Bytes of the legacy region and the header of an XSAVE area; and with AVX.
const XSAVE_LEGACY_BYTES: u32 = 576;
const XSAVE_BYTES: u32 = XSAVE_LEGACY_BYTES + 256;

impl CpuModel {
    /// The model called `name`, if there is one. `host-common` becomes the full name of what this host has.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "x86-64-v2" => return Some(Self::x86_64_v2()),
            "x86-64-v3" => return Some(Self::x86_64_v3()),
            HOST_COMMON => return Some(Self::host_common(Features::of_host())),
            _ => {}
        }
        let mut set = Features::NONE;
        for feature in name.strip_prefix(HOST_COMMON)?.strip_prefix('+')?.split('+') {
            set = set.with(Features::by_name(feature).filter(|&f| Features::OPTIONAL.has(f))?);
        }
        Some(Self::host_common(set))
    }

    /// The names people can choose from.
    pub const NAMES: [&str; 3] = ["x86-64-v2", "x86-64-v3", HOST_COMMON];

    /// What this host lacks to run it; empty if it can.
    pub fn missing(&self) -> Features {
        self.features.without(Features::of_host())
    }

    /// Whether `st` is a state a processor of this model can be in, as far as the model matters.
    pub fn allows(&self, st: &CpuState) -> bool {
        let xsave = self.features.has(Features::XSAVE) || st.cr4 & cr4::OSXSAVE == 0;
        xsave && st.xcr0 & !self.xcr0_bits() == 0 && (self.features.has(Features::AVX) || st.ymm_high == [[0; 2]; 16])
    }

    /// XCR0 bits that can be set.
    pub(crate) fn xcr0_bits(&self) -> u64 {
        match (self.features.has(Features::XSAVE), self.features.has(Features::AVX)) {
            (false, _) => xcr0::X87,
            (true, false) => xcr0::X87 | xcr0::SSE,
            (true, true) => xcr0::X87 | xcr0::SSE | xcr0::AVX,
        }
    }

    /// The baseline called x86-64-v2 (SSE4.2, POPCNT, CX16), as a processor of AMD's: those need no page-table
    /// isolation. One core, one thread.
    pub fn x86_64_v2() -> Self {
        Self::with("x86-64-v2", "x86-64-v2".into(), Features::NONE)
    }

    /// The baseline called x86-64-v3 (AVX2, BMI2, FMA, MOVBE).
    pub fn x86_64_v3() -> Self {
        Self::with("x86-64-v3", "x86-64-v3".into(), Features::V3)
    }

    /// v3 and what `set` has of the optional features.
    pub fn host_common(set: Features) -> Self {
        let optional = set.common(Features::OPTIONAL);
        let name = std::iter::once(HOST_COMMON).chain(optional.names()).collect::<Vec<_>>().join("+");
        // With none of them it is v3, under that name: `host-common` alone says nothing.
        if optional.is_empty() { Self::x86_64_v3() } else { Self::with(HOST_COMMON, name, Features::V3.with(optional)) }
    }

    /// A model of a family (for the brand string), its full name, and what it has beyond v2.
    fn with(family: &str, name: String, features: Features) -> Self {
        let [leaf1_ecx, leaf7_ebx, leaf7_ecx, extended_ecx] = features.cpuid();
        let mut leaves = Vec::new();
        let mut add = |leaf, subleaf, regs| leaves.push(CpuidLeaf { leaf, subleaf, regs });
        let [b, d, c] = text("AuthenticAMD");
        add(0, None, [0xd, b, c, d]);
        // CLFLUSH line of 8 quadwords, one logical processor.
        add(1, None, [SIGNATURE, 1 << 16 | 8 << 8, leaf1::ECX | leaf1_ecx, leaf1::EDX]);
        // The APIC timer runs always (ARAT).
        add(6, None, [1 << 2, 0, 0, 0]);
        // TSC_ADJUST; INVPCID; fast REP MOVSB and STOSB (they are done a page at a time here, so guests should use them).
        add(7, Some(0), [0, bits(&[1, 9, 10]) | leaf7_ebx, leaf7_ecx, 0]);
        // Topology: one thread a core, one core.
        add(0xb, Some(0), [0, 1, 0x100, 0]);
        add(0xb, Some(1), [0, 1, 0x201, 0]);
        if features.has(Features::XSAVE) {
            // EBX (bytes an area takes with what is enabled now) depends on the state: see `cpuid`.
            add(0xd, Some(0), [xcr0::ALL as u32, 0, XSAVE_BYTES, 0]);
            // XSAVEOPT, XSAVEC, XGETBV of what is in use.
            add(0xd, Some(1), [bits(&[0, 1, 2]), 0, 0, 0]);
            // AVX: 256 bytes behind legacy region and header.
            add(0xd, Some(2), [256, XSAVE_LEGACY_BYTES, 0, 0]);
        }

        let [b, c, d] = text("KVMKVMKVM\0\0\0");
        add(0x4000_0000, None, [0x4000_0010, b, c, d]);
        // Clock source (both MSR numbers), no delay needed after port I/O, stable clock.
        add(0x4000_0001, None, [bits(&[0, 1, 3, 24]), 0, 0, 0]);
        // TSC and APIC bus frequency in kHz.
        add(0x4000_0010, None, [TSC_KHZ, TSC_KHZ, 0, 0]);

        let [b, d, c] = text("AuthenticAMD");
        add(0x8000_0000, None, [0x8000_0021, b, c, d]);
        // LAHF_LM; what leaf 1 has in common, SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
        let common = leaf1::EDX & 0x0183_f3ff & !(1 << 11);
        let extended = common | 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
        add(0x8000_0001, None, [SIGNATURE, 0, 1 | extended_ecx, extended]);
        let brand = text::<12>(&format!("Twinstep {family}"));
        for (i, part) in brand.chunks_exact(4).enumerate() {
            add(0x8000_0002 + i as u32, None, [part[0], part[1], part[2], part[3]]);
        }
        // L1: 32 KiB, 8 ways, 64-byte lines each; TLBs of 64 entries. L2: 512 KiB, 8 ways. No L3.
        add(0x8000_0005, None, [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140]);
        add(0x8000_0006, None, [0, 0x6400_6400, 0x0200_6140, 0]);
        // Invariant TSC.
        add(0x8000_0007, None, [0, 0, 0, 1 << 8]);
        // Address sizes; error pointers always restored (FIP and friends are constants here), and not affected by: speculative store bypass (26),
        // branch type confusion (29). One core.
        add(0x8000_0008, None, [48 << 8 | PHYSICAL_BITS, bits(&[2, 26, 29]), 0, 0]);
        // LFENCE serialises (2), null selectors clear the base (6), automatic IBRS (8), not affected by speculative return
        // stack overflow (29); ECX: not affected by transient scheduler attacks (1, 2).
        add(0x8000_0021, None, [bits(&[2, 6, 8, 29]), 0, bits(&[1, 2]), 0]);
        Self { name, features, leaves }
    }

    /// What CPUID answers in state `st`. Leaves that do not exist read as zero, as AMD's do.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, st: &CpuState) -> [u32; 4] {
        let found = self.leaves.iter().find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf));
        let mut regs = found.map_or([0; 4], |l| l.regs);
        match leaf {
            1 => {
                regs[2] &= !leaf1::OSXSAVE;
                if regs[2] & leaf1::XSAVE != 0 && st.cr4 & cr4::OSXSAVE != 0 {
                    regs[2] |= leaf1::OSXSAVE;
                }
            }
            0xd if subleaf < 2 && found.is_some() => {
                let avx = st.xcr0 & xcr0::AVX != 0;
                regs[1] = if avx { XSAVE_BYTES } else { XSAVE_LEGACY_BYTES };
            }
            // Levels that do not exist still say which was asked for.
            0xb if found.is_none() => regs[2] = subleaf & 0xff,
            _ => {}
        }
        regs
    }
}

/// Text as the little-endian words CPUID returns it in.
fn text<const N: usize>(s: &str) -> [u32; N] {
    let mut words = [0; N];
    for (i, b) in s.bytes().take(4 * N).enumerate() {
        words[i / 4] |= (b as u32) << (8 * (i % 4));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(leaf: u32, subleaf: u32) -> [u32; 4] {
        CpuModel::x86_64_v2().cpuid(leaf, subleaf, &CpuState::reset())
    }
    fn ascii(words: &[u32]) -> String {
        words.iter().flat_map(|w| w.to_le_bytes()).filter(|&b| b != 0).map(char::from).collect()
    }

    #[test]
    fn names() {
        assert_eq!(CpuModel::by_name("x86-64-v2"), Some(CpuModel::x86_64_v2()));
        assert_eq!(CpuModel::by_name("x86-64-v9"), None);
        let [_, b, c, d] = ask(0, 0);
        assert_eq!(ascii(&[b, d, c]), "AuthenticAMD");
        let [_, b, c, d] = ask(0x4000_0000, 0);
        assert_eq!(ascii(&[b, c, d]), "KVMKVMKVM");
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|l| ask(l, 0)).collect();
        assert_eq!(ascii(&brand), "Twinstep x86-64-v2");
    }

    /// The levels of the x86-64 psABI, version 1.0 section 3.1.1.
    #[test]
    fn v2_and_no_more() {
        let [_, _, c, d] = ask(1, 0);
        for bit in [0, 8, 15, 23, 24, 25, 26] {
            assert_ne!(d & 1 << bit, 0, "EDX {bit}");
        }
        for bit in [0, 9, 13, 19, 20, 23] {
            assert_ne!(c & 1 << bit, 0, "ECX {bit}");
        }
        // PCLMUL, MONITOR, SMX, VMX, FMA, MOVBE, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND; VME, MCE, MCA.
        for bit in [1, 3, 5, 6, 12, 22, 25, 26, 27, 28, 29, 30] {
            assert_eq!(c & 1 << bit, 0, "ECX {bit}");
        }
        for bit in [1, 7, 14] {
            assert_eq!(d & 1 << bit, 0, "EDX {bit}");
        }
        assert_eq!(ask(7, 0), [0, 0x602, 0, 0]);
        assert_eq!(ask(7, 1), [0; 4]);
        let [_, _, c, d] = ask(0x8000_0001, 0);
        assert_eq!(c, 1);
        for bit in [11, 20, 26, 27, 29] {
            assert_ne!(d & 1 << bit, 0, "extended EDX {bit}");
        }
        assert_eq!(ask(0x8000_0008, 0)[0], 0x3028);
    }

    #[test]
    fn v3_and_what_is_chosen_beyond() {
        let st = CpuState::reset();
        let v3 = CpuModel::x86_64_v3();
        let [_, _, c, _] = v3.cpuid(1, 0, &st);
        for bit in [12, 22, 26, 28, 29] {
            assert_ne!(c & 1 << bit, 0, "ECX {bit}");
        }
        // PCLMUL, AES, OSXSAVE (not yet).
        assert_eq!(c & (1 << 1 | 1 << 25 | 1 << 27), 0);
        assert_eq!(v3.cpuid(7, 0, &st), [0, ask(7, 0)[1] | 1 << 3 | 1 << 5 | 1 << 8, 0, 0]);
        assert_eq!(v3.cpuid(0x8000_0001, 0, &st)[2], 0x21);
        let more = CpuModel::by_name("host-common+sha_ni+aes").expect("a model");
        assert_eq!(more.name, "host-common+aes+sha_ni");
        assert_eq!(CpuModel::by_name(&more.name).as_ref(), Some(&more));
        assert_ne!(more.cpuid(1, 0, &st)[2] & 1 << 25, 0);
        assert_ne!(more.cpuid(7, 0, &st)[1] & 1 << 29, 0);
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|l| more.cpuid(l, 0, &st)).collect();
        assert_eq!(ascii(&brand), "Twinstep host-common");
        for bad in ["host-common+", "host-common+avx", "host-common+mmx", "host-commonaes", "x86-64-v3+aes"] {
            assert_eq!(CpuModel::by_name(bad), None, "{bad}");
        }
    }

    /// A name says all: who is told it builds the same model, whatever that host has.
    #[test]
    fn host_common_has_a_full_name() {
        let here = CpuModel::by_name("host-common").expect("a model");
        assert_ne!(here.name, "host-common");
        assert_eq!(CpuModel::by_name(&here.name).as_ref(), Some(&here));
        assert!(Features::V3.with(Features::OPTIONAL).has(here.features));
        assert_eq!(CpuModel::host_common(Features::NONE), CpuModel::x86_64_v3());
        // What the host lacks of v3 is still missing.
        assert_eq!(here.missing(), Features::V3.without(Features::of_host()));
    }

    /// SDM vol. 1 section 13.2.
    #[test]
    fn the_xsave_area() {
        let mut st = CpuState::reset();
        let v3 = CpuModel::x86_64_v3();
        assert_eq!(v3.cpuid(0xd, 0, &st), [7, 576, 832, 0]);
        assert_eq!(v3.cpuid(0xd, 1, &st), [7, 576, 0, 0]);
        assert_eq!(v3.cpuid(0xd, 2, &st), [256, 576, 0, 0]);
        assert_eq!(v3.cpuid(0xd, 3, &st), [0; 4]);
        st.xcr0 = 7;
        st.cr4 |= cr4::OSXSAVE;
        assert_eq!(v3.cpuid(0xd, 0, &st), [7, 832, 832, 0]);
        assert_eq!(v3.cpuid(0xd, 1, &st)[1], 832);
        assert_ne!(v3.cpuid(1, 0, &st)[2] & 1 << 27, 0);
        assert!(v3.allows(&st) && !CpuModel::x86_64_v2().allows(&st));
        assert!(CpuModel::x86_64_v2().allows(&CpuState::reset()));
    }

    #[test]
    fn what_does_not_exist_is_zero() {
        for leaf in [2, 0xd, 0xe, 0x15, 0x4000_0002, 0x8000_001e, 0x8000_0022, 0xc000_0000, u32::MAX] {
            assert_eq!(ask(leaf, 0), [0; 4]);
        }
        assert_eq!(ask(0xb, 5), [0, 0, 5, 0]);
        assert_eq!(ask(0x8000_0000, 99)[0], 0x8000_0021);
    }

    #[test]
    fn time_is_steady() {
        assert_ne!(ask(0x8000_0007, 0)[3] & 1 << 8, 0);
        assert_eq!(ask(0x4000_0010, 0)[0], 1_000_000);
        let features = ask(0x4000_0001, 0)[0];
        assert_eq!(features & bits(&[0, 3, 24]), bits(&[0, 3, 24]));
    }
}
