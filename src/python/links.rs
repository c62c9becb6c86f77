//! `LinkHub` and `LinkConnection`: the link without its sockets.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use pyo3::prelude::*;

use super::backups::BackupVolume;
use super::boundary::{detached, misuse};
use super::buffers::{ByteBuffer, copy_from_python};
use super::volumes::PrimaryVolume;
use crate::error::Error;
use crate::format::frames::Class;
use crate::link::{Endpoint, Hub};

/// All link connections of this process, and what they lead to.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct LinkHub {
    hub: Arc<Hub>,
}

#[pymethods]
impl LinkHub {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self { hub: Arc::new(Hub::new()?) })
    }

    #[getter]
    fn wake_descriptor(&self) -> i32 {
        self.hub.wake().descriptor().as_raw_fd()
    }

    fn ready(&self) -> Vec<u64> {
        self.hub.wake().take()
    }

    fn serve(&self, py: Python<'_>, volume: &BackupVolume) -> PyResult<()> {
        let side = volume.side(&self.hub)?;
        detached(py, || self.hub.serve(side))
    }

    fn withdraw(&self, py: Python<'_>, volume: &BackupVolume) {
        let name = volume.name();
        py.detach(|| self.hub.withdraw(name));
    }

    fn connect(
        &self,
        py: Python<'_>,
        volume: &PrimaryVolume,
        backup: usize,
        remote_name: &str,
        link_class: &str,
    ) -> PyResult<LinkConnection> {
        if backup != 0 {
            return Err(Error::usage("a primary has one backup in this version").into());
        }
        let class = match link_class {
            "mirror" => Class::Mirror,
            "demand" => Class::Demand,
            "bulk" => Class::Bulk,
            other => return Err(misuse(&format!("{other:?} is no class of link connections"))),
        };
        let held = volume.held();
        let endpoint = detached(py, || self.hub.connect(&held, remote_name, class))?;
        volume.set_side(self.hub.primary(&held));
        Ok(LinkConnection { endpoint })
    }

    fn accept(&self) -> LinkConnection {
        LinkConnection { endpoint: self.hub.accept() }
    }

    /// Ends the connections of a primary; they are to be made again.
    fn disconnect(&self, py: Python<'_>, volume: &PrimaryVolume) {
        let held = volume.held();
        py.detach(|| self.hub.forget(&held));
    }

    /// Nothing is left to do: connections are closed one by one, the descriptor with the object.
    #[expect(clippy::unused_self, reason = "a method of the Python class")]
    fn close(&self) {}
}

/// The protocol of one TCP connection, without the socket.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct LinkConnection {
    endpoint: Arc<Endpoint>,
}

const IDLE_SECONDS: f64 = 1.0;

#[pymethods]
impl LinkConnection {
    #[getter]
    fn id(&self) -> u64 {
        self.endpoint.id()
    }

    #[getter]
    fn state(&self) -> &'static str {
        self.endpoint.state()
    }

    #[getter]
    fn error(&self) -> Option<String> {
        self.endpoint.problem()
    }

    #[getter]
    fn refused(&self) -> bool {
        self.endpoint.is_refused()
    }

    #[getter]
    fn label(&self) -> String {
        self.endpoint.label()
    }

    fn receive(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>, length: usize) -> PyResult<()> {
        let bytes = copy_from_python(buffer, length)?;
        py.detach(|| self.endpoint.receive(&bytes));
        Ok(())
    }

    fn take_outgoing(&self, py: Python<'_>, limit: usize) -> Option<ByteBuffer> {
        py.detach(|| self.endpoint.take_outgoing(limit)).map(ByteBuffer::new)
    }

    fn tick(&self, py: Python<'_>) -> f64 {
        let next_ms = py.detach(|| self.endpoint.tick());
        next_ms.map_or(IDLE_SECONDS, |ms| (ms as f64 / 1000.0).min(IDLE_SECONDS))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.endpoint.close());
    }
}
