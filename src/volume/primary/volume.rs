//! A volume in the role primary: its files, its life before and after the operator's word, and
//! what it offers to applications.
//!
//! | on disk | state | what it takes to go on |
//! |---|---|---|
//! | no map, device made empty by us | live at once, generation 0: both sides empty | |
//! | no map, anything else | waiting | the operator's word (`restore`) |
//! | a map | live | |
//!
//! Generation 0 says that neither side ever held anything; a backup accepts it only if it is empty
//! itself. Guarantees law 12 for its files. Does not know: NBD, the link's bytes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use uuid::Uuid;

use super::acquaintance::{Acquaintance, Introduction};
use super::attaching::Attachment;
use super::driver::Driver;
use super::event::Options;
use super::state::{Counters, Primary};
use crate::device::{Device, Directory, digest};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::map::{
    INTENT_LOG_NAME, IntentLog, Intents, MapFile, MapIdentity, OVERWRITE_MAP_NAME, OverwriteMap,
    Recovery,
};
use crate::units::Geometry;
use crate::volume::engine::Engine;

const MAP: &str = OVERWRITE_MAP_NAME;
const INTENT: &str = INTENT_LOG_NAME;
const QUIESCE: Duration = Duration::from_secs(30);

/// What the operator says was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The backup is the truth.
    All,
    /// The primary is the truth.
    None,
    Ranges(Vec<ByteRange>),
}

/// See the module.
#[derive(Debug)]
pub struct PrimaryVolume {
    name: String,
    directory: Arc<dyn Directory>,
    pub(super) device: Arc<dyn Device>,
    pub(super) geometry: Geometry,
    options: Options,
    engine: Arc<Engine>,
    pub(super) live: RwLock<Option<Arc<Driver>>>,
    recovery: Recovery,
    pub(super) acquaintance: Acquaintance,
    pub(super) attachments: Mutex<Vec<Attachment>>,
    /// See `hold_word`.
    word: Mutex<()>,
}

/// What `status` tells.
#[derive(Clone, Debug)]
pub struct PrimaryStatus {
    pub waiting: bool,
    pub volume: Uuid,
    pub generation: u64,
    pub current_bytes: u64,
    pub missing_bytes: u64,
    pub link_only_bytes: u64,
    pub unsent_bytes: u64,
    pub hot_extents: usize,
    pub hydrating: bool,
    pub connected: bool,
    pub resyncing: bool,
    pub in_flight_bytes: u64,
    /// What the backup has not made durable of the writes of this session, and for how long.
    pub lag_bytes: u64,
    pub lag_ms: u64,
    pub mirrored: bool,
    pub poisoned: Option<Error>,
    pub counters: Counters,
}

/// What the comparison of one range found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Something touched the range, or is on its way: nothing can be said.
    Busy,
    Compared {
        bytes: u64,
        missing: u64,
        different: Vec<ByteRange>,
    },
}

impl PrimaryVolume {
    /// `created_empty`: the daemon itself has just made the device, and it reads as zeros.
    pub fn open(
        name: &str,
        directory: Arc<dyn Directory>,
        device: Arc<dyn Device>,
        created_empty: bool,
        geometry: Geometry,
        options: Options,
        engine: Arc<Engine>,
    ) -> Result<Arc<Self>> {
        if device.size() < geometry.size() {
            return Err(Error::identity(format!(
                "volume {name}: the device has {} bytes, expected at least {}",
                device.size(),
                geometry.size()
            )));
        }
        let acquaintance = Acquaintance::open(Arc::clone(&directory))?;
        let mut volume = Self {
            name: name.to_owned(),
            directory,
            device,
            geometry,
            options,
            engine,
            live: RwLock::new(None),
            recovery: Recovery::default(),
            acquaintance,
            attachments: Mutex::default(),
            word: Mutex::new(()),
        };
        if has_map(&*volume.directory)? {
            let (driver, recovery) = volume.open_files()?;
            volume.recovery = recovery;
            volume.live = RwLock::new(Some(driver));
        } else if created_empty {
            volume.acquaintance.forget()?;
            let driver = volume.create_files(Uuid::new_v4(), 0, true, false)?;
            volume.live = RwLock::new(Some(driver));
        }
        let volume = Arc::new(volume);
        volume.find_recorded_media()?;
        Ok(volume)
    }

