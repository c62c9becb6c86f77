//! A plain image as the source of a merge. It has no checksums: what it holds is taken as it is.

use std::sync::Arc;

use crate::bundle::{Content, Identity, ImageSource, Piece, PieceSource, Source};
use crate::device::Device;
use crate::error::Result;
use crate::extent::ByteRange;
use crate::limits::{BUNDLE_CHUNK_BYTES_MAX, BUNDLE_ZERO_GRAIN_BYTES};
use crate::units::BlockSize;

/// See the module.
#[derive(Debug)]
pub struct ImagePieces {
    device: Arc<dyn Device>,
    identity: Identity,
}

impl ImagePieces {
    /// An image of a whole volume.
    pub fn new(device: Arc<dyn Device>) -> Result<Self> {
        let identity = ImageSource::new(Arc::clone(&device), BlockSize::DEFAULT)?.identity();
        Ok(Self { device, identity })
    }

    /// The next piece at or after `at`; `data` is the device's latest answer.
    fn next(&self, at: u64, data: &mut Option<ByteRange>) -> Result<Piece> {
        let size = self.device.size();
        if data.is_some_and(|data| data.end() <= at) {
            // In whole grains, so that pieces suit devices of any sector size and most block sizes.
            *data = self.device.next_data(at)?.map(|found| {
                let start = found.offset / BUNDLE_ZERO_GRAIN_BYTES * BUNDLE_ZERO_GRAIN_BYTES;
                let end = found.end().next_multiple_of(BUNDLE_ZERO_GRAIN_BYTES).min(size);
                ByteRange::new(start, end - start)
            });
        }
        let (end, content) = match *data {
            None => (size, Content::Zero),
            Some(data) if data.offset > at => (data.offset, Content::Zero),
            Some(data) => {
                let cell_end = (at / BUNDLE_CHUNK_BYTES_MAX + 1) * BUNDLE_CHUNK_BYTES_MAX;
                (data.end().min(cell_end), Content::Plain(Arc::clone(&self.device)))
            }
        };
        Ok(Piece { range: ByteRange::new(at, end - at), content })
    }
}

impl PieceSource for ImagePieces {
    fn name(&self) -> String {
        "plain image".into()
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn bytes_total(&self) -> u64 {
        self.device.size()
    }

    fn answers_at_once(&self) -> bool {
        self.device.answers_at_once()
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let mut at = 0;
        let mut data = Some(ByteRange::default());
        Box::new(std::iter::from_fn(move || {
            if at >= self.device.size() {
                return None;
            }
            let piece = self.next(at, &mut data);
            at = piece.as_ref().map_or(u64::MAX, |piece| piece.range.end());
            Some(piece)
        }))
    }
}
