//! One life: a setting, its steps, its end.
//!
//! Guarantees: the seed decides everything; the beginning of a life is the same however many steps
//! follow, so that a failing one can be shortened.
//! Does not know: who counts.

use std::sync::atomic::AtomicU64;

use super::chance::Chance;
use super::rare::Counts;
use super::setting::Setting;
use super::steps::STEPS;
use super::trace::Trace;
use super::world::World;

/// See the module.
pub struct Life {
    pub world: World,
}

/// What a life that went well came through.
#[derive(Debug)]
pub struct Lived {
    pub operations: u64,
    pub rare: Counts,
}

impl Life {
    pub fn new(seed: u64, clock: &'static AtomicU64, trace: Trace) -> Self {
        let mut chance = Chance::new(seed);
        let setting = Setting::new(&mut chance);
        trace.note(|| format!("{setting:?}"));
        Self { world: World::new(setting, chance, clock, trace) }
    }

    /// Lives through all of it, or only the first steps and the end. Panics where a law is broken.
    pub fn live(mut self, steps_max: u64) -> Lived {
        let operations = self.world.setting.steps.min(steps_max);
        for _ in 0..operations {
            if self.world.is_over {
                break;
            }
            self.step();
        }
        if !self.world.is_over {
            self.end();
        }
        let mut rare = self.world.rare;
        rare.add(&self.world.works.take_rare());
        Lived { operations, rare }
    }

    fn step(&mut self) {
        let world = &mut self.world;
        let (step, ..) = STEPS[world.chance.weighted(&world.setting.weights)];
        world.take(step);
        world.note(|| format!("{step:?}: {}", world.planes()));
        for _ in 0..world.chance.below(world.setting.works_max) {
            if !world.work() {
                break;
            }
        }
    }
}
