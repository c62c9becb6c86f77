//! The description of an exported snapshot.

use uuid::Uuid;

use dualrestore::extent::ByteRange;
use dualrestore::format::nbd::{ExportedCut, Included};

use crate::golden;

#[test]
fn the_description_of_version_1_of_an_exported_snapshot_is_written_and_read_as_it_was() {
    let ranges = vec![ByteRange::new(0, 4096), ByteRange::new(8192, 512)];
    let cuts =
        [Included::All, Included::Ranges(ranges), Included::Unstated].map(|included| ExportedCut {
            volume: Uuid::from_u128(0x6011_d3a9_0000_4000_8000_0000_0000_0001),
            generation: 4,
            sequence: u64::MAX,
            snapshot: Uuid::from_u128(0x6011_dc07_0000_4000_8000_0000_0000_0001),
            block_bytes: 4096,
            included,
        });
    let written: String = cuts.iter().map(|cut| cut.text() + "\n").collect();
    let held = golden("exported-cut-v1.txt", written.as_bytes());
    let held = String::from_utf8(held).expect("text");
    let read: Vec<_> = held.lines().map(|line| ExportedCut::parse(line).expect("ours")).collect();
    assert_eq!(read, cuts.map(Some));
}
