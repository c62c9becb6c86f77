//! `OverwriteMap`: a map file used offline.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyList;
use uuid::Uuid;

use super::boundary::{byte_range, closed, detached, extents, geometry, uuid};
use super::buffers::ByteBuffer;
use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::map::{MapIdentity, OfflineMap, OverwriteMap as Map};
use crate::units::Geometry;

/// A map file: which blocks of a volume are current. The file is locked while open.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct OverwriteMap {
    path: PathBuf,
    map: Mutex<Option<OfflineMap>>,
}

impl OverwriteMap {
    pub fn held(&self) -> PyResult<Arc<Map>> {
        let map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        map.as_ref().map(|held| Arc::clone(held.map())).ok_or_else(|| closed("map"))
    }

    fn held_at(path: &Path, map: OfflineMap) -> Self {
        Self { path: path.to_owned(), map: Mutex::new(Some(map)) }
    }

    fn bitmap_extents(&self, current: bool) -> PyResult<Vec<ByteRange>> {
        let map = self.held()?;
        let geometry = map.geometry();
        let runs = map.current().runs(geometry.all_blocks(), current);
        Ok(runs.map(|run| geometry.bytes_of(run)).collect())
    }
}

/// The whole blocks of a range; its ends lie on blocks or on the end of the volume.
fn aligned_blocks(geometry: Geometry, offset: u64, length: u64) -> Result<BlockRange> {
    let range = byte_range((offset, length))?;
    let block = geometry.block_size().bytes();
    let whole = offset.is_multiple_of(block)
        && (range.end().is_multiple_of(block) || range.end() == geometry.size());
    if !geometry.contains(range) || !whole {
        return Err(Error::usage(format!(
            "expected a range of whole blocks of {block} bytes within {} bytes, found {offset} to \
             {}",
            geometry.size(),
            range.end()
        )));
    }
    Ok(geometry.covered(range))
}

/// The current bytes in each of `cells` equal stretches.
pub fn picture(geometry: Geometry, current: &Bitmap, cells: usize) -> Result<Vec<u64>> {
    const CELLS_MAX: usize = 1 << 20;
    if cells == 0 || cells > CELLS_MAX {
        return Err(Error::usage(format!("expected 1 to {CELLS_MAX} cells, found {cells}")));
    }
    let blocks = u128::from(geometry.blocks());
    let edge = |cell: usize| (blocks * cell as u128 / cells as u128) as u64;
    let size = geometry.block_size().bytes();
    let mut bytes: Vec<u64> = (0..cells)
        .map(|cell| current.count_set(BlockRange::new(edge(cell), edge(cell + 1))) * size)
        .collect();
    // The last block may be shorter; it is in the last cell that has one.
    let last = BlockRange::one(geometry.blocks() - 1);
    if current.count_set(last) > 0 {
        let cell = (0..cells).rfind(|cell| edge(*cell) < edge(cell + 1));
        bytes[cell.expect("a block is in a cell")] -= size - geometry.bytes_of(last).length;
    }
    Ok(bytes)
}

/// One bit a block, least significant first, 1 = current.
pub fn packed(geometry: Geometry, current: &Bitmap) -> Vec<u8> {
    let words = geometry.blocks().div_ceil(64) as usize;
    let mut bits = Vec::with_capacity(words * 8);
    for page in 0..current.pages() {
        for word in current.copy_page(page).iter() {
            bits.extend_from_slice(&word.to_le_bytes());
        }
    }
    bits.truncate(geometry.blocks().div_ceil(8) as usize);
    bits
}

#[pymethods]
impl OverwriteMap {
    #[staticmethod]
    #[pyo3(signature = (path, size, block_size, volume=None, generation=None))]
    fn create(
        py: Python<'_>,
        path: &str,
        size: u64,
        block_size: u64,
        volume: Option<&str>,
        generation: Option<u64>,
    ) -> PyResult<Self> {
        let geometry = geometry(size, block_size)?;
        let volume = volume.map(uuid).transpose()?.unwrap_or(Uuid::nil());
        let generation = generation.unwrap_or(u64::from(!volume.is_nil()));
        let path = Path::new(path);
        let identity = MapIdentity { volume, geometry, generation };
        detached(py, || Ok(Self::held_at(path, OfflineMap::create(path, identity)?)))
    }

    #[staticmethod]
    fn open(py: Python<'_>, path: &str) -> PyResult<Self> {
        let path = Path::new(path);
        detached(py, || Ok(Self::held_at(path, OfflineMap::open(path)?)))
    }

    #[getter]
    fn path(&self) -> &Path {
        &self.path
    }

    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.held()?.geometry().size())
    }

    #[getter]
    fn block_size(&self) -> PyResult<u64> {
        Ok(self.held()?.geometry().block_size().bytes())
    }

    #[getter]
    fn generation(&self) -> PyResult<u64> {
        Ok(self.held()?.identity().generation)
    }

    #[getter]
    fn volume(&self) -> PyResult<Option<String>> {
        let volume = self.held()?.identity().volume;
        Ok((!volume.is_nil()).then(|| volume.to_string()))
    }

    #[getter]
    fn current_bytes(&self) -> PyResult<u64> {
        Ok(self.held()?.current_bytes())
    }

    #[getter]
    fn missing_bytes(&self) -> PyResult<u64> {
        Ok(self.held()?.missing_bytes())
    }

    fn mark_current(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<u64> {
        let map = self.held()?;
        detached(py, || {
            let before = map.current_bytes();
            map.mark_current(aligned_blocks(map.geometry(), offset, length)?);
            Ok(map.current_bytes() - before)
        })
    }

    fn is_current(&self, offset: u64, length: u64) -> PyResult<bool> {
        let map = self.held()?;
        let range = byte_range((offset, length))?;
        if !map.geometry().contains(range) {
            return Err(Error::usage(format!(
                "range {offset} to {} lies outside the volume of {} bytes",
                range.end(),
                map.geometry().size()
            ))
            .into());
        }
        Ok(map.current().all_equal(map.geometry().touched(range), true))
    }

    fn current_extents<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        iterator(extents(py, self.bitmap_extents(true)?)?)
    }

    fn missing_extents<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        iterator(extents(py, self.bitmap_extents(false)?)?)
    }

    fn bits(&self, py: Python<'_>) -> PyResult<ByteBuffer> {
        let map = self.held()?;
        detached(py, || Ok(ByteBuffer::new(packed(map.geometry(), map.current()))))
    }

    fn picture(&self, py: Python<'_>, cells: usize) -> PyResult<Vec<u64>> {
        let map = self.held()?;
        detached(py, || picture(map.geometry(), map.current(), cells))
    }

    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        let map = self.held()?;
        detached(py, || map.file().commit_all())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let taken = self.map.lock().unwrap_or_else(PoisonError::into_inner).take();
        match taken {
            Some(held) => detached(py, || held.map().file().commit_all()),
            None => Ok(()),
        }
    }
}

fn iterator<'py>(list: Bound<'py, PyList>) -> PyResult<Bound<'py, PyAny>> {
    Ok(list.as_any().try_iter()?.into_any())
}
