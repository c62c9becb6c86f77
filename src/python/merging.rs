//! Merges, as functions.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::boundary::{Callback, NOTHING_YET, attended, detached, extents};
use super::keys::Trust;
use super::maps::OverwriteMap;
use super::places::{Place, Whereabouts};
use super::volumes::PrimaryVolume;
use crate::bundle::PieceSource;
use crate::device::{Engine, FileDevice, OpenOptions, Stop};
use crate::error::{Error, Result};
use crate::map::OverwriteMap as Map;
use crate::merge::{
    MergeOptions, MergeReport, MergeTarget, OfflineTarget, SourceReport, Strand, Undo, forecast,
    run_all,
};
use crate::volume::primary::LiveTarget;

/// A source, and what is known of it.
type Known = (Place, Option<Py<Trust>>);
type Target = Arc<dyn MergeTarget + Send + Sync>;

fn merge_report<'py>(py: Python<'py>, report: MergeReport) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("bytes_written", report.bytes_written)?;
    dict.set_item("bytes_skipped", report.bytes_skipped)?;
    dict.set_item("bytes_stale", report.bytes_stale)?;
    dict.set_item("bytes_zeroed", report.bytes_zeroed)?;
    dict.set_item("bytes_fetched", report.bytes_fetched)?;
    dict.set_item("bytes_in_doubt", report.bytes_in_doubt)?;
    dict.set_item("bytes_read", report.bytes_read)?;
    let other = report.bytes_fetched + report.bytes_in_doubt + report.bytes_stale;
    dict.set_item("bytes_total", report.bytes_written + report.bytes_skipped + other)?;
    dict.set_item("chunks_total", report.chunks_total)?;
    dict.set_item("chunks_repaired", report.chunks_repaired)?;
    dict.set_item("chunks_damaged", report.chunks_damaged - report.chunks_repaired)?;
    dict.set_item("damaged", extents(py, report.damaged)?)?;
    dict.set_item("shortfall", report.shortfall)?;
    dict.set_item("seconds", report.seconds)?;
    dict.set_item("engine", report.engine)?;
    dict.set_item("side_by_side", report.side_by_side)?;
    let sources = PyList::empty(py);
    for source in report.sources {
        sources.append(source_report(py, source)?)?;
    }
    dict.set_item("sources", sources)?;
    Ok(dict)
}

fn source_report<'py>(py: Python<'py>, report: SourceReport) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("bytes_total", report.bytes_done)?;
    dict.set_item("bytes_written", report.bytes_written)?;
    dict.set_item("bytes_read", report.bytes_read)?;
    dict.set_item("chunks_total", report.chunks_total)?;
    dict.set_item("chunks_repaired", report.chunks_repaired)?;
    dict.set_item("chunks_damaged", report.chunks_damaged - report.chunks_repaired)?;
    dict.set_item("damaged", extents(py, report.damaged)?)?;
    dict.set_item("shortfall", report.shortfall)?;
    dict.set_item("error", report.error.map(PyErr::from))?;
    Ok(dict)
}

/// Opens all sources. Those that may have to be waited for come last, so that a wrong one among the
/// others is known before.
fn open_all(known: &[(Place, Trust)], stops: &[Stop]) -> Result<Vec<Box<dyn PieceSource>>> {
    let mut opened: Vec<Option<Box<dyn PieceSource>>> = known.iter().map(|_| None).collect();
    for streams in [false, true] {
        for (number, (place, trust)) in known.iter().enumerate() {
            if place.is_stream() == streams {
                opened[number] = Some(place.merge_source(&stops[number], trust)?);
            }
        }
    }
    Ok(opened.into_iter().flatten().collect())
}

/// A number for each disk: sources on one are not read against each other.
fn lanes(known: &[(Place, Trust)]) -> Vec<usize> {
    let mut disks: HashMap<Whereabouts, usize> = HashMap::new();
    let mut count = 0;
    let mut next = || {
        count += 1;
        count - 1
    };
    known
        .iter()
        .map(|(place, _)| match place.whereabouts() {
            Some(disk) => *disks.entry(disk).or_insert_with(&mut next),
            None => next(),
        })
        .collect()
}

