//! A directory of state: files as devices, small records replaced atomically.
//!
//! Guarantees: what `create`, `replace` and `remove` did is durable when they return; after a
//! crash within one of them its whole effect is there or none of it (a directory of several files
//! may be removed in part).
//! Does not know: what the files mean.

#![expect(clippy::disallowed_methods, reason = "the one door to directories")]

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{Device, FileDevice, OpenOptions};
use crate::error::{Error, Result};
use crate::units::SECTOR_BYTES;

/// Room on the file system that a directory lies on, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub free: u64,
    pub total: u64,
}

/// See the module. Names are plain: not empty, no slash, neither `.` nor `..`.
pub trait Directory: Send + Sync + Debug {
    /// A new file of `size` zero bytes, sparse. Refuses a name that exists.
    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Device>>;

    /// A file that was made here; refuses one that is missing or ends within a sector.
    fn open(&self, name: &str) -> Result<Arc<dyn Device>>;

    /// The same file past the page cache, where the file system allows it, for long requests.
    fn open_direct(&self, name: &str) -> Result<Arc<dyn Device>> {
        self.open(name)
    }

    /// What is in it, ascending.
    fn names(&self) -> Result<Vec<String>>;

    /// Gives the record `name` the contents `bytes`, whatever was there.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()>;

    /// The contents of a record, `None` if there is none; refuses one longer than `bytes_max`.
    fn read(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>>;

    /// Removes a file, or a directory with all that is in it. What is not there is removed already.
    /// Needs no free space.
    fn remove(&self, name: &str) -> Result<()>;

    /// The directory `name` in it, made if missing.
    fn directory(&self, name: &str) -> Result<Arc<dyn Directory>>;

    /// `None` if it cannot tell.
    fn space(&self) -> Result<Option<Space>>;
}

/// State may hold keys: nobody but its owner reads it, whatever the directory allows.
const OWNER_ONLY: u32 = 0o600;

/// A directory of a file system, locked against other processes if asked for.
#[derive(Debug)]
pub struct FileDirectory {
    path: PathBuf,
    /// Open for as long as the lock is held.
    opened: File,
}

impl FileDirectory {
    /// Makes the directory if it is missing. `lock`: refuses one that another process has locked.
    pub fn open(path: impl AsRef<Path>, lock: bool) -> Result<Self> {
        let path = path.as_ref();
        let at = |error: Error| error.at_path(path);
        make_directory(path).map_err(at)?;
        let opened = File::open(path).map_err(|error| at(Error::device("open", &error)))?;
        if lock {
            rustix::fs::flock(&opened, FlockOperation::NonBlockingLockExclusive).map_err(
                |error| match error {
                    Errno::WOULDBLOCK => {
                        at(Error::busy("in use by another process of ours: stop it first"))
                    }
                    error => at(Error::device("lock", &error.into())),
                },
            )?;
        }
        Ok(Self { path: path.to_path_buf(), opened })
    }

    fn at(&self, name: &str) -> PathBuf {
        assert!(is_plain(name), "{name:?} is no plain name");
        self.path.join(name)
    }

    fn flush(&self) -> Result<()> {
        self.opened.sync_all().map_err(|e| Error::device("flush", &e).at_path(&self.path))
    }
}

pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

/// Makes the names in a directory durable.
pub(super) fn flush_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::device("flush the directory", &error).at_path(path))
}

fn make_directory(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent {
        make_directory(parent)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::device("create the directory", &error));
        }
        _ => {}
    }
    flush_directory(parent.unwrap_or(Path::new(".")))
}

const TEMPORARY: &str = ".new";

