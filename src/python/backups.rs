//! `BackupVolume` and `SnapshotSource`.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use uuid::Uuid;

use super::boundary::{byte_range, byte_ranges, closed, detached, engine, extents, geometry, uuid};
use crate::bundle::{Release, ReleasingSnapshot, Source};
use crate::clock::wall_clock_ms;
use crate::device::{Directory, FileDirectory};
use crate::error::{Error, Result};
use crate::format::frames::Class;
use crate::link::{BackupSide, Hub};
use crate::snapshot::{Condition, SnapshotChain, SnapshotStatus, SnapshotView};
use crate::volume::backup::BackupVolume as Volume;
use crate::volume::opening::{Recorded, VolumeDevice};

/// Says that the daemon made the device, and that it reads as zeros until a primary comes.
const EMPTY: &str = "created-empty";

const LOST: &str = "if it is lost, remove the state directory of the volume as well: its primary \
                    fills a new backup";

/// A volume in the role backup: mirror device, changed map, snapshots.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct BackupVolume {
    name: String,
    created_empty: bool,
    held: Mutex<Option<Arc<Volume>>>,
    side: Mutex<Option<Arc<BackupSide>>>,
}

impl BackupVolume {
    pub fn held(&self) -> PyResult<Arc<Volume>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.clone().ok_or_else(|| closed("volume"))
    }

    /// The side that takes link connections, made with the hub that serves it.
    pub fn side(&self, hub: &Hub) -> PyResult<Arc<BackupSide>> {
        let volume = self.held()?;
        let mut side = self.side.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(side) = &*side {
            return Ok(Arc::clone(side));
        }
        let made = BackupSide::new(
            self.name.clone(),
            volume,
            self.created_empty,
            hub.boot_id(),
            engine()?,
            wall_clock_ms,
        );
        *side = Some(Arc::clone(&made));
        Ok(made)
    }

    fn known_side(&self) -> Option<Arc<BackupSide>> {
        self.side.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn snapshot_dict<'py>(
    py: Python<'py>,
    volume: &Volume,
    status: &SnapshotStatus,
) -> PyResult<Bound<'py, PyDict>> {
    let geometry = volume.identity().geometry;
    let cut = &status.cut;
    let dict = PyDict::new(py);
    dict.set_item("snapshot", cut.snapshot.to_string())?;
    dict.set_item("label", &cut.label)?;
    dict.set_item("generation", cut.generation)?;
    dict.set_item("sequence", cut.sequence)?;
    dict.set_item("created", cut.created_ms / 1000)?;
    dict.set_item("size", geometry.size())?;
    dict.set_item("preserved_bytes", status.preserved_bytes)?;
    dict.set_item("released_bytes", status.released_bytes)?;
    let broken = match &status.condition {
        Condition::Intact => None,
        Condition::Broken(reason) => Some(reason.as_str()),
        Condition::Leaving => Some("it is being deleted"),
    };
    dict.set_item("broken", broken)?;
    let runs = cut.selection.runs().iter().map(|run| geometry.bytes_of(*run));
    dict.set_item("selection", extents(py, runs)?)?;
    Ok(dict)
}

#[pymethods]
impl BackupVolume {
    #[staticmethod]
    #[pyo3(signature = (state_directory, name, device, *, size, block_size, direct=false))]
    fn open(
        py: Python<'_>,
        state_directory: &str,
        name: &str,
        device: &str,
        size: Option<u64>,
        block_size: u64,
        direct: bool,
    ) -> PyResult<Self> {
        detached(py, || {
            let state = Path::new(state_directory);
            let directory = Arc::new(FileDirectory::open(state, true)?);
            let recorded = SnapshotChain::recorded_size(&*directory)
                .map_err(|error| error.within(state))?
                .map(|size| Recorded { size, advice: LOST });
            let opened = VolumeDevice::open(Path::new(device), recorded, size, direct)?;
            let geometry = geometry(opened.size, block_size)?;
            opened.check_sectors(geometry).map_err(|error| error.at_path(Path::new(device)))?;
            let device = opened.device;
            if opened.made {
                directory.replace(EMPTY, b"1")?;
            }
            // Somebody may have put another in its place since.
            let created_empty =
                directory.read(EMPTY, 16)?.is_some() && device.next_data(0)?.is_none();
            let volume = if recorded.is_some() {
                Volume::open(directory, device, geometry)
            } else {
                Volume::create(directory, device, geometry, Uuid::new_v4())
            };
            let volume = volume.map_err(|error| error.within(state))?;
            volume.set_pool(engine()?.pool());
            let volume = Arc::new(volume);
            let deleting = Arc::clone(&volume);
            // One that fails stays listed as being deleted, and can be deleted again.
            engine()?.spawn(move || drop(deleting.snapshots().finish_deletions()));
            Ok(Self {
                name: name.to_owned(),
                created_empty,
                held: Mutex::new(Some(volume)),
                side: Mutex::default(),
            })
        })
    }

