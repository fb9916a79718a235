//! Writing an image.
//!
//! **In:** payloads and pages. **Out:** blocks on a `Write`.
//! **Invariant:** whatever is written, [`super::ImageReader`] takes: what it would refuse is refused here first.
use super::*;
use crate::container::{Output, WriteError, encode_metadata};
use std::collections::BTreeSet;
use std::io::Write;

/// Writes one image. Between pages, payloads may come at any time; [`ImageWriter::finish`] makes it whole. Writes are large, so
/// the writer below needs no buffer.
pub struct ImageWriter<W: Write> {
    output: Output<W>,
    /// Offset of the image's first byte.
    start: u64,
    compression: Compression,
    ram_pages: u64,
    digest: ContentDigest,
    kinds: BTreeSet<String>,
    pages: u64,
    /// The lowest page number that may still come.
    next_page: u64,
    group: Group,
    packed: Vec<u8>,
}

/// Pages that wait for their group to be full.
struct Group {
    first: u64,
    present: u64,
    bytes: Vec<u8>,
}

impl<W: Write> ImageWriter<W> {
    /// Begins an image.
    ///
    /// # Errors
    /// If the output fails, or the metadata declares more than [`MAX_RAM_PAGES`].
    pub fn new(output: W, metadata: &ImageMetadata, compression: Compression) -> Result<Self, WriteError> {
        Self::new_at(Output::new(output, CONTAINER.what), metadata, compression)
    }

    /// The same for an image inside something else.
    pub(crate) fn new_at(mut output: Output<W>, metadata: &ImageMetadata, compression: Compression) -> Result<Self, WriteError> {
        let start = output.offset;
        if metadata.ram_pages > MAX_RAM_PAGES {
            return Err(output.invalid(format!("{} pages of RAM, over the limit of {MAX_RAM_PAGES}", metadata.ram_pages)));
        }
        let bytes = encode_metadata(metadata);
        CONTAINER.begin(&mut output, &bytes)?;
        Ok(Self {
            output,
            start,
            compression,
            ram_pages: metadata.ram_pages,
            digest: ContentDigest::new(&bytes),
            kinds: BTreeSet::new(),
            pages: 0,
            next_page: 0,
            group: Group { first: 0, present: 0, bytes: Vec::with_capacity(GROUP_BYTES) },
            packed: vec![0; lz4_flex::block::get_maximum_output_size(GROUP_BYTES)],
        })
    }

    /// Writes a payload.
    ///
    /// # Errors
    /// If the output fails, or the payload's kind is malformed or was there before, or it is too large.
    pub fn payload(&mut self, payload: &ImagePayload) -> Result<(), WriteError> {
        if let Some(fault) = kind_fault(&payload.kind) {
            return Err(self.output.invalid(format!("{fault}: {:?}", payload.kind)));
        }
        if payload.bytes.len() > MAX_IMAGE_PAYLOAD {
            let length = payload.bytes.len();
            let fault = format!("payload {} of {length} bytes, over the limit of {MAX_IMAGE_PAYLOAD}", payload.kind);
            return Err(self.output.invalid(fault));
        }
        if self.kinds.len() as u32 == MAX_IMAGE_PAYLOADS {
            return Err(self.output.invalid(format!("more than {MAX_IMAGE_PAYLOADS} payloads")));
        }
        if !self.kinds.insert(payload.kind.clone()) {
            return Err(self.output.invalid(format!("payload {} came twice", payload.kind)));
        }
        self.write_group()?;
        self.digest.payload(payload);
        let mut body_check = crc32fast::Hasher::new();
        body_check.update(payload.kind.as_bytes());
        body_check.update(&payload.bytes);
        self.write_header(BlockHeader {
            check: U32::ZERO,
            kind: BLOCK_PAYLOAD,
            encoding: 0,
            version: U16::new(payload.version),
            length: U32::new((payload.kind.len() + payload.bytes.len()) as u32),
            body_check: U32::new(body_check.finalize()),
            number: U64::new(payload.kind.len() as u64),
            present: U64::ZERO,
        })?;
        self.output.write(payload.kind.as_bytes())?;
        self.output.write(&payload.bytes)
    }

    /// Takes a page. A page of zeros is passed over.
    ///
    /// # Errors
    /// If the output fails, `number` is not below the RAM size, or not above the page before.
    pub fn page(&mut self, number: u64, page: &[u8; PAGE_BYTES]) -> Result<(), WriteError> {
        if number >= self.ram_pages {
            return Err(self.output.invalid(format!("page {number} of a machine that has {} pages", self.ram_pages)));
        }
        if number < self.next_page {
            return Err(self.output.invalid(format!("page {number} after page {}", self.next_page - 1)));
        }
        self.next_page = number + 1;
        let first = number - number % GROUP_PAGES;
        if first != self.group.first {
            self.write_group()?;
            self.group.first = first;
        }
        if is_zero(page) {
            return Ok(());
        }
        self.group.present |= 1 << (number - first);
        self.group.bytes.extend_from_slice(page);
        if number - first == GROUP_PAGES - 1 {
            self.write_group()?;
        }
        Ok(())
    }

