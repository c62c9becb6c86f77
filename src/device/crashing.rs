//! A device in memory that loses power: only what was flushed is sure to survive.
//!
//! Guarantees: each sector of 512 bytes that was written since the last flush comes out of a crash
//! as it was durable or as any one of the writes since left it, each sector on its own, as the
//! chooser says; reads see the last write.
//! Does not know: chance. Devices that share a `Power` lose it at the same moment.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Device;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::units::SECTOR_BYTES;

const SECTOR: usize = SECTOR_BYTES as usize;
/// The unit in which space is taken from a `Capacity`.
const ALLOCATION_SECTORS: u64 = 8;

/// Says which state of a sector survives: 0 the durable one, `n` what the n-th write since left.
/// Its argument is the greatest `n`.
pub type Chooser<'a> = &'a mut dyn FnMut(usize) -> usize;

/// The supply of several devices: counts what they do and goes out at a chosen event.
#[derive(Debug)]
pub struct Power {
    events: AtomicU64,
    off_at: AtomicU64,
    last_takes_effect: bool,
}

/// What a device may do about an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Supply {
    On,
    /// The power goes out while this event happens.
    Last,
    Off,
}

impl Power {
    /// Never goes out.
    #[must_use]
    pub fn steady() -> Arc<Self> {
        Self::failing_at(u64::MAX, false)
    }

    /// Goes out during event `event` (the first is 0): that one and all later operations fail.
    /// `last_takes_effect` says whether a directory operation interrupted so happened or not.
    #[must_use]
    pub fn failing_at(event: u64, last_takes_effect: bool) -> Arc<Self> {
        let off_at = AtomicU64::new(event);
        Arc::new(Self { events: AtomicU64::new(0), off_at, last_takes_effect })
    }

    /// Goes out during the event that comes after so many others from now on.
    pub fn fail_after(&self, events: u64) {
        self.off_at.store(self.events().saturating_add(events), Ordering::Release);
    }

    /// Writes, zeroes, flushes and directory operations so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Acquire)
    }

    pub(super) fn spend(&self) -> Supply {
        let off_at = self.off_at.load(Ordering::Acquire);
        match self.events.fetch_add(1, Ordering::AcqRel).cmp(&off_at) {
            std::cmp::Ordering::Less => Supply::On,
            std::cmp::Ordering::Equal => Supply::Last,
            std::cmp::Ordering::Greater => Supply::Off,
        }
    }

    #[must_use]
    pub fn is_off(&self) -> bool {
        self.events() > self.off_at.load(Ordering::Acquire)
    }

    pub(super) fn last_takes_effect(&self) -> bool {
        self.last_takes_effect
    }
}

pub(super) fn power_lost() -> Error {
    Error::device("use a device without power", &io::Error::from_raw_os_error(5))
}

/// Space that several devices share; a write that needs more fails with `ENOSPC`.
#[derive(Debug)]
pub struct Capacity {
    total: AtomicU64,
    used: AtomicU64,
}

impl Capacity {
    #[must_use]
    pub fn new(total: u64) -> Arc<Self> {
        Arc::new(Self { total: AtomicU64::new(total), used: AtomicU64::new(0) })
    }

    /// Somebody makes room.
    pub fn grow(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(super) fn total(&self) -> u64 {
        self.total.load(Ordering::Acquire)
    }

    pub(super) fn free(&self) -> u64 {
        self.total().saturating_sub(self.used.load(Ordering::Acquire))
    }

    fn take(&self, bytes: u64) -> Result<()> {
        let taken = self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
            used.checked_add(bytes).filter(|used| *used <= self.total())
        });
        let full = || Error::device("write", &io::Error::from_raw_os_error(28));
        taken.map(|_| ()).map_err(|_| full())
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// The bytes of a sector; `None` is zeros.
type Sector = Option<Box<[u8; SECTOR]>>;

#[derive(Debug, Default)]
struct Sectors {
    durable: BTreeMap<u64, Box<[u8; SECTOR]>>,
    /// What each write since the last flush left, oldest first.
    pending: BTreeMap<u64, Vec<Sector>>,
    /// Units of `ALLOCATION_SECTORS` that space was taken for.
    allocated: BTreeSet<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct CrashingDevice {
    size: u64,
    power: Arc<Power>,
    capacity: Option<Arc<Capacity>>,
    sectors: Mutex<Sectors>,
}

impl CrashingDevice {
    /// `size` zero bytes, durable.
    #[must_use]
    pub fn new(size: u64, power: Arc<Power>) -> Self {
        assert!(size.is_multiple_of(SECTOR_BYTES), "{size} bytes are no whole sectors");
        Self { size, power, capacity: None, sectors: Mutex::default() }
    }

