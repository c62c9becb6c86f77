//! The overwrite map of a primary: what is current, what only the link may supply, what the
//! backup lacks.
//!
//! | current | link-only | unsent | state of the block |
//! |---|---|---|---|
//! | 0 | 0 | 0 | missing |
//! | 0 | 1 | 0 | missing, a bundle must not supply it (law 5) |
//! | 1 | any | 0 | current |
//! | 1 | any | 1 | current, the backup may lack it |
//!
//! Guarantees: opening after an unclean stop applies rules R1 to R5: every missing block in a hot
//! extent becomes link-only, every current one there unsent, durably, before anything is served.
//! Does not know: devices of volumes, requests, the link.

use std::sync::Arc;

use uuid::Uuid;

use super::file::{Damage, MapFile};
use super::intent::Intents;
use crate::bitmap::Bitmap;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::format::map::{MapIdentity, MapRole};
use crate::limits::HOT_EXTENT_BYTES;
use crate::units::{Cut, CutSpan, Geometry};

/// Planes of the map file.
pub const CURRENT: usize = 0;
pub const LINK_ONLY: usize = 1;
pub const UNSENT: usize = 2;

/// What opening after an unclean stop had to assume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Blocks that became link-only: fetched over the link, never taken from a bundle.
    pub link_only_blocks: u64,
    /// Current blocks that became unsent, though nothing says that they were written: they are
    /// sent again. The backup should hold them all the same.
    pub presumed_unsent: Vec<BlockRange>,
    /// Current blocks that became unsent because the page that tells was damaged: of these nobody
    /// knows what the backup holds.
    pub unsent_by_damage: u64,
    /// Pages of the map that were damaged.
    pub damaged_pages: u64,
}

impl Recovery {
    /// Current blocks that became unsent.
    #[must_use]
    pub fn unsent_blocks(&self) -> u64 {
        let presumed: u64 = self.presumed_unsent.iter().map(|run| run.count()).sum();
        presumed + self.unsent_by_damage
    }
}

/// See the module.
#[derive(Debug)]
pub struct OverwriteMap {
    file: MapFile,
    geometry: Geometry,
}

impl OverwriteMap {
    #[must_use]
    pub fn bytes_needed(geometry: Geometry) -> u64 {
        MapFile::bytes_needed(geometry, MapRole::Overwrite)
    }

    /// A new map with every block missing.
    pub fn create(device: Arc<dyn Device>, identity: MapIdentity) -> Result<Self> {
        let file = MapFile::create(device, identity, MapRole::Overwrite)?;
        Ok(Self { file, geometry: identity.geometry })
    }

    /// A new map with every block current, and unsent if the backup has nothing yet.
    pub fn create_current(
        device: Arc<dyn Device>,
        identity: MapIdentity,
        unsent: bool,
    ) -> Result<Self> {
        let base = [true, false, unsent];
        let file = MapFile::create_filled(device, identity, MapRole::Overwrite, &base)?;
        Ok(Self { file, geometry: identity.geometry })
    }

    /// Opens a map and makes it safe by what the intent log says (`None`: there is no log, the map
    /// is used offline, where nothing is written without its bits).
    pub fn open(device: Arc<dyn Device>, intents: Option<&Intents>) -> Result<(Self, Recovery)> {
        let (file, damage) = MapFile::open_damaged(device, MapRole::Overwrite)?;
        let geometry = file.identity().geometry;
        let map = Self { file, geometry };
        let recovery = map.recover(&damage, intents)?;
        Ok((map, recovery))
    }

