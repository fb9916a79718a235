//! Instructions that run alone: found again without decoding.
//!
//! **In:** where an instruction is. **Out:** what it is, and its block of one. Invariant: what is kept is used only while its block stands for
//! its bytes.
use super::{Core, Stop};
use crate::Exception;
use crate::cache::Key;
use crate::classify::{Kind, classify};
use crate::segmentation;
use crate::sys;
use crate::translate::{Mode, decode, length_if_refused};

/// An instruction that ran alone, decoded and translated.
pub(super) struct Alone {
    key: Key,
    insn: iced_x86::Instruction,
    /// Number of its block, and of the life of the cache in which that counts.
    id: u32,
    life: u64,
}

/// How many of them are kept.
pub(super) const ALONE_KEPT: usize = 256;

impl Core {
    /// The instruction at a key, and the block of it alone if it is not one for `sys`.
    pub(super) fn alone_block(&mut self, key: Key) -> Result<(iced_x86::Instruction, Option<u32>), Stop> {
        let slot = (key.rip ^ key.rip >> 8) as usize % ALONE_KEPT;
        if let Some(known) = &self.alone[slot]
            && known.key == key
            && known.life == self.cache.life()
            && self.cache.is_alive(known.id)
        {
            return Ok((known.insn, Some(known.id)));
        }
        let bytes = self.bytes(key.rip, key.gpa)?;
        let code = if bytes.second.is_some() { &bytes.joined[..15] } else { bytes.slice };
        let insn = decode(code, key.rip, key.mode, self.model.features);
        let narrow = key.mode.has(Mode::CODE_32);
        // Bytes that are refused for what they say are fetched like others.
        let len = if insn.is_invalid() { length_if_refused(code, key.rip, key.mode) } else { Some(insn.len()) };
        if narrow && len.is_some_and(|len| !segmentation::holds_code(self.st(), key.rip as u32, len)) {
            return Err(Stop::Fault(Exception::gp(0)));
        }
        match classify(&insn, key.mode, self.model.features) {
            Kind::Invalid => return Err(Stop::Fault(Exception::UD)),
            Kind::NoFpu => return Err(Stop::Fault(Exception::NM)),
            Kind::Sys => return Ok((insn, None)),
            // Where segments are not flat; blocks of many instructions have code of their own for these.
            _ if narrow && sys::handles_near(&insn) => return Ok((insn, None)),
            _ => {}
        }
        let id = match self.cache.find(key) {
            Some(id) if self.cache.block(id).second == bytes.second => id,
            _ => self.translate(key, &bytes, 1),
        };
        // In 32-bit code, the code segment's limit has to be looked at each time.
        if bytes.second.is_none() && !narrow {
            self.alone[slot] = Some(Alone { key, insn, id, life: self.cache.life() });
        }
        Ok((insn, Some(id)))
    }
}
