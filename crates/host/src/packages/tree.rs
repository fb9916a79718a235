//! Unpacking a package, and telling later whether it is still the same.
//!
//! *In*: a .deb, or a folder. *Out*: a folder, or its digest. *Invariant*: a folder under its final name is whole; two folders with
//! equal digests hold the same names, kinds, permissions to execute, link targets and contents.

use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Context, Error, Result};

/// Unpacks `deb` into `folder` (which must not be there half-done: it is replaced) and returns the folder's digest.
pub fn unpack(deb: &Path, folder: &Path) -> Result<String> {
    let mut draft = folder.as_os_str().to_owned();
    draft.push(".unpacking");
    let draft = Path::new(&draft);
    for stale in [draft, folder] {
        if stale.exists() {
            fs::remove_dir_all(stale).at("remove", stale)?;
        }
    }
    let output = Command::new("dpkg-deb")
        .arg("-x")
        .arg(deb)
        .arg(draft)
        .output()
        .map_err(|e| Error::new("cannot run dpkg-deb").because(e).next("install dpkg (Debian and Ubuntu always have it)"))?;
    if !output.status.success() {
        return Err(Error::new(format!("cannot unpack {}", deb.display()))
            .because(String::from_utf8_lossy(&output.stderr).trim().to_owned())
            .next("check the free space (df -h) and try again"));
    }
    let digest = digest(draft)?;
    fs::rename(draft, folder).at("create", folder)?;
    Ok(digest)
}

/// The digest of a folder, 32 hexadecimal digits.
pub fn digest(folder: &Path) -> Result<String> {
    let mut hash = Xxh3::new();
    visit(folder, folder, &mut hash)?;
    Ok(format!("{:032x}", hash.digest128()))
}

fn visit(root: &Path, folder: &Path, hash: &mut Xxh3) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).at("list", folder)? {
        names.push(entry.at("list", folder)?.path());
    }
    names.sort();
    for path in names {
        let metadata = fs::symlink_metadata(&path).at("look at", &path)?;
        let name = path.strip_prefix(root).unwrap_or(&path).as_os_str().as_bytes();
        // Lengths go in first, so that no two trees feed the same bytes.
        hash.update(&(name.len() as u64).to_le_bytes());
        hash.update(name);
        if metadata.is_dir() {
            hash.update(b"d");
            visit(root, &path, hash)?;
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path).at("read", &path)?;
            hash.update(b"l");
            hash.update(&(target.as_os_str().len() as u64).to_le_bytes());
            hash.update(target.as_os_str().as_bytes());
        } else {
            let executable = u8::from(metadata.mode() & 0o111 != 0);
            hash.update(&[b'f', executable]);
            hash.update(&metadata.len().to_le_bytes());
            let mut file = fs::File::open(&path).at("open", &path)?;
            let mut buffer = vec![0; 128 << 10];
            loop {
                let n = file.read(&mut buffer).at("read", &path)?;
                if n == 0 {
                    break;
                }
                hash.update(&buffer[..n]);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn every_kind_of_change_shows() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a/f");
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(&file, b"x").unwrap();
        symlink("f", dir.path().join("a/l")).unwrap();
        let mut seen = vec![digest(dir.path()).unwrap()];
        assert_eq!(digest(dir.path()).unwrap(), seen[0]);

        fs::write(&file, b"y").unwrap();
        seen.push(digest(dir.path()).unwrap());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        seen.push(digest(dir.path()).unwrap());
        fs::remove_file(dir.path().join("a/l")).unwrap();
        symlink("g", dir.path().join("a/l")).unwrap();
        seen.push(digest(dir.path()).unwrap());
        fs::write(dir.path().join("empty"), b"").unwrap();
        seen.push(digest(dir.path()).unwrap());
        fs::create_dir(dir.path().join("d")).unwrap();
        seen.push(digest(dir.path()).unwrap());
        for i in 0..seen.len() {
            assert!(!seen[..i].contains(&seen[i]), "change {i} does not show");
        }
    }

    #[test]
    fn something_that_is_no_package_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("x.deb");
        fs::write(&deb, b"not a package").unwrap();
        let error = unpack(&deb, &dir.path().join("x")).unwrap_err();
        assert!(error.to_string().contains("x.deb"), "{error}");
        assert!(!dir.path().join("x").exists());
    }
}
