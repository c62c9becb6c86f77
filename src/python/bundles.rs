//! Bundles, as functions.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use uuid::Uuid;

use super::backups::SnapshotSource;
use super::boundary::{
    Callback, NOTHING_YET, attended, block_size as block_size_of, byte_ranges, extents,
};
use super::keys::{BundleKey, Trust};
use super::places::{OpenedBundle, Place};
use super::remote::NbdSource;
use super::selecting::Words;
use crate::bundle::{
    BundleProgress, BundleReport, BundleWriter, Compression, Crew, Encryption, Identity,
    ImageSource, Journey, Source, VerifyProgress, WriterOptions, random_salt,
};
use crate::clock::wall_clock_ms;
use crate::device::{FileDevice, OpenOptions, Stop, discard};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::TAR_SEGMENT_BYTES_MAX;

const PROBLEMS_MAX: usize = 100;

/// An image by its path, a snapshot, or what a server exports.
#[derive(FromPyObject)]
pub enum BundleInput {
    Path(String),
    Snapshot(Py<SnapshotSource>),
    Export(Py<NbdSource>),
}

#[pyfunction]
#[pyo3(signature = (source, media, *, selection=None, partitions=None, allocated=false,
                    since=None, compression="none", block_size=4096,
                    medium_size=None, proceed=false, name="", mark="", state=None,
                    encryption=None, force=false, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub fn bundle_create<'py>(
    py: Python<'py>,
    source: BundleInput,
    media: Vec<Place>,
    selection: Option<Vec<(u64, u64)>>,
    partitions: Option<Vec<u32>>,
    allocated: bool,
    since: Option<String>,
    compression: &str,
    block_size: u64,
    medium_size: Option<u64>,
    proceed: bool,
    name: &str,
    mark: &str,
    state: Option<PathBuf>,
    encryption: Option<(Py<BundleKey>, Vec<u8>)>,
    force: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let partitions = partitions.unwrap_or_default();
    let words = Words { ranges: byte_ranges(selection)?, partitions, allocated, since };
    let mut snapshot_view = None;
    let source: Arc<dyn Source> = match source {
        BundleInput::Path(path) => {
            let block_size = block_size_of(block_size)?;
            let options = OpenOptions { read_only: true, lock: true, ..OpenOptions::default() };
            let device = Arc::new(py.detach(|| FileDevice::open(path, options))?);
            Arc::new(ImageSource::new(device, block_size)?)
        }
        BundleInput::Export(export) => export.get().source(block_size_of(block_size)?)?,
        BundleInput::Snapshot(snapshot) => {
            let into_tar = media.iter().any(Place::is_tar_destination);
            snapshot_view = Some(snapshot.get().view());
            py.detach(|| snapshot.get().source(into_tar))?
        }
    };
    let encryption = encryption.map(|(key, wrapped_key)| Encryption {
        key: key.get().held().clone(),
        wrapped_key,
        salts: random_salt,
    });
    let defaults = WriterOptions::default();
    let mut options = WriterOptions {
        compression: Compression::parse(compression)?,
        bundle: encryption.as_ref().map_or(defaults.bundle, |how| how.key.bundle()),
        encryption,
        created_unix_s: wall_clock_ms() / 1000,
        ..defaults
    };
    let directories: Vec<PathBuf> = media.iter().map(|place| place.to_string().into()).collect();
    let journey = Journey {
        source: &*source,
        name,
        mark,
        media: &directories,
        medium_bytes_max: medium_size,
        proceed,
        state: state.as_deref(),
    };
    let mut callback = Callback::new(progress);
    let encrypted = options.encryption.is_some();
    let result = py.detach(|| {
        words.apply(&*source, snapshot_view.as_ref(), proceed, &mut options)?;
        write_bundle((&media, force), &journey, options, &mut callback)
    });
    let report = callback.result(result)?;
    let dict = bundle_report(py, &report, source.identity())?;
    dict.set_item("encrypted", encrypted)?;
    Ok(dict)
}

