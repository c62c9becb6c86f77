//! An image as the source of a merge. It has no checksums: what it holds is taken as it is, so that
//! whoever brings it from elsewhere answers for the way (TLS, a local socket).
//!
//! | image | whose it is | includes |
//! |---|---|---|
//! | plain | nobody knows | everything |
//! | of a snapshot, as its server says | a volume at a cut | what the snapshot selects |

use std::sync::Arc;

use crate::bundle::{Content, Identity, ImageSource, Piece, PieceSource, Source};
use crate::device::{Device, Engine};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::frames::CutName;
use crate::limits::{BUNDLE_CHUNK_BYTES_MAX, BUNDLE_ZERO_GRAIN_BYTES};
use crate::units::BlockSize;

/// See the module.
#[derive(Debug)]
pub struct ImagePieces {
    device: Arc<dyn Device>,
    name: String,
    identity: Identity,
    cut: Option<CutName>,
    /// Ascending, disjoint: the rest is absent, not zero (law 8).
    included: Vec<ByteRange>,
}

impl ImagePieces {
    /// An image of a whole volume.
    pub fn new(device: Arc<dyn Device>) -> Result<Self> {
        let identity = ImageSource::new(Arc::clone(&device), BlockSize::DEFAULT)?.identity();
        let included = vec![identity.geometry.all_bytes()];
        Ok(Self { device, name: "plain image".into(), identity, cut: None, included })
    }

    /// A snapshot that says whose it is, and what of the volume it includes.
    pub fn of_snapshot(
        device: Arc<dyn Device>,
        identity: Identity,
        cut: CutName,
        included: Vec<ByteRange>,
    ) -> Result<Self> {
        let size = identity.geometry.size();
        let mut end = 0;
        for range in &included {
            let inside = range.offset.checked_add(range.length).is_some_and(|end| end <= size);
            if range.offset < end || range.is_empty() || !inside || device.size() != size {
                return Err(Error::format(format!(
                    "expected a snapshot of {size} bytes with ranges of it in order, found {} \
                     bytes, and {} bytes at {}",
                    device.size(),
                    range.length,
                    range.offset
                )));
            }
            end = range.end();
        }
        let name = format!("snapshot {}", cut.snapshot);
        Ok(Self { device, name, identity, cut: Some(cut), included })
    }

    /// With the place that it comes from, for messages.
    #[must_use]
    pub fn at(self, place: &str) -> Self {
        Self { name: format!("{} at {place}", self.name), ..self }
    }

    /// The next piece at or after `at`, at most to `limit`; `data` is the device's latest answer.
    fn next(&self, at: u64, limit: u64, data: &mut Option<ByteRange>) -> Result<Piece> {
        if data.is_some_and(|data| data.end() <= at) {
            // In whole grains, so that pieces suit devices of any sector size and most block sizes.
            *data = self.device.next_data(at)?.map(|found| {
                let start = found.offset / BUNDLE_ZERO_GRAIN_BYTES * BUNDLE_ZERO_GRAIN_BYTES;
                let end = found.end().next_multiple_of(BUNDLE_ZERO_GRAIN_BYTES);
                ByteRange::new(start, end - start)
            });
        }
        let (end, content) = match *data {
            None => (limit, Content::Zero),
            Some(data) if data.offset > at => (data.offset, Content::Zero),
            Some(data) => {
                let cell_end = (at / BUNDLE_CHUNK_BYTES_MAX + 1) * BUNDLE_CHUNK_BYTES_MAX;
                (data.end().min(cell_end), Content::Plain(Arc::clone(&self.device)))
            }
        };
        Ok(Piece { range: ByteRange::new(at, end.min(limit) - at), content })
    }
}

impl PieceSource for ImagePieces {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn cut_name(&self) -> Option<CutName> {
        self.cut
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn bytes_total(&self) -> u64 {
        self.included.iter().map(|range| range.length).sum()
    }

    fn answers_at_once(&self) -> bool {
        self.device.answers_at_once()
    }

    fn engine(&self) -> Option<Engine> {
        self.device.engine()
    }

    fn interrupt(&self) {
        self.device.interrupt();
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let mut ranges = self.included.iter();
        let mut rest = ByteRange::default();
        let mut data = Some(ByteRange::default());
        Box::new(std::iter::from_fn(move || {
            while rest.is_empty() {
                rest = *ranges.next()?;
            }
            let piece = self.next(rest.offset, rest.end(), &mut data);
            match &piece {
                Ok(piece) => {
                    rest = ByteRange::new(piece.range.end(), rest.end() - piece.range.end())
                }
                Err(_) => (rest, ranges) = (ByteRange::default(), [].iter()),
            }
            Some(piece)
        }))
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::device::RamDevice;
    use crate::units::Geometry;

    const MIB: u64 = 1 << 20;

    fn snapshot(included: &[(u64, u64)]) -> Result<ImagePieces> {
        let mut bytes = vec![1; (4 * MIB) as usize + 512];
        bytes[MIB as usize..2 * MIB as usize].fill(0);
        let geometry = Geometry::new(4 * MIB + 512, BlockSize::DEFAULT).expect("valid");
        let identity = Identity { volume: Uuid::from_u128(1), geometry, generation: 2, cut: 3 };
        let cut = CutName { snapshot: Uuid::from_u128(4), generation: 2, sequence: 3 };
        let included = included.iter().map(|(start, end)| ByteRange::new(*start, end - start));
        let device = Arc::new(RamDevice::from_bytes(bytes));
        ImagePieces::of_snapshot(device, identity, cut, included.collect())
    }

    #[test]
    fn what_a_snapshot_does_not_include_is_in_no_piece() {
        let included = [(4096, MIB + 4096), (3 * MIB, 4 * MIB + 512)];
        let source = snapshot(&included).expect("in order");
        assert_eq!(source.bytes_total(), 2 * MIB + 512);
        let pieces: Vec<_> = source.pieces().map(|piece| piece.expect("memory")).collect();
        let runs: Vec<_> = pieces.iter().map(|one| (one.range.offset, one.range.end())).collect();
        let expected =
            [(4096, MIB), (MIB, MIB + 4096), (3 * MIB, 4 * MIB), (4 * MIB, 4 * MIB + 512)];
        assert_eq!(runs, expected);
        let zeros: Vec<_> = pieces.iter().map(|one| matches!(one.content, Content::Zero)).collect();
        assert_eq!(zeros, [false, true, false, false]);
    }

    #[test]
    fn ranges_that_overlap_are_empty_or_lie_outside_are_refused() {
        let whole = 4 * MIB + 512;
        for bad in [&[(0, whole + 1)][..], &[(0, 8192), (4096, 9000)], &[(4096, 4096)]] {
            assert!(snapshot(bad).is_err(), "{bad:?}");
        }
        assert!(snapshot(&[]).expect("of nothing").pieces().next().is_none());
    }
}
