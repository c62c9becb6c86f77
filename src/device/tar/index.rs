//! A tar archive on a disk, seen as a folder that can be read: its headers are walked once.
//!
//! Guarantees: a file is read inside its member only; the latest of several members of one name
//! counts, as when the archive is unpacked. All files lie in one directory of the archive.
//! Does not know: bundles.

#![expect(clippy::disallowed_methods, reason = "one of the doors to the file system")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error as IoError, ErrorKind as IoErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::walker::{Step, TarWalker};
use crate::device::folder::{DiskFile, Folder, FolderFile};
use crate::device::stream::{DescriptorStream, Stop};
use crate::error::{Error, Result};
use crate::format::tar::{RECORD_BYTES, is_header};

/// See the module.
#[derive(Debug)]
pub struct TarIndex {
    path: PathBuf,
    file: Arc<DiskFile>,
    /// Position and length of each payload.
    members: BTreeMap<String, (u64, u64)>,
    whole: bool,
}

impl TarIndex {
    /// Whether the file or disk begins as a tar archive does.
    pub fn is_one(path: &Path) -> Result<bool> {
        let failed = |error: IoError| Error::device("open", &error).at_path(path);
        let found = std::fs::metadata(path).map_err(failed)?.file_type();
        if !found.is_file() && !found.is_block_device() {
            return Ok(false);
        }
        let mut record = [0; RECORD_BYTES];
        let read = File::open(path).map_err(failed)?.read_exact_at(&mut record, 0);
        Ok(read.is_ok() && is_header(&record))
    }

    /// Walks the archive. `is_ours` says which names are of interest.
    pub fn open(path: &Path, is_ours: impl Fn(&str) -> bool) -> Result<Self> {
        let failed = |error: IoError| Error::device("open", &error).at_path(path);
        let file = File::open(path).map_err(failed)?;
        let walked = File::open(path).map_err(failed)?;
        let stream = DescriptorStream::new(walked.into(), Stop::default())?;
        let mut walker = TarWalker::new(Box::new(stream));
        let mut members = BTreeMap::new();
        let mut folder: Option<String> = None;
        let whole = loop {
            match walker.next_member().map_err(|error| error.within(path))? {
                Step::Member(member) if is_ours(&member.name) => {
                    if folder.get_or_insert_with(|| member.folder.clone()) != &member.folder {
                        return Err(Error::format(
                            "expected one bundle in the tar, found files of several directories: \
                             make a tar of each",
                        )
                        .at_path(path));
                    }
                    members.insert(member.name, (member.position, member.bytes));
                }
                Step::Member(_) => {}
                Step::End => break true,
                Step::CutOff => break false,
            }
        };
        Ok(Self {
            path: path.to_path_buf(),
            file: Arc::new(DiskFile::new(file, path.to_path_buf())),
            members,
            whole,
        })
    }

    /// Whether the archive has its end.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }
}

fn read_only() -> Error {
    Error::usage("a tar can only be read")
}

impl Folder for TarIndex {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.members.keys().cloned().collect())
    }

    fn create(&self, _: &str) -> Result<Arc<dyn FolderFile>> {
        Err(read_only().at_path(&self.path))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let absent = || Error::device("open", &IoError::from_raw_os_error(2));
        let &(position, bytes) =
            self.members.get(name).ok_or_else(|| absent().at_path(&self.path.join(name)))?;
        let path = self.path.join(name);
        Ok(Arc::new(MemberFile { file: Arc::clone(&self.file), path, position, bytes }))
    }

    fn rename(&self, _: &str, _: &str) -> Result<()> {
        Err(read_only().at_path(&self.path))
    }

    fn remove(&self, _: &str) -> Result<()> {
        Err(read_only().at_path(&self.path))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn answers_at_once(&self) -> bool {
        self.file.answers_at_once()
    }
}

#[derive(Debug)]
struct MemberFile {
    file: Arc<DiskFile>,
    path: PathBuf,
    position: u64,
    bytes: u64,
}

impl FolderFile for MemberFile {
    fn length(&self) -> Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let failed =
            |source: &IoError| Error::device("read", source).at_path(&self.path).at_offset(offset);
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            return Err(failed(&IoError::new(
                IoErrorKind::UnexpectedEof,
                "the member ends before",
            )));
        }
        self.file.read_at(self.position + offset, buffer).map_err(|error| error.at_path(&self.path))
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(read_only().at_path(&self.path))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tar::{encode_end, encode_member};

    fn written(members: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let mut bytes = Vec::new();
        for (name, payload) in members {
            let headers = encode_member(bytes.len() as u64, name, payload.len() as u64, 1);
            bytes.extend_from_slice(&headers);
            bytes.extend_from_slice(payload);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        let end = encode_end(bytes.len() as u64);
        bytes.extend_from_slice(&end);
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        file
    }

    #[test]
    fn the_files_of_an_archive_are_read_inside_their_members() {
        let file =
            written(&[("x/a", b"first"), ("x/b", b"second"), ("other", b"no"), ("x/a", b"3")]);
        assert!(TarIndex::is_one(file.path()).expect("readable"));
        let index = TarIndex::open(file.path(), |name| name != "other").expect("whole");
        assert!(index.is_whole() && !index.has("other"));
        assert_eq!(index.open("a").expect("there").length().expect("known"), 1, "the latest");
        let second = index.open("b").expect("there");
        let mut bytes = [0; 6];
        second.read_at(0, &mut bytes).expect("read");
        assert_eq!(&bytes, b"second");
        assert!(second.read_at(1, &mut bytes).is_err(), "past the end");
        assert_eq!(index.open("c").expect_err("absent").errno(), Some(2));
        assert!(index.create("c").is_err());
    }

    #[test]
    fn two_directories_are_two_bundles() {
        let file = written(&[("x/a", b"1"), ("y/b", b"2")]);
        assert!(TarIndex::open(file.path(), |_| true).is_err());
        std::fs::write(file.path(), [7; 1024]).expect("written");
        assert!(!TarIndex::is_one(file.path()).expect("readable"));
    }
}
