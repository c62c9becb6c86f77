//! The journal of preservation: what must be durable before blocks are overwritten becomes so by
//! one sequential write and one flush of a file whose space was taken before. Stores and maps
//! follow later, many records at a time.
//!
//! Two halves: while one takes records, the other is *settled* in the background.
//!
//! | step | who | a crash after it |
//! |---|---|---|
//! | old bytes are written to the store, not flushed | `preserving.rs` | changes nothing |
//! | `append`: the record is written and flushed | its caller | the record is replayed |
//! | bits are set in memory, blocks are overwritten | its caller | the same |
//! | the half is full: stores are flushed, maps are committed | `Settling` | the same, in vain |
//! | a record in the other half says so | `make_room` | nothing to replay |
//! | the half is used again | `append` | the same |
//!
//! Guarantees: a record counts whole or not at all; records that are lost though newer ones are
//! there are noticed; replaying twice changes nothing.
//! Does not know: which blocks must be preserved, what happens to a snapshot that failed.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use uuid::Uuid;

use super::member::Snapshot;
use crate::device::{AlignedBuffer, Device, Directory, WorkerPool};
use crate::error::{Error, Result};
use crate::extent::BlockRange;
use crate::format::journal::{
    Found, JOURNAL_PAGE_BYTES, JOURNAL_RUNS_MAX, JournalKind, JournalRecord, JournalRun,
};
use crate::limits::{JOURNAL_HALF_BYTES_MAX, JOURNAL_HALF_BYTES_MIN, STRETCH_BYTES};
use crate::map::MapFile;
use crate::units::Geometry;

pub(super) const JOURNAL: &str = "journal";
const PAGE: u64 = JOURNAL_PAGE_BYTES as u64;

/// See the module.
#[derive(Debug)]
pub(super) struct Journal {
    file: Arc<dyn Device>,
    backup: Uuid,
    sequence: u64,
    settled: u64,
    half_bytes: u64,
    /// The half that takes records. Its last page is left for saying that the other is settled.
    current: usize,
    halves: [Half; 2],
    buffer: Arc<Mutex<AlignedBuffer>>,
}

#[derive(Debug, Default)]
struct Half {
    used: u64,
    /// Sequence of its last record.
    last: u64,
    /// What its records preserved, and where.
    parts: Vec<Part>,
    settling: Option<Arc<Settling>>,
}

/// Blocks of one snapshot whose bits, or bytes, may be durable in the journal only.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub snapshot: Arc<Snapshot>,
    pub runs: Vec<BlockRange>,
}

/// A snapshot whose store or map failed, with all that it lost.
#[derive(Debug)]
pub(super) struct Lost {
    pub part: Part,
    pub error: Error,
}

/// What became of a half.
#[derive(Debug)]
pub(super) struct Outcome {
    pub lost: Vec<Lost>,
    /// The map of changed blocks.
    pub changed: Result<()>,
}

#[derive(Debug)]
struct Settling {
    work: Mutex<Option<(Vec<Part>, Arc<MapFile>)>>,
    outcome: Mutex<Option<Outcome>>,
    ended: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Settling {
    fn run(&self) {
        let Some((parts, changed)) = lock(&self.work).take() else { return };
        let mut lost = Vec::new();
        for part in parts {
            if let Err(error) = part.snapshot.settle() {
                lost.push(Lost { part, error });
            }
        }
        *lock(&self.outcome) = Some(Outcome { lost, changed: changed.commit_all() });
        self.ended.notify_all();
    }

    /// Does it now if nobody has begun, else waits.
    fn outcome(&self) -> Outcome {
        self.run();
        let missing = |outcome: &mut Option<Outcome>| outcome.is_none();
        let waited = self.ended.wait_while(lock(&self.outcome), missing);
        let mut outcome = waited.unwrap_or_else(PoisonError::into_inner);
        outcome.take().expect("waited for")
    }
}

/// A record that still counts.
#[derive(Debug)]
pub(super) struct Replayed {
    pub record: JournalRecord,
    pub payload: Vec<u8>,
}

/// What a journal held when it was opened.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// In their order.
    pub records: Vec<Replayed>,
    /// Records were lost: nobody knows what they said.
    pub damaged: bool,
}

fn half_bytes_for(geometry: Geometry) -> u64 {
    (geometry.size() / 8)
        .clamp(JOURNAL_HALF_BYTES_MIN, JOURNAL_HALF_BYTES_MAX)
        .next_multiple_of(PAGE)
}

impl Journal {
    /// A journal without records, all its space taken. Durable when it returns.
    pub fn create(directory: &dyn Directory, backup: Uuid, geometry: Geometry) -> Result<Self> {
        let half = half_bytes_for(geometry);
        directory.remove(JOURNAL)?;
        let file = directory.create(JOURNAL, 2 * half)?;
        let zeros = AlignedBuffer::zeroed(half.min(STRETCH_BYTES) as usize);
        let mut at = 0;
        while at < 2 * half {
            let count = (2 * half - at).min(zeros.len() as u64);
            file.write_at(at, &zeros[..count as usize])?;
            at += count;
        }
        file.flush()?;
        Ok(Self::assemble(file, backup, 0))
    }

