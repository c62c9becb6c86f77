//! The disk behind a path: what it is called, and whether it is one that is carried away.
//!
//! | path | its disk |
//! |---|---|
//! | a block device | itself, or the disk that it is a partition of |
//! | a file or directory, or a new one in a directory that exists | that of its file system |
//!
//! A mapped device (LUKS, LVM, RAID) stands for the disks beneath it; it is removable if one of
//! them is. A disk is removable if the kernel says that its medium is, or if it hangs on USB or
//! MMC. Loop devices, network file systems and memory are not removable.
//!
//! Guarantees: nothing is opened or changed.
//! Does not know: who asks.

#![expect(clippy::disallowed_methods, reason = "the kernel tells of disks through files")]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use super::mounted::{Number, read_number, source_of};
use crate::error::{Error, Result};

/// Mapped devices on mapped devices; more than anybody stacks.
const STACKED_MAX: usize = 8;
const SECTOR: u64 = 512;
/// Where the kernel and udev describe block devices by number.
const SYSFS: &str = "/sys/dev/block";
const UDEV: &str = "/run/udev/data";

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// For example `/dev/sdb`.
    pub device: PathBuf,
    pub model: Option<String>,
    pub serial: Option<String>,
    /// Bytes.
    pub size: u64,
    pub removable: bool,
}

impl std::fmt::Display for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let model = self.model.as_deref().unwrap_or("of unknown model");
        let serial = self.serial.as_deref().unwrap_or("unknown");
        let (device, size) = (self.device.display(), self.size);
        write!(f, "{device} ({model}, serial {serial}, {size} bytes)")
    }
}

/// The disk behind a path; `None` if there is none to be found: memory, a network, an overlay.
pub fn disk_behind(path: &Path) -> Result<Option<Disk>> {
    Ok(number_behind(path)?.and_then(|number| Places::system().disk(number)))
}

/// Whether what is written there goes to a disk that is carried away.
pub fn sink_is_removable(path: &Path) -> Result<bool> {
    Ok(disk_behind(path)?.is_some_and(|disk| disk.removable))
}

/// Refuses to write over what `path` names unless it is a disk that is made for it: a whole block
/// device, removable or else `forced`. That nobody uses it is found out when it is opened.
pub fn check_raw_sink(path: &Path, forced: bool) -> Result<Disk> {
    let found =
        fs::metadata(path).map_err(|source| Error::device("open", &source).at_path(path))?;
    if !found.file_type().is_block_device() {
        return Err(Error::usage(
            "expected a block device to write a bundle straight onto, found something else: name a \
             directory, or a device",
        )
        .at_path(path));
    }
    let disk =
        disk_behind(path)?.unwrap_or_else(|| Disk { device: path.into(), ..Disk::default() });
    if !disk.removable && !forced {
        return Err(Error::usage(format!(
            "expected a removable disk, found {disk}, which is none: all that is on it would be \
             lost; --force says that this is meant"
        ))
        .at_path(path));
    }
    Ok(disk)
}

/// The block device that holds `path`, or the nearest directory above it that exists.
fn number_behind(path: &Path) -> Result<Option<Number>> {
    let mut place = path;
    let found = loop {
        match fs::metadata(place) {
            Ok(found) => break found,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {
                let above =
                    place.parent().ok_or_else(|| Error::device("open", &source).at_path(path))?;
                place = if above.as_os_str().is_empty() { Path::new(".") } else { above };
            }
            Err(source) => return Err(Error::device("open", &source).at_path(place)),
        }
    };
    if found.file_type().is_block_device() {
        return Ok(Some((major(found.rdev()), minor(found.rdev()))));
    }
    let number = (major(found.dev()), minor(found.dev()));
    // Some file systems have a number of their own and name the device only by path.
    Ok(if number.0 == 0 { source_of(number) } else { Some(number) })
}

/// Where to look.
struct Places {
    sysfs: PathBuf,
    udev: PathBuf,
}

