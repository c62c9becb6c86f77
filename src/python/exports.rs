//! `NbdServer`: exports, and the connections that Python accepted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use zeroize::Zeroizing;

use super::backups::BackupVolume;
use super::boundary::{detached, engine, uuid};
use super::buffers::take_descriptor;
use super::remote::exported_cut;
use super::volumes::PrimaryVolume;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::{Allowed, ExportTable, Server, TlsAcceptor};
use crate::volume::service::BlockService;
use crate::volume::snapshot_service::SnapshotService;

/// NBD sessions over descriptors that Python accepted. Guest I/O runs in Rust threads only.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct NbdServer {
    server: Server,
    /// Without it, connections are in the clear.
    acceptor: Option<Arc<TlsAcceptor>>,
    peers: Mutex<HashMap<u64, String>>,
}

impl NbdServer {
    fn insert(
        &self,
        name: &str,
        description: &str,
        service: Arc<dyn BlockService>,
        allowed: Option<Vec<String>>,
    ) -> Result<()> {
        let parse = |names: Vec<String>| names.iter().map(|name| Allowed::parse(name)).collect();
        let allowed: Option<Result<Vec<_>>> = allowed.map(parse);
        self.server.exports().insert_for(name, description, service, allowed.transpose()?)
    }
}

/// Authority, certificate and key, all PEM.
type TlsParts = (Vec<u8>, Vec<u8>, Vec<u8>);

#[pymethods]
impl NbdServer {
    #[new]
    #[pyo3(signature = (tls=None))]
    fn new(tls: Option<TlsParts>) -> PyResult<Self> {
        let acceptor = match tls {
            Some((authority, certificate, key)) => {
                let key = Zeroizing::new(key);
                Some(Arc::new(TlsAcceptor::new(&authority, &certificate, &key)?))
            }
            None => None,
        };
        let server = Server::new(Arc::new(ExportTable::new()));
        Ok(Self { server, acceptor, peers: Mutex::default() })
    }

    #[pyo3(signature = (name, volume, allowed=None))]
    fn add_volume(
        &self,
        name: &str,
        volume: &PrimaryVolume,
        allowed: Option<Vec<String>>,
    ) -> PyResult<()> {
        Ok(self.insert(name, "", volume.held(), allowed)?)
    }

    #[pyo3(signature = (name, volume, snapshot, allowed=None))]
    fn add_snapshot(
        &self,
        py: Python<'_>,
        name: &str,
        volume: &BackupVolume,
        snapshot: &str,
        allowed: Option<Vec<String>>,
    ) -> PyResult<()> {
        let snapshot = uuid(snapshot)?;
        let volume = volume.held()?;
        detached(py, || {
            let view = volume.view(snapshot)?;
            let pool = Arc::clone(engine()?.pool());
            let description = exported_cut(&view);
            let service = Arc::new(SnapshotService::new(view, pool)?);
            self.insert(name, &description, service, allowed)
        })
    }

    fn remove(&self, py: Python<'_>, name: &str) {
        py.detach(|| self.server.exports().remove(name));
    }

    fn exports(&self) -> Vec<String> {
        let exports = self.server.exports().all();
        exports.iter().map(|export| export.name().to_owned()).collect()
    }

    fn serve(&self, py: Python<'_>, descriptor: i32, peer: String) -> PyResult<()> {
        let socket = take_descriptor(descriptor)?;
        let connection = detached(py, || self.server.serve(socket, self.acceptor.clone()))?;
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
