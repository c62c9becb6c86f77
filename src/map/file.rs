//! A map file: planes of bits whose changes become durable in commits.
//!
//! | step | who | guarantee |
//! |---|---|---|
//! | `fill` | any thread | bits change in memory; their pages await a commit |
//! | `capture` | committer | copies of waiting pages; later changes await the next commit (R2) |
//! | device flush | **caller** | the data that the captured bits speak of is durable (R1) |
//! | `commit` | committer | the copies are written to the older slots and flushed |
//!
//! Guarantees: a crash at any point leaves every page as some commit wrote it; the slot that was
//! valid stays so until the newer one is durable. The first commit of a page writes both slots, one
//! after the other, so that a page torn by a crash is told from one that was lost. After a failed
//! commit the map refuses further ones (law 11). Opening reads the pages that exist, no more.
//! Does not know: what the planes mean, when to commit.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::header::{HEADER_BYTES, Headers};
use crate::bitmap::Bitmap;
use crate::device::{AlignedBuffer, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BlockRange;
use crate::format::map::{MapHeader, MapIdentity, MapPage, MapRole, SLOT_BYTES, Slot};
use crate::units::Geometry;

/// See the module.
#[derive(Debug)]
pub struct MapFile {
    device: Arc<dyn Device>,
    role: MapRole,
    pub(super) planes: Vec<Arc<Bitmap>>,
    pub(super) waiting: Mutex<Waiting>,
    pub(super) durable: Mutex<Durable>,
    /// Held from capture to commit by `commit_all`, so that no older copy follows a newer one.
    committing: Mutex<()>,
    poisoned: AtomicBool,
}

/// Pages that changed since they were captured, per plane.
#[derive(Debug)]
pub(super) struct Waiting {
    pub pages: Vec<BTreeSet<usize>>,
}

#[derive(Debug)]
pub(super) struct Durable {
    pub headers: Headers,
    /// Sequence of the latest commit.
    pub sequence: u64,
    /// Per plane and page: the slot that is valid, if any.
    pub slots: Vec<Vec<Option<u8>>>,
}

/// Copies of pages, taken at one moment.
#[derive(Debug)]
pub struct Capture {
    pages: Vec<CapturedPage>,
}

#[derive(Debug)]
struct CapturedPage {
    plane: usize,
    index: usize,
    words: Box<[u64; crate::bitmap::PAGE_WORDS]>,
}

impl Capture {
    /// Pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// What opening found damaged: the caller decides what the bits there must be taken for.
#[derive(Debug, Default)]
pub struct Damage {
    /// One slot of the page is valid, the other was torn (or rotted): perhaps an older state.
    pub suspect: Vec<(usize, BlockRange)>,
    /// No slot is valid though one was written: the bits are lost and read as clear.
    pub lost: Vec<(usize, BlockRange)>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MapFile {
    /// Bytes of the sparse file that holds such a map.
    #[must_use]
    pub fn bytes_needed(geometry: Geometry, role: MapRole) -> u64 {
        let pages = geometry.blocks().div_ceil(crate::bitmap::PAGE_BITS);
        HEADER_BYTES + pages * role.planes() as u64 * 2 * SLOT_BYTES as u64
    }

    /// Writes a new map with every bit clear over a device that reads as zeros. Durable when it
    /// returns.
    pub fn create(device: Arc<dyn Device>, identity: MapIdentity, role: MapRole) -> Result<Self> {
        Self::create_filled(device, identity, role, &vec![false; role.planes()])
    }

    /// As `create`, with every bit of plane `p` equal to `base[p]`.
    pub fn create_filled(
        device: Arc<dyn Device>,
        identity: MapIdentity,
        role: MapRole,
        base: &[bool],
    ) -> Result<Self> {
        assert_eq!(base.len(), role.planes(), "a base for each plane");
        let needed = Self::bytes_needed(identity.geometry, role);
        if device.size() < needed {
            return Err(Error::usage(format!(
                "a map of this volume needs {needed} bytes, the file has {}",
                device.size()
            )));
        }
        let header = MapHeader {
            identity,
            role,
            sequence: 1,
            void_through: 0,
            base: std::array::from_fn(|plane| base.get(plane).copied().unwrap_or(false)),
            span: None,
        };
        let headers = Headers::create(&*device, header)?;
        Ok(Self::assemble(device, headers))
    }

    fn assemble(device: Arc<dyn Device>, headers: Headers) -> Self {
        let header = headers.newest;
        let blocks = header.identity.geometry.blocks();
        let count = header.role.planes();
        let planes: Vec<_> =
            (0..count).map(|p| Arc::new(Bitmap::new(blocks, header.base[p]))).collect();
        let pages = planes[0].pages();
        Self {
            device,
            role: header.role,
            waiting: Mutex::new(Waiting { pages: vec![BTreeSet::new(); count] }),
            durable: Mutex::new(Durable {
                headers,
                sequence: header.void_through,
                slots: vec![vec![None; pages]; count],
            }),
            planes,
            committing: Mutex::default(),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Opens a map of the given role; fails if any page is lost. For maps whose owner can say what
    /// lost bits mean there is `open_damaged`.
    pub fn open(device: Arc<dyn Device>, role: MapRole) -> Result<Self> {
        let (map, damage) = Self::open_damaged(device, role)?;
        match damage.lost.first() {
            None => Ok(map),
            Some((plane, blocks)) => Err(Error::integrity(format!(
                "the map is damaged: expected a valid copy of the page for blocks {} to {} of \
                 plane {plane}, found none; bring the file back, or make a new map",
                blocks.start, blocks.end
            ))),
        }
    }

    /// Opens a map and tells which pages are damaged.
    pub fn open_damaged(device: Arc<dyn Device>, role: MapRole) -> Result<(Self, Damage)> {
        let headers = Headers::read(&*device)?;
        let header = headers.newest;
        if header.role != role {
            return Err(Error::identity(format!(
                "expected a map of role {role:?}, found one of role {:?}: name another file",
                header.role
            )));
        }
        let needed = Self::bytes_needed(header.identity.geometry, role);
        if device.size() < needed {
            return Err(Error::integrity(format!(
                "the map is truncated: expected {needed} bytes, found {}; bring the whole file \
                 back, or make a new map",
                device.size()
            )));
        }
        // Whoever held the file before may have ended between writing a page and its flush, or with
        // a flush that failed: what is read here counts as committed, so it is made durable first.
        device.flush()?;
        let map = Self::assemble(device, headers);
        let damage = map.read_pages(needed)?;
        Ok((map, damage))
    }

    fn read_pages(&self, end: u64) -> Result<Damage> {
        const READ_BYTES: u64 = 1 << 20;
        let mut damage = Damage::default();
        let mut durable = lock(&self.durable);
        let pair = 2 * SLOT_BYTES as u64;
        // A small map is read whole; nothing larger is made for it.
        let mut buffer = AlignedBuffer::zeroed(READ_BYTES.min(end - HEADER_BYTES) as usize);
        let mut at = HEADER_BYTES;
        while let Some(data) = self.device.next_data(at)?.filter(|data| data.offset < end) {
            // Whole pairs of slots, from the one that the stretch begins in.
            let start =
                at.max(HEADER_BYTES + (data.offset.max(HEADER_BYTES) - HEADER_BYTES) / pair * pair);
            let stop =
                (data.end().max(start + 1) - HEADER_BYTES).next_multiple_of(pair) + HEADER_BYTES;
            at = stop.min(end).min(start + READ_BYTES);
            let bytes = &mut buffer[..(at - start) as usize];
            self.device.read_at(start, bytes)?;
            let first = ((start - HEADER_BYTES) / pair) as usize;
            for (pair_index, slots) in bytes.chunks_exact(pair as usize).enumerate() {
                self.read_pair(first + pair_index, slots, &mut durable, &mut damage)?;
            }
        }
        Ok(damage)
    }

    fn read_pair(
        &self,
        at: usize,
        slots: &[u8],
        durable: &mut Durable,
        damage: &mut Damage,
    ) -> Result<()> {
        let pages = self.planes[0].pages();
        let (plane, index) = (at / pages, at % pages);
        let header = durable.headers.newest;
        let volume = header.identity.volume;
        let mut best: Option<(u8, MapPage)> = None;
        let mut damaged = [false; 2];
        for (slot, bytes) in slots.chunks_exact(SLOT_BYTES).enumerate() {
            let bytes: &[u8; SLOT_BYTES] = bytes.try_into().expect("exact chunks");
            match MapPage::decode(bytes, plane, index, volume) {
                Slot::Empty => {}
                Slot::Damaged(_) => damaged[slot] = true,
                Slot::Unknown(error) => return Err(error),
                Slot::Valid(page) if page.sequence <= header.void_through => {}
                Slot::Valid(page) => {
                    if best.as_ref().is_none_or(|(_, held)| held.sequence < page.sequence) {
                        best = Some((slot as u8, page));
                    }
                }
            }
        }
        let blocks = self.planes[plane].page_range(index);
        let loaded = best.as_ref().and_then(|(slot, page)| {
            self.planes[plane].load_page(index, &page.words).map(|()| (*slot, page.sequence))
        });
        match loaded {
            Some((slot, sequence)) => {
                durable.slots[plane][index] = Some(slot);
                durable.sequence = durable.sequence.max(sequence);
                if damaged[0] || damaged[1] {
                    damage.suspect.push((plane, blocks));
                }
            }
            None if damaged[0] || best.is_some() => damage.lost.push((plane, blocks)),
            // Slot 1 is written before slot 0 ever is: a crash tore the very first commit.
            None => {}
        }
        Ok(())
    }

    /// Whether no map was ever completed there: what a crash within `create` leaves.
    pub fn is_unfinished(device: &dyn Device) -> Result<bool> {
        Headers::are_unfinished(device)
    }

    /// Whose map it is, without reading its pages.
    pub fn read_identity(device: &dyn Device) -> Result<MapIdentity> {
        Ok(Headers::read(device)?.newest.identity)
    }

    #[must_use]
    pub fn identity(&self) -> MapIdentity {
        lock(&self.durable).headers.newest.identity
    }

    /// The bits of a plane, to be read freely; changes go through `fill`.
    #[must_use]
    pub fn plane(&self, plane: usize) -> &Arc<Bitmap> {
        &self.planes[plane]
    }

    /// Changes bits and remembers their pages for the next commit; returns how many changed.
    pub fn fill(&self, plane: usize, blocks: BlockRange, value: bool) -> u64 {
        let mut waiting: Option<MutexGuard<'_, Waiting>> = None;
        self.planes[plane].fill_with(blocks, value, |page| {
            waiting.get_or_insert_with(|| lock(&self.waiting)).pages[plane].insert(page);
        })
    }

    #[must_use]
    pub fn has_uncommitted(&self) -> bool {
        lock(&self.waiting).pages.iter().any(|pages| !pages.is_empty())
    }

    /// Copies of at most `pages_max` waiting pages, of all planes alike.
    #[must_use]
    pub fn capture(&self, pages_max: usize) -> Capture {
        let leading = leading_plane(self.role);
        let mut waiting = lock(&self.waiting);
        let mut pages = Vec::new();
        let mut sets: Vec<_> = waiting.pages.iter_mut().enumerate().collect();
        sets.sort_by_key(|(plane, _)| Some(*plane) != leading);
        for (plane, set) in sets {
            while pages.len() < pages_max {
                let Some(index) = set.pop_first() else { break };
                pages.push(CapturedPage {
                    plane,
                    index,
                    words: self.planes[plane].copy_page(index),
                });
            }
        }
        Capture { pages }
    }

    /// Writes the captured pages to their older slots and flushes. The caller has flushed the
    /// volume's device between `capture` and this (R1). One commit at a time.
    pub fn commit(&self, capture: &Capture) -> Result<()> {
        let mut durable = lock(&self.durable);
        self.check_poisoned()?;
        if capture.is_empty() {
            return Ok(());
        }
        let result = self.write_pages(&durable, capture);
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
            return result;
        }
        durable.sequence += 1;
        for page in &capture.pages {
            let slot = &mut durable.slots[page.plane][page.index];
            *slot = Some(other_slot(*slot));
        }
        Ok(())
    }

    fn write_pages(&self, durable: &Durable, capture: &Capture) -> Result<()> {
        let leading = leading_plane(self.role);
        let (first, rest): (Vec<_>, Vec<_>) =
            capture.pages.iter().partition(|page| Some(page.plane) == leading);
        for group in [first, rest] {
            // Unless slot 1 holds it already, a torn first slot 0 would look like a lost page.
            let born = |page: &&&CapturedPage| durable.slots[page.plane][page.index].is_none();
            self.write_slots(durable, group.iter().filter(born).map(|page| (*page, 1)))?;
            self.write_slots(
                durable,
                group.iter().map(|page| (*page, other_slot(durable.slots[page.plane][page.index]))),
            )?;
        }
        Ok(())
    }

    /// Writes each page to the slot and flushes, if there are any.
    fn write_slots<'a>(
        &self,
        durable: &Durable,
        pages: impl Iterator<Item = (&'a CapturedPage, u8)>,
    ) -> Result<()> {
        let mut any = false;
        for (page, slot) in pages {
            let encoded = MapPage {
                plane: page.plane,
                index: page.index,
                volume: durable.headers.newest.identity.volume,
                sequence: durable.sequence + 1,
                words: page.words.clone(),
            }
            .encode();
            self.device.write_at(self.position(page.plane, page.index, slot), &encoded)?;
            any = true;
        }
        if any { self.device.flush() } else { Ok(()) }
    }

    fn position(&self, plane: usize, index: usize, slot: u8) -> u64 {
        let pair = (plane * self.planes[0].pages() + index) as u64;
        HEADER_BYTES + (pair * 2 + u64::from(slot)) * SLOT_BYTES as u64
    }

    /// Captures and commits everything that waits. For callers that have no device to flush in
    /// between, or have just flushed it with no change since. Several may do so at a time.
    pub fn commit_all(&self) -> Result<()> {
        let _one_at_a_time = lock(&self.committing);
        self.check_poisoned()?;
        while self.has_uncommitted() {
            self.commit(&self.capture(crate::limits::COMMIT_PAGES_MAX))?;
        }
        Ok(())
    }

    pub(super) fn write_header(&self, durable: &mut Durable, mut header: MapHeader) -> Result<()> {
        header.sequence += 1;
        let written = durable.headers.write(&*self.device, header);
        if written.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        written
    }

    pub(super) fn check_poisoned(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "a write to the map failed earlier; reopen it after mending its disk",
            ));
        }
        Ok(())
    }
}

/// The plane whose pages of a commit are durable before those of the others are written: a block
/// never stops being current before it is durably link-only (law 5).
fn leading_plane(role: MapRole) -> Option<usize> {
    (role == MapRole::Overwrite).then_some(super::overwrite::LINK_ONLY)
}

fn other_slot(slot: Option<u8>) -> u8 {
    slot.map_or(0, |slot| 1 - slot)
}

#[cfg(test)]
mod tests;
