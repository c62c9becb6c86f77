//! The key of an encrypted bundle, and what else is known of a bundle, as objects that show no
//! secret.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::boundary::uuid;
use crate::bundle::{self, TarStream, generate_key};
use crate::device::hide_memory;
use crate::error::{Error, Result};
use crate::format::bundle::{BundleKey as Key, locked};

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
#[derive(Debug, Default)]
pub struct Trust {
    known: bundle::Trust,
    /// Makes the key of a stream of what wraps it, once that has come.
    unlock: Option<Py<PyAny>>,
}

impl Trust {
    /// What is known before the bundle is opened.
    pub fn known(&self) -> bundle::Trust {
        self.known.clone()
    }

    /// Whether only a bundle can be meant.
    pub fn is_any(&self) -> bool {
        self.known.key.is_some() || self.known.is_signed() || self.unlock.is_some()
    }

    /// Holds a stream to it, before its first segment is read.
    pub fn unlock(&self, stream: &TarStream) -> Result<()> {
        if self.known.is_signed() {
            return Err(Error::usage(
                "expected a directory, found a stream, whose signature could be checked only \
                 when all of it was used: unpack it first, with `tar xf`",
            ));
        }
        let Some(unlock) = &self.unlock else { return stream.unlock(self.known.key.as_ref()) };
        let wrapped = stream.wrapped_key()?.ok_or_else(|| {
            locked(
                "expected an encrypted bundle, found one that is not: it may have been exchanged; \
                 name no identity or passphrase if you trust it",
            )
        })?;
        let key = Python::attach(|py| {
            let made = unlock.call1(py, (PyBytes::new(py, &wrapped),));
            let key = made.and_then(|made| Ok(made.extract::<Py<BundleKey>>(py)?));
            key.map_err(|raised| locked(raised.value(py).to_string()))
        })?;
        stream.unlock(Some(key.get().held()))
    }

    /// The same as an object that a call can keep; nothing is known if none is given.
    pub fn of(given: Option<Py<Self>>) -> Self {
        let Some(given) = given else { return Self::default() };
        let unlock = &given.get().unlock;
        let unlock = Python::attach(|py| unlock.as_ref().map(|unlock| unlock.clone_ref(py)));
        Self { known: given.get().known(), unlock }
    }
}

#[pymethods]
impl Trust {
    #[new]
    #[pyo3(signature = (key=None, manifest=None, unlock=None))]
    fn new(
        key: Option<&BundleKey>,
        manifest: Option<&[u8]>,
        unlock: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let manifest = manifest.map(<[u8; 32]>::try_from).transpose();
        let manifest = manifest.map_err(|_| Error::usage("expected a SHA-256 of 32 bytes"))?;
        let known = bundle::Trust { key: key.map(|key| key.0.clone()), manifest };
        Ok(Self { known, unlock })
    }

    #[getter]
    fn key(&self) -> Option<BundleKey> {
        self.known.key.clone().map(BundleKey)
    }

    #[getter]
    fn manifest<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.known.manifest.map(|hash| PyBytes::new(py, &hash))
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.known)
    }
}

#[pyfunction]
pub fn guard_secrets() -> PyResult<()> {
    Ok(hide_memory()?)
}
