//! Standbys that say in etcd where they wait, so that nobody has to name them.
//!
//! *In*: the address of a standby that waits. *Out*: the addresses of those that wait. *Invariant*: a registration is a hint where to try and never a claim: who is reached there must still be the right
//! one (TLS), fit the VM, and get its image as any standby does, and who may run is settled by epochs alone. So it may be missing, late, or of a host long dead, and a host whose clock is
//! wrong does no harm.
//!
//! A registration is a key `PREFIX/.standbys/ADDRESS` under a lease of [`LEASE_S`] seconds, made anew every [`REFRESH`]: one of a host that died goes away by itself. It is taken back while the standby
//! serves somebody.
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, json};
use twinstep_pair::wire::MAX_STANDBY_BYTES;

use super::etcd::{EtcdArbiter, Failure, Header, RangeAnswer};
use crate::error::{Context, Error, Result};
use crate::events::Events;

/// How long a registration outlives its standby.
const LEASE_S: u32 = 30;
/// How often it is made anew.
const REFRESH: Duration = Duration::from_secs(10);
/// Registrations that are looked at.
const MOST: usize = 64;

/// An answer of which only is wanted that it is etcd's.
#[derive(Debug, Deserialize)]
struct Done {
    #[serde(rename = "header")]
    _header: Header,
}

/// A lease.
#[derive(Debug, Deserialize)]
struct Lease {
    #[serde(rename = "header")]
    _header: Header,
    #[serde(rename = "ID")]
    id: String,
}

/// A range of keys.
#[derive(Debug, Deserialize)]
struct Range {
    #[serde(rename = "header")]
    _header: Header,
    #[serde(rename = "more", default)]
    _more: Option<IgnoredAny>,
    #[serde(flatten)]
    range: RangeAnswer,
}

/// The registrations of one arbiter.
#[derive(Debug)]
pub struct Registry(EtcdArbiter);

impl Registry {
    pub(super) fn new(etcd: EtcdArbiter) -> Self {
        Self(etcd)
    }

    fn folder(&self) -> String {
        format!("{}/.standbys/", self.0.prefix())
    }

    fn key(&self, address: &str) -> String {
        BASE64.encode(format!("{}{address}", self.folder()))
    }

    /// A standby waits at this address, for so many seconds from now unless it says so again. (They are etcd's seconds, and nothing depends on them.)
    ///
    /// # Errors
    /// If etcd does not take it.
    pub fn put(&self, address: &str, seconds: u32) -> Result<()> {
        let put = || {
            let lease =
                self.0.call("lease/grant", &json!({ "TTL": seconds.to_string() }), |lease: &Lease| Ok(lease.id.clone()))?;
            let put = json!({ "key": self.key(address), "value": BASE64.encode("waiting"), "lease": lease });
            self.0.call("kv/put", &put, |_: &Done| Ok(()))
        };
        put()
            .map_err(|failure: Failure| Error::new(format!("cannot register the standby {address} at etcd")).because(failure.why))
    }

    /// It waits no more.
    ///
    /// # Errors
    /// If etcd does not take it; then it is forgotten after a while.
    pub fn remove(&self, address: &str) -> Result<()> {
        let removed = self.0.call("kv/deleterange", &json!({ "key": self.key(address) }), |_: &Done| Ok(()));
        removed.map_err(|failure| Error::new(format!("cannot take back that {address} waits")).because(failure.why))
    }

    /// The addresses of those that wait, as far as anybody knows. What could be no address is left out: anybody who may write there may write anything.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub fn list(&self) -> Result<Vec<String>> {
        let folder = self.folder();
        // All keys that begin with it: those before it with its last letter, a slash, replaced by the next.
        let end = format!("{}0", folder.trim_end_matches('/'));
        let question =
            json!({ "key": BASE64.encode(&folder), "range_end": BASE64.encode(end), "limit": MOST, "keys_only": true });
        let read = |answer: &Range| {
            let keys = answer.range.kvs.iter().filter_map(|kv| String::from_utf8(BASE64.decode(&kv.key).ok()?).ok());
            Ok(keys.filter_map(|key| Some(key.strip_prefix(&folder)?.to_owned())).filter(|a| is_address(a)).collect::<Vec<_>>())
        };
        self.0
            .call("kv/range", &question, read)
            .map_err(|failure| Error::new("etcd does not say which standbys are registered").because(failure.why))
    }
}

/// Whether a text could be the address of a standby: a host and a port.
pub(crate) fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let host_is_good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b':' | b'[' | b']');
    !host.is_empty()
        && text.len() <= MAX_STANDBY_BYTES
        && host.bytes().all(host_is_good)
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}

/// A standby's registration, kept up by a thread of its own: etcd may take long to answer, and nobody waits for it.
#[derive(Debug, Clone)]
pub struct Registration(Sender<bool>);

impl Registration {
    /// For the standby that primaries reach at `address`. It waits for nobody yet.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(registry: Registry, address: String, events: Events) -> Result<Self> {
        let (to, told) = channel();
        let keep = move || {
            let (mut waits, mut failures) = (false, None::<u32>);
            loop {
                let word =
                    if waits { told.recv_timeout(REFRESH) } else { told.recv().map_err(|_| RecvTimeoutError::Disconnected) };
                match word {
                    Ok(now) => waits = now,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) if waits => return taken_back(&registry, &address),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                if !waits {
                    taken_back(&registry, &address);
                    continue;
                }
                match (registry.put(&address, LEASE_S), &mut failures) {
                    (Ok(()), Some(0)) => {}
                    (Ok(()), failures) => {
                        let figures = Map::from_iter([("address".to_owned(), json!(address))]);
                        events.say_with("registered", format!("primaries find this standby at {address}"), figures);
                        *failures = Some(0);
                    }
                    (Err(e), failures) => {
                        let n = failures.unwrap_or(0) + 1;
                        *failures = Some(n);
                        // Seldom, if it stays so.
                        if n.is_power_of_two() {
                            events.say("not-registered", format!("{e}; it is tried again every {} s", REFRESH.as_secs()));
                        }
                    }
                }
            }
        };
        std::thread::Builder::new().name("register".into()).spawn(keep).what("cannot start a thread")?;
        Ok(Self(to))
    }

    /// Whether the standby waits for a primary now.
    pub fn waits(&self, waits: bool) {
        // The thread lives as long as this.
        let _ = self.0.send(waits);
    }
}

fn taken_back(registry: &Registry, address: &str) {
    // If this does not get there, the lease ends by itself.
    let _ = registry.remove(address);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_what_else_somebody_may_have_written() {
        for good in ["b:7171", "10.0.0.2:1", "[::1]:7171", "host-2.example:65535"] {
            assert!(is_address(good), "{good}");
        }
        let long = format!("{}:1", "x".repeat(MAX_STANDBY_BYTES));
        for bad in ["", "b", ":7171", "b:0", "b:x", "b:70000", "a b:1", "registered", "b:1\n", "a/b:1", &long] {
            assert!(!is_address(bad), "{bad}");
        }
    }
}
