//! Virtio over PCI (section 4.1): the capabilities, the common configuration, doorbells and interrupts of one function.
//!
//! One 32 KiB memory range holds everything, a page each: common configuration, ISR status, device configuration, doorbells (4 bytes per
//! queue), MSI-X table, MSI-X pending bits. There is no legacy interface and no INTx.
use super::queues::{NO_VECTOR, QueueImage};
use super::{Broken, Cx, Queues, Received, VirtioDevice, feature};
use crate::disk::DiskWanted;
use crate::payload::{Payload, Payloads, RestoreError};
use crate::pci::ConfigSpace;
use crate::pci::msix::{self, Msix};
use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use virtio_queue::QueueT;

/// Bytes of the function's memory range.
pub(crate) const BAR_LEN: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 1;
const DEVICE: u64 = 2;
const NOTIFY: u64 = 3;
const MSIX_TABLE: u64 = 4;
const MSIX_PENDING: u64 = 5;

const VENDOR: u16 = 0x1af4;
/// PCI device id of virtio device type 0.
const DEVICE_ID_BASE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 9;
const COMMON_LEN: usize = 0x38;
const NOTIFY_MULTIPLIER: u32 = 4;
/// Structure types of the vendor capabilities (4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Device status bits (section 2.1).
mod status {
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const NEEDS_RESET: u8 = 64;
}
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
struct Registers {
    #[n(0)]
    status: u8,
    #[n(1)]
    isr: u8,
    #[n(2)]
    device_feature_select: u32,
    #[n(3)]
    driver_feature_select: u32,
    #[n(4)]
    driver_features: u64,
    #[n(5)]
    config_vector: u16,
    #[n(6)]
    queue_select: u16,
}

#[derive(Encode, Decode)]
struct Image {
    #[n(0)]
    config: ByteVec,
    #[n(1)]
    registers: Registers,
    #[n(2)]
    queues: Vec<QueueImage>,
    #[n(3)]
    msix: Msix,
    #[n(4)]
    device: ByteVec,
    #[n(5)]
    stalled: u64,
}

/// One virtio device as a PCI function.
#[derive(Debug)]
pub(crate) struct VirtioPci {
    kind: String,
    config: ConfigSpace,
    msix: Msix,
    msix_at: usize,
    pci_cfg_at: usize,
    r: Registers,
    queues: Queues,
    /// Doorbells the host failed to serve, a bit per queue.
    stalled: u64,
    device: Box<dyn VirtioDevice>,
}

impl VirtioPci {
    /// Wraps `device`, the `number`th of its kind.
    pub(crate) fn new(device: Box<dyn VirtioDevice>, number: usize) -> Self {
        let id = DEVICE_ID_BASE + device.device_type();
        let mut config = ConfigSpace::new(VENDOR, id, 1, device.class(), (VENDOR, id));
        config.add_memory_bar(BAR_LEN as u32);
        let sizes = device.queue_sizes();
        let msix = Msix::new(sizes.len() as u16 + 1);
        let table = (MSIX_TABLE * PAGE) as u32;
        let msix_at = config.add_capability(
            msix::CAPABILITY,
            &msix.capability(table, (MSIX_PENDING * PAGE) as u32),
            &(msix::ENABLE | msix::MASK_ALL).to_le_bytes(),
        );
        // cap_len, cfg_type, bar, id, padding, offset, length.
        let structure = |kind: u8, page: u64, len: u32| {
            let mut body = vec![16, kind, 0, 0, 0, 0];
            body.extend(((page * PAGE) as u32).to_le_bytes());
            body.extend(len.to_le_bytes());
            body
        };
        config.add_capability(CAPABILITY_VENDOR, &structure(CFG_COMMON, COMMON, COMMON_LEN as u32), &[]);
        config.add_capability(CAPABILITY_VENDOR, &structure(CFG_ISR, ISR, 1), &[]);
        let device_len = device.config().len() as u32;
        if device_len > 0 {
            config.add_capability(CAPABILITY_VENDOR, &structure(CFG_DEVICE, DEVICE, device_len), &[]);
        }
        let mut notify = structure(CFG_NOTIFY, NOTIFY, sizes.len() as u32 * NOTIFY_MULTIPLIER);
        notify[0] = 20;
        notify.extend(NOTIFY_MULTIPLIER.to_le_bytes());
        config.add_capability(CAPABILITY_VENDOR, &notify, &[]);
        // The window through configuration space (4.1.4.9): bar, offset and length are the driver's.
        let mut window = structure(CFG_PCI, 0, 0);
        window[0] = 20;
        window.extend([0; 4]);
        let mut writable = [0xff; 18];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let pci_cfg_at = config.add_capability(CAPABILITY_VENDOR, &window, &writable);

        let queues = Queues::new(sizes);
        let r = Registers { config_vector: NO_VECTOR, ..Default::default() };
        let kind = format!("{}{number}", device.kind());
        Self { kind, config, msix, msix_at, pci_cfg_at, r, queues, stalled: 0, device }
    }

