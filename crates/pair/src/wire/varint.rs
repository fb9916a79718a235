//! Numbers in as few bytes as they need: seven bits a byte, lowest first, the high bit set on all but the last (LEB128).
//!
//! In: numbers, or bytes. Out: the other. Invariant: a number has one form, the shortest; another one is refused.

/// Bytes of the largest number.
pub(super) const MAX_BYTES: usize = 10;

/// Appends a number.
pub(super) fn put(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// So many bytes it takes.
pub(super) fn bytes_of(number: u64) -> usize {
    (64 - (number | 1).leading_zeros() as usize).div_ceil(7)
}

/// Takes a payload apart: what is left of it.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    /// The next number; or what is wrong with it.
    pub(super) fn number(&mut self) -> Result<u64, &'static str> {
        let mut number = 0;
        for at in 0..MAX_BYTES {
            let byte = *self.0.get(at).ok_or("a number is cut off")?;
            let bits = u64::from(byte & 0x7f);
            if at == MAX_BYTES - 1 && bits > 1 {
                return Err("a number is too large");
            }
            number |= bits << (7 * at);
            if byte & 0x80 == 0 {
                if byte == 0 && at > 0 {
                    return Err("a number is longer than it need be");
                }
                self.0 = &self.0[at + 1..];
                return Ok(number);
            }
        }
        Err("a number is too large")
    }
    /// The next bytes; or that there are not so many.
    pub(super) fn bytes(&mut self, n: usize) -> Result<&'a [u8], &'static str> {
        let (bytes, rest) = self.0.split_at_checked(n).ok_or("a record is cut off")?;
        self.0 = rest;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_one_form() {
        for number in (0..64).flat_map(|bit| [(1u64 << bit) - 1, 1 << bit]).chain([u64::MAX]) {
            let mut bytes = Vec::new();
            put(number, &mut bytes);
            assert_eq!(bytes.len(), bytes_of(number), "{number}");
            let mut reader = Reader(&bytes);
            assert_eq!((reader.number(), reader.0.len()), (Ok(number), 0));
            for cut in 0..bytes.len() {
                assert_eq!(Reader(&bytes[..cut]).number(), Err("a number is cut off"));
            }
            // The same number with a zero behind it.
            if bytes.len() < MAX_BYTES {
                *bytes.last_mut().unwrap() |= 0x80;
                bytes.push(0);
                assert_eq!(Reader(&bytes).number(), Err("a number is longer than it need be"));
            }
        }
        assert_eq!(Reader(&[0xff; 11]).number(), Err("a number is too large"));
        let over = [&[0xff; 9][..], &[2]].concat();
        assert_eq!(Reader(&over).number(), Err("a number is too large"));
    }
}
