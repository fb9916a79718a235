//! Kernels that begin in protected mode: ELF images with a PVH note, and multiboot (version 1) images.
//!
//! **In:** the files' bytes and a command line. **Out:** guest RAM and a processor state as the two protocols want them. **Invariant:** everything is
//! checked before the first byte is written, and the result depends on the arguments only.
//!
//! Modules: PVH's (the initramfs) lies as high as possible below 3 GiB, multiboot's follows the kernel, as QEMU's does. The first word of a multiboot
//! command line is "kernel", where others have the name of a file.
//!
//! References: Xen, docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h; Multiboot Specification version 0.6.96.
//!
//! ```text
//! 0000_7000  start_info or multiboot information, memory map    0002_0000  command line
//! 0000_8000  GDT                                                the rest is the kernel's
//! ```
use super::elf::{self, Elf, Segment};
use super::{BootError, COMMAND_LINE, e820, entry, mib};
use crate::memory::GuestRam;
use crate::{acpi, layout, memory};
use twinstep_x86::CpuState;
use vm_memory::{Bytes, GuestAddress};

/// Where what we say to the kernel lies, and how much room that takes; no segment may be there.
const INFORMATION: u64 = 0x7000;
const MODULE_LIST: u64 = 0x7100;
const MEMORY_MAP: u64 = 0x7200;
const RESERVED_END: u64 = COMMAND_LINE + 0x1_0000;
/// The longest command line.
const MAX_COMMAND_LINE: usize = 0xfff0;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const MULTIBOOT_HEADER: u32 = 0x1bad_b002;
const MULTIBOOT_LOADED: u32 = 0x2bad_b002;
/// A multiboot header lies in the first 8 KiB.
const HEADER_END: usize = 8192;

/// What a multiboot header asks for.
mod wants {
    /// Modules on page boundaries; memory information. Both are done always.
    pub const PAGES: u32 = 1;
    pub const MEMORY: u32 = 2;
    /// A video mode: not offered, and not refused either, as the kernel finds out.
    pub const VIDEO: u32 = 4;
    /// Where it is to be loaded is in the header.
    pub const ADDRESSES: u32 = 1 << 16;
    /// Those that a loader must understand or refuse.
    pub const REQUIRED: u32 = 0xffff;
}

/// What the information given to a multiboot kernel has.
mod has {
    pub const MEMORY: u32 = 1;
    pub const BOOT_DEVICE: u32 = 1 << 1;
    pub const COMMAND_LINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
    pub const LOADER_NAME: u32 = 1 << 9;
}

/// A multiboot header: its offset in the file, and its flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    at: usize,
    flags: u32,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// The multiboot header of an image, if it has one.
pub(super) fn multiboot_header(image: &[u8]) -> Option<Header> {
    (0..HEADER_END.min(image.len())).step_by(4).find_map(|at| {
        let (magic, flags, checksum) = (word(image, at)?, word(image, at + 4)?, word(image, at + 8)?);
        let sum = magic.wrapping_add(flags).wrapping_add(checksum);
        (magic == MULTIBOOT_HEADER && sum == 0).then_some(Header { at, flags })
    })
}

/// An image whose multiboot header says where it goes.
fn by_addresses(image: &[u8], header: Header) -> Result<Elf, BootError> {
    let bad = BootError::BadMultiboot("the addresses in its header make no sense");
    let field = |n: usize| word(image, header.at + 12 + 4 * n).map(u64::from).ok_or(bad.clone());
    let (header_at, load, load_end, bss_end, entry) = (field(0)?, field(1)?, field(2)?, field(3)?, field(4)?);
    let skipped = (header.at as u64).checked_sub(header_at.checked_sub(load).ok_or(bad.clone())?).ok_or(bad.clone())?;
    let end = if load_end == 0 { image.len() as u64 } else { skipped + load_end.checked_sub(load).ok_or(bad.clone())? };
    let file = skipped as usize..end as usize;
    if file.start > file.end || file.end > image.len() {
        return Err(bad);
    }
    let len = (file.len() as u64).max(bss_end.saturating_sub(load));
    Ok(Elf { segments: vec![Segment { gpa: load, file, len }], entry, pvh: None, wide: false })
}

