//! The Python module `dualrestore._core`: declarations only, as `_core.pyi` states them.
//!
//! | file | holds |
//! |---|---|
//! | `boundary.rs` | the one way in: detach, map errors, poll signals |
//! | `buffers.rs` | bytes across the boundary |
//! | `maps.rs`, `bundles.rs`, `selecting.rs`, `merging.rs` | files |
//! | `extracting.rs`, `reading.rs` | what bundles hold, as images and as memory |
//! | `places.rs`, `remote.rs` | where bundles come from and go to |
//! | `disks.rs` | what lies behind a path |
//! | `confinement.rs` | what a daemon gives up |
//! | `volumes.rs`, `backups.rs`, `links.rs`, `exports.rs` | what a daemon runs |

mod backups;
mod boundary;
mod buffers;
mod bundles;
mod confinement;
mod disks;
mod exports;
mod extracting;
mod keys;
mod links;
mod maps;
mod merging;
mod places;
mod reading;
mod remote;
mod selecting;
mod volumes;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::python::backups::{BackupVolume, SnapshotSource};
    #[pymodule_export]
    use crate::python::buffers::{BundleChunk, ByteBuffer};
    #[pymodule_export]
    use crate::python::bundles::{bundle_create, bundle_show, bundle_verify};
    #[pymodule_export]
    use crate::python::confinement::{confine_writing, renounce_system_calls};
    #[pymodule_export]
    use crate::python::disks::disk_behind;
    #[pymodule_export]
    use crate::python::exports::NbdServer;
    #[pymodule_export]
    use crate::python::extracting::bundle_extract;
    #[pymodule_export]
    use crate::python::keys::{BundleKey, Trust, guard_secrets};
    #[pymodule_export]
    use crate::python::links::{LinkConnection, LinkHub};
    #[pymodule_export]
    use crate::python::maps::OverwriteMap;
    #[pymodule_export]
    use crate::python::merging::{merge, merge_into_volume, merge_revert};
    #[pymodule_export]
    use crate::python::places::tar_key;
    #[pymodule_export]
    use crate::python::reading::{BundleChunkIterator, BundleExtents, BundleReader};
    #[pymodule_export]
    use crate::python::remote::NbdSource;
    #[pymodule_export]
    use crate::python::volumes::PrimaryVolume;
}
