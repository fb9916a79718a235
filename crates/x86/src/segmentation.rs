//! Segmentation outside 64-bit code: what a segment register allows.
//!
//! **In:** a segment register with its hidden part, an offset and a length. **Out:** whether the access is allowed, or the exception.
//!
//! **Invariant:** [`is_flat`] and [`is_open`] say yes only where [`check`] refuses nothing but an access that reaches beyond 4 GiB. In a segment
//! that begins at 0 such an access crosses a page, and so never stays in translated code; for the others translated code looks.
//!
//! References: APM vol. 2 sections 4.7 (descriptors), 4.12 (checks); SDM vol. 3 section 5.3 (limits). An access that wraps at 4 GiB faults,
//! as on AMD's silicon.
use crate::state::seg;
use crate::{CpuState, Exception, Segment};

/// Attribute bit of code and data segments: code.
const CODE: u16 = 8;
/// Attribute bit of data segments: expand-down.
const EXPAND_DOWN: u16 = 4;
/// Attribute bit: readable (code), writable (data).
const ACCESSIBLE: u16 = 2;

/// Whether `len` bytes (at least one) from `offset` on may be accessed through segment register number `s`.
pub fn check(st: &CpuState, s: usize, offset: u32, len: usize, write: bool) -> Result<(), Exception> {
    if allows(&st.seg[s], offset, len, write) {
        return Ok(());
    }
    Err(if s == seg::SS { Exception::ss(0) } else { Exception::gp(0) })
}

/// Whether a segment allows an access to `len` bytes (at least one) from `offset` on.
pub fn allows(segment: &Segment, offset: u32, len: usize, write: bool) -> bool {
    permits(segment, write) && reaches(segment, offset, len)
}

/// Whether a segment's type permits the access. A null selector permits none.
pub fn permits(segment: &Segment, write: bool) -> bool {
    if segment.attributes == 0 {
        return false;
    }
    let accessible = segment.attributes & ACCESSIBLE != 0;
    if segment.attributes & CODE != 0 { accessible && !write } else { accessible || !write }
}

/// Whether a segment's limit leaves room for the access.
fn reaches(segment: &Segment, offset: u32, len: usize) -> bool {
    let last = u64::from(offset) + len as u64 - 1;
    if segment.attributes & (CODE | EXPAND_DOWN) == EXPAND_DOWN {
        let end = if segment.attributes & Segment::BIG != 0 { 0xffff_ffff } else { 0xffff };
        return offset > segment.limit && last <= end;
    }
    last <= u64::from(segment.limit)
}

/// Whether the code segment holds `len` bytes from `offset` on.
pub fn holds_code(st: &CpuState, offset: u32, len: usize) -> bool {
    reaches(&st.seg[seg::CS], offset, len)
}

/// Whether a segment register can be read and written up to 4 GiB; its base may be any.
pub fn is_open(segment: &Segment) -> bool {
    let mask = CODE | EXPAND_DOWN | ACCESSIBLE;
    segment.limit == u32::MAX && segment.attributes & mask == ACCESSIBLE
}

/// Whether 32-bit code with these segment registers needs no checks but for FS and GS: all begin at 0 and have no limit.
pub fn is_flat(st: &CpuState) -> bool {
    let cs = &st.seg[seg::CS];
    let code = cs.base == 0 && cs.limit == u32::MAX && cs.attributes & ACCESSIBLE != 0;
    let data = |s: usize| st.seg[s].base == 0 && is_open(&st.seg[s]);
    code && data(seg::SS) && data(seg::DS) && data(seg::ES) && st.seg[seg::SS].attributes & Segment::BIG != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(attributes: u16, limit: u32) -> CpuState {
        let mut st = CpuState::reset();
        for s in &mut st.seg {
            *s = Segment { base: 0, limit, selector: 8, attributes };
        }
        st
    }

    #[test]
    fn limits() {
        let st = with(0xc093, u32::MAX);
        assert_eq!(check(&st, seg::DS, 0xffff_fffc, 4, true), Ok(()));
        assert_eq!(check(&st, seg::DS, 0xffff_fffd, 4, false), Err(Exception::gp(0)));
        assert_eq!(check(&st, seg::SS, 0xffff_fffd, 4, false), Err(Exception::ss(0)));
        let st = with(0x4093, 0xfff);
        assert_eq!(check(&st, seg::ES, 0xffc, 4, true), Ok(()));
        assert_eq!(check(&st, seg::ES, 0xffd, 4, true), Err(Exception::gp(0)));
        assert!(!is_open(&st.seg[seg::ES]));
    }

    #[test]
    fn expand_down() {
        for (attributes, top) in [(0x4097, 0xffff_ffffu32), (0x0097, 0xffff)] {
            let st = with(attributes, 0xfff);
            assert_eq!(check(&st, seg::DS, 0xfff, 1, true), Err(Exception::gp(0)));
            assert_eq!(check(&st, seg::DS, 0x1000, 4, true), Ok(()));
            assert_eq!(check(&st, seg::DS, top - 3, 4, true), Ok(()));
            assert_eq!(check(&st, seg::DS, top - 2, 4, true), Err(Exception::gp(0)));
        }
        assert!(!is_open(&with(0xc097, u32::MAX).seg[0]));
    }

    #[test]
    fn types() {
        // Read-only data, readable code, execute-only code, null.
        for (attributes, read, write) in [(0xc091, true, false), (0xc09b, true, false), (0xc099, false, false), (0, false, false)]
        {
            let st = with(attributes, u32::MAX);
            assert_eq!(check(&st, seg::DS, 0, 1, false).is_ok(), read);
            assert_eq!(check(&st, seg::DS, 0, 1, true).is_ok(), write);
            assert!(!is_open(&st.seg[seg::DS]) && !is_flat(&st));
        }
    }

    #[test]
    fn flat() {
        let mut st = with(0xc093, u32::MAX);
        st.seg[seg::CS].attributes = 0xc09b;
        assert!(is_flat(&st));
        st.seg[seg::GS].base = 0x1234;
        st.seg[seg::FS].attributes = 0;
        assert!(is_flat(&st));
        type Change = fn(&mut CpuState);
        let changes: [Change; 3] =
            [|st| st.seg[seg::DS].base = 1, |st| st.seg[seg::SS].attributes = 0x8093, |st| st.seg[seg::CS].limit = 9];
        for change in changes {
            let mut other = st.clone();
            change(&mut other);
            assert!(!is_flat(&other));
        }
    }
}