    /// Bytes of the volume whose map is in the directory, if there is one.
    pub fn recorded_size(directory: &dyn Directory) -> Result<Option<u64>> {
        if !has_map(directory)? {
            return Ok(None);
        }
        let identity = MapFile::read_identity(&*directory.open(MAP)?)?;
        Ok(Some(identity.geometry.size()))
    }

    fn open_files(&self) -> Result<(Arc<Driver>, Recovery)> {
        let map_device = self.directory.open(MAP)?;
        let identity = MapFile::read_identity(&*map_device)?;
        if identity.geometry != self.geometry {
            return Err(Error::identity(format!(
                "volume {}: expected a map of {} bytes in blocks of {}, as configured, found one \
                 of {} bytes in blocks of {}: mend the configuration",
                self.name,
                self.geometry.size(),
                self.geometry.block_size().bytes(),
                identity.geometry.size(),
                identity.geometry.block_size().bytes()
            )));
        }
        let named = self.directory.names()?.iter().any(|name| name == INTENT);
        let (intent, intents) = if named {
            IntentLog::open(self.directory.open(INTENT)?, identity.volume)?
        } else {
            let device = self.directory.create(INTENT, IntentLog::BYTES)?;
            (IntentLog::create(device, identity.volume)?, Intents::Unknown)
        };
        let (map, recovery) = OverwriteMap::open(map_device, Some(&intents))?;
        // What the hot extents meant is durable in the map now.
        intent.record(&[])?;
        let presumed = recovery.presumed_unsent.clone();
        Ok((self.driver(map, intent, presumed), recovery))
    }

    fn create_files(
        &self,
        volume: Uuid,
        generation: u64,
        current: bool,
        unsent: bool,
    ) -> Result<Arc<Driver>> {
        self.directory.remove(MAP)?;
        self.directory.remove(INTENT)?;
        let intent_device = self.directory.create(INTENT, IntentLog::BYTES)?;
        let intent = IntentLog::create(intent_device, volume)?;
        // Last: a volume exists once its map does.
        let map_device = self.directory.create(MAP, OverwriteMap::bytes_needed(self.geometry))?;
        let identity = MapIdentity { volume, geometry: self.geometry, generation };
        let map = if current {
            OverwriteMap::create_current(map_device, identity, unsent)?
        } else {
            OverwriteMap::create(map_device, identity)?
        };
        Ok(self.driver(map, intent, Vec::new()))
    }

    fn driver(
        &self,
        map: OverwriteMap,
        intent: IntentLog,
        presumed: Vec<BlockRange>,
    ) -> Arc<Driver> {
        let map = Arc::new(map);
        let machine = Primary::new(Arc::clone(&map), self.options);
        let engine = Arc::clone(&self.engine);
        Driver::new(machine, Arc::clone(&self.device), map, intent, presumed, engine)
    }

