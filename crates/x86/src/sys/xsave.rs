//! XSAVE areas (XSAVE, XSAVEOPT, XSAVEC, XRSTOR) and the register that says what they hold, XCR0 (XGETBV, XSETBV).
//!
//! **In:** `st.fx` and `st.ymm_high`, which the engine keeps current around these instructions. **Out:** memory, or a new state.
//!
//! **Invariant:** what is stored follows from the state alone. Silicon *may* notice that a component is in its initial configuration (XINUSE), or
//! unchanged since it was loaded; here XINUSE is exact, a component is in use exactly if its registers differ from their initial values,
//! and nothing is ever left out as unchanged. XSAVES and XRSTORS are not offered.
//!
//! References: SDM vol. 1 chapter 13 (13.4 the area, 13.6 XINUSE, 13.7 to 13.10 the instructions), vol. 3 section 2.6 (XCR0).
use super::fpu::{MXCSR_MASK, at, settle};
use super::{Cx, Ea, Flow};
use crate::Exception;
use crate::state::{FxImage, cr0, cr4, gpr, xcr0};
use iced_x86::{Instruction, Mnemonic as M};

/// Offsets in an area.
const XSTATE_BV: u64 = 512;
const HEADER_BYTES: usize = 64;
const AVX: u64 = 576;
/// XCOMP_BV: the area is in compacted format. That moves nothing here, since AVX comes first in either.
const COMPACTED: u64 = 1 << 63;
/// MXCSR after reset.
const MXCSR_INITIAL: u32 = 0x1f80;

/// Whether XCR0 can have this value, on some model.
pub(crate) fn xcr0_ok(value: u64) -> bool {
    value & !xcr0::ALL == 0 && value & xcr0::X87 != 0 && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0)
}

/// Executes one of this module's instructions.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if cx.st.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    let mask = cx.st.gpr[gpr::RDX] << 32 | cx.st.gpr[gpr::RAX] & 0xffff_ffff;
    match insn.mnemonic() {
        M::Xgetbv => return xgetbv(cx),
        M::Xsetbv => return xsetbv(cx, mask),
        _ => {}
    }
    if cx.st.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    let area = cx.ea(insn);
    if !area.va.is_multiple_of(64) {
        return Err(Exception::gp(0));
    }
    let requested = cx.st.xcr0 & mask;
    match insn.mnemonic() {
        M::Xsave | M::Xsave64 => save(cx, area, requested, requested),
        M::Xsaveopt | M::Xsaveopt64 => {
            let used = in_use(cx) & requested;
            save(cx, area, requested, used)
        }
        M::Xsavec | M::Xsavec64 => save_compacted(cx, area, requested),
        M::Xrstor | M::Xrstor64 => restore(cx, area, requested),
        _ => Err(Exception::UD),
    }
}

fn xgetbv(cx: &mut Cx) -> Result<Flow, Exception> {
    let value = match cx.st.gpr[gpr::RCX] as u32 {
        0 => cx.st.xcr0,
        1 => cx.st.xcr0 & in_use(cx),
        _ => return Err(Exception::gp(0)),
    };
    cx.st.gpr[gpr::RAX] = value & 0xffff_ffff;
    cx.st.gpr[gpr::RDX] = value >> 32;
    Ok(Flow::Next)
}

fn xsetbv(cx: &mut Cx, value: u64) -> Result<Flow, Exception> {
    cx.require_cpl0()?;
    if cx.st.gpr[gpr::RCX] as u32 != 0 || !xcr0_ok(value) || value & !cx.model.xcr0_bits() != 0 {
        return Err(Exception::gp(0));
    }
    cx.st.xcr0 = value;
    Ok(Flow::Sync)
}

/// XMM and YMM registers there are in the current mode.
fn registers(cx: &Cx) -> usize {
    if cx.st.is_64_bit_code() { 16 } else { 8 }
}

fn mxcsr(fx: &FxImage) -> u32 {
    u32::from_le_bytes([fx.0[at::MXCSR], fx.0[at::MXCSR + 1], fx.0[at::MXCSR + 2], fx.0[at::MXCSR + 3]])
}

