//! `PrimaryVolume`.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use uuid::Uuid;

use super::boundary::{byte_range, byte_ranges, detached, engine, extents, geometry, misuse};
use super::keys::BundleKey;
use super::maps::picture;
use crate::clock::wall_clock_ms;
use crate::device::FileDirectory;
use crate::error::Error;
use crate::extent::ByteRange;
use crate::format::frames::Class;
use crate::limits::{ASYNC_BYTES, ASYNC_MS};
use crate::link::PrimarySide;
use crate::volume::opening::{Recorded, VolumeDevice};
use crate::volume::primary::{
    AttachmentStatus, Caller, Comparison, Event, LagBound, Lost, MirrorPolicy, Options,
    PrimaryStatus, PrimaryVolume as Volume,
};
use crate::volume::service::Command;

const LOST: &str = "if it is lost, put an empty one in its place, start, and say `restore NAME \
                    --lost all`";

/// How long `restore --lost all` waits for a backup to say which volume it holds.
const INTRODUCTION: Duration = Duration::from_secs(15);

/// A volume in the role primary: its device, map, hot extents and threads.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct PrimaryVolume {
    held: Arc<Volume>,
    side: Mutex<Option<Arc<PrimarySide>>>,
}

impl PrimaryVolume {
    pub fn held(&self) -> Arc<Volume> {
        Arc::clone(&self.held)
    }

    pub fn set_side(&self, side: Option<Arc<PrimarySide>>) {
        *self.side.lock().unwrap_or_else(PoisonError::into_inner) = side;
    }

    fn side(&self) -> Option<Arc<PrimarySide>> {
        self.side.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn link_dict<'py>(
        &self,
        py: Python<'py>,
        status: &PrimaryStatus,
    ) -> PyResult<Bound<'py, PyDict>> {
        let side = self.side();
        let states = side.as_ref().map(|side| side.states()).unwrap_or_default();
        let dict = PyDict::new(py);
        dict.set_item("connected", status.connected)?;
        for (name, class) in
            [("demand", Class::Demand), ("mirror", Class::Mirror), ("bulk", Class::Bulk)]
        {
            dict.set_item(name, states.get(&class).copied().unwrap_or("closed"))?;
        }
        dict.set_item("unsent_bytes", status.unsent_bytes)?;
        dict.set_item("resyncing", status.resyncing)?;
        dict.set_item("in_flight_bytes", status.in_flight_bytes)?;
        dict.set_item("lag_bytes", status.lag_bytes)?;
        dict.set_item("lag_ms", status.lag_ms)?;
        dict.set_item("error", side.and_then(|side| side.problem()))?;
        Ok(dict)
    }
}

fn attachment_dict<'py>(
    py: Python<'py>,
    medium: &AttachmentStatus,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("path", medium.path.to_str())?;
    dict.set_item("state", medium.state)?;
    dict.set_item("error", medium.error.as_ref().map(ToString::to_string))?;
    dict.set_item("bundle", medium.bundle.to_string())?;
    dict.set_item("generation", medium.generation)?;
    dict.set_item("sequence", medium.cut)?;
    dict.set_item("bytes_covered", medium.bytes_covered)?;
    dict.set_item("bytes_supplied", medium.bytes_supplied)?;
    dict.set_item("reads_damaged", medium.reads_damaged)?;
    Ok(dict)
}

fn state_word(status: &PrimaryStatus, backups: bool) -> &'static str {
    if status.poisoned.is_some() {
        "failed"
    } else if status.waiting {
        "waiting"
    } else if status.missing_bytes > 0 {
        "restoring"
    } else if backups && !status.connected {
        "degraded"
    } else if !backups {
        "current"
    } else if status.resyncing {
        "resyncing"
    } else if !status.mirrored {
        "mirroring"
    } else {
        // Law 10: said only when it is proven.
        "mirrored"
    }
}

