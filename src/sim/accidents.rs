//! What befalls a node: its power goes out, its process is killed, its disks fail or rot, its
//! machine is lost.
//!
//! Guarantees: whatever a node may hold after its power went out is put before the oracle.
//! Does not know: when.

use std::sync::Arc;
use std::time::Duration;

use super::disk::{ENOSPC, Part};
use super::merging::Merging;
use super::primary_node::PrimaryNode;
use super::rare::RareState;
use super::requests::Asked;
use super::stamp::{self, SECTOR};
use super::world::{World, stamped};
use crate::clock::MonotonicClock;
use crate::device::{Directory, Operation};
use crate::error::ErrorKind;
use crate::extent::ByteRange;
use crate::map::{INTENT_LOG_NAME, OVERWRITE_MAP_NAME};
use crate::volume::backup::BackupVolume;
use crate::volume::primary::Lost;

impl World {
    /// Whatever the backup may hold after a crash is what mirrored flushes allow (I3).
    pub fn check_backup(&self) {
        for at in self.oracle.sectors() {
            for value in self.backup.may(at) {
                self.oracle.check_backup(at, value);
            }
        }
    }

    /// Everything that was asked of the primary is forgotten, answered or not.
    fn forget_requests(&mut self) {
        self.asked.clear();
        self.merging = None;
        self.snapshots.forget_pending();
        self.session = None;
        self.oracle.crash();
    }

    /// The primary loses power and comes up again.
    pub fn crash_primary(&mut self) {
        self.note(|| "the primary loses power".to_owned());
        if self.merging.as_ref().is_some_and(Merging::has_claims) {
            self.rare.note(RareState::CrashDuringMerge);
        }
        match self.primary.troubles.last() {
            Some((Part::Map, _)) => self.rare.note(RareState::CrashDuringCommit),
            Some((Part::Intent, _)) => self.rare.note(RareState::CrashDuringIntent),
            _ => {}
        }
        self.note_stopped();
        self.primary.lose_power(&mut self.chance);
        self.forget_requests();
        self.start_primary();
    }

    /// The primary's process is killed; what it wrote stays in the memory of its machine.
    pub fn kill_primary(&mut self) {
        self.note(|| "the primary is killed".to_owned());
        self.note_stopped();
        self.primary.kill();
        self.forget_requests();
        self.start_primary();
    }

    /// Starts the primary until that succeeds: its power may go out meanwhile.
    pub fn start_primary(&mut self) {
        loop {
            if self.chance.one_in(4) {
                self.primary.power.fail_after(self.chance.below(12));
            }
            let started = self.primary.start(&self.setting, false);
            if self.primary.power.is_off() {
                self.note(|| "the primary loses power while it starts".to_owned());
                self.rare.note(RareState::CrashDuringRecovery);
                self.primary.lose_power(&mut self.chance);
                continue;
            }
            self.primary.power.fail_after(u64::MAX);
            match started {
                Ok(()) => break,
                Err(error) if self.rotten && error.kind() == ErrorKind::Integrity => {
                    self.note(|| format!("the volume is refused: {error}"));
                    self.rare.note(RareState::RefusedAfterRot);
                    self.is_over = !self.backup_has_all();
                    return self.replace_machine();
                }
                Err(error) => panic!("after a crash the volume is refused: {error}"),
            }
        }
        let recovery = self.primary.recovery();
        self.note(|| format!("the primary has started: {recovery:?}"));
        self.note(|| self.planes());
        for (count, state) in [
            (recovery.damaged_pages, RareState::DamagedMapPage),
            (recovery.link_only_blocks, RareState::IntentMadeLinkOnly),
            (recovery.unsent_blocks(), RareState::IntentMadeUnsent),
        ] {
            if count > 0 {
                self.rare.note(state);
            }
        }
    }

    /// The planes of the primary's map in words: which blocks are missing, link-only, unsent.
    pub fn planes(&self) -> String {
        let Some(driver) = self.primary.driver() else { return "no map".to_owned() };
        let (map, all) = (driver.map(), self.setting.geometry.all_blocks());
        format!(
            "missing {:?}, link-only {:?}, unsent {:?}",
            map.current().runs(all, false).collect::<Vec<_>>(),
            map.link_only().runs(all, true).collect::<Vec<_>>(),
            map.unsent().runs(all, true).collect::<Vec<_>>()
        )
    }

