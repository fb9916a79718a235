//! How each [`Input`] is laid out in an entry's payload. The one place to touch when the door gets another input.
//!
//! **In / out:** an input, or an entry kind and its payload bytes.
//! **Invariant:** every input has exactly one encoding, and only that one decodes (no padding, no second way to write a number),
//! so two logs are equal if and only if their bytes are.
use crate::entry::EntryKind;
use twinstep_machine::door::Input;

/// The kind of entry that stores `input`.
pub(crate) fn kind(input: &Input) -> EntryKind {
    match input {
        Input::Clock { .. } => EntryKind::Clock,
        Input::NetRx { .. } => EntryKind::NetRx,
        Input::Serial(_) => EntryKind::Serial,
        Input::Console(_) => EntryKind::Console,
        Input::Seed(_) => EntryKind::Seed,
        Input::WallClock(_) => EntryKind::WallClock,
        Input::PowerButton => EntryKind::PowerButton,
        Input::NetRxGso { .. } => EntryKind::NetRxGso,
        Input::DiskDone { .. } => EntryKind::DiskDone,
    }
}

/// Appends the payload of `input`.
pub(crate) fn encode(input: &Input, out: &mut Vec<u8>) {
    match input {
        Input::Clock { advance_to_ns, picoseconds_per_instruction } => {
            encode_clock(*advance_to_ns, *picoseconds_per_instruction, out);
        }
        Input::NetRx { nic, frame } => {
            out.push(*nic);
            out.extend_from_slice(frame);
        }
        Input::Serial(bytes) | Input::Console(bytes) => out.extend_from_slice(bytes),
        Input::Seed(seed) => out.extend_from_slice(seed),
        Input::WallClock(ns) => out.extend_from_slice(&ns.to_le_bytes()),
        Input::PowerButton => {}
        Input::NetRxGso { nic, frame, segment_size } => {
            out.push(*nic);
            out.extend_from_slice(&segment_size.to_le_bytes());
            out.extend_from_slice(frame);
        }
        Input::DiskDone { disk, request, data } => {
            out.push(*disk);
            out.extend_from_slice(&request.to_le_bytes());
            out.extend_from_slice(data);
        }
    }
}

/// The input whose payload this is; or what is wrong with the payload.
pub(crate) fn decode(kind: EntryKind, payload: &[u8]) -> Result<Input, &'static str> {
    match kind {
        EntryKind::Clock => decode_clock(payload),
        EntryKind::NetRx => {
            let (nic, frame) = payload.split_first().ok_or("no network card is named")?;
            Ok(Input::NetRx { nic: *nic, frame: frame.to_vec() })
        }
        EntryKind::Serial => Ok(Input::Serial(payload.to_vec())),
        EntryKind::Console => Ok(Input::Console(payload.to_vec())),
        EntryKind::Seed => Ok(Input::Seed(payload.try_into().map_err(|_| "a seed has 32 bytes")?)),
        EntryKind::WallClock => {
            Ok(Input::WallClock(u64::from_le_bytes(payload.try_into().map_err(|_| "a wall clock time has 8 bytes")?)))
        }
        EntryKind::PowerButton if payload.is_empty() => Ok(Input::PowerButton),
        EntryKind::PowerButton => Err("a power button press has no payload"),
        EntryKind::NetRxGso => match payload {
            &[nic, low, high, ref frame @ ..] => {
                Ok(Input::NetRxGso { nic, frame: frame.to_vec(), segment_size: u16::from_le_bytes([low, high]) })
            }
            _ => Err("no network card and no size of pieces are named"),
        },
        EntryKind::DiskDone => match payload.split_first_chunk::<9>() {
            Some(([disk, request @ ..], data)) => {
                Ok(Input::DiskDone { disk: *disk, request: u64::from_le_bytes(*request), data: data.to_vec() })
            }
            None => Err("no disk and no request are named"),
        },
        EntryKind::Output | EntryKind::Digest | EntryKind::Progress | EntryKind::End => Err("not an input"),
    }
}

/// A busy machine logs a thousand of these a second, so they are kept short: the rate in groups of seven bits (two bytes up to
/// 16383 ps), then the time in as many bytes as it needs (six up to three days, seven up to two years).
fn encode_clock(advance_to_ns: u64, picoseconds_per_instruction: u32, out: &mut Vec<u8>) {
    let mut rate = picoseconds_per_instruction;
    while rate >= 0x80 {
        out.push(rate as u8 | 0x80);
        rate >>= 7;
    }
    out.push(rate as u8);
    let time_bytes = 8 - advance_to_ns.leading_zeros() as usize / 8;
    out.extend_from_slice(&advance_to_ns.to_le_bytes()[..time_bytes]);
}

fn decode_clock(payload: &[u8]) -> Result<Input, &'static str> {
    let mut rate = 0u64;
    let mut rate_bytes = 0;
    loop {
        let byte = *payload.get(rate_bytes).ok_or("the clock rate is cut short")?;
        rate |= u64::from(byte & 0x7f) << (7 * rate_bytes);
        rate_bytes += 1;
        if byte & 0x80 == 0 {
            if byte == 0 && rate_bytes > 1 {
                return Err("the clock rate has a leading zero");
            }
            break;
        }
        if rate_bytes == 5 {
            return Err("the clock rate is too long");
        }
    }
    let picoseconds_per_instruction = u32::try_from(rate).map_err(|_| "the clock rate is too large")?;
    let time = &payload[rate_bytes..];
    if time.len() > 8 {
        return Err("the clock time is too long");
    }
    if time.last() == Some(&0) {
        return Err("the clock time has a leading zero");
    }
    let mut bytes = [0; 8];
    bytes[..time.len()].copy_from_slice(time);
    Ok(Input::Clock { advance_to_ns: u64::from_le_bytes(bytes), picoseconds_per_instruction })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_extremes() {
        for advance_to_ns in [0, 1, 255, 256, (1 << 48) - 1, 1 << 48, u64::MAX] {
            for picoseconds_per_instruction in [0, 1, 127, 128, 16383, 16384, u32::MAX] {
                let input = Input::Clock { advance_to_ns, picoseconds_per_instruction };
                let mut out = Vec::new();
                encode(&input, &mut out);
                assert_eq!(decode(EntryKind::Clock, &out), Ok(input));
            }
        }
    }

    #[test]
    fn clock_has_one_encoding_only() {
        assert!(decode(EntryKind::Clock, &[]).is_err());
        assert!(decode(EntryKind::Clock, &[0x80]).is_err());
        assert!(decode(EntryKind::Clock, &[0x81, 0x00]).is_err(), "rate 1 in two bytes");
        assert!(decode(EntryKind::Clock, &[0xff, 0xff, 0xff, 0xff, 0x1f]).is_err(), "33 bits of rate");
        assert!(decode(EntryKind::Clock, &[0xff, 0xff, 0xff, 0xff, 0xff, 0x01]).is_err());
        assert!(decode(EntryKind::Clock, &[1, 5, 0]).is_err(), "time 5 in two bytes");
        assert!(decode(EntryKind::Clock, &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1]).is_err(), "nine bytes of time");
    }
}