fn run<'py>(
    py: Python<'py>,
    sources: Vec<Known>,
    targets: impl FnOnce(&[&dyn PieceSource]) -> Result<Vec<Target>> + Send,
    (engine, dry): (&str, bool),
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let options = MergeOptions { engine: Engine::parse(engine)?, ..MergeOptions::default() };
    let mut callback = Callback::new(progress);
    let known: Vec<(Place, Trust)> =
        sources.into_iter().map(|(place, trust)| (place, Trust::of(trust))).collect();
    let result = py.detach(|| {
        let stop = Stop::default();
        // A source that fails ends its own waits, not those of the others.
        let stops: Vec<Stop> = known.iter().map(|_| stop.below()).collect();
        let open = || open_all(&known, &stops);
        let opened = attended(&stop, || callback.tell(NOTHING_YET), open)?;
        let opened: Vec<&dyn PieceSource> = opened.iter().map(|source| &**source).collect();
        let targets = targets(&opened)?;
        let mut strands: Vec<Strand<'_>> = Vec::new();
        for ((source, target), lane) in opened.iter().zip(&targets).zip(lanes(&known)) {
            strands.push(Strand { source: *source, target: &**target, lane });
        }
        if dry {
            let total = opened.iter().map(|source| source.bytes_total()).sum();
            return forecast(&strands, &mut |done| {
                callback.tell(&[("done_bytes", done), ("total_bytes", total)])
            });
        }
        run_all(&strands, &options, &mut |state| {
            callback.tell(&[
                ("done_bytes", state.bytes_done),
                ("total_bytes", state.bytes_total),
                ("bytes_written", state.bytes_written),
                ("chunks_damaged", state.chunks_damaged),
                ("sources_done", state.sources_done),
                ("sources", state.sources),
            ])
        })
    });
    merge_report(py, callback.result(result)?)
}

fn offline(target: &str, map: Arc<Map>) -> Result<OfflineTarget> {
    let options = OpenOptions { lock: true, ..OpenOptions::default() };
    let device = Arc::new(FileDevice::open_for_bulk(target, options)?);
    OfflineTarget::new(device, map).map_err(|error| error.at_path(Path::new(target)))
}

#[pyfunction]
#[pyo3(signature = (sources, target, map, *, engine="auto", undo=None, dry_run=false,
                    progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub fn merge<'py>(
    py: Python<'py>,
    sources: Vec<Known>,
    target: &str,
    map: &OverwriteMap,
    engine: &str,
    undo: Option<PathBuf>,
    dry_run: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let map = map.held()?;
    let make = move |sources: &[&dyn PieceSource]| -> Result<Vec<Target>> {
        let plain = offline(target, Arc::clone(&map))?;
        let made: Target = match undo {
            Some(path) if !dry_run => Arc::new(plain.keeping(Undo::open(&path, map.identity())?)),
            _ => Arc::new(plain),
        };
        Ok(vec![made; sources.len()])
    };
    run(py, sources, make, (engine, dry_run), progress)
}

/// Puts back what merges with this undo file overwrote; the bytes put back.
#[pyfunction]
pub fn merge_revert(
    py: Python<'_>,
    undo: PathBuf,
    target: &str,
    map: &OverwriteMap,
) -> PyResult<u64> {
    let map = map.held()?;
    detached(py, || {
        if !undo.exists() {
            let words = "expected what a merge with --undo kept, found nothing: check the path";
            return Err(Error::usage(words).at_path(&undo));
        }
        let kept = Undo::open(&undo, map.identity())?;
        kept.put_back(&offline(target, map)?)
    })
}

#[pyfunction]
#[pyo3(signature = (sources, volume, *, engine="auto", progress=None))]
pub fn merge_into_volume<'py>(
    py: Python<'py>,
    sources: Vec<Known>,
    volume: &PrimaryVolume,
    engine: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let volume = volume.held();
    let make = move |sources: &[&dyn PieceSource]| {
        let targets = LiveTarget::for_sources(&volume, sources)?;
        Ok(targets.into_iter().map(|target| target as Target).collect())
    };
    run(py, sources, make, (engine, false), progress)
}
