//! The greeting: who the two sides are, and whether the one can replay what the other runs.
//!
//! In: [`Hello`] from the primary, [`HelloReply`] from the secondary, what the standby was told to [`Expectation`]. Out: a list
//! of differences, in words for people; an empty list means they fit. Invariant: two hosts that could replay differently are
//! refused here, with the reason, and not discovered later by a wrong guest.
//!
//! The payloads are maps of numbered fields, so that a newer build may add some. Fields 0 and 1 of both never change.

use minicbor::{Decode, Encode};

use super::{MAX_TEXT_BYTES, MAX_VERSION, MIN_VERSION};
use crate::config::{Commit, OnMismatch};
use crate::types::{Epoch, OwnerId, VmId};

/// The machine that is to be protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmIdentity {
    /// Which life of which VM.
    pub vm: VmId,
    /// What people call it: 1 to [`MAX_NAME_BYTES`] letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The fixed, named CPU model the guest sees.
    pub cpu_model: String,
    /// Guest RAM.
    pub ram_bytes: u64,
}

/// The longest name of a VM.
pub const MAX_NAME_BYTES: usize = 64;

/// Whether this can be the name of a VM: it is shown to people and looked for in lists, so nothing in it is special to anybody.
pub fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.starts_with('.') && name.chars().all(plain)
}

/// The host and the program that run, or would replay, the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostIdentity {
    /// The build of Twinstep; any other may replay differently.
    pub build: String,
    /// The CPU engine and its version.
    pub engine: String,
    /// The maker of the host's CPU as CPUID leaf 0 gives it; flags that manuals leave undefined differ between makers.
    pub cpu_vendor: String,
    /// The family of the host's CPU as CPUID leaf 1 gives it, extended family added.
    pub cpu_family: u32,
}

/// What a standby was told about the VM it may accept. `None` accepts anything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expectation {
    /// Only this VM.
    pub vm: Option<VmId>,
    /// Only VMs with one of these names; any if there are none.
    pub names: Vec<String>,
    /// Only this CPU model.
    pub cpu_model: Option<String>,
    /// Only this much RAM.
    pub ram_bytes: Option<u64>,
}

/// The primary's half of the greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The oldest payload version the primary speaks.
    pub min_version: u16,
    /// The newest payload version the primary speaks.
    pub max_version: u16,
    /// The machine.
    pub vm: VmIdentity,
    /// The epoch in which it runs.
    pub epoch: Epoch,
    /// What its outputs wait for.
    pub commit: Commit,
    /// What happens when outputs differ.
    pub on_mismatch: OnMismatch,
    /// The primary's process.
    pub owner: OwnerId,
    /// The primary's host.
    pub host: HostIdentity,
    /// Where the VM's standbys are, in the hosts' words: the one addressed first, then the others in the order in which it is to try them once it is
    /// live. At most [`MAX_STANDBYS`], each at most [`MAX_STANDBY_BYTES`] long.
    pub standbys: Vec<String>,
}

/// Standbys that a VM has at most.
pub const MAX_STANDBYS: usize = 32;

/// Bytes of the word that says where a standby is, at most.
pub const MAX_STANDBY_BYTES: usize = 256;

/// The secondary's half of the greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloReply {
    /// The payload version the secondary picked: the newest both speak.
    pub version: u16,
    /// Which VM is meant, repeated.
    pub vm: VmId,
    /// The epoch that was offered, repeated.
    pub epoch: Epoch,
    /// The secondary's process.
    pub owner: OwnerId,
    /// The secondary's host.
    pub host: HostIdentity,
    /// Where the secondary takes signs of life beside the channel, in the hosts' words; at most [`MAX_STANDBY_BYTES`] long. Nothing: nowhere.
    pub beats: Option<String>,
}

impl HostIdentity {
    /// In what way replaying on `self` could differ from running on `other`.
    pub fn differences(&self, other: &HostIdentity) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, ours: &str, theirs: &str| {
            if ours != theirs {
                found.push(format!("{what} is {ours:?} here and {theirs:?} at the other side"));
            }
        };
        compare("the build", &self.build, &other.build);
        compare("the engine", &self.engine, &other.engine);
        compare("the maker of the host's CPU", &self.cpu_vendor, &other.cpu_vendor);
        compare("the family of the host's CPU", &self.cpu_family.to_string(), &other.cpu_family.to_string());
        found
    }
}

