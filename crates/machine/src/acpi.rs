//! ACPI tables: how the guest learns what hardware there is (ACPI 6.5).
//!
//! **In:** nothing but the constants of [`layout`](crate::layout). **Out:** the tables, and where each goes. **Invariant:** they describe exactly what
//! the bus answers to; every checksum is right.
//!
//! The fixed hardware of ACPI is reduced to what is used: PM1 event and control registers with the power button, the SCI, and the reset
//! register; no PM timer, no general-purpose events. The *hardware-reduced* profile (ACPI 6.5, section 4.1) would do without those as well, but on it
//! Linux reboots only through EFI or through real-mode firmware, and there is neither. PCI functions use MSI-X only, so there is no `_PRT`.
use crate::layout;
use acpi_tables::aml::{self, Name};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

const OEM: [u8; 6] = *b"TWINST";
const OEM_TABLE: [u8; 8] = *b"TWINSTEP";
const REVISION: u32 = 1;
/// Bytes of a table before its own fields.
const SDT_HEADER: u32 = 36;
/// IA-PC boot flags (ACPI 6.5, table 5.11): no VGA, no PCIe ASPM. The CMOS clock is there, the 8042 is not.
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_ASPM: u16 = 1 << 4;
/// A latency that says: no such C-state.
const NO_C_STATE: u16 = 0x0fff;

/// A table ready to be copied to guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) gpa: u64,
    pub(crate) bytes: Vec<u8>,
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// All tables; the first is the RSDP, at [`layout::ACPI_TABLES`].
pub(crate) fn tables() -> Vec<Table> {
    let mut tables = vec![Table { gpa: layout::ACPI_TABLES, bytes: Vec::new() }];
    let mut next = layout::ACPI_TABLES + 0x40;
    let mut place = |bytes: Vec<u8>| {
        let gpa = next;
        next += (bytes.len() as u64).next_multiple_of(64);
        assert!(next <= layout::HIGH_MEMORY, "ACPI tables outgrew their range");
        tables.push(Table { gpa, bytes });
        gpa
    };
    let dsdt = place(dsdt());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    let facs = place(bytes(&FACS::new()));
    xsdt.add_entry(place(fadt(dsdt, facs)));
    xsdt.add_entry(place(madt()));
    xsdt.add_entry(place(mcfg()));
    let xsdt = place(bytes(&xsdt));
    tables[0].bytes = bytes(&Rsdp::new(OEM, xsdt));
    tables
}

fn port(address: u16, bytes: u16) -> GAS {
    let size = if bytes == 1 { AccessSize::ByteAccess } else { AccessSize::WordAccess };
    GAS::new(AddressSpace::SystemIo, (bytes * 8) as u8, 0, size, address.into())
}

fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // A clear power button flag says that it is a fixed feature; a set one that there is no sleep button of that kind.
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    // Also in the 32-bit field, for those that look only there.
    fadt.dsdt = (dsdt as u32).into();
    fadt.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_ASPM).into();
    fadt.century = crate::rtc::CENTURY;
    fadt.sci_int = u16::from(layout::IRQ_SCI).into();
    fadt.p_lvl2_lat = NO_C_STATE.into();
    fadt.p_lvl3_lat = NO_C_STATE.into();
    fadt.pm1a_evt_blk = u32::from(layout::PORT_PM1_EVENT).into();
    fadt.pm1_evt_len = layout::PORT_PM1_EVENT_LEN as u8;
    fadt.x_pm1a_evt_blk = port(layout::PORT_PM1_EVENT, layout::PORT_PM1_EVENT_LEN);
    fadt.pm1a_cnt_blk = u32::from(layout::PORT_PM1_CONTROL).into();
    fadt.pm1_cnt_len = layout::PORT_PM1_CONTROL_LEN as u8;
    fadt.x_pm1a_cnt_blk = port(layout::PORT_PM1_CONTROL, layout::PORT_PM1_CONTROL_LEN);
    fadt.reset_reg = port(layout::PORT_RESET, 1);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    bytes(&fadt.finalize())
}

/// Interrupt source override (ACPI 6.5, 5.2.12.5): the SCI is level triggered and active high.
struct SciOverride;

impl Aml for SciOverride {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        // Type, length, bus, source.
        sink.vec(&[2, 10, 0, layout::IRQ_SCI]);
        sink.dword(layout::IRQ_SCI.into());
        // Polarity: active high. Trigger: level.
        sink.word(1 | 3 << 2);
    }
}

fn madt() -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC as u32));
    madt.add_structure(ProcessorLocalApic::new(0, 0, EnabledStatus::Enabled));
    madt.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));
    // The crate has no such structure, and takes none but its own: appended by hand.
    let mut table = bytes(&madt);
    SciOverride.to_aml_bytes(&mut table);
    let len = table.len() as u32;
    table[4..8].copy_from_slice(&len.to_le_bytes());
    table[9] = 0;
    table[9] = table.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
    table
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    bytes(&mcfg)
}

/// `_HID` and a unique id.
fn hid(id: &str) -> Name {
    Name::new("_HID".into(), &aml::EISAName::new(id))
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(name.into(), value)
}

