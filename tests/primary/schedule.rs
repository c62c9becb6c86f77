//! One random life of a volume: a beginning, some hundred steps, an end that must be mirrored.
//!
//! Guarantees: the seed decides everything; each life has its own mixture of what may happen, so
//! that rare things meet often.
//! Does not know: how the world works.

use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::units::{BlockSize, Geometry, MIB};
use dualrestore::volume::primary::{Event, LagBound, MirrorPolicy, Options};

use crate::backup::{LANES, Lane};
use crate::medium::fault;
use crate::world::{Beginning, Job, Trace, World};
use dualrestore::sim::Chance;
use dualrestore::sim::stamp::{self, SECTOR};

/// Steps after which a life that does not come to rest is taken for stuck.
const END_STEPS_MAX: usize = 40_000;
/// The first bit of a map page that lies in the second sector of its slot.
const PAGE_BREAK: u64 = (512 - 64) * 8;
const OUTSTANDING_MAX: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Request,
    Local,
    Apply,
    Pay,
    Serve,
    Receive,
    Tick,
    LinkUp,
    LinkDown,
    Late,
    Drain,
    CrashBackup,
    Crash,
    Merge,
    TakeBundle,
    Cut,
    Hydrate,
    MarkUnsent,
    Watch,
    Attach,
    Detach,
    Vouch,
    Fault,
}

/// Each step with how likely it is, and how many lives in eight have it at all.
const STEPS: [(Step, u64, u64); 23] = [
    (Step::Request, 120, 8),
    (Step::Local, 200, 8),
    (Step::Apply, 60, 8),
    (Step::Pay, 40, 8),
    (Step::Serve, 60, 8),
    (Step::Receive, 90, 8),
    (Step::Tick, 25, 7),
    (Step::LinkUp, 20, 8),
    (Step::LinkDown, 6, 5),
    (Step::Late, 5, 3),
    (Step::Drain, 10, 4),
    (Step::CrashBackup, 5, 4),
    (Step::Crash, 7, 5),
    (Step::Merge, 20, 4),
    (Step::TakeBundle, 6, 4),
    (Step::Cut, 5, 2),
    (Step::Hydrate, 8, 4),
    (Step::MarkUnsent, 4, 1),
    (Step::Watch, 12, 2),
    (Step::Attach, 10, 4),
    (Step::Detach, 4, 3),
    (Step::Vouch, 10, 4),
    (Step::Fault, 8, 3),
];

/// A life under way.
pub struct Life {
    pub world: World,
    chance: Chance,
    weights: Vec<u64>,
    /// Kinds of requests: read, write, zeroes, trim, cache, flush.
    requests: [u64; 6],
}

fn geometry(chance: &mut Chance) -> Geometry {
    let small = SECTOR * (3 + chance.below(22));
    let block = chance.pick(&[512, 1024, 1024, 2048, 4096]);
    // Seldom more than one hot extent, or a map page whose bits lie in several sectors, which a
    // crash can tear: those volumes are slower to go through.
    let (size, block) = match chance.below(16) {
        0 => (MIB + chance.below(6) * SECTOR + SECTOR, block << 6),
        1 => (2 * MIB + chance.below(6) * SECTOR + SECTOR, 512),
        _ => (small, block),
    };
    Geometry::new(size, BlockSize::new(block).expect("a power of two")).expect("valid")
}

fn window(geometry: Geometry) -> Vec<u64> {
    let sectors = geometry.size() / SECTOR;
    let border = MIB / SECTOR;
    match sectors {
        0..64 => (0..sectors).collect(),
        // The beginning, where the second hot extent begins, the end.
        _ if geometry.block_size().bytes() > 512 => (0..6).chain(border - 8..sectors).collect(),
        // And where the second sector of a map page begins.
        _ => [0..4, border - 2..border + 2, PAGE_BREAK - 3..PAGE_BREAK + 3, 2 * border..sectors]
            .into_iter()
            .flatten()
            .collect(),
    }
}

