//! What somebody does, or what goes wrong, in one step of a life.
//!
//! Does not know: how often a life has each (`setting.rs`).

use super::disk::{EIO, ENOSPC, Part};
use super::rare::RareState;
use super::stamp::{self, SECTOR};
use super::wire::{Cut, HERE, THERE};
use super::world::World;
use crate::device::Operation;
use crate::extent::{BlockRange, ByteRange};
use crate::volume::primary::{Caller, Comparison, Event};

const OUTSTANDING_MAX: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Request,
    Time,
    Connect,
    ConnectAgain,
    Merge,
    BeginMerge,
    Cut,
    Bundle,
    Ship,
    DeleteSnapshot,
    CheckSnapshots,
    Hydrate,
    Repair,
    Compare,
    CutWire,
    CutAll,
    Stall,
    DamageWire,
    Part,
    CrashPrimary,
    CrashBackup,
    FusePrimary,
    FuseBackup,
    KillPrimary,
    StopPrimary,
    StopBackup,
    ReplaceMachine,
    LoseAll,
    LoseSome,
    PrimaryFault,
    BackupFault,
    Rot,
}

impl Step {
    /// Whether something goes wrong in it.
    pub fn is_harm(self) -> bool {
        self as usize >= Self::CutWire as usize
    }
}

/// Each step with how likely it is, and how many lives in eight have it at all.
pub const STEPS: [(Step, u64, u64); 32] = [
    (Step::Request, 400, 8),
    (Step::Time, 60, 8),
    (Step::Connect, 60, 8),
    (Step::ConnectAgain, 6, 3),
    (Step::Merge, 90, 6),
    (Step::BeginMerge, 60, 6),
    (Step::Cut, 25, 6),
    (Step::Bundle, 30, 6),
    (Step::Ship, 20, 5),
    (Step::DeleteSnapshot, 3, 4),
    (Step::CheckSnapshots, 4, 5),
    (Step::Hydrate, 8, 2),
    (Step::Repair, 4, 1),
    (Step::Compare, 8, 2),
    (Step::CutWire, 10, 4),
    (Step::CutAll, 6, 4),
    (Step::Stall, 5, 2),
    (Step::DamageWire, 6, 1),
    (Step::Part, 5, 3),
    (Step::CrashPrimary, 5, 3),
    (Step::CrashBackup, 5, 3),
    (Step::FusePrimary, 8, 3),
    (Step::FuseBackup, 8, 3),
    (Step::KillPrimary, 4, 2),
    (Step::StopPrimary, 4, 2),
    (Step::StopBackup, 4, 2),
    (Step::ReplaceMachine, 4, 2),
    (Step::LoseAll, 4, 2),
    (Step::LoseSome, 5, 2),
    (Step::PrimaryFault, 12, 2),
    (Step::BackupFault, 8, 1),
    (Step::Rot, 5, 1),
];

impl World {
    pub fn take(&mut self, step: Step) {
        match step {
            Step::Request if self.outstanding() < OUTSTANDING_MAX => self.request(),
            Step::Request => {}
            Step::Time => self.let_time_pass(),
            Step::Connect => {
                self.connect();
                self.say_the_word();
            }
            Step::ConnectAgain => self.connect_again(),
            Step::Merge => {
                for _ in 0..1 + self.chance.below(3) {
                    self.go_on_merging();
                }
            }
            Step::BeginMerge => self.begin_merge(),
            Step::Cut => self.cut(),
            Step::Bundle => self.make_bundle(),
            Step::Ship => self.ship(),
            Step::DeleteSnapshot => self.delete_snapshot(),
            Step::CheckSnapshots => self.check_snapshots(),
            Step::Hydrate => self.hydrate(),
            Step::Repair => self.repair(),
            Step::Compare => self.compare(),
            Step::CutWire | Step::CutAll | Step::Stall | Step::DamageWire | Step::Part => {
                self.harm_the_link(step);
            }
            Step::PrimaryFault => self.primary_fault(),
            Step::BackupFault => self.backup_fault(),
            _ => self.harm_a_node(step),
        }
    }

    /// What an operator does after a loss: a snapshot, a bundle of it, a merge.
    fn ship(&mut self) {
        const PATIENCE: usize = 300;
        let before = self.snapshots.imaged.len();
        self.cut();
        for _ in 0..PATIENCE {
            if self.snapshots.imaged.len() > before || !self.work() {
                break;
            }
        }
        self.make_bundle();
        self.begin_merge();
    }

    fn harm_the_link(&mut self, step: Step) {
        match step {
            Step::CutWire => {
                let cut = self.a_cut();
                let late = self.chance.one_in(2);
                self.works.cut_one(cut, late);
            }
            Step::CutAll => {
                let cut = self.a_cut();
                let late = self.chance.one_in(2);
                self.works.cut_all(cut, late);
            }
            Step::Stall => self.works.stall_one(),
            Step::DamageWire => {
                if self.works.damage_one() {
                    self.rare.note(RareState::WireDamageCaught);
                }
            }
            _ => self.parted = self.chance.one_in(2),
        }
        self.look();
    }

    fn a_cut(&mut self) -> Cut {
        let end = self.chance.pick(&[HERE, THERE]);
        match self.chance.below(3) {
            0 => Cut::Reset,
            1 => Cut::HalfOpen(end),
            _ => Cut::Truncated(end),
        }
    }

