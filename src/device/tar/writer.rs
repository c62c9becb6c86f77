//! A folder of which a tar archive goes out, member by member, as its files are finished.
//!
//! | a file was | and then | |
//! |---|---|---|
//! | created, written | renamed | it has the new name |
//! | | another is created, or the folder flushed | it is sent and forgotten |
//!
//! Guarantees: members go out in the order in which they were created, each payload at a multiple
//! of 4096; one file is held at a time, of at most `TAR_MEMBER_BYTES_MAX`.
//! Does not know: bundles. What was sent cannot be read or changed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::folder::{Folder, FolderFile, checked};
use crate::device::stream::ByteSink;
use crate::error::{Error, Result};
use crate::format::tar::{encode_end, encode_member, padded};
use crate::limits::TAR_MEMBER_BYTES_MAX;

/// See the module.
#[derive(Debug)]
pub struct TarFolder {
    path: PathBuf,
    sending: Arc<Mutex<Sending>>,
}

#[derive(Debug)]
struct Sending {
    sink: Box<dyn ByteSink>,
    modified_s: u64,
    position: u64,
    names: BTreeSet<String>,
    held: Option<Held>,
    /// The memory of the file sent last, used again.
    spare: Vec<u8>,
    /// Counts files, so that one that was sent is told from the one that is held.
    created: u64,
}

#[derive(Debug)]
struct Held {
    name: String,
    bytes: Vec<u8>,
}

impl TarFolder {
    /// `path` is for messages; `modified_s` the time (seconds since 1970) of all members.
    pub fn new(sink: Box<dyn ByteSink>, path: &Path, modified_s: u64) -> Self {
        let sending = Sending {
            sink,
            modified_s,
            position: 0,
            names: BTreeSet::new(),
            held: None,
            spare: Vec::new(),
            created: 0,
        };
        Self { path: path.to_path_buf(), sending: Arc::new(Mutex::new(sending)) }
    }

    /// Ends the archive and makes it durable. Without it a reader takes it for cut off.
    pub fn finish(&self) -> Result<()> {
        let mut sending = self.locked();
        sending.send_held().map_err(|error| error.within(&self.path))?;
        let end = encode_end(sending.position);
        sending.put(&end).and_then(|()| sending.sink.flush()).map_err(|e| e.within(&self.path))
    }

    fn locked(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sending {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.position += bytes.len() as u64;
        self.sink.write(bytes)
    }

    fn send_held(&mut self) -> Result<()> {
        let Some(Held { name, mut bytes }) = self.held.take() else { return Ok(()) };
        let length = bytes.len() as u64;
        let headers = encode_member(self.position, &name, length, self.modified_s);
        self.put(&headers)?;
        bytes.resize(usize::try_from(padded(length)).expect("it is in memory"), 0);
        self.put(&bytes)?;
        bytes.clear();
        self.spare = bytes;
        Ok(())
    }

    fn held(&mut self, number: u64) -> Result<&mut Held> {
        let held = if number == self.created { self.held.as_mut() } else { None };
        held.ok_or_else(|| Error::usage("the file was sent and can no longer be used"))
    }
}

impl Folder for TarFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.locked().names.iter().cloned().collect())
    }

    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let name = checked(&self.path, name)?.to_owned();
        let mut sending = self.locked();
        if !sending.names.insert(name.clone()) {
            let taken = std::io::Error::from_raw_os_error(17);
            return Err(Error::device("create", &taken).at_path(&self.path.join(name)));
        }
        sending.send_held().map_err(|error| error.within(&self.path))?;
        let bytes = std::mem::take(&mut sending.spare);
        sending.held = Some(Held { name, bytes });
        sending.created += 1;
        let file = HeldFile {
            path: self.path.clone(),
            sending: Arc::clone(&self.sending),
            number: sending.created,
        };
        Ok(Arc::new(file))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        Err(Error::usage("a tar that is being written cannot be read")
            .at_path(&self.path.join(name)))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let to = checked(&self.path, to)?;
        let mut sending = self.locked();
        let absent = || Error::usage("the file was sent under its name").at_path(Path::new(from));
        let held = sending.held.as_mut().filter(|held| held.name == from).ok_or_else(absent)?;
        held.name = to.to_owned();
        sending.names.remove(from);
        sending.names.insert(to.to_owned());
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        if !self.locked().names.contains(name) {
            return Ok(());
        }
        Err(Error::usage("what was sent cannot be taken away").at_path(&self.path.join(name)))
    }

    fn flush(&self) -> Result<()> {
        self.locked().send_held().map_err(|error| error.within(&self.path))
    }
}