/// Checks that an image fits and the command line is one. Says where the image ends and how much low RAM there is.
fn check(elf: &Elf, cmdline: &str, ram_mib: u32) -> Result<(u64, u64), BootError> {
    if cmdline.len() > MAX_COMMAND_LINE {
        return Err(BootError::CommandLineTooLong { len: cmdline.len(), max: MAX_COMMAND_LINE });
    }
    if cmdline.as_bytes().contains(&0) {
        return Err(BootError::CommandLineNul);
    }
    let (_, low_end) = memory::regions(ram_mib)[0];
    let mut end = 0;
    for s in &elf.segments {
        if s.gpa < RESERVED_END || s.gpa < layout::HIGH_MEMORY && s.gpa + s.len > layout::EBDA {
            return Err(BootError::BadElf("it wants to be loaded where boot information or firmware is"));
        }
        end = end.max(s.gpa + s.len);
    }
    if elf.segments.is_empty() {
        return Err(BootError::BadElf("it has nothing to load"));
    }
    if end > low_end {
        return Err(BootError::KernelTooLarge { needed_mib: mib(end), have_mib: mib(low_end) });
    }
    Ok((end, low_end))
}

/// Writes to RAM.
struct Writer<'a>(&'a GuestRam);

impl Writer<'_> {
    fn put(&self, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.0.write_slice(bytes, GuestAddress(gpa)).map_err(|e| BootError::Load(e.to_string()))
    }
    /// An image. RAM is zero at power-on, and so is what the file does not have of a segment.
    fn image(&self, image: &[u8], elf: &Elf) -> Result<(), BootError> {
        elf.segments.iter().try_for_each(|s| self.put(s.gpa, &image[s.file.clone()]))
    }
    /// Text with its NUL.
    fn text(&self, gpa: u64, text: &str) -> Result<(), BootError> {
        self.put(gpa, text.as_bytes())?;
        self.put(gpa + text.len() as u64, &[0])
    }
    fn tables(&self) -> Result<(), BootError> {
        acpi::tables().iter().try_for_each(|table| self.put(table.gpa, &table.bytes))
    }
}

/// Loads an ELF image with a PVH note.
pub(super) fn load_pvh(ram: &GuestRam, ram_mib: u32, image: &[u8], initrd: &[u8], cmdline: &str) -> Result<CpuState, BootError> {
    let elf = elf::parse(image)?;
    let entry = elf.pvh.ok_or(BootError::BadElf("it has neither a PVH note nor a multiboot header"))?;
    let entry = u32::try_from(entry).map_err(|_| BootError::BadElf("its PVH entry point is above 4 GiB"))?;
    let (end, low_end) = check(&elf, cmdline, ram_mib)?;
    let len = initrd.len() as u64;
    let free = low_end.saturating_sub(end.next_multiple_of(4096));
    if len > free {
        return Err(BootError::InitrdTooLarge { len_mib: mib(len), free_mib: free >> 20 });
    }
    let module = (low_end - len) & !0xfff;

    let to = Writer(ram);
    to.image(image, &elf)?;
    to.put(module, initrd)?;
    to.text(COMMAND_LINE, cmdline)?;
    to.tables()?;
    let modules = u32::from(!initrd.is_empty());
    to.put(MODULE_LIST, &[module, len, 0, 0].map(u64::to_le_bytes).concat())?;
    let map = e820(ram_mib);
    for (i, &(gpa, len, kind)) in (0..).zip(&map) {
        to.put(MEMORY_MAP + 24 * i, &[gpa, len, kind.into()].map(u64::to_le_bytes).concat())?;
    }
    let mut info = [START_INFO_MAGIC, 1, 0, modules].map(u32::to_le_bytes).concat();
    let list = if modules == 0 { 0 } else { MODULE_LIST };
    info.extend([list, COMMAND_LINE, layout::ACPI_TABLES, MEMORY_MAP, map.len() as u64].map(u64::to_le_bytes).concat());
    to.put(INFORMATION, &info)?;
    entry::write_gdt_32(ram).map_err(|e| BootError::Load(e.to_string()))?;
    Ok(entry::state_32(entry, 0, INFORMATION as u32))
}

