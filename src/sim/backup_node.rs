//! The backup's machine: its power, its disk and state directory, and the volume while it runs.
//!
//! Does not know: who mirrors to it.

use std::sync::Arc;

use uuid::Uuid;

use super::chance::Chance;
use super::disk::{Part, Troubles};
use super::primary_node::NAME;
use super::setting::Setting;
use super::stamp;
use super::wire::THERE;
use super::works::Works;
use crate::clock::MonotonicClock;
use crate::device::{Capacity, CrashingDevice, CrashingDirectory, Device, Power};
use crate::error::Result;
use crate::link::{BackupSide, Endpoint, Hub};
use crate::volume::backup::BackupVolume;
use crate::volume::engine::Engine;

pub const BACKUP: Uuid = Uuid::from_u128(0xb);

/// The process.
#[derive(Clone)]
pub struct Running {
    pub volume: Arc<BackupVolume>,
    pub hub: Arc<Hub>,
}

/// See the module.
pub struct BackupNode {
    works: Arc<Works>,
    clock: MonotonicClock,
    pub power: Arc<Power>,
    pub directory: Arc<CrashingDirectory>,
    pub disk: Arc<CrashingDevice>,
    pub troubles: Troubles,
    pub running: Option<Running>,
    /// The process has made the disk.
    made: bool,
}

impl BackupNode {
    /// A machine with this on its disk; nobody has made a backup on it.
    pub fn new(
        works: &Arc<Works>,
        clock: MonotonicClock,
        setting: &Setting,
        disk: &[u8],
        chance: &mut Chance,
    ) -> Self {
        let power = Power::failing_at(u64::MAX, chance.one_in(2));
        let troubles = Troubles::new(Arc::clone(&power), true, chance.number());
        let mut directory =
            CrashingDirectory::new(Arc::clone(&power)).with_wrapper(troubles.wrapper());
        if let Some(bytes) = setting.store_bytes {
            directory = directory.with_capacity(Capacity::new(bytes));
        }
        Self {
            works: Arc::clone(works),
            clock,
            disk: Arc::new(CrashingDevice::from_bytes(disk, Arc::clone(&power))),
            directory: Arc::new(directory),
            power,
            troubles,
            running: None,
            made: false,
        }
    }

    /// A new backup, of this volume if it holds one; `created_empty`: its process has made the disk
    /// just now.
    pub fn create(
        &mut self,
        setting: &Setting,
        holds: Option<Uuid>,
        created_empty: bool,
    ) -> Result<()> {
        let disk = self.troubles.disk(Part::Mirror, &self.disk);
        let home = Arc::clone(&self.directory) as _;
        let volume = BackupVolume::create(home, disk, setting.geometry, BACKUP)?;
        if let Some(held) = holds {
            volume.adopt(held, 1)?;
        }
        self.made = created_empty;
        self.serve(volume)
    }

    pub fn start(&mut self, setting: &Setting) -> Result<()> {
        let disk = self.troubles.disk(Part::Mirror, &self.disk);
        let home = Arc::clone(&self.directory) as _;
        let volume = BackupVolume::open(home, disk, setting.geometry)?;
        volume.snapshots().finish_deletions()?;
        self.serve(volume)
    }

    fn serve(&mut self, volume: BackupVolume) -> Result<()> {
        let created_empty = self.made && self.disk.next_data(0)?.is_none();
        let volume = Arc::new(volume);
        let engine = Engine::driven(self.works.hands(THERE), self.clock);
        let hub = Arc::new(Hub::with_clock(self.clock)?);
        let side = BackupSide::new(
            NAME.to_owned(),
            Arc::clone(&volume),
            created_empty,
            hub.boot_id(),
            engine,
            || 0,
        );
        hub.serve(side)?;
        self.running = Some(Running { volume, hub });
        Ok(())
    }

    /// The power goes out: what was not flushed survives in part.
    pub fn lose_power(&mut self, chance: &mut Chance) {
        self.running = None;
        self.works.lose_power(THERE);
        self.come_up(chance);
    }

    /// After `lose_power`, once more: it went out while the process was starting.
    pub fn come_up(&mut self, chance: &mut Chance) {
        let power = Power::failing_at(u64::MAX, chance.one_in(2));
        let mut choose = |versions: usize| chance.index(versions + 1);
        self.directory = Arc::new(self.directory.crash(&mut choose, &power));
        self.disk = Arc::new(self.disk.crash(&mut choose, Arc::clone(&power)));
        self.troubles.renew(Arc::clone(&power));
        self.power = power;
    }

    /// The process ends as it should.
    pub fn stop(&mut self) -> Result<()> {
        let Some(running) = self.running.take() else { return Ok(()) };
        running.hub.withdraw(NAME);
        running.volume.flush()
    }

    pub fn accept(&self) -> Option<Arc<Endpoint>> {
        self.running.as_ref().map(|running| running.hub.accept())
    }

    pub fn volume(&self) -> Option<&Arc<BackupVolume>> {
        self.running.as_ref().map(|running| &running.volume)
    }

    /// Every value that a sector of the mirror may have after a crash.
    pub fn may(&self, sector: u64) -> impl Iterator<Item = u64> {
        self.disk.may(sector).into_iter().map(|bytes| stamp::value(&bytes))
    }
}