    /// While the primary is stopped, a bit of its map or intent log rots.
    pub fn rot(&mut self) {
        self.end_merge();
        self.note_stopped();
        let stopped = self.primary.stop();
        self.primary.kill();
        self.forget_requests();
        if stopped.is_err() || self.primary.power.is_off() {
            return self.start_primary();
        }
        self.primary.power.fail_after(u64::MAX);
        let name = self.chance.pick(&[OVERWRITE_MAP_NAME, OVERWRITE_MAP_NAME, INTENT_LOG_NAME]);
        if let Ok(file) = self.primary.directory.open(name) {
            let mut sectors = Vec::new();
            let mut at = 0;
            while let Ok(Some(found)) = file.next_data(at) {
                sectors.push(found.offset);
                at = found.end();
            }
            if !sectors.is_empty() {
                let at = self.chance.pick(&sectors);
                let mut bytes = [0; SECTOR as usize];
                file.read_at(at, &mut bytes).expect("the power is on");
                let byte = self.chance.index(bytes.len());
                bytes[byte] ^= 1 << self.chance.below(8);
                file.write_at(at, &bytes).expect("the power is on");
                file.flush().expect("the power is on");
                self.note(|| format!("a bit of {name} rots at {}", at + byte as u64));
                self.rotten = true;
            }
        }
        self.start_primary();
    }

    /// The backup loses power and comes up again.
    pub fn crash_backup(&mut self) {
        self.note(|| "the backup loses power".to_owned());
        let preserving = matches!(
            self.backup.troubles.last(),
            Some((Part::Journal | Part::Store | Part::Preserved | Part::Changed, _))
        );
        if preserving {
            self.rare.note(RareState::CrashDuringPreservation);
        }
        self.note_stopped();
        self.check_backup();
        let before = self.backup.disk.contents();
        self.backup.lose_power(&mut self.chance);
        if before != self.backup.disk.contents() {
            self.rare.note(RareState::BackupLostUnflushedTail);
        }
        self.start_backup();
        self.snapshots.has_crashed();
        self.check_snapshots();
    }

    pub fn start_backup(&mut self) {
        loop {
            if self.chance.one_in(4) {
                self.backup.power.fail_after(self.chance.below(12));
            }
            let started = self.backup.start(&self.setting);
            if self.backup.power.is_off() {
                self.note(|| "the backup loses power while it starts".to_owned());
                self.rare.note(RareState::CrashDuringRecovery);
                self.backup.lose_power(&mut self.chance);
                continue;
            }
            self.backup.power.fail_after(u64::MAX);
            match started {
                Ok(()) => break,
                Err(error) if error.errno() == Some(ENOSPC) && self.make_room() => {}
                Err(error) => panic!("after a crash the backup is refused: {error}"),
            }
        }
        self.note(|| "the backup has started".to_owned());
        self.check_backup();
    }

    /// Where room for old bytes is scarce, the operator makes some; `false` if it is not.
    pub fn make_room(&mut self) -> bool {
        let capacity = self.backup.directory.capacity();
        if let Some(capacity) = capacity {
            self.note(|| "the operator makes room".to_owned());
            capacity.grow(1 << 20);
        }
        capacity.is_some()
    }

    /// Counts what struck since this was last asked.
    pub fn note_troubles(&mut self) {
        for (part, operation) in self.primary.troubles.take_struck() {
            self.note(|| format!("the primary's {part:?} has failed: {operation:?}"));
            match (part, operation) {
                (Part::Volume, Operation::Write) => self.rare.note(RareState::LocalWriteFailed),
                (Part::Volume, Operation::Read) => {
                    for asked in self.asked.values_mut() {
                        if let Asked::Read { struck, .. } = asked {
                            *struck = true;
                        }
                    }
                }
                _ => {}
            }
        }
        for (part, operation) in self.backup.troubles.take_struck() {
            self.note(|| format!("the backup's {part:?} has failed: {operation:?}"));
            self.stores_troubled |= part != Part::Mirror || operation == Operation::Read;
        }
    }

