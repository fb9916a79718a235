//! The processor's part of a snapshot.
//!
//! **In:** a [`CpuState`], or bytes of unknown origin. **Out:** a CBOR array of [`STATE_VERSION`] and a map with a numbered entry for every
//! field; or a state that the engine's invariants hold for.
//!
//! **Invariant:** what [`decode_state`] accepts is a state as instructions could have left it, as far as the engine relies on it: canonical
//! addresses, no reserved bits, control registers that agree with each other. A field's number is never used again for something
//! else; unknown, missing, repeated or left-over data is an error.
use crate::mmu::canonical;
use crate::state::{CpuState, Segment, cr0, cr4, efer, rflags, seg};
use crate::sys;
use minicbor::{Decoder, Encoder};
use std::convert::Infallible;

/// The version [`encode_state`] writes. [`decode_state`] reads it and all before.
pub const STATE_VERSION: u16 = 3;

/// Why bytes are no processor state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Not the CBOR that was expected.
    #[error("the processor state cannot be decoded: {0}")]
    Malformed(String),
    /// A version this program does not know.
    #[error("the processor state has version {0}; this program knows versions up to {STATE_VERSION}")]
    Version(u16),
    /// A field that this version does not have, or not in this place.
    #[error("the processor state has field {found} where field {expected} belongs")]
    Field {
        /// What should come next.
        expected: u8,
        /// What came.
        found: u8,
    },
    /// Too few or too many fields, or words in a field.
    #[error("the processor state has a list of {found} where {expected} belong")]
    Length {
        /// How many there should be.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// Bytes after the end.
    #[error("{0} bytes follow the processor state")]
    LeftOver(usize),
    /// A value no processor can have.
    #[error("the processor state has an impossible value in {0}")]
    Impossible(&'static str),
}

impl From<minicbor::decode::Error> for SnapshotError {
    fn from(e: minicbor::decode::Error) -> Self {
        Self::Malformed(e.to_string())
    }
}

/// Both directions of a field: a coder either writes what it is shown or replaces it, so that the two cannot drift apart.
trait Coder {
    type Error;
    /// Words that belong together.
    fn words(&mut self, values: &mut [u64]) -> Result<(), Self::Error>;
    /// Bytes of fixed length.
    fn bytes(&mut self, values: &mut [u8]) -> Result<(), Self::Error>;
    /// One word.
    fn word(&mut self, value: &mut u64) -> Result<(), Self::Error> {
        self.words(std::slice::from_mut(value))
    }
}

/// The state with its narrow fields widened to words, as it is written.
#[derive(Default)]
struct Wide {
    segments: [[u64; 4]; 8],
    tables: [[u64; 2]; 2],
    /// CPL, halted, interrupt shadow.
    mode: [u64; 3],
}

/// Number of fields; they are numbered from 0 and written in order.
const FIELDS: u8 = 37;
/// Number of fields in each version, from version 1 on. A field that a version does not have is as after reset.
const FIELDS_OF: [u8; 3] = [34, 35, FIELDS];

/// The fields. Segments are ES, CS, SS, DS, FS, GS, TR, LDTR; tables GDTR, IDTR.
fn field<C: Coder>(c: &mut C, number: u8, st: &mut CpuState, wide: &mut Wide) -> Result<(), C::Error> {
    match number {
        0 => c.words(&mut st.gpr),
        1 => c.word(&mut st.rip),
        2 => c.word(&mut st.rflags),
        3..=10 => c.words(&mut wide.segments[number as usize - 3]),
        11 | 12 => c.words(&mut wide.tables[number as usize - 11]),
        13 => c.word(&mut st.cr0),
        14 => c.word(&mut st.cr2),
        15 => c.word(&mut st.cr3),
        16 => c.word(&mut st.cr4),
        17 => c.words(&mut st.dr),
        18 => c.word(&mut st.efer),
        19 => c.word(&mut st.star),
        20 => c.word(&mut st.lstar),
        21 => c.word(&mut st.cstar),
        22 => c.word(&mut st.sfmask),
        23 => c.word(&mut st.kernel_gs_base),
        24 => c.words(&mut st.sysenter),
        25 => c.word(&mut st.pat),
        26 => c.word(&mut st.tsc_aux),
        27 => c.word(&mut st.tsc_offset),
        28 => c.word(&mut st.misc_enable),
        29 => c.word(&mut st.mtrr_def_type),
        30 => c.words(&mut st.mtrr_fixed),
        31 => c.words(&mut st.mtrr_var),
        32 => c.words(&mut wide.mode),
        33 => c.bytes(&mut st.fx.0),
        // Since version 2.
        34 => c.words(&mut st.pdpte),
        // Since version 3.
        35 => c.word(&mut st.xcr0),
        _ => c.words(st.ymm_high.as_flattened_mut()),
    }
}

struct Writer<'a>(Encoder<&'a mut Vec<u8>>);