fn beginning(seed: u64, chance: &mut Chance) -> Beginning {
    let geometry = geometry(chance);
    let blocks = geometry.blocks();
    let backup = !chance.one_in(10);
    let window = window(geometry);
    let per_block = geometry.block_size().bytes() / SECTOR;
    let mut touched: Vec<u64> = window.iter().map(|at| at / per_block).collect();
    touched.dedup();
    let lost = match chance.below(4) {
        0 => vec![],
        1 => touched.into_iter().filter(|_| chance.one_in(2)).collect(),
        2 => (0..blocks).collect(),
        _ => touched,
    };
    let bound = LagBound {
        bytes: chance.pick(&[1024, 4096, MIB]),
        ms: chance.pick(&[100, 2_000, 1_000_000]),
    };
    Beginning {
        geometry,
        options: Options {
            policy: chance.pick(&[
                MirrorPolicy::Flush,
                MirrorPolicy::Flush,
                MirrorPolicy::Write,
                MirrorPolicy::Async(bound),
            ]),
            backup,
            strict: chance.one_in(5),
            missing_deadline_ms: chance.pick(&[300, 5_000, 1_000_000]),
        },
        window,
        backup_empty: backup && chance.one_in(6),
        lost,
        seed,
    }
}

impl Life {
    pub fn new(seed: u64, trace: Trace) -> Self {
        let mut chance = Chance::new(seed);
        let beginning = beginning(seed, &mut chance);
        let weights = STEPS.map(|(_, weight, lives)| {
            let has = chance.below(8) < lives;
            let scale = 1 + chance.below(4);
            if has { weight * scale } else { 0 }
        });
        let requests = [30, 40, 8, 8, 3, 12].map(|weight| weight * chance.below(3));
        let mut life = Self {
            world: World::new(beginning, trace),
            chance,
            weights: weights.to_vec(),
            requests,
        };
        life.requests[1] += 1;
        life.world.link.supersedes = life.chance.one_in(2);
        life.world.note(|| format!("{:?}", life.world.beginning));
        life
    }

    pub fn steps(&mut self) -> u64 {
        20 + self.chance.below(280)
    }

    pub fn step(&mut self) {
        let (step, ..) = STEPS[self.chance.weighted(&self.weights)];
        self.take(step);
    }

    fn take(&mut self, step: Step) {
        let backup = self.world.beginning.options.backup;
        let up = self.world.link.up;
        match step {
            Step::Request if self.world.outstanding() < OUTSTANDING_MAX => self.request(),
            Step::Local if !self.world.items.is_empty() => {
                let index = self.chance.index(self.world.items.len());
                self.world.step(index);
            }
            Step::Apply => {
                self.world.link.apply_next(&mut self.world.backup, &mut self.chance);
            }
            Step::Pay => self.world.link.pay(),
            Step::Serve => self.serve(),
            Step::Receive => {
                let lane = self.chance.pick(&LANES);
                self.world.receive(lane);
            }
            Step::Tick => self.tick(),
            Step::LinkUp if backup && !up => self.world.link_up(),
            Step::LinkDown if up => self.world.link_down(),
            Step::Late if !self.world.link.late.is_empty() => {
                let index = self.chance.index(self.world.link.late.len());
                let event = self.world.link.late.swap_remove(index);
                self.world.event(event);
            }
            Step::Drain if !up => self.world.link.drain_one(&mut self.world.backup),
            Step::CrashBackup => self.world.crash_backup(),
            Step::Crash => self.world.crash(&mut self.chance),
            Step::Merge => self.merge(),
            Step::TakeBundle if backup && self.world.bundle.is_some() => self.world.take_bundle(),
            Step::Cut if up => {
                self.world.cut();
            }
            Step::Hydrate => {
                let enabled = self.chance.one_in(2);
                self.world.event(Event::Hydrate { enabled });
            }
            Step::MarkUnsent if backup => self.mark_unsent(),
            Step::Watch => self.watch(),
            Step::Attach => self.attach(),
            Step::Detach => {
                let ids = self.world.shelf.ids();
                if !ids.is_empty() {
                    let id = self.chance.pick(&ids);
                    self.world.detach(id);
                }
            }
            Step::Vouch => {
                for id in self.world.shelf.ids() {
                    self.world.vouch(id);
                }
            }
            Step::Fault => self.fault(),
            _ => {}
        }
    }

    fn tick(&mut self) {
        // Now and then long enough for an extent to cool.
        let most = if self.chance.one_in(4) { 6_000 } else { 1_500 };
        self.world.now += 100 + self.chance.below(most);
        self.world.event(Event::Tick);
    }

