//! A folder of files that are written once and then only read: what a medium looks like.
//!
//! | face | for |
//! |---|---|
//! | `FileFolder` | a directory of any file system |
//! | `RamFolder` | tests |
//! | `CrashingFolder` (`crashing_folder.rs`) | tests: keeps what was flushed, part of the rest |
//!
//! Guarantees: a name is one path component, so nothing outside the folder is ever touched; an
//! existing file is never overwritten except by `rename`. A file's bytes are durable once its
//! `flush` has returned, its name once the folder's `flush` has.
//! Does not know: what the files mean.

#![expect(clippy::disallowed_methods, reason = "one of the doors to the file system")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{Error as IoError, ErrorKind as IoErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::opening::suits_direct;
use crate::error::{Error, Result};

/// What direct I/O is aligned to here: members are laid out in pages.
const PAGE: u64 = 4096;

/// One file of a folder. It grows as it is written.
pub trait FolderFile: Send + Sync + Debug {
    fn length(&self) -> Result<u64>;
    /// Fills the buffer; an error if the file ends before.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()>;
    /// Afterwards everything written before is durable.
    fn flush(&self) -> Result<()>;

    /// See `Device::direct`; for reading only.
    fn direct(&self, offset: u64, memory: &[u8]) -> Option<BorrowedFd<'_>> {
        let (_by_nobody, _else) = (offset, memory);
        None
    }
}

/// See the module.
pub trait Folder: Send + Sync + Debug {
    /// Where it is, for messages.
    fn path(&self) -> &Path;
    /// The names of all files, in no particular order.
    fn names(&self) -> Result<Vec<String>>;
    /// A new empty file; an error if the name is taken.
    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>>;
    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>>;
    /// Gives a file another name; a file that had it is replaced in one step.
    fn rename(&self, from: &str, to: &str) -> Result<()>;
    /// Afterwards the names are durable.
    fn flush(&self) -> Result<()>;
    /// Takes a file away, if it is there.
    fn remove(&self, name: &str) -> Result<()>;
    /// Bytes that new files may take; `None` if it cannot tell.
    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
    /// Whether reads usually return without waiting for a medium, as `Device::answers_at_once`.
    fn answers_at_once(&self) -> bool {
        true
    }
}

pub(super) fn checked<'a>(folder: &Path, name: &'a str) -> Result<&'a str> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    if plain {
        Ok(name)
    } else {
        Err(Error::usage(format!("expected a plain file name, found {name:?}")).at_path(folder))
    }
}

/// A directory.
#[derive(Debug)]
pub struct FileFolder {
    path: PathBuf,
    /// Whether `create` made the directory itself.
    made: bool,
    /// Files that were created and not renamed away.
    created: Mutex<BTreeSet<String>>,
}

impl FileFolder {
    /// A folder for new files: makes the directory, or takes an empty one that exists.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = Self::resume(path)?;
        if folder.made || folder.names()?.is_empty() {
            return Ok(folder);
        }
        Err(Error::usage(
            "expected a new or an empty directory, found files in it; \
             name another directory or empty this one",
        )
        .at_path(path))
    }

    /// A folder to go on in, whatever is in it; made if it is missing.
    pub fn resume(path: &Path) -> Result<Self> {
        match std::fs::create_dir(path) {
            Ok(()) => {
                flush_directory(parent_of(path))?;
                Ok(Self { made: true, ..Self::at(path) })
            }
            Err(source) if source.kind() == IoErrorKind::AlreadyExists => Self::open(path),
            Err(source) => Err(Error::device("create directory", &source).at_path(path)),
        }
    }

    fn at(path: &Path) -> Self {
        Self { path: path.to_path_buf(), made: false, created: Mutex::default() }
    }

    fn created(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.created.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes back what was made here: the files, and the directory if it was made too. For a work
    /// that failed; what cannot be removed stays.
    pub fn discard(&self) {
        for name in std::mem::take(&mut *self.created()) {
            let _removed = std::fs::remove_file(self.path.join(name));
        }
        if self.made {
            let _removed = std::fs::remove_dir(&self.path);
        }
    }

    /// A folder that exists.
    pub fn open(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path)
            .map_err(|source| Error::device("open", &source).at_path(path))?;
        if !found.is_dir() {
            return Err(Error::format(
                "expected a bundle, which is a directory, found something else",
            )
            .at_path(path));
        }
        Ok(Self::at(path))
    }

    fn member(&self, name: &str) -> Result<PathBuf> {
        Ok(self.path.join(checked(&self.path, name)?))
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn flush_directory(path: &Path) -> Result<()> {
    let directory =
        File::open(path).map_err(|source| Error::device("open", &source).at_path(path))?;
    directory.sync_all().map_err(|source| Error::device("flush directory", &source).at_path(path))
}

/// Opens a file, and nothing that leads elsewhere, waits for somebody, or acts when it is opened.
fn open_plain(path: &Path) -> Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let not_plain =
        || Error::format("expected a plain file, found a link, device or pipe: put the file there");
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    match opened {
        Ok(file) => {
            let found = file.metadata().map_err(|source| Error::device("measure", &source))?;
            if found.is_file() { Ok(file) } else { Err(not_plain()) }
        }
        Err(source) if source.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            Err(not_plain())
        }
        Err(source) => Err(Error::device("open", &source)),
    }
}

