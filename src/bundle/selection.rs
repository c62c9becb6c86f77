//! What a bundle is to include, and the pieces in which it is read.
//!
//! Guarantees: pieces ascend, cover the selection exactly and are whole blocks; a piece with bytes
//! lies in one cell of the chunk grid, so that chunks of two bundles of one volume line up.
//! Does not know: how pieces are read or stored.

use crate::bundle::source::Source;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::{BUNDLE_CHUNK_BYTES_MAX, BUNDLE_SELECTION_RUNS_MAX, BUNDLE_ZERO_GRAIN_BYTES};
use crate::units::Geometry;

/// Ascending, disjoint, not adjacent, whole blocks; nothing given means everything.
pub fn normalised(selection: &[ByteRange], geometry: Geometry) -> Result<Vec<ByteRange>> {
    if selection.is_empty() {
        return Ok(vec![geometry.all_bytes()]);
    }
    let block = geometry.block_size().bytes();
    let mut sorted = selection.to_vec();
    sorted.sort_unstable();
    let mut runs: Vec<ByteRange> = Vec::with_capacity(sorted.len());
    for range in sorted {
        if range.is_empty() || !geometry.contains(range) {
            return Err(Error::usage(format!(
                "expected a range of bytes inside the volume of {} bytes, found {} bytes at {}",
                geometry.size(),
                range.length,
                range.offset
            )));
        }
        let end = range.end();
        let whole = range.offset.is_multiple_of(block)
            && (end.is_multiple_of(block) || end == geometry.size());
        if !whole {
            return Err(Error::usage(format!(
                "expected a range of whole blocks of {block} bytes, found {}-{end}",
                range.offset
            )));
        }
        match runs.last_mut() {
            Some(last) if range.offset <= last.end() => {
                last.length = last.end().max(end) - last.offset;
            }
            _ => runs.push(range),
        }
    }
    if runs.len() > BUNDLE_SELECTION_RUNS_MAX {
        return Err(Error::usage(format!(
            "expected at most {BUNDLE_SELECTION_RUNS_MAX} separate ranges, found {}",
            runs.len()
        )));
    }
    Ok(runs)
}

/// The unit in which zeros are told from bytes.
#[must_use]
pub fn zero_grain(geometry: Geometry) -> u64 {
    BUNDLE_ZERO_GRAIN_BYTES.max(geometry.block_size().bytes())
}

/// A piece of the selection: a run that the source knows to be zero, or bytes to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub range: ByteRange,
    pub zero: bool,
}

/// All pieces of a selection, ascending.
pub struct Stretches<'a> {
    source: &'a dyn Source,
    geometry: Geometry,
    selection: std::vec::IntoIter<ByteRange>,
    rest: ByteRange,
    /// The latest answer of the source: where it may hold bytes next, in whole grains.
    data: Option<ByteRange>,
}

impl<'a> Stretches<'a> {
    #[must_use]
    pub fn new(source: &'a dyn Source, selection: Vec<ByteRange>) -> Self {
        Self {
            source,
            geometry: source.identity().geometry,
            selection: selection.into_iter(),
            rest: ByteRange::default(),
            data: Some(ByteRange::default()),
        }
    }

    /// Asks the source again if its last answer lies behind.
    fn look_ahead(&mut self) -> Result<()> {
        let at = self.rest.offset;
        if self.data.is_some_and(|data| data.end() <= at) {
            let grain = zero_grain(self.geometry);
            self.data = self.source.next_data(at)?.map(|found| {
                let start = found.offset / grain * grain;
                let end = found.end().next_multiple_of(grain).min(self.geometry.size());
                ByteRange::new(start, end - start)
            });
        }
        Ok(())
    }

    fn take(&mut self, length: u64, zero: bool) -> Stretch {
        let range = ByteRange::new(self.rest.offset, length.min(self.rest.length));
        self.rest = ByteRange::new(range.end(), self.rest.length - range.length);
        Stretch { range, zero }
    }
}

impl Iterator for Stretches<'_> {
    type Item = Result<Stretch>;

    fn next(&mut self) -> Option<Result<Stretch>> {
        if self.rest.is_empty() {
            self.rest = self.selection.next()?;
        }
        if let Err(error) = self.look_ahead() {
            self.rest = ByteRange::default();
            self.selection = Vec::new().into_iter();
            return Some(Err(error));
        }
        let at = self.rest.offset;
        Some(Ok(match self.data {
            None => self.take(u64::MAX, true),
            Some(data) if data.offset > at => self.take(data.offset - at, true),
            Some(data) => {
                let cell_end = (at / BUNDLE_CHUNK_BYTES_MAX + 1) * BUNDLE_CHUNK_BYTES_MAX;
                self.take(cell_end.min(data.end()) - at, false)
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bundle::source::ImageSource;
    use crate::device::RamDevice;
    use crate::units::BlockSize;

    const GRAIN: u64 = BUNDLE_ZERO_GRAIN_BYTES;

    #[test]
    fn a_selection_is_sorted_joined_and_checked() {
        let geometry = Geometry::new(40_960 + 512, BlockSize::DEFAULT).expect("valid");
        let normal = |runs: &[(u64, u64)]| {
            let ranges: Vec<_> =
                runs.iter().map(|&(start, end)| ByteRange::new(start, end - start)).collect();
            normalised(&ranges, geometry)
        };
        assert_eq!(normal(&[]).expect("all"), [ByteRange::new(0, 41_472)]);
        let joined = normal(&[(8192, 12_288), (0, 4096), (4096, 8192), (40_960, 41_472)]);
        assert_eq!(
            joined.expect("valid"),
            [ByteRange::new(0, 12_288), ByteRange::new(40_960, 512)]
        );
        for bad in [(0, 0), (0, 512), (512, 4096), (40_960, 45_056)] {
            assert!(normal(&[bad]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pieces_cover_the_selection_and_know_the_holes() {
        let mut bytes = vec![0; (4 << 20) + 512];
        bytes[(1 << 20) + 70_000] = 1;
        bytes[4 << 20] = 1;
        let size = bytes.len() as u64;
        let device = Arc::new(RamDevice::from_bytes(bytes));
        let source = ImageSource::new(device, BlockSize::DEFAULT).expect("an image");
        let selection = vec![
            ByteRange::new(8192, (1 << 20) + 65_536),
            ByteRange::new(3 << 20, size - (3 << 20)),
        ];
        let pieces: Vec<Stretch> =
            Stretches::new(&source, selection).map(|piece| piece.expect("no error")).collect();
        let zero = |start: u64, end: u64| Stretch {
            range: ByteRange::new(start, end - start),
            zero: true,
        };
        let bytes_at = |start: u64, end: u64| Stretch { zero: false, ..zero(start, end) };
        assert_eq!(
            pieces,
            [
                zero(8192, (1 << 20) + GRAIN),
                bytes_at((1 << 20) + GRAIN, (1 << 20) + GRAIN + 8192),
                zero(3 << 20, 4 << 20),
                bytes_at(4 << 20, size),
            ]
        );
    }
}
