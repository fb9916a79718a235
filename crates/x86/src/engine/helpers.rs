//! The helpers that translated code calls.
//!
//! **In:** the frame, with the argument and the address that the code left there. **Out:** 0 = go on in translated code, 1 = leave, with `exit` set.
//! Invariant: a helper that makes the code leave has made RIP and the budget exact.
use super::onward::Onward;
use super::{Bounce, Core, GiveUp, Stop};
use crate::PAGE_SIZE;
use crate::activity::Activity;
use crate::frame::{Frame, exit};
use crate::mmu::Access;
use crate::segmentation;
use crate::sys::Flow;
use crate::translate::helper_arg;

/// What a helper works on. Rust's own state is sound here: the shared routine saved all guest registers and loaded Rust's MXCSR.
fn core_of(frame: *mut Frame) -> &'static mut Core {
    // SAFETY: translated code passes its own frame, whose core is alive and runs it; `enter` holds no other borrow that is used
    // before the helper returns.
    unsafe { &mut *(*frame).core }
}

/// How many of the bytes at `ea` lie before the end of a 32-bit address space: a segment whose base is not 0 may wrap there.
fn before_wrap(ea: u64, size: usize) -> usize {
    size.min(((1u64 << 32).wrapping_sub(ea)) as usize)
}

/// A TLB check of a block of many instructions failed: 0 = repeat it, or go on elsewhere after the instruction ran alone; 1 = leave.
pub(super) extern "sysv64" fn mem_helper(frame: *mut Frame) -> u32 {
    let core = core_of(frame);
    // SAFETY: the frame is the core's.
    let (arg, ea, ret) = unsafe { ((*frame).arg, (*frame).ea, (*frame).ret as usize) };
    core.stats.engine.memory_calls += 1;
    core.activity.set(Activity::Memory);
    let size = arg & 0xffff;
    let write = arg >> 16 & 1 != 0;
    let group = arg & helper_arg::GROUP as u64 != 0;
    let k = (arg >> 20) as usize;
    // SAFETY: as above.
    let (site, hard) = unsafe { ((*frame).site, std::mem::take(&mut (*frame).hard) != 0) };
    let restless = hard && core.mmu.sites().misses_left(site) == 0;
    if restless {
        core.give_up.push(GiveUp { code: ret, instruction: k, group: false });
    } else if ea % PAGE_SIZE + size <= PAGE_SIZE {
        // SAFETY: the state is not part of the MMU.
        let st = unsafe { &(*frame).st };
        let user = st.cpl == 3;
        let emptied = core.mmu.sites().emptied;
        let filled = if group {
            // The instruction accesses only some of these bytes: nothing may be walked, and no bit of a table set, for the others.
            core.mmu.fill_known(ea, write, user)
        } else {
            let access = if write { Access::Write } else { Access::Read };
            core.mmu.fill(st, ea, access, user).is_ok() && core.mmu.is_cached(ea, write, user)
        };
        // Checks made earlier in the block count as long as no site was emptied.
        if filled && core.mmu.sites().emptied == emptied {
            if hard {
                core.mmu.make_room_for_site(ea, user);
            }
            core.activity.set(Activity::Guest);
            return 0;
        }
    }
    if group && !restless && core.mmu.sites().group_failed(site) {
        core.give_up.push(GiveUp { code: ret, instruction: k, group: true });
    }
    let block = core.cache.block_at(ret).expect("called from a block");
    let (rip, unused) = (block.rip_of(k), block.len() - k as u64);
    // SAFETY: as above.
    unsafe {
        (*frame).st.rip = rip;
        (*frame).budget += unused;
        core.position = core.limit - (*frame).budget;
    }
    core.join_flags();
    let onward = match group {
        // Each of its accesses by itself.
        true => core.ungrouped_and_on(),
        false => core.alone_and_on(write.then_some(ea)),
    };
    go_on(core, onward)
}

/// Lets the shared routine go on, or leave for the loop. State and budget are exact.
fn go_on(core: &mut Core, onward: Onward) -> u32 {
    core.split_flags();
    // SAFETY: the frame is the core's.
    let frame = unsafe { &mut *core.frame };
    frame.owed = 0;
    frame.exit = match onward {
        Onward::Code(code) => {
            frame.ret = code;
            core.activity.set(Activity::Guest);
            return 0;
        }
        Onward::Leave => exit::HELPER,
        Onward::Again => exit::BAIL,
    };
    1
}

