//! MSI-X: a function's table of interrupt messages (PCI Local Bus 3.0, section 6.8.2).
//!
//! **In:** table accesses, requests to send a vector. **Out:** interrupt [`Message`]s. **Invariant:** a request while the vector or the function is
//! masked is remembered in the pending bits and sent once when it is unmasked.
use crate::apic::Message;
use crate::payload::{Payload, RestoreError};
use minicbor::{Decode, Encode};

/// Capability id.
pub(crate) const CAPABILITY: u8 = 0x11;
/// Message control: enabled.
pub(crate) const ENABLE: u16 = 1 << 15;
/// Message control: all vectors masked.
pub(crate) const MASK_ALL: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;
/// Bytes of a table entry.
pub(crate) const ENTRY_LEN: u64 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
struct Entry {
    #[n(0)]
    address: u64,
    #[n(1)]
    data: u32,
    #[n(2)]
    control: u32,
}

/// The table and the pending bits.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Msix {
    #[n(0)]
    entries: Vec<Entry>,
    #[n(1)]
    pending: u64,
}

impl Msix {
    /// A table of `vectors` (64 at most) masked entries.
    pub(crate) fn new(vectors: u16) -> Self {
        assert!((1..=64).contains(&vectors));
        let entry = Entry { address: 0, data: 0, control: ENTRY_MASKED };
        Self { entries: vec![entry; vectors.into()], pending: 0 }
    }

    /// Vectors in the table.
    pub(crate) fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Body of the capability: table and pending bits both in base address register 0.
    pub(crate) fn capability(&self, table: u32, pending: u32) -> Vec<u8> {
        let mut body = (self.vectors() - 1).to_le_bytes().to_vec();
        body.extend(table.to_le_bytes());
        body.extend(pending.to_le_bytes());
        body
    }

    /// Reads the table, in 32-bit or 64-bit units.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(entry) = self.entries.get((offset / ENTRY_LEN) as usize) else { return };
        let mut bytes = [0; ENTRY_LEN as usize];
        bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
        bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
        for (out, byte) in data.iter_mut().zip(&bytes[(offset % ENTRY_LEN) as usize..]) {
            *out = *byte;
        }
    }

    /// Writes the table. Returns the message a vector sends that was pending and is unmasked by this.
    pub(crate) fn write_table(&mut self, offset: u64, data: &[u8], control: u16) -> Option<Message> {
        let vector = (offset / ENTRY_LEN) as usize;
        let within = offset % ENTRY_LEN;
        // Anything but aligned 32-bit and 64-bit accesses is undefined; here it is ignored.
        if !matches!(data.len(), 4 | 8) || !within.is_multiple_of(data.len() as u64) {
            return None;
        }
        let entry = self.entries.get_mut(vector)?;
        for (i, word) in (0..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes(word.try_into().ok()?);
            match within / 4 + i {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
        }
        self.send_pending(vector, control)
    }

    /// Reads the pending bits.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.pending.to_le_bytes();
        for (i, out) in data.iter_mut().enumerate() {
            *out = bytes.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn send_pending(&mut self, vector: usize, control: u16) -> Option<Message> {
        if self.pending >> vector & 1 == 0 {
            return None;
        }
        self.pending &= !(1 << vector);
        self.send(vector as u16, control)
    }

    /// The function asks for `vector`; vectors it does not have go nowhere.
    pub(crate) fn send(&mut self, vector: u16, control: u16) -> Option<Message> {
        let entry = self.entries.get(usize::from(vector))?;
        if control & ENABLE == 0 {
            return None;
        }
        if control & MASK_ALL != 0 || entry.control & ENTRY_MASKED != 0 {
            self.pending |= 1 << vector;
            return None;
        }
        Message::from_msi(entry.address, entry.data)
    }

    /// Message control changed: what was pending and is unmasked now is sent.
    pub(crate) fn control_changed(&mut self, control: u16) -> Vec<Message> {
        (0..self.entries.len()).filter_map(|vector| self.send_pending(vector, control)).collect()
    }

    /// Checks a saved table against this one.
    pub(crate) fn check(&self, payload: &Payload, saved: &Self) -> Result<(), RestoreError> {
        let vectors = self.entries.len();
        if saved.entries.len() != vectors || (vectors < 64 && saved.pending >> vectors != 0) {
            return Err(payload.invalid("the MSI-X table has another size"));
        }
        if saved.entries.iter().any(|e| e.control & !ENTRY_MASKED != 0 || e.address & 3 != 0) {
            return Err(payload.invalid("reserved bits are set in the MSI-X table"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(msix: &mut Msix, vector: u64, masked: u32) -> Option<Message> {
        msix.write_table(vector * 16, &0xfee0_0000u64.to_le_bytes(), ENABLE);
        msix.write_table(vector * 16 + 8, &0x41u32.to_le_bytes(), ENABLE);
        msix.write_table(vector * 16 + 12, &masked.to_le_bytes(), ENABLE)
    }

    #[test]
    fn masked_vectors_wait() {
        let mut msix = Msix::new(3);
        assert_eq!(program(&mut msix, 1, 1), None);
        assert_eq!(msix.send(1, ENABLE), None);
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits[0], 2);
        let sent = program(&mut msix, 1, 0).unwrap();
        assert_eq!((sent.vector, sent.destination, sent.level), (0x41, 0, false));
        assert!(msix.send(1, ENABLE).is_some());
        assert_eq!(msix.send(1, ENABLE | MASK_ALL), None);
        assert_eq!(msix.control_changed(ENABLE).len(), 1);
        assert_eq!(msix.control_changed(ENABLE).len(), 0);
        assert_eq!(msix.send(1, 0), None);
        assert_eq!(msix.send(7, ENABLE), None);
    }

    #[test]
    fn table_reads_back() {
        let mut msix = Msix::new(2);
        program(&mut msix, 1, 0);
        let mut bytes = [0; 8];
        msix.read_table(16, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), 0xfee0_0000);
        msix.read_table(24, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), 0x41);
        msix.read_table(4000, &mut bytes);
        assert_eq!(bytes, [0; 8]);
        assert_eq!(msix.write_table(17, &[0; 4], ENABLE), None);
    }
}
