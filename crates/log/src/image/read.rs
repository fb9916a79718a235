//! Reading an image.
//!
//! **In:** blocks from a `Read`, from anybody.
//! **Out:** payloads and pages, each after its checksum held and its numbers made sense.
//! **Invariants:** page numbers rise and stay below the declared RAM size; no payload kind comes twice; memory grows with what
//! comes, not with what is announced. What was handed out may be used only after `None` came: then the whole is confirmed.
use super::*;
use crate::container::{Input, ReadError, decode_metadata};
use std::collections::BTreeSet;
use std::io::{Read, Seek};
use zerocopy::FromZeros;

/// Reads one image.
pub struct ImageReader<R: Read> {
    input: Input<R>,
    /// Offset of the image's first byte.
    start: u64,
    metadata: ImageMetadata,
    digest: ContentDigest,
    kinds: BTreeSet<String>,
    pages: u64,
    /// The lowest page number that may still come.
    next_page: u64,
    body: Vec<u8>,
    /// The last group's pages.
    unpacked: Vec<u8>,
    summary: Option<ImageSummary>,
}

/// A part of an image.
#[derive(Debug)]
pub enum ImageItem<'a> {
    /// The state of a part of the machine.
    Payload(ImagePayload),
    /// Some pages of RAM.
    Pages(Pages<'a>),
}

/// Some pages of one group.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    first: u64,
    present: u64,
    bytes: &'a [u8],
}

impl<'a> Pages<'a> {
    /// The pages with their numbers, rising.
    pub fn iter(&self) -> PagesIter<'a> {
        let (pages, rest) = self.bytes.as_chunks();
        assert!(rest.is_empty() && pages.len() == self.present.count_ones() as usize);
        PagesIter { first: self.first, present: self.present, pages: pages.iter() }
    }
}

impl<'a> IntoIterator for Pages<'a> {
    type Item = (u64, &'a [u8; PAGE_BYTES]);
    type IntoIter = PagesIter<'a>;
    fn into_iter(self) -> PagesIter<'a> {
        self.iter()
    }
}

/// Iterates over [`Pages`].
#[derive(Debug, Clone)]
pub struct PagesIter<'a> {
    first: u64,
    present: u64,
    pages: std::slice::Iter<'a, [u8; PAGE_BYTES]>,
}

impl<'a> Iterator for PagesIter<'a> {
    type Item = (u64, &'a [u8; PAGE_BYTES]);
    fn next(&mut self) -> Option<Self::Item> {
        let page = self.pages.next()?;
        let number = self.first + u64::from(self.present.trailing_zeros());
        self.present &= self.present - 1;
        Some((number, page))
    }
}

impl<R: Read> ImageReader<R> {
    /// Reads the beginning of an image. Takes not one byte more from `input` than the image has, so `input` should be buffered.
    ///
    /// # Errors
    /// If this is no image, a newer one, or a damaged one.
    pub fn open(input: R) -> Result<Self, ReadError> {
        Self::open_at(Input { inner: input, offset: 0, what: CONTAINER.what })
    }

    /// The same for an image inside something else; errors give offsets in that, and its name.
    pub(crate) fn open_at(mut input: Input<R>) -> Result<Self, ReadError> {
        let start = input.offset;
        let bytes = CONTAINER.open(&mut input)?;
        let metadata: ImageMetadata = decode_metadata(&input, &bytes)?;
        if metadata.ram_pages > MAX_RAM_PAGES {
            let fault = format!("it declares {} pages of RAM, over the limit of {MAX_RAM_PAGES}", metadata.ram_pages);
            return Err(ReadError::Damaged { what: input.what, offset: input.offset, fault });
        }
        Ok(Self {
            input,
            start,
            metadata,
            digest: ContentDigest::new(&bytes),
            kinds: BTreeSet::new(),
            pages: 0,
            next_page: 0,
            body: Vec::new(),
            unpacked: Vec::with_capacity(GROUP_BYTES),
            summary: None,
        })
    }

    /// What the image says about itself.
    pub fn metadata(&self) -> &ImageMetadata {
        &self.metadata
    }

