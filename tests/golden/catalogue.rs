//! The backup's catalogue.

use uuid::Uuid;

use dualrestore::extent::BlockRange;
use dualrestore::snapshot::{Catalogue, CutRecord, Selection};
use dualrestore::units::{BlockSize, Geometry};

use crate::golden;

fn cut(number: u128, changed: u64, kept: bool, selection: &[(u64, u64)]) -> CutRecord {
    let runs = selection.iter().map(|(start, end)| BlockRange::new(*start, *end)).collect();
    CutRecord {
        snapshot: Uuid::from_u128(0x6011_dc07_0000_4000_8000_0000_0000_0000 + number),
        label: if kept { "nächtlich \"7\"".to_owned() } else { String::new() },
        generation: 2 + changed,
        sequence: u64::MAX - changed,
        created_ms: 1_700_000_000_000,
        selection: Selection::union(runs),
        changed,
        kept,
    }
}

#[test]
fn a_catalogue_of_version_1_is_written_and_read_as_it_was() {
    let geometry = Geometry::new((10 << 20) + 512, BlockSize::DEFAULT).expect("valid");
    let catalogue = Catalogue {
        backup: Uuid::from_u128(0x6011_dbac_0000_4000_8000_0000_0000_0001),
        volume: Uuid::from_u128(0x6011_d3a9_0000_4000_8000_0000_0000_0001),
        generation: 4,
        geometry,
        changed: 7,
        journal: false,
        cuts: vec![cut(1, 0, false, &[(0, 2561)]), cut(2, 2, true, &[(0, 1), (9, 2561)])],
    };
    let bytes = golden("catalogue-v1.txt", &catalogue.encode());
    assert_eq!(Catalogue::decode(&bytes).expect("whole"), catalogue);
}

#[test]
fn a_catalogue_of_version_1_that_no_primary_has_claimed_is_written_and_read_as_it_was() {
    let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
    let backup = Uuid::from_u128(0x6011_dbac_0000_4000_8000_0000_0000_0002);
    let volume = Uuid::nil();
    let catalogue = Catalogue {
        backup,
        volume,
        generation: 0,
        geometry,
        changed: 0,
        journal: false,
        cuts: vec![],
    };
    let bytes = golden("catalogue-v1-unclaimed.txt", &catalogue.encode());
    assert_eq!(Catalogue::decode(&bytes).expect("whole"), catalogue);
}

#[test]
fn a_catalogue_with_a_journal_says_so_and_one_without_does_not() {
    let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
    let backup = Uuid::from_u128(0x6011_dbac_0000_4000_8000_0000_0000_0003);
    let mut catalogue = Catalogue {
        backup,
        volume: Uuid::nil(),
        generation: 0,
        geometry,
        changed: 1,
        journal: true,
        cuts: vec![cut(1, 0, true, &[(0, 256)])],
    };
    let bytes = golden("catalogue-v1-journal.txt", &catalogue.encode());
    assert_eq!(Catalogue::decode(&bytes).expect("whole"), catalogue);
    catalogue.journal = false;
    assert!(!String::from_utf8(catalogue.encode()).expect("text").contains("journal"));
}