    fn recover(&self, damage: &Damage, intents: Option<&Intents>) -> Result<Recovery> {
        let mut recovery = Recovery {
            damaged_pages: (damage.suspect.len() + damage.lost.len()) as u64,
            ..Recovery::default()
        };
        for (plane, blocks) in damage.suspect.iter().chain(&damage.lost) {
            if *plane == UNSENT {
                let presumed = self.presume_unsent(*blocks);
                recovery.unsent_by_damage += presumed.iter().map(|run| run.count()).sum::<u64>();
            } else {
                recovery.link_only_blocks += self.presume_link_only(*blocks);
            }
        }
        for (plane, blocks) in &damage.lost {
            if *plane == CURRENT && self.file.plane(UNSENT).any_set(*blocks) {
                return Err(Error::integrity(format!(
                    "the map page that says which of the blocks {} to {} are current is lost, and \
                     some of them were never sent to the backup; declare what is lost with \
                     restore --lost",
                    blocks.start, blocks.end
                )));
            }
        }
        self.refuse_forgotten_writes(damage, intents)?;
        match intents {
            None => {}
            Some(Intents::Unknown) => self.presume(self.geometry.all_blocks(), &mut recovery),
            Some(Intents::Hot(extents)) => {
                for extent in extents {
                    let bytes =
                        ByteRange::new(u64::from(*extent) * HOT_EXTENT_BYTES, HOT_EXTENT_BYTES);
                    let inside = bytes.intersect(self.geometry.all_bytes());
                    if let Some(inside) = inside {
                        self.presume(self.geometry.touched(inside), &mut recovery);
                    }
                }
            }
        }
        // A write that did not reach its local end leaves `unsent` on a missing block: the backup
        // is right for it (I10).
        let all = self.geometry.all_blocks();
        let stray: Vec<_> = self
            .file
            .plane(UNSENT)
            .runs(all, true)
            .flat_map(|run| self.file.plane(CURRENT).runs(run, false).collect::<Vec<_>>())
            .collect();
        for run in stray {
            self.file.fill(UNSENT, run, false);
        }
        self.file.commit_all()?;
        Ok(recovery)
    }

    /// A crash may tear a page of a commit that nobody was told of; what that page spoke of lies in
    /// hot extents. Elsewhere a block that is unsent and not current was current in the copy of the
    /// page that is damaged: its bytes are nowhere but here, and taking those of the backup would
    /// lose them in silence (law 3).
    fn refuse_forgotten_writes(&self, damage: &Damage, intents: Option<&Intents>) -> Result<()> {
        let is_hot = |extent: u64| match intents {
            Some(Intents::Unknown) => true,
            Some(Intents::Hot(extents)) => extents.iter().any(|hot| u64::from(*hot) == extent),
            None => false,
        };
        for (_, blocks) in damage.suspect.iter().filter(|(plane, _)| *plane == CURRENT) {
            let unsent = self.file.plane(UNSENT).runs(*blocks, true);
            for run in unsent.flat_map(|run| self.file.plane(CURRENT).runs(run, false)) {
                let bytes = self.geometry.bytes_of(run);
                let last = (bytes.end() - 1) / HOT_EXTENT_BYTES;
                if (bytes.offset / HOT_EXTENT_BYTES..=last).all(is_hot) {
                    continue;
                }
                return Err(Error::integrity(format!(
                    "the map page that says which of the blocks {} to {} are current is damaged, \
                     and blocks {} to {} were never sent to the backup; declare what is lost with \
                     restore --lost",
                    blocks.start, blocks.end, run.start, run.end
                )));
            }
        }
        Ok(())
    }

    fn presume(&self, blocks: BlockRange, recovery: &mut Recovery) {
        recovery.link_only_blocks += self.presume_link_only(blocks);
        recovery.presumed_unsent.extend(self.presume_unsent(blocks));
    }

    fn presume_link_only(&self, blocks: BlockRange) -> u64 {
        let missing: Vec<_> = self.file.plane(CURRENT).runs(blocks, false).collect();
        missing.into_iter().map(|run| self.file.fill(LINK_ONLY, run, true)).sum()
    }

    /// Returns the runs that were not unsent before.
    fn presume_unsent(&self, blocks: BlockRange) -> Vec<BlockRange> {
        let unsent = self.file.plane(UNSENT);
        let presumed: Vec<_> = self
            .file
            .plane(CURRENT)
            .runs(blocks, true)
            .flat_map(|run| unsent.runs(run, false).collect::<Vec<_>>())
            .collect();
        for run in &presumed {
            self.file.fill(UNSENT, *run, true);
        }
        presumed
    }

    #[must_use]
    pub fn file(&self) -> &MapFile {
        &self.file
    }

    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[must_use]
    pub fn identity(&self) -> MapIdentity {
        self.file.identity()
    }

    #[must_use]
    pub fn current(&self) -> &Arc<Bitmap> {
        self.file.plane(CURRENT)
    }

    #[must_use]
    pub fn link_only(&self) -> &Arc<Bitmap> {
        self.file.plane(LINK_ONLY)
    }

    #[must_use]
    pub fn unsent(&self) -> &Arc<Bitmap> {
        self.file.plane(UNSENT)
    }

    /// The block's bytes are right here. Link-only stays: were it cleared, a crash could keep that
    /// and lose that the block is current, and a bundle would supply it (law 5).
    pub fn mark_current(&self, blocks: BlockRange) {
        self.file.fill(CURRENT, blocks, true);
    }

