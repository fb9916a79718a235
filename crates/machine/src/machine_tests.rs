//! Tests of the machine as a whole, with little guests in machine code.
//!
//! A guest here is a bzImage whose body is the program: it starts at the 64-bit entry point, with 4 GiB mapped to themselves.
use super::*;
use crate::config::DiskConfig;
use crate::disk::{DiskError, MemoryDisk};
use crate::layout;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

/// A bzImage that runs `code`.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024 + 0x200];
    let header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: 1,
        xloadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 255,
        pref_address: 1 << 20,
        init_size: 1 << 20,
        ..Default::default()
    };
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend(code);
    image.resize(image.len().next_multiple_of(4096), 0xf4);
    image
}

fn config() -> Config {
    Config { ram_mib: 64, nics: vec![[2, 0, 0, 0, 0, 9]], ..Config::default() }
}
fn machine(code: &[u8]) -> Machine {
    let mut m = Machine::new(config(), Vec::new()).unwrap();
    m.boot(&kernel(code), None, "").unwrap();
    m
}

/// mov $value, %al; mov $port, %dx; out %al, %dx
fn out(port: u16, value: u8) -> Vec<u8> {
    [&[0xb0, value, 0x66, 0xba][..], &port.to_le_bytes(), &[0xee]].concat()
}
/// mov $value, %eax; xor %edx, %edx; mov $msr, %ecx; wrmsr
fn wrmsr(msr: u32, value: u32) -> Vec<u8> {
    [&[0xb8][..], &value.to_le_bytes(), &[0x31, 0xd2, 0xb9], &msr.to_le_bytes(), &[0x0f, 0x30]].concat()
}
fn power_off() -> Vec<u8> {
    out(layout::PORT_PM1_CONTROL + 1, layout::SLEEP_TYPE_S5 << 2 | 0x20)
}

const CODE: u32 = 0x10_0200;
const IDT: u32 = 0x30_0000;
const VECTOR: u8 = 0x40;
const HANDLER: usize = 0x200;