fn bundle_report<'py>(
    py: Python<'py>,
    report: &BundleReport,
    identity: Identity,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("bundle", report.bundle.to_string())?;
    dict.set_item("volume", volume_text(identity.volume))?;
    dict.set_item("generation", identity.generation)?;
    dict.set_item("sequence", identity.cut)?;
    dict.set_item("bytes_selected", report.bytes_selected)?;
    dict.set_item("bytes_data", report.bytes_data)?;
    dict.set_item("bytes_zero", report.bytes_zero)?;
    dict.set_item("bytes_unreadable", report.bytes_unreadable)?;
    dict.set_item("bytes_stored", report.bytes_stored)?;
    dict.set_item("bytes_saved", report.bytes_saved)?;
    dict.set_item("chunks", report.chunks)?;
    dict.set_item("chunks_compressed", report.chunks_compressed)?;
    dict.set_item("chunks_untried", report.chunks_untried)?;
    dict.set_item("segments", report.segments)?;
    dict.set_item("unreadable", extents(py, report.unreadable.iter().copied())?)?;
    dict.set_item("media", report.media)?;
    dict.set_item("bytes_left", report.bytes_left)?;
    dict.set_item("seconds", report.seconds)?;
    Ok(dict)
}

/// Into directories, or into one tar.
fn write_bundle(
    (media, forced): (&[Place], bool),
    journey: &Journey<'_>,
    options: WriterOptions,
    callback: &mut Callback,
) -> Result<BundleReport> {
    let tell = |callback: &mut Callback, state: &BundleProgress| {
        callback.tell(&[
            ("done_bytes", state.bytes_done),
            ("total_bytes", state.bytes_total),
            ("bytes_stored", state.bytes_stored),
        ])
    };
    let stop = Stop::default();
    let tars = media.iter().filter(|place| place.is_tar_destination()).count();
    let ([destination], 1) = (media, tars) else {
        if tars > 0 {
            return Err(Error::usage(
                "expected one tar, or directories as media, found several places with a tar among \
                 them: name one",
            ));
        }
        return journey.make(&options, &mut |state| tell(callback, state));
    };
    if journey.proceed || journey.medium_bytes_max.is_some() {
        return Err(Error::usage(
            "expected directories as media to go on with or of a stated size, found a tar, which \
             is written in one go: leave --continue and --medium-size out",
        ));
    }
    let source = journey.source;
    let (tar, made) = destination.tar_destination(&stop, options.created_unix_s, forced)?;
    let options = WriterOptions { segment_bytes_max: TAR_SEGMENT_BYTES_MAX, ..options };
    let latest = Mutex::new(BundleProgress::default());
    let poll = || tell(callback, &latest.lock().unwrap_or_else(PoisonError::into_inner));
    let result = attended(&stop, poll, || {
        let report = BundleWriter::create_in(&tar, source, &options, &mut |state| {
            *latest.lock().unwrap_or_else(PoisonError::into_inner) = *state;
            match stop.check() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        tar.finish()?;
        Ok(report)
    });
    if let (Err(_), Some(made)) = (&result, made) {
        discard(&made);
    }
    result
}

fn volume_text(volume: Uuid) -> Option<String> {
    (!volume.is_nil()).then(|| volume.to_string())
}

#[pyfunction]
pub fn bundle_show<'py>(py: Python<'py>, place: Place) -> PyResult<Bound<'py, PyDict>> {
    let mut callback = Callback::new(None);
    let stop = Stop::default();
    let result = py.detach(|| attended(&stop, || callback.poll(), || place.look(&stop)));
    let manifest = callback.result(result)?;
    let selection: Vec<ByteRange> =
        manifest.begin.selection.iter().map(|run| ByteRange::from(*run)).collect();
    let begin = &manifest.begin;
    let sum = |field: fn(&crate::format::bundle::SegmentEntry) -> u64| {
        manifest.segments.iter().map(field).sum::<u64>()
    };
    let dict = PyDict::new(py);
    dict.set_item("bundle", begin.bundle.0.to_string())?;
    dict.set_item("volume", begin.volume.as_ref().map(|volume| volume.0.to_string()))?;
    dict.set_item("size", begin.size)?;
    dict.set_item("block_size", begin.block_size)?;
    dict.set_item("generation", begin.generation)?;
    dict.set_item("sequence", begin.cut)?;
    dict.set_item("snapshot", begin.snapshot.as_ref().map(|snapshot| snapshot.0.to_string()))?;
    dict.set_item("created", begin.created_unix_s)?;
    dict.set_item("compression", &begin.compression)?;
    dict.set_item("encrypted", begin.is_encrypted())?;
    dict.set_item("complete", true)?;
    dict.set_item("allocated_only", begin.allocated_only)?;
    let base = begin.base.as_ref().map(|base| (base.generation, base.cut));
    dict.set_item("base", base)?;
    dict.set_item("medium", manifest.medium.map_or(1, |medium| medium.number))?;
    dict.set_item("last", manifest.medium.is_none_or(|medium| medium.last))?;
    let selected: u64 = selection.iter().map(|range| range.length).sum();
    dict.set_item("extents", extents(py, selection)?)?;
    dict.set_item("bytes_selected", selected)?;
    dict.set_item("bytes_data", sum(|segment| segment.data_bytes))?;
    dict.set_item("bytes_zero", sum(|segment| segment.zero_bytes))?;
    dict.set_item("bytes_unreadable", sum(|segment| segment.unreadable_bytes))?;
    dict.set_item("bytes_stored", sum(|segment| segment.stored_bytes))?;
    dict.set_item("chunks", sum(|segment| segment.chunks))?;
    let segments = PyList::empty(py);
    for segment in &manifest.segments {
        let entry = PyDict::new(py);
        entry.set_item("name", &segment.name)?;
        entry.set_item("bytes", segment.bytes)?;
        entry.set_item("chunks", segment.chunks)?;
        segments.append(entry)?;
    }
    dict.set_item("segments", segments)?;
    Ok(dict)
}