impl Coder for Writer<'_> {
    type Error = minicbor::encode::Error<Infallible>;
    fn words(&mut self, values: &mut [u64]) -> Result<(), Self::Error> {
        self.0.array(values.len() as u64)?;
        for v in values {
            self.0.u64(*v)?;
        }
        Ok(())
    }
    fn bytes(&mut self, values: &mut [u8]) -> Result<(), Self::Error> {
        self.0.bytes(values)?;
        Ok(())
    }
}

struct Reader<'a>(Decoder<'a>);

impl Reader<'_> {
    /// The length of a list, map or string that must have `expected` entries.
    fn length(found: Option<u64>, expected: u64) -> Result<(), SnapshotError> {
        match found {
            Some(found) if found == expected => Ok(()),
            Some(found) => Err(SnapshotError::Length { expected, found }),
            None => Err(SnapshotError::Malformed("a list of indefinite length".into())),
        }
    }
}

impl Coder for Reader<'_> {
    type Error = SnapshotError;
    fn words(&mut self, values: &mut [u64]) -> Result<(), SnapshotError> {
        Self::length(self.0.array()?, values.len() as u64)?;
        for v in values {
            *v = self.0.u64()?;
        }
        Ok(())
    }
    fn bytes(&mut self, values: &mut [u8]) -> Result<(), SnapshotError> {
        let found = self.0.bytes()?;
        Self::length(Some(found.len() as u64), values.len() as u64)?;
        values.copy_from_slice(found);
        Ok(())
    }
}

/// Encodes the processor's state.
pub fn encode_state(state: &CpuState) -> Vec<u8> {
    let mut st = state.clone();
    sys::settle_fx(&mut st.fx);
    let mut wide = Wide::default();
    let all = st.seg.iter().chain([&st.tr, &st.ldtr]);
    for (to, s) in wide.segments.iter_mut().zip(all) {
        *to = [s.base, s.limit as u64, s.selector as u64, s.attributes as u64];
    }
    for (to, t) in wide.tables.iter_mut().zip([st.gdtr, st.idtr]) {
        *to = [t.base, t.limit as u64];
    }
    wide.mode = [st.cpl as u64, st.halted as u64, st.interrupt_shadow as u64];

    let mut out = Vec::with_capacity(2048);
    let mut write = || -> Result<(), minicbor::encode::Error<Infallible>> {
        let mut e = Encoder::new(&mut out);
        e.array(2)?.u16(STATE_VERSION)?.map(FIELDS as u64)?;
        let mut writer = Writer(e);
        for number in 0..FIELDS {
            writer.0.u8(number)?;
            field(&mut writer, number, &mut st, &mut wide)?;
        }
        Ok(())
    };
    write().expect("writing to a vector does not fail");
    out
}

