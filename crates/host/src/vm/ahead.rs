//! Pages that are sent to the standby ahead of a resync's delta, while the guest runs: only needed if more differs than can be sent while it stands still.
//!
//! *In*: on the primary, pages; on the standby, the bytes of the image of a resync. *Out*: pieces; on the standby, the pages as they were sent last, and the delta. *Invariant*: the standby's machine is
//! not touched before the delta is whole, since it may have to go live; memory is no more than its RAM's, and what is not whole or names a page that is not there is refused.
//!
//! The image of a resync is pieces of kind 4, each of one page: kind u8, 3 zero bytes, length u32; page u32, its bytes packed (LZ4 block), or nothing if they are all zero. Then a head of kind 5
//! and length 0, and the delta, which goes to the end.
use std::collections::BTreeMap;

use twinstep_machine::PAGE_SIZE;
use twinstep_migrate::layout::is_zero;
use twinstep_migrate::packing;

use crate::error::{Context, Error, Result};

const PAGE: u8 = 4;
const DELTA: u8 = 5;
const HEAD_BYTES: usize = 8;
/// The longest piece: a number, and a page that does not compress.
const MAX_PIECE_BYTES: usize = 4 + PAGE_SIZE as usize + PAGE_SIZE as usize / 128 + 64;

fn head(kind: u8, length: usize) -> [u8; HEAD_BYTES] {
    let [a, b, c, d] = (length as u32).to_le_bytes();
    [kind, 0, 0, 0, a, b, c, d]
}

/// Appends a page.
pub(super) fn put_page(page: usize, bytes: &[u8], to: &mut Vec<u8>) {
    let data = if is_zero(bytes) { Vec::new() } else { packing::pack(bytes) };
    to.extend(head(PAGE, 4 + data.len()));
    to.extend((page as u32).to_le_bytes());
    to.extend(data);
}

/// What precedes the delta.
pub(super) fn delta_head() -> [u8; HEAD_BYTES] {
    head(DELTA, 0)
}

/// A page's number and its bytes.
type Page = (usize, Vec<u8>);

/// What came so far of the image of a resync.
#[derive(Debug, Default)]
pub(super) struct Staged {
    /// The piece that is not whole.
    rest: Vec<u8>,
    pages: BTreeMap<usize, Vec<u8>>,
    delta: Option<Vec<u8>>,
}

impl Staged {
    /// Takes bytes in, for a machine of so many pages.
    pub(super) fn push(&mut self, bytes: &[u8], pages: usize) -> Result<()> {
        if let Some(delta) = &mut self.delta {
            delta.extend(bytes);
            return Ok(());
        }
        self.rest.extend(bytes);
        let mut at = 0;
        while let Some((head, data)) = self.rest[at..].split_first_chunk::<HEAD_BYTES>() {
            let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
            match head[0] {
                DELTA if length == 0 => {
                    self.delta = Some(data.to_vec());
                    self.rest = Vec::new();
                    return Ok(());
                }
                PAGE if (4..=MAX_PIECE_BYTES).contains(&length) => {
                    let Some(piece) = data.get(..length) else { break };
                    let page = u32::from_le_bytes([piece[0], piece[1], piece[2], piece[3]]) as usize;
                    if page >= pages {
                        return Err(Error::new(format!("the primary sends page {page}; there are {pages}")));
                    }
                    self.pages.insert(page, piece[4..].to_vec());
                    at += HEAD_BYTES + length;
                }
                kind => {
                    return Err(Error::new(format!(
                        "the image of the resync has a piece of kind {kind} and {length} bytes, which cannot be"
                    )));
                }
            }
        }
        self.rest.drain(..at);
        Ok(())
    }
    /// The pages, unpacked one after the other, and the delta.
    pub(super) fn finish(self) -> Result<(impl Iterator<Item = Result<Page>>, Vec<u8>)> {
        let delta = self.delta.ok_or_else(|| Error::new("the image of the resync ends before its delta"))?;
        let unpack = |(page, data): Page| match &data[..] {
            [] => Ok((page, vec![0; PAGE_SIZE as usize])),
            data => {
                let bytes = packing::unpack(data, PAGE_SIZE as usize);
                Ok((page, bytes.what(format!("page {page} of the primary's RAM cannot be used"))?))
            }
        };
        Ok((self.pages.into_iter().map(unpack), delta))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The image of some pages and a delta.
    fn image() -> Vec<u8> {
        let mut bytes = Vec::new();
        put_page(7, &[1; 4096], &mut bytes);
        put_page(3, &[0; 4096], &mut bytes);
        put_page(7, &std::array::from_fn::<u8, 4096, _>(|i| ((i * i) >> 3) as u8), &mut bytes);
        bytes.extend(delta_head());
        bytes.extend(b"delta");
        bytes
    }

    #[test]
    fn pages_come_as_they_were_sent_last() {
        let bytes = image();
        for length in [1, 7, 100, bytes.len()] {
            let mut staged = Staged::default();
            bytes.chunks(length).for_each(|part| staged.push(part, 8).unwrap());
            let (pages, delta) = staged.finish().unwrap();
            let pages: Vec<_> = pages.map(Result::unwrap).collect();
            assert_eq!((pages[0].0, pages[1].0, pages.len(), &delta[..]), (3, 7, 2, &b"delta"[..]));
            assert!(pages[0].1 == [0; 4096] && pages[1].1[4095] == ((4095 * 4095) >> 3) as u8);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut staged = Staged::default();
        assert!(staged.push(&image(), 7).unwrap_err().to_string().contains("page 7; there are 7"));
        let mut staged = Staged::default();
        staged.push(&image()[..100], 8).unwrap();
        assert!(staged.finish().is_err(), "no delta");
        for strange in [head(9, 4), head(PAGE, 3), head(PAGE, 1 << 20), head(DELTA, 1)] {
            assert!(Staged::default().push(&strange, 8).is_err(), "{strange:?}");
        }
    }
}
