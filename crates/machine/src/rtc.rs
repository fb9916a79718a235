//! CMOS real-time clock (MC146818): the wall clock as a PC guest reads it.
//!
//! **In:** the wall-clock time at guest time 0, guest time, port accesses. **Out:** date and time registers. **Invariant:** the time shown is wall clock +
//! guest time + what the guest set it off by; an update is never in progress. No alarm and no periodic interrupt: the ACPI table names no
//! interrupt for it, and Linux then does not use them. Reference: Motorola MC146818A data sheet.
use crate::payload::{Payload, Payloads, RestoreError};
use minicbor::{Decode, Encode};

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 10;
const STATUS_B: u8 = 11;
const STATUS_C: u8 = 12;
const STATUS_D: u8 = 13;
/// Where PCs keep the century (ACPI FADT field CENTURY).
pub(crate) const CENTURY: u8 = 0x32;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 4;
const B_24_HOURS: u8 = 2;
const CMOS: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct State {
    #[n(0)]
    index: u8,
    #[cbor(n(1), with = "minicbor::bytes")]
    cmos: Vec<u8>,
    /// Wall-clock time at guest time 0, nanoseconds since 1970.
    #[n(2)]
    wall_ns: u64,
    /// Seconds the guest set the clock off by.
    #[n(3)]
    offset_s: i64,
}

/// The clock and its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rtc {
    s: State,
}

/// Civil date and time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hours: u8,
    minutes: u8,
    seconds: u8,
}

/// Days since 1970-01-01 of a proleptic Gregorian date. Years begin in March here, so that leap days come last.
fn days_of(year: i64, month: u8, day: u8) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (i64::from(month) + 9) % 12;
    let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * month + 2) / 5 + i64::from(day) - 1;
    era * 146_097 + year * 365 + year / 4 - year / 100 + day_of_year - 719_468
}

impl Date {
    fn from_unix(seconds: i64) -> Self {
        let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let shifted = days + 719_468;
        let (era, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        Self {
            year: year + era * 400 + i64::from(month >= 10),
            month: ((month + 2) % 12 + 1) as u8,
            day: (day - (153 * month + 2) / 5 + 1) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            hours: (of_day / 3600) as u8,
            minutes: (of_day / 60 % 60) as u8,
            seconds: (of_day % 60) as u8,
        }
    }
    fn to_unix(self) -> i64 {
        days_of(self.year, self.month, self.day) * 86_400
            + i64::from(self.hours) * 3600
            + i64::from(self.minutes) * 60
            + i64::from(self.seconds)
    }
}

impl Rtc {
    const KIND: &'static str = "rtc";
    const VERSION: u16 = 1;

    pub(crate) fn new() -> Self {
        let mut cmos = vec![0; CMOS];
        cmos[usize::from(STATUS_A)] = 0x26;
        cmos[usize::from(STATUS_B)] = B_24_HOURS;
        cmos[usize::from(STATUS_D)] = 0x80;
        Self { s: State { index: 0, cmos, wall_ns: 0, offset_s: 0 } }
    }

    /// Wall-clock time at guest time 0.
    pub(crate) fn set_wall_clock(&mut self, ns: u64) {
        self.s.wall_ns = ns;
    }
    /// Wall-clock time at guest time 0.
    pub(crate) fn wall_clock(&self) -> u64 {
        self.s.wall_ns
    }

