//! A record of the backup's preservation journal.

use uuid::Uuid;

use dualrestore::extent::BlockRange;
use dualrestore::format::journal::{Found, JournalKind, JournalRecord, JournalRun};

use crate::golden;

#[test]
fn a_journal_record_of_version_1_is_written_and_read_as_it_was() {
    let run = |kind, start, end| JournalRun { kind, blocks: BlockRange::new(start, end) };
    let payload = [0x5a; 2 * 4096];
    let record = JournalRecord {
        backup: Uuid::from_u128(0x6011_dbac_0000_4000_8000_0000_0000_0001),
        snapshot: Uuid::from_u128(0x6011_dc07_0000_4000_8000_0000_0000_0002),
        sequence: 41,
        settled: 7,
        changed: 2,
        runs: vec![
            run(JournalKind::Changed, 0, 3),
            run(JournalKind::Held, 7, 9),
            run(JournalKind::Stored, 1 << 32, (1 << 32) + 256),
        ],
        payload_bytes: payload.len() as u64,
        payload_crc: crc32c::crc32c(&payload),
    };
    let mut bytes = vec![0xff; 4096];
    record.encode(&mut bytes);
    bytes.extend(payload);
    let bytes = golden("journal-v1.bin", &bytes);
    let Found::Record(read) = JournalRecord::decode(&bytes, 1 << 33) else { panic!("unread") };
    assert_eq!((read.bytes(), &read), (bytes.len() as u64, &record));
}
