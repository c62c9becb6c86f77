//! What lies where an image is to be written to, and what may be written over.
//!
//! | there is | it is | written over |
//! |---|---|---|
//! | nothing | a new file | |
//! | a file | that file, emptied first | only if that is forced |
//! | a block device | that disk | if it is removable, else only if that is forced |
//! | a pipe, a socket, a character device | a stream | it takes what comes |
//!
//! Guarantees: nothing is changed before a file is emptied; one that others of us use is not.
//! Does not know: what is written.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::disk::check_raw_sink;
use super::opening::{OpenOptions, flush_directory_of, lock, open_file};
use super::stream::{DescriptorSink, Stop, create_sink};
use crate::error::{Error, Result};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    NewFile,
    File,
    Disk,
    Stream,
}

impl Destination {
    /// What is at `path`, if it may be written over.
    pub fn at(path: &Path, forced: bool) -> Result<Self> {
        let kind = match fs::metadata(path) {
            Ok(found) => found.file_type(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::NewFile),
            Err(error) => return Err(Error::device("open", &error).at_path(path)),
        };
        if kind.is_dir() {
            let words = "expected a file or disk to write an image to, found a directory";
            return Err(Error::usage(words).at_path(path));
        }
        if kind.is_block_device() {
            check_raw_sink(path, forced)?;
            return Ok(Self::Disk);
        }
        if !kind.is_file() {
            return Ok(Self::Stream);
        }
        if !forced {
            return Err(Error::usage(
                "expected a new file, found one that exists: name another, or --force says that \
                 it is to be written over",
            )
            .at_path(path));
        }
        Ok(Self::File)
    }

    /// Whether a failure leaves a file there that nobody wants.
    #[must_use]
    pub fn is_file(self) -> bool {
        matches!(self, Self::NewFile | Self::File)
    }

    /// Opens it to write bytes one after the other. A file loses what it held.
    pub fn sink(self, path: &Path, stop: Stop) -> Result<DescriptorSink> {
        if self != Self::File {
            let sink = create_sink(path, stop)?;
            if self == Self::NewFile {
                flush_directory_of(path)?;
            }
            return Ok(sink);
        }
        let file = emptied(path)?;
        DescriptorSink::new(file.into(), stop).map_err(|error| error.within(path))
    }
}

/// Takes a file everything that it held.
pub fn empty_file(path: &Path) -> Result<()> {
    emptied(path).map(|_| ())
}

fn emptied(path: &Path) -> Result<File> {
    let opened = open_file(path, OpenOptions::default(), false, false);
    let file = opened.map_err(|error| error.within(path))?;
    lock(&file, false).map_err(|error| error.within(path))?;
    file.set_len(0).map_err(|error| Error::device("empty", &error).at_path(path))?;
    Ok(file)
}

/// Refuses to write over a file or disk that a bundle is read from, or a file of its directory.
pub fn refuse_source(destination: &Path, sources: &[PathBuf]) -> Result<()> {
    let Some(there) = place_of(destination) else { return Ok(()) };
    let parent = destination.canonicalize().ok();
    let home = parent.as_deref().and_then(Path::parent).and_then(place_of);
    for source in sources {
        let found = place_of(source);
        let within = source.is_dir() && found == home;
        if found == Some(there) || within {
            let words = format!(
                "expected another place than the bundle itself, found {}: name a new file",
                source.display()
            );
            return Err(Error::usage(words).at_path(destination));
        }
    }
    Ok(())
}

/// What tells a file, directory or device from all others.
fn place_of(path: &Path) -> Option<(u64, u64)> {
    let found = fs::metadata(path).ok()?;
    let device = found.file_type().is_block_device();
    Some(if device { (u64::MAX, found.rdev()) } else { (found.dev(), found.ino()) })
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests look at files")]
mod tests {
    use super::*;
    use crate::device::ByteSink;
    use crate::device::FileDevice;
    use crate::error::ErrorKind;

    #[test]
    fn a_file_is_written_over_only_by_force_and_a_directory_never() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let file = home.path().join("image");
        assert_eq!(Destination::at(&file, false).expect("new"), Destination::NewFile);
        fs::write(&file, "held").expect("written");
        let refused = Destination::at(&file, false).expect_err("it exists");
        assert!(refused.kind() == ErrorKind::Usage && refused.to_string().contains("--force"));
        assert_eq!(Destination::at(&file, true).expect("forced"), Destination::File);
        assert!(Destination::at(home.path(), true).is_err());
        let stream = Destination::at(Path::new("/dev/null"), false).expect("takes what comes");
        assert_eq!(stream, Destination::Stream);
        assert_eq!(fs::read(&file).expect("there"), b"held", "only looked at");
    }

    #[test]
    fn a_forced_file_begins_empty_unless_it_is_in_use() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let file = home.path().join("image");
        fs::write(&file, [1; 512]).expect("written");
        let options = OpenOptions { lock: true, ..OpenOptions::default() };
        let held = FileDevice::open(&file, options).expect("opened");
        let busy = Destination::File.sink(&file, Stop::default()).expect_err("in use");
        assert_eq!(busy.kind(), ErrorKind::Busy);
        assert_eq!(empty_file(&file).expect_err("in use").kind(), ErrorKind::Busy);
        drop(held);
        let mut sink = Destination::File.sink(&file, Stop::default()).expect("free");
        sink.write(b"new").expect("written");
        assert_eq!(fs::read(&file).expect("there"), b"new");
    }

    #[test]
    fn a_bundle_is_not_written_over_by_its_own_image() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let (bundle, tar) = (home.path().join("bundle"), home.path().join("b.tar"));
        fs::create_dir(&bundle).expect("made");
        for file in [&tar, &bundle.join("manifest.json"), &home.path().join("other")] {
            fs::write(file, "x").expect("written");
        }
        let sources = [bundle.clone(), tar.clone()];
        for path in [bundle.join("manifest.json"), tar] {
            let refused = refuse_source(&path, &sources).expect_err("the bundle itself");
            assert_eq!(refused.kind(), ErrorKind::Usage);
        }
        for path in [home.path().join("other"), home.path().join("new"), bundle.join("new")] {
            refuse_source(&path, &sources).expect("another");
        }
    }
}
