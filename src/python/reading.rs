//! What a bundle holds, as objects: runs, any range, chunk by chunk. Bytes stay in the core's
//! memory and are seen there.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

use super::boundary::{byte_range, detached};
use super::buffers::{BundleChunk, ByteBuffer};
use super::keys::Trust;
use crate::bundle::{Bundle, BundleChunks, BundleRuns, RandomReader, RunKind};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::BUNDLE_READ_BYTES_MAX;

/// A bundle in a directory or a tar, open for reading. No file of it stays open between two calls
/// of `read`.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct BundleReader(RandomReader);

#[pymethods]
impl BundleReader {
    #[staticmethod]
    #[pyo3(signature = (path, trust=None))]
    fn open(py: Python<'_>, path: &str, trust: Option<Py<Trust>>) -> PyResult<Self> {
        let trust = Trust::of(trust).known();
        detached(py, || {
            Ok(Self(RandomReader::new(Bundle::open_trusting(Path::new(path), trust)?)?))
        })
    }

    fn read(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<ByteBuffer> {
        let range = byte_range((offset, length))?;
        detached(py, || Ok(ByteBuffer::of_payload(self.checked(range)?)))
    }

    fn extents(&self) -> BundleExtents {
        BundleExtents(Mutex::new(BundleRuns::of(self.0.shared_bundle())))
    }

    fn chunks(&self, py: Python<'_>) -> PyResult<BundleChunkIterator> {
        detached(py, || {
            Ok(BundleChunkIterator(Mutex::new(BundleChunks::of(self.0.shared_bundle())?)))
        })
    }
}

impl BundleReader {
    fn checked(&self, range: ByteRange) -> Result<crate::device::Payload> {
        let geometry = self.0.bundle().geometry();
        if !geometry.contains(range) {
            return Err(Error::usage(format!(
                "expected a range within the volume of {} bytes, found {} to {}",
                geometry.size(),
                range.offset,
                range.end()
            )));
        }
        if range.length > BUNDLE_READ_BYTES_MAX {
            return Err(Error::usage(format!(
                "expected at most {BUNDLE_READ_BYTES_MAX} bytes at a time, found {}: read it part \
                 by part",
                range.length
            )));
        }
        self.0.read(range)
    }
}

/// Runs that a bundle holds.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct BundleExtents(Mutex<BundleRuns>);

#[pymethods]
impl BundleExtents {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<(u64, u64, &'static str)>> {
        let found =
            detached(py, || self.0.lock().unwrap_or_else(PoisonError::into_inner).next_run())?;
        Ok(found.map(|(range, kind)| {
            let kind = match kind {
                RunKind::Data => "data",
                RunKind::Zero => "zero",
            };
            (range.offset, range.length, kind)
        }))
    }
}

/// Chunks of a bundle that have bytes.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct BundleChunkIterator(Mutex<BundleChunks>);

#[pymethods]
impl BundleChunkIterator {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<BundleChunk>> {
        let found =
            detached(py, || self.0.lock().unwrap_or_else(PoisonError::into_inner).next_chunk())?;
        Ok(found.map(|(offset, bytes)| BundleChunk::new(offset, bytes)))
    }
}
