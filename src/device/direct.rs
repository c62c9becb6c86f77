//! What direct I/O must be aligned to, and how an unaligned request is cut into aligned pieces.
//!
//! Guarantees: the pieces of a request lie side by side and cover it; the whole direct I/O sectors
//! around each are at most `BOUNCE_BYTES` (one sector if that is more).
//! Does not know: buffers, locks.

use std::fs::File;
use std::ops::Range;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::extent::ByteRange;

/// Bytes that pass through an aligned copy at a time.
pub(super) const BOUNCE_BYTES: u64 = 1 << 20;
/// What direct I/O is aligned to where the kernel does not say.
const ALIGNMENT_DEFAULT: u64 = 4096;

#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    pub(super) memory: usize,
    pub(super) offset: u64,
}

/// A stretch of a request and the whole direct I/O sectors around it.
pub(super) struct Piece {
    pub(super) inner: ByteRange,
    pub(super) outer: ByteRange,
}

impl Piece {
    /// The inner bytes as indices into something that begins at `origin`.
    pub(super) fn inner_from(&self, origin: u64) -> Range<usize> {
        (self.inner.offset - origin) as usize..(self.inner.end() - origin) as usize
    }
}

impl Alignment {
    pub(super) fn fits_offset(self, offset: u64, length: u64) -> bool {
        offset.is_multiple_of(self.offset) && length.is_multiple_of(self.offset)
    }

    pub(super) fn fits(self, offset: u64, memory: &[u8]) -> bool {
        self.fits_offset(offset, memory.len() as u64)
            && memory.as_ptr().addr().is_multiple_of(self.memory)
    }

    pub(super) fn pieces(self, offset: u64, length: u64) -> impl Iterator<Item = Piece> {
        let request = ByteRange::new(offset, length);
        let start = offset - offset % self.offset;
        let end = request.end().next_multiple_of(self.offset);
        let step = BOUNCE_BYTES.max(self.offset);
        (start..end).step_by(step as usize).filter_map(move |at| {
            let outer = ByteRange::new(at, step.min(end - at));
            request.intersect(outer).map(|inner| Piece { inner, outer })
        })
    }
}

/// What the kernel says direct I/O must be aligned to.
pub(super) fn direct_alignment(file: &File, sector: Option<u32>) -> Result<Alignment> {
    let default = Alignment {
        memory: ALIGNMENT_DEFAULT as usize,
        offset: sector.map_or(ALIGNMENT_DEFAULT, u64::from),
    };
    let asked = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let Ok(told) = asked else { return Ok(default) };
    if told.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(default);
    }
    let (memory, offset) = (told.stx_dio_mem_align, told.stx_dio_offset_align);
    if memory == 0 || offset == 0 {
        return Err(Error::usage("it has no direct I/O: open it buffered")
            .with_errno(Errno::INVAL.raw_os_error()));
    }
    Ok(Alignment { memory: memory as usize, offset: u64::from(offset) })
}
