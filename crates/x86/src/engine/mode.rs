//! What translated code depends on besides its bytes, read off the processor's state.
//!
//! **In:** the state. **Out:** the [`Mode`] of the code at RIP. Invariant: whatever code was translated for another mode is not entered; the jump
//! caches, which do not look at modes, are for one kind each ([`Core::jump_kind`]).
use super::Core;
use crate::segmentation;
use crate::state::{cr0, seg};
use crate::translate::Mode;

impl Core {
    /// What kind of blocks one of the jump caches is for: their mode, but for USER.
    pub(super) fn jump_kind(&mut self, user: bool) -> &mut u16 {
        // SAFETY: the frame is ours.
        unsafe { &mut (*self.frame).jump_kinds[user as usize] }
    }

    pub(super) fn mode(&mut self) -> Mode {
        let st = self.st();
        let user = (st.cpl == 3) as u16 * Mode::USER;
        let ts = (st.cr0 & cr0::TS != 0) as u16 * Mode::TS;
        let em = (st.cr0 & cr0::EM != 0) as u16 * Mode::EM;
        let avx = st.avx_on() as u16 * Mode::AVX;
        let mut legacy = 0;
        if !st.is_64_bit_code() {
            let open = |s: usize, bit: u16| segmentation::is_open(&st.seg[s]) as u16 * bit;
            legacy = Mode::CODE_32 | open(seg::FS, Mode::FS_OPEN) | open(seg::GS, Mode::GS_OPEN);
        }
        Mode(user | ts | em | avx | legacy)
    }

    /// Whether code can run in blocks of many instructions: they have no segment checks but for FS and GS.
    pub(super) fn is_flat(&mut self) -> bool {
        let st = self.st();
        st.is_64_bit_code() || segmentation::is_flat(st)
    }
}
