//! Random contents of the FPU: control and status words, registers, images in memory.
use crate::layout::Fx;
use crate::prng::Rng;

/// An MXCSR: mostly all masked, any rounding, flags, FTZ and DAZ.
pub fn mxcsr(rng: &mut Rng) -> u32 {
    let masks = if rng.chance(92) { 0x1f80 } else { rng.next() as u32 & 0x1f80 };
    let modes = if rng.chance(50) { 0 } else { rng.next() as u32 & 0xe040 };
    masks | modes | (rng.next() as u32 & 0x3f)
}

/// An x87 control word: mostly all masked, any precision and rounding.
pub fn fcw(rng: &mut Rng) -> u16 {
    let masks = if rng.chance(92) { 0x3f } else { rng.next() as u16 & 0x3f };
    let modes = if rng.chance(50) { 0x300 } else { rng.pick(&[0x000, 0x200, 0x300]) | (rng.next() as u16 & 0xc00) };
    0x40 | masks | modes
}

/// An x87 status word that fits the control word: with the summary bits set if an unmasked exception is pending.
pub fn fsw(rng: &mut Rng, fcw: u16) -> u16 {
    let mut exceptions = rng.next() as u16 & 0x7f;
    if rng.chance(70) {
        exceptions &= fcw; // nothing pending
    }
    let pending = exceptions & !fcw & 0x3f != 0;
    let top = rng.below(8) as u16 * 0x800;
    (rng.next() as u16 & 0x4700) | top | exceptions | if pending { 0x8080 } else { 0 }
}

/// Half an XMM register.
pub fn vector_half(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => rng.value(),
        1 => u64::from(rng.float()) << 32 | u64::from(rng.float()),
        _ => rng.double(),
    }
}

/// A random FXSAVE image.
pub fn fx(rng: &mut Rng) -> Fx {
    let mut image = [0; 512];
    let control = fcw(rng);
    image[0..2].copy_from_slice(&control.to_le_bytes());
    image[2..4].copy_from_slice(&fsw(rng, control).to_le_bytes());
    image[4] = match rng.below(4) {
        0 => rng.next() as u8,
        1 => 0,
        _ => 0xff,
    };
    image[24..28].copy_from_slice(&mxcsr(rng).to_le_bytes());
    for i in 0..8 {
        image[32 + 16 * i..42 + 16 * i].copy_from_slice(&rng.extended());
    }
    for i in 0..16 {
        for half in 0..2 {
            let value = vector_half(rng);
            let at = 160 + 16 * i + 8 * half;
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    Fx(image)
}

/// An FLDENV or FRSTOR image of `size` bytes with pointers of zero.
pub fn legacy_fpu(rng: &mut Rng, size: usize) -> Vec<u8> {
    let word = if size == 14 || size == 94 { 2 } else { 4 };
    let mut image = vec![0; size];
    let control = fcw(rng);
    let words = [control, fsw(rng, control), rng.next() as u16];
    for (i, value) in words.into_iter().enumerate() {
        image[i * word..i * word + 2].copy_from_slice(&value.to_le_bytes());
    }
    for register in image[7 * word..].as_chunks_mut::<10>().0 {
        *register = rng.extended();
    }
    image
}
