//! Starting a kernel: an unmodified Linux bzImage with its initramfs, entered at its 64-bit entry point, or at its
//! 32-bit one if that is all it has; here. What begins in protected mode, an ELF
//! image with a PVH note or a multiboot image, is in [`bare`].
//!
//! **In:** the files' bytes and a command line. **Out:** guest RAM and a processor state as a boot loader leaves them. **Invariant:** everything is
//! checked before the first byte is written, and the result depends on the arguments only.
//! Reference: Linux, Documentation/arch/x86/boot.rst (boot protocol 2.12 and up) and zero-page.rst.
//!
//! ```text
//! 0000_7000  zero page (boot_params)      0002_0000  command line
//! 0000_8000  GDT                          000e_0000  ACPI tables
//! 0000_9000  page tables                  0010_0000  kernel
//!                                         ...        initramfs, as high as the kernel allows
//! ```
mod bare;
mod elf;
mod entry;

use crate::memory::GuestRam;
use crate::{acpi, layout, memory};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use std::io::Cursor;
use twinstep_x86::CpuState;
use twinstep_x86::state::gpr;
use vm_memory::{ByteValued, Bytes, GuestAddress};

const ZERO_PAGE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Where the kernel's protected-mode part goes.
const KERNEL: u64 = layout::HIGH_MEMORY;
/// The 64-bit entry point lies this far into it. The 32-bit one is where it begins.
const ENTRY_64: u64 = 0x200;

const HEADER: usize = 0x1f1;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 0x80;
const XLF_KERNEL_64: u16 = 1;
/// Boot protocol 2.12 (Linux 3.8) brought `xloadflags`.
const OLDEST_PROTOCOL: u16 = 0x020c;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why a kernel cannot be booted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// Not a bzImage.
    #[error("the kernel is not a bzImage: {0}")]
    NotBzImage(&'static str),
    /// An ELF image that cannot be loaded.
    #[error("the ELF image cannot be booted: {0}")]
    BadElf(&'static str),
    /// A multiboot image that cannot be loaded.
    #[error("the multiboot image cannot be booted: {0}")]
    BadMultiboot(&'static str),
    /// None of the kinds of kernel there are.
    #[error("the kernel is none of these: a Linux bzImage, an ELF image with a PVH note, a multiboot image")]
    Unknown,
    /// Its boot protocol does not say enough.
    #[error("the kernel's boot protocol {major}.{minor:02} is too old; 2.12 (Linux 3.8) or later is needed")]
    TooOld {
        /// Protocol version.
        major: u8,
        /// Protocol version.
        minor: u8,
    },
    /// The kernel needs more RAM than there is.
    #[error("the kernel needs {needed_mib} MiB of RAM to unpack; the machine has {have_mib} MiB below 3 GiB")]
    KernelTooLarge {
        /// What it needs.
        needed_mib: u64,
        /// What there is.
        have_mib: u64,
    },
    /// The initramfs does not fit beside the kernel.
    #[error("the initramfs of {len_mib} MiB does not fit: {free_mib} MiB are free beside the kernel")]
    InitrdTooLarge {
        /// Its size.
        len_mib: u64,
        /// What is free.
        free_mib: u64,
    },
    /// The command line is longer than the kernel accepts.
    #[error("the command line has {len} bytes; this kernel accepts {max}")]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// The kernel's limit.
        max: usize,
    },
    /// The command line holds a NUL.
    #[error("the command line contains a NUL byte")]
    CommandLineNul,
    /// The machine is not fresh.
    #[error("a kernel can only be booted on a machine that has not run")]
    NotFresh,
    /// Copying to RAM failed.
    #[error("loading the kernel failed: {0}")]
    Load(String),
}

/// Where things go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// Start of the initramfs.
    initrd: u64,
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// The setup header of a bzImage, checked.
fn header(kernel: &[u8]) -> Result<setup_header, BootError> {
    let size = size_of::<setup_header>();
    let bytes = kernel.get(HEADER..HEADER + size).ok_or(BootError::NotBzImage("it is too short"))?;
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(bytes);
    if header.boot_flag != 0xaa55 || header.header != HEADER_MAGIC {
        return Err(BootError::NotBzImage("its setup header has no 'HdrS' signature"));
    }
    let version = header.version;
    if version < OLDEST_PROTOCOL {
        return Err(BootError::TooOld { major: (version >> 8) as u8, minor: version as u8 });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::NotBzImage("it loads low (a zImage)"));
    }
    let setup = (u64::from(header.setup_sects.max(1)) + 1) * 512;
    // The size is rounded up to paragraphs of 16 bytes.
    let whole = setup + (u64::from(header.syssize) * 16).saturating_sub(15).max(ENTRY_64 + 1);
    if (kernel.len() as u64) < whole {
        return Err(BootError::NotBzImage("it is cut off"));
    }
    Ok(header)
}

