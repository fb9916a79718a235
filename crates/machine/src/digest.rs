//! The digest of a machine's state: do two machines agree, and if not, in what?
//!
//! **In:** pages of RAM that changed, the processor's state, the devices' payloads. **Out:** a [`Digest`] of named parts. **Invariant:** equal states give equal
//! digests, whatever the order in which pages changed; the cost follows the number of changed pages, not the size of RAM.
//!
//! RAM's part is the wrapping sum of the hashes of its pages (xxh3-128, seeded by the page number; 0 for a page of zeroes, so that untouched RAM
//! costs nothing). It finds differences that happen; it is no defence against somebody who makes them.
use crate::payload::Payload;
use minicbor::{Decode, Encode};
use std::fmt;
use twinstep_x86::state::seg;
use twinstep_x86::{CpuState, PAGE_SIZE, Segment};
use xxhash_rust::xxh3::{xxh3_128, xxh3_128_with_seed};

/// 128 bits; CBOR has no such integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
struct Hash(#[n(0)] u64, #[n(1)] u64);

impl From<u128> for Hash {
    fn from(value: u128) -> Self {
        Self((value >> 64) as u64, value as u64)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct Part {
    #[n(0)]
    name: String,
    #[n(1)]
    hash: Hash,
}

/// What a machine's state is, in short. Encodes with minicbor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Digest {
    #[n(0)]
    parts: Vec<Part>,
}

impl Digest {
    pub(crate) fn new(ram: &RamDigest, cpu: &CpuState, payloads: &[Payload]) -> Self {
        let mut parts = vec![Part { name: "ram".into(), hash: ram.sum.into() }];
        parts.extend(cpu_parts(cpu));
        // The processor's own payload would only say again that something in it differs.
        for payload in payloads.iter().filter(|p| p.kind != "cpu") {
            parts.push(Part { name: payload.kind.clone(), hash: xxh3_128(&payload.bytes).into() });
        }
        Self { parts }
    }

    /// The names of the parts in which two digests differ: `ram`, `cpu.rip`, `virtio-net0`, ... Empty if they are equal.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let find = |digest: &Self, name: &str| digest.parts.iter().find(|p| p.name == name).map(|p| p.hash);
        let mut names: Vec<_> =
            self.parts.iter().filter(|p| find(other, &p.name) != Some(p.hash)).map(|p| p.name.clone()).collect();
        names.extend(other.parts.iter().filter(|p| find(self, &p.name).is_none()).map(|p| p.name.clone()));
        names
    }

    /// One number for the whole.
    pub fn total(&self) -> u128 {
        let mut bytes = Vec::new();
        for part in &self.parts {
            bytes.extend((part.name.len() as u64).to_le_bytes());
            bytes.extend(part.name.as_bytes());
            bytes.extend(part.hash.0.to_le_bytes());
            bytes.extend(part.hash.1.to_le_bytes());
        }
        xxh3_128(&bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.total())
    }
}

/// The running digest of RAM.
#[derive(Debug)]
pub(crate) struct RamDigest {
    pages: Vec<u128>,
    sum: u128,
}

impl RamDigest {
    /// RAM of `pages` pages, all zero.
    pub(crate) fn of_zeroes(pages: usize) -> Self {
        Self { pages: vec![0; pages], sum: 0 }
    }

    /// The hash of one page.
    pub(crate) fn hash(page: usize, bytes: &[u8; PAGE_SIZE as usize]) -> u128 {
        if Self::is_zero(bytes) {
            return 0;
        }
        xxh3_128_with_seed(bytes, page as u64)
    }

    /// Whether a page is all zero.
    pub(crate) fn is_zero(bytes: &[u8; PAGE_SIZE as usize]) -> bool {
        bytes.as_chunks::<64>().0.iter().all(|chunk| *chunk == [0; 64])
    }

    /// A page changed.
    pub(crate) fn update(&mut self, page: usize, bytes: &[u8; PAGE_SIZE as usize]) {
        let hash = Self::hash(page, bytes);
        let old = std::mem::replace(&mut self.pages[page], hash);
        self.sum = self.sum.wrapping_sub(old).wrapping_add(hash);
    }

    /// The hash of every page.
    pub(crate) fn pages(&self) -> &[u128] {
        &self.pages
    }
}

/// Every field of the processor's state, under its own name. The compiler complains here when a field is added.
fn cpu_parts(state: &CpuState) -> Vec<Part> {
    let CpuState {
        gpr,
        rip,
        rflags,
        seg,
        tr,
        ldtr,
        gdtr,
        idtr,
        cr0,
        cr2,
        cr3,
        cr4,
        dr,
        efer,
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        sysenter,
        pat,
        tsc_aux,
        tsc_offset,
        misc_enable,
        mtrr_def_type,
        mtrr_fixed,
        mtrr_var,
        cpl,
        halted,
        interrupt_shadow,
        pdpte,
        fx,
        ymm_high,
        xcr0,
    } = state;
    let mut parts = Vec::with_capacity(64);
    let mut add = |name: &str, words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        parts.push(Part { name: format!("cpu.{name}"), hash: xxh3_128(&bytes).into() });
    };
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    for (name, &value) in names.iter().zip(gpr) {
        add(name, &[value]);
    }
    let words = |s: &Segment| [s.base, s.limit.into(), s.selector.into(), s.attributes.into()];
    for (name, index) in [("es", seg::ES), ("cs", seg::CS), ("ss", seg::SS), ("ds", seg::DS), ("fs", seg::FS), ("gs", seg::GS)] {
        add(name, &words(&seg[index]));
    }
    add("tr", &words(tr));
    add("ldtr", &words(ldtr));
    add("gdtr", &[gdtr.base, gdtr.limit.into()]);
    add("idtr", &[idtr.base, idtr.limit.into()]);
    let single: [(&str, u64); 23] = [
        ("rip", *rip),
        ("rflags", *rflags),
        ("cr0", *cr0),
        ("cr2", *cr2),
        ("cr3", *cr3),
        ("cr4", *cr4),
        ("efer", *efer),
        ("star", *star),
        ("lstar", *lstar),
        ("cstar", *cstar),
        ("sfmask", *sfmask),
        ("kernel_gs_base", *kernel_gs_base),
        ("pat", *pat),
        ("tsc_aux", *tsc_aux),
        ("tsc_offset", *tsc_offset),
        ("misc_enable", *misc_enable),
        ("cpl", (*cpl).into()),
        ("halted", (*halted).into()),
        ("interrupt_shadow", (*interrupt_shadow).into()),
        ("sysenter_cs", sysenter[0]),
        ("sysenter_esp", sysenter[1]),
        ("sysenter_eip", sysenter[2]),
        ("mtrr_def_type", *mtrr_def_type),
    ];
    for (name, value) in single {
        add(name, &[value]);
    }
    add("dr", dr);
    add("mtrr", &[&mtrr_fixed[..], &mtrr_var[..]].concat());
    // Older recordings know of none; only PAE paging outside long mode has any.
    if *pdpte != [0; 4] {
        add("pdpte", pdpte);
    }
    // Told only where they are not as after reset: recordings made before there was AVX do not have them.
    if *xcr0 != 1 {
        add("xcr0", &[*xcr0]);
    }
    if ymm_high.as_flattened().iter().any(|&word| word != 0) {
        add("ymm_high", ymm_high.as_flattened());
    }
    parts.push(Part { name: "cpu.fx".into(), hash: xxh3_128(&fx.0).into() });
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_sum_does_not_depend_on_order() {
        let (one, two, zero) = ([1; 4096], [2; 4096], [0; 4096]);
        let mut a = RamDigest::of_zeroes(4);
        let mut b = RamDigest::of_zeroes(4);
        a.update(0, &one);
        a.update(3, &two);
        b.update(3, &one);
        b.update(3, &two);
        assert_ne!(a.sum, b.sum);
        b.update(0, &one);
        assert_eq!(a.sum, b.sum);
        a.update(0, &zero);
        a.update(3, &zero);
        assert_eq!((a.sum, a.pages()), (0, &[0; 4][..]));
        // The same bytes elsewhere are something else.
        a.update(1, &one);
        b.update(3, &zero);
        assert_ne!(a.sum, b.sum);
    }

    #[test]
    fn differences_have_names() {
        let ram = RamDigest::of_zeroes(1);
        let serial = Payload { kind: "serial".into(), version: 1, bytes: vec![1] };
        let mut state = CpuState::reset();
        let a = Digest::new(&ram, &state, std::slice::from_ref(&serial));
        state.rip += 1;
        state.fx.0[100] = 1;
        let b = Digest::new(&ram, &state, &[Payload { bytes: vec![2], ..serial }]);
        assert_eq!(a.differences(&b), ["cpu.rip", "cpu.fx", "serial"]);
        assert!(a.differences(&a).is_empty());
        assert_ne!(a.total(), b.total());
        let bytes = minicbor::to_vec(&a).unwrap();
        assert_eq!(minicbor::decode::<Digest>(&bytes).unwrap(), a);
    }
}