#[pymethods]
impl PrimaryVolume {
    #[staticmethod]
    #[pyo3(signature = (state_directory, name, device, *, size, block_size, mirror, backups,
                        missing_deadline_ms, direct=false, strict=false,
                        async_bytes=None, async_ms=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn open(
        py: Python<'_>,
        state_directory: &str,
        name: &str,
        device: &str,
        size: Option<u64>,
        block_size: u64,
        mirror: &str,
        backups: usize,
        missing_deadline_ms: u64,
        direct: bool,
        strict: bool,
        async_bytes: Option<u64>,
        async_ms: Option<u64>,
    ) -> PyResult<Self> {
        let policy = match mirror {
            "flush" => MirrorPolicy::Flush,
            "write" => MirrorPolicy::Write,
            "async" => MirrorPolicy::Async(LagBound {
                bytes: async_bytes.unwrap_or(ASYNC_BYTES),
                ms: async_ms.unwrap_or(ASYNC_MS),
            }),
            other => {
                return Err(Error::usage(format!(
                    "expected mirror to be flush, write or async, found {other:?}"
                ))
                .into());
            }
        };
        if backups > 1 {
            return Err(Error::usage(format!(
                "volume {name}: {backups} backups are configured, this version mirrors to one"
            ))
            .into());
        }
        let options = Options { policy, backup: backups > 0, strict, missing_deadline_ms };
        let held = detached(py, || {
            let directory = Arc::new(FileDirectory::open(state_directory, true)?);
            let recorded = Volume::recorded_size(&*directory)
                .map_err(|error| error.within(Path::new(state_directory)))?
                .map(|size| Recorded { size, advice: LOST });
            let opened = VolumeDevice::open(Path::new(device), recorded, size, direct)?;
            let geometry = geometry(opened.size, block_size)?;
            opened.check_sectors(geometry).map_err(|error| error.at_path(Path::new(device)))?;
            let device = opened.device;
            Volume::open(name, directory, device, opened.made, geometry, options, engine()?)
                .map_err(|error| error.within(Path::new(state_directory)))
        })?;
        Ok(Self { held, side: Mutex::default() })
    }

