//! Who this host and this program are, as far as exact replay cares.
//!
//! *Invariant*: two programs with the same build string are the same file, byte by byte; so an engine that could replay differently has
//! another one.
use std::arch::x86_64::__cpuid;
use std::io::Read;

use twinstep_pair::HostIdentity;

/// This host and this program.
pub fn host() -> HostIdentity {
    let (vendor, family) = cpu();
    HostIdentity {
        build: build(),
        engine: concat!("twinstep-x86 ", env!("CARGO_PKG_VERSION")).to_owned(),
        cpu_vendor: vendor,
        cpu_family: family,
    }
}

/// Maker and family of the host's CPU (CPUID leaves 0 and 1; SDM vol. 2, CPUID).
pub fn cpu() -> (String, u32) {
    let leaf = __cpuid(0);
    let mut bytes = Vec::new();
    for word in [leaf.ebx, leaf.edx, leaf.ecx] {
        bytes.extend(word.to_le_bytes());
    }
    let version = __cpuid(1).eax;
    let family = (version >> 8 & 15) + if version >> 8 & 15 == 15 { version >> 20 & 255 } else { 0 };
    (String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned(), family)
}

/// Version and digest of the running program's file.
pub fn build() -> String {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    let read = || -> std::io::Result<()> {
        let mut file = std::fs::File::open("/proc/self/exe")?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    let mut read = read;
    match read() {
        Ok(()) => format!("{}-{:016x}", env!("CARGO_PKG_VERSION"), hash.digest()),
        // Without its file the program cannot tell what it is; it pairs with nobody but others that cannot either.
        Err(_) => format!("{}-unknown", env!("CARGO_PKG_VERSION")),
    }
}

/// Sixteen random bytes, for names that must be unique.
pub fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    random(&mut id);
    id
}

/// Fills `bytes` from the kernel's random numbers.
pub fn random(bytes: &mut [u8]) {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("the kernel gives no random numbers: {e}"),
        }
    }
}