/// XINUSE: the components whose registers are not all in their initial configuration. MXCSR does not count.
fn in_use(cx: &Cx) -> u64 {
    let n = registers(cx);
    let fx = settled(cx);
    let same = |from: usize, to: usize| fx.0[from..to] == FxImage::RESET.0[from..to];
    let mut used = 0;
    if !same(0, at::MXCSR) || !same(at::ST, at::XMM) {
        used |= xcr0::X87;
    }
    if !same(at::XMM, at::XMM + 16 * n) {
        used |= xcr0::SSE;
    }
    if cx.st.ymm_high[..n].iter().any(|half| *half != [0; 2]) {
        used |= xcr0::AVX;
    }
    used
}

/// The registers as an image shows them.
fn settled(cx: &Cx) -> FxImage {
    let mut fx = cx.st.fx;
    settle(&mut fx);
    fx.0[at::MXCSR_MASK..at::ST].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    fx
}

/// A part of an area: offset and bytes.
type Piece<'a> = (u64, &'a [u8]);

/// Writes all pieces or none.
fn write(cx: &mut Cx, area: Ea, pieces: &[Piece]) -> Result<(), Exception> {
    for (offset, bytes) in pieces {
        cx.probe_bytes(part(area, *offset), bytes.len())?;
    }
    for (offset, bytes) in pieces {
        cx.write_bytes(part(area, *offset), bytes)?;
    }
    Ok(())
}

fn part(area: Ea, offset: u64) -> Ea {
    Ea { va: area.va.wrapping_add(offset), ..area }
}

/// The upper halves as an area has them.
fn avx_bytes(cx: &Cx) -> [u8; 256] {
    let mut bytes = [0; 256];
    for (to, half) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(cx.st.ymm_high.as_flattened()) {
        *to = half.to_le_bytes();
    }
    bytes
}

/// The components in `set`, and MXCSR with its mask if `with_mxcsr`.
fn pieces<'a>(n: usize, fx: &'a FxImage, avx: &'a [u8; 256], set: u64, with_mxcsr: bool) -> Vec<Piece<'a>> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(6);
    if set & xcr0::X87 != 0 {
        pieces.push((0, &fx.0[..at::MXCSR]));
        pieces.push((at::ST as u64, &fx.0[at::ST..at::XMM]));
    }
    if with_mxcsr {
        pieces.push((at::MXCSR as u64, &fx.0[at::MXCSR..at::ST]));
    }
    if set & xcr0::SSE != 0 {
        pieces.push((at::XMM as u64, &fx.0[at::XMM..at::XMM + 16 * n]));
    }
    if set & xcr0::AVX != 0 {
        pieces.push((AVX, &avx[..16 * n]));
    }
    pieces
}

/// XSAVE and XSAVEOPT: writes the components in `stored`; XSTATE_BV says of all `requested` ones whether they are in use. MXCSR
/// goes with SSE and with AVX, and is never left out.
fn save(cx: &mut Cx, area: Ea, requested: u64, stored: u64) -> Result<Flow, Exception> {
    let old = cx.read_value(part(area, XSTATE_BV), 8)?;
    let header = (old & !requested | in_use(cx) & requested).to_le_bytes();
    let (fx, avx) = (settled(cx), avx_bytes(cx));
    let with_mxcsr = requested & (xcr0::SSE | xcr0::AVX) != 0;
    let mut pieces = pieces(registers(cx), &fx, &avx, stored, with_mxcsr);
    pieces.push((XSTATE_BV, &header));
    write(cx, area, &pieces)?;
    Ok(Flow::Next)
}

/// XSAVEC: MXCSR is a part of SSE, which counts as in use if MXCSR is not as after reset.
fn save_compacted(cx: &mut Cx, area: Ea, requested: u64) -> Result<Flow, Exception> {
    let (fx, avx) = (settled(cx), avx_bytes(cx));
    let special = if mxcsr(&fx) != MXCSR_INITIAL { xcr0::SSE } else { 0 };
    let stored = (in_use(cx) | special) & requested;
    let mut header = [0; 16];
    header[..8].copy_from_slice(&stored.to_le_bytes());
    header[8..].copy_from_slice(&(requested | COMPACTED).to_le_bytes());
    let mut pieces = pieces(registers(cx), &fx, &avx, stored, stored & xcr0::SSE != 0);
    pieces.push((XSTATE_BV, &header));
    write(cx, area, &pieces)?;
    Ok(Flow::Next)
}