    /// As `new`; what it holds is counted against `capacity`.
    #[must_use]
    pub fn with_capacity(size: u64, power: Arc<Power>, capacity: Option<Arc<Capacity>>) -> Self {
        Self { capacity, ..Self::new(size, power) }
    }

    /// These bytes, durable.
    #[must_use]
    pub fn from_bytes(bytes: &[u8], power: Arc<Power>) -> Self {
        let device = Self::new(bytes.len() as u64, power);
        let durable = (0..)
            .zip(bytes.chunks_exact(SECTOR))
            .filter_map(|(index, chunk)| sector_of(chunk).map(|sector| (index, sector)));
        device.lock().durable = durable.collect();
        device
    }

    /// What a reader would see now.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size).expect("fits memory")];
        self.lock().copy_out(0, &mut bytes);
        bytes
    }

    /// Every content that a sector may have after a crash, the one that a reader sees last.
    #[must_use]
    pub fn may(&self, sector: u64) -> Vec<[u8; SECTOR]> {
        let held = self.lock();
        let bytes = |held: Option<&Box<[u8; SECTOR]>>| held.map_or([0; SECTOR], |held| **held);
        let waiting = held.pending.get(&sector).into_iter().flatten();
        std::iter::once(bytes(held.durable.get(&sector)))
            .chain(waiting.map(|version| bytes(version.as_ref())))
            .collect()
    }

    /// From now on these are its bytes there, durably, whatever was written: as if somebody had
    /// changed or replaced the disk.
    pub fn replace(&self, offset: u64, bytes: &[u8]) {
        let mut held = self.lock();
        for (index, chunk) in self.span(offset, bytes.len() as u64).zip(bytes.chunks_exact(SECTOR))
        {
            held.pending.remove(&index);
            match sector_of(chunk) {
                Some(sector) => held.durable.insert(index, sector),
                None => held.durable.remove(&index),
            };
        }
    }

    /// The device as it comes up after the power was lost now, on another supply.
    #[must_use]
    pub fn crash(&self, chooser: Chooser<'_>, power: Arc<Power>) -> Self {
        let capacity = self.capacity.as_ref().map(|old| Capacity::new(old.total()));
        self.crash_into(chooser, power, capacity)
    }

    pub(super) fn crash_into(
        &self,
        chooser: Chooser<'_>,
        power: Arc<Power>,
        capacity: Option<Arc<Capacity>>,
    ) -> Self {
        let held = self.lock();
        let mut durable = held.durable.clone();
        for (index, versions) in &held.pending {
            let choice = chooser(versions.len());
            assert!(choice <= versions.len(), "{choice} of {}", versions.len());
            let Some(survivor) = choice.checked_sub(1) else { continue };
            match &versions[survivor] {
                Some(sector) => durable.insert(*index, sector.clone()),
                None => durable.remove(index),
            };
        }
        let allocated: BTreeSet<u64> = durable.keys().map(|at| at / ALLOCATION_SECTORS).collect();
        if let Some(capacity) = &capacity {
            let bytes = allocated.len() as u64 * ALLOCATION_SECTORS * SECTOR_BYTES;
            capacity.used.fetch_add(bytes, Ordering::AcqRel);
        }
        let sectors = Sectors { durable, pending: BTreeMap::new(), allocated };
        Self { size: self.size, power, capacity, sectors: Mutex::new(sectors) }
    }

