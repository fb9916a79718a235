//! Writing the archive format the Linux kernel unpacks as its first root file system: cpio "newc".
//!
//! *In*: folders, files, links, device nodes. *Out*: the archive's bytes. *Invariant*: the same calls give the same bytes (no clock, no inode
//! numbers of the host), every folder comes before what is in it, and no path appears twice.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux kernel.

use std::collections::BTreeSet;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    paths: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder, and the folders above it. A folder that is there already stays as it is.
    pub fn folder(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.paths.contains(path) {
            return;
        }
        self.folders_above(path);
        self.entry(path, S_IFDIR | 0o755, 2, (0, 0), &[]);
    }

    /// A file with its permissions.
    ///
    /// # Panics
    /// If the path is taken or the file has 4 GiB or more, which the format can't say.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.folders_above(path);
        self.entry(path, S_IFREG | permissions, 1, (0, 0), content);
    }

    /// A symbolic link.
    ///
    /// # Panics
    /// If the path is taken.
    pub fn link(&mut self, path: &str, target: &str) {
        self.folders_above(path);
        self.entry(path, S_IFLNK | 0o777, 1, (0, 0), target.as_bytes());
    }

    /// A character device.
    ///
    /// # Panics
    /// If the path is taken.
    pub fn character_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) {
        self.folders_above(path);
        self.entry(path, S_IFCHR | permissions, 1, (major, minor), &[]);
    }

    /// Whether something of this name is in the archive.
    #[must_use]
    pub fn has(&self, path: &str) -> bool {
        self.paths.contains(path.trim_matches('/'))
    }

    /// The archive, ended as the format demands.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 1, (0, 0), 0);
        self.bytes
    }

    fn folders_above(&mut self, path: &str) {
        if let Some((above, _)) = path.trim_matches('/').rsplit_once('/') {
            self.folder(above);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
        let path = path.trim_matches('/');
        assert!(self.paths.insert(path.to_owned()), "{path} is in the archive twice");
        self.inode += 1;
        let length = u32::try_from(content.len()).expect("a cpio member is smaller than 4 GiB");
        self.header(path, mode, links, device, length);
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn header(&mut self, name: &str, mode: u32, links: u32, device: (u32, u32), length: u32) {
        let name_size = u32::try_from(name.len() + 1).expect("a path is short");
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device (major, minor), node (major, minor), name size, check
        let fields = [self.inode, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, name_size, 0];
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let mut archive = Archive::new();
        archive.file("a/b", 0o644, b"hello");
        archive.link("/l", "a/b");
        archive.character_device("dev/console", 0o600, 5, 1);
        let zeros = |n| "00000000".repeat(n);
        let expected = [
            format!("070701{:08X}{:08X}{}00000002{}00000002{}a\0", 1, 0o40_755, zeros(2), zeros(6), zeros(1)),
            format!(
                "070701{:08X}{:08X}{}00000001{}00000005{}00000004{}a/b\0\0\0hello\0\0\0",
                2,
                0o100_644,
                zeros(2),
                zeros(1),
                zeros(4),
                zeros(1)
            ),
            format!(
                "070701{:08X}{:08X}{}00000001{}00000003{}00000002{}l\0a/b\0",
                3,
                0o120_777,
                zeros(2),
                zeros(1),
                zeros(4),
                zeros(1)
            ),
            format!("070701{:08X}{:08X}{}00000002{}00000004{}dev\0\0\0", 4, 0o40_755, zeros(2), zeros(6), zeros(1)),
            format!("070701{:08X}{:08X}{}00000001{}000000050000000100000", 5, 0o20_600, zeros(2), zeros(4)),
        ]
        .concat();
        let bytes = archive.finish();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.starts_with(&expected), "\n{}\n{}", text.escape_debug(), expected.escape_debug());
        assert!(text.contains("TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn gnu_cpio_agrees_when_it_is_there() {
        use std::io::Write;
        let mut archive = Archive::new();
        archive.file("x/y/z", 0o755, &[7; 1000]);
        archive.link("s", "x");
        let bytes = archive.finish();
        let list = std::process::Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn();
        let Ok(mut child) = list else { return };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "x\nx/y\nx/y/z\ns\n");
    }

    #[test]
    #[should_panic(expected = "twice")]
    fn nothing_is_there_twice() {
        let mut archive = Archive::new();
        archive.file("a", 0o644, b"");
        archive.file("/a", 0o644, b"");
    }
}
