//! The test's own random numbers: splitmix64. The same seed gives the same cases everywhere.

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A stream for `seed`; streams of different `lane`s do not resemble each other.
    pub fn new(seed: u64, lane: u64) -> Self {
        let mut rng = Self(seed ^ lane.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        rng
    }
    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number in `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
    /// A number in `low..=high`.
    pub fn within(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as u64) as i64
    }
    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
    /// A 64-bit value of the kind that finds mistakes: extremes, single bits, small numbers, or anything.
    pub fn value(&mut self) -> u64 {
        match self.below(10) {
            0 => self.pick(&[0, 1, 2, 7, 8, 31, 32, 63, 64, u64::MAX, u64::MAX - 1]),
            1 => self.pick(&[
                0x7f,
                0x80,
                0xff,
                0x7fff,
                0x8000,
                0xffff,
                0x7fff_ffff,
                0x8000_0000,
                0xffff_ffff,
                i64::MAX as u64,
                1 << 63,
            ]),
            2 => 1 << self.below(64),
            3 => self.below(256),
            4 => self.within(-300, 300) as u64,
            5 => self.next() as u32 as u64,
            6 => self.next() as i32 as u64,
            _ => self.next(),
        }
    }
    /// The bits of a double (or two floats) that is often special: zero, infinity, NaN, denormal, small integers.
    pub fn double(&mut self) -> u64 {
        match self.below(8) {
            0 => self.pick(&[
                0,
                1 << 63,
                0x7ff0 << 48,
                0xfff0 << 48,
                0x7ff8 << 48,
                0xfff8 << 48,
                0x7ff0_0000_0000_0001,
                1,
                0x000f_ffff_ffff_ffff,
                0x7fef_ffff_ffff_ffff,
            ]),
            1 => (self.within(-1000, 1000) as f64).to_bits(),
            2 => (self.within(i64::from(i32::MIN), i64::from(i32::MAX)) as f64 / 1024.0).to_bits(),
            3 => (u64::from(self.float()) << 32) | u64::from(self.float()),
            4 => (self.next() & !(0x7ff << 52)) | ((0x3ff + self.within(-70, 70)) as u64) << 52,
            5 => self.value(),
            _ => self.next(),
        }
    }
    /// The bits of a float that is often special.
    pub fn float(&mut self) -> u32 {
        match self.below(5) {
            0 => self.pick(&[
                0,
                1 << 31,
                0x7f80_0000,
                0xff80_0000,
                0x7fc0_0000,
                0xffc0_0000,
                0x7f80_0001,
                1,
                0x007f_ffff,
                0x7f7f_ffff,
            ]),
            1 => (self.within(-1000, 1000) as f32).to_bits(),
            2 => (self.next() as u32 & !(0xff << 23)) | ((127 + self.within(-40, 40)) as u32) << 23,
            _ => self.next() as u32,
        }
    }
    /// An 80-bit x87 value, often special.
    pub fn extended(&mut self) -> [u8; 10] {
        let mantissa;
        let exponent: u64;
        match self.below(8) {
            0 => {
                mantissa = self.pick(&[0, 1 << 63, 0xc000 << 48, 0xa000 << 48, 1, u64::MAX]);
                exponent = self.pick(&[0, 0x7fff, 0x8000, 0xffff, 0x3fff]);
            }
            1 => {
                mantissa = self.next();
                exponent = self.next();
            }
            2 => {
                mantissa = (1 << 63) | (self.below(1 << 20) << 43);
                exponent = (0x3fff + self.within(0, 20)) as u64 | (self.next() & 0x8000);
            }
            _ => {
                mantissa = self.next() | 1 << 63;
                exponent = (0x3fff + self.within(-70, 70)) as u64 | (self.next() & 0x8000);
            }
        }
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&u64::to_le_bytes(mantissa));
        bytes[8..].copy_from_slice(&(exponent as u16).to_le_bytes());
        bytes
    }
}