/// Loads a multiboot image.
pub(super) fn load_multiboot(
    ram: &GuestRam,
    ram_mib: u32,
    image: &[u8],
    header: Header,
    initrd: &[u8],
    cmdline: &str,
) -> Result<CpuState, BootError> {
    if header.flags & wants::REQUIRED & !(wants::PAGES | wants::MEMORY | wants::VIDEO) != 0 {
        return Err(BootError::BadMultiboot("it wants something that is not offered"));
    }
    let elf = if header.flags & wants::ADDRESSES != 0 { by_addresses(image, header)? } else { elf::parse(image)? };
    if elf.wide {
        return Err(BootError::BadMultiboot("it is a 64-bit ELF image, and multiboot has 32-bit ones"));
    }
    let entry = u32::try_from(elf.entry).map_err(|_| BootError::BadMultiboot("its entry point is above 4 GiB"))?;
    let cmdline = if cmdline.is_empty() { "kernel".into() } else { format!("kernel {cmdline}") };
    let (end, low_end) = check(&elf, &cmdline, ram_mib)?;
    let module = end.next_multiple_of(4096);
    let len = initrd.len() as u64;
    if module + len > low_end {
        return Err(BootError::InitrdTooLarge { len_mib: mib(len), free_mib: low_end.saturating_sub(module) >> 20 });
    }

    let to = Writer(ram);
    to.image(image, &elf)?;
    to.put(module, initrd)?;
    to.text(COMMAND_LINE, &cmdline)?;
    to.tables()?;
    let map = e820(ram_mib);
    for (i, &(gpa, len, kind)) in (0..).zip(&map) {
        // Each entry is preceded by its size, itself not counted.
        let entry = [&20u32.to_le_bytes()[..], &gpa.to_le_bytes(), &len.to_le_bytes(), &kind.to_le_bytes()].concat();
        to.put(MEMORY_MAP + 24 * i, &entry)?;
    }
    let name = MODULE_LIST + 0x40;
    to.text(name, "twinstep")?;
    let modules = u32::from(!initrd.is_empty());
    // Start, end, its own command line, reserved.
    to.put(
        MODULE_LIST,
        &[module as u32, (module + len) as u32, (COMMAND_LINE + cmdline.len() as u64) as u32, 0].map(u32::to_le_bytes).concat(),
    )?;
    let mut info = [0u32; 29];
    info[0] = has::MEMORY | has::BOOT_DEVICE | has::COMMAND_LINE | has::MODULES | has::MEMORY_MAP | has::LOADER_NAME;
    // KiB below 640 KiB, and from 1 MiB on.
    info[1] = (layout::EBDA >> 10) as u32;
    info[2] = ((low_end - layout::HIGH_MEMORY) >> 10) as u32;
    info[3] = 0x8000_ffff;
    info[4] = COMMAND_LINE as u32;
    info[5] = modules;
    info[6] = if modules == 0 { 0 } else { MODULE_LIST as u32 };
    info[11] = 24 * map.len() as u32;
    info[12] = MEMORY_MAP as u32;
    info[16] = name as u32;
    to.put(INFORMATION, &info.map(u32::to_le_bytes).concat())?;
    entry::write_gdt_32(ram).map_err(|e| BootError::Load(e.to_string()))?;
    Ok(entry::state_32(entry, MULTIBOOT_LOADED, INFORMATION as u32))
}

#[cfg(test)]
mod tests {
    use super::super::load;
    use super::*;
    use crate::memory;
    use twinstep_x86::state::{cr0, gpr, seg};

    fn get(ram: &GuestRam, gpa: u64) -> u32 {
        ram.read_obj(GuestAddress(gpa)).unwrap()
    }
    fn text(ram: &GuestRam, gpa: u64) -> String {
        (gpa..).map(|at| ram.read_obj::<u8>(GuestAddress(at)).unwrap()).take_while(|&b| b != 0).map(char::from).collect()
    }
    /// An image with a multiboot header in front of its code.
    fn multiboot(flags: u32, more: &[u32]) -> Vec<u8> {
        let mut code =
            [MULTIBOOT_HEADER, flags, 0u32.wrapping_sub(MULTIBOOT_HEADER).wrapping_sub(flags)].map(u32::to_le_bytes).concat();
        code.extend(more.iter().flat_map(|w| w.to_le_bytes()));
        code.extend([0xf4; 16]);
        code
    }

