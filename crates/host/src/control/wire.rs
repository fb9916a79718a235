//! Requests and responses of the control socket: one line of JSON each. `docs/protocol-control.md` is the page for other programs.
//!
//! *In*: a line. *Out*: a request, or the error that is the answer to it; and the same on the client's side. *Invariant*: what is not
//! known (version, request, field) is refused, never guessed or skipped; a line has a bound.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use twinstep_machine::faults::{Bit, Fill};

use crate::events::Kept;
pub use crate::status::Status;

/// The version of this protocol.
pub const VERSION: u64 = 1;
/// Bytes of a request's line at most, without its end.
pub const MAX_REQUEST: usize = 4096;
/// Bytes of a response's line at most.
pub const MAX_RESPONSE: usize = 256 << 10;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Who is there.
    Identify,
    /// What the machine did so far. From then on, and as long as the connection lasts, what it does is sampled.
    Stat,
    /// How the pair does.
    Status,
    /// What happened so far.
    Events,
    /// Have the standby go live and end here.
    FailOver,
    /// The other side is dead: decide in place of the arbiter, which cannot be reached.
    Override,
    /// Flip this bit ([`twinstep_machine::faults`]). Refused unless the VM was started for that.
    FlipBit(Bit),
}

impl Request {
    /// All of them, by name.
    pub const ALL: [(&'static str, Request); 7] = [
        ("identify", Request::Identify),
        ("stat", Request::Stat),
        ("status", Request::Status),
        ("events", Request::Events),
        ("failover", Request::FailOver),
        ("override", Request::Override),
        ("flip-bit", Request::FlipBit(Bit::Ram(0, 0))),
    ];

    /// As a line, with its end.
    pub fn line(self) -> String {
        let kind = std::mem::discriminant(&self);
        let (name, _) = Self::ALL.iter().find(|(_, r)| std::mem::discriminant(r) == kind).expect("all have a name");
        let value = match self {
            Request::FlipBit(Bit::Ram(address, bit)) => json!({ "v": VERSION, "do": name, "address": address, "bit": bit }),
            Request::FlipBit(Bit::Filled(fill, count, bit)) => {
                json!({ "v": VERSION, "do": name, "filled": String::from_utf8_lossy(fill.text()), "count": count, "bit": bit })
            }
            Request::FlipBit(Bit::Register(register, bit)) => {
                json!({ "v": VERSION, "do": name, "register": register, "bit": bit })
            }
            _ => json!({ "v": VERSION, "do": name }),
        };
        format!("{value}\n")
    }

    /// From a line without its end.
    pub fn parse(line: &[u8]) -> Result<Self, Refusal> {
        let value: Value = serde_json::from_slice(line).map_err(|e| Refusal::new(Code::BadRequest, format!("no JSON: {e}")))?;
        let Value::Object(mut fields) = value else {
            return Err(Refusal::new(Code::BadRequest, "a request is a JSON object"));
        };
        match fields.remove("v") {
            Some(v) if v.as_u64() == Some(VERSION) => {}
            Some(v) => return Err(Refusal::new(Code::Version, format!("version {v} is not spoken here, {VERSION} is"))),
            None => return Err(Refusal::new(Code::BadRequest, "\"v\", the protocol's version, is missing")),
        }
        let name = match fields.remove("do") {
            Some(Value::String(name)) => name,
            Some(_) => return Err(Refusal::new(Code::BadRequest, "\"do\" is the request's name, a text")),
            None => return Err(Refusal::new(Code::BadRequest, "\"do\", the request's name, is missing")),
        };
        let Some((_, request)) = Self::ALL.iter().find(|(n, _)| *n == name) else {
            let known: Vec<_> = Self::ALL.iter().map(|(name, _)| *name).collect();
            let text = format!("there is no request '{}'; there are: {}", shortened(&name), known.join(", "));
            return Err(Refusal::new(Code::UnknownRequest, text));
        };
        let request = match request {
            Request::FlipBit(_) => Request::FlipBit(bit_of(&mut fields)?),
            request => *request,
        };
        match fields.keys().next() {
            Some(field) => Err(Refusal::new(Code::BadRequest, format!("'{name}' has no field '{}'", shortened(field)))),
            None => Ok(request),
        }
    }
}

/// Takes the bit that is meant out of a request's fields.
fn bit_of(fields: &mut Map<String, Value>) -> Result<Bit, Refusal> {
    let filled = match fields.remove("filled") {
        None => None,
        Some(value) => {
            let fill = value.as_str().and_then(|text| Fill::new(text.as_bytes()));
            Some(fill.ok_or_else(|| Refusal::new(Code::BadRequest, format!("\"filled\" is a text of 1 to {} bytes", Fill::MAX)))?)
        }
    };
    let mut number = |name: &str| match fields.remove(name) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or_else(|| Refusal::new(Code::BadRequest, format!("\"{name}\" is no number"))),
    };
    let (address, register, bit) = (number("address")?, number("register")?, number("bit")?);
    let count = match filled {
        Some(_) => number("count")?.unwrap_or(1),
        None => 0,
    };
    let small = |number: u64| {
        u8::try_from(number).map_err(|_| Refusal::new(Code::BadRequest, format!("there is no bit or register {number}")))
    };
    match (address, register, filled, bit) {
        (Some(address), None, None, Some(bit)) => Ok(Bit::Ram(address, small(bit)?)),
        (None, Some(register), None, Some(bit)) => Ok(Bit::Register(small(register)?, small(bit)?)),
        (None, None, Some(fill), Some(bit)) => {
            let count = u16::try_from(count).map_err(|_| Refusal::new(Code::BadRequest, "\"count\" is at most 65535"))?;
            Ok(Bit::Filled(fill, count, small(bit)?))
        }
        _ => Err(Refusal::new(Code::BadRequest, "\"bit\" and one of \"address\", \"register\" and \"filled\" say which one")),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The line is not what a request looks like.
    BadRequest,
    /// The line is too long. The connection ends after this one.
    TooLong,
    /// Another version of the protocol.
    Version,
    /// A request that this build does not know.
    UnknownRequest,
    /// Too many clients or questions, or the machine is too busy to answer now.
    Busy,
    /// Not what this VM was started for.
    Forbidden,
    /// There is no machine now.
    NoMachine,
    /// A code of a later build.
    #[serde(other)]
    Other,
}

/// A request that was not granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// For people.
    pub text: String,
}

