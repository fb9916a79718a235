//! Running arbitrary user code on the host CPU and getting back: the trampoline in and the signal handler out.
//!
//! In: all registers are loaded, then a jump. Out: the code always ends in an exception (`int3` if nothing else). The kernel makes a
//! signal of it, the handler (on its own stack, with the host's FS base) copies the registers out of the signal frame and rewrites the
//! frame so that returning from the signal lands behind the trampoline.
//!
//! Only for a process with one thread: everything is in statics.
use crate::layout::{IMAGE, NO_VECTOR, Outcome, Regs, TF, TIMED_OUT};
use crate::segments::{CS, DS, ES, GS, SS, Segments};
use std::arch::naked_asm;
use std::mem::{offset_of, zeroed};
use std::ptr;

/// What a single-stepped run is to take a picture of, and when.
#[derive(Clone, Copy)]
pub struct Steps {
    pub picture_at: u64,
    pub picture: *mut Regs,
    pub image: *const u8,
    pub picture_memory: *mut u8,
}

/// What the handler works on.
struct Control {
    running: bool,
    timed_out: bool,
    fs_base: u64,
    gs_base: u64,
    entry: u64,
    outcome: *mut Outcome,
    steps: Option<Steps>,
    started: bool,
    last_rip: u64,
    iterations: u64,
    positions: u64,
    picture_taken: bool,
}

static mut CONTROL: Control = Control {
    running: false,
    timed_out: false,
    fs_base: 0,
    gs_base: 0,
    entry: 0,
    outcome: ptr::null_mut(),
    steps: None,
    started: false,
    last_rip: 0,
    iterations: 0,
    positions: 0,
    picture_taken: false,
};
/// The control block. Only the one thread of the process uses it.
const fn control() -> *mut Control {
    &raw mut CONTROL
}
/// The host's stack pointer while a guest runs.
static mut HOST_RSP: u64 = 0;
/// The host's FS base.
static mut HOST_FS: u64 = 0;
/// Where the trampoline jumps.
static mut TARGET: u64 = 0;
/// The host's FPU state while a guest runs.
static mut HOST_FX: crate::layout::Fx = crate::layout::Fx([0; 512]);
/// Whether the host has AVX: 1 or 0.
static mut HAS_AVX: u8 = 0;
/// The stack signals are taken on.
static mut SIGNAL_STACK: [u8; 1 << 17] = [0; 1 << 17];

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;

use crate::rep::STEP as REP_STEP;

/// Loads the upper halves of the vector registers from the `Regs` at r12, if there are any. Part of [`enter`] and [`enter_narrow`].
#[unsafe(naked)]
unsafe extern "C" fn load_ymm() {
    naked_asm!(
        "test byte ptr [rip + {has_avx}], 1",
        "jz 2f",
        "vinsertf128 ymm0, ymm0, xmmword ptr [r12 + {ymm} + 0], 1",
        "vinsertf128 ymm1, ymm1, xmmword ptr [r12 + {ymm} + 16], 1",
        "vinsertf128 ymm2, ymm2, xmmword ptr [r12 + {ymm} + 32], 1",
        "vinsertf128 ymm3, ymm3, xmmword ptr [r12 + {ymm} + 48], 1",
        "vinsertf128 ymm4, ymm4, xmmword ptr [r12 + {ymm} + 64], 1",
        "vinsertf128 ymm5, ymm5, xmmword ptr [r12 + {ymm} + 80], 1",
        "vinsertf128 ymm6, ymm6, xmmword ptr [r12 + {ymm} + 96], 1",
        "vinsertf128 ymm7, ymm7, xmmword ptr [r12 + {ymm} + 112], 1",
        "vinsertf128 ymm8, ymm8, xmmword ptr [r12 + {ymm} + 128], 1",
        "vinsertf128 ymm9, ymm9, xmmword ptr [r12 + {ymm} + 144], 1",
        "vinsertf128 ymm10, ymm10, xmmword ptr [r12 + {ymm} + 160], 1",
        "vinsertf128 ymm11, ymm11, xmmword ptr [r12 + {ymm} + 176], 1",
        "vinsertf128 ymm12, ymm12, xmmword ptr [r12 + {ymm} + 192], 1",
        "vinsertf128 ymm13, ymm13, xmmword ptr [r12 + {ymm} + 208], 1",
        "vinsertf128 ymm14, ymm14, xmmword ptr [r12 + {ymm} + 224], 1",
        "vinsertf128 ymm15, ymm15, xmmword ptr [r12 + {ymm} + 240], 1",
        "2:",
        "ret",
        ymm = const offset_of!(Regs, ymm_high), has_avx = sym HAS_AVX,
    )
}

