//! A real primary over real map and intent log on disks that lose power, with a model of the
//! backup, in one thread. Whoever drives it says what happens next.
//!
//! Guarantees: each action of the machine waits until it is carried out, then until it is reported,
//! and every answer is put before the oracle.
//! Does not know: what happens next.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use dualrestore::clock::Instant;
use dualrestore::device::{AlignedBuffer, Device, Payload, digest};
use dualrestore::error::Result;
use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::map::{Capture, IntentLog, MapIdentity, OverwriteMap};
use dualrestore::units::Geometry;
use dualrestore::volume::content::Content;
use dualrestore::volume::primary::{Action, Event, MirrorPolicy, Options, Primary};
use dualrestore::volume::service::{Command, Outcome};
use uuid::Uuid;

use crate::backup::{Backup, Lane, Link};
use crate::comparing::Watch;
use crate::disk::Disk;
use crate::medium::Shelf;
use dualrestore::sim::Chance;
use dualrestore::sim::stamp;
use dualrestore::sim::{Oracle, Value};

pub const VOLUME: Uuid = Uuid::from_u128(7);

/// What happened, in words, for whoever asks.
pub type Trace = Rc<RefCell<Option<Vec<String>>>>;

/// How a world begins.
#[derive(Clone, Debug)]
pub struct Beginning {
    pub geometry: Geometry,
    pub options: Options,
    /// Sectors that requests may name; the others are zero and current.
    pub window: Vec<u64>,
    /// Blocks of the window that the primary lost; ignored when the backup lacks everything.
    pub lost: Vec<u64>,
    /// The primary is the truth: everything is unsent, the backup holds garbage.
    pub backup_empty: bool,
    pub seed: u64,
}

/// A device action, or a merge, on its way.
#[derive(Debug)]
pub enum Job {
    Read {
        token: u64,
        range: ByteRange,
        parts: Vec<ByteRange>,
    },
    Write {
        token: u64,
        offset: u64,
        content: Content,
    },
    Digest {
        token: u64,
        range: ByteRange,
    },
    Flush,
    Commit {
        epoch: u64,
        capture: Capture,
    },
    Record {
        extents: Vec<u32>,
    },
    /// `old`: from the bundle of an earlier generation.
    Merge {
        claim: u64,
        runs: Vec<BlockRange>,
        old: bool,
    },
    Medium {
        medium: u64,
        token: u64,
        range: ByteRange,
    },
}

#[derive(Debug)]
pub struct Item {
    pub operation: u64,
    pub job: Job,
    /// Carried out, to be reported.
    pub done: Option<Event>,
}

#[derive(Clone, Debug)]
enum Asked {
    Read(ByteRange),
    Write,
    Flush,
    Nothing,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    pub beginning: Beginning,
    pub now: u64,
    pub volume: Arc<Disk>,
    pub map_disk: Arc<Disk>,
    pub intent_disk: Arc<Disk>,
    pub primary: Primary,
    pub map: Arc<OverwriteMap>,
    log: IntentLog,
    pub items: Vec<Item>,
    pub link: Link,
    pub backup: Backup,
    /// A copy of the backup at some instant since the loss.
    pub bundle: Option<Vec<u8>>,
    pub shelf: Shelf,
    pub oracle: Oracle,
    pub(crate) watch: Option<Watch>,
    /// Requests that were not answered.
    asked: BTreeMap<u64, Asked>,
    /// Answers that nobody took yet.
    pub answers: BTreeMap<u64, Outcome>,
    pub cuts: BTreeMap<u64, Result<(u64, u64)>>,
    next_id: u64,
    next_value: Value,
    next_operation: u64,
    pub trace: Trace,
}

fn stamped(geometry: Geometry, value: impl Fn(u64) -> Value) -> Vec<u8> {
    let mut bytes = vec![0; geometry.size() as usize];
    for (at, sector) in bytes.chunks_exact_mut(stamp::SECTOR as usize).enumerate() {
        match value(at as u64) {
            0 => {}
            value => stamp::fill(sector, value),
        }
    }
    bytes
}

