//! What a VM is built from, as people write it: flags, or a TOML file with the same names.
//!
//! *In*: text. *Out*: a checked [`VmSpec`]. *Invariant*: an unknown word is an error that names it and says what there is.
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer};
use twinstep_machine::{Config, DiskConfig};

use crate::channel::ChannelOptions;
use crate::disk::{Access, Format};
use crate::error::{Context, Error, Result};
use crate::passt::Forward;

/// A virtual machine, as configured. Every field may be left out; flags win over the file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Linux kernel (bzImage), ELF image with a PVH note, or multiboot image.
    pub kernel: Option<PathBuf>,
    /// Initramfs.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// RAM.
    pub mem: Option<Memory>,
    /// CPU model.
    pub cpu: Option<String>,
    /// A debug-exit port.
    #[serde(default)]
    pub debug_exit: bool,
    /// Address spaces whose caches are kept. The guest cannot see it.
    #[serde(rename = "cache-groups")]
    pub cache_groups: Option<usize>,
    /// Disks, in order.
    #[serde(default)]
    pub disk: Vec<DiskSpec>,
    /// Network cards, in order.
    #[serde(default)]
    pub net: Vec<NetSpec>,
    /// How the way to a standby is secured.
    #[serde(default)]
    pub channel: ChannelOptions,
}

/// An amount of RAM in MiB: "512M", "2G", or a number of MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory(pub u32);

impl FromStr for Memory {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::new(format!("'{text}' is no amount of memory")).next("write it like 512M or 2G");
        let (digits, factor) = match text.strip_suffix(['G', 'g']) {
            Some(digits) => (digits, 1024),
            None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
        };
        let number: u32 = digits.parse().map_err(|_| bad())?;
        number.checked_mul(factor).map(Memory).ok_or_else(bad)
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u32),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(mib) => Ok(Self(mib)),
            Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// Types that are written as one text, on the command line and in TOML alike.
macro_rules! from_text {
    ($type:ty) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// A disk: `PATH[,format=raw|qcow2][,ro][,serial=TEXT][,share=on|off]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    /// Its format, if it is said.
    pub format: Option<Format>,
    /// How it is opened.
    pub read_only: bool,
    /// Serial number the guest sees.
    pub serial: String,
    /// All hosts of the pair have this one image.
    pub shared: bool,
}
from_text!(DiskSpec);

impl FromStr for DiskSpec {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let path = PathBuf::from(parts.next().unwrap_or_default());
        let mut spec = Self { path, format: None, read_only: false, serial: String::new(), shared: false };
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => spec.read_only = true,
                Some(("share", "on")) => spec.shared = true,
                Some(("share", "off")) => spec.shared = false,
                Some(("serial", serial)) => spec.serial = serial.to_owned(),
                Some(("format", "raw")) => spec.format = Some(Format::Raw),
                Some(("format", "qcow2")) => spec.format = Some(Format::Qcow2),
                _ => {
                    return Err(Error::new(format!("'{part}' in the disk '{text}' means nothing")).next(
                        "write it as PATH, PATH,ro, PATH,serial=TEXT, PATH,format=raw, PATH,format=qcow2 or PATH,share=on",
                    ));
                }
            }
        }
        if spec.shared && spec.read_only {
            return Err(Error::new(format!("the disk '{text}' is to be shared and read-only"))
                .next("say one of them: a disk that is only read needs no sharing, each host can have a copy"));
        }
        Ok(spec)
    }
}

impl DiskSpec {
    /// How the image is opened.
    pub fn access(&self) -> Access {
        if self.read_only { Access::ReadOnly } else { Access::ReadWrite }
    }
}

/// Where a network card's cable goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cable {
    /// To a passt of its own, without privileges, with these forwarded ports.
    User(Vec<Forward>),
    /// To a switch's socket.
    Switch(PathBuf),
    /// To a running passt's socket.
    Passt(PathBuf),
    /// To a TAP device.
    Tap(String),
}

/// A network card: `user[,forward=HOST:GUEST]...`, `switch=PATH`, `passt=PATH` or `tap=NAME`, each with `,mac=XX:XX:XX:XX:XX:XX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetSpec {
    /// Where the cable goes.
    pub cable: Cable,
    /// Hardware address, if chosen.
    pub mac: Option<[u8; 6]>,
}
from_text!(NetSpec);

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|b| u8::from_str_radix(b, 16).ok().filter(|_| b.len() == 2)).collect();
    bytes?.try_into().ok()
}

fn parse_forward(text: &str) -> Option<Forward> {
    let (host, guest) = text.rsplit_once(':')?;
    let guest = guest.parse().ok()?;
    let host = match host.rsplit_once(':') {
        Some((ip, port)) => SocketAddrV4::new(ip.parse().ok()?, port.parse().ok()?),
        None => SocketAddrV4::new(Ipv4Addr::LOCALHOST, host.parse().ok()?),
    };
    Some(Forward { host, guest })
}

