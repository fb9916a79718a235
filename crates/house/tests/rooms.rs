//! Crates are rooms: the arrows between them go one way, some dependencies live in one room only, and versions stand in one place.
use std::collections::BTreeMap;

use toml::{Table, Value};
use twinstep_house::{read, root};

/// What each crate may depend on among ours (its tests may depend on more).
const ARROWS: &[(&str, &[&str])] = &[
    ("x86", &[]),
    ("machine", &["x86"]),
    ("log", &["machine"]),
    ("pair", &[]),
    ("migrate", &["machine"]),
    ("host", &["machine", "log", "pair", "migrate"]),
    ("twinstep", &["machine", "log", "pair", "migrate", "host"]),
    ("sim", &["pair"]),
    ("bench", &["host"]),
    ("house", &[]),
];

/// Dependencies that only these crates may name, so that they could be replaced in one place.
const WRAPPED: &[(&str, &[&str])] = &[
    ("iced-x86", &["x86"]),
    ("dynasmrt", &["x86"]),
    ("vm-memory", &["machine"]),
    ("virtio-queue", &["machine"]),
    ("virtio-bindings", &["machine"]),
    ("linux-loader", &["machine"]),
    ("acpi_tables", &["machine"]),
    ("lz4_flex", &["log", "migrate"]),
    ("rustix", &["host", "bench"]),
    ("ureq", &["host"]),
    ("rustls", &["host"]),
    ("clap", &["twinstep", "bench"]),
    ("anyhow", &["twinstep"]),
    ("ratatui", &["twinstep"]),
    ("hdrhistogram", &["host"]),
];

fn manifests() -> BTreeMap<String, Table> {
    let folders = root().join("crates").read_dir().expect("the crates' folder can be listed");
    folders
        .map(|entry| entry.expect("an entry of a folder can be read").path())
        .filter(|folder| folder.join("Cargo.toml").exists())
        .map(|folder| {
            let name = folder.file_name().expect("a folder has a name").to_string_lossy().into_owned();
            let manifest = read(&folder.join("Cargo.toml"));
            (name, manifest.parse().expect("cargo has read this manifest"))
        })
        .collect()
}

fn table<'a>(manifest: &'a Table, name: &str) -> Vec<(&'a String, &'a Value)> {
    manifest.get(name).and_then(Value::as_table).into_iter().flatten().collect()
}

#[test]
fn arrows_go_one_way() {
    for (name, manifest) in manifests() {
        let (_, allowed) = ARROWS.iter().find(|(n, _)| *n == name).unwrap_or_else(|| {
            panic!(
                "crate {name} is not in ARROWS of {}: say there what it may depend on, and in ARCHITECTURE.md what it is for",
                file!()
            )
        });
        for (dependency, _) in table(&manifest, "dependencies") {
            if let Some(room) = dependency.strip_prefix("twinstep-") {
                assert!(allowed.contains(&room), "crate {name} must not depend on {room}: see the rooms in ARCHITECTURE.md");
            }
            if let Some((_, rooms)) = WRAPPED.iter().find(|(d, _)| d == dependency) {
                assert!(rooms.contains(&name.as_str()), "{dependency} belongs to {rooms:?} alone; crate {name} must not name it");
            }
        }
    }
}

#[test]
fn versions_stand_in_the_workspace_alone() {
    for (name, manifest) in manifests() {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (dependency, value) in table(&manifest, kind) {
                let inherited = value.as_table().and_then(|t| t.get("workspace")) == Some(&Value::Boolean(true));
                assert!(
                    inherited,
                    "crates/{name}/Cargo.toml: write `{dependency}.workspace = true`; the version stands in the workspace's Cargo.toml"
                );
            }
        }
        let lints = manifest.get("lints").and_then(|l| l.get("workspace"));
        assert_eq!(lints, Some(&Value::Boolean(true)), "crates/{name}/Cargo.toml does not take the workspace's lints");
        for field in ["version", "edition", "license", "rust-version"] {
            let inherited = manifest["package"].get(field).and_then(|v| v.get("workspace"));
            assert_eq!(inherited, Some(&Value::Boolean(true)), "crates/{name}/Cargo.toml: write `{field}.workspace = true`");
        }
    }
}

#[test]
fn nothing_in_the_workspace_is_pinned_for_nobody() {
    let workspace: Table = read(&root().join("Cargo.toml")).parse().expect("cargo has read this manifest");
    let manifests = manifests();
    let pinned = workspace["workspace"]["dependencies"].as_table().expect("there are dependencies").keys();
    let unused: Vec<_> = pinned
        .filter(|dependency| {
            let named = |m: &Table, kind| table(m, kind).iter().any(|(d, _)| d == dependency);
            !manifests
                .values()
                .any(|m| ["dependencies", "dev-dependencies", "build-dependencies"].iter().any(|kind| named(m, kind)))
        })
        .collect();
    assert!(unused.is_empty(), "pinned in the workspace's Cargo.toml, but no crate uses them: {unused:?}");
}