/// Loads every register from `regs` and jumps to `TARGET`; comes back through [`leave`].
///
/// # Safety
/// The handlers are installed and `CONTROL` is set up.
#[unsafe(naked)]
unsafe extern "C" fn enter(regs: *const Regs) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip + {host_rsp}], rsp",
        "fxsave64 [rip + {host_fx}]",
        "mov r12, rdi",
        "mov eax, {arch_prctl}", "mov edi, {set_gs}", "mov rsi, [r12 + {gs}]", "syscall",
        "mov eax, {arch_prctl}", "mov edi, {set_fs}", "mov rsi, [r12 + {fs}]", "syscall",
        "fxrstor64 [r12 + {fx}]",
        "call {load_ymm}",
        "push qword ptr [r12 + {flags}]", "popfq",
        "mov rax, [r12]", "mov rcx, [r12 + 8]", "mov rdx, [r12 + 16]", "mov rbx, [r12 + 24]",
        "mov rsp, [r12 + 32]", "mov rbp, [r12 + 40]", "mov rsi, [r12 + 48]", "mov rdi, [r12 + 56]",
        "mov r8, [r12 + 64]", "mov r9, [r12 + 72]", "mov r10, [r12 + 80]", "mov r11, [r12 + 88]",
        "mov r13, [r12 + 104]", "mov r14, [r12 + 112]", "mov r15, [r12 + 120]", "mov r12, [r12 + 96]",
        "jmp qword ptr [rip + {target}]",
        host_rsp = sym HOST_RSP, host_fx = sym HOST_FX, target = sym TARGET,
        arch_prctl = const libc::SYS_arch_prctl, set_gs = const ARCH_SET_GS, set_fs = const ARCH_SET_FS,
        gs = const offset_of!(Regs, gs_base), fs = const offset_of!(Regs, fs_base), fx = const offset_of!(Regs, fx),
        flags = const offset_of!(Regs, rflags), load_ymm = sym load_ymm,
    )
}

/// Selectors of 32-bit code: ES, SS, DS, GS.
static mut SELECTORS: [u16; 4] = [0; 4];
/// Where 32-bit code starts: EIP and CS.
static mut FAR_TARGET: [u16; 3] = [0; 3];

/// As [`enter`], for 32-bit code: loads segment registers, too, and jumps to `FAR_TARGET`. FS stays the host's, unused.
///
/// # Safety
/// As [`enter`]; the selectors are good.
#[unsafe(naked)]
unsafe extern "C" fn enter_narrow(regs: *const Regs) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip + {host_rsp}], rsp",
        "fxsave64 [rip + {host_fx}]",
        "mov r12, rdi",
        "mov es, word ptr [rip + {selectors}]", "mov ss, word ptr [rip + {selectors} + 2]",
        "mov ds, word ptr [rip + {selectors} + 4]", "mov gs, word ptr [rip + {selectors} + 6]",
        "fxrstor64 [r12 + {fx}]",
        "call {load_ymm}",
        "push qword ptr [r12 + {flags}]", "popfq",
        "mov rax, [r12]", "mov rcx, [r12 + 8]", "mov rdx, [r12 + 16]", "mov rbx, [r12 + 24]",
        "mov rsp, [r12 + 32]", "mov rbp, [r12 + 40]", "mov rsi, [r12 + 48]", "mov rdi, [r12 + 56]",
        "mov r8, [r12 + 64]", "mov r9, [r12 + 72]", "mov r10, [r12 + 80]", "mov r11, [r12 + 88]",
        "mov r13, [r12 + 104]", "mov r14, [r12 + 112]", "mov r15, [r12 + 120]", "mov r12, [r12 + 96]",
        "jmp fword ptr [rip + {target}]",
        host_rsp = sym HOST_RSP, host_fx = sym HOST_FX, target = sym FAR_TARGET, selectors = sym SELECTORS,
        fx = const offset_of!(Regs, fx), flags = const offset_of!(Regs, rflags), load_ymm = sym load_ymm,
    )
}

/// Puts the segments of 32-bit code into the LDT, and their selectors to where [`enter_narrow`] looks.
///
/// # Safety
/// Nothing else in this process uses the LDT; the case is not running.
unsafe fn prepare_segments(segments: &Segments, eip: u32) {
    const WRITE_LDT: u64 = 0x11;
    for d in segments.all.iter().filter(|d| d.is_local()) {
        let entry = d.for_linux();
        // SAFETY: a system call with a valid description of its length.
        unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE_LDT, entry.as_ptr(), size_of_val(&entry)) };
    }
    let selector = |s: usize| segments.all[s].selector;
    // SAFETY: one thread.
    unsafe {
        SELECTORS = [selector(ES), selector(SS), selector(DS), selector(GS)];
        FAR_TARGET = [eip as u16, (eip >> 16) as u16, selector(CS)];
    }
}