    fn assemble(file: Arc<dyn Device>, backup: Uuid, sequence: u64) -> Self {
        let half_bytes = file.size() / 2 / PAGE * PAGE;
        let room = JournalRecord::header_bytes(JOURNAL_RUNS_MAX) + STRETCH_BYTES as usize;
        let room = room.min((half_bytes - PAGE) as usize);
        Self {
            file,
            half_bytes,
            backup,
            sequence,
            settled: sequence,
            current: 0,
            halves: Default::default(),
            buffer: Arc::new(Mutex::new(AlignedBuffer::zeroed(room))),
        }
    }

    /// Opens a journal and tells what its records say. Once that is durable elsewhere, `settle`.
    pub fn open(
        directory: &dyn Directory,
        backup: Uuid,
        geometry: Geometry,
    ) -> Result<(Self, Replay)> {
        let mut journal = Self::assemble(directory.open(JOURNAL)?, backup, 0);
        let mut found = Vec::new();
        let mut stray = 0;
        let mut bytes = AlignedBuffer::zeroed(journal.half_bytes as usize);
        for half in 0..2 {
            journal.file.read_at(half as u64 * journal.half_bytes, &mut bytes)?;
            let before = found.len();
            let end = read_half(&bytes, backup, geometry, &mut found)?;
            stray = stray.max(latest_stray(&bytes[end..], backup, geometry)?);
            if let Some(last) = found[before..].last() {
                let last = last.record.sequence;
                journal.halves[half] = Half { used: end as u64, last, ..Half::default() };
            }
        }
        journal.current = usize::from(journal.halves[1].last > journal.halves[0].last);
        // Of the other nothing counts once this replay is durable.
        journal.halves[1 - journal.current] = Half::default();
        found.sort_by_key(|replayed: &Replayed| replayed.record.sequence);
        let newest = found.last().map_or((0, 0), |r| (r.record.sequence, r.record.settled));
        found.retain(|replayed| replayed.record.sequence > newest.1);
        let whole = found.len() as u64 == newest.0 - newest.1 && stray <= newest.0;
        (journal.sequence, journal.settled) = newest;
        Ok((journal, Replay { records: found, damaged: !whole }))
    }

    /// Whether a record of so many runs and bytes fits a half.
    pub fn fits(&self, runs: usize, payload: u64) -> bool {
        runs <= JOURNAL_RUNS_MAX && record_bytes(runs, payload) <= lock(&self.buffer).len() as u64
    }

    /// The memory that a record is put together in, and where its old bytes begin.
    pub fn buffer(&self, runs: usize) -> (Arc<Mutex<AlignedBuffer>>, usize) {
        (Arc::clone(&self.buffer), JournalRecord::header_bytes(runs))
    }

    /// Makes room for a record: if the current half is full, the other one takes over. What became
    /// of the other one's earlier records is told.
    pub fn make_room(
        &mut self,
        runs: usize,
        payload: u64,
        changed: &Arc<MapFile>,
        pool: Option<&Arc<WorkerPool>>,
    ) -> (Option<Outcome>, Result<()>) {
        if self.halves[self.current].used + record_bytes(runs, payload) <= self.half_bytes - PAGE {
            return (None, Ok(()));
        }
        let outcome = self.finish_settling(1 - self.current);
        if let Some(Outcome { changed: Err(error), .. }) = &outcome {
            let error = error.clone();
            return (outcome, Err(error));
        }
        // Before the other half is written over, it must be known that nothing there counts.
        let said = match self.halves[self.current].used + PAGE <= self.half_bytes {
            true => self.write(Uuid::nil(), 0, Vec::new(), 0),
            // The last page says it already.
            false => Ok(()),
        };
        self.begin_settling(self.current, changed, pool);
        self.current = 1 - self.current;
        (outcome, said)
    }

    fn begin_settling(
        &mut self,
        half: usize,
        changed: &Arc<MapFile>,
        pool: Option<&Arc<WorkerPool>>,
    ) {
        let half = &mut self.halves[half];
        if half.used == 0 || half.settling.is_some() {
            return;
        }
        let work = (std::mem::take(&mut half.parts), Arc::clone(changed));
        let settling = Arc::new(Settling {
            work: Mutex::new(Some(work)),
            outcome: Mutex::default(),
            ended: Condvar::new(),
        });
        half.settling = Some(Arc::clone(&settling));
        if let Some(pool) = pool {
            // Where no thread is free, whoever needs the half next does it.
            let _taken = pool.offer(move || settling.run());
        }
    }

    fn finish_settling(&mut self, half: usize) -> Option<Outcome> {
        let half = &mut self.halves[half];
        let outcome = half.settling.take().map(|settling| settling.outcome());
        // Where the map failed, the records are all that knows of the changes.
        if outcome.as_ref().is_some_and(|outcome| outcome.changed.is_ok()) {
            half.used = 0;
            self.settled = self.settled.max(half.last);
        }
        outcome
    }