fn dsdt() -> Vec<u8> {
    let mut code = Vec::new();

    // S5: the sleep type that goes into the PM1 control register.
    let s5 = aml::Package::new(vec![&layout::SLEEP_TYPE_S5, &0u8, &0u8, &0u8]);
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut code);

    let cpu_hid = Name::new("_HID".into(), &"ACPI0007");
    let cpu_uid = name("_UID", &0u8);
    aml::Device::new("\\_SB_.C000".into(), vec![&cpu_hid, &cpu_uid]).to_aml_bytes(&mut code);

    pci_root(&mut code);
    motherboard(&mut code);

    // COM1.
    let (com_hid, com_uid) = (hid("PNP0501"), name("_UID", &0u8));
    let com_io = aml::IO::new(layout::PORT_SERIAL, layout::PORT_SERIAL, 1, layout::PORT_SERIAL_LEN as u8);
    let com_irq = aml::Interrupt::new(true, true, false, false, layout::IRQ_SERIAL.into());
    let com_crs = name("_CRS", &aml::ResourceTemplate::new(vec![&com_io, &com_irq]));
    aml::Device::new("\\_SB_.COM1".into(), vec![&com_hid, &com_uid, &com_crs]).to_aml_bytes(&mut code);

    // The CMOS clock, without an interrupt.
    let rtc_io = aml::IO::new(layout::PORT_RTC, layout::PORT_RTC, 1, 2);
    let rtc_crs = name("_CRS", &aml::ResourceTemplate::new(vec![&rtc_io]));
    aml::Device::new("\\_SB_.RTC_".into(), vec![&hid("PNP0B00"), &rtc_crs]).to_aml_bytes(&mut code);

    let mut dsdt = Sdt::new(*b"DSDT", SDT_HEADER, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt.as_slice().to_vec()
}

fn pci_root(code: &mut Vec<u8>) {
    let bus = aml::AddressSpace::new_bus_number(0u16, 0);
    let config = aml::IO::new(layout::PORT_PCI_ADDRESS, layout::PORT_PCI_ADDRESS, 1, 8);
    let io_low = aml::AddressSpace::new_io(0u16, layout::PORT_PCI_ADDRESS - 1, None);
    let io_high = aml::AddressSpace::new_io(layout::PORT_PCI_ADDRESS + 8, 0xffffu16, None);
    let window = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW as u32,
        (layout::PCI_WINDOW + layout::PCI_WINDOW_LEN - 1) as u32,
        None,
    );
    let crs = name("_CRS", &aml::ResourceTemplate::new(vec![&bus, &config, &io_low, &io_high, &window]));
    let (express, plain) = (hid("PNP0A08"), Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")));
    let (segment, base_bus, uid) = (name("_SEG", &0u8), name("_BBN", &0u8), name("_UID", &0u8));
    // Memory accesses are coherent with the processor's caches.
    let coherent = name("_CCA", &1u8);
    aml::Device::new("\\_SB_.PCI0".into(), vec![&express, &plain, &segment, &base_bus, &uid, &coherent, &crs]).to_aml_bytes(code);
}

/// What Linux must keep its hands off: without this reservation it does not trust MCFG.
fn motherboard(code: &mut Vec<u8>) {
    let ecam = aml::Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_LEN as u32);
    let power = aml::IO::new(layout::PORT_PM1_EVENT, layout::PORT_PM1_EVENT, 1, 6);
    let crs = name("_CRS", &aml::ResourceTemplate::new(vec![&ecam, &power]));
    let uid = name("_UID", &0u8);
    aml::Device::new("\\_SB_.MBRD".into(), vec![&hid("PNP0C02"), &uid, &crs]).to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }
    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn checksums_lengths_and_links_are_right() {
        let tables = tables();
        let rsdp = &tables[0].bytes;
        assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
        for table in &tables[1..] {
            // The FACS is the one table without a checksum.
            assert!(sum(&table.bytes) == 0 || table.bytes.starts_with(b"FACS"));
            let length = u32::from_le_bytes(table.bytes[4..8].try_into().unwrap());
            assert_eq!(length as usize, table.bytes.len());
        }
        let find = |gpa| tables.iter().find(|t| t.gpa == gpa).unwrap();
        let xsdt = find(u64_at(rsdp, 24));
        assert_eq!(&xsdt.bytes[..4], b"XSDT");
        let kinds: Vec<_> = (36..xsdt.bytes.len()).step_by(8).map(|at| &find(u64_at(&xsdt.bytes, at)).bytes[..4]).collect();
        assert_eq!(kinds, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = tables.iter().find(|t| t.bytes.starts_with(b"FACP")).unwrap();
        assert_eq!(&find(u64_at(&fadt.bytes, 140)).bytes[..4], b"DSDT");
    }

    #[test]
    fn tables_do_not_overlap() {
        let tables = tables();
        for pair in tables.windows(2) {
            assert!(pair[0].gpa + pair[0].bytes.len() as u64 <= pair[1].gpa);
        }
    }
}
