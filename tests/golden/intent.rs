//! The intent log with a torn slot, and full.

use std::sync::Arc;

use uuid::Uuid;

use dualrestore::device::{Device, RamDevice};
use dualrestore::map::{IntentLog, Intents};

use crate::golden;

const VOLUME: Uuid = Uuid::from_u128(0x6011_d3a9_0000_4000_8000_0000_0000_0001);

fn log() -> (Arc<RamDevice>, IntentLog) {
    let device = Arc::new(RamDevice::new(IntentLog::BYTES));
    let log = IntentLog::create(Arc::clone(&device) as _, VOLUME).expect("created");
    (device, log)
}

fn read(bytes: Vec<u8>) -> Intents {
    IntentLog::open(Arc::new(RamDevice::from_bytes(bytes)), VOLUME).expect("opens").1
}

#[test]
fn an_intent_log_of_version_1_is_written_and_read_as_it_was() {
    let (device, log) = log();
    log.record(&[0, 7, 16_777_215]).expect("recorded");
    log.record(&[0, 7, 9, 16_777_215]).expect("recorded");
    // The newest set was torn while it was written: the set before counts.
    device.write_at(4096, &[0x5a; 512]).expect("ram");
    let bytes = golden("intent-log-v1.bin", &device.contents());
    assert_eq!(read(bytes), Intents::Hot(vec![0, 7, 16_777_215]));
}

#[test]
fn a_full_intent_log_of_version_1_is_written_and_read_as_it_was() {
    let (device, log) = log();
    let extents: Vec<u32> = (0..1000).map(|number| number * 3).collect();
    log.record(&extents).expect("recorded");
    let bytes = golden("intent-log-v1-full.bin", &device.contents());
    assert_eq!(read(bytes), Intents::Hot(extents));
}
