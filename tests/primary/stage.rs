//! Small worlds for tests that say themselves what happens next: eight blocks of two sectors.
//!
//! Does not know: what is tested.

use std::cell::RefCell;
use std::rc::Rc;

use dualrestore::error::ErrorKind;
use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::units::{BlockSize, Geometry};
use dualrestore::volume::primary::{Event, MirrorPolicy, Options, OutgoingMessage};

use crate::backup::{LANES, Lane};
use crate::world::{Beginning, Job, World};
use dualrestore::sim::Chance;
use dualrestore::sim::Value;
use dualrestore::sim::stamp::{self, SECTOR};

pub const BLOCK: u64 = 2 * SECTOR;
pub const BLOCKS: u64 = 8;
pub const DEADLINE_MS: u64 = 5_000;

pub const FLUSH: Options = Options {
    policy: MirrorPolicy::Flush,
    backup: true,
    strict: false,
    missing_deadline_ms: DEADLINE_MS,
};

/// Eight blocks of which these are lost, the backup holding all, the link down.
pub fn world(lost: impl IntoIterator<Item = u64>, options: Options) -> World {
    let block = BlockSize::new(BLOCK as u32).expect("a power of two");
    let geometry = Geometry::new(BLOCKS * BLOCK, block).expect("valid");
    begin(geometry, lost.into_iter().collect(), options)
}

pub fn begin(geometry: Geometry, lost: Vec<u64>, options: Options) -> World {
    let window = (0..geometry.size() / SECTOR).collect();
    let beginning = Beginning { geometry, options, window, lost, backup_empty: false, seed: 1 };
    World::new(beginning, Rc::new(RefCell::new(None)))
}

/// The same with the link up.
pub fn linked(lost: impl IntoIterator<Item = u64>, options: Options) -> World {
    let mut world = world(lost, options);
    world.link_up();
    world
}

/// The bytes of sectors `first..end`.
pub fn sectors(first: u64, end: u64) -> ByteRange {
    ByteRange::new(first * SECTOR, (end - first) * SECTOR)
}

/// The bytes of one block.
pub fn block(index: u64) -> ByteRange {
    ByteRange::new(index * BLOCK, BLOCK)
}

/// What a sector held before anything was written.
pub fn old(sector: u64) -> Value {
    1_000_000 + sector
}

impl World {
    /// Everything local is carried out and reported, in order, until nothing is left.
    pub fn local(&mut self) {
        while !self.items.is_empty() {
            self.step(0);
        }
    }

    /// Messages go back and forth until none is left that can.
    pub fn exchange(&mut self) {
        let mut chance = Chance::new(0);
        loop {
            let before = self.link.passed;
            self.link.apply_next(&mut self.backup, &mut chance);
            self.link.pay();
            for lane in [Lane::Demand, Lane::Bulk] {
                if let Some(at) = self.link.ready_fetches(&self.backup, lane).first() {
                    self.link.serve(&self.backup, lane, *at, false);
                }
            }
            for lane in LANES {
                self.receive(lane);
            }
            if self.link.passed == before {
                return;
            }
        }
    }

    /// What is being compared is, and nothing else happens.
    pub fn compare(&mut self) {
        loop {
            let ready = self.link.ready_fetches(&self.backup, Lane::Bulk);
            if let Some(at) = ready.first() {
                self.link.serve(&self.backup, Lane::Bulk, *at, false);
                self.receive(Lane::Bulk);
            } else if self.has_job(is_digest) {
                self.do_job(is_digest);
            } else {
                return;
            }
        }
    }

    pub fn settle(&mut self) {
        loop {
            self.local();
            self.exchange();
            if self.items.is_empty() {
                return;
            }
        }
    }

    /// Lets time pass.
    pub fn wait(&mut self, ms: u64) {
        self.now += ms;
        self.event(Event::Tick);
    }

    /// Lets time pass until everything is settled that only waits for it.
    pub fn rest(&mut self) {
        for _ in 0..8 {
            self.wait(1_500);
            self.settle();
        }
    }

    pub fn is_answered(&self, id: u64) -> bool {
        self.answers.contains_key(&id)
    }

    /// Asserts that the request was answered without an error.
    #[track_caller]
    pub fn assert_ok(&self, id: u64) {
        let answer = self.answers.get(&id).expect("it was answered");
        assert!(answer.is_ok(), "{answer:?}");
    }

