//! The end of a life: nothing fails any more, both sides come to hold the same, and that is proven.
//!
//! Does not know: what came before.

use super::life::Life;
use super::stamp::{self, SECTOR};
use super::world::World;
use crate::extent::ByteRange;
use crate::volume::primary::{Caller, Event};

/// Rounds after which a life that does not come to rest is taken for stuck.
const ROUNDS_MAX: usize = 400;
/// Things that may happen before it is asked what has failed.
const LATE_WORKS_MAX: usize = 2_000;
/// Things that happen in one round, at the most.
const WORKS_MAX: usize = 100_000;

impl Life {
    /// Brings everything to rest and checks that both sides hold what they must (laws 3 and 10).
    pub fn end(&mut self) {
        let world = &mut self.world;
        world.note(|| "the end begins".to_owned());
        world.mend();
        world.rest();
        world.flush();
        world.rest();
        assert!(world.oracle.is_quiet(), "every request is answered: {}", world.describe());
        world.check_mirrored();
        world.check_contents();
        world.check_snapshots();
        world.compare();
    }
}

impl World {
    /// Nothing fails from here on; what had failed is started again.
    fn mend(&mut self) {
        for power in [&self.primary.power, &self.backup.power] {
            power.fail_after(u64::MAX);
        }
        self.primary.troubles.disarm();
        self.backup.troubles.disarm();
        self.end_merge();
        self.works.go_on();
        self.parted = false;
        // What had failed before and is not told yet.
        for _ in 0..LATE_WORKS_MAX {
            if !self.work() {
                break;
            }
        }
        let (poisoned, stopped) = self.note_stopped();
        let refuses = self.primary.driver().is_some_and(|driver| driver.refusal().is_some());
        if poisoned || refuses || self.chance.one_in(8) {
            self.crash_primary();
        }
        if stopped | self.stores_troubled | self.make_room() {
            self.crash_backup();
        }
        // What could not be read is tried again in a new session.
        if self.chance.one_in(2) {
            self.works.cut_all(super::wire::Cut::Reset, false);
        }
        self.look();
    }

    fn is_mirrored(&self) -> bool {
        let running = self.primary.running.as_ref();
        running.is_some_and(|running| running.volume.status().mirrored)
    }

    /// Everything that is under way ends, in any order; time passes until both sides are the same.
    fn rest(&mut self) {
        let mut calm = 0;
        for _ in 0..ROUNDS_MAX {
            self.connect();
            self.say_the_word();
            if let Some(driver) = self.primary.driver().filter(|_| !self.is_hydrating()) {
                driver.event(Event::Hydrate { enabled: true }, Caller::Other);
            }
            for _ in 0..WORKS_MAX {
                if !self.work() {
                    break;
                }
            }
            if self.is_mirrored() && self.outstanding() == 0 {
                calm += 1;
                if calm > 3 {
                    return;
                }
            }
            self.pass(400);
        }
        panic!("the volume does not come to rest: {}", self.describe());
    }

    fn is_hydrating(&self) -> bool {
        let driver = self.primary.driver();
        driver.is_some_and(|driver| {
            driver.map().missing_bytes() == 0
                || driver.with_machine(|machine, _, _| machine.is_hydrating())
        })
    }

    fn describe(&self) -> String {
        let running = self.primary.running.as_ref();
        let status = running.map(|running| running.volume.status());
        let side = running.and_then(|running| running.hub.primary(&running.volume));
        let problem = side.and_then(|side| side.problem());
        format!(
            "{} outstanding, wires {}, {status:?}, link: {problem:?}, backup: {:?}",
            self.outstanding(),
            self.works.wires(),
            self.backup.volume().and_then(|volume| volume.failure())
        )
    }

    /// Law 10: both sides hold the same, durably at the backup.
    fn check_mirrored(&self) {
        assert!(self.is_mirrored(), "with everything done: {}", self.describe());
        let here = self.primary.disk.contents();
        for at in 0..self.setting.geometry.size() / SECTOR {
            let start = (at * SECTOR) as usize;
            let held = &here[start..start + SECTOR as usize];
            let there = self.backup.disk.may(at);
            assert!(
                there.iter().all(|sector| sector[..] == *held),
                "mirrored, but sector {at} holds {} here and {:?} there",
                stamp::value(held),
                there.iter().map(|sector| stamp::value(sector)).collect::<Vec<_>>()
            );
        }
    }

    fn check_contents(&self) {
        let here = self.primary.disk.contents();
        let driver = self.primary.driver().expect("it is mirrored");
        for at in self.oracle.sectors() {
            let sector = ByteRange::new(at * SECTOR, SECTOR);
            let block = self.setting.geometry.touched(sector);
            assert!(driver.map().current().all_equal(block, true), "nothing is missing");
            let span = sector.offset as usize..sector.end() as usize;
            self.oracle.check_settled(at, stamp::value(&here[span]));
        }
        self.check_backup();
    }
}