/// Decodes and checks a processor's state.
pub fn decode_state(bytes: &[u8]) -> Result<CpuState, SnapshotError> {
    let mut reader = Reader(Decoder::new(bytes));
    Reader::length(reader.0.array()?, 2)?;
    let version = reader.0.u16()?;
    let fields = usize::from(version).checked_sub(1).and_then(|v| FIELDS_OF.get(v)).copied();
    let fields = fields.ok_or(SnapshotError::Version(version))?;
    Reader::length(reader.0.map()?, fields as u64)?;
    let mut st = CpuState::reset();
    let mut wide = Wide::default();
    for expected in 0..fields {
        let found = reader.0.u8()?;
        if found != expected {
            return Err(SnapshotError::Field { expected, found });
        }
        field(&mut reader, expected, &mut st, &mut wide)?;
    }
    let left = bytes.len() - reader.0.position();
    if left != 0 {
        return Err(SnapshotError::LeftOver(left));
    }
    narrow(&mut st, &wide)?;
    check(&st)?;
    Ok(st)
}

/// Puts the widened fields back.
fn narrow(st: &mut CpuState, wide: &Wide) -> Result<(), SnapshotError> {
    const SEGMENT: SnapshotError = SnapshotError::Impossible("a segment register");
    let all = st.seg.iter_mut().chain([&mut st.tr, &mut st.ldtr]);
    for (s, &[base, limit, selector, attributes]) in all.zip(&wide.segments) {
        *s = Segment {
            base,
            limit: limit.try_into().map_err(|_| SEGMENT)?,
            selector: selector.try_into().map_err(|_| SEGMENT)?,
            attributes: attributes.try_into().map_err(|_| SEGMENT)?,
        };
    }
    for (t, &[base, limit]) in [&mut st.gdtr, &mut st.idtr].into_iter().zip(&wide.tables) {
        t.base = base;
        t.limit = limit.try_into().map_err(|_| SnapshotError::Impossible("GDTR or IDTR"))?;
    }
    let [cpl, halted, shadow] = wide.mode;
    if cpl > 3 || halted > 1 || shadow > 1 {
        return Err(SnapshotError::Impossible("the mode"));
    }
    (st.cpl, st.halted, st.interrupt_shadow) = (cpl as u8, halted == 1, shadow == 1);
    Ok(())
}

/// Checks all that the engine takes for granted.
fn check(st: &CpuState) -> Result<(), SnapshotError> {
    let flags =
        rflags::STATUS | rflags::ONE | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
    let paging = st.cr0 & cr0::PG != 0;
    let lma = st.efer & efer::LMA != 0;
    let mut fx = st.fx;
    sys::settle_fx(&mut fx);
    let mxcsr = u32::from_le_bytes([fx.0[24], fx.0[25], fx.0[26], fx.0[27]]);
    let rules = [
        ("RIP", canonical(st.rip) && (st.is_64_bit_code() || st.rip >> 32 == 0)),
        ("RFLAGS", st.rflags & !flags == 0 && st.rflags & rflags::ONE != 0),
        ("CR0", st.cr0 & !sys::CR0_ALLOWED == 0 && st.cr0 & cr0::ET != 0),
        ("CR0", !paging || st.cr0 & cr0::PE != 0),
        ("CR0", st.cr0 & cr0::NW == 0 || st.cr0 & cr0::CD != 0),
        // An identifier stays when process-context identifiers are switched off.
        ("CR3", st.cr3 & !if lma { sys::cr3_kept(cr4::PCIDE) } else { sys::CR3_KEPT_LEGACY } == 0),
        ("CR4", st.cr4 & !sys::CR4_ALLOWED == 0),
        ("CR4", st.cr4 & cr4::PCIDE == 0 || lma),
        ("EFER", st.efer & !sys::EFER_ALLOWED == 0 && lma == (paging && st.efer & efer::LME != 0)),
        ("EFER", !lma || st.efer & efer::LME != 0 && st.cr4 & cr4::PAE != 0),
        ("a debug register", st.dr[4] == 0 && st.dr[5] == 0),
        ("DR6", st.dr[6] & !sys::DR6_WRITABLE == sys::DR6_FIXED),
        ("DR7", st.dr[7] & !sys::DR7_WRITABLE == sys::DR7_FIXED),
        ("LSTAR", canonical(st.lstar)),
        ("CSTAR", canonical(st.cstar)),
        ("SFMASK", st.sfmask >> 32 == 0),
        ("KERNEL_GS_BASE", canonical(st.kernel_gs_base)),
        ("a SYSENTER register", st.sysenter[0] >> 16 == 0 && canonical(st.sysenter[1]) && canonical(st.sysenter[2])),
        ("PAT", sys::pat_ok(st.pat)),
        ("TSC_AUX", st.tsc_aux >> 32 == 0),
        ("MISC_ENABLE", st.misc_enable & !sys::MISC_ENABLE_ALLOWED == 0),
        ("an MTRR", sys::mtrr_def_type_ok(st.mtrr_def_type)),
        ("an MTRR", st.mtrr_fixed.iter().all(|&m| sys::mtrr_fixed_ok(m))),
        ("an MTRR", st.mtrr_var.iter().enumerate().all(|(i, &m)| sys::mtrr_var_ok(i, m))),
        ("GDTR", canonical(st.gdtr.base)),
        ("IDTR", canonical(st.idtr.base)),
        ("XCR0", sys::xcr0_ok(st.xcr0)),
        ("the FPU", fx == st.fx && mxcsr & !sys::MXCSR_MASK == 0),
    ];
    if let Some((what, _)) = rules.iter().find(|(_, holds)| !holds) {
        return Err(SnapshotError::Impossible(what));
    }
    check_segments(st)
}

