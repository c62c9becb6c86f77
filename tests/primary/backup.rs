//! A model of the backup and of the link to it, without any machinery.
//!
//! Guarantees: a connection delivers in order or not at all; mirrored operations are applied in
//! their order, a fetch sees everything up to the sequence it names; a new session drains or drops
//! what was left of the one before, and makes durable what that had applied.
//! Does not know: snapshots beyond a copy of everything at the cut.

use std::collections::VecDeque;

use dualrestore::device::{Device, Payload, digest};
use dualrestore::error::Error;
use dualrestore::extent::ByteRange;
use dualrestore::volume::content::Content;
use dualrestore::volume::primary::{Event, FetchClass, OutgoingMessage};

use crate::disk::Disk;
use dualrestore::sim::Chance;

/// See the module.
#[derive(Debug)]
pub struct Backup {
    pub disk: Disk,
    applied: u64,
    /// Contents at the latest cut.
    pub cut: Option<Vec<u8>>,
}

impl Backup {
    pub fn new(contents: Vec<u8>, seed: u64) -> Self {
        Self { disk: Disk::new(contents, seed), applied: 0, cut: None }
    }

    /// What a mirrored operation is answered with.
    fn apply(&mut self, message: OutgoingMessage) -> Event {
        match message {
            OutgoingMessage::Write { sequence, offset, content } => {
                assert!(sequence > self.applied, "sequences ascend");
                content.write_to(&self.disk, offset).expect("the model's disk takes it");
                self.applied = sequence;
                Event::Applied { sequence }
            }
            OutgoingMessage::Flush { sequence } => {
                self.disk.flush().expect("the model's disk flushes");
                self.applied = sequence;
                Event::Flushed { sequence }
            }
            OutgoingMessage::Cut { sequence, .. } => {
                self.disk.flush().expect("the model's disk flushes");
                self.applied = sequence;
                self.cut = Some(self.disk.visible());
                Event::CutAnswered { sequence, result: Ok((1, sequence)) }
            }
            OutgoingMessage::Fetch { .. }
            | OutgoingMessage::Digest { .. }
            | OutgoingMessage::Barrier => unreachable!("not on this connection"),
        }
    }
}

/// Which of the three connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Mirror = 0,
    Demand = 1,
    Bulk = 2,
}

pub const LANES: [Lane; 3] = [Lane::Mirror, Lane::Demand, Lane::Bulk];

/// See the module.
#[derive(Debug, Default)]
pub struct Link {
    pub up: bool,
    there: [VecDeque<OutgoingMessage>; 3],
    back: [VecDeque<Event>; 3],
    /// Mirrored operations of the session before, still on the wire.
    orphans: VecDeque<OutgoingMessage>,
    /// Acknowledgements of earlier sessions of this primary.
    pub late: Vec<Event>,
    /// Applied, and not yet said so.
    owed: Option<u64>,
    /// Messages that were taken off a queue so far.
    pub passed: u64,
    /// Writes that later ones cover do not leave, back to the latest barrier.
    pub supersedes: bool,
    barrier: u64,
}

impl Link {
    /// What has left on this lane and has not reached the backup.
    pub fn waiting_there(&self, lane: Lane) -> &VecDeque<OutgoingMessage> {
        &self.there[lane as usize]
    }

    /// Returns the sequences of writes that do not leave.
    pub fn send(&mut self, message: OutgoingMessage) -> Vec<u64> {
        assert!(self.up, "nothing is sent while the link is down: {message:?}");
        let mut superseded = Vec::new();
        match &message {
            OutgoingMessage::Write { offset, content, .. } if self.supersedes => {
                let range = ByteRange::new(*offset, content.len());
                superseded = self.supersede(range);
            }
            OutgoingMessage::Flush { sequence } | OutgoingMessage::Cut { sequence, .. } => {
                self.barrier = *sequence;
            }
            OutgoingMessage::Barrier => {
                let last = self.there[Lane::Mirror as usize].back();
                self.barrier = last.map_or(self.barrier, OutgoingMessage::sequence);
                return superseded;
            }
            _ => {}
        }
        let lane = match &message {
            OutgoingMessage::Fetch { class: FetchClass::Demand, .. } => Lane::Demand,
            OutgoingMessage::Fetch { class: FetchClass::Bulk, .. }
            | OutgoingMessage::Digest { .. } => Lane::Bulk,
            _ => Lane::Mirror,
        };
        self.there[lane as usize].push_back(message);
        superseded
    }

