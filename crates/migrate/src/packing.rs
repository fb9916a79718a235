//! Packed bytes, for units that travel outside of a copy's own stream.
//!
//! *In*: bytes. *Out*: fewer bytes, and the same again. *Invariant*: what is unpacked has exactly the length that was expected, whatever was packed.

use thiserror::Error;

/// What was packed cannot be unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PackingError {
    /// It was not made by [`pack`].
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It is of something else.
    #[error("it has {0} bytes instead of {1}")]
    Length(usize, usize),
}

/// Packs bytes (LZ4 block format). What does not compress becomes longer by one part in 255 and a few bytes.
pub fn pack(bytes: &[u8]) -> Vec<u8> {
    lz4_flex::block::compress(bytes)
}

/// The bytes again, of which there have to be `length`; no more memory than that is taken.
///
/// # Errors
/// If there is something else.
pub fn unpack(packed: &[u8], length: usize) -> Result<Vec<u8>, PackingError> {
    let bytes = lz4_flex::block::decompress(packed, length).map_err(|e| PackingError::Damaged(e.to_string()))?;
    if bytes.len() == length { Ok(bytes) } else { Err(PackingError::Length(bytes.len(), length)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_is_there_again_and_nothing_else() {
        let bytes: Vec<u8> = (0..5000_u32).map(|n| ((n * n) >> 7) as u8).collect();
        let packed = pack(&bytes);
        assert_eq!(unpack(&packed, 5000), Ok(bytes));
        assert_eq!(unpack(&packed, 5001), Err(PackingError::Length(5000, 5001)));
        assert!(unpack(&packed, 4999).is_err());
        assert!(unpack(&packed[..packed.len() / 2], 5000).is_err());
    }
}