fn check_segments(st: &CpuState) -> Result<(), SnapshotError> {
    let impossible = |what| Err(SnapshotError::Impossible(what));
    for s in st.seg.iter().chain([&st.tr, &st.ldtr]) {
        if s.attributes & 0xf00 != 0 || !canonical(s.base) {
            return impossible("a segment register");
        }
    }
    for (i, s) in st.seg.iter().enumerate() {
        let present = Segment::PRESENT | Segment::NON_SYSTEM;
        let unusable = s.attributes == 0 && i != seg::CS;
        // FS and GS alone have 64-bit bases.
        if !unusable && s.attributes & present != present || i < seg::FS && s.base >> 32 != 0 {
            return impossible("a segment register");
        }
    }
    if st.tr.attributes & Segment::NON_SYSTEM != 0 || st.ldtr.attributes & Segment::NON_SYSTEM != 0 {
        return impossible("TR or LDTR");
    }
    if st.efer & efer::LMA == 0 {
        return Ok(());
    }
    let (cs, ss) = (&st.seg[seg::CS], &st.seg[seg::SS]);
    let both = Segment::LONG | Segment::BIG;
    if cs.attributes & 8 == 0 || cs.attributes & both == both || (cs.selector & 3) as u8 != st.cpl {
        return impossible("CS");
    }
    let ss_ok = if ss.attributes == 0 { st.cpl < 3 } else { ss.attributes & 10 == 2 && ss.dpl() == st.cpl };
    if !ss_ok { impossible("SS") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::World;

    #[test]
    fn round_trip() {
        for st in [CpuState::reset(), World::new().st, World::new().user().st] {
            assert_eq!(decode_state(&encode_state(&st)), Ok(st));
        }
    }

    /// The bytes of a version never change: snapshots outlive programs.
    #[test]
    fn versions_are_what_they_were() {
        let fnv =
            |bytes: &[u8]| bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3));
        let bytes = encode_state(&CpuState::reset());
        assert_eq!((bytes.len(), fnv(&bytes)), (807, 14671457327780465797));
        // Version 2 is the same without XCR0 and YMM registers, version 1 without the page-directory pointers before them.
        let mut second = bytes[..767].to_vec();
        (second[1], second[3]) = (2, 35);
        assert_eq!(fnv(&second), 11613863948946843165);
        assert_eq!(decode_state(&second), Ok(CpuState::reset()));
        let mut first = bytes[..760].to_vec();
        (first[1], first[3]) = (1, 34);
        assert_eq!((first.len(), fnv(&first)), (760, 4150948963227879511));
        assert_eq!(decode_state(&first), Ok(CpuState::reset()));
    }

    #[test]
    fn every_field_survives() {
        let mut st = World::new().user().st;
        for (i, r) in st.gpr.iter_mut().enumerate() {
            *r = 0x1234_5678_9abc_def0 ^ i as u64;
        }
        st.cr2 = u64::MAX;
        st.seg[seg::FS].base = 0x7fff_1234_5678;
        st.tsc_offset = u64::MAX - 5;
        st.tsc_aux = 77;
        st.mtrr_fixed[10] = 0x0606_0606_0606_0606;
        st.mtrr_var[3] = 0xff_8000_0800;
        st.sysenter = [0x10, 1, 2];
        st.interrupt_shadow = true;
        st.dr[0] = 99;
        st.pdpte = [1, 2, 3, 4];
        st.fx.0[0x20] = 5;
        st.fx.0[160 + 255] = 6;
        st.xcr0 = 7;
        st.ymm_high[15] = [3, u64::MAX];
        assert_eq!(decode_state(&encode_state(&st)), Ok(st));
    }

    #[test]
    fn damage_is_noticed() {
        let good = encode_state(&World::new().st);
        for end in 0..good.len() {
            assert!(decode_state(&good[..end]).is_err());
        }
        let mut longer = good.clone();
        longer.push(0);
        assert_eq!(decode_state(&longer), Err(SnapshotError::LeftOver(1)));
        let mut version = good.clone();
        version[1] = 9;
        assert_eq!(decode_state(&version), Err(SnapshotError::Version(9)));
        let mut number = good.clone();
        assert_eq!(number[4], 0);
        number[4] = 1;
        assert_eq!(decode_state(&number), Err(SnapshotError::Field { expected: 0, found: 1 }));
        // Any single changed byte gives a state or an error, never a panic.
        for at in 0..good.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                if let Ok(st) = decode_state(&bad) {
                    assert_eq!(decode_state(&encode_state(&st)), Ok(st));
                }
            }
        }
    }

    #[test]
    fn impossible_states_are_refused() {
        type Spoil = fn(&mut CpuState);
        let cases: [(&str, Spoil); 18] = [
            ("RIP", |st| st.rip = 1 << 47),
            ("RFLAGS", |st| st.rflags |= rflags::RF),
            ("RFLAGS", |st| st.rflags = 0),
            ("CR0", |st| st.cr0 |= 1 << 40),
            ("CR3", |st| st.cr3 |= 1 << 41),
            ("CR4", |st| st.cr4 |= cr4::SMEP),
            ("EFER", |st| st.efer &= !efer::LMA),
            ("EFER", |st| st.cr4 &= !cr4::PAE),
            ("DR7", |st| st.dr[7] = 0),
            ("LSTAR", |st| st.lstar = 1 << 63),
            ("PAT", |st| st.pat = 2),
            ("an MTRR", |st| st.mtrr_var[0] = 1 << 40),
            ("CS", |st| st.cpl = 3),
            ("SS", |st| st.seg[seg::SS].attributes = 0xc0f3),
            ("a segment register", |st| st.seg[seg::GS].base = 1 << 50),
            ("the FPU", |st| st.fx.0[27] = 1),
            ("XCR0", |st| st.xcr0 = 5),
            ("XCR0", |st| st.xcr0 = 0),
        ];
        for (what, spoil) in cases {
            let mut st = World::new().st;
            spoil(&mut st);
            assert_eq!(decode_state(&encode_state(&st)), Err(SnapshotError::Impossible(what)));
        }
    }
}
