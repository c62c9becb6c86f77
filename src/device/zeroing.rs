//! Zeros that a file system or a disk makes by itself, without being sent them.
//!
//! | way | on a file | on a block device |
//! |---|---|---|
//! | a hole | gives space back | the disk's own zeroing, or refused |
//! | a zeroed range | keeps space, writes nothing | perhaps a write of zeros by the kernel |
//!
//! Guarantees: a way that was refused once is not tried again; zeroing is called fast only where
//! it was seen to be.
//! Does not know: ranges that are allowed, how zeros are written otherwise.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Where to look whether there can be holes: behind the end, in whole units of any file system.
const PROBE_BYTES: u64 = 1 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Zeroing {
    /// The first of `WAYS` that was not refused so far, and whether it was ever taken.
    way: AtomicU8,
    taken: AtomicBool,
    block_device: bool,
}

/// Best first. Both also work on block devices (since Linux 4.9).
const WAYS: [FallocateFlags; 2] = [
    FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE),
    FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE),
];

impl Zeroing {
    pub(super) fn new(block_device: bool) -> Self {
        Self { way: AtomicU8::new(0), taken: AtomicBool::new(false), block_device }
    }

    /// Whether it was done; `false` if there is no way to but writing.
    pub(super) fn zero(&self, file: &File, offset: u64, length: u64) -> Result<bool, Errno> {
        let mut way = self.way.load(Ordering::Relaxed);
        while let Some(flags) = WAYS.get(usize::from(way)) {
            match rustix::fs::fallocate(file, *flags, offset, length) {
                Ok(()) => {
                    self.taken.store(true, Ordering::Relaxed);
                    return Ok(true);
                }
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => {
                    way += 1;
                    self.taken.store(false, Ordering::Relaxed);
                    self.way.store(way, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Whether a zeroing now would write nothing. `size` is that of the file, and writable.
    pub(super) fn is_fast(&self, file: &File, size: u64) -> bool {
        let way = self.way.load(Ordering::Relaxed);
        if !self.taken.load(Ordering::Relaxed) && !self.block_device && way == 0 {
            // A hole behind the end changes nothing.
            let behind = size.next_multiple_of(PROBE_BYTES);
            let punched = rustix::fs::fallocate(file, WAYS[0], behind, PROBE_BYTES).is_ok();
            self.taken.store(punched, Ordering::Relaxed);
        }
        self.taken.load(Ordering::Relaxed) && (way == 0 || (way == 1 && !self.block_device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(size).expect("set");
        file
    }

    #[test]
    fn zeroing_of_a_file_with_holes_is_fast_and_asking_changes_nothing() {
        let file = file(5000);
        let zeroing = Zeroing::new(false);
        assert!(zeroing.is_fast(&file, 5000));
        let found = file.metadata().expect("there");
        assert_eq!(found.len(), 5000);
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&found), 0);
    }

    #[test]
    fn zeroing_of_a_block_device_is_fast_once_it_made_a_hole() {
        let (file, zeroing) = (file(8192), Zeroing::new(true));
        assert!(!zeroing.is_fast(&file, 8192), "nothing is known");
        assert!(zeroing.zero(&file, 0, 4096).expect("done"));
        assert!(zeroing.is_fast(&file, 8192));
    }

    #[test]
    fn what_makes_no_zeros_is_never_fast() {
        // A pipe has neither holes nor zeroed ranges.
        let (_reader, writer) = std::io::pipe().expect("a pipe");
        let pipe = File::from(std::os::fd::OwnedFd::from(writer));
        let zeroing = Zeroing::new(false);
        assert!(!zeroing.is_fast(&pipe, 4096));
        assert!(zeroing.zero(&pipe, 0, 4096).is_err(), "ESPIPE is none of the refusals");
    }
}