    fn unix(&self, now_ns: u64) -> i64 {
        (self.s.wall_ns.saturating_add(now_ns) / 1_000_000_000) as i64 + self.s.offset_s
    }
    fn status_b(&self) -> u8 {
        self.s.cmos[usize::from(STATUS_B)]
    }
    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }
    fn decode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 { value } else { (value >> 4).wrapping_mul(10).wrapping_add(value & 15) }
    }
    fn encode_hours(&self, hours: u8) -> u8 {
        if self.status_b() & B_24_HOURS != 0 {
            return self.encode(hours);
        }
        let twelve = if hours.is_multiple_of(12) { 12 } else { hours % 12 };
        self.encode(twelve) | if hours >= 12 { 0x80 } else { 0 }
    }
    fn decode_hours(&self, value: u8) -> u8 {
        if self.status_b() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// Copies the running time to the registers.
    fn update(&mut self, now_ns: u64) {
        let date = Date::from_unix(self.unix(now_ns));
        let registers = [
            (SECONDS, self.encode(date.seconds)),
            (MINUTES, self.encode(date.minutes)),
            (HOURS, self.encode_hours(date.hours)),
            (WEEKDAY, date.weekday),
            (DAY, self.encode(date.day)),
            (MONTH, self.encode(date.month)),
            (YEAR, self.encode(date.year.rem_euclid(100) as u8)),
            (CENTURY, self.encode(date.year.div_euclid(100).rem_euclid(100) as u8)),
        ];
        for (register, value) in registers {
            self.s.cmos[usize::from(register)] = value;
        }
    }

    /// Takes the time from the registers. Nonsense is left alone.
    fn set(&mut self, now_ns: u64) {
        let at = |register: u8| self.s.cmos[usize::from(register)];
        let date = Date {
            year: i64::from(self.decode(at(CENTURY))) * 100 + i64::from(self.decode(at(YEAR))),
            month: self.decode(at(MONTH)),
            day: self.decode(at(DAY)),
            weekday: 1,
            hours: self.decode_hours(at(HOURS)),
            minutes: self.decode(at(MINUTES)),
            seconds: self.decode(at(SECONDS)),
        };
        let sane = (1..=12).contains(&date.month)
            && (1..=31).contains(&date.day)
            && date.hours < 24
            && date.minutes < 60
            && date.seconds < 60;
        if sane {
            self.s.offset_s += date.to_unix() - self.unix(now_ns);
        }
    }

    fn is_time(register: u8) -> bool {
        matches!(register, SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY)
    }

    /// Reads port 0x70 (offset 0) or 0x71.
    pub(crate) fn read(&mut self, offset: u16, now_ns: u64) -> u8 {
        if offset == 0 {
            return 0xff;
        }
        let register = self.s.index;
        if Self::is_time(register) && self.status_b() & B_SET == 0 {
            self.update(now_ns);
        }
        self.s.cmos[usize::from(register)]
    }

    /// Writes port 0x70 (offset 0) or 0x71.
    pub(crate) fn write(&mut self, offset: u16, value: u8, now_ns: u64) {
        if offset == 0 {
            self.s.index = value & 0x7f;
            return;
        }
        let register = self.s.index;
        let held = self.status_b() & B_SET != 0;
        match register {
            // Update-in-progress is read-only, C and D are read-only.
            STATUS_A => self.s.cmos[usize::from(register)] = value & 0x7f,
            STATUS_C | STATUS_D => {}
            STATUS_B => {
                if !held && value & B_SET != 0 {
                    self.update(now_ns);
                }
                // A change of number format takes effect for the registers written under the new one.
                self.s.cmos[usize::from(register)] = value;
                if held && value & B_SET == 0 {
                    self.set(now_ns);
                }
            }
            _ => {
                if Self::is_time(register) && !held {
                    self.update(now_ns);
                }
                self.s.cmos[usize::from(register)] = value;
                if Self::is_time(register) && !held {
                    self.set(now_ns);
                }
            }
        }
    }

    pub(crate) fn save(&self) -> Payload {
        Payload::encode(Self::KIND, Self::VERSION, &self.s)
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let s: State = payload.decode()?;
        // Four centuries of BCD years bound what a guest can set.
        if s.cmos.len() != CMOS || s.index >= CMOS as u8 || s.offset_s.unsigned_abs() > 1 << 50 {
            return Err(payload.invalid("out of range"));
        }
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(rtc: &mut Rtc, register: u8, now: u64) -> u8 {
        rtc.write(0, register, now);
        rtc.read(1, now)
    }
    fn put(rtc: &mut Rtc, register: u8, value: u8, now: u64) {
        rtc.write(0, register, now);
        rtc.write(1, value, now);
    }

    #[test]
    fn dates_round_trip() {
        for seconds in [0, 951_782_399, 951_782_400, 1_709_164_800, 4_102_444_799, 1_795_246_261] {
            assert_eq!(Date::from_unix(seconds).to_unix(), seconds);
        }
        let d = Date::from_unix(1_709_208_000); // Thu 2024-02-29 12:00:00
        assert_eq!((d.year, d.month, d.day, d.weekday, d.hours), (2024, 2, 29, 5, 12));
    }

    #[test]
    fn shows_wall_clock_plus_guest_time() {
        let mut rtc = Rtc::new();
        rtc.set_wall_clock(1_709_208_000_000_000_000);
        let now = 83_500_000_000;
        assert_eq!(get(&mut rtc, SECONDS, now), 0x23);
        assert_eq!(get(&mut rtc, MINUTES, now), 0x01);
        assert_eq!(get(&mut rtc, HOURS, now), 0x12);
        assert_eq!(get(&mut rtc, YEAR, now), 0x24);
        assert_eq!(get(&mut rtc, CENTURY, now), 0x20);
        assert_eq!(get(&mut rtc, STATUS_A, now) & 0x80, 0);
        assert_eq!(get(&mut rtc, STATUS_D, now), 0x80);
    }

    #[test]
    fn can_be_set() {
        let mut rtc = Rtc::new();
        rtc.set_wall_clock(1_709_208_000_000_000_000);
        put(&mut rtc, STATUS_B, B_SET | B_24_HOURS, 0);
        put(&mut rtc, HOURS, 0x23, 0);
        put(&mut rtc, STATUS_B, B_24_HOURS, 0);
        assert_eq!(get(&mut rtc, HOURS, 1_000_000_000), 0x23);
        assert_eq!(get(&mut rtc, SECONDS, 1_000_000_000), 1);
        put(&mut rtc, STATUS_B, 0, 0);
        assert_eq!(get(&mut rtc, HOURS, 0), 0x91, "11 p.m. in BCD");
        put(&mut rtc, MONTH, 0x77, 0);
        assert_eq!(get(&mut rtc, MONTH, 0), 2, "nonsense is ignored");
    }

    #[test]
    fn state_survives_saving() {
        let mut rtc = Rtc::new();
        put(&mut rtc, 0x40, 9, 0);
        let mut back = Rtc::new();
        back.restore(&mut Payloads::new(vec![rtc.save()]).unwrap()).unwrap();
        assert_eq!(back, rtc);
        rtc.s.cmos.pop();
        assert!(back.restore(&mut Payloads::new(vec![rtc.save()]).unwrap()).is_err());
    }
}
