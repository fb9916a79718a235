//! CPU models: what CPUID tells the guest, by name. A model is fixed for ever: two hosts that offer it replay alike.

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
    pub name: &'static str,
    /// What CPUID answers.
    pub leaves: Vec<CpuidLeaf>,
}
