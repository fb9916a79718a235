//! Port I/O: IN, OUT, and the permission check INS and OUTS share with them.
//!
//! **In:** the instruction; IOPL, CPL, the TSS's I/O bitmap. **Out:** the bus asked, or #GP(0).
//!
//! Reference: APM vol. 2 section 12.2.6 (I/O-permission bitmap), SDM vol. 1 section 19.5.
use super::{Cx, Flow};
use crate::Exception;
use crate::state::{Segment, gpr, rflags};
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Offset of the I/O map base in a 64-bit TSS, and in a 32-bit one.
const IO_MAP_BASE: u32 = 0x66;

/// #GP(0) unless the current code may access `size` ports from `port` on.
pub(super) fn check(cx: &mut Cx, port: u16, size: usize) -> Result<(), Exception> {
    let iopl = (cx.st.rflags & rflags::IOPL) >> 12;
    if cx.st.cpl as u64 <= iopl {
        return Ok(());
    }
    let tr = cx.st.tr;
    // A 16-bit TSS has no map.
    if tr.attributes & Segment::PRESENT == 0 || tr.attributes & 8 == 0 || tr.limit < IO_MAP_BASE + 1 {
        return Err(Exception::gp(0));
    }
    let base = u16::from_le_bytes(cx.read_system(tr.base.wrapping_add(IO_MAP_BASE as u64))?) as u32;
    // Two bytes are read always, so the map must be followed by a byte of ones.
    let at = base + port as u32 / 8;
    if at + 1 > tr.limit {
        return Err(Exception::gp(0));
    }
    let map = u16::from_le_bytes(cx.read_system(tr.base.wrapping_add(at as u64))?);
    let wanted = ((1u16 << size) - 1) << (port % 8);
    if map & wanted != 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

/// IN and OUT.
pub(super) fn execute(cx: &mut Cx, insn: &Instruction) -> Result<Flow, Exception> {
    let input = insn.mnemonic() == Mnemonic::In;
    let (data, port) = if input { (0, 1) } else { (1, 0) };
    let size = insn.op_register(data).size();
    let port = match insn.op_kind(port) {
        OpKind::Register => cx.st.gpr[gpr::RDX] as u16,
        _ => insn.immediate8() as u16,
    };
    check(cx, port, size)?;
    if input {
        let value = cx.bus.pio_read(cx.position, port, size as u8) as u64;
        let rax = &mut cx.st.gpr[gpr::RAX];
        *rax = match size {
            1 => *rax & !0xff | value & 0xff,
            2 => *rax & !0xffff | value & 0xffff,
            _ => value,
        };
    } else {
        let value = cx.st.gpr[gpr::RAX] as u32 & (u32::MAX >> (32 - 8 * size));
        cx.bus.pio_write(cx.position, port, size as u8, value);
    }
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TSS, World};
    use super::*;

    #[test]
    fn registers_and_sizes() {
        let mut w = World::new();
        w.st.gpr[gpr::RAX] = u64::MAX;
        w.st.gpr[gpr::RDX] = 0x3f8;
        w.bus.port_value = 0x1234_5678;
        assert_eq!(w.exec(&[0xec]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RAX], 0xffff_ffff_ffff_ff78);
        assert_eq!(w.exec(&[0xe5, 0x60]), Ok(Flow::Next));
        assert_eq!(w.st.gpr[gpr::RAX], 0x1234_5678);
        assert_eq!(w.exec(&[0x66, 0xef]), Ok(Flow::Next));
        assert_eq!(w.exec(&[0xe6, 0x80]), Ok(Flow::Next));
        assert_eq!(w.bus.log, ["in1 3f8", "in4 60", "out2 3f8 5678", "out1 80 78"]);
    }

    #[test]
    fn users_need_iopl_or_the_bitmap() {
        let mut w = World::new().user();
        w.st.gpr[gpr::RDX] = 0x3f8;
        // The TSS ends before the map's base says anything.
        w.put(TSS + 0x66, 0x68);
        assert_eq!(w.exec(&[0xec]), Err(Exception::gp(0)));
        w.st.tr.limit = 0x68 + 0x2000;
        assert_eq!(w.exec(&[0xec]), Ok(Flow::Next));
        w.put(TSS + 0x68 + 0x3f8 / 8, 2);
        assert_eq!(w.exec(&[0xec]), Ok(Flow::Next));
        assert_eq!(w.exec(&[0x66, 0xed]), Err(Exception::gp(0)));
        assert_eq!(w.exec(&[0x6e]), Err(Exception::pf(5, 0)));
        w.st.rflags |= rflags::IOPL;
        assert_eq!(w.exec(&[0x66, 0xed]), Ok(Flow::Next));
    }
}
