//! The two header slots of a map file: whose map it is, and which of its pages count.
//!
//! | step of a change | a crash within it leaves |
//! |---|---|
//! | the older slot is written, then flushed | the header before, whole in the other slot |
//! | the other slot gets the same bytes, then a flush | the new header, whole in the first |
//!
//! Guarantees: between changes both slots hold the newest header, so that a slot that rots never
//! brings an earlier life of the volume back. Does not know: pages.

use crate::device::{AlignedBuffer, Device};
use crate::error::{Error, Result};
use crate::format::map::{MapHeader, SLOT_BYTES, Slot};

pub(super) const HEADER_BYTES: u64 = 2 * SLOT_BYTES as u64;

/// The newest header and the slot it is in.
#[derive(Debug)]
pub(super) struct Headers {
    pub newest: MapHeader,
    slot: usize,
}

impl Headers {
    /// Writes the first header over zeros; durable when it returns.
    pub fn create(device: &dyn Device, first: MapHeader) -> Result<Self> {
        let mut headers = Self { newest: first, slot: 1 };
        headers.write(device, first)?;
        Ok(headers)
    }

    /// The newest header. One that is whole and not understood is refused, also beside a valid one.
    pub fn read(device: &dyn Device) -> Result<Self> {
        if device.size() < HEADER_BYTES {
            return Err(Error::format(format!(
                "expected a map, which has at least {HEADER_BYTES} bytes, found a file of {}: \
                 bring the whole file back, or make a new map",
                device.size()
            )));
        }
        let mut newest: Option<Self> = None;
        let mut problem = None;
        for (slot, found) in read_slots(device)?.into_iter().enumerate() {
            match found {
                Slot::Empty => {}
                Slot::Unknown(error) => return Err(error),
                Slot::Damaged(error) => problem = problem.or(Some(error)),
                Slot::Valid(header) => {
                    if newest.as_ref().is_none_or(|held| held.newest.sequence < header.sequence) {
                        newest = Some(Self { newest: header, slot });
                    }
                }
            }
        }
        newest.ok_or_else(|| {
            problem
                .unwrap_or_else(|| Error::format("expected a map, found zeros: name another file"))
        })
    }

    /// Gives the map another header, durable when it returns.
    pub fn write(&mut self, device: &dyn Device, header: MapHeader) -> Result<()> {
        let bytes = header.encode();
        for slot in [1 - self.slot, self.slot] {
            device.write_at((slot * SLOT_BYTES) as u64, &bytes)?;
            device.flush()?;
        }
        self.newest = header;
        Ok(())
    }

    /// Whether `create` has not come to its end: nothing was ever promised by this map. The second
    /// slot is written last, so it tells.
    pub fn are_unfinished(device: &dyn Device) -> Result<bool> {
        if device.size() < HEADER_BYTES {
            return Ok(false);
        }
        let slots = read_slots(device)?;
        Ok(matches!(slots, [Slot::Empty | Slot::Damaged(_), Slot::Empty]))
    }
}

fn read_slots(device: &dyn Device) -> Result<[Slot<MapHeader>; 2]> {
    let mut bytes = AlignedBuffer::zeroed(2 * SLOT_BYTES);
    device.read_at(0, &mut bytes)?;
    let (first, second) = bytes.split_at(SLOT_BYTES);
    let decode = |slot: &[u8]| MapHeader::decode(slot.try_into().expect("a slot's length"));
    Ok([decode(first), decode(second)])
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::device::RamDevice;
    use crate::error::ErrorKind;
    use crate::format::map::{MapIdentity, MapRole};
    use crate::units::{BlockSize, Geometry};

    fn header(sequence: u64) -> MapHeader {
        let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
        MapHeader {
            identity: MapIdentity { volume: Uuid::from_u128(1), geometry, generation: sequence },
            role: MapRole::Overwrite,
            sequence,
            void_through: 0,
            base: [false; 8],
            span: None,
        }
    }

    fn changed() -> RamDevice {
        let device = RamDevice::new(HEADER_BYTES);
        let mut headers = Headers::create(&device, header(1)).expect("created");
        headers.write(&device, header(2)).expect("written");
        device
    }

    #[test]
    fn the_newest_header_survives_the_loss_of_either_slot() {
        for rotten in [0, SLOT_BYTES as u64] {
            let device = changed();
            device.write_at(rotten + 512, &[9; 512]).expect("ram");
            assert_eq!(Headers::read(&device).expect("one is whole").newest, header(2));
        }
    }

    #[test]
    fn a_change_torn_in_its_first_slot_leaves_the_header_before() {
        let device = changed();
        let mut headers = Headers::read(&device).expect("whole");
        let first = 1 - headers.slot;
        headers.write(&device, header(3)).expect("written");
        // As if power had failed: the second slot is as before, the first half written.
        device.write_at(((1 - first) * SLOT_BYTES) as u64, &header(2).encode()).expect("ram");
        device.write_at((first * SLOT_BYTES) as u64 + 2048, &[7; 512]).expect("ram");
        let mut headers = Headers::read(&device).expect("one is whole");
        assert_eq!(headers.newest, header(2));
        headers.write(&device, header(3)).expect("written");
        assert_eq!(Headers::read(&device).expect("whole").newest, header(3));
    }

    #[test]
    fn a_header_of_a_newer_program_is_refused_beside_a_valid_one() {
        let device = changed();
        let mut newer = header(3).encode();
        newer[8] = 2;
        let crc = crc32c::crc32c(&newer[..SLOT_BYTES - 4]).to_le_bytes();
        newer[SLOT_BYTES - 4..].copy_from_slice(&crc);
        for slot in [0, SLOT_BYTES as u64] {
            let device = RamDevice::from_bytes(device.contents());
            device.write_at(slot, &newer).expect("ram");
            let error = Headers::read(&device).expect_err("a newer program's");
            assert_eq!(error.kind(), ErrorKind::Format);
            assert!(error.to_string().contains("version 2"), "{error}");
        }
    }

    #[test]
    fn what_is_no_map_is_named_so() {
        for (bytes, words) in [
            (vec![0; 4096], "at least 8192"),
            (vec![0; 8192], "found zeros"),
            (b"text".repeat(2048), "no map of dualrestore"),
        ] {
            let error = Headers::read(&RamDevice::from_bytes(bytes)).expect_err("no map");
            assert_eq!(error.kind(), ErrorKind::Format);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_creation_that_power_ended_is_told_from_a_map() {
        let device = RamDevice::new(HEADER_BYTES);
        assert!(Headers::are_unfinished(&device).expect("read"));
        device.write_at(512, &header(1).encode()[512..1024]).expect("ram");
        assert!(Headers::are_unfinished(&device).expect("read"));
        device.write_at(0, &header(1).encode()).expect("ram");
        assert!(!Headers::are_unfinished(&device).expect("read"));
        device.write_at(0, &[5; 512]).expect("ram");
        device.write_at(SLOT_BYTES as u64, &header(1).encode()).expect("ram");
        assert!(!Headers::are_unfinished(&device).expect("read"));
    }
}
