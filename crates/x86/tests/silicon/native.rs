//! The silicon's side: a child process that runs cases on the host CPU.
//!
//! The child is forked so that its signal handlers, its fixed mappings and any wild store stay its own. It shares a memory file with its
//! parent: a template of the image, and a batch of slots with cases and results. The parent writes one byte to a pipe
//! to have a batch run and gets one back. The child allocates nothing and takes no lock, so forking from a process with
//! threads is sound.
use crate::layout::{IMAGE, Outcome, PAGE, Regs, WINDOWS};
use crate::sandbox;
use crate::segments::Segments;
use std::mem::size_of;
use std::ptr;

/// Cases in a batch.
pub const BATCH: usize = 64;
/// Bytes of code in a case.
pub const CODE_BYTES: usize = 1024;
/// Pieces of memory a case sets on top of the template.
pub const POKES: usize = 6;

/// Bytes that a case puts into the image.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Poke {
    /// Offset in the image.
    pub at: u32,
    /// How many.
    pub len: u32,
    /// The bytes.
    pub bytes: [u8; 512],
}

/// A case and what the silicon made of it.
#[repr(C)]
pub struct Slot {
    /// Starting registers.
    pub init: Regs,
    /// Its segments, if it is 32-bit code.
    pub segments: Segments,
    /// The code and its offset in the image.
    pub code_at: u32,
    pub code_len: u32,
    pub code: [u8; CODE_BYTES],
    pub pokes: [Poke; POKES],
    pub poke_count: u32,
    /// Run it a second time in single steps.
    pub single_step: u32,
    /// The position at which the single-stepped run takes a picture.
    pub picture_at: u64,

    /// How it ended.
    pub end: Outcome,
    /// The image at the end.
    pub memory: [u8; IMAGE],
    /// How the single-stepped run ended.
    pub stepped_end: Outcome,
    /// Instructions retired by it before the exception that ended it, in the sense of docs/positions.md.
    pub stepped_positions: u64,
    /// Whether it came as far as `picture_at`.
    pub picture_taken: u32,
    /// Registers then.
    pub picture: Regs,
    /// The image then.
    pub picture_memory: [u8; IMAGE],
}

/// What parent and child share.
#[repr(C)]
pub struct Shared {
    /// The image as mapped at the windows.
    pub image: [u8; IMAGE],
    /// What every case's image starts as.
    pub template: [u8; IMAGE],
    /// The slots to run.
    pub first: u32,
    /// See `first`.
    pub end: u32,
    /// The slot that runs, for the parent's message when the child dies.
    pub current: u32,
    /// The batch.
    pub slots: [Slot; BATCH],
}

/// The low part of the address space, which the child clears.
const LOW_START: u64 = 0x1_0000;
const LOW_END: u64 = 1 << 32;

const SHARED_BYTES: usize = size_of::<Shared>().next_multiple_of(PAGE);

/// The child process.
pub struct Native {
    shared: *mut Shared,
    pid: libc::pid_t,
    to_child: libc::c_int,
    from_child: libc::c_int,
}

// SAFETY: the mapping and the descriptors belong to this value alone.
unsafe impl Send for Native {}

impl Native {
    /// Starts a child.
    pub fn start() -> Self {
        // SAFETY: plain system calls; the mapping is as long as Shared, zero is a valid Shared, and only this value uses it.
        unsafe {
            let file = libc::memfd_create(c"silicon".as_ptr(), libc::MFD_CLOEXEC);
            assert!(file >= 0 && libc::ftruncate(file, SHARED_BYTES as i64) == 0, "memfd");
            let at = libc::mmap(ptr::null_mut(), SHARED_BYTES, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file, 0);
            assert!(at != libc::MAP_FAILED, "mmap");
            let shared = at.cast::<Shared>();
            let (mut down, mut up) = ([0; 2], [0; 2]);
            assert!(
                libc::pipe2(down.as_mut_ptr(), libc::O_CLOEXEC) == 0 && libc::pipe2(up.as_mut_ptr(), libc::O_CLOEXEC) == 0,
                "pipe"
            );
            let pid = libc::fork();
            assert!(pid >= 0, "fork");
            if pid == 0 {
                // Also those that other threads' children are waiting on: a pipe ends only when nobody holds it.
                for fd in 3..1024 {
                    if ![down[0], up[1], file].contains(&fd) {
                        libc::close(fd);
                    }
                }
                serve(shared, file, down[0], up[1]);
            }
            libc::close(down[0]);
            libc::close(up[1]);
            libc::close(file);
            Self { shared, pid, to_child: down[1], from_child: up[0] }
        }
    }
    /// The shared memory. The child does not touch it while no batch runs, and batches run only in [`Native::run`].
    pub fn shared(&mut self) -> &mut Shared {
        // SAFETY: a valid mapping of that size; exclusive because of `&mut self` and because the child waits.
        unsafe { &mut *self.shared }
    }
    /// Runs the first `count` slots.
    ///
    /// # Panics
    /// If the child dies.
    pub fn run(&mut self, count: usize) {
        self.run_slots(0, count);
    }
    /// Runs one slot; otherwise as [`Native::run`].
    pub fn run_one(&mut self, slot: usize) {
        self.run_slots(slot, slot + 1);
    }
    fn run_slots(&mut self, from: usize, to: usize) {
        (self.shared().first, self.shared().end) = (from as u32, to as u32);
        let mut byte = 0u8;
        // SAFETY: one byte to and from our own pipes.
        let answered = unsafe {
            libc::write(self.to_child, (&raw const byte).cast(), 1) == 1
                && libc::read(self.from_child, (&raw mut byte).cast(), 1) == 1
        };
        assert!(answered && byte == b'+', "the native side died or refused ({byte}) in slot {}", self.shared().current);
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: our own descriptors, our own child (which ends when its pipe closes), our own mapping.
        unsafe {
            libc::close(self.to_child);
            libc::close(self.from_child);
            libc::waitpid(self.pid, ptr::null_mut(), 0);
            libc::munmap(self.shared.cast(), SHARED_BYTES);
        }
    }
}

