//! Where bundles come from and go to: a path, or a descriptor that bytes go through once.
//!
//! | place | as a source | as a destination |
//! |---|---|---|
//! | directory | a bundle | a bundle |
//! | file or disk that begins as a tar | a bundle in it | |
//! | another file or disk | a raw image | |
//! | new file named `.tar`, disk | | a bundle as a tar |
//! | pipe, descriptor | a bundle as a tar | a bundle as a tar |
//! | export of an NBD server | a snapshot, or a raw image | |

use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::buffers::copy_descriptor;
use super::keys::Trust;
use super::remote::NbdSource;
use crate::bundle::{Bundle, PieceSource, TarStream};
use crate::device::{
    DescriptorSink, DescriptorStream, FileDevice, OpenOptions, Stop, TarFolder, TarIndex,
    check_raw_sink, create_sink, disk_behind, open_stream,
};
use crate::error::{Error, Result};
use crate::format::bundle::{Manifest, locked};
use crate::merge::ImagePieces;

/// See the module.
#[derive(FromPyObject)]
pub enum Place {
    Descriptor(i32),
    Path(String),
    /// A descriptor with a name for messages.
    Named(i32, String),
    /// Of somebody's NBD server.
    Export(Py<NbdSource>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Descriptor(0) => f.write_str("standard input"),
            Self::Descriptor(1) => f.write_str("standard output"),
            Self::Descriptor(number) => write!(f, "descriptor {number}"),
            Self::Path(name) | Self::Named(_, name) => f.write_str(name),
            Self::Export(export) => f.write_str(export.get().name()),
        }
    }
}

/// A bundle that has its end within reach, or one that comes as it may.
#[derive(Debug)]
pub enum OpenedBundle {
    Whole(Box<Bundle>),
    Stream(Box<TarStream>),
}

fn is_pipe(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| {
        let kind = found.file_type();
        kind.is_fifo() || kind.is_socket() || kind.is_char_device()
    })
}

/// What a source lies on, as far as that can be told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Whereabouts {
    Disk(PathBuf),
    /// Without a disk that the kernel names (memory, network, overlay): its number.
    FileSystem(u64),
}

impl Place {
    /// Whether its bytes come when they come, once.
    pub fn is_stream(&self) -> bool {
        match self {
            Self::Descriptor(_) | Self::Named(..) => true,
            Self::Path(path) => is_pipe(Path::new(path)),
            Self::Export(_) => false,
        }
    }

    /// `None`: nothing else is read from there. Of a device that is made of several disks the first
    /// stands for all.
    pub fn whereabouts(&self) -> Option<Whereabouts> {
        let Self::Path(path) = self else { return None };
        let path = Path::new(path);
        if is_pipe(path) {
            return None;
        }
        if let Ok(Some(disk)) = disk_behind(path) {
            return Some(Whereabouts::Disk(disk.device));
        }
        path.metadata().ok().map(|found| Whereabouts::FileSystem(found.dev()))
    }

    fn open_by(
        &self,
        stop: &Stop,
        whole: impl FnOnce(&Path) -> Result<Bundle>,
    ) -> Result<OpenedBundle> {
        let stream = |stream: DescriptorStream| {
            let opened = TarStream::open(Box::new(stream), &self.to_string(), stop.clone())?;
            Ok(OpenedBundle::Stream(Box::new(opened)))
        };
        let path = match self {
            Self::Descriptor(number) | Self::Named(number, _) => {
                let copy = copy_descriptor(*number)
                    .map_err(|error| Error::usage(format!("descriptor {number}: {error}")))?;
                return stream(DescriptorStream::new(copy, stop.clone())?);
            }
            Self::Path(path) => Path::new(path),
            Self::Export(_) => {
                return Err(Error::usage(format!("expected a bundle, found the export {self}")));
            }
        };
        // What came of a tar that was cut off is of use too.
        if is_pipe(path) || Bundle::is_cut_off(path)? {
            return stream(open_stream(path, stop.clone())?);
        }
        Ok(OpenedBundle::Whole(Box::new(whole(path)?)))
    }

