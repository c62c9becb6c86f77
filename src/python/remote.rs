//! `NbdSource`: an export of an NBD server that Python has connected to, as a source.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::boundary::{Callback, attended};
use super::buffers::take_descriptor;
use crate::bundle::{Identity, ImageSource, PieceSource, Source};
use crate::device::{Device, Stop};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::frames::CutName;
use crate::format::nbd::{ExportedCut, Included};
use crate::merge::ImagePieces;
use crate::nbd::{NbdDevice, SocketWire};
use crate::units::{BlockSize, Geometry};

/// An export of an NBD server, open for reading.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct NbdSource {
    name: String,
    device: Mutex<Option<Arc<NbdDevice>>>,
}

impl NbdSource {
    pub fn name(&self) -> &str {
        &self.name
    }

    fn held(&self) -> Result<Arc<NbdDevice>> {
        let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.clone().ok_or_else(|| Error::usage(format!("{}: it is closed", self.name)))
    }

    /// What a merge takes from it.
    pub fn pieces(&self) -> Result<Box<dyn PieceSource>> {
        let device = self.held()?;
        let Some(cut) = device.cut().cloned() else {
            return Ok(Box::new(ImagePieces::new(device)?.at(&self.name)));
        };
        let identity = identity(&cut, device.size())?;
        let included = match cut.included.clone() {
            Included::All => vec![identity.geometry.all_bytes()],
            Included::Ranges(ranges) => ranges,
            Included::Unstated => return Err(unstated(&self.name)),
        };
        let name =
            CutName { snapshot: cut.snapshot, generation: cut.generation, sequence: cut.sequence };
        let pieces = ImagePieces::of_snapshot(device, identity, name, included)?;
        Ok(Box::new(pieces.at(&self.name)))
    }

    /// What a bundle is made of; a plain image is selected in blocks of that size.
    pub fn source(&self, block_size: BlockSize) -> Result<Arc<dyn Source>> {
        let device = self.held()?;
        let Some(cut) = device.cut().cloned() else {
            return Ok(Arc::new(ImageSource::new(device, block_size)?));
        };
        let identity = identity(&cut, device.size())?;
        let all = identity.geometry.all_bytes();
        if cut.included != Included::All && cut.included != Included::Ranges(vec![all]) {
            return Err(Error::usage(format!(
                "{}: expected a snapshot of the whole volume, found one of a part of it: make the \
                 bundle at the backup, of NAME@SNAPSHOT",
                self.name
            )));
        }
        Ok(Arc::new(ImageSource::of_snapshot(device, identity, cut.snapshot)))
    }
}

fn identity(cut: &ExportedCut, size: u64) -> Result<Identity> {
    let geometry = BlockSize::new(cut.block_bytes).and_then(|block| Geometry::new(size, block));
    let geometry = geometry.ok_or_else(|| {
        Error::format(format!(
            "expected a snapshot of whole sectors in blocks of a power of two, found {size} bytes \
             in blocks of {}",
            cut.block_bytes
        ))
    })?;
    let (volume, generation) = (cut.volume, cut.generation);
    Ok(Identity { volume, geometry, generation, cut: cut.sequence })
}

fn unstated(name: &str) -> Error {
    Error::usage(format!(
        "{name}: expected an export that says what of the volume its snapshot includes, found one \
         of too many ranges: make a bundle of it at the backup"
    ))
}

#[pymethods]
impl NbdSource {
    #[new]
    #[pyo3(signature = (descriptor, export, name, *, greeted=false))]
    fn new(
        py: Python<'_>,
        descriptor: i32,
        export: &str,
        name: String,
        greeted: bool,
    ) -> PyResult<Self> {
        let socket = take_descriptor(descriptor)?;
        let mut callback = Callback::new(None);
        let stop = Stop::default();
        let opened = py.detach(|| {
            attended(
                &stop,
                || callback.poll(),
                || {
                    let wire = SocketWire::new(socket, stop.clone())?;
                    NbdDevice::open(Box::new(wire), export, greeted)
                },
            )
        });
        let named = opened.map_err(|error| error.within(std::path::Path::new(&name)));
        let device = Mutex::new(Some(Arc::new(callback.result(named)?)));
        Ok(Self { name, device })
    }

    #[getter(name)]
    fn python_name(&self) -> &str {
        &self.name
    }

    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.held()?.size())
    }

    /// What the export says of itself; `None`: nothing.
    #[getter]
    fn cut<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let device = self.held()?;
        let Some(cut) = device.cut() else { return Ok(None) };
        let dict = PyDict::new(py);
        dict.set_item("volume", cut.volume.to_string())?;
        dict.set_item("generation", cut.generation)?;
        dict.set_item("sequence", cut.sequence)?;
        dict.set_item("snapshot", cut.snapshot.to_string())?;
        Ok(Some(dict))
    }

    fn close(&self) -> PyResult<()> {
        let device = self.device.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(device) = device {
            device.interrupt();
        }
        Ok(())
    }
}

/// Of a backup's snapshot, for the description of its export.
pub fn exported_cut(view: &crate::snapshot::SnapshotView) -> String {
    if view.volume().is_nil() {
        return String::new();
    }
    let (geometry, cut) = (view.geometry(), view.cut());
    let runs = cut.selection.runs().iter().map(|run| geometry.bytes_of(*run));
    let ranges: Vec<ByteRange> = runs.collect();
    let all = ranges == [geometry.all_bytes()];
    let exported = ExportedCut {
        volume: view.volume(),
        generation: cut.generation,
        sequence: cut.sequence,
        snapshot: cut.snapshot,
        block_bytes: geometry.block_size().bytes_u32(),
        included: if all { Included::All } else { Included::Ranges(ranges) },
    };
    exported.text()
}
