//! How a VM's standbys are reached: at an address that was named, or at one of those that are registered at the arbiter.
//!
//! *In*: a place of the VM's list: `HOST:PORT`, or [`REGISTERED`]. *Out*: a channel, and the address it leads to. *Invariant*: who is registered is tried like anybody else; one that did not serve
//! the VM is not tried twice in a row while there are others.
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Channel, Security, reach};
use crate::arbiter::{ArbiterSpec, Registry};
use crate::error::{Error, Result};

/// The place that stands for all standbys that are registered at the arbiter. No address is written so.
pub const REGISTERED: &str = "registered";

/// A channel to a standby, and where that is.
pub type Reached = (Channel, String);

/// Reaches standbys. Cheap to clone.
#[derive(Clone)]
pub struct Reach {
    security: Security,
    arbiter: Option<ArbiterSpec>,
    memory: Arc<Mutex<Memory>>,
}

#[derive(Default)]
struct Memory {
    registry: Option<Registry>,
    /// Who was tried last.
    last: Option<String>,
}

impl Reach {
    /// Reaches standbys with this security; those that are registered are looked up at this arbiter.
    #[must_use]
    pub fn new(security: Security, arbiter: Option<ArbiterSpec>) -> Self {
        Self { security, arbiter, memory: Arc::default() }
    }

    /// Connects to the standby at a place. Whoever is tried has `patience` to accept the connection.
    ///
    /// # Errors
    /// If nobody is there who may protect the VM.
    pub fn reach(&self, place: &str, patience: Duration) -> Result<Reached> {
        if place != REGISTERED {
            return Ok((reach(place, &self.security, patience)?, place.to_owned()));
        }
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let addresses = in_turn(self.registered(&mut memory)?, memory.last.as_deref());
        let mut failure = Error::new("no standby is registered at the arbiter")
            .next("start one: twinstep standby --register HOST:PORT with the same --arbiter");
        for address in addresses {
            memory.last = Some(address.clone());
            match reach(&address, &self.security, patience) {
                Ok(channel) => return Ok((channel, address)),
                Err(e) => failure = Error::new("none of the standbys that are registered can be reached").because(e),
            }
        }
        Err(failure)
    }

    fn registered(&self, memory: &mut Memory) -> Result<Vec<String>> {
        let registry = match &mut memory.registry {
            Some(registry) => registry,
            none => {
                let spec =
                    self.arbiter.as_ref().ok_or_else(|| Error::new("there is no arbiter where standbys could be registered"))?;
                none.insert(spec.registry()?)
            }
        };
        registry.list()
    }
}

/// Those behind the one that was tried last, then the others.
fn in_turn(mut addresses: Vec<String>, last: Option<&str>) -> Vec<String> {
    addresses.sort_unstable();
    // Where there are none behind, this turns nothing.
    let behind = last.map_or(0, |last| addresses.partition_point(|address| address.as_str() <= last));
    addresses.rotate_left(behind);
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_tried_last_comes_last() {
        let list = || ["c:1", "a:1", "b:1"].map(str::to_owned).to_vec();
        assert_eq!(in_turn(list(), None), ["a:1", "b:1", "c:1"]);
        assert_eq!(in_turn(list(), Some("a:1")), ["b:1", "c:1", "a:1"]);
        assert_eq!(in_turn(list(), Some("c:1")), ["a:1", "b:1", "c:1"]);
        // It is gone meanwhile.
        assert_eq!(in_turn(list(), Some("b:0")), ["b:1", "c:1", "a:1"]);
        assert!(in_turn(Vec::new(), Some("a:1")).is_empty());
    }

    #[test]
    fn without_etcd_nobody_is_registered() {
        let folder = ArbiterSpec::Directory("/tmp".into());
        let error = |arbiter| match Reach::new(Security::default(), arbiter).reach(REGISTERED, crate::channel::CONNECT_PATIENCE) {
            Ok(_) => panic!("nobody is there"),
            Err(e) => e.to_string(),
        };
        assert!(error(Some(folder)).contains("registered at etcd"));
        assert!(error(None).contains("no arbiter"));
    }
}