    /// Returns the space it holds; called when the file is removed.
    pub(super) fn give_back_space(&self) {
        let units = std::mem::take(&mut self.lock().allocated).len() as u64;
        if let Some(capacity) = &self.capacity {
            capacity.give_back(units * ALLOCATION_SECTORS * SECTOR_BYTES);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sectors> {
        self.sectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn span(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let end = offset + length;
        assert!(end <= self.size, "{offset}+{length} lies outside {} bytes", self.size);
        assert!(offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES));
        offset / SECTOR_BYTES..end / SECTOR_BYTES
    }

    fn reserve(&self, held: &mut Sectors, span: &std::ops::Range<u64>) -> Result<()> {
        let Some(capacity) = &self.capacity else { return Ok(()) };
        for unit in span.start / ALLOCATION_SECTORS..span.end.div_ceil(ALLOCATION_SECTORS) {
            if !held.allocated.contains(&unit) {
                capacity.take(ALLOCATION_SECTORS * SECTOR_BYTES)?;
                held.allocated.insert(unit);
            }
        }
        Ok(())
    }

    fn free(&self, held: &mut Sectors, span: &std::ops::Range<u64>) {
        let Some(capacity) = &self.capacity else { return };
        for unit in span.start.div_ceil(ALLOCATION_SECTORS)..span.end / ALLOCATION_SECTORS {
            if held.allocated.remove(&unit) {
                capacity.give_back(ALLOCATION_SECTORS * SECTOR_BYTES);
            }
        }
    }
}

fn sector_of(bytes: &[u8]) -> Sector {
    let sector: [u8; SECTOR] = bytes.try_into().expect("a whole sector");
    sector.iter().any(|byte| *byte != 0).then(|| Box::new(sector))
}

impl Sectors {
    fn copy_out(&self, first: u64, buffer: &mut [u8]) {
        for (index, chunk) in (first..).zip(buffer.chunks_exact_mut(SECTOR)) {
            let held = match self.pending.get(&index).and_then(|versions| versions.last()) {
                Some(version) => version.as_ref(),
                None => self.durable.get(&index),
            };
            match held {
                Some(sector) => chunk.copy_from_slice(&sector[..]),
                None => chunk.fill(0),
            }
        }
    }

    fn settle(&mut self) {
        for (index, mut versions) in std::mem::take(&mut self.pending) {
            match versions.pop().expect("a pending sector has a version") {
                Some(sector) => self.durable.insert(index, sector),
                None => self.durable.remove(&index),
            };
        }
    }
}

impl Device for CrashingDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn sector_size(&self) -> u32 {
        512
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let span = self.span(offset, buffer.len() as u64);
        if self.power.is_off() {
            return Err(power_lost());
        }
        self.lock().copy_out(span.start, buffer);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let span = self.span(offset, data.len() as u64);
        let supply = self.power.spend();
        if supply == Supply::Off {
            return Err(power_lost());
        }
        let mut held = self.lock();
        self.reserve(&mut held, &span)?;
        for (index, chunk) in span.zip(data.chunks_exact(SECTOR)) {
            held.pending.entry(index).or_default().push(sector_of(chunk));
        }
        if supply == Supply::Last { Err(power_lost()) } else { Ok(()) }
    }

    fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
        let span = self.span(offset, length);
        let supply = self.power.spend();
        if supply == Supply::Off {
            return Err(power_lost());
        }
        let mut held = self.lock();
        self.free(&mut held, &span);
        for index in span {
            if held.durable.contains_key(&index) || held.pending.contains_key(&index) {
                held.pending.entry(index).or_default().push(None);
            }
        }
        if supply == Supply::Last { Err(power_lost()) } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        match self.power.spend() {
            Supply::On => {
                self.lock().settle();
                Ok(())
            }
            // Whatever of it was done is one of the outcomes that the chooser has anyway.
            Supply::Last | Supply::Off => Err(power_lost()),
        }
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let held = self.lock();
        let from = offset / SECTOR_BYTES;
        let durable = held.durable.range(from..).next().map(|(index, _)| *index);
        let pending = held.pending.range(from..).next().map(|(index, _)| *index);
        let next = durable.into_iter().chain(pending).min();
        Ok(next.map(|index| ByteRange::new(index * SECTOR_BYTES, SECTOR_BYTES)))
    }