    #[getter]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let volume = self.held()?;
        let side = self.known_side();
        let identity = volume.identity();
        let connected = side.as_ref().is_some_and(|side| side.is_connected());
        let failure = volume.failure();
        let state = if failure.is_some() {
            "failed"
        } else if identity.volume.is_nil() {
            "empty"
        } else if connected {
            "mirroring"
        } else {
            "idle"
        };
        let dict = PyDict::new(py);
        dict.set_item("state", state)?;
        let known = (!identity.volume.is_nil()).then(|| identity.volume.to_string());
        dict.set_item("volume", known)?;
        dict.set_item("size", identity.geometry.size())?;
        dict.set_item("block_size", identity.geometry.block_size().bytes())?;
        dict.set_item("generation", identity.generation)?;
        let changed = volume.snapshots().changed().count_all();
        dict.set_item("changed_bytes", changed * identity.geometry.block_size().bytes())?;
        dict.set_item("connected", connected)?;
        dict.set_item("error", failure.map(|failure| failure.to_string()))?;
        dict.set_item("primary", None::<String>)?;
        let links = PyDict::new(py);
        let states = side.as_ref().map(|side| side.states()).unwrap_or_default();
        for (name, class) in
            [("demand", Class::Demand), ("mirror", Class::Mirror), ("bulk", Class::Bulk)]
        {
            links.set_item(name, states.get(&class).copied().unwrap_or("closed"))?;
        }
        dict.set_item("links", links)?;
        let counters = side.map(|side| side.counters()).unwrap_or_default();
        dict.set_item("reads", counters.reads)?;
        dict.set_item("writes", counters.writes)?;
        dict.set_item("flushes", counters.flushes)?;
        dict.set_item("bytes_sent", counters.bytes_sent)?;
        dict.set_item("bytes_mirrored", counters.bytes_mirrored)?;
        let list = volume.snapshots().list();
        let preserved: u64 = list.iter().map(|status| status.preserved_bytes).sum();
        dict.set_item("bytes_preserved", preserved)?;
        dict.set_item("snapshots", self.snapshots(py)?)?;
        dict.update(self.preservation(py)?.as_mapping())?;
        Ok(dict)
    }

    /// How preservation fares; cheap, to be asked often.
    fn preservation<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let volume = self.held()?;
        let chain = volume.snapshots();
        let room = detached(py, || chain.room())?;
        let conditions = chain.conditions();
        let dict = PyDict::new(py);
        dict.set_item("store_free_bytes", room.map(|(space, _)| space.free))?;
        dict.set_item("store_total_bytes", room.map(|(space, _)| space.total))?;
        let intact = conditions.iter().any(|(_, condition)| *condition == Condition::Intact);
        dict.set_item("store_low", intact && room.is_some_and(|(_, low)| low))?;
        let broken = PyDict::new(py);
        for (snapshot, condition) in conditions {
            if let Condition::Broken(reason) = condition {
                broken.set_item(snapshot.to_string(), reason)?;
            }
        }
        dict.set_item("snapshots_broken", broken)?;
        Ok(dict)
    }

    #[pyo3(signature = (label, *, selection=None))]
    fn snapshot<'py>(
        &self,
        py: Python<'py>,
        label: &str,
        selection: Option<Vec<(u64, u64)>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let volume = self.held()?;
        let side = self
            .known_side()
            .ok_or_else(|| PyErr::from(Error::busy("the volume is not served yet")))?;
        let selection = byte_ranges(selection)?;
        let snapshot = Uuid::new_v4();
        detached(py, || side.snapshot_now(snapshot, label.to_owned(), selection))?;
        let list = volume.snapshots().list();
        let status = list
            .iter()
            .find(|status| status.cut.snapshot == snapshot)
            .ok_or_else(|| PyErr::from(Error::busy("the snapshot was deleted at once")))?;
        snapshot_dict(py, &volume, status)
    }

    fn snapshots<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let volume = self.held()?;
        let list = PyList::empty(py);
        for status in volume.snapshots().list() {
            list.append(snapshot_dict(py, &volume, &status)?)?;
        }
        Ok(list)
    }

    fn delete_snapshot(&self, py: Python<'_>, snapshot: &str) -> PyResult<()> {
        let volume = self.held()?;
        let snapshot = uuid(snapshot)?;
        detached(py, || volume.snapshots().delete(snapshot))
    }

    #[pyo3(signature = (snapshot, *, release="auto"))]
    fn source(&self, py: Python<'_>, snapshot: &str, release: &str) -> PyResult<SnapshotSource> {
        let volume = self.held()?;
        let snapshot = uuid(snapshot)?;
        let release = Release::parse(release)?;
        let view = detached(py, || volume.view(snapshot))?;
        Ok(SnapshotSource { view: Arc::new(view), release })
    }

    fn digest(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<String> {
        let volume = self.held()?;
        let range = byte_range((offset, length))?;
        let digest: [u8; 32] = detached(py, || volume.digest(range))?;
        Ok(blake3::Hash::from_bytes(digest).to_hex().to_string())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        let side = self.side.lock().unwrap_or_else(PoisonError::into_inner).take();
        detached(py, || {
            if let Some(side) = side {
                side.end();
            }
            held.map_or(Ok(()), |volume| -> Result<()> { volume.flush() })
        })
    }
}

/// A snapshot of a backup volume as something a bundle can be made of.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct SnapshotSource {
    view: Arc<SnapshotView>,
    release: Release,
}

impl SnapshotSource {
    pub fn view(&self) -> Arc<SnapshotView> {
        Arc::clone(&self.view)
    }

    /// As the source of a bundle, in directories or in a tar.
    pub fn source(&self, into_tar: bool) -> Result<Arc<dyn Source>> {
        match (into_tar, self.release) {
            (false, release) => Ok(Arc::new(ReleasingSnapshot::new(self.view(), release)?)),
            // Nothing of a tar is durable before its end.
            (true, Release::Always) => Err(Error::usage(
                "expected directories as media of a snapshot that is given back as it is written, \
                 found a tar: leave --release out, and delete the snapshot afterwards",
            )),
            (true, _) => Ok(self.view()),
        }
    }
}

#[pymethods]
impl SnapshotSource {
    #[getter]
    fn snapshot(&self) -> String {
        self.view.cut().snapshot.to_string()
    }
}