/// The life of the child.
///
/// # Safety
/// Only in a freshly forked child; `shared` is a mapping of `file`, which starts with the image.
unsafe fn serve(shared: *mut Shared, file: libc::c_int, down: libc::c_int, up: libc::c_int) -> ! {
    // SAFETY: system calls on what the caller handed over; the windows are mapped where nothing else is (NOREPLACE), and guest code
    // runs in `sandbox` only.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut byte = b'+';
        // Wild addresses are often small: nothing must be there, in particular no engine of another test. This program itself and
        // all it needs are position-independent, and high.
        if (serve as *const () as u64) < LOW_END || libc::munmap(LOW_START as *mut _, (LOW_END - LOW_START) as usize) != 0 {
            byte = b'p';
        }
        for w in WINDOWS {
            let mut prot = libc::PROT_READ;
            if w.write {
                prot |= libc::PROT_WRITE;
            }
            if w.execute {
                prot |= libc::PROT_EXEC;
            }
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
            let at = libc::mmap(w.va as *mut _, w.pages * PAGE, prot, flags, file, w.at as i64);
            if at as u64 != w.va {
                byte = b'm';
            }
            // Error codes of page faults tell not-present from read-only: the pages must stay.
            if libc::mlock(at, w.pages * PAGE) != 0 && byte == b'+' {
                byte = b'l';
            }
        }
        if !sandbox::install() {
            byte = b's';
        }
        let mut received = 0u8;
        while libc::read(down, (&raw mut received).cast(), 1) == 1 {
            if byte == b'+' {
                sandbox::set_alarm(2);
                for i in (*shared).first as usize..(*shared).end as usize {
                    (*shared).current = i as u32;
                    run_slot(shared, &raw mut (*shared).slots[i]);
                }
                sandbox::set_alarm(0);
            }
            if libc::write(up, (&raw const byte).cast(), 1) != 1 {
                break;
            }
        }
        libc::_exit(0);
    }
}

/// Runs one case, once at full speed and once in single steps if it asks for that.
///
/// # Safety
/// In the child, with everything installed; both pointers into the shared memory.
unsafe fn run_slot(shared: *mut Shared, slot: *mut Slot) {
    // SAFETY: the caller's; offsets and lengths are inside their arrays (the parent is this same program).
    unsafe {
        let image = (&raw mut (*shared).image).cast::<u8>();
        prepare(shared, slot, image);
        sandbox::run(&raw const (*slot).init, &raw const (*slot).segments, &raw mut (*slot).end);
        ptr::copy_nonoverlapping(image, (&raw mut (*slot).memory).cast(), IMAGE);
        if (*slot).single_step != 0 {
            prepare(shared, slot, image);
            let steps = sandbox::Steps {
                picture_at: (*slot).picture_at,
                picture: &raw mut (*slot).picture,
                image,
                picture_memory: (&raw mut (*slot).picture_memory).cast(),
            };
            let (positions, taken) =
                sandbox::run_stepping(&raw const (*slot).init, &raw const (*slot).segments, &raw mut (*slot).stepped_end, steps);
            (*slot).stepped_positions = positions;
            (*slot).picture_taken = u32::from(taken);
        }
    }
}

/// Puts the image into its starting state.
///
/// # Safety
/// As [`run_slot`].
unsafe fn prepare(shared: *const Shared, slot: *const Slot, image: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        ptr::copy_nonoverlapping((&raw const (*shared).template).cast(), image, IMAGE);
        ptr::copy_nonoverlapping(
            (&raw const (*slot).code).cast(),
            image.add((*slot).code_at as usize),
            (*slot).code_len as usize,
        );
        for i in 0..(*slot).poke_count as usize {
            let poke = &raw const (*slot).pokes[i];
            ptr::copy_nonoverlapping((&raw const (*poke).bytes).cast(), image.add((*poke).at as usize), (*poke).len as usize);
        }
    }
}
