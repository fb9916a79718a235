//! Arbitrary bytes as an image: pages that come out rise and lie within the declared RAM.
#![no_main]
use libfuzzer_sys::fuzz_target;
use twinstep_log::{ImageItem, ImageReader};

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut reader) = ImageReader::open(bytes) else { return };
    let ram_pages = reader.metadata().ram_pages;
    let mut next_page = 0;
    while let Ok(Some(item)) = reader.next_item() {
        if let ImageItem::Pages(pages) = item {
            for (number, _) in pages {
                assert!(number >= next_page && number < ram_pages);
                next_page = number + 1;
            }
        }
    }
});
