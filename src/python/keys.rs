//! The key of an encrypted bundle as an object that shows nothing of itself.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::boundary::uuid;
use crate::bundle::generate_key;
use crate::device::hide_memory;
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

#[pyfunction]
pub fn guard_secrets() -> PyResult<()> {
    Ok(hide_memory()?)
}