impl World {
    pub fn new(beginning: Beginning, trace: Trace) -> Self {
        let geometry = beginning.geometry;
        let seed = beginning.seed;
        let per_block = geometry.block_size().bytes() / stamp::SECTOR;
        let in_window = |at: u64| beginning.window.binary_search(&at).is_ok();
        let first = |at: u64| if in_window(at) { 1_000_000 + at } else { 0 };
        let is_lost = |at: u64| in_window(at) && beginning.lost.contains(&(at / per_block));
        let truth = stamped(geometry, first);
        let (here, there) = if beginning.backup_empty {
            (truth, stamped(geometry, |_| GARBAGE_THERE))
        } else {
            (stamped(geometry, |at| if is_lost(at) { stamp::GARBAGE } else { first(at) }), truth)
        };
        let map_bytes = OverwriteMap::bytes_needed(geometry) as usize;
        let map_disk = Arc::new(Disk::new(vec![0; map_bytes], seed ^ 1));
        let intent_disk = Arc::new(Disk::new(vec![0; IntentLog::BYTES as usize], seed ^ 2));
        let log = IntentLog::create(Arc::clone(&intent_disk) as _, VOLUME).expect("created");
        let map = Arc::new(first_map(&beginning, &map_disk));
        let oracle = Oracle::new(
            beginning.window.iter().map(|at| (*at, first(*at))),
            !beginning.backup_empty,
        );
        Self {
            now: 1,
            volume: Arc::new(Disk::new(here, seed ^ 3)),
            map_disk,
            intent_disk,
            primary: Primary::new(Arc::clone(&map), beginning.options),
            map,
            log,
            items: Vec::new(),
            link: Link::default(),
            bundle: (!beginning.backup_empty).then(|| there.clone()),
            shelf: Shelf::new(&there, geometry, seed),
            backup: Backup::new(there, seed ^ 4),
            oracle,
            watch: None,
            asked: BTreeMap::new(),
            answers: BTreeMap::new(),
            cuts: BTreeMap::new(),
            next_id: 0,
            next_value: 1,
            next_operation: 0,
            beginning,
            trace,
        }
    }

    pub fn note(&self, words: impl FnOnce() -> String) {
        if let Some(lines) = &mut *self.trace.borrow_mut() {
            lines.push(words());
        }
    }

    pub fn geometry(&self) -> Geometry {
        self.beginning.geometry
    }

    // The machine.

    pub fn event(&mut self, event: Event) {
        self.note(|| format!("  event {}", brief(&event)));
        let mut actions = Vec::new();
        self.primary.apply(event, Instant(self.now), &mut actions);
        self.take(actions);
        self.check_lag();
    }

    /// The backup never lags further than the policy allows, but by one write.
    fn check_lag(&self) {
        let lag = self.primary.lag();
        if let MirrorPolicy::Async(bound) = self.beginning.options.policy {
            assert!(lag.bytes <= bound.bytes || lag.writes == 1, "it lags {lag:?}");
        }
    }

