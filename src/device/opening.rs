//! Opening a file or block device: what is refused, and with which words.
//!
//! Guarantees: nothing is changed by a refusal.
//! Does not know: requests.

#![expect(clippy::disallowed_methods, reason = "the one door to files")]

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::units::SECTOR_BYTES;

/// How to open a file or block device. The default: buffered, writable, existing, unlocked.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Bypass the page cache.
    pub direct: bool,
    pub read_only: bool,
    /// Make a missing file, sparse, of this many bytes; what exists must have at least as many.
    pub create_size: Option<u64>,
    /// Hold an advisory lock (shared if `read_only`) for the life of the device.
    pub lock: bool,
}

pub(super) fn failed(operation: &'static str) -> impl Fn(Errno) -> Error {
    move |error| Error::device(operation, &error.into())
}

pub(super) fn missing() -> Error {
    Error::new(ErrorKind::Device, "no such file or device: check the path")
        .with_errno(Errno::NOENT.raw_os_error())
}

pub(super) fn wrong_type(found: &fs::Metadata) -> Error {
    let (what, errno) = if found.is_dir() {
        ("a directory", Errno::ISDIR)
    } else if found.file_type().is_char_device() {
        ("a character device", Errno::NOTBLK)
    } else {
        ("a pipe or socket", Errno::NOTBLK)
    };
    Error::usage(format!("expected a regular file or a block device, found {what}"))
        .with_errno(errno.raw_os_error())
}

pub(super) fn check_size(size: u64) -> Result<()> {
    if size > 0 && size.is_multiple_of(SECTOR_BYTES) && size <= crate::limits::VOLUME_BYTES_MAX {
        return Ok(());
    }
    Err(Error::usage(format!(
        "expected a size that is a positive multiple of {SECTOR_BYTES} bytes, found {size}"
    )))
}

pub(super) fn open_file(
    path: &Path,
    options: OpenOptions,
    exclusive: bool,
    create: bool,
) -> Result<File> {
    let mut flags = OFlags::CLOEXEC;
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    if exclusive && (options.lock || !options.read_only) {
        // On a block device: fails when the kernel itself uses it (mount, RAID, swap).
        flags |= OFlags::EXCL;
    }
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .create_new(create)
        .mode(0o600)
        .custom_flags(flags.bits() as i32)
        .open(path);
    opened.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::BUSY) => Error::busy(
            "the device is in use by the system (mounted, part of a RAID or volume group, or \
             swap): release it first",
        )
        .with_errno(Errno::BUSY.raw_os_error()),
        Some(Errno::INVAL) if options.direct => {
            Error::usage("its file system has no direct I/O: open it buffered")
                .with_errno(Errno::INVAL.raw_os_error())
        }
        _ => Error::device(if create { "create" } else { "open" }, &error),
    })
}

/// Whether a file may gain by `O_DIRECT`: not where its pages are its only home.
pub(super) fn suits_direct(file: &File) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    // The field is signed on some platforms and 32 bits wide on others.
    let kind = rustix::fs::fstatfs(file).map(|found| found.f_type as u64 & 0xffff_ffff);
    kind.is_ok_and(|kind| kind != TMPFS && kind != RAMFS)
}

pub(super) fn lock(file: &File, shared: bool) -> Result<()> {
    let operation = match shared {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    rustix::fs::flock(file, operation).map_err(|error| match error {
        Errno::WOULDBLOCK => {
            Error::busy("in use by another process of ours: stop it first, or choose another file")
                .with_errno(Errno::BUSY.raw_os_error())
        }
        error => Error::device("lock", &error.into()),
    })
}

pub(super) fn flush_directory_of(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    super::directory::flush_directory(parent.unwrap_or(Path::new(".")))
}
