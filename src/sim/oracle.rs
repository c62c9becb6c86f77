//! What a volume may answer: the ghosts of the consistency rules, per sector, and no more.
//!
//! | ghost | holds | narrowed by |
//! |---|---|---|
//! | settled | values the sector may have with no write under way | a write's end, a quiet read |
//! | local | values it may have after a crash of the primary | a flush's or FUA write's end |
//! | mirrored | values the backup may hold | the end of a flush that was mirrored throughout |
//!
//! Guarantees: a value that is refused is one that no order of the requests explains.
//! Does not know: blocks, maps, the link.

use std::collections::BTreeMap;

/// What a sector holds, as one number.
pub type Value = u64;

const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    value: Value,
    /// When its write ended; `NEVER` while it is under way.
    ended: u64,
    /// The write, 0 for none.
    write: u64,
}

#[derive(Debug)]
struct Sector {
    settled: Vec<Candidate>,
    local: Vec<Candidate>,
    mirrored: Vec<Candidate>,
    under_way: u32,
    /// Counts beginnings and ends of writes.
    touched: u64,
}

#[derive(Debug)]
struct Read {
    sectors: BTreeMap<u64, (Vec<Value>, u64, bool)>,
}

#[derive(Debug)]
struct Write {
    begun: u64,
    values: BTreeMap<u64, Value>,
    force_unit_access: bool,
}

