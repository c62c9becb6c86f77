//! The primary's machine: its power, its disk and state directory, and the volume while it runs.
//!
//! Guarantees: the volume runs as in the daemon, with its driver and its side of the link.
//! Does not know: what is asked of it.

use std::sync::{Arc, Mutex, PoisonError};

use super::chance::Chance;
use super::disk::{Part, Troubles};
use super::setting::Setting;
use super::stamp;
use super::wire::HERE;
use super::works::Works;
use crate::clock::MonotonicClock;
use crate::device::{AlignedBuffer, CrashingDevice, CrashingDirectory, Power};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::frames::Class;
use crate::link::{Endpoint, Hub};
use crate::map::Recovery;
use crate::volume::engine::Engine;
use crate::volume::primary::{Driver, PrimaryVolume};
use crate::volume::service::{BlockService, Command, Outcome};

/// The name of the volume on both sides.
pub const NAME: &str = "v";

/// Answers that nobody has looked at yet.
pub type Answers = Arc<Mutex<Vec<(u64, Outcome)>>>;

/// The process.
#[derive(Clone)]
pub struct Running {
    pub volume: Arc<PrimaryVolume>,
    pub hub: Arc<Hub>,
    pub engine: Arc<Engine>,
}

/// See the module.
pub struct PrimaryNode {
    works: Arc<Works>,
    clock: MonotonicClock,
    pub power: Arc<Power>,
    pub directory: Arc<CrashingDirectory>,
    pub disk: Arc<CrashingDevice>,
    pub troubles: Troubles,
    pub running: Option<Running>,
    answers: Answers,
}

impl PrimaryNode {
    /// A machine with this on its disk and nothing known of the volume.
    pub fn new(
        works: &Arc<Works>,
        clock: MonotonicClock,
        setting: &Setting,
        disk: &[u8],
        chance: &mut Chance,
    ) -> Self {
        let power = Power::failing_at(u64::MAX, chance.one_in(2));
        let troubles = Troubles::new(Arc::clone(&power), setting.quick_disks, chance.number());
        let directory = CrashingDirectory::new(Arc::clone(&power)).with_wrapper(troubles.wrapper());
        Self {
            works: Arc::clone(works),
            clock,
            disk: Arc::new(CrashingDevice::from_bytes(disk, Arc::clone(&power))),
            directory: Arc::new(directory),
            power,
            troubles,
            running: None,
            answers: Answers::default(),
        }
    }

    /// Starts the process. `created_empty`: it has made the disk just now.
    pub fn start(&mut self, setting: &Setting, created_empty: bool) -> Result<()> {
        let engine = Engine::driven(self.works.hands(HERE), self.clock);
        let volume = PrimaryVolume::open(
            NAME,
            Arc::clone(&self.directory) as _,
            self.troubles.disk(Part::Volume, &self.disk),
            created_empty,
            setting.geometry,
            setting.options,
            Arc::clone(&engine),
        )?;
        let hub = Arc::new(Hub::with_clock(self.clock)?);
        self.running = Some(Running { volume, hub, engine });
        Ok(())
    }

    /// The power goes out: what was not flushed survives in part.
    pub fn lose_power(&mut self, chance: &mut Chance) {
        self.running = None;
        self.works.lose_power(HERE);
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
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

    /// The process is killed: what it wrote stays in the memory of its machine.
    pub fn kill(&mut self) {
        self.running = None;
        self.works.lose_power(HERE);
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.troubles.renew(Arc::clone(&self.power));
    }

    /// The process ends as it should.
    pub fn stop(&mut self) -> Result<()> {
        let Some(running) = self.running.take() else { return Ok(()) };
        running.hub.forget(&running.volume);
        running.volume.close()
    }

    pub fn driver(&self) -> Option<Arc<Driver>> {
        self.running.as_ref().and_then(|running| running.volume.live())
    }

    pub fn recovery(&self) -> Recovery {
        let running = self.running.as_ref();
        running.map_or_else(Recovery::default, |running| running.volume.recovery().clone())
    }

    /// Which session with the backup is up, by its number there.
    pub fn session(&self) -> Option<u64> {
        let running = self.running.as_ref()?;
        let up = running.volume.live()?.with_machine(|machine, _, _| machine.link_is_up());
        running.hub.primary(&running.volume).filter(|_| up)?.session_epoch()
    }

    pub fn connect(&self, class: Class) -> Option<Arc<Endpoint>> {
        let running = self.running.as_ref()?;
        running.hub.connect(&running.volume, NAME, class).ok()
    }

    /// Asks for something as a server of a protocol does: what can be read at once is.
    pub fn ask(&self, id: u64, command: Command) {
        let answers = Arc::clone(&self.answers);
        let answer = move |outcome: Outcome| {
            answers.lock().unwrap_or_else(PoisonError::into_inner).push((id, outcome));
        };
        let Some(running) = &self.running else {
            answer(Err(Error::busy("the process does not run")));
            return;
        };
        if let Command::Read { range } = command
            && let Some(buffer) = read_now(&running.volume, range)
        {
            answer(Ok(Some(buffer)));
            return;
        }
        running.volume.submit(command, Box::new(answer));
    }

    pub fn take_answers(&self) -> Vec<(u64, Outcome)> {
        std::mem::take(&mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nothing of these bytes is left on the disk.
    pub fn spoil(&self, range: ByteRange) {
        let sectors = (range.length / stamp::SECTOR) as usize;
        self.disk.replace(range.offset, &stamp::bytes(vec![stamp::GARBAGE; sectors]));
    }
}

fn read_now(volume: &PrimaryVolume, range: ByteRange) -> Option<AlignedBuffer> {
    let mut buffer = AlignedBuffer::zeroed(range.length as usize);
    // After an error the request is submitted as well.
    volume.read_now(range, &mut buffer)?.ok().map(|()| buffer)
}