    /// Whether both sides take writes; counts those that do not, which is asked before they are
    /// started again.
    pub fn note_stopped(&mut self) -> (bool, bool) {
        let poisoned = self.primary.driver().is_some_and(|driver| {
            driver.with_machine(|machine, _, _| machine.poisoned().is_some())
        });
        if poisoned {
            self.rare.note(RareState::PrimaryPoisoned);
        }
        let stopped = self.backup.volume().is_some_and(|volume| volume.failure().is_some());
        if stopped {
            self.rare.note(RareState::BackupStopped);
        }
        (poisoned, stopped)
    }

    // Losses.

    /// The operator's word for a volume that waits for it, if the backup has told what it holds.
    pub fn say_the_word(&mut self) {
        let Some(running) = self.primary.running.clone() else { return };
        let Some(word) = self.word.clone().filter(|_| running.volume.live().is_none()) else {
            return;
        };
        match running.volume.restore(&word, Duration::ZERO) {
            Ok(()) => self.note(|| format!("restore --lost {word:?}")),
            Err(error) => self.note(|| format!("restore --lost {word:?}: {error}")),
        }
        self.look();
    }

    /// The primary's machine is lost with everything on it; another takes its place.
    pub fn replace_machine(&mut self) {
        if !self.backup_has_all() {
            return;
        }
        self.note(|| "the primary's machine is lost".to_owned());
        self.note_loss();
        self.rare.note(RareState::MachineReplaced);
        self.primary.lose_power(&mut self.chance);
        self.forget_requests();
        let garbage = stamped(&self.setting, |_| stamp::GARBAGE);
        let clock = MonotonicClock::told(self.clock);
        self.primary =
            PrimaryNode::new(&self.works, clock, &self.setting, &garbage, &mut self.chance);
        self.primary.start(&self.setting, false).expect("there is nothing that could be refused");
        self.oracle.lose(&self.oracle.sectors());
        self.word = Some(Lost::All);
    }

    /// Whether the backup knows the volume and ever held all of it: it can be taken for the truth.
    fn backup_has_all(&self) -> bool {
        let known = |volume: &Arc<BackupVolume>| !volume.identity().volume.is_nil();
        self.oracle.is_backed() && self.backup.volume().is_some_and(known)
    }

    fn note_loss(&mut self) {
        let driver = self.primary.driver();
        if driver.is_some_and(|driver| driver.map().missing_bytes() > 0) {
            self.rare.note(RareState::LossDuringRestore);
        }
    }

    /// Reads that are under way while the disk is lost may find anything.
    fn forget_reads(&mut self) {
        for (id, asked) in &mut self.asked {
            if matches!(asked, Asked::Read { .. }) {
                self.oracle.read_failed(*id);
                *asked = Asked::Nothing;
            }
        }
    }

    /// Declares a loss of a volume that runs, and then these bytes are lost.
    pub fn declare(&mut self, range: Option<ByteRange>) {
        if !self.backup_has_all() || self.primary.driver().is_none() {
            return;
        }
        self.note(|| format!("restore --lost {range:?}"));
        self.note_loss();
        let lost = range.map_or(Lost::All, |range| Lost::Ranges(vec![range]));
        loop {
            let running = self.primary.running.clone().expect("the volume runs");
            let declared = running.volume.restore(&lost, Duration::ZERO);
            let off = self.primary.power.is_off();
            self.look();
            match declared {
                Ok(()) if !off => break,
                Err(error) if error.kind() == ErrorKind::Busy => return,
                // The operator says it again: whether it took effect is not known.
                Ok(()) | Err(_) => {
                    if !off {
                        self.primary.troubles.disarm();
                        self.kill_primary();
                    }
                }
            }
        }
        if range.is_some() {
            self.rare.note(RareState::PartialLoss);
        }
        let geometry = self.setting.geometry;
        let bytes = geometry.bytes_of(geometry.touched(range.unwrap_or(geometry.all_bytes())));
        let inside = |at: &u64| ByteRange::new(at * SECTOR, SECTOR).intersect(bytes).is_some();
        let lost: Vec<u64> = self.oracle.sectors().into_iter().filter(inside).collect();
        self.forget_reads();
        for at in &lost {
            self.primary.spoil(ByteRange::new(at * SECTOR, SECTOR));
        }
        self.oracle.lose(&lost);
        self.merging = None;
    }
}