fn plan(header: &setup_header, kernel: &[u8], initrd: u64, cmdline: &str, ram_mib: u32) -> Result<Plan, BootError> {
    let max = header.cmdline_size as usize;
    if cmdline.len() > max {
        return Err(BootError::CommandLineTooLong { len: cmdline.len(), max });
    }
    if cmdline.as_bytes().contains(&0) {
        return Err(BootError::CommandLineNul);
    }
    let (_, low_end) = memory::regions(ram_mib)[0];
    // The kernel unpacks itself at its preferred address (or where it was loaded, if that is higher), and needs `init_size` from there on.
    let preferred = header.pref_address;
    let base = KERNEL.max(preferred);
    let kernel_end = base.saturating_add(header.init_size.into()).max(KERNEL + kernel.len() as u64);
    if kernel_end > low_end {
        return Err(BootError::KernelTooLarge { needed_mib: mib(kernel_end), have_mib: mib(low_end) });
    }
    let initrd_end = low_end.min(u64::from(header.initrd_addr_max) + 1);
    let free = initrd_end.saturating_sub(kernel_end.next_multiple_of(4096));
    if initrd > free {
        return Err(BootError::InitrdTooLarge { len_mib: mib(initrd), free_mib: free >> 20 });
    }
    Ok(Plan { initrd: (initrd_end - initrd) & !0xfff })
}

/// (start, length, kind) of the guest's memory map.
fn e820(ram_mib: u32) -> Vec<(u64, u64, u32)> {
    let regions = memory::regions(ram_mib);
    let mut map = vec![
        (0, layout::EBDA, E820_RAM),
        (layout::EBDA, 0xa_0000 - layout::EBDA, E820_RESERVED),
        (layout::ACPI_TABLES, layout::HIGH_MEMORY - layout::ACPI_TABLES, E820_RESERVED),
        (layout::HIGH_MEMORY, regions[0].1 - layout::HIGH_MEMORY, E820_RAM),
        (layout::ECAM, layout::ECAM_LEN, E820_RESERVED),
    ];
    map.extend(regions[1..].iter().map(|&(gpa, len)| (gpa, len, E820_RAM)));
    map
}

