//! Tests of the transport, with the console as the device.
use super::*;
use crate::virtio::testing::Driver;
use crate::virtio::{Block, Console, Net, Rng};

fn driver() -> Driver {
    Driver::new(Box::new(Console::new()))
}

#[test]
fn features_are_negotiated() {
    let mut d = driver();
    assert_eq!(d.offered(), feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT);
    // Without VERSION_1, or with something not offered, FEATURES_OK does not stick.
    for (low, high) in [(0u32, 0u32), (1, 1), (0, 3)] {
        d.write(0x14, &[0]);
        d.write(0x14, &[3]);
        for (half, value) in [(0u32, low), (1, high)] {
            d.write(0x08, &half.to_le_bytes());
            d.write(0x0c, &value.to_le_bytes());
        }
        d.write(0x14, &[0xb]);
        assert_eq!(d.status(), 3);
        d.write(0x14, &[0xf]);
        assert_eq!(d.status(), 3, "and DRIVER_OK neither");
    }
    d.start(feature::EVENT_IDX);
    assert_eq!(d.status(), 0xf);
    d.write(0x08, &0u32.to_le_bytes());
    d.write(0x0c, &0u32.to_le_bytes());
    assert_eq!(d.get(0x0c, 4), feature::EVENT_IDX, "fixed once accepted");
    d.write(0x14, &[0]);
    assert_eq!((d.status(), d.get(0x0c, 4)), (0, 0));
}

#[test]
fn queue_registers() {
    let mut d = driver();
    assert_eq!(d.get(0x12, 2), 2);
    d.write(0x16, &1u16.to_le_bytes());
    assert_eq!((d.get(0x18, 2), d.get(0x1e, 2)), (64, 1));
    d.write(0x18, &65u16.to_le_bytes());
    d.write(0x18, &48u16.to_le_bytes());
    d.write(0x18, &0u16.to_le_bytes());
    assert_eq!(d.get(0x18, 2), 64, "not a power of two, or too large");
    d.write(0x1a, &2u16.to_le_bytes());
    assert_eq!(d.get(0x1a, 2), 2);
    d.write(0x1a, &3u16.to_le_bytes());
    assert_eq!(d.get(0x1a, 2), u64::from(NO_VECTOR), "not in the table");
    d.write(0x20, &0x1234_5678_9000u64.to_le_bytes());
    assert_eq!(d.get(0x20, 8), 0x1234_5678_9000);
    d.write(0x1c, &1u16.to_le_bytes());
    d.write(0x20, &0u64.to_le_bytes());
    assert_eq!(d.get(0x20, 8), 0x1234_5678_9000, "fixed while enabled");
    d.write(0x16, &7u16.to_le_bytes());
    assert_eq!((d.get(0x18, 2), d.get(0x1c, 2)), (0, 0), "no such queue");
    d.write(0x1c, &1u16.to_le_bytes());
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let mut d = driver();
    // The last capability: find it.
    let mut at = d.config(0x34, 1) as usize;
    while d.config(at + 1, 1) != 0 {
        at = d.config(at + 1, 1) as usize;
    }
    assert_eq!(d.config(at + 3, 1), u64::from(CFG_PCI));
    d.set_config(at + 8, &0x12u32.to_le_bytes());
    d.set_config(at + 12, &2u32.to_le_bytes());
    assert_eq!(d.config(at + 16, 2), 2, "number of queues");
    d.set_config(at + 8, &0x16u32.to_le_bytes());
    d.set_config(at + 16, &1u16.to_le_bytes());
    assert_eq!(d.get(0x16, 2), 1, "queue select");
    // Outside the range, or of a size there is not: nothing.
    for (offset, len) in [(u32::MAX, 4u32), (0, 3), (0, u32::MAX), (0x7fff, 4)] {
        d.set_config(at + 8, &offset.to_le_bytes());
        d.set_config(at + 12, &len.to_le_bytes());
        d.set_config(at + 16, &[0xff; 4]);
        d.config(at + 16, 4);
    }
}

#[test]
fn without_msix_the_isr_register_tells() {
    let mut d = driver();
    d.start(0);
    d.set_config(0x42, &0u16.to_le_bytes());
    d.add(1, &[b"x"], &[]);
    d.kick(1);
    assert_eq!(d.interrupts(), []);
    assert_eq!((d.get(0x1000, 1), d.get(0x1000, 1)), (1, 0), "reading clears");
}

#[test]
fn moving_the_range_moves_the_registers() {
    let mut d = driver();
    d.pci.assign(0xc000_0000);
    assert_eq!(d.pci.decode(0xc000_7ffc, 4), Some(0x7ffc));
    assert_eq!(d.pci.decode(0xc000_7ffe, 4), None);
    d.set_config(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!((d.pci.decode(0xc000_0000, 4), d.pci.decode(0xd000_0000, 4)), (None, Some(0)));
    d.set_config(4, &0u16.to_le_bytes());
    assert_eq!(d.pci.decode(0xd000_0000, 4), None, "memory decoding is off");
}

#[test]
fn rings_full_of_noise_hurt_nobody() {
    use vm_memory::{Bytes, GuestAddress};
    let devices: [fn() -> Box<dyn VirtioDevice>; 4] = [
        || Box::new(Console::new()),
        || Box::new(Net::new(0, [2; 6])),
        || Box::new(Rng::new()),
        || Box::new(Block::new(Box::new(crate::disk::MemoryDisk(vec![0; 4096])), 0, &Default::default())),
    ];
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    for device in devices {
        for round in 0..200 {
            let mut d = Driver::new(device());
            d.start(if round % 2 == 0 { 0 } else { feature::EVENT_IDX | feature::INDIRECT });
            d.receive(Received::Seed([1; 32]));
            // Descriptors that are nearly right: addresses in RAM or not, small or large, all flags.
            for queue in 0..2u64 {
                for index in 0..64u64 {
                    let address = if random() % 8 == 0 { random() << 20 } else { 0x10_0000 + random() % 0x4_0000 };
                    let len = if random() % 8 == 0 { random() as u32 } else { random() as u32 % 4096 };
                    let flags = random() as u16 & 7;
                    let next = random() as u16 % 66;
                    let bytes =
                        [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
                    d.ram.write_slice(&bytes, GuestAddress(0x10_0000 + queue * 0x1_0000 + index * 16)).unwrap();
                }
            }
            for i in 0..50 {
                let queue = random() % 2;
                if d.pci.queues.get(queue as usize).is_some() {
                    d.offer(queue, random() as u16 % 65);
                    d.kick(queue as u16);
                }
                d.receive(Received::Frame(vec![0; 60 + random() as usize % 3000]));
                d.receive(Received::Bytes(vec![0; 100]));
                d.fire(i * 10_000);
            }
            d.check_save(device());
        }
    }
}
