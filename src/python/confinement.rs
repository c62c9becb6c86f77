//! What a daemon gives up, as Python asks for it.

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::device;

#[pyfunction]
pub fn confine_writing(places: Vec<PathBuf>) -> PyResult<()> {
    Ok(device::confine_writing(&places)?)
}

#[pyfunction]
pub fn renounce_system_calls() -> PyResult<()> {
    Ok(device::renounce_system_calls()?)
}
