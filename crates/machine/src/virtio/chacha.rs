//! The ChaCha20 block function (RFC 8439, section 2.3), for the entropy device's generator.

const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

fn quarter(s: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(16);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(12);
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(8);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(7);
}

/// One block of key stream.
fn block(key: &[u8; 32], counter: u32, nonce: &[u8; 12]) -> [u8; 64] {
    let word = |bytes: &[u8], i: usize| u32::from_le_bytes([bytes[i * 4], bytes[i * 4 + 1], bytes[i * 4 + 2], bytes[i * 4 + 3]]);
    let mut start = [0; 16];
    start[..4].copy_from_slice(&CONSTANTS);
    for i in 0..8 {
        start[4 + i] = word(key, i);
    }
    start[12] = counter;
    for i in 0..3 {
        start[13 + i] = word(nonce, i);
    }
    let mut s = start;
    for _ in 0..10 {
        quarter(&mut s, 0, 4, 8, 12);
        quarter(&mut s, 1, 5, 9, 13);
        quarter(&mut s, 2, 6, 10, 14);
        quarter(&mut s, 3, 7, 11, 15);
        quarter(&mut s, 0, 5, 10, 15);
        quarter(&mut s, 1, 6, 11, 12);
        quarter(&mut s, 2, 7, 8, 13);
        quarter(&mut s, 3, 4, 9, 14);
    }
    let mut out = [0; 64];
    for i in 0..16 {
        out[i * 4..i * 4 + 4].copy_from_slice(&s[i].wrapping_add(start[i]).to_le_bytes());
    }
    out
}

/// `len` bytes of key stream (below 256 GiB), and the key for the next time: what was given out cannot be computed from what is kept.
pub(super) fn draw(key: &mut [u8; 32], len: usize) -> Vec<u8> {
    let mut stream = Vec::with_capacity(len + 128);
    let mut counter = 0;
    while stream.len() < len + 32 {
        stream.extend(block(key, counter, &[0; 12]));
        counter = counter.wrapping_add(1);
    }
    key.copy_from_slice(&stream[..32]);
    stream.drain(..32);
    stream.truncate(len);
    stream
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_8439_test_vector() {
        let key: [u8; 32] = std::array::from_fn(|i| i as u8);
        let nonce = [0, 0, 0, 9, 0, 0, 0, 0x4a, 0, 0, 0, 0];
        let out = block(&key, 1, &nonce);
        assert_eq!(out[..16], [0x10, 0xf1, 0xe7, 0xe4, 0xd1, 0x3b, 0x59, 0x15, 0x50, 0x0f, 0xdd, 0x1f, 0xa3, 0x20, 0x71, 0xc4]);
        assert_eq!(out[48..], [0xb5, 0x12, 0x9c, 0xd1, 0xde, 0x16, 0x4e, 0xb9, 0xcb, 0xd0, 0x83, 0xe8, 0xa2, 0x50, 0x3c, 0x4e]);
    }

    #[test]
    fn the_key_moves_on() {
        let mut key = [1; 32];
        let a = draw(&mut key, 100);
        let b = draw(&mut key, 100);
        assert_eq!((a.len(), b.len()), (100, 100));
        assert_ne!(a, b);
        assert_ne!(key, [1; 32]);
    }
}