    /// The next part; `None` after the last, when the whole image has been confirmed.
    ///
    /// # Errors
    /// If the image is damaged or cut. It must be thrown away then, with all that came out of it.
    pub fn next_item(&mut self) -> Result<Option<ImageItem<'_>>, ReadError> {
        if self.summary.is_some() {
            return Ok(None);
        }
        let start = self.input.offset;
        let header = read_block_header(&mut self.input)?;
        let length = header.length.get() as usize;
        self.body = self.input.read_vec(length, start, "a block")?;
        let what = self.input.what;
        let damaged = |fault: String| ReadError::Damaged { what, offset: start, fault };
        if crc32fast::hash(&self.body) != header.body_check.get() {
            return Err(damaged("the block is damaged".to_owned()));
        }
        match header.kind {
            BLOCK_PAYLOAD => self.take_payload(&header).map(|payload| Some(ImageItem::Payload(payload))).map_err(damaged),
            BLOCK_PAGES => {
                self.take_pages(&header).map_err(damaged)?;
                let (first, present) = (header.number.get(), header.present.get());
                Ok(Some(ImageItem::Pages(Pages { first, present, bytes: &self.unpacked })))
            }
            BLOCK_END => {
                self.take_end().map_err(damaged)?;
                Ok(None)
            }
            kind => unreachable!("block kind {kind} was refused with its header"),
        }
    }

    fn take_payload(&mut self, header: &BlockHeader) -> Result<ImagePayload, String> {
        let kind_length = header.number.get() as usize;
        let (kind, bytes) = self.body.split_at_checked(kind_length).ok_or("a payload is shorter than its kind's name")?;
        let kind = std::str::from_utf8(kind).map_err(|_| "the name of a payload's kind is not text")?.to_owned();
        if let Some(fault) = kind_fault(&kind) {
            return Err(fault.to_owned());
        }
        if self.kinds.len() as u32 == MAX_IMAGE_PAYLOADS {
            return Err(format!("there are more than {MAX_IMAGE_PAYLOADS} payloads"));
        }
        if !self.kinds.insert(kind.clone()) {
            return Err(format!("payload {kind} comes twice"));
        }
        let payload = ImagePayload { kind, version: header.version.get(), bytes: bytes.to_vec() };
        self.digest.payload(&payload);
        Ok(payload)
    }

    fn take_pages(&mut self, header: &BlockHeader) -> Result<(), String> {
        let (first, present) = (header.number.get(), header.present.get());
        // `read_block_header` saw to it that there is a page and that the first is the first of a group.
        let lowest = first + u64::from(present.trailing_zeros());
        let highest = first + 63 - u64::from(present.leading_zeros());
        if highest >= self.metadata.ram_pages {
            return Err(format!("page {highest} of a machine that has {} pages", self.metadata.ram_pages));
        }
        if lowest < self.next_page {
            return Err(format!("page {lowest} comes after page {}", self.next_page - 1));
        }
        let bytes = present.count_ones() as usize * PAGE_BYTES;
        if header.encoding == STORED {
            if self.body.len() != bytes {
                return Err(format!("{} bytes for {} pages", self.body.len(), present.count_ones()));
            }
            std::mem::swap(&mut self.unpacked, &mut self.body);
        } else {
            self.unpacked.resize(bytes, 0);
            match lz4_flex::block::decompress_into(&self.body, &mut self.unpacked) {
                Ok(unpacked) if unpacked == bytes => {}
                Ok(unpacked) => return Err(format!("{unpacked} bytes for {} pages", present.count_ones())),
                Err(error) => return Err(format!("pages cannot be unpacked: {error}")),
            }
        }
        self.digest.pages(first, present, &self.unpacked);
        self.next_page = highest + 1;
        self.pages += u64::from(present.count_ones());
        Ok(())
    }

    fn take_end(&mut self) -> Result<(), String> {
        let end = EndLayout::ref_from_bytes(&self.body).map_err(|_| "the end block has the wrong size")?;
        if end.reserved != U32::ZERO {
            return Err("reserved bytes of the end block are not zero".to_owned());
        }
        let payloads = self.kinds.len() as u32;
        if end.pages.get() != self.pages || end.payloads.get() != payloads {
            return Err(format!(
                "{} pages and {} payloads were written, {} and {payloads} came",
                end.pages, end.payloads, self.pages
            ));
        }
        let digest = self.digest.value();
        if end.digest.get() != digest {
            return Err(format!("the whole was {:032x} when written, {digest:032x} came", end.digest.get()));
        }
        self.summary = Some(ImageSummary { pages: self.pages, payloads, bytes: self.input.offset - self.start, digest });
        Ok(())
    }

