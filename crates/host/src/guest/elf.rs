//! Just enough ELF to see what a program or a kernel module needs.
//!
//! *In*: the bytes of a 64-bit little-endian ELF file. *Out*: the shared libraries a program names, or what a kernel module's
//! `.modinfo` says. *Invariant*: broken files give `None` or less, never a panic.

/// A parsed section table.
#[derive(Debug)]
pub struct Elf<'a> {
    bytes: &'a [u8],
    sections: Vec<Section<'a>>,
}

#[derive(Debug, Clone, Copy)]
struct Section<'a> {
    name: &'a [u8],
    offset: usize,
    size: usize,
}

const DT_NEEDED: u64 = 1;

impl<'a> Elf<'a> {
    /// Reads the section table; `None` if this is not such a file.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        // Magic, 64 bits, little-endian.
        if bytes.get(..6)? != b"\x7fELF\x02\x01" {
            return None;
        }
        let table = usize::try_from(u64_at(bytes, 0x28)?).ok()?;
        let entry = usize::from(u16_at(bytes, 0x3a)?);
        let count = usize::from(u16_at(bytes, 0x3c)?);
        let names_index = usize::from(u16_at(bytes, 0x3e)?);
        let header = |index: usize| bytes.get(table.checked_add(index.checked_mul(entry)?)?..);
        let place =
            |header: &[u8]| Some((usize::try_from(u64_at(header, 0x18)?).ok()?, usize::try_from(u64_at(header, 0x20)?).ok()?));
        let (names_offset, _) = place(header(names_index)?)?;
        let mut sections = Vec::with_capacity(count);
        for index in 0..count {
            let header = header(index)?;
            let (offset, size) = place(header)?;
            let name = c_string(bytes, names_offset.checked_add(u32_at(header, 0)? as usize)?)?;
            sections.push(Section { name, offset, size });
        }
        Some(Self { bytes, sections })
    }

    fn section(&self, name: &str) -> Option<&'a [u8]> {
        let section = self.sections.iter().find(|s| s.name == name.as_bytes())?;
        self.bytes.get(section.offset..section.offset.checked_add(section.size)?)
    }

    /// The shared libraries this file asks for. A static program asks for none.
    #[must_use]
    pub fn needed(&self) -> Vec<String> {
        let (Some(dynamic), Some(strings)) = (self.section(".dynamic"), self.section(".dynstr")) else { return Vec::new() };
        dynamic
            .chunks_exact(16)
            .filter(|entry| u64_at(entry, 0) == Some(DT_NEEDED))
            .filter_map(|entry| c_string(strings, usize::try_from(u64_at(entry, 8)?).ok()?))
            .filter_map(|name| String::from_utf8(name.to_vec()).ok())
            .collect()
    }

    /// The program loader this file asks for.
    #[must_use]
    pub fn interpreter(&self) -> Option<&'a str> {
        let section = self.section(".interp")?;
        std::str::from_utf8(section.split(|b| *b == 0).next()?).ok()
    }

    /// The value of a kernel module's `key=value` note.
    #[must_use]
    pub fn module_info(&self, key: &str) -> Option<&'a str> {
        self.section(".modinfo")?.split(|b| *b == 0).find_map(|note| {
            let note = std::str::from_utf8(note).ok()?;
            note.strip_prefix(key)?.strip_prefix('=')
        })
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes_at(bytes, offset).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes_at(bytes, offset).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes_at(bytes, offset).map(u64::from_le_bytes)
}

fn c_string(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    bytes.get(offset..)?.split(|b| *b == 0).next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_this_very_program() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let elf = Elf::parse(&bytes).unwrap();
        assert!(elf.needed().iter().any(|name| name.starts_with("libc.so")), "{:?}", elf.needed());
        assert!(elf.interpreter().unwrap().contains("ld-linux"));
        assert_eq!(elf.module_info("depends"), None);
    }

    #[test]
    fn other_files_are_none() {
        assert!(Elf::parse(b"").is_none());
        assert!(Elf::parse(b"#!/bin/sh\n").is_none());
        assert!(Elf::parse(b"\x7fELF\x02\x01").is_none());
    }

    proptest! {
        #[test]
        fn damage_never_panics(cut in 0usize..4096, flips in proptest::collection::vec((0usize..4096, any::<u8>()), 0..20)) {
            let mut bytes = std::fs::read("/proc/self/exe").unwrap();
            // The section table sits at the end; damage the header and also try a cut file.
            for (at, value) in flips {
                bytes[at % 0x200] = value;
            }
            for bytes in [&bytes[..], &bytes[..cut]] {
                if let Some(elf) = Elf::parse(bytes) {
                    let _ = (elf.needed(), elf.interpreter(), elf.module_info("depends"));
                }
            }
        }
    }
}