    #[getter]
    fn name(&self) -> &str {
        self.held.name()
    }

    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let status = py.detach(|| self.held.status());
        let geometry = self.held.geometry();
        let backups = self.held.has_backup();
        let dict = PyDict::new(py);
        dict.set_item("state", state_word(&status, backups))?;
        let volume = (!status.volume.is_nil()).then(|| status.volume.to_string());
        dict.set_item("volume", volume)?;
        dict.set_item("size", geometry.size())?;
        dict.set_item("block_size", geometry.block_size().bytes())?;
        dict.set_item("generation", status.generation)?;
        dict.set_item("current_bytes", status.current_bytes)?;
        dict.set_item("missing_bytes", status.missing_bytes)?;
        dict.set_item("link_only_bytes", status.link_only_bytes)?;
        dict.set_item("unsent_bytes", status.unsent_bytes)?;
        dict.set_item("hot_extents", status.hot_extents)?;
        dict.set_item("hydrating", status.hydrating)?;
        dict.set_item("mirrored", status.mirrored)?;
        dict.set_item("error", status.poisoned.as_ref().map(ToString::to_string))?;
        let links = PyList::empty(py);
        if backups {
            links.append(self.link_dict(py, &status)?)?;
        }
        dict.set_item("backups", links)?;
        let media = PyList::empty(py);
        for medium in py.detach(|| self.held.media()) {
            media.append(attachment_dict(py, &medium)?)?;
        }
        dict.set_item("media", media)?;
        let recovery = self.held.recovery();
        dict.set_item("recovered_link_only_blocks", recovery.link_only_blocks)?;
        dict.set_item("recovered_unsent_blocks", recovery.unsent_blocks())?;
        dict.set_item("damaged_map_pages", recovery.damaged_pages)?;
        let counters = status.counters;
        dict.set_item("reads", counters.reads)?;
        dict.set_item("writes", counters.writes)?;
        dict.set_item("flushes", counters.flushes)?;
        dict.set_item("bytes_read", counters.bytes_read)?;
        dict.set_item("bytes_written_live", counters.bytes_written)?;
        dict.set_item("fetches", counters.fetches)?;
        dict.set_item("bytes_fetched", counters.bytes_fetched)?;
        dict.set_item("bytes_hydrated", counters.bytes_hydrated)?;
        dict.set_item("bytes_merged", counters.bytes_merged)?;
        dict.set_item("bytes_from_media", counters.bytes_from_media)?;
        dict.set_item("bytes_resent", counters.bytes_resent)?;
        dict.set_item("bytes_found_equal", counters.bytes_found_equal)?;
        dict.set_item("errors", counters.errors)?;
        Ok(dict)
    }

    fn restore<'py>(
        &self,
        py: Python<'py>,
        lost: &Bound<'_, PyAny>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let lost = if let Ok(word) = lost.extract::<String>() {
            match word.as_str() {
                "all" => Lost::All,
                "none" => Lost::None,
                other => return Err(misuse(&format!("lost {other:?}: all, none or ranges"))),
            }
        } else {
            Lost::Ranges(byte_ranges(Some(lost.extract()?))?)
        };
        detached(py, || self.held.restore(&lost, INTRODUCTION))?;
        if let Some(side) = self.side() {
            py.detach(|| side.end("a new generation has begun"));
        }
        let status = py.detach(|| self.held.status());
        let dict = PyDict::new(py);
        dict.set_item("generation", status.generation)?;
        dict.set_item("missing_bytes", status.missing_bytes)?;
        Ok(dict)
    }

    fn hydrate(&self, py: Python<'_>, enabled: bool) -> PyResult<()> {
        detached(py, || {
            self.held.driver_or_refuse()?.event(Event::Hydrate { enabled }, Caller::Other);
            Ok(())
        })
    }

    #[pyo3(signature = (bundle, *, key=None))]
    fn attach<'py>(
        &self,
        py: Python<'py>,
        bundle: &str,
        key: Option<Py<BundleKey>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let key = key.as_ref().map(|key| key.get().held());
        let status = detached(py, || self.held.attach_with(Path::new(bundle), key))?;
        attachment_dict(py, &status)
    }

    fn detach(&self, py: Python<'_>, bundle: &str) -> PyResult<bool> {
        detached(py, || self.held.detach(Path::new(bundle)))
    }

    #[pyo3(signature = (label, *, selection=None, backup=0, timeout_ms))]
    fn snapshot<'py>(
        &self,
        py: Python<'py>,
        label: &str,
        selection: Option<Vec<(u64, u64)>>,
        backup: usize,
        timeout_ms: u64,
    ) -> PyResult<Bound<'py, PyDict>> {
        if backup != 0 {
            return Err(Error::usage("a primary has one backup in this version").into());
        }
        let selection = byte_ranges(selection)?;
        let snapshot = Uuid::new_v4();
        let created = wall_clock_ms() / 1000;
        let cut_selection = selection.clone();
        let (generation, sequence) = detached(py, || {
            let driver = self.held.driver_or_refuse()?;
            driver.cut(snapshot, label.to_owned(), cut_selection, timeout_ms)
        })?;
        let dict = PyDict::new(py);
        dict.set_item("snapshot", snapshot.to_string())?;
        dict.set_item("label", label)?;
        dict.set_item("generation", generation)?;
        dict.set_item("sequence", sequence)?;
        dict.set_item("created", created)?;
        let whole = vec![self.held.geometry().all_bytes()];
        let selected = if selection.is_empty() { whole } else { selection };
        dict.set_item("selection", extents(py, selected)?)?;
        Ok(dict)
    }

    #[pyo3(signature = (offset, length, *, backup=0, timeout_ms))]
    fn compare<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: u64,
        backup: usize,
        timeout_ms: u64,
    ) -> PyResult<Bound<'py, PyDict>> {
        if backup != 0 {
            return Err(Error::usage("a primary has one backup in this version").into());
        }
        let range = byte_range((offset, length))?;
        let timeout = Duration::from_millis(timeout_ms);
        let comparison = detached(py, || self.held.compare(range, timeout))?;
        let dict = PyDict::new(py);
        let (state, bytes, missing, different) = match comparison {
            Comparison::Busy => ("busy", 0, 0, Vec::new()),
            Comparison::Compared { bytes, missing, different } if different.is_empty() => {
                ("same", bytes, missing, different)
            }
            Comparison::Compared { bytes, missing, different } => {
                ("different", bytes, missing, different)
            }
        };
        dict.set_item("state", state)?;
        dict.set_item("compared_bytes", bytes)?;
        dict.set_item("missing_bytes", missing)?;
        dict.set_item("different", extents(py, different)?)?;
        Ok(dict)
    }

    #[pyo3(signature = (ranges, *, backup=0))]
    fn repair(&self, py: Python<'_>, ranges: Vec<(u64, u64)>, backup: usize) -> PyResult<u64> {
        if backup != 0 {
            return Err(Error::usage("a primary has one backup in this version").into());
        }
        let ranges = byte_ranges(Some(ranges))?;
        detached(py, || ranges.into_iter().map(|range| self.held.repair(range)).sum())
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.held.driver_or_refuse()?.wait_for(Command::Flush).map(|_| ()))
    }

    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.held.driver_or_refuse()?.commit())
    }

    fn map_extents<'py>(&self, py: Python<'py>, plane: &str) -> PyResult<Bound<'py, PyList>> {
        let driver = self.held.driver_or_refuse()?;
        let map = driver.map();
        let (bits, value) = match plane {
            "current" => (map.current(), true),
            "missing" => (map.current(), false),
            "unsent" => (map.unsent(), true),
            "link_only" => (map.link_only(), true),
            other => return Err(misuse(&format!("{other:?} is no plane"))),
        };
        let geometry = self.held.geometry();
        let ranges: Vec<ByteRange> = py.detach(|| {
            bits.runs(geometry.all_blocks(), value).map(|run| geometry.bytes_of(run)).collect()
        });
        extents(py, ranges)
    }

    fn picture(&self, py: Python<'_>, cells: usize) -> PyResult<Vec<u64>> {
        detached(py, || match self.held.live() {
            Some(driver) => picture(self.held.geometry(), driver.map().current(), cells),
            None => Ok(vec![0; cells]),
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if let Some(side) = self.side() {
            py.detach(|| side.end("the primary is stopping"));
        }
        detached(py, || self.held.close())
    }
}
