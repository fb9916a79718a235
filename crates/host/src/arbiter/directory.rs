//! The arbiter in a directory both hosts can reach.
//!
//! *In*: claims. *Out*: verdicts, and a file for every epoch that was won. *Invariant*: a claim's file is whole from the moment it is there, and a win
//! is reported only when a power failure can't undo it.
//!
//! # How
//! The claim is a file `VM.epoch-N` holding the owner's name. It is written under a name of the owner's own, made durable
//! with fsync, and then given its final name with link(2), which fails if the name exists. So the file is complete from the moment
//! it is there, and an owner that crashes half-way leaves nothing that counts. The directory is fsynced before a win is
//! reported: a win that a power failure could undo is none.
//!
//! link(2) is exclusive on local file systems, on NFS version 2 to 4 and on clustered ones, also where O_EXCL is not. On NFS the *answer*
//! to a link that succeeded may be lost and its repetition be told that the file exists. Therefore the error
//! code is not believed: whoever's name is in the file has won. (open(2), under O_EXCL, recommends the same.)

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Arbiter, Verdict, check_name};
use crate::error::{Error, Result};

/// Longest owner's name.
const LONGEST_OWNER: u64 = 256;

/// The arbiter in a shared directory.
#[derive(Debug, Clone)]
pub struct DirectoryArbiter {
    folder: PathBuf,
}

impl DirectoryArbiter {
    /// An arbiter in `folder`, which must exist: creating it here could hide that the shared file system is not mounted.
    pub fn open(folder: &Path) -> Result<Self> {
        let refuse = |why: String| {
            Err(Error::new(format!("{} cannot be the arbiter", folder.display()))
                .because(why)
                .next("give --arbiter a directory that exists, is writable, and is the same one for both hosts"))
        };
        match fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return refuse("it is not a directory".to_owned()),
            Err(e) => return refuse(e.to_string()),
        }
        // Better now than in the moment of need. The name is one no VM can have.
        let probe = folder.join(format!(".probe-{}", std::process::id()));
        match File::create(&probe).and_then(|file| file.sync_all()) {
            Ok(()) => {
                // It is in nobody's way if it can't be removed.
                let _ = fs::remove_file(&probe);
            }
            Err(e) => return refuse(format!("it is not writable: {e}")),
        }
        Ok(Self { folder: folder.to_owned() })
    }

    /// The file that says who owns an epoch.
    #[must_use]
    pub fn path(&self, vm: &str, epoch: u64) -> PathBuf {
        self.folder.join(format!("{vm}.epoch-{epoch}"))
    }

    fn try_claim(&self, vm: &str, epoch: u64, owner: &str) -> std::result::Result<Verdict, String> {
        check_name("VM", vm)?;
        check_name("owner", owner)?;
        let path = self.path(vm, epoch);
        // Asked before, or decided long ago: no need to write.
        if let Some(found) = read_owner(&path)? {
            return self.verdict(found, owner);
        }
        let say = |what: &str, path: &Path, e: std::io::Error| format!("cannot {what} {}: {e}", path.display());
        let (mut file, draft) = self.new_draft(vm, epoch, owner)?;
        file.write_all(owner.as_bytes()).and_then(|()| file.sync_all()).map_err(|e| say("write", &draft, e))?;
        drop(file);
        let linked = fs::hard_link(&draft, &path);
        // The draft has served; a left-over does no harm.
        let _ = fs::remove_file(&draft);
        match (read_owner(&path)?, linked) {
            (Some(found), _) => self.verdict(found, owner),
            (None, Err(e)) => Err(say("create", &path, e)),
            (None, Ok(())) => Err(format!("{} vanished after it was created", path.display())),
        }
    }

    /// A file nobody else has open. It must be a new one: a draft of the same name could be the very file that was linked a moment ago, and writing to it
    /// would empty a claim.
    fn new_draft(&self, vm: &str, epoch: u64, owner: &str) -> std::result::Result<(File, PathBuf), String> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o644);
        // Left-overs of crashes are passed over.
        for number in 0..1000 {
            let draft = self.folder.join(format!(".{vm}.epoch-{epoch}.{owner}.{}-{number}", std::process::id()));
            match options.open(&draft) {
                Ok(file) => return Ok((file, draft)),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(format!("cannot create {}: {e}", draft.display())),
            }
        }
        Err(format!("{} is full of old drafts (.{vm}.epoch-{epoch}.*); remove them", self.folder.display()))
    }

    fn verdict(&self, found: String, owner: &str) -> std::result::Result<Verdict, String> {
        if found != owner {
            return Ok(Verdict::Lost { owner: found });
        }
        // Also when the file was there before: an earlier self may have died between link and fsync.
        let durable = File::open(&self.folder).and_then(|folder| folder.sync_all());
        durable.map_err(|e| format!("cannot make the entry in {} durable: {e}", self.folder.display()))?;
        Ok(Verdict::Won)
    }
}