impl Folder for FileFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Result<Vec<String>> {
        let failed = |source: IoError| Error::device("list", &source).at_path(&self.path);
        std::fs::read_dir(&self.path)
            .map_err(failed)?
            .map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let path = self.member(name)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|source| Error::device("create", &source).at_path(&path))?;
        self.created().insert(name.to_owned());
        Ok(Arc::new(DiskFile::new(file, path)))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let path = self.member(name)?;
        let file = open_plain(&path).map_err(|error| error.at_path(&path))?;
        Ok(Arc::new(DiskFile::new(file, path)))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (old, new) = (self.member(from)?, self.member(to)?);
        std::fs::rename(&old, &new)
            .map_err(|source| Error::device("rename", &source).at_path(&new))?;
        if self.created().remove(from) {
            self.created().insert(to.to_owned());
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        flush_directory(&self.path)
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.member(name)?;
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != IoErrorKind::NotFound => {
                return Err(Error::device("remove", &source).at_path(&path));
            }
            _ => {}
        }
        self.created().remove(name);
        Ok(())
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        let told = rustix::fs::statvfs(&self.path)
            .map_err(|errno| Error::device("measure", &errno.into()).at_path(&self.path))?;
        Ok(Some(told.f_bavail.saturating_mul(told.f_frsize)))
    }

    fn answers_at_once(&self) -> bool {
        File::open(&self.path).is_ok_and(|directory| !suits_direct(&directory))
    }
}

#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
    /// The same file past the page cache, where its file system can do that.
    direct: Option<File>,
    path: PathBuf,
}

impl DiskFile {
    pub(super) fn new(file: File, path: PathBuf) -> Self {
        let direct = if suits_direct(&file) {
            let flags = (OFlags::DIRECT | OFlags::NOFOLLOW).bits() as i32;
            let writable = rustix::fs::fcntl_getfl(&file).is_ok_and(|f| f.contains(OFlags::RDWR));
            OpenOptions::new().read(true).write(writable).custom_flags(flags).open(&path).ok()
        } else {
            None
        };
        Self { file, direct, path }
    }

    pub(super) fn answers_at_once(&self) -> bool {
        self.direct.is_none()
    }

    /// The descriptor for a request.
    fn suited(&self, offset: u64, memory: &[u8]) -> &File {
        let aligned = offset.is_multiple_of(PAGE) && memory.len().is_multiple_of(PAGE as usize);
        match &self.direct {
            Some(direct) if aligned && memory.as_ptr().addr().is_multiple_of(PAGE as usize) => {
                direct
            }
            _ => &self.file,
        }
    }

    fn failed(&self, operation: &'static str, source: &IoError) -> Error {
        Error::device(operation, source).at_path(&self.path)
    }
}

impl FolderFile for DiskFile {
    fn length(&self) -> Result<u64> {
        let found = self.file.metadata().map_err(|source| self.failed("measure", &source))?;
        Ok(found.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.suited(offset, buffer)
            .read_exact_at(buffer, offset)
            .map_err(|source| self.failed("read", &source).at_offset(offset))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.suited(offset, data)
            .write_all_at(data, offset)
            .map_err(|source| self.failed("write", &source).at_offset(offset))
    }

    fn flush(&self) -> Result<()> {
        self.file.sync_all().map_err(|source| self.failed("flush", &source))
    }

    fn direct(&self, offset: u64, memory: &[u8]) -> Option<BorrowedFd<'_>> {
        let direct = self.direct.as_ref()?;
        std::ptr::eq(self.suited(offset, memory), direct).then(|| direct.as_fd())
    }
}

/// A folder in memory. Clones share the files.
#[derive(Clone, Debug)]
pub struct RamFolder {
    files: Arc<Mutex<BTreeMap<String, Arc<RamFile>>>>,
}

impl Default for RamFolder {
    fn default() -> Self {
        Self { files: Arc::new(Mutex::new(BTreeMap::new())) }
    }
}

impl RamFolder {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<String, Arc<RamFile>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn absent(name: &str) -> Error {
        Error::device("open", &IoError::from_raw_os_error(2)).at_path(Path::new(name))
    }