fn restore(cx: &mut Cx, area: Ea, requested: u64) -> Result<Flow, Exception> {
    let mut header = [0; HEADER_BYTES];
    cx.read_bytes(part(area, XSTATE_BV), &mut header)?;
    let (words, _) = header.as_chunks::<8>();
    let (present, format) = (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1]));
    let compacted = format & COMPACTED != 0;
    let sound = if compacted {
        let there = format & !COMPACTED;
        there & !cx.st.xcr0 == 0 && present & !there == 0 && header[16..].iter().all(|&b| b == 0)
    } else {
        present & !cx.st.xcr0 == 0 && header[8..24].iter().all(|&b| b == 0)
    };
    if !sound {
        return Err(Exception::gp(0));
    }
    let n = registers(cx);
    let from_area = |component| requested & present & component != 0;
    // Both halves of what is read: the legacy region and AVX. What is not there starts anew.
    let mut fx = cx.st.fx;
    let mut ymm_high = cx.st.ymm_high;
    let load = |cx: &mut Cx, fx: &mut FxImage, from: usize, to: usize, there: bool| {
        if there {
            return cx.read_bytes(part(area, from as u64), &mut fx.0[from..to]);
        }
        fx.0[from..to].copy_from_slice(&FxImage::RESET.0[from..to]);
        Ok(())
    };
    if requested & xcr0::X87 != 0 {
        let there = from_area(xcr0::X87);
        load(cx, &mut fx, 0, at::MXCSR, there)?;
        load(cx, &mut fx, at::ST, at::XMM, there)?;
    }
    if compacted && requested & xcr0::SSE != 0 {
        load(cx, &mut fx, at::MXCSR, at::MXCSR_MASK, from_area(xcr0::SSE))?;
    } else if !compacted && requested & (xcr0::SSE | xcr0::AVX) != 0 {
        load(cx, &mut fx, at::MXCSR, at::MXCSR_MASK, true)?;
    }
    if requested & xcr0::SSE != 0 {
        load(cx, &mut fx, at::XMM, at::XMM + 16 * n, from_area(xcr0::SSE))?;
    }
    if requested & xcr0::AVX != 0 {
        let mut bytes = [0; 256];
        if from_area(xcr0::AVX) {
            cx.read_bytes(part(area, AVX), &mut bytes[..16 * n])?;
        }
        let words = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w));
        for (to, word) in ymm_high[..n].as_flattened_mut().iter_mut().zip(words) {
            *to = word;
        }
    }
    if mxcsr(&fx) & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    settle(&mut fx);
    (cx.st.fx, cx.st.ymm_high) = (fx, ymm_high);
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{USER, World};
    use super::*;
    use crate::CpuModel;
    use std::arch::asm;

    /// Somewhere in user memory, aligned.
    const AREA: u64 = USER + 0x1000;
    /// XSAVE64, XSAVEOPT64, XSAVEC64, XRSTOR64 of an area at RBX.
    const XSAVE: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
    const XSAVEOPT: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
    const XSAVEC: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
    const XRSTOR: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];

    fn world() -> World {
        let mut w = World::new();
        w.model = CpuModel::x86_64_v3();
        w.st.cr4 |= cr4::OSXSAVE;
        w.st.xcr0 = xcr0::ALL;
        w.st.gpr[gpr::RBX] = AREA;
        w.st.gpr[gpr::RAX] = 7;
        w.st.gpr[gpr::RDX] = 0;
        w
    }

    /// An area on the host.
    #[repr(C, align(64))]
    #[derive(Clone, Copy)]
    struct Area([u8; 832]);

    impl Area {
        fn of(fx: &FxImage, ymm_high: &[[u64; 2]; 16], present: u64) -> Self {
            let mut area = Self([0; 832]);
            area.0[..416].copy_from_slice(&fx.0[..416]);
            area.0[512..520].copy_from_slice(&present.to_le_bytes());
            for (to, half) in area.0[576..].as_chunks_mut::<8>().0.iter_mut().zip(ymm_high.as_flattened()) {
                *to = half.to_le_bytes();
            }
            area
        }
        /// Without what docs/positions.md fixes: pointers, the mask of MXCSR.
        fn settled(mut self) -> Self {
            self.0[6..24].fill(0);
            self.0[28..32].fill(0);
            self
        }
    }

    /// Loads `state` into the silicon (all components), runs one instruction on `area` with mask `mask`, and stores all registers.
    macro_rules! silicon {
        ($instruction:literal, $state:expr, $area:expr, $mask:expr) => {{
            let mut host = FxImage::RESET;
            let mut after = Area([0; 832]);
            // SAFETY: only on a host with AVX; the host's own FPU state is saved before and restored after; areas are large enough.
            unsafe {
                asm!(
                    "fxsave64 [{host}]",
                    "mov eax, 7",
                    "xor edx, edx",
                    "xrstor64 [{state}]",
                    "mov eax, {mask:e}",
                    concat!($instruction, " [{area}]"),
                    "mov eax, 7",
                    "xsave64 [{after}]",
                    "vzeroupper",
                    "fxrstor64 [{host}]",
                    host = in(reg) &raw mut host,
                    state = in(reg) &raw const $state,
                    area = in(reg) &raw mut $area,
                    after = in(reg) &raw mut after,
                    mask = in(reg) $mask as u32,
                    out("rax") _, out("rdx") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                    out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
                    out("xmm14") _, out("xmm15") _,
                );
            }
            after.settled()
        }};
    }

    /// Register contents of which each component may be in its initial configuration.
    fn states() -> Vec<(FxImage, [[u64; 2]; 16])> {
        let mut all = Vec::new();
        for bits in 0..16 {
            let mut fx = FxImage::RESET;
            let mut ymm_high = [[0; 2]; 16];
            if bits & 1 != 0 {
                fx.0[at::ST + 16 * 3] = 9;
                fx.0[at::FTW] = 0x81;
                fx.0[at::FCW] = 0x7e;
            }
            if bits & 2 != 0 {
                fx.0[at::XMM + 255] = 7;
                fx.0[at::XMM] = 8;
            }
            if bits & 4 != 0 {
                ymm_high[15] = [0, 3];
                ymm_high[2] = [u64::MAX, 0];
            }
            if bits & 8 != 0 {
                fx.0[at::MXCSR] = 0xa0;
            }
            all.push((fx, ymm_high));
        }
        all
    }

    /// Bytes to be overwritten, or not.
    fn old(present: u64) -> Area {
        let mut area = Area([0x55; 832]);
        area.0[512..576].fill(0);
        area.0[512..520].copy_from_slice(&present.to_le_bytes());
        area
    }

    fn header(area: &[u8]) -> [u64; 2] {
        let word = |at: usize| u64::from_le_bytes(area[at..at + 8].try_into().expect("eight bytes"));
        [word(512), word(520)]
    }

    #[test]
    fn saving_is_the_silicons() {
        if !is_x86_feature_detected!("avx") {
            return;
        }
        for (fx, ymm_high) in states() {
            for mask in 0..8 {
                for code in [XSAVE, XSAVEOPT, XSAVEC] {
                    let mut w = world();
                    (w.st.fx, w.st.ymm_high) = (fx, ymm_high);
                    w.st.gpr[gpr::RAX] = mask;
                    let used = in_use(&w.cx());
                    let mut native = old(5);
                    w.put_bytes(AREA, &native.0);
                    assert_eq!(w.exec(code), Ok(Flow::Next));
                    let mine = w.bytes(AREA, 832);
                    let state = Area::of(&fx, &ymm_high, 7);
                    match code[1..] {
                        [0x0f, 0xae, 0x23] => silicon!("xsave64", state, native, mask),
                        [0x0f, 0xae, _] => silicon!("xsaveopt64", state, native, mask),
                        _ => silicon!("xsavec64", state, native, mask),
                    };
                    // Where the silicon is sure that a component is in use although it is not, it stores it: look only at what both do.
                    let [theirs, format] = header(&native.0);
                    let [ours, my_format] = header(&mine);
                    assert_eq!(my_format, format);
                    assert_eq!(ours & !theirs, 0, "{mask:x} {used:x} {code:x?}");
                    let same =
                        |from: usize, to: usize| assert_eq!(mine[from..to], native.0[from..to], "{mask:x} {code:x?} {from}");
                    let agreed = |component| (ours ^ theirs) & component == 0;
                    if agreed(xcr0::X87) {
                        same(0, 6);
                        same(32, 160);
                    }
                    if agreed(xcr0::SSE) {
                        same(24, 28);
                        same(160, 416);
                    }
                    if agreed(xcr0::AVX) {
                        same(576, 832);
                    }
                    same(464, 512);
                    same(528, 576);
                }
            }
        }
    }

    #[test]
    fn restoring_is_the_silicons() {
        if !is_x86_feature_detected!("avx") {
            return;
        }
        let all = states();
        for (i, (fx, ymm_high)) in all.iter().enumerate() {
            for (mask, present, compacted) in
                [(7, 7, false), (7, 0, false), (6, 2, false), (4, 3, false), (1, 6, false), (2, 5, true)]
                    .into_iter()
                    .chain((0..8).flat_map(|mask| (0..8).map(move |present| (mask, present, true))))
            {
                let before = all[(i * 5 + 3) % all.len()];
                let mut area = Area::of(fx, ymm_high, present);
                if compacted {
                    area.0[520..528].copy_from_slice(&(7 | COMPACTED).to_le_bytes());
                }
                let mut w = world();
                (w.st.fx, w.st.ymm_high) = before;
                w.st.gpr[gpr::RAX] = mask;
                w.put_bytes(AREA, &area.0);
                assert_eq!(w.exec(XRSTOR), Ok(Flow::Next));
                let mine = Area::of(&w.st.fx, &w.st.ymm_high, 0);
                let state = Area::of(&before.0, &before.1, 7);
                let theirs = silicon!("xrstor64", state, area, mask);
                assert_eq!(mine.0[..512], theirs.0[..512], "{i} {mask} {present} {compacted}");
                assert_eq!(mine.0[576..], theirs.0[576..], "{i} {mask} {present} {compacted}");
            }
        }
    }

    #[test]
    fn what_is_in_use_is_exact() {
        for (bits, (fx, ymm_high)) in states().into_iter().enumerate() {
            let mut w = world();
            (w.st.fx, w.st.ymm_high) = (fx, ymm_high);
            w.st.gpr[gpr::RCX] = 1;
            assert_eq!(w.exec(XGETBV), Ok(Flow::Next));
            assert_eq!((w.st.gpr[gpr::RAX], w.st.gpr[gpr::RDX]), (bits as u64 & 7, 0));
        }
        // Pointers do not count: they are zero by definition.
        let mut w = world();
        w.st.fx.0[8] = 1;
        assert_eq!(in_use(&w.cx()), 0);
    }

    #[test]
    fn bad_areas() {
        let bad = |spoil: &dyn Fn(&mut World)| {
            let mut w = world();
            w.put_bytes(AREA, &Area::of(&FxImage::RESET, &[[1; 2]; 16], 7).0);
            spoil(&mut w);
            w.exec(XRSTOR)
        };
        assert_eq!(bad(&|_| {}), Ok(Flow::Next));
        assert_eq!(bad(&|w| w.put(AREA + 512, 0xf)), Err(Exception::gp(0)));
        assert_eq!(bad(&|w| w.put(AREA + 520, 1)), Err(Exception::gp(0)));
        assert_eq!(bad(&|w| w.put(AREA + 528, 1)), Err(Exception::gp(0)));
        assert_eq!(bad(&|w| w.put(AREA + 536, 1)), Ok(Flow::Next));
        assert_eq!(bad(&|w| w.put(AREA + 520, COMPACTED | 7)), Ok(Flow::Next));
        assert_eq!(bad(&|w| w.put(AREA + 520, COMPACTED | 3)), Err(Exception::gp(0)));
        assert_eq!(bad(&|w| w.put(AREA + 520, COMPACTED | 15)), Err(Exception::gp(0)));
        let compacted = |w: &mut World| w.put(AREA + 520, COMPACTED | 7);
        assert_eq!(bad(&|w| (compacted(w), w.put(AREA + 568, 1)).1), Err(Exception::gp(0)));
        // A component that is off may not be there.
        assert_eq!(bad(&|w| w.st.xcr0 = 3), Err(Exception::gp(0)));
        // MXCSR is checked where it is loaded: with SSE or AVX; in compacted format with SSE only, if that is there.
        assert_eq!(bad(&|w| w.put_bytes(AREA + 27, &[1])), Err(Exception::gp(0)));
        let avx_only = |w: &mut World| (w.st.gpr[gpr::RAX] = 4, w.put_bytes(AREA + 27, &[1])).1;
        assert_eq!(bad(&avx_only), Err(Exception::gp(0)));
        assert_eq!(bad(&|w| (avx_only(w), compacted(w)).1), Ok(Flow::Next));
        assert_eq!(bad(&|w| (w.st.gpr[gpr::RAX] = 1, w.put_bytes(AREA + 27, &[1])).1), Ok(Flow::Next));
        for code in [XSAVE, XSAVEOPT, XSAVEC, XRSTOR] {
            let mut w = world();
            w.st.gpr[gpr::RBX] += 32;
            assert_eq!(w.exec(code), Err(Exception::gp(0)));
            w.st.cr0 |= cr0::TS;
            assert_eq!(w.exec(code), Err(Exception::NM));
            w.st.cr4 &= !cr4::OSXSAVE;
            assert_eq!(w.exec(code), Err(Exception::UD));
        }
        // The second page of an area is missing: nothing is written to the first.
        let mut w = world();
        w.st.gpr[gpr::RBX] = USER + 0x2000 - 576;
        w.st.ymm_high[0] = [1, 1];
        w.unmap(USER + 0x2000);
        assert_eq!(w.exec(XSAVE), Err(Exception::pf(2, USER + 0x2000)));
        assert_eq!(w.bytes(USER + 0x2000 - 576, 576), [0; 576]);
    }

    #[test]
    fn xcr0() {
        let set = |w: &mut World, value: u64| {
            w.st.gpr[gpr::RCX] = 0;
            w.st.gpr[gpr::RAX] = value & 0xffff_ffff;
            w.st.gpr[gpr::RDX] = value >> 32;
            w.exec(XSETBV)
        };
        let mut w = world();
        for good in [1, 3, 7] {
            assert_eq!(set(&mut w, good), Ok(Flow::Sync));
            assert_eq!(w.exec(XGETBV), Ok(Flow::Next));
            assert_eq!((w.st.gpr[gpr::RAX], w.st.xcr0), (good, good));
        }
        for bad in [0, 2, 5, 6, 15, 1 << 63 | 7] {
            assert_eq!(set(&mut w, bad), Err(Exception::gp(0)), "{bad:x}");
        }
        w.st.gpr[gpr::RCX] = 2;
        assert_eq!(w.exec(XGETBV), Err(Exception::gp(0)));
        assert_eq!(w.exec(XSETBV), Err(Exception::gp(0)));
        w.st.cr4 &= !cr4::OSXSAVE;
        assert_eq!(w.exec(XGETBV), Err(Exception::UD));
        let mut w = world().user();
        assert_eq!(set(&mut w, 7), Err(Exception::gp(0)));
        // A model without XSAVE has none of it.
        let mut w = world();
        w.model = CpuModel::x86_64_v2();
        assert_eq!(set(&mut w, 1), Err(Exception::UD));
        assert_eq!(w.exec(XSAVE), Err(Exception::UD));
    }
}
