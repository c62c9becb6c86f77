//! What a daemon keeps: maps of every role, intent log, catalogue.

use std::sync::Arc;

use dualrestore::device::RamDevice;
use dualrestore::extent::BlockRange;
use dualrestore::map::{IntentLog, MapFile, MapRole, OverwriteMap};
use dualrestore::snapshot::Catalogue;
use uuid::Uuid;

use crate::{both_modes, modes};

const SLOT: usize = 4096;
const OVERWRITE: &[u8] = include_bytes!("../../tests/golden/overwrite-map-v1.bin");
const CHANGED: &[u8] = include_bytes!("../../tests/golden/changed-map-v1.bin");
const PRESERVED: &[u8] = include_bytes!("../../tests/golden/preserved-map-v1.bin");
const INTENTS: &[u8] = include_bytes!("../../tests/golden/intent-log-v1.bin");
const CATALOGUE: &[u8] = include_bytes!("../../tests/golden/catalogue-v1.txt");

/// A file as large as whole sectors.
fn file_of(mut bytes: Vec<u8>) -> Arc<RamDevice> {
    bytes.resize(bytes.len().next_multiple_of(512).max(512), 0);
    Arc::new(RamDevice::from_bytes(bytes))
}

/// Puts the checksum of a slot, without the four bytes of it, there.
fn seal(slot: &mut [u8], at: usize) {
    let crc = if at == 4 {
        crc32c::crc32c(&slot[8..])
    } else {
        slot[at..at + 4].fill(0);
        let counted = if at == SLOT - 4 { &slot[..at] } else { &slot[..] };
        crc32c::crc32c(counted)
    };
    slot[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn seal_map(bytes: &mut [u8]) {
    for (number, slot) in bytes.chunks_exact_mut(SLOT).enumerate() {
        match number {
            0 | 1 => seal(slot, SLOT - 4),
            _ if slot.starts_with(b"DRMP") => seal(slot, 4),
            _ => {}
        }
    }
}

/// Opens a map in each role, and writes into it what it can hold.
pub fn map(bytes: &[u8]) {
    let Some((reseal, rest)) = modes(bytes) else { return };
    let mut bytes = rest.to_vec();
    if reseal {
        seal_map(&mut bytes);
    }
    for role in [MapRole::Overwrite, MapRole::Changed, MapRole::Preserved] {
        if let Ok((map, _)) = MapFile::open_damaged(file_of(bytes.clone()), role) {
            let end = map.identity().geometry.blocks().min(1 << 16);
            map.plane(0).runs(BlockRange::new(0, end), true).count();
            assert!(!map.has_uncommitted() || map.commit_all().is_ok(), "memory takes it");
        }
    }
    if let Ok((map, _)) = OverwriteMap::open(file_of(bytes), None) {
        assert!(map.current_bytes() + map.missing_bytes() == map.geometry().size());
    }
}

/// Opens an intent log.
pub fn intent_log(bytes: &[u8]) {
    let Some((reseal, rest)) = modes(bytes) else { return };
    let mut bytes = rest.to_vec();
    if reseal {
        bytes.chunks_exact_mut(SLOT).for_each(|slot| seal(slot, 52));
    }
    let volume = Uuid::from_bytes(std::array::from_fn(|at| bytes.get(24 + at).map_or(0, |b| *b)));
    if let Ok((log, _)) = IntentLog::open(file_of(bytes), volume) {
        log.record(&[1, 2, 3]).expect("memory takes it");
    }
}

/// Reads a catalogue.
pub fn catalogue(bytes: &[u8]) {
    let Some((reseal, rest)) = modes(bytes) else { return };
    let mut bytes = rest.to_vec();
    if reseal {
        let head =
            format!("dualrestore-backup-catalogue 1 {:08x} {}\n", crc32c::crc32c(rest), rest.len());
        bytes = [head.as_bytes(), rest].concat();
    }
    if let Ok(catalogue) = Catalogue::decode(&bytes) {
        let again = Catalogue::decode(&catalogue.encode()).expect("what was read can be written");
        assert_eq!(again, catalogue);
    }
}

pub(crate) fn map_seeds() -> Vec<Vec<u8>> {
    both_modes(&[OVERWRITE, CHANGED, PRESERVED].map(<[u8]>::to_vec))
}

pub(crate) fn intent_seeds() -> Vec<Vec<u8>> {
    both_modes(&[INTENTS.to_vec()])
}

pub(crate) fn catalogue_seeds() -> Vec<Vec<u8>> {
    let body = CATALOGUE.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    vec![[&[0], CATALOGUE].concat(), [&[1], &CATALOGUE[body..]].concat()]
}