impl Refusal {
    /// One.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// Who is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The VM's name.
    pub name: String,
    /// The process.
    pub pid: u32,
    /// What it is: "alone", "primary", "standby", "survivor".
    pub side: String,
    /// The program.
    pub build: String,
    /// Requests it knows.
    pub requests: Vec<String>,
}

/// It was asked for; how it goes, status and events tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {}

/// A person has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overridden {
    /// The epoch that is this side's now.
    pub epoch: u64,
}

/// A bit was flipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flipped {
    /// Where the machine stood.
    pub position: u64,
}

/// What a machine did since it was made in this process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// The host's monotonic clock when the machine's thread answered.
    pub at_ns: u64,
    /// Instructions retired since power-on.
    pub position: u64,
    /// Guest time.
    pub guest_ns: u64,
    /// Processor time of the machine's thread.
    pub cpu_ns: u64,
    /// How often the thread was seen doing what. Grows only while a connection that asked is open.
    pub samples: BTreeMap<String, u64>,
    /// Counters: "set.name".
    pub counters: BTreeMap<String, u64>,
    /// What is no counter.
    pub gauges: BTreeMap<String, u64>,
}

/// What happened so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// The newest events of this process, oldest first.
    pub events: Vec<Kept>,
}

/// A response's line, with its end.
pub fn response<T: Serialize>(result: &Result<T, Refusal>) -> String {
    let value = match result {
        Ok(value) => json!({ "v": VERSION, "ok": value }),
        Err(refusal) => json!({ "v": VERSION, "error": refusal }),
    };
    format!("{value}\n")
}

