//! The device of a volume: made only where nothing is known of the volume yet.
//!
//! | known of the volume | the device | then |
//! |---|---|---|
//! | nothing | missing, and a size is given | made, sparse |
//! | nothing | missing | refused |
//! | its size | missing, or smaller | refused: what it held is not to be taken for zeros |
//! | any | there | opened under a lock |
//!
//! Does not know: maps, catalogues.

use std::path::Path;
use std::sync::Arc;

use crate::device::{Device, FileDevice, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Geometry;

const ENOENT: i32 = 2;

/// A volume's device, open.
#[derive(Debug)]
pub struct VolumeDevice {
    pub device: Arc<dyn Device>,
    /// Made just now: it reads as zeros.
    pub made: bool,
    /// Bytes of the volume.
    pub size: u64,
}

/// What the state of a volume says of its device.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    pub size: u64,
    /// What to do where the device is lost for good.
    pub advice: &'static str,
}

impl VolumeDevice {
    /// `size`: bytes of the volume as the configuration says.
    pub fn open(
        path: &Path,
        recorded: Option<Recorded>,
        size: Option<u64>,
        direct: bool,
    ) -> Result<Self> {
        let made = !path.exists();
        if let Some(recorded) = recorded {
            check_there(path, recorded).map_err(|error| error.at_path(path))?;
        } else if made && size.is_none() {
            let words =
                "no such device or file: check the path, or give a size to have a file made";
            return Err(Error::new(ErrorKind::Device, words).with_errno(ENOENT).at_path(path));
        }
        let create_size = if recorded.is_none() { size } else { None };
        let options = OpenOptions { direct, lock: true, create_size, ..OpenOptions::default() };
        let device = FileDevice::open(path, options)?;
        let size = size.or(recorded.map(|known| known.size)).unwrap_or(device.size());
        if device.size() < size {
            return Err(smaller(size, device.size()).at_path(path));
        }
        Ok(Self { device: Arc::new(device), made, size })
    }

    /// An error if blocks of this volume are not whole sectors of the device.
    pub fn check_sectors(&self, geometry: Geometry) -> Result<()> {
        let sector = self.device.sector_size();
        if geometry.is_whole_sectors(sector) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "expected a size and a block size in whole sectors of the device, which has sectors of \
             {sector} bytes, found {} and {}: mend size and block_size in the configuration",
            geometry.size(),
            geometry.block_size().bytes()
        )))
    }
}

/// A file that is missing or became shorter held something.
fn check_there(path: &Path, recorded: Recorded) -> Result<()> {
    match path.metadata() {
        Ok(found) if found.is_file() && found.len() < recorded.size => {
            Err(smaller(recorded.size, found.len()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::new(
            ErrorKind::Device,
            format!(
                "expected the device of this volume, found nothing: bring it back (is it \
                 mounted?); {}",
                recorded.advice
            ),
        )
        .with_errno(ENOENT)),
        _ => Ok(()),
    }
}

fn smaller(expected: u64, found: u64) -> Error {
    Error::identity(format!(
        "expected a device of at least the {expected} bytes of its volume, found {found}: bring \
         the right one back"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn recorded() -> Option<Recorded> {
        Some(Recorded { size: MIB, advice: "do as told" })
    }

    #[test]
    fn a_missing_device_is_made_only_for_a_volume_that_nothing_is_known_of() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let path = home.path().join("disk");
        let refused = VolumeDevice::open(&path, recorded(), Some(MIB), false);
        let refused = refused.expect_err("it was there once");
        assert_eq!((refused.kind(), refused.errno()), (ErrorKind::Device, Some(ENOENT)));
        assert!(refused.to_string().contains("do as told"), "{refused}");
        assert!(VolumeDevice::open(&path, None, None, false).is_err(), "no size");
        assert!(!path.exists());
        let opened = VolumeDevice::open(&path, None, Some(2 * MIB), false).expect("made");
        assert_eq!((opened.made, opened.size, opened.device.size()), (true, 2 * MIB, 2 * MIB));
        drop(opened);
        let opened = VolumeDevice::open(&path, recorded(), None, false).expect("opened");
        assert_eq!((opened.made, opened.size), (false, MIB));
    }

    #[test]
    fn a_device_that_became_smaller_is_refused_and_left_alone() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        for bytes in [0, 512, MIB - 512] {
            file.as_file().set_len(bytes).expect("set");
            let refused = VolumeDevice::open(file.path(), recorded(), Some(MIB), false);
            assert_eq!(refused.expect_err("smaller").kind(), ErrorKind::Identity);
            assert_eq!(file.as_file().metadata().expect("there").len(), bytes);
        }
    }
}