/// Jumps into a case and comes back.
///
/// # Safety
/// As [`run`], after [`begin`].
unsafe fn enter_either(init: *const Regs, segments: *const Segments) {
    // SAFETY: the caller's.
    unsafe {
        if (*segments).narrow {
            prepare_segments(&*segments, (*init).rip as u32);
            enter_narrow(init);
        } else {
            enter(init);
        }
    }
}

/// Where the handler returns to: the second half of [`enter`], with its stack.
#[unsafe(naked)]
unsafe extern "C" fn leave() {
    naked_asm!(
        "test byte ptr [rip + {has_avx}], 1",
        "jz 2f",
        "vzeroupper",
        "2:",
        "fxrstor64 [rip + {host_fx}]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        host_fx = sym HOST_FX, has_avx = sym HAS_AVX,
    )
}

/// The signal handler: gives Rust code the host's FS base, and the interrupted code the one [`on_signal`] answers.
#[unsafe(naked)]
unsafe extern "C" fn handler() {
    naked_asm!(
        "push rbx", "push r12", "push r13",
        "mov rbx, rdi", "mov r12, rdx",
        "mov eax, {arch_prctl}", "mov edi, {set_fs}", "mov rsi, [rip + {host_fs}]", "syscall",
        "mov rdi, rbx", "mov rsi, r12",
        "call {on_signal}",
        "mov rsi, rax", "mov eax, {arch_prctl}", "mov edi, {set_fs}", "syscall",
        "pop r13", "pop r12", "pop rbx",
        "ret",
        arch_prctl = const libc::SYS_arch_prctl, set_fs = const ARCH_SET_FS, host_fs = sym HOST_FS,
        on_signal = sym on_signal,
    )
}

/// Copies the interrupted registers. Trap flag hidden.
///
/// # Safety
/// `context` is what the kernel gave a handler.
unsafe fn copy_registers(context: *const libc::ucontext_t, regs: *mut Regs) {
    const ORDER: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: the caller's; the FPU state of a signal frame starts with an FXSAVE image.
    unsafe {
        let from = &(*context).uc_mcontext.gregs;
        for (to, index) in (*regs).gpr.iter_mut().zip(ORDER) {
            *to = from[index as usize] as u64;
        }
        (*regs).rip = from[libc::REG_RIP as usize] as u64;
        (*regs).rflags = from[libc::REG_EFL as usize] as u64 & !TF;
        (*regs).fs_base = (*control()).fs_base;
        (*regs).gs_base = (*control()).gs_base;
        let image = (*context).uc_mcontext.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(image, (&raw mut (*regs).fx).cast(), 512);
        (*regs).ymm_high = [[0; 2]; 16];
        let extended = image.add(SIGNAL_MAGIC_AT).cast::<u32>().read_unaligned() == SIGNAL_MAGIC;
        if extended && image.add(XSTATE_BV_AT).cast::<u64>().read_unaligned() & 4 != 0 {
            ptr::copy_nonoverlapping(image.add(AVX_AT), (&raw mut (*regs).ymm_high).cast(), 256);
        }
    }
}

/// Where a signal frame's FPU image says that an XSAVE area follows (Linux, struct _fpx_sw_bytes), and parts of that area (standard format).
const SIGNAL_MAGIC_AT: usize = 464;
const SIGNAL_MAGIC: u32 = 0x4650_5853;
const XSTATE_BV_AT: usize = 512;
const AVX_AT: usize = 576;

/// Called for every signal; answers the FS base to go on with.
unsafe extern "C" fn on_signal(signal: libc::c_int, context: *mut libc::ucontext_t) -> u64 {
    // SAFETY: one thread, and signals are blocked in the handler, so CONTROL is ours; context comes from the kernel.
    unsafe {
        let control = &mut *control();
        if !control.running {
            if signal == libc::SIGALRM {
                return HOST_FS;
            }
            libc::_exit(101);
        }
        let gregs = &(*context).uc_mcontext.gregs;
        let (rip, vector) = (gregs[libc::REG_RIP as usize] as u64, gregs[libc::REG_TRAPNO as usize] as u64);
        if signal == libc::SIGALRM {
            control.timed_out = true;
        } else if signal == libc::SIGTRAP && vector == 1 && control.steps.is_some() && step(control, context, rip) {
            return control.fs_base;
        }
        let outcome = control.outcome;
        copy_registers(context, &raw mut (*outcome).regs);
        let page_fault = vector == 14;
        (*outcome).vector = if control.timed_out { TIMED_OUT } else { vector };
        (*outcome).error = gregs[libc::REG_ERR as usize] as u64;
        (*outcome).cr2 = if page_fault { gregs[libc::REG_CR2 as usize] as u64 } else { 0 };
        let gregs = &mut (*context).uc_mcontext.gregs;
        gregs[libc::REG_RIP as usize] = leave as *const () as i64;
        gregs[libc::REG_RSP as usize] = HOST_RSP as i64;
        gregs[libc::REG_EFL as usize] = 0x202;
        // CS and SS of 64-bit programs, whatever the case had.
        let selectors = &mut gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & 0x0000_ffff_ffff_0000 | 0x33 | 0x2b << 48;
        HOST_FS
    }
}