    /// These blocks are missing from now on. Durable when it returns.
    pub fn make_missing(&self, runs: &[BlockRange]) -> Result<()> {
        for run in runs {
            self.file.fill(CURRENT, *run, false);
        }
        self.file.commit_all()
    }

    /// The block's bytes here are not to be trusted and the backup has newer ones than any bundle.
    pub fn demote(&self, blocks: BlockRange) {
        self.file.fill(LINK_ONLY, blocks, true);
        self.file.fill(CURRENT, blocks, false);
    }

    /// Bytes of the runs of `plane` that equal `value`, the tail clipped.
    fn bytes_where(&self, plane: usize, value: bool) -> u64 {
        let blocks = self.geometry.blocks();
        let bits = self.file.plane(plane);
        let set = bits.count_all();
        let count = if value { set } else { blocks - set };
        let size = self.geometry.block_size().bytes();
        let short = blocks * size - self.geometry.size();
        count * size - if bits.get(blocks - 1) == value { short } else { 0 }
    }

    #[must_use]
    pub fn current_bytes(&self) -> u64 {
        self.bytes_where(CURRENT, true)
    }

    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        self.bytes_where(CURRENT, false)
    }

    /// Bytes of the missing blocks that no bundle may supply.
    #[must_use]
    pub fn link_only_bytes(&self) -> u64 {
        let missing = self.current().runs(self.geometry.all_blocks(), false);
        let runs = missing.flat_map(|run| self.link_only().runs(run, true));
        runs.map(|run| self.geometry.bytes_of(run).length).sum()
    }

    #[must_use]
    pub fn unsent_bytes(&self) -> u64 {
        self.bytes_where(UNSENT, true)
    }

    /// The runs inside `blocks` that a bundle may supply: missing and not link-only.
    #[must_use]
    pub fn wanted(&self, blocks: BlockRange) -> Vec<BlockRange> {
        let missing = self.current().runs(blocks, false);
        missing.flat_map(|run| self.link_only().runs(run, false)).collect()
    }

    /// The runs inside `blocks` that only the link may supply: missing and link-only.
    #[must_use]
    pub fn in_doubt(&self, blocks: BlockRange) -> Vec<BlockRange> {
        let link_only = self.link_only();
        self.current()
            .runs(blocks, false)
            .flat_map(|run| link_only.runs(run, true).collect::<Vec<_>>())
            .collect()
    }

    /// A new life of the volume in which every block is missing (`current` false), or current and
    /// unsent or not. One durable step for any size. Nothing may change bits meanwhile.
    pub fn begin_generation(&self, generation: u64, current: bool, unsent: bool) -> Result<()> {
        self.file.reset(self.identity().volume, generation, &[current, false, unsent])
    }

    /// A new life of the volume in which these blocks are missing and the rest is as it was.
    /// Durable when it returns.
    pub fn begin_generation_without(&self, generation: u64, lost: &[BlockRange]) -> Result<()> {
        // First, so that after a crash in between no bundle of the life before is merged.
        self.file.set_generation(generation)?;
        for blocks in lost {
            self.file.fill(CURRENT, *blocks, false);
            self.file.fill(LINK_ONLY, *blocks, false);
            self.file.fill(UNSENT, *blocks, false);
        }
        self.file.commit_all()
    }

    /// A map that is bound to no volume becomes that of a replica of this cut. Refused once a
    /// block is current: what its pages vouch for may be of any volume. Nothing may change bits
    /// meanwhile.
    pub fn bind(&self, volume: Uuid, cut: Cut) -> Result<()> {
        let held = self.identity().volume;
        if !held.is_nil() {
            return Err(Error::identity(format!(
                "expected a map that is bound to no volume, found that of volume {held}"
            )));
        }
        let current = self.current_bytes();
        if current > 0 {
            return Err(Error::identity(format!(
                "the map is bound to no volume and {current} bytes are current in it already, \
                 perhaps of another volume than {volume}: make it with `map create --volume \
                 {volume} --generation {}`, mark what is current there, and merge again",
                cut.generation
            )));
        }
        // First, so that after a crash in between the map is still bound to none.
        self.file.set_span(CutSpan { oldest: cut, newest: cut })?;
        self.file.reset(volume, cut.generation, &[false; 3])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{CrashingDevice, Power, RamDevice};
    use crate::units::BlockSize;

    fn geometry() -> Geometry {
        Geometry::new((8 << 20) + 512, BlockSize::DEFAULT).expect("valid")
    }

    fn create() -> (Arc<RamDevice>, OverwriteMap) {
        let device = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry())));
        let identity =
            MapIdentity { volume: Uuid::from_u128(1), geometry: geometry(), generation: 1 };
        let map = OverwriteMap::create(Arc::clone(&device) as _, identity).expect("created");
        (device, map)
    }

    #[test]
    fn bytes_count_a_short_tail_as_it_is() {
        let (_, map) = create();
        assert_eq!(map.missing_bytes(), (8 << 20) + 512);
        map.mark_current(BlockRange::new(2047, 2049));
        assert_eq!(map.current_bytes(), 4096 + 512);
        assert_eq!(map.missing_bytes(), (8 << 20) - 4096);
    }

    #[test]
    fn after_an_unclean_stop_hot_extents_are_link_only_or_unsent() {
        let (device, map) = create();
        map.mark_current(BlockRange::new(256, 300));
        map.file().commit_all().expect("committed");
        let hot = Intents::Hot(vec![1]);
        let (map, recovery) = OverwriteMap::open(device, Some(&hot)).expect("opens");
        assert_eq!(recovery.presumed_unsent, [BlockRange::new(256, 300)]);
        assert_eq!(recovery.unsent_blocks(), 44);
        assert_eq!(recovery.link_only_blocks, 256 - 44);
        assert!(map.wanted(BlockRange::new(256, 512)).is_empty());
        assert_eq!(map.wanted(geometry().all_blocks()).len(), 2);
    }

    #[test]
    fn unsent_on_a_missing_block_is_cleared_on_opening() {
        let (device, map) = create();
        map.file().fill(UNSENT, BlockRange::new(3, 5), true);
        map.file().commit_all().expect("committed");
        let (map, _) = OverwriteMap::open(device, None).expect("opens");
        assert_eq!(map.unsent().count_all(), 0);
    }

    #[test]
    fn a_lost_page_over_unsent_blocks_is_refused() {
        let (device, map) = create();
        map.mark_current(BlockRange::new(0, 10));
        map.file().fill(UNSENT, BlockRange::new(3, 5), true);
        map.file().commit_all().expect("committed");
        device.write_at(8192, &[9; 512]).expect("ram");
        device.write_at(8192 + 4096, &[9; 512]).expect("ram");
        let error = OverwriteMap::open(Arc::clone(&device) as _, None).expect_err("lost page");
        assert!(error.to_string().contains("never sent"), "{error}");
    }

    #[test]
    fn law_3_a_rotten_page_over_blocks_that_only_the_primary_has_is_refused_and_not_guessed_at() {
        let (device, map) = create();
        map.mark_current(BlockRange::new(0, 3));
        map.file().commit_all().expect("committed");
        map.mark_current(BlockRange::new(3, 5));
        map.file().fill(UNSENT, BlockRange::new(3, 5), true);
        map.file().commit_all().expect("committed");
        // The newer copy of the page of current blocks.
        device.write_at(8192 + 4096, &[9; 512]).expect("ram");
        for intents in [None, Some(Intents::Hot(vec![])), Some(Intents::Hot(vec![1]))] {
            let opened = OverwriteMap::open(Arc::clone(&device) as _, intents.as_ref());
            let error = opened.expect_err("which are current is forgotten");
            assert!(error.to_string().contains("blocks 3 to 5"), "{error}");
        }
        // In a hot extent it may be a commit that a crash tore: nobody was told that it was done.
        let torn = Intents::Hot(vec![0]);
        let (map, recovery) = OverwriteMap::open(device, Some(&torn)).expect("opens");
        assert_eq!((recovery.damaged_pages, map.unsent().get(3)), (1, false));
    }

    #[test]
    fn blocks_that_a_rotten_page_makes_unsent_are_not_said_to_be_at_the_backup() {
        let (device, map) = create();
        map.mark_current(BlockRange::new(0, 5));
        map.file().fill(UNSENT, BlockRange::new(0, 1), true);
        map.file().commit_all().expect("committed");
        map.file().fill(UNSENT, BlockRange::new(1, 5), true);
        map.file().commit_all().expect("committed");
        let pair = 2 * 4096;
        device.write_at(8192 + 2 * pair + 4096, &[9; 512]).expect("ram");
        let hot = Intents::Hot(vec![0]);
        let (map, recovery) = OverwriteMap::open(device, Some(&hot)).expect("opens");
        assert_eq!(map.unsent().count_all(), 5);
        assert_eq!((recovery.presumed_unsent.len(), recovery.unsent_by_damage), (0, 4));
        assert_eq!(recovery.unsent_blocks(), 4);
    }

    /// Lets `change` be committed with the power going out at every event, with any mixture of
    /// what was not flushed left on disk; `check` sees what is opened afterwards.
    fn at_every_crash(
        prepare: impl Fn(&OverwriteMap),
        change: impl Fn(&OverwriteMap),
        check: impl Fn(&OverwriteMap),
    ) {
        // A page whose bits lie in several sectors, so that it can be torn.
        let small = BlockSize::new(512).expect("a power of two");
        let geometry = Geometry::new(8 << 20, small).expect("valid");
        let bytes = OverwriteMap::bytes_needed(geometry);
        let first = CrashingDevice::new(bytes, Power::steady());
        let identity = MapIdentity { volume: Uuid::from_u128(1), geometry, generation: 1 };
        let first = Arc::new(first);
        let map = OverwriteMap::create(Arc::clone(&first) as _, identity).expect("created");
        prepare(&map);
        map.file().commit_all().expect("committed");
        let none = Intents::Hot(vec![]);
        let mut finished = false;
        for event in 0.. {
            for seed in 0..24_u64 {
                let power = Power::failing_at(u64::MAX, true);
                let device = Arc::new(first.crash(&mut |_| 0, Arc::clone(&power)));
                let opened = OverwriteMap::open(Arc::clone(&device) as _, Some(&none));
                let (map, _) = opened.expect("opens");
                power.fail_after(event);
                change(&map);
                finished = map.file().commit_all().is_ok();
                let mut state = seed;
                let mut choose = |most: usize| {
                    state = (state + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
                    if state % 2 == 1 { most } else { 0 }
                };
                let device = Arc::new(device.crash(&mut choose, Power::steady()));
                let (map, _) = OverwriteMap::open(device, Some(&none)).expect("opens");
                check(&map);
            }
            if finished {
                return;
            }
        }
    }

    #[test]
    fn a_link_only_block_that_became_current_is_never_wanted_whatever_a_crash_keeps() {
        at_every_crash(
            |map| map.demote(BlockRange::one(7)),
            |map| map.mark_current(BlockRange::one(7)),
            |map| assert!(map.wanted(BlockRange::one(7)).is_empty()),
        );
    }

    #[test]
    fn a_demoted_block_is_never_wanted_whatever_a_crash_keeps() {
        at_every_crash(
            |map| {
                map.mark_current(BlockRange::new(0, 9));
                map.demote(BlockRange::one(100));
            },
            |map| map.demote(BlockRange::one(7)),
            |map| assert!(map.wanted(BlockRange::one(7)).is_empty()),
        );
    }

    #[test]
    fn a_first_commit_of_unsent_writes_opens_whatever_a_crash_keeps() {
        at_every_crash(
            |_| {},
            |map| {
                for block in [7, 9_000] {
                    map.mark_current(BlockRange::one(block));
                    map.file().fill(UNSENT, BlockRange::one(block), true);
                }
            },
            |map| assert!(map.current_bytes() <= 1024),
        );
    }

    #[test]
    fn an_unbound_map_is_bound_once_and_only_while_nothing_is_current() {
        let device = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry())));
        let identity = MapIdentity { volume: Uuid::nil(), geometry: geometry(), generation: 1 };
        let map = OverwriteMap::create(Arc::clone(&device) as _, identity).expect("created");
        let volume = Uuid::from_u128(8);
        map.mark_current(BlockRange::one(3));
        let cut = Cut { generation: 5, sequence: 7 };
        let refused = map.bind(volume, cut).expect_err("a block is current");
        assert_eq!(refused.kind(), crate::error::ErrorKind::Identity);
        assert!(refused.to_string().contains(&volume.to_string()), "{refused}");
        let map = OverwriteMap::create(Arc::clone(&device) as _, identity).expect("created");
        map.bind(volume, cut).expect("bound");
        assert_eq!(map.file().span(), Some(CutSpan { oldest: cut, newest: cut }));
        assert!(map.bind(Uuid::from_u128(9), cut).is_err(), "once");
        let (map, _) = OverwriteMap::open(device, None).expect("opens");
        assert_eq!(map.identity(), MapIdentity { volume, generation: 5, ..identity });
    }
}