    /// The bundle at this place.
    pub fn open_bundle(&self, stop: &Stop, trust: &Trust) -> Result<OpenedBundle> {
        let opened = self.open_by(stop, |path| Bundle::open_trusting(path, trust.known()))?;
        if let OpenedBundle::Stream(stream) = &opened {
            trust.unlock(stream)?;
        }
        Ok(opened)
    }

    /// What its manifest says, whoever wrote it.
    pub fn look(&self, stop: &Stop) -> Result<Manifest> {
        match self.open_by(stop, Bundle::look)? {
            OpenedBundle::Whole(bundle) => Ok(bundle.manifest().clone()),
            OpenedBundle::Stream(stream) => stream.read_manifest(),
        }
    }

    /// What a merge takes from here.
    pub fn merge_source(&self, stop: &Stop, trust: &Trust) -> Result<Box<dyn PieceSource>> {
        let unproven = || {
            locked("expected a bundle, which is encrypted or signed, found an image")
                .at_path(Path::new(&self.to_string()))
        };
        if let Self::Export(export) = self {
            return if trust.is_any() { Err(unproven()) } else { export.get().pieces() };
        }
        if let Self::Path(path) = self {
            let path = Path::new(path);
            let is_raw = !path.is_dir() && !is_pipe(path) && !TarIndex::is_one(path)?;
            if is_raw {
                if trust.is_any() {
                    return Err(unproven());
                }
                let options = OpenOptions { read_only: true, lock: true, ..OpenOptions::default() };
                let device = Arc::new(FileDevice::open_for_bulk(path, options)?);
                return Ok(Box::new(ImagePieces::new(device)?));
            }
        }
        Ok(match self.open_bundle(stop, trust)? {
            OpenedBundle::Whole(bundle) => bundle,
            OpenedBundle::Stream(stream) => stream,
        })
    }

    /// Whether a bundle is written there as a tar, not as a directory.
    pub fn is_tar_destination(&self) -> bool {
        let Self::Path(path) = self else { return true };
        let path = Path::new(path);
        path.extension().is_some_and(|suffix| suffix == "tar") && !path.is_dir() || is_special(path)
    }

    /// The tar to write a bundle into, and the file to remove if that fails. What is on a disk that
    /// is not removable is written over only if that is `forced`.
    pub fn tar_destination(
        &self,
        stop: &Stop,
        modified_s: u64,
        forced: bool,
    ) -> Result<(TarFolder, Option<PathBuf>)> {
        let name = self.to_string();
        let (sink, made) = match self {
            Self::Export(_) => {
                return Err(Error::usage(format!("{self}: no bundle is written into an export")));
            }
            Self::Descriptor(number) | Self::Named(number, _) => {
                let copy = copy_descriptor(*number)
                    .map_err(|error| Error::usage(format!("descriptor {number}: {error}")))?;
                let sink = DescriptorSink::new(copy, stop.clone());
                (sink.map_err(|error| error.within(Path::new(&name)))?, None)
            }
            Self::Path(path) => {
                let path = Path::new(path);
                if path.metadata().is_ok_and(|found| found.file_type().is_block_device()) {
                    check_raw_sink(path, forced)?;
                }
                let sink = create_sink(path, stop.clone())?;
                (sink, (!is_special(path)).then(|| path.to_path_buf()))
            }
        };
        Ok((TarFolder::new(Box::new(sink), Path::new(&name), modified_s), made))
    }
}

/// A disk, or a pipe: neither a file nor a directory.
fn is_special(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| !found.is_dir() && !found.is_file())
}

/// `key.age` of a tar in a file or on a disk.
#[pyfunction]
pub fn tar_key<'py>(py: Python<'py>, path: &str) -> PyResult<Option<Bound<'py, PyBytes>>> {
    let found = py.detach(|| Bundle::key_of_tar(Path::new(path)))?;
    Ok(found.map(|bytes| PyBytes::new(py, &bytes)))
}
