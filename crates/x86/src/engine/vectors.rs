//! The guest's x87 and vector registers between their places: the host's registers, the frame, the architectural state.
//!
//! **In:** registers in one place. **Out:** the same in another. While [`super::Core::run`] runs, x87 registers live in the host's, also in Rust code;
//! vector registers live in the host's while translated code runs and in the frame otherwise (with AVX in
//! [`crate::frame::Frame::vectors`], else in `st.fx`). Invariant: after `run`, and around instructions of `sys` that look at them
//! ([`crate::classify::image`]), the state has them all.
use super::Core;
use crate::classify::Image;
use crate::state::FxImage;
use crate::sys;

/// Where an FXSAVE image has XMM0.
const XMM: usize = 160;

impl Core {
    /// The state's registers go to where they live.
    pub(super) fn load_fpu(&mut self) {
        self.load_image(Image::All);
    }
    /// The reverse.
    pub(super) fn save_fpu(&mut self) {
        self.save_image(Image::All);
    }
    pub(super) fn load_image(&mut self, image: Image) {
        if image != Image::None {
            self.load_vectors();
        }
        if image == Image::All {
            self.load_x87();
        }
    }
    pub(super) fn save_image(&mut self, image: Image) {
        if image != Image::None {
            self.save_vectors();
        }
        if image == Image::All {
            self.save_x87();
        }
    }

    fn load_vectors(&mut self) {
        if !self.avx {
            return;
        }
        // SAFETY: the frame is ours.
        let frame = unsafe { &mut *self.frame };
        let low = frame.st.fx.0[XMM..XMM + 256].as_chunks::<16>().0;
        for (i, vector) in frame.vectors.0.iter_mut().enumerate() {
            vector[..16].copy_from_slice(&low[i]);
            vector[16..24].copy_from_slice(&frame.st.ymm_high[i][0].to_le_bytes());
            vector[24..].copy_from_slice(&frame.st.ymm_high[i][1].to_le_bytes());
        }
    }
    fn save_vectors(&mut self) {
        if !self.avx {
            return;
        }
        // SAFETY: the frame is ours.
        let frame = unsafe { &mut *self.frame };
        let low = frame.st.fx.0[XMM..XMM + 256].as_chunks_mut::<16>().0;
        for (i, vector) in frame.vectors.0.iter().enumerate() {
            let (words, _) = vector.as_chunks::<8>();
            low[i].copy_from_slice(&vector[..16]);
            frame.st.ymm_high[i] = [u64::from_le_bytes(words[2]), u64::from_le_bytes(words[3])];
        }
    }

    fn load_x87(&mut self) {
        let mut image = self.st().fx;
        // MXCSR is Rust's here; translated code loads the guest's.
        image.0[24..32].copy_from_slice(&[0x80, 0x1f, 0, 0, 0, 0, 0, 0]);
        // SAFETY: loads FPU registers from an aligned image without reserved bits; all XMM registers are declared clobbered.
        unsafe { std::arch::asm!("fxrstor64 [{}]", in(reg) image.0.as_ptr(), clobber_abi("sysv64")) };
    }
    fn save_x87(&mut self) {
        let mut image = FxImage([0; 512]);
        // SAFETY: stores FPU registers into an aligned buffer.
        unsafe { std::arch::asm!("fxsave64 [{}]", in(reg) image.0.as_mut_ptr(), options(nostack)) };
        let fx = &mut self.st().fx;
        fx.0[..24].copy_from_slice(&image.0[..24]);
        fx.0[32..160].copy_from_slice(&image.0[32..160]);
        sys::settle_fx(fx);
    }
    /// Whether an unmasked x87 exception waits to be raised. Only during `run`.
    pub(super) fn x87_pending(&self) -> bool {
        let status: u16;
        // SAFETY: reads the status word of the guest's x87, which is live.
        unsafe { std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
        status & 1 << 7 != 0
    }
}