impl Places {
    fn system() -> Self {
        Self { sysfs: SYSFS.into(), udev: UDEV.into() }
    }

    fn disk(&self, number: Number) -> Option<Disk> {
        let own = fs::canonicalize(self.sysfs.join(format!("{}:{}", number.0, number.1))).ok()?;
        let whole = if own.join("partition").exists() { own.parent()?.to_path_buf() } else { own };
        let beneath = self.beneath(&whole, STACKED_MAX);
        let shown = beneath.first()?;
        Some(Disk {
            device: Path::new("/dev").join(shown.file_name()?),
            model: self.model(shown),
            serial: self.serial(shown),
            size: text(&shown.join("size"))?.parse::<u64>().ok()?.checked_mul(SECTOR)?,
            removable: beneath.iter().any(|disk| is_removable(disk)),
        })
    }

    /// The disks that a device stands for: itself, or those that it is mapped to.
    fn beneath(&self, whole: &Path, depth: usize) -> Vec<PathBuf> {
        let slaves = fs::read_dir(whole.join("slaves")).into_iter().flatten().flatten();
        let mut disks = Vec::new();
        for slave in slaves.filter(|_| depth > 0) {
            let Ok(slave) = fs::canonicalize(slave.path()) else { continue };
            let partition = slave.join("partition").exists();
            let whole = if partition { slave.parent().map(Path::to_path_buf) } else { Some(slave) };
            disks.extend(whole.iter().flat_map(|whole| self.beneath(whole, depth - 1)));
        }
        if disks.is_empty() { vec![whole.to_path_buf()] } else { disks }
    }

    fn model(&self, disk: &Path) -> Option<String> {
        let vendor = text(&disk.join("device/vendor")).filter(|vendor| !vendor.starts_with("0x"));
        let model = text(&disk.join("device/model")).or_else(|| text(&disk.join("device/name")));
        match (vendor, model) {
            (Some(vendor), Some(model)) => Some(format!("{vendor} {model}")),
            (_, Some(model)) => Some(model),
            _ => text(&disk.join("loop/backing_file"))
                .map(|file| format!("loop device of {file}"))
                .or_else(|| self.udev_property(disk, "ID_MODEL")),
        }
    }

    fn serial(&self, disk: &Path) -> Option<String> {
        text(&disk.join("device/serial"))
            .or_else(|| text(&disk.join("serial")))
            .or_else(|| page_80(&disk.join("device/vpd_pg80")))
            .or_else(|| disk.ancestors().skip(1).find_map(usb_serial))
            .or_else(|| self.udev_property(disk, "ID_SERIAL_SHORT"))
    }

    fn udev_property(&self, disk: &Path, name: &str) -> Option<String> {
        let (major, minor) = read_number(disk)?;
        let told = fs::read_to_string(self.udev.join(format!("b{major}:{minor}"))).ok()?;
        let start = format!("E:{name}=");
        told.lines().find_map(|line| line.strip_prefix(&start)).map(str::to_owned)
    }
}

/// The trimmed text of a small file of the kernel; `None` if there is none or it is empty.
fn text(path: &Path) -> Option<String> {
    let told = fs::read_to_string(path).ok()?;
    let told = told.trim_matches(|c: char| c.is_whitespace() || c.is_control());
    (!told.is_empty()).then(|| told.to_owned())
}

/// The serial number of a SCSI disk: a page with a header of four bytes.
fn page_80(path: &Path) -> Option<String> {
    let page = fs::read(path).ok()?;
    let told =
        String::from_utf8_lossy(page.get(4..)?).trim_matches(char::from(0)).trim().to_owned();
    (!told.is_empty()).then_some(told)
}

/// The serial number of the USB device at a place of the device tree, if one is there.
fn usb_serial(place: &Path) -> Option<String> {
    place.join("idVendor").exists().then(|| text(&place.join("serial"))).flatten()
}

