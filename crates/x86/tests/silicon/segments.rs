//! The segments a case of 32-bit code runs with: flat ones as Linux has them, or others in the LDT, the same on both sides.
use crate::layout::{CODE as CODE_START, DATA, DATA_BYTES, PAGE, Regs, STACK, STACK_PAGES};
use crate::prng::Rng;

/// One segment register of a user program.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// What a descriptor table holds; zero is a null selector.
    pub raw: u64,
    /// The selector.
    pub selector: u16,
}

/// Access rights of user segments: present, privilege level 3, accessed.
const USER: u64 = 0xf1;
/// Expand-down, writable (data); conforming, readable (code); code.
const DOWN: u64 = 4;
const ACCESSIBLE: u64 = 2;
const CODE: u64 = 8;
const BIG: u64 = 1 << 54;
const PAGES: u64 = 1 << 55;

/// Linux's selectors of flat segments.
pub const FLAT_CODE: u16 = 0x23;
/// See [`FLAT_CODE`].
pub const FLAT_DATA: u16 = 0x2b;
/// Flat 32-bit code and data.
pub const FLAT_CODE_RAW: u64 = 0x00cf_fb00_0000_ffff;

impl Descriptor {
    /// A null selector.
    pub const NULL: Self = Self { raw: 0, selector: 0 };
    /// Entry `index` of the LDT.
    fn local(index: u16, base: u32, last: u32, kind: u64) -> Self {
        let base = u64::from(base);
        // A limit of more than 1 MiB is in pages; the last byte is then the last of a page.
        let (limit, pages) = if last < 1 << 20 { (last, 0) } else { (last >> 12, PAGES) };
        let limit = u64::from(limit);
        let raw = limit & 0xffff
            | (base & 0xff_ffff) << 16
            | (USER | kind) << 40
            | (limit >> 16) << 48
            | (base >> 24) << 56
            | BIG
            | pages;
        Self { raw, selector: index << 3 | 7 }
    }
    /// Base address.
    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw & PAGES != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// Access rights as the engine has them.
    pub fn attributes(&self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }
    /// Whether it is in the LDT.
    pub fn is_local(&self) -> bool {
        self.selector & 4 != 0
    }
    /// As Linux's modify_ldt takes it: entry, base, limit, flags.
    pub fn for_linux(&self) -> [u32; 4] {
        let bit = |condition: bool, at: u32| u32::from(condition) << at;
        let kind = self.raw >> 40;
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        let contents = if kind & CODE != 0 { 2 } else { (kind & DOWN != 0) as u32 };
        let flags =
            bit(self.raw & BIG != 0, 0) | contents << 1 | bit(kind & ACCESSIBLE == 0, 3) | bit(self.raw & PAGES != 0, 4) | 1 << 6;
        [u32::from(self.selector >> 3), self.base() as u32, limit, flags]
    }
}

/// All segment registers in the hardware's numbering, or that the case is 64-bit code.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// 32-bit code.
    pub narrow: bool,
    /// ES, CS, SS, DS, FS, GS.
    pub all: [Descriptor; 6],
}

pub const ES: usize = 0;
pub const CS: usize = 1;
pub const SS: usize = 2;
pub const DS: usize = 3;
pub const GS: usize = 5;

impl Segments {
    /// 64-bit code: no segments to speak of.
    pub const WIDE: Self = Self { narrow: false, all: [Descriptor::NULL; 6] };

    /// Flat segments, but for GS, which begins at `gs` and has no limit.
    pub fn flat(gs: u32) -> Self {
        let data = Descriptor { raw: 0x00cf_f300_0000_ffff, selector: FLAT_DATA };
        let mut all = [data; 6];
        all[CS] = Descriptor { raw: FLAT_CODE_RAW, selector: FLAT_CODE };
        all[4] = Descriptor::NULL;
        all[GS] = Descriptor::local(GS as u16, gs, u32::MAX, ACCESSIBLE);
        Self { narrow: true, all }
    }
    /// Makes a data segment an odd one: from `base` on to the byte before `end` (linear), or from there up.
    pub fn bend(&mut self, s: usize, base: u32, end: u32, down: bool, writable: bool) {
        let kind = if down { DOWN } else { 0 } | if writable { ACCESSIBLE } else { 0 };
        self.all[s] = Descriptor::local(s as u16, base, end.wrapping_sub(base).wrapping_sub(1), kind);
    }
    /// The same for the code segment.
    pub fn bend_code(&mut self, base: u32, end: u32, readable: bool) {
        let kind = CODE | if readable { ACCESSIBLE } else { 0 };
        self.all[CS] = Descriptor::local(CS as u16, base, end.wrapping_sub(base).wrapping_sub(1), kind);
    }
    /// Base of a segment register.
    pub fn base(&self, s: usize) -> u64 {
        self.all[s].base()
    }
    /// Whether all but FS and GS are flat.
    pub fn is_flat(&self) -> bool {
        self.all[..4].iter().all(|d| !d.is_local())
    }
}

/// The segments of a case of 32-bit code; makes registers fit. Mostly flat, as Linux has them.
pub fn random(rng: &mut Rng, init: &mut Regs, code_at: usize) -> Segments {
    for (i, value) in init.gpr.iter_mut().enumerate() {
        // What 32-bit code leaves in the upper halves of its registers is nobody's business; r8 and up it cannot touch.
        *value &= if i < 8 { 0xffff_ffff } else { u64::MAX };
    }
    let gs = (DATA + rng.below(DATA_BYTES as u64 / 2)) as u32;
    init.gs_base = gs.into();
    init.fs_base = 0;
    let mut segments = Segments::flat(gs);
    if rng.chance(65) {
        return segments;
    }
    let (start, end) = (DATA as u32, (DATA + DATA_BYTES as u64) as u32);
    for s in [ES, DS, GS] {
        let base = rng.pick(&[0, 0, 0x1000, 0x123_4567, start, 0xf000_0000]);
        let middle = start + rng.below(DATA_BYTES as u64) as u32;
        match rng.below(8) {
            // Ends in the window, begins in it, cannot be written, does not exist.
            0 if base <= start => segments.bend(s, base, middle, false, true),
            1 if base <= start => segments.bend(s, base, middle, true, true),
            2 if base <= start => segments.bend(s, base, end.wrapping_add(0x10_0000), false, false),
            3 if s != DS => segments.all[s] = Descriptor::NULL,
            // Only a base; it may wrap at 4 GiB.
            4 | 5 => segments.bend(s, base, base, false, true),
            _ => {}
        }
    }
    if rng.chance(30) {
        let middle = STACK as u32 + (STACK_PAGES * PAGE / 2) as u32;
        let distance = rng.below(1000) as u32;
        match rng.below(3) {
            0 => segments.bend(SS, rng.pick(&[0, 0x1000]), middle + distance, false, true),
            1 => segments.bend(SS, 0, middle - distance, true, true),
            _ => segments.bend(SS, 0x2fff_0000, 0x2fff_0000, false, true),
        }
    }
    if rng.chance(30) {
        let base = rng.pick(&[0, 0x1000, CODE_START as u32]);
        // The first instruction's first byte is inside, or the silicon's would be another program's fault.
        let inside = if rng.chance(50) { 1 + rng.below(60) } else { 0x1000 };
        segments.bend_code(base, CODE_START as u32 + code_at as u32 + inside as u32, rng.chance(70));
    }
    init.gs_base = segments.base(GS);
    segments
}