impl Expectation {
    /// In what way the offered machine is not the one the standby was told to accept.
    pub fn differences(&self, offered: &VmIdentity) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(vm) = self.vm.filter(|vm| *vm != offered.vm) {
            found.push(format!("this standby waits for VM {vm}, not for {}", offered.vm));
        }
        if !self.names.is_empty() && !self.names.contains(&offered.name) {
            found.push(format!("this standby expects the VM {}, not {:?}", self.names.join(" or "), offered.name));
        }
        if let Some(model) = self.cpu_model.as_ref().filter(|model| **model != offered.cpu_model) {
            found.push(format!("this standby expects CPU model {model:?}, the VM has {:?}", offered.cpu_model));
        }
        if let Some(ram_bytes) = self.ram_bytes.filter(|bytes| *bytes != offered.ram_bytes) {
            found.push(format!("this standby expects {ram_bytes} bytes of RAM, the VM has {}", offered.ram_bytes));
        }
        found
    }
}

/// The newest version that both sides speak.
pub(crate) fn greeting_version(hello: &Hello) -> Result<u16, String> {
    let newest = hello.max_version.min(MAX_VERSION);
    if newest >= hello.min_version.max(MIN_VERSION) {
        return Ok(newest);
    }
    Err(format!(
        "this side speaks versions {MIN_VERSION} to {MAX_VERSION} of the logging channel, the other {} to {}",
        hello.min_version, hello.max_version
    ))
}

/// Both messages on the wire, in numbered fields.
#[derive(Encode, Decode)]
#[cbor(map)]
struct WireGreeting {
    /// The oldest version offered; in a reply the version picked.
    #[n(0)]
    min_version: u16,
    /// The newest version offered; in a reply the version picked.
    #[n(1)]
    max_version: u16,
    #[cbor(n(2), with = "minicbor::bytes")]
    vm: [u8; 16],
    #[n(3)]
    epoch: u64,
    #[cbor(n(4), with = "minicbor::bytes")]
    owner: [u8; 16],
    #[n(5)]
    build: String,
    #[n(6)]
    engine: String,
    #[n(7)]
    cpu_vendor: String,
    #[n(8)]
    cpu_family: u32,
    /// Only in a hello.
    #[n(9)]
    cpu_model: Option<String>,
    /// Only in a hello.
    #[n(10)]
    ram_bytes: Option<u64>,
    /// Only in a hello: 0 is received, 1 is matched.
    #[n(11)]
    commit: Option<u8>,
    /// Only in a hello.
    #[n(12)]
    name: Option<String>,
    /// Only in a hello: 0 believes the primary, 1 stops.
    #[n(14)]
    on_mismatch: Option<u8>,
    /// Only in a hello.
    #[n(13)]
    standbys: Option<Vec<String>>,
    /// Only in a reply.
    #[n(15)]
    beats: Option<String>,
}

impl WireGreeting {
    fn to_bytes(&self) -> Vec<u8> {
        minicbor::to_vec(self).expect("encoding into memory can't fail")
    }

    fn from_bytes(payload: &[u8]) -> Result<WireGreeting, &'static str> {
        let mut decoder = minicbor::Decoder::new(payload);
        let greeting: WireGreeting = decoder.decode().map_err(|_| "its fields can't be read")?;
        if decoder.position() != payload.len() {
            return Err("bytes are left over after its fields");
        }
        let texts = [&greeting.build, &greeting.engine, &greeting.cpu_vendor];
        if texts.into_iter().chain(&greeting.cpu_model).any(|text| text.len() > MAX_TEXT_BYTES) {
            return Err("a text in it is too long");
        }
        let standbys = greeting.standbys.as_deref().unwrap_or_default();
        if standbys.len() > MAX_STANDBYS || standbys.iter().any(|place| place.len() > MAX_STANDBY_BYTES) {
            return Err("its list of standbys is too long");
        }
        if greeting.beats.as_ref().is_some_and(|place| place.len() > MAX_STANDBY_BYTES) {
            return Err("its place for signs of life is too long");
        }
        Ok(greeting)
    }

    fn host(&self) -> HostIdentity {
        HostIdentity {
            build: self.build.clone(),
            engine: self.engine.clone(),
            cpu_vendor: self.cpu_vendor.clone(),
            cpu_family: self.cpu_family,
        }
    }
}

