//! Packages from the real archive into a fresh cache, and the guests built from them. Needs apt and a Debian mirror; where there is no apt, it is skipped.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use twinstep_host::guest::{self, Kind};
use twinstep_host::packages::{KernelLine, Progress, Request, Store, tell_on_stderr};

/// Names and contents of a cpio archive.
fn unpack(mut archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    loop {
        assert_eq!(&archive[..6], b"070701");
        let field = |n: usize| usize::from_str_radix(std::str::from_utf8(&archive[6 + 8 * n..14 + 8 * n]).unwrap(), 16).unwrap();
        let (size, name_size) = (field(6), field(11));
        let name = String::from_utf8(archive[110..109 + name_size].to_vec()).unwrap();
        if name == "TRAILER!!!" {
            return found;
        }
        let data = (110 + name_size).next_multiple_of(4);
        found.insert(name, archive[data..data + size].to_vec());
        archive = &archive[(data + size).next_multiple_of(4)..];
    }
}

#[test]
fn from_an_empty_cache_to_guests_and_again_without_asking() {
    if Command::new("apt-get").arg("--version").output().is_err() {
        eprintln!("skipped: this host has no apt-get");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(dir.path().join("cache")).unwrap();

    // Two processes at once fill one cache; here two threads, whose locks are as separate.
    let guests: Vec<_> = std::thread::scope(|scope| {
        let build = || guest::build(&store, Kind::Redis, KernelLine::Stable, &mut tell_on_stderr).unwrap();
        let threads = [scope.spawn(build), scope.spawn(build)];
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(guests[0].initrd == guests[1].initrd, "the same packages give the same bytes");
    let guest = &guests[0];
    assert!(
        guest.kernel.release.starts_with("6.1.") && guest.kernel.release.ends_with("-cloud-amd64"),
        "{}",
        guest.kernel.release
    );
    // A bzImage says so at this place (Documentation/arch/x86/boot.rst).
    assert_eq!(&fs::read(&guest.kernel.image).unwrap()[0x202..0x206], b"HdrS");

    let files = unpack(&guest.initrd);
    for name in [
        "init",
        "bin/sh",
        "usr/bin/redis-server",
        "etc/redis.conf",
        "lib64/ld-linux-x86-64.so.2",
        "lib/x86_64-linux-gnu/libc.so.6",
    ] {
        assert!(files.contains_key(name), "{name} is missing");
    }
    let order = String::from_utf8(files["lib/modules/order"].clone()).unwrap();
    let place = |module: &str| order.lines().position(|line| line == module).unwrap_or_else(|| panic!("{module} is missing"));
    assert!(
        place("virtio_ring") < place("virtio_pci")
            && place("failover") < place("virtio_net")
            && place("virtio") < place("virtio_blk")
    );
    for module in order.lines() {
        assert!(files[&format!("lib/modules/{module}.ko")].starts_with(b"\x7fELF"));
    }
    // The second time nothing is fetched and nothing is said.
    let mut silent = |progress: Progress| panic!("{progress:?}");
    let again = guest::build(&store, Kind::Redis, KernelLine::Stable, &mut silent).unwrap();
    assert!(again.initrd == guest.initrd);

    // A damaged package is fetched anew, and no other.
    let busybox = store.package("busybox-static", &mut silent).unwrap();
    fs::write(busybox.root.join("bin/busybox"), b"damaged").unwrap();
    let mut said = Vec::new();
    let healed = store.package("busybox-static", &mut |progress| said.push(progress)).unwrap();
    assert_eq!(healed, busybox);
    assert!(fs::metadata(busybox.root.join("bin/busybox")).unwrap().len() > 1_000_000);
    assert!(said.iter().any(|p| matches!(p, Progress::Step(text) if text.starts_with("Fetching busybox-static"))), "{said:?}");

    let error = store.fetch(Request::Package("no-such-package-at-all"), &mut tell_on_stderr).unwrap_err().to_string();
    assert!(error.contains("no-such-package-at-all") && error.contains("what to do"), "{error}");
}
