//! Figures 3A and 3B of the seed, the backup's side, step by step (paragraphs 46 to 59).
//!
//! | figure | here |
//! |---|---|
//! | snapshot map 310 before a cut (314, 316), backup map 324 | the backup map, kept with the cut |
//! | snapshot map 310 after a cut (317, 318) | the blocks whose old bytes are in the store |
//! | snapshot storage 300 | the bytes that a view reads where the map is set |

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::{Answer, BackupVolume, MirrorOperation};
use crate::bitmap::Bitmap;
use crate::device::{CrashingDirectory, Device, Payload, Power, RamDevice};
use crate::extent::BlockRange;
use crate::snapshot::CutOrder;
use crate::units::{BlockSize, Geometry};

const BLOCK: usize = 4096;
const SNAPSHOT: Uuid = Uuid::from_u128(0x300);

struct Figure {
    disk: Arc<RamDevice>,
    backup: BackupVolume,
    sequence: u64,
}

/// A block whose every 8 bytes are its name.
fn block(name: &str) -> Vec<u8> {
    format!("{name:<8}").into_bytes().repeat(BLOCK / 8)
}

fn names(bytes: &[u8]) -> Vec<String> {
    let name = |block: &[u8]| String::from_utf8_lossy(&block[..8]).trim().to_owned();
    assert!(bytes.chunks_exact(BLOCK).all(|b| b.chunks_exact(8).all(|part| part == &b[..8])));
    bytes.chunks_exact(BLOCK).map(name).collect()
}

/// The numbers, from 1 as in the figures, of the set bits.
fn grey(map: &Bitmap) -> Vec<u64> {
    let all = BlockRange::new(0, 6);
    map.runs(all, true).flat_map(|run| run.start + 1..run.end + 1).collect()
}

impl Figure {
    /// Time T0: locations 330 hold blocks 1 to 6, all maps are clear.
    fn at_t0() -> Self {
        let bytes: Vec<u8> = ["1", "2", "3", "4", "5", "6"].map(block).concat();
        let disk = Arc::new(RamDevice::from_bytes(bytes));
        let geometry = Geometry::new(6 * BLOCK as u64, BlockSize::DEFAULT).expect("valid");
        let home = Arc::new(CrashingDirectory::new(Power::steady()));
        let mirror = Arc::clone(&disk) as Arc<dyn Device>;
        let backup =
            BackupVolume::create(home, mirror, geometry, Uuid::from_u128(1)).expect("created");
        backup.adopt(Uuid::from_u128(104), 1).expect("adopted");
        backup.begin_session(1, 0).expect("begun");
        Self { disk, backup, sequence: 0 }
    }

    /// Mirrors writes that arrived together.
    fn write(&mut self, blocks: &[(u64, &str)]) {
        let batch = blocks.iter().map(|(location, name)| {
            self.sequence += 1;
            MirrorOperation::Write {
                sequence: self.sequence,
                offset: (location - 1) * BLOCK as u64,
                data: Payload::copy_of(&block(name)),
            }
        });
        let batch = batch.collect();
        let answers = self.backup.apply(1, batch).expect("taken");
        assert!(matches!(answers[..], [Answer::Applied { through }] if through == self.sequence));
    }

    fn cut(&mut self) {
        self.sequence += 1;
        let order = CutOrder {
            snapshot: SNAPSHOT,
            label: "T1".to_owned(),
            created_ms: 1,
            selection: Vec::new(),
        };
        let cut = MirrorOperation::Cut { sequence: self.sequence, order };
        let answers = self.backup.apply(1, vec![cut]).expect("taken");
        assert!(matches!(answers[..], [Answer::CutDone { snapshot: SNAPSHOT, .. }]), "{answers:?}");
    }

    fn mirror(&self) -> Vec<String> {
        names(&self.disk.contents())
    }

    fn view(&self) -> Vec<String> {
        let mut bytes = vec![0; 6 * BLOCK];
        self.backup.view(SNAPSHOT).expect("kept").read_at(0, &mut bytes).expect("read");
        names(&bytes)
    }

    /// Map 310 after the cut, and what storage 300 holds.
    fn preserved_bytes(&self) -> u64 {
        self.backup.snapshots().list()[0].preserved_bytes
    }

    fn changed(&self) -> Vec<u64> {
        grey(&self.backup.snapshots().changed())
    }
}

#[test]
fn figures_3a_and_3b_on_the_backup_step_by_step() {
    let mut figure = Figure::at_t0();
    assert_eq!(figure.changed(), [0; 0], "T0: map locations 312 and 322 are clear");

    // Paragraph 48: the primary reads location 1 over the link.
    let mut fetched = vec![0; BLOCK];
    figure.backup.read(1, 0, &mut fetched, 0, Duration::ZERO).expect("fetched");
    assert_eq!(names(&fetched), ["1"]);
    assert_eq!(figure.changed(), [0; 0], "reading changes no map");

    // Paragraphs 49 and 50: data blocks 340.
    figure.write(&[(3, "3a"), (4, "4a")]);
    assert_eq!(figure.mirror(), ["1", "2", "3a", "4a", "5", "6"], "locations 332");
    assert_eq!(figure.changed(), [3, 4], "map locations 314");

    // Paragraph 51: data blocks 342.
    figure.write(&[(3, "3b"), (4, "4b"), (6, "6a")]);
    assert_eq!(figure.mirror(), ["1", "2", "3b", "4b", "5", "6a"], "locations 334");
    assert_eq!(figure.changed(), [3, 4, 6], "map locations 316");
    assert!(figure.backup.snapshots().list().is_empty(), "no snapshot has been taken");

    // Paragraph 52: the snapshot at T1; 316 becomes 324.
    figure.cut();
    let before = figure.backup.snapshots().changed_before(SNAPSHOT).expect("recorded");
    assert_eq!(grey(&before), [3, 4, 6], "map locations 324");
    assert_eq!(figure.changed(), [0; 0], "nothing has changed since T1");
    assert_eq!(figure.preserved_bytes(), 0);

    // Paragraph 53: data blocks 344.
    figure.write(&[(1, "1a"), (3, "3c")]);
    assert_eq!(figure.mirror(), ["1a", "2", "3c", "4b", "5", "6a"], "locations 336");
    assert_eq!(figure.changed(), [1, 3], "map locations 317");
    assert_eq!(figure.preserved_bytes(), 2 * BLOCK as u64, "1 and 3b in storage 300");

    // Paragraphs 54 to 57: the snapshot copy is locations 334.
    assert_eq!(figure.view(), ["1", "2", "3b", "4b", "5", "6a"], "data blocks 352");

    // Paragraphs 58 and 59: data blocks 346; 1a is not preserved, 4b and 6a are.
    figure.write(&[(1, "1b"), (4, "4c"), (6, "6b")]);
    assert_eq!(figure.mirror(), ["1b", "2", "3c", "4c", "5", "6b"], "locations 338");
    assert_eq!(figure.changed(), [1, 3, 4, 6], "map locations 318");
    assert_eq!(figure.preserved_bytes(), 4 * BLOCK as u64, "and 4b and 6a in storage 300");
    assert_eq!(figure.view(), ["1", "2", "3b", "4b", "5", "6a"], "the snapshot does not move");
    assert_eq!(grey(&before), [3, 4, 6], "map locations 324 remain");
}
