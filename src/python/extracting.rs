//! A bundle written out as an image, as a function.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::boundary::{Callback, attended, extents};
use super::buffers::copy_descriptor;
use super::keys::Trust;
use super::places::{OpenedBundle, Place};
use crate::bundle::{ExtractProgress, ExtractReport, Extraction, MediaSet, PieceSource, TarStream};
use crate::device::{
    DescriptorSink, Destination, Device, FileDevice, OpenOptions, Stop, discard, empty_file,
    refuse_source,
};
use crate::error::{Error, ErrorKind, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

impl Format {
    fn parse(text: &str) -> Result<Self> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(Error::usage(format!(
                "expected raw or qcow2 as the format of an image, found {text:?}"
            ))),
        }
    }
}

/// Media of one bundle, or a stream of one.
enum Source {
    Media(MediaSet),
    Stream(Box<TarStream>),
}

impl Source {
    fn open(media: &[(Place, Trust)], partial: bool, stop: &Stop) -> Result<Self> {
        let mut bundles = Vec::new();
        for (place, trust) in media {
            match place.open_bundle(stop, trust)? {
                OpenedBundle::Whole(bundle) => bundles.push(Arc::from(bundle)),
                OpenedBundle::Stream(stream) if media.len() == 1 => {
                    // Where the selection comes late, the end tells.
                    if !partial && stream.selection().is_ok() {
                        stream.check_complete()?;
                    }
                    return Ok(Self::Stream(stream));
                }
                OpenedBundle::Stream(_) => {
                    return Err(Error::usage(
                        "expected directories or whole tars as several media, found a stream, or \
                         a tar that was cut off, among them: name it alone",
                    ));
                }
            }
        }
        let media = MediaSet::new(bundles)?;
        if !partial {
            media.check_complete()?;
        }
        Ok(Self::Media(media))
    }

    fn pieces(&self) -> &dyn PieceSource {
        match self {
            Self::Media(media) => media,
            Self::Stream(stream) => &**stream,
        }
    }
}

/// Where the image goes.
struct Target<'a> {
    destination: &'a Place,
    format: Format,
    /// What is there, if it is a path.
    found: Option<Destination>,
    stop: &'a Stop,
}

impl Target<'_> {
    /// Whether it can be written from front to back only.
    fn is_stream(&self) -> bool {
        self.format == Format::Qcow2 || self.found.is_none_or(|found| found == Destination::Stream)
    }

    /// Writes it; a file that could not be finished is removed.
    fn write(
        &self,
        extraction: &Extraction<'_>,
        tell: &mut dyn FnMut(&ExtractProgress) -> ControlFlow<()>,
    ) -> Result<ExtractReport> {
        self.write_there(extraction, tell).map_err(|error| match error.kind() {
            // What cannot be read names its own place.
            ErrorKind::Device => error.within(Path::new(&self.destination.to_string())),
            _ => error,
        })
    }

    fn write_there(
        &self,
        extraction: &Extraction<'_>,
        tell: &mut dyn FnMut(&ExtractProgress) -> ControlFlow<()>,
    ) -> Result<ExtractReport> {
        let (path, found) = match (self.destination, self.found) {
            (Place::Path(path), Some(found)) => (Path::new(path), found),
            (place, _) => {
                let sink = descriptor_sink(place, self.stop)?;
                return self.stream(extraction, |_| Ok(sink), tell);
            }
        };
        let mut begun = false;
        let written = if self.is_stream() {
            let open = |bytes: Option<u64>| {
                check_room(path, found, bytes)?;
                let sink = found.sink(path, self.stop.clone())?;
                begun = true;
                Ok(sink)
            };
            self.stream(extraction, open, tell)
        } else {
            open_device(path, found, extraction.source).and_then(|device| {
                begun = true;
                let blank = found.is_file() && device.next_data(0)?.is_none();
                extraction.onto(&device, blank, tell)
            })
        };
        if written.is_err() && begun && found.is_file() {
            discard(path);
        }
        written
    }

    /// Opens the sink when it is known that there is something to write, and how much.
    fn stream(
        &self,
        extraction: &Extraction<'_>,
        open: impl FnOnce(Option<u64>) -> Result<DescriptorSink>,
        tell: &mut dyn FnMut(&ExtractProgress) -> ControlFlow<()>,
    ) -> Result<ExtractReport> {
        if self.format == Format::Raw {
            return extraction.into_raw(Box::new(open(None)?), tell);
        }
        let plan = extraction.plan_qcow2()?;
        let sink = open(Some(plan.file_bytes()))?;
        extraction.into_qcow2(plan, Box::new(sink), tell)
    }
}

