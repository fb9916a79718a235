//! The user's terminal as the guest's console: raw while the guest runs, and as it was afterwards.
//!
//! *In*: a terminal's descriptor, typed bytes. *Out*: bytes for the guest, and the wish to leave. *Invariant*: the terminal's settings are restored when the
//! guard is dropped, also by a panic; every byte typed reaches the guest, but for the escape sequences.
//!
//! The escape is Ctrl-A, as in QEMU and screen: Ctrl-A x leaves, Ctrl-A h helps, Ctrl-A Ctrl-A sends one Ctrl-A.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::error::{Context, Result};

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// What Ctrl-A h shows. The terminal is raw, so lines end with both characters.
pub const HELP: &str = "\r\nCtrl-A x  leave Twinstep (the guest is switched off)\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// A terminal in raw mode; dropping it restores the settings.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

/// The settings of the terminal that is raw now, for [`restore_now`].
static RAW: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

impl RawMode {
    /// Makes a terminal raw. Something that is no terminal (a pipe, a file) is left alone: `None`.
    pub fn enter(terminal: impl AsFd) -> Result<Option<Self>> {
        if !isatty(&terminal) {
            return Ok(None);
        }
        let keep = || terminal.as_fd().try_clone_to_owned().what("cannot keep the terminal");
        let (terminal, spare) = (keep()?, keep()?);
        let before = tcgetattr(&terminal).what("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        *RAW.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((spare, before.clone()));
        tcsetattr(&terminal, OptionalActions::Drain, &raw).what("cannot make the terminal raw")?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        *RAW.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
        // Now and not after draining: a terminal that is gone would hold the process up. It may be gone; then nothing is to be restored.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

/// Restores the terminal from anywhere, for the way out through `std::process::exit` or an abort, which run no destructors. Does nothing if it is not raw.
pub fn restore_now() {
    // `try_lock`: a panic inside the lock must not become a deadlock.
    let Ok(mut raw) = RAW.try_lock() else { return };
    if let Some((terminal, before)) = raw.take() {
        let _ = tcsetattr(&terminal, OptionalActions::Now, &before);
    }
}

/// Restores the terminal before a panic is reported, so that the report can be read also where panics abort.
pub fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_now();
        report(info);
    }));
}

/// What typed bytes mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Typed {
    /// For the guest.
    Bytes(Vec<u8>),
    /// Ctrl-A h.
    Help,
    /// Ctrl-A x. What was typed after it is nobody's.
    Leave,
}

/// Finds the escape sequences in what is typed, also when they come in pieces.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Takes what was typed and says what it means, in order.
    pub fn typed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut found = Vec::new();
        let mut plain = Vec::new();
        for byte in bytes {
            if !std::mem::take(&mut self.pending) {
                match *byte {
                    ESCAPE => self.pending = true,
                    byte => plain.push(byte),
                }
                continue;
            }
            match *byte {
                ESCAPE => plain.push(ESCAPE),
                b'x' | b'X' | b'h' | b'H' | b'?' => {
                    if !plain.is_empty() {
                        found.push(Typed::Bytes(std::mem::take(&mut plain)));
                    }
                    if byte.eq_ignore_ascii_case(&b'x') {
                        found.push(Typed::Leave);
                        return found;
                    }
                    found.push(Typed::Help);
                }
                // Not one of ours: the guest may know it (screen, tmux).
                byte => plain.extend([ESCAPE, byte]),
            }
        }
        if !plain.is_empty() {
            found.push(Typed::Bytes(plain));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    fn bytes(text: &[u8]) -> Typed {
        Typed::Bytes(text.to_vec())
    }

    #[test]
    fn sequences() {
        let one = |text: &[u8]| Escape::default().typed(text);
        assert_eq!(one(b"ls\r"), [bytes(b"ls\r")]);
        assert_eq!(one(b"a\x01xb"), [bytes(b"a"), Typed::Leave]);
        assert_eq!(one(b"a\x01hb"), [bytes(b"a"), Typed::Help, bytes(b"b")]);
        assert_eq!(one(b"\x01\x01x"), [bytes(b"\x01x")]);
        assert_eq!(one(b"\x01d"), [bytes(b"\x01d")]);
        assert_eq!(one(b"\x01\x01\x01x"), [bytes(b"\x01"), Typed::Leave]);
        assert_eq!(one(b""), []);
    }

    proptest! {
        #[test]
        fn pieces_mean_the_same_as_the_whole(text in proptest::collection::vec(prop_oneof![Just(1u8), Just(b'h'), Just(b'q')], 0..30), cut in 0usize..30) {
            let flat = |parts: Vec<Typed>| parts.into_iter().flat_map(|t| match t {
                Typed::Bytes(bytes) => bytes.into_iter().map(Some).collect(),
                _ => vec![None],
            }).collect::<Vec<_>>();
            let cut = cut.min(text.len());
            let mut escape = Escape::default();
            let mut parts = escape.typed(&text[..cut]);
            parts.extend(escape.typed(&text[cut..]));
            prop_assert_eq!(flat(parts), flat(Escape::default().typed(&text)));
        }
    }

    #[test]
    fn settings_come_back() {
        let Ok(main) = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY) else { return };
        grantpt(&main).unwrap();
        unlockpt(&main).unwrap();
        let name = ptsname(&main, Vec::new()).unwrap();
        let terminal = std::fs::OpenOptions::new().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let canonical = || tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ICANON);
        assert!(canonical());
        let guard = RawMode::enter(&terminal).unwrap().unwrap();
        assert!(!canonical());
        drop(guard);
        assert!(canonical());

        let _guard = RawMode::enter(&terminal).unwrap();
        restore_now();
        assert!(canonical());

        let panicked = std::panic::catch_unwind(|| {
            let _guard = RawMode::enter(&terminal).unwrap();
            assert!(canonical(), "on purpose");
        });
        assert!(panicked.is_err() && canonical());
    }

    #[test]
    fn a_pipe_is_left_alone() {
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(RawMode::enter(&reader).unwrap().is_none());
    }
}
