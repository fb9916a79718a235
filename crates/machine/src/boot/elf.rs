//! ELF images of 32 and 64 bits: what is loaded where, and the notes.
//!
//! **In:** a file's bytes. **Out:** its segments by physical address, its entry point, a PVH entry point. **Invariant:** whatever the bytes are,
//! nothing panics, and what a segment says is inside the file.
//! References: System V ABI, chapters 4 and 5; Xen, docs/misc/pvh.pandoc and xen/include/public/elfnote.h.
use super::BootError;
use std::ops::Range;

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
const EXECUTABLE: u32 = 1;
const XEN_PHYS32_ENTRY: u32 = 18;

/// Part of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it goes.
    pub gpa: u64,
    /// Which bytes of the file.
    pub file: Range<usize>,
    /// Bytes in memory; what the file does not have is zero.
    pub len: u64,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Elf {
    pub segments: Vec<Segment>,
    /// Physical address of the entry point.
    pub entry: u64,
    /// The entry point of the PVH note.
    pub pvh: Option<u64>,
    /// A 64-bit image.
    pub wide: bool,
}

/// Whether it begins like an ELF image.
pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(MAGIC)
}

/// Fields of a file, all little-endian; `None` beyond its end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let at = usize::try_from(at).ok()?;
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    fn half(&self, at: u64) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }
    fn word(&self, at: u64) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }
    /// A word of the image's own width.
    fn long(&self, at: u64, wide: bool) -> Option<u64> {
        if wide { self.bytes(at).map(u64::from_le_bytes) } else { self.word(at).map(u64::from) }
    }
    /// `len` bytes from `at` on.
    fn range(&self, at: u64, len: u64) -> Option<Range<usize>> {
        let end = usize::try_from(at.checked_add(len)?).ok()?;
        (end <= self.0.len()).then_some(at as usize..end)
    }
}

/// A program header.
struct Header {
    kind: u32,
    flags: u32,
    offset: u64,
    va: u64,
    gpa: u64,
    file_len: u64,
    len: u64,
    align: u64,
}

fn header(f: &Fields, at: u64, wide: bool) -> Option<Header> {
    let long = |narrow_at: u64, wide_at: u64| f.long(at.checked_add(if wide { wide_at } else { narrow_at })?, wide);
    Some(Header {
        kind: f.word(at)?,
        flags: f.word(at.checked_add(if wide { 4 } else { 24 })?)?,
        offset: long(4, 8)?,
        va: long(8, 16)?,
        gpa: long(12, 24)?,
        file_len: long(16, 32)?,
        len: long(20, 40)?,
        align: long(28, 48)?,
    })
}

/// Reads an image.
pub(super) fn parse(image: &[u8]) -> Result<Elf, BootError> {
    let f = Fields(image);
    let (class, endian) = (image.get(4).copied(), image.get(5).copied());
    let wide = match class {
        Some(CLASS_32) => false,
        Some(CLASS_64) => true,
        _ => return Err(BootError::BadElf("it is neither a 32-bit nor a 64-bit one")),
    };
    let machine = f.half(18);
    if endian != Some(LITTLE_ENDIAN) || !matches!(machine, Some(MACHINE_386 | MACHINE_X86_64)) {
        return Err(BootError::BadElf("it is not for x86"));
    }
    headers(&f, wide).ok_or(BootError::BadElf("it is cut off or its headers are damaged"))
}