impl Arbiter for DirectoryArbiter {
    fn claim(&self, vm: &str, epoch: u64, owner: &str) -> Verdict {
        self.try_claim(vm, epoch, owner).unwrap_or_else(|why| Verdict::Unreachable { why })
    }
    fn owner(&self, vm: &str, epoch: u64) -> std::result::Result<Option<String>, String> {
        check_name("VM", vm)?;
        read_owner(&self.path(vm, epoch))
    }
}

fn read_owner(path: &Path) -> std::result::Result<Option<String>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("cannot open {}: {e}", path.display())),
    };
    let mut text = String::new();
    file.take(LONGEST_OWNER).read_to_string(&mut text).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    if text.is_empty() {
        // Ours are never empty: somebody else made this file, or a file system lost its content.
        return Err(format!(
            "{} is empty, so nobody knows whose epoch it is; see which side runs and write its name into it",
            path.display()
        ));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Arc, Barrier};

    fn arbiter() -> (tempfile::TempDir, DirectoryArbiter) {
        let dir = tempfile::tempdir().unwrap();
        let arbiter = DirectoryArbiter::open(dir.path()).unwrap();
        (dir, arbiter)
    }

    #[test]
    fn one_wins_and_stays_the_winner() {
        let (dir, a) = arbiter();
        let b = DirectoryArbiter::open(dir.path()).unwrap();
        assert_eq!(a.claim("vm", 1, "left"), Verdict::Won);
        assert_eq!(b.claim("vm", 1, "right"), Verdict::Lost { owner: "left".into() });
        assert_eq!(a.claim("vm", 1, "left"), Verdict::Won);
        // The next epoch and another VM are free.
        assert_eq!(b.claim("vm", 2, "right"), Verdict::Won);
        assert_eq!(b.claim("other", 1, "right"), Verdict::Won);
        // Nothing but the claims is left.
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["other.epoch-1", "vm.epoch-1", "vm.epoch-2"]);
    }

    #[test]
    fn of_many_at_once_exactly_one_wins() {
        let (_dir, arbiter) = arbiter();
        for epoch in 0..20 {
            let barrier = Arc::new(Barrier::new(8));
            let threads: Vec<_> = (0..8)
                .map(|n| {
                    let (arbiter, barrier) = (arbiter.clone(), Arc::clone(&barrier));
                    std::thread::spawn(move || {
                        barrier.wait();
                        arbiter.claim("vm", epoch, &format!("host-{n}"))
                    })
                })
                .collect();
            let verdicts: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            let won: Vec<usize> = (0..8).filter(|n| verdicts[*n] == Verdict::Won).collect();
            assert_eq!(won.len(), 1, "{verdicts:?}");
            let winner = format!("host-{}", won[0]);
            assert_eq!(verdicts.iter().filter(|v| **v == Verdict::Lost { owner: winner.clone() }).count(), 7);
        }
    }

    #[test]
    fn one_owner_may_ask_from_several_threads() {
        let (_dir, arbiter) = arbiter();
        for epoch in 0..20 {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    let arbiter = arbiter.clone();
                    std::thread::spawn(move || arbiter.claim("vm", epoch, "left"))
                })
                .collect();
            for thread in threads {
                assert_eq!(thread.join().unwrap(), Verdict::Won);
            }
        }
    }

    #[test]
    fn a_crash_before_the_link_leaves_nothing_that_counts() {
        let (dir, arbiter) = arbiter();
        fs::write(dir.path().join(format!(".vm.epoch-1.right.{}-0", std::process::id())), b"ri").unwrap();
        assert_eq!(arbiter.claim("vm", 1, "right"), Verdict::Won);
        assert_eq!(arbiter.claim("vm", 1, "left"), Verdict::Lost { owner: "right".into() });
    }

    #[test]
    fn what_is_not_known_is_unreachable_and_says_why() {
        let (dir, arbiter) = arbiter();
        fs::write(arbiter.path("vm", 1), b"").unwrap();
        let verdict = arbiter.claim("vm", 1, "left");
        assert!(matches!(&verdict, Verdict::Unreachable { why } if why.contains("is empty")), "{verdict}");
        for name in ["", "../vm", ".vm", "a/b", "a b"] {
            assert!(matches!(arbiter.claim(name, 1, "left"), Verdict::Unreachable { .. }));
            assert!(matches!(arbiter.claim("vm", 2, name), Verdict::Unreachable { .. }));
        }
        let path = dir.path().to_owned();
        drop(dir);
        let verdict = arbiter.claim("vm", 3, "left");
        assert!(matches!(&verdict, Verdict::Unreachable { why } if why.contains("No such file")), "{verdict}");
        let error = DirectoryArbiter::open(&path).unwrap_err().to_string();
        assert!(error.contains("--arbiter"), "{error}");
    }

    #[test]
    fn a_directory_one_may_not_write_to_is_refused_at_the_start() {
        if rustix::process::geteuid().is_root() {
            // Root may write everywhere but into a file.
            let file = tempfile::NamedTempFile::new().unwrap();
            assert!(DirectoryArbiter::open(file.path()).unwrap_err().to_string().contains("not a directory"));
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o500)).unwrap();
        assert!(DirectoryArbiter::open(dir.path()).unwrap_err().to_string().contains("not writable"));
    }
}
