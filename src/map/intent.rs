//! The write-intent log: which extents may hold writes that the map does not yet speak of (R3).
//!
//! Two slots of 4 KiB, each with the whole set; a change writes the older slot and flushes. So a
//! torn slot leaves the set before, which holds every extent that was in use.
//!
//! Guarantees: `record` returns once the set is durable. Does not know: who uses the extents.

use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use crate::device::{AlignedBuffer, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::format::map::{IntentRecord, SLOT_BYTES, Slot};
use crate::limits::HOT_EXTENT_BYTES;

/// What the log said when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intents {
    /// These extents were hot when the volume stopped, ascending; none after a clean stop.
    Hot(Vec<u32>),
    /// No slot is readable: every extent must be taken for hot.
    Unknown,
}

/// See the module.
#[derive(Debug)]
pub struct IntentLog {
    device: Arc<dyn Device>,
    volume: Uuid,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    sequence: u64,
    slot: usize,
    poisoned: bool,
}

impl IntentLog {
    pub const BYTES: u64 = 2 * SLOT_BYTES as u64;

    /// A new log with no hot extent. Durable when it returns.
    pub fn create(device: Arc<dyn Device>, volume: Uuid) -> Result<Self> {
        let state = Mutex::new(State { sequence: 0, slot: 1, poisoned: false });
        let log = Self { device, volume, state };
        // Both slots, so that nothing of an earlier log is left.
        log.record(&[])?;
        log.record(&[])?;
        Ok(log)
    }

    /// Opens the log of `volume` and tells what was hot. A readable log of another volume is
    /// `Identity`, one of a newer program `Format`; a damaged one is not an error: it means
    /// `Intents::Unknown`.
    pub fn open(device: Arc<dyn Device>, volume: Uuid) -> Result<(Self, Intents)> {
        let mut bytes = AlignedBuffer::zeroed(2 * SLOT_BYTES);
        if device.size() < Self::BYTES {
            return Err(Error::integrity(format!(
                "the intent log is truncated: expected {} bytes, found {}; remove it, and every \
                 block counts as written to when the volume stopped",
                Self::BYTES,
                device.size()
            )));
        }
        device.read_at(0, &mut bytes)?;
        let mut best: Option<(IntentRecord, usize)> = None;
        for (slot, bytes) in bytes.chunks_exact(SLOT_BYTES).enumerate() {
            match IntentRecord::decode(bytes.try_into().expect("exact chunks")) {
                Slot::Empty | Slot::Damaged(_) => {}
                Slot::Unknown(error) => return Err(error),
                Slot::Valid(record) => {
                    if best.as_ref().is_none_or(|(held, _)| held.sequence < record.sequence) {
                        best = Some((record, slot));
                    }
                }
            }
        }
        let Some((record, slot)) = best else {
            let state = Mutex::new(State { sequence: 0, slot: 1, poisoned: false });
            return Ok((Self { device, volume, state }, Intents::Unknown));
        };
        if record.volume != volume || record.extent_bytes != HOT_EXTENT_BYTES {
            return Err(Error::identity(format!(
                "expected the intent log of volume {volume} in extents of {HOT_EXTENT_BYTES} \
                 bytes, found that of {} in extents of {}: name the state directory of this volume",
                record.volume, record.extent_bytes
            )));
        }
        let state = Mutex::new(State { sequence: record.sequence, slot, poisoned: false });
        Ok((Self { device, volume, state }, Intents::Hot(record.extents)))
    }

    /// Makes exactly these extents (ascending) the durable set.
    pub fn record(&self, extents: &[u32]) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.poisoned {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "a write to the intent log failed earlier; reopen the volume",
            ));
        }
        let record = IntentRecord {
            volume: self.volume,
            sequence: state.sequence + 1,
            extent_bytes: HOT_EXTENT_BYTES,
            extents: extents.to_vec(),
        };
        let slot = 1 - state.slot;
        let written = self
            .device
            .write_at((slot * SLOT_BYTES) as u64, &record.encode())
            .and_then(|()| self.device.flush());
        if written.is_err() {
            state.poisoned = true;
            return written;
        }
        state.sequence += 1;
        state.slot = slot;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RamDevice;

    #[test]
    fn the_latest_set_is_found_and_a_torn_one_leaves_the_set_before() {
        let device = Arc::new(RamDevice::new(IntentLog::BYTES));
        let volume = Uuid::from_u128(3);
        let log = IntentLog::create(Arc::clone(&device) as _, volume).expect("created");
        log.record(&[4, 9]).expect("recorded");
        log.record(&[4, 9, 11]).expect("recorded");
        let (_, intents) = IntentLog::open(Arc::clone(&device) as _, volume).expect("opens");
        assert_eq!(intents, Intents::Hot(vec![4, 9, 11]));
        device.write_at(4096 + 512, &[7; 512]).expect("ram");
        let (_, intents) = IntentLog::open(Arc::clone(&device) as _, volume).expect("opens");
        assert_eq!(intents, Intents::Hot(vec![4, 9]));
        device.write_at(512, &[7; 512]).expect("ram");
        let (log, intents) = IntentLog::open(Arc::clone(&device) as _, volume).expect("opens");
        assert_eq!(intents, Intents::Unknown);
        log.record(&[]).expect("recorded");
        let error = IntentLog::open(device, Uuid::nil()).expect_err("another volume");
        assert_eq!(error.kind(), ErrorKind::Identity);
    }

    #[test]
    fn a_log_of_a_newer_program_is_refused_and_left_as_it_is() {
        let device = Arc::new(RamDevice::new(IntentLog::BYTES));
        let volume = Uuid::from_u128(3);
        drop(IntentLog::create(Arc::clone(&device) as _, volume).expect("created"));
        let mut newer = device.contents()[..4096].to_vec();
        newer[8] = 2;
        newer[52..56].fill(0);
        let crc = crc32c::crc32c(&newer).to_le_bytes();
        newer[52..56].copy_from_slice(&crc);
        device.write_at(0, &newer).expect("ram");
        let before = device.contents();
        let error = IntentLog::open(Arc::clone(&device) as _, volume).expect_err("newer");
        assert_eq!(error.kind(), ErrorKind::Format);
        assert_eq!(device.contents(), before);
    }
}
