//! Tests of the local APIC.
use super::*;

fn x2apic() -> LocalApic {
    let mut apic = LocalApic::new();
    apic.set_base(apic.base() | BASE_X2APIC).unwrap();
    apic.write_msr(SVR, 0x1ff, 0).unwrap();
    apic
}

fn fixed(vector: u8, level: bool) -> Message {
    Message { vector, mode: 0, logical: false, destination: 0, level }
}

#[test]
fn priorities_nest() {
    let mut apic = x2apic();
    assert!(apic.message(fixed(0x41, false)));
    assert!(apic.message(fixed(0x55, false)));
    assert_eq!(apic.pending(), Some(0x55));
    apic.take(0x55);
    assert_eq!(apic.read_msr(PPR, 0), Ok(0x50));
    assert_eq!(apic.pending(), None, "0x41 is below the one in service");
    apic.message(fixed(0x5f, false));
    assert_eq!(apic.pending(), None, "same class");
    apic.message(fixed(0x60, false));
    assert_eq!(apic.pending(), Some(0x60));
    assert_eq!(apic.write_msr(EOI, 0, 0), Ok(None));
    assert_eq!(apic.pending(), Some(0x60));
    apic.set_cr8(6);
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.read_msr(TPR, 0), Ok(0x60));
    apic.set_cr8(0);
    apic.take(0x60);
    apic.write_msr(EOI, 0, 0).unwrap();
    apic.take(0x5f);
    apic.write_msr(EOI, 0, 0).unwrap();
    assert_eq!(apic.pending(), Some(0x41));
}

#[test]
fn level_interrupts_broadcast_their_end() {
    let mut apic = x2apic();
    apic.message(fixed(0x30, true));
    apic.take(0x30);
    assert_eq!(apic.write_msr(EOI, 0, 0), Ok(Some(0x30)));
    assert_eq!(apic.write_msr(EOI, 0, 0), Ok(None), "nothing in service");
}

#[test]
fn self_ipi_and_icr() {
    let mut apic = x2apic();
    apic.write_msr(SELF_IPI, 0x80, 0).unwrap();
    apic.write_msr(ICR, 0x0004_0081, 0).unwrap();
    apic.write_msr(ICR, 0x82, 0).unwrap();
    apic.write_msr(ICR, 7 << 32 | 0x83, 0).unwrap();
    apic.write_msr(ICR, 1 << 32 | 1 << 11 | 0x84, 0).unwrap();
    apic.write_msr(ICR, 0x000c_0085, 0).unwrap();
    let irr: Vec<_> = (0x80..0x88u8).filter(|&v| apic.s.irr.has(v)).collect();
    assert_eq!(irr, [0x80, 0x81, 0x82, 0x84]);
    apic.write_msr(ICR, 5, 0).unwrap();
    apic.write_msr(ESR, 0, 0).unwrap();
    assert_eq!(apic.read_msr(ESR, 0), Ok(u64::from(ERROR_SEND_VECTOR)));
}

#[test]
fn tsc_deadline_follows_the_guests_tsc() {
    let mut apic = x2apic();
    apic.write_msr(LVT_TIMER, 0x4_00ec, 0).unwrap();
    apic.set_tsc_deadline(1_500);
    assert_eq!(apic.deadline_ns(), None);
    apic.latch(500);
    assert_eq!((apic.deadline_ns(), apic.tsc_deadline()), (Some(1_000), 1_500));
    apic.fire_due(999);
    assert_eq!(apic.pending(), None);
    apic.fire_due(1_000);
    assert_eq!((apic.pending(), apic.deadline_ns(), apic.tsc_deadline()), (Some(0xec), None, 0));
    // A deadline before time 0 is past; one after a guest that set its TSC back is not.
    apic.set_tsc_deadline(10);
    apic.latch(500);
    assert_eq!(apic.deadline_ns(), Some(0));
    apic.set_tsc_deadline(10);
    apic.latch(0u64.wrapping_sub(5_000));
    assert_eq!(apic.deadline_ns(), Some(5_010));
    apic.set_tsc_deadline(0);
    apic.latch(0);
    assert_eq!(apic.deadline_ns(), None);
}