#[derive(Debug)]
struct Flush {
    begun: u64,
    settled: BTreeMap<u64, Vec<Candidate>>,
    mirrored: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Oracle {
    now: u64,
    sectors: BTreeMap<u64, Sector>,
    reads: BTreeMap<u64, Read>,
    writes: BTreeMap<u64, Write>,
    flushes: BTreeMap<u64, Flush>,
    last_flush: u64,
    last_mirrored: Option<u64>,
}

fn values(candidates: &[Candidate]) -> Vec<Value> {
    candidates.iter().map(|held| held.value).collect()
}

/// What remains possible once everything settled when a flush began is durable.
fn after_flush(held: &mut Vec<Candidate>, settled: &[Candidate], begun: u64) {
    held.retain(|candidate| candidate.ended > begun);
    for candidate in settled {
        if !held.contains(candidate) {
            held.push(*candidate);
        }
    }
}

impl Oracle {
    /// `backup_agrees`: the backup holds these values too.
    pub fn new(initial: impl IntoIterator<Item = (u64, Value)>, backup_agrees: bool) -> Self {
        let sector = |value| {
            let held = vec![Candidate { value, ended: 0, write: 0 }];
            let (local, mirrored) = (held.clone(), held.clone());
            Sector { settled: held, local, mirrored, under_way: 0, touched: 0 }
        };
        Self {
            now: 1,
            sectors: initial.into_iter().map(|(at, value)| (at, sector(value))).collect(),
            reads: BTreeMap::new(),
            writes: BTreeMap::new(),
            flushes: BTreeMap::new(),
            last_flush: 0,
            last_mirrored: backup_agrees.then_some(0),
        }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub fn begin_read(&mut self, id: u64, sectors: impl Iterator<Item = u64>) {
        let begin = |at: u64| {
            let sector = &self.sectors[&at];
            let mut possible = values(&sector.settled);
            let under_way = sector.local.iter().filter(|held| held.ended == NEVER);
            possible.extend(under_way.map(|held| held.value));
            (at, (possible, sector.touched, sector.under_way == 0))
        };
        let read = Read { sectors: sectors.map(begin).collect() };
        self.reads.insert(id, read);
    }

    pub fn read_failed(&mut self, id: u64) {
        self.reads.remove(&id);
    }

    pub fn read_done(&mut self, id: u64, found: &BTreeMap<u64, Value>) {
        self.tick();
        let read = self.reads.remove(&id).expect("the read was begun");
        for (at, (possible, touched, quiet)) in read.sectors {
            let value = found[&at];
            assert!(
                possible.contains(&value),
                "stale read {id}: sector {at} holds {value}, allowed are {possible:?}"
            );
            let sector = self.sectors.get_mut(&at).expect("only known sectors are read");
            if quiet && sector.touched == touched {
                assert!(
                    sector.settled.iter().any(|held| held.value == value),
                    "read {id}: sector {at} holds {value}, another was seen before"
                );
                sector.settled.retain(|held| held.value == value);
            }
        }
    }

    pub fn begin_write(&mut self, id: u64, values: BTreeMap<u64, Value>, force_unit_access: bool) {
        let begun = self.tick();
        for (&at, &value) in &values {
            let sector = self.sectors.get_mut(&at).expect("only known sectors are written");
            let candidate = Candidate { value, ended: NEVER, write: id };
            sector.local.push(candidate);
            sector.mirrored.push(candidate);
            sector.under_way += 1;
            sector.touched += 1;
            for read in self.reads.values_mut() {
                if let Some((possible, ..)) = read.sectors.get_mut(&at) {
                    possible.push(value);
                }
            }
        }
        self.writes.insert(id, Write { begun, values, force_unit_access });
    }

    pub fn write_ended(&mut self, id: u64, succeeded: bool) {
        let now = self.tick();
        let write = self.writes.remove(&id).expect("the write was begun");
        for (&at, &value) in &write.values {
            let sector = self.sectors.get_mut(&at).expect("only known sectors are written");
            let ended = Candidate { value, ended: now, write: id };
            for held in sector.local.iter_mut().chain(&mut sector.mirrored) {
                if held.write == id {
                    held.ended = now;
                }
            }
            if succeeded {
                sector.settled.retain(|held| held.ended > write.begun);
                if write.force_unit_access {
                    sector.local.retain(|held| held.ended > write.begun);
                }
            }
            sector.settled.push(ended);
            sector.under_way -= 1;
            sector.touched += 1;
        }
    }

    pub fn begin_flush(&mut self, id: u64, mirrored: bool) {
        let begun = self.tick();
        let settled =
            self.sectors.iter().map(|(at, sector)| (*at, sector.settled.clone())).collect();
        self.flushes.insert(id, Flush { begun, settled, mirrored });
    }

    /// No flush under way is mirrored throughout.
    pub fn link_lost(&mut self) {
        for flush in self.flushes.values_mut() {
            flush.mirrored = false;
        }
    }

    pub fn flush_failed(&mut self, id: u64) {
        self.flushes.remove(&id);
    }

    /// Returns whether the backup vouches for it too.
    pub fn flush_done(&mut self, id: u64) -> bool {
        let flush = self.flushes.remove(&id).expect("the flush was begun");
        let local = flush.begun > self.last_flush;
        let mirrored = flush.mirrored && self.last_mirrored.is_none_or(|last| flush.begun > last);
        for (at, settled) in &flush.settled {
            let sector = self.sectors.get_mut(at).expect("sectors stay");
            if local {
                after_flush(&mut sector.local, settled, flush.begun);
            }
            if mirrored {
                after_flush(&mut sector.mirrored, settled, flush.begun);
            }
        }
        if local {
            self.last_flush = flush.begun;
        }
        if mirrored {
            self.last_mirrored = Some(flush.begun);
        }
        mirrored
    }

    /// The primary lost power: whatever was not flushed may be there or not.
    pub fn crash(&mut self) {
        let now = self.tick();
        for sector in self.sectors.values_mut() {
            for held in sector.local.iter_mut().chain(&mut sector.mirrored) {
                held.ended = held.ended.min(now);
            }
            sector.settled.clone_from(&sector.local);
            sector.settled.iter_mut().for_each(|held| held.ended = now);
            sector.under_way = 0;
            sector.touched += 1;
        }
        self.reads.clear();
        self.writes.clear();
        self.flushes.clear();
    }

    /// These sectors were lost: they hold what the backup may hold. Nothing is under way.
    pub fn lose(&mut self, sectors: &[u64]) {
        let now = self.tick();
        for at in sectors {
            let sector = self.sectors.get_mut(at).expect("only known sectors are lost");
            sector.mirrored.iter_mut().for_each(|held| held.ended = held.ended.min(now));
            sector.settled.clone_from(&sector.mirrored);
            sector.local.clone_from(&sector.mirrored);
            sector.under_way = 0;
            sector.touched += 1;
        }
    }

    /// Whether the backup ever held all of the volume.
    #[must_use]
    pub fn is_backed(&self) -> bool {
        self.last_mirrored.is_some()
    }

    /// A snapshot that was begun like a read of these sectors has them as at one instant.
    pub fn cut_done(&mut self, id: u64, found: &BTreeMap<u64, Value>) {
        // A crash of the primary forgets what was asked.
        let Some(read) = self.reads.remove(&id) else { return };
        for (at, (possible, ..)) in read.sectors {
            let value = found[&at];
            assert!(
                possible.contains(&value),
                "a snapshot holds {value} in sector {at}, allowed are {possible:?}"
            );
        }
    }

    /// Everything the backup may hold after a crash is what a mirrored flush allows (I3).
    pub fn check_backup(&self, at: u64, held: Value) {
        if self.last_mirrored.is_none() {
            return;
        }
        let allowed = values(&self.sectors[&at].mirrored);
        assert!(
            allowed.contains(&held),
            "the backup may hold {held} in sector {at}, a mirrored flush allows {allowed:?}"
        );
    }

    /// With nothing under way, a sector holds a settled value.
    pub fn check_settled(&self, at: u64, held: Value) {
        let allowed = values(&self.sectors[&at].settled);
        assert!(
            allowed.contains(&held),
            "sector {at} holds {held} in the end, allowed are {allowed:?}"
        );
    }

    #[must_use]
    pub fn sectors(&self) -> Vec<u64> {
        self.sectors.keys().copied().collect()
    }

    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.reads.is_empty() && self.writes.is_empty() && self.flushes.is_empty()
    }
}