fn is_removable(disk: &Path) -> bool {
    let on_bus = disk.components().any(|part| {
        let name = part.as_os_str().to_string_lossy();
        let usb = name.strip_prefix("usb").is_some_and(|rest| rest.parse::<u32>().is_ok());
        usb || name == "mmc_host"
    });
    on_bus || text(&disk.join("removable")).as_deref() == Some("1")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::error::ErrorKind;

    /// A device tree with a disk on USB and its partition, one on SATA, and a mapped device on the
    /// partition.
    fn places() -> (tempfile::TempDir, Places) {
        let root = tempfile::tempdir().expect("a temporary directory");
        let sysfs = root.path().join("dev");
        let udev = root.path().join("udev");
        let stick = root.path().join("devices/usb2/2-1/host6/block/sdb");
        let sata = root.path().join("devices/ata1/host0/block/sda");
        let mapped = root.path().join("devices/virtual/block/dm-0");
        for directory in [
            &sysfs,
            &udev,
            &stick.join("sdb1"),
            &stick.join("device"),
            &sata.join("device"),
            &mapped.join("slaves"),
        ] {
            fs::create_dir_all(directory).expect("made");
        }
        for (file, bytes) in [
            (stick.join("size"), "2048\n"),
            (stick.join("dev"), "8:16\n"),
            (stick.join("removable"), "0\n"),
            (stick.join("sdb1/partition"), "1\n"),
            (stick.join("device/vendor"), "ACME    \n"),
            (stick.join("device/model"), "Stick 3000      \n"),
            (root.path().join("devices/usb2/2-1/idVendor"), "1234\n"),
            (root.path().join("devices/usb2/2-1/serial"), "S123\n"),
            (sata.join("size"), "4096\n"),
            (sata.join("dev"), "8:0\n"),
            (sata.join("removable"), "0\n"),
            (mapped.join("size"), "2000\n"),
            (udev.join("b8:0"), "S:disk/by-id/x\nE:ID_MODEL=Disk_9\nE:ID_SERIAL_SHORT=Z9\n"),
        ] {
            fs::write(file, bytes).expect("written");
        }
        symlink(stick.join("sdb1"), mapped.join("slaves/sdb1")).expect("linked");
        for (number, place) in
            [("8:16", &stick), ("8:17", &stick.join("sdb1")), ("8:0", &sata), ("253:0", &mapped)]
        {
            symlink(place, sysfs.join(number)).expect("linked");
        }
        (root, Places { sysfs, udev })
    }

    #[test]
    fn a_disk_on_usb_is_removable_and_so_is_what_lies_on_it() {
        let (_root, places) = places();
        let expected = Disk {
            device: "/dev/sdb".into(),
            model: Some("ACME Stick 3000".into()),
            serial: Some("S123".into()),
            size: 1 << 20,
            removable: true,
        };
        for number in [(8, 16), (8, 17), (253, 0)] {
            assert_eq!(places.disk(number).as_ref(), Some(&expected), "{number:?}");
        }
    }

    #[test]
    fn a_built_in_disk_is_not_and_udev_knows_its_name() {
        let (_root, places) = places();
        let disk = places.disk((8, 0)).expect("there");
        assert_eq!((disk.removable, disk.size), (false, 2 << 20));
        assert_eq!(disk.to_string(), "/dev/sda (Disk_9, serial Z9, 2097152 bytes)");
        assert_eq!(places.disk((9, 9)), None);
    }

    #[test]
    fn what_is_no_block_device_is_no_raw_sink() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let file = place.path().join("file");
        fs::write(&file, "x").expect("written");
        for path in [place.path(), &file] {
            let refused = check_raw_sink(path, true).expect_err("no device");
            assert_eq!(refused.kind(), ErrorKind::Usage);
        }
        assert!(check_raw_sink(&place.path().join("none"), true).is_err());
    }

    #[test]
    fn a_path_that_does_not_exist_yet_lies_where_its_directory_does() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let new = place.path().join("a/b/c");
        assert_eq!(
            number_behind(&new).expect("found"),
            number_behind(place.path()).expect("found")
        );
        disk_behind(&new).expect("looked for");
    }
}