/// Loads everything into `ram` and returns the processor state to start with.
pub(crate) fn load(
    ram: &GuestRam,
    ram_mib: u32,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<CpuState, BootError> {
    let initrd = initrd.unwrap_or(&[]);
    let is_bz_image = kernel.get(HEADER + 0x11..HEADER + 0x15) == Some(&HEADER_MAGIC.to_le_bytes());
    if !is_bz_image {
        // Multiboot images may be ELF images, and have PVH notes as well.
        let is_pvh = elf::is_elf(kernel) && elf::parse(kernel).is_ok_and(|e| e.wide && e.pvh.is_some());
        if let Some(header) = bare::multiboot_header(kernel).filter(|_| !is_pvh) {
            return bare::load_multiboot(ram, ram_mib, kernel, header, initrd, cmdline);
        }
        if elf::is_elf(kernel) {
            return bare::load_pvh(ram, ram_mib, kernel, initrd, cmdline);
        }
        return Err(BootError::Unknown);
    }
    load_linux(ram, ram_mib, kernel, initrd, cmdline)
}

fn load_linux(ram: &GuestRam, ram_mib: u32, kernel: &[u8], initrd: &[u8], cmdline: &str) -> Result<CpuState, BootError> {
    let mut header = header(kernel)?;
    let wide = header.xloadflags & XLF_KERNEL_64 != 0;
    let plan = plan(&header, kernel, initrd.len() as u64, cmdline, ram_mib)?;
    let failed = |e: &dyn std::fmt::Display| BootError::Load(e.to_string());

    let loaded = BzImage::load(ram, Some(GuestAddress(KERNEL)), &mut Cursor::new(kernel), None).map_err(|e| failed(&e))?;
    let write = |gpa: u64, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(gpa)).map_err(|e| failed(&e));
    write(COMMAND_LINE, cmdline.as_bytes())?;
    write(COMMAND_LINE + cmdline.len() as u64, &[0])?;
    if !initrd.is_empty() {
        write(plan.initrd, initrd)?;
        header.ramdisk_image = plan.initrd as u32;
        header.ramdisk_size = initrd.len() as u32;
    }
    for table in acpi::tables() {
        write(table.gpa, &table.bytes)?;
    }

    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags = header.loadflags & !CAN_USE_HEAP | LOADED_HIGH;
    header.code32_start = KERNEL as u32;
    header.cmd_line_ptr = COMMAND_LINE as u32;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI_TABLES, ..Default::default() };
    let map = e820(ram_mib);
    for (i, &(addr, size, kind)) in map.iter().enumerate() {
        params.e820_table[i].addr = addr;
        params.e820_table[i].size = size;
        params.e820_table[i].r#type = kind;
    }
    params.e820_entries = map.len() as u8;
    write(ZERO_PAGE, params.as_slice())?;

    if wide {
        entry::write_tables(ram).map_err(|e| failed(&e))?;
        return Ok(entry::state(loaded.kernel_load.0 + ENTRY_64, ZERO_PAGE));
    }
    entry::write_gdt_32(ram).map_err(|e| failed(&e))?;
    let mut state = entry::state_32(loaded.kernel_load.0 as u32, 0, 0);
    state.gpr[gpr::RSI] = ZERO_PAGE;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinstep_x86::state::seg;

    /// A bzImage of one setup sector and `body` bytes.
    fn image(body: usize) -> Vec<u8> {
        let mut image = vec![0xcc; 1024 + body];
        image[..1024].fill(0);
        let header = setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            header: HEADER_MAGIC,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 2047,
            pref_address: 16 << 20,
            init_size: 20 << 20,
            relocatable_kernel: 1,
            ..Default::default()
        };
        image[HEADER..HEADER + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image
    }
    fn set<T: ByteValued>(image: &mut [u8], offset: usize, value: T) {
        image[offset..offset + size_of::<T>()].copy_from_slice(value.as_slice());
    }

    #[test]
    fn loads_kernel_initrd_and_zero_page() {
        let (ram, _phys) = memory::map(64).unwrap();
        let kernel = image(0x3000);
        let state = load(&ram, 64, &kernel, Some(b"initramfs"), "console=ttyS0").unwrap();
        assert_eq!(state.rip, KERNEL + ENTRY_64);
        assert_eq!(state.gpr[gpr::RSI], ZERO_PAGE);
        assert_eq!((state.seg[seg::CS].selector, state.seg[seg::DS].selector), (0x10, 0x18));
        assert!(state.is_64_bit_code());
        let params: boot_params = ram.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((image, size), ((64 << 20) - 4096, 9));
        let mut text = [0; 9];
        ram.read_slice(&mut text, GuestAddress(image.into())).unwrap();
        assert_eq!(&text, b"initramfs");
        assert_eq!(params.e820_entries, 5);
        let rsdp = params.acpi_rsdp_addr;
        ram.read_slice(&mut text[..8], GuestAddress(rsdp)).unwrap();
        assert_eq!(&text[..8], b"RSD PTR ");
        assert_eq!(ram.read_obj::<u8>(GuestAddress(KERNEL)).unwrap(), 0xcc);
    }

    #[test]
    fn a_32_bit_kernel() {
        let (ram, _phys) = memory::map(64).unwrap();
        let mut kernel = image(0x3000);
        set(&mut kernel, 0x236, 0u16);
        let state = load(&ram, 64, &kernel, None, "console=ttyS0").unwrap();
        assert_eq!((state.rip, state.gpr[gpr::RSI], state.gpr[gpr::RBX]), (KERNEL, ZERO_PAGE, 0));
        assert_eq!((state.seg[seg::CS].attributes, state.cr0 >> 31, state.efer), (0xc09b, 0, 0));
    }

    #[test]
    fn bad_kernels_are_named() {
        let (ram, _phys) = memory::map(64).unwrap();
        let boot = |kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str| load(&ram, 64, kernel, initrd, cmdline).unwrap_err();
        assert!(matches!(boot(b"\x7fELF", None, ""), BootError::BadElf(_)));
        assert_eq!(boot(&[0; 4096], None, ""), BootError::Unknown);
        assert_eq!(boot(b"", None, ""), BootError::Unknown);
        let good = image(0x3000);
        assert!(matches!(boot(&good[..1024], None, ""), BootError::NotBzImage(_)));
        let mut old = good.clone();
        set(&mut old, 0x206, 0x0206u16);
        assert_eq!(
            boot(&old, None, "").to_string(),
            "the kernel's boot protocol 2.06 is too old; 2.12 (Linux 3.8) or later is needed"
        );
        let mut big = good.clone();
        set(&mut big, 0x260, 100u32 << 20);
        assert_eq!(boot(&big, None, ""), BootError::KernelTooLarge { needed_mib: 116, have_mib: 64 });
        assert_eq!(boot(&good, Some(&vec![0; 30 << 20]), ""), BootError::InitrdTooLarge { len_mib: 30, free_mib: 28 });
        assert_eq!(boot(&good, None, &"x".repeat(2048)), BootError::CommandLineTooLong { len: 2048, max: 2047 });
        assert_eq!(boot(&good, None, "a\0b"), BootError::CommandLineNul);
    }

    #[test]
    fn memory_map_of_a_large_machine() {
        let map = e820(8192);
        assert_eq!(map.last(), Some(&(4 << 30, 5 << 30, E820_RAM)));
        assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
    }
}
