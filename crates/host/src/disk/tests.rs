//! Tests of disk images.
use super::*;
use std::fs;

fn image(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn open(path: &Path, access: Access) -> Result<Image> {
    Image::open(path, None, access)
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.img", "a.qcow2"] {
        let path = dir.path().join(name);
        let disk = Image::create(&path, None, 1 << 20).unwrap();
        let mut got = [7; 5];
        disk.read_at(512, &mut got).unwrap();
        assert_eq!(got, [0; 5]);
        disk.write_at(512, b"hello").unwrap();
        disk.flush().unwrap();
        disk.read_at(512, &mut got).unwrap();
        assert_eq!((&got, disk.size(), disk.access()), (b"hello", 1 << 20, Access::ReadWrite));
        Image::create(&path, None, 1 << 20).unwrap_err();
        drop(disk);
        let disk = open(&path, Access::ReadOnly).unwrap();
        disk.read_at(512, &mut got).unwrap();
        assert_eq!(&got, b"hello");
        assert!(disk.write_at(0, b"x").unwrap_err().to_string().contains("read-only"));
        disk.flush().unwrap();
    }
}

#[test]
fn nothing_beyond_the_end() {
    let file = image(1024);
    let disk = open(file.path(), Access::ReadWrite).unwrap();
    let mut sector = [0; 512];
    disk.read_at(512, &mut sector).unwrap();
    for offset in [513, 1024, u64::MAX - 10] {
        let error = disk.read_at(offset, &mut sector).unwrap_err().to_string();
        assert!(error.contains("ends at 1024"), "{error}");
        disk.write_at(offset, &sector).unwrap_err();
    }
    assert_eq!(fs::metadata(file.path()).unwrap().len(), 1024);
    // Somebody cuts the file under us.
    file.as_file().set_len(512).unwrap();
    assert!(disk.read_at(512, &mut sector).unwrap_err().to_string().contains("shorter"));
}

#[test]
fn one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.img", "a.qcow2"] {
        let path = dir.path().join(name);
        let writer = Image::create(&path, None, 1 << 20).unwrap();
        assert!(open(&path, Access::ReadWrite).unwrap_err().to_string().contains("in use"));
        assert!(open(&path, Access::ReadOnly).unwrap_err().to_string().contains("in use"));
        drop(writer);
        let _readers = (open(&path, Access::ReadOnly).unwrap(), open(&path, Access::ReadOnly).unwrap());
        open(&path, Access::ReadWrite).unwrap_err();
    }
}

#[test]
fn what_is_no_disk_is_refused_with_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none");
    for (path, words) in [(missing.as_path(), "truncate --size"), (dir.path(), "folder"), (Path::new("/dev/null"), "disk image")]
    {
        let error = open(path, Access::ReadWrite).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    for size in [0, 511, 513] {
        assert!(open(image(size).path(), Access::ReadOnly).unwrap_err().to_string().contains("multiple of 512"));
    }
}

/// A guest that writes the head of a qcow2 image into its raw disk must not make us follow it.
#[test]
fn the_format_is_never_what_a_guest_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, [7; 4096]).unwrap();
    let forged = dir.path().join("forged.qcow2");
    drop(Image::create(&forged, None, 1 << 20).unwrap());
    let mut head = fs::read(&forged).unwrap();
    // The backing file's name goes behind the header (docs/interop/qcow2.txt of QEMU: offset at 8, length at 16).
    let name = secret.to_str().unwrap().as_bytes();
    head[8..16].copy_from_slice(&1024u64.to_be_bytes());
    head[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    head[1024..1024 + name.len()].copy_from_slice(name);

    let raw = dir.path().join("disk.img");
    fs::write(&raw, &head).unwrap();
    let error = open(&raw, Access::ReadWrite).unwrap_err().to_string();
    assert!(error.contains("looks like a qcow2 image") && error.contains("format=raw"), "{error}");
    let disk = Image::open(&raw, Some(Format::Raw), Access::ReadWrite).unwrap();
    assert_eq!(disk.size(), head.len() as u64);
    drop(disk);
    let error = Image::open(&raw, Some(Format::Qcow2), Access::ReadOnly).unwrap_err().to_string();
    assert!(error.contains("another file") && error.contains("qemu-img convert"), "{error}");
    // Neither is what is said to be qcow2 and is not.
    let error = Image::open(&secret, Some(Format::Qcow2), Access::ReadOnly).unwrap_err().to_string();
    assert!(error.contains("as a qcow2 image") && error.contains("format=raw"), "{error}");
}
