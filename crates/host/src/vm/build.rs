//! A machine from a spec, an image or a recording; an image from a machine.
//!
//! *Invariant*: a machine comes out whole or not at all.
use std::io::{Read, Write};

use minicbor::{Decode, Encode};
use twinstep_log::{Compression, ImageItem, ImageMetadata, ImagePayload, ImageReader, ImageSummary};
use twinstep_machine::{Config, ConfigError, Disk, Machine, Payload};

use super::kept_blocks;
use crate::error::{Context, Error, Result};
use crate::identity;

/// What an image says beyond the machine itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Extra {
    /// Outputs the machine had made since power-on.
    #[n(0)]
    pub last_output: u64,
    /// Network cards of the machine.
    #[n(1)]
    pub nics: Vec<NicExtra>,
    /// RAM in MiB.
    #[n(2)]
    pub ram_mib: u32,
    /// Disks: read-only flag and serial number.
    #[n(3)]
    pub disks: Vec<DiskExtra>,
    /// Of a snapshot that a replay saved: digest of the recording up to there, so that it is used with no other. An image of another
    /// origin has none.
    #[n(4)]
    #[cbor(default)]
    pub log_digest: Option<u64>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NicExtra {
    /// Hardware address.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub mac: [u8; 6],
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DiskExtra {
    /// The guest cannot write to it.
    #[n(0)]
    pub read_only: bool,
    /// Serial number.
    #[n(1)]
    pub serial: String,
    /// Size in bytes.
    #[n(2)]
    pub bytes: u64,
    /// What is on it is not part of the machine.
    #[n(3)]
    #[cbor(default)]
    pub shared: bool,
}

/// Kind of the payload that holds [`Extra`]. No device has this name.
const EXTRA_KIND: &str = "host";
const EXTRA_VERSION: u16 = 1;

/// The metadata of an image of this machine now.
pub fn image_metadata(machine: &Machine) -> ImageMetadata {
    let (vendor, family) = identity::cpu();
    ImageMetadata {
        ram_pages: machine.ram().flags().pages() as u64,
        position: machine.position(),
        engine: identity::build(),
        cpu_model: machine.config().cpu_model.clone(),
        host_vendor: vendor,
        host_family: family.to_string(),
        note: String::new(),
    }
}

/// The machine's payloads, with what only the host knows.
pub fn image_payloads(machine: &Machine, disk_bytes: &[u64], last_output: u64, log_digest: Option<u64>) -> Vec<ImagePayload> {
    let own = extra_payload(machine, disk_bytes, last_output, log_digest);
    let payloads = machine.save().into_iter();
    std::iter::once(own).chain(payloads.map(|p| ImagePayload { kind: p.kind, version: p.version, bytes: p.bytes })).collect()
}

/// What only the host knows of a machine.
pub fn extra_payload(machine: &Machine, disk_bytes: &[u64], last_output: u64, log_digest: Option<u64>) -> ImagePayload {
    let config = machine.config();
    let extra = Extra {
        last_output,
        nics: config.nics.iter().map(|&mac| NicExtra { mac }).collect(),
        ram_mib: config.ram_mib,
        disks: config
            .disks
            .iter()
            .zip(disk_bytes)
            .map(|(d, &bytes)| DiskExtra { read_only: d.read_only, serial: d.serial.clone(), bytes, shared: d.shared })
            .collect(),
        log_digest,
    };
    let extra = minicbor::to_vec(&extra).expect("encoding into memory cannot fail");
    ImagePayload { kind: EXTRA_KIND.into(), version: EXTRA_VERSION, bytes: extra }
}

/// Writes an image of the machine. The machine must stand still meanwhile.
pub fn write_image<W: Write>(
    machine: &Machine,
    disk_bytes: &[u64],
    last_output: u64,
    log_digest: Option<u64>,
    output: W,
    compression: Compression,
) -> std::result::Result<(W, ImageSummary), twinstep_log::WriteError> {
    let payloads = image_payloads(machine, disk_bytes, last_output, log_digest);
    twinstep_log::image::write_image(
        output,
        &image_metadata(machine),
        compression,
        &payloads,
        |number, page| page.copy_from_slice(machine.ram().page_bytes(number as usize)),
        |_| {},
    )
}

/// Makes the disks of a machine, given their descriptions.
pub type DiskMaker<'a> = &'a mut dyn FnMut(&[DiskExtra]) -> Result<Vec<Box<dyn Disk>>>;

/// Builds the machine of an image. `tune` may change what the guest cannot see of its configuration. `disks` is not asked for the disks of a window, which has what
/// is needed of them.
pub fn from_image<R: Read>(
    reader: &mut ImageReader<R>,
    disks: DiskMaker,
    tune: &dyn Fn(&mut Config),
) -> Result<(Machine, Extra)> {
    let metadata = reader.metadata().clone();
    check_host(&metadata.host_vendor, &metadata.host_family)?;
    let mut payloads = Vec::new();
    let mut built: Option<(Machine, Extra)> = None;
    loop {
        match reader.next_item().what("the image cannot be used")? {
            Some(ImageItem::Payload(payload)) => payloads.push(payload),
            Some(ImageItem::Pages(pages)) => {
                // Payloads come before pages, so the configuration is known when the first page comes.
                if built.is_none() {
                    built = Some(own_disks_or(&metadata, &mut payloads, disks, tune)?);
                }
                let (machine, _) = built.as_mut().expect("just built");
                for (number, bytes) in pages.iter() {
                    if !machine.write_ram_page(number as usize, bytes) {
                        return Err(Error::new(format!("the image has a page {number} that the machine has not")));
                    }
                }
            }
            None => break,
        }
    }
    let (mut machine, extra) = match built {
        Some(built) => built,
        None => own_disks_or(&metadata, &mut payloads, disks, tune)?,
    };
    let payloads = payloads.into_iter().map(|p| Payload { kind: p.kind, version: p.version, bytes: p.bytes });
    machine.restore(payloads.collect()).what("the image does not fit this build")?;
    if machine.position() != metadata.position {
        let stands = machine.position();
        return Err(Error::new(format!("the image says position {}, its processor stands at {stands}", metadata.position)));
    }
    Ok((machine, extra))
}

/// The machine of an image before its state, with the disks of the image, if they are in it.
fn own_disks_or(
    metadata: &ImageMetadata,
    payloads: &mut Vec<ImagePayload>,
    disks: DiskMaker,
    tune: &dyn Fn(&mut Config),
) -> Result<(Machine, Extra)> {
    match kept_blocks::take(payloads)? {
        None => blank(metadata, payloads, disks, tune),
        Some(mut blocks) => {
            blank(metadata, payloads, &mut |wanted| kept_blocks::disks(std::mem::take(&mut blocks), wanted), tune)
        }
    }
}

/// Takes the host's own payload out of an image's.
pub fn take_extra(payloads: &mut Vec<ImagePayload>) -> Result<Extra> {
    let own = payloads.iter().position(|p| p.kind == EXTRA_KIND);
    let own = own.ok_or_else(|| Error::new("the image says nothing of the machine's configuration"))?;
    let own = payloads.swap_remove(own);
    if own.version != EXTRA_VERSION {
        let what = format!("the image's payload '{EXTRA_KIND}' has version {}, this build reads {EXTRA_VERSION}", own.version);
        return Err(Error::new(what).next("use the Twinstep that wrote it"));
    }
    minicbor::decode(&own.bytes).what("the image's configuration cannot be read")
}

/// The machine of an image before its state: takes the host's own payload out of `payloads`.
pub(super) fn blank(
    metadata: &ImageMetadata,
    payloads: &mut Vec<ImagePayload>,
    disks: DiskMaker,
    tune: &dyn Fn(&mut Config),
) -> Result<(Machine, Extra)> {
    let extra = take_extra(payloads)?;
    let mut config = Config {
        ram_mib: extra.ram_mib,
        cpu_model: metadata.cpu_model.clone(),
        nics: extra.nics.iter().map(|n| n.mac).collect(),
        disks: extra
            .disks
            .iter()
            .map(|d| twinstep_machine::DiskConfig { read_only: d.read_only, serial: d.serial.clone(), shared: d.shared })
            .collect(),
        ..Config::default()
    };
    tune(&mut config);
    if metadata.ram_pages != u64::from(config.ram_mib) * 256 {
        return Err(Error::new(format!("the image has {} pages for {} MiB of RAM", metadata.ram_pages, config.ram_mib)));
    }
    let machine = Machine::new(config, disks(&extra.disks)?).map_err(|e| {
        let lacks = matches!(e, ConfigError::HostLacks { .. });
        let error = Error::new("cannot build the machine of the image").because(e);
        if lacks { error.next("use a host whose processor has that") } else { error }
    })?;
    Ok((machine, extra))
}

/// Refuses what another maker's CPU recorded: undefined flags and the like may differ (docs/positions.md).
pub fn check_host(vendor: &str, family: &str) -> Result<()> {
    let (own_vendor, own_family) = identity::cpu();
    if vendor == own_vendor && family == own_family.to_string() {
        return Ok(());
    }
    Err(Error::new(format!(
        "this was made on a CPU of {vendor} family {family}, and this host's is {own_vendor} family {own_family}: \
         what manuals leave undefined may differ between them, so it cannot be continued exactly"
    ))
    .next("use a host with a CPU of the same maker and family"))
}
