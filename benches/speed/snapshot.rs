//! The snapshot write path of a backup: batches of mirrored 4 KiB writes, with no snapshot, to
//! blocks whose old bytes must be preserved first, and to blocks that are preserved already.

use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput};
use dualrestore::device::{FileDirectory, Payload, RamDevice};
use dualrestore::snapshot::CutOrder;
use dualrestore::volume::backup::{BackupVolume, MirrorOperation};
use uuid::Uuid;

use crate::{BLOCK, VOLUME_BYTES, geometry, noise, scattered, scratch};

const EPOCH: u64 = 1;
/// Writes of a batch, and batches of a measurement; each batch ends with a flush.
const WRITES: u64 = 64;
const BATCHES: u64 = 4;
const OPERATIONS: u64 = BATCHES * (WRITES + 1);

/// A backup and its state directory.
struct Home {
    backup: BackupVolume,
    batches: Vec<Vec<MirrorOperation>>,
    _state: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let state = scratch();
        let directory = FileDirectory::open(state.path(), false).expect("just made");
        let device = Arc::new(RamDevice::from_bytes(noise(VOLUME_BYTES)));
        let backup = BackupVolume::create(Arc::new(directory), device, geometry(), Uuid::nil())
            .expect("an empty place");
        backup.begin_session(EPOCH, 0).expect("the first session");
        Self { backup, batches: Vec::new(), _state: state }
    }

    fn with_snapshot() -> Self {
        let home = Self::new();
        let order = CutOrder {
            snapshot: Uuid::from_u128(1),
            label: "measured".to_owned(),
            created_ms: 0,
            selection: Vec::new(),
        };
        home.backup.snapshot_now(&order).expect("cut");
        home
    }

    /// Prepares the batches, so that only their application is measured.
    fn ready(mut self, sequence_before: u64) -> Self {
        let mut blocks = scattered(VOLUME_BYTES / BLOCK);
        let bytes = Payload::copy_of(&[0x5a; BLOCK as usize]);
        let mut sequence = sequence_before;
        for _ in 0..BATCHES {
            let mut batch = Vec::new();
            for _ in 0..WRITES {
                sequence += 1;
                let offset = blocks.next().expect("endless") * BLOCK;
                batch.push(MirrorOperation::Write { sequence, offset, data: bytes.clone() });
            }
            sequence += 1;
            batch.push(MirrorOperation::Flush { sequence });
            self.batches.push(batch);
        }
        self
    }

    fn apply(mut self) -> Self {
        for batch in std::mem::take(&mut self.batches) {
            let answers = self.backup.apply(EPOCH, batch).expect("well formed");
            assert!(!answers.is_empty(), "a flush is answered");
        }
        self
    }
}

/// What is measured, and how to prepare it.
type Case = (&'static str, fn() -> Home);

pub fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snapshot write path, batches of 64 and a flush");
    group.throughput(Throughput::Bytes(BATCHES * WRITES * BLOCK)).sample_size(20);
    let cases: [Case; 3] = [
        ("no snapshot", || Home::new().ready(0)),
        ("first writes after the cut", || Home::with_snapshot().ready(0)),
        ("blocks preserved before", || Home::with_snapshot().ready(0).apply().ready(OPERATIONS)),
    ];
    for (name, home) in cases {
        group.bench_function(name, |bencher| {
            bencher.iter_batched(home, Home::apply, BatchSize::PerIteration);
        });
    }
    group.finish();
}
