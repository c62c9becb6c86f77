//! Maximal runs of equal bits, ascending.

use super::paged::Bitmap;
use crate::extent::BlockRange;

/// Iterator over the maximal runs of bits equal to `value` within a range. Sees changes made
/// meanwhile at positions it has not reached.
#[derive(Debug)]
pub struct Runs<'a> {
    bitmap: &'a Bitmap,
    rest: BlockRange,
    value: bool,
}

impl<'a> Runs<'a> {
    #[inline]
    pub(super) fn new(bitmap: &'a Bitmap, range: BlockRange, value: bool) -> Self {
        Self { bitmap, rest: range, value }
    }
}

impl Iterator for Runs<'_> {
    type Item = BlockRange;

    #[inline]
    fn next(&mut self) -> Option<BlockRange> {
        let start = self.bitmap.next(self.rest, self.value)?;
        let after = BlockRange::new(start + 1, self.rest.end);
        let end = self.bitmap.next(after, !self.value).unwrap_or(self.rest.end);
        self.rest.start = end;
        Some(BlockRange::new(start, end))
    }
}
