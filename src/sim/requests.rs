//! What is asked of the volume, and what it answers.
//!
//! Guarantees: every answer is put before the oracle. Does not know: what is asked next.

use super::oracle::Value;
use super::rare::RareState;
use super::stamp;
use super::world::World;
use crate::device::Payload;
use crate::error::ErrorKind;
use crate::extent::ByteRange;
use crate::volume::primary::MirrorPolicy;
use crate::volume::service::{Command, Outcome};

/// What was asked and not answered.
#[derive(Clone, Debug)]
pub enum Asked {
    /// `missing`: of blocks that were missing; `struck`: the disk has failed a read since.
    Read {
        range: ByteRange,
        missing: bool,
        struck: bool,
    },
    Write {
        range: ByteRange,
    },
    Flush {
        mirrored: bool,
    },
    Nothing,
}

impl World {
    pub fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub fn new_value(&mut self) -> Value {
        self.next_value += 1;
        self.next_value
    }

    fn is_missing(&self, range: ByteRange) -> bool {
        let blocks = self.setting.geometry.touched(range);
        let driver = self.primary.driver();
        driver.is_some_and(|driver| !driver.map().current().all_equal(blocks, true))
    }

    pub fn read(&mut self, range: ByteRange) {
        let id = self.new_id();
        self.oracle.begin_read(id, stamp::sectors(range));
        let missing = self.is_missing(range);
        self.ask(id, Asked::Read { range, missing, struck: false }, Command::Read { range });
    }

    pub fn cache(&mut self, range: ByteRange) {
        let id = self.new_id();
        self.ask(id, Asked::Nothing, Command::Cache { range });
    }

    pub fn write(&mut self, range: ByteRange, values: &[Value], force_unit_access: bool) {
        let id = self.new_id();
        let data = Payload::copy_of(&stamp::bytes(values.iter().copied()));
        let by_sector = stamp::sectors(range).zip(values.iter().copied()).collect();
        self.oracle.begin_write(id, by_sector, force_unit_access);
        let command = Command::Write { offset: range.offset, data, force_unit_access };
        self.ask(id, Asked::Write { range }, command);
    }

    pub fn write_zeroes(&mut self, range: ByteRange, force_unit_access: bool) {
        let id = self.new_id();
        let zeros = stamp::sectors(range).map(|at| (at, 0)).collect();
        self.oracle.begin_write(id, zeros, force_unit_access);
        let command = Command::WriteZeroes { range, may_deallocate: true, force_unit_access };
        self.ask(id, Asked::Write { range }, command);
    }

    pub fn trim(&mut self, range: ByteRange, force_unit_access: bool) {
        let id = self.new_id();
        let whole = self.setting.geometry.bytes_of(self.setting.geometry.covered(range));
        let zeros = stamp::sectors(whole).map(|at| (at, 0)).collect();
        self.oracle.begin_write(id, zeros, force_unit_access);
        self.ask(id, Asked::Write { range: whole }, Command::Trim { range, force_unit_access });
    }

    pub fn flush(&mut self) {
        let id = self.new_id();
        let resyncing = self
            .primary
            .driver()
            .is_some_and(|driver| driver.with_machine(|machine, _, _| machine.is_resyncing()));
        if resyncing {
            self.rare.note(RareState::ResyncPendingFlush);
        }
        let mirrored = self.session.is_some()
            && !resyncing
            && !matches!(self.setting.options.policy, MirrorPolicy::Async(_));
        self.oracle.begin_flush(id, mirrored);
        self.ask(id, Asked::Flush { mirrored }, Command::Flush);
    }

    fn ask(&mut self, id: u64, asked: Asked, command: Command) {
        self.note(|| format!("request {id}: {asked:?}"));
        self.asked.insert(id, asked);
        self.primary.ask(id, command);
        self.look();
    }

    pub fn outstanding(&self) -> usize {
        self.asked.len()
    }

    pub fn writes_under_way(&self) -> bool {
        self.asked.values().any(|asked| matches!(asked, Asked::Write { .. }))
    }

    pub(super) fn answered(&mut self, id: u64, outcome: Outcome) {
        let asked = self.asked.remove(&id).expect("a request is answered once");
        self.note(|| match &outcome {
            Ok(_) => format!("answer {id}"),
            Err(error) => format!("answer {id}: {error}"),
        });
        match (asked, outcome) {
            (Asked::Read { range, struck, missing }, Ok(Some(buffer))) => {
                let found = stamp::values(range, &buffer);
                if struck && !missing {
                    self.rare.note(RareState::ReadHealed);
                }
                self.note(|| format!("    found {found:?}"));
                self.oracle.read_done(id, &found);
            }
            (Asked::Read { .. }, Ok(None)) => panic!("read {id} was answered with nothing"),
            (Asked::Read { missing, .. }, Err(error)) => {
                if missing && error.kind() == ErrorKind::Timeout {
                    self.rare.note(RareState::MissingReadTimedOut);
                }
                self.oracle.read_failed(id);
            }
            (Asked::Write { range }, outcome) => self.write_answered(id, range, outcome.is_ok()),
            (Asked::Flush { mirrored }, Ok(_)) => {
                let vouched = self.oracle.flush_done(id);
                if mirrored && !vouched {
                    self.rare.note(RareState::FlushLostTheLink);
                }
                if vouched {
                    self.check_backup();
                }
            }
            (Asked::Flush { .. }, Err(_)) => self.oracle.flush_failed(id),
            (Asked::Nothing, _) => {}
        }
    }

    fn write_answered(&mut self, id: u64, range: ByteRange, succeeded: bool) {
        let geometry = self.setting.geometry;
        let overtakes = |(other, asked): (&u64, &Asked)| match asked {
            Asked::Read { range: read, missing: true, .. } => {
                *other < id && geometry.touched(*read).intersect(geometry.covered(range)).is_some()
            }
            _ => false,
        };
        if succeeded && self.asked.iter().any(overtakes) {
            self.rare.note(RareState::FetchOvertakenByWrite);
        }
        self.oracle.write_ended(id, succeeded);
    }
}
