//! A snapshot served read-only to whoever speaks for an application.
//!
//! Guarantees: answers are of the cut (`SnapshotView`); every change is refused with `EROFS`;
//! reads that would wait for a disk run on the pool.
//! Does not know: NBD.

use std::sync::Arc;

use super::service::{BlockService, Command, Completion, StatusContext, StatusExtent};
use crate::bitmap::Bitmap;
use crate::device::{AlignedBuffer, WorkerPool};
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::snapshot::SnapshotView;

const EROFS: i32 = 30;

/// See the module.
#[derive(Debug)]
pub struct SnapshotService {
    view: Arc<SnapshotView>,
    /// The blocks that changed since the cut before.
    changed: Arc<Bitmap>,
    pool: Arc<WorkerPool>,
}

impl SnapshotService {
    pub fn new(view: SnapshotView, pool: Arc<WorkerPool>) -> Result<Self> {
        let changed = view.changed()?;
        Ok(Self { view: Arc::new(view), changed, pool })
    }

    fn allocation(&self, range: ByteRange, limit: usize) -> Result<Vec<StatusExtent>> {
        let mut extents: Vec<StatusExtent> = Vec::new();
        let mut at = range.offset;
        while at < range.end() {
            let next = self.view.extent_at(at, range.end())?;
            at = next.range.end();
            let (length, hole) = (next.range.length, !next.data);
            if let Some(last) = extents.last_mut().filter(|last| last.hole == hole) {
                last.length += length;
                continue;
            }
            if extents.len() == limit {
                break;
            }
            extents.push(StatusExtent { length, hole, zero: hole, marked: false });
        }
        Ok(extents)
    }

    fn changes(&self, range: ByteRange, limit: usize) -> Vec<StatusExtent> {
        let geometry = self.view.geometry();
        let blocks = geometry.touched(range);
        let mut extents = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end && extents.len() < limit {
            let marked = self.changed.get(at);
            let rest = BlockRange::new(at, blocks.end);
            let end = self.changed.next(rest, !marked).unwrap_or(blocks.end);
            let bytes = geometry.bytes_of(BlockRange::new(at, end));
            let bytes = bytes.intersect(range).expect("a touched block shares bytes");
            extents.push(StatusExtent { length: bytes.length, hole: false, zero: false, marked });
            at = end;
        }
        extents
    }
}

fn read_only() -> Error {
    Error::usage("a snapshot cannot be changed: it is served read-only").with_errno(EROFS)
}

impl BlockService for SnapshotService {
    fn size(&self) -> u64 {
        self.view.geometry().size()
    }

    fn sector_size(&self) -> u32 {
        self.view.sector_size()
    }

    fn preferred_size(&self) -> u32 {
        self.view.geometry().block_size().bytes_u32().max(4096)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn contexts(&self) -> Vec<StatusContext> {
        vec![StatusContext::Allocation, StatusContext::Changed]
    }

    fn read_now(&self, range: ByteRange, buffer: &mut [u8]) -> Option<Result<()>> {
        self.view.answers_at_once().then(|| self.view.read_at(range.offset, buffer))
    }

    fn submit(&self, command: Command, completion: Completion) {
        match command {
            Command::Read { range } => {
                let view = Arc::clone(&self.view);
                self.pool.submit(move || {
                    let mut buffer = AlignedBuffer::zeroed(range.length as usize);
                    let read = view.read_at(range.offset, &mut buffer);
                    completion(read.map(|()| Some(buffer)));
                });
            }
            Command::Write { .. } | Command::WriteZeroes { .. } | Command::Trim { .. } => {
                completion(Err(read_only()));
            }
            Command::Cache { .. } | Command::Flush => completion(self.view.check().map(|()| None)),
        }
    }

    fn status(
        &self,
        context: StatusContext,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<StatusExtent>> {
        match context {
            StatusContext::Allocation => self.allocation(range, limit),
            StatusContext::Changed => Ok(self.changes(range, limit)),
            StatusContext::Missing | StatusContext::Unsent => {
                Err(Error::usage("a snapshot lacks no blocks and sends none: ask for others"))
            }
        }
    }
}