    /// A copy of a file's bytes.
    pub fn contents(&self, name: &str) -> Result<Vec<u8>> {
        let file = self.locked().get(name).cloned().ok_or_else(|| Self::absent(name))?;
        Ok(file.bytes.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Makes or replaces a file.
    pub fn replace(&self, name: &str, bytes: Vec<u8>) {
        self.locked().insert(name.into(), Arc::new(RamFile { bytes: RwLock::new(bytes) }));
    }
}

impl Folder for RamFolder {
    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.locked().keys().cloned().collect())
    }

    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let name = checked(self.path(), name)?;
        let mut files = self.locked();
        if files.contains_key(name) {
            let taken = IoError::from_raw_os_error(17);
            return Err(Error::device("create", &taken).at_path(Path::new(name)));
        }
        let file = Arc::new(RamFile::default());
        files.insert(name.into(), Arc::clone(&file));
        Ok(file)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let file = self.locked().get(name).cloned().ok_or_else(|| Self::absent(name))?;
        Ok(file)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let to = checked(self.path(), to)?;
        let mut files = self.locked();
        let file = files.remove(from).ok_or_else(|| Self::absent(from))?;
        files.insert(to.into(), file);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.locked().remove(name);
        Ok(())
    }
}

#[derive(Debug, Default)]
struct RamFile {
    bytes: RwLock<Vec<u8>>,
}

impl FolderFile for RamFile {
    fn length(&self) -> Result<u64> {
        Ok(self.bytes.read().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let held = usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..start.checked_add(buffer.len())?));
        let ended = || IoError::new(IoErrorKind::UnexpectedEof, "the file ends before");
        let held = held.ok_or_else(|| Error::device("read", &ended()).at_offset(offset))?;
        buffer.copy_from_slice(held);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).expect("a file in memory fits memory");
        if bytes.len() < start + data.len() {
            bytes.resize(start + data.len(), 0);
        }
        bytes[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn behaves(folder: &dyn Folder) {
        let file = folder.create("a").expect("new");
        file.write_at(4, b"abc").expect("written");
        file.flush().expect("durable");
        assert_eq!(file.length().expect("known"), 7);
        assert!(folder.create("a").is_err(), "a name is used once");
        let mut bytes = [1; 7];
        folder.open("a").expect("there").read_at(0, &mut bytes).expect("read");
        assert_eq!(&bytes, b"\0\0\0\0abc");
        assert!(file.read_at(1, &mut bytes).is_err(), "reading past the end is an error");
        folder.rename("a", "b").expect("renamed");
        assert_eq!(folder.names().expect("listed"), ["b"]);
        for name in ["", ".", "..", "x/y"] {
            assert!(folder.create(name).is_err(), "{name:?}");
        }
        folder.remove("b").expect("removed");
        folder.remove("b").expect("it is gone already");
        assert!(folder.open("b").is_err() && folder.names().expect("listed").is_empty());
        folder.flush().expect("durable");
    }

    #[test]
    fn both_faces_behave_alike() {
        behaves(&RamFolder::new());
        let place = tempfile::tempdir().expect("a place");
        behaves(&FileFolder::create(&place.path().join("new")).expect("made"));
    }

    #[test]
    fn a_directory_with_files_is_not_taken_for_new_ones() {
        let place = tempfile::tempdir().expect("a place");
        FileFolder::create(place.path()).expect("an empty one is fine").create("x").expect("made");
        let refused = FileFolder::create(place.path()).expect_err("not empty");
        assert_eq!(refused.kind(), ErrorKind::Usage);
    }

    #[test]
    fn links_pipes_and_directories_are_not_taken_for_files() {
        let place = tempfile::tempdir().expect("a place");
        let folder = FileFolder::open(place.path()).expect("there");
        std::fs::write(place.path().join("file"), "x").expect("written");
        std::os::unix::fs::symlink("file", place.path().join("link")).expect("made");
        std::os::unix::fs::symlink("/dev/zero", place.path().join("device")).expect("made");
        std::fs::create_dir(place.path().join("directory")).expect("made");
        let pipe = place.path().join("pipe");
        let mode = rustix::fs::Mode::from(0o600);
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).expect("made");
        for name in ["link", "device", "directory", "pipe"] {
            let refused = folder.open(name).expect_err("not a plain file");
            assert_eq!(refused.kind(), ErrorKind::Format, "{name}");
        }
        folder.open("file").expect("a plain file");
    }

    #[test]
    fn what_is_discarded_leaves_the_place_as_it_was() {
        let place = tempfile::tempdir().expect("a place");
        for (path, made) in [(place.path().join("new"), true), (place.path().join("old"), false)] {
            if !made {
                std::fs::create_dir(&path).expect("made");
            }
            let folder = FileFolder::create(&path).expect("empty");
            folder.create("a").expect("new");
            folder.rename("a", "b").expect("renamed");
            folder.create("c").expect("new");
            folder.discard();
            assert_eq!(path.exists(), !made);
        }
        let mixed = place.path().join("mixed");
        let folder = FileFolder::create(&mixed).expect("empty");
        folder.create("ours").expect("new");
        std::fs::write(mixed.join("theirs"), "x").expect("written");
        folder.discard();
        assert_eq!(folder.names().expect("listed"), ["theirs"]);
    }
}
