//! Instruction-set features beyond x86-64-v2: which there are, which a CPU model has, which the host's silicon has.
//!
//! **In:** names, or the host's CPUID. **Out:** sets of features. **Invariant:** what a guest may use is the set of its CPU model, never the host's;
//! the host's set only decides whether a model can run here at all.
//!
//! The names are those of /proc/cpuinfo (but for LZCNT, `abm` there), so that people can compare.
use std::fmt;

/// A set of features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Features(u32);

/// Declares the features: constant, name, whether the host must have it for a guest to use it.
macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $text:literal, $host:expr;)*) => {
        #[allow(missing_docs)]
        impl Features {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*
            /// Every feature there is, in the order in which sets are written.
            const ALL: &'static [(Self, &'static str)] = &[$((Self::$name, $text)),*];
            /// What the host's silicon can execute.
            pub fn of_host() -> Self {
                let mut set = Self::NONE;
                $(if $host { set = set.with(Self::$name); })*
                set
            }
        }
    };
}

features! {
    ADX = 0, "adx", is_x86_feature_detected!("adx");
    AES = 1, "aes", is_x86_feature_detected!("aes");
    AVX = 2, "avx", is_x86_feature_detected!("avx");
    AVX2 = 3, "avx2", is_x86_feature_detected!("avx2");
    BMI1 = 4, "bmi1", is_x86_feature_detected!("bmi1");
    BMI2 = 5, "bmi2", is_x86_feature_detected!("bmi2");
    F16C = 6, "f16c", is_x86_feature_detected!("f16c");
    FMA = 7, "fma", is_x86_feature_detected!("fma");
    GFNI = 8, "gfni", is_x86_feature_detected!("gfni");
    LZCNT = 9, "lzcnt", is_x86_feature_detected!("lzcnt");
    MOVBE = 10, "movbe", is_x86_feature_detected!("movbe");
    PCLMULQDQ = 11, "pclmulqdq", is_x86_feature_detected!("pclmulqdq");
    SHA = 12, "sha_ni", is_x86_feature_detected!("sha");
    VAES = 13, "vaes", is_x86_feature_detected!("vaes");
    VPCLMULQDQ = 14, "vpclmulqdq", is_x86_feature_detected!("vpclmulqdq");
    /// XSAVE, XSAVEOPT, XSAVEC, XRSTOR, XGETBV, XSETBV. Module `sys` executes them, so any host will do.
    XSAVE = 15, "xsave", true;
}

impl Features {
    /// None of them: x86-64-v2.
    pub const NONE: Self = Self(0);
    /// What x86-64-v3 has beyond v2 (x86-64 psABI version 1.0 section 3.1.1).
    pub const V3: Self = Self::AVX
        .with(Self::AVX2)
        .with(Self::BMI1)
        .with(Self::BMI2)
        .with(Self::F16C)
        .with(Self::FMA)
        .with(Self::LZCNT)
        .with(Self::MOVBE)
        .with(Self::XSAVE);
    /// What `host-common` takes beyond v3, of what the host has.
    pub const OPTIONAL: Self =
        Self::ADX.with(Self::AES).with(Self::GFNI).with(Self::PCLMULQDQ).with(Self::SHA).with(Self::VAES).with(Self::VPCLMULQDQ);

    /// Both sets together.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// What is in both sets.
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    /// What is not in the other set.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    /// Whether all of another set are in this one.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// Whether it is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// The feature of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, text)| *text == name).map(|(feature, _)| *feature)
    }
    /// The names, in their one order.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::ALL.iter().filter(move |(feature, _)| self.has(*feature)).map(|(_, text)| *text)
    }
    /// As CPUID has them: ECX of leaf 1, EBX and ECX of leaf 7, ECX of leaf 8000_0001.
    pub fn cpuid(self) -> [u32; 4] {
        let bit = |feature, n: u32| u32::from(self.has(feature)) << n;
        let leaf1 = bit(Self::PCLMULQDQ, 1)
            | bit(Self::FMA, 12)
            | bit(Self::MOVBE, 22)
            | bit(Self::AES, 25)
            | bit(Self::XSAVE, 26)
            | bit(Self::AVX, 28)
            | bit(Self::F16C, 29);
        let leaf7_ebx = bit(Self::BMI1, 3) | bit(Self::AVX2, 5) | bit(Self::BMI2, 8) | bit(Self::ADX, 19) | bit(Self::SHA, 29);
        let leaf7_ecx = bit(Self::GFNI, 8) | bit(Self::VAES, 9) | bit(Self::VPCLMULQDQ, 10);
        [leaf1, leaf7_ebx, leaf7_ecx, bit(Self::LZCNT, 5)]
    }
}

/// The names with commas between them.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.names().enumerate() {
            write!(f, "{}{name}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets() {
        let set = Features::SHA.with(Features::AES);
        assert_eq!(set.to_string(), "aes, sha_ni");
        assert!(set.has(Features::AES) && !set.has(Features::V3) && set.has(Features::NONE));
        assert_eq!(set.without(Features::AES), Features::SHA);
        assert_eq!(set.common(Features::V3), Features::NONE);
        assert_eq!(Features::by_name("sha_ni"), Some(Features::SHA));
        assert_eq!(Features::by_name("mmx"), None);
        for (feature, name) in Features::ALL {
            assert_eq!(Features::by_name(name), Some(*feature));
        }
        assert!(Features::V3.common(Features::OPTIONAL).is_empty());
    }

    /// Each feature has one bit of CPUID, and no two the same.
    #[test]
    fn bits_of_cpuid() {
        let mut seen = [0; 4];
        for (feature, name) in Features::ALL {
            let bits = feature.cpuid();
            assert_eq!(bits.iter().map(|w| w.count_ones()).sum::<u32>(), 1, "{name}");
            for (all, new) in seen.iter_mut().zip(bits) {
                assert_eq!(*all & new, 0, "{name}");
                *all |= new;
            }
        }
    }
}