    /// Sets its base address, as firmware does.
    pub(crate) fn assign(&mut self, address: u32) {
        self.config.set_bar(address);
    }

    /// Offset into the memory range if an access of `len` bytes at `gpa` hits it.
    pub(crate) fn decode(&self, gpa: u64, len: usize) -> Option<u64> {
        let offset = gpa.checked_sub(self.config.bar()?)?;
        (offset + len as u64 <= BAR_LEN).then_some(offset)
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT
    }
    fn control(&self) -> u16 {
        self.config.word(self.msix_at + 2)
    }

    // Configuration space.

    /// The access the configuration window describes, if it is one the range has.
    fn window(&self) -> Option<(u64, usize)> {
        let bar = self.config.dword(self.pci_cfg_at + 4) as u8;
        let offset = u64::from(self.config.dword(self.pci_cfg_at + 8));
        let len = self.config.dword(self.pci_cfg_at + 12);
        let sane = bar == 0 && matches!(len, 1 | 2 | 4) && offset + u64::from(len) <= BAR_LEN;
        sane.then_some((offset, len as usize))
    }

    pub(crate) fn read_config(&mut self, cx: &mut Cx, offset: usize, data: &mut [u8]) {
        let window_data = self.pci_cfg_at + 16;
        if (window_data..window_data + 4).contains(&offset)
            && let Some((at, len)) = self.window()
        {
            let mut value = [0; 4];
            self.read_bar(cx, at, &mut value[..len]);
            self.config.write(window_data, &value);
        }
        self.config.read(offset, data);
    }

    pub(crate) fn write_config(&mut self, cx: &mut Cx, offset: usize, data: &[u8]) {
        let before = self.control();
        self.config.write(offset, data);
        let now = self.control();
        if before != now {
            cx.messages.extend(self.msix.control_changed(now));
        }
        let window_data = self.pci_cfg_at + 16;
        if offset == window_data
            && let Some((at, len)) = self.window()
        {
            let value = self.config.dword(window_data).to_le_bytes();
            self.write_bar(cx, at, &value[..len]);
        }
    }

    // The memory range.

    pub(crate) fn read_bar(&mut self, cx: &mut Cx, offset: u64, data: &mut [u8]) {
        let _ = cx;
        data.fill(0);
        let within = offset % PAGE;
        match offset / PAGE {
            COMMON => copy_from(&self.common(), within as usize, data),
            ISR if within == 0 => {
                data[0] = std::mem::take(&mut self.r.isr);
            }
            DEVICE => copy_from(&self.device.config(), within as usize, data),
            MSIX_TABLE => self.msix.read_table(within, data),
            MSIX_PENDING => self.msix.read_pending(within, data),
            _ => {}
        }
    }

    pub(crate) fn write_bar(&mut self, cx: &mut Cx, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset / PAGE {
            COMMON => {
                // A 64-bit register may be written as one or as two halves.
                if data.len() == 8 {
                    self.write_common(cx, within, &data[..4]);
                    self.write_common(cx, within + 4, &data[4..]);
                } else {
                    self.write_common(cx, within, data);
                }
            }
            NOTIFY => self.doorbell(cx, (within / u64::from(NOTIFY_MULTIPLIER)) as usize),
            MSIX_TABLE => {
                let control = self.control();
                cx.messages.extend(self.msix.write_table(within, data, control));
            }
            _ => {}
        }
    }