    #[track_caller]
    pub fn assert_failed(&self, id: u64, kind: ErrorKind) {
        let answer = self.answers.get(&id).expect("it was answered");
        assert_eq!(answer.as_ref().expect_err("it failed").kind(), kind);
    }

    /// The values that a read was answered with.
    #[track_caller]
    pub fn found(&self, id: u64) -> Vec<Value> {
        let answer = self.answers.get(&id).expect("it was answered");
        let buffer = answer.as_ref().expect("no error").as_ref().expect("a read has bytes");
        buffer.chunks_exact(SECTOR as usize).map(stamp::value).collect()
    }

    /// The values of a range on the primary's device, and on the backup's.
    pub fn here(&self, range: ByteRange) -> Vec<Value> {
        values(&self.volume.visible(), range)
    }

    pub fn there(&self, range: ByteRange) -> Vec<Value> {
        values(&self.backup.disk.visible(), range)
    }

    pub fn is_current(&self, index: u64) -> bool {
        self.map.current().get(index)
    }

    pub fn is_unsent(&self, index: u64) -> bool {
        self.map.unsent().get(index)
    }

    /// Local writes that were begun, by offset.
    pub fn writes(&self) -> Vec<u64> {
        let offset = |job: &Job| match job {
            Job::Write { offset, .. } => Some(*offset),
            _ => None,
        };
        self.items.iter().filter_map(|item| offset(&item.job)).collect()
    }

    pub fn has_job(&self, wanted: impl Fn(&Job) -> bool) -> bool {
        self.items.iter().any(|item| wanted(&item.job))
    }

    /// Carries out and reports the first such item.
    #[track_caller]
    pub fn do_job(&mut self, wanted: impl Fn(&Job) -> bool) {
        let operation =
            self.items.iter().find(|item| wanted(&item.job)).expect("it was begun").operation;
        for _ in 0..2 {
            let at = self.items.iter().position(|item| item.operation == operation);
            self.step(at.expect("an item stays until it is reported"));
        }
    }

    pub fn fetches(&self) -> usize {
        self.link.waiting_there(Lane::Demand).len() + self.link.waiting_there(Lane::Bulk).len()
    }

    /// Comparisons that the backup was not told of yet.
    pub fn digests_asked(&self) -> usize {
        let asked = self.link.waiting_there(Lane::Bulk).iter();
        asked.filter(|message| matches!(message, OutgoingMessage::Digest { .. })).count()
    }

    /// Mirrored writes on their way there, by offset.
    pub fn sent_writes(&self) -> Vec<u64> {
        let offset = |message: &OutgoingMessage| match message {
            OutgoingMessage::Write { offset, .. } => Some(*offset),
            _ => None,
        };
        self.link.waiting_there(Lane::Mirror).iter().filter_map(offset).collect()
    }

    pub fn has_sent_flush(&self) -> bool {
        let mut sent = self.link.waiting_there(Lane::Mirror).iter();
        sent.any(|message| matches!(message, OutgoingMessage::Flush { .. }))
    }

    /// Both sides hold the same and the machine says so.
    #[track_caller]
    pub fn assert_mirrored(&mut self) {
        self.event(Event::Hydrate { enabled: true });
        self.rest();
        assert!(self.primary.is_mirrored());
        assert!(self.volume.visible() == self.backup.disk.durable(), "the sides differ");
    }

    pub fn all(&self) -> BlockRange {
        self.geometry().all_blocks()
    }
}

fn values(bytes: &[u8], range: ByteRange) -> Vec<Value> {
    let held = &bytes[range.offset as usize..range.end() as usize];
    held.chunks_exact(SECTOR as usize).map(stamp::value).collect()
}

pub fn is_write(job: &Job) -> bool {
    matches!(job, Job::Write { .. })
}

pub fn is_read(job: &Job) -> bool {
    matches!(job, Job::Read { .. })
}

pub fn is_digest(job: &Job) -> bool {
    matches!(job, Job::Digest { .. })
}

pub fn is_record(job: &Job) -> bool {
    matches!(job, Job::Record { .. })
}

pub fn is_flush(job: &Job) -> bool {
    matches!(job, Job::Flush)
}

pub fn is_commit(job: &Job) -> bool {
    matches!(job, Job::Commit { .. })
}

pub fn is_merge(job: &Job) -> bool {
    matches!(job, Job::Merge { .. })
}
