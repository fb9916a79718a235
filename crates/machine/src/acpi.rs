//! ACPI tables: how the guest learns what hardware there is (ACPI 6.5).
//!
//! **In:** nothing but the constants of [`layout`](crate::layout). **Out:** the tables, and where each goes. **Invariant:** they describe exactly what
//! the bus answers to; every checksum is right.
//!
//! The platform is *hardware-reduced* (ACPI 6.5, section 4.1): no PM timer, no PM1 event block, no SCI, no 8259. Sleep goes through the sleep control
//! register, reset through the reset register, and the power button is a control-method device whose interrupt a generic event device
//! (ACPI0013) owns. PCI functions use MSI-X only, so there is no `_PRT`.
use crate::layout;
use acpi_tables::Aml;
use acpi_tables::aml::{self, Name, Path};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

const OEM: [u8; 6] = *b"TWINST";
const OEM_TABLE: [u8; 8] = *b"TWINSTEP";
const REVISION: u32 = 1;
/// Bytes of a table before its own fields.
const SDT_HEADER: u32 = 36;
/// IA-PC boot flags (ACPI 6.5, table 5.11): no VGA, no PCIe ASPM. The CMOS clock is there, the 8042 is not.
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_ASPM: u16 = 1 << 4;

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
    xsdt.add_entry(place(fadt(dsdt)));
    xsdt.add_entry(place(madt()));
    xsdt.add_entry(place(mcfg()));
    let xsdt = place(bytes(&xsdt));
    tables[0].bytes = bytes(&Rsdp::new(OEM, xsdt));
    tables
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // Both buttons are control-method devices, or absent.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_ASPM).into();
    fadt.century = crate::rtc::CENTURY;
    fadt.reset_reg = port(layout::PORT_RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::PORT_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    bytes(&fadt.finalize())
}

fn madt() -> Vec<u8> {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC as u32));
    madt.add_structure(ProcessorLocalApic::new(0, 0, EnabledStatus::Enabled));
    madt.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));
    bytes(&madt)
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

    // S5: the sleep type goes into the sleep control register.
    let s5 = aml::Package::new(vec![&layout::SLEEP_TYPE_S5, &0u8]);
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

    // The power button, and the generic event device that owns its interrupt.
    aml::Device::new("\\_SB_.PWRB".into(), vec![&hid("PNP0C0C")]).to_aml_bytes(&mut code);
    let ged_hid = Name::new("_HID".into(), &"ACPI0013");
    let ged_uid = name("_UID", &0u8);
    let ged_irq = aml::Interrupt::new(true, true, false, false, layout::IRQ_EVENT.into());
    let ged_crs = name("_CRS", &aml::ResourceTemplate::new(vec![&ged_irq]));
    let button = Path::new("\\_SB_.PWRB");
    let notify = aml::Notify::new(&button, &0x80u8);
    let (arg, line) = (aml::Arg(0), layout::IRQ_EVENT);
    let is_button = aml::Equal::new(&arg, &line);
    let on_event = aml::If::new(&is_button, vec![&notify]);
    let evt = aml::Method::new("_EVT".into(), 1, true, vec![&on_event]);
    aml::Device::new("\\_SB_.GED_".into(), vec![&ged_hid, &ged_uid, &ged_crs, &evt]).to_aml_bytes(&mut code);

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
    aml::Device::new(
        "\\_SB_.PCI0".into(),
        vec![&express, &plain, &segment, &base_bus, &uid, &coherent, &crs],
    )
    .to_aml_bytes(code);
}

/// What Linux must keep its hands off: without this reservation it does not trust MCFG.
fn motherboard(code: &mut Vec<u8>) {
    let ecam = aml::Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_LEN as u32);
    let power = aml::IO::new(layout::PORT_SLEEP_CONTROL, layout::PORT_SLEEP_CONTROL, 1, 2);
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
            assert_eq!(sum(&table.bytes), 0);
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