impl Hello {
    pub(super) fn to_payload(&self) -> Vec<u8> {
        let host = self.host.clone();
        WireGreeting {
            min_version: self.min_version,
            max_version: self.max_version,
            vm: self.vm.vm.0,
            epoch: self.epoch.0,
            owner: self.owner.0,
            build: host.build,
            engine: host.engine,
            cpu_vendor: host.cpu_vendor,
            cpu_family: host.cpu_family,
            cpu_model: Some(self.vm.cpu_model.clone()),
            ram_bytes: Some(self.vm.ram_bytes),
            commit: Some(match self.commit {
                Commit::Received => 0,
                Commit::Matched => 1,
            }),
            name: Some(self.vm.name.clone()),
            on_mismatch: Some(match self.on_mismatch {
                OnMismatch::Primary => 0,
                OnMismatch::Stop => 1,
            }),
            standbys: Some(self.standbys.clone()),
            beats: None,
        }
        .to_bytes()
    }

    pub(super) fn from_payload(payload: &[u8]) -> Result<Hello, &'static str> {
        let greeting = WireGreeting::from_bytes(payload)?;
        let host = greeting.host();
        Ok(Hello {
            min_version: greeting.min_version,
            max_version: greeting.max_version,
            vm: VmIdentity {
                vm: VmId(greeting.vm),
                name: match greeting.name {
                    Some(name) if is_name(&name) => name,
                    Some(_) => return Err("its VM's name is none"),
                    // Who has none speaks an older version, and is to be told so.
                    None => String::new(),
                },
                cpu_model: greeting.cpu_model.ok_or("it has no CPU model")?,
                ram_bytes: greeting.ram_bytes.ok_or("it has no RAM size")?,
            },
            epoch: Epoch(greeting.epoch),
            commit: match greeting.commit {
                Some(0) => Commit::Received,
                Some(1) => Commit::Matched,
                Some(_) => return Err("its output rule is unknown"),
                None => return Err("it has no output rule"),
            },
            on_mismatch: match greeting.on_mismatch {
                // Who has none speaks an older version, and is to be told so.
                Some(0) | None => OnMismatch::Primary,
                Some(1) => OnMismatch::Stop,
                Some(_) => return Err("its policy for outputs that differ is unknown"),
            },
            owner: OwnerId(greeting.owner),
            host,
            standbys: greeting.standbys.unwrap_or_default(),
        })
    }
}

impl HelloReply {
    pub(super) fn to_payload(&self) -> Vec<u8> {
        let host = self.host.clone();
        WireGreeting {
            min_version: self.version,
            max_version: self.version,
            vm: self.vm.0,
            epoch: self.epoch.0,
            owner: self.owner.0,
            build: host.build,
            engine: host.engine,
            cpu_vendor: host.cpu_vendor,
            cpu_family: host.cpu_family,
            cpu_model: None,
            ram_bytes: None,
            commit: None,
            name: None,
            on_mismatch: None,
            standbys: None,
            beats: self.beats.clone(),
        }
        .to_bytes()
    }

    pub(super) fn from_payload(payload: &[u8]) -> Result<HelloReply, &'static str> {
        let greeting = WireGreeting::from_bytes(payload)?;
        if greeting.min_version != greeting.max_version {
            return Err("it picks no single version");
        }
        let host = greeting.host();
        Ok(HelloReply {
            version: greeting.min_version,
            vm: VmId(greeting.vm),
            epoch: Epoch(greeting.epoch),
            owner: OwnerId(greeting.owner),
            host,
            beats: greeting.beats,
        })
    }
}
