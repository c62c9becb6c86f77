//! Real block devices: loop devices, which only root may attach and mount.
//!
//! `tests/run --without-root` leaves out the tests whose names begin with `as_root`.

#![expect(clippy::disallowed_methods, reason = "disks are attached by programs")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Device, FileDevice, OpenOptions};
use crate::error::ErrorKind;

const SIZE: u64 = 64 << 20;

fn home() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("started");
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed; these tests need root and loop devices: {output:?}"
    );
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

/// A loop device, detached at the end.
struct Loop {
    _home: tempfile::TempDir,
    path: PathBuf,
}

impl Loop {
    fn new(sector: &str) -> Self {
        let home = home();
        let backing = home.path().join("backing");
        File::create(&backing).and_then(|file| file.set_len(SIZE)).expect("made");
        let backing = backing.to_str().expect("plain");
        let path = run("losetup", &["-f", "--show", "-b", sector, backing]).into();
        Self { _home: home, path }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["-d", self.path.to_str().expect("plain")]);
    }
}

fn open(path: &Path, options: OpenOptions) -> Result<FileDevice, ErrorKind> {
    FileDevice::open(path, options).map_err(|error| error.kind())
}

#[test]
fn as_root_block_devices_of_both_sector_sizes_read_back() {
    for sector in ["512", "4096"] {
        let disk = Loop::new(sector);
        for direct in [false, true] {
            let options = OpenOptions { direct, lock: true, ..OpenOptions::default() };
            let device = open(&disk.path, options).expect("opened");
            assert_eq!(device.sector_size().to_string(), sector);
            assert_eq!(device.size(), SIZE);
            device.write_at(0, &[7; 16384]).expect("written");
            device.zero_at(4096, 4096).expect("zeroed");
            device.flush().expect("flushed");
            let mut bytes = vec![9; 16385];
            device.read_at(0, &mut bytes[1..]).expect("read");
            assert_eq!(bytes[1..], [[7; 4096], [0; 4096], [7; 4096], [7; 4096]].concat());
            assert_eq!(open(&disk.path, options).err(), Some(ErrorKind::Busy), "open already");
        }
    }
}

#[test]
fn as_root_a_mounted_block_device_is_refused_and_the_error_names_the_mount() {
    let (disk, point) = (Loop::new("512"), home());
    let path = disk.path.to_str().expect("plain");
    let point = point.path().to_str().expect("plain");
    run("mkfs.ext4", &["-q", "-F", path]);
    run("mount", &[path, point]);
    let refused = FileDevice::open(path, OpenOptions::default());
    run("umount", &[point]);
    let refused = refused.expect_err("mounted");
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains(point), "{refused}");
}
