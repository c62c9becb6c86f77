//! The one way across: errors as the classes of `dualrestore.errors`, long calls detached from the
//! interpreter, progress and signals polled on the calling thread.

use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};
use std::thread::Builder;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use uuid::Uuid;

use crate::device::Stop;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::limits::PROGRESS_INTERVAL_MS;
use crate::units::{BlockSize, Geometry};
use crate::volume::engine::Engine;

mod errors {
    pyo3::import_exception!(dualrestore.errors, UsageError);
    pyo3::import_exception!(dualrestore.errors, FormatError);
    pyo3::import_exception!(dualrestore.errors, IntegrityError);
    pyo3::import_exception!(dualrestore.errors, LockedError);
    pyo3::import_exception!(dualrestore.errors, IdentityError);
    pyo3::import_exception!(dualrestore.errors, DeviceError);
    pyo3::import_exception!(dualrestore.errors, PoisonedError);
    pyo3::import_exception!(dualrestore.errors, LinkError);
    pyo3::import_exception!(dualrestore.errors, DeadlineError);
    pyo3::import_exception!(dualrestore.errors, NextMediumError);
    pyo3::import_exception!(dualrestore.errors, BusyError);
    pyo3::import_exception!(dualrestore.errors, InterruptedJobError);
}

const EIO: i32 = 5;
/// What is told while a stream has not begun.
pub const NOTHING_YET: &[(&str, u64)] = &[("done_bytes", 0), ("total_bytes", 0)];

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let errno = error.errno().unwrap_or(EIO);
        match error.kind() {
            ErrorKind::Usage => errors::UsageError::new_err(message),
            ErrorKind::Format => errors::FormatError::new_err(message),
            ErrorKind::Integrity => errors::IntegrityError::new_err(message),
            ErrorKind::Locked => errors::LockedError::new_err(message),
            ErrorKind::Identity => errors::IdentityError::new_err(message),
            ErrorKind::Device => errors::DeviceError::new_err((errno, message)),
            ErrorKind::Poisoned => errors::PoisonedError::new_err((errno, message)),
            ErrorKind::Link => errors::LinkError::new_err(message),
            ErrorKind::Timeout => errors::DeadlineError::new_err(message),
            ErrorKind::NextMedium => errors::NextMediumError::new_err(message),
            ErrorKind::Busy => errors::BusyError::new_err(message),
            ErrorKind::Interrupted => errors::InterruptedJobError::new_err(message),
        }
    }
}

/// Runs a call that may wait, without the interpreter.
pub fn detached<T: Send>(py: Python<'_>, call: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    Ok(py.detach(call)?)
}

/// The threads and the clock of this process, made when first needed.
pub fn engine() -> Result<Arc<Engine>> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    if let Some(engine) = ENGINE.get() {
        return Ok(Arc::clone(engine));
    }
    let made = Engine::new()?;
    Ok(Arc::clone(ENGINE.get_or_init(|| made)))
}

/// A progress callback of Python, asked from the thread that does the long call.
pub struct Callback {
    callable: Option<Py<PyAny>>,
    raised: Option<PyErr>,
}

impl Callback {
    pub fn new(callable: Option<Py<PyAny>>) -> Self {
        Self { callable, raised: None }
    }

    /// Tells progress and polls signals; whether to go on.
    pub fn tell(&mut self, figures: &[(&str, u64)]) -> ControlFlow<()> {
        Python::attach(|py| {
            let told = py.check_signals().and_then(|()| {
                let Some(callable) = &self.callable else { return Ok(()) };
                let figures_dict = PyDict::new(py);
                for (name, value) in figures {
                    figures_dict.set_item(name, value)?;
                }
                callable.call1(py, (figures_dict,)).map(|_| ())
            });
            match told {
                Ok(()) => ControlFlow::Continue(()),
                Err(raised) => {
                    self.raised = Some(raised);
                    ControlFlow::Break(())
                }
            }
        })
    }

    /// Polls signals only; whether to go on.
    pub fn poll(&mut self) -> ControlFlow<()> {
        match Python::attach(|py| py.check_signals()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(raised) => {
                self.raised = Some(raised);
                ControlFlow::Break(())
            }
        }
    }

    /// The result, or what the callback raised to end the call.
    pub fn result<T>(self, result: Result<T>) -> PyResult<T> {
        match self.raised {
            Some(raised) => Err(raised),
            None => Ok(result?),
        }
    }
}

/// Does work that may wait for another program, on a thread of its own, while this one polls: so
/// that a signal or a cancelled job ends the wait.
pub fn attended<T: Send>(
    stop: &Stop,
    mut poll: impl FnMut() -> ControlFlow<()>,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        let (done_in, done) = bounded(1);
        let thread = Builder::new().name("stream".into()).spawn_scoped(scope, move || {
            // The receiver lives as long as this scope.
            let _heard = done_in.send(work());
        });
        thread.map_err(|source| Error::device("start thread", &source))?;
        loop {
            match done.recv_timeout(Duration::from_millis(PROGRESS_INTERVAL_MS)) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if poll().is_break() => stop.now(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(ErrorKind::Interrupted, "a thread ended early"));
                }
            }
        }
    })
}

pub fn byte_range((offset, length): (u64, u64)) -> Result<ByteRange> {
    offset
        .checked_add(length)
        .map(|_| ByteRange::new(offset, length))
        .ok_or_else(|| Error::usage(format!("range {offset}+{length} ends beyond any volume")))
}

pub fn byte_ranges(ranges: Option<Vec<(u64, u64)>>) -> Result<Vec<ByteRange>> {
    ranges.unwrap_or_default().into_iter().map(byte_range).collect()
}

pub fn block_size(bytes: u64) -> Result<BlockSize> {
    u32::try_from(bytes).ok().and_then(BlockSize::new).ok_or_else(|| {
        Error::usage(format!(
            "expected a block size that is a power of two from 512 bytes to 1 MiB, found {bytes}"
        ))
    })
}

pub fn geometry(size: u64, block_bytes: u64) -> Result<Geometry> {
    let block_size = block_size(block_bytes)?;
    Geometry::new(size, block_size).ok_or_else(|| {
        Error::usage(format!(
            "expected a size that is a positive multiple of 512 bytes below 8 EiB, found {size}"
        ))
    })
}

pub fn uuid(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text)
        .map_err(|_| Error::usage(format!("expected a UUID like {}, found {text:?}", Uuid::nil())))
}

pub fn extents<'py>(
    py: Python<'py>,
    ranges: impl IntoIterator<Item = ByteRange>,
) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for range in ranges {
        list.append((range.offset, range.length))?;
    }
    Ok(list)
}

/// A lock that a panicking thread has left is not to be trusted by Python either.
pub fn closed(what: &str) -> PyErr {
    errors::UsageError::new_err(format!("the {what} is closed"))
}

/// For what cannot happen unless Python misuses the module.
pub fn misuse(words: &str) -> PyErr {
    PyRuntimeError::new_err(words.to_owned())
}