#[test]
fn one_shot_and_periodic() {
    let mut apic = x2apic();
    apic.write_msr(LVT_TIMER, 0x30, 0).unwrap();
    apic.write_msr(DIVIDE, 3, 0).unwrap(); // by 16
    apic.write_msr(INITIAL_COUNT, 100, 1_000).unwrap();
    assert_eq!(apic.deadline_ns(), Some(2_600));
    assert_eq!(apic.read_msr(CURRENT_COUNT, 1_800), Ok(50));
    apic.fire_due(2_600);
    assert_eq!((apic.pending(), apic.deadline_ns()), (Some(0x30), None));
    assert_eq!(apic.read_msr(CURRENT_COUNT, 2_600), Ok(0));

    apic.write_msr(LVT_TIMER, 0x2_0031, 0).unwrap();
    apic.write_msr(DIVIDE, 0xb, 0).unwrap(); // by 1
    apic.write_msr(INITIAL_COUNT, 100, 10_000).unwrap();
    apic.fire_due(10_100);
    assert_eq!(apic.deadline_ns(), Some(10_200));
    apic.fire_due(10_555);
    assert_eq!(apic.deadline_ns(), Some(10_600), "missed periods are skipped, the grid stays");
    apic.write_msr(INITIAL_COUNT, 0, 10_556).unwrap();
    assert_eq!(apic.deadline_ns(), None);
}

#[test]
fn modes_of_the_base_register() {
    let mut apic = LocalApic::new();
    let base = apic.base();
    assert_eq!(apic.read_msr(ID, 0), Err(Fault), "not in x2APIC mode yet");
    assert_eq!(apic.set_base(base & !BASE_ENABLED | BASE_X2APIC), Err(Fault));
    apic.set_base(base | BASE_X2APIC).unwrap();
    assert_eq!(apic.read_msr(LDR, 0), Ok(1));
    assert_eq!(apic.set_base(base), Err(Fault), "x2APIC to xAPIC");
    apic.set_base(base & !BASE_ENABLED).unwrap();
    assert_eq!(apic.set_base(base | BASE_X2APIC), Err(Fault), "disabled to x2APIC");
    apic.set_base(base).unwrap();
    assert_eq!(apic.set_base(base + 0x1000), Err(Fault), "moved");
    assert!(apic.mmio_enabled());
}

#[test]
fn xapic_page() {
    let mut apic = LocalApic::new();
    apic.mmio_write(0xf0, &0x1ffu32.to_le_bytes(), 0);
    apic.mmio_write(0xd0, &0x0100_0000u32.to_le_bytes(), 0);
    let mut word = [0; 4];
    apic.mmio_read(0x30, &mut word, 0);
    assert_eq!(u32::from_le_bytes(word), VERSION_VALUE);
    // Logical, flat: member 0.
    assert!(apic.message(Message { logical: true, destination: 1, ..fixed(0x40, false) }));
    assert!(!apic.message(Message { logical: true, destination: 2, ..fixed(0x41, false) }));
    apic.mmio_write(0x310, &0u32.to_le_bytes(), 0);
    apic.mmio_write(0x300, &0x42u32.to_le_bytes(), 0);
    assert_eq!(apic.pending(), Some(0x42));
    apic.mmio_read(0x220, &mut word, 0);
    assert_eq!(u32::from_le_bytes(word), 1 | 1 << 2, "IRR of vectors 40..5f");
    let mut wide = [9; 8];
    apic.mmio_read(0x20, &mut wide, 0);
    assert_eq!(wide, [0; 8]);
    assert_eq!(apic.mmio_write(0xb1, &[0], 0), None);
}

#[test]
fn disabled_apic_delivers_nothing() {
    let mut apic = x2apic();
    apic.message(fixed(0x40, false));
    apic.write_msr(SVR, 0xff, 0).unwrap();
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.read_msr(LVT_TIMER, 0).unwrap() as u32 & LVT_MASKED, LVT_MASKED);
}

#[test]
fn state_survives_saving_and_bad_state_is_refused() {
    let mut apic = x2apic();
    apic.message(fixed(0x40, true));
    apic.write_msr(LVT_TIMER, 0x4_00ec, 0).unwrap();
    apic.set_tsc_deadline(77);
    let mut back = LocalApic::new();
    back.restore(&mut Payloads::new(vec![apic.save()]).unwrap()).unwrap();
    assert_eq!(back, apic);
    apic.s.base = 0x1000;
    assert!(back.restore(&mut Payloads::new(vec![apic.save()]).unwrap()).is_err());
}
