//! Accesses to guest memory: addresses and checks.
//!
//! **In:** a memory operand. **Out:** code that computes its address and makes sure that its bytes may be accessed, by a site, by the soft TLB, or by nothing if
//! a group's check covers them ([`super::groups`]). Invariant: what fails leaves the trace, or goes back to the check, before the instruction has changed anything.
use super::flags::Flags;
use super::groups::{By, Cover, Place, Plan};
use super::{Cold, Ea, Manner, T0, T1, Translator, full_number, helper_arg, in_frame, is_narrow};
use crate::emit::At;
use crate::sites::Site;
use iced_x86::{Instruction, Register};

impl Translator<'_> {
    /// r11 = the address. May clobber r10 and flags.
    pub(super) fn address(&mut self, ea: Ea) {
        match ea {
            Ea::Operand(insn) => self.operand_address(&insn, true),
            Ea::Plain(reg, disp) => self.emit.lea(T0, reg, disp),
            Ea::Plain32(reg, disp) => self.emit.lea32(T0, reg, disp),
            Ea::Kept(_) => self.emit.load_word(T0, self.at.tmp(1)),
            Ea::Place(Place { base, index: None, disp }) => self.emit.lea(T0, base, disp),
            Ea::Place(Place { base, index: Some((index, scale)), disp }) => {
                self.emit.lea_index(T0, base, index, scale.into(), disp);
            }
        }
    }

    pub(super) fn operand_address(&mut self, insn: &Instruction, segment: bool) {
        let base = insn.memory_base();
        let index = insn.memory_index();
        let disp = insn.memory_displacement64();
        let disp32 = disp as i32;
        let host = |t: &mut Self, reg: Register, scratch: u8| {
            let n = full_number(reg).expect("general register in an address");
            if in_frame(n) {
                if scratch == T1 {
                    t.held = None;
                }
                t.emit.load(scratch, n as usize);
                scratch
            } else {
                n
            }
        };
        if base == Register::RIP || base == Register::EIP || base == Register::None && index == Register::None {
            self.emit.imm(T0, disp);
        } else if index == Register::None {
            let b = host(self, base, T0);
            self.emit.lea(T0, b, disp32);
        } else if base == Register::None {
            let i = host(self, index, T1);
            self.emit.lea_scaled(T0, i, insn.memory_index_scale(), disp32);
        } else {
            let b = host(self, base, T0);
            let i = host(self, index, T1);
            self.emit.lea_index(T0, b, i, insn.memory_index_scale(), disp32);
        }
        self.wrap_address(insn);
        if segment {
            self.add_segment(insn);
        }
    }

    /// Cuts r11 off at the width of the operand's address.
    pub(super) fn wrap_address(&mut self, insn: &Instruction) {
        if self.code_32() {
            self.wrap_address_32(insn);
        } else if is_narrow(insn) {
            self.emit.zero_extend(T0);
        }
    }

    /// r11 += the base of the operand's segment.
    pub(super) fn add_segment(&mut self, insn: &Instruction) {
        if self.code_32() {
            return self.add_segment_32(insn);
        }
        match insn.memory_segment() {
            Register::FS => self.emit.add_word(T0, self.at.seg_base(crate::state::seg::FS)),
            Register::GS => self.emit.add_word(T0, self.at.seg_base(crate::state::seg::GS)),
            _ => {}
        }
    }

    /// Makes `size` bytes at `ea` accessible, for the current instruction, before it changes anything: says how to get at them from r10. r11 is
    /// free; the host's flags are gone, unless no check was needed.
    pub(super) fn access(&mut self, ea: Ea, size: usize, write: bool) -> At {
        let held = self.held.take();
        if self.alone() {
            self.clobber_flags();
            let arg = size as i32 | (write as i32) << 16 | self.checked_segment(ea);
            self.checked_address(ea, size);
            self.emit.call_helper_here(self.shared.mem_alone, arg);
            self.emit.add_no_flags(T1, T0);
            self.note_flags();
            return At::Host;
        }
        let place = match ea {
            Ea::Plain(reg, disp) => Some(Place::plain(reg, disp)),
            Ea::Operand(insn) => Place::of(&insn),
            _ => None,
        };
        let at = match place {
            Some(Place { base, index: None, disp }) => At::Sum(base, disp),
            _ => At::Host,
        };
        let manner = (self.src.manner)(self.points[self.current].guest);
        let restless = !self.src.hot || manner.restless;
        if let Some(place) = place.filter(|place| !self.code_32() && !in_frame(place.base)) {
            match self.groups.plan(self.current, place, size, write, manner) {
                Plan::Checked(by, beyond) => {
                    if held != Some(by) {
                        match by {
                            By::Addend(site) => self.emit.load_addend(site),
                            By::Base(slot) | By::Kept(slot) => self.emit.load_word(T1, self.at.base(slot)),
                        }
                    }
                    self.held = Some(by);
                    self.note_flags();
                    return if place.index.is_some() { At::Beyond(beyond) } else { at };
                }
                Plan::Check(_) if self.quiet[self.current] => {
                    unreachable!("an access is checked that liveness counts on not being: {ea:?}")
                }
                Plan::Check(cover) if cover.many => return self.check_group(place, cover, manner),
                Plan::Check(_) => {}
            }
        }
        self.clobber_flags();
        let arg = size as i32 | (write as i32) << 16 | self.checked_segment(ea);
        let retry = self.emit.here();
        let constant = matches!(ea, Ea::Operand(insn) if is_constant(&insn));
        let (from, site) = if restless {
            self.checked_address(ea, size);
            (self.emit.tlb_check(size, write, at), None)
        } else {
            let bits = if constant { Site::CONSTANT } else { 0 } | if write { Site::WRITE } else { 0 };
            let address = self.new_site(retry, size, bits);
            let from = if constant {
                self.emit.site_check_constant(address)
            } else {
                self.checked_address(ea, size);
                self.emit.site_check(address, size, at)
            };
            if let Some(place) = place {
                let cover = Cover { start: place.disp, size, write, many: false };
                self.held = self.groups.check(place, cover, address, manner);
            }
            (from, Some((address, constant)))
        };
        let arg = arg | (self.current as i32) << 20;
        self.cold.push(Cold::Slow { from, site, counter: None, ea, write, arg, retry, flags: self.flags });
        self.note_flags();
        at
    }

    /// Checks all of a group's bytes. The current instruction accesses some of them, at `place`; where the check fails for good each access is checked by itself.
    pub(super) fn check_group(&mut self, place: Place, cover: Cover, manner: Manner) -> At {
        self.clobber_flags();
        let at = match place.index {
            None => At::Sum(place.base, place.disp),
            Some(_) => At::Host,
        };
        let retry = self.emit.here();
        let bits = if cover.write { Site::WRITE } else { 0 };
        let address = self.new_site(retry, cover.size, bits);
        let ea = Ea::Place(Place { disp: cover.start, ..place });
        self.checked_address(ea, cover.size);
        let (from, site, counter) = if manner.restless {
            (self.emit.tlb_check(cover.size, cover.write, at), None, Some(address))
        } else {
            (self.emit.site_check(address, cover.size, at), Some((address, false)), None)
        };
        self.held = self.groups.check(place, cover, address, manner);
        let arg = cover.size as i32 | (cover.write as i32) << 16 | helper_arg::GROUP | (self.current as i32) << 20;
        self.cold.push(Cold::Slow { from, site, counter, ea, write: cover.write, arg, retry, flags: self.flags });
        self.note_flags();
        match self.held {
            Some(By::Base(slot)) => {
                self.emit.store_word(self.at.base(slot), T1);
                At::Beyond(place.disp - cover.start)
            }
            Some(By::Kept(slot)) => {
                self.emit.store_word(self.at.base(slot), T1);
                at
            }
            _ => at,
        }
    }

    /// After a store in a block of one instruction: takes the bytes to where they belong.
    pub(super) fn stored(&mut self) {
        if self.alone() {
            self.settle_flags();
            self.emit.call_helper_here(self.shared.write_back, 0);
            self.flags = Flags::FRAME;
        }
    }
}

/// Whether the linear address of the memory operand is a constant.
fn is_constant(insn: &Instruction) -> bool {
    let base = insn.memory_base();
    (base == Register::RIP || base == Register::EIP || base == Register::None && insn.memory_index() == Register::None)
        && !matches!(insn.memory_segment(), Register::FS | Register::GS)
}
