//! A map file that nobody serves: made beside an image, or left by a daemon that is not running.
//!
//! | beside the file | then |
//! |---|---|
//! | nothing of ours | the file is locked, its bits are taken as they are |
//! | `intent.log`, as in a state directory | the directory is locked, hot extents count (law 5) |
//!
//! Guarantees: a map that a daemon holds is busy; what a creation cannot complete is removed.
//! Does not know: what is done with the map.

use std::path::Path;
use std::sync::Arc;

use super::file::MapFile;
use super::intent::IntentLog;
use super::overwrite::OverwriteMap;
use crate::device::{Directory, FileDevice, FileDirectory, OpenOptions};
use crate::error::{Error, Result};
use crate::format::map::{MapIdentity, SLOT_BYTES};

/// Names of a primary's files in its state directory.
pub const OVERWRITE_MAP_NAME: &str = "overwrite.map";
pub const INTENT_LOG_NAME: &str = "intent.log";

/// See the module.
#[derive(Debug)]
pub struct OfflineMap {
    map: Arc<OverwriteMap>,
    /// Locked for as long as this lives.
    _home: Option<FileDirectory>,
}

impl OfflineMap {
    /// A new file in which everything is missing, durable when it returns.
    pub fn create(path: &Path, identity: MapIdentity) -> Result<Self> {
        if path.exists() {
            return Err(Error::usage(
                "expected a new file, found one: remove it first, or name another",
            )
            .at_path(path));
        }
        let size = OverwriteMap::bytes_needed(identity.geometry);
        let options = OpenOptions { create_size: Some(size), lock: true, ..OpenOptions::default() };
        let device = Arc::new(FileDevice::open(path, options)?);
        match OverwriteMap::create(device, identity) {
            Ok(map) => Ok(Self { map: Arc::new(map), _home: None }),
            Err(error) => {
                // What matters to the caller is why it failed.
                let _removed = remove(path);
                Err(error.at_path(path))
            }
        }
    }

    pub fn open(path: &Path) -> Result<Self> {
        check_length(path)?;
        let home = match home_of(path) {
            Some(home) => Some(FileDirectory::open(home, true)?),
            None => None,
        };
        let options = OpenOptions { lock: true, ..OpenOptions::default() };
        let device = Arc::new(FileDevice::open(path, options)?);
        let opened = || {
            let Some(home) = &home else { return OverwriteMap::open(device, None) };
            let volume = MapFile::read_identity(&*device)?.volume;
            let (_, intents) = IntentLog::open(home.open(INTENT_LOG_NAME)?, volume)?;
            OverwriteMap::open(device, Some(&intents))
        };
        let (map, _) = opened().map_err(|error| error.at_path(path))?;
        Ok(Self { map: Arc::new(map), _home: home })
    }

    #[must_use]
    pub fn map(&self) -> &Arc<OverwriteMap> {
        &self.map
    }
}

/// Tells a file that ends within a slot from one whose sectors the device room would refuse.
fn check_length(path: &Path) -> Result<()> {
    let Ok(found) = path.metadata() else { return Ok(()) };
    if found.is_file() && (found.len() == 0 || !found.len().is_multiple_of(SLOT_BYTES as u64)) {
        return Err(Error::format(format!(
            "expected a map, which is whole slots of {SLOT_BYTES} bytes, found a file of {}: it \
             was cut off, or is none; bring the whole file back, or make a new map",
            found.len()
        ))
        .at_path(path));
    }
    Ok(())
}

/// The state directory that a map is in, if it is in one.
fn home_of(path: &Path) -> Option<&Path> {
    let named = path.file_name().is_some_and(|name| name == OVERWRITE_MAP_NAME);
    let home = parent_of(path);
    (named && home.join(INTENT_LOG_NAME).exists()).then_some(home)
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn remove(path: &Path) -> Result<()> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Error::usage("expected a file with a plain name"))?;
    FileDirectory::open(parent_of(path), false)?.remove(name)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::error::ErrorKind;
    use crate::extent::BlockRange;
    use crate::units::{BlockSize, Geometry};

    fn identity() -> MapIdentity {
        let geometry = Geometry::new(4 << 20, BlockSize::DEFAULT).expect("valid");
        MapIdentity { volume: Uuid::from_u128(3), geometry, generation: 1 }
    }

    #[test]
    fn a_map_beside_an_intent_log_is_opened_with_it_and_under_its_directorys_lock() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let path = home.path().join(OVERWRITE_MAP_NAME);
        drop(OfflineMap::create(&path, identity()).expect("created"));
        let directory = FileDirectory::open(home.path(), true).expect("locked");
        let device = directory.create(INTENT_LOG_NAME, IntentLog::BYTES).expect("created");
        let log = IntentLog::create(device, identity().volume).expect("created");
        log.record(&[1]).expect("recorded");
        let busy = OfflineMap::open(&path).expect_err("the daemon has it");
        assert_eq!(busy.kind(), ErrorKind::Busy);
        drop(directory);
        let opened = OfflineMap::open(&path).expect("free");
        let wanted = opened.map().wanted(identity().geometry.all_blocks());
        assert_eq!(wanted, [BlockRange::new(0, 256), BlockRange::new(512, 1024)]);
        let busy = FileDirectory::open(home.path(), true).expect_err("we have it");
        assert_eq!(busy.kind(), ErrorKind::Busy);
    }

    #[test]
    fn a_map_in_use_and_one_that_exists_are_refused() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let path = home.path().join("x.map");
        let held = OfflineMap::create(&path, identity()).expect("created");
        assert_eq!(OfflineMap::open(&path).expect_err("in use").kind(), ErrorKind::Busy);
        drop(held);
        let refused = OfflineMap::create(&path, identity()).expect_err("it exists");
        assert_eq!(refused.kind(), ErrorKind::Usage);
        OfflineMap::open(&path).expect("as it was");
    }
}