fn descriptor_sink(place: &Place, stop: &Stop) -> Result<DescriptorSink> {
    let Place::Descriptor(number) = place else {
        return Err(Error::usage("expected a descriptor, found a path"));
    };
    let copy = copy_descriptor(*number)
        .map_err(|error| Error::usage(format!("descriptor {number}: {error}")))?;
    let sink = DescriptorSink::new(copy, stop.clone());
    sink.map_err(|error| error.within(Path::new(&place.to_string())))
}

fn check_room(path: &Path, found: Destination, bytes: Option<u64>) -> Result<()> {
    let (Destination::Disk, Some(bytes)) = (found, bytes) else { return Ok(()) };
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let size = FileDevice::open(path, options)?.size();
    if size >= bytes {
        return Ok(());
    }
    Err(Error::usage(format!(
        "expected room for an image of {bytes} bytes, found a disk of {size}: name a larger one"
    ))
    .at_path(path))
}

fn open_device(
    path: &Path,
    found: Destination,
    source: &dyn PieceSource,
) -> Result<Arc<dyn Device>> {
    if found == Destination::File {
        empty_file(path)?;
    }
    let size = source.identity().geometry.size();
    let create_size = found.is_file().then_some(size);
    let options = OpenOptions { create_size, lock: true, ..OpenOptions::default() };
    Ok(Arc::new(FileDevice::open_for_bulk(path, options)?))
}

#[pyfunction]
#[pyo3(signature = (media, destination, *, format="raw", force=false, partial=false,
                    progress=None))]
pub fn bundle_extract<'py>(
    py: Python<'py>,
    media: Vec<(Place, Option<Py<Trust>>)>,
    destination: Place,
    format: &str,
    force: bool,
    partial: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let format = Format::parse(format)?;
    let media: Vec<(Place, Trust)> =
        media.into_iter().map(|(place, trust)| (place, Trust::of(trust))).collect();
    let mut callback = Callback::new(progress);
    let stop = Stop::default();
    let latest = Mutex::new(ExtractProgress::default());
    let held = || *latest.lock().unwrap_or_else(PoisonError::into_inner);
    let mut tell = |state: ExtractProgress| {
        callback.tell(&[
            ("done_bytes", state.bytes_done),
            ("total_bytes", state.bytes_total),
            ("chunks_damaged", state.chunks_damaged),
        ])
    };
    let result = py.detach(|| {
        let report = attended(
            &stop,
            || tell(held()),
            || {
                extract(&media, &destination, (format, force, partial), &stop, &mut |state| {
                    *latest.lock().unwrap_or_else(PoisonError::into_inner) = *state;
                    ControlFlow::Continue(())
                })
            },
        )?;
        // All is done: a wish to stop comes too late.
        let _too_late = tell(held());
        Ok(report)
    });
    extract_report(py, callback.result(result)?)
}

fn extract(
    media: &[(Place, Trust)],
    destination: &Place,
    (format, force, partial): (Format, bool, bool),
    stop: &Stop,
    tell: &mut dyn FnMut(&ExtractProgress) -> ControlFlow<()>,
) -> Result<ExtractReport> {
    let mut found = None;
    if let Place::Path(path) = destination {
        let path = Path::new(path);
        found = Some(Destination::at(path, force)?);
        let sources = media.iter().filter_map(|(place, _)| match place {
            Place::Path(source) => Some(PathBuf::from(source)),
            Place::Descriptor(_) | Place::Named(..) | Place::Export(_) => None,
        });
        refuse_source(path, &sources.collect::<Vec<_>>())?;
    }
    let target = Target { destination, format, found, stop };
    let source = Source::open(media, partial, stop)?;
    let selection;
    let coverage = match &source {
        Source::Media(media) => media.coverage(),
        Source::Stream(stream) => {
            selection = match stream.selection() {
                Err(error) if target.is_stream() => return Err(error),
                known => known.unwrap_or_default(),
            };
            &selection
        }
    };
    let extraction = Extraction { source: source.pieces(), coverage, partial, stop };
    target.write(&extraction, tell)
}

fn extract_report<'py>(py: Python<'py>, report: ExtractReport) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("size", report.size)?;
    dict.set_item("bytes_data", report.bytes_data)?;
    dict.set_item("bytes_zero", report.bytes_zero)?;
    dict.set_item("bytes_damaged", report.bytes_damaged)?;
    dict.set_item("bytes_absent", report.bytes_absent)?;
    dict.set_item("bytes_output", report.bytes_output)?;
    dict.set_item("chunks_total", report.chunks_total)?;
    dict.set_item("chunks_damaged", report.chunks_damaged)?;
    dict.set_item("damaged", extents(py, report.damaged)?)?;
    dict.set_item("absent", extents(py, report.absent)?)?;
    dict.set_item("shortfall", report.shortfall)?;
    dict.set_item("seconds", report.seconds)?;
    Ok(dict)
}
