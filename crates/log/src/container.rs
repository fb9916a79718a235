//! What recordings and images have in common: how they begin, and how reading and writing them can fail.
//!
//! ```text
//!  0        8        12               16               20           28      32
//!  | magic  | format | metadata bytes | metadata check | reserved 0 | check | metadata ...
//! ```
//! **In:** a stream of bytes. **Out:** its metadata, or an error that names the byte and says what to do.
//! **Invariants:** a stream of a newer format is told from a damaged one; no length is believed before its checksum was.
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most bytes of metadata.
pub const MAX_METADATA: usize = 1 << 20;

/// Why a recording or an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It begins with something else.
    #[error("this is not a Twinstep {what}")]
    Foreign {
        /// What it should have been.
        what: &'static str,
    },
    /// A later version of Twinstep wrote it.
    #[error("this {what} was written by a newer Twinstep (format {found}, this one reads up to {known})")]
    Newer {
        /// Recording or image.
        what: &'static str,
        /// Its format.
        found: u32,
        /// The latest format that can be read.
        known: u32,
    },
    /// Its bytes are not those that were written, or make no sense.
    #[error("byte {offset} of the {what}: {fault}")]
    Damaged {
        /// Recording or image.
        what: &'static str,
        /// Where the damaged part begins.
        offset: u64,
        /// What is wrong there.
        fault: String,
    },
    /// It ends too early.
    #[error("the {what} is cut off: {part} begins at byte {offset} and is not all there")]
    Cut {
        /// Recording or image.
        what: &'static str,
        /// Where the part that is cut begins.
        offset: u64,
        /// What is cut.
        part: &'static str,
    },
    /// The file or connection failed.
    #[error("byte {offset} of the {what} cannot be read: {source}")]
    Io {
        /// Recording or image.
        what: &'static str,
        /// Where it failed.
        offset: u64,
        /// How it failed.
        source: io::Error,
    },
}

/// Why a recording or an image cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file or connection failed; [`io::ErrorKind::StorageFull`] says that the disk is full.
    #[error("the {what} cannot be written beyond byte {offset}: {source}")]
    Io {
        /// Recording or image.
        what: &'static str,
        /// Bytes written before.
        offset: u64,
        /// How it failed.
        source: io::Error,
    },
    /// It failed before, and what came since is not in it.
    #[error("the {what} has failed before; nothing is written to it any more")]
    Failed {
        /// Recording or image.
        what: &'static str,
    },
    /// What should be written may not be in it: a mistake of the caller.
    #[error("this cannot be put into the {what}: {fault}")]
    Invalid {
        /// Recording or image.
        what: &'static str,
        /// Why not.
        fault: String,
    },
}

impl WriteError {
    /// Whether it was for want of space.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, WriteError::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

/// A kind of stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Container {
    /// How it is called in errors.
    pub what: &'static str,
    /// Its first bytes.
    pub magic: [u8; 8],
    /// The format that is written, and the latest that can be read. Formats count from 1.
    pub format: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Preamble {
    magic: [u8; 8],
    format: U32,
    metadata_length: U32,
    metadata_check: U32,
    reserved: [u8; 8],
    check: U32,
}

const _: () = {
    assert!(size_of::<Preamble>() == 32);
    assert!(offset_of!(Preamble, format) == 8);
    assert!(offset_of!(Preamble, metadata_length) == 12);
    assert!(offset_of!(Preamble, metadata_check) == 16);
    assert!(offset_of!(Preamble, check) == 28);
};

const CHECKED: usize = offset_of!(Preamble, check);

impl Container {
    /// Writes the beginning of a stream.
    pub fn begin<W: Write>(&self, output: &mut Output<W>, metadata: &[u8]) -> Result<(), WriteError> {
        if metadata.len() > MAX_METADATA {
            let fault = format!("{} bytes of metadata, over the limit of {MAX_METADATA}", metadata.len());
            return Err(WriteError::Invalid { what: self.what, fault });
        }
        let mut preamble = Preamble {
            magic: self.magic,
            format: U32::new(self.format),
            metadata_length: U32::new(metadata.len() as u32),
            metadata_check: U32::new(crc32fast::hash(metadata)),
            reserved: [0; 8],
            check: U32::ZERO,
        };
        preamble.check = U32::new(crc32fast::hash(&preamble.as_bytes()[..CHECKED]));
        output.write(preamble.as_bytes())?;
        output.write(metadata)
    }

