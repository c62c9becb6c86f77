//! Both nodes, the works between them, the oracle, and what is carried from one to the other.
//!
//! Guarantees: every answer is put before the oracle; whatever a node may hold after its power went
//! out is too.
//! Does not know: what happens next.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::backup_node::BackupNode;
use super::chance::Chance;
use super::merging::Merging;
use super::oracle::{Oracle, Value};
use super::primary_node::PrimaryNode;
use super::rare::Counts;
use super::requests::Asked;
use super::setting::{Beginning, Setting};
use super::shelf::Carried;
use super::snapshots::Snapshots;
use super::stamp::{self, SECTOR};
use super::trace::Trace;
use super::works::Works;
use crate::clock::MonotonicClock;
use crate::format::frames::Class;
use crate::volume::primary::Lost;

const VOLUME: Uuid = Uuid::from_u128(7);
/// What a backup holds that never saw the volume.
const GARBAGE_THERE: Value = 0xfeed_feed_feed_feed;

/// See the module.
pub struct World {
    pub setting: Setting,
    pub chance: Chance,
    pub trace: Trace,
    pub works: Arc<Works>,
    pub(super) clock: &'static AtomicU64,
    pub primary: PrimaryNode,
    pub backup: BackupNode,
    pub oracle: Oracle,
    pub rare: Counts,
    pub(super) asked: BTreeMap<u64, Asked>,
    pub(super) session: Option<u64>,
    pub(super) next_id: u64,
    pub(super) next_value: Value,
    pub snapshots: Snapshots,
    pub shelf: Vec<Carried>,
    pub merging: Option<Merging>,
    /// What the operator says once the backup has told which volume it holds.
    pub word: Option<Lost>,
    /// The link cannot be made again.
    pub parted: bool,
    /// Something of the snapshots' files failed: they may be broken.
    pub stores_troubled: bool,
    /// A bit of the primary's files has rotted.
    pub rotten: bool,
    /// The primary's volume is lost, and nobody has it.
    pub is_over: bool,
}

pub(super) fn stamped(setting: &Setting, value: impl Fn(u64) -> Value) -> Vec<u8> {
    let mut bytes = vec![0; setting.geometry.size() as usize];
    for at in &setting.window {
        let start = (at * SECTOR) as usize;
        match value(*at) {
            0 => {}
            value => stamp::fill(&mut bytes[start..start + SECTOR as usize], value),
        }
    }
    bytes
}

impl World {
    /// `clock`: of this world alone.
    pub fn new(
        setting: Setting,
        mut chance: Chance,
        clock: &'static AtomicU64,
        trace: Trace,
    ) -> Self {
        clock.store(1, Ordering::Release);
        let told = MonotonicClock::told(clock);
        let works = Works::new(chance.number(), setting.jobs_first, trace.clone());
        let truth = |at: u64| match setting.beginning {
            Beginning::BothEmpty => 0,
            Beginning::Lost | Beginning::Unsent => 1_000_000 + at,
        };
        let (here, there) = match setting.beginning {
            Beginning::BothEmpty => (stamped(&setting, |_| 0), stamped(&setting, |_| 0)),
            Beginning::Lost => (stamped(&setting, |_| stamp::GARBAGE), stamped(&setting, truth)),
            Beginning::Unsent => (stamped(&setting, truth), stamped(&setting, |_| GARBAGE_THERE)),
        };
        let primary = PrimaryNode::new(&works, told, &setting, &here, &mut chance);
        let backup = BackupNode::new(&works, told, &setting, &there, &mut chance);
        let oracle = Oracle::new(
            setting.window.iter().map(|at| (*at, truth(*at))),
            setting.beginning != Beginning::Unsent,
        );
        let word = match setting.beginning {
            Beginning::BothEmpty => None,
            Beginning::Lost => Some(Lost::All),
            Beginning::Unsent => Some(Lost::None),
        };
        let mut world = Self {
            setting,
            chance,
            trace,
            works,
            clock,
            primary,
            backup,
            oracle,
            rare: Counts::default(),
            asked: BTreeMap::new(),
            session: None,
            next_id: 0,
            next_value: 1,
            snapshots: Snapshots::default(),
            shelf: Vec::new(),
            merging: None,
            word,
            parted: false,
            stores_troubled: false,
            rotten: false,
            is_over: false,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        let empty = self.setting.beginning == Beginning::BothEmpty;
        let holds = (self.setting.beginning == Beginning::Lost).then_some(VOLUME);
        self.backup.create(&self.setting, holds, empty).expect("nothing fails yet");
        self.primary.start(&self.setting, empty).expect("nothing fails yet");
    }

    pub fn note(&self, words: impl FnOnce() -> String) {
        self.trace.note(words);
    }

    // Time and works.

    pub fn pass(&mut self, milliseconds: u64) {
        self.clock.fetch_add(milliseconds, Ordering::AcqRel);
        if let Some(running) = &self.primary.running {
            running.engine.tick();
        }
        self.works.tick();
        self.look();
    }

    /// Lets one thing happen by itself; `false` if nothing can.
    pub fn work(&mut self) -> bool {
        let worked = self.works.step();
        self.look();
        worked
    }

    /// Puts what was answered before the oracle; a node whose power went out comes up again.
    pub fn look(&mut self) {
        let session = self.primary.session();
        if session != self.session {
            self.note(|| format!("session {session:?}"));
            self.oracle.link_lost();
            self.session = session;
        }
        self.note_troubles();
        for (id, outcome) in self.primary.take_answers() {
            self.answered(id, outcome);
        }
        self.look_at_cuts();
        if self.primary.power.is_off() {
            self.crash_primary();
        }
        if self.backup.power.is_off() {
            self.crash_backup();
        }
    }

    /// Makes the connections of the link that there are not.
    pub fn connect(&mut self) {
        if self.parted {
            return;
        }
        self.make_connections(|works, class| !works.is_connected(class));
    }

    /// Makes all of them once more, whatever there is.
    pub fn connect_again(&mut self) {
        self.make_connections(|_, _| true);
    }

    fn make_connections(&mut self, wanted: impl Fn(&Works, Class) -> bool) {
        for class in [Class::Mirror, Class::Demand, Class::Bulk] {
            if !wanted(&self.works, class) {
                continue;
            }
            let Some(there) = self.backup.accept() else { return };
            let Some(here) = self.primary.connect(class) else { return };
            self.works.connect(class, [here, there]);
        }
        self.look();
    }
}
