//! The engine on a few lines of code.
use twinstep_x86::*;

struct NoBus;
impl Bus for NoBus {
    fn mmio_read(&mut self, _: Position, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: Position, _: u64, _: &[u8]) {}
    fn pio_read(&mut self, _: Position, _: u16, _: u8) -> u32 {
        !0
    }
    fn pio_write(&mut self, _: Position, _: u16, _: u8, _: u32) {}
    fn tsc(&mut self, position: Position) -> u64 {
        position
    }
    fn rdmsr(&mut self, _: Position, _: u32) -> Result<u64, UnknownMsr> {
        Err(UnknownMsr)
    }
    fn wrmsr(&mut self, _: Position, _: u32, _: u64) -> Result<(), UnknownMsr> {
        Err(UnknownMsr)
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: Position, _: u8) {}
    fn attention(&self) -> bool {
        false
    }
}

/// 16 MiB of RAM, identity-mapped by 2 MiB pages at 0x1000.., long mode, CPL 0, code at 1 MiB.
fn cpu(code: &[u8], max: u32) -> Cpu {
    let len = 16usize << 20;
    let host = Box::leak(vec![0u64; len / 8 + 512].into_boxed_slice()).as_mut_ptr() as u64;
    let host = host.next_multiple_of(4096) as *mut u8;
    let flags = PageFlags::new(len / 4096);
    let put = |at: usize, bytes: &[u8]| unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host.add(at), bytes.len()) };
    put(0x1000, &0x2003u64.to_le_bytes());
    put(0x2000, &0x3003u64.to_le_bytes());
    for i in 0..8u64 {
        put(0x3000 + 8 * i as usize, &(i << 21 | 0x83).to_le_bytes());
    }
    put(0x10_0000, code);
    let ram = unsafe { PhysMem::new(vec![RamRegion { gpa: 0, len: len as u64, host }], flags) };
    let mut config = CpuConfig::new(CpuModel::x86_64_v2());
    config.max_block_instructions = max;
    config.code_cache_bytes = 4 << 20;
    let mut cpu = Cpu::new(config, ram);
    let mut st = CpuState::reset();
    st.cr0 = state::cr0::PE | state::cr0::PG | state::cr0::WP | state::cr0::NE | state::cr0::ET;
    st.cr4 = state::cr4::PAE | state::cr4::OSFXSR | state::cr4::OSXMMEXCPT;
    st.efer = state::efer::LME | state::efer::LMA | state::efer::NXE;
    st.cr3 = 0x1000;
    st.seg[state::seg::CS] = Segment { base: 0, limit: !0, selector: 8, attributes: 0xa09b };
    st.seg[state::seg::SS] = Segment { base: 0, limit: !0, selector: 16, attributes: 0xc093 };
    st.rip = 0x10_0000;
    st.gpr[state::gpr::RSP] = 0x20_0000;
    cpu.set_state(st);
    cpu
}

#[test]
fn a_loop_with_memory_calls_and_spilled_registers() {
    // mov ecx,1000; xor r15d,r15d
    // l: add r15,rcx; push r15; pop r10; mov [rsp-64],r10; mov r11,[rsp-64]; call f; dec ecx; jnz l; hlt
    // f: lea rax,[r11+r15*2]; ret
    let code: &[u8] = &[
        0xb9, 0xe8, 0x03, 0, 0, 0x45, 0x31, 0xff, // mov, xor
        0x49, 0x01, 0xcf, // add r15, rcx
        0x41, 0x57, // push r15
        0x41, 0x5a, // pop r10
        0x4c, 0x89, 0x54, 0x24, 0xc0, // mov [rsp-64], r10
        0x4c, 0x8b, 0x5c, 0x24, 0xc0, // mov r11, [rsp-64]
        0xe8, 0x05, 0, 0, 0, // call f
        0xff, 0xc9, // dec ecx
        0x75, 0xe6, // jnz l
        0xf4, // hlt
        0x4b, 0x8d, 0x04, 0x7b, // lea rax,[r11+r15*2]
        0xc3,
    ];
    let mut results = Vec::new();
    for (max, slice) in [(64, u64::MAX), (1, u64::MAX), (64, 7), (3, 1)] {
        let mut cpu = cpu(code, max);
        let exit = loop {
            match cpu.run(&mut NoBus, cpu.position().saturating_add(slice)) {
                Exit::Position => {}
                exit => break exit,
            }
        };
        assert_eq!(exit, Exit::Halted);
        assert_eq!(cpu.position(), 2 + 1000 * 10 + 1);
        assert_eq!(cpu.state().gpr[state::gpr::RAX], 500_500 * 3);
        results.push(cpu.state().clone());
    }
    assert!(results.windows(2).all(|w| w[0] == w[1]));
}