    fn harm_a_node(&mut self, step: Step) {
        match step {
            Step::CrashPrimary => self.crash_primary(),
            Step::CrashBackup => self.crash_backup(),
            Step::FusePrimary => self.primary.power.fail_after(self.chance.below(16)),
            Step::FuseBackup => self.backup.power.fail_after(self.chance.below(24)),
            Step::KillPrimary => self.kill_primary(),
            Step::Rot => self.rot(),
            Step::StopPrimary => self.stop_primary(),
            Step::StopBackup => self.stop_backup(),
            Step::ReplaceMachine => self.replace_machine(),
            Step::LoseAll => {
                self.end_merge();
                self.declare(None);
            }
            _ => {
                self.end_merge();
                let range = self.range();
                self.declare(Some(range));
            }
        }
    }

    fn let_time_pass(&mut self) {
        // Now and then long enough for an extent to cool, or a silent peer to be given up.
        let most = if self.chance.one_in(4) { 6_000 } else { 1_500 };
        if self.chance.one_in(2) {
            self.works.go_on();
        }
        let milliseconds = 100 + self.chance.below(most);
        self.pass(milliseconds);
    }

    /// Consecutive sectors of the window.
    pub fn range(&mut self) -> ByteRange {
        let window = &self.setting.window;
        // Some of it is seldom asked for, so that it stays missing for long.
        let most = if self.chance.one_in(8) { window.len() } else { self.setting.busy };
        let first = self.chance.index(most);
        let rest = &window[first..];
        let run = rest.iter().zip(rest[0]..).take_while(|(at, want)| **at == *want).count();
        let longest = if self.chance.one_in(12) { run } else { run.min(5) };
        let length = 1 + self.chance.index(longest);
        ByteRange::new(rest[0] * SECTOR, length as u64 * SECTOR)
    }

    fn request(&mut self) {
        let range = self.range();
        let force_unit_access = self.chance.one_in(8);
        match self.chance.weighted(&self.setting.requests) {
            0 => self.read(range),
            1 => {
                let values: Vec<_> = stamp::sectors(range).map(|_| self.new_value()).collect();
                self.write(range, &values, force_unit_access);
            }
            2 => self.write_zeroes(range, force_unit_access),
            3 => self.trim(range, force_unit_access),
            4 => self.cache(range),
            _ => self.flush(),
        }
    }

    fn blocks(&mut self) -> BlockRange {
        let range = self.range();
        self.setting.geometry.touched(range)
    }

    fn hydrate(&mut self) {
        let enabled = self.chance.one_in(2);
        if let Some(driver) = self.primary.driver() {
            driver.event(Event::Hydrate { enabled }, Caller::Other);
        }
        self.look();
    }

    /// The operator has some blocks sent to the backup again.
    fn repair(&mut self) {
        let blocks = self.blocks();
        let range = self.setting.geometry.bytes_of(blocks);
        if let Some(running) = self.primary.running.clone() {
            let _waiting = running.volume.repair(range);
        }
        self.look();
    }

    /// The operator compares some blocks with the backup: never cries wolf (law 10).
    pub fn compare(&mut self) {
        let blocks = self.blocks();
        let range = self.setting.geometry.bytes_of(blocks);
        let Some(running) = self.primary.running.clone() else { return };
        let compared = running.volume.compare(range, std::time::Duration::ZERO);
        if let Ok(Comparison::Compared { different, .. }) = compared {
            assert!(different.is_empty(), "the comparison of {blocks:?} cries wolf: {different:?}");
        }
        self.look();
    }

    fn stop_primary(&mut self) {
        self.note(|| "the primary is stopped".to_owned());
        self.end_merge();
        let stopped = self.primary.stop();
        self.look();
        if self.primary.running.is_none() {
            self.note(|| format!("the primary has stopped: {stopped:?}"));
            // What had not ended by then never will.
            self.kill_primary();
        }
    }

    fn stop_backup(&mut self) {
        self.note(|| "the backup is stopped".to_owned());
        self.note_stopped();
        let _failed = self.backup.stop();
        if self.backup.power.is_off() {
            self.crash_backup();
            return;
        }
        self.works.lose_power(THERE);
        self.backup.troubles.renew(std::sync::Arc::clone(&self.backup.power));
        self.start_backup();
        self.look();
        self.check_snapshots();
    }

    fn primary_fault(&mut self) {
        let (part, operation) = match self.chance.below(12) {
            0..4 => (Part::Volume, Operation::Read),
            4..8 => (Part::Volume, Operation::Write),
            8 => (Part::Volume, Operation::Flush),
            9 => (Part::Map, Operation::Write),
            10 => (Part::Map, Operation::Flush),
            _ => (Part::Intent, Operation::Write),
        };
        let errno = self.chance.pick(&[EIO, ENOSPC]);
        self.note(|| format!("a fault of the primary's {part:?} is to come: {operation:?}"));
        self.primary.troubles.arm(part, operation, errno);
    }

    fn backup_fault(&mut self) {
        let (part, operation) = match self.chance.below(12) {
            0..4 => (Part::Mirror, Operation::Read),
            4 => (Part::Mirror, Operation::Write),
            5 => (Part::Mirror, Operation::Flush),
            6 => (Part::Store, Operation::Write),
            7 => (Part::Store, Operation::Flush),
            8 => (Part::Journal, Operation::Write),
            9 => (Part::Journal, Operation::Flush),
            10 => (Part::Preserved, Operation::Write),
            _ => (Part::Changed, Operation::Write),
        };
        let errno = self.chance.pick(&[EIO, ENOSPC]);
        self.note(|| format!("a fault of the backup's {part:?} is to come: {operation:?}"));
        self.backup.troubles.arm(part, operation, errno);
    }
}