    /// How far it is.
    pub fn progress(&self) -> ImageProgress {
        ImageProgress {
            pages_passed: self.next_page,
            pages_total: self.metadata.ram_pages,
            bytes: self.input.offset - self.start,
        }
    }

    /// What the whole was; `None` before [`ImageReader::next_item`] gave `None`.
    pub fn summary(&self) -> Option<ImageSummary> {
        self.summary
    }

    /// Gives the reader back, which stands at the first byte after the image if the whole was read.
    pub fn into_inner(self) -> R {
        self.input.inner
    }
}

/// Reads and checks the header of a block: what can be said without its body and without the blocks before.
fn read_block_header<R: Read>(input: &mut Input<R>) -> Result<BlockHeader, ReadError> {
    let start = input.offset;
    let mut header = BlockHeader::new_zeroed();
    input.read(header.as_mut_bytes(), start, "a block")?;
    let fault =
        if header.computed_check() != header.check.get() { Some("the block's header is damaged") } else { header_fault(&header) };
    match fault {
        Some(fault) => Err(ReadError::Damaged { what: input.what, offset: start, fault: fault.to_owned() }),
        None => Ok(header),
    }
}

fn header_fault(header: &BlockHeader) -> Option<&'static str> {
    let (version, number, present) = (header.version.get(), header.number.get(), header.present.get());
    let length = header.length.get() as usize;
    let (limit, makes_sense) = match header.kind {
        BLOCK_PAYLOAD => {
            (MAX_IMAGE_PAYLOAD + MAX_KIND, header.encoding == 0 && present == 0 && number >= 1 && number <= MAX_KIND as u64)
        }
        BLOCK_PAGES => {
            let known = header.encoding == STORED || header.encoding == LZ4;
            (GROUP_BYTES, known && version == 0 && present != 0 && number % GROUP_PAGES == 0 && number < MAX_RAM_PAGES)
        }
        BLOCK_END => (size_of::<EndLayout>(), header.encoding == 0 && version == 0 && number == 0 && present == 0),
        _ => return Some("a block is of a kind that is not known"),
    };
    if !makes_sense {
        Some("the block's header makes no sense")
    } else if length > limit {
        Some("the block is larger than it may be")
    } else {
        None
    }
}

/// Passes over an image without looking into its blocks; stands at the first byte after it then. Gives its metadata.
pub(crate) fn skip_image<R: Read + Seek>(input: &mut Input<R>) -> Result<ImageMetadata, ReadError> {
    let bytes = CONTAINER.open(input)?;
    let metadata = decode_metadata(input, &bytes)?;
    loop {
        let header = read_block_header(input)?;
        let (offset, length) = (input.offset, header.length.get());
        if header.kind == BLOCK_END {
            input.read_vec(length as usize, offset, "the image's end")?;
            return Ok(metadata);
        }
        input.seek(offset + u64::from(length))?;
    }
}

/// Reads a whole image: `payload` and `page` are called for what is in it, `progress` after every block. Pages that `page` was
/// not called for are zero. What they were given may be used only if this succeeds.
///
/// # Errors
/// If the image is damaged or cut; or the error of `payload`.
pub fn read_image<R: Read, E: From<ReadError>>(
    reader: &mut ImageReader<R>,
    mut payload: impl FnMut(ImagePayload) -> Result<(), E>,
    mut page: impl FnMut(u64, &[u8; PAGE_BYTES]),
    mut progress: impl FnMut(ImageProgress),
) -> Result<ImageSummary, E> {
    loop {
        match reader.next_item()? {
            Some(ImageItem::Payload(found)) => payload(found)?,
            Some(ImageItem::Pages(pages)) => pages.iter().for_each(|(number, bytes)| page(number, bytes)),
            None => break,
        }
        progress(reader.progress());
    }
    Ok(reader.summary().expect("a whole image has a summary"))
}