    fn serve(&mut self) {
        let lane = if self.chance.one_in(2) { Lane::Demand } else { Lane::Bulk };
        let ready = self.world.link.ready_fetches(&self.world.backup, lane);
        if !ready.is_empty() {
            let at = self.chance.pick(&ready);
            let fails = self.weight_of(Step::Fault) > 0 && self.chance.one_in(20);
            self.world.link.serve(&self.world.backup, lane, at, fails);
        }
    }

    fn weight_of(&self, step: Step) -> u64 {
        let at = STEPS.iter().position(|(held, ..)| *held == step).expect("every step is listed");
        self.weights[at]
    }

    /// Consecutive sectors of the window.
    fn range(&mut self) -> ByteRange {
        let window = &self.world.beginning.window;
        let first = self.chance.index(window.len());
        let rest = &window[first..];
        let run = rest.iter().zip(rest[0]..).take_while(|(at, want)| **at == *want).count();
        let most = if self.chance.one_in(6) { run } else { run.min(5) };
        let length = 1 + self.chance.index(most);
        ByteRange::new(rest[0] * SECTOR, length as u64 * SECTOR)
    }

    fn request(&mut self) {
        let range = self.range();
        let force_unit_access = self.chance.one_in(8);
        match self.chance.weighted(&self.requests) {
            0 => self.world.read(range),
            1 => {
                let values: Vec<_> = if self.chance.one_in(4) {
                    // What the backup holds: a comparison finds it equal.
                    self.world.there(range)
                } else {
                    stamp::sectors(range).map(|_| self.world.new_value()).collect()
                };
                self.world.write(range, &values, force_unit_access)
            }
            2 => self.world.write_zeroes(range, force_unit_access),
            3 => self.world.trim(range, force_unit_access),
            4 => self.world.cache(range),
            _ => self.world.flush(),
        };
    }

    fn blocks(&mut self) -> BlockRange {
        let range = self.range();
        self.world.geometry().touched(range)
    }

    fn merge(&mut self) {
        let blocks = self.blocks();
        let old = self.world.link.up && self.world.bundle.is_some() && self.chance.one_in(4);
        self.world.merge_from(blocks, old);
    }

    /// A medium with some blocks, now and then one of an earlier generation.
    fn attach(&mut self) {
        const MEDIA_MAX: usize = 3;
        if self.world.shelf.ids().len() >= MEDIA_MAX || self.world.bundle.is_none() {
            return;
        }
        let coverage = match self.chance.below(3) {
            0 => vec![self.blocks()],
            _ => vec![self.world.geometry().all_blocks()],
        };
        if self.chance.one_in(3) {
            self.world.attach_old(coverage);
        } else {
            self.world.attach(coverage);
        }
    }

    /// Begins a comparison of some blocks with the backup, or ends it.
    fn watch(&mut self) {
        if self.world.is_watching() {
            self.world.end_watch();
        } else {
            let blocks = self.blocks();
            self.world.begin_watch(blocks);
        }
    }

    fn mark_unsent(&mut self) {
        let blocks = self.blocks();
        let now = dualrestore::clock::Instant(self.world.now);
        let mut actions = Vec::new();
        self.world.primary.mark_unsent(blocks, now, &mut actions);
        self.world.take(actions);
    }

    fn fault(&mut self) {
        match self.chance.below(15) {
            12.. => self.world.shelf.fault = Some(fault(&mut self.chance)),
            0..4 => self.world.volume.fail_next_read(),
            4..8 => self.world.volume.fail_next_write(),
            8 => self.world.volume.fail_next_flush(),
            9 => self.world.map_disk.fail_next_write(),
            10 => self.world.map_disk.fail_next_flush(),
            _ => self.world.intent_disk.fail_next_write(),
        }
    }

    // The end.