#[derive(Debug)]
struct HeldFile {
    path: PathBuf,
    sending: Arc<Mutex<Sending>>,
    number: u64,
}

impl HeldFile {
    fn locked(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FolderFile for HeldFile {
    fn length(&self) -> Result<u64> {
        Ok(self.locked().held(self.number)?.bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut sending = self.locked();
        let bytes = &sending.held(self.number)?.bytes;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = start.checked_add(buffer.len()).and_then(|end| bytes.get(start..end));
        let ended = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        buffer.copy_from_slice(part.ok_or_else(|| Error::device("read", &ended))?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let end = offset.saturating_add(data.len() as u64);
        if end > TAR_MEMBER_BYTES_MAX {
            return Err(Error::usage(format!(
                "expected files of at most {TAR_MEMBER_BYTES_MAX} bytes in a tar, found {end}: \
                 make a bundle in a directory"
            ))
            .at_path(&self.path));
        }
        let mut sending = self.locked();
        let bytes = &mut sending.held(self.number)?.bytes;
        let (start, end) = (offset as usize, end as usize);
        if start == bytes.len() {
            bytes.extend_from_slice(data);
            return Ok(());
        }
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(data);
        Ok(())
    }

    /// Nothing is durable before the archive is finished.
    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tar::{Step, TarWalker};

    #[derive(Clone, Debug, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl ByteSink for Shared {
        fn write(&mut self, bytes: &[u8]) -> Result<()> {
            self.0.lock().expect("whole").extend_from_slice(bytes);
            Ok(())
        }

        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn files_go_out_in_order_under_their_last_names_and_aligned() {
        let sink = Shared::default();
        let folder = TarFolder::new(Box::new(sink.clone()), Path::new("tar"), 7);
        let one = folder.create("one").expect("new");
        one.write_at(3, b"abc").expect("written");
        one.write_at(0, b"xyz").expect("written");
        assert!(folder.create("one").is_err(), "a name is used once");
        let two = folder.create("two.new").expect("new");
        assert!(one.write_at(0, b"late").is_err(), "it was sent");
        two.write_at(0, &[5; 5000]).expect("written");
        assert!(folder.rename("one", "other").is_err(), "it was sent");
        folder.rename("two.new", "two").expect("renamed");
        folder.finish().expect("ended");
        let bytes = sink.0.lock().expect("whole").clone();
        assert!(bytes.len().is_multiple_of(4096));
        let mut walker = TarWalker::new(Box::new(std::io::Cursor::new(bytes)));
        for (name, expected) in [("one", b"xyzabc".to_vec()), ("two", vec![5; 5000])] {
            let Step::Member(member) = walker.next_member().expect("whole") else {
                panic!("a member")
            };
            assert_eq!((member.name.as_str(), member.bytes), (name, expected.len() as u64));
            assert!(member.position.is_multiple_of(4096));
            let mut held = vec![0; expected.len()];
            assert_eq!(walker.read(&mut held).expect("read"), expected.len());
            assert_eq!(held, expected);
        }
        assert!(matches!(walker.next_member().expect("whole"), Step::End));
    }

    #[test]
    fn a_file_that_would_not_fit_memory_is_refused() {
        let folder = TarFolder::new(Box::new(Vec::new()), Path::new("tar"), 7);
        let file = folder.create("large").expect("new");
        assert!(file.write_at(TAR_MEMBER_BYTES_MAX, &[1]).is_err());
    }
}
