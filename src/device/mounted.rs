//! What the kernel says of a block device before it is opened: whether the device, a partition of
//! it or its disk is mounted, and whether it takes writes.
//!
//! Guarantees: a device that `/proc/self/mountinfo` names, by number or by source path, is found.
//! Does not know: mounts in other namespaces (the exclusive open in `file.rs` finds those).

#![expect(clippy::disallowed_methods, reason = "the kernel tells of mounts through files")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};

use crate::error::{Error, ErrorKind, Result};

const EBUSY: i32 = 16;
const EROFS: i32 = 30;

/// A block device's major and minor number.
pub(super) type Number = (u32, u32);

/// Refuses the block device `number` when it or a relative of it is mounted.
pub(super) fn refuse_if_mounted(path: &Path, number: u64) -> Result<()> {
    let number = (major(number), minor(number));
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| Error::device("read the list of mounts", &error))?;
    match mounted_at(&table, &relatives(Path::new("/sys/dev/block"), number), source_number) {
        None => Ok(()),
        Some(place) => Err(Error::new(
            ErrorKind::Busy,
            format!(
                "the device, a partition of it or its disk is mounted at {place}: \
                 unmount it first, or choose another device"
            ),
        )
        .with_errno(EBUSY)
        .at_path(path)),
    }
}

/// Refuses the block device `number` when it is read-only: root can open it for writing all the
/// same, and only the first write would fail.
pub(super) fn refuse_if_read_only(path: &Path, number: u64) -> Result<()> {
    let number = (major(number), minor(number));
    if !is_read_only(Path::new("/sys/dev/block"), number) {
        return Ok(());
    }
    let words = "the device is read-only: make it writable, or choose another device";
    Err(Error::new(ErrorKind::Device, words).with_errno(EROFS).at_path(path))
}

fn is_read_only(sysfs: &Path, number: Number) -> bool {
    let state = sysfs.join(format!("{}:{}/ro", number.0, number.1));
    fs::read_to_string(state).is_ok_and(|text| text.trim() == "1")
}

/// The device, its partitions, and the disk it is a partition of.
fn relatives(sysfs: &Path, number: Number) -> Vec<Number> {
    let mut all = vec![number];
    let Ok(own) = fs::canonicalize(sysfs.join(format!("{}:{}", number.0, number.1))) else {
        return all;
    };
    for entry in fs::read_dir(&own).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            all.extend(read_number(&entry.path()));
        }
    }
    if own.join("partition").exists() {
        all.extend(own.parent().and_then(read_number));
    }
    all
}

pub(super) fn read_number(directory: &Path) -> Option<Number> {
    parse_number(fs::read_to_string(directory.join("dev")).ok()?.trim())
}

fn parse_number(text: &str) -> Option<Number> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The number of the block device at `source`; file systems such as btrfs mount under a number of
/// their own and name the device only by path.
fn source_number(source: &str) -> Option<Number> {
    let found = fs::metadata(source).ok().filter(|_| source.starts_with('/'))?;
    Some((major(found.rdev()), minor(found.rdev()))).filter(|number| *number != (0, 0))
}

/// The block device of a mounted file system that has a number of its own.
pub(super) fn source_of(number: Number) -> Option<Number> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    table.lines().find_map(|line| {
        let (place, source) = line.split_once(" - ")?;
        let own = parse_number(place.split(' ').nth(2)?)?;
        (own == number).then(|| source_number(source.split(' ').nth(1)?)).flatten()
    })
}

fn mounted_at(
    table: &str,
    devices: &[Number],
    source_number: impl Fn(&str) -> Option<Number>,
) -> Option<String> {
    table.lines().find_map(|line| {
        let (place, source) = line.split_once(" - ")?;
        let mut fields = place.split(' ');
        let number = parse_number(fields.nth(2)?)?;
        let point = fields.nth(1)?;
        let source = source.split(' ').nth(1)?;
        let hit = devices.contains(&number)
            || source_number(source).is_some_and(|number| devices.contains(&number));
        hit.then(|| point.replace("\\040", " "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 28 0:20 / /proc rw,nosuid - proc proc rw
29 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 29 0:45 /@ /srv/my\\040pool rw - btrfs /dev/sdc rw
";

    fn by_path(source: &str) -> Option<Number> {
        (source == "/dev/sdc").then_some((8, 32))
    }

    #[test]
    fn a_device_is_found_by_its_number_or_by_the_path_of_its_source() {
        assert_eq!(mounted_at(TABLE, &[(8, 1)], by_path).as_deref(), Some("/"));
        assert_eq!(mounted_at(TABLE, &[(8, 32)], by_path).as_deref(), Some("/srv/my pool"));
        assert_eq!(mounted_at(TABLE, &[(8, 16)], by_path), None);
    }

    #[test]
    fn a_read_only_device_is_told_from_a_writable_and_an_unknown_one() {
        let sysfs = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in [("7:0", "1\n"), ("7:1", "0\n")] {
            fs::create_dir(sysfs.path().join(name)).expect("made");
            fs::write(sysfs.path().join(name).join("ro"), text).expect("written");
        }
        assert!(is_read_only(sysfs.path(), (7, 0)));
        assert!(!is_read_only(sysfs.path(), (7, 1)) && !is_read_only(sysfs.path(), (7, 2)));
    }

    #[test]
    fn a_disk_is_related_to_its_partitions_and_each_partition_to_its_disk() {
        let sysfs = tempfile::tempdir().expect("a temporary directory");
        let disk = sysfs.path().join("8:0");
        fs::create_dir_all(disk.join("sda1")).expect("made");
        fs::write(disk.join("dev"), "8:0\n").expect("written");
        fs::write(disk.join("sda1/dev"), "8:1\n").expect("written");
        fs::write(disk.join("sda1/partition"), "1\n").expect("written");
        std::os::unix::fs::symlink(disk.join("sda1"), sysfs.path().join("8:1")).expect("linked");
        assert_eq!(relatives(sysfs.path(), (8, 0)), [(8, 0), (8, 1)]);
        assert_eq!(relatives(sysfs.path(), (8, 1)), [(8, 1), (8, 0)]);
    }
}
