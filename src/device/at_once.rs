//! Reads that the page cache answers, told apart from those that would wait for a disk.
//!
//! Guarantees: a file system that cannot tell is asked once.
//! Does not know: ranges that are allowed, how else to read.

use std::fs::File;
use std::io::IoSliceMut;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// What became of a read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AtOnce {
    Read,
    WouldWait,
    /// Memory, or a file system that cannot tell: a read usually returns at once.
    Untold,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct CacheReads {
    untold: AtomicBool,
}

impl CacheReads {
    pub(super) fn read(&self, file: &File, offset: u64, buffer: &mut [u8]) -> AtOnce {
        if self.untold.load(Ordering::Relaxed) {
            return AtOnce::Untold;
        }
        let length = buffer.len();
        let mut whole = [IoSliceMut::new(buffer)];
        match preadv2(file, &mut whole, offset, ReadWriteFlags::NOWAIT) {
            Ok(count) if count == length => AtOnce::Read,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => AtOnce::WouldWait,
            Err(_) => {
                self.untold.store(true, Ordering::Relaxed);
                AtOnce::Untold
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_just_written_is_read_at_once_or_nobody_can_tell() {
        for place in ["/var/tmp", "/dev/shm"] {
            let mut file = tempfile::tempfile_in(place).expect("a temporary file");
            file.write_all(&[7; 8192]).expect("written");
            let (reads, mut bytes) = (CacheReads::default(), [0; 4096]);
            match reads.read(&file, 4096, &mut bytes) {
                AtOnce::Read => assert_eq!(bytes, [7; 4096]),
                AtOnce::Untold => assert_eq!(reads.read(&file, 0, &mut bytes), AtOnce::Untold),
                AtOnce::WouldWait => panic!("it lies in the page cache"),
            }
        }
    }

    #[test]
    fn a_read_over_the_end_is_left_to_whoever_has_words_for_it() {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&[7; 4096]).expect("written");
        let found = CacheReads::default().read(&file, 0, &mut [0; 8192]);
        assert_ne!(found, AtOnce::Read);
    }
}