/// The result in a response's line. The outer error says what is wrong with the line.
pub fn parse_response<T: for<'a> Deserialize<'a>>(line: &[u8]) -> Result<Result<T, Refusal>, String> {
    let mut fields: Map<String, Value> = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    if fields.get("v").and_then(Value::as_u64) != Some(VERSION) {
        return Err(format!("it does not speak version {VERSION} of the control protocol"));
    }
    if let Some(ok) = fields.remove("ok") {
        return serde_json::from_value(ok).map(Ok).map_err(|e| e.to_string());
    }
    match fields.remove("error") {
        Some(error) => serde_json::from_value(error).map(Err).map_err(|e| e.to_string()),
        None => Err("neither \"ok\" nor \"error\" is there".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_back_as_they_were() {
        for (name, request) in Request::ALL {
            let line = request.line();
            assert!(line.ends_with('\n') && line.contains(name), "{line}");
            assert_eq!(Request::parse(line.trim_end().as_bytes()), Ok(request));
        }
        for bit in [Bit::Register(15, 63), Bit::Filled(Fill::new(b"sixteen letters\n").unwrap(), 8, 2)] {
            let flip = Request::FlipBit(bit);
            assert_eq!(Request::parse(flip.line().trim_end().as_bytes()), Ok(flip));
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (line, code) in [
            ("", Code::BadRequest),
            ("stat", Code::BadRequest),
            ("[]", Code::BadRequest),
            ("{\"do\":\"stat\"}", Code::BadRequest),
            ("{\"v\":1}", Code::BadRequest),
            ("{\"v\":1,\"do\":7}", Code::BadRequest),
            ("{\"v\":2,\"do\":\"stat\"}", Code::Version),
            ("{\"v\":\"1\",\"do\":\"stat\"}", Code::Version),
            ("{\"v\":1,\"do\":\"dance\"}", Code::UnknownRequest),
            ("{\"v\":1,\"do\":\"stat\",\"fast\":true}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"stat\"} {}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":1}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":1,\"address\":1,\"register\":1}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":1,\"address\":1,\"count\":2}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":1,\"filled\":\"\"}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":1,\"filled\":\"longer than it may be\"}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":256,\"address\":1}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":-1,\"address\":1}", Code::BadRequest),
            ("{\"v\":1,\"do\":\"flip-bit\",\"bit\":1,\"address\":1,\"twice\":true}", Code::BadRequest),
        ] {
            assert_eq!(Request::parse(line.as_bytes()).unwrap_err().code, code, "{line}");
        }
        let long = format!("{{\"v\":1,\"do\":\"{}\"}}", "x".repeat(4000));
        assert!(Request::parse(long.as_bytes()).unwrap_err().text.len() < 200, "what is echoed is short");
    }

    #[test]
    fn responses_come_back_as_they_were() {
        let stat = Stat { position: u64::MAX, counters: BTreeMap::from([("exits.hot".into(), 3)]), ..Stat::default() };
        let line = response(&Ok(stat.clone()));
        assert_eq!(parse_response::<Stat>(line.as_bytes()), Ok(Ok(stat)));
        let refusal = Refusal::new(Code::Busy, "later");
        let line = response::<Stat>(&Err(refusal.clone()));
        assert_eq!(line, "{\"error\":{\"code\":\"busy\",\"text\":\"later\"},\"v\":1}\n");
        assert_eq!(parse_response::<Stat>(line.as_bytes()), Ok(Err(refusal)));
        let later = "{\"v\":1,\"error\":{\"code\":\"of-tomorrow\",\"text\":\"x\"}}";
        assert_eq!(parse_response::<Stat>(later.as_bytes()).unwrap().unwrap_err().code, Code::Other);
        assert!(parse_response::<Stat>(b"{\"v\":9,\"ok\":{}}").is_err());
    }
}
