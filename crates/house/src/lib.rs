//! The rules of the house, as tests: this crate ships nothing.
//!
//! *In*: the workspace's sources and what `cargo metadata` says of it. *Out*: failures that name the place and the way out.
//!
//! | test | holds that |
//! | --- | --- |
//! | `purity` | the crates behind the door (`x86`, `machine`, `log`, `pair`) reach no clock, socket, thread, file or randomness |
//! | `rooms` | the arrows between crates go one way; some dependencies are named by one crate only; versions stand in one place |
//! | `tidy` | files have a head and a bounded length, nothing is left undone, links in the documents lead somewhere |
//!
//! Here is what they share: [`source`], Rust text without its comments, strings and tests.
pub mod source;

use std::path::{Path, PathBuf};

/// The workspace's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("this crate lies two folders deep").to_owned()
}

/// All files below `folder` with this extension, in order. Build results and hidden folders are left out.
pub fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = folder.read_dir().unwrap_or_else(|e| panic!("cannot list {}: {e}", folder.display()));
        for entry in entries {
            let path = entry.expect("an entry of a folder can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with('.') || name.starts_with("target") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A file's text.
pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
}

/// A path as people write it: from the workspace's folder on.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}