    #[test]
    fn pvh() {
        let (ram, _phys) = memory::map(64).unwrap();
        let image = elf::tests::image(&[0xf4; 8], 0x10_0000, 0x10_0000, Some(0x10_0004));
        let st = load(&ram, 64, &image, Some(b"module"), "hello world").unwrap();
        assert_eq!((st.rip, st.gpr[gpr::RBX], st.cr0), (0x10_0004, INFORMATION, cr0::PE | cr0::ET));
        assert!(!st.is_64_bit_code());
        assert_eq!((st.seg[seg::CS].attributes, st.seg[seg::SS].attributes, st.tr.attributes), (0xc09b, 0xc093, 0x8b));
        assert_eq!((get(&ram, INFORMATION), get(&ram, INFORMATION + 4), get(&ram, INFORMATION + 12)), (START_INFO_MAGIC, 1, 1));
        assert_eq!(text(&ram, get(&ram, INFORMATION + 24).into()), "hello world");
        let module = get(&ram, get(&ram, INFORMATION + 16).into());
        assert_eq!((u64::from(module), text(&ram, module.into())), ((64 << 20) - 4096, "module".into()));
        assert_eq!(text(&ram, get(&ram, INFORMATION + 32).into())[..8], *"RSD PTR ");
        assert_eq!(get(&ram, INFORMATION + 48), 5);
        assert_eq!(get(&ram, 0x10_0000), 0xf4f4_f4f4);
        let none = elf::tests::image(&[0xf4; 8], 0x10_0000, 0x10_0000, None);
        assert!(matches!(load(&ram, 64, &none, None, ""), Err(BootError::BadElf(_))));
        let high = elf::tests::image(&[0xf4; 8], 64 << 20, 64 << 20, Some(0));
        assert!(matches!(load(&ram, 64, &high, None, ""), Err(BootError::KernelTooLarge { .. })));
        let low = elf::tests::image(&[0xf4; 8], 0x7000, 0x7000, Some(0));
        assert!(matches!(load(&ram, 64, &low, None, ""), Err(BootError::BadElf(_))));
    }

    #[test]
    fn multiboot_in_elf() {
        let (ram, _phys) = memory::map(64).unwrap();
        let image = elf::tests::image(&multiboot(wants::PAGES | wants::MEMORY, &[]), 0x10_0000, 0xc010_0000, Some(0x20_0000));
        let st = load(&ram, 64, &image, Some(b"module"), "a=b").unwrap();
        assert_eq!((st.rip, st.gpr[gpr::RAX], st.gpr[gpr::RBX]), (0x10_0000, MULTIBOOT_LOADED.into(), INFORMATION));
        assert_eq!((get(&ram, INFORMATION + 4), get(&ram, INFORMATION + 8)), (639, 63 << 10));
        assert_eq!(text(&ram, get(&ram, INFORMATION + 16).into()), "kernel a=b");
        assert_eq!(text(&ram, get(&ram, INFORMATION + 64).into()), "twinstep");
        let list: u64 = get(&ram, INFORMATION + 24).into();
        let (from, to) = (get(&ram, list), get(&ram, list + 4));
        assert_eq!((from % 4096, to - from, text(&ram, from.into())), (0, 6, "module".into()));
        // The memory map: the first entry's size, base and length.
        let map: u64 = get(&ram, INFORMATION + 48).into();
        assert_eq!((get(&ram, map), get(&ram, map + 4), get(&ram, map + 12)), (20, 0, 0x9_fc00));
    }

    #[test]
    fn multiboot_by_addresses() {
        let (ram, _phys) = memory::map(64).unwrap();
        // Header address, load, load end, bss end, entry.
        let image = multiboot(wants::ADDRESSES, &[0x20_0000, 0x20_0000, 0, 0x20_1000, 0x20_0020]);
        let st = load(&ram, 64, &image, None, "").unwrap();
        assert_eq!((st.rip, get(&ram, 0x20_0000)), (0x20_0020, MULTIBOOT_HEADER));
        assert_eq!((get(&ram, INFORMATION + 20), text(&ram, COMMAND_LINE)), (0, "kernel".into()));
        for bad in [[0x20_0000, 0x20_1000, 0, 0, 0], [0x20_0100, 0x20_0000, 0, 0, 0], [0x20_0000, 0x20_0000, 0x30_0000, 0, 0]] {
            let image = multiboot(wants::ADDRESSES, &bad);
            assert!(matches!(load(&ram, 64, &image, None, ""), Err(BootError::BadMultiboot(_))));
        }
        let wishes = elf::tests::image(&multiboot(8, &[]), 0x10_0000, 0x10_0000, None);
        assert!(matches!(load(&ram, 64, &wishes, None, ""), Err(BootError::BadMultiboot(_))));
    }
}
