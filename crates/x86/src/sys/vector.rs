//! Vector instructions that touch memory element by element: masked loads and stores, gathers. And VLDMXCSR, which is here because it must be
//! checked.
//!
//! **In:** `st.fx` and `st.ymm_high`, which the engine keeps current around these instructions. **Out:** memory, or new registers.
//!
//! **Invariant:** an element whose mask bit is clear is never touched: it can neither fault nor reach a device. Elements are taken from
//! the lowest on. A masked load or store that faults leaves no trace; a gather keeps the elements before the faulting one, with
//! their mask bits cleared, so that it goes on there (SDM vol. 2, VGATHERDPS).
//!
//! References: SDM vol. 2 (VMASKMOV, VPMASKMOV, VGATHER..., VPGATHER..., MASKMOVDQU, LDMXCSR).
use super::fpu::at::XMM;
use super::{Cx, Ea, Flow, fpu};
use crate::Exception;
use crate::state::cr0;

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// Executes one of this module's instructions.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    if !cx.st.avx_on() {
        return Err(Exception::UD);
    }
    if cx.st.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    match insn.mnemonic() {
        M::Vldmxcsr => fpu::load_mxcsr(cx, insn),
        M::Vmaskmovdqu => fpu::masked_bytes(cx, insn),
        M::Vmaskmovps | M::Vpmaskmovd => masked(cx, insn, 4),
        M::Vmaskmovpd | M::Vpmaskmovq => masked(cx, insn, 8),
        _ => gather(cx, insn),
    }
}

/// A whole YMM register, lowest byte first.
fn vector(cx: &Cx, r: Register) -> [u8; 32] {
    let n = r.number() & 15;
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&cx.st.fx.0[XMM + 16 * n..][..16]);
    bytes[16..24].copy_from_slice(&cx.st.ymm_high[n][0].to_le_bytes());
    bytes[24..].copy_from_slice(&cx.st.ymm_high[n][1].to_le_bytes());
    bytes
}

fn set_vector(cx: &mut Cx, r: Register, bytes: &[u8; 32]) {
    let n = r.number() & 15;
    let (words, _) = bytes.as_chunks::<8>();
    cx.st.fx.0[XMM + 16 * n..][..16].copy_from_slice(&bytes[..16]);
    cx.st.ymm_high[n] = [u64::from_le_bytes(words[2]), u64::from_le_bytes(words[3])];
}

/// Element `i` of `size` bytes (4 or 8).
fn element(bytes: &[u8; 32], i: usize, size: usize) -> u64 {
    let mut word = [0; 8];
    word[..size].copy_from_slice(&bytes[i * size..][..size]);
    u64::from_le_bytes(word)
}

/// Whether the mask's element `i` has its top bit set.
fn selected(mask: &[u8; 32], i: usize, size: usize) -> bool {
    mask[(i + 1) * size - 1] & 0x80 != 0
}

/// Where an element is that begins `offset` bytes into the operand. Outside 64-bit code, it must not lie beyond the end of what offsets reach:
/// an operand does not wrap.
pub(super) fn element_at(cx: &Cx, operand: Ea, offset: usize, size: usize) -> Result<Ea, Exception> {
    let at = Ea { va: operand.va.wrapping_add(offset as u64), ..operand };
    if cx.st.is_64_bit_code() {
        return Ok(at);
    }
    let start = (operand.va as u32).wrapping_sub(cx.st.seg[operand.segment].base as u32);
    let end = u64::from(start) + (offset + size) as u64;
    if end <= 1 << 32 { Ok(at) } else { Err(operand.fault(Exception::gp(0))) }
}

