//! What lies behind the door stays pure: no clock, no socket, no thread, no file, no randomness, no async runtime; neither in our own
//! sources nor in what we depend on. See ARCHITECTURE.md, "The one door".
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;
use twinstep_house::{root, shown, source};

const PURE: [&str; 5] = ["x86", "machine", "log", "pair", "migrate"];

/// Everything a pure crate may depend on, directly or not, with what it is there for. A package that is missing here is looked at before it is added:
/// does it read a clock, open a socket or a file, start a thread, or draw random numbers in what we call? Then it does not belong here.
const KNOWN_PURE: &[(&str, &str)] = &[
    ("acpi_tables", "bytes of ACPI tables"),
    ("bitflags", "flag types"),
    ("byteorder", "byte order (dynasmrt)"),
    ("cfg-if", "a macro"),
    ("crc32fast", "checksums"),
    ("dynasm", "the assembler's macro"),
    ("dynasmrt", "the assembler"),
    ("fnv", "a hash with a fixed seed (dynasmrt)"),
    ("iced-x86", "the decoder and encoder"),
    ("lazy_static", "constants (iced-x86)"),
    ("libc", "mmap and signals; which functions may be called is checked below"),
    ("linux-loader", "headers of kernels"),
    ("log", "a facade nobody listens to (virtio-queue)"),
    ("lz4_flex", "compression of images"),
    ("memmap2", "executable memory (dynasmrt)"),
    ("minicbor", "numbered fields"),
    ("minicbor-derive", "its macro"),
    ("thiserror", "error types"),
    ("thiserror-impl", "its macro"),
    ("twox-hash", "checksums (lz4_flex)"),
    ("virtio-bindings", "constants"),
    ("virtio-queue", "rings in guest memory"),
    ("vm-memory", "guest memory"),
    ("vmm-sys-util", "types that virtio-queue names; it could do timers and sockets, which nobody calls"),
    ("xxhash-rust", "digests"),
    ("zerocopy", "fixed layouts"),
    ("zerocopy-derive", "its macro"),
];

/// What must not stand in what ships of a pure crate.
const FORBIDDEN: &[(&str, &str)] = &[
    ("Instant", "a clock"),
    ("SystemTime", "a clock"),
    ("_rdtsc", "a clock"),
    ("__rdtscp", "a clock"),
    ("std::net", "sockets"),
    ("std::os::unix::net", "sockets"),
    ("std::thread", "threads"),
    ("thread::spawn", "threads"),
    ("std::sync::mpsc", "threads"),
    ("std::fs", "files"),
    ("File::open", "files"),
    ("File::create", "files"),
    ("std::env", "what the host's user set"),
    ("std::process", "processes"),
    ("io::stdin", "a terminal"),
    ("io::stdout", "a terminal"),
    ("io::stderr", "a terminal"),
    ("println!", "a terminal"),
    ("eprintln!", "a terminal"),
    ("print!", "a terminal"),
    ("eprint!", "a terminal"),
    ("RandomState", "randomness: a hash map's order differs from run to run; take a BTreeMap, or a fixed hasher"),
    ("HashMap::new", "randomness: a hash map's order differs from run to run; take a BTreeMap, or a fixed hasher"),
    ("HashSet::new", "randomness: a hash set's order differs from run to run; take a BTreeSet, or a fixed hasher"),
    ("_rdrand64_step", "randomness"),
    ("_rdseed64_step", "randomness"),
    ("async fn", "an async runtime"),
    (".await", "an async runtime"),
    ("use libc::{", "libc by name: write libc::function, so that this test sees it"),
    ("use libc::*", "libc by name: write libc::function, so that this test sees it"),
];

/// The functions and types of libc that a pure crate may name: memory for the guest, and faults of translated code.
const LIBC: &[&str] = &[
    "c_int",
    "c_void",
    "mmap",
    "munmap",
    "mprotect",
    "madvise",
    "pthread_sigmask",
    "sigaction",
    "sigaltstack",
    "sigdelset",
    "sigaddset",
    "sigemptyset",
    "sigfillset",
    "siginfo_t",
    "sigset_t",
    "stack_t",
    "ucontext_t",
];

#[test]
fn sources_of_pure_crates_reach_nothing_outside() {
    let mut found = Vec::new();
    for name in PURE {
        for (file, code) in source::shipped(&root().join("crates").join(name)) {
            for (word, what) in FORBIDDEN {
                if let Some(at) = source::find_word(&code, word) {
                    found.push(format!("{}:{}: {word} is {what}", shown(&file), source::line(&code, at)));
                }
            }
            for (at, _) in code.match_indices("libc::") {
                let named = &code[at + "libc::".len()..];
                let end = named.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(named.len());
                let named = &named[..end];
                let constant = named.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
                if !constant && !LIBC.contains(&named) {
                    found.push(format!(
                        "{}:{}: libc::{named} is not on the list of what may be called",
                        shown(&file),
                        source::line(&code, at)
                    ));
                }
            }
        }
    }
    assert!(
        found.is_empty(),
        "behind the door there is no outside. Pass what is needed in as a value, or do it in `host`:\n{}",
        found.join("\n")
    );
}

#[test]
fn pure_crates_depend_on_pure_packages() {
    // `cargo test` has everything this needs already: no network, and no change to the lock file.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let text = |value: &Value| value.as_str().expect("cargo's names are text").to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();

    let names: BTreeMap<String, String> =
        list(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
    let is_macro = |p: &Value| list(&p["targets"]).iter().any(|t| list(&t["kind"]).contains(&Value::from("proc-macro")));
    let macros: BTreeSet<String> = list(&metadata["packages"]).iter().filter(|p| is_macro(p)).map(|p| text(&p["id"])).collect();
    let mut needs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in list(&metadata["resolve"]["nodes"]) {
        let deps = list(&node["deps"]);
        let normal = deps.iter().filter(|d| list(&d["dep_kinds"]).iter().any(|k| k["kind"].is_null()));
        needs.insert(text(&node["id"]), normal.map(|d| text(&d["pkg"])).collect());
    }

    let known: BTreeSet<&str> = KNOWN_PURE.iter().map(|(name, _)| *name).collect();
    let mut used = BTreeSet::new();
    let mut found = Vec::new();
    for pure in PURE {
        let name = format!("twinstep-{pure}");
        let start = names.iter().find(|(_, n)| **n == name).unwrap_or_else(|| panic!("there is no crate {name}")).0;
        // Each package with the way to it, so that the message can say who brought it in.
        let mut ways = BTreeMap::from([(start.clone(), name.clone())]);
        let mut open = vec![start.clone()];
        while let Some(id) = open.pop() {
            // A macro runs in the compiler; what it depends on does, too.
            if macros.contains(&id) {
                continue;
            }
            for need in &needs[&id] {
                if ways.contains_key(need) {
                    continue;
                }
                let way = format!("{} -> {}", ways[&id], names[need]);
                let name = names[need].as_str();
                let ours = PURE.iter().any(|p| name == format!("twinstep-{p}"));
                if !ours && !known.contains(name) {
                    found.push(way.clone());
                }
                used.insert(name.to_owned());
                ways.insert(need.clone(), way);
                open.push(need.clone());
            }
        }
    }
    assert!(
        found.is_empty(),
        "pure crates gained dependencies. If they reach no clock, socket, thread, file or randomness, add them to KNOWN_PURE in {}:\n{}",
        file!(),
        found.join("\n")
    );
    let unused: Vec<_> = known.iter().filter(|name| !used.contains(**name)).collect();
    assert!(unused.is_empty(), "no pure crate depends on these any more; take them off KNOWN_PURE: {unused:?}");
}
