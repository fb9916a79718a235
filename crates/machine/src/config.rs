//! What a machine is built from.
use crate::disk::Disk;
use twinstep_x86::CpuModel;

/// A machine's configuration. Two machines that shall replay alike need the same one (but for what is said to be invisible to the guest).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// RAM in MiB, [`Config::MIN_RAM_MIB`]..=[`Config::MAX_RAM_MIB`].
    pub ram_mib: u32,
    /// Name of the CPU model the guest sees. A machine's own configuration has the full name: not `host-common`, but what that is here.
    pub cpu_model: String,
    /// Hardware address of each network card; at most [`Config::MAX_NICS`].
    pub nics: Vec<[u8; 6]>,
    /// Each disk; at most [`Config::MAX_DISKS`].
    pub disks: Vec<DiskConfig>,
    /// Bytes of translated code kept at most. Not visible to the guest.
    pub code_cache_bytes: usize,
    /// Guest instructions translated as one block at most. Not visible to the guest.
    pub max_block_instructions: u32,
    /// Address spaces whose translations are kept while another one is current. Not visible to the guest.
    pub cache_groups: usize,
}

/// One disk's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskConfig {
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Serial number the guest reads; the first 20 bytes count.
    pub serial: String,
    /// What is on it is not part of the machine: what the guest reads comes in by the door, and what it writes leaves by it ([`crate::disk`]).
    pub shared: bool,
}

/// Why a machine cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Too little or too much RAM.
    #[error("{0} MiB of RAM is outside {min}..={max} MiB", min = Config::MIN_RAM_MIB, max = Config::MAX_RAM_MIB)]
    Ram(u32),
    /// Too many devices of a kind.
    #[error("{given} {what} are more than the {max} a machine can have")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many were given.
        given: usize,
        /// How many are possible.
        max: usize,
    },
    /// Disks and their configurations do not match.
    #[error("{disks} disks were supplied for {configured} configured ones")]
    Disks {
        /// Disks supplied.
        disks: usize,
        /// Disks configured.
        configured: usize,
    },
    /// No such CPU model.
    #[error("there is no CPU model '{0}'")]
    CpuModel(String),
    /// This host's processor cannot execute what the CPU model has.
    #[error("this host's processor lacks {missing}, which the CPU model '{model}' has")]
    HostLacks {
        /// The model.
        model: String,
        /// The features, by name.
        missing: String,
    },
    /// RAM could not be had.
    #[error("mapping the machine's RAM failed: {0}")]
    Map(String),
}

impl Config {
    /// Least RAM in MiB.
    pub const MIN_RAM_MIB: u32 = 64;
    /// Most RAM in MiB.
    pub const MAX_RAM_MIB: u32 = 65_536;
    /// Most network cards.
    pub const MAX_NICS: usize = 8;
    /// Most disks.
    pub const MAX_DISKS: usize = 16;

    /// The CPU model that [`Config::cpu_model`] names, if this host can run it.
    pub fn cpu(&self) -> Result<CpuModel, ConfigError> {
        let model = CpuModel::by_name(&self.cpu_model).ok_or_else(|| ConfigError::CpuModel(self.cpu_model.clone()))?;
        let missing = model.missing();
        if missing.is_empty() {
            Ok(model)
        } else {
            Err(ConfigError::HostLacks { model: model.name, missing: missing.to_string() })
        }
    }

    pub(crate) fn check(&self, disks: &[Box<dyn Disk>]) -> Result<(), ConfigError> {
        if !(Self::MIN_RAM_MIB..=Self::MAX_RAM_MIB).contains(&self.ram_mib) {
            return Err(ConfigError::Ram(self.ram_mib));
        }
        for (what, given, max) in
            [("network cards", self.nics.len(), Self::MAX_NICS), ("disks", self.disks.len(), Self::MAX_DISKS)]
        {
            if given > max {
                return Err(ConfigError::TooMany { what, given, max });
            }
        }
        if disks.len() != self.disks.len() {
            return Err(ConfigError::Disks { disks: disks.len(), configured: self.disks.len() });
        }
        Ok(())
    }
}

impl Default for Config {
    /// 512 MiB, no network cards, no disks.
    fn default() -> Self {
        Self {
            ram_mib: 512,
            cpu_model: DEFAULT_CPU_MODEL.into(),
            nics: Vec::new(),
            disks: Vec::new(),
            code_cache_bytes: 128 << 20,
            max_block_instructions: 96,
            cache_groups: 16,
        }
    }
}

/// The CPU model used where none is named.
const DEFAULT_CPU_MODEL: &str = "x86-64-v2";