    fn answers_at_once(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady() -> CrashingDevice {
        CrashingDevice::new(4096, Power::steady())
    }

    #[test]
    fn what_was_flushed_survives_and_the_rest_as_the_chooser_says() {
        let device = steady();
        device.write_at(0, &[1; 1024]).expect("written");
        device.flush().expect("flushed");
        device.write_at(512, &[2; 1024]).expect("written");
        device.write_at(512, &[3; 512]).expect("written");
        let none = device.crash(&mut |_| 0, Power::steady()).contents();
        assert_eq!(none[..2048], [[1; 512], [1; 512], [0; 512], [0; 512]].concat());
        let first = device.crash(&mut |_| 1, Power::steady()).contents();
        assert_eq!(first[..2048], [[1; 512], [2; 512], [2; 512], [0; 512]].concat());
        let all = device.crash(&mut |versions| versions, Power::steady()).contents();
        assert_eq!(all, device.contents());
        assert_eq!(all[512], 3);
    }

    #[test]
    fn the_power_goes_out_for_all_devices_at_the_chosen_event() {
        let power = Power::failing_at(1, false);
        let one = CrashingDevice::new(512, Arc::clone(&power));
        let other = CrashingDevice::new(512, power);
        one.write_at(0, &[1; 512]).expect("event 0");
        other.write_at(0, &[2; 512]).expect_err("event 1 is interrupted");
        one.flush().expect_err("off");
        one.read_at(0, &mut [0; 512]).expect_err("off");
        let survived = other.crash(&mut |versions| versions, Power::steady());
        assert_eq!(survived.contents(), [2; 512], "an interrupted write may have happened");
    }

    #[test]
    fn a_sector_may_be_what_was_durable_or_what_any_write_since_left() {
        let device = CrashingDevice::from_bytes(&[1; 1024], Power::steady());
        device.write_at(0, &[2; 512]).expect("written");
        device.zero_at(0, 512).expect("zeroed");
        assert_eq!(device.may(0), [[1; 512], [2; 512], [0; 512]]);
        device.replace(0, &[5; 512]);
        assert_eq!((device.may(0), device.may(1)), (vec![[5; 512]], vec![[1; 512]]));
    }

    #[test]
    fn the_power_can_be_told_later_when_to_go_out() {
        let power = Power::steady();
        let device = CrashingDevice::new(512, Arc::clone(&power));
        device.flush().expect("on");
        power.fail_after(1);
        device.flush().expect("on");
        assert!(!power.is_off());
        device.flush().expect_err("it goes out");
        assert!(power.is_off());
    }

    #[test]
    fn zeros_are_lost_like_any_write() {
        let device = CrashingDevice::from_bytes(&[7; 1024], Power::steady());
        device.zero_at(0, 512).expect("zeroed");
        assert_eq!(device.contents()[..512], [0; 512]);
        assert_eq!(device.crash(&mut |_| 0, Power::steady()).contents(), [7; 1024]);
    }

    #[test]
    fn a_full_capacity_refuses_new_pages_until_some_are_given_back() {
        let capacity = Capacity::new(4096);
        let device =
            CrashingDevice::with_capacity(16384, Power::steady(), Some(Arc::clone(&capacity)));
        device.write_at(0, &[1; 512]).expect("the first page");
        device.write_at(512, &[1; 512]).expect("the same page");
        assert_eq!(device.write_at(8192, &[1; 512]).expect_err("full").errno(), Some(28));
        device.zero_at(0, 4096).expect("given back");
        device.write_at(8192, &[1; 512]).expect("room again");
    }
}
