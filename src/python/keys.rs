//! The key of an encrypted bundle, and what else is known of a bundle, as objects that show no
//! secret.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::boundary::uuid;
use crate::bundle::{self, generate_key};
use crate::device::hide_memory;
use crate::error::Error;
use crate::format::bundle::BundleKey as Key;

/// Held in the core, wiped when the last reference goes.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct BundleKey(Key);

impl BundleKey {
    pub fn held(&self) -> &Key {
        &self.0
    }
}

#[pymethods]
impl BundleKey {
    #[staticmethod]
    fn generate(bundle: &str) -> PyResult<Self> {
        hide_memory()?;
        Ok(Self(generate_key(uuid(bundle)?)?))
    }

    #[staticmethod]
    fn parse(text: &[u8]) -> PyResult<Self> {
        hide_memory()?;
        Ok(Self(Key::parse(text)?))
    }

    #[getter]
    fn bundle(&self) -> String {
        self.0.bundle().to_string()
    }

    fn text<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.text().as_bytes())
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// What a bundle is held to.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct Trust(bundle::Trust);

impl Trust {
    /// That of a bundle of which nothing is known, if none is given.
    pub fn of(given: Option<&Py<Self>>) -> bundle::Trust {
        given.map(|trust| trust.get().0.clone()).unwrap_or_default()
    }
}

#[pymethods]
impl Trust {
    #[new]
    #[pyo3(signature = (key=None, manifest=None))]
    fn new(key: Option<&BundleKey>, manifest: Option<&[u8]>) -> PyResult<Self> {
        let manifest = manifest.map(<[u8; 32]>::try_from).transpose();
        let manifest = manifest.map_err(|_| Error::usage("expected a SHA-256 of 32 bytes"))?;
        Ok(Self(bundle::Trust { key: key.map(|key| key.0.clone()), manifest }))
    }

    #[getter]
    fn key(&self) -> Option<BundleKey> {
        self.0.key.clone().map(BundleKey)
    }

    #[getter]
    fn manifest<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.manifest.map(|hash| PyBytes::new(py, &hash))
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

#[pyfunction]
pub fn guard_secrets() -> PyResult<()> {
    Ok(hide_memory()?)
}