fn headers(f: &Fields, wide: bool) -> Option<Elf> {
    let mut entry = f.long(24, wide)?;
    let table = f.long(if wide { 32 } else { 28 }, wide)?;
    let size = u64::from(f.half(if wide { 54 } else { 42 })?);
    let count = u64::from(f.half(if wide { 56 } else { 44 })?);
    let (mut segments, mut pvh, mut found) = (Vec::new(), None, false);
    for i in 0..count {
        let h = header(f, table.checked_add(i * size)?, wide)?;
        match h.kind {
            LOAD if h.len > 0 => {
                let file = f.range(h.offset, h.file_len.min(h.len))?;
                h.gpa.checked_add(h.len)?;
                // The entry point is a virtual address; code that runs before there is paging wants the physical one.
                if !found && h.flags & EXECUTABLE != 0 && (h.va..h.va.checked_add(h.len)?).contains(&entry) {
                    entry = entry - h.va + h.gpa;
                    found = true;
                }
                segments.push(Segment { gpa: h.gpa, file, len: h.len });
            }
            NOTE => pvh = pvh.or(phys32_entry(f.0.get(f.range(h.offset, h.file_len)?)?, h.align)),
            _ => {}
        }
    }
    Some(Elf { segments, entry, pvh, wide })
}

/// The PVH entry point, if these notes have it.
fn phys32_entry(notes: &[u8], align: u64) -> Option<u64> {
    let f = Fields(notes);
    let align = if align == 8 { 8 } else { 4 };
    let mut at = 0u64;
    loop {
        let (name_len, len, kind) = (f.word(at)?, f.word(at + 4)?, f.word(at + 8)?);
        let name_at = at + 12;
        let data_at = (name_at + u64::from(name_len)).next_multiple_of(align);
        let name = f.0.get(f.range(name_at, name_len.into())?)?;
        if name == b"Xen\0" && kind == XEN_PHYS32_ENTRY {
            return if len >= 8 { f.long(data_at, true) } else { f.word(data_at).map(u64::from) };
        }
        at = (data_at + u64::from(len)).next_multiple_of(align);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A 32-bit image: `code` at `gpa` (linked at `va`), and a PVH note if wanted.
    pub(in crate::boot) fn image(code: &[u8], gpa: u32, va: u32, pvh: Option<u32>) -> Vec<u8> {
        let mut e = vec![0; 52];
        e[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
        let mut put = |at: usize, bytes: &[u8]| e[at..at + bytes.len()].copy_from_slice(bytes);
        put(16, &[2, 0, 3, 0, 1]);
        put(24, &va.to_le_bytes());
        put(28, &52u32.to_le_bytes());
        put(42, &[32, 0, 1 + u8::from(pvh.is_some()), 0]);
        let at = 52 + 2 * 32;
        let header = |kind: u32, at: usize, va: u32, gpa: u32, len: usize, memory: usize| {
            [kind, at as u32, va, gpa, len as u32, memory as u32, 5, 4].map(u32::to_le_bytes).concat()
        };
        e.extend(header(LOAD, at, va, gpa, code.len(), code.len() + 0x1000));
        e.extend(header(NOTE, at + code.len(), 0, 0, 20, 20));
        e.extend(code);
        e.extend([4u32, 4, XEN_PHYS32_ENTRY].map(u32::to_le_bytes).concat());
        e.extend(b"Xen\0");
        e.extend(pvh.unwrap_or(0).to_le_bytes());
        e
    }

    #[test]
    fn segments_entry_and_note() {
        let e = parse(&image(&[0x90; 8], 0x10_0000, 0xc010_0000, Some(0x10_0004))).unwrap();
        assert_eq!(e.segments, [Segment { gpa: 0x10_0000, file: 116..124, len: 0x1008 }]);
        assert_eq!((e.entry, e.pvh, e.wide), (0x10_0000, Some(0x10_0004), false));
        assert_eq!(parse(&image(&[0x90; 8], 0x10_0000, 0x10_0000, None)).unwrap().pvh, None);
    }

    #[test]
    fn damage_is_an_error() {
        let good = image(&[0x90; 8], 0x10_0000, 0x10_0000, Some(0x10_0000));
        for end in 0..good.len() - 8 {
            let _ = parse(&good[..end]);
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = parse(&bad);
            }
        }
        assert!(matches!(parse(&good[..60]), Err(BootError::BadElf(_))));
        assert!(matches!(parse(b"\x7fELF\x01\x02"), Err(BootError::BadElf(_))));
    }
}