    fn supersede(&mut self, range: ByteRange) -> Vec<u64> {
        let mut superseded = Vec::new();
        self.there[Lane::Mirror as usize].retain(|held| match held {
            OutgoingMessage::Write { sequence, offset, content } if *sequence > self.barrier => {
                let covered = ByteRange::new(*offset, content.len());
                let stays = range.intersect(covered) != Some(covered);
                if !stays {
                    superseded.push(*sequence);
                }
                stays
            }
            _ => true,
        });
        superseded
    }

    pub fn is_quiet(&self) -> bool {
        LANES.iter().all(|lane| self.there[*lane as usize].is_empty())
            && self.back.iter().all(VecDeque::is_empty)
            && self.owed.is_none()
    }

    /// The connections end. What was sent is drained by the backup later, or dropped.
    pub fn cut(&mut self) {
        self.up = false;
        let [mirror, ..] = std::mem::take(&mut self.there);
        self.orphans = mirror;
        self.owed = None;
        for queue in &mut self.back {
            for event in queue.drain(..) {
                if matches!(event, Event::Applied { .. } | Event::Flushed { .. }) {
                    self.late.push(event);
                }
            }
        }
    }

    /// The backup takes one operation that was on the wire when its session ended.
    pub fn drain_one(&mut self, backup: &mut Backup) {
        if let Some(message) = self.orphans.pop_front() {
            let _nobody_listens = backup.apply(message);
        }
    }

    pub fn drop_orphans(&mut self) {
        self.orphans.clear();
    }

    /// A new session: the old one is fenced (R11), what it applied is made durable.
    pub fn begin(&mut self, backup: &mut Backup) {
        assert!(!self.up);
        self.orphans.clear();
        backup.disk.flush().expect("the model's disk flushes");
        backup.applied = 0;
        self.up = true;
    }

    /// The backup applies the next mirrored operation; it may keep the answer for later.
    pub fn apply_next(&mut self, backup: &mut Backup, chance: &mut Chance) {
        let Some(message) = self.there[Lane::Mirror as usize].pop_front() else { return };
        self.passed += 1;
        match backup.apply(message) {
            Event::Applied { sequence } => {
                self.owed = Some(sequence);
                if chance.one_in(2) {
                    self.pay();
                }
            }
            event => {
                self.pay();
                self.back[Lane::Mirror as usize].push_back(event);
            }
        }
    }

    /// Says what was applied.
    pub fn pay(&mut self) {
        if let Some(sequence) = self.owed.take() {
            self.back[Lane::Mirror as usize].push_back(Event::Applied { sequence });
        }
    }

    /// Fetches and digests that may be served now, by their place in the lane.
    pub fn ready_fetches(&self, backup: &Backup, lane: Lane) -> Vec<usize> {
        let ready = |message: &OutgoingMessage| match message {
            OutgoingMessage::Fetch { after_sequence, .. }
            | OutgoingMessage::Digest { after_sequence, .. } => *after_sequence <= backup.applied,
            _ => false,
        };
        let lane = self.there[lane as usize].iter().enumerate();
        lane.filter(|(_, message)| ready(message)).map(|(at, _)| at).collect()
    }

    /// The backup serves one fetch or digest, or says that it cannot.
    pub fn serve(&mut self, backup: &Backup, lane: Lane, at: usize, fails: bool) {
        let message = self.there[lane as usize].remove(at).expect("it is there");
        self.passed += 1;
        let refused = || Error::link("the backup cannot read that");
        let (tag, range) = match message {
            OutgoingMessage::Fetch { tag, range, .. } => (tag, range),
            OutgoingMessage::Digest { tag, range, .. } => {
                let result = if fails { Err(refused()) } else { digest(&backup.disk, range) };
                self.back[lane as usize].push_back(Event::DigestTold { tag, result });
                return;
            }
            _ => unreachable!("only reads travel there"),
        };
        let mut buffer = vec![0; range.length as usize];
        backup.disk.read_at(range.offset, &mut buffer).expect("the model's disk is sound");
        let content = if buffer.iter().all(|byte| *byte == 0) {
            Content::Zeros(range.length)
        } else {
            Content::Bytes(Payload::copy_of(&buffer))
        };
        let result = if fails { Err(refused()) } else { Ok(content) };
        self.back[lane as usize].push_back(Event::Fetched { tag, result });
    }

    pub fn receive(&mut self, lane: Lane) -> Option<Event> {
        let event = self.back[lane as usize].pop_front();
        self.passed += u64::from(event.is_some());
        event
    }
}
