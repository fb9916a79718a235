//! In what two outputs differ, for people.
//!
//! *In*: what each side made. *Out*: a sentence or two: what kind of output, whose connection, which bytes. *Invariant*: whatever the bytes are, there is
//! a text, of bounded length.
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use twinstep_machine::Output;

/// Ranges of bytes that are named.
const MAX_RANGES: usize = 4;
/// Bytes that are shown around the first difference.
const SHOWN: usize = 16;

/// What a side made, and at which position.
pub type Made<'a> = Option<(u64, &'a Output)>;

/// What two sides made instead of one another.
pub fn describe(output: u64, primary: Made, secondary: Made) -> String {
    let mut text = format!("output {output} differs: ");
    match (primary, secondary) {
        (Some((position, ours)), Some((at, theirs))) => {
            let _ = write!(text, "the primary made {} at position {position}, the secondary {}", what(ours), what(theirs));
            let _ = if at == position { write!(text, " at the same") } else { write!(text, " at position {at}") };
            text.push_str(&bytes_differ(bytes(ours), bytes(theirs)));
        }
        (Some((position, ours)), None) => {
            let _ = write!(text, "the primary made {} at position {position}, the secondary nothing", what(ours));
        }
        (None, Some((at, theirs))) => {
            let _ = write!(text, "the secondary made {} at position {at}, the primary nothing", what(theirs));
        }
        (None, None) => text.push_str("what was made is not known any more"),
    }
    text
}

fn bytes(output: &Output) -> &[u8] {
    match output {
        Output::NetTx { frame, .. } | Output::NetTxGso { frame, .. } => frame,
        Output::Serial(bytes) | Output::Console(bytes) | Output::DiskWrite { data: bytes, .. } => bytes,
        Output::DiskFlush { .. } => &[],
    }
}

/// What an output is: its kind, its length, whose it is.
pub fn what(output: &Output) -> String {
    let n = bytes(output).len();
    match output {
        Output::NetTx { nic, frame } => format!("a frame of {n} bytes at card {nic} ({})", conversation(frame)),
        Output::NetTxGso { nic, frame, .. } => format!("a large segment of {n} bytes at card {nic} ({})", conversation(frame)),
        Output::DiskWrite { disk, offset, .. } => format!("a write of {n} bytes at {offset} of shared disk {disk}"),
        Output::DiskFlush { disk, .. } => format!("a flush of shared disk {disk}"),
        Output::Serial(_) => format!("{n} bytes at the serial port"),
        Output::Console(_) => format!("{n} bytes at the console"),
    }
}

/// Whose conversation an Ethernet frame belongs to.
fn conversation(frame: &[u8]) -> String {
    let pair = |at: usize| frame.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let Some(kind) = pair(12) else { return "cut off".into() };
    let (protocol, from, to, next) = match (kind, frame.get(14)) {
        (0x0800, Some(first)) if frame.len() >= 34 => {
            let address = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).expect("four bytes")).to_string();
            (frame[23], address(26), address(30), 14 + usize::from(first & 15) * 4)
        }
        (0x86dd, _) if frame.len() >= 54 => {
            let address =
                |at: usize| format!("[{}]", Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).expect("sixteen bytes")));
            (frame[20], address(22), address(38), 54)
        }
        (0x0806, _) => return "ARP".into(),
        _ => return format!("type {kind:04x}"),
    };
    match (protocol, pair(next), pair(next + 2)) {
        (6, Some(a), Some(b)) => format!("TCP {from}:{a} to {to}:{b}"),
        (17, Some(a), Some(b)) => format!("UDP {from}:{a} to {to}:{b}"),
        _ => format!("protocol {protocol}, {from} to {to}"),
    }
}

fn bytes_differ(ours: &[u8], theirs: &[u8]) -> String {
    let common = ours.len().min(theirs.len());
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for at in (0..common).filter(|&at| ours[at] != theirs[at]) {
        match ranges.last_mut() {
            Some((_, end)) if *end == at => *end += 1,
            _ => ranges.push((at, at + 1)),
        }
    }
    if ours.len() != theirs.len() {
        ranges.push((common, ours.len().max(theirs.len())));
    }
    let Some(&(first, _)) = ranges.first() else { return "; their bytes are the same".into() };
    let named: Vec<String> = ranges.iter().take(MAX_RANGES).map(|(from, to)| format!("{from}..{to}")).collect();
    let more = if ranges.len() > MAX_RANGES { " and more" } else { "" };
    let show = |bytes: &[u8]| {
        let part = &bytes[first.min(bytes.len())..(first + SHOWN).min(bytes.len())];
        part.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    };
    let (one, other) = (show(ours), show(theirs));
    format!("; bytes {}{more} differ, from {first} on: {one} and {other}", named.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(text: &[u8]) -> Output {
        let mut frame = vec![0; 54];
        frame[12] = 8;
        frame[14] = 0x45;
        frame[23] = 6;
        frame[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        frame[34..38].copy_from_slice(&[0x18, 0xeb, 0x9c, 0x40]);
        frame.extend(text);
        Output::NetTx { nic: 0, frame }
    }

    #[test]
    fn a_person_sees_whose_bytes_differ() {
        let text = describe(9, Some((100, &tcp(b"hello world"))), Some((100, &tcp(b"hellO worlD"))));
        for part in [
            "output 9 differs",
            "a frame of 65 bytes at card 0 (TCP 10.0.0.2:6379 to 10.0.0.1:40000)",
            "at position 100",
            "bytes 58..59, 64..65 differ, from 58 on: 6f20776f726c64 and 4f20776f726c44",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = describe(9, Some((1, &Output::Serial(b"ab".to_vec()))), Some((2, &Output::Serial(b"abc".to_vec()))));
        assert!(text.contains("at position 2; bytes 2..3 differ, from 2 on:  and 63"), "{text}");
        assert!(describe(9, Some((1, &tcp(b""))), None).contains("the secondary nothing"));
        assert!(describe(9, None, Some((1, &tcp(b"")))).contains("the primary nothing"));
        assert!(describe(9, None, None).contains("not known any more"));
    }

    #[test]
    fn any_bytes_have_a_text() {
        for length in 0..80 {
            for kind in [[8, 0], [0x86, 0xdd], [8, 6], [1, 2]] {
                let mut frame = vec![0xff; length];
                if length >= 14 {
                    frame[12..14].copy_from_slice(&kind);
                }
                let output = Output::NetTx { nic: 0, frame };
                let other = Output::Console(vec![0; 200]);
                assert!(describe(1, Some((1, &output)), Some((1, &other))).len() < 600);
            }
        }
    }
}