#[pyfunction]
#[pyo3(signature = (place, *, trust=None, progress=None))]
pub fn bundle_verify<'py>(
    py: Python<'py>,
    place: Place,
    trust: Option<Py<Trust>>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let mut callback = Callback::new(progress);
    let trust = Trust::of(trust);
    let stop = Stop::default();
    let result = py.detach(|| {
        let open = || place.open_bundle(&stop, &trust);
        let bundle = attended(&stop, || callback.tell(NOTHING_YET), open)?;
        let mut tell = |state: &VerifyProgress| {
            callback.tell(&[
                ("done_bytes", state.bytes_done),
                ("total_bytes", state.bytes_total),
                ("chunks_damaged", state.chunks_damaged),
            ])
        };
        match bundle {
            OpenedBundle::Whole(bundle) => bundle.verify(Crew::of(&*bundle), &mut tell),
            OpenedBundle::Stream(stream) => stream.verify(Crew::of(&*stream), &mut tell),
        }
    });
    let report = callback.result(result)?;
    let dict = PyDict::new(py);
    dict.set_item("bytes_checked", report.bytes)?;
    dict.set_item("chunks_checked", report.chunks)?;
    dict.set_item("chunks_damaged", report.chunks_damaged)?;
    dict.set_item("segments_missing", 0)?;
    dict.set_item("damaged", extents(py, report.damaged)?)?;
    let problems: Vec<_> = report.blemishes.into_iter().take(PROBLEMS_MAX).collect();
    dict.set_item("problems", problems)?;
    dict.set_item("seconds", report.seconds)?;
    Ok(dict)
}
