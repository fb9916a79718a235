//! Host faults in translated code: the silicon found a guest exception (#DE, #GP of a misaligned access, #MF, #XM ...).
//!
//! **In:** a synchronous signal whose address lies in the code cache of the machine that runs on this thread. **Out:** the same
//! thread goes on at the cache's fault exit, with the trap's number in the frame. Anything else goes to whoever handled the signal
//! before.
//!
//! Invariant: while translated code runs, RSP is the guest's; so handlers run on an alternate stack, and every other
//! signal is blocked.
use crate::frame::Frame;
use std::cell::Cell;
use std::sync::Once;

/// The code that runs on this thread.
#[derive(Clone, Copy)]
struct Active {
    start: usize,
    end: usize,
    fault_exit: usize,
    frame: *mut Frame,
}

const IDLE: Active = Active { start: 0, end: 0, fault_exit: 0, frame: std::ptr::null_mut() };

thread_local! {
    // Const-initialised and without a destructor, so a signal handler may read it.
    static ACTIVE: Cell<Active> = const { Cell::new(IDLE) };
    static HAS_STACK: Cell<bool> = const { Cell::new(false) };
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS];
static INSTALL: Once = Once::new();
static mut PREVIOUS: [std::mem::MaybeUninit<libc::sigaction>; 4] = [const { std::mem::MaybeUninit::uninit() }; 4];

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let active = ACTIVE.with(|a| a.get());
    // SAFETY: the kernel passes a ucontext to SA_SIGINFO handlers.
    let regs = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let pc = regs[libc::REG_RIP as usize] as usize;
    if (active.start..active.end).contains(&pc) {
        // SAFETY: `frame` belongs to the engine that runs on this thread (see `Running`).
        unsafe {
            (*active.frame).fault_trap = regs[libc::REG_TRAPNO as usize] as u64;
            (*active.frame).fault_pc = pc as u64;
            (*active.frame).fault_flags = regs[libc::REG_EFL as usize] as u64;
        }
        regs[libc::REG_RIP as usize] = active.fault_exit as i64;
        return;
    }
    let i = SIGNALS.iter().position(|&s| s == signal).expect("installed for these only");
    // SAFETY: written once before any handler was installed, read-only since.
    let previous = unsafe { (&raw const PREVIOUS[i]).as_ref().expect("a static").assume_init_ref() };
    match previous.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // Not ours and nobody's: let it happen again with the default action.
            // SAFETY: plain libc call with a valid structure.
            unsafe {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
        }
        address if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the previous handler was registered with this signature.
            let f: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = unsafe { std::mem::transmute(address) };
            f(signal, info, context);
        }
        address => {
            // SAFETY: the previous handler was registered with this signature.
            let f: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(address) };
            f(signal);
        }
    }
}

fn install() {
    INSTALL.call_once(|| {
        // SAFETY: plain libc calls; PREVIOUS is filled before the handler can run for that signal.
        unsafe {
            for (i, &signal) in SIGNALS.iter().enumerate() {
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, std::ptr::null(), &mut old);
                (&raw mut PREVIOUS[i]).write(std::mem::MaybeUninit::new(old));
                let mut new: libc::sigaction = std::mem::zeroed();
                new.sa_sigaction = handler as *const () as usize;
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigfillset(&mut new.sa_mask);
                for &s in &SIGNALS {
                    libc::sigdelset(&mut new.sa_mask, s);
                }
                let result = libc::sigaction(signal, &new, std::ptr::null_mut());
                assert_eq!(result, 0, "sigaction");
            }
        }
    });
}

/// Gives this thread an alternate signal stack that is large enough for any host's register file. Kept for the thread's life.
fn own_stack() {
    if HAS_STACK.with(|h| h.replace(true)) {
        return;
    }
    const LEN: usize = 256 << 10;
    // SAFETY: a fresh mapping that is never unmapped, handed to the kernel as this thread's signal stack.
    unsafe {
        let base = libc::mmap(
            std::ptr::null_mut(),
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        assert_ne!(base, libc::MAP_FAILED, "signal stack: {}", std::io::Error::last_os_error());
        let stack = libc::stack_t { ss_sp: base, ss_flags: 0, ss_size: LEN };
        assert_eq!(libc::sigaltstack(&stack, std::ptr::null_mut()), 0, "sigaltstack");
    }
}

/// Held while an engine runs on this thread.
pub struct Running {
    outer: Active,
    mask: libc::sigset_t,
}

impl Running {
    /// Announces the code cache `code` (start, length) whose faults leave at `fault_exit` and are described in `frame`.
    ///
    /// # Safety
    /// All must stay valid until the value is dropped.
    pub unsafe fn enter(code: (usize, usize), fault_exit: usize, frame: *mut Frame) -> Self {
        install();
        own_stack();
        let active = Active { start: code.0, end: code.0 + code.1, fault_exit, frame };
        let outer = ACTIVE.with(|a| a.replace(active));
        // SAFETY: plain libc calls.
        let mask = unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut old: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            for &s in &SIGNALS {
                libc::sigdelset(&mut all, s);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &all, &mut old);
            old
        };
        Self { outer, mask }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        ACTIVE.with(|a| a.set(self.outer));
        // SAFETY: restores what `enter` saved.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.mask, std::ptr::null_mut()) };
    }
}