impl FromStr for NetSpec {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let wrong = |part: &str| {
            Error::new(format!("'{part}' in the network card '{text}' means nothing")).next(
                "write it as user[,forward=HOSTPORT:GUESTPORT], switch=PATH, passt=PATH or tap=NAME, each with ,mac=52:54:00:12:34:56 if you like",
            )
        };
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let mut cable = match first.split_once('=') {
            None if first == "user" => Cable::User(Vec::new()),
            Some(("switch", path)) => Cable::Switch(path.into()),
            Some(("passt", path)) => Cable::Passt(path.into()),
            Some(("tap", name)) => Cable::Tap(name.into()),
            _ => return Err(wrong(first)),
        };
        let mut mac = None;
        for part in parts {
            match (part.split_once('='), &mut cable) {
                (Some(("mac", text)), _) => mac = Some(parse_mac(text).ok_or_else(|| wrong(part))?),
                (Some(("forward", text)), Cable::User(forwards)) => {
                    forwards.push(parse_forward(text).ok_or_else(|| wrong(part))?);
                }
                _ => return Err(wrong(part)),
            }
        }
        Ok(Self { cable, mac })
    }
}

impl VmSpec {
    /// Reads a TOML file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).at("read the configuration", path)?;
        toml::from_str(&text).map_err(|e| Error::new(format!("the configuration {} is wrong", path.display())).because(e))
    }
    /// What `flags` says, and what `self` (a file) says where the flags are silent.
    #[must_use]
    pub fn overridden_by(self, flags: Self) -> Self {
        Self {
            kernel: flags.kernel.or(self.kernel),
            initrd: flags.initrd.or(self.initrd),
            cmdline: flags.cmdline.or(self.cmdline),
            mem: flags.mem.or(self.mem),
            cpu: flags.cpu.or(self.cpu),
            debug_exit: flags.debug_exit || self.debug_exit,
            cache_groups: flags.cache_groups.or(self.cache_groups),
            disk: if flags.disk.is_empty() { self.disk } else { flags.disk },
            channel: self.channel.overridden_by(flags.channel),
            net: if flags.net.is_empty() { self.net } else { flags.net },
        }
    }
    /// The machine's configuration.
    pub fn config(&self) -> Config {
        let mut config = Config::default();
        if let Some(Memory(mib)) = self.mem {
            config.ram_mib = mib;
        }
        if let Some(cpu) = &self.cpu {
            config.cpu_model = cpu.clone();
        }
        if let Some(groups) = self.cache_groups {
            config.cache_groups = groups;
        }
        config.nics = self.net.iter().enumerate().map(|(i, net)| net.mac.unwrap_or(default_mac(i))).collect();
        config.disks =
            self.disk.iter().map(|d| DiskConfig { read_only: d.read_only, serial: d.serial.clone(), shared: d.shared }).collect();
        config
    }
}

/// The hardware address of card `index` where none was chosen: locally administered, the same at every start.
fn default_mac(index: usize) -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x74, 0x77, index as u8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory() {
        for (text, mib) in [("512M", 512), ("2G", 2048), ("64", 64), ("1g", 1024)] {
            assert_eq!(text.parse::<Memory>().unwrap().0, mib);
        }
        for text in ["", "G", "5T", "-1", "4294967295G"] {
            assert!(text.parse::<Memory>().is_err(), "{text}");
        }
    }

    #[test]
    fn cables_and_disks() {
        let net: NetSpec = "user,forward=2222:22,forward=0.0.0.0:8080:80,mac=52:54:00:00:00:01".parse().unwrap();
        let Cable::User(forwards) = &net.cable else { panic!() };
        assert_eq!(forwards[0].to_string(), "127.0.0.1/2222:22");
        assert_eq!(forwards[1].to_string(), "0.0.0.0/8080:80");
        assert_eq!(net.mac, Some([0x52, 0x54, 0, 0, 0, 1]));
        assert_eq!("tap=t0".parse::<NetSpec>().unwrap().cable, Cable::Tap("t0".into()));
        for bad in ["", "tap", "user,forward=x", "switch=/s,forward=1:2", "user,mac=1:2:3:4:5:6", "wifi"] {
            let e = bad.parse::<NetSpec>().unwrap_err().to_string();
            assert!(e.contains("means nothing") && e.contains("what to do"), "{e}");
        }
        let disk: DiskSpec = "/a/b.img,ro,serial=x".parse().unwrap();
        assert!(disk.read_only && disk.serial == "x");
        assert_eq!(disk.format, None);
        assert_eq!("/a,format=qcow2".parse::<DiskSpec>().unwrap().format, Some(Format::Qcow2));
        assert!("/a,share=on".parse::<DiskSpec>().unwrap().shared && !disk.shared);
        assert!("/a,share=on,ro".parse::<DiskSpec>().is_err());
        assert!("/a,rw".parse::<DiskSpec>().is_err());
        assert!("/a,format=vmdk".parse::<DiskSpec>().is_err());
    }

    #[test]
    fn a_file_and_flags() {
        let file: VmSpec = toml::from_str("kernel = '/k'\nmem = '1G'\nnet = ['user', 'tap=t0']\ndisk = ['/d,ro']").unwrap();
        let flags = VmSpec { mem: Some(Memory(64)), ..VmSpec::default() };
        let config = file.overridden_by(flags).config();
        assert_eq!((config.ram_mib, config.nics.len(), config.disks.len()), (64, 2, 1));
        assert_ne!(config.nics[0], config.nics[1]);
        let e = toml::from_str::<VmSpec>("kernal = '/k'").unwrap_err().to_string();
        assert!(e.contains("kernal") && e.contains("kernel"), "{e}");
    }
}
