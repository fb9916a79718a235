//! PCI: one bus with a host bridge and the virtio functions, all on bus 0, function 0 of their device.
//!
//! **In:** configuration accesses (ports 0xcf8/0xcfc, or ECAM), memory accesses in the PCI window. **Out:** the functions' answers. **Invariant:** which
//! function a memory address reaches is decided by the base address registers as the guest has set them. Reference: PCI Local Bus 3.0, PCI Express 5.0
//! section 7.2.2 (ECAM).
mod config;
pub(crate) mod msix;

pub(crate) use config::ConfigSpace;

use crate::layout;
use crate::payload::{Payload, Payloads, RestoreError};
use crate::virtio::{Cx, VirtioPci};

const HOST_BRIDGE_VENDOR: u16 = 0x1b36;
const HOST_BRIDGE_DEVICE: u16 = 0x0008;
/// Class codes: bridge, host.
const HOST_BRIDGE_CLASS: u32 = 0x06_0000;
const ENABLE: u32 = 1 << 31;

/// The PCI host and all functions behind it.
#[derive(Debug)]
pub(crate) struct PciHost {
    /// The configuration address register (port 0xcf8).
    address: u32,
    bridge: ConfigSpace,
    /// Device 1 and up.
    pub(crate) functions: Vec<VirtioPci>,
}

impl PciHost {
    const KIND: &'static str = "pci-host";
    const VERSION: u16 = 1;

    /// A host with `functions` at devices 1, 2, ... (31 at most). Their base addresses are assigned as firmware would.
    pub(crate) fn new(mut functions: Vec<VirtioPci>) -> Self {
        assert!(functions.len() < 32, "one bus holds 32 devices");
        for (i, function) in (0u64..).zip(&mut functions) {
            function.assign((layout::PCI_WINDOW + i * crate::virtio::BAR_LEN) as u32);
        }
        let bridge = ConfigSpace::new(HOST_BRIDGE_VENDOR, HOST_BRIDGE_DEVICE, 0, HOST_BRIDGE_CLASS, (0x1af4, 0x1100));
        Self { address: 0, bridge, functions }
    }

    fn read_config(&mut self, cx: &mut Cx, device: usize, offset: usize, data: &mut [u8]) {
        match device {
            0 => self.bridge.read(offset, data),
            n => match self.functions.get_mut(n - 1) {
                Some(function) => function.read_config(cx, offset, data),
                None => data.fill(0xff),
            },
        }
    }

    fn write_config(&mut self, cx: &mut Cx, device: usize, offset: usize, data: &[u8]) {
        match device {
            0 => self.bridge.write(offset, data),
            n => {
                if let Some(function) = self.functions.get_mut(n - 1) {
                    function.write_config(cx, offset, data);
                }
            }
        }
    }

    /// Device and register offset of an ECAM offset; `None` for functions other than 0.
    fn ecam(offset: u64) -> Option<(usize, usize)> {
        let (device, function, register) = (offset >> 15 & 31, offset >> 12 & 7, offset & 0xfff);
        (function == 0).then_some((device as usize, register as usize))
    }

    /// Reads ECAM.
    pub(crate) fn ecam_read(&mut self, cx: &mut Cx, offset: u64, data: &mut [u8]) {
        match Self::ecam(offset) {
            Some((device, register)) => self.read_config(cx, device, register, data),
            None => data.fill(0xff),
        }
    }

    /// Writes ECAM.
    pub(crate) fn ecam_write(&mut self, cx: &mut Cx, offset: u64, data: &[u8]) {
        if let Some((device, register)) = Self::ecam(offset) {
            self.write_config(cx, device, register, data);
        }
    }

    /// Device and register offset the address register points at, `within` bytes into the data register.
    fn addressed(&self, within: u16) -> Option<(usize, usize)> {
        let a = self.address;
        let (bus, function) = (a >> 16 & 0xff, a >> 8 & 7);
        (a & ENABLE != 0 && bus == 0 && function == 0)
            .then_some(((a >> 11 & 31) as usize, (a & 0xfc) as usize + usize::from(within)))
    }

    /// Reads the address register.
    pub(crate) fn address(&self) -> u32 {
        self.address
    }
    /// Writes the address register.
    pub(crate) fn set_address(&mut self, value: u32) {
        self.address = value & 0x80ff_fffc;
    }
    /// Reads the data register, `within` 0..=3.
    pub(crate) fn data_read(&mut self, cx: &mut Cx, within: u16, data: &mut [u8]) {
        match self.addressed(within) {
            Some((device, register)) => self.read_config(cx, device, register, data),
            None => data.fill(0xff),
        }
    }
    /// Writes the data register, `within` 0..=3.
    pub(crate) fn data_write(&mut self, cx: &mut Cx, within: u16, data: &[u8]) {
        if let Some((device, register)) = self.addressed(within) {
            self.write_config(cx, device, register, data);
        }
    }

    /// Reads the PCI memory window.
    pub(crate) fn window_read(&mut self, cx: &mut Cx, gpa: u64, data: &mut [u8]) {
        for function in &mut self.functions {
            if let Some(offset) = function.decode(gpa, data.len()) {
                return function.read_bar(cx, offset, data);
            }
        }
        data.fill(0xff);
    }

    /// Writes the PCI memory window.
    pub(crate) fn window_write(&mut self, cx: &mut Cx, gpa: u64, data: &[u8]) {
        for function in &mut self.functions {
            if let Some(offset) = function.decode(gpa, data.len()) {
                return function.write_bar(cx, offset, data);
            }
        }
    }

    /// Guest time of the next thing a function does by itself.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        self.functions.iter().filter_map(VirtioPci::deadline_ns).min()
    }

    /// Lets every function do what is due.
    pub(crate) fn fire_due(&mut self, cx: &mut Cx) {
        for function in &mut self.functions {
            function.fire_due(cx);
        }
    }

    pub(crate) fn save(&self) -> Payload {
        Payload::encode(Self::KIND, Self::VERSION, &(self.address, self.bridge.save()))
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(Self::KIND, Self::VERSION)?;
        let (address, bridge): (u32, minicbor::bytes::ByteVec) = payload.decode()?;
        if address & !0x80ff_fffc != 0 {
            return Err(payload.invalid("reserved bits are set"));
        }
        self.bridge.restore(&payload, &bridge)?;
        self.address = address;
        Ok(())
    }
}