/// A memory access of a single instruction: makes it possible (0) or raises its exception (1).
pub(super) extern "sysv64" fn mem_alone_helper(frame: *mut Frame) -> u32 {
    let core = core_of(frame);
    // SAFETY: the frame is the core's; its state and bounce buffer are not part of the MMU.
    let (arg, ea, st, buffer) = unsafe { ((*frame).arg, (*frame).ea, &(*frame).st, &mut (*frame).bounce.0) };
    let size = (arg & 0xffff) as usize;
    let write = arg >> 16 & 1 != 0;
    let user = st.cpl == 3;
    core.bounce = Bounce { ea, len: size, active: false };
    core.activity.set(Activity::Memory);
    // The segment register, where there are checks: in code that is not 64-bit.
    let segment = (arg >> 17 & 7) as usize;
    let mut first = size;
    let result = (|| {
        if let Some(s) = segment.checked_sub(1) {
            segmentation::check(st, s, (ea as u32).wrapping_sub(st.seg[s].base as u32), size, write)?;
            first = before_wrap(ea, size);
        }
        if ea % PAGE_SIZE + size as u64 <= PAGE_SIZE {
            let access = if write { Access::Write } else { Access::Read };
            core.mmu.fill(st, ea, access, user)?;
            if core.mmu.is_cached(ea, write, user) {
                return Ok(core.mmu.addend(ea, user));
            }
        } else if write {
            core.mmu.probe_write(st, ea, first, user)?;
            core.mmu.probe_write(st, 0, size - first, user)?;
        }
        // Two pages, a device, or a watched page: the instruction works on a copy at the same alignment.
        let at = (ea % 64) as usize;
        let copy = &mut buffer[at..at + size];
        let position = core.position;
        core.mmu.read(st, core.bus(), position, ea, &mut copy[..first], user)?;
        core.mmu.read(st, core.bus(), position, 0, &mut copy[first..], user)?;
        core.bounce.active = write;
        Ok((copy.as_ptr() as u64).wrapping_sub(ea))
    })();
    match result {
        Ok(addend) => {
            // SAFETY: as above.
            unsafe { (*frame).addend = addend };
            core.activity.set(Activity::Guest);
            0
        }
        Err(e) => {
            core.fault = Some(e);
            // SAFETY: as above.
            unsafe { (*frame).exit = exit::HELPER };
            1
        }
    }
}

/// After the store of a single instruction: takes a copy to where it belongs.
pub(super) extern "sysv64" fn write_back_helper(frame: *mut Frame) -> u32 {
    let core = core_of(frame);
    let bounce = std::mem::take(&mut core.bounce);
    if !bounce.active {
        return 0;
    }
    core.activity.set(Activity::Memory);
    // SAFETY: the frame is the core's; its state and bounce buffer are not part of the MMU.
    let (st, buffer) = unsafe { (&(*frame).st, &(*frame).bounce.0) };
    let at = (bounce.ea % 64) as usize;
    let position = core.position;
    let user = st.cpl == 3;
    let first = if st.is_64_bit_code() { bounce.len } else { before_wrap(bounce.ea, bounce.len) };
    let (low, wrapped) = buffer[at..at + bounce.len].split_at(first);
    let result = core.mmu.write(st, core.bus(), position, bounce.ea, low, user);
    match result.and_then(|()| core.mmu.write(st, core.bus(), position, 0, wrapped, user)) {
        Ok(()) => {
            core.activity.set(Activity::Guest);
            0
        }
        // Cannot happen: the write was probed. If it does, the guest gets the fault after a half-done instruction.
        Err(e) => {
            core.fault = Some(e);
            // SAFETY: as above.
            unsafe { (*frame).exit = exit::HELPER };
            1
        }
    }
}

/// A system instruction inside a block: 0 = go on at `ret`, 1 = leave.
pub(super) extern "sysv64" fn sys_helper(frame: *mut Frame) -> u32 {
    let core = core_of(frame);
    // SAFETY: the frame is the core's.
    let (k, id) = unsafe { ((*frame).arg as usize, (*frame).exit_arg as u32) };
    core.stats.engine.system_calls += 1;
    let block = core.cache.block(id);
    let insn = block.sys[block.sys.partition_point(|s| (s.0 as usize) < k)].1;
    let unused = block.len() - k as u64;
    // SAFETY: as above.
    let budget = unsafe { (*frame).budget } + unused;
    core.position = core.limit - budget;
    core.join_flags();
    core.st().rip = insn.ip();
    match core.execute_sys(&insn) {
        Ok(Flow::Next) if !core.mmu.pending.any() && !core.mmu.ram().flags().any_stale() && !core.bus().attention() => {
            core.split_flags();
            0
        }
        Ok(_) => {
            core.position += 1;
            // SAFETY: as above.
            unsafe { (*frame).budget = budget - 1 };
            let onward = core.onward(true);
            go_on(core, onward)
        }
        Err(Stop::Fault(e)) => {
            // SAFETY: as above.
            unsafe { (*frame).budget = budget };
            let done = core.deliver(e).is_ok();
            let onward = core.onward(done);
            go_on(core, onward)
        }
        // What is not supported comes up again when it runs alone.
        Err(Stop::Unsupported(_)) => {
            // SAFETY: as above.
            unsafe { (*frame).budget = budget };
            go_on(core, Onward::Again)
        }
        Err(Stop::Shutdown) => unreachable!("system instructions fault or retire"),
    }
}
