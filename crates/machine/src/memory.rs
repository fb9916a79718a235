//! Guest RAM as the devices see it.
//!
//! **In:** a size in MiB. **Out:** the regions, mapped once, as [`GuestRam`] for the devices and as [`PhysMem`] for the processor.
//! **Invariant:** whatever a device writes through [`GuestRam`] is reported to [`PageFlags::device_wrote`] before the next instruction, because the
//! region's dirty bitmap *is* the page flags; no device has to remember it.
use crate::layout;
use std::sync::Arc;
use twinstep_x86::{PAGE_SIZE, PageFlags, PhysMem, RamRegion};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Guest RAM for devices.
pub(crate) type GuestRam = GuestMemoryMmap<PageMarks>;

/// The dirty bitmap of one region: a window on the machine's page flags.
#[derive(Debug)]
pub(crate) struct PageMarks {
    flags: Arc<PageFlags>,
    first_page: usize,
}

impl<'a> WithBitmapSlice<'a> for PageMarks {
    type S = RefSlice<'a, PageMarks>;
}

impl Bitmap for PageMarks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let page = PAGE_SIZE as usize;
        let end = offset.saturating_add(len - 1) / page;
        for page in offset / page..=end {
            let page = self.first_page + page;
            if page < self.flags.pages() {
                self.flags.device_wrote(page);
            }
        }
    }
    fn dirty_at(&self, offset: usize) -> bool {
        let page = self.first_page + offset / PAGE_SIZE as usize;
        page < self.flags.pages() && self.flags.get(page) & PageFlags::DIRTY != 0
    }
    fn slice_at(&self, offset: usize) -> RefSlice<'_, PageMarks> {
        RefSlice::new(self, offset)
    }
}

/// The pieces of `ram_mib` MiB of RAM: (guest-physical address, bytes).
pub(crate) fn regions(ram_mib: u32) -> Vec<(u64, u64)> {
    let bytes = u64::from(ram_mib) << 20;
    let low = bytes.min(layout::LOW_RAM_END);
    let mut regions = vec![(0, low)];
    if bytes > low {
        regions.push((layout::HIGH_RAM, bytes - low));
    }
    regions
}

/// Maps `ram_mib` MiB of zeroes. The [`PhysMem`] is valid as long as the [`GuestRam`] lives.
pub(crate) fn map(ram_mib: u32) -> Result<(GuestRam, PhysMem), String> {
    let regions = regions(ram_mib);
    let pages = regions.iter().map(|(_, len)| len / PAGE_SIZE).sum::<u64>() as usize;
    let flags = PageFlags::new(pages);
    let (mut mapped, mut for_cpu, mut first_page) = (Vec::new(), Vec::new(), 0);
    for (gpa, len) in regions {
        let region = MmapRegionBuilder::new_with_bitmap(len as usize, PageMarks { flags: flags.clone(), first_page })
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| e.to_string())?;
        for_cpu.push(RamRegion { gpa, len, host: region.as_ptr() });
        mapped.push(GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or("region wraps")?);
        first_page += (len / PAGE_SIZE) as usize;
    }
    let ram = GuestRam::from_regions(mapped).map_err(|e| e.to_string())?;
    // SAFETY: the mappings are page aligned, readable and writable, and owned by `ram`, which the machine keeps until after its processor is
    // gone (field order in `Machine`).
    let phys = unsafe { PhysMem::new(for_cpu, flags) };
    Ok((ram, phys))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(regions(64), [(0, 64 << 20)]);
        assert_eq!(regions(3072), [(0, 3 << 30)]);
        assert_eq!(regions(8192), [(0, 3 << 30), (4 << 30, 5 << 30)]);
    }

    #[test]
    fn device_writes_reach_the_page_flags() {
        let (ram, phys) = map(64).unwrap();
        for page in 0..phys.flags().pages() {
            phys.flags().clear(page, PageFlags::DIRTY);
        }
        phys.flags().set(3, PageFlags::CODE);
        ram.write_slice(&[1; 4097], GuestAddress(0x2fff)).unwrap();
        assert_eq!(phys.flags().get(1), 0);
        assert_eq!(phys.flags().get(2), PageFlags::DIRTY);
        assert_eq!(phys.flags().get(3), PageFlags::DIRTY | PageFlags::STALE | PageFlags::CODE);
        assert_eq!(phys.flags().get(4), 0);
        assert_eq!(phys.page_bytes(3)[0], 1);
    }

    #[test]
    fn ram_above_4_gib_counts_its_pages_on() {
        let (ram, phys) = map(4096).unwrap();
        let high = (3u64 << 30) / PAGE_SIZE;
        for page in high..high + 2 {
            phys.flags().clear(page as usize, PageFlags::DIRTY);
        }
        ram.write_obj(5u64, GuestAddress(layout::HIGH_RAM + 4096)).unwrap();
        assert_eq!(phys.flags().get(high as usize), 0);
        assert_eq!(phys.flags().get(high as usize + 1), PageFlags::DIRTY);
        assert_eq!(phys.gpa_of_page(high as usize), layout::HIGH_RAM);
    }
}
