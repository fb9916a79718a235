//! Where everything is: the guest-physical memory map, the I/O ports and the interrupt lines of the virtual PC.
//!
//! One page, because the boot code (E820), the ACPI tables and the bus must tell the guest the same story.
//!
//! ```text
//! 0000_0000 .. RAM, up to 3 GiB (the ACPI tables sit in the page range of the old BIOS, e_0000 .. 10_0000)
//! c000_0000 .. PCI memory window (512 MiB)
//! e000_0000 .. PCI configuration space, ECAM, bus 0 (1 MiB)
//! fec0_0000 .. I/O APIC
//! fee0_0000 .. local APIC (until the guest switches to x2APIC mode)
//! 1_0000_0000 .. RAM above 3 GiB
//! ```

/// RAM below this address is contiguous from 0; what does not fit continues at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM beyond [`LOW_RAM_END`] goes on.
pub const HIGH_RAM: u64 = 0x1_0000_0000;
/// First byte of the extended BIOS data area that real firmware would reserve.
pub const EBDA: u64 = 0x9_fc00;
/// Start of the range that holds the ACPI tables; reserved in E820.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of low memory: everything from here to the end of low RAM is the guest's.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// PCI memory window: base address registers live here.
pub const PCI_WINDOW: u64 = 0xc000_0000;
/// Bytes in the PCI memory window.
pub const PCI_WINDOW_LEN: u64 = 0x2000_0000;
/// PCI Express enhanced configuration space, bus 0 only.
pub const ECAM: u64 = 0xe000_0000;
/// Bytes of ECAM: one bus.
pub const ECAM_LEN: u64 = 0x10_0000;
/// I/O APIC registers.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Bytes the I/O APIC decodes.
pub const IO_APIC_LEN: u64 = 0x1000;
/// Local APIC registers in xAPIC mode.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Bytes the local APIC decodes.
pub const LOCAL_APIC_LEN: u64 = 0x1000;

/// COM1.
pub const PORT_SERIAL: u16 = 0x3f8;
/// Ports of COM1.
pub const PORT_SERIAL_LEN: u16 = 8;
/// Keyboard controller command port: only its reset command exists here.
pub const PORT_KBD_COMMAND: u16 = 0x64;
/// CMOS index port; the data port follows it.
pub const PORT_RTC: u16 = 0x70;
/// ACPI PM1a event block: status and enable, two bytes each.
pub const PORT_PM1_EVENT: u16 = 0x600;
/// Bytes of the PM1a event block.
pub const PORT_PM1_EVENT_LEN: u16 = 4;
/// ACPI PM1a control block.
pub const PORT_PM1_CONTROL: u16 = 0x604;
/// Bytes of the PM1a control block.
pub const PORT_PM1_CONTROL_LEN: u16 = 2;
/// PCI configuration address register.
pub const PORT_PCI_ADDRESS: u16 = 0xcf8;
/// Reset control register; also ACPI's reset register.
pub const PORT_RESET: u16 = 0xcf9;
/// PCI configuration data register.
pub const PORT_PCI_DATA: u16 = 0xcfc;
/// The debug-exit port, as QEMU's isa-debug-exit is mostly placed; only if asked for.
pub const PORT_DEBUG_EXIT: u16 = 0xf4;
/// Ports of it.
pub const PORT_DEBUG_EXIT_LEN: u16 = 4;
/// What ACPI says to write to [`PORT_RESET`].
pub const RESET_VALUE: u8 = 0x06;
/// Sleep type of S5 (soft off) in the PM1 control register.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Interrupt line of COM1 (edge, active high).
pub const IRQ_SERIAL: u8 = 4;
/// Interrupt line of ACPI, the SCI (level, active high): the power button.
pub const IRQ_SCI: u8 = 9;
