//! The disks behind paths, as Python asks for them.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::boundary::detached;
use crate::device::{Disk, disk_behind as find_disk};

fn disk_dict<'py>(py: Python<'py>, disk: &Disk) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("device", disk.device.to_string_lossy())?;
    dict.set_item("model", &disk.model)?;
    dict.set_item("serial", &disk.serial)?;
    dict.set_item("size", disk.size)?;
    dict.set_item("removable", disk.removable)?;
    Ok(dict)
}

#[pyfunction]
pub fn disk_behind(py: Python<'_>, path: PathBuf) -> PyResult<Option<Bound<'_, PyDict>>> {
    let disk = detached(py, || find_disk(&path))?;
    disk.map(|disk| disk_dict(py, &disk)).transpose()
}