    fn common(&self) -> [u8; COMMON_LEN] {
        let mut out = [0; COMMON_LEN];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0x00, &self.r.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered(), self.r.device_feature_select).to_le_bytes());
        put(0x08, &self.r.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.r.driver_features, self.r.driver_feature_select).to_le_bytes());
        put(0x10, &self.r.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.r.status, 0]);
        put(0x16, &self.r.queue_select.to_le_bytes());
        let index = usize::from(self.r.queue_select);
        if let Some(queue) = self.queues.get(index) {
            put(0x18, &queue.size().to_le_bytes());
            put(0x1a, &self.queues.vectors[index].to_le_bytes());
            put(0x1c, &u16::from(queue.ready()).to_le_bytes());
            put(0x1e, &self.r.queue_select.to_le_bytes());
            put(0x20, &queue.desc_table().to_le_bytes());
            put(0x28, &queue.avail_ring().to_le_bytes());
            put(0x30, &queue.used_ring().to_le_bytes());
        }
        out
    }

    fn vector(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    fn write_common(&mut self, cx: &mut Cx, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        let n = data.len().min(4);
        bytes[..n].copy_from_slice(&data[..n]);
        let value = u32::from_le_bytes(bytes);
        let index = usize::from(self.r.queue_select);
        match (offset, n) {
            (0x00, 4) => self.r.device_feature_select = value,
            (0x08, 4) => self.r.driver_feature_select = value,
            (0x0c, 4) => {
                let f = &mut self.r.driver_features;
                // Once accepted, features are fixed.
                if self.r.status & status::FEATURES_OK == 0 {
                    match self.r.driver_feature_select {
                        0 => *f = *f & !0xffff_ffff | u64::from(value),
                        1 => *f = *f & 0xffff_ffff | u64::from(value) << 32,
                        _ => {}
                    }
                }
            }
            (0x10, 2) => self.r.config_vector = self.vector(value as u16),
            (0x14, _) => self.set_status(cx, value as u8),
            (0x16, 2) => self.r.queue_select = value as u16,
            (0x1a, 2) if index < self.queues.len() => self.queues.vectors[index] = self.vector(value as u16),
            _ => self.write_queue(index, offset, n, value),
        }
    }

    fn write_queue(&mut self, index: usize, offset: u64, len: usize, value: u32) {
        let event_idx = self.r.driver_features & feature::EVENT_IDX != 0;
        // A queue in use keeps its settings until reset.
        let Some(queue) = self.queues.get_mut(index).filter(|q| !q.ready()) else { return };
        match (offset, len) {
            (0x18, 2) => queue.set_size(value as u16),
            (0x1c, 2) if value == 1 && queue.size() != 0 => {
                queue.set_event_idx(event_idx);
                queue.set_ready(true);
            }
            (0x20, 4) => queue.set_desc_table_address(Some(value), None),
            (0x24, 4) => queue.set_desc_table_address(None, Some(value)),
            (0x28, 4) => queue.set_avail_ring_address(Some(value), None),
            (0x2c, 4) => queue.set_avail_ring_address(None, Some(value)),
            (0x30, 4) => queue.set_used_ring_address(Some(value), None),
            (0x34, 4) => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, cx: &mut Cx, value: u8) {
        if value == 0 {
            self.r = Registers { config_vector: NO_VECTOR, ..Default::default() };
            self.queues.reset();
            self.stalled = 0;
            self.device.reset();
            return;
        }
        let before = self.r.status;
        // Bits are only ever added by the driver; NEEDS_RESET is the device's.
        let mut new = before | value & !status::NEEDS_RESET;
        if new & !before & status::FEATURES_OK != 0 {
            let f = self.r.driver_features;
            if f & !self.offered() != 0 || f & feature::VERSION_1 == 0 {
                new &= !status::FEATURES_OK;
            } else {
                self.device.negotiated(f);
            }
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.r.status = new;
        if new & !before & status::DRIVER_OK != 0 && new & status::NEEDS_RESET == 0 {
            self.queues.live = true;
            for queue in 0..self.queues.len() {
                self.doorbell(cx, queue);
            }
        }
    }

    // Work.

    fn doorbell(&mut self, cx: &mut Cx, queue: usize) {
        if !self.queues.usable(queue) {
            return;
        }
        if cx.failure.is_none() {
            self.work(cx, |device, queues, cx| device.notify(queue, queues, cx));
        }
        if cx.failure.is_some() {
            self.stalled |= 1 << queue;
        }
    }

    /// Serves again the doorbells at which the host failed.
    pub(crate) fn retry(&mut self, cx: &mut Cx) {
        let stalled = std::mem::take(&mut self.stalled);
        for queue in (0..self.queues.len()).filter(|q| stalled >> q & 1 != 0) {
            self.doorbell(cx, queue);
        }
    }

    /// Hands the device something from outside.
    pub(crate) fn receive(&mut self, cx: &mut Cx, received: Received) {
        self.work(cx, |device, queues, cx| device.receive(received, queues, cx));
    }

    /// What the device waits for the host to do.
    pub(crate) fn waits_for(&self) -> Vec<(u64, DiskWanted)> {
        self.device.waits_for()
    }

    /// Guest time of the device's next event.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        self.device.deadline_ns().filter(|_| self.queues.live)
    }

    /// Does what is due.
    pub(crate) fn fire_due(&mut self, cx: &mut Cx) {
        if self.deadline_ns().is_some_and(|d| d <= cx.now_ns) {
            self.work(cx, |device, queues, cx| device.fire_due(queues, cx));
        }
    }

    fn work(&mut self, cx: &mut Cx, f: impl FnOnce(&mut dyn VirtioDevice, &mut Queues, &mut Cx) -> Result<(), Broken>) {
        let interrupts = f(self.device.as_mut(), &mut self.queues, cx).and_then(|()| self.queues.take_interrupts(cx));
        match interrupts {
            Ok(queues) => {
                for queue in queues {
                    self.interrupt(cx, self.queues.vectors[queue], ISR_QUEUE);
                }
            }
            Err(Broken) => {
                self.queues.live = false;
                let _ = self.queues.take_interrupts(cx);
                self.r.status |= status::NEEDS_RESET;
                self.interrupt(cx, self.r.config_vector, ISR_CONFIG);
            }
        }
    }

    fn interrupt(&mut self, cx: &mut Cx, vector: u16, isr: u8) {
        let control = self.control();
        if control & msix::ENABLE == 0 {
            self.r.isr |= isr;
        } else if vector != NO_VECTOR {
            cx.messages.extend(self.msix.send(vector, control));
        }
    }

    // Saved state.

    pub(crate) fn save(&self) -> Payload {
        let image = Image {
            config: self.config.save(),
            registers: self.r.clone(),
            queues: self.queues.save(),
            msix: self.msix.clone(),
            device: self.device.save().into(),
            stalled: self.stalled,
        };
        Payload::encode(self.kind.clone(), self.device.version(), &image)
    }

    pub(crate) fn restore(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        let payload = payloads.take(&self.kind, self.device.newest_version())?;
        self.device.become_version(payload.version);
        let image: Image = payload.decode()?;
        self.config.restore(&payload, &image.config)?;
        self.msix.check(&payload, &image.msix)?;
        let r = &image.registers;
        let negotiated = r.status & status::FEATURES_OK != 0;
        if (negotiated && r.driver_features & !self.offered() != 0) || (r.status & status::DRIVER_OK != 0 && !negotiated) {
            return Err(payload.invalid("impossible device status"));
        }
        if image.stalled >> self.queues.len() != 0 {
            return Err(payload.invalid("doorbells of queues it does not have"));
        }
        let vectors = image.queues.iter().map(|q| q.vector()).chain([r.config_vector]);
        if vectors.into_iter().any(|v| v != self.vector(v)) {
            return Err(payload.invalid("a vector lies outside the MSI-X table"));
        }
        self.queues.reset();
        self.stalled = image.stalled;
        self.device.reset();
        self.queues.restore(&image.queues).map_err(|why| payload.invalid(why))?;
        if negotiated {
            self.device.negotiated(r.driver_features);
        }
        self.device.restore(&payload, &image.device)?;
        self.queues.live = r.status & status::DRIVER_OK != 0 && r.status & status::NEEDS_RESET == 0;
        self.msix = image.msix;
        self.r = image.registers;
        Ok(())
    }
}

fn copy_from(source: &[u8], offset: usize, data: &mut [u8]) {
    for (i, out) in data.iter_mut().enumerate() {
        *out = source.get(offset + i).copied().unwrap_or(0);
    }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