impl Directory for FileDirectory {
    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Device>> {
        let path = self.at(name);
        if path.exists() {
            return Err(Error::usage("expected a new name, found a file: remove it first")
                .with_errno(Errno::EXIST.raw_os_error())
                .at_path(&path));
        }
        let options = OpenOptions { create_size: Some(size), ..OpenOptions::default() };
        Ok(Arc::new(FileDevice::open(path, options)?))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Device>> {
        let path = self.at(name);
        let words = match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                "expected a file that belongs here, found nothing: bring it back".to_owned()
            }
            Ok(found) if found.len() == 0 || !found.len().is_multiple_of(SECTOR_BYTES) => format!(
                "expected a file of whole sectors, found {} bytes: it was cut off; bring it back",
                found.len()
            ),
            _ => return Ok(Arc::new(FileDevice::open(path, OpenOptions::default())?)),
        };
        Err(Error::integrity(words).at_path(&path))
    }

    fn open_direct(&self, name: &str) -> Result<Arc<dyn Device>> {
        let options = OpenOptions { direct: true, ..OpenOptions::default() };
        match FileDevice::open(self.at(name), options) {
            Ok(device) => Ok(Arc::new(device)),
            Err(_) => self.open(name),
        }
    }

    fn names(&self) -> Result<Vec<String>> {
        let failed = |error| Error::device("list", &error).at_path(&self.path);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.at(name);
        let temporary = self.at(&format!("{name}{TEMPORARY}"));
        // A temporary one that a crash left may have been made by others, for others to read.
        let _left_over = fs::remove_file(&temporary);
        let new = File::options().write(true).create_new(true).mode(OWNER_ONLY).open(&temporary);
        let written = new.and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        });
        if let Err(error) = written {
            let _removed = fs::remove_file(&temporary);
            return Err(Error::device("replace", &error).at_path(&path));
        }
        self.flush()
    }

    fn read(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>> {
        let path = self.at(name);
        let failed = |error| Error::device("read", &error).at_path(&path);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > bytes_max {
            return Err(Error::format(format!("expected at most {bytes_max} bytes, found more"))
                .at_path(&path));
        }
        Ok(Some(bytes))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.at(name);
        let removed = match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::device("remove", &error).at_path(&path))
            }
            _ => self.flush(),
        }
    }

    fn directory(&self, name: &str) -> Result<Arc<dyn Directory>> {
        Ok(Arc::new(Self::open(self.at(name), false)?))
    }

    fn space(&self) -> Result<Option<Space>> {
        let told = rustix::fs::fstatvfs(&self.opened)
            .map_err(|error| Error::device("find the free space", &error.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(told.f_frsize);
        Ok(Some(Space { free: bytes(told.f_bavail), total: bytes(told.f_blocks) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn opened() -> (tempfile::TempDir, FileDirectory) {
        let home = tempfile::tempdir().expect("a temporary directory");
        let directory = FileDirectory::open(home.path().join("a/b"), true).expect("opened");
        (home, directory)
    }

    #[test]
    fn a_record_is_for_its_owner_only_also_where_a_crash_left_another() {
        use std::os::unix::fs::PermissionsExt;
        let home = tempfile::tempdir().expect("a temporary directory");
        let left = home.path().join("record.new");
        fs::write(&left, "left").expect("written");
        fs::set_permissions(&left, fs::Permissions::from_mode(0o666)).expect("open to all");
        let directory = FileDirectory::open(home.path(), false).expect("opened");
        directory.replace("record", b"a key").expect("replaced");
        let found = fs::metadata(home.path().join("record")).expect("there");
        assert_eq!(found.permissions().mode() & 0o777, 0o600);
        assert!(!left.exists());
    }

    #[test]
    fn a_record_holds_what_was_put_there_last() {
        let (_home, directory) = opened();
        assert_eq!(directory.read("record", 10).expect("read"), None);
        directory.replace("record", b"one").expect("replaced");
        directory.replace("record", b"two").expect("replaced");
        assert_eq!(directory.read("record", 10).expect("read").as_deref(), Some(&b"two"[..]));
        assert_eq!(directory.names().expect("listed"), ["record"]);
        let refused = directory.read("record", 2).expect_err("too long");
        assert_eq!(refused.kind(), ErrorKind::Format);
    }

    #[test]
    fn a_locked_directory_is_busy_for_a_second_opener() {
        let (home, directory) = opened();
        let path = home.path().join("a/b");
        let refused = FileDirectory::open(&path, true).expect_err("locked");
        assert_eq!(refused.kind(), ErrorKind::Busy);
        drop(directory);
        FileDirectory::open(&path, true).expect("free again");
    }

    #[test]
    fn files_are_made_once_and_removed_with_their_directory() {
        let (_home, directory) = opened();
        let inner = directory.directory("inner").expect("made");
        let file = inner.create("file", 4096).expect("created");
        file.write_at(0, &[1; 512]).expect("written");
        assert!(inner.create("file", 4096).is_err(), "it exists");
        assert_eq!(inner.open("file").expect("opened").size(), 4096);
        directory.remove("inner").expect("removed");
        directory.remove("inner").expect("removing twice is no error");
        assert_eq!(directory.names().expect("listed"), [""; 0]);
        let space = directory.space().expect("told").expect("known");
        assert!(space.free <= space.total);
    }
}