/// VMASKMOVPS and its kin, with elements of `size` bytes.
fn masked(cx: &mut Cx, insn: &Instruction, size: usize) -> Result<Flow, Exception> {
    let mask = vector(cx, insn.op1_register());
    let start = cx.ea(insn);
    if insn.op0_kind() == OpKind::Register {
        let to = insn.op0_register();
        let mut loaded = [0; 32];
        for i in (0..to.size() / size).filter(|&i| selected(&mask, i, size)) {
            let at = element_at(cx, start, i * size, size)?;
            let value = cx.read_value(at, size)?;
            loaded[i * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
        set_vector(cx, to, &loaded);
        return Ok(Flow::Next);
    }
    let from = vector(cx, insn.op2_register());
    let stored: Vec<usize> = (0..insn.op2_register().size() / size).filter(|&i| selected(&mask, i, size)).collect();
    for &i in &stored {
        let at = element_at(cx, start, i * size, size)?;
        cx.probe_bytes(at, size)?;
    }
    for &i in &stored {
        let at = element_at(cx, start, i * size, size)?;
        cx.write_value(at, size, element(&from, i, size))?;
    }
    Ok(Flow::Next)
}

/// Bytes of an element of data.
fn data_size(insn: &Instruction) -> usize {
    match insn.mnemonic() {
        M::Vgatherdps | M::Vgatherqps | M::Vpgatherdd | M::Vpgatherqd => 4,
        _ => 8,
    }
}

fn gather(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let (to, index, mask) = (insn.op0_register(), insn.memory_index(), insn.op2_register());
    if to == mask || to.full_register() == index.full_register() || mask.full_register() == index.full_register() {
        return Err(Exception::UD);
    }
    let size = data_size(insn);
    let index_size = if insn.is_vsib64() { 8 } else { 4 };
    let count = (to.size() / size).min(index.size() / index_size);
    let indices = vector(cx, index);
    let mut wanted = vector(cx, mask);
    let mut data = vector(cx, to);
    for i in 0..count {
        if selected(&wanted, i, size) {
            let offset = insn.virtual_address(1, i, |r, element_index, element_size| {
                Some(match r {
                    _ if r.is_segment_register() => 0,
                    _ if r.is_vector_register() => element(&indices, element_index, element_size),
                    _ => cx.st.gpr[r.full_register().number() & 15],
                })
            });
            let at = cx.linear(super::segment_number(insn.memory_segment()), offset.unwrap_or(0));
            match cx.read_value(at, size) {
                Ok(value) => data[i * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]),
                Err(e) => {
                    set_vector(cx, to, &data);
                    set_vector(cx, mask, &wanted);
                    return Err(e);
                }
            }
        }
        wanted[i * size..][..size].fill(0);
    }
    data[count * size..].fill(0);
    set_vector(cx, to, &data);
    set_vector(cx, mask, &[0; 32]);
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DEVICE, USER, World};
    use super::*;
    use crate::CpuModel;
    use crate::state::{cr4, gpr, xcr0};

    fn world() -> World {
        let mut w = World::new();
        w.model = CpuModel::x86_64_v3();
        w.st.cr4 |= cr4::OSXSAVE;
        w.st.xcr0 = xcr0::ALL;
        w.st.gpr[gpr::RBX] = USER;
        w
    }

    fn dwords(values: [u32; 8]) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (to, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *to = value.to_le_bytes();
        }
        bytes
    }

    /// What is not selected is not touched: not a page that is missing, not a device.
    #[test]
    fn masks_hide_pages_and_devices() {
        let top = 1 << 31;
        // VMASKMOVPS ymm2, ymm1, [rbx] and [rbx], ymm1, ymm2
        let (load, store): (&[u8], &[u8]) = (&[0xc4, 0xe2, 0x75, 0x2c, 0x13], &[0xc4, 0xe2, 0x75, 0x2e, 0x13]);
        let mut w = world();
        w.st.gpr[gpr::RBX] = USER + 0x1000 - 16;
        w.put_bytes(USER + 0x1000 - 16, &[1; 16]);
        w.unmap(USER + 0x1000);
        set_vector(&mut w.cx(), Register::YMM1, &dwords([top, 0, 5, top, 0, 0, 0, 0]));
        assert_eq!(w.exec(load), Ok(Flow::Next));
        assert_eq!(vector(&w.cx(), Register::YMM2), dwords([0x0101_0101, 0, 0, 0x0101_0101, 0, 0, 0, 0]));
        set_vector(&mut w.cx(), Register::YMM2, &dwords([7; 8]));
        assert_eq!(w.exec(store), Ok(Flow::Next));
        assert_eq!(w.get(USER + 0x1000 - 16), 0x0101_0101_0000_0007);
        set_vector(&mut w.cx(), Register::YMM1, &dwords([top, top, 0, 0, 0, 0, 0, top]));
        assert_eq!(w.exec(load), Err(Exception::pf(0, USER + 0x1000 + 12)));
        assert_eq!(w.exec(store), Err(Exception::pf(2, USER + 0x1000 + 12)));
        assert_eq!(w.get(USER + 0x1000 - 16), 0x0101_0101_0000_0007, "a fault leaves no trace");

        let mut w = world();
        w.st.gpr[gpr::RBX] = DEVICE;
        set_vector(&mut w.cx(), Register::YMM1, &dwords([0, 0, top, 0, 0, 0, top, 0]));
        assert_eq!(w.exec(store), Ok(Flow::Next));
        assert_eq!(w.bus.log, ["w4 fee00008", "w4 fee00018"]);
    }

    /// A gather that faults keeps what it has, and goes on there.
    #[test]
    fn a_gather_goes_on_where_it_faulted() {
        // VPGATHERDD ymm1, [rbx+ymm2*4], ymm3
        let code = &[0xc4, 0xe2, 0x65, 0x90, 0x0c, 0x93];
        let mut w = world();
        for i in 0..4 {
            w.put(USER + 8 * i, ((2 * i + 1) << 32) | (2 * i));
        }
        let all = u32::MAX;
        set_vector(&mut w.cx(), Register::YMM1, &dwords([99; 8]));
        set_vector(&mut w.cx(), Register::YMM2, &dwords([7, 6, 0xffff_ffff, 5, 4, 3, 2, 1]));
        set_vector(&mut w.cx(), Register::YMM3, &dwords([all, 0, 0, all, 1 << 31, all, 0x4000_0000, all]));
        w.put(super::super::testing::LEAVES + 8 * (USER >> 12), 0);
        w.mmu.flush_all();
        assert_eq!(execute(&mut w.cx(), &decoded(code)), Err(Exception::pf(0, USER + 28)));
        assert_eq!(vector(&w.cx(), Register::YMM3)[0], 0xff);
        // The same with the page there: in two goes, because the fifth element is elsewhere.
        w.put(super::super::testing::LEAVES + 8 * (USER >> 12), USER | 7);
        w.mmu.flush_all();
        set_vector(&mut w.cx(), Register::YMM2, &dwords([7, 6, 0xffff_ffff, 5, 0x0400_0000, 3, 2, 1]));
        assert_eq!(execute(&mut w.cx(), &decoded(code)), Err(Exception::pf(0, USER + 0x1000_0000)));
        assert_eq!(vector(&w.cx(), Register::YMM1), dwords([7, 99, 99, 5, 99, 99, 99, 99]));
        assert_eq!(vector(&w.cx(), Register::YMM3), dwords([0, 0, 0, 0, 1 << 31, all, 0x4000_0000, all]));
        set_vector(&mut w.cx(), Register::YMM2, &dwords([0, 0, 0, 0, 4, 3, 2, 1]));
        assert_eq!(execute(&mut w.cx(), &decoded(code)), Ok(Flow::Next));
        assert_eq!(vector(&w.cx(), Register::YMM1), dwords([7, 99, 99, 5, 4, 3, 99, 1]));
        assert_eq!(vector(&w.cx(), Register::YMM3), [0; 32]);
        // The same register twice.
        assert_eq!(execute(&mut w.cx(), &decoded_raw(&[0xc4, 0xe2, 0x75, 0x90, 0x0c, 0x93])), Err(Exception::UD));
    }

    fn decoded_raw(code: &[u8]) -> Instruction {
        iced_x86::Decoder::with_ip(64, code, 0, iced_x86::DecoderOptions::NO_INVALID_CHECK).decode()
    }
    fn decoded(code: &[u8]) -> Instruction {
        let insn = decoded_raw(code);
        assert_eq!(insn.len(), code.len());
        insn
    }

    #[test]
    fn switches() {
        // VLDMXCSR [rbx]
        let code = &[0xc5, 0xf8, 0xae, 0x13];
        let mut w = world();
        w.put(USER, 0x1fa0);
        w.st.cr0 |= crate::state::cr0::EM;
        assert_eq!(w.exec(code), Ok(Flow::Next));
        assert_eq!(w.st.fx.0[24..28], [0xa0, 0x1f, 0, 0]);
        w.put(USER, 0x1_0000);
        assert_eq!(w.exec(code), Err(Exception::gp(0)));
        w.st.cr0 |= cr0::TS;
        assert_eq!(w.exec(code), Err(Exception::NM));
        w.st.xcr0 = 3;
        assert_eq!(w.exec(code), Err(Exception::UD));
        w.st.xcr0 = 7;
        w.model = CpuModel::x86_64_v2();
        assert_eq!(w.exec(code), Err(Exception::UD));
    }
}