    /// How far it is.
    pub fn progress(&self) -> ImageProgress {
        ImageProgress { pages_passed: self.next_page, pages_total: self.ram_pages, bytes: self.output.offset - self.start }
    }

    /// Makes the image whole and flushes; gives the writer back.
    ///
    /// # Errors
    /// If the output fails.
    pub fn finish(self) -> Result<(W, ImageSummary), WriteError> {
        let (mut output, summary) = self.finish_at()?;
        output.flush()?;
        Ok((output.into_inner(), summary))
    }

    /// The same for an image inside something else; does not flush.
    pub(crate) fn finish_at(mut self) -> Result<(Output<W>, ImageSummary), WriteError> {
        self.write_group()?;
        let digest = self.digest.value();
        let payloads = self.kinds.len() as u32;
        let end = EndLayout {
            pages: U64::new(self.pages),
            payloads: U32::new(payloads),
            reserved: U32::ZERO,
            digest: U128::new(digest),
        };
        self.write_header(BlockHeader {
            check: U32::ZERO,
            kind: BLOCK_END,
            encoding: 0,
            version: U16::ZERO,
            length: U32::new(size_of::<EndLayout>() as u32),
            body_check: U32::new(crc32fast::hash(end.as_bytes())),
            number: U64::ZERO,
            present: U64::ZERO,
        })?;
        self.output.write(end.as_bytes())?;
        let bytes = self.output.offset - self.start;
        Ok((self.output, ImageSummary { pages: self.pages, payloads, bytes, digest }))
    }

    /// Writes the pages that wait. A group may be split by a payload: its later pages then come in a block of their own.
    fn write_group(&mut self) -> Result<(), WriteError> {
        if self.group.present == 0 {
            return Ok(());
        }
        let Group { first, present, .. } = self.group;
        assert!(self.group.bytes.len() == present.count_ones() as usize * PAGE_BYTES);
        self.digest.pages(first, present, &self.group.bytes);
        let packed = match self.compression {
            Compression::Stored => None,
            Compression::Lz4 => lz4_flex::block::compress_into(&self.group.bytes, &mut self.packed).ok(),
        };
        let packed = packed.filter(|length| *length < self.group.bytes.len());
        let (encoding, length) = packed.map_or((STORED, self.group.bytes.len()), |length| (LZ4, length));
        let body = if encoding == LZ4 { &self.packed[..length] } else { &self.group.bytes[..] };
        let body_check = crc32fast::hash(body);
        self.write_header(BlockHeader {
            check: U32::ZERO,
            kind: BLOCK_PAGES,
            encoding,
            version: U16::ZERO,
            length: U32::new(length as u32),
            body_check: U32::new(body_check),
            number: U64::new(first),
            present: U64::new(present),
        })?;
        self.output.write(if encoding == LZ4 { &self.packed[..length] } else { &self.group.bytes })?;
        self.pages += u64::from(present.count_ones());
        self.group.present = 0;
        self.group.bytes.clear();
        Ok(())
    }

    fn write_header(&mut self, mut header: BlockHeader) -> Result<(), WriteError> {
        header.check = U32::new(header.computed_check());
        self.output.write(header.as_bytes())
    }
}

fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    page.chunks_exact(16).all(|chunk| chunk == [0; 16])
}

/// Writes a whole image. `fill` is called for every page number in turn and puts the page's bytes into the buffer;
/// `progress` is called after every group of pages.
///
/// # Errors
/// As [`ImageWriter`]'s.
pub fn write_image<W: Write>(
    output: W,
    metadata: &ImageMetadata,
    compression: Compression,
    payloads: &[ImagePayload],
    mut fill: impl FnMut(u64, &mut [u8; PAGE_BYTES]),
    mut progress: impl FnMut(ImageProgress),
) -> Result<(W, ImageSummary), WriteError> {
    let mut writer = ImageWriter::new(output, metadata, compression)?;
    for payload in payloads {
        writer.payload(payload)?;
    }
    let mut page = [0; PAGE_BYTES];
    for number in 0..metadata.ram_pages {
        fill(number, &mut page);
        writer.page(number, &page)?;
        if (number + 1) % GROUP_PAGES == 0 {
            progress(writer.progress());
        }
    }
    progress(writer.progress());
    writer.finish()
}
