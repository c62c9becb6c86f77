//! `NbdServer`: exports, and the connections that Python accepted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::backups::BackupVolume;
use super::boundary::{detached, engine, uuid};
use super::buffers::take_descriptor;
use super::remote::exported_cut;
use super::volumes::PrimaryVolume;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::{ExportTable, Server, Tls};
use crate::volume::service::BlockService;
use crate::volume::snapshot_service::SnapshotService;

/// NBD sessions over descriptors that Python accepted. Guest I/O runs in Rust threads only.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct NbdServer {
    server: Server,
    /// The export that the empty name means, besides its own.
    default: Option<String>,
    peers: Mutex<HashMap<u64, String>>,
}

impl NbdServer {
    fn insert(&self, name: &str, description: &str, service: Arc<dyn BlockService>) -> Result<()> {
        let exports = self.server.exports();
        exports.insert(name, description, Arc::clone(&service))?;
        if self.default.as_deref() == Some(name) {
            exports.insert("", name, service)?;
        }
        Ok(())
    }
}

#[pymethods]
impl NbdServer {
    #[new]
    #[pyo3(signature = (default=None))]
    fn new(default: Option<String>) -> PyResult<Self> {
        let server = Server::new(Arc::new(ExportTable::new()))?;
        Ok(Self { server, default, peers: Mutex::default() })
    }

    fn add_volume(&self, name: &str, volume: &PrimaryVolume) -> PyResult<()> {
        Ok(self.insert(name, "", volume.held())?)
    }

    fn add_snapshot(
        &self,
        py: Python<'_>,
        name: &str,
        volume: &BackupVolume,
        snapshot: &str,
    ) -> PyResult<()> {
        let snapshot = uuid(snapshot)?;
        let volume = volume.held()?;
        detached(py, || {
            let view = volume.view(snapshot)?;
            let pool = Arc::clone(engine()?.pool());
            let description = exported_cut(&view);
            self.insert(name, &description, Arc::new(SnapshotService::new(view, pool)?))
        })
    }

    fn remove(&self, py: Python<'_>, name: &str) {
        py.detach(|| {
            if self.default.as_deref() == Some(name) {
                self.server.exports().remove("");
            }
            self.server.exports().remove(name);
        });
    }

    fn exports(&self) -> Vec<String> {
        let exports = self.server.exports().all();
        exports.iter().map(|export| export.name().to_owned()).filter(|n| !n.is_empty()).collect()
    }

    fn serve(&self, py: Python<'_>, descriptor: i32, peer: String) -> PyResult<()> {
        let socket = take_descriptor(descriptor)?;
        let connection = detached(py, || self.server.serve(socket, Tls::Off))?;
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.insert(connection, peer);
        Ok(())
    }

    fn connections<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let reports = self.server.connections();
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|held, _| reports.iter().any(|report| report.connection == *held));
        let list = PyList::empty(py);
        for report in reports {
            let dict = PyDict::new(py);
            dict.set_item("peer", peers.get(&report.connection))?;
            dict.set_item("requests", report.requests)?;
            dict.set_item("bytes_read", report.bytes_sent)?;
            dict.set_item("bytes_written", report.bytes_received)?;
            dict.set_item("in_flight", report.in_flight)?;
            list.append(dict)?;
        }
        Ok(list)
    }

    /// The wait is the server's own; `timeout_ms` below it only matters to the caller's patience.
    #[pyo3(signature = (timeout_ms))]
    fn shutdown(&self, py: Python<'_>, timeout_ms: u64) -> PyResult<bool> {
        let _the_servers_own_limit_is_shorter = timeout_ms;
        match py.detach(|| self.server.shutdown()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Timeout => Ok(false),
            Err(error) => Err(Error::into(error)),
        }
    }
}