    /// Reads the beginning of a stream; gives its metadata.
    pub fn open<R: Read>(&self, input: &mut Input<R>) -> Result<Vec<u8>, ReadError> {
        let (what, start) = (input.what, input.offset);
        let damaged = |fault: &str| ReadError::Damaged { what, offset: start, fault: fault.to_owned() };
        let mut preamble = Preamble::new_zeroed();
        // The magic alone first: a short foreign file is foreign, not cut.
        let (magic, rest) = preamble.as_mut_bytes().split_at_mut(size_of_val(&self.magic));
        let found = input.read_up_to(magic)?;
        if magic[..found] != self.magic[..found] {
            return Err(ReadError::Foreign { what: self.what });
        }
        if found < magic.len() {
            return Err(ReadError::Cut { what, offset: start, part: "the header" });
        }
        input.read(rest, start, "the header")?;
        // The format before the checksum: a newer format may have its checksum elsewhere.
        let found = preamble.format.get();
        if found > self.format {
            return Err(ReadError::Newer { what: self.what, found, known: self.format });
        }
        if crc32fast::hash(&preamble.as_bytes()[..CHECKED]) != preamble.check.get() {
            return Err(damaged("the header is damaged"));
        }
        if found == 0 {
            return Err(damaged("the header names format 0, which does not exist"));
        }
        if preamble.reserved != [0; 8] {
            return Err(damaged("reserved bytes of the header are not zero"));
        }
        let length = preamble.metadata_length.get() as usize;
        if length > MAX_METADATA {
            return Err(damaged("the header announces more metadata than there may be"));
        }
        let offset = input.offset;
        let metadata = input.read_vec(length, offset, "the metadata")?;
        if crc32fast::hash(&metadata) != preamble.metadata_check.get() {
            return Err(ReadError::Damaged { what, offset, fault: "the metadata is damaged".to_owned() });
        }
        Ok(metadata)
    }
}

/// Metadata to bytes.
pub(crate) fn encode_metadata<T: minicbor::Encode<()>>(metadata: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    minicbor::encode(metadata, &mut bytes).expect("writing to memory does not fail");
    bytes
}

/// Metadata from the bytes that were read last from `input`. Fields this version does not know are passed over; bytes after the
/// metadata are an error.
pub(crate) fn decode_metadata<'b, R, T>(input: &Input<R>, bytes: &'b [u8]) -> Result<T, ReadError>
where
    T: minicbor::Decode<'b, ()>,
{
    let mut decoder = minicbor::Decoder::new(bytes);
    let metadata = decoder.decode().map_err(|error| error.to_string());
    let fault = match metadata {
        Ok(metadata) if decoder.position() == bytes.len() => return Ok(metadata),
        Ok(_) => "there are bytes after it".to_owned(),
        Err(error) => error,
    };
    let offset = input.offset - bytes.len() as u64;
    Err(ReadError::Damaged { what: input.what, offset, fault: format!("the metadata makes no sense: {fault}") })
}

/// A reader that knows where it is.
#[derive(Debug)]
pub(crate) struct Input<R> {
    pub inner: R,
    /// Bytes read since the stream's beginning.
    pub offset: u64,
    pub what: &'static str,
}

impl<R: Read> Input<R> {
    /// Fills `bytes`, or says that `part`, which begins at `start`, is cut.
    pub fn read(&mut self, bytes: &mut [u8], start: u64, part: &'static str) -> Result<(), ReadError> {
        if self.read_up_to(bytes)? < bytes.len() {
            return Err(ReadError::Cut { what: self.what, offset: start, part });
        }
        Ok(())
    }

    /// Fills as much of `bytes` as there is before the end of the stream; says how much.
    pub fn read_up_to(&mut self, bytes: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.inner.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(read) => {
                    filled += read;
                    self.offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ReadError::Io { what: self.what, offset: self.offset, source }),
            }
        }
        Ok(filled)
    }

    /// Reads `length` bytes. Memory grows with what comes, not with what was announced.
    pub fn read_vec(&mut self, length: usize, start: u64, part: &'static str) -> Result<Vec<u8>, ReadError> {
        const STEP: usize = 256 << 10;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let filled = bytes.len();
            bytes.resize(length.min(filled + STEP), 0);
            self.read(&mut bytes[filled..], start, part)?;
        }
        Ok(bytes)
    }
}

impl<R: Seek> Input<R> {
    /// Goes to an offset.
    pub fn seek(&mut self, offset: u64) -> Result<(), ReadError> {
        let sought = self.inner.seek(SeekFrom::Start(offset));
        sought.map_err(|source| ReadError::Io { what: self.what, offset, source })?;
        self.offset = offset;
        Ok(())
    }
}

/// A writer that knows where it is, and that writes nothing more once it has failed (a gap would pass for damage).
#[derive(Debug)]
pub(crate) struct Output<W> {
    inner: W,
    /// Bytes written since the stream's beginning.
    pub offset: u64,
    pub what: &'static str,
    failed: bool,
}

impl<W: Write> Output<W> {
    pub fn new(inner: W, what: &'static str) -> Self {
        Self { inner, offset: 0, what, failed: false }
    }

    /// Writes all of `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.attempt(|inner| inner.write_all(bytes))?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Flushes the writer below.
    pub fn flush(&mut self) -> Result<(), WriteError> {
        self.attempt(|inner| inner.flush())
    }

    /// Whether it still can be written to.
    pub fn check(&self) -> Result<(), WriteError> {
        if self.failed { Err(WriteError::Failed { what: self.what }) } else { Ok(()) }
    }

    fn attempt(&mut self, act: impl FnOnce(&mut W) -> io::Result<()>) -> Result<(), WriteError> {
        self.check()?;
        act(&mut self.inner).map_err(|source| {
            self.failed = true;
            WriteError::Io { what: self.what, offset: self.offset, source }
        })
    }

    /// The refusal of something that may not be written here. Nothing was written of it.
    pub fn invalid(&self, fault: impl Into<String>) -> WriteError {
        WriteError::Invalid { what: self.what, fault: fault.into() }
    }

    pub fn into_inner(self) -> W {
        self.inner
    }
}