    /// Brings everything to rest and checks that both sides hold what they must.
    pub fn end(&mut self) {
        self.world.note(|| "the end begins".to_owned());
        self.world.volume.heal();
        self.world.map_disk.heal();
        self.world.intent_disk.heal();
        // What failed and was not yet reported may poison.
        while let Some(index) = self.world.items.iter().position(|item| item.done.is_some()) {
            self.world.step(index);
        }
        if self.chance.one_in(8) || self.world.primary.poisoned().is_some() {
            self.world.crash(&mut self.chance);
        }
        if self.world.beginning.options.backup {
            // A session without faults: what could not be read is tried again.
            if self.world.link.up && (self.weight_of(Step::Fault) > 0 || self.chance.one_in(2)) {
                self.world.link_down();
            }
            if !self.world.link.up {
                self.world.link_up();
            }
            self.rest();
            self.world.event(Event::Hydrate { enabled: true });
        }
        self.rest();
        if self.world.beginning.options.backup {
            self.check_mirrored();
        }
        self.world.flush();
        self.rest();
        assert!(self.world.oracle.is_quiet(), "every request is answered");
        self.check_contents();
    }

    fn is_at_rest(&self) -> bool {
        let world = &self.world;
        let settled = !world.beginning.options.backup
            || (world.primary.is_mirrored() || !world.primary.is_hydrating());
        world.items.is_empty() && world.link.is_quiet() && world.primary.is_idle() && settled
    }

    /// Everything that is under way ends, in any order; then time passes until nothing begins.
    fn rest(&mut self) {
        let mut calm = 0;
        for _ in 0..END_STEPS_MAX {
            if self.is_at_rest() {
                calm += 1;
                self.world.now += 1_500;
                self.world.event(Event::Tick);
                if calm > 6 {
                    return;
                }
                continue;
            }
            calm = 0;
            let choice = self.chance.below(9);
            let step =
                [Step::Local, Step::Apply, Step::Pay, Step::Serve, Step::Receive, Step::Tick]
                    [choice.min(8) as usize % 6];
            match step {
                Step::Serve => self.serve_all(),
                step => self.take(step),
            }
        }
        panic!("the volume does not come to rest: {:?}", self.stuck());
    }

    fn serve_all(&mut self) {
        for lane in [Lane::Demand, Lane::Bulk] {
            let ready = self.world.link.ready_fetches(&self.world.backup, lane);
            if !ready.is_empty() {
                let at = self.chance.pick(&ready);
                self.world.link.serve(&self.world.backup, lane, at, false);
            }
        }
    }

    fn stuck(&self) -> Vec<String> {
        let world = &self.world;
        let jobs = world.items.iter().map(|item| match &item.job {
            Job::Read { .. } => "read",
            Job::Write { .. } => "write",
            Job::Digest { .. } => "digest",
            Job::Flush => "flush",
            Job::Commit { .. } => "commit",
            Job::Record { .. } => "record",
            Job::Merge { .. } => "merge",
            Job::Medium { .. } => "medium",
        });
        let mut words: Vec<String> = jobs.map(str::to_owned).collect();
        words.push(format!("link quiet: {}", world.link.is_quiet()));
        words.push(format!("resyncing: {}", world.primary.is_resyncing()));
        words.push(format!("hydrating: {}", world.primary.is_hydrating()));
        words.push(format!("idle: {}", world.primary.is_idle()));
        words.push(format!("outstanding: {}", world.outstanding()));
        words.push(format!("missing: {}", world.map.missing_bytes()));
        words.push(format!("unsent: {}", world.map.unsent_bytes()));
        words
    }

    /// Law 10: both sides hold the same, durably at the backup.
    fn check_mirrored(&self) {
        let world = &self.world;
        assert!(world.primary.is_mirrored(), "with everything done: {:?}", self.stuck());
        let (here, there) = (world.volume.visible(), world.backup.disk.durable());
        let sector = SECTOR as usize;
        let different = here.chunks(sector).zip(there.chunks(sector)).position(|(a, b)| a != b);
        if let Some(at) = different {
            let span = at * sector..(at + 1) * sector;
            panic!(
                "mirrored, but sector {at} holds {} here and {} there",
                stamp::value(&here[span.clone()]),
                stamp::value(&there[span])
            );
        }
    }

    fn check_contents(&self) {
        let world = &self.world;
        let here = world.volume.visible();
        for at in world.oracle.sectors() {
            let start = at * SECTOR;
            let block = world.geometry().touched(ByteRange::new(start, SECTOR));
            if world.map.current().all_equal(block, true) {
                let span = start as usize..(start + SECTOR) as usize;
                world.oracle.check_settled(at, stamp::value(&here[span]));
            }
        }
        world.check_backup();
    }
}