    pub fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.note(|| format!("    action {}", brief(&action)));
            match action {
                Action::ReadLocal { token, range, parts } => {
                    self.add(Job::Read { token, range, parts });
                }
                Action::WriteLocal { token, offset, content } => {
                    self.check_alone(ByteRange::new(offset, content.len()));
                    self.add(Job::Write { token, offset, content });
                }
                Action::DigestLocal { token, range } => self.add(Job::Digest { token, range }),
                Action::FlushLocal => self.add(Job::Flush),
                Action::Commit { epoch, capture } => self.add(Job::Commit { epoch, capture }),
                Action::RecordIntent { extents } => self.add(Job::Record { extents }),
                Action::ReadMedium { medium, token, range } => {
                    self.check_medium(medium, range);
                    self.add(Job::Medium { medium, token, range });
                }
                Action::Send(message) => {
                    let sequence = message.sequence();
                    let superseded = self.link.send(message);
                    self.primary.superseded(&superseded, sequence);
                }
                Action::Complete { id, outcome } => self.answered(id, outcome),
                Action::CutDone { id, result } => {
                    assert!(self.cuts.insert(id, result).is_none(), "a cut is answered once");
                    self.asked.remove(&id).expect("only cuts that were asked for");
                }
            }
        }
    }

    fn add(&mut self, job: Job) {
        self.next_operation += 1;
        self.items.push(Item { operation: self.next_operation, job, done: None });
    }

    /// Writes to one place are never under way side by side (I6, I7).
    fn check_alone(&self, range: ByteRange) {
        for item in &self.items {
            let held = match &item.job {
                Job::Write { offset, content, .. } => vec![ByteRange::new(*offset, content.len())],
                Job::Merge { runs, .. } => {
                    runs.iter().map(|run| self.geometry().bytes_of(*run)).collect()
                }
                _ => vec![],
            };
            for other in held {
                assert!(other.intersect(range).is_none(), "two writes side by side: {range:?}");
            }
        }
    }

    // Requests.

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub fn new_value(&mut self) -> Value {
        self.next_value += 1;
        self.next_value
    }

    pub fn read(&mut self, range: ByteRange) -> u64 {
        let id = self.new_id();
        self.oracle.begin_read(id, stamp::sectors(range));
        self.ask(id, Asked::Read(range), Command::Read { range })
    }

    pub fn cache(&mut self, range: ByteRange) -> u64 {
        let id = self.new_id();
        self.ask(id, Asked::Nothing, Command::Cache { range })
    }

    pub fn write(&mut self, range: ByteRange, values: &[Value], force_unit_access: bool) -> u64 {
        let id = self.new_id();
        let data = Payload::copy_of(&stamp::bytes(values.iter().copied()));
        let by_sector = stamp::sectors(range).zip(values.iter().copied()).collect();
        self.oracle.begin_write(id, by_sector, force_unit_access);
        let command = Command::Write { offset: range.offset, data, force_unit_access };
        self.ask(id, Asked::Write, command)
    }

    pub fn write_zeroes(&mut self, range: ByteRange, force_unit_access: bool) -> u64 {
        let id = self.new_id();
        let zeros = stamp::sectors(range).map(|at| (at, 0)).collect();
        self.oracle.begin_write(id, zeros, force_unit_access);
        let command = Command::WriteZeroes { range, may_deallocate: true, force_unit_access };
        self.ask(id, Asked::Write, command)
    }

    pub fn trim(&mut self, range: ByteRange, force_unit_access: bool) -> u64 {
        let id = self.new_id();
        let whole = self.geometry().bytes_of(self.geometry().covered(range));
        let zeros = stamp::sectors(whole).map(|at| (at, 0)).collect();
        self.oracle.begin_write(id, zeros, force_unit_access);
        self.ask(id, Asked::Write, Command::Trim { range, force_unit_access })
    }

    pub fn flush(&mut self) -> u64 {
        let id = self.new_id();
        let mirrored = !matches!(self.beginning.options.policy, MirrorPolicy::Async(_))
            && self.primary.link_is_up()
            && !self.primary.is_resyncing();
        self.oracle.begin_flush(id, mirrored);
        self.ask(id, Asked::Flush, Command::Flush)
    }

    pub fn cut(&mut self) -> u64 {
        let id = self.new_id();
        self.asked.insert(id, Asked::Nothing);
        let snapshot = Uuid::from_u128(u128::from(id));
        let selection = vec![self.geometry().all_bytes()];
        self.event(Event::Cut {
            id,
            snapshot,
            label: String::new(),
            selection,
            timeout_ms: 30_000,
        });
        id
    }

    fn ask(&mut self, id: u64, asked: Asked, command: Command) -> u64 {
        self.note(|| format!("request {id}: {}", brief(&command)));
        self.asked.insert(id, asked);
        self.event(Event::Request { id, command });
        id
    }

    fn answered(&mut self, id: u64, outcome: Outcome) {
        match (self.asked.remove(&id).expect("a request is answered once"), &outcome) {
            (Asked::Read(range), Ok(Some(buffer))) => {
                let found = stamp::values(range, buffer);
                self.note(|| format!("    read {id} found {found:?}"));
                self.oracle.read_done(id, &found);
            }
            (Asked::Read(_), Ok(None)) => panic!("read {id} was answered with nothing"),
            (Asked::Read(_), Err(_)) => self.oracle.read_failed(id),
            (Asked::Write, outcome) => self.oracle.write_ended(id, outcome.is_ok()),
            (Asked::Flush, Ok(_)) => {
                if self.oracle.flush_done(id) {
                    self.check_backup();
                }
            }
            (Asked::Flush, Err(_)) => self.oracle.flush_failed(id),
            (Asked::Nothing, _) => {}
        }
        self.answers.insert(id, outcome);
    }

    pub fn outstanding(&self) -> usize {
        self.asked.len()
    }

    // The devices.

    /// Carries the item out, or reports it if that is done.
    pub fn step(&mut self, index: usize) {
        if self.items[index].done.is_none() {
            let event = self.perform(index);
            self.note(|| format!("done {}", brief(&event)));
            self.items[index].done = Some(event);
        } else {
            let item = self.items.remove(index);
            self.volume.returned(item.operation);
            self.event(item.done.expect("just seen"));
        }
    }

    pub fn perform(&mut self, index: usize) -> Event {
        let (operation, job) = (self.items[index].operation, &self.items[index].job);
        self.volume.begin(operation);
        let event = match job {
            Job::Read { token, range, parts } => {
                Event::ReadDone { token: *token, result: self.read_parts(*range, parts) }
            }
            Job::Write { token, offset, content } => {
                Event::WriteDone { token: *token, result: content.write_to(&*self.volume, *offset) }
            }
            Job::Digest { token, range } => {
                Event::DigestDone { token: *token, result: digest(&*self.volume, *range) }
            }
            Job::Flush => Event::DeviceFlushed { result: self.volume.flush() },
            Job::Commit { epoch, capture } => {
                let flushed = self.volume.flush();
                let result = flushed.and_then(|()| self.map.file().commit(capture));
                Event::Committed { epoch: *epoch, result }
            }
            Job::Record { extents } => Event::IntentRecorded { result: self.log.record(extents) },
            Job::Merge { claim, runs, old } => {
                Event::MergeWritten { claim: *claim, result: self.write_bundle(runs, *old) }
            }
            Job::Medium { medium, token, range } => {
                let result = self.shelf.read(*medium, *range);
                Event::MediumRead { medium: *medium, token: *token, result }
            }
        };
        self.volume.end();
        event
    }

    fn read_parts(&self, range: ByteRange, parts: &[ByteRange]) -> Result<AlignedBuffer> {
        let mut buffer = AlignedBuffer::zeroed(range.length as usize);
        for part in parts {
            let start = (part.offset - range.offset) as usize;
            self.volume.read_at(part.offset, &mut buffer[start..start + part.length as usize])?;
        }
        Ok(buffer)
    }

    fn write_bundle(&self, runs: &[BlockRange], old: bool) -> Result<()> {
        let bundle = if old { Some(&self.shelf.old) } else { self.bundle.as_ref() };
        let bundle = bundle.expect("a merge has a bundle");
        for run in runs {
            let bytes = self.geometry().bytes_of(*run);
            let content = &bundle[bytes.offset as usize..bytes.end() as usize];
            self.volume.write_at(bytes.offset, content)?;
        }
        Ok(())
    }

    // The bundle.

    /// Claims what the bundle may supply of these blocks; what it says is what the backup holds.
    pub fn merge(&mut self, blocks: BlockRange) -> Option<Vec<BlockRange>> {
        self.merge_from(blocks, false)
    }

    /// `old`: from the bundle of an earlier generation, what is vouched for in this session.
    pub fn merge_from(&mut self, blocks: BlockRange, old: bool) -> Option<Vec<BlockRange>> {
        let bundle = if old { Some(&self.shelf.old) } else { self.bundle.as_ref() }?;
        let vouched = old.then(|| Arc::clone(&self.shelf.vouched));
        let (claim, runs) = self.primary.claim_for_merge(blocks, vouched.as_deref()).ok()??;
        for run in &runs {
            let bytes = self.geometry().bytes_of(*run);
            let span = bytes.offset as usize..bytes.end() as usize;
            if self.beginning.options.backup {
                let there = self.backup.disk.visible();
                assert!(bundle[span.clone()] == there[span], "the bundle is older in {run:?}");
            }
            self.check_alone(bytes);
        }
        self.note(|| format!("merge claims {runs:?}"));
        self.add(Job::Merge { claim, runs: runs.clone(), old });
        Some(runs)
    }

    pub fn take_bundle(&mut self) {
        self.bundle = Some(self.backup.disk.visible());
    }

    // The link and the backup.

    pub fn link_up(&mut self) {
        self.note(|| "link up".to_owned());
        self.link.begin(&mut self.backup);
        self.event(Event::LinkUp);
    }

    pub fn link_down(&mut self) {
        self.note(|| "link down".to_owned());
        self.link.cut();
        self.oracle.link_lost();
        self.event(Event::LinkDown);
    }

    pub fn receive(&mut self, lane: Lane) {
        if let Some(event) = self.link.receive(lane) {
            self.event(event);
        }
    }

    pub fn crash_backup(&mut self) {
        if self.link.up {
            self.link_down();
        }
        self.note(|| "backup crashes".to_owned());
        self.link.drop_orphans();
        self.backup.disk.crash();
        self.check_backup();
    }

    /// Whatever the backup may hold after a crash is what mirrored flushes allow (I3).
    pub fn check_backup(&self) {
        if !self.beginning.options.backup {
            return;
        }
        for at in self.oracle.sectors() {
            for content in self.backup.disk.may(at) {
                self.oracle.check_backup(at, stamp::value(&content));
            }
        }
    }

    // Power.

    /// The primary loses power in the middle of whatever it does, and is opened again.
    pub fn crash(&mut self, chance: &mut Chance) {
        self.note(|| "primary crashes".to_owned());
        for index in 0..self.items.len() {
            if self.items[index].done.is_none() && chance.one_in(2) {
                self.map_disk.set_fuse(chance.below(8));
                self.intent_disk.set_fuse(chance.below(3));
                let _lost = self.perform(index);
            }
        }
        self.items.clear();
        self.asked.clear();
        self.answers.clear();
        if self.link.up {
            self.link.cut();
        }
        self.link.late.clear();
        self.shelf.clear();
        self.watch = None;
        self.oracle.crash();
        for disk in [&self.volume, &self.map_disk, &self.intent_disk] {
            disk.heal();
            disk.crash();
        }
        while !self.reopen(chance) {
            self.note(|| "primary crashes while it is opened".to_owned());
            self.map_disk.crash();
            self.intent_disk.crash();
        }
    }

    /// Opens map and log; `false` if the power went out meanwhile.
    fn reopen(&mut self, chance: &mut Chance) -> bool {
        if chance.one_in(4) {
            self.map_disk.set_fuse(chance.below(8));
            self.intent_disk.set_fuse(chance.below(3));
        }
        let opened = IntentLog::open(Arc::clone(&self.intent_disk) as _, VOLUME).and_then(
            |(log, intents)| {
                let device = Arc::clone(&self.map_disk) as _;
                let (map, _) = OverwriteMap::open(device, Some(&intents))?;
                log.record(&[])?;
                Ok((log, map))
            },
        );
        match opened {
            Ok((log, map)) => {
                self.map_disk.remove_fuse();
                self.intent_disk.remove_fuse();
                self.log = log;
                self.map = Arc::new(map);
                self.primary = Primary::new(Arc::clone(&self.map), self.beginning.options);
                true
            }
            Err(_) if self.map_disk.blown() || self.intent_disk.blown() => false,
            Err(error) => panic!("after a crash the volume is refused: {error}"),
        }
    }
}