    /// Settles everything; the next record says so. (Until then a start replays in vain.)
    pub fn settle(&mut self, changed: &Arc<MapFile>) -> Vec<Outcome> {
        let older = self.finish_settling(1 - self.current);
        let Half { used, last, .. } = self.halves[self.current];
        self.begin_settling(self.current, changed, None);
        let newer = self.finish_settling(self.current);
        let half = &mut self.halves[self.current];
        (half.used, half.last) = (used, last);
        let outcomes: Vec<Outcome> = older.into_iter().chain(newer).collect();
        if outcomes.iter().all(|outcome| outcome.changed.is_ok()) {
            self.settled = self.sequence;
        }
        outcomes
    }

    /// Writes a record, whose old bytes are in the buffer already; durable when it returns. There
    /// is room for it.
    pub fn append(
        &mut self,
        snapshot: Option<&Arc<Snapshot>>,
        changed: u64,
        runs: Vec<JournalRun>,
        payload_bytes: u64,
    ) -> Result<()> {
        let preserved = runs.iter().filter(|run| run.kind != JournalKind::Changed);
        let preserved: Vec<BlockRange> = preserved.map(|run| run.blocks).collect();
        let id = snapshot.map_or(Uuid::nil(), |snapshot| snapshot.id());
        self.write(id, changed, runs, payload_bytes)?;
        if let Some(snapshot) = snapshot {
            self.halves[self.current].part(snapshot).runs.extend(preserved);
        }
        Ok(())
    }

    fn write(
        &mut self,
        snapshot: Uuid,
        changed: u64,
        runs: Vec<JournalRun>,
        payload_bytes: u64,
    ) -> Result<()> {
        let mut buffer = lock(&self.buffer);
        let header = JournalRecord::header_bytes(runs.len());
        let payload = &mut buffer[header..][..payload_bytes.next_multiple_of(PAGE) as usize];
        payload[payload_bytes as usize..].fill(0);
        let record = JournalRecord {
            backup: self.backup,
            snapshot,
            sequence: self.sequence + 1,
            settled: self.settled,
            changed,
            payload_bytes,
            payload_crc: crc32c::crc32c(&payload[..payload_bytes as usize]),
            runs,
        };
        record.encode(&mut buffer);
        let bytes = record.bytes();
        let half = &mut self.halves[self.current];
        assert!(half.used + bytes <= self.half_bytes, "room was made");
        let at = self.current as u64 * self.half_bytes + half.used;
        self.file.write_at(at, &buffer[..bytes as usize])?;
        self.file.flush()?;
        self.sequence += 1;
        half.used += bytes;
        half.last = self.sequence;
        Ok(())
    }
}

fn record_bytes(runs: usize, payload: u64) -> u64 {
    JournalRecord::header_bytes(runs) as u64 + payload.next_multiple_of(PAGE)
}

impl Half {
    fn part(&mut self, snapshot: &Arc<Snapshot>) -> &mut Part {
        let at = self.parts.iter().position(|part| part.snapshot.id() == snapshot.id());
        let at = at.unwrap_or_else(|| {
            self.parts.push(Part { snapshot: Arc::clone(snapshot), runs: Vec::new() });
            self.parts.len() - 1
        });
        &mut self.parts[at]
    }
}

/// Reads the records that follow each other from the start of a half; returns where they end.
fn read_half(
    bytes: &[u8],
    backup: Uuid,
    geometry: Geometry,
    found: &mut Vec<Replayed>,
) -> Result<usize> {
    let mut at = 0;
    let mut expected = None;
    while let Some(record) = record_at(&bytes[at..], backup, geometry)? {
        let header = JournalRecord::header_bytes(record.runs.len());
        let payload = usize::try_from(record.payload_bytes)
            .ok()
            .and_then(|length| bytes[at + header..].get(..length))
            .filter(|payload| crc32c::crc32c(payload) == record.payload_crc);
        let follows = expected.is_none_or(|expected| expected == record.sequence);
        let Some(payload) = payload.filter(|_| follows) else { break };
        expected = Some(record.sequence + 1);
        at = (at + record.bytes() as usize).min(bytes.len());
        found.push(Replayed { payload: payload.to_vec(), record });
    }
    Ok(at)
}

/// The greatest sequence of a record behind those that follow each other: an older one, or one
/// that stands behind a lost one. The first place may hold a record that was torn.
fn latest_stray(bytes: &[u8], backup: Uuid, geometry: Geometry) -> Result<u64> {
    let mut latest = 0;
    for at in (JOURNAL_PAGE_BYTES..bytes.len()).step_by(JOURNAL_PAGE_BYTES) {
        if let Some(record) = record_at(&bytes[at..], backup, geometry)? {
            latest = latest.max(record.sequence);
        }
    }
    Ok(latest)
}

fn record_at(bytes: &[u8], backup: Uuid, geometry: Geometry) -> Result<Option<JournalRecord>> {
    match JournalRecord::decode(bytes, geometry.blocks()) {
        Found::Nothing => Ok(None),
        Found::Unknown(error) => Err(error),
        Found::Record(record) => record.check_backup(backup).map(|()| Some(record)),
    }
}