/// After one instruction of a single-stepped run: counts it. Answers whether to go on.
///
/// # Safety
/// From the handler.
unsafe fn step(control: &mut Control, context: *const libc::ucontext_t, rip: u64) -> bool {
    if !control.started {
        if rip != control.entry {
            return true; // still in the trampoline
        }
        control.started = true;
    } else if rip == control.last_rip {
        control.iterations += 1;
        if control.iterations.is_multiple_of(REP_STEP) {
            control.positions += 1;
        }
    } else {
        control.iterations = 0;
        control.positions += 1;
    }
    control.last_rip = rip;
    let steps = control.steps.expect("stepping");
    if control.positions == steps.picture_at && control.iterations.is_multiple_of(REP_STEP) && !control.picture_taken {
        control.picture_taken = true;
        // SAFETY: the caller's, and that of `run_stepping`.
        unsafe {
            copy_registers(context, steps.picture);
            ptr::copy_nonoverlapping(steps.image, steps.picture_memory, IMAGE);
        }
    }
    control.positions < 100_000
}

/// Installs the handlers. Answers whether that worked.
///
/// # Safety
/// Only in a process of its own with one thread.
pub unsafe fn install() -> bool {
    // SAFETY: plain system calls; the statics are only used by this thread.
    unsafe {
        HAS_AVX = is_x86_feature_detected!("avx").into();
        let stack = libc::stack_t { ss_sp: (&raw mut SIGNAL_STACK).cast(), ss_flags: 0, ss_size: 1 << 17 };
        let mut ok = libc::sigaltstack(&raw const stack, ptr::null_mut()) == 0;
        ok &= libc::syscall(libc::SYS_arch_prctl, ARCH_GET_FS, &raw mut HOST_FS) == 0;
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGALRM] {
            ok &= libc::sigaction(signal, &raw const action, ptr::null_mut()) == 0;
        }
        let mut all: libc::sigset_t = zeroed();
        libc::sigfillset(&raw mut all);
        ok & (libc::sigprocmask(libc::SIG_UNBLOCK, &raw const all, ptr::null_mut()) == 0)
    }
}

/// Ends whatever runs in `seconds` (0: not any more).
pub fn set_alarm(seconds: u32) {
    // SAFETY: a system call.
    unsafe { libc::alarm(seconds) };
}

/// Runs code at `init.rip` until an exception.
///
/// # Safety
/// [`install`]ed; the pointers are valid. The code must not make system calls or write where it must not.
pub unsafe fn run(init: *const Regs, segments: *const Segments, outcome: *mut Outcome) {
    // SAFETY: the caller's.
    unsafe {
        begin(init, outcome, None);
        enter_either(init, segments);
        (*control()).running = false;
    }
}

/// The same in single steps. Answers the number of positions passed, and whether the picture was taken.
///
/// # Safety
/// As [`run`], and for the pointers in `steps`.
pub unsafe fn run_stepping(init: *const Regs, segments: *const Segments, outcome: *mut Outcome, steps: Steps) -> (u64, bool) {
    // SAFETY: the caller's.
    unsafe {
        begin(init, outcome, Some(steps));
        let mut trapping = *init;
        trapping.rflags |= TF;
        enter_either(&raw const trapping, segments);
        let control = &mut *control();
        control.running = false;
        (control.positions, control.picture_taken)
    }
}

/// # Safety
/// As [`run`].
unsafe fn begin(init: *const Regs, outcome: *mut Outcome, steps: Option<Steps>) {
    // SAFETY: the caller's.
    unsafe {
        *outcome = Outcome::NONE;
        debug_assert_eq!((*outcome).vector, NO_VECTOR);
        TARGET = (*init).rip;
        let control = &mut *control();
        *control = Control {
            running: true,
            timed_out: false,
            fs_base: (*init).fs_base,
            gs_base: (*init).gs_base,
            entry: (*init).rip,
            outcome,
            steps,
            started: false,
            last_rip: 0,
            iterations: 0,
            positions: 0,
            picture_taken: false,
        };
    }
}