/// What a backup holds that never saw the volume.
const GARBAGE_THERE: Value = 0xfeed_feed_feed_feed;

/// Which blocks are current and which the backup lacks, made durable.
fn first_map(beginning: &Beginning, disk: &Arc<Disk>) -> OverwriteMap {
    let geometry = beginning.geometry;
    let identity = MapIdentity { volume: VOLUME, geometry, generation: 1 };
    let device = Arc::clone(disk) as _;
    let lost = &beginning.lost;
    if beginning.backup_empty || lost.is_empty() {
        let unsent = beginning.backup_empty;
        return OverwriteMap::create_current(device, identity, unsent).expect("created");
    }
    let map = OverwriteMap::create(device, identity).expect("created");
    let all = geometry.all_blocks();
    for block in (all.start..all.end).filter(|block| lost.binary_search(block).is_err()) {
        map.mark_current(BlockRange::one(block));
    }
    map.file().commit_all().expect("committed");
    map
}

/// Words without the bytes.
fn brief(value: &dyn std::fmt::Debug) -> String {
    let mut words = format!("{value:?}");
    for (from, to) in [("AlignedBuffer { start: ", " } }"), ("words: [", "]")] {
        while let Some(start) = words.find(from) {
            let end = words[start..].find(to).map_or(words.len(), |at| start + at + to.len());
            words.replace_range(start..end, "..");
        }
    }
    words
}