    pub(super) fn directory(&self) -> &Arc<dyn Directory> {
        &self.directory
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[must_use]
    pub fn has_backup(&self) -> bool {
        self.options.backup
    }

    /// What opening after an unclean stop had to assume.
    #[must_use]
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// The driver, once the volume is live.
    #[must_use]
    pub fn live(&self) -> Option<Arc<Driver>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The driver, or why there is none.
    pub fn driver_or_refuse(&self) -> Result<Arc<Driver>> {
        self.live().ok_or_else(|| {
            Error::busy(format!(
                "volume {} waits for your word: `restore {} --lost none` if the primary's device \
                 is the truth, `--lost all` if the backup is",
                self.name, self.name
            ))
        })
    }

    /// Volume and generation to say hello with; nil while the volume waits for its identity.
    #[must_use]
    pub fn hello_identity(&self) -> (Uuid, u64) {
        self.live().map_or((Uuid::nil(), 0), |driver| {
            let identity = driver.map.identity();
            (identity.volume, identity.generation)
        })
    }

    /// One word of the operator, close, or meeting with a backup at a time.
    pub(super) fn hold_word(&self) -> MutexGuard<'_, ()> {
        self.word.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what may wait on a thread for it.
    pub fn elsewhere(&self, work: impl FnOnce() + Send + 'static) {
        self.engine.spawn(work);
    }

    /// The operator's word: what is lost. A new generation, durable when it returns.
    pub fn restore(&self, lost: &Lost, patience: Duration) -> Result<()> {
        let _word = self.hold_word();
        if let Lost::Ranges(ranges) = lost {
            for range in ranges {
                if range.is_empty() || !self.geometry.contains(*range) {
                    return Err(Error::usage(format!(
                        "lost range {}-{} is empty or outside the volume of {} bytes",
                        range.offset,
                        range.offset.saturating_add(range.length),
                        self.geometry.size()
                    )));
                }
            }
        }
        match self.live() {
            Some(driver) => self.declare(&driver, lost),
            None => {
                let driver = match lost {
                    Lost::None => {
                        self.acquaintance.forget()?;
                        self.create_files(Uuid::new_v4(), 1, true, self.options.backup)?
                    }
                    Lost::All => {
                        let told = self.wait_for_introduction(patience)?;
                        self.acquaintance.remember(told.backup)?;
                        self.create_files(told.volume, told.generation + 1, false, false)?
                    }
                    Lost::Ranges(_) => {
                        return Err(Error::usage(
                            "the volume has no map yet: say --lost all or --lost none",
                        ));
                    }
                };
                *self.live.write().unwrap_or_else(PoisonError::into_inner) = Some(driver);
                Ok(())
            }
        }
    }

    fn wait_for_introduction(&self, patience: Duration) -> Result<Introduction> {
        self.acquaintance.wait(patience).ok_or_else(|| {
            Error::link(format!(
                "volume {} has no map, so only its backup knows its identity, and the backup was \
                 not reached within {} s",
                self.name,
                patience.as_secs()
            ))
        })
    }

    fn declare(&self, driver: &Arc<Driver>, lost: &Lost) -> Result<()> {
        driver.quiesce(
            Error::busy("the volume is being declared lost; the request was not carried out"),
            QUIESCE,
        )?;
        let generation = driver.map.identity().generation + 1;
        match lost {
            Lost::All => driver.map.begin_generation(generation, false, false)?,
            Lost::None => driver.map.begin_generation(generation, true, self.options.backup)?,
            Lost::Ranges(ranges) => {
                let blocks: Vec<BlockRange> =
                    ranges.iter().map(|range| self.geometry.touched(*range)).collect();
                // Bits of blocks that stay are as in memory, which is ahead of the file.
                self.device.flush()?;
                driver.map.file().commit_all()?;
                driver.map.begin_generation_without(generation, &blocks)?;
            }
        }
        driver.resume(Primary::new(Arc::clone(&driver.map), self.options))?;
        self.forget_media();
        Ok(())
    }

    /// Refuses requests, lets those in flight end, makes everything durable, marks a clean stop.
    pub fn close(&self) -> Result<()> {
        let _word = self.hold_word();
        let Some(driver) = self.live.write().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        driver
            .quiesce(Error::new(ErrorKind::Interrupted, "the volume is being closed"), QUIESCE)?;
        driver.finish()
    }

    #[must_use]
    pub fn status(&self) -> PrimaryStatus {
        let Some(driver) = self.live() else { return PrimaryStatus::waiting(self.geometry) };
        let map = &driver.map;
        let identity = map.identity();
        let counters = driver.counters();
        let refusal = driver.refusal();
        driver.with_machine(|machine, _, _| PrimaryStatus {
            waiting: false,
            volume: identity.volume,
            generation: identity.generation,
            current_bytes: map.current_bytes(),
            missing_bytes: map.missing_bytes(),
            link_only_bytes: map.link_only_bytes(),
            unsent_bytes: map.unsent_bytes(),
            hot_extents: machine.hot_extents(),
            hydrating: machine.is_hydrating(),
            connected: machine.link_is_up(),
            resyncing: machine.is_resyncing(),
            in_flight_bytes: machine.in_flight_bytes(),
            lag_bytes: machine.lag().bytes,
            lag_ms: machine.lag_ms(),
            mirrored: machine.is_mirrored() && refusal.is_none(),
            poisoned: machine.poisoned().cloned().or(refusal),
            counters,
        })
    }

    /// Compares the current blocks of a range with the backup, digest by digest. Never says
    /// "different" of a range that something touched meanwhile (law 10).
    pub fn compare(&self, range: ByteRange, timeout: Duration) -> Result<Comparison> {
        let driver = self.driver_or_refuse()?;
        if !self.geometry.contains(range) {
            return Err(Error::usage(format!(
                "range {}+{} lies outside the volume of {} bytes",
                range.offset,
                range.length,
                self.geometry.size()
            )));
        }
        if !driver.with_machine(|machine, _, _| machine.link_is_up()) {
            return Err(Error::link("the link to the backup is down"));
        }
        let blocks = self.geometry.touched(range);
        let current: Vec<BlockRange> = driver.map.current().runs(blocks, true).collect();
        let total = self.geometry.bytes_of(blocks).length;
        let mut bytes = 0;
        let mut different = Vec::new();
        for run in current {
            if !self.compare_run(&driver, run, timeout, &mut different)? {
                return Ok(Comparison::Busy);
            }
            bytes += self.geometry.bytes_of(run).length;
        }
        Ok(Comparison::Compared { bytes, missing: total - bytes, different })
    }

    /// Narrows differences down to blocks; `false` if the run was touched.
    fn compare_run(
        &self,
        driver: &Arc<Driver>,
        run: BlockRange,
        timeout: Duration,
        different: &mut Vec<ByteRange>,
    ) -> Result<bool> {
        let bytes = self.geometry.bytes_of(run);
        let Some(watch) = driver.with_machine(|machine, _, _| machine.begin_watch(run)) else {
            return Ok(false);
        };
        let compared = self.digests_agree(driver, bytes, timeout);
        let untouched = driver.with_machine(|machine, _, _| machine.end_watch(watch));
        if !untouched {
            return Ok(false);
        }
        if compared? {
            return Ok(true);
        }
        if run.count() == 1 {
            different.push(bytes);
            return Ok(true);
        }
        let middle = run.start + run.count() / 2;
        for half in [BlockRange::new(run.start, middle), BlockRange::new(middle, run.end)] {
            if !self.compare_run(driver, half, timeout, different)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn digests_agree(
        &self,
        driver: &Arc<Driver>,
        range: ByteRange,
        timeout: Duration,
    ) -> Result<bool> {
        let ours = digest(&*self.device, range)?;
        Ok(driver.backup_digest(range, timeout)? == ours)
    }

    /// The current blocks of the range are sent to the backup again; returns their bytes.
    pub fn repair(&self, range: ByteRange) -> Result<u64> {
        let driver = self.driver_or_refuse()?;
        let blocks = self.geometry.touched(range);
        driver.with_machine(|machine, now, actions| machine.mark_unsent(blocks, now, actions));
        Ok(driver.map.current().count_set(blocks) * self.geometry.block_size().bytes())
    }
}

fn has_map(directory: &dyn Directory) -> Result<bool> {
    if !directory.names()?.iter().any(|name| name == MAP) {
        return Ok(false);
    }
    // A crash within `create_files` leaves an empty file or half a header.
    if matches!(directory.read(MAP, 0), Ok(Some(_))) {
        return Ok(false);
    }
    Ok(!MapFile::is_unfinished(&*directory.open(MAP)?)?)
}

impl PrimaryStatus {
    fn waiting(geometry: Geometry) -> Self {
        Self {
            waiting: true,
            volume: Uuid::nil(),
            generation: 0,
            current_bytes: 0,
            missing_bytes: geometry.size(),
            link_only_bytes: 0,
            unsent_bytes: 0,
            hot_extents: 0,
            hydrating: false,
            connected: false,
            resyncing: false,
            in_flight_bytes: 0,
            lag_bytes: 0,
            lag_ms: 0,
            mirrored: false,
            poisoned: None,
            counters: Counters::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::Caller;
    use super::super::event::{Event, MirrorPolicy};
    use super::*;
    use crate::device::{FileDirectory, RamDevice};
    use crate::units::BlockSize;
    use crate::volume::service::Command;

    #[test]
    fn nothing_begins_between_the_end_of_a_life_and_the_next() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: false,
            strict: false,
            missing_deadline_ms: 1000,
        };
        let volume = PrimaryVolume::open(
            "v",
            Arc::new(FileDirectory::open(home.path(), true).expect("opened")),
            Arc::new(RamDevice::new(1 << 20)),
            true,
            Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid"),
            options,
            Engine::new().expect("started"),
        )
        .expect("opened");
        let driver = volume.live().expect("made empty by us");
        driver.quiesce(Error::busy("declared lost"), QUIESCE).expect("quiet");
        // A commit that began now would write pages of the old life over those of the new.
        driver.event(Event::CommitMap { id: 1 }, Caller::Other);
        assert!(driver.with_machine(|machine, _, _| machine.is_idle()));
        driver.resume(Primary::new(Arc::clone(driver.map()), options)).expect("resumed");
        driver.wait_for(Command::Flush).expect("it goes on");
    }
}
