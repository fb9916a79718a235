//! Arbitrary bytes as a copy of a machine: the target gets only units of the layout it has agreed to, of the right size.
#![no_main]
use libfuzzer_sys::fuzz_target;
use twinstep_migrate::{Destination, Layout, Target};

#[derive(Default)]
struct Room(Option<Layout>);

impl Room {
    fn region(&self, region: usize, unit: u64) -> usize {
        let region = self.0.as_ref().expect("the layout comes first").regions()[region];
        assert!(unit < region.units);
        region.unit_bytes as usize
    }
}

impl Target for Room {
    fn begin(&mut self, layout: &Layout, _preface: &[u8]) -> Result<(), String> {
        assert!(self.0.is_none());
        if layout.regions().iter().map(|r| r.units).sum::<u64>() > 1 << 16 {
            return Err("too large".into());
        }
        self.0 = Some(layout.clone());
        Ok(())
    }
    fn unit(&mut self, region: usize, unit: u64, bytes: &[u8]) -> Result<(), String> {
        assert_eq!(bytes.len(), self.region(region, unit));
        Ok(())
    }
    fn zero(&mut self, region: usize, unit: u64, _first: bool) -> Result<(), String> {
        self.region(region, unit);
        Ok(())
    }
}

fuzz_target!(|bytes: &[u8]| {
    let (mut destination, mut room) = (Destination::new(), Room::default());
    for piece in bytes.chunks(97) {
        if destination.push(piece, &mut room).is_err() {
            return;
        }
    }
    let _ = destination.finish();
});