/// A guest with one interrupt vector: `setup`, then interrupts on, then `body` for ever; `handler` ends with EOI and IRET here.
fn with_interrupts(setup: &[u8], body: &[u8], handler: &[u8]) -> Vec<u8> {
    let target = CODE + HANDLER as u32;
    let low = u64::from(target & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(target >> 16) << 48;
    let mut code = Vec::new();
    // A stack; the gate; an IDT register image behind the table.
    code.extend([0xbc, 0x00, 0x00, 0x40, 0x00]); // mov $0x400000, %esp
    code.extend([0x48, 0xb8]); // movabs $low, %rax
    code.extend(low.to_le_bytes());
    code.extend([0x48, 0xa3]); // movabs %rax, (gate)
    code.extend(u64::from(IDT + u32::from(VECTOR) * 16).to_le_bytes());
    code.extend([0x48, 0xb8]); // limit, base
    code.extend((0x0fff | u64::from(IDT) << 16).to_le_bytes());
    code.extend([0x48, 0xa3]);
    code.extend(u64::from(IDT + 0x1000).to_le_bytes());
    code.extend([0x0f, 0x01, 0x1c, 0x25]); // lidt
    code.extend((IDT + 0x1000).to_le_bytes());
    code.extend(wrmsr(0x1b, 0xfee0_0d00)); // x2APIC mode
    code.extend(wrmsr(0x80f, 0x1ff)); // enabled by software
    code.extend(setup);
    code.push(0xfb); // sti
    let top = code.len();
    code.extend(body);
    code.push(0xe9); // jmp top
    code.extend((top as i32 - code.len() as i32 - 4).to_le_bytes());
    assert!(code.len() <= HANDLER);
    code.resize(HANDLER, 0xcc);
    code.extend([0x50, 0x51, 0x52]); // push %rax, %rcx, %rdx
    code.extend(handler);
    code.extend(wrmsr(0x80b, 0)); // EOI
    code.extend([0x5a, 0x59, 0x58, 0x48, 0xcf]); // pop, iretq
    code
}

/// Ticks every 1000 ns, counting in %ebx meanwhile; each tick writes 't' to the serial port.
fn ticker() -> Vec<u8> {
    let setup = [wrmsr(0x83e, 0xb), wrmsr(0x832, 0x2_0000 | u32::from(VECTOR)), wrmsr(0x838, 1000)].concat();
    with_interrupts(&setup, &[0xff, 0xc3, 0x01, 0xd9], &out(layout::PORT_SERIAL, b't'))
}
/// Sleeps; each wake-up writes 'w'.
fn sleeper(setup: &[u8]) -> Vec<u8> {
    with_interrupts(setup, &[0xf4], &out(layout::PORT_SERIAL, b'w'))
}
/// The RAM and the state of one machine in another.
fn copy(from: &Machine, to: &mut Machine) {
    for page in 0..from.ram().flags().pages() {
        assert!(to.write_ram_page(page, from.ram().page_bytes(page)));
    }
    to.restore(from.save()).unwrap();
}

#[test]
fn serial_output_and_power_off() {
    let mut m = machine(&[out(layout::PORT_SERIAL, b'h'), out(layout::PORT_SERIAL, b'i'), power_off()].concat());
    assert_eq!(m.run(1000), Pause::PoweredOff);
    assert_eq!(m.drain_outputs(), [(3, Output::Serial(b"h".to_vec())), (6, Output::Serial(b"i".to_vec()))]);
    assert_eq!((m.run(2000), m.position()), (Pause::PoweredOff, 9));
    m.input(Input::PowerButton).unwrap();
    let mut other = Machine::new(config(), Vec::new()).unwrap();
    copy(&m, &mut other);
    assert_eq!(other.run(2000), Pause::PoweredOff);
}

#[test]
fn resets_and_crashes() {
    assert_eq!(machine(&out(layout::PORT_RESET, layout::RESET_VALUE)).run(100), Pause::Reset);
    assert_eq!(machine(&out(layout::PORT_KBD_COMMAND, 0xfe)).run(100), Pause::Reset);
    // ud2 without an IDT.
    assert_eq!(machine(&[0x0f, 0x0b]).run(100), Pause::Crashed { reason: "triple fault".into() });
}

#[test]
fn how_a_run_is_cut_changes_nothing() {
    let mut whole = machine(&ticker());
    assert_eq!(whole.run(20_000), Pause::Position);
    let outputs = whole.drain_outputs();
    assert!(outputs.len() >= 18, "{}", outputs.len());
    for slice in [1, 7, 333, 1000] {
        let mut cut = machine(&ticker());
        let mut seen = Vec::new();
        while cut.position() < 20_000 {
            cut.run((cut.position() + slice).min(20_000));
            seen.extend(cut.drain_outputs());
        }
        assert_eq!(seen, outputs, "slices of {slice}");
        assert_eq!(cut.digest().differences(&whole.digest()), [""; 0], "slices of {slice}");
    }
}

#[test]
fn a_saved_machine_goes_on_alike() {
    let mut whole = machine(&ticker());
    whole.input(Input::Clock { advance_to_ns: 12_345, picoseconds_per_instruction: 700 }).unwrap();
    for at in [1, 50, 1500, 7777] {
        whole.run(at);
        whole.drain_outputs();
        let mut other = Machine::new(config(), Vec::new()).unwrap();
        copy(&whole, &mut other);
        assert_eq!(other.digest().differences(&whole.digest()), [""; 0]);
        assert_eq!(other.save(), whole.save());
        other.run(at + 5000);
        let mut reference = Machine::new(config(), Vec::new()).unwrap();
        copy(&whole, &mut reference);
        reference.run(at + 2500);
        reference.run(at + 5000);
        assert_eq!(other.drain_outputs(), reference.drain_outputs());
        assert_eq!(other.digest(), reference.digest());
    }
}

#[test]
fn sleep_ends_with_the_timer_that_the_clock_reaches() {
    let setup = [wrmsr(0x83e, 0xb), wrmsr(0x832, u32::from(VECTOR)), wrmsr(0x838, 1_000_000)].concat();
    let mut m = machine(&sleeper(&setup));
    let Pause::Idle { wake_ns: Some(wake) } = m.run(1_000_000) else { panic!() };
    let asleep = m.position();
    assert_eq!(m.run(1_000_000), Pause::Idle { wake_ns: Some(wake) });
    let clock = |ns| Input::Clock { advance_to_ns: ns, picoseconds_per_instruction: 1000 };
    m.input(clock(wake - 1)).unwrap();
    assert_eq!(m.run(1_000_000), Pause::Idle { wake_ns: Some(wake) });
    assert_eq!(m.position(), asleep);
    m.input(clock(wake)).unwrap();
    assert_eq!(m.run(1_000_000), Pause::Idle { wake_ns: None });
    assert_eq!(m.drain_outputs().len(), 1);
    assert!(m.guest_ns() >= wake && m.position() > asleep);
}

#[test]
fn sleep_ends_with_typed_bytes() {
    // The I/O APIC's pin 4 to the vector, and the UART's received-data interrupt through OUT2.
    let io_apic = |register: u8, value: u32| {
        // 32-bit displacements are sign-extended: the address goes through a register.
        let base = |at: u32| [&[0xbf][..], &at.to_le_bytes()].concat(); // mov $at, %edi
        let via = |value: u32| [&[0xc7, 0x07][..], &value.to_le_bytes()].concat(); // movl $value, (%rdi)
        [base(layout::IO_APIC as u32), via(register.into()), base(layout::IO_APIC as u32 + 0x10), via(value)].concat()
    };
    let setup = [io_apic(0x18, VECTOR.into()), out(0x3fc, 8), out(0x3f9, 1)].concat();
    // The handler reads the byte and sends it back: mov $0x3f8, %dx; in %dx, %al; out %al, %dx
    let handler = [0x66, 0xba, 0xf8, 0x03, 0xec, 0xee];
    let mut m = machine(&with_interrupts(&setup, &[0xf4], &handler));
    assert_eq!(m.run(1_000_000), Pause::Idle { wake_ns: None });
    m.input(Input::Serial(b"x".to_vec())).unwrap();
    assert_eq!(m.run(1_000_000), Pause::Idle { wake_ns: None });
    let outputs: Vec<_> = m.drain_outputs().into_iter().map(|(_, o)| o).collect();
    assert_eq!(outputs, [Output::Serial(b"x".to_vec())]);
}

#[test]
fn inputs_at_one_position_act_one_after_the_other() {
    // A clock input that fires a timer, then another: with or without running nowhere in between.
    let setup = [wrmsr(0x83e, 0xb), wrmsr(0x832, u32::from(VECTOR)), wrmsr(0x838, 5_000)].concat();
    let run = |pauses: bool| {
        let mut m = machine(&sleeper(&setup));
        m.run(1_000);
        let position = m.position();
        for ns in [20_000, 30_000] {
            m.input(Input::Clock { advance_to_ns: ns, picoseconds_per_instruction: 10 }).unwrap();
            if pauses {
                m.run(position);
            }
        }
        m.run(10_000);
        m.digest()
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn digests_see_what_devices_write() {
    let mut m = machine(&[0xf4]);
    let a = m.digest();
    let hashes = m.page_hashes().to_vec();
    assert!(hashes[0x100] != 0 && hashes[0x3000] == 0, "the kernel is there, and nothing else");
    let checkpoint = m.track_dirty("checkpoint", Start::Nothing);
    m.write_ram_page(0x3000, &[5; 4096]);
    let b = m.digest();
    assert_eq!(a.differences(&b), ["ram"]);
    assert_eq!(m.take_dirty(checkpoint).iter().collect::<Vec<_>>(), [0x3000], "the digest took nothing away from the checkpoint");
    m.write_ram_page(0x3000, &[0; 4096]);
    assert_eq!(m.digest(), a);
    m.untrack_dirty(checkpoint);
    assert!(!m.write_ram_page(usize::MAX, &[0; 4096]));
    m.run(10);
    assert!(m.digest().differences(&a).contains(&"cpu.rip".to_string()));
}

#[test]
fn bad_states_are_refused_by_name() {
    let m = machine(&[0xf4]);
    let good = m.save();
    let mut fresh = Machine::new(config(), Vec::new()).unwrap();
    for (i, payload) in good.iter().enumerate() {
        let mut missing = good.clone();
        missing.remove(i);
        assert_eq!(fresh.restore(missing), Err(RestoreError::Missing { kind: payload.kind.clone() }));
        let mut newer = good.clone();
        newer[i].version = 9;
        assert!(matches!(fresh.restore(newer), Err(RestoreError::Newer { kind, .. }) if kind == payload.kind));
        // Whatever a flipped bit does, it is no panic.
        for bit in 0..payload.bytes.len() * 8 {
            let mut flipped = good.clone();
            flipped[i].bytes[bit / 8] ^= 1 << (bit % 8);
            let _ = fresh.restore(flipped);
        }
    }
    let mut more = good.clone();
    more.push(Payload { kind: "virtio-block7".into(), version: 1, bytes: vec![] });
    assert_eq!(fresh.restore(more), Err(RestoreError::Unknown { kind: "virtio-block7".into() }));
    let mut small = Machine::new(Config { ram_mib: 65, ..config() }, Vec::new()).unwrap();
    assert_eq!(
        small.restore(good).unwrap_err().to_string(),
        "payload 'machine' is damaged: it has 64 MiB of RAM, this machine 65"
    );
}

#[test]
fn bad_configurations_and_inputs_are_refused() {
    let new = |config: Config| Machine::new(config, Vec::new()).map(|_| ()).unwrap_err();
    assert_eq!(new(Config { ram_mib: 63, ..config() }), ConfigError::Ram(63));
    assert_eq!(new(Config { cpu_model: "z80".into(), ..config() }), ConfigError::CpuModel("z80".into()));
    assert_eq!(new(Config { disks: vec![DiskConfig::default()], ..config() }), ConfigError::Disks { disks: 0, configured: 1 });
    assert!(matches!(new(Config { nics: vec![[0; 6]; 9], ..config() }), ConfigError::TooMany { .. }));
    let mut m = machine(&[0xf4]);
    assert_eq!(m.input(Input::NetRx { nic: 1, frame: vec![0; 60] }), Err(InputError::NoSuchNic { nic: 1, cards: 1 }));
    assert_eq!(m.input(Input::NetRx { nic: 0, frame: vec![0; 13] }), Err(InputError::FrameLength(13)));
    let gso = |nic, segment_size| Input::NetRxGso { nic, frame: vec![0; 3000], segment_size };
    assert_eq!(m.input(gso(1, 1448)), Err(InputError::NoSuchNic { nic: 1, cards: 1 }));
    assert_eq!(m.input(gso(0, 1448)), Err(InputError::LargeSegment { bytes: 3000, segment_size: 1448 }));
    m.run(10);
    assert_eq!(m.boot(&kernel(&[]), None, ""), Err(BootError::NotFresh));
}

/// A disk that fails as often as it is told to.
#[derive(Debug)]
struct Flaky(MemoryDisk, u32);

impl Disk for Flaky {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        if self.1 > 0 {
            self.1 -= 1;
            return Err(DiskError("cable out".into()));
        }
        self.0.read_at(offset, data)
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.0.write_at(offset, data)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// A machine whose guest rings the doorbell of a read request that lies ready, and sleeps.
fn reading_machine(failures: u32) -> Machine {
    let doorbell = layout::PCI_WINDOW as u32 + 0x3000;
    let code = [&[0xbf][..], &doorbell.to_le_bytes(), &[0x66, 0xc7, 0x07, 0, 0, 0xfb, 0xf4]].concat();
    let config = Config { disks: vec![DiskConfig::default()], ..config() };
    let disk = Flaky(MemoryDisk(vec![7; 4096]), failures);
    let mut m = Machine::new(config, vec![Box::new(disk)]).unwrap();
    m.boot(&kernel(&code), None, "").unwrap();
    let mut page = [0; 4096];
    // Descriptors: header, data, status. Then the available ring at +0x800 with one entry; the used ring is on the next page.
    for (i, (at, len, flags, next)) in
        [(0x30_2000u64, 16u32, 1u16, 1u16), (0x30_3000, 512, 3, 2), (0x30_4000, 1, 2, 0)].into_iter().enumerate()
    {
        page[i * 16..i * 16 + 8].copy_from_slice(&at.to_le_bytes());
        page[i * 16 + 8..i * 16 + 12].copy_from_slice(&len.to_le_bytes());
        page[i * 16 + 12..i * 16 + 14].copy_from_slice(&flags.to_le_bytes());
        page[i * 16 + 14..i * 16 + 16].copy_from_slice(&next.to_le_bytes());
    }
    m.write_ram_page(0x300, &page);
    let bus = m.bus();
    let mut set = |offset: u64, bytes: &[u8]| bus.mmio_write(0, layout::PCI_WINDOW + offset, bytes);
    set(0x14, &[3]);
    set(0x08, &1u32.to_le_bytes());
    set(0x0c, &1u32.to_le_bytes());
    set(0x14, &[0xb]);
    set(0x18, &4u16.to_le_bytes());
    set(0x20, &0x30_0000u64.to_le_bytes());
    set(0x28, &0x30_0800u64.to_le_bytes());
    set(0x30, &0x30_1000u64.to_le_bytes());
    set(0x1c, &1u16.to_le_bytes());
    set(0x14, &[0xf]);
    page[0x802] = 1;
    m.write_ram_page(0x300, &page);
    m
}

#[test]
fn a_host_that_failed_tries_again_and_the_guest_never_knows() {
    let mut good = reading_machine(0);
    let pause = good.run(1000);
    assert!(matches!(pause, Pause::Idle { wake_ns: Some(_) }));
    let mut bad = reading_machine(2);
    assert_eq!(bad.run(1000), Pause::HostFailure("disk: cable out".into()));
    assert!(matches!(bad.input(Input::PowerButton), Err(InputError::HostFailure(_))));
    assert_eq!(bad.run(1000), Pause::HostFailure("disk: cable out".into()));
    // It can even be moved to another host meanwhile.
    let mut moved = reading_machine(0);
    copy(&bad, &mut moved);
    assert_eq!(bad.run(1000), pause);
    assert_eq!(moved.run(1000), pause);
    assert_eq!(bad.digest().differences(&good.digest()), [""; 0]);
    assert_eq!(moved.digest().differences(&good.digest()), [""; 0]);
    // The completion comes in its time.
    let Pause::Idle { wake_ns: Some(advance_to_ns) } = pause else { panic!() };
    assert_eq!(good.ram().page_bytes(0x301)[2], 0);
    good.input(Input::Clock { advance_to_ns, picoseconds_per_instruction: 1000 }).unwrap();
    assert_eq!(good.ram().page_bytes(0x301)[2], 1);
    assert_eq!(good.run(1000), Pause::Idle { wake_ns: None });
}

/// The PCI bus as its configuration space tells it: what a guest's driver binds to must not change by accident.
#[test]
fn the_pci_bus_looks_as_it_always_did() {
    let config = Config { disks: vec![DiskConfig::default()], ..config() };
    let mut m = Machine::new(config, vec![Box::new(MemoryDisk(vec![0; 512]))]).unwrap();
    let bus = m.bus();
    let mut text = String::new();
    for device in 0..32u64 {
        let mut get = |offset: u64, len: usize| {
            let mut bytes = [0; 4];
            bus.mmio_read(0, layout::ECAM + (device << 15) + offset, &mut bytes[..len]);
            u32::from_le_bytes(bytes)
        };
        if get(0, 4) == u32::MAX {
            continue;
        }
        text += &format!("{device} {:08x} class {:08x} bar {:08x}\n", get(0, 4), get(8, 4), get(0x10, 4));
        let mut at = u64::from(get(0x34, 1));
        while at != 0 {
            text +=
                &format!("  {at:02x} {:08x} {:08x} {:08x} {:08x}\n", get(at, 4), get(at + 4, 4), get(at + 8, 4), get(at + 12, 4));
            at = u64::from(get(at + 1, 1));
        }
    }
    assert_eq!(text, include_str!("pci_layout.txt"), "it is now:\n{text}");
    // The old ports lead to the same place.
    bus.pio_write(0, 0xcf8, 4, 0x8000_0800);
    assert_eq!(bus.pio_read(0, 0xcfc, 4), 0x1042_1af4);
    assert_eq!(bus.pio_read(0, 0xcfe, 2), 0x1042);
    bus.pio_write(0, 0xcf8, 4, 0x8001_0800);
    assert_eq!(bus.pio_read(0, 0xcfc, 4), u32::MAX);
}

#[test]
fn a_machine_can_move_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Machine>();
}

/// A generator for tests (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

#[test]
fn nothing_a_guest_does_to_the_bus_panics() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let config = Config { disks: vec![DiskConfig::default()], ..config() };
        let mut m = Machine::new(config, vec![Box::new(MemoryDisk(vec![0; 65_536]))]).unwrap();
        for i in 0..3000u64 {
            let (what, value) = (random.next(), random.next());
            let size = 1usize << (what >> 8 & 3);
            let mut data = value.to_le_bytes();
            let bases =
                [layout::PCI_WINDOW, layout::PCI_WINDOW, layout::ECAM, layout::IO_APIC, layout::LOCAL_APIC, 0x5_0000_0000];
            let base = bases[(what >> 16) as usize % bases.len()];
            let span = if base == layout::PCI_WINDOW { 0x2_8000 } else { 0x4_0000 >> (what >> 60) };
            let gpa = base + (what >> 24) % span;
            let port = [0x70, 0x71, 0x3f8, 0x3f9, 0x3fa, 0x3fc, 0xcf8, 0xcfc, 0x600, 0x602][(what >> 40) as usize % 10]
                + (what >> 50) as u16 % 3;
            let msr =
                [0x1b, 0x6e0, 0x800 + (what >> 32) as u32 % 0x100, 0x4b56_4d00, 0x4b56_4d01, 0x11][(what >> 20) as usize % 6];
            let bus = m.bus();
            match what % 8 {
                0 => bus.mmio_read(i, gpa, &mut data[..size]),
                1 | 2 => bus.mmio_write(i, gpa, &data[..size]),
                3 => drop(bus.pio_read(i, port, size.min(4) as u8)),
                4 => bus.pio_write(i, port, size.min(4) as u8, value as u32),
                5 => drop(bus.rdmsr(i, msr)),
                6 => drop(bus.wrmsr(i, msr, if msr > 0x4000_0000 { value & 0x3ff_ffff } else { value })),
                _ => bus.set_cr8(i, value as u8 & 15),
            }
        }
        let inputs =
            [Input::NetRx { nic: 0, frame: vec![1; 60] }, Input::Serial(vec![1]), Input::Console(vec![2]), Input::Seed([3; 32])];
        for input in inputs {
            m.input(input).unwrap();
        }
        m.run(10);
        let saved = m.save();
        m.restore(saved).unwrap();
    }
}
