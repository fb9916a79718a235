//! Vector registers and MXCSR between translated code and Rust.
//!
//! **In:** the guest's registers, live in the host's. **Out:** the same in the frame, and back; Rust runs with its own MXCSR.
//!
//! Without AVX in the CPU model the registers go to where the state has them (`st.fx`), and no VEX-encoded instruction is emitted: the host may
//! have none. With it the whole YMM registers go to [`crate::frame::Frame::vectors`], one store each, and Rust is entered with clean upper halves (mixing
//! dirty ones with SSE instructions is slow on many processors).
use super::Emit;
use dynasmrt::{DynasmApi, dynasm};

impl Emit {
    pub(super) fn save_vectors(&mut self) {
        let (fx, host, vectors) = (self.at.fx(), self.at.host_mxcsr(), self.at.vectors());
        for x in 0..16u8 {
            if self.avx {
                let slot = vectors + 32 * x as i32;
                dynasm!(self.ops ; .arch x64 ; vmovaps [slot], Ry(x));
            } else {
                let slot = fx + 160 + 16 * x as i32;
                dynasm!(self.ops ; .arch x64 ; movaps [slot], Rx(x));
            }
        }
        dynasm!(self.ops ; .arch x64 ; stmxcsr [fx + 24] ; ldmxcsr [host]);
        if self.avx {
            dynasm!(self.ops ; .arch x64 ; vzeroupper);
        }
    }

    pub(super) fn restore_vectors(&mut self) {
        let (fx, vectors) = (self.at.fx(), self.at.vectors());
        dynasm!(self.ops ; .arch x64 ; ldmxcsr [fx + 24]);
        for x in 0..16u8 {
            if self.avx {
                let slot = vectors + 32 * x as i32;
                dynasm!(self.ops ; .arch x64 ; vmovaps Ry(x), [slot]);
            } else {
                let slot = fx + 160 + 16 * x as i32;
                dynasm!(self.ops ; .arch x64 ; movaps Rx(x), [slot]);
            }
        }
    }
}
