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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{CrashingDirectory, Device, Payload, Power, RamDevice};
    use crate::snapshot::CutOrder;
    use crate::units::{BlockSize, Geometry};
    use crate::volume::backup::{BackupVolume, MirrorOperation};
    use uuid::Uuid;

    const BLOCK: usize = 4096;

    /// A volume of 10 blocks and a tail of one sector: blocks 2 and 3 were written before the cut,
    /// 3 to 6 after it.
    fn service() -> SnapshotService {
        let size = 10 * BLOCK as u64 + 512;
        let disk: Arc<dyn Device> = Arc::new(RamDevice::new(size));
        let geometry = Geometry::new(size, BlockSize::DEFAULT).expect("valid");
        let home = Arc::new(CrashingDirectory::new(Power::steady()));
        let backup =
            BackupVolume::create(home, disk, geometry, Uuid::from_u128(1)).expect("created");
        backup.begin_session(1, 0).expect("begun");
        let write = |sequence, first: usize, count: usize| MirrorOperation::Write {
            sequence,
            offset: (first * BLOCK) as u64,
            data: Payload::copy_of(&vec![sequence as u8; count * BLOCK]),
        };
        backup.apply(1, vec![write(1, 2, 2)]).expect("taken");
        let order = CutOrder {
            snapshot: Uuid::from_u128(1),
            label: String::new(),
            created_ms: 0,
            selection: Vec::new(),
        };
        backup.snapshot_now(&order).expect("cut");
        backup.apply(1, vec![write(2, 3, 4)]).expect("taken");
        let pool = Arc::new(WorkerPool::new("test", 1).expect("threads"));
        SnapshotService::new(backup.view(order.snapshot).expect("kept"), pool).expect("opened")
    }

    fn ask(service: &SnapshotService, command: Command) -> Result<Option<AlignedBuffer>> {
        let (send, receive) = crossbeam_channel::bounded(1);
        service.submit(command, Box::new(move |outcome| send.send(outcome).expect("awaited")));
        receive.recv().expect("answered once")
    }

    #[test]
    fn a_read_by_either_way_gives_the_bytes_of_the_cut() {
        let service = service();
        let range = ByteRange::new(0, service.size());
        let read = ask(&service, Command::Read { range }).expect("read").expect("bytes");
        let values: Vec<u8> = read.chunks(BLOCK).map(|block| block[0]).collect();
        assert_eq!(values, [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]);
        let mut now = vec![9; read.len()];
        service.read_now(range, &mut now).expect("RAM answers at once").expect("read");
        assert!(now[..] == read[..]);
    }

    #[test]
    fn every_change_is_refused_as_read_only_and_a_flush_is_not() {
        let service = service();
        let (range, force_unit_access) = (ByteRange::new(0, 512), false);
        let data = Payload::copy_of(&[1; 512]);
        for command in [
            Command::Write { offset: 0, data, force_unit_access },
            Command::WriteZeroes { range, may_deallocate: true, force_unit_access },
            Command::Trim { range, force_unit_access },
        ] {
            assert_eq!(ask(&service, command).expect_err("refused").errno(), Some(EROFS));
        }
        assert!(ask(&service, Command::Flush).expect("fine").is_none());
        assert!(service.read_only());
    }

    #[test]
    fn the_status_tells_data_holes_and_changes_as_of_the_cut() {
        let service = service();
        let whole = ByteRange::new(0, service.size());
        let blocks = |extents: Vec<StatusExtent>| -> Vec<(u64, bool, bool)> {
            extents.iter().map(|e| (e.length, e.hole, e.marked)).collect()
        };
        let told = service.status(StatusContext::Allocation, whole, 99).expect("told");
        let (two, rest) = (2 * BLOCK as u64, 6 * BLOCK as u64 + 512);
        assert_eq!(blocks(told), [(two, true, false), (two, false, false), (rest, true, false)]);
        let told = service.status(StatusContext::Changed, whole, 99).expect("told");
        assert_eq!(blocks(told), [(two, false, false), (two, false, true), (rest, false, false)]);
        let inner = ByteRange::new(BLOCK as u64, 4 * BLOCK as u64);
        for context in service.contexts() {
            let told = service.status(context, inner, 1).expect("told");
            assert_eq!(told.iter().map(|e| e.length).collect::<Vec<_>>(), [two - BLOCK as u64]);
        }
    }
}
